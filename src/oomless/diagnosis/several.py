"""Several GPUs in a text: how many, how the training is shared among them, and which one failed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

Sharing = Literal["ddp", "dp", "zero1", "zero2", "zero3", "fsdp", "layers", "tensor"]
"""Every GPU holds all (DDP, or DataParallel in one process); a part of the optimizer's state, of gradients too, of weights too
(ZeRO 1 to 3, FSDP); some layers each (``device_map="auto"``); or a part of every matrix."""

WORDS: dict[Sharing, str] = {
    "ddp": "data parallel (DDP: each GPU holds everything)",
    "dp": "DataParallel (one process; GPU 0 holds more than the others)",
    "zero1": "DeepSpeed ZeRO-1 (the optimizer's state is shared out)",
    "zero2": "DeepSpeed ZeRO-2 (optimizer state and gradients are shared out, weights are not)",
    "zero3": "DeepSpeed ZeRO-3 (weights, gradients and optimizer state are shared out)",
    "fsdp": "FSDP (weights, gradients and optimizer state are shared out)",
    "layers": 'device_map="auto" (each GPU holds some of the layers)',
    "tensor": "tensor parallel (each GPU holds a part of every matrix)",
}
_SEP = r"['\"]?\s*(?:[:=]|\s)\s*['\"]?"
_COUNTS = [
    re.compile(rf"(?<![\w-])(?:--)?(?:nproc[-_]per[-_]node|num[-_]gpus|n[-_]gpus[-_]per[-_]node|num[-_]processes|ngpus|gpus[-_]per[-_]node){_SEP}(\d{{1,4}})\b", re.IGNORECASE),
    re.compile(rf"\bWORLD_SIZE{_SEP}(\d{{1,4}})\b|\bworld[_ ]size{_SEP}(\d{{1,4}})\b|\bNum GPUs(?: used)? = (\d{{1,3}})\b"),
    re.compile(rf"\btrainer\.devices{_SEP}(\d{{1,3}})\b|^\s*devices:\s*(\d{{1,3}})\b", re.MULTILINE),
]  # fmt: skip
_NODES = re.compile(rf"(?<![\w-])(?:--)?(?:nnodes|num[-_]nodes|num[-_]machines){_SEP}(\d{{1,3}})\b", re.IGNORECASE)
_VISIBLE = re.compile(r"\b(?:CUDA|HIP|ROCR|ASCEND_RT)_VISIBLE_DEVICES['\"\]]*\s*=\s*['\"]?(\d+(?:,\d+)*)")
_GPU_WORD = r"(?:NVIDIA\s+)?(?:GPUs?\b|cards?\b|[AHBLVTP]\d{1,4}\w*|RTX|GTX|Tesla|MI\d{3}|\d{4}(?:Ti)?s?\b|Ascend|910B)"
_PROSE = [
    re.compile(rf"(?<![\w.])(\d{{1,3}})\s*(?:x|×|\*)\s*(?:\d+\s*GB?\s+)?{_GPU_WORD}", re.IGNORECASE),
    re.compile(
        r"(?<![\w.-])(\d{1,2})\s+(?:NVIDIA\s+)?(?:GPUs\b|[AHBLV]\d{2,4}s?\b(?!\s*GB)|RTX\s*\d{4}s?\b)",
        re.IGNORECASE,
    ),
    re.compile(r"(?:[AHBLVT]\d{2,4}\w*|RTX\s*\w+|\d{4})\s*(?:x|×|\*)\s*(\d{1,2})(?![\d.])", re.IGNORECASE),
    re.compile(r"(\d{1,2})\s*(?:张|块|卡|个\s*GPU)"),
]
_ZERO = [
    re.compile(r"zero[-_ ]?(?:stage[-_ ]?)?([123])\b|zero[-_]?([123])[_.-]|\bds_z([123])_|\bz([123])_(?:config|offload)", re.IGNORECASE),
    re.compile(r"zero_optimization['\"]?\s*:\s*\{[^{}]{0,400}?['\"]?stage['\"]?\s*:\s*([0-3])"),
    re.compile(rf"zero_stage{_SEP}([0-3])\b"),
    re.compile(r"runtime[/\\]zero[/\\](?:stage_?)?([123])\.py"),
]  # fmt: skip
_ZERO_3 = re.compile(r"partition_parameters\.py|partitioned_param_coordinator|zero[/\\]stage3\.py|zero\.Init\(")
_ZERO_12 = re.compile(r"zero[/\\]stage_1_and_2\.py")
_FSDP = re.compile(
    rf"fully_shard\b|FullyShardedDataParallel|fully_sharded_data_parallel|\bdistributed_type{_SEP}FSDP|--fsdp\b|\bfsdp_\w+\s*:|"
    rf"\bfsdp{_SEP}[\"'\[]*(?:full_shard|shard_grad_op|true|auto_wrap)|\bFSDP2?\b|strategy=fsdp",
)
_DDP = re.compile(
    r"DistributedDataParallel|nn[/\\]parallel[/\\]distributed\.py|\bDDP\b|\bdistributed_type\W+MULTI_GPU|\btorchrun\b|torch\.distributed\.(?:launch|run)"
    r"|accelerate launch[^\n]*--multi_gpu|NPROC_PER_NODE",
)
_DP = re.compile(
    r"nn\.DataParallel\(|nn[/\\]parallel[/\\](?:data_parallel|parallel_apply|replicate|scatter_gather)\.py"
)
_LAYERS = re.compile(r"device_map['\"]?\s*[:=]\s*['\"](?:auto|balanced\w*|sequential)['\"]|\bdevice_map\s+auto")
_TENSOR = re.compile(rf"tensor_(?:model_)?parallel(?:_size)?{_SEP}([2-9]|\d\d)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Several:
    """What a text says of several GPUs."""

    gpus: int | None = None
    """How many work together; ``None`` where it is not said."""

    sharing: Sharing | None = None
    parts: int | None = None
    """Into how many parts each matrix is cut, where it is tensor parallel; the rest of the GPUs does something else."""

    at_least: bool = False
    """Whether ``gpus`` is only what the numbers in the text show, so that there may be more."""

    @property
    def many(self) -> bool:
        """Whether more than one GPU is at work, as far as the text shows."""
        return (self.gpus or 1) > 1 or (self.sharing is not None and self.gpus is None and self.sharing != "layers")

    @property
    def shares(self) -> bool:
        """Whether each GPU holds a part only of what one GPU alone would hold."""
        return self.many and self.sharing not in (None, "ddp", "dp")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"gpus": self.gpus, "sharing": self.sharing, "parts": self.parts, "at_least": self.at_least}


def read_several(text: str, by_default: Sharing | None = None) -> Several:
    """Return what ``text`` says of several GPUs, which share ``by_default`` where it does not say how."""
    gpus, at_least = _count(text)
    parts = [int(number) for number in _TENSOR.findall(text)]
    sharing = _sharing(text, gpus) or by_default
    return Several(
        gpus=gpus, sharing=sharing, parts=parts[-1] if parts and sharing == "tensor" else None, at_least=at_least
    )


def _count(text: str) -> tuple[int | None, bool]:
    nodes = max([int(n) for n in _NODES.findall(text) if 0 < int(n) < 500], default=1)
    for pattern in _COUNTS:
        found = [int(number) for match in pattern.findall(text) for number in _flat(match) if number]
        if [n for n in found if n]:
            return max(found) * (nodes if pattern is _COUNTS[0] and "num_processes" not in text else 1), False
    visible = _VISIBLE.findall(text)
    if visible:
        return len(visible[-1].split(",")) * nodes, False
    for pattern in _PROSE:
        found = [int(number) for number in pattern.findall(text) if 1 < int(number) <= 512]
        if found:
            return max(found), False
    ranks = [int(n) for n in re.findall(r"^\[(?:rank|default)(\d{1,4})\]:", text, re.MULTILINE)]
    devices = [int(n) for n in re.findall(r"\bGPU (\d{1,2})(?:;| has)|\bcuda:(\d{1,2})\b", text) for n in n if n]
    highest = max([*ranks, *devices], default=0)
    return (highest + 1, True) if highest else (None, False)


def _flat(match: str | tuple[str, ...]) -> tuple[str, ...]:
    return (match,) if isinstance(match, str) else match


def _sharing(text: str, gpus: int | None) -> Sharing | None:
    if _ZERO_3.search(text):
        return "zero3"
    stages = [int(number) for pattern in _ZERO for match in pattern.findall(text) for number in _flat(match) if number]
    if stages and stages[-1]:
        return ("zero1", "zero2", "zero3")[stages[-1] - 1]
    if _ZERO_12.search(text):
        return "zero2"
    if _FSDP.search(text):
        return "fsdp"
    if _TENSOR.search(text):
        return "tensor"
    if _DP.search(text):
        return "dp"
    if _LAYERS.search(text):
        return "layers"
    return "ddp" if _DDP.search(text) and gpus != 1 and (gpus or 0) > 1 else None
