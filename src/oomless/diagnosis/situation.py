"""What is known of a run before anything is rehearsed: what was given, what the text says, and what the catalogue knows.

Nothing here needs torch, so that a reader has the first answer at once. What was given and cannot be used becomes a note.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oomless import catalogue
from oomless.diagnosis.logs import Reading
from oomless.diagnosis.messages import ON_GPU
from oomless.diagnosis.model_names import NamedModel
from oomless.diagnosis.several import Several
from oomless.diagnosis.tensors import Dimensions
from oomless.diagnosis.tools import TOOLS, recognise
from oomless.errors import HardwareError, ModelError
from oomless.models.names import by_shape
from oomless.units import format_bytes

Source = Literal["given", "default", "log", "tool", "message", "assumed"]
_PUBLISHED = re.compile(r"(?!.*(?:4bit|8bit|awq|gptq|gguf|int[48]|fp8|nf4))[A-Za-z][\w.-]*/[\w.-]+", re.IGNORECASE)
"""A model under its owner, whose weights are as they were trained."""

SAME_GPU = 0.02
"""Two sizes of a GPU that differ by less are one GPU's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What is known of the run that failed."""

    reading: Reading
    values: Mapping[str, Any] = field(default_factory=dict)
    """Settings under the names of ``TrainConfig``, model and GPU aside."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    tool: str | None = None
    method: str | None = None
    several: Several = field(default_factory=Several)
    mixed_precision: str | None = None
    attention: str | None = None
    model: str | None = None
    """As it was given, or by the catalogue's name."""

    parameters: int | None = None
    dimensions: Dimensions | None = None
    gpu: str | None = None
    """As it was given, or by the catalogue's name."""

    capacity_bytes: int | None = None
    notes: tuple[str, ...] = ()
    """What was given and cannot be used, and what was taken for what."""

    @property
    def trains_all(self) -> bool:
        """Whether all weights train, as far as is known."""
        return bool(self.values.get("trainable", "full") == "full")

    @property
    def trains(self) -> bool:
        """Whether any setting is one of a training."""
        return bool(self.values.keys() - {"dtype", "quantization", "max_seq_length", "trust_remote_code"})

    @property
    def shown_values(self) -> dict[str, Any]:
        """The settings with those of generation beside them."""
        return {**self.others, **self.values}


def read_situation(
    reading: Reading,
    given: Mapping[str, Any],
    *,
    tool: str | None = None,
    mixed_precision: str | None = None,
    attention: str | None = None,
) -> Situation:
    """Return what is known of the run of which ``reading`` tells; what is ``given`` outranks what it says."""
    log, notes = reading.settings, list[str]()
    values = {k: v for k, v in given.items() if k not in ("model", "gpu", "data", "output_dir")}
    sources: dict[str, Source] = dict.fromkeys(values, "given")
    for name, value in log.values.items():
        if name not in values and not (name == "lora_r" and "lora" not in str(values.get("trainable", "lora"))):
            values[name] = value
            sources[name] = "tool" if name in log.by_default else "log"
    if "lora" not in str(values.get("trainable", "full")):
        for name in [n for n in ("lora_r", "quantization") if sources.get(n) == "log"]:
            del values[name], sources[name]
    mixed = mixed_precision or log.mixed_precision
    if "dtype" in values:
        mixed = mixed_precision or (log.mixed_precision if values["dtype"] == "fp32" else None)
        if values["dtype"] == "auto":
            del values["dtype"], sources["dtype"]
    model, parameters, dimensions = _model(given.get("model"), log.named, notes)
    if model is not None:
        sources["model"] = "given" if given.get("model") else "log"
    gpu, capacity = _gpu(reading, given.get("gpu"), notes)
    if gpu is not None:
        sources["gpu"] = "given" if given.get("gpu") else "log"
    elif capacity is not None:
        sources["gpu"] = "message"
    positions = dimensions.positions if dimensions is not None else None
    if positions and values.get("max_seq_length", 0) > positions:
        notes.append(
            f"a length of {values['max_seq_length']:,} is more than the {positions:,} that the model's config allows"
        )
    return Situation(
        reading=reading,
        values=values,
        sources=sources,
        others=log.others,
        tool=_tool(tool, log.tool, notes),
        method=log.method,
        several=log.several,
        mixed_precision=mixed,
        attention=attention or log.attention,
        model=model,
        parameters=parameters,
        dimensions=dimensions,
        gpu=gpu,
        capacity_bytes=capacity,
        notes=tuple(notes),
    )


def _tool(given: str | None, log: str | None, notes: list[str]) -> str | None:
    if given is None or given in TOOLS:
        return given or log
    meant = recognise(given)
    said = f"taken as {meant}" if meant else f"not known here; known are {', '.join(TOOLS)}"
    notes.append(f"--tool {given}: {said}")
    return meant or log


def _model(
    given: str | None, named: NamedModel | None, notes: list[str]
) -> tuple[str | None, int | None, Dimensions | None]:
    if given is None:
        if named is not None and named.known is None:
            notes.append(
                f"{named.text} is not a model that is known here: --model NAME, or --model path/to/config.json, makes the answer better"
            )
        known = catalogue.model(named.known) if named is not None and named.known else None
        name = (
            None if known is None or named is None else named.text if _PUBLISHED.fullmatch(named.text) else known.name
        )
    else:
        path = Path(given).expanduser()
        if path.exists():
            return given, None, _of_file(path)
        known, name = _known(given), given
    if known is None:
        return name, None, None
    return name, known.parameters, Dimensions.of_mapping(known.config)


def _known(name: str) -> catalogue.Model | None:
    try:
        return catalogue.model(name)
    except ModelError:
        return by_shape(name)


def _of_file(path: Path) -> Dimensions | None:
    try:
        return Dimensions.of_mapping(json.loads((path / "config.json" if path.is_dir() else path).read_text()))
    except (OSError, ValueError, AttributeError):
        return None


def _gpu(reading: Reading, given: str | None, notes: list[str]) -> tuple[str | None, int | None]:
    """Return the GPU's name and size; the size that a message prints is that of the very GPU."""
    message = reading.first.message if reading.first is not None else None
    capacity = message.capacity if message is not None and message.kind == "allocator" else None
    named = list(reading.settings.gpus)
    if given is not None:
        try:
            as_given = given.startswith(("virtual:", "auto")) or "x" in given[:4]
            known = None if as_given else catalogue.gpu(given)
            named = [known.name if known in catalogue.gpus() else given]
        except HardwareError as error:
            notes.append(str(error))
    sizes = {name: _size(name) for name in named}
    if capacity is not None:
        near = {n: s for n, s in sizes.items() if s is None or abs(s - capacity.middle) <= 0.12 * capacity.middle}
        if given is not None and sizes and not near:
            name, size = next(iter(sizes.items()))
            notes.append(
                f"the message comes from a GPU of {capacity.text}, and {name} has {format_bytes(size or 0)}: the message's size is used"
            )
        best = min(near, key=lambda n: abs((near[n] or 0) - capacity.middle), default=None)
        return best, capacity.middle
    if len(sizes) == 1:
        return next(iter(sizes.items()))
    if len(sizes) > 1:
        notes.append(f"the GPU may be {' or '.join(sizes)}: --gpu says which")
    return None, None


def _size(name: str) -> int | None:
    try:
        return catalogue.gpu(name).usable_bytes
    except HardwareError:
        return None


PAIRS = ("dpo", "orpo", "reward model")
"""Methods that run a chosen and a rejected answer together."""

NOT_REHEARSED = {
    "ppo": "PPO holds several models and generates between its steps, which is not rehearsed",
    "distillation": "a teacher beside the student is not rehearsed",
}


OWN_SHARING = ("torchtune", "litgpt", "nemo", "verl", "unsloth")
"""Tools that cut a model otherwise than accelerate."""


def _why_not_shared(situation: Situation) -> str | None:
    several = situation.several
    if several.sharing not in ("fsdp", "zero1", "zero2", "zero3"):
        return "which is rehearsed for FSDP and ZeRO alone"
    if several.sharing != "fsdp" and situation.others.get("offload_param"):
        return "with their weights in the host's memory, which is not rehearsed"
    if situation.tool in OWN_SHARING:
        return f"which {situation.tool} does in its own way"
    if situation.values.get("quantization") and several.sharing in ("fsdp", "zero3"):
        return "which is not rehearsed with packed weights"
    if several.gpus is None or several.at_least:
        return "and the text does not say how many there are"
    return None


def why_not_rehearsed(situation: Situation) -> str | None:
    """Return why the run cannot be rehearsed as it was; ``None`` where it can be."""
    first, several = situation.reading.first, situation.several
    if first is not None and (first.message.kind not in ON_GPU or first.place.in_managed_memory):
        return "it was not the training's GPU memory that ran out"
    if first is not None and first.message.source not in (
        "CUDA",
        "HIP",
        "cuBLAS",
        "cuDNN",
        "bitsandbytes",
        "Triton",
        "NCCL",
        "cuSOLVER",
    ):
        return f"rehearsals simulate CUDA's allocator, not that of {first.message.source}"
    if first is not None and (first.place.generating or first.place.phase == "save"):
        return "it failed while it generated text" if first.place.generating else "it failed while it saved"
    if first is not None and first.place.phase == "load" and situation.tool is None and not situation.trains:
        return "it failed while the model was loaded, and nothing in the text trains it"
    if situation.method in NOT_REHEARSED:
        return NOT_REHEARSED[situation.method]
    if situation.method == "grpo" and (situation.tool in ("unsloth", "verl") or situation.several.sharing == "layers"):
        return "GRPO is rehearsed as TRL does it"
    if situation.method == "grpo" and not {"max_completion_length"} <= situation.others.keys():
        return "the text does not say how long GRPO's answers may be (max_completion_length)"
    if several.shares and (why := _why_not_shared(situation)) is not None:
        return f"the model is shared out among GPUs, {why}"
    if situation.others.get("packed_weights") and "quantization" not in situation.values:
        return "weights that are published packed (AWQ, GPTQ, FP8) are not rehearsed"
    if situation.others.get("quantization_config") and "quantization" not in situation.values:
        return "the text does not say in how many bits the weights are packed: --quantization nf4 or int8"
    if situation.model is None and situation.reading.settings.named is None:
        return "the text names no model: --model NAME"
    if situation.model is None:
        return "the model is not known here: --model NAME, or --model path/to/config.json"
    if situation.gpu is None and situation.capacity_bytes is None:
        return "the GPU is not known: --gpu NAME, or a size such as --gpu 24GiB"
    return None
