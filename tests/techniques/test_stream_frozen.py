"""Frozen layers on the host: two of their weights on the device, the same training, the same saved model."""

import pytest
import torch
from safetensors.torch import load_file
from tests.blank import blank_batch

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.techniques.frozen_layers import frozen_layers
from oomless.training import loop
from oomless.training.assemble import assemble

LAYERS = 6


def configure(folder, corpus="none", out="none", **settings):
    defaults = {"trainable": "lora+lm_head", "lora_r": 4, "max_seq_length": 32, "stream_frozen": True, "dtype": "fp32"}
    return TrainConfig(
        model=str(folder), data=(DataSource(path=str(corpus)),), output_dir=str(out), **{**defaults, **settings}
    )


WIDE = {
    "llama": (dict(hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS), 7 * LAYERS),
    "gpt2": (dict(hidden_size=256, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), 4 * 2),
}


@pytest.mark.parametrize(("architecture", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_the_device_holds_two_weights_and_updates_as_if_it_held_all(make_checkpoint, architecture, checkpointing):
    shape, linear = WIDE[architecture]
    folder = make_checkpoint(architecture, **shape)
    found = {}
    for streamed in (False, True):
        torch.manual_seed(0)
        settings = configure(folder, stream_frozen=streamed, gradient_checkpointing=checkpointing)
        device = VirtualGPU(1 << 30)
        with device.active():
            parts = assemble(resolve(str(folder)), settings, device, fill=True)
            losses = [float(parts.step.run([blank_batch(1, (32,), device)]).loss) for _ in range(3)]
            weights = [p.detach().clone() for p in parts.model.parameters() if p.requires_grad]
        found[streamed] = losses, weights, device.usage().peak_allocated_bytes
        layers = list(frozen_layers(parts.model))
    assert found[True][0] == found[False][0]
    assert all(torch.equal(left, right) for left, right in zip(found[True][1], found[False][1], strict=True))
    sizes = [4 * layer.in_features * layer.out_features for _, layer in layers]
    assert len(sizes) == linear
    saved = found[False][2] - found[True][2]
    assert sum(sizes) - 3 * max(sizes) <= saved <= sum(sizes) - max(sizes)
    assert device.host_allocated_bytes >= sum(sizes)


def test_saves_the_original_weights_and_resumes(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("qwen2")
    common = {"gpu": "virtual:64MiB", "eval_fraction": 0.1, "max_steps": 4, "save_steps": 2, "trainable": "lm_head"}
    result = loop.train(configure(folder, corpus, tmp_path, lora_r=None, **common))
    saved, original = load_file(result.model_dir / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    assert [name for name in saved if not torch.equal(saved[name], original[name])] == ["lm_head.weight"]
    for name in ("checkpoint-4", "model"):
        (tmp_path / name).rename(tmp_path / f"was-{name}")
    again = loop.train(configure(folder, corpus, tmp_path, lora_r=None, resume=True, **common))
    assert torch.equal(load_file(again.model_dir / "model.safetensors")["lm_head.weight"], saved["lm_head.weight"])


def test_no_effect_on_a_cpu(make_checkpoint):
    folder = make_checkpoint("llama")
    with pytest.raises(ConfigError, match="no effect on a CPU"):
        assemble(resolve(str(folder)), configure(folder), Device(), fill=True)
