"""K-quants as the gguf package reads them."""

import gguf
import numpy as np
import pytest
import torch

from oomless.export.gguf_mixtures import Mixture
from oomless.export.k_quants import KINDS, quantize


def stored(numbers, kind):
    return gguf.dequantize(quantize(numbers.numpy(), kind), gguf.GGMLQuantizationType[kind.upper()])


def lost(numbers, kind):
    return float(np.linalg.norm(stored(numbers, kind) - numbers.numpy()) / numbers.norm())


def drawn(how, rows=64, width=1024):
    draw = np.random.default_rng(3)
    made = {"normal": draw.normal, "long-tailed": lambda size: draw.standard_t(4, size), "even": draw.uniform}[how]
    return torch.from_numpy(made(size=(rows, width)).astype(np.float32)) * 0.02


def lost_by_one_scale(numbers, bits):
    """What the best scale for all of ``numbers`` loses, of the evenly spaced ones about zero."""
    largest = 2 ** (bits - 1)
    steps = float(numbers.abs().max()) / largest * torch.linspace(0.1, 1.0, 91)
    errors = (
        (step * (numbers / step).round().clamp(-largest, largest - 1) - numbers).norm() / numbers.norm()
        for step in steps
    )
    return float(min(errors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["normal", "long-tailed"])
def test_less_is_lost_than_by_one_scale_for_all(how, kind):
    numbers = drawn(how)
    assert lost(numbers, kind) < 0.8 * lost_by_one_scale(numbers, int(kind[1]))


@pytest.mark.parametrize("kind", ["q4_k", "q5_k"])
def test_less_is_lost_than_in_the_gguf_package_s_own_of_more_bits(kind):
    numbers, simple = drawn("normal"), gguf.GGMLQuantizationType[kind[:2].upper() + "_1"]
    of_simple = gguf.dequantize(gguf.quantize(numbers.numpy(), simple), simple) - numbers.numpy()
    assert lost(numbers, kind) < np.linalg.norm(of_simple) / numbers.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_form_holds_is_held(kind):
    """Integers over the whole range in each part, times scales of the whole range."""
    bits, draw = int(kind[1]), np.random.default_rng(5)
    size, about_zero = (16, kind in ("q3_k", "q6_k")) if kind not in ("q4_k", "q5_k") else (32, False)
    parts = 256 // size
    scales_to = {"q2_k": 15, "q3_k": 31, "q6_k": 127}.get(kind, 63)
    integers = draw.integers(0, 2**bits, (50, parts, size))
    integers[:, :, 0], integers[:, :, 1] = 0, 2**bits - 1
    scales, minima = draw.integers(1, scales_to + 1, (2, 50, parts, 1))
    scales[:, 0], minima[:, 0] = (-scales_to - 1 if about_zero else scales_to), scales_to
    numbers = scales * (integers - 2 ** (bits - 1)) if about_zero else scales * integers - minima
    exact = torch.from_numpy(numbers.reshape(50, 256).astype(np.float32) / 1024)
    assert lost(exact, kind) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_odd_blocks(kind):
    zeros = torch.zeros(1, 256)
    one = zeros.clone()
    one[0, 77] = -3.0
    assert np.array_equal(stored(zeros, kind), zeros.numpy())
    assert np.allclose(stored(one, kind), one.numpy(), atol=0.03)
    for constant in (2.0, -2.0, 60_000.0, -60_000.0):
        assert np.allclose(stored(torch.full((2, 256), constant), kind), constant, rtol=0.01)
    for few in (1e-7, 1e-30):
        assert np.abs(stored(drawn("normal", 2, 256) * few, kind)).max() < 1e-7
    step = 2.0 ** (1 - int(kind[1]))
    for numbers in (drawn("even").abs() + 1, -drawn("even").abs() - 1, drawn("normal").cumsum(1)):
        wide = numbers.unflatten(1, (-1, 256)).abs().amax(-1, keepdim=True)
        off = (torch.from_numpy(stored(numbers, kind)) - numbers).abs().unflatten(1, (-1, 256)) / wide
        assert float(off.max()) < 1.1 * step


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_stored_one_by_one(kind):
    numbers = drawn("long-tailed", 9, 768)
    together = quantize(numbers.numpy(), kind)
    assert np.array_equal(together, np.concatenate([quantize(row[None], kind) for row in numbers.numpy()]))
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][1]
    assert together.shape == (9, 3 * block_bytes)


def mixed(name, *places, layers=9, experts=0, share=1, tied=False, width=512):
    mixture = Mixture(name, layers, experts, share, tied)
    return [mixture.kind(f"{place}.weight", (width, width)) for place in places]


def test_what_loses_most_has_more_bits():
    """As llama.cpp's llama-quantize has it, with which test_llama_cpp.py compares all."""
    downs = [f"blk.{layer}.ffn_down" for layer in range(9)]
    six = "q6_k"
    assert mixed("q4_k_m", *downs) == [six, "q4_k", "q4_k", six, "q4_k", "q4_k", six, six, six]
    assert mixed("q4_k_s", *downs)[:2] == ["q5_k", "q4_k"]
    assert mixed("q4_k_m", "output", "token_embd", "blk.1.attn_q") == [six, "q4_k", "q4_k"]
    assert mixed("q4_k_m", "token_embd", tied=True) == [six]
    assert mixed("q4_k_m", "blk.0.attn_v", "blk.0.attn_k", "blk.0.attn_output", experts=8) == ["q8_0", "q8_0", "q5_k"]
    assert mixed("q2_k", "blk.1.attn_v", share=4) == ["q4_k"]
    assert mixed("q4_k_m", "blk.1.attn_v", layers=80, share=8) == ["q6_k"]
    assert mixed("q4_k_m", "blk.12.attn_v", layers=80, share=8) == [six]
    assert mixed("q4_k_m", "blk.11.attn_v", layers=80, share=8) == ["q5_k"]
    assert mixed("q4_k_m", "blk.0.ffn_down", "blk.1.ffn_up", width=96) == ["q8_0", "q5_0"]
    assert mixed("q6_k", "blk.0.ffn_gate_inp", "blk.0.attn_norm") == ["f32", "f32"]
    assert mixed("q8_0", "output", "blk.0.ffn_up", width=40) == ["f16", "f16"]
