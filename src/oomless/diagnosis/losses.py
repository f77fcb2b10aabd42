"""What the losses of other tools hold: in chunks as TRL's and Liger's, of rewards, of the answers that a model gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oomless.diagnosis.tensors import TRL_TOKENS, TRL_WORDS, Dimensions
from oomless.memory.device import Device
from oomless.ops.linear_cross_entropy import linear_cross_entropy


def reward_loss(model: Any, tokens: Tensor, device: Device) -> Tensor:
    """Return the loss of TRL's RewardTrainer: one number for each token, of which the last of a sequence counts."""
    with device.phase("forward"):
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        chosen, rejected = model.get_output_embeddings()(hidden)[:, -1].float().chunk(2)
    with device.phase("loss"):
        return -nn.functional.logsigmoid(chosen - rejected).mean()


def answers_loss(model: Any, tokens: Tensor, answers: int, device: Device, *, single: bool) -> Tensor:
    """Return what GRPO computes of the last ``answers`` tokens (TRL before 1: trl/trainer/grpo_trainer.py).

    The logits of these tokens alone exist, in fp32 where ``single``, divided by the temperature; log-probabilities are computed one
    sequence after the other.
    """
    with device.phase("forward"):
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=answers + 1).logits
    with device.phase("loss"):
        logits = (logits.float() if single else logits)[:, :-1] / 0.9
        index = tokens[:, -answers:].unsqueeze(-1)
        if logits.dtype == torch.float32:
            chosen = torch.gather(logits, -1, index).squeeze(-1)
            return (chosen - torch.stack([row.logsumexp(-1) for row in logits])).mean()
        rows = [row.log_softmax(-1).gather(-1, own) for row, own in zip(logits, index, strict=True)]
        return torch.stack(rows).mean()


def generate(model: Any, sequences: int, tokens: int, device: Device) -> None:
    """Hold what generating takes at its end: keys and values of ``sequences`` of so many ``tokens``, and one token's logits of each."""
    d = Dimensions.of_config(model.config)
    if d is None:
        return
    weight = model.get_input_embeddings().weight
    with device.phase("forward"), torch.no_grad():
        shape = (sequences, d.key_heads, tokens, d.head_width)
        cache = [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2 * d.layers)]
        device.label(cache, "saved activations")
        logits = torch.empty((sequences, d.vocabulary), dtype=torch.float32, device=weight.device)
        del cache, logits


def distillation_loss(
    model: Any, teacher: Callable[[], Any], tokens: Tensor, device: Device, *, single: bool, beta: float
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence from what ``teacher`` returns (https://huggingface.co/papers/2306.13649).

    As TRL's GKDTrainer computes it (1.16: trl/experimental/gkd/gkd_trainer.py): over whole logits of both, in fp32 where ``single``,
    and forward or reverse KL alone where ``beta`` is 0 or 1. What the teacher returns, keys and values too, is held for so long.
    """
    with device.phase("forward"):
        logits = model(input_ids=tokens, use_cache=False).logits
        logits = logits.float() if single else logits
        taught = teacher()
        wanted = taught.logits.float() if single else taught.logits
    with device.phase("loss"):
        return _divergence(logits[:, :-1] / 1.0, wanted[:, :-1] / 1.0, beta)


def _divergence(logits: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """Return the sum over tokens, each of which counts; shapes (sequences, tokens, vocabulary)."""
    kl = partial(nn.functional.kl_div, reduction="none", log_target=True)
    student, teacher = logits.log_softmax(-1), wanted.log_softmax(-1)
    if beta in (0, 1):
        each = kl(student, teacher) if beta == 0 else kl(teacher, student)
    else:
        weighted = torch.stack([student + math.log1p(-beta), teacher + math.log(beta)])
        mixture = weighted.logsumexp(0)
        of_teacher, of_student = kl(mixture, teacher), kl(mixture, student)
        each = beta * of_teacher + (1 - beta) * of_student
    each = each.flatten(0, 1)
    return each[torch.arange(len(each), device=each.device)].sum()


def fused_loss(model: Any, tokens: Tensor, device: Device, whose: Literal["liger", "trl"]) -> Tensor:
    """Return the loss of a tool that never holds all logits."""
    with device.phase("forward"):
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    with device.phase("loss"):
        weight = model.get_output_embeddings().weight
        if whose == "trl":
            rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            return _LossOfTRL.apply(rows, weight)  # type: ignore[no-any-return, no-untyped-call]
        rows = hidden.reshape(-1, hidden.shape[-1])
        total: Tensor = linear_cross_entropy(rows.to(weight.dtype), weight, tokens.reshape(-1))
        return total


class _LossOfTRL(torch.autograd.Function):
    """Holds what TRL's loss holds (1.16: trl/kernels/chunked_logprob.py), and computes nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else rows.dtype
        sums = [torch.zeros(len(rows), dtype=torch.float32, device=rows.device) for _ in range(7)]
        held = _LossOfTRL._chunk(ctx, rows, weight)
        del held
        ctx.save_for_backward(rows, weight, sums[0])
        return sums[1].sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight, _ = ctx.saved_tensors
        of_both = [
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if needed else None
            for tensor, needed in zip((rows, weight), ctx.needs_input_grad, strict=True)
        ]
        held = _LossOfTRL._chunk(ctx, rows, weight)
        of_rows, of_weight = (
            None if one is None else one.to(t.dtype) for one, t in zip(of_both, (rows, weight), strict=True)
        )
        del held
        return of_rows, of_weight

    @staticmethod
    def _chunk(ctx: Any, rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        tokens, words = min(len(rows), TRL_TOKENS), min(len(weight), TRL_WORDS)
        logits = torch.empty((tokens, words), dtype=ctx.dtype, device=rows.device)
        return logits, rows[:tokens].to(ctx.dtype), weight[:words].to(ctx.dtype)
