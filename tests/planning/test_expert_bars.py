"""What mixtures of experts need, rehearsed at 2,048 tokens: the table in docs/techniques.md."""

import json

import pytest

from oomless.config import DataSource, TrainConfig
from oomless.models.spec import resolve
from oomless.planning.rehearse import rehearse_briefly, virtual_device

GIB = 1 << 30
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "tie_word_embeddings": False,
}
LORA = {"trainable": "lora", "quantization": "nf4", "optimizer": "adamw_8bit", "weight_precision": "correction"}
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
FULL = {"trainable": "full", "optimizer": "adafactor", "weight_precision": "stochastic"}
BARS = {
    "gpt-oss-20b": (GPT_OSS_20B, LORA, 20_914_757_184, 14.0, 0),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, LORA | IN_BACKWARD, 30_532_122_624, 20.5, 0),
    "Qwen3-30B-A3B, experts on the host": (QWEN3_30B_A3B, LORA | {"experts_on_host": True}, 30_532_122_624, 9.0, 13.8),
    "OLMoE-1B-7B, full": (OLMOE_1B_7B, FULL | IN_BACKWARD, 6_919_161_856, 24.0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("bar", BARS)
def test_below_the_bar(tmp_path, bar):
    model, settings, parameters, limit, on_host = BARS[bar]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model), encoding="utf-8")
    config = TrainConfig(
        model=str(path),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=2048,
        dtype="bf16",
        gradient_checkpointing=True,
        **settings,
    )
    found = rehearse_briefly(resolve(str(path)), config, virtual_device)
    added = found.trainable_parameters if "quantization" in settings else 0
    assert found.parameters - added == parameters
    assert found.profile.peak_allocated_bytes <= limit * GIB
    assert found.profile.peak_reserved_bytes <= limit * GIB
    assert found.device.host_peak_allocated_bytes >= on_host * GIB
