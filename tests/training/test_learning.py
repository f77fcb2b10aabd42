"""The short form of bench/learning.py: optimizers learn, and 16-bit weights learn as fp32 masters do, plain ones do not."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from oomless.config import DataSource, TrainConfig
from oomless.training import audit, loop

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from tensor_cores import TensorCores


def learnt(folder, corpus, out, **settings):
    """Return how far the held-out loss fell, in nats a token."""
    config = TrainConfig(
        model=str(folder),
        data=(DataSource(path=str(corpus), name="text"),),
        output_dir=str(out),
        cache_dir=str(out.parent / "cache"),
        max_seq_length=64,
        per_device_train_batch_size=16,
        max_steps=40,
        eval_fraction=0.1,
        lr_scheduler_type="constant",
        gpu="cpu",
        **settings,
    )
    result = loop.train(config)
    return result.eval_before["text"] - result.eval_after["text"]


@pytest.mark.slow
def test_optimizers(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("llama", tied=True)
    rates = {"adamw": 4e-3, "adamw_8bit": 4e-3, "adafactor": 4e-3, "apollo": 4e-3, "galore": 4e-3, "muon": 1e-2}
    found = {
        name: learnt(folder, corpus, tmp_path / name, optimizer=name, learning_rate=rate, dtype="fp32")
        for name, rate in rates.items()
    }
    assert found["adamw"] > 1.0
    assert found["adamw_8bit"] == pytest.approx(found["adamw"], rel=0.03)
    for name, fall in found.items():
        assert fall > 0.7 * found["adamw"], name


@pytest.fixture(scope="module")
def pretrained(make_checkpoint, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained")
    settings = dict(optimizer="adamw", learning_rate=4e-3, dtype="fp32")
    learnt(make_checkpoint("llama", tied=True), corpus, out, **settings)
    return out / "model"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rate"), [("bf16", 1e-4), ("fp16", 1e-5)])
def test_sixteen_bit_weights(pretrained, corpus, tmp_path, monkeypatch, dtype, rate):
    """Continued pretraining at a rate whose updates 16 bits round away, products as a GPU makes them."""
    monkeypatch.setattr(audit, "PATIENCE_STEPS", 1000)  # it would stop the plain run, whose norms never move
    with TensorCores() as cores:
        found = {
            way: learnt(pretrained, corpus, tmp_path / way, weight_precision=way, dtype=dtype, learning_rate=rate)
            for way in ("master", "correction", "stochastic", "plain")
        }
    assert cores.products > 1000
    assert found["correction"] == pytest.approx(found["master"], rel=0.05)
    assert found["stochastic"] == pytest.approx(found["master"], rel=0.1)
    assert found["plain"] < 0.8 * found["master"], found


def matrices(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


PRODUCTS = {
    "mm": (lambda a, b: a @ b, [(33, 70), (70, 45)]),
    "mm into a buffer": (lambda a, b: torch.mm(a.detach(), b.detach(), out=a.new_empty(33, 45)), [(33, 70), (70, 45)]),
    "addmm": (F.linear, [(3, 33, 70), (45, 70), (45,)]),
    "addmm in place": (lambda c, a, b: c.detach().clone().addmm_(a, b), [(33, 45), (33, 70), (70, 45)]),
    "bmm": (torch.bmm, [(3, 33, 70), (3, 70, 45)]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_tensor_cores_are_exact_but_for_one_rounding(name, dtype):
    function, shapes = PRODUCTS[name]
    given = matrices(*shapes, dtype=dtype)
    native = function(*given)
    exact = function(*(tensor.double() for tensor in given))
    with TensorCores() as cores:
        ours = function(*given)
    assert cores.products == 1
    assert ours.dtype == dtype
    half_a_step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(ours.double(), exact, rtol=1.01 * half_a_step, atol=1e-4)
    torch.testing.assert_close(ours, native, rtol=2 * half_a_step, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_tensor_cores_is_no_worse_than_the_native_kernel(dtype):
    def attend(*states):
        output = F.scaled_dot_product_attention(*states, is_causal=True)
        return output, *torch.autograd.grad(output.pow(2).sum(), states)

    given = matrices(*[(2, 4, 48, 32)] * 3, dtype=dtype)
    exact, native = attend(*(tensor.detach().double().requires_grad_() for tensor in given)), attend(*given)
    with TensorCores() as cores:
        ours = attend(*given)
    assert cores.products == 2
    for one, other, true in zip(ours, native, exact, strict=True):
        assert one.dtype == dtype
        assert (one - true).norm() <= 1.05 * (other - true).norm()


def test_fp32_products_are_left_alone():
    with TensorCores() as cores:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert cores.products == 0


@pytest.mark.parametrize("half", ["optimizers", "precisions"])
def test_the_documented_losses_are_the_measured_ones(half):
    """Every row says what was measured, and says that it is worse where it lies further above its measure than allowed."""
    root = Path(__file__).parents[2]
    rows = [line for line in (root / "docs" / "optimizers.md").read_text().splitlines() if line.startswith("| ")]
    runs = json.loads((root / "bench" / "results" / f"learning_{half}.json").read_text())["runs"]
    for name, run in runs.items():
        (row,) = (row for row in rows if row.startswith(f"| `{name}` | {run['loss']:.3f} |"))
        if run["above"]:
            assert f"{100 * run['above']:+.1f} %" in row
        too_far = run["allowed"] is None or run["above"] > run["allowed"]
        assert ("worse" in row) == too_far
        if run["allowed"] is None:
            assert run["above"] > 0.01
