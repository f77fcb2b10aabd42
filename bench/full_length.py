"""Claims of the documentation at their full length, which the tests make in a short form.

python bench/full_length.py CLAIM ...
python bench/full_length.py CLAIM:FROM-TO ...

Runs the tests themselves with --full-length, and keeps what they counted in a result for each claim. Of one that takes hours a
range of its tests can be run at a time, which takes its place among those that ran before; the result says of how many.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from provenance import RESULTS, provenance, write

ROOT = Path(__file__).parent.parent
CLAIMS = {
    "faults_in_steps": "training/test_guard.py::test_a_fault_at_any_allocation_changes_no_bit",
    "faults_in_a_larger_model": "training/test_guard.py::test_a_fault_in_a_larger_model",
    "faults_in_runs": "training/test_faults_in_runs.py::test_no_mode_ends_the_run",
    "faults_in_pairs": "training/test_faults_in_runs.py::test_no_two_techniques_end_the_run",
    "faults_in_processes": "training/test_recovering_together.py::test_no_fault_in_one_of_three_changes_a_bit",
    "machines": "training/test_several_machines.py",
    "nothing_lives_on": "training/test_nothing_lives_on.py",
    "settings_alone": "settings/test_every_setting.py::test_a_setting_alone",
    "settings_together": "settings/test_every_setting.py::test_settings_together",
    "kills": "training/test_survival.py::test_killed_at_random_moments",
    "full_disks": "training/test_survival.py::test_disk_full_at_every_page_and_every_file",
    "damage": "training/test_survival.py::test_every_flip_and_cut_is_noticed",
    "exports_killed": "export/test_export.py::test_killed_at_every_moment_it_goes_on",
    "exports_on_full_disks": "export/test_export.py::test_a_disk_that_is_full_or_read_only",
    "exports_in_every_form": "export/test_gguf.py::test_every_mode_in_every_form",
    "llama_cpp": "export/test_llama_cpp.py",
    "soak": "training/test_survival.py::test_soak",
    "picks": "planning/test_search.py::test_the_pick_is_the_best_of_all",
    "real_errors": "diagnosis/test_real.py::test_real_errors_of_every_kind",
    "real_errors_of_tools": "diagnosis/test_real_tools.py::test_what_asked_is_named",
    "monotone": "planning/test_monotone.py",
    "plans": "planning/test_search.py::test_the_pick_trains_and_the_next_better_runs_out",
}


def main() -> None:
    asked = [argument.partition(":") for argument in sys.argv[1:]]
    if not asked or {claim for claim, _, _ in asked} - CLAIMS.keys():
        raise SystemExit(f"claims are {', '.join(CLAIMS)}")
    raise SystemExit(max(check(claim, span) for claim, _, span in asked))


def check(claim: str, span: str = "") -> int:
    """Run the tests of ``claim``, or those of ``span``, at full length, write what they counted, and return pytest's exit code."""
    tests, before = [f"tests/{CLAIMS[claim]}"], {}
    every = collected(tests[0])
    if span:
        first, last = map(int, span.split("-"))
        tests = every[first:last]
        path = RESULTS / f"full_length_{claim}.json"
        before = {row["test"]: row for row in json.loads(path.read_text())["tests"]} if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = pytest(*tests, "-o", "junit_family=xunit1", "--timeout=7200", f"--junitxml={report}").returncode
        commit = {"commit": provenance()["commit"]} if span else {}
        rows = before | {row["test"]: row | commit for row in ran(report)}
    order = [test.partition("::")[2] for test in every]
    kept = sorted((row for name, row in rows.items() if name in order), key=lambda row: order.index(row["test"]))
    print(f"written to {write(f'full_length_{claim}', {'of_tests': len(every), 'tests': kept})}")
    return code


def pytest(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run pytest on tests of every length."""
    command = [sys.executable, "-m", "pytest", "--full-length", "-q", "-m", "", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, **how)


def collected(test: str) -> list[str]:
    """Return the names of the tests that ``test`` stands for."""
    said = pytest(test, "--collect-only", capture_output=True)
    return [line for line in said.stdout.splitlines() if "::" in line]


def ran(report: Path) -> list[dict[str, Any]]:
    """Return a row for each test that pytest's ``report`` has."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        counted = {p.get("name", ""): int(p.get("value", "0")) for p in case.iter("property")}
        failed = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        seconds = round(float(case.get("time", "0")), 1)
        rows.append({"test": case.get("name"), "passed": not failed, "seconds": seconds, **counted})
    return rows


if __name__ == "__main__":
    main()
