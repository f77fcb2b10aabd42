"""Whether plain transformers reads a saved model as the model that was trained.

The files are loaded in the model's own class: nothing may be missing, unexpected or newly initialised, every parameter must be
bit for bit the one that was trained (or, where the run held it in fewer bits, the one of the base with its adapter), and the
logits must be those of the live model. Of a model that is large for the host's free memory the first layers, the embeddings and
the head are loaded, and of the others names and shapes are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from oomless.errors import ModelError
from oomless.hardware import available_host_bytes
from oomless.memory.device import Device
from oomless.models import form, twin
from oomless.models.layout import LateTensor, Savable
from oomless.models.save import plain_tensors
from oomless.models.weights import shown

_FIRST_LAYERS = 2


@torch.no_grad()
def check_saved(
    folder: Path,
    model: Any,
    device: Device,
    late: Mapping[str, LateTensor],
    *,
    alone: bool = True,
    live: Callable[[], Tensor | None] | None = None,
) -> None:
    """Load the model in ``folder`` and compare it with ``model``, which was saved there; its adapters are merged.

    Args:
        folder: a Hugging Face checkpoint.
        model: the live model, on ``device``.
        device: where it lies.
        late: what stands in the files for layers that are stored in another form, under the plain model's names.
        alone: whether this process holds the whole model; else only names and shapes are compared.
        live: gives its ``live_logits``, or ``None`` where its device has no room for them, so that those are not compared.

    Raises:
        ModelError: they differ.
    """
    expected = plain_tensors(model, device, late)
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    whole = 2 * size < available_host_bytes()
    with device.host(), quiet():
        config = type(model.config).from_pretrained(folder)
        # Of a part the names and shapes of the whole are asked for first, which takes no memory.
        loaded, report = _load(folder, model, config, device_map=None if whole else "meta")
        if not whole:
            loaded, _ = _load(folder, model, twin.first_layers(config, _FIRST_LAYERS))
    if faults := [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]:
        raise _differs(
            folder, f"it does not load whole: {shown(sorted(map(str, faults)))} is missing, unknown or of another shape"
        )
    if not alone:
        return
    changed = [name for name, found in loaded.state_dict().items() if not _is_expected(name, found, expected, device)]
    if changed:
        raise _differs(folder, f"{shown(changed)} differs")
    if whole and not late:
        with device.host():
            logits = form.own_logits(loaded.eval(), form.length_for(model))
        own = live_logits(model, device) if live is None else live()
        with device.host():
            if own is not None and not form.same(own, logits, form.tolerance(model), form.HOST):
                raise _differs(folder, "its logits differ")


def _load(folder: Path, model: Any, config: Any, device_map: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Return what plain transformers makes of ``folder`` in the class of ``model``, and its report."""
    try:
        loaded, report = type(model).from_pretrained(
            folder,
            config=config,
            dtype="auto",
            attn_implementation=form.OWN_ATTENTION,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except RuntimeError as error:  # as where one expert of a layer is missing
        raise _differs(folder, f"transformers does not load it ({str(error).strip().splitlines()[0]})") from error
    return loaded, report


@torch.no_grad()
def live_logits(model: Any, device: Device) -> Tensor:
    """Return what ``model``, which is on ``device``, makes of the tokens that it is asked about, on the host."""
    model.eval()
    return device.fetch(form.own_logits(model, form.length_for(model)))


def _is_expected(name: str, found: Tensor, expected: Mapping[str, Savable], device: Device) -> bool:
    wanted = expected.get(name)
    if wanted is None:  # tied to one that is compared, or made by the model
        return True
    assert isinstance(wanted, (Tensor, LateTensor))
    host = wanted.make() if isinstance(wanted, LateTensor) else device.fetch(wanted)
    with device.host():
        # Bit for bit: what came with NaN is equal where it has it still.
        return torch.equal(host.to(found.dtype).reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8))


def _differs(folder: Path, how: str) -> ModelError:
    return ModelError(
        f"the model that was written to {folder} is not the one that was trained: {how}. The checkpoints are right: keep them, and "
        "please report this"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Load without transformers' bars and remarks: what matters of them is in its report."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
