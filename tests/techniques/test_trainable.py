"""Exactly what was asked for trains."""

import pytest
import torch

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.models import build
from oomless.models.spec import resolve
from oomless.techniques import trainable


def applied(folder, **settings):
    spec = resolve(str(folder))
    model = build.build(spec, device=Device(), dtype=torch.float32)
    build.load_weights(model, spec, device=Device())
    config = TrainConfig(model=str(folder), data=(DataSource(path="x"),), output_dir="o", **settings)
    trainable.apply(model, config, Device())
    return model


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lm_head", {"lm_head.weight"}),
        ("embed_tokens", {"model.embed_tokens.weight"}),
        ("lm_head+embed_tokens", {"lm_head.weight", "model.embed_tokens.weight"}),
        ("model.norm", {"model.norm.weight"}),
        (
            "lm_head+model.layers.1.mlp.*_proj",
            {f"model.layers.1.mlp.{n}_proj.weight" for n in ("up", "gate", "down")} | {"lm_head.weight"},
        ),
    ],
)
def test_parts(make_checkpoint, setting, expected):
    assert trains(applied(make_checkpoint("llama"), trainable=setting)) == expected


def test_full(make_checkpoint):
    model = applied(make_checkpoint("llama"))
    assert trains(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("extra", [set(), {"lm_head"}, {"lm_head", "embed_tokens"}])
def test_lora_with_whole_matrices(make_checkpoint, extra):
    model = applied(make_checkpoint("llama"), trainable="+".join(["lora", *sorted(extra)]))
    adapters = {name for name in trains(model) if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 7
    rest = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    assert trains(model) - adapters == {rest[name] for name in extra}


def test_lora_targets(make_checkpoint):
    model = applied(make_checkpoint("llama"), trainable="lora", lora_target_modules="q_proj,v_proj")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trains(model)} == {"q_proj", "v_proj"}


def test_lora_targets_by_an_expression(make_checkpoint):
    model = applied(make_checkpoint("llama"), trainable="lora", lora_target_modules=r".*layers\.1\..*\.(q|up)_proj")
    assert {name.split(".lora_")[0] for name in trains(model)} == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    for wrong, message in ((r"q_proj(", "no regular expression"), (r".*\.9\..*", "names no linear layer")):
        with pytest.raises(ConfigError, match=message):
            applied(make_checkpoint("llama"), trainable="lora", lora_target_modules=wrong)


class TestTied:
    @pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
    def test_choice_must_be_made_and_its_cost_is_shown(self, make_checkpoint, part):
        with pytest.raises(ConfigError, match=r"512 x 64.*shared.*untied.*128\.00 KiB"):
            applied(make_checkpoint("llama", tied=True), trainable=part)

    def test_shared(self, make_checkpoint):
        model = applied(make_checkpoint("llama", tied=True), trainable="lm_head", tied_weights="shared")
        assert trains(model) == {"model.embed_tokens.weight"}
        assert trainable.is_tied(model)

    @pytest.mark.parametrize(
        ("part", "expected"), [("lm_head", {"lm_head.weight"}), ("embed_tokens", {"model.embed_tokens.weight"})]
    )
    def test_untied(self, make_checkpoint, part, expected):
        model = applied(make_checkpoint("llama", tied=True), trainable=part, tied_weights="untied")
        assert trains(model) == expected
        assert not model.config.tie_word_embeddings
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)

    @pytest.mark.parametrize("setting", ["full", "lm_head+embed_tokens"])
    def test_both_stay_shared_unless_untied(self, make_checkpoint, setting):
        assert trainable.is_tied(applied(make_checkpoint("llama", tied=True), trainable=setting))
        model = applied(make_checkpoint("llama", tied=True), trainable=setting, tied_weights="untied")
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= trains(model)

    @pytest.mark.parametrize(("tied", "setting"), [(False, "lm_head"), (True, "model.norm"), (True, "lora")])
    def test_moot_choice_is_refused(self, make_checkpoint, tied, setting):
        with pytest.raises(ConfigError, match="remove it"):
            applied(make_checkpoint("llama", tied=tied), trainable=setting, tied_weights="untied")


@pytest.mark.parametrize("setting", ["model.layer.0", "lmhead", "lm_head+nothing.*"])
def test_unknown_part(make_checkpoint, setting):
    with pytest.raises(ConfigError, match="nor a pattern that matches"):
        applied(make_checkpoint("llama"), trainable=setting)


def test_unknown_lora_target(make_checkpoint):
    with pytest.raises(ConfigError, match=r"'q_prj' names no linear layer.*q_proj"):
        applied(make_checkpoint("llama"), trainable="lora", lora_target_modules="q_prj")
