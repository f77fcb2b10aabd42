"""Who updates weights: asked for, possible there, tried, and remembered."""

import pytest
import torch
from torch import nn

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.optim import adamw, build
from oomless.training import kernels, loop
from oomless.training.listening import Listener


def config(**settings):
    return TrainConfig(**dict(model="a", data=(DataSource(path="b"),), output_dir="c") | settings)


def optimizer():
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    return build("adamw_8bit", [weight], lr=1e-3, weight_precision="correction")


class RealGpu(Device):
    """As far as this choice goes: the operators of its tensors are whatever a test says."""

    compute_capability = (8, 0)
    torch_device = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "fused", "note"),
    [
        (Device(), False, ()),
        (VirtualGPU(1 << 30, compute_capability=(7, 5)), True, ()),
        (
            VirtualGPU(1 << 30, name="P100", compute_capability=(6, 0)),
            False,
            (
                "updates are not fused: they need compute capability 7.5, and P100 has 6.0. They are slower and take up to "
                "64 MiB",
            ),
        ),
    ],
)
def test_auto_is_fused_where_a_gpu_can(device, fused, note):
    made = optimizer()
    assert kernels.choose(made, config(), device) == note
    assert made.fused is fused
    assert kernels.choose(made, config(kernels="plain"), device) == ()
    assert made.fused is False
    if not fused:
        with pytest.raises(ConfigError, match="kernels: fused cannot be had: they (are for GPUs|need compute)"):
            kernels.choose(made, config(kernels="fused"), device)


def test_kernels_that_cannot_be_made_are_not_taken(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    made = optimizer()
    assert kernels.choose(made, config(), RealGpu()) == ()
    assert made.fused
    monkeypatch.setattr(adamw._UPDATE, "_operator", no_compiler)
    (note,) = kernels.choose(made, config(), RealGpu())
    assert note.startswith("updates are not fused: they do not work here (RuntimeError: Failed to find C compiler.)")
    assert not made.fused
    with pytest.raises(ConfigError, match="kernels: fused cannot be had: they do not work here"):
        kernels.choose(made, config(kernels="fused"), RealGpu())


def test_kernels_that_compute_something_else_are_not_taken(monkeypatch):
    made = optimizer()
    plain = adamw._UPDATE._operator

    def twice(*arguments, **keywords):
        plain(*arguments, **keywords)
        plain(*arguments, **keywords)

    monkeypatch.setattr(adamw._UPDATE, "_operator", twice)
    (note,) = kernels.choose(made, config(), RealGpu())
    assert "fused updates of torch.bfloat16 differ from their plain form" in note
    assert not made.fused


class Heard(Listener):
    def __init__(self):
        self.lines = []

    def said(self, text):
        self.lines.append(text)


def test_a_resume_says_that_updates_change_their_form(make_checkpoint, corpus, tmp_path):
    given = dict(
        model=str(make_checkpoint("llama")),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(tmp_path),
        gpu="virtual:256MiB",
        **dict(max_seq_length=32, max_steps=2, save_steps=1, logging_steps=1),
    )
    loop.train(TrainConfig(**given))
    for steps, said in (
        (3, ["updates were fused and are plain from here on: the same but for rounding"]),
        (4, []),
    ):
        heard = Heard()
        loop.train(TrainConfig(**given | dict(max_steps=steps, resume=True, kernels="plain")), heard)
        assert [line for line in heard.lines if "updates" in line] == said
