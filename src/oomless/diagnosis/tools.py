"""The same change in the tools that people come from, in each tool's own words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_TRAINER = {
    "logits": "use_liger_kernel=True",
    "checkpointing": "gradient_checkpointing=True",
    "batch": "per_device_train_batch_size=1, gradient_accumulation_steps={gradient_accumulation_steps}",
    "adamw_8bit": 'optim="adamw_8bit"',
    "adafactor": 'optim="adafactor"',
    "half": "{dtype_words}",
}
_PEFT = {
    "lora": 'get_peft_model(model, LoraConfig(target_modules="all-linear"))',
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "lm_head": "model.requires_grad_(False); model.lm_head.requires_grad_(True)",
}
_LENGTHS = ("half_length", "quarter_length")
_PLAIN = {
    "checkpointing": "model.gradient_checkpointing_enable()",
    "batch": "batches of 1, an optimizer step after every {gradient_accumulation_steps}",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.Adafactor",
    "half": "{dtype_words}",
    **dict.fromkeys(_LENGTHS, "blocks of {max_seq_length} tokens"),
    **_PEFT,
}
WORDS: Mapping[str, Mapping[str, str]] = {
    "trainer": {**_TRAINER, **_PEFT, **dict.fromkeys(_LENGTHS, "tokenise into blocks of {max_seq_length}")},
    "trl": {**_TRAINER, **_PEFT, **dict.fromkeys(_LENGTHS, "SFTConfig(max_length={max_seq_length})")},
    "unsloth": {
        **{name: words for name, words in _TRAINER.items() if name != "logits"},
        "checkpointing": 'use_gradient_checkpointing="unsloth"',
        "lora": "FastLanguageModel.get_peft_model(model)",
        "nf4": "FastLanguageModel.from_pretrained(..., load_in_4bit=True)",
        **dict.fromkeys(_LENGTHS, "max_seq_length={max_seq_length}"),
    },
    "axolotl": {
        "logits": "plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]",
        "checkpointing": "gradient_checkpointing: true",
        "batch": "micro_batch_size: 1, gradient_accumulation_steps: {gradient_accumulation_steps}",
        "adamw_8bit": "optimizer: adamw_bnb_8bit",
        "adafactor": "optimizer: adafactor",
        "half": "{dtype_yaml}",
        "lora": "adapter: lora, lora_target_linear: true",
        "nf4": "adapter: qlora, load_in_4bit: true",
        **dict.fromkeys(_LENGTHS, "sequence_len: {max_seq_length}"),
    },
    "peft": _PLAIN,
    "accelerate": _PLAIN,
    "torch": _PLAIN,
}
"""By tool and change. ``in_backward`` and ``correction`` are oomless' own."""

TOOLS = (*WORDS, "oomless")
_OWN = {"in_backward": "updates inside the backward pass", "correction": "8 bits of correction"}


def change_in(tool: str | None, changes: Iterable[str], values: Mapping[str, Any]) -> str | None:
    """Return ``changes`` in the words of ``tool``; ``None`` where it has none of them, or no tool is known."""
    words = WORDS.get(tool or "")
    if words is None:
        return None
    facts = {"gradient_accumulation_steps": 1, "max_seq_length": "", **values}
    facts["dtype_words"] = (
        "dtype=torch.float16" if values.get("dtype") == "fp16" else "dtype=torch.bfloat16 (fp16 before Ampere)"
    )
    facts["dtype_yaml"] = "fp16: true" if values.get("dtype") == "fp16" else "bf16: auto"
    said = [words[name].format(**facts) for name in changes if name in words]
    missing = [_OWN.get(name, name.replace("_", " ")) for name in changes if name not in words]
    if not said:
        return None
    return ", ".join(said) + (f"; it has no {' and no '.join(missing)}" if missing else "")
