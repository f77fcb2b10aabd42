"""Whole runs on real checkpoints and real text."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless import optim
from oomless.config import DataSource, TrainConfig
from oomless.data.loader import micro_batches
from oomless.errors import AuditError, CheckpointError, ConfigError, GradientOverflowError, TrainingError
from oomless.memory.device import Device
from oomless.training import loop, run_folder
from oomless.training.audit import TrainabilityAudit
from oomless.training.checkpoint import list_checkpoints

IDS = torch.arange(1, 21)[None] * 17 % 512


class Ear(loop.Listener):
    """Remembers what a run says."""

    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)


def config(model, corpus, out, **settings):
    defaults = dict(
        max_seq_length=64, per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, eval_fraction=0.1
    )
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        gpu="cpu",
        **{**defaults, **settings},
    )


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def live_logits(run):
    model = run.assembly.model.eval()
    return model(IDS, use_cache=False).logits


@pytest.fixture
def live_run(monkeypatch):
    """Runs a config and keeps the live ``Run`` for comparison with what it wrote."""
    runs = []
    original = loop.Run.__init__

    def remember(self, *arguments):
        original(self, *arguments)
        runs.append(self)

    monkeypatch.setattr(loop.Run, "__init__", remember)

    def run(configuration):
        result = loop.train(configuration)
        return runs[-1], result

    return run


def test_it_learns(make_checkpoint, corpus, tmp_path):
    result = loop.train(config(make_checkpoint("llama"), corpus, tmp_path, max_steps=30))
    assert result.eval_after["library.jsonl"] < result.eval_before["library.jsonl"] - 0.5
    assert (tmp_path / "config.yaml").is_file()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 31))
    assert result.tokens == metrics(tmp_path)[-1]["tokens"]


@pytest.mark.parametrize(
    "settings",
    [
        dict(trainable="full"),
        dict(trainable="lm_head", tied_weights="shared"),
        dict(trainable="lm_head", tied_weights="untied"),
        dict(trainable="embed_tokens", tied_weights="untied"),
        dict(trainable="model.layers.1.*"),
    ],
    ids=lambda s: "-".join(s.values()),
)
@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen2"])
def test_saved_model_is_the_live_model(make_checkpoint, corpus, tmp_path, live_run, architecture, settings):
    run, result = live_run(config(make_checkpoint(architecture, tied=True), corpus, tmp_path, **settings))
    for folder in (result.model_dir, list_checkpoints(tmp_path)[-1].folder):
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(plain(IDS).logits, live_logits(run), atol=1e-5, rtol=1e-4)
        untied = settings.get("tied_weights") == "untied"
        assert plain.config.tie_word_embeddings != untied
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == untied


@pytest.mark.parametrize("trainable", ["lora", "lora+lm_head+embed_tokens", "lora+lm_head"])
@pytest.mark.parametrize("extra", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora"])
def test_adapters_load_in_peft_and_merge(make_checkpoint, corpus, tmp_path, live_run, trainable, extra):
    base = make_checkpoint("llama")
    run, result = live_run(config(base, corpus, tmp_path, trainable=trainable, **extra))
    expected = live_logits(run)
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-3)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), list_checkpoints(tmp_path)[-1].folder
    )
    torch.testing.assert_close(adapted.eval()(IDS).logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen3"])
def test_accumulation_is_exact(make_checkpoint, corpus, tmp_path, architecture):
    """... with SGD, whose update is the gradient: AdamW's would make a whole step of the rounding of a gradient near zero."""
    outcomes = []
    for batch in (8, 4, 1):
        out = tmp_path / str(batch)
        loop.train(
            config(
                make_checkpoint(architecture, tied=True),
                corpus,
                out,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=8 // batch,
                optimizer="sgd",
                learning_rate=0.3,
                max_steps=4,
            )
        )
        outcomes.append(([line["loss"] for line in metrics(out)], load_file(out / "model" / "model.safetensors")))
    assert outcomes[0][0][-1] < outcomes[0][0][0] - 0.05
    for losses, weights in outcomes[1:]:
        assert losses == pytest.approx(outcomes[0][0], abs=2e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, outcomes[0][1][name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(gradient_accumulation_steps=2, optimizer="adafactor"),
        dict(gradient_accumulation_steps=2, dtype="fp16"),
        dict(trainable="lm_head", tied_weights="shared"),
        dict(trainable="lora+lm_head+embed_tokens", optimizer="adamw_8bit"),
    ],
    ids=lambda s: "-".join(map(str, s.values())) or "full",
)
def test_updates_in_backward_are_the_same_updates(make_checkpoint, corpus, tmp_path, settings):
    outcomes = []
    for in_backward in (False, True):
        out = tmp_path / str(in_backward)
        model = make_checkpoint("llama", tied="lora" not in settings.get("trainable", ""))
        loop.train(
            config(model, corpus, out, optimizer_in_backward=in_backward, max_grad_norm=0, max_steps=5, **settings)
        )
        outcomes.append(([line["loss"] for line in metrics(out)], load_file(out / "model" / "model.safetensors")))
    (losses, weights), (in_backward_losses, in_backward_weights) = outcomes
    assert losses == in_backward_losses
    assert weights.keys() == in_backward_weights.keys()
    assert all(torch.equal(weights[name], in_backward_weights[name]) for name in weights)


class TestFrozenPartsCostNothing:
    def test_no_graph_below_the_head(self, make_checkpoint, corpus, tmp_path, live_run):
        run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path, trainable="lm_head"))
        saved = []
        batches = list(micro_batches(run.loader.take(2), 2))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            run.assembly.step.accumulate(batches, 1)
        # What the loss itself keeps: the head's gradient. Nothing of the body has a width of 64 x 96 or 2 x 64 tokens.
        assert all(shape in ((512, 64), ()) for shape in saved), saved

    def test_backward_stops_at_the_lowest_trainable_layer(self, make_checkpoint, corpus, tmp_path, live_run):
        run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path, trainable="model.layers.1.*"))
        visited = set()
        for name, module in run.assembly.model.named_modules():
            if name in ("model.layers.0.mlp", "model.layers.1.mlp"):
                module.register_full_backward_hook(lambda *_, name=name: visited.add(name))
        run.assembly.step.accumulate(list(micro_batches(run.loader.take(2), 2)), 1)
        assert visited == {"model.layers.1.mlp"}


class TestAudit:
    def test_parameter_without_gradient_stops_the_run(self, make_checkpoint, corpus, tmp_path, monkeypatch):
        original = loop.assemble

        def with_an_orphan(*arguments, **keywords):
            from oomless.training.assemble import parameter_groups

            parts = original(*arguments, **keywords)
            parts.model.model.orphan = torch.nn.Parameter(torch.ones(3))
            parts.optimizer.add_param_group(
                {**parameter_groups(parts.model, arguments[1])[0], "params": [parts.model.model.orphan]}
            )
            return parts

        monkeypatch.setattr(loop, "assemble", with_an_orphan)
        with pytest.raises(AuditError, match=r"no gradient: model\.orphan"):
            loop.train(config(make_checkpoint("llama"), corpus, tmp_path))

    def test_parameter_in_no_group(self, make_checkpoint, corpus, tmp_path, live_run):
        run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path, trainable="lm_head"))
        run.assembly.model.model.norm.weight.requires_grad_(True)
        with pytest.raises(AuditError, match=r"model\.norm\.weight must be in 1 of the optimizer's groups; it is in 0"):
            TrainabilityAudit(run.assembly.model, run.assembly.optimizer, run.device)

    def test_frozen_parameter_that_moves(self, make_checkpoint, corpus, tmp_path, live_run):
        run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path, trainable="lm_head"))
        audit = TrainabilityAudit(run.assembly.model, run.assembly.optimizer, run.device)
        with torch.no_grad():
            run.assembly.model.model.norm.weight[3] += 1e-6
            run.assembly.model.lm_head.weight[3] += 1e-6
        audit.without_gradient.clear()
        with pytest.raises(AuditError, match=r"frozen but moved: model\.norm\.weight"):
            audit.after_step()

    def test_trainable_parameter_that_does_not_move(self, make_checkpoint, corpus, tmp_path):
        with pytest.raises(AuditError, match="no parameter moved in 5 steps; raise learning_rate"):
            loop.train(config(make_checkpoint("llama"), corpus, tmp_path, learning_rate=1e-30, max_steps=9))

    def test_parameter_without_updates(self, make_checkpoint, corpus, tmp_path, live_run):
        run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path))
        audit = TrainabilityAudit(run.assembly.model, run.assembly.optimizer, Device())
        audit.without_gradient.clear()
        run.assembly.optimizer.state[run.assembly.model.model.norm.weight]["step"].zero_()
        with torch.no_grad():
            run.assembly.model.lm_head.weight[3] += 1e-6
        assert not any(audit.after_step() for _ in range(4))
        with pytest.raises(
            AuditError, match=r"1 parameter should train but got no update in 5 steps: model\.norm\.weight"
        ):
            audit.after_step()

    def test_updates_too_small_for_some_weights_are_said(self, make_checkpoint, corpus, tmp_path):
        """LoRA's second matrix begins at 0, where any update counts; the first one's gradient is as small as the second is."""
        ear = Ear()
        settings = dict(optimizer="sgd", learning_rate=1e-3, max_steps=6, dtype="fp32", trainable="lora")
        result = loop.train(config(make_checkpoint("llama"), corpus, tmp_path, **settings), ear)
        assert result.steps == 6
        (said,) = [message for message in ear.heard if "did not move" in message]
        assert "lora_A" in said
        assert "lora_B" not in said

    def test_movement_below_sixteen_bits_counts(self, make_checkpoint, corpus, tmp_path):
        """Norms of 1 in bf16 stand still at this rate; their 8 bits of correction do not."""
        settings = dict(dtype="bf16", learning_rate=1e-4, max_steps=6)
        folder = make_checkpoint("llama")
        for way, said in (("correction", 0), ("plain", 1)):
            ear = Ear()
            loop.train(config(folder, corpus, tmp_path / way, weight_precision=way, **settings), ear)
            assert sum("norm.weight did not move" in message for message in ear.heard) == said

    @pytest.mark.parametrize("way", ["stochastic", "plain"])
    def test_a_norm_that_is_rounded_by_chance_may_rest_during_a_warmup(self, way):
        norm = torch.nn.RMSNorm(64, dtype=torch.bfloat16)
        optimizer = optim.build("adamw", norm.parameters(), lr=1e-8, weight_precision=way)
        audit = TrainabilityAudit(norm, optimizer, Device())
        with pytest.raises(AuditError, match="no parameter moved") if way == "plain" else nullcontext():
            for _ in range(5):
                norm(torch.randn(3, 64, dtype=torch.bfloat16)).sum().backward()
                optimizer.step()
                audit.after_step()
        assert torch.equal(norm.weight, torch.ones(64, dtype=torch.bfloat16))


class TestPrecision:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_sixteen_bit_learns_like_fp32(self, make_checkpoint, corpus, tmp_path, dtype):
        losses = {}
        for kind in ("fp32", dtype):
            settings = config(
                make_checkpoint("llama"), corpus, tmp_path / kind, dtype=kind, max_steps=20, learning_rate=3e-3
            )
            losses[kind] = loop.train(settings).eval_after["library.jsonl"]
        assert losses[dtype] == pytest.approx(losses["fp32"], rel=0.01)

    def test_lasting_fp16_overflow_names_the_module(self, make_checkpoint, corpus, tmp_path):
        folder = tmp_path / "overflowing"
        model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1e7)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(make_checkpoint("llama")).save_pretrained(folder)
        with pytest.raises(GradientOverflowError, match=r"first in the output of model\.layers\.1\.mlp"):
            loop.train(config(folder, corpus, tmp_path / "run", dtype="fp16", max_steps=60))

    def test_nan_stops_before_it_is_saved(self, make_checkpoint, corpus, tmp_path):
        settings = config(
            make_checkpoint("llama"),
            corpus,
            tmp_path,
            optimizer="sgd",
            learning_rate=1e30,
            weight_decay=0,
            max_grad_norm=0,
            max_steps=9,
        )
        with pytest.raises(TrainingError, match="loss of step"):
            loop.train(settings)
        assert not list_checkpoints(tmp_path)


class TestRunFolder:
    def test_checkpoints_are_not_overwritten(self, make_checkpoint, corpus, tmp_path):
        settings = config(make_checkpoint("llama"), corpus, tmp_path)
        loop.train(settings)
        with pytest.raises(ConfigError, match="give --resume"):
            loop.train(settings)

    def test_limit(self, make_checkpoint, corpus, tmp_path):
        loop.train(config(make_checkpoint("llama"), corpus, tmp_path, max_steps=5, save_steps=1, save_total_limit=2))
        assert [c.step for c in list_checkpoints(tmp_path)] == [4, 5]

    def test_lock(self, make_checkpoint, corpus, tmp_path):
        with run_folder.locked(tmp_path), pytest.raises(CheckpointError, match="another run is writing"):
            loop.train(config(make_checkpoint("llama"), corpus, tmp_path))

    def test_resolved_config_reproduces_the_run(self, make_checkpoint, corpus, tmp_path):
        from oomless.config.values import load_yaml

        first = config(make_checkpoint("llama"), corpus, tmp_path / "a", trainable="lora+lm_head", lora_dropout=0.1)
        loop.train(first)
        again = load_yaml(tmp_path / "a" / "config.yaml") | {"output_dir": str(tmp_path / "b")}
        loop.train(TrainConfig.from_mapping(again))
        assert [m["loss"] for m in metrics(tmp_path / "a")] == [m["loss"] for m in metrics(tmp_path / "b")]


def test_lengths_of_a_run(make_checkpoint, corpus, tmp_path, live_run):
    run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path / "a", max_steps=None, num_train_epochs=0.5))
    assert run.total_steps == math.ceil(run.data.train.blocks_per_epoch * 0.5 / 2)
    run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path / "b", max_steps=None, max_tokens=1000))
    assert run.total_steps == math.ceil(1000 / (2 * 64))


def test_embedding_rate(make_checkpoint, corpus, tmp_path, live_run):
    run, _ = live_run(config(make_checkpoint("llama"), corpus, tmp_path / "a", embedding_learning_rate=1e-3))
    rates = {
        name: group["peak_lr"]
        for group in run.assembly.optimizer.param_groups
        for name, parameter in run.assembly.model.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert {n for n, rate in rates.items() if rate == 1e-3} == {"lm_head.weight", "model.embed_tokens.weight"}
    with pytest.raises(ConfigError, match="embedding_learning_rate has no effect"):
        loop.train(
            config(
                make_checkpoint("llama"), corpus, tmp_path / "b", trainable="model.norm", embedding_learning_rate=1e-3
            )
        )
