"""The claims of docs/recovery.md and docs/survival.md at their full length, which the tests make in a short form.

python bench/survival.py faults     every allocation of a step in every mode, hundreds in a larger model and in whole runs
python bench/survival.py survival   200 kills, a full disk at every page, 400 flips and cuts, a soak of 2,000 steps

Runs the tests themselves with --full-length, and keeps what they counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from provenance import write

ROOT = Path(__file__).parent.parent
GUARD, RUNS, SURVIVAL = (f"tests/training/test_{name}.py" for name in ("guard", "faults_in_runs", "survival"))
TESTS = {
    "faults": [
        f"{GUARD}::test_a_fault_at_any_allocation_changes_no_bit",
        f"{GUARD}::test_a_fault_in_a_larger_model",
        f"{RUNS}::test_no_mode_ends_the_run",
    ],
    "survival": [
        f"{SURVIVAL}::test_killed_at_random_moments",
        f"{SURVIVAL}::test_disk_full_at_every_page_and_every_file",
        f"{SURVIVAL}::test_every_flip_and_cut_is_noticed",
        f"{SURVIVAL}::test_soak",
    ],
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in TESTS:
        raise SystemExit(f"one of {', '.join(TESTS)} must be named")
    name = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["--full-length", "-q", "-m", "", "-p", "no:cacheprovider", "--timeout=7200", f"--junitxml={report}"]
        code = subprocess.run([sys.executable, "-m", "pytest", *TESTS[name], *options], cwd=ROOT).returncode
        rows = []
        for case in ElementTree.parse(report).iter("testcase"):
            counted = {p.get("name", ""): int(p.get("value", "0")) for p in case.iter("property")}
            failed = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
            seconds = round(float(case.get("time", "0")), 1)
            rows.append({"test": case.get("name"), "passed": not failed, "seconds": seconds, **counted})
    print(f"written to {write(f'survival_{name}', {'tests': rows})}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
