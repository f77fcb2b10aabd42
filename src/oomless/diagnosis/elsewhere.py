"""What ran out where it was not PyTorch's allocator on the GPU: the driver, a library, an engine, the host, the whole process."""

from __future__ import annotations

import re

from oomless.diagnosis.deaths import PROVED
from oomless.diagnosis.frames import Place
from oomless.diagnosis.messages import OutOfMemory
from oomless.diagnosis.situation import Situation
from oomless.units import format_bytes

Told = tuple[str, str, str]
"""Topic, text and remedy."""

NOTHING: Told = ("", "", "")


def elsewhere(message: OutOfMemory, place: Place, situation: Situation) -> Told:
    """Return what an error that is not the allocator's says, and what to do; empty texts where it is the allocator's."""
    asked = message.requested.text if message.requested is not None else "more than there is"
    if message.kind == "kernel":
        has = message.capacity.text if message.capacity is not None else "less"
        return (
            "not GPU memory",
            f"This is no shortage of GPU memory. A Triton kernel wants {asked} of a multiprocessor's shared memory, and this GPU has "
            f"{has}. A smaller batch does not help.",
            "smaller blocks or fewer stages of that kernel, another version of the library that brings it, or another kernel "
            '(attn_implementation="sdpa", no liger)',
        )
    if message.kind == "host":
        return _host(message, place, situation, asked)
    if message.kind == "killed":
        return _killed(message, situation)
    if message.kind == "engine":
        return _engine(message)
    if message.kind == "placement":
        return (
            "engine",
            'device_map="auto" found no room for all layers on the GPU and put some on the CPU or the disk, where bitsandbytes has no '
            "4-bit or 8-bit matrices. Either the model does not fit even so, or something else fills the GPU.",
            'nvidia-smi, to see what fills the GPU; device_map={"": 0} to have all of it on one GPU; else a smaller model, or 4 bits '
            "instead of 8. (llm_int8_enable_fp32_cpu_offload=True is for inference alone)",
        )
    if place.in_managed_memory:
        return (
            "not GPU memory",
            "A paged optimizer asked for managed memory for its state, which lies in the host's memory (RAM) until it is used, and was "
            "refused. It does not show that the GPU is full: the host's memory, or what Windows and WSL let one process have, is.",
            "more RAM, under WSL memory=... in .wslconfig; or less state: LoRA, or an 8-bit optimizer that is not paged if the GPU has room",
        )
    if message.kind == "library" or (message.kind == "driver" and message.source == "Triton"):
        return (
            "library",
            f"{message.source} takes memory beside PyTorch's allocator and found none left: PyTorch had cached or filled the GPU.",
            "the remedies are those of any other shortage; they have to leave some hundred MiB free",
        )
    if message.source == "Level Zero":
        return (
            "driver",
            "Intel's driver found no room, and its message has no numbers. It says the same where one tensor is larger than the "
            "4 GiB that a single allocation may have.",
            "a smaller batch or shorter blocks; UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS=1 allows larger single tensors",
        )
    if message.kind == "driver":
        return _driver(place, situation)
    if message.source == "MPS" and message.words.lower().startswith("invalid buffer"):
        return (
            "larger than the device",
            f"Metal allows no single buffer of {asked}: one tensor is too large, whatever is free. Attention scores in full "
            "(batch x heads x length x length) and logits (batch x length x vocabulary) are the usual ones.",
            'shorter blocks, a batch of 1, attn_implementation="sdpa"',
        )
    return NOTHING


def _driver(place: Place, situation: Situation) -> Told:
    frames = " ".join(f"{f.path} {f.name} {f.code}" for f in place.frames)
    if re.search(r"pin_memory|cudaHostAlloc|offload|cpu_adam|\.pin_memory\(", frames):
        return (
            "driver",
            "The driver was asked for pinned memory of the host (pin_memory, offloading), so this is most likely the host's memory, or "
            "its limit for locked pages, and not the GPU's.",
            "pin_memory=False, fewer data-loader workers, pin_memory: false under offload_optimizer; ulimit -l unlimited; under WSL "
            "more memory in .wslconfig",
        )
    paged = situation.others.get("paged") or "bitsandbytes" in frames
    windows = re.search(r"[A-Z]:\\", frames) is not None
    reasons = ["another process has filled the GPU, so that not even a context fits"]
    if paged:
        reasons.append("the managed memory of a paged optimizer found neither GPU nor host memory")
    if windows:
        reasons.append("Windows or WSL limits what one process may have")
    reasons.append("an earlier kernel failed, and the error is reported late (CUDA_LAUNCH_BLOCKING=1 shows where)")
    return (
        "driver",
        "The driver itself refused; this message has no numbers, and it does not show that PyTorch had filled the GPU. Possible: "
        + "; ".join(reasons)
        + ".",
        "nvidia-smi first: if memory is in use before the run starts, end that process or take another GPU (CUDA_VISIBLE_DEVICES)",
    )


def _host(message: OutOfMemory, place: Place, situation: Situation, asked: str) -> Told:
    if "shared memory" in message.source:
        return (
            "not GPU memory",
            "Shared memory (/dev/shm) ran out, which data-loader workers and NCCL use. Containers give 64 MiB of it if they are not told.",
            "docker run --shm-size=16g (or --ipc=host; in Kubernetes an emptyDir with medium: Memory at /dev/shm); or "
            "dataloader_num_workers=0",
        )
    if message.source == "Windows' page file":
        return (
            "not GPU memory",
            "Windows could not back the host's memory: its page file is too small. Loading a model's files or several workers does that.",
            "a larger page file (System > Advanced > Performance > Virtual memory: some tens of GiB), or num_workers=0",
        )
    if message.source == "Ray":
        return (
            "not GPU memory",
            "Ray ended a worker because the node's memory (RAM) was nearly full. It is not the GPU's.",
            "fewer or smaller workers on the node, less offloading to the CPU, a smaller object store; "
            "RAY_memory_usage_threshold moves the limit, RAY_memory_monitor_refresh_ms=0 turns the watch off",
        )
    return (
        "not GPU memory",
        f"The host's memory (RAM) ran out, not the GPU's: {message.source} asked for {asked}.{_host_needs(situation)}",
        _host_remedy(situation, place.phase),
    )


def _host_needs(situation: Situation) -> str:
    if situation.parameters is None:
        return ""
    half, several = situation.parameters * 2, situation.several
    text = f" The weights of this model alone are {format_bytes(half)} in 16 bits, {format_bytes(2 * half)} in fp32"
    if several.many and several.gpus and not several.at_least:
        text += f"; each of {several.gpus} processes may load them: {format_bytes(several.gpus * half)} at once"
    if situation.others.get("offload_optimizer") and situation.trains_all:
        text += f"; an offloaded AdamW adds {format_bytes(situation.parameters * 12)} for all of it"
    return text + "."


def _host_remedy(situation: Situation, phase: str | None) -> str:
    parts = ["load in 16 bits (dtype=torch.bfloat16) from safetensors files, which are not copied"]
    if situation.several.many:
        parts.append("under ZeRO-3 or FSDP load on one rank (zero3_init_flag, fsdp_cpu_ram_efficient_loading)")
    if situation.others.get("offload_optimizer") or situation.others.get("offload_param"):
        parts.append("offload less to the CPU")
    parts.append("fewer data-loader workers and tokenising processes; streaming instead of a list of all texts")
    parts.append("more RAM or swap")
    return "; ".join(parts)


def _killed(message: OutOfMemory, situation: Situation) -> Told:
    remedy = _host_remedy(situation, None)
    if message.source == "Ray":
        remedy = "ray logs and dmesg on the node say why; " + remedy
    if message.source == "a data-loader worker":
        return (
            "not GPU memory",
            "A data-loader worker was ended from outside, mostly because the host's memory (RAM) or /dev/shm was full. The GPU is not the reason.",
            "dataloader_num_workers=0 or fewer; a larger /dev/shm (docker --shm-size); a dataset that is read from disk",
        )
    if message.source == "SLURM":
        remedy = "ask SLURM for more: --mem=0 (all of the node) or --mem=200G; " + remedy
    if message.source.startswith("the container"):
        remedy = "raise the container's memory limit; " + remedy
    if message.source in ("Colab", "Kaggle"):
        remedy = "a runtime with more RAM; " + remedy
    sure = message.source in PROVED
    how = (
        f"The host ran out of its own memory (RAM) and the process was killed ({message.source}). It is not the GPU's memory."
        if sure
        else f"The process was killed from outside ({message.source}). Most often the host ran out of its own memory (RAM); the text does "
        "not prove it, and no GPU error has this form. dmesg | grep -i kill shows whether the kernel did it."
    )
    return ("not GPU memory", how + _host_needs(situation), remedy)


def _engine(message: OutOfMemory) -> Told:
    words = message.words.lower()
    if "cache blocks" in words or "mem-fraction" in words:
        return (
            "engine",
            f"After its weights and a trial run {message.source} has no memory left for its key-value cache.",
            "raise gpu_memory_utilization (0.95) if nothing else is on this GPU; else a smaller max_model_len, 4-bit or fp8 weights, or "
            "tensor_parallel_size=2; beside a trainer, a GPU of its own",
        )
    if "sampler" in words:
        return (
            "engine",
            f"{message.source} tried its sampler with as many requests at once as max_num_seqs allows, whose logits did not fit.",
            "max_num_seqs=64 (or less), or a lower gpu_memory_utilization, which leaves more beside the cache",
        )
    if "cumem" in words:
        return (
            "engine",
            f"{message.source} was asleep and took its memory back; the trainer in the same process holds too much of the GPU for that.",
            "a lower gpu_memory_utilization; the trainer's weights and optimizer state offloaded while it generates (verl: "
            "actor_rollout_ref.actor.fsdp_config.param_offload=True, optimizer_offload=True); no expandable_segments",
        )
    if "startup" in words:
        return (
            "engine",
            f"{message.source} wants a share of the whole GPU, and less than that was free when it started: something else is on this GPU.",
            "end the other process (nvidia-smi; an engine that was not closed is one), or a lower gpu_memory_utilization",
        )
    return (
        "engine",
        f"The key-value cache of one sequence of max_model_len tokens is more than {message.source} has left for it.",
        "a smaller max_model_len, or a higher gpu_memory_utilization; kv_cache_dtype=fp8 halves it",
    )
