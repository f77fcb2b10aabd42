"""gpt-oss' own checkpoints: experts stay in the bytes of their files, exactly what the format says, and a run is rehearsed to the byte."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.gpt_oss import GPT_OSS

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve, resolve_for_plan
from oomless.ops import mxfp4
from oomless.planning.layout import Layout
from oomless.planning.rehearse import play, rehearse, virtual_device
from oomless.planning.stages import settings_to_plan
from oomless.techniques.experts import FrozenExperts
from oomless.training import loop
from oomless.training.assemble import assemble
from oomless.training.checkpoint import list_checkpoints

LORA = {"trainable": "lora", "lora_r": 4, "quantization": "mxfp4"}


def by_the_format(blocks, scales):
    """[experts, in, out] of [experts, out, groups, 16] and [experts, out, groups], number by number (OCP MX 1.0, E2M1 and E8M0)."""
    experts, outer, groups, _ = blocks.shape
    numbers = torch.empty(experts, groups * 32, outer, dtype=torch.float64)
    for expert, column, group, place in torch.cartesian_prod(*map(torch.arange, (experts, outer, groups, 32))).tolist():
        byte = blocks[expert, column, group, place // 2].item()
        bits = byte >> 4 if place % 2 else byte & 15
        exponent, fraction = bits >> 1 & 3, bits & 1
        size = fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
        power = scales[expert, column, group].item() - 127
        numbers[expert, group * 32 + place, column] = (-size if bits & 8 else size) * 2.0**power
    return numbers


def make_config(folder, corpus="none", out="none", **settings):
    data = (DataSource(path=str(corpus)),)
    return TrainConfig(model=str(folder), data=data, output_dir=str(out), max_seq_length=64, **settings)


def test_every_number_is_the_formats_and_is_packed_again_without_loss():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1, 24, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 254, (1, 24, 2), dtype=torch.uint8, generator=generator)
    blocks[0, 0], blocks[0, 1], scales[0, 2] = 0, 0x11, 0  # nothing, the smallest numbers, the smallest power
    expected = by_the_format(blocks, scales)[0]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = mxfp4.unpack(blocks[0].flatten(1), scales[0], mxfp4.new_code(), dtype)
        assert torch.equal(matrix.double(), expected)
        assert torch.equal(mxfp4.unpack(*mxfp4.pack(matrix), mxfp4.new_code(), dtype), matrix)


@pytest.mark.parametrize("host", [False, True], ids=["on the GPU", "on the host"])
def test_experts_have_their_files_bytes_and_values(gpt_oss_checkpoint, host):
    device, config = VirtualGPU(1 << 30), make_config(gpt_oss_checkpoint, dtype="bf16", experts_on_host=host, **LORA)
    tensors = load_file(gpt_oss_checkpoint / "model.safetensors")
    with device.active():
        model = assemble(resolve(str(gpt_oss_checkpoint)), config, device, fill=True).model
    found = [(n.split("model.", 1)[1], m) for n, m in model.named_modules() if isinstance(m, FrozenExperts)]
    assert len(found) == 4
    for name, stack in found:
        blocks, scales = (tensors[f"model.{name.removeprefix('model.')}_{kind}"] for kind in ("blocks", "scales"))
        assert stack.row_bytes * stack.shape[0] == blocks.numel() + scales.numel()  # 4.25 bits
        with device.active(), device.phase("load"):
            matrices = stack.matrices(range(4))
            made = torch.stack([matrices(expert, torch.bfloat16) for expert in range(4)])
        assert torch.equal(made.double(), by_the_format(blocks, scales))


@pytest.mark.parametrize(
    "beside",
    [
        {"gradient_checkpointing": True},
        {"experts_on_host": True},
        {"use_dora": True, "lora_target_modules": "q_proj"},  # of linear layers, which mxfp4 leaves as they are
    ],
    ids=str,
)
def test_a_rehearsal_is_exact(gpt_oss_checkpoint, beside):
    spec, config = resolve(str(gpt_oss_checkpoint)), make_config(gpt_oss_checkpoint, dtype="bf16", **LORA, **beside)
    real = VirtualGPU(1 << 40, name="virtual GPU", record_history=True)
    with real.active():
        play(assemble(spec, config, real, fill=True), config, Layout.uniform((20, 44), config))
    layout = Layout.uniform((20, 44), config)
    fake = rehearse(spec, config, virtual_device(), kernel="auto", layout=layout).device.profile(max_points=None)
    assert fake.phases == real.profile(max_points=None).phases


def test_what_is_trained_resumed_and_saved_is_that_of_the_same_weights_held_plain(gpt_oss_checkpoint, corpus, tmp_path):
    """Nothing is rounded, so the run is that of 16-bit experts; the saved model is plain, and trains on in both forms."""

    def trained(name, folder=gpt_oss_checkpoint, **settings):
        config = make_config(folder, corpus, tmp_path / name, dtype="fp32", learning_rate=1e-2, **settings)
        return load_file(loop.train(config).model_dir / "model.safetensors")

    plain = trained("plain", max_steps=4, **{**LORA, "quantization": None})
    kept = trained("kept", max_steps=4, save_steps=2, **LORA)
    assert kept.keys() == plain.keys() == load_file_names(gpt_oss_checkpoint)
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-5, atol=1e-6)
    shutil.rmtree(list_checkpoints(tmp_path / "kept")[-1].folder)  # as if it had been killed on the way
    shutil.rmtree(tmp_path / "kept" / "model")
    again = trained("kept", max_steps=4, save_steps=2, resume=True, **LORA)
    for name, tensor in kept.items():
        assert torch.equal(again[name], tensor), name


def load_file_names(folder):
    """The names of the plain tensors for which those in ``folder`` stand."""
    names = load_file(folder / "model.safetensors")
    return {name.removesuffix("_blocks") for name in names if not name.endswith("_scales")}


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({}, "has no frozen experts"),
        ({"model_type": "mixtral", "num_local_experts": 2}, "this model's lie otherwise: use nf4"),
    ],
)
def test_refused_for_other_models(make_checkpoint, tmp_path, family, message):
    path = tmp_path / "config.json"
    settings = json.loads((make_checkpoint("llama", **family) / "config.json").read_text())
    path.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ConfigError, match=message):
        rehearse(resolve(str(path)), make_config(path, **LORA), virtual_device())


def test_refused_for_a_checkpoint_that_holds_another_form(make_checkpoint):
    folder = make_checkpoint("llama", **GPT_OSS)
    with pytest.raises(ConfigError, match="holds plain weights: use nf4"):
        rehearse(resolve(str(folder)), make_config(folder, **LORA), virtual_device())


def test_new_tokens_of_an_earlier_stage_leave_experts_as_they_were(gpt_oss_checkpoint, corpus, tmp_path):
    kept = {"model": str(gpt_oss_checkpoint), "data": [{"path": str(corpus)}], "max_seq_length": 64, **LORA}
    first = TrainConfig.from_mapping({**kept, "output_dir": "none", "extend_tokenizer": {"tokens": 20}})
    planned = settings_to_plan(kept, [first], tmp_path)
    assert planned["model"] == str(tmp_path / "as-left.json")
    resolve_for_plan(planned["model"]).require_mxfp4()


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "unsloth/gpt-oss-safeguard-120b", "gpt-oss 20b mxfp4"])
def test_a_plan_by_name_says_that_it_rests_on_the_published_form(name):
    spec = resolve_for_plan(name)
    spec.require_mxfp4()
    assert spec.notes_with("nf4") == spec.notes
    *before, said = spec.notes_with("mxfp4")
    assert tuple(before) == spec.notes
    assert f"{spec.name} as published stores its experts in MXFP4" in said


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("unsloth/gpt-oss-20b-BF16", "bf16"),
        ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", "bnb 4bit"),
        ("lmstudio-community/gpt-oss-120b-GGUF", "gguf"),
        ("Qwen/Qwen3-30B-A3B", "plain weights"),
    ],
)
def test_refused_for_a_name_that_says_another_form(name, form):
    with pytest.raises(ConfigError, match=f"by its name or its config.json, holds {form}: use nf4"):
        rehearse(resolve_for_plan(name), make_config(name, **LORA), virtual_device())


def test_a_config_alone_says_the_form_of_its_weights(gpt_oss_checkpoint):
    assert resolve_for_plan(str(gpt_oss_checkpoint / "config.json")).stored_as == "mxfp4"


def test_a_checkpoint_is_said_to_be_held_as_it_is_held(gpt_oss_checkpoint):
    spec = resolve(str(gpt_oss_checkpoint))
    said = {form: spec.notes_with(form)[0] for form in ("mxfp4", "nf4", None)}
    assert "held so, without rounding" in said["mxfp4"]
    assert "held as nf4" in said["nf4"]
    assert said[None].endswith("--quantization mxfp4 keeps frozen experts as they are")
    assert not any("--quantization" in note for note in (said["mxfp4"], said["nf4"], *spec.notes_read()))
