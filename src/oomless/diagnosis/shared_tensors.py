"""Every tensor that exists because several GPUs train one model: DDP's buckets, and what FSDP gathers and sends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from oomless.diagnosis.tensors import DTYPES, Tensor, phases

if TYPE_CHECKING:
    from oomless.memory.device import Phase
    from oomless.models.spec import ModelSpec

_SMALL = 1 << 20
_BUCKET_BYTES = 25 << 20
_GATHERING = (
    "torch.empty(torch.Size([numel * world_size])",
    "storage.resize_",
    "all_gather",
    "torch.empty(size, dtype=dtype",
)


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
                operations=("aten.empty", "storage.resize_"),
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
