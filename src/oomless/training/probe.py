"""Three questions to the real model before it trains, because architectures differ and a wrong guess would be silent.

``models.form`` asks them of a twin before anything is loaded. Here the model that was loaded answers, with its weights and the
kernels of its device, in a few dozen tokens: is it its own forward with its own attention, is it causal, are packed documents
apart?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from oomless.config import Packing
from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import attention, form
from oomless.models.make import attend
from oomless.techniques import in_flight
from oomless.techniques.kinds import body_of


@torch.no_grad()
def check_architecture(model: Any, packing: Packing, device: Device) -> None:
    """Ask ``model``, which is on ``device``.

    Raises:
        ModelError: its head's logits are not those of its own forward, a token sees later ones, or packed documents see each
            other.
    """
    model.eval()
    # Each of its texts has a length of its own, of which more or fewer tiles are made, so that none tells what the next fetches.
    fresh = body_of(model).register_forward_pre_hook(lambda *_: in_flight.drop(model))
    try:
        with own_attention(model):
            logits = form.own_logits(model, form.length_for(model))
        problem = form.find_problem(model, logits, packing, form.tolerance(model), device)
    finally:
        fresh.remove()
    if problem is not None:
        raise ModelError(problem.text)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Let ``model`` attend as its class does by itself."""
    before = model.config._attn_implementation
    if before == attention.NAME:
        attend(model, form.OWN_ATTENTION)
    try:
        yield
    finally:
        if before == attention.NAME:
            attend(model, attention.NAME)
