"""What a folder holds is read right or refused before anything is loaded, by plan, train and explain alike."""

import json
import shutil

import pytest

from oomless.errors import ModelError
from oomless.models.spec import resolve, resolve_for_plan

QUANTIZED = {
    "hqq": {"quant_method": "hqq"},
    "torchao": {"quant_method": "torchao"},
    "a_kind_of_tomorrow": {"quant_method": "a_kind_of_tomorrow"},
    "unknown": {"something": "else"},
}


def folder_with(tmp_path, source, **changes):
    settings = json.loads((source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("ask", [resolve, resolve_for_plan])
def test_a_quantized_kind_that_is_not_read_is_refused_with_the_line_that_helps(kind, ask, make_checkpoint, tmp_path):
    folder = folder_with(tmp_path, make_checkpoint("llama"), quantization_config=QUANTIZED[kind])
    for name in (folder, folder / "config.json"):
        with pytest.raises(ModelError, match=rf"quantized \({kind}\).*give the 16-bit model"):
            ask(str(name))


def test_the_text_part_may_be_what_is_quantized(make_checkpoint, tmp_path):
    part = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(ModelError, match=r"quantized \(hqq\)"):
        resolve(str(folder_with(tmp_path, make_checkpoint("llama"), text_config=part)))


def test_an_adapter_names_its_base_that_is_not_there(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match="is of 'org/base', as base_model_name_or_path"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(("file", "said"), [("model.gguf", "GGUF"), ("params.json", "converted for transformers")])
def test_forms_that_are_not_transformers_own(file, said, tmp_path):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ModelError, match=said):
        resolve(str(tmp_path))


@pytest.mark.parametrize("said", ["", '{"eos_token_id": ', "[1]", "null"])
def test_a_damaged_generation_config_is_named_before_it_is_saved_again(said, make_checkpoint, tmp_path):
    folder = shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(said)
    with pytest.raises(ModelError, match=r"generation_config.json .*fetch it again, or remove it"):
        resolve(str(folder))


@pytest.mark.parametrize("layers", [10**6, 10**9, 1e30])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_more_layers_than_any_model_has_are_refused_before_transformers_lists_them(
    layers, part, make_checkpoint, tmp_path
):
    changes = {"num_hidden_layers": layers}
    folder = folder_with(tmp_path, make_checkpoint("llama"), **(changes if part is None else {part: changes}))
    for ask in (resolve, resolve_for_plan):
        with pytest.raises(ModelError, match="a model has at most 100,000 layers"):
            ask(str(folder))
