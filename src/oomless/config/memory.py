"""The numbers that weights are kept in, and what is done to need less memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from oomless.config.values import Count, Range
from oomless.errors import ConfigError

if TYPE_CHECKING:
    from oomless.config import TrainConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Precision and memory."""

    dtype: Precision = "auto"
    """Weights and arithmetic. auto: bf16 or fp16 by what the GPU can do, fp32 on a CPU."""

    quantization: Literal["nf4", "int8", "mxfp4"] | None = None
    """Store the frozen linear layers and experts in 4 bits (nf4, double quantisation) or 8 (int8), quantised while
    loading, which needs the extra `quantize`; or the experts of gpt-oss as its checkpoints hold them (mxfp4), all else in
    16. [default: 16 bits]"""

    experts_on_host: bool = False
    """Keep the frozen experts of a mixture in pinned host memory, in the bits that `quantization` says; those to which
    tokens go come to the GPU, one at a time."""

    stream_frozen: bool = False
    """Keep the frozen linear layers and experts in pinned host memory, each on the GPU while it is used: the last resort."""

    embeddings_on_host: bool = False
    """Keep tables of tokens' embeddings that do not train in pinned host memory; the rows of a pass's tokens come to the GPU,
    which costs next to no time. A table that is also the matrix of lm_head stays."""

    weight_precision: Literal["master", "correction", "stochastic", "plain"] | None = None
    """How trainable 16-bit weights keep small updates: an fp32 master copy, 8 bits of correction, stochastic rounding,
    or not at all. [default: master]"""

    fp32_residual: bool | None = None
    """Keep what flows between the layers in fp32, around 16-bit matrix products. [default: on for Gemma in fp16, which
    overflows without, else off]"""

    gpu: str = "auto"
    """auto, cpu, cuda, cuda:1, or a virtual GPU on the CPU such as virtual:256MiB; to plan, also T4, 2xT4 or 2x8xH100."""

    sharding: Literal["auto", "replicate", "shard"] = "auto"
    """What each of several GPUs holds: a part of the model (shard, the least memory), or all of it (replicate, the least to
    exchange). auto: a part where it can be cut, as packed weights and those on the host can; `oomless plan` chooses the faster one that fits."""

    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in backward."""

    checkpointed_layers: Count | None = None
    """Checkpoint only this many layers, the first that backward runs through. [default: all]"""

    offload_activations: bool = False
    """Keep the inputs of checkpointed layers in host memory between forward and backward; at most two are on the GPU."""

    cheap_recompute: bool = False
    """Compute norms and gated products again in backward instead of keeping them, which costs next to no time."""

    mlp_tiles: Annotated[int, Range(least=2)] | None = None
    """Run each MLP over the tokens in this many parts, of which one at a time takes memory. [default: whole]"""

    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is complete, and free the gradient: the model's gradients never exist
    together. Rules out max_grad_norm."""

    offload_optimizer: bool = False
    """Keep the optimizer's state in pinned host memory; slices of it come to the GPU and go back at every step."""

    kernels: Literal["auto", "fused", "plain"] = "auto"
    """How a GPU updates weights, computes norms, gated products and rotary embeddings, and goes over the loss' logits: in kernels of
    their own without temporaries (fused, by Triton, from compute capability 7.5 on), or in PyTorch's operators (plain); and attends to
    packed documents: to all in one launch (fused), or one by one (plain). auto: fused where that works, else plain, and says so."""

    loss_chunk_bytes: Annotated[int, Range(least=1 << 16)] = 64 << 20
    """Most bytes that the loss holds of the logits at once, copies that it needs included."""


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself."""
    for name in ("quantization", "experts_on_host", "stream_frozen", "embeddings_on_host"):
        if getattr(run, name) and "full" in run.trainable_parts:
            raise ConfigError(
                f"{name} is for frozen layers, and trainable: full freezes none: add --trainable lora, or remove {name}",
                *(name, "trainable"),
            )
    if run.stream_frozen and (run.quantization is not None or run.use_dora):
        other = "quantization" if run.quantization is not None else "use_dora"
        raise ConfigError(f"stream_frozen cannot be joined with {other}: remove one of them", *("stream_frozen", other))
    if run.stream_frozen and run.experts_on_host:
        raise ConfigError(
            "experts_on_host has no effect beside stream_frozen, which has experts on the host already: remove one of them",
            *("experts_on_host", "stream_frozen"),
        )
    if run.quantization in ("nf4", "int8") and run.use_dora:
        raise ConfigError(
            "use_dora needs the norms of the weights that it adapts, which quantization rounds: remove one",
            *("use_dora", "quantization"),
        )
    if run.weight_precision is not None and run.dtype == "fp32":
        raise ConfigError(
            "weight_precision has no effect on fp32 weights: remove it, or choose dtype bf16 or fp16",
            *("weight_precision", "dtype"),
        )
    for name in ("checkpointed_layers", "offload_activations"):
        if getattr(run, name) and not run.gradient_checkpointing:
            raise ConfigError(
                f"{name} has no effect without gradient_checkpointing: turn that on, or remove {name}",
                *(name, "gradient_checkpointing"),
            )
