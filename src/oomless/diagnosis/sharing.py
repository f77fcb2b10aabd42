"""What helps where several GPUs share a run."""

from __future__ import annotations

from oomless.diagnosis.situation import Situation


def of_sharing(situation: Situation) -> str:
    """Return what helps with the way in which the GPUs share the work; nothing where nothing follows from it."""
    sharing = situation.several.sharing
    full, first = situation.trains_all, situation.reading.first
    phase = first.place.phase if first is not None else None
    if situation.others.get("packed_weights") and sharing in (None, "ddp", "zero1", "zero2"):
        return (
            "more GPUs make no room here: each holds all of the packed weights, which ZeRO-3 and FSDP do not share out"
        )
    if phase == "load" and sharing == "fsdp":
        return (
            "each process loads all of the model before FSDP cuts it: load on the host (fsdp_cpu_ram_efficient_loading: true, no device_map), "
            "and in 4 bits with bnb_4bit_quant_storage in the dtype of the other weights"
        )
    if phase == "load" and sharing == "zero3":
        return "ZeRO-3 cuts the model while it loads only where it knows of it by then: TrainingArguments(deepspeed=...) before from_pretrained"
    if phase == "save":
        return ""
    if sharing in (None, "ddp"):
        return (
            "more GPUs make no room in DDP: ZeRO-3 or FSDP share weights, gradients and optimizer state out"
            if full
            else "more GPUs make no room in DDP; ZeRO-3 or FSDP share the frozen weights out"
        )
    if sharing == "dp":
        return "torchrun with DistributedDataParallel, FSDP or ZeRO: GPU 0 then holds no more than the others"
    if sharing == "layers":
        shared = "" if first is not None and first.place.generating else "; FSDP or ZeRO-3 share it equally"
        return (
            "GPUs work one after the other so, and the first and last hold embeddings and logits: "
            f'max_memory={{0: "10GiB", ...}} evens it out{shared}'
        )
    if sharing in ("zero1", "zero2"):
        return (
            "ZeRO-3 shares the weights out too; offload_optimizer puts the optimizer's state into the host's memory"
            if full
            else "ZeRO-3 shares the frozen weights out too"
        )
    if sharing in ("zero3", "fsdp"):
        return "what remains on each GPU are activations, the layer that is gathered, and logits: those grow with the batch and the length of each GPU"
    return ""
