"""Weights in fewer bits are read as what their format says they stand for, to the last bit where another library reads them too."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import build, save
from oomless.models.spec import resolve

IDS = torch.arange(1, 21)[None] * 17 % 512
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def built(folder, dtype=torch.float32):
    spec = resolve(str(folder))
    model = build.build(spec, device=Device(), dtype=dtype)
    build.load_weights(model, spec, device=Device())
    return model.eval()


def stored(source, target, quantization_config, encode):
    """Write the checkpoint of ``source`` with each linear layer of its body as ``encode`` makes it."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith(LINEAR):
            tensors |= {f"{stem}{ending}": part.contiguous() for ending, part in encode(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def packed(numbers, order=range(8)):
    """Whole numbers of 4 bits, eight of a row in one int32, in the places that ``order`` says."""
    groups = numbers.long().view(numbers.shape[0], -1, 8)
    return sum(groups[..., column] << 4 * place for place, column in enumerate(order)).to(torch.int64).to(torch.int32)


def in_groups(weight, size=32):
    """A weight [out, in] as whole numbers of 4 bits, zeros and scales, the two of each group of inputs: [groups, out]."""
    groups = weight.T.reshape(-1, size, weight.shape[0])
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return numbers.flatten(0, 1), zeros, scales


def by_its_numbers(weight, size=32):
    numbers, zeros, scales = in_groups(weight, size)
    rows = torch.arange(len(numbers)) // size
    return ((numbers - zeros[rows]) * scales[rows]).T


def fp8_blocks(weight, block=(32, 32)):
    rows, columns = (-(-side // size) for side, size in zip(weight.shape, block, strict=True))
    scales, values = torch.empty(rows, columns), torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].abs().max() / 448
            values[part] = weight[part] / scales[i, j]
    return {".weight": values.to(torch.float8_e4m3fn), ".weight_scale_inv": scales}


def gptq(weight):
    numbers, zeros, scales = in_groups(weight)
    return {
        ".qweight": packed(numbers.T).T,
        ".qzeros": packed((zeros - 1) % 16),
        ".scales": scales.half(),
        ".g_idx": (torch.arange(len(numbers)) // 32).int(),
    }


def awq(weight):
    numbers, zeros, scales = in_groups(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {".qweight": packed(numbers, order), ".qzeros": packed(zeros, order), ".scales": scales.half()}


def mlx(weight):
    numbers, zeros, scales = in_groups(weight)
    return {
        ".weight": packed(numbers.T).view(torch.uint32),
        ".scales": scales.T,
        ".biases": (-zeros * scales).T,
    }


def packed_symmetric(weight):
    scales = (weight.view(weight.shape[0], -1, 32).abs().amax(-1) / 7).repeat_interleave(32, 1)
    numbers = (weight / scales).round().clamp(-8, 7)
    return {
        ".weight_packed": packed(numbers + 8),
        ".weight_scale": scales[:, ::32],
        ".weight_shape": torch.tensor(weight.shape),
    }


def rows_of_fp8(weight, ending=".weight_scale"):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {".weight": (weight / scale).to(torch.float8_e4m3fn), ending: scale}


def scaled(parts):
    return parts[".weight"].float() * parts[".weight_scale"]


FORMS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq, by_its_numbers),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq, by_its_numbers),
    "mlx": ({"bits": 4, "group_size": 32}, mlx, by_its_numbers),
    "compressed-tensors in 4 bits": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        packed_symmetric,
        lambda w: (
            (packed_symmetric(w)[".weight_scale"].repeat_interleave(32, 1))
            * (w / packed_symmetric(w)[".weight_scale"].repeat_interleave(32, 1)).round().clamp(-8, 7)
        ),
    ),
    "compressed-tensors in fp8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        rows_of_fp8,
        lambda w: scaled(rows_of_fp8(w)),
    ),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, rows_of_fp8, lambda w: scaled(rows_of_fp8(w))),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_what_its_definition_says(form, make_checkpoint, tmp_path):
    quantization_config, encode, meant = FORMS[form]
    source = make_checkpoint("llama")
    model = built(stored(source, tmp_path / "few", quantization_config, encode))
    plain = load_file(source / "model.safetensors")
    for name, parameter in model.named_parameters():
        expected = meant(plain[name]) if name.removesuffix(".weight").endswith(LINEAR) else plain[name]
        torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_fp8_blocks_are_read_as_transformers_dequantizes_them(architecture, make_checkpoint, tmp_path):
    """Experts too, which lie one by one in the files, each with its scales, and become one tensor."""
    source = make_checkpoint(architecture)
    quantization_config = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    folder = stored(source, tmp_path / "fp8", quantization_config, fp8_blocks)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    expected = theirs.state_dict()
    model = built(folder)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert 0 < (model(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm() < 0.1


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}, {"double": True}])
def test_bitsandbytes_checkpoints_are_read_as_bitsandbytes_dequantizes_them(settings, make_checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    if settings.pop("double", False):
        settings |= {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"}
    source = make_checkpoint("llama", hidden_size=128, intermediate_size=192)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32
        )
        theirs.save_pretrained(tmp_path)
    layers = dict(theirs.named_modules())
    for name, parameter in built(tmp_path).named_parameters():
        layer = layers[name.removesuffix(".weight")]
        expected = layer.weight
        if name.removesuffix(".weight").endswith(LINEAR):
            expected = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        torch.testing.assert_close(parameter.data, expected.data.float(), rtol=1e-5, atol=1e-6)


def test_mxfp4_is_read_as_transformers_dequantizes_it(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gpt_oss",
        **dict(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=2),
        **dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts_per_tok=1),
    )
    plain = AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path / "plain")
    tensors = {}
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            generator = torch.Generator().manual_seed(len(name))
            shape = (experts, outer, inner // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(110, 130, shape[:3], dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = tensor
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    for name, tensor in built(tmp_path, torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_what_is_trained_from_fewer_bits_is_saved_plain(make_checkpoint, tmp_path):
    quantization_config, encode, _ = FORMS["gptq"]
    model = built(stored(make_checkpoint("llama"), tmp_path / "few", quantization_config, encode))
    (tmp_path / "plain").mkdir()
    save.save_model(model, tmp_path / "plain", save.model_tensors(model, Device()), Device())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("told", [True, False])
def test_scales_that_nothing_reads_are_an_error(told, make_checkpoint, tmp_path):
    """The fault that was: fp8 numbers were taken without their scales, and nothing said so."""
    folder = stored(make_checkpoint("llama"), tmp_path / "few", {"quant_method": "fp8"}, fp8_blocks)
    settings = json.loads((folder / "config.json").read_text())
    if told:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        del settings["quantization_config"]
        (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="stored as F8_E4M3" if told else "weight_scale_inv.*no parameter"):
        built(folder)
