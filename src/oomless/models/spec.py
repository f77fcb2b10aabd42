"""What a config.json says, wherever it was found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from oomless.config import adapter
from oomless.errors import ConfigError, ModelError, nearest
from oomless.models import extension, names, starting_point

STANDS_FOR = "stands_for"
"""Where a config.json that a plan writes keeps what a person calls the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model that is known by its config; ``folder`` is ``None`` where there are no weights to load."""

    name: str
    config: Any
    """The ``transformers.PreTrainedConfig``."""

    folder: Path | None
    base: Path | None = None
    """The folder of the model that is trained, where ``folder`` is a checkpoint of its training."""

    adapter: Path | None = None
    """The folder of an adapter of the model, which goes on training."""

    trust_remote_code: bool = False
    stored_as: str | None = None
    """The form of fewer bits that its weights have by its config.json, or by its name; ``None`` where they are plain."""

    notes: tuple[str, ...] = ()
    """What was taken for what, to be said once."""

    def notes_read(self) -> tuple[str, ...]:
        """Return what is to be said where the model is read and not trained."""
        if self.stored_as is None or self.folder is None:
            return self.notes
        return (f"the weights of {self.name} are stored as {self.stored_as}: {starting_point.READ_PLAIN}", *self.notes)

    def notes_with(self, quantization: str | None) -> tuple[str, ...]:
        """Return what is to be said of a plan or a run that holds frozen weights in the form ``quantization``."""
        if self.stored_as is not None and self.folder is not None:
            how = starting_point.trained_from(self.stored_as, quantization)
            return (f"the weights of {self.name} are stored as {self.stored_as}: {how}", *self.notes)
        if quantization != "mxfp4" or self.stored_as != "mxfp4":
            return self.notes
        return (
            *self.notes,
            f"quantization mxfp4: {self.name} as published stores its experts in MXFP4, on which this plan rests; a copy of it in another "
            "form is refused when it is trained",
        )

    def require_mxfp4(self) -> None:
        """Check that the checkpoint's experts are in MXFP4.

        Raises:
            ConfigError: they are not.
        """
        kind = self.stored_as if self.base is None else starting_point.stored_as(self.base)[1]
        if kind != "mxfp4":
            where = self.base or self.folder or "this one, by its name or its config.json,"
            raise ConfigError(
                f"quantization mxfp4 keeps experts as their checkpoint holds them; {where} holds {kind or 'plain weights'}: use nf4"
            )


def resolve(name: str, *, trust_remote_code: bool = False) -> ModelSpec:
    """Return the spec of a local folder, of a config.json, or of a Hugging Face name (its files are downloaded).

    Raises:
        ModelError: nothing is there, or what is there is not a config that this transformers knows.
    """
    path, adapted = Path(name).expanduser(), adapter.folder_of(name)
    if adapted is not None:
        return _with_adapter(adapted, partial(resolve, trust_remote_code=trust_remote_code))
    if path.is_file():
        config = read_config(path, trust_remote_code)
        called = getattr(config, STANDS_FOR, name)
        _, kind = starting_point.stored_as(path)
        return ModelSpec(name=called, config=config, folder=None, trust_remote_code=trust_remote_code, stored_as=kind)
    folder = path if path.is_dir() else _download(name)
    starting_point.check_folder(folder)
    config = read_config(folder / "config.json", trust_remote_code)
    config._name_or_path = str(folder.resolve()) if path.is_dir() else name
    _, kind = starting_point.stored_as(folder)
    return ModelSpec(
        name=name,
        config=config,
        folder=folder,
        trust_remote_code=trust_remote_code,
        stored_as=kind,
        notes=(*_of_a_trainer(folder), *_parts(config), *_of_new_tokens(folder)),
    )


def _with_adapter(folder: Path, find: Callable[[str], ModelSpec]) -> ModelSpec:
    name = adapter.base_of(folder)
    try:
        base = find(name)
    except ModelError as error:
        raise ModelError(
            f"the adapter in {folder} is of {name!r}, as base_model_name_or_path in its {adapter.FILE} says: {error}"
        ) from error
    note = f"the adapter in {folder} goes on training, with its own LoRA settings, beside {base.name}"
    return replace(base, adapter=folder, notes=(*base.notes, note, *_of_a_trainer(folder)))


def _of_a_trainer(folder: Path) -> tuple[str, ...]:
    """Return what is to be said of a checkpoint of transformers' ``Trainer``."""
    if not (folder / "trainer_state.json").is_file():
        return ()
    return (
        f"{folder} is a checkpoint of a transformers Trainer: its weights are taken; its optimizer state, schedule and place in the data "
        "are not, and the run begins at step 0",
    )


def _of_new_tokens(folder: Path) -> tuple[str, ...]:
    noted = extension.read(folder)
    return () if noted is None else noted.notes()


def resolve_for_plan(name: str, *, trust_remote_code: bool = False) -> ModelSpec:
    """Return the spec of a folder, a config.json or a known model, without its weights and without a download.

    Raises:
        ModelError: as ``resolve``; for a name that is neither here nor in the catalogue, with the nearest known.
    """
    from transformers import AutoConfig

    if (adapted := adapter.folder_of(name)) is not None:
        return _with_adapter(adapted, partial(resolve_for_plan, trust_remote_code=trust_remote_code))
    if Path(name).expanduser().exists():
        return resolve(name, trust_remote_code=trust_remote_code)
    found = names.find(name)
    notes = (found.note,) if found.note else ()
    if found.model is None:
        assert found.config is not None
        config = read_config(found.config, trust_remote_code)
        return ModelSpec(
            name=name,
            config=config,
            folder=None,
            trust_remote_code=trust_remote_code,
            stored_as=starting_point.stored_as(found.config)[1],
            notes=notes + _parts(config),
        )
    settings = copy.deepcopy(dict(found.model.config))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    stored = names.packing(name) or found.model.stored_as
    return ModelSpec(name=found.model.name, config=config, folder=None, stored_as=stored, notes=notes)


def _parts(config: Any) -> tuple[str, ...]:
    """Return what is to be said of the parts of a model that do not train."""
    from oomless.models.make import sees

    if not sees(config):
        return ()
    return (
        f"{config.model_type} sees as well as reads: its text part is trained, the rest is not loaded and is saved as it is",
    )


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers config in the file ``path``.

    Raises:
        ModelError: the file is not JSON, or of an architecture that this transformers does not know.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from oomless.models.make import is_known

    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the model config {path} cannot be read as JSON: {error}") from error
    if not isinstance(mapping, dict) or "model_type" not in mapping:
        raise ModelError(f"a model config is a JSON object with a model_type; {path} is not")
    starting_point.check(mapping, path)
    _check_layers(path, mapping)
    model_type = str(mapping["model_type"])
    if not is_known(model_type) and not trust_remote_code:
        import transformers

        raise ModelError(
            f"{path} is of architecture {model_type!r}, which transformers {transformers.__version__} does not know as "
            f"a causal language model.{nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} Update transformers, "
            "choose another model, or give --trust-remote-code if its own code is to run."
        )
    try:
        # A folder's own code is found beside its config only where the folder is named.
        place = path.parent if path.name == "config.json" else path
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers validates configs with many exception types
        raise ModelError(f"the model config {path} is not valid: {error}") from error
    starting_point.forget_quantization(config)
    _check_sizes(path, config.get_text_config())
    return config


MOST_LAYERS = 100_000
"""More than any model has; transformers makes lists of this length while it reads a config."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _check_layers(path: Path, mapping: Mapping[str, Any]) -> None:
    parts = [mapping, *(part for part in mapping.values() if isinstance(part, dict))]
    for name, count in ((name, part[name]) for part in parts for name in LAYERS if name in part):
        if isinstance(count, (int, float)) and count > MOST_LAYERS:
            raise ModelError(f"the model config {path} has {name} {count}: a model has at most {MOST_LAYERS:,} layers")


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def most_positions(config: Any) -> int | None:
    """Return how many positions the text model of ``config`` has; ``None`` where they are unlimited, for which XLNet says -1."""
    said = getattr(config.get_text_config(), "max_position_embeddings", None)
    return said if said is not None and said > 0 else None


def largest(config: Any, name: str) -> int | None:
    """Return the number ``name`` of ``config``, the largest where it is one for each layer, or ``None`` without one."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    numbers = [value for layer in layers if isinstance(value := getattr(layer, name, None), int)]
    return max(numbers, default=None)


def _check_sizes(path: Path, config: Any) -> None:
    """Check what no model can be without; what an architecture has as a list, one for each layer, is left to transformers."""
    sizes = {name: size for name in SIZES if (size := largest(config, name)) is not None}
    for name, size in sizes.items():
        if size < 1 and not isinstance(getattr(type(config), name, None), property):  # which a class says of itself
            raise ModelError(f"the model config {path} has {name} {size}: a model has at least 1")
    heads, shared = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 1)
    if heads % shared:
        raise ModelError(
            f"the model config {path} has {shared} key and value heads for {heads} query heads, of which each must serve as many: "
            "num_key_value_heads must divide num_attention_heads"
        )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        near = names.hub_is_near()
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=not near))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"], local_files_only=not near)
        return folder
    except HFValidationError as error:
        raise ModelError(
            f"there is no model folder {name!r}, and it is no Hugging Face name either.{names.suggestion(name)}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"there is no folder {name!r}, it is not in the local cache of the Hugging Face Hub, and it could not be fetched from there "
            f"({type(error).__name__ if near else 'out of reach'}).{names.suggestion(name)} Check the name and the network, log in if "
            "the model is gated, or give a folder."
        ) from error
