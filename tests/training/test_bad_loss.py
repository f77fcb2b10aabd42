"""Steps whose loss or gradient is not finite, or far from what the run is used to: stopped, skipped or rewound."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import Loader
from oomless.errors import ConfigError, TrainingError
from oomless.training import loop
from oomless.training.bad_loss import FEWEST, BadLoss

SETTINGS = dict(max_seq_length=32, per_device_train_batch_size=2, max_steps=12, learning_rate=1e-2, eval_fraction=0.0)


class Ear(loop.Listener):
    """Remembers what a run says."""

    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)


def make_config(model, corpus, out, **settings):
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        **{"gpu": "cpu", **SETTINGS, **settings},
    )


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def poisoned(make_checkpoint, corpus, tmp_path, monkeypatch):
    """A model whose embedding of one token is NaN, and the only step of the first twelve in which that token occurs."""
    seen = []
    original = Loader.take

    def remember(self, count):
        blocks = original(self, count)
        seen.append({int(token) for block in blocks for token in block.input_ids})
        return blocks

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "take", remember)
        loop.train(make_config(make_checkpoint("llama"), corpus, tmp_path / "clean", max_steps=16))
    step = 7
    token = min(seen[step - 1] - set().union(*(tokens for place, tokens in enumerate(seen) if place != step - 1)))
    folder = shutil.copytree(make_checkpoint("llama"), tmp_path / "poisoned")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, step


def test_it_stops(poisoned, corpus, tmp_path):
    model, step = poisoned
    with pytest.raises(TrainingError, match=f"the loss of step {step} is nan.*set on_bad_loss to skip or rewind"):
        loop.train(make_config(model, corpus, tmp_path / "run"))


def test_a_model_that_came_with_nan_is_not_told_to_learn_more_slowly(make_checkpoint, corpus, tmp_path):
    folder = shutil.copytree(make_checkpoint("llama"), tmp_path / "spoilt")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError) as raised:
        loop.train(make_config(folder, corpus, tmp_path / "run"))
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in str(raised.value)
    assert "came with them" in str(raised.value)
    assert "Lower learning_rate" not in str(raised.value)


@pytest.mark.parametrize("save_steps", [None, 8])
def test_a_bad_step_between_two_lines_of_metrics_is_noticed(poisoned, corpus, tmp_path, save_steps):
    model, step = poisoned
    config = make_config(model, corpus, tmp_path / "run", logging_steps=12, save_steps=save_steps)
    with pytest.raises(
        TrainingError, match=f"before step {save_steps or 12} a loss or gradient was not finite in 1 step:"
    ):
        loop.train(config)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def everything(run):
    """All weights and optimizer states, by name; NaN compares as a number."""
    model, optimizer = run.assembly.model, run.assembly.optimizer
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": state for key, state in optimizer.state_tensors(parameter).items()}
    return {name: torch.nan_to_num(tensor, nan=1e9).clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "settings", [{}, dict(dtype="bf16", optimizer="adamw_8bit"), dict(gradient_accumulation_steps=2)]
)
def test_a_skipped_step_changes_nothing(poisoned, corpus, tmp_path, monkeypatch, settings):
    model, step = poisoned
    if settings.get("gradient_accumulation_steps"):
        settings = settings | {"per_device_train_batch_size": 1}
    runs = []
    original = loop.Run.__init__
    monkeypatch.setattr(loop.Run, "__init__", lambda self, *given: (original(self, *given), runs.append(self))[0])

    class Compares(Ear):
        def stepped(self, metrics):
            self.before = everything(runs[0])

        def said(self, message):
            super().said(message)
            after = everything(runs[0])
            assert all(torch.equal(self.before[name], after[name]) for name in after)

    ear = Compares()
    result = loop.train(make_config(model, corpus, tmp_path / "run", on_bad_loss="skip", **settings), ear)
    assert result.steps == 12
    assert ear.heard == [f"step {step} is bad: its loss is nan; it was skipped and changed nothing"]
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [
        s for s in range(1, 13) if s != step
    ]
    assert [line["bad_step"] for line in lines(tmp_path / "run") if line.get("answer") == "skip"] == [step]


@pytest.mark.parametrize(
    "settings", [{}, dict(optimizer_in_backward=True), dict(trainable="lora+lm_head", lora_dropout=0.1)]
)
def test_rewound_is_as_if_the_blocks_had_never_been_there(poisoned, corpus, tmp_path, monkeypatch, settings):
    model, step = poisoned
    out, reference = tmp_path / "run", tmp_path / "reference"
    ear = Ear()
    settings = dict(on_bad_loss="rewind", save_steps=4, **settings)
    assert loop.train(make_config(model, corpus, out, **settings), ear).steps == 12
    blocks = [2 * step - 2, 2 * step - 1]
    assert ear.heard == [f"step {step} is bad: its loss is nan; back to checkpoint-4, the step's 2 blocks left out"]
    assert [line["blocks"] for line in lines(out) if line.get("answer") == "rewind"] == [blocks]

    original = Loader.__init__

    def without(self, stream):
        original(self, stream)
        self.left_out = set(blocks)

    monkeypatch.setattr(Loader, "__init__", without)
    loop.train(make_config(model, corpus, reference, **settings))
    state = json.loads((out / "checkpoint-12" / "trainer" / "state.json").read_text())
    assert state["loader"]["left_out"] == blocks
    for name in ("trainer/optimizer.safetensors", "trainer/state.json"):
        ours, theirs = ((folder / "checkpoint-12" / name).read_bytes() for folder in (out, reference))
        assert ours == theirs.replace(str(reference).encode(), str(out).encode()), name
    assert [(x["step"], x["loss"]) for x in lines(out) if "loss" in x] == [
        (x["step"], x["loss"]) for x in lines(reference) if "loss" in x
    ]


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_five_in_a_row_end_the_run(make_checkpoint, corpus, tmp_path, policy):
    """With a learning rate that spoils every weight in a step, no block is to blame."""
    folder = shutil.copytree(make_checkpoint("llama"), tmp_path / "poisoned")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ear = Ear()
    with pytest.raises(TrainingError, match=r"is bad: its loss is nan \(bad for the 5th time in a row\)"):
        loop.train(make_config(folder, corpus, tmp_path / "run", on_bad_loss=policy, save_steps=50), ear)
    assert len(ear.heard) == 4


@pytest.fixture
def outlier(tmp_path):
    """A text that repeats one line, with something else after 40 blocks of it."""
    path = tmp_path / "text.txt"
    path.write_text(
        "for line in lines:\n" * 250 + "".join(map(chr, range(0x4E00, 0x4E40))) + "for line in lines:\n" * 250
    )
    return path


@pytest.mark.parametrize("policy", ["skip", "rewind", "stop"])
def test_an_exploding_loss(make_checkpoint, outlier, tmp_path, policy):
    """What is far above the median is skipped or rewound too, and only that."""
    settings = dict(bad_loss_factor=4.0, on_bad_loss=policy, shuffle=False, max_steps=60, save_steps=15)
    config = make_config(make_checkpoint("llama"), outlier, tmp_path / "run", **settings)
    ear = Ear()
    if policy == "stop":
        with pytest.raises(TrainingError, match="is 4 times the running median or more: the run was stopped"):
            loop.train(config, ear)
        return
    loop.train(config, ear)
    answers = [line for line in lines(tmp_path / "run") if "answer" in line]
    assert 1 <= len(answers) <= 4
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert max(losses[FEWEST:]) < 4
    resumed = TrainConfig.from_mapping(config.to_dict() | {"resume": True})
    shutil.rmtree(tmp_path / "run" / "checkpoint-60")
    before = load_file(tmp_path / "run" / "model" / "model.safetensors")
    loop.train(resumed, ear)
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_limits_need_some_steps_and_shrug_at_overflow():
    judge = BadLoss("skip", 2.0, dynamic_scale=True)
    for step in range(FEWEST):
        assert judge.limits() == (float("inf"), float("inf"))
        assert judge.judge(step, 1.0 + step / 100, 1.0) is None
    assert judge.limits() == (pytest.approx(2.19), 2.0)
    assert judge.judge(30, 1.0, float("inf")) is None
    assert "its loss, 2.5, is 2 times" in judge.judge(31, 2.5, 1.0)
    assert "its gradient norm, 2, is 2 times" in judge.judge(32, 1.0, 2.0)
    assert judge.in_a_row == 2
    assert judge.judge(33, 1.0, 1.0) is None
    assert judge.in_a_row == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(on_bad_loss="skip", optimizer_in_backward=True), "choose rewind or stop"),
        (dict(bad_loss_factor=1.0), "bad_loss_factor must be a number above 1; got 1.0"),
        (dict(preemption_grace_s=0.0), "preemption_grace_s must be a number above 0"),
        (dict(host_reserve_bytes=-1), "host_reserve_bytes must be at least 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model="m", data=(DataSource(path="d"),), output_dir="o", **settings)
