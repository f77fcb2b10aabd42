"""Every operator in three ways: fp32 truth, the plain lines in 16 bits, ours in 16 bits; and against finite differences in 64.

Each operator's own file tests the same more closely; here none can be forgotten.
"""

from itertools import pairwise
from pathlib import Path

import bitsandbytes  # noqa: F401  (its operators)
import pytest
import torch
from torch.nn import functional

import oomless.ops
from oomless.ops import documents, mxfp4
from oomless.ops.attention import packed_attention
from oomless.ops.embedding import embedding
from oomless.ops.frozen_linear import frozen_linear, new_code, pack
from oomless.ops.gated_product import gated_product
from oomless.ops.grouped_linear import Groups, grouped_linear
from oomless.ops.linear_cross_entropy import linear_cross_entropy
from oomless.ops.rms_norm import rms_norm
from oomless.ops.rotary import rotary
from oomless.ops.selective_scan import selective_scan
from oomless.ops.tiled import tiled

SIXTEEN = [torch.bfloat16, torch.float16]
NO_ARITHMETIC = {
    *("__init__", "gradient_buffer", "operators", "packing_shapes", "random_state", "recompute", "repeating"),
    *("layer_kernels", "loss_kernels", "loss_passes", "triton_values"),  # the passes are in the loss
}
DOCUMENTS = ((3, 1, 5), (9,))


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def masked_attention(query, key, value, *, softcap=None, sinks=None):
    """All scores of all tokens, and a mask."""
    document = torch.stack([torch.arange(len(d)).repeat_interleave(torch.tensor(d)) for d in DOCUMENTS])
    place = torch.arange(document.shape[1])
    visible = (document[:, :, None] == document[:, None]) & (place[:, None] >= place)
    scores = query @ key.transpose(-1, -2) * 0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : len(place)] @ value).transpose(1, 2)


def attention_case(**settings):
    states = [numbers(2, 3, 9, 5, seed=seed) for seed in range(3)]
    ours = {"document_lengths": DOCUMENTS, "scale": 0.5}
    if settings.pop("sinks", False):
        states.append(numbers(3, seed=3))
        return (
            lambda q, k, v, s: packed_attention(q, k, v, sinks=s, **settings, **ours),
            lambda q, k, v, s: masked_attention(q, k, v, sinks=s, **settings),
            states,
        )
    return (
        lambda *states: packed_attention(*states, **settings, **ours),
        lambda *states: masked_attention(*states, **settings),
        states,
    )


def documents_case():
    """All documents of both blocks end to end, as the kernels have them."""
    lengths = [length for block in DOCUMENTS for length in block]

    def ours(*states):
        ends = (state.transpose(1, 2).flatten(0, 1) for state in states)
        made = documents.attend(*ends, documents.starts_of(lengths), lengths, scale=0.5, kernel="flash")
        return made.unflatten(0, (2, 9))

    _, plain, states = attention_case()
    return ours, plain, states


def loss_case(**settings):
    targets = torch.arange(17) * 5 % 11
    targets[::4] = -100
    smoothing, z_loss = settings.get("label_smoothing", 0.0), settings.get("z_loss", 0.0)

    def plain(hidden, weight, bias):
        logits = functional.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * settings.get("logit_scale", 1.0)
        if cap := settings.get("softcap"):
            logits = torch.tanh(logits / cap) * cap
        loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return loss + z_loss * (logits.logsumexp(1)[targets != -100] ** 2).sum()

    return (
        lambda hidden, weight, bias: linear_cross_entropy(
            hidden, weight, targets, bias=bias, chunk_bytes=500, **settings
        ),
        plain,
        [numbers(17, 6), numbers(11, 6, seed=1), numbers(11, seed=2)],
    )


def embedding_case():
    ids = torch.arange(33).view(3, 11) ** 2 % 9
    return (
        lambda weight: embedding(ids, weight, chunk_bytes=400),
        lambda weight: functional.embedding(ids, weight),
        [numbers(13, 7)],
    )


class Kept:
    """A frozen weight that is stored as it is."""

    def __init__(self, weight):
        self.weight = weight

    def unpack(self, dtype):
        return self.weight.to(dtype)


def frozen_case(kind):
    weight, bias = numbers(19, 64, seed=1, scale=0.1), numbers(19, seed=2)
    stored = Kept(weight) if kind is None else pack(weight.float(), kind, new_code(kind))

    def exact(dtype):
        return stored.unpack(torch.float32 if kind else dtype).to(dtype)

    return (
        lambda x: frozen_linear(x, stored, bias.to(x.dtype)),
        lambda x: functional.linear(x, exact(x.dtype), bias.to(x.dtype)),
        [numbers(5, 64)],
    )


def mxfp4_case():
    """The numbers that are kept are those of the grid; in 16 bits each is exact."""
    values, scales = mxfp4.pack(numbers(64, 19, seed=1, scale=0.1))
    powers = 2 ** (scales.double() - 127)
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = torch.stack([values & 15, values >> 4], 2).flatten(1).long()
    kept = grid[codes & 7] * (1 - 2 * (codes >> 3)) * powers.repeat_interleave(mxfp4.GROUP, 1)
    return (
        lambda x: x @ mxfp4.unpack(values, scales, mxfp4.new_code(), x.dtype),
        lambda x: x @ kept.t().to(x.dtype),
        [numbers(5, 64)],
    )


def grouped_case():
    """Three experts, one of which has no rows; the last two rows are nobody's."""
    bounds = [0, 5, 5, 12]

    def plain(rows, weight, bias):
        parts = [
            functional.linear(rows[begin:end], weight[expert], bias[expert])
            for expert, (begin, end) in enumerate(pairwise(bounds))
        ]
        return torch.cat([*parts, rows.new_zeros(2, 9)])

    return (
        lambda rows, weight, bias: grouped_linear(rows, weight, Groups(bounds), bias=bias),
        plain,
        [numbers(14, 6), numbers(3, 9, 6, seed=1), numbers(3, 9, seed=2)],
    )


def rotary_case():
    angles = numbers(2, 5, 6, seed=1), numbers(2, 5, 6, seed=2)

    def plain(x):
        cos, sin = (angle[:, None].to(x.dtype) for angle in angles)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    return lambda x: rotary(x, *(angle.to(x.dtype) for angle in angles)), plain, [numbers(2, 3, 5, 6)]


def looped_scan(x, delta, A, B, C, D, z, delta_bias):
    """A loop over tokens."""
    step = functional.softplus(delta + delta_bias[:, None])
    state, outputs = x.new_zeros(*x.shape[:2], A.shape[1]), []
    for token in range(x.shape[2]):
        now = step[:, :, token, None]
        state = torch.exp(now * A) * state + now * x[:, :, token, None] * B[:, None, :, token]
        outputs.append((state * C[:, None, :, token]).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * x) * functional.silu(z)


def scan_inputs(tokens, sequences=2, channels=5, states=3):
    """What a mixer gives, in fp64: x, delta, A, B, C, D, z, delta_bias."""
    wide, narrow = (sequences, channels, tokens), (sequences, states, tokens)
    shapes = wide, wide, (channels, states), narrow, narrow, (channels,), wide, (channels,)
    x, delta, A, *rest = (numbers(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return [x, delta - 1, -A.exp(), *rest]


def tiled_case():
    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (torch.nn.Parameter(numbers(9, 6, seed=s, scale=0.3)) for s in (1, 2))

        def forward(self, x):
            return functional.silu(x @ self.up.t().to(x.dtype)) @ self.down.to(x.dtype)

    mlp = MLP()
    return lambda x: tiled(mlp, mlp, x, tiles=4), mlp, [numbers(2, 7, 6)]


CASES = {
    "attention": attention_case(),
    "attention, soft cap": attention_case(softcap=1.5),
    "attention, sinks": attention_case(sinks=True),
    "documents": documents_case(),
    "embedding": embedding_case(),
    "frozen_linear": frozen_case(None),
    "frozen_linear, nf4": frozen_case("nf4"),
    "frozen_linear, int8": frozen_case("int8"),
    "gated_product": (
        lambda gate, up: gated_product(gate, up, functional.silu),
        lambda gate, up: functional.silu(gate) * up,
        [numbers(3, 5, 7), numbers(3, 5, 7, seed=1)],
    ),
    "grouped_linear": grouped_case(),
    "linear_cross_entropy": loss_case(),
    "linear_cross_entropy, capped": loss_case(softcap=3.0, logit_scale=0.7),
    "linear_cross_entropy, smoothed": loss_case(label_smoothing=0.2, z_loss=1e-2),
    "mxfp4": mxfp4_case(),
    "rms_norm": (
        lambda x, weight: rms_norm(x, weight, eps=1e-6),
        lambda x, weight: functional.rms_norm(x, weight.shape, weight, 1e-6),
        [numbers(3, 5, 7), numbers(7, seed=1)],
    ),
    "rotary": rotary_case(),
    "selective_scan": (selective_scan, looped_scan, scan_inputs(37)),
    "tiled": tiled_case(),
}


def outputs_and_gradients(function, inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    output.backward(numbers(*output.shape, seed=9).to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_no_operator_is_left_out():
    files = {path.stem for path in Path(oomless.ops.__file__).parent.glob("*.py")}
    assert {name.split(",")[0] for name in CASES} == files - NO_ARITHMETIC


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_the_truth_than_the_plain_lines(case, dtype):
    ours, plain, inputs = CASES[case]
    low = [tensor.to(dtype) for tensor in inputs]
    truth = outputs_and_gradients(plain, [tensor.float() for tensor in low])
    naive, lean = outputs_and_gradients(plain, low), outputs_and_gradients(ours, low)
    eps = torch.finfo(dtype).eps
    assert len(lean) == len(naive) == len(truth)
    for true, rough, own in zip(truth, naive, lean, strict=True):
        assert own.dtype == rough.dtype
        error, allowed = (own.float() - true).abs(), (rough.float() - true).abs()
        assert bool((error <= allowed + 4 * eps * true.abs().clamp_min(true.abs().mean())).all())
        assert error.norm() <= 1.1 * allowed.norm() + eps * true.norm() / 2


NO_FP64 = {"documents", "frozen_linear, nf4", "frozen_linear, int8", "mxfp4"}


@pytest.mark.parametrize("case", [name for name in CASES if name not in NO_FP64])
def test_gradients_are_those_of_finite_differences(case):
    ours, _, inputs = CASES[case]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    if case.startswith("linear_cross_entropy"):
        # It gives its gradients once, as the forward makes them; gradcheck asks again and again.
        _, *gradients = outputs_and_gradients(ours, leaves)
        step = 1e-6
        for leaf, gradient in zip(leaves, gradients, strict=True):
            way = numbers(*leaf.shape, seed=4)
            with torch.no_grad():
                sides = [ours(*(t + sign * step * way if t is leaf else t for t in leaves)) for sign in (1, -1)]
            slope = (sides[0] - sides[1]) / (2 * step)
            expected = (gradient * way).sum() / numbers(seed=9)
            torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-7)
        return
    assert torch.autograd.gradcheck(ours, leaves, fast_mode=True)
