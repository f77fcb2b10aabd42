"""The selective scan of Mamba (Gu and Dao 2023), in chunks of tokens, which keeps its inputs and one state per chunk.

Replaces, of each channel, a loop over tokens::

    step = softplus(delta + delta_bias)
    state = exp(step * A) * state + step * x * B    # N numbers
    y = (C @ state + D * x) * silu(z)

In PyTorch this loop is some operators for each token, forward and backward, and autograd keeps several fp32 tensors of N numbers for
every token and channel. Here a chunk is ``STEPS`` times a few rows: the rows of a chunk are stepped through side by side, each from a
state of zero; then the rows' last states are joined; then what came into each row is added, decayed by the steps up to each token. All
decays are exponentials of sums of steps and at most 1; nothing is divided. Kept for backward are the inputs and the state before
each chunk in fp32, N numbers per channel; a chunk's states are made again. Costs the forward scan once more in backward. Works in fp32
throughout, or fp64.

The temporaries take at most ``SLICE_BYTES``, a single channel's aside: channels do not depend on each other and are done in slices.

Shapes in names: S sequences, T tokens, D channels, N numbers of a state; in a chunk L steps (``STEPS``), K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from oomless.ops.repeating import repeating, slices

CHUNK = 128
STEPS = 16
SLICE_BYTES = 128 << 20
COPIES, NARROW = 3, 16
"""How many numbers there are at once for each token and channel: so many states, and so many beside them."""

Work = Callable[[int, slice, slice], None]


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """Return the gated output of the scan: [S, D, T] in the dtype of ``x``, the channels of a token side by side.

    Args:
        x: [S, D, T].
        delta: [S, D, T], what the softplus is applied to, less the bias.
        A: [D, N], negative.
        B: [S, N, T].
        C: [S, N, T].
        D: [D].
        z: [S, D, T].
        delta_bias: [D].
    """
    result: Tensor = _SelectiveScan.apply(x, delta, A, B, C, D, z, delta_bias)  # type: ignore[no-untyped-call]
    return result


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        scan = _Scan(inputs)
        result_STD = scan.x.new_empty(scan.x.shape)
        kept_SDN = scan.new_states(len(scan.chunks))
        kept_SDN[0].zero_()
        scan.for_each("forward", scan.chunks, partial(scan.forward, kept_SDN, result_STD))
        ctx.save_for_backward(*inputs, kept_SDN)
        return result_STD.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept_SDN = ctx.saved_tensors
        scan = _Scan(inputs)
        gradients = _Gradients(scan, ctx.needs_input_grad)
        carry_SDN = scan.new_states(1).zero_()[0]
        work = partial(scan.backward, kept_SDN, carry_SDN, gradient.transpose(1, 2), gradients)
        scan.for_each("backward", scan.chunks[::-1], work)
        return gradients.results(inputs)


class _Gradients:
    """Where backward writes; of parameters that do not train nothing is made. Sums over channels or tokens are made in full precision."""

    def __init__(self, scan: _Scan, needed: Sequence[bool]) -> None:
        self.needed = needed
        _, _, for_A, _, _, for_D, _, for_bias = needed
        self.x, self.delta, self.z = (tensor.new_empty(tensor.shape) for tensor in (scan.x, scan.delta, scan.z))
        self.B, self.C = (tensor.new_zeros(tensor.shape, dtype=scan.exact) for tensor in (scan.B, scan.C))
        self.A, self.D, self.bias = (
            tensor.new_zeros(tensor.shape, dtype=scan.exact) if wanted else None
            for tensor, wanted in ((scan.A, for_A), (scan.D, for_D), (scan.bias, for_bias))
        )

    def results(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return them as autograd wants them, in the order and the dtypes of ``inputs``."""
        x, delta, B, C, z = (t.transpose(1, 2) for t in (self.x, self.delta, self.B, self.C, self.z))
        made = (x, delta, self.A, B, C, self.D, z, self.bias)
        return tuple(
            None if gradient is None or not needed else gradient.to(own.dtype)
            for gradient, own, needed in zip(made, inputs, self.needed, strict=True)
        )


class _Scan:
    """The inputs, tokens before channels, and what is done to one chunk of tokens of some channels."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        x, delta, A, B, C, D, z, bias = inputs
        self.exact = _exact(x)
        self.x, self.delta, self.B, self.C, self.z = (t.transpose(1, 2) for t in (x, delta, B, C, z))
        self.A, self.D, self.bias = A, D, bias
        sequences, tokens, channels = self.x.shape
        self.chunks = list(enumerate(slices(tokens, CHUNK)))
        one = sequences * (min(tokens, CHUNK) + STEPS) * (COPIES * A.shape[1] + NARROW) * self.exact.itemsize
        self.slices = slices(channels, SLICE_BYTES // one)
        self.facts = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)

    def new_states(self, count: int) -> Tensor:
        """Return ``count`` states of all channels, not filled: [count, S, D, N]."""
        sequences, _, channels = self.x.shape
        return self.x.new_empty(count, sequences, channels, self.A.shape[1], dtype=self.exact)

    def for_each(self, way: str, chunks: Sequence[tuple[int, slice]], work: Work) -> None:
        """Call ``work`` with the place, the tokens and the channels of each chunk, one after another."""
        for place, tokens in chunks:
            for channels in self.slices:
                size = tokens.stop - tokens.start, channels.stop - channels.start
                repeating((__name__, way, size, self.facts), partial(work, place, tokens, channels))

    def forward(self, kept_SDN: Tensor, result_STD: Tensor, place: int, tokens: slice, channels: slice) -> None:
        """Write the output of one chunk, and the state after it where there is room for that."""
        x_LKSD, raw_STD, step_LKSD = self._steps(tokens, channels)
        B_LKSN, C_LKSN = (_rows(tensor[:, tokens].to(self.exact)) for tensor in (self.B, self.C))
        states = (step_LKSD * x_LKSD).unsqueeze(-1) * B_LKSN.unsqueeze(-2)
        carry_SDN = kept_SDN[place, :, channels].clone()
        _solve(step_LKSD, self.A[channels].to(self.exact), states, carry_SDN)
        if place + 1 < len(kept_SDN):
            kept_SDN[place + 1, :, channels] = carry_SDN
        y_STD = _tokens(_apply(states, C_LKSN).addcmul_(x_LKSD, self.D[channels].to(self.exact)), raw_STD)
        result_STD[:, tokens, channels] = y_STD * functional.silu(self.z[:, tokens, channels].to(self.exact))

    def backward(
        self,
        kept_SDN: Tensor,
        carry_SDN: Tensor,
        gradient_STD: Tensor,
        to: _Gradients,
        place: int,
        tokens: slice,
        channels: slice,
    ) -> None:
        """Write the gradients of one chunk; ``carry_SDN`` is that of the state after it, and then of that before it."""
        exact = self.exact
        here = slice(None), tokens, channels
        A_DN, D_D = self.A[channels].to(exact), self.D[channels].to(exact)
        x_LKSD, raw_STD, step_LKSD = self._steps(tokens, channels)
        B_LKSN, C_LKSN = (_rows(tensor[:, tokens].to(exact)) for tensor in (self.B, self.C))
        scaled_LKSD = step_LKSD * x_LKSD

        # The states again, each behind the one before it.
        steps, *rest = step_LKSD.shape
        states = step_LKSD.new_empty(steps + 1, *rest, A_DN.shape[1])
        torch.mul(scaled_LKSD.unsqueeze(-1), B_LKSN.unsqueeze(-2), out=states[1:])
        states[0] = _solve(step_LKSD, A_DN, states[1:], kept_SDN[place, :, channels].clone())

        # The gate, and the output before it.
        z_LKSD, gradient_LKSD = (_rows(tensor[here].to(exact)) for tensor in (self.z, gradient_STD))
        y_LKSD = _apply(states[1:], C_LKSN).addcmul_(x_LKSD, D_D)
        open_LKSD = torch.sigmoid(z_LKSD)
        slope_LKSD = open_LKSD * (1 + z_LKSD * (1 - open_LKSD))
        to.z[here] = _tokens(gradient_LKSD * y_LKSD * slope_LKSD, raw_STD)
        y_gradient = gradient_LKSD * z_LKSD * open_LKSD
        to.C[:, tokens] += _tokens(_sum_channels(y_gradient, states[1:]), raw_STD)

        # The gradients of the states: the same recurrence, from the last token to the first.
        adjoint = y_gradient.unsqueeze(-1) * C_LKSN.unsqueeze(-2)
        step_STD = functional.softplus(raw_STD)
        later_LKSD = _rows(functional.pad(step_STD[:, 1:], (0, 0, 0, 1)))
        carry_SDN = carry_SDN[:, channels]
        _solve(later_LKSD, A_DN, adjoint, carry_SDN, back=True)
        carry_SDN.mul_(torch.exp(step_STD[:, 0].unsqueeze(-1) * A_DN))

        to.B[:, tokens] += _tokens(_sum_channels(scaled_LKSD, adjoint), raw_STD)
        through_B = _apply(adjoint, B_LKSN)
        to.x[here] = _tokens((step_LKSD * through_B).addcmul_(y_gradient, D_D), raw_STD)
        through_decay = torch.mul(step_LKSD.unsqueeze(-1), A_DN).exp_().mul_(adjoint).mul_(states[:-1])
        step_gradient = torch.mul(through_decay, A_DN, out=states[1:]).sum(-1).addcmul_(x_LKSD, through_B)
        delta_gradient = _tokens(step_gradient, raw_STD) * torch.sigmoid(raw_STD)
        to.delta[here] = delta_gradient
        if to.A is not None:
            to.A[channels] += through_decay.mul_(step_LKSD.unsqueeze(-1)).sum((0, 1, 2))
        if to.D is not None:
            to.D[channels] += (y_gradient * x_LKSD).sum((0, 1, 2))
        if to.bias is not None:
            to.bias[channels] += delta_gradient.sum((0, 1))

    def _steps(self, tokens: slice, channels: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return x in rows, what the softplus is applied to, and the steps in rows, which are zero beyond the last token."""
        raw_STD = self.delta[:, tokens, channels].to(self.exact) + self.bias[channels].to(self.exact)
        return _rows(self.x[:, tokens, channels].to(self.exact)), raw_STD, _rows(functional.softplus(raw_STD))


def _solve(step_LKSD: Tensor, A_DN: Tensor, states_LKSDN: Tensor, carry_SDN: Tensor, *, back: bool = False) -> Tensor:
    """Change what flows into states to the states; return what came into each row: [K, S, D, N].

    ``carry_SDN`` is the state before the chunk, and then that of its last token. ``back`` runs from the last token to the first.
    """
    steps, rows = step_LKSD.shape[:2]
    order, last = (range(steps - 1, -1, -1), 0) if back else (range(steps), steps - 1)
    decay = (step_LKSD.unsqueeze(-1) * A_DN).exp_()
    for before, now in pairwise(order):
        states_LKSDN[now].addcmul_(decay[now], states_LKSDN[before])
    so_far = step_LKSD.flip(0).cumsum(0).flip(0) if back else step_LKSD.cumsum(0)
    torch.mul(so_far.unsqueeze(-1), A_DN, out=decay).exp_()
    came_KSDN = decay.new_empty(decay.shape[1:])
    for row in range(rows - 1, -1, -1) if back else range(rows):
        came_KSDN[row] = carry_SDN
        carry_SDN.mul_(decay[last, row]).add_(states_LKSDN[last, row])
    states_LKSDN.addcmul_(decay, came_KSDN)
    return came_KSDN


def _rows(tensor_STW: Tensor) -> Tensor:
    """Return a chunk as [L, K, S, W]: row after row of steps, filled up with zeros."""
    tokens = tensor_STW.shape[1]
    steps = min(STEPS, tokens)
    filled_TSW = tensor_STW.transpose(0, 1)
    if tokens % steps:
        filled_TSW = functional.pad(filled_TSW, (0, 0, 0, 0, 0, -tokens % steps))
    return filled_TSW.view(-1, steps, *filled_TSW.shape[1:]).transpose(0, 1)


def _tokens(rows_LKSW: Tensor, like_STD: Tensor) -> Tensor:
    """Return what ``_rows`` was given: [S, T, W]."""
    return rows_LKSW.transpose(0, 1).flatten(0, 1)[: like_STD.shape[1]].transpose(0, 1)


def _apply(states_LKSDN: Tensor, vector_LKSN: Tensor) -> Tensor:
    """Return each channel's product with its token's vector: [L, K, S, D]."""
    return (states_LKSDN @ vector_LKSN.unsqueeze(-1)).squeeze(-1)


def _sum_channels(weights_LKSD: Tensor, states_LKSDN: Tensor) -> Tensor:
    """Return the weighted sum over channels: [L, K, S, N]."""
    return (weights_LKSD.unsqueeze(-2) @ states_LKSDN).squeeze(-2)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
