"""``oomless report``: a run as one page, from the run folder alone."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from tests.cli.test_cli import oomless

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.report.charts import Chart, Line, draw
from oomless.report.run import read_run, run_page
from oomless.training.loop import train

HOSTILE = "<script>alert(1)</script>\"' onload=x \u202e\x1b[2J"
VOID = {"meta", "line", "path", "rect", "circle"}


class Outline(HTMLParser):
    """The elements of a page, with a check that every one is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def folder_with(path, records, config="model: m\n", prediction=None):
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "config.yaml").write_text(config)
    if prediction is not None:
        (path / "prediction.json").write_text(json.dumps(prediction))
    return path


def test_a_real_run(make_checkpoint, corpus, tmp_path):
    """Trained by the command line in a virtual GPU: the page has its curves, and the prediction beside what was measured."""
    run = tmp_path / "run"
    settings = ("--max-seq-length", 32, "--max-steps", 3, "--learning-rate", "1e-3", "--dtype", "fp32", "--as-given")
    settings += ("--sample-prompts", "def main(", "--sample-prompts", "import", "--sample-tokens", 4)
    where = ("--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", run, "--gpu", "virtual:256MiB")
    trained = oomless("train", *where, *settings)
    assert trained.returncode == 0, trained.stderr
    result = oomless("report", run)
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert re.search(r"Peak memory \S+ \S+ allocated, predicted \S+ \S+ \([+-]\d", said), said
    prediction = json.loads((run / "prediction.json").read_text())
    peak = max(
        json.loads(line).get("peak_memory_bytes", 0) for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    assert prediction["profile"]["peak_allocated_bytes"] == peak
    page = (run / "report.html").read_text()
    outline = Outline(page)
    text = " ".join(outline.text)
    for part in (
        "Loss",
        "evaluation: library.jsonl",
        "Learning rate",
        "Tokens/s",
        "predicted peak",
        "max_steps: 3",
        "Written on the way",
        "after step 3",
    ):
        assert part in text, part
    assert outline.seen.count("svg") == 5
    assert "script" not in outline.seen
    assert not [value for name, value in outline.attributes if name in ("src", "href")]


def test_no_text_is_markup(tmp_path):
    """Names of sources, reasons and settings are whatever their authors wrote."""
    run = tmp_path / "<b onload=x>"
    run.mkdir()
    records = [
        {"step": 0, f"eval_loss/{HOSTILE}": 2.0},
        {"step": 1, "loss": 2.0},
        {"step": 1, "samples": [{"prompt": HOSTILE, "text": HOSTILE}, {"prompt": 1}, HOSTILE]},
        {"step": 1, "bad_step": HOSTILE, "answer": HOSTILE, "reason": HOSTILE},
        {"step": 2, "loss": 1.0, "oom_recoveries": 1, "recovery_rung": HOSTILE},
    ]
    page = run_page(read_run(folder_with(run, records, f"model: {HOSTILE}\ud800".encode(errors="replace").decode())))
    outline = Outline(page)
    assert not {"script", "b"} & set(outline.seen)
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in " ".join(outline.text)
    assert "after step 1" in outline.text
    assert "2 lines of metrics.jsonl could not be read" in page
    assert "Memory ran out 1 time, and the run went on." in page
    assert "\u202e" not in page
    assert "\x1b" not in page


def test_what_is_damaged_is_said(tmp_path):
    run = folder_with(tmp_path, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 2.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "4"}\n' + "[" * 100_000 + f'\n{{"step": 4, "loss": {10**400}}}\n{{"step": 5, "lo')
    page = run_page(read_run(run))
    assert "4 lines of metrics.jsonl could not be read" in page
    assert "Not finite, and not drawn: 1 value." in page
    assert "NaN" not in page


def test_a_long_run_is_small_and_keeps_its_spikes(tmp_path):
    """100,000 logged steps: below 1 MB, and the one loss of 9 is drawn at the top."""
    records = [
        {"step": n, "loss": 9.0 if n == 43_210 else 2.0, "learning_rate": 1e-4, "tokens_per_second": 5.0, "tokens": n}
        | {"memory_bytes": 1 << 20, "peak_memory_bytes": 1 << 21, "gradient_norm": 1.0}
        for n in range(1, 100_001)
    ]
    page = run_page(read_run(folder_with(tmp_path, records)))
    assert len(page.encode()) < 1_000_000
    path = re.search(r"<h2>Loss</h2>.*? d=\"M([^\"]+)\"", page)[1]
    places = [tuple(map(float, point.split())) for point in path.split("L")]
    top = [x for x, y in places if y == min(y for _, y in places)]
    assert len(top) == 1
    assert top[0] == pytest.approx(84 + 43_210 / 100_000 * (720 - 84 - 12), abs=0.2)


@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (-3.0, -3.0), (1e-30, 2e-30), (1e99, -1e99), (5e-324, 1e-323)])
def test_any_values_have_a_chart(values):
    drawn = draw(Chart(title="t", show=str, lines=[Line("a", list(enumerate(values)))]))
    assert "<svg" in drawn
    assert "nan" not in drawn


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        read_run(tmp_path)
    folder_with(tmp_path, [])
    assert "0 steps" in run_page(read_run(tmp_path))


def test_a_run_keeps_its_own_prediction_and_no_older_one(make_checkpoint, corpus, tmp_path):
    """It is that of the process that wrote the metrics last; where that one has none, there is none to compare with."""
    run = tmp_path / "run"
    settings = {"model": str(make_checkpoint("llama")), "data": str(corpus), "output_dir": str(run), "gpu": "cpu"}
    settings |= {"max_seq_length": 32, "max_steps": 1, "learning_rate": 1e-3, "dtype": "fp32", "eval_fraction": 0.0}
    train(TrainConfig.from_mapping(settings), prediction={"profile": {"peak_allocated_bytes": 12345}})
    assert read_run(run).predicted("profile", "peak_allocated_bytes") == 12345
    train(TrainConfig.from_mapping(settings | {"resume": True}))
    assert read_run(run).predicted("profile", "peak_allocated_bytes") is None


def test_of_what_was_written_the_first_and_the_last_are_kept(tmp_path):
    records = [
        {"step": n, "samples": [{"prompt": "def", "text": f" text {n}"}]} for n in (0, 10, 20, 20, 30, 40, 50, 60)
    ]
    logged = read_run(folder_with(tmp_path, records))
    many = {"step": 1, "samples": [{"prompt": "天" * 5000 + str(n), "text": "天" * 9000} for n in range(100)]}
    page = run_page(read_run(folder_with(tmp_path, [many, *({**many, "step": n} for n in range(2, 9))])))
    assert "The first 16 of 100 texts." in page
    assert len(page.encode()) < 1_000_000
    assert logged.samples == {"def": {n: f" text {n}" for n in (0, 20, 30, 40, 50, 60)}}
