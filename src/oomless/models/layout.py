"""How the tensors of a checkpoint's files and the parameters of a model correspond.

Files often hold a parameter under another name, or in pieces: one matrix for each expert where the model has a stack of them.
transformers describes that for every architecture by renamings and by conversions, which can be reversed. They are used here
on one parameter at a time, and on one expert at a time where the conversion allows it, so that neither reading nor writing
holds more than that on the host, and what is written has the names and the form of what was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oomless.memory.device import Device
from oomless.models.make import left_out
from oomless.techniques.sharding import Part

NAMES = "_oomless_names_in_files"
"""Under this name a model remembers the names in the files that it was filled from."""

SOURCE = "_oomless_source"
"""Under this name a model remembers the folder in which what was left out of it stands."""


@dataclass(frozen=True, slots=True)
class LateTensor:
    """A tensor of the host that is made when it is written; ``expert`` makes one of the matrices of a stack."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    expert: Callable[[int], Tensor] | None = None

    def numel(self) -> int:
        """Return the number of elements, as a tensor does."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Return the bytes of one element, as a tensor does."""
        return self.dtype.itemsize


Savable = Tensor | LateTensor | Part


@dataclass(eq=False, slots=True)
class Recipe:
    """What one or a few parameters are made of."""

    conversion: Any
    """``None``: the one source as it is."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    """Names in the files, by the pattern under which the conversion wants them."""

    parameters: dict[str, str] = field(default_factory=dict)
    """The parameters, by the pattern under which the conversion makes them."""

    def takes_experts_apart(self, experts: int) -> bool:
        """Return whether the conversion can be given one of so many experts."""
        from transformers.core_model_loading import MergeModulelist

        first, *others = self.conversion.operations
        stacks = isinstance(first, MergeModulelist) and first.dim == 0
        axes = [axis for operation in others for name, axis in vars(operation).items() if name.startswith("dim")]
        each = all(len(names) == experts for names in self.sources.values())
        return stacks and all(axis > 0 for axis in axes) and each and len(self.parameters) == 1


class Layout:
    """Which of the tensors ``names`` in files make which parameters of ``model``.

    Attributes:
        recipes: by the name of each of ``parameters`` that the files hold.
        left: names in the files of what was left out of the model.
        unknown: other names in the files that no parameter takes.
    """

    def __init__(self, model: Any, names: Collection[str], parameters: Collection[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        self.model = model
        self.recipes: dict[str, Recipe] = {}
        self.left: list[str] = []
        self.unknown: list[str] = []
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, wanted = model.base_model_prefix, dict.fromkeys(parameters, True)
        for source in sorted(names, key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
            if name not in wanted and source in wanted:
                name, pattern = rename_source_key(source, [], [], prefix, wanted)
            if name not in wanted:
                outside = any(full.startswith(left_out(model)) for full in (name, f"{prefix}.{name}"))
                (self.left if outside else self.unknown).append(source)
            elif pattern is None:
                self.recipes[name] = Recipe(None, {"": [source]}, {"": name})
            else:
                converter = by_pattern[pattern]
                recipe = self.recipes.get(name) or Recipe(converter)
                recipe.sources.setdefault(pattern, []).append(source)
                for target in converter.target_patterns:
                    recipe.parameters[target] = name.replace(converter.target_patterns[0], target)
                    self.recipes[recipe.parameters[target]] = recipe

    def convert(self, recipe: Recipe, pieces: Mapping[str, list[Tensor]], *, back: bool = False) -> dict[str, Tensor]:
        """Return what the conversion of ``recipe``, or its reverse, makes of ``pieces``: patterns to tensors, as it names them."""
        conversion = recipe.conversion.reverse_transform() if back else recipe.conversion
        made: dict[str, Any] = dict(pieces)
        for operation in conversion.operations:
            made = operation.convert(
                made,
                source_patterns=conversion.source_patterns,
                target_patterns=conversion.target_patterns,
                full_layer_name=next(iter(recipe.parameters.values())),
                model=self.model,
                config=self.model.config,
            )
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def in_files(self, tensors: Mapping[str, Savable], device: Device) -> dict[str, Savable]:
        """Return ``tensors``, parameters by name, as the files hold them; each is made when it is written."""
        laid_out: dict[str, Savable] = {}
        for name, tensor in tensors.items():
            recipe = self.recipes.get(name)
            if recipe is None:
                laid_out[name] = tensor
            elif recipe.conversion is None:
                laid_out[recipe.sources[""][0]] = tensor
            elif name == next(iter(recipe.parameters.values())):
                laid_out |= _Pieces(self, recipe, tensors, device).tensors()
        return laid_out


class _Pieces:
    """The pieces in files of the parameters that one recipe makes; what was made last is kept for the next."""

    def __init__(self, layout: Layout, recipe: Recipe, tensors: Mapping[str, Savable], device: Device) -> None:
        self.layout, self.recipe, self.device = layout, recipe, device
        self.whole = {target: tensors[name] for target, name in recipe.parameters.items()}
        self.stack = next(iter(self.whole.values()))
        self.apart = recipe.takes_experts_apart(self.stack.shape[0])
        self.reverse = recipe.conversion.reverse_transform()
        self.made: tuple[int | None, dict[str, Tensor]] = (None, {})

    def tensors(self) -> dict[str, Savable]:
        shapes = {
            target: [torch.empty(((1, *tensor.shape[1:]) if self.apart else tensor.shape), device="meta")]
            for target, tensor in self.whole.items()
        }
        made = self.layout.convert(self.recipe, shapes, back=True)
        pieces: dict[str, Savable] = {}
        for place in range(max(len(names) for names in self.recipe.sources.values())):
            for pattern, names in self.recipe.sources.items():
                if place < len(names):
                    wanted = self.written(pattern, 0 if self.apart else place)
                    make = partial(self.make, place if self.apart else -1, wanted)
                    pieces[names[place]] = LateTensor(tuple(made[wanted].shape), self.stack.dtype, make)
        return pieces

    def written(self, pattern: str, number: int) -> str:
        """Return what the reversed conversion calls the piece that ``pattern`` matches."""
        place = self.recipe.conversion.source_patterns.index(pattern)
        return str(self.reverse.target_patterns[place]).replace("*", str(number))

    def make(self, expert: int, wanted: str) -> Tensor:
        if self.made[0] != expert:
            self.made = (None, {})
            with self.device.host():
                whole = {target: [self.on_host(tensor, expert)] for target, tensor in self.whole.items()}
                self.made = (expert, self.layout.convert(self.recipe, whole, back=True))
        return self.made[1][wanted].contiguous()

    def on_host(self, tensor: Savable, expert: int) -> Tensor:
        if isinstance(tensor, LateTensor):
            return tensor.make() if expert < 0 or tensor.expert is None else tensor.expert(expert)[None]
        assert isinstance(tensor, Tensor)
        return self.device.fetch(tensor if expert < 0 else tensor[expert : expert + 1])


def published_names(model: Any, tensors: Mapping[str, Savable]) -> list[str]:
    """Return under which names published checkpoints of ``model`` hold ``tensors``."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    return list(revert_weight_conversion(model, shapes))


def in_files(model: Any, tensors: Mapping[str, Savable], device: Device) -> dict[str, Savable]:
    """Return ``tensors``, parameters of ``model`` by name, as the files that it was filled from hold them, or published ones."""
    names = getattr(model, NAMES, None) or published_names(model, tensors)
    return Layout(model, names, tensors).in_files(tensors, device)
