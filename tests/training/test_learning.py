"""The short form of bench/learning.py: optimizers learn, and 16-bit weights learn as fp32 masters do, plain ones do not."""

import pytest

from oomless.config import DataSource, TrainConfig
from oomless.training import loop


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


@pytest.mark.slow
def test_sixteen_bit_weights(make_checkpoint, corpus, tmp_path):
    folder = make_checkpoint("llama", tied=True)
    found = {
        way: learnt(folder, corpus, tmp_path / way, weight_precision=way, learning_rate=5e-5, dtype="bf16")
        for way in ("master", "correction", "stochastic")
    }
    settings = dict(weight_precision="plain", learning_rate=5e-5, dtype="bf16", trainable="lm_head+embed_tokens")
    found["plain"] = learnt(folder, corpus, tmp_path / "plain", **settings)
    settings["weight_precision"] = "master"
    beside_plain = learnt(folder, corpus, tmp_path / "beside", **settings)
    assert found["correction"] == pytest.approx(found["master"], rel=0.05)
    assert found["stochastic"] == pytest.approx(found["master"], rel=0.1)
    assert found["plain"] < 0.8 * beside_plain
