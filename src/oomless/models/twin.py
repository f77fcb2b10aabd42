"""A twin of an architecture: the same class with the same switches, a few narrow layers, random weights, on the host.

What an architecture does (which attention it has, whether packed documents see each other, which layers get a gradient) does
not depend on how wide it is. So a question about it is put to its twin, in fp32 and a fraction of a second, before anything of
the model itself is loaded, and a plan asks the same as a run.

Sizes are known by their names in the config (``_WIDTHS`` and ``_COUNTS``); everything else stays as it is. Windows and chunks
shrink too, so that a few dozen tokens reach beyond them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers.utils import logging

from oomless.models.make import make, sees
from oomless.ops.attention import attention_kernel

_HIDDEN = r"hidden_size|d_model|n_embd|emb_dim|embedding_dim"
_HEADS = r"(swa_|encoder_|decoder_|num_decoder_|num_encoder_)?(num_)?attention_heads|n_heads?|linear_num_(value_)?heads"
_KEY_HEADS = r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|linear_num_key_heads"
_LAYERS = re.compile(r"n_layers?|num_layers|num_hidden_layers|(de|en)coder_layers|num_blocks|num_(de|en)coder_layers")
_PERIOD = re.compile(
    r".*(period|offset|interval|pattern|every_n_layers|first_k_dense_replace|num_dense_layers|_step|group_size)"
)
_TOKEN = re.compile(r".*(token_id|_idx|_index)")
_PLACES = re.compile(r".*(layer|attn)s?_(ids|indices|idxs)|.*_layers")
"""Lists of the places of layers of one kind."""

_TYPES = re.compile(r".*(layer|block)s?_types?|.*layers?_pattern")
"""Lists of the kinds of layers, of all or of a pattern that repeats."""

_MOST_LAYERS = 12
_WIDTH, _HEAD = 64, 16

_WIDTHS = (
    (_HIDDEN, _WIDTH),
    (r"(input_|output_)?embedding_size|word_embed_proj_dim|lru_width|dim_model_base", _WIDTH),
    (_HEADS, 4),
    (r"(swa_)?head_dim|(linear|linear_key|linear_value|swa|global)_head_dim|d_head|dim_head|kv_channels", _HEAD),
    (r"qk_(nope|rope)_head_dim|(swa_)?v_head_dim|attention_head_size|d_rel", _HEAD),
    (r"qk_head_dim", 2 * _HEAD),
    (r"d_inner|mamba_d_ssm", 2 * _WIDTH),
    (r"(mamba_n|mamba_num)_heads", 8),
    (r"mamba_(d_head|head_dim|headdim)", _HEAD),
)
"""Names of widths, which fit together as they are here. A width that is 0 or less is a part that is not there."""

_COUNTS = (
    (r"(unpadded_|shape_|pronunciation_)?vocab_size(_per_layer_input)?", 128),
    (r"(.*_)?intermediate_size(_mlp)?|((de|en)coder_)?ffn_dim|n_inner|dff|dim_ff|(.*_)?ffn_hidden_size", 96),
    (r"feed_forward_size|prompt_mid_dim", 96),
    (r"rotary_dim", _HEAD),
    (r"(q|kv|o)_lora_rank|index_head_dim|(shape|pronunciation|ple)_embed_dim|router_hidden_size", 32),
    (r"index_n_heads", 2),
    (r"index_topk|index_topk_blocks|index_block_size", 4),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention|keep_window_size|rel_extent", 8),
    (r"attention_chunk_size|(mamba_)?chunk_size|(local|lsh)_attn_chunk_length|block_size|floor_scale", 8),
    (r"(mamba_d_|ssm_)?state_size|mamba_d_state", 16),
    (r"mamba_n_?groups|n_groups|o_groups", 2),
    (r"(mamba_dt|time_step|laurel|adapter|gated_norm)_rank|hc_lowrank|hidden_size_per_layer_input", 8),
    (r"original_max_position_embeddings", 64),
    (r"ngram_vocab_size_base", 200),
    (r"split_ngram_parts", 4),
    (r"(max|n)_(target_|source_)?position(_embedding)?s|n_ctx|max_seq_len|context_length|model_max_length", 256),
)
"""Names of sizes that need only not be larger."""

_EXACT = [(re.compile(pattern), size) for pattern, size in _WIDTHS]
_AT_MOST = [(re.compile(pattern), size) for pattern, size in _COUNTS]


def small_config(config: Any) -> Any:
    """Return a copy of ``config`` with a text part of the sizes of a twin; of the text alone where that has a class of its own."""
    text = config.get_text_config()
    settings = {name: value for name, value in text.to_dict().items() if name not in ("id2label", "label2id")}
    small = type(text).from_dict(_Shrinking.of(settings).settings(settings))
    if not sees(config):
        return small
    whole = copy.deepcopy(config)
    setattr(whole, next(name for name in config.sub_configs if getattr(config, name) is text), small)
    return whole


def first_layers(config: Any, layers: int) -> Any:
    """Return a copy of ``config``, of a model of text alone, with the first ``layers`` of its layers."""
    settings = config.to_dict()
    count = next((v for name, v in settings.items() if _LAYERS.fullmatch(name) and type(v) is int), layers)

    def cut(name: str, value: Any) -> Any:
        if type(value) is int and _LAYERS.fullmatch(name):
            return min(value, layers)
        return value[:layers] if isinstance(value, list) and len(value) == count else value

    return type(config).from_dict({name: cut(name, value) for name, value in settings.items()})


@contextmanager
def on_the_host() -> Iterator[None]:
    """Compute for real, on the host and beside the run: unbooked, unheard, from random numbers of its own."""
    verbosity = logging.get_verbosity()
    with _disable_current_modes(), attention_kernel("auto"), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


def twin(config: Any, attention: str, *, trust_remote_code: bool = False) -> Any:
    """Return a model of the architecture of ``config`` in fp32 on the host, in evaluation; call inside ``on_the_host``.

    Its matrices are larger than fresh ones, so that attention attends to something and caps bite.
    """
    small = small_config(config)
    with torch.device("meta" if sees(small) else "cpu"):  # towers are left out before they have memory
        model = make(small, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code)
    if sees(small):
        model.to_empty(device="cpu")
        model.initialize_weights()
        model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0 < parameter.std() < 0.05:
                parameter *= 5
    return model.eval()


@dataclass(frozen=True, slots=True)
class _Shrinking:
    """How the settings of one config become those of a twin."""

    count: int
    layers: int
    hidden: int
    heads: int
    rotary: int
    expand: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> _Shrinking:
        def first(pattern: str | re.Pattern[str]) -> int:
            found = (v for name, v in settings.items() if re.fullmatch(pattern, name) and type(v) is int and v > 0)
            return next(found, 1)

        count = first(_LAYERS)
        rope = settings.get("rope_parameters") or {}
        partial = rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
        return cls(
            count, _layers(settings, count), first(_HIDDEN), first(_HEADS), int(_HEAD * partial), first(r"expand")
        )

    def settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        small = {name: self._value(str(name), value) for name, value in settings.items()}
        return {name: value for name, value in small.items() if not (str(name).isdigit() and int(name) >= self.layers)}

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self.settings(value)
        if isinstance(value, list):
            return self._list(name, value)
        if type(value) is not int or value <= 0:
            return value
        if _LAYERS.fullmatch(name):
            return min(value, self.layers)
        if name == "num_kv_shared_layers":
            return min(value, self.layers // 2)
        if _TOKEN.fullmatch(name):
            return value % 100
        if name in ("attention_hidden_size", "attention_head_dim"):
            per_head = name == "attention_head_dim"
            return value * (self.heads * _HEAD if per_head else _WIDTH) // self.hidden
        if name == "num_heads":
            return self.expand * _WIDTH // _HEAD
        if re.fullmatch(_KEY_HEADS, name):
            return 1 if value == 1 else 4 if value >= self.heads else 2
        exact = next((size for pattern, size in _EXACT if pattern.fullmatch(name)), None)
        return exact or next((min(value, size) for pattern, size in _AT_MOST if pattern.fullmatch(name)), value)

    def _list(self, name: str, value: list[Any]) -> list[Any]:
        if name in ("long_factor", "short_factor"):
            return value[: self.rotary // 2]
        if name == "mrope_section":
            first = self.rotary // 2 - 2 * (len(value) - 1)
            return [first] + [2] * (len(value) - 1)
        if len(value) == self.count:
            return [self._value(name, item) for item in value[: self.layers]]
        if _are_below(value, self.count):
            return [item for item in value if item < self.layers]
        return value


def _layers(settings: dict[str, Any], count: int) -> int:
    """Return how many of the first of ``count`` layers show each kind, twice where that is not too many, by lists and by periods."""
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == count]
    kinds = list(zip(*([str(item) for item in value] for value in lists), strict=True))
    of_each = [[place for place, kind in enumerate(kinds) if kind == one] for one in set(kinds)]
    of_each += [sorted(v) for name, v in settings.items() if _PLACES.fullmatch(name) and _are_below(v, count)]
    shown = [[place + 1 for place in places[:2] if place < _MOST_LAYERS] for places in of_each]
    patterns = [
        len(v) for name, v in settings.items() if _TYPES.fullmatch(name) and isinstance(v, list) and 0 < len(v) < count
    ]
    periods = [
        value + 1
        for name, value in settings.items()
        if _PERIOD.fullmatch(name) and type(value) is int and 0 < value < count
    ]
    return min(count, _MOST_LAYERS, max([2, *(places[-1] for places in shown if places), *patterns, *periods]))


def _are_below(value: Any, count: int) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item < count for item in value)
