"""The whole model after training, each tensor made when it is written.

Nothing is held but the tensor at hand: it is read from the model's files, changed in fp32, rounded once to the dtype of the export, and
forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oomless.errors import ModelError
from oomless.export.adapter import LowRankExperts, changes, file_of
from oomless.export.changes import Change, LowRank, Replaced, Rows, require_range
from oomless.export.source import Source
from oomless.memory.device import Device
from oomless.models import experts, layout, sample
from oomless.models.layout import LateTensor, Savable
from oomless.models.make import left_out, without_memory
from oomless.models.weights import Weights, open_file
from oomless.techniques import lora, trainable
from oomless.training.precision import DTYPES
from oomless.units import MiB

HOST = Device()
_READ_AT_ONCE = 32 * MiB
"""How much of a file is read before it is opened anew."""


class Merged:
    """The model of ``source``, its numbers in ``dtype`` (default: those that it was trained in).

    Attributes:
        model: without memory; tells names, shapes and the config.
        tensors: the parameters and buffers by name, tied ones once.
        dtype: that of the numbers.

    Raises:
        ModelError: files are missing or damaged, or an adapter is of another model.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None) -> None:
        spec = source.base
        assert spec.folder is not None
        self.source, self.dtype = source, dtype or trained_dtype(source)
        self.model = without_memory(spec.config, dtype=self.dtype, trust_remote_code=spec.trust_remote_code)
        experts.put_behind_interface(self.model)
        state = self.model.state_dict(keep_vars=True)
        self._weights = Weights(spec.folder, self.model, list(state), HOST)
        self._read_bytes = 0
        self._weights.check_whole({name: id(tensor) for name, tensor in state.items()})
        setattr(self.model, layout.NAMES, self._weights.names_in_files)
        self._changes: Mapping[str, Change] = {}
        if source.kind != "model":
            self._changes = changes(source, self.model)
            _require_base(source, self.model, self._weights)
        in_files = {id(state[name]): name for name in reversed(self._weights.names)}
        stored = {name: in_files.get(id(tensor), name) for name, tensor in state.items()}
        own = stored
        if trainable.is_tied(self.model) and _comes_untied(source, self.model, self._changes):
            trainable.untie(self.model, HOST)
            own = {name: name for name in state}
        changed = {own[name]: change for name, change in self._changes.items()}
        _require_alike(source, self._changes, own)
        self.tensors = {
            name: self._late(name, stored[name], changed.get(own[name]), tensor)
            for name, tensor in lora.plain_tensors(self.model).items()
        }

    def in_files(self) -> dict[str, Savable]:
        """Return the tensors as the files that the model came from hold them, with what was left out of it."""
        found = layout.in_files(self.model, self.tensors, HOST)
        if left_out(self.model):
            found |= {name: self._weights.late(name) for name in self._weights.left}
        return found

    def _late(self, name: str, stored: str, change: Change | None, like: Tensor) -> LateTensor:
        shape, dtype = tuple(like.shape), like.dtype

        def read() -> Tensor:
            return self._checked(name, self._weights.read(stored), shape)

        def whole() -> Tensor:
            made = read().to(dtype) if change is None else change.of(read, dtype)
            require_range(name, made, dtype)
            return made.contiguous()

        def expert(number: int) -> Tensor:
            if isinstance(change, Replaced):
                made = change.new()[number].to(dtype)
            else:
                matrix = self._checked(name, self._weights.read_expert(stored, number), shape[1:])
                experts = change if isinstance(change, LowRankExperts) else None
                made = matrix.to(dtype) if experts is None else experts.of_expert(matrix, number, dtype)
            require_range(name, made, dtype)
            return made.contiguous()

        return LateTensor(shape, dtype, whole, expert if len(shape) == 3 else None)

    def _checked(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        self._read_bytes += tensor.nbytes
        if self._read_bytes > _READ_AT_ONCE:
            self._read_bytes = 0
            self._weights.close()
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{name} is {tuple(tensor.shape)} in the files but {shape} by the config.json of {self.source.base.name}: the two do "
                "not belong together"
            )
        return tensor


def _require_base(source: Source, model: Any, weights: Weights) -> None:
    """Check that ``weights``, those of ``model``, are what the weights of ``source`` were trained beside, where it kept what those were."""
    embedding = model.get_input_embeddings().weight
    name = next(
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor is embedding and name in weights.names
    )
    if (began := source.base_sample) and not sample.same(began, sample.of(weights.read(name))):
        raise ModelError(
            f"{source.folder} was trained on another model than {source.base.name}: its embedding is another one; name the right one with --base"
        )


def _require_alike(source: Source, found: Mapping[str, Change], own: Mapping[str, str]) -> None:
    """Check that adapters of what is one matrix, which ``own`` tells, are one adapter."""
    adapted = {own[name]: name for name, change in found.items() if isinstance(change, LowRank)}
    for name, one in own.items():
        first = adapted.get(one)
        if first is not None and not _alike(found[first], found.get(name)):
            raise ModelError(
                f"{source.folder} changes {name} otherwise than {first}, which are one matrix in {source.base.name}: it cannot be merged; "
                "--to adapter leaves it as it is"
            )


def _alike(one: Change, other: Change | None) -> bool:
    assert isinstance(one, LowRank)
    if not isinstance(other, LowRank) or one.scale != other.scale:
        return False
    pairs = ((one.a, other.a), (one.b, other.b), (one.magnitude, other.magnitude))
    return one is other or all(
        left is right or (left and right and torch.equal(left(), right())) for left, right in pairs
    )


def trained_dtype(source: Source) -> torch.dtype:
    """Return the dtype that the model of ``source`` was trained in; of an adapter from elsewhere, what its model is stored in."""
    if source.run is not None and source.kind != "model":
        file = open_file(file_of(source))
        trained: torch.dtype = next(file.get_tensor(name).dtype for name in file.keys())  # noqa: SIM118
        return trained
    said = str(source.base.config.dtype).removeprefix("torch.")
    return next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{said}"), torch.float32)


def _comes_untied(source: Source, model: Any, changed: Mapping[str, Change]) -> bool:
    """Return whether the head and the embedding, one matrix in the base, are two after training."""
    if source.run is not None:
        return source.run.tied_weights == "untied"
    names = {module: name for name, module in model.named_modules()}
    embedding, head = (
        changed.get(f"{names[module]}.weight")
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if isinstance(embedding, Replaced) and isinstance(head, Replaced):
        return not torch.equal(embedding.new(), head.new())
    return head is not None or (embedding is not None and not isinstance(embedding, Rows))
