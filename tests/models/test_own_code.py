"""A folder that brings its own code, as published models do: the files in ``own_code`` beside real weights."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.settings.commands import oomless
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CODE = Path(__file__).parent / "own_code"
TRAIN = (
    "--trust-remote-code",
    "--max-seq-length",
    64,
    "--packing",
    "concatenate",
    "--max-steps",
    3,
    "--learning-rate",
    1e-2,
)


@pytest.fixture
def make_folder(tmp_path, tokenizer_folder, monkeypatch):
    """A function that makes a model of the code in ``own_code``, changed where asked, in a folder of a new name."""
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)

    def make(replaced="", by=""):
        folder = tmp_path / f"little{len(list(tmp_path.glob('little*')))}"
        shutil.copytree(CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        code = folder / "modeling_little.py"
        assert replaced in code.read_text()
        code.write_text(code.read_text().replace(replaced, by))
        auto_map = {
            "AutoConfig": "configuration_little.LittleConfig",
            "AutoModelForCausalLM": "modeling_little.LittleForCausalLM",
        }
        config = {
            "model_type": "little",
            "auto_map": auto_map,
            "eos_token_id": 0,
            "architectures": ["LittleForCausalLM"],
        }
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        torch.manual_seed(1)
        kind = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], folder)
        model = kind(AutoConfig.from_pretrained(folder, trust_remote_code=True))
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_it_is_planned_trained_in_that_size_and_saved_with_its_code(make_folder, corpus, tmp_path, trainable):
    model = make_folder()
    given = ("--model", model, "--data", corpus, "--trainable", trainable, *TRAIN)
    said = oomless("plan", *given, "--gpu", "virtual:64MiB", "--as-given", "--json")
    assert said.code == 0, said.err
    size = said.json["needed_bytes"]
    said = oomless("train", *given, "--gpu", f"virtual:{size}", "--output-dir", tmp_path / "run", "--as-given")
    assert said.code == 0, said.err + said.out
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    assert not torch.equal(loaded.model.layers[1].up.weight, before.model.layers[1].up.weight)
    assert (tmp_path / "run" / "model" / "modeling_little.py").is_file()


def test_without_the_option_nothing_of_it_runs(make_folder, corpus, tmp_path):
    model = make_folder()
    for code in model.glob("*.py"):
        code.write_text(f"raise SystemExit(77)\n{code.read_text()}")
    said = oomless("train", "--model", model, "--data", corpus, "--output-dir", tmp_path / "run", "--gpu", "cpu")
    assert said.code == 2
    assert "--trust-remote-code" in said.err


def test_what_its_constructor_alone_computes_is_not_left_to_chance(make_folder, corpus, tmp_path):
    model = make_folder("module.slopes.copy_(slopes(module.heads))", "pass")
    said = oomless(
        "train", "--model", model, "--data", corpus, "--output-dir", tmp_path / "run", "--gpu", "cpu", *TRAIN
    )
    assert said.code == 2
    assert "attention.slopes" in said.err


def test_what_asks_by_values_trains_without_a_plan(make_folder, corpus, tmp_path):
    model = make_folder("in self.layers:", "in self.layers[int(hidden_states.sum() > 1e9) :]:")
    given = ("--model", model, "--gpu", "virtual:64MiB", *TRAIN)
    for more in ((), ("--as-given",)):
        said = oomless("plan", *given, *more)
        assert said.code == 2
        assert said.err.startswith("error: Little")
        assert "train --as-given" in said.err
    said = oomless("train", *given, "--data", corpus, "--output-dir", tmp_path / "run", "--as-given")
    assert said.code == 0, said.err
    assert "no plan: LittleForCausalLM cannot be planned" in " ".join(said.out.split())
