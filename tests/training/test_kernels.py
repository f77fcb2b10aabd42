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


def choose(tries, device, **settings):
    return kernels.choose(config(**settings), device, tries)


def works():
    pass


def no_compiler(*_, **__):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


@pytest.mark.parametrize(
    ("device", "fused", "notes"),
    [
        (Device(), set(), ()),
        (VirtualGPU(1 << 30, compute_capability=(7, 5)), {"updates", "the loss"}, ()),
        (
            VirtualGPU(1 << 30, name="P100", compute_capability=(6, 0)),
            set(),
            (
                "no fused kernels for updates and the loss: they need compute capability 7.5, and P100 has 6.0. Without them a "
                "run is slower and takes more memory",
            ),
        ),
    ],
)
def test_auto_is_fused_where_a_gpu_can(device, fused, notes):
    tries = {"updates": no_compiler, "the loss": no_compiler}  # no virtual GPU tries
    assert choose(tries, device) == (fused, notes)
    assert choose(tries, device, kernels="plain") == (set(), ())
    if not fused:
        with pytest.raises(ConfigError, match="kernels: fused cannot be had: they (are for GPUs|need compute)"):
            choose(tries, device, kernels="fused")


def test_a_part_whose_kernels_cannot_be_made_goes_without():
    assert choose({"updates": works, "the loss": works}, RealGpu()) == ({"updates", "the loss"}, ())
    fused, (note,) = choose({"updates": no_compiler, "the loss": works}, RealGpu())
    assert fused == {"the loss"}
    assert note.startswith(
        "no fused kernels for updates: they do not work here (RuntimeError: Failed to find C compiler.)"
    )
    _, (note,) = choose({"updates": no_compiler, "the loss": no_compiler}, RealGpu())
    assert note.startswith("no fused kernels for updates and the loss:")
    with pytest.raises(ConfigError, match="kernels: fused cannot be had: they do not work here"):
        choose({"updates": works, "the loss": no_compiler}, RealGpu(), kernels="fused")


def test_updates_that_compute_something_else_are_not_taken(monkeypatch):
    made = optimizer()
    assert choose({"updates": made.try_fused}, RealGpu()) == ({"updates"}, ())
    plain = adamw._UPDATE._operator

    def twice(*arguments, **keywords):
        plain(*arguments, **keywords)
        plain(*arguments, **keywords)

    monkeypatch.setattr(adamw._UPDATE, "_operator", twice)
    fused, (note,) = choose({"updates": made.try_fused}, RealGpu())
    assert "fused updates of torch.bfloat16 differ from their plain form" in note
    assert not fused


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
    parts = "attention to packed documents, gated products, norms, rotary embeddings, the loss, updates"
    for steps, said in (
        (3, [f"plain from here on, which it was not before: {parts}; the same but for rounding"]),
        (4, []),
    ):
        heard = Heard()
        loop.train(TrainConfig(**given | dict(max_steps=steps, resume=True, kernels="plain")), heard)
        assert [line for line in heard.lines if "updates" in line] == said
