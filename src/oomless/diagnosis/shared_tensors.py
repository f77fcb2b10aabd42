"""Every tensor that exists because several GPUs train one model: DDP's buckets, what FSDP gathers and sends, what ZeRO makes flat."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from oomless.diagnosis.tensors import DEEPSPEED, DTYPES, Tensor, phases

if TYPE_CHECKING:
    from oomless.memory.device import Phase
    from oomless.models.spec import ModelSpec

ZERO_BUCKET = 500_000_000
"""DeepSpeed's ``reduce_bucket_size`` where it is not told."""


_SMALL = 1 << 20
_BUCKET_BYTES = 25 << 20
_GATHERING = (
    "torch.empty(torch.Size([numel * world_size])",
    "storage.resize_",
    "all_gather",
    "torch.empty(size, dtype=dtype",
)


def of_zero(
    stage: int, gpus: int | None, trained: int | None, bucket: int, matrices: list[tuple[str, tuple[int, ...]]]
) -> Iterator[Tensor]:
    """Yield what DeepSpeed makes (0.19: deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py).

    Args:
        stage: 1, 2 or 3.
        gpus: how many share the training; ``None`` where it is not known.
        trained: how many parameters train; ``None`` where it is not known.
        bucket: numbers in a bucket of gradients.
        matrices: names and shapes of weights, which stage 3 gathers.
    """

    def made(kind: str, shape: str, count: int, item: int, when: frozenset[Phase], *hints: str) -> Tensor:
        return Tensor(
            kind=kind, of=DEEPSPEED, shape=shape, count=count, item_bytes=item, phases=when, hints=hints, prior=0.35
        )

    when = phases("backward", "load")
    yield made("bucket of gradients in 16 bits", f"{bucket:,}", bucket, 2, when, "self.reduce_bucket_size")
    if trained:
        if stage < 3:
            start = ("flatten_dense_tensors", "self.flatten(", "_flatten_dense_tensors")
            yield made("all trained weights in 16 bits, made flat", f"{trained:,}", trained, 2, phases("load"), *start)
        if gpus:
            shape, part = f"{trained:,} / {gpus} GPUs", -(-trained // gpus)
            copies = (".clone()", ".float()", "fp32_partition", "single_partition_of_fp32_groups")
            of_part = (
                ("fp32 copy of this GPU's part of the weights", 4, phases("load"), copies),
                ("gradients of this GPU's part in fp32", 4, phases("optimizer", "load"), ("single_grad_partition", "torch.zeros(", ".to(")),
                ("optimizer state of this GPU's part", 4, phases("optimizer"), ("exp_avg", "zeros_like", "state[")),
                ("gradients of this GPU's part in 16 bits", 2, phases("backward", "optimizer", "load"), ("grads_in_partition", "grad_partitions_flat_buffer", "flat_grad_partition")),
            )  # fmt: skip
            for kind, item, its_phases, hints in of_part:
                yield made(kind, shape, part, item, its_phases, *hints)
    if stage == 3:
        used = phases("forward", "backward", "evaluation", "save")
        for name, sides in matrices:
            count, text = math.prod(sides), " x ".join(f"{n:,}" for n in sides)
            if count >= _SMALL:
                how = (
                    "flat_tensor = torch.empty",
                    "param_buffer = torch.empty",
                    "all_gather",
                    "torch.empty(tensor_size",
                )
                yield made("gathered weight in 16 bits", f"{text} ({name})", count, 2, used, *how)


def of_sharing(spec: ModelSpec, sharing: Literal["ddp", "fsdp"]) -> Iterator[Tensor]:
    """Yield what exists because several GPUs train a model: DDP's buckets of one matrix alone, or what FSDP gathers and sends."""
    from oomless.models.make import without_memory
    from oomless.techniques.checkpointing import decoder_layers

    model = without_memory(spec.config, trust_remote_code=spec.trust_remote_code)
    whole = {" x ".join(f"{n:,}" for n in p.shape): p.numel() for p in model.parameters() if p.numel() >= _SMALL}
    layers = {sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)}
    used = phases("forward", "backward", "evaluation")
    for item in (2, 4):
        words = DTYPES[item]

        def made(kind: str, shape: str, count: int, when: frozenset[Phase], *hints: str, item: int = item) -> Tensor:
            of = "DDP" if sharing == "ddp" else "FSDP"
            return Tensor(
                kind=kind, of=of, shape=shape, count=count, item_bytes=item, phases=when, hints=hints, prior=0.2,
                operations=() if sharing == "ddp" else ("aten.empty", "storage.resize_"),
            )  # fmt: skip

        for shape, count in whole.items():
            if sharing == "fsdp":
                yield made(f"gathered weight in {words}", shape, count, used, *_GATHERING)
            elif count * item > _BUCKET_BYTES:
                yield made(f"bucket of gradients in {words}", shape, count, phases("load", "backward"), "dist.Reducer(")
        for count in layers if sharing == "fsdp" else ():
            shape = f"a layer's {count:,} weights"
            yield made(f"gathered layer in {words}", shape, count, used, *_GATHERING)
            yield made(f"gradients of a layer in {words}, sent", shape, count, phases("backward"), "reduce_scatter")
