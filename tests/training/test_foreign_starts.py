"""A run begins from what other programs made: adapters, checkpoints of transformers' Trainer, weights in four bits."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from oomless.config import TrainConfig
from oomless.errors import ConfigError, ModelError, UserError
from oomless.export.compare import Pair
from oomless.export.plan import make_plan
from oomless.export.run import export
from oomless.memory.device import Device
from oomless.models.spec import resolve, resolve_for_plan
from oomless.models.tokenizer import load_tokenizer
from oomless.planning.given import read_given
from oomless.training.assemble import assemble
from oomless.training.loop import train

IDS = torch.arange(1, 33)[None] * 13 % 512
ADAPTERS = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "in a pickle": ("llama", {"target_modules": ["q_proj"]}),
    "rank-stabilised": ("qwen2", {"target_modules": ["q_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "with a head": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "all layers": ("llama", {"target_modules": "all-linear"}),
    "ranks and scales by pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.mlp.down_proj": 32},
        },
    ),
    "layers by pattern": ("llama", {"target_modules": r".*layers\.1\..*(q|v)_proj|.*\.0\.mlp\.(up|down)_proj"}),
    "some layers": (
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [1], "fan_in_fan_out": True},
    ),
    "a layer of a stack": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "all but some": ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "all but a pattern": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*_proj"}),
    "rows of the embedding": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [210, 5, 7]}),
    "rows of a tied embedding": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [210, 5, 7], "tied": True},
    ),
    "rows of both": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [27, 14], "lm_head": [14, 27]},
        },
    ),
    "biases of its layers": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "biases where there are none": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "a bias of its own": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "a bias of its own on a bias": (
        "qwen2",
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "bias": "lora_only", "use_rslora": True},
    ),
    "experts by pattern": (
        "mixtral",
        {
            "target_modules": r".*\.q_proj",
            "target_parameters": ["mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.down_proj": 32},
        },
    ),
}


@pytest.fixture
def make_adapter(make_checkpoint, tmp_path):
    """A function that has peft make an adapter whose every number counts, and returns its folder and the model with it."""

    def make(architecture="llama", pickled=False, tied=False, **settings):
        base = make_checkpoint(architecture, tied=tied)
        torch.manual_seed(3)
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # it uses those of parameters
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
            model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        folder = tmp_path / "adapter"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LoRA tensor")  # peft takes a bias for a matrix that was cut
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
            model.eval().save_pretrained(folder)
        if pickled:
            torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
            (folder / "adapter_model.safetensors").unlink()
        return folder, model

    return make


def settings(model, corpus, run, **more):
    return TrainConfig.from_mapping(
        {
            "model": str(model),
            "data": str(corpus),
            "output_dir": str(run),
            "max_seq_length": 32,
            "max_steps": 2,
            "learning_rate": 0.01,
            "dtype": "fp32",
            "gpu": "cpu",
            "eval_fraction": 0.0,
            **more,
        }
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_goes_on_where_peft_left_it(make_adapter, corpus, tmp_path, kind):
    architecture, made = ADAPTERS[kind]
    folder, model = make_adapter(architecture, pickled=kind == "in a pickle", **made)
    config = settings(folder, corpus, tmp_path / "run")
    spec = resolve(config.model)
    assert any("goes on training" in note for note in spec.notes)
    begun = assemble(spec, config, Device(), fill=True).model
    trains = sum(parameter.numel() for parameter in begun.parameters() if parameter.requires_grad)
    assert trains == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logits = begun.eval()(IDS).logits
    assert (logits - model(input_ids=IDS).logits).abs().max() < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(spec.folder, attn_implementation="eager")
    assert (logits - plain(IDS).logits).abs().max() > 1e-3


def test_a_rounded_adapter_and_a_quantized_body_are_said_and_trained(make_adapter, corpus, tmp_path):
    folder, _ = make_adapter(target_modules=["q_proj"])
    config = settings(folder, corpus, tmp_path / "run", dtype="bf16", quantization="nf4", tokenizer=str(folder))
    spec = resolve(config.model)
    assert any("rounded from float32 to bfloat16" in n for n in assemble(spec, config, Device(), fill=True).notes)
    train(config)
    exact = assemble(spec, settings(folder, corpus, tmp_path / "exact"), Device(), fill=True)
    assert not any("rounded" in note for note in exact.notes)


def test_what_is_trained_on_is_an_adapter_of_the_base(make_adapter, make_checkpoint, corpus, tmp_path):
    """peft loads it beside the model that the first one was of; a resumed run is the undisturbed one; base and trained are compared."""
    folder, model = make_adapter(target_modules=["q_proj"])
    run = tmp_path / "run"
    train(settings(folder, corpus, run, merge_lora=False, save_steps=1, eval_fraction=0.05))
    said = json.loads((run / "model" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(make_checkpoint("llama"))
    plain = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"), attn_implementation="eager")
    PeftModel.from_pretrained(plain, str(run / "model"))
    (run / "checkpoint-2").rename(run / "gone")
    train(settings(folder, corpus, run, merge_lora=False, save_steps=1, eval_fraction=0.05, resume=True))
    again, once = (load_file(run / name / "adapter_model.safetensors") for name in ("checkpoint-2", "gone"))
    assert all(torch.equal(again[name], once[name]) for name in once)
    found = Pair(run).compare()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    for side, measured in ((found.base, metrics[0]), (found.trained, metrics[-1])):
        assert side.losses["library.jsonl"] == pytest.approx(measured["eval_loss/library.jsonl"], abs=1e-4)


WENT_ON = ("ranks and scales by pattern", "all but a pattern", "rows of a tied embedding", "all biases")
ITS_OWN = "a bias of its own on a bias"


@pytest.mark.parametrize(
    ("kind", "more"),
    [*((kind, {}) for kind in WENT_ON), (ITS_OWN, {}), (ITS_OWN, {"quantization": "nf4"})],
)
def test_what_went_on_is_exported(make_adapter, corpus, tmp_path, kind, more):
    """The adapter that comes of it is what peft makes of it, and so is what is merged."""
    architecture, made = ADAPTERS[kind]
    folder, _ = make_adapter(architecture, **made)
    train(settings(folder, corpus, tmp_path / "run", **more))
    for to in ("adapter", "safetensors"):
        plan = make_plan(tmp_path / "run", to, verify="full")
        assert export(plan).checked.error < 1e-4
    final, merged = (
        AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager")(IDS).logits
        for place in (tmp_path / "run" / "model", plan.target)
    )
    assert (final - merged).abs().max() < 1e-4
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "run/checkpoint-2")
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if not name.endswith("k_proj.bias"))


def test_a_bias_that_a_plain_model_has_no_place_for(make_adapter, corpus, tmp_path):
    """It goes on as an adapter, and is exported as one; merged it cannot be, which is said before anything trains."""
    folder, model = make_adapter("llama", target_modules=["q_proj"], lora_bias=True)
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj has none .* --merge-lora false"):
        train(settings(folder, corpus, run))
    with pytest.raises(ModelError, match="it cannot be merged; --to adapter"):
        make_plan(folder, "safetensors", output=tmp_path / "merged")
    train(settings(folder, corpus, run, merge_lora=False))
    export(make_plan(run, "adapter", output=tmp_path / "out"))
    assert "lora_B.bias" in " ".join(load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_a_plan_and_a_search_take_the_adapter_as_it_is(make_adapter):
    folder, _ = make_adapter(target_modules=["q_proj"], use_rslora=True)
    pins = read_given({"model": str(folder)})
    assert pins["trainable"] == "lora"
    assert (pins["lora_r"], pins["lora_alpha"], pins["lora_target_modules"]) == (4, 10.0, "q_proj")
    assert pins["use_rslora"]
    assert not pins["use_dora"]
    assert resolve_for_plan(str(folder)).adapter == folder
    assert len(load_tokenizer(str(folder))) == 512


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        ({}, {"trainable": "full"}, "has trainable lora.* got full: .*oomless export"),
        ({}, {"lora_r": 8}, "has lora_r 4.* got 8"),
        ({"bias": "all"}, {"bias": "none"}, "has bias all.* got none"),
        ({"init_lora_weights": "olora"}, {}, "has init_lora_weights olora"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            {},
            "rows of one embedding and other rows",
        ),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, {}, "or all, of another"),
    ],
)
def test_what_cannot_go_on_says_how_it_can(make_adapter, corpus, tmp_path, made, given, message):
    folder, _ = make_adapter(**{"target_modules": ["q_proj"], **made})
    with pytest.raises(ConfigError, match=message):
        settings(folder, corpus, tmp_path / "run", **given)


@torch.no_grad()
@pytest.mark.parametrize(
    ("began", "architecture", "more"),
    [
        ("olora", "llama", {"use_rslora": True}),
        ("pissa", "llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}),
        ("pissa", "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_what_changed_the_models_own_matrices_is_merged_into_what_it_left(
    make_adapter, tmp_path, began, architecture, more
):
    folder, model = make_adapter(architecture, init_lora_weights=began, **{"target_modules": ["q_proj"], **more})
    export(make_plan(folder, "safetensors", output=tmp_path / "merged", verify="full"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert (merged(IDS).logits - model(input_ids=IDS).logits).abs().max() < 1e-4


def test_what_chance_took_off_the_models_own_matrices_is_not_merged(make_adapter, tmp_path):
    folder, _ = make_adapter(target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    with pytest.raises(ModelError, match=r"has init_lora_weights pissa_niter_4, .* path_initial_model"):
        make_plan(folder, "safetensors", output=tmp_path / "merged")


def test_damaged_adapters(make_adapter, corpus, tmp_path):
    folder, _ = make_adapter(target_modules=["q_proj", "v_proj"])
    config = folder / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "target_modules": ["q_proj"]}))
    with pytest.raises(ConfigError, match="of other matrices"):
        train(settings(folder, corpus, tmp_path / "run"))
    for text, message in (
        ("{", "as JSON"),
        ("[]", "no JSON object"),
        ('{"r": 4}', "does not say lora_alpha"),
        (json.dumps({**said, "r": "4"}), "r is a whole number from 1 on, got '4'"),
        (json.dumps({**said, "alpha_pattern": [1]}), "alpha_pattern is a number for each"),
        (json.dumps({**said, "target_modules": [5]}), "target_modules is a name or a list of names"),
        ('{"peft_type": "IA3"}', "IA3"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigError, match=message):
            settings(folder, corpus, tmp_path / "run")
        with pytest.raises(UserError):
            make_plan(folder, "safetensors", output=tmp_path / "merged")
    for odd in ({"arrow_config": []}, {"arrow_config": {}}, {"lora_dropout": 7}, {"megatron_config": {"a": 1}}):
        config.write_text(json.dumps(said | odd))
        for to in ("adapter", "safetensors"):
            with pytest.raises(
                ModelError, match="peft cannot load this adapter with what its adapter_config.json says"
            ):
                export(make_plan(folder, to, output=tmp_path / "exported"))
    config.write_text(json.dumps({**said, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        train(settings(folder, corpus, tmp_path / "run"))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_checkpoint_of_the_trainer(make_checkpoint, corpus, tmp_path, adapted):
    """Its weights are where the run begins, and it is said that its optimizer is not."""
    base = make_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist() * 2]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), max_steps=1, save_steps=1, use_cpu=True, report_to=[], learning_rate=0.05
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    folder = tmp_path / "theirs" / "checkpoint-1"
    assert (folder / "optimizer.pt").is_file()
    config = settings(folder, corpus, tmp_path / "run", tokenizer=str(base))
    spec = resolve(config.model)
    assert any("optimizer state" in note for note in spec.notes)
    begun = assemble(spec, config, Device(), fill=True).model.eval()
    with torch.no_grad():
        assert (begun(IDS).logits - model.eval()(input_ids=IDS).logits).abs().max() < 1e-4


def test_weights_in_four_bits_are_the_same_four_bits(make_checkpoint, corpus, tmp_path):
    """A checkpoint of bitsandbytes', trained as a frozen body in NF4: it is not rounded to four bits a second time, only its scales are."""
    base = make_checkpoint("llama", intermediate_size=128)
    theirs = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map="cpu",
        attn_implementation="eager",
    )
    theirs.save_pretrained(tmp_path / "four")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "four")
    config = settings(tmp_path / "four", corpus, tmp_path / "run", trainable="lora", quantization="nf4")
    begun = assemble(resolve(config.model), config, Device(), fill=True).model.eval()
    with torch.no_grad():
        wanted = theirs(IDS).logits
        exact = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")(IDS).logits
        rounding = (exact - wanted).abs().max()
        assert (begun(IDS).logits - wanted).abs().max() < rounding / 10
    train(config)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
