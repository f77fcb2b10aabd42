"""What is exported is what was trained, whatever trained and however it was held."""

import filecmp
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.config import TrainConfig
from oomless.errors import CheckpointError, ConfigError, HardwareError, ModelError
from oomless.export import plan as planning
from oomless.export import verify
from oomless.export.compare import Pair
from oomless.export.plan import make_plan
from oomless.export.run import export
from oomless.export.source import find, find_two
from oomless.training.loop import train

LORA = {"trainable": "lora", "lora_r": 4}
MODES = {
    "full": ("llama", False, {"trainable": "full"}),
    "full, tied": ("llama", True, {"trainable": "full"}),
    "lora": ("llama", False, LORA),
    "lora, rank-stabilised, tied": ("gemma", True, {**LORA, "use_rslora": True}),
    "dora": ("qwen2", False, {**LORA, "use_dora": True}),
    "transposed": ("gpt2", True, LORA),
    "transposed dora": ("gpt2", True, {**LORA, "use_dora": True}),
    "lora and matrices": ("llama", True, {**LORA, "trainable": "lora+lm_head+embed_tokens"}),
    "lora and an untied head": ("llama", True, {**LORA, "trainable": "lora+lm_head", "tied_weights": "untied"}),
    "lora and rows": ("llama", True, {**LORA, "trainable": "lora+embed_tokens+lm_head", "trainable_rows": "5,200-210"}),
    "rows": ("llama", False, {"trainable": "embed_tokens+lm_head", "trainable_rows": "5,200-210"}),
    "an untied head": ("llama", True, {"trainable": "lm_head", "tied_weights": "untied"}),
    "lora and biases": ("gpt2", True, {**LORA, "bias": "all"}),
    "lora and its biases, nf4": ("qwen2", False, {**LORA, "bias": "lora_only", "quantization": "nf4"}),
    "lora, nf4": ("qwen3", False, {**LORA, "quantization": "nf4"}),
    "head, int8": ("llama", False, {"trainable": "lm_head", "quantization": "int8"}),
    "rows, nf4": ("llama", True, {"trainable": "embed_tokens+lm_head", "trainable_rows": "7", "quantization": "nf4"}),
    "untied head, nf4": ("llama", True, {"trainable": "lm_head", "tied_weights": "untied", "quantization": "nf4"}),
    "experts": ("mixtral", False, LORA),
    "experts, nf4": ("mixtral", False, {**LORA, "quantization": "nf4"}),
    "down_proj of experts": ("mixtral", False, {**LORA, "lora_target_modules": "down_proj"}),
    "experts weighed before": ("llama4_text", False, {**LORA, "packing": "concatenate"}),
    "stacks of their own": ("jetmoe", False, {**LORA, "lora_target_modules": "input_linear", "quantization": "nf4"}),
    "experts without matrices": ("longcat_flash", False, LORA),
    "shared experts": ("deepseek_v2", False, {**LORA, "lora_target_modules": "all-linear"}),
}


@pytest.fixture(params=MODES)
def run(request, make_run):
    architecture, tied, settings = MODES[request.param]
    return make_run(architecture, tied=tied, **settings)


def ids_for(folder):
    text = "def export(self, name):\n    return self.what(name) or None\n"
    return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]


def off(found, wanted):
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@torch.no_grad()
def test_every_mode_is_merged_right(run, tmp_path):
    """Beside the export's own check: the logits of plain transformers, of the trained model, and of the run's own final model."""
    plan = make_plan(run, "safetensors", output=tmp_path / "out", verify="full")
    exported = export(plan)
    assert exported.checked.error < 1e-3
    ids = ids_for(exported.folder)
    loaded = AutoModelForCausalLM.from_pretrained(exported.folder, attn_implementation="eager")
    logits = loaded(ids).logits
    assert off(logits, verify.trained_logits(plan.source, ids)) < 1e-4
    final = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager")
    assert off(logits, final(ids).logits) < 1e-4
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((run / "checkpoint-2/trainer/state.json").read_text())["config"]["model"]
    )
    assert off(logits, base(ids).logits) > 1e-3
    assert loaded.config.tie_word_embeddings == final.config.tie_word_embeddings


OFTEN = ("lora", "dora", "experts", "lora and an untied head", "lora and rows")
WITH_ADAPTERS = [mode for mode, (_, _, settings) in MODES.items() if settings["trainable"].startswith("lora")]


@pytest.mark.parametrize(
    "mode", [mode if mode in OFTEN else pytest.param(mode, marks=pytest.mark.slow) for mode in WITH_ADAPTERS]
)
def test_an_adapter_is_loaded_by_peft(make_run, tmp_path, mode):
    architecture, tied, settings = MODES[mode]
    run = make_run(architecture, tied=tied, **settings)
    plan = make_plan(run, "adapter", output=tmp_path / "out")
    assert export(plan).checked.how == "full"
    ids = ids_for(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(plan.source.base.folder, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    final = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager")
    with torch.no_grad():
        assert off(loaded(ids).logits, final(ids).logits) < 1e-4
    assert not (tmp_path / "out" / "trainer").exists()


def test_numbers_are_rounded_once(make_run, tmp_path):
    run = make_run("llama", **LORA)
    export(make_plan(run, "safetensors", output=tmp_path / "fp32"))
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        export(make_plan(run, "safetensors", dtype=name, output=tmp_path / name))
        rounded = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(rounded[key], exact[key].to(dtype)) for key in exact)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_what_is_in_the_way_of_fp32_is_merged_in_fp32(make_checkpoint, make_run, tmp_path):
    """Of a model in bf16: W + BA in fp32, rounded once, not W + bf16(BA)."""
    run = make_run("llama", shape=(("dtype", torch.bfloat16),), **{**LORA, "dtype": "bf16"})
    export(make_plan(run, "safetensors", output=tmp_path / "out"))
    adapter = load_file(run / "checkpoint-2" / "adapter_model.safetensors")
    settings = json.loads((run / "checkpoint-2" / "adapter_config.json").read_text())
    base = load_file(make_checkpoint("llama", dtype=torch.bfloat16) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = base[f"{name}.weight"].double() + b @ a * settings["lora_alpha"] / settings["r"]
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert (found != exact.to(torch.bfloat16)).float().mean() < 1e-3  # but where fp32 and fp64 round to two sides


def test_an_adapter_from_elsewhere(make_checkpoint, tmp_path):
    """Made by peft, with what oomless has no setting for: embeddings, patterns of ranks and scales, biases, a matrix whole."""
    base = make_checkpoint("qwen2")
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"),
        LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj", "embed_tokens"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.1.mlp.down_proj": 32},
            bias="lora_only",
            modules_to_save=["lm_head"],
            init_lora_weights=False,
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name and name.endswith("bias"):
                parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ConfigError, match="--output"):
        make_plan(tmp_path / "adapter", "safetensors")
    plan = make_plan(tmp_path / "adapter", "safetensors", output=tmp_path / "out")
    export(plan)
    ids = ids_for(base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        assert off(loaded(ids).logits, model(input_ids=ids).logits) < 1e-4
    assert "oomless" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_and_a_checkpoint_are_exported_as_well(make_run, tmp_path):
    run = make_run("llama", trainable="full")
    for number, place in enumerate((run / "model", run / "checkpoint-2")):
        export(make_plan(place, "safetensors", output=tmp_path / str(number)))
        assert filecmp.cmp(place / "model.safetensors", tmp_path / str(number) / "model.safetensors", shallow=False)


@pytest.mark.parametrize("settings", [LORA, {"trainable": "full"}])
def test_the_card_says_what_was_trained_on_what(make_run, corpus, tmp_path, settings):
    run = make_run("llama", **settings)
    export(make_plan(run, "safetensors", output=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    model = json.loads((run / "checkpoint-2/trainer/state.json").read_text())["config"]["model"]
    for word in (
        f"base_model: {model}",
        str(corpus),
        "2 steps",
        f"trainable: {settings['trainable']}",
        "library_name: transformers",
        "float32",
    ):
        assert word in card, word


def same_folders(left, right):
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    different = [name for name in names if not filecmp.cmp(left / name, right / name, shallow=False)]
    assert not different, different


def dies(plan, moment):
    """Export in a process that is killed when it has said something ``moment`` times; whether it was."""
    child = os.fork()
    if not child:
        said = 0

        def say(what, share):
            nonlocal said
            said += 1
            if said == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            export(plan, say)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize(
    ("to", "stride"),
    [("safetensors", 7), *(pytest.param(to, 1, marks=pytest.mark.slow) for to in ("safetensors", "gguf"))],
)
def test_killed_at_every_moment_it_goes_on(make_run, tmp_path, monkeypatch, record_property, to, stride):
    monkeypatch.setattr("oomless.models.save.SHARD_BYTES", 150_000)
    run = make_run("llama", shape=(("num_hidden_layers", 6),), **LORA)
    export(make_plan(run, to, output=tmp_path / "undisturbed", verify="sample"))
    target, hidden = tmp_path / "out", tmp_path / ".out.tmp"
    plan = make_plan(run, to, output=target, verify="sample")
    kills = 0
    while dies(plan, 1 + kills * stride):
        kills += 1
        assert not target.exists()
        if kills % 3 == 0:  # a write that was cut short
            newest = max(hidden.glob(f"*.{to}"), key=lambda path: path.name)
            os.truncate(newest, newest.stat().st_size * 2 // 3)
            assert 0 < make_plan(run, to, output=target).begun_bytes < plan.disk_bytes * 2
        if kills % 5 == 0:  # go on to the end; else as far as the next kill
            assert not dies(plan, 0)
            same_folders(tmp_path / "undisturbed", target)
            shutil.rmtree(target)
    assert kills * stride >= 50
    record_property("kills", kills)
    same_folders(tmp_path / "undisturbed", target)


def test_what_was_begun_of_something_else_is_not_gone_on_with(make_run, tmp_path):
    target = tmp_path / "out"
    assert dies(make_plan(make_run("llama", **LORA), "safetensors", output=target), 20)
    plan = make_plan(make_run("llama", trainable="full"), "safetensors", output=target, verify="sample")
    assert plan.begun_bytes == 0
    export(plan)
    wanted = load_file(plan.source.folder / "model.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(target / "model.safetensors").items())


def test_a_place_that_is_taken(make_run, tmp_path):
    run = make_run("llama", **LORA)
    assert not export(make_plan(run, "safetensors", output=tmp_path / "out")).was_there
    assert export(make_plan(run, "safetensors", output=tmp_path / "out")).was_there
    with pytest.raises(CheckpointError, match="holds something else"):
        export(make_plan(run, "safetensors", dtype="bf16", output=tmp_path / "out"))


def test_a_disk_that_fills_up_leaves_nothing(make_run, tmp_path):
    """At sizes from nothing to almost all: one clear error each time, and then, with room, the export."""
    run = make_run("llama", **LORA)
    plan = make_plan(run, "safetensors", output=tmp_path / "out", verify="sample")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in [0, 8, *range(1000, plan.disk_bytes, plan.disk_bytes // 12)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path / 'out'))} could not be written"):
                export(plan)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(tmp_path.iterdir())
    export(plan)


@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=pytest.mark.full_length)])
def test_a_disk_that_is_full_or_read_only(make_run, tmp_path, record_property, stride):
    """A real one, of every number of pages and of files that is too small: one error, nothing left, and with room the same bytes."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    script = Path(__file__).with_name("full_disk.py")
    command = ["unshare", "-rm", sys.executable, script, make_run("llama", **LORA), tmp_path, stride]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1]).values()
    record_property("full disks", sum(pages // stride + inodes for pages, _, inodes, _ in found))
    for pages, used, inodes, files in found:
        assert pages + 2 >= used - stride  # it begins with two
        assert inodes >= files


def test_a_shard_that_is_missing(make_run, make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("oomless.models.save.SHARD_BYTES", 150_000)
    export(make_plan(make_checkpoint("llama"), "safetensors", output=tmp_path / "base"))
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    for place, base in ((make_run("llama", **LORA), str(tmp_path / "base")), (tmp_path / "base", None)):
        with pytest.raises(ModelError, match=f"names {shards[1].name}"):
            make_plan(place, "safetensors", base=base, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_too_little_room_is_said_before_anything_is_written(make_run, tmp_path, monkeypatch):
    run = make_run("llama", **LORA)
    left = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: left)
    with pytest.raises(CheckpointError, match="which has 48.83 KiB left"):
        make_plan(run, "safetensors", output=tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(planning, "available_host_bytes", lambda: 1000)
    with pytest.raises(HardwareError, match="of memory"):
        make_plan(run, "safetensors", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_less_memory_is_a_check_that_takes_less(make_run, tmp_path, monkeypatch):
    run = make_run("llama", **LORA)
    size = make_plan(run, "safetensors", output=tmp_path / "out").disk_bytes
    monkeypatch.setattr(planning, "available_host_bytes", lambda: size)
    assert make_plan(run, "safetensors", output=tmp_path / "out").verify == "sample"
    with pytest.raises(HardwareError, match="--verify sample"):
        make_plan(run, "safetensors", output=tmp_path / "out", verify="full")


@pytest.mark.parametrize("how", ["sample", "full"])
def test_what_is_not_what_was_trained_is_marked_as_bad(make_run, tmp_path, monkeypatch, how):
    plan = make_plan(make_run("llama", **LORA), "safetensors", output=tmp_path / "out", verify=how)
    describe = plan.files.describe

    def spoil(folder):
        describe(folder)
        if how == "full":  # bytes as they were written, and read as another model
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
        else:
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(-3, 2)
                file.write(b"?")

    object.__setattr__(plan.files, "describe", spoil)
    with pytest.raises(ModelError, match="marked as bad"):
        export(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out.bad"]


@pytest.mark.parametrize(
    ("place", "settings", "message"),
    [
        ("nowhere", {}, "is no folder"),
        ("", {"which": "1"}, "there is 2"),
        ("", {"which": "best"}, "no checkpoint that was evaluated"),
        ("", {"which": "lst"}, "Did you mean 'last'"),
        ("model", {"which": "2"}, "no run's folder"),
        ("model", {"base": "x"}, "--base is for an adapter"),
        ("", {"to": "adapter"}, "no adapter to export"),
        ("", {"quantize": "q8_0"}, "--quantize is for --to gguf"),
    ],
)
def test_what_cannot_be_exported(make_run, tmp_path, place, settings, message):
    run = make_run("llama", trainable="full")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        make_plan(run / place, **{"to": "safetensors", "output": tmp_path / "out", **settings})


def test_another_base_a_missing_shard_a_damaged_checkpoint(make_run, make_checkpoint, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(make_run("llama", **LORA), run)
    with pytest.raises(ModelError, match="of another model"):
        make_plan(run, "safetensors", base=str(make_checkpoint("gpt2")), output=tmp_path / "out")
    wide = make_checkpoint("llama", intermediate_size=128)
    with pytest.raises(ModelError, match="another model"):
        make_plan(run, "safetensors", base=str(wide), output=tmp_path / "out")
    shutil.copytree(make_checkpoint("llama"), tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    same_shapes = str(tmp_path / "other")
    for place in (run, run / "checkpoint-2"):
        for to in ("adapter", "safetensors"):
            with pytest.raises(ModelError, match="trained on another model than .* its embedding"):
                make_plan(place, to, base=same_shapes, output=tmp_path / "out")
    export(make_plan(run, "adapter", output=tmp_path / "run" / "adapter"))
    with pytest.raises(ModelError, match="trained on another model than .* its embedding"):
        make_plan(tmp_path / "run" / "adapter", "safetensors", base=same_shapes, output=tmp_path / "out")
    base = tmp_path / "base"
    export(make_plan(make_checkpoint("llama"), "safetensors", dtype="bf16", output=base))  # the same but for rounding
    make_plan(run, "safetensors", base=str(base), output=tmp_path / "out")
    shutil.rmtree(base)
    shutil.copytree(make_checkpoint("llama"), base)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack model.norm.weight"):
        make_plan(run, "safetensors", base=str(base), output=tmp_path / "out")
    with (run / "checkpoint-2" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        make_plan(run, "safetensors", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other", "run"]


def test_the_best_checkpoint_is_the_final_model(make_run, tmp_path):
    run = make_run(
        "llama",
        trainable="full",
        load_best_model_at_end=True,
        eval_fraction=0.02,
        eval_steps=1,
        save_steps=1,
        learning_rate=1.0,
        warmup_ratio=0.9,
    )
    steps = {which: find(run, which).saved.step for which in (None, "final", "best", "last", "2")}
    assert steps == {None: 1, "final": 1, "best": 1, "last": 2, "2": 2}
    targets = {make_plan(run, "safetensors", which=which).target.name for which in (None, "last", "final")}
    assert targets == {"safetensors", "safetensors-step-2"}
    export(make_plan(run, "safetensors", output=tmp_path / "out"))
    assert filecmp.cmp(run / "model" / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


@pytest.mark.parametrize("to", ["safetensors", "gguf"])
def test_numbers_that_fp16_does_not_hold_are_said(make_checkpoint, tmp_path, to):
    base = tmp_path / "base"
    shutil.copytree(make_checkpoint("llama"), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70_000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="fp16 does not hold"):
        export(make_plan(base, to, dtype="fp16", output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    export(make_plan(base, to, dtype="bf16", output=tmp_path / "out"))


def test_two_exports_to_one_place(make_run, tmp_path):
    """The second one says so, and leaves the first one's files alone, whatever it would have written."""
    first = make_plan(make_run("llama", **LORA), "safetensors", output=tmp_path / "out")
    second = make_plan(make_run("llama", **LORA), "safetensors", dtype="bf16", output=tmp_path / "out")
    refused = []

    def say(what, share):
        if not refused and what == "reading back":
            with pytest.raises(CheckpointError, match="another export") as error:
                export(second)
            refused.append(error)

    export(first, say)
    assert refused
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_a_run_is_found_from_every_folder(make_checkpoint, corpus, tmp_path, monkeypatch):
    """Its model and its text were named from the folder that it was begun in; of one of an earlier version --base is asked for."""
    begun_in, elsewhere = tmp_path / "begun_in", tmp_path / "elsewhere"
    begun_in.mkdir()
    elsewhere.mkdir()
    shutil.copytree(make_checkpoint("llama"), begun_in / "model")
    shutil.copy(corpus, begun_in / "text.jsonl")
    settings = {**LORA, "max_seq_length": 32, "max_steps": 2, "dtype": "fp32", "gpu": "cpu", "eval_fraction": 0.1}
    config = {"model": "model", "tokenizer": "model", "data": "tex*.jsonl", "output_dir": "run", **settings}
    monkeypatch.chdir(begun_in)
    train(TrainConfig.from_mapping(config))
    train(TrainConfig.from_mapping({**config, "max_steps": 3, "resume": True}))
    monkeypatch.chdir(elsewhere)
    export(make_plan(begun_in / "run", "safetensors", verify="sample"))
    assert Pair(begun_in / "run", held_out=True).compare().base.losses
    saved = begun_in / "run" / "checkpoint-3" / "trainer" / "state.json"
    config_file = begun_in / "run" / "config.yaml"
    assert str(begun_in / "tex*.jsonl") in config_file.read_text()
    for path in (saved, config_file):
        path.write_text(path.read_text().replace(str(begun_in / "model"), "model"))
    find(begun_in / "run")  # its adapter names the model's folder
    with pytest.raises(ModelError, match=r"began with the model model, which is not found: .*--base"):
        find_two(begun_in / "run")
    find_two(begun_in / "run", base=str(begun_in / "model"))
    shutil.move(begun_in / "model", begun_in / "moved")
    with pytest.raises(ModelError, match=r"which is not found: .*--base"):
        find(begun_in / "run")
    find(begun_in / "run", base=str(begun_in / "moved"))
