"""The docs say what the code does."""

import importlib
import json
import re
from pathlib import Path

import pytest

from oomless.report.reference import reference
from oomless.units import format_bytes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_reference_is_current():
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_exist(page):
    from oomless.config import TrainConfig

    known = {name.replace("_", "-") for name in TrainConfig.__dataclass_fields__} | {
        "help",
        "help-all",
        "config",
        "all",
    }
    known |= {"as-given", "host-memory", "prefer"}
    commands = re.findall(r"oomless train[^\n`]*(?:\\\n[^\n`]*)*", page.read_text(encoding="utf-8"))
    for option in re.findall(r"--([a-z-]+)", " ".join(commands)):
        assert option in known, option


@pytest.mark.parametrize(
    ("result", "page"),
    [
        ("equal_time", "planner"),
        ("seed_cases", "memory"),
        ("layer_bytes", "techniques"),
        ("loss_bytes", "techniques"),
        ("memory_table", "techniques"),
        ("packed_documents", "techniques"),
        ("plan_table", "planner"),
        ("public_speeds", "throughput"),
        ("several_gpus", "several_gpus"),
        ("selective_scan", "techniques"),
        ("update_bytes", "optimizers"),
    ],
)
def test_tables_are_those_that_were_measured(result, page):
    made = (ROOT / "bench" / "results" / f"{result}.md").read_text(encoding="utf-8").strip()
    assert made in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


STEPS_AND_RUNS = ("faults_in_steps", "faults_in_a_larger_model", "faults_in_runs")
EXPORTS = ("exports_killed", "exports_on_full_disks", "exports_in_every_form", "llama_cpp")
CLAIMS = (*STEPS_AND_RUNS, "kills", "full_disks", "damage", "soak", "picks", "plans", *EXPORTS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_at_full_length_were_kept(claim):
    result = f"full_length_{claim}.json"
    tests = json.loads((ROOT / "bench" / "results" / result).read_text(encoding="utf-8"))["tests"]
    assert tests
    assert all(test["passed"] for test in tests)
    assert any(result in page.read_text(encoding="utf-8") for page in PAGES)


def test_an_export_takes_less_than_pefts_merge():
    found = json.loads((ROOT / "bench" / "results" / "export_memory.json").read_text(encoding="utf-8"))
    ours, theirs = found["ours, verify none"], found["peft"]
    assert found["model_bytes"] > 4e9
    assert max(ours["peak_bytes"], found["ours, verify sample"]["peak_bytes"]) < 1e9 + 3 * found["largest_tensor_bytes"]
    assert ours["peak_bytes"] < theirs["peak_bytes"] / 4
    assert ours["seconds"] < theirs["seconds"]
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert f"holds {ours['peak_bytes'] / 1e9:.1f} GB" in page
    assert f"hold {theirs['peak_bytes'] / 1e9:.1f} GB" in page


def test_an_export_to_gguf_takes_three_tensors_and_a_gigabyte():
    found = json.loads((ROOT / "bench" / "results" / "export_memory_gguf.json").read_text(encoding="utf-8"))
    peak = max(taken["peak_bytes"] for form, taken in found.items() if form.startswith("gguf"))
    assert found["model_bytes"] > 4e9
    assert peak < 1e9 + 3 * found["largest_tensor_bytes"]
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert f"it holds {peak / 1e9:.1f} GB at most" in page


def test_readme_shows_what_was_measured_beside_the_trainer():
    parity, speed = (
        json.loads((ROOT / "bench" / "results" / f"trainer_{name}.json").read_text()) for name in ("parity", "speed")
    )
    difference = f"{parity['largest_difference']:.1e}"
    rows = [f"| {parity['ours'][-1]:.4f} | {parity['trainer'][-1]:.4f} | largest difference of any step {difference} |"]
    for case in ("full", "lm_head", "lm_head of a tied model"):
        rates, peaks = speed[case]["tokens_per_second"], speed[case]["tracked_peak_bytes"]
        rows.append(f"| {rates['ours']:,.0f} | {rates['trainer']:,.0f} | {speed[case]['speed_ratio']:.2f} x |")
        peak_row = " | ".join(format_bytes(peaks[program]) for program in ("ours", "trainer"))
        rows.append(f"| {peak_row} | {speed[case]['peak_ratio']:.2f} x |")
    table = re.findall(
        r"^\| (?:loss|everything|`lm_head`)[^|]*(\|.*\|)$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert table[-len(rows) :] == rows


def test_a_seed_case_still_comes_out_as_written(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    seed_cases = importlib.import_module("seed_cases")
    what, model, settings = seed_cases.CASES[2]
    line = seed_cases.row(what, model, seed_cases.planned(model, settings))
    assert line in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def test_the_errors_on_real_gpus_are_those_of_the_result(monkeypatch):
    """In docs/rehearse.md each row ends with the number of figures, the median and the worst error of the committed result."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    public_memory = importlib.import_module("public_memory")
    text = (ROOT / "docs" / "rehearse.md").read_text(encoding="utf-8")
    for source in json.loads(public_memory.KEPT.read_text(encoding="utf-8")).values():
        for count, *errors in public_memory.summary(source["rows"]).values():
            median, worst = (f"{100 * error:.2g} %" for error in errors)
            assert f"| {count} | {median} | {worst} |" in text
