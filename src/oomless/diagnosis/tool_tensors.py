"""Tensors of single methods and tools, in place of all logits: the answers of GRPO and PPO, and the chunks of torchtune's loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oomless.diagnosis.tensors import DTYPES, Dimensions, Tensor, phases


def of_answers(d: Dimensions, blocks: int, tokens: int, item_bytes: int) -> Iterator[Tensor]:
    """Yield what GRPO and PPO compute of ``blocks`` answers of ``tokens``: their logits alone, and log-probabilities one by one."""
    for size in {item_bytes, 4}:
        of_all: dict[str, Any] = {"of": "lm_head", "item_bytes": size, "prior": 0.5}
        for more, words in ((0, f"{tokens:,} tokens"), (1, f"({tokens:,} + 1) tokens")):
            yield Tensor(
                kind=f"logits of the answers in {DTYPES[size]}",
                shape=f"{blocks:,} x {words} x {d.vocabulary:,}",
                count=blocks * (tokens + more) * d.vocabulary,
                phases=phases("forward", "loss", "backward"),
                modules=frozenset({"lm_head"}),
                hints=("logits",),
                **of_all,
            )
        yield Tensor(
            kind=f"log-probabilities of one answer in {DTYPES[size]}",
            shape=f"{tokens:,} tokens x {d.vocabulary:,}",
            count=tokens * d.vocabulary,
            phases=phases("loss", "forward", "backward"),
            hints=("log_softmax", "logsumexp"),
            **of_all,
        )


TORCHTUNE_CHUNKS = 8


def of_torchtune(d: Dimensions, blocks: int) -> Iterator[Tensor]:
    """Yield what torchtune's loss computes at once: an eighth of the tokens (0.6: torchtune/modules/loss/ce_chunked_output_loss.py)."""
    for kind, phase in (("chunk of the logits in fp32", "loss"), ("gradient of a chunk of the logits", "backward")):
        yield Tensor(
            kind=kind,
            of="lm_head",
            shape=f"{blocks:,} x T tokens / {TORCHTUNE_CHUNKS} x {d.vocabulary:,}",
            of_tokens=lambda tokens: blocks * -(-tokens // TORCHTUNE_CHUNKS) * d.vocabulary,
            item_bytes=4,
            phases=phases(phase),  # type: ignore[arg-type]
            modules=frozenset({"lm_head"}),
            hints=("F.cross_entropy(", ".float()"),
            prior=0.5,
        )
