"""What else is told the metrics of a run: the same numbers, once each, as one run; and no run ends because of it."""

import json
import os
from importlib.util import find_spec

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oomless.config import DataSource, TrainConfig
from oomless.config.running import TRACKERS
from oomless.errors import ConfigError
from oomless.training import loop
from oomless.training.checkpoint import delete


class Ear(loop.Listener):
    """Remembers what a run says."""

    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)


def train(model, corpus, out, **settings):
    ear = Ear()
    defaults = dict(max_seq_length=32, max_steps=4, save_steps=2, learning_rate=1e-2, eval_fraction=0.1)
    loop.train(
        TrainConfig(
            model=str(model),
            data=(DataSource(path=str(corpus)),),
            output_dir=str(out),
            gpu="cpu",
            **{**defaults, "max_eval_blocks": 2, **settings},
        ),
        ear,
    )
    return ear.heard


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]


def told(out):
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_reads_what_metrics_say_once_after_a_resume_too(make_checkpoint, corpus, tmp_path):
    settings = dict(report_to="tensorboard", sample_prompts=("def",), sample_tokens=2)
    train(make_checkpoint("llama"), corpus, tmp_path, **settings)
    first = [(event.step, event.value) for event in told(tmp_path).Scalars("loss")]
    assert first == metrics(tmp_path)
    # As if it had been killed after its fourth step and before that was saved: the third and fourth are trained again.
    for name in ("checkpoint-4", "model"):
        delete(tmp_path / name)
    assert "resumed from checkpoint-2" in train(make_checkpoint("llama"), corpus, tmp_path, resume=True, **settings)
    events = told(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == metrics(tmp_path) == first
    assert {"eval_loss/library.jsonl", "bits_per_byte/library.jsonl"} <= set(events.Tags()["scalars"])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_what_cannot_be_told_is_said_once_and_ends_no_run(make_checkpoint, corpus, tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    heard = train(make_checkpoint("llama"), corpus, tmp_path, report_to="tensorboard")
    said = [message for message in heard if "tensorboard" in message]
    assert len(said) == 1
    assert said[0].startswith("tensorboard is told no more of this run: ")
    assert said[0].endswith("The run goes on; metrics.jsonl has everything.")
    assert len(metrics(tmp_path)) == 4


@pytest.mark.parametrize("name", [name for name in TRACKERS if find_spec(name) is None])
def test_what_is_not_installed_is_said_before_anything_is_begun(make_checkpoint, corpus, tmp_path, name):
    with pytest.raises(ConfigError, match=rf"install oomless\[{name}\]"):
        train(make_checkpoint("llama"), corpus, tmp_path / "run", report_to=f"tensorboard,{name}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of their own libraries
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_others_go_on_with_the_same_run_offline(make_checkpoint, corpus, tmp_path, name, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run, known = tmp_path / "run", []
    for steps in (2, 4):
        heard = train(
            make_checkpoint("llama"),
            corpus,
            run,
            report_to=name,
            max_steps=steps,
            resume=steps == 4,
            lr_scheduler_type="constant",
        )
        assert not [message for message in heard if "told no more" in message]
        known.append(json.loads((run / "trackers.json").read_text())[name])
    assert known[0] == known[1]
    if name == "mlflow":
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(known[0], "loss")
        assert [(metric.step, metric.value) for metric in history] == metrics(run)
    elif name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        logs = [line for line in SQLiteStorage.get_logs("oomless", known[0]) if "loss" in line]
        assert [(line["step"], line["loss"]) for line in logs] == metrics(run)
    else:
        assert (
            len([path for path in os.listdir(run / "wandb") if path.startswith("offline-run-") and known[0] in path])
            == 2
        )
