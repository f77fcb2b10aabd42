"""The weights of a checkpoint under the names of a model, each made when it is asked for.

Three layers, each blind to the others: files and their tensors; what stored forms stand for (``stored_forms``); and the
names and layouts that transformers gives to what published checkpoints hold otherwise (experts one by one, older names),
which are its own conversions, asked for one parameter at a time instead of for the whole model at once.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import starting_point, stored_forms
from oomless.models.layout import LateTensor, Layout, Recipe

_COMPUTED = re.compile(
    r"(^|[._])(attn|attention)\.(masked_)?bias$|(^|\.)(causal_mask|inv_freq|position_ids|decoder\.version)$"
)
"""What earlier versions of transformers stored although the model computes it."""

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NUMBERS = frozenset(_DTYPES.values())


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of the Hugging Face checkpoint in ``folder``: safetensors, or where there are none pickles.

    Raises:
        ModelError: there are none, or the index names files that are not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed(index)
        if (folder / name).is_file():
            return [folder / name]
    raise ModelError(f"{folder} holds no model.safetensors and no pytorch_model.bin")


def _indexed(index: Path) -> list[Path]:
    try:
        said = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{index} cannot be read as JSON: {error}") from error
    places = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index} is damaged: it has no weight_map that names a file for each tensor")
    names = sorted(set(places.values()))
    folder = index.parent
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ModelError(f"{index} names {', '.join(absent)}, which {folder} does not hold: fetch the model again")
    return [folder / name for name in names]


class Weights:
    """The tensors in ``folder`` under the names ``wanted`` of ``model``.

    Attributes:
        names: those of ``wanted`` that the files hold.
        left: tensors of the files that belong to what was left out of the model.
        unknown: other tensors of the files that no parameter takes.
        absent: those of ``wanted`` that the files lack.

    Raises:
        ModelError: files are missing or damaged.
    """

    def __init__(self, folder: Path, model: Any, wanted: Collection[str], device: Device) -> None:
        self.folder = folder
        self._model, self._device = model, device
        with device.host():
            self._places = {name: path for path in weight_files(folder) for name in open_file(path).keys()}  # noqa: SIM118
        self._opened: tuple[Path | None, Any] = (None, None)
        self._settings, kind = starting_point.stored_as(folder)
        self._plain = stored_forms.plain(self._places, kind)
        self._made: tuple[Recipe | None, dict[str, Tensor]] = (None, {})
        self._parameters = {
            name.replace(".base_layer.", ".") for name, _ in model.named_parameters(remove_duplicate=False)
        }
        own = {name for name, _ in model.named_buffers()}
        self._layout = Layout(model, self._plain, own | set(wanted))
        unknown = [name for name in self._layout.unknown if not _COMPUTED.search(name)]
        self._recipes = {name: recipe for name, recipe in self._layout.recipes.items() if name in wanted}
        told = SimpleNamespace(unexpected_keys=set(unknown), missing_keys=set(wanted) - set(self._recipes))
        model._adjust_missing_and_unexpected_keys(told)
        self.names, self.left = list(self._recipes), self._layout.left
        self.unknown, self.absent = sorted(told.unexpected_keys), sorted(told.missing_keys)

    @property
    def names_in_files(self) -> list[str]:
        """The plain tensors for which those in the files stand."""
        return list(self._plain)

    def read(self, name: str) -> Tensor:
        """Return the tensor of the parameter ``name``, on the host.

        Raises:
            ModelError: the files hold none.
        """
        recipe = self._recipe(name)
        if recipe is not self._made[0]:
            with self._device.host():
                made = self._make(recipe)
            if len(made) == 1:
                return made[name]
            self._made = (recipe, made)
        return self._made[1][name]

    def read_expert(self, name: str, expert: int) -> Tensor:
        """Return one matrix of the parameter ``name``, a stack, on the host.

        Raises:
            ModelError: the files hold none.
        """
        recipe = self._recipe(name)
        with self._device.host():
            if recipe.conversion is None:
                return self._plain_slice(recipe.sources[""][0], expert)
            if recipe.takes_experts_apart(len(next(iter(recipe.sources.values())))):
                pieces = {pattern: [self._plain_tensor(names[expert])] for pattern, names in recipe.sources.items()}
                ((whole,),) = (self._layout.convert(recipe, pieces).values(),)
                return whole[0]
            if recipe is not self._made[0]:
                self._made = (recipe, self._make(recipe))
            return self._made[1][name][expert].clone()

    def late(self, name: str) -> LateTensor:
        """Return the plain tensor ``name`` of the files, as it stands there, to be read when it is written."""

        def read() -> Tensor:
            with self._device.host():
                return self._plain_tensor(name).contiguous()

        tensor = read()
        return LateTensor(tuple(tensor.shape), tensor.dtype, read)

    def close(self) -> None:
        """Forget the file at hand: what was read of it counts as memory of this process for as long as it is open."""
        self._opened = (None, None)

    def _recipe(self, name: str) -> Recipe:
        recipe = self._recipes.get(name)
        if recipe is None:
            raise ModelError(f"the weights in {self.folder} lack {name}")
        return recipe

    def _make(self, recipe: Recipe) -> dict[str, Tensor]:
        if recipe.conversion is None:
            return {recipe.parameters[""]: self._plain_tensor(recipe.sources[""][0])}
        pieces = {pattern: [self._plain_tensor(name) for name in names] for pattern, names in recipe.sources.items()}
        return {recipe.parameters[target]: made for target, made in self._layout.convert(recipe, pieces).items()}

    def _plain_slice(self, name: str, expert: int) -> Tensor:
        """Return one matrix of the plain stack ``name``."""
        stored = self._plain[name]
        if stored is None:
            matrix: Tensor = self._file_of(name).get_slice(name)[expert]
            return matrix
        parts = {
            ending: self._file_of(part).get_slice(part)[expert : expert + 1] for ending, part in stored.parts.items()
        }
        return stored.form.decode(parts, self._settings)[0]

    def _plain_tensor(self, name: str) -> Tensor:
        stored = self._plain[name]
        if stored is None:
            return self._tensor(name)
        parts = {ending: self._tensor(part) for ending, part in stored.parts.items()}
        return stored.form.decode(parts, self._settings)

    def _tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of(name).get_tensor(name)
        return tensor

    def _file_of(self, name: str) -> Any:
        path = self._places[name]
        if path != self._opened[0]:
            with self._device.host():
                self._opened = (path, open_file(path))
        return self._opened[1]

    def check_whole(self, tensors: Mapping[str, int]) -> None:
        """Check that each tensor of the files has a parameter, and each parameter a tensor in a form that is read.

        Args:
            tensors: an identity for each name; what is tied has one, and needs one name in the files.

        Raises:
            ModelError: one has none.
        """
        there = {tensors.get(name, name) for name in self.names}
        missing = [name for name in self.absent if tensors.get(name, name) not in there]
        if missing:
            raise ModelError(f"the weights in {self.folder} lack {shown(missing)}")
        if self.unknown:
            raise ModelError(
                f"the weights in {self.folder} hold {shown(self.unknown)}, for which {type(self._model).__name__} has no "
                "parameter: they are of another model or another form than its config.json says"
            )
        for name in self.names:
            for source in (source for sources in self._recipes[name].sources.values() for source in sources):
                kind = self._file_of(source).get_slice(source).get_dtype() if self._plain[source] is None else "F32"
                if kind not in _NUMBERS and name in self._parameters:
                    raise ModelError(
                        f"{source} in {self.folder} is stored as {kind}, and nothing there says what it stands for: "
                        f"{starting_point.FULL}"
                    )


class _Pickled:
    """The tensors of a ``.bin`` file, which stay in the file until they are asked for; nothing of it but tensors is made."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            first = str(error).partition("\n")[0]
            raise ModelError(
                f"{path} is no whole file of weights alone, and nothing else is read from a pickle, which can run code ({first}): "
                "convert it to safetensors where you trust it"
            ) from error
        if not all(isinstance(tensor, Tensor) for tensor in self._tensors.values()):
            raise ModelError(f"{path} holds more than the tensors of a model: give the folder of the model itself")

    def keys(self) -> Collection[str]:
        names: Collection[str] = self._tensors.keys()
        return names

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    """A tensor of a ``.bin`` file under the methods of safetensors' slices."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, place: Any) -> Tensor:
        return self._tensor[place]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))


def open_file(path: Path) -> Any:
    """Return the tensors of the weight file ``path``, each read when it is asked for.

    Raises:
        ModelError: it is damaged, or a pickle of more than tensors.
    """
    if path.suffix == ".bin":
        return _Pickled(path)
    try:
        return safe_open(path, framework="pt")  # an mmap, gone with its last reference
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from error


def adapter_file(folder: Path) -> Path:
    """Return the file of the adapter in ``folder``.

    Raises:
        ModelError: there is none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(
        f"{folder} holds an adapter_config.json and no adapter_model.safetensors: the adapter is not whole"
    )


def shown(names: Collection[str], most: int = 5) -> str:
    """Return ``names`` joined for a message, those beyond ``most`` as a count."""
    first = ", ".join(list(names)[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first
