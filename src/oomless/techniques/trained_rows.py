"""Train only some rows of ``embed_tokens`` and ``lm_head``: those of tokens that were added.

Saves: gradient and optimizer state of all other rows. Costs: what those could have learnt. The rows are a parameter of their
own that stands in the place of the matrix's; the matrix is frozen and, until the model is merged at the end, never written.
Saved models hold the matrix with the trained rows in it; checkpoints that hold only what trains hold the rows alone, beside
LoRA in the form of peft's ``trainable_token_indices``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.embedding import embedding

NAME = "trained_rows"


def apply(model: Any, wanted: str, device: Device) -> None:
    """Freeze the embeddings of ``model`` that train, but for the rows that ``wanted`` names.

    Raises:
        ConfigError: ``wanted`` is no list of ids and ranges, names rows that are not there, or no embedding trains.
    """
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m.weight.requires_grad]
    if not modules:
        raise ConfigError("trainable_rows has no effect: neither embed_tokens nor lm_head trains; remove it")
    numbers = parse(wanted, modules[0].weight.shape[0])
    with device.host():
        host = torch.tensor(numbers)
    ids = device.put(host)
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        weight = module.weight
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.detach()[ids])
        module.trained_rows, module.trained_row_ids = made[id(weight)], ids
        module.forward = (_RowLookup if isinstance(module, nn.Embedding) else _RowHead)(module)
    for module in modules:
        module.weight.requires_grad_(False)
    device.label(made.values(), "weights")


def parse(wanted: str, vocabulary: int) -> list[int]:
    """Return the ids that ``wanted`` names, such as ``5,128000-128007``, each once and in order.

    Raises:
        ConfigError: it is no such list, or an id is not below ``vocabulary``.
    """
    ids: set[int] = set()
    for piece in wanted.split(","):
        first, dash, last = (part.strip() for part in piece.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigError(
                f"trainable_rows is token ids and ranges joined by commas, such as 5,128000-128007; got {wanted!r}"
            )
        ids.update(range(int(first), int(last or first) + 1))
    if max(ids) >= vocabulary:
        raise ConfigError(
            f"trainable_rows names row {max(ids)}, but the model has {vocabulary}: the last is {vocabulary - 1}"
        )
    return sorted(ids)


def is_rows(name: str) -> bool:
    """Return whether the parameter ``name`` is rows that train."""
    return name.endswith(f".{NAME}")


def rows_of(module: nn.Module) -> tuple[nn.Parameter | None, Tensor | None]:
    """Return the rows of ``module`` that train, and their ids; ``None`` where it has none."""
    return getattr(module, NAME, None), getattr(module, "trained_row_ids", None)


def take_from_weight(model: Any) -> None:
    """Fill the rows that train from the matrices, which a checkpoint has just filled."""
    for module in model.modules():
        rows, ids = rows_of(module)
        if rows is not None and ids is not None:
            rows.data.copy_(module.weight.detach()[ids])


def owners(model: Any) -> dict[str, Any]:
    """Return the modules of ``model`` that have rows that train, by name; of two that share theirs the first."""
    found: dict[str, Any] = {}
    shared = set()
    for name, module in model.named_modules():
        rows, _ = rows_of(module)
        if rows is not None and id(rows) not in shared:
            shared.add(id(rows))
            found[name] = module
    return found


@torch.no_grad()
def merge(model: Any) -> None:
    """Write the rows that train into their matrices, in place."""
    for module in owners(model).values():
        module.weight.index_copy_(0, module.trained_row_ids, module.trained_rows)


def with_rows(module: Any, device: Device) -> Tensor:
    """Return the matrix of ``module`` on the host, the rows that train in it."""
    rows, ids = rows_of(module)
    assert rows is not None
    assert ids is not None
    with device.host():
        matrix = device.fetch(module.weight)
        if matrix.untyped_storage()._cdata == module.weight.untyped_storage()._cdata:
            matrix = matrix.clone()
        return matrix.index_copy_(0, device.fetch(ids), device.fetch(rows))


class _RowLookup:
    """The forward of an embedding some of whose rows train."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying

    def __call__(self, input_ids: Tensor) -> Tensor:
        module = self.module
        places = torch.searchsorted(module.trained_row_ids, input_ids).clamp_(max=len(module.trained_row_ids) - 1)
        trained = (module.trained_row_ids[places] == input_ids)[..., None]
        rows = torch.where(
            trained, embedding(places, module.trained_rows), functional.embedding(input_ids, module.weight)
        )
        scale = getattr(module, "embed_scale", None)
        return rows if scale is None else rows * scale.to(module.weight.dtype)


class _RowHead:
    """The forward of a head some of whose rows train; training itself takes them in ``ops.linear_cross_entropy``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.proxy(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        module = self.module
        logits = functional.linear(hidden, module.weight, module.bias)
        replaced = functional.linear(
            hidden, module.trained_rows, None if module.bias is None else module.bias[module.trained_row_ids]
        )
        return logits.index_copy(-1, module.trained_row_ids, replaced)
