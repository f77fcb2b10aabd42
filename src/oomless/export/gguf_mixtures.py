"""How each tensor of a GGUF file is stored: the mixtures of llama.cpp, which give more bits to what loses most by few."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PLAIN = ("f32", "bf16", "f16")
_LEGACY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
QUANTIZATIONS = (*_LEGACY, *_K_QUANTS)
_INSTEAD = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What stands for a K-quant where rows are no multiple of 256."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """One of ``PLAIN`` or of ``QUANTIZATIONS``, for one model."""

    name: str
    layers: int
    experts: int
    """0 where the model has none."""

    heads_share: int
    """How many heads use the same keys and values."""

    head_is_embedding: bool
    """Whether the file has one tensor for both."""

    @staticmethod
    def of(name: str, config: Any, *, head_is_embedding: bool) -> Mixture:
        """Return that of the model of ``config``."""
        heads = config.num_attention_heads
        share = heads // (getattr(config, "num_key_value_heads", None) or heads)
        return Mixture(name, config.num_hidden_layers, getattr(config, "num_experts", 0), share, head_is_embedding)

    def kind(self, place: str, shape: tuple[int, ...]) -> str:
        """Return how the tensor at ``place`` is stored: vectors, norms and routers in fp32."""
        if len(shape) == 1 or place.endswith("_norm.weight") or ".ffn_gate_inp." in place:
            return "f32"
        if self.name in PLAIN:
            return self.name
        kind = self._wanted(place)
        if shape[-1] % 256:
            kind = _INSTEAD.get(kind, kind)
        return "f16" if shape[-1] % 32 else kind

    def described(self, stored: Iterable[tuple[str, tuple[int, ...]]]) -> str:
        """Return what a file is made of whose tensors are of these kinds and shapes."""
        rows: dict[str, set[int]] = {}
        for kind, shape in stored:
            rows.setdefault(kind, set()).add(shape[-1])
        found = sorted(rows.keys() - {"f32", self.name})
        odd = any(width % 256 for kind in {"f16", *_INSTEAD.values()} & set(found) for width in rows[kind])
        kinds = ", ".join(found) + (": not all rows are a multiple of 256" if odd else "")
        return f"{self.name} ({kinds})" if found else self.name

    def _wanted(self, place: str) -> str:
        name = self.name
        plain = "_".join(name.split("_")[:2])
        if place == "output.weight" or (place == "token_embd.weight" and self.head_is_embedding):
            return "q8_0" if name == "q8_0" else "q6_k"
        if not place.startswith("blk."):
            return plain
        _, number, part, *_ = place.split(".")
        layer, first = int(number), self.layers // 8
        outer = layer < first or layer >= 7 * self.layers // 8 or (layer - first) % 3 == 2
        part = part.removesuffix("_exps")
        if part in ("attn_v", "attn_k") and self.experts == 8:
            return "q8_0"
        if part in ("attn_v", "attn_qkv"):
            kind = self._of_values(plain, layer, outer)
            return "q5_k" if kind in ("q3_k", "q4_k") and self.layers == 80 and self.heads_share > 1 else kind
        if part == "ffn_down":
            more = {
                "q2_k": "q3_k",
                "q3_k_m": "q5_k" if layer < self.layers // 16 else "q4_k",
                "q3_k_l": "q5_k",
                "q4_k_s": "q5_k" if layer < first else plain,
                "q4_k_m": "q6_k" if outer else plain,
                "q5_k_m": "q6_k" if outer else plain,
            }
            return more.get(name, plain)
        if part == "attn_output" and self.experts == 8:
            return "q5_k" if name in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else plain
        if part == "attn_output":
            return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(name, plain)
        return plain

    def _of_values(self, plain: str, layer: int, outer: bool) -> str:
        more = {
            "q2_k": "q4_k" if self.heads_share >= 4 else "q3_k",
            "q3_k_m": "q5_k" if layer < 2 else "q4_k",
            "q3_k_l": "q5_k",
            "q4_k_s": "q5_k" if layer < 4 else plain,
            "q4_k_m": "q6_k" if outer else plain,
            "q5_k_m": "q6_k" if outer else plain,
        }
        return more.get(self.name, plain)
