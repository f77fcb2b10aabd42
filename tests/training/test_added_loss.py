"""Label smoothing and z-loss: in the training loss, as torch computes them, and not in the evaluation."""

import pytest
import torch
from tests.blank import blank_batch
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.models.spec import resolve
from oomless.training.assemble import assemble


def config(folder, **settings):
    return TrainConfig(
        model=str(folder), data=(DataSource(path="x"),), output_dir="x", max_seq_length=32, dtype="fp32", **settings
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_training_has_them_and_evaluation_not(make_checkpoint, architecture):
    folder = make_checkpoint(architecture)
    device = Device()
    settings = config(folder, label_smoothing_factor=0.1, z_loss=0.01)
    step = assemble(resolve(str(folder)), settings, device, fill=True).step
    batch = blank_batch(1, (32,), device)
    logits = AutoModelForCausalLM.from_pretrained(folder)(batch.input_ids).logits[0].float()
    smooth = torch.nn.functional.cross_entropy(logits, batch.labels[0], label_smoothing=0.1)
    expected = smooth + 0.01 * logits.logsumexp(dim=1).square().mean()
    plain = torch.nn.functional.cross_entropy(logits, batch.labels[0], reduction="sum")
    assert step.evaluate([batch])[0].item() == pytest.approx(plain.item(), rel=1e-5)
    assert step.accumulate([batch], 32).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 1.0}, {"z_loss": -0.1}], ids=str)
def test_ranges(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        config("x", **settings)
