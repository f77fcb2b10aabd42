"""Architectures that llama.cpp and transformers both know: what a GGUF file says of one, and how its tensors lie there.

llama.cpp computes an architecture in one way. Where a config says something else, it is refused here: the file would load and be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oomless.errors import ModelError

Form = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How llama.cpp has an architecture of transformers."""

    name: str
    """In the file."""

    activation: tuple[str, ...] = ("silu", "swish")
    rotates_neighbours: bool = False
    """Whether queries and keys turn numbers that lie beside each other; transformers turns those half a head apart."""

    norms_from_zero: bool = False
    """Whether transformers' norms multiply by 1 + weight, and llama.cpp's by weight."""

    head: str = "own"
    """Whether a head of its own is ``own``: possible; ``never``; or ``always``: tied ones are written twice."""

    transformers_reads: bool = True
    """Whether transformers reads it from a GGUF file."""


_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_tanh", "gelu")
ARCHITECTURES = {
    "llama": Architecture(name="llama", rotates_neighbours=True),
    "mistral": Architecture(name="llama", rotates_neighbours=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "qwen3_moe": Architecture(name="qwen3moe"),
    "gemma": Architecture(name="gemma", activation=_GELU, norms_from_zero=True, head="never", transformers_reads=False),
    "gemma2": Architecture(name="gemma2", activation=_GELU, norms_from_zero=True, head="never"),
    "gemma3_text": Architecture(name="gemma3", activation=_GELU, norms_from_zero=True),
    "phi3": Architecture(name="phi3"),
    "olmo2": Architecture(name="olmo2", head="always", transformers_reads=False),
}
CONVERTER = "python llama.cpp/convert_hf_to_gguf.py"


def architecture(config: Any) -> Architecture:
    """Return how llama.cpp has the architecture of ``config``, a text model's.

    Raises:
        ModelError: it is not one of those written here, or llama.cpp computes it otherwise.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise ModelError(
            f"GGUF is written here for {', '.join(ARCHITECTURES)}; this model is {config.model_type}: export it with --to safetensors, "
            f"then {CONVERTER} FOLDER"
        )
    if odd := next(_odd(config, known), None):
        raise ModelError(f"llama.cpp has no {config.model_type} with {odd}: it would compute another model")
    return known


def _odd(config: Any, known: Architecture) -> Iterator[str]:
    """Yield what of ``config`` llama.cpp does not have."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in known.activation:
        yield f"hidden_act {activation}"
    if known.head == "never" and not config.tie_word_embeddings:
        yield "a head of its own"
    if getattr(config, "mlp_bias", False):
        yield "mlp_bias"
    if getattr(config, "attention_bias", False) and known.name != "llama":
        yield "attention_bias"
    rope = _full_rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3", "yarn", "longrope"):
        yield f"rope_type {rope['rope_type']}"
    if known.name in ("qwen2", "qwen3", "qwen3moe") and getattr(config, "use_sliding_window", False):
        yield "use_sliding_window"
    if known.name == "qwen3moe":
        if not config.norm_topk_prob:
            yield "norm_topk_prob false"
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            yield "layers without experts"
    period = {"gemma2": 2, "gemma3": 6}.get(known.name)
    if period is not None:
        full = [kind == "full_attention" for kind in config.layer_types]
        if full != [(layer + 1) % period == 0 for layer in range(len(full))]:
            yield f"layer_types other than each {period}th with full attention"
        largest = {"gemma2": 46, "gemma3": 62}[known.name] == config.num_hidden_layers
        width = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != width:
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}, which it takes to be {width}"


def _full_rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters or {}
    found: dict[str, Any] = rope.get("full_attention", rope)
    return {"rope_type": "default", **found}


def head_width(config: Any) -> int:
    """Return how many numbers a head has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe(writer: Any, config: Any, known: Architecture) -> None:
    """Tell ``writer``, gguf's, what it must know of ``config``."""
    rope, width = _full_rope(config), head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    _describe_scaling(writer, config, rope)
    if known.name == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if known.name in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
        for add, softcap in (
            (writer.add_attn_logit_softcapping, config.attn_logit_softcapping),
            (writer.add_final_logit_softcapping, config.final_logit_softcapping),
        ):
            if softcap:
                add(softcap)
    if known.name == "gemma3":
        writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
    if known.name == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)


def _describe_scaling(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    kinds = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN, "longrope": RopeScalingType.LONGROPE}
    kind = kinds.get(rope["rope_type"])
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind is not None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(float(rope.get("factor") or config.max_position_embeddings / original))
    if kind in (RopeScalingType.YARN, RopeScalingType.LONGROPE) or config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(int(original))
    if kind is RopeScalingType.LONGROPE:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, device=torch.device("cpu"))
        writer.add_rope_scaling_attn_factors(float(factor))


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Return what llama.cpp wants as tensors that transformers has as settings: factors of the rotary frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, width = _full_rope(config), head_width(config)
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
        plain = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        return {"rope_freqs.weight": plain / scaled}
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{name}.weight": torch.tensor(rope[f"{name}_factor"]) for name in ("long", "short")}
    return {}


def form_of(name: str, config: Any, known: Architecture) -> Form | None:
    """Return what is done to the tensor of the parameter ``name``; ``None`` where it lies in the file as it is."""
    kind = name.rsplit(".", 2)[-2]
    if known.norms_from_zero and kind.endswith("norm"):
        return lambda tensor: tensor + 1
    if known.rotates_neighbours and kind in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        return lambda tensor: _neighbours(tensor, heads)
    return None


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Return ``tensor``, the rows of ``heads`` heads, with rows that are half a head apart beside each other."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
