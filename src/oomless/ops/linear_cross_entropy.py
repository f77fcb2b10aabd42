"""The head and its loss in one, without the logits.

Replaces::

    logits = F.linear(hidden, weight, bias).float() * logit_scale
    logits = torch.tanh(logits / softcap) * softcap              # where the model caps them
    loss = scale * F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)

For N tokens and a vocabulary of V that holds N x V logits three times over (logits, their fp32 copy, their gradient):
2.9 GiB for 2,048 tokens of Llama 3.2 1B in 16 bits. Here logits exist a chunk at a time, and because the gradient of a
cross-entropy is at hand as soon as the logits are, it is taken in the forward pass; backward only multiplies.

Two orders of work:

``by rows``     a chunk is some tokens and the whole vocabulary. Three matrix products. The head's gradient is the sum
                over chunks, which in 16 bits would round at every chunk.
``by columns``  a chunk is all tokens and some of the vocabulary, after one pass for the softmax's denominators. Four
                matrix products; each row of the head's gradient is made in one product, accumulated in fp32 inside it
                and rounded once, so there is neither a rounding sum nor an fp32 copy of a V x D gradient.

By columns is used where a 16-bit head needs a gradient, or where several processes each have some rows of the head (then each
goes through the tokens of all with its own rows, and only sums are exchanged), by rows everywhere else. ``scale`` (in fp16 the loss scale,
divided by the tokens of the step) enters before the gradient is stored: unscaled, most of a softmax is below what fp16
can hold.

A chunk is gone over twice, for the softmax and for the gradient (``loss_passes.py``); ``fused`` says in which form.

There is no choice of another implementation: torch's own (2.13) and cut-cross-entropy are weighed in ``docs/techniques.md``.

Shapes in names: N tokens, V vocabulary, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oomless.ops.gradient_buffer import GradientDestination, deliver, take_buffer
from oomless.ops.loss_passes import Fused, Passes, Plain, Slopes, Statistics, bytes_of_a_logit, exact_dtype
from oomless.ops.repeating import for_each, slices

IGNORED = -100


class HeadParts(Protocol):
    """How a frozen head is shared among processes, each of which has some of its rows."""

    first: int
    """How many rows come before this process's."""

    count: int
    """Of the rows of all."""

    def of_all(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` [N, ...] of every process, one after the other."""

    def own(self, tensor: Tensor) -> Tensor:
        """Return this process's part of what ``of_all`` returned, as a view."""

    def largest(self, tensor: Tensor) -> Tensor:
        """Turn each number into the largest that any process has in its place."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Turn each number into the sum of those that all processes have in its place."""

    def own_sum(self, tensor: Tensor) -> Tensor:
        """Return ``own`` of the sum over all processes of ``tensor``."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    row_ids: Tensor | None = None,
    scale: Tensor | float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = 64 << 20,
    destination: GradientDestination = "new",
    parts: HeadParts | None = None,
    fused: bool = False,
) -> Tensor:
    """Return ``scale`` times the summed cross-entropy of a linear head: 0-dim, fp32 (fp64 for a head in fp64).

    Args:
        hidden: [N, D], in the dtype of ``weight``.
        weight: [V, D].
        targets: int64 [N]; -100 predicts nothing.
        bias: [V] or None.
        rows: [R, D] or None; stand in the place of the rows ``row_ids`` of ``weight``, which must not want a gradient.
        row_ids: int64 [R], distinct, where there are ``rows``.
        scale: a number or a 0-dim tensor; multiplies loss and gradients.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        logit_scale: multiplies the logits first.
        label_smoothing: share of the target that is spread evenly over the vocabulary, as in torch's cross-entropy.
        z_loss: weight of the squared logarithm of the softmax's denominator, added to every token's loss (PaLM,
            Chowdhery et al. 2022).
        chunk_bytes: most bytes of logits, in all their copies, held at once; at least one row or column is.
        destination: where the gradient of ``weight`` goes; unless "new" it is added to the ``.grad`` that is there as soon
            as the loss is computed, and the loss must be what ``backward()`` is called on.
        parts: where ``weight`` and ``bias`` are only this process's rows of a frozen head; there are no ``rows`` then, and N and
            ``scale`` are the same in all processes, which call this together.
        fused: go over each chunk in kernels, which need no copies of the logits; not in fp64.

    Raises:
        ValueError: ``destination`` is not "new" and ``weight`` is not a leaf, or there are ``rows`` and ``weight`` wants a
            gradient.
    """
    if rows is not None and weight.requires_grad:
        raise ValueError("rows train in the place of the weight's, which must not want a gradient of its own")
    # Inside an autograd function gradients are always off, and its inputs say that they need one even under no_grad.
    work = _Work(
        hidden,
        weight,
        bias,
        targets,
        rows,
        row_ids,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_bytes=chunk_bytes,
        gradients=torch.is_grad_enabled(),
        destination=destination,
        parts=parts,
        fused=fused,
    )
    scale_tensor = torch.as_tensor(scale, dtype=work.exact, device=hidden.device)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, rows, scale_tensor, work)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows_RD: Tensor | None,
        scale: Tensor,
        work: _Work,
    ) -> Tensor:
        needs = (work.gradients and needed for needed in ctx.needs_input_grad[:4])
        for_hidden, for_weight, for_bias, for_rows = needs
        buffer = take_buffer(work.destination, weight_VD) if for_weight else None
        if work.parts is not None:
            loss, gradients = work.of_parts(work.parts, scale, for_hidden)
        elif for_weight and not work.single:
            loss, gradients = work.by_columns(scale, buffer, for_hidden, for_bias)
        else:
            loss, gradients = work.by_rows(scale, buffer, for_hidden, for_weight, for_bias, for_rows)
        if gradients[1] is not None:
            gradients[1] = deliver(work.destination, weight_VD, gradients[1])
        ctx.gradients, ctx.scaled = gradients, (True, work.destination == "new", True, True)
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy gives its gradients once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return (
            *(
                made if made is None or not scaled else made.mul_(gradient)
                for made, scaled in zip(gradients, ctx.scaled, strict=True)
            ),
            None,
            None,
        )


class _Work:
    """One call's inputs, and the buffers that its chunks share."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        rows_RD: Tensor | None = None,
        row_ids_R: Tensor | None = None,
        *,
        softcap: float | None,
        logit_scale: float,
        label_smoothing: float,
        z_loss: float,
        chunk_bytes: int,
        gradients: bool,
        destination: GradientDestination,
        parts: HeadParts | None = None,
        fused: bool = False,
    ) -> None:
        if parts is not None:
            hidden_ND, targets_N = parts.of_all(hidden_ND), parts.of_all(targets_N)
        self.parts, self.first = parts, 0 if parts is None else parts.first
        self.hidden_ND, self.weight_VD, self.bias_V = hidden_ND, weight_VD, bias_V
        self.rows_RD, self.row_ids_R = rows_RD, row_ids_R
        self.tokens = hidden_ND.shape[0]
        self.vocabulary = weight_VD.shape[0] if parts is None else parts.count
        self.gradients, self.destination = gradients, destination
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.exact = exact_dtype(weight_VD.dtype)
        self.single = self.exact == weight_VD.dtype
        self.kept_N = (targets_N != IGNORED).to(self.exact)
        self.targets_N = targets_N.clamp_min(0)
        fused = fused and weight_VD.dtype != torch.float64
        self._passes_of = partial(Fused if fused else Plain, softcap=softcap, logit_scale=logit_scale)
        per_logit = bytes_of_a_logit(weight_VD.dtype, fused=fused, capped=bool(softcap))
        self.logits_at_once = max(1, chunk_bytes // per_logit)
        shapes = [None if tensor is None else tensor.shape for tensor in (hidden_ND, weight_VD, bias_V, rows_RD)]
        self._facts = (*shapes, weight_VD.dtype, softcap, logit_scale, label_smoothing, z_loss, chunk_bytes, fused)

    def _for_each(self, chunks: list[slice], function: Callable[[slice], None], of: Any = ()) -> None:
        """Call ``function`` on each of ``chunks``; what it asks for follows from ``of``, from the inputs, and from a chunk's size."""
        for_each(chunks, function, (of, self._facts))

    def _passes(self, size: int) -> Passes:
        """Return what goes over chunks of so many logits, with the room for them."""
        return self._passes_of(self.weight_VD.new_empty(size))

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, passes: Passes) -> Tensor:
        """Return the matrix product, in the room of ``passes``."""
        shape = (hidden.shape[0], weight.shape[0])
        logits = passes.room[: shape[0] * shape[1]].view(shape)
        if bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)
        if self.rows_RD is not None and self.row_ids_R is not None:
            replaced = hidden @ self.rows_RD.t()
            logits.index_copy_(1, self.row_ids_R, replaced if bias is None else replaced.add_(bias[self.row_ids_R]))
        return logits

    def by_rows(
        self,
        scale: Tensor,
        buffer_VD: Tensor | None,
        for_hidden: bool,
        for_weight: bool,
        for_bias: bool,
        for_rows: bool = False,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Go through the tokens; return the summed loss and the gradients asked for, the head's added to ``buffer_VD``."""
        hidden_grad = torch.empty_like(self.hidden_ND) if for_hidden else None
        weight_grad = buffer_VD
        if for_weight and weight_grad is None:
            weight_grad = torch.zeros_like(self.weight_VD)
        bias_grad = torch.zeros_like(self.bias_V, dtype=self.exact) if for_bias and self.bias_V is not None else None
        rows_grad = torch.zeros_like(self.rows_RD, dtype=self.exact) if for_rows and self.rows_RD is not None else None
        loss = self.hidden_ND.new_zeros((), dtype=self.exact)
        rows = max(1, min(self.tokens, self.logits_at_once // self.vocabulary))
        passes = self._passes(rows * self.vocabulary)

        def take(part: slice) -> None:
            hidden, columns, kept = self.hidden_ND[part], self.targets_N[part], self.kept_N[part]
            gradient = self._logits(hidden, self.weight_VD, self.bias_V, passes)
            seen = self._none_yet(kept)
            passes.statistics(gradient, columns, seen)
            loss.add_(self._losses(seen, kept).sum())
            if not (for_hidden or for_weight or for_bias or for_rows):
                return
            slopes = self._slopes(seen, kept * scale)
            factor = passes.gradient(gradient, columns, seen.largest, slopes, just_seen=True)
            if factor is not None:
                hidden = hidden * factor
            if weight_grad is not None:
                weight_grad.addmm_(gradient.t(), hidden)
            if bias_grad is not None:
                bias_grad.add_(
                    gradient.sum(dim=0, dtype=self.exact) if factor is None else (gradient.t() @ factor)[:, 0]
                )
            replaced = None
            if self.row_ids_R is not None:
                # What the matrix holds in the replaced rows must not matter, not even by rounding.
                replaced = gradient[:, self.row_ids_R]
                gradient.index_fill_(1, self.row_ids_R, 0)
            if rows_grad is not None and replaced is not None:
                rows_grad.addmm_(replaced.t().to(self.exact), hidden.to(self.exact))
            if hidden_grad is not None:
                torch.mm(gradient, self.weight_VD, out=hidden_grad[part])
                if self.rows_RD is not None and replaced is not None:
                    hidden_grad[part].addmm_(replaced, self.rows_RD)
                if factor is not None:
                    hidden_grad[part].mul_(factor)

        self._for_each(slices(self.tokens, rows), take, (for_hidden, for_weight, for_bias, for_rows))
        dtype = self.weight_VD.dtype
        return loss, [
            hidden_grad,
            weight_grad,
            None if bias_grad is None else bias_grad.to(dtype),
            None if rows_grad is None else rows_grad.to(dtype),
        ]

    def by_columns(
        self, scale: Tensor, buffer_VD: Tensor | None, for_hidden: bool, for_bias: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Go through the vocabulary twice; return the summed loss and the gradients, the head's added to ``buffer_VD``."""
        weight_grad = torch.empty_like(self.weight_VD) if buffer_VD is None else buffer_VD
        bias_grad = torch.empty_like(self.bias_V) if for_bias and self.bias_V is not None else None
        passes = self._column_passes()
        seen = self._statistics(passes)
        loss = self._losses(seen, self.kept_N).sum()

        def of_head(part: slice, gradient: Tensor) -> None:
            if buffer_VD is None:
                torch.mm(gradient.t(), self.hidden_ND, out=weight_grad[part])
            else:
                buffer_VD[part].addmm_(gradient.t(), self.hidden_ND)
            if bias_grad is not None:
                bias_grad[part] = gradient.sum(dim=0)

        of = (buffer_VD is None, for_bias)
        hidden_grad = self._column_gradients(passes, seen, scale, for_hidden, of_head, of)
        return loss, [
            None if hidden_grad is None else hidden_grad.to(self.hidden_ND.dtype),
            weight_grad,
            bias_grad,
            None,
        ]

    def of_parts(self, parts: HeadParts, scale: Tensor, for_hidden: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Go through this process's rows of the vocabulary; return the summed loss of its tokens, and their gradient."""
        passes = self._column_passes()
        own = self._statistics(passes)
        largest = parts.largest(own.largest.clone())
        own.sums.mul_((own.largest - largest).exp_())
        seen = Statistics(largest, *parts.sum(torch.stack([of_own for of_own in own[1:] if of_own is not None])))
        loss = parts.own(self._losses(seen, self.kept_N)).sum()
        del own
        hidden_grad = None
        if for_hidden:
            of_all = self._column_gradients(passes, seen, scale, for_hidden, lambda part, gradient: None)
            assert of_all is not None
            hidden_grad = parts.own_sum(of_all).to(self.hidden_ND.dtype)
        return loss, [hidden_grad, None, None, None]

    def _columns(self) -> list[slice]:
        return slices(self.weight_VD.shape[0], self.logits_at_once // max(1, self.tokens))

    def _column_passes(self) -> Passes:
        most = max((part.stop - part.start for part in self._columns()), default=0)
        return self._passes(self.tokens * most)

    def _statistics(self, passes: Passes) -> Statistics:
        """Go through the columns; return what was seen of each token's logits."""
        seen = self._none_yet(self.kept_N)

        def take(part: slice) -> None:
            logits = self._logits(self.hidden_ND, self.weight_VD[part], self._bias(part), passes)
            passes.statistics(logits, self._targets_in(part), seen)

        self._for_each(self._columns(), take)
        return seen

    def _none_yet(self, like_N: Tensor) -> Statistics:
        return Statistics.none_yet(like_N, totals=bool(self.label_smoothing))

    def _losses(self, seen: Statistics, kept: Tensor) -> Tensor:
        """Return each token's loss, where all its logits were seen; 0 where nothing is predicted."""
        logs, aim = seen.sums.log(), seen.target
        if seen.totals is not None:  # some of the mean of all
            aim = (1 - self.label_smoothing) * aim + (self.label_smoothing / self.vocabulary) * seen.totals
        losses = logs - (aim - seen.largest)
        if self.z_loss:
            losses.add_(logs.add_(seen.largest).square_(), alpha=self.z_loss)
        return losses * kept

    def _slopes(self, seen: Statistics, factors: Tensor) -> Slopes:
        """Return what the gradient is made with, where each token's loss counts for ``factors``."""
        heights = 1 / seen.sums
        if self.z_loss:
            heights *= 1 + 2 * self.z_loss * (seen.sums.log() + seen.largest)
        return Slopes(heights, factors, 1 - self.label_smoothing, self.label_smoothing / self.vocabulary)

    def _column_gradients(
        self,
        passes: Passes,
        seen: Statistics,
        scale: Tensor,
        for_hidden: bool,
        of_head: Callable[[slice, Tensor], None],
        of: Any = (),
    ) -> Tensor | None:
        """Go through the columns again; hand the gradients of their logits to ``of_head``, and return that of the hidden states.

        What ``of_head`` asks for follows from ``of``.
        """
        hidden_grad = torch.zeros_like(self.hidden_ND, dtype=self.exact) if for_hidden else None
        slopes = self._slopes(seen, self.kept_N * scale)

        def take(part: slice) -> None:
            gradient = self._logits(self.hidden_ND, self.weight_VD[part], self._bias(part), passes)
            passes.gradient(gradient, self._targets_in(part), seen.largest, slopes, just_seen=False)
            of_head(part, gradient)
            if hidden_grad is not None:
                hidden_grad.add_(gradient @ self.weight_VD[part])

        self._for_each(self._columns(), take, (for_hidden, of))
        return hidden_grad

    def _bias(self, part: slice) -> Tensor | None:
        return None if self.bias_V is None else self.bias_V[part]

    def _targets_in(self, part: slice) -> Tensor:
        """Return each target's column among those of ``part``, which may lie outside."""
        columns: Tensor = self.targets_N - (self.first + part.start)
        return columns
