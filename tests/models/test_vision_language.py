"""Of a vision-language checkpoint the text part is trained; the rest is not loaded, and stands unchanged in what is saved."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from oomless.config import TrainConfig
from oomless.memory.device import Device
from oomless.models import body, build, form, save
from oomless.models.make import left_out
from oomless.models.spec import resolve
from oomless.training.assemble import assemble
from oomless.training.loop import train

TEXT = dict(
    **dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
    **dict(num_key_value_heads=2, max_position_embeddings=512, head_dim=16),
    **dict(bos_token_id=None, eos_token_id=0, pad_token_id=None),
)
TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
)
QWEN_TOWER = dict(depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=48)
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
LLAMA_4 = dict(intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16)
LLAMA_4_TOWER = dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
MLLAMA_TOWER = dict(num_global_layers=1, vision_output_dim=64, intermediate_layers_indices=[0], max_num_tiles=1)
MLLAMA_TOWER |= dict(supported_aspect_ratios=[[1, 1]])

CONFIGS = {
    "gemma3": (
        {"model_type": "gemma3_text", "sliding_window": 16},
        {"model_type": "siglip_vision_model", **TOWER},
        {"mm_tokens_per_image": 4},
    ),
    "qwen2_vl": (
        {"model_type": "qwen2_vl_text", **ROPE},
        dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2),
        {},
    ),
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl_text", **ROPE}, {**QWEN_TOWER, "fullatt_block_indexes": [0]}, {}),
    "qwen3_vl": ({"model_type": "qwen3_vl_text", **ROPE}, {**QWEN_TOWER, "deepstack_visual_indexes": [0]}, {}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **TOWER}, {}),
    "llava_next": ({"model_type": "mistral"}, {"model_type": "clip_vision_model", **TOWER}, {}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **TOWER, "head_dim": 16}, {}),
    "mllama": (
        {
            "model_type": "mllama_text_model",
            "num_hidden_layers": 4,
            "cross_attention_layers": [1],
            "pad_token_id": 0,
            "bos_token_id": 0,
        },
        {**TOWER, **MLLAMA_TOWER, "model_type": "mllama_vision_model"},
        {},
    ),
    "llama4": ({"model_type": "llama4_text", **LLAMA_4}, {**TOWER, **LLAMA_4_TOWER}, {}),
}
QUICK = ("gemma3", "qwen2_vl", "llava_next")
IDS = torch.arange(1, 33)[None] * 17 % 512


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder):
    """A function that makes a tiny vision-language checkpoint with transformers and returns its folder."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            text, tower, more = CONFIGS[name]
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, text_config={**TEXT, **text}, vision_config=tower, **more)
            made[name] = tmp_path_factory.mktemp(name)
            AutoModelForImageTextToText.from_config(config).save_pretrained(made[name])
            shutil.copytree(tokenizer_folder, made[name], dirs_exist_ok=True)
        return made[name]

    return make


def theirs(folder):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
@torch.no_grad()
def test_the_text_part_alone_is_built_and_the_rest_stands_in_what_is_saved(name, checkpoint, tmp_path):
    source = theirs(checkpoint(name))
    spec = resolve(str(checkpoint(name)))
    assert "its text part is trained" in spec.notes[0]
    ours = build.build(spec, device=Device(), dtype=torch.float32, form=form.choose(spec, "block_diagonal"))
    build.load_weights(ours, spec, device=Device())
    ours.eval()
    rest = [key for key in source.state_dict() if key.startswith(left_out(ours))]
    assert rest
    assert set(ours.state_dict()) == set(source.state_dict()) - set(rest)
    assert build.parameter_count(spec) == sum(p.numel() for p in ours.parameters())

    def own() -> torch.Tensor:
        return ours.get_output_embeddings()(body.run(ours, input_ids=IDS))

    torch.testing.assert_close(own(), logits(source), atol=1e-5, rtol=1e-4)
    for parameter in ours.parameters():
        parameter += 0.01
    save.save_model(ours, tmp_path, save.model_tensors(ours, Device()), Device())
    saved = theirs(tmp_path)
    assert type(saved) is type(source)
    torch.testing.assert_close(own(), logits(saved), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(saved.state_dict()[key], source.state_dict()[key]) for key in rest)


@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_its_checkpoints_and_its_resumption(trainable, checkpoint, corpus, tmp_path, monkeypatch, caplog):
    """Checkpoints that are gone do not take the tower with them."""
    folder = checkpoint("gemma3")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that pytest hears it

    def run(output: str, **more):
        settings = {"model": str(folder), "data": str(corpus), "output_dir": str(tmp_path / output), "gpu": "cpu"}
        settings |= {"max_seq_length": 64, "per_device_train_batch_size": 2, "dtype": "fp32", "trainable": trainable}
        settings |= {
            "max_steps": 6,
            "save_steps": 2,
            "eval_fraction": 0.0,
            "cache_dir": str(tmp_path / "tokens"),
            **more,
        }
        return train(TrainConfig.from_mapping(settings)).model_dir

    whole = load_file(run("whole") / "model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for later in ("checkpoint-4", "checkpoint-6", "model"):
        shutil.rmtree(tmp_path / "part" / later)
    again = load_file(run("part", resume=True, save_total_limit=1) / "model.safetensors")
    assert not (tmp_path / "part" / "checkpoint-2").exists()
    base = load_file(folder / "model.safetensors")
    assert whole.keys() == again.keys() == base.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    outside = [key for key in base if "vision" in key or "projector" in key]
    assert outside
    assert all(torch.equal(whole[key], base[key]) for key in outside)
    assert not torch.equal(
        whole["language_model.model.layers.0.self_attn.q_proj.weight"],
        base["language_model.model.layers.0.self_attn.q_proj.weight"],
    )
    config = json.loads((tmp_path / "whole" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert not [record for record in caplog.records if "sub-model" in record.getMessage()]
    theirs(tmp_path / "whole" / "model")


def test_layers_that_text_skips_do_not_train(checkpoint):
    """Those of one stack that attend to pictures alone, with all that is in them."""
    folder = str(checkpoint("mllama"))
    config = TrainConfig.from_mapping(
        {"model": folder, "data": "none", "output_dir": "none", "dtype": "fp32", "max_seq_length": 64}
    )
    parts = assemble(resolve(folder), config, Device(), fill=False)
    trained = {name for name, parameter in parts.model.named_parameters() if parameter.requires_grad}
    assert any(".layers.0.mlp." in name for name in trained)
    assert not any(".layers.1." in name for name in trained)
