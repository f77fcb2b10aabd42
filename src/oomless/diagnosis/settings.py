"""The settings that a text shows: as options, YAML, JSON or Python keywords, in the banners of tools, or in words.

Every value is one that stands in the text, or follows from what the tool does when it is not told. Where a setting stands there
several times, the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from oomless.diagnosis.frames import libraries
from oomless.diagnosis.hardware_names import named_gpus
from oomless.diagnosis.model_names import TEACHER, NamedModel, named_model
from oomless.diagnosis.several import Several, read_several

_INTEGERS = {
    "per_device_train_batch_size": r"per_device_train_batch_size|train_micro_batch_size_per_gpu|micro_batch_size|"
    r"ppo_micro_batch_size_per_gpu|per_gpu_train_batch_size|Instantaneous batch size per device|Batch size per device|"
    r"batch size \(per device\)|batch[_ ]?size|バッチサイズ|批(?:次|处理)?大小|배치 ?크기|batch",
    "gradient_accumulation_steps": r"gradient_accumulation_steps|Gradient Accumulation steps|grad_accum(?:ulation)?(?:_steps)?",
    "max_seq_length": r"max_seq_length|max_seq_len|sequence_len|cutoff_len|block_size|seq(?:uence)?_length|seq_len|max_length|"
    r"max_model_len|sequence length|seq(?:uence)?[ -]length|context length|max_tokens_per_sample|model_max_length",
    "per_device_eval_batch_size": r"per_device_eval_batch_size|eval_batch_size|val_batch_size",
    "lora_r": r"lora_r|lora_rank",
}
_OTHER_INTEGERS = {
    "num_generations": r"num_generations|rollout\.n",
    "max_completion_length": r"max_completion_length|max_response_length|max_new_tokens",
    "max_prompt_length": r"max_prompt_length",
    "eval_accumulation_steps": r"eval_accumulation_steps",
    "dataloader_num_workers": r"dataloader_num_workers|num_workers|preprocessing_num_workers|dataset_num_proc|num_proc",
}
_KEY = r"(?<!\w)(?<!\w-)(?:{names})['\"]?"
_INTEGER = _KEY + r"(?:\s*[:=|│]+\s*|\s+(?:of\s+|is\s+|=\s*)?)['\"]?(\d[\d,]{{0,8}})(?![\w.]*\d)\b"
_TRAINABLE = re.compile(
    r"(?:trainable params|Number of trainable parameters|trainable parameters)\s*[:=]\s*(\d[\d,]*)", re.IGNORECASE
)
_ALL = re.compile(
    r"all params\s*[:=]\s*(\d[\d,]*)|trainable parameters\s*=\s*[\d,]+\s*(?:/|of)\s*(\d[\d,]*)", re.IGNORECASE
)
_TRUE = r"(?:true|yes|on|1|enable[sd]?)\b"
_FALSE = r"(?:false|no|off|0|none|null|disable[sd]?)\b"
_SWITCH = r"(?<!\w)(?<!\w-)({dashes}){name}['\"]?(?:\s*[:=│|]+\s*|\s+)?(?:\{{\s*['\"]?enabled['\"]?\s*:\s*)?['\"]?({true}|{false}|auto\b)?"
_OPTIMIZER = re.compile(
    r"(?<!\w)optim(?:izer)?(?:_name|\.name|_type)?['\"]?\s*[:= ]\s*['\"]?(?:OptimizerNames\.|torch\.optim\.|bitsandbytes\.optim\.|bnb\.optim\.)?"
    r"([A-Za-z]\w*)"
    r"|_component_:\s*(?:torch|bitsandbytes|torchao)\.optim\w*\.(?:\w+\.)*(\w+)|\b(?:torch\.optim|bnb\.optim|bitsandbytes\.optim)\.(\w+)\("
)
_OPTIMIZER_IN_WORDS = re.compile(
    r"(?<![\w.])(paged_adamw(?:_8bit|_32bit)?|adamw_8bit|adamw_bnb_8bit)(?!\w)", re.IGNORECASE
)
_STATE_IN_8_BITS = re.compile(r"bitsandbytes[/\\]optim[^\n]*in init_state[^\0]{0,400}?dtype=torch\.uint8")
_PAGED = re.compile(r"\bin get_paged\b|get_managed_ptr")
_OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adam": "adamw",
    "fused_adam": "adamw", "fusedadam": "adamw", "deepspeedcpuadam": "adamw", "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw", "pagedadamw": "adamw", "pagedadamw32bit": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit", "adam8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit", "pagedadamw8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "adafactor": "adafactor", "sgd": "sgd", "muon": "muon",
    "galore_adamw": "galore", "apollo_adamw": "apollo",
}  # fmt: skip
_DTYPE = re.compile(
    r"(?<![\w.])(?:torch_)?dtype['\"]?\s*(?:[:=]|\s)\s*['\"]?(?:torch\.)?(float32|bfloat16|float16|fp32|bf16|fp16|half)\b"
    r"|\bprecision['\"]?\s*(?:[:=]|\s)\s*['\"]?(32|bf16|16)-true\b|\bmodel\.(half|bfloat16)\(\)",
    re.IGNORECASE,
)
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "32": "fp32", "16": "fp16"}
_MIXED = re.compile(
    r"\bmixed[_ ]precision['\"]?\s*(?:[:=]|\s)\s*['\"]?(bf16|fp16)\b|\bprecision['\"]?\s*(?:[:=]|\s)\s*['\"]?(bf16|16)-mixed\b",
    re.IGNORECASE,
)
_FOUR_BITS = re.compile(
    rf"\bload_in_4bit['\"]?\s*(?:[:=]|\s)\s*['\"]?{_TRUE}|\bquant(?:ization)?_bits?['\"]?\s*(?:[:=]|\s)\s*['\"]?4\b|-4bit\b|\bint4\b"
    r"|\badapter['\"]?\s*[:=]\s*['\"]?qlora\b|\bQLoRA\b|\bbnb\.nf4|--load_in_4bit\b|\bqlora_finetune|[-_/]qlora",
    re.IGNORECASE,
)
_EIGHT_BITS = re.compile(
    rf"\bload_in_8bit['\"]?\s*(?:[:=]|\s)\s*['\"]?{_TRUE}|\bquant(?:ization)?_bits?['\"]?\s*(?:[:=]|\s)\s*['\"]?8\b|--load_in_8bit\b",
    re.IGNORECASE,
)
_PACKED = re.compile(r"(?<![A-Za-z])(?:AWQ|GPTQ)(?![A-Za-z])|[\w.]-(?:FP8|w[48]a(?:8|16))\b", re.IGNORECASE)
"""Weights that are published in 4 or 8 bits."""

_CONFIGURED = re.compile(r"\bquantization_config\s*=\s*(?!None\b)\w|\bBitsAndBytesConfig\(")
"""Code that packs the weights while it loads them."""

_NOT_QUANTIZED = re.compile(r"\bload_in_[48]bit['\"]?\s*[:=]\s*['\"]?false", re.IGNORECASE)
_LORA = re.compile(
    rf"\bLoraConfig\b|\bget_peft_model\b|(?:finetuning|train|tuner|sft|peft|adapter)(?:_type|_method)?['\"]?\s*(?:[:=]|\s)\s*['\"]?q?lora\b"
    rf"|\buse_(?:peft|q?lora)['\"]?\s*(?:[:=]|\s)\s*['\"]?{_TRUE}|--use_(?:peft|q?lora)\b(?!\s+false)|\blora_(?:target|alpha|dropout)\w*\b|\bq?lora_finetune"
    r"|\bPeftModel\w*\b|\bQLoRA\b|\bwith LoRA\b|\bLoRA ?(?:微调|训练|学習|チューニング|학습)|\bLoRA fine|peft/tuners/lora|\bfinetune_lora\b",
    re.IGNORECASE,
)
_FULL = re.compile(
    r"(?:finetuning|train|tuner|sft)_type['\"]?\s*(?:[:=]|\s)\s*['\"]?full\b|\bfull_finetuning\s*=\s*True|\bfull[_ -](?:parameter|param|fine-?tun)"
    r"|全参|全量",
    re.IGNORECASE,
)
_ATTENTION = re.compile(
    r"(?:\battn_impl(?:ementation)?|\bflash_attn|attn)['\"]?\s*(?:[:=]|\s)\s*['\"]?(eager|sdpa|flash_attention_\d|flash_attn\d?|fa2|flex_attention)\b"
)
_LIGER = ("use_liger_kernel", "use_liger", "enable_liger_kernel", "liger_fused_linear_cross_entropy", "liger_kernel", "cut_cross_entropy")  # fmt: skip
_CHECKPOINTING = (
    *("gradient_checkpointing", "enable_activation_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
    *("enable_gradient_checkpointing", "grad_checkpointing", "fsdp_activation_checkpointing", "activations_checkpoint_granularity"),
)  # fmt: skip
_CHECKPOINTING_ON = re.compile(
    r"gradient_checkpointing_enable\(\)|use_gradient_checkpointing\s*=\s*['\"]unsloth|prepare_model_for_kbit_training\((?!.*use_gradient_checkpointing\s*=\s*False)"
    r"|torch[/\\]utils[/\\]checkpoint\.py|unsloth_zoo[/\\]gradient_checkpointing|Gradient checkpointing enabled|`?use_cache=True`? is incompatible with gradient checkpointing"
    r"|activations_checkpoint_granularity['\"]?\s*[:=]\s*['\"]?(?:full|selective)|recompute[-_]granularity[ =:]+(?:full|selective)",
)
_CHECKPOINTING_OFF = re.compile(rf"disable_gradient_checkpointing['\"]?\s*(?:[:=]|\s)\s*['\"]?{_TRUE}", re.IGNORECASE)
_ON = {
    "packing": ("packing", "sample_packing"),
    "offload_optimizer": ("optimizer_cpu_offload",),
    "cpu_offload": ("fsdp_offload_params", "fsdp_cpu_offload", "cpu_offload", "param_offload"),
    "prediction_loss_only": ("prediction_loss_only",),
    "optimizer_in_backward": ("optimizer_in_bwd",),
    "use_vllm": ("use_vllm",),
    "vllm_sleeps": ("vllm_enable_sleep_mode", "sleep_level", "free_cache_engine"),
    "padding_free": ("padding_free",),
}
_EXPANDABLE = re.compile(
    r"(?:environ\[['\"]PYTORCH_(?:CUDA_|HIP_)?ALLOC_CONF['\"]\]\s*=\s*['\"][^'\"\n]*|(?:export|set|-e|env)\s+['\"]?PYTORCH_(?:CUDA_|HIP_)?ALLOC_CONF=\S*|"
    r"^\s*PYTORCH_(?:CUDA_|HIP_)?ALLOC_CONF=\S*)expandable_segments:True(?!\s+to\s+avoid)",
    re.MULTILINE,
)
_OFFLOAD = re.compile(r"offload_(optimizer|param)['\"]?\s*[:=]\s*\{?\s*['\"]?device['\"]?\s*[:=]\s*['\"]?(cpu|nvme)")
_OFFLOAD_FLAG = re.compile(
    r"offload_(optimizer|param)(?:_device)?['\"]?\s*[:=]\s*['\"]?cpu\b|zero_?[23]_(offload)\b|deepspeed\b['\":=\s]{1,6}\S*_z[23]_(offload)"
    r"|\b(optimizer) (?:state )?offload(?:ed|ing)?\b|zero-?[23]\W{1,3}(?:with )?(?:CPU )?(offload)\b",
    re.IGNORECASE,
)
_METHODS = (
    ("dpo", r"\bDPO(?:Trainer|Config)?\b|dpo_trainer"),
    ("orpo", r"\bORPO(?:Trainer|Config)?\b"),
    ("kto", r"\bKTO(?:Trainer|Config)?\b"),
    ("grpo", r"\bGRPO(?:Trainer|Config)?\b|grpo_trainer|adv_estimator=grpo"),
    ("ppo", r"\bPPO(?:Trainer|Config|v2Trainer)?\b|ppo_trainer|adv_estimator=gae"),
    (
        "reward model",
        r"\bReward(?:Trainer|Config)\b|reward_trainer|PairwiseTrainer|\bstage['\"]?\s*(?:[:=]|\s)\s*['\"]?rm\b",
    ),
    ("gkd", r"\bGKD(?:Trainer|Config)?\b|gkd_trainer"),
    ("distillation", r"\bDistillation(?:Trainer|Config)\b|\bteacher_model|knowledge_distillation|distill\w*\.py"),
)
_STAGE = re.compile(
    r"\b(?:stage|rlhf_type|rl|rl_type)['\"]?\s*(?:[:=]|\s)\s*['\"]?(sft|pt|dpo|orpo|kto|grpo|ppo|gkd|simpo)\b"
)
_PRECISION_IS_WEIGHTS = ("llamafactory", "ms-swift", "axolotl", "unsloth", "verl", "torchtune", "litgpt", "nemo")
"""Tools that load the weights themselves in 16 bits where they are told bf16 or fp16."""

_CHECKPOINTS_BY_DEFAULT = ("llamafactory", "ms-swift", "unsloth")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSettings:
    """What a text says about the run."""

    values: Mapping[str, Any] = field(default_factory=dict)
    """Settings under the names of ``TrainConfig``."""

    others: Mapping[str, Any] = field(default_factory=dict)
    """What else it sets, under the names that most tools have for it: ``use_vllm``, ``liger`` ..."""

    by_default: frozenset[str] = frozenset()
    """Of all these, what the text does not say, but the tool does when it is not told."""

    named: NamedModel | None = None
    """The model, as the text names it and as it is known."""

    gpus: tuple[str, ...] = ()
    """The catalogue's GPUs that it may mean; several where one name has several sizes."""

    tool: str | None = None
    """One of ``tools.TOOLS``."""

    beside: tuple[str, ...] = ()
    """Other libraries that it names: deepspeed, fsdp, bitsandbytes ..."""

    method: str | None = None
    """dpo, grpo, ppo ...; ``None`` for plain training."""

    several: Several = field(default_factory=Several)
    mixed_precision: str | None = None
    """fp16 or bf16, where the text asks for automatic casting."""

    attention: str | None = None
    """eager, sdpa or flash."""

    trainable_parameters: int | None = None
    all_parameters: int | None = None

    @property
    def model(self) -> str | None:
        """The model by the catalogue's name."""
        return self.named.known if self.named is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "model": self.model,
            "model_in_the_text": None if self.named is None else self.named.text,
            "gpu": list(self.gpus),
            "tool": self.tool,
            "beside": list(self.beside),
            "method": self.method,
            "several": self.several.to_dict(),
            "mixed_precision": self.mixed_precision,
            "attention": self.attention,
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
            **dict(self.others),
            **dict(self.values),
        }


_OTHERS_CODE = re.compile(
    r"^([ \t]*File \"[^\"\n]*(?:site-packages|dist-packages|lib/python)[^\"\n]*\", line \d+, in [^\n]+)\n[^\n]*",
    re.MULTILINE,
)
"""A frame in a library, whose code is nobody's setting."""


def read_settings(text: str) -> LogSettings:
    """Return the settings that ``text``, which is clean, prints."""
    tool, beside = libraries(text)
    whole, text = text, _OTHERS_CODE.sub(r"\1", text)
    values: dict[str, Any] = {}
    for name, spellings in _INTEGERS.items():
        number = _integer(spellings, text, at_least=2 if name == "max_seq_length" else 1)
        if number is not None:
            values[name] = number
    by_default = set()
    others = dict(_others(text))
    checkpointing = _any_switch(text, _CHECKPOINTING)
    if _CHECKPOINTING_OFF.search(text):
        checkpointing = False
    if checkpointing or (checkpointing is None and _CHECKPOINTING_ON.search(text)):
        values["gradient_checkpointing"] = True
    elif checkpointing is None and tool in _CHECKPOINTS_BY_DEFAULT:
        values["gradient_checkpointing"] = True
        by_default.add("gradient_checkpointing")
    optimizers = [next(n for n in match if n).lower() for match in _OPTIMIZER.findall(text) if any(match)]
    optimizers = optimizers or [match.lower() for match in _OPTIMIZER_IN_WORDS.findall(text)]
    known = [(_OPTIMIZERS[name], "paged" in name) for name in optimizers if name in _OPTIMIZERS]
    if known:
        values["optimizer"], others["paged"] = known[-1]
    elif _STATE_IN_8_BITS.search(whole):
        values["optimizer"] = "adamw_8bit"
    if _PAGED.search(whole):
        others["paged"] = True
    trainable, everything = _number(_TRAINABLE, text), _number(_ALL, text)
    packed = bool(others.get("packed_weights") or others.get("quantization_config"))
    _read_part(text, values, tool, trainable, everything, packed)
    if "quantization" in values:
        others["quantization_config"] = False
    mixed = _read_precision(text, values, tool)
    parts = [others.get(name) for name in ("max_prompt_length", "max_completion_length")]
    if "max_seq_length" not in values and parts[0] and parts[1]:
        values["max_seq_length"] = parts[0] + parts[1]
    attention = _ATTENTION.findall(text)
    kind = (
        attention[-1] if attention else "flash" if re.search(r"\bflash_attention['\"]?\s*[:=]\s*true", text) else None
    )
    return LogSettings(
        values=values,
        others={name: value for name, value in others.items() if value},
        by_default=frozenset(by_default),
        named=named_model(text),
        gpus=named_gpus(text),
        tool=tool,
        beside=beside,
        method=_method(text),
        several=read_several(text, "fsdp" if tool == "verl" else None),
        mixed_precision=mixed,
        attention=kind if kind in (None, "eager", "sdpa") else "flash",
        trainable_parameters=trainable,
        all_parameters=everything,
    )


def _integer(spellings: str, text: str, *, at_least: int = 1) -> int | None:
    for spelling in re.split(r"\|(?![^()]*\))", spellings):  # the first spelling that occurs is the most precise one
        names = re.sub(r"[_ ](?![^\[]*\])", "[-_ ]", spelling)
        found = re.findall(_INTEGER.format(names=names), text, re.IGNORECASE)
        numbers = [int(number.replace(",", "")) for number in found]
        sensible = [n for n in numbers if at_least <= n < 10_000_000]
        if sensible:
            return sensible[-1]
    return None


def _others(text: str) -> Iterator[tuple[str, Any]]:
    for name, spellings in _OTHER_INTEGERS.items():
        yield name, _integer(spellings, text)
    for name, switches in _ON.items():
        yield name, _any_switch(text, switches)
    yield (
        "liger",
        _any_switch(text, _LIGER)
        or bool(
            re.search(
                r"apply_liger_kernel|CutCrossEntropyPlugin|(?:liger_kernel|cut_cross_entropy|chunked_logprob)[/\\.]"
                r"|fused_lm_head=True",
                text,
            )
        ),
    )
    buckets = re.findall(r"(?<![a-z_])reduce_bucket_size['\"]?\s*[:=\s]\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\b", text)
    yield "reduce_bucket_size", int(float(buckets[-1])) if buckets and float(buckets[-1]) < 1e12 else None
    yield "packed_weights", bool(_PACKED.search(text))
    yield "quantization_config", bool(_CONFIGURED.search(text))
    yield "expandable", bool(_EXPANDABLE.search(text))
    for match in [*_OFFLOAD.finditer(text), *_OFFLOAD_FLAG.finditer(text)]:
        part = (match[1] or "optimizer").lower()
        yield f"offload_{part}", True
        if "z3" in match[0].lower() or "zero3" in match[0].lower():
            yield "offload_param", True  # the tools' files of this name offload both
    share = re.findall(r"(?:vllm_)?gpu_memory_utilization['\"]?\s*(?:[:=]|\s)\s*['\"]?(0?\.\d+|1\.0)", text)
    yield "gpu_memory_utilization", float(share[-1]) if share else None
    yield "vllm_server", bool(re.search(r"vllm_mode['\"]?\s*[:=\s]\s*['\"]?server|vllm-serve\b", text))
    beta = re.findall(r"(?<![\w_])beta['\"]?\s*[:=\s]\s*(0?\.\d+|\d+(?:\.\d+)?)", text)
    yield "beta", float(beta[-1]) if beta else None
    teachers = [a or b for a, b in TEACHER.findall(text)]
    yield "teacher_model", teachers[-1] if teachers else None
    yield "vllm", bool(share) or bool(re.search(r"(?<![a-z])vllm(?![a-z])", text, re.IGNORECASE))


def _read_part(
    text: str, values: dict[str, Any], tool: str | None, trainable: int | None, everything: int | None, packed: bool
) -> None:
    """Read what trains, and in what the rest is stored."""
    bits = "nf4" if _FOUR_BITS.search(text) else "int8" if _EIGHT_BITS.search(text) else None
    if bits and not (
        _NOT_QUANTIZED.search(text) and not re.search(r"load_in_[48]bit['\"]?\s*[:=]\s*['\"]?true", text, re.I)
    ):
        values["quantization"] = bits
    full = _FULL.search(text)
    if full:
        values["trainable"] = "full"
    if not full and ("lora_r" in values or _LORA.search(text) or values.get("quantization") or packed):
        values["trainable"] = "lora"
    if trainable and everything and trainable < everything // 2 and tool != "oomless":
        values["trainable"] = "lora"
    if values.get("trainable") != "lora":
        values.pop("lora_r", None)
        values.pop("quantization", None)


def _read_precision(text: str, values: dict[str, Any], tool: str | None) -> str | None:
    """Read the dtype of the weights, and return what the arithmetic is cast to where the text asks for it."""
    dtypes = [next(part for part in match if part).lower() for match in _DTYPE.findall(text) if any(match)]
    if dtypes:
        values["dtype"] = _DTYPES.get(dtypes[-1], dtypes[-1])
    if _switch(text, "pure_bf16"):
        values["dtype"] = "bf16"
    casts = [(a or b).lower() for a, b in _MIXED.findall(text)]
    mixed = next((kind for kind in ("bf16", "fp16") if _switch(text, kind)), None) or (
        casts and {"16": "fp16"}.get(casts[-1], casts[-1]) or None
    )
    casts_alone = tool == "llamafactory" and values.get("trainable") != "lora"
    if mixed and "dtype" not in values and tool in _PRECISION_IS_WEIGHTS and not casts_alone:
        values["dtype"] = mixed
        return None
    return mixed


def _method(text: str) -> str | None:
    stages = _STAGE.findall(text)
    if stages:
        return None if stages[-1] in ("sft", "pt") else {"simpo": "orpo"}.get(stages[-1], stages[-1])
    return next((name for name, pattern in _METHODS if re.search(pattern, text)), None)


def _any_switch(text: str, names: tuple[str, ...]) -> bool | None:
    found = [value for name in names if (value := _switch(text, name)) is not None]
    return any(found) if found else None


def _switch(text: str, name: str) -> bool | None:
    """Return whether ``name`` is on; an option without a value is. ``None`` where the text does not say."""
    pattern = _SWITCH.format(dashes="--?|", name=name.replace("_", "[-_]"), true=_TRUE, false=_FALSE)
    said: bool | None = None
    for dashes, value in re.findall(pattern, text, re.IGNORECASE):
        if value and value.lower() != "auto":
            said = re.fullmatch(_TRUE, value, re.IGNORECASE) is not None
        elif dashes == "--" and not value:
            said = True
    return said


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = ["".join(match).replace(",", "") for match in pattern.findall(text)]
    return int(found[-1]) if found and len(found[-1]) < 15 else None
