"""Operators rehearsed as a program of one's own, beside what others measured on real GPUs (bench/public_operators.py says who)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from public_operators import rehearse

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
MLP = {"hidden_size": 2048, "intermediate_size": 4096, "dtype": "torch.bfloat16", "bsz": 2}
NORM = {"M": 2048, "dtype": "torch.bfloat16", "eps": 1e-6}


@pytest.mark.parametrize(
    ("kernel", "how", "x_name", "x", "config", "gpu", "measured"),
    [
        ("cross_entropy", "full", "V", 4096, {"B": 8, "T": 2048}, A100, 1342309376),
        ("layer_norm", "full", "N", 1024, {"M": 4096, "dtype": "torch.float32", "eps": 1e-6}, A100, 83951616),
        ("rms_norm", "full", "H", 2048, NORM, A100, 167804928),
        ("megatron_rms_norm", "full", "H", 1024, {"S": 4096, "B": 1}, H100, 41966592),
        ("megatron_swiglu", "full", "ffn_local", 2048, {"S": 2048, "B": 4}, H100, 234882048),
        (
            "tiled_geglu",
            "full",
            "T",
            1024,
            {**MLP, "hidden_act": "gelu_pytorch_tanh"},
            "NVIDIA GeForce RTX 4090",
            277086208,
        ),
        ("tiled_swiglu", "forward", "T", 1024, {**MLP, "hidden_act": "silu"}, "NVIDIA GeForce RTX 4090", 151257088),
        ("kl_div", "full", "V", 8192, {"B": 8, "T": 2048}, "NVIDIA H100 PCIe", 3758096384),
        ("jsd", "full", "BT", 1024, {"vocab_size": 128256}, "NVIDIA B200", 6843008000),
    ],
)
def test_an_operator_holds_what_it_held_on_a_real_gpu(kernel, how, x_name, x, config, gpu, measured):
    settings = {"kernel": kernel, "mode": how, "x_name": x_name, "x": x, "config": config, "gpu": gpu, "liger": ""}
    assert rehearse(settings)["allocated"] == measured
