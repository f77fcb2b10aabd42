"""The settings that a log prints: as arguments, as YAML, in the banners of Trainer, PEFT and Unsloth, or in words.

Every value is one that stands in the text. Where a setting stands there several times, the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from oomless import catalogue
from oomless.diagnosis.frames import libraries

_INTEGERS = {
    "per_device_train_batch_size": r"per_device_train_batch_size|micro_batch_size|train_micro_batch_size_per_gpu|"
    r"Instantaneous batch size per device|Batch size per device|batch[ _-]?size|batch",
    "gradient_accumulation_steps": r"gradient_accumulation_steps|Gradient Accumulation steps",
    "max_seq_length": r"max_seq_length|max_seq_len|sequence_len|seq_len(?:gth)?|block_size|cutoff_len|max_length|"
    r"model_max_length|sequence length|seq(?:uence)?[ _-]length|context length",
    "per_device_eval_batch_size": r"per_device_eval_batch_size|eval_batch_size",
    "lora_r": r"lora_r|lora_rank",
}
_INTEGER = r"(?<![\w-])(?:{names})['\"]?(?:\s*[:=]\s*|\s+(?:of\s+|is\s+)?)['\"]?(\d[\d,]{{0,8}})(?![\w.]*\d)\b"
_TRAINABLE = re.compile(
    r"(?:trainable params|Number of trainable parameters|trainable parameters)\s*[:=]\s*(\d[\d,]*)", re.IGNORECASE
)
_ALL = re.compile(r"all params\s*[:=]\s*(\d[\d,]*)", re.IGNORECASE)
_SWITCH = r"(?<![\w-]){name}['\"]?\s*[:=]\s*['\"]?(true|false)"
_OPTIMIZER = re.compile(r"(?<![\w-])optim(?:izer)?['\"]?\s*[:= ]\s*['\"]?(?:OptimizerNames\.)?([A-Za-z]\w*)")
_OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adam": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit", "adam8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit", "adafactor": "adafactor", "sgd": "sgd", "muon": "muon", "galore_adamw": "galore",
    "apollo_adamw": "apollo",
}  # fmt: skip
_DTYPE = re.compile(
    r"(?:torch_)?dtype['\"]?\s*[:=]\s*['\"]?(?:torch\.)?(float32|bfloat16|float16|fp32|bf16|fp16)\b|load_in_(4bit|8bit)['\"]?\s*[:=]\s*['\"]?(?:true)",
    re.IGNORECASE,
)
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_EAGER = re.compile(r"attn_implementation['\"]?\s*[:=]\s*['\"]?(eager|sdpa|flash_attention_\d)")
_UNSLOTH_GPU = re.compile(r"GPU: (?:NVIDIA )?([^.\n]+?)\. (?:Num GPUs|Max memory)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSettings:
    """What a text says about the run."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Settings under the names of ``TrainConfig``."""

    model: str | None = None
    """A model that the catalogue knows."""

    gpu: str | None = None
    """A GPU that the catalogue knows."""

    tool: str | None = None
    """trainer, trl, peft, unsloth, axolotl, accelerate or oomless."""

    beside: tuple[str, ...] = ()
    """Other libraries that it names: deepspeed, fsdp, bitsandbytes ..."""

    mixed_precision: str | None = None
    """fp16 or bf16, where the text asks for automatic casting."""

    attention: str | None = None
    trainable_parameters: int | None = None
    all_parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "model": self.model,
            "gpu": self.gpu,
            "tool": self.tool,
            "beside": list(self.beside),
            "mixed_precision": self.mixed_precision,
            "attention": self.attention,
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
            **dict(self.values),
        }


def read_settings(text: str) -> LogSettings:
    """Return the settings that ``text``, which is clean, prints."""
    tool, beside = libraries(text)
    values: dict[str, Any] = {}
    for name, spellings in _INTEGERS.items():
        # The first spelling that occurs is the most precise one.
        for spelling in spellings.split("|"):
            found = re.findall(_INTEGER.format(names=spelling), text, re.IGNORECASE)
            numbers = [int(number.replace(",", "")) for number in found]
            sensible = [n for n in numbers if 0 < n < 10_000_000 and (name != "max_seq_length" or n > 1)]
            if sensible:
                values[name] = sensible[-1]
                break
    if _switch(text, "gradient_checkpointing"):
        values["gradient_checkpointing"] = True
    optimizers = [_OPTIMIZERS[name.lower()] for name in _OPTIMIZER.findall(text) if name.lower() in _OPTIMIZERS]
    if optimizers:
        values["optimizer"] = optimizers[-1]
    _read_precision(text, values)
    if "lora_r" in values or re.search(r"\bLoraConfig\b|\badapter['\"]?\s*[:=]\s*['\"]?q?lora\b", text):
        values["trainable"] = "lora"
    trainable, everything = _number(_TRAINABLE, text), _number(_ALL, text)
    if trainable and everything and trainable < everything // 2 and "trainable" not in values and tool != "oomless":
        values["trainable"] = "lora"
    if values.get("quantization") and "trainable" not in values:
        values["trainable"] = "lora"
    if values.get("trainable") != "lora":
        values.pop("lora_r", None)
        values.pop("quantization", None)
    mixed = next((kind for kind in ("bf16", "fp16") if _switch(text, kind)), None)
    attention = _EAGER.findall(text)
    return LogSettings(
        values=values,
        model=known_model(text),
        gpu=known_gpu(text),
        tool=tool,
        beside=beside,
        mixed_precision=mixed,
        attention=attention[-1] if attention else None,
        trainable_parameters=trainable,
        all_parameters=everything,
    )


def _read_precision(text: str, values: dict[str, Any]) -> None:
    for dtype, bits in _DTYPE.findall(text):
        if dtype:
            values["dtype"] = _DTYPES.get(dtype.lower(), dtype.lower())
        else:
            values["quantization"] = {"4bit": "nf4", "8bit": "int8"}[bits.lower()]
    if re.search(r"\bbnb-4bit\b|\badapter['\"]?\s*[:=]\s*['\"]?qlora\b", text):
        values["quantization"] = "nf4"


def _switch(text: str, name: str) -> bool:
    found = re.findall(_SWITCH.format(name=name), text, re.IGNORECASE)
    return bool(found) and found[-1].lower() == "true"


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = [match.replace(",", "") for match in pattern.findall(text)]
    return int(found[-1]) if found and len(found[-1]) < 15 else None


def known_model(text: str) -> str | None:
    """Return the catalogue's model whose name stands in ``text``, however it is punctuated; the longest name counts."""
    squeezed = _squeeze(text)
    best: tuple[int, int, str] | None = None
    for spelling, name in _model_spellings():
        place = _find_word(squeezed, spelling)
        if place >= 0:
            found = (len(spelling), place, name)
            best = found if best is None or found[0] > best[0] else best
    return best[2] if best else None


def known_gpu(text: str) -> str | None:
    """Return the catalogue's GPU whose name stands in ``text`` as a word of its own."""
    match = _UNSLOTH_GPU.search(text)
    for part in ([match[1]] if match else []) + [text]:
        squeezed = _squeeze(part)
        found = [(len(spelling), name) for spelling, name in _gpu_spellings() if _find_word(squeezed, spelling) >= 0]
        if found:
            longest = max(found)[0]
            names = {name for length, name in found if length == longest}
            return names.pop() if len(names) == 1 else None
    return None


def _squeeze(text: str) -> str:
    """Lower-case words with single blanks between them: ``Llama-3.2_1B`` is ``llama 3.2 1b``."""
    return " " + re.sub(r"[^a-z0-9.]+", " ", text.lower()).replace(". ", " ") + " "


def _find_word(squeezed: str, spelling: str) -> int:
    return squeezed.find(f" {spelling} ")


@cache
def _model_spellings() -> tuple[tuple[str, str], ...]:
    spellings = []
    for name in catalogue.models():
        entry = catalogue.model(name)
        for published in (entry.name, *entry.also):
            spellings.append((_squeeze(published.rpartition("/")[2]).strip(), entry.name))
    return tuple(s for s in spellings if len(s[0]) > 3)


@cache
def _gpu_spellings() -> tuple[tuple[str, str], ...]:
    spellings: dict[tuple[str, str], None] = {}
    for entry in catalogue.gpus():
        for published in (entry.name, *entry.aliases):
            for spelling in {published, re.sub(r"(?<=[A-Za-z])\s+(?=\d)", "", published)}:
                spellings[_squeeze(spelling).strip(), entry.name] = None
    return tuple(s for s in spellings if not s[0].isdigit() and len(s[0]) > 1)
