"""Two real processes over gloo: the losses of one, the peak that was rehearsed, checkpoints for any number, and clear ends."""

import json
import os
import random
import shutil
import signal
import socket
import time
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.gpt_oss import GPT_OSS
from tests.training.test_samples import written
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError, HardwareError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models import save
from oomless.models.spec import resolve
from oomless.planning.layout import Layout
from oomless.planning.plan import Target, target_for
from oomless.planning.rehearse import play, rehearse, virtual_device
from oomless.planning.search import search
from oomless.planning.trial import Setting
from oomless.techniques import peers, quantization, sharding
from oomless.techniques.experts import FrozenExperts
from oomless.training import checkpoint, distributed, loop
from oomless.training.assemble import assemble, open_device
from oomless.training.bad_loss import BadLoss
from oomless.training.checkpoint import Checkpoint, damage, list_checkpoints
from oomless.training.step import TrainingStep

LENGTHS = (20, 1, 43)
LONGEST_S = 120
"""A process that has not ended by then hangs: 50 times what these runs take alone."""

LLAMA = dict(max_seq_length=64, per_device_train_batch_size=2, learning_rate=1e-3)
LORA = dict(trainable="lora+embed_tokens+lm_head", lora_r=4)
STREAMED = dict(dtype="fp32", gpu="virtual:1GiB", stream_frozen=True, trainable="lora", lora_r=4)
ON_HOST = dict(dtype="fp32", gpu="virtual:1GiB", experts_on_host=True, trainable="lora+lm_head", lora_r=4)
TABLES = dict(gpu="virtual:1GiB", embeddings_on_host=True)
ROUTES = {
    "full": ("llama", False, dict(dtype="fp32", sample_prompts=("def main(",))),
    "accumulation": ("llama", True, dict(dtype="fp32", gradient_accumulation_steps=2, weight_decay=0.1)),
    "lora": ("gemma", True, dict(dtype="fp32", **LORA)),
    "checkpointing": (
        "qwen3",
        False,
        dict(dtype="fp32", gradient_checkpointing=True, checkpointed_layers=1, cheap_recompute=True, mlp_tiles=2),
    ),
    "8-bit": ("llama", False, dict(dtype="fp32", optimizer="adamw_8bit", max_grad_norm=None)),
    "sgd": ("gemma2", False, dict(dtype="fp32", optimizer="sgd", z_loss=1e-4, label_smoothing_factor=0.1)),
    "head": ("qwen2", False, dict(dtype="fp32", trainable="lm_head", tokens_per_step=512)),
    "tables on the host": ("llama", False, dict(dtype="fp32", trainable="lora", lora_r=4, **TABLES)),
    "replicate": ("llama", True, dict(dtype="fp32", sharding="replicate", gradient_accumulation_steps=2)),
    "nf4": (
        *("llama", False),
        dict(dtype="fp32", quantization="nf4", trainable="lora", lora_r=4, optimizer="adamw_8bit", **TABLES),
    ),
    "int8": ("llama", False, dict(dtype="fp32", quantization="int8", trainable="lora+lm_head", lora_r=4)),
    "experts": ("mixtral", False, dict(dtype="fp32", quantization="nf4", gradient_checkpointing=True, **LORA)),
    "packed but whole": ("gemma", True, dict(dtype="fp32", quantization="int8", sharding="replicate", **LORA)),
    "dropout": ("llama", True, dict(dtype="fp32", lora_dropout=0.3, gradient_accumulation_steps=2, **LORA)),
    "packed with dropout": (
        "qwen2",
        False,
        dict(dtype="fp32", quantization="nf4", lora_dropout=0.3, gradient_checkpointing=True, **LORA),
    ),
    "in backward": (
        "llama",
        True,
        dict(dtype="fp32", max_grad_norm=None, optimizer_in_backward=True, sharding="replicate"),
    ),
    "packed, in backward": (
        "qwen2",
        False,
        dict(
            dtype="fp32",
            quantization="nf4",
            max_grad_norm=None,
            optimizer_in_backward=True,
            gradient_accumulation_steps=2,
            **LORA,
        ),
    ),
    "packed beside frozen ends": (
        "gemma2",
        True,
        dict(
            dtype="fp32",
            quantization="int8",
            trainable="lora",
            lora_r=4,
            z_loss=1e-4,
            label_smoothing_factor=0.1,
            per_device_eval_batch_size=3,
            sample_prompts=("def main(",),
        ),
    ),
    "packed body": ("qwen2", False, dict(dtype="fp32", quantization="nf4", trainable="lm_head", sharding="shard")),
    "biases": ("gpt2", True, dict(dtype="fp32", bias="all", **LORA)),
    "dora": ("gemma", True, dict(dtype="fp32", trainable="lora", lora_r=4, use_dora=True)),
    "rows": ("llama", False, dict(dtype="fp32", trainable="lm_head", trainable_rows="0-99")),
    "adafactor": ("gemma", True, dict(dtype="fp32", optimizer="adafactor", gradient_accumulation_steps=2)),
    "muon": ("qwen3", False, dict(dtype="fp32", optimizer="muon", gradient_checkpointing=True)),
    "galore": ("llama", False, dict(dtype="fp32", optimizer="galore")),
    "streamed": ("llama", False, dict(STREAMED, gradient_checkpointing=True, sample_prompts=("def main(",))),
    "streamed, whole": ("gemma", True, dict(STREAMED, sharding="replicate", gradient_accumulation_steps=2)),
    "experts on the host": ("mixtral", False, dict(ON_HOST, optimizer_in_backward=True, max_grad_norm=None)),
    "packed experts on the host": ("mixtral", False, dict(ON_HOST, quantization="nf4", lora_dropout=0.2)),
    "experts on the host, whole": ("mixtral", False, dict(ON_HOST, quantization="int8", sharding="replicate")),
    "apollo": ("llama", True, dict(dtype="fp32", optimizer="apollo")),
}
MEMORY = {
    "llama": ("llama", False, dict()),
    "llama-tied": ("llama", True, dict(gradient_checkpointing=True, gradient_accumulation_steps=2, optimizer="sgd")),
    "qwen": (
        "qwen3",
        False,
        dict(optimizer="adamw_8bit", weight_precision="correction", gradient_accumulation_steps=2),
    ),
    "gemma": ("gemma", True, dict(trainable="embed_tokens", tied_weights="shared", per_device_train_batch_size=2)),
    "lora": (
        "llama",
        False,
        dict(trainable="lora+lm_head", lora_r=4, gradient_checkpointing=True, offload_activations=True, mlp_tiles=3),
    ),
    "fp16": ("gemma2", False, dict(dtype="fp16", gradient_checkpointing=True, checkpointed_layers=1)),
    "nf4": ("llama", False, dict(quantization="nf4", trainable="lora", lora_r=4, gradient_checkpointing=True)),
    "int8": ("qwen2", True, dict(quantization="int8", gradient_accumulation_steps=2, **LORA)),
    "experts": ("mixtral", False, dict(quantization="nf4", gradient_checkpointing=True, **LORA)),
    "packed but whole": ("llama", False, dict(quantization="nf4", sharding="replicate", **LORA)),
    "in backward": (
        "llama",
        False,
        dict(quantization="nf4", optimizer_in_backward=True, gradient_accumulation_steps=2, max_grad_norm=None, **LORA),
    ),
    "replicate": ("qwen3", True, dict(sharding="replicate", gradient_accumulation_steps=2)),
    "streamed": ("llama", False, dict(STREAMED, gradient_accumulation_steps=2, eval_steps=2)),
    "streamed experts": ("mixtral", False, dict(STREAMED, gradient_checkpointing=True)),
    "streamed, whole": ("qwen2", True, dict(STREAMED, sharding="replicate")),
    "experts on the host": ("mixtral", False, dict(ON_HOST, gradient_checkpointing=True)),
    "packed experts on the host": ("mixtral", False, dict(ON_HOST, quantization="nf4")),
    "samples": ("gemma", True, dict(sample_prompts=("def main(", "import"), gradient_checkpointing=True)),
    "adafactor": ("qwen3", True, dict(optimizer="adafactor", gradient_accumulation_steps=2)),
}


LONG = {
    "streamed",
    "streamed, whole",
    "experts on the host",
    "packed experts on the host",
    "experts on the host, whole",
}
"""Run at full length alone: three processes with streamed layers and experts say the same of most of it."""


def some(names, *quick):
    """Of ``names`` those that are not ``quick`` are slow tests."""
    assert set(quick) <= set(names)
    marks = {name: pytest.mark.full_length if name in LONG else pytest.mark.slow for name in names}
    return [name if name in quick else pytest.param(name, marks=marks[name]) for name in names]


def as_rank(rank, count, port, out, function, arguments):
    """Be what torchrun makes of a process; write what ``function`` returns, or the error that ends it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        outcome = function(*arguments)
    except Exception as error:
        told = getattr(error, "told", None)
        outcome = f"{type(error).__name__}: {error}"
        (out / f"{rank}.told").write_text(str(told))
    (out / f"{rank}.json").write_text(json.dumps(outcome))


def begin(processes, out, function, *arguments, count=2):
    """Start ``count`` processes that run ``function`` together."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        processes.Process(target=as_rank, args=(rank, count, port, out, function, arguments)) for rank in range(count)
    ]
    for process in started:
        process.start()
    return started


def end(started, out, longest_s=LONGEST_S):
    """Wait for processes, and return what each came to: ``None`` for one that was killed."""
    for process in started:
        process.join(longest_s)
    hanging = [process for process in started if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    assert not hanging, "a process hangs"
    paths = [out / f"{rank}.json" for rank in range(len(started))]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def together(processes, out, function, *arguments, count=2, longest_s=LONGEST_S):
    return end(begin(processes, out, function, *arguments, count=count), out, longest_s)


def make_config(model, corpus, out, **settings):
    return TrainConfig(
        model=str(model),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(out),
        **{**dict(gpu="cpu", max_steps=6, save_steps=3, logging_steps=1, save_total_limit=9), **LLAMA, **settings},
    )


def again(config, **changes):
    return TrainConfig.from_mapping({**config.to_dict(), "resume": True, **changes})


def train(config):
    return loop.train(config).steps


def told_by(run_folder):
    """What metrics.jsonl tells but speeds and memory, by step and name; of a mixture also where all tokens go."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    names = ("loss", "gradient_norm", "eval_loss/library.jsonl", "learning_rate", "tokens")
    names += ("busiest_expert_share", "unused_experts")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def assert_same_losses(straight, other, tolerance=1e-5):
    """``other`` tells what ``straight`` does, and where it was resumed one evaluation more."""
    ours, theirs = told_by(straight), told_by(other)
    assert {name for _, name in theirs.keys() - ours.keys()} <= {"eval_loss/library.jsonl"}
    assert {key: theirs.get(key) for key in ours} == pytest.approx(ours, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("route", some(ROUTES, "full", "lora", "checkpointing", "8-bit", "replicate", "nf4"))
def test_losses_are_those_of_one_process(make_checkpoint, corpus, tmp_path, processes, route):
    architecture, tied, settings = ROUTES[route]
    model = make_checkpoint(architecture, tied=tied)
    two = make_config(model, corpus, tmp_path / "two", **settings)
    alone = {"output_dir": str(tmp_path / "one"), "sharding": "auto"}
    if two.tokens_per_step is None:
        alone["gradient_accumulation_steps"] = 2 * two.gradient_accumulation_steps
    one = TrainConfig.from_mapping({**two.to_dict(), **alone})
    assert together(processes, tmp_path / "out", train, two) == [6, 6]
    loop.train(one)
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    assert written(tmp_path / "one")[:1] == written(tmp_path / "two")[:1]  # of the same weights, to the bit
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    # AdamW divides a gradient by its own size: where it is all rounding, so is the sign of its first updates.
    loose = 2e-3 if two.optimizer != "sgd" else 1e-5
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=loose), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", dict(dtype="fp32", quantization="nf4", **LORA)),
        ("llama", dict(dtype="fp32", quantization="int8", **LORA)),
        ("mixtral", STREAMED),
        pytest.param("mixtral", dict(ON_HOST, quantization="int8"), marks=pytest.mark.full_length),
    ],
    ids=["nf4", "int8", "streamed", "experts on the host"],
)
def test_three_keep_parts_of_frozen_weights(make_checkpoint, corpus, tmp_path, processes, architecture, settings):
    """No number of bytes here divides by three."""
    three = make_config(make_checkpoint(architecture), corpus, tmp_path / "three", eval_fraction=0.1, **settings)
    assert together(processes, tmp_path / "out", train, three, count=3) == [6] * 3
    loop.train(
        TrainConfig.from_mapping(
            {**three.to_dict(), "output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 3}
        )
    )
    assert_same_losses(tmp_path / "one", tmp_path / "three")


def some_experts(kind):
    """Return whether each of the experts that this process asks for, others than its peers, is the whole one."""
    device, (experts, rows, columns) = VirtualGPU(1 << 30), (6, 24, 16)
    with distributed.joined("cpu") as ranks, device.active():
        held = torch.nn.Module()
        stack = torch.nn.Parameter(torch.empty(experts, rows, columns, device="meta"), requires_grad=False)
        held.stack = FrozenExperts(stack, kind, device, peers.Peers(held, ranks.mesh, device))
        held.stack.allocate()
        with device.host():
            matrices = torch.randn(experts, rows, columns, generator=torch.Generator().manual_seed(0))
        quantization.prepare(held, device)
        for expert in range(experts):
            held.stack.fill(matrices[expert], torch.float32, device, expert)
        right = []
        for asked in ([[1, 4], [], [0, 1, 2, 5]], [[5], [0], [3]], [[0, 1, 2, 3, 4, 5], [2, 3], []]):
            matrix_of = held.stack.matrices(asked[ranks.rank])
            for expert in asked[ranks.rank]:
                found = device.fetch(matrix_of(expert, torch.float32))
                right.append(bool((found - matrices[expert]).abs().max() <= (0.1 if kind else 0.0)))
    return right


@pytest.mark.parametrize("kind", [None, "int8"])
def test_processes_ask_for_other_experts_on_the_host(tmp_path, processes, kind):
    """All that anyone asks for come to all, whoever has no token for them."""
    found = together(processes, tmp_path / "out", some_experts, kind, count=3)
    assert found == [[True] * 9, [True] * 3, [True] * 5]


@pytest.mark.full_length
def test_three_keep_parts_of_experts_as_stored(gpt_oss_checkpoint, corpus, tmp_path, processes):
    three = make_config(gpt_oss_checkpoint, corpus, tmp_path / "three", dtype="fp32", quantization="mxfp4", **LORA)
    assert together(processes, tmp_path / "out", train, three, count=3) == [6] * 3
    alone = {"output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 3 * three.gradient_accumulation_steps}
    loop.train(TrainConfig.from_mapping({**three.to_dict(), **alone}))
    assert_same_losses(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [
        (1, 2, dict(optimizer="adamw_8bit")),
        (2, 1, LORA),
        (2, 2, dict(sharding="replicate")),  # and goes on in parts
        pytest.param(2, 2, dict(quantization="nf4", sharding="replicate", **LORA), marks=pytest.mark.slow),
        pytest.param(3, 1, dict(quantization="nf4", **LORA), marks=pytest.mark.slow),
        pytest.param(2, 3, dict(quantization="int8", **LORA), marks=pytest.mark.slow),
        pytest.param(2, 3, STREAMED, marks=pytest.mark.full_length),
        pytest.param(3, 1, STREAMED, marks=pytest.mark.full_length),
        pytest.param(1, 2, dict(optimizer="adafactor"), marks=pytest.mark.slow),
        pytest.param(2, 3, dict(weight_decay=0.1), marks=pytest.mark.slow),  # no number of rows here divides by three
    ],
)
def test_a_checkpoint_serves_any_number_of_processes(
    make_checkpoint, corpus, tmp_path, processes, before, after, settings
):
    """What goes on with what others saved comes to what one process does that was never interrupted."""
    settings = dict(dtype="fp32", per_device_train_batch_size=1) | settings
    sharding = settings.pop("sharding", "auto")
    one = make_config(
        make_checkpoint("llama"), corpus, tmp_path / "one", gradient_accumulation_steps=before * after, **settings
    )
    loop.train(one)
    out = tmp_path / "resumed"
    begun = {"output_dir": str(out), "gradient_accumulation_steps": after, "sharding": sharding}
    start = TrainConfig.from_mapping({**one.to_dict(), **begun})
    if before == 1:
        shutil.copytree(one.output_dir, out)
    else:
        assert together(processes, tmp_path / "out", train, start, count=before) == [6] * before
    shutil.rmtree(out / "checkpoint-6")
    rest = again(start, gradient_accumulation_steps=before, sharding="auto")
    assert together(processes, tmp_path / "out", train, rest, count=after) == [6] * after
    assert_same_losses(tmp_path / "one", out)
    assert [(one.step, damage(one)) for one in list_checkpoints(out)] == [(3, None), (6, None)]
    for path in (tmp_path / "one" / "checkpoint-6").rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(out / path.relative_to(tmp_path / "one"))
        assert {key: tensor.shape for key, tensor in ours.items()} == {
            key: tensor.shape for key, tensor in theirs.items()
        }


@pytest.mark.slow
def test_adapters_of_experts_in_parts_are_begun_and_merged_as_whole_ones(make_checkpoint, corpus, tmp_path, processes):
    model, models = make_checkpoint("llama", **GPT_OSS), []
    for how in ("shard", "replicate"):
        settings = dict(trainable="lora", lora_r=4, sharding=how, learning_rate=0.05, max_steps=2, save_steps=2)
        config = make_config(model, corpus, tmp_path / how, dtype="fp32", **settings)
        assert together(processes, tmp_path / "out", train, config) == [2, 2]
        models.append(load_file(tmp_path / how / "model" / "model.safetensors"))
    assert_same_losses(tmp_path / "replicate", tmp_path / "shard")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.allclose(models[0][name], models[1][name], atol=2e-3), name
        assert not (name.endswith("experts.down_proj") and torch.equal(models[0][name], tensor)), name


def test_a_checkpoint_is_bit_for_bit_what_one_process_would_write(make_checkpoint, corpus, tmp_path, processes):
    """Nothing trains between loading and saving, so nothing may differ, adapters and 8-bit state included."""
    for number, settings in enumerate((dict(optimizer="adamw_8bit", dtype="bf16"), dict(dtype="bf16", **LORA))):
        model = make_checkpoint("llama", dtype=torch.bfloat16)
        one = make_config(model, corpus, tmp_path / f"one-{number}", max_steps=3, **settings)
        loop.train(one)
        two = tmp_path / f"two-{number}"
        shutil.copytree(one.output_dir, two)
        assert together(
            processes, tmp_path / "out", load_and_save, again(one, output_dir=str(two), per_device_train_batch_size=1)
        ) == [None, None]
        for path in (two / "checkpoint-4").rglob("*.safetensors"):
            ours, theirs = load_file(path), load_file(two / "checkpoint-3" / path.relative_to(two / "checkpoint-4"))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert damage(Checkpoint(folder=two / "checkpoint-4", step=4)) is None


def test_an_adapter_alone_and_merged_of_two_processes_are_one_model(make_checkpoint, corpus, tmp_path, processes):
    model = make_checkpoint("gemma", tied=True)
    common = dict(
        trainable="lora", lora_r=4, dtype="fp32", max_steps=3, save_steps=None, learning_rate=1e-2, eval_fraction=0.0
    )
    for merge in (False, True):
        config = make_config(model, corpus, tmp_path / str(merge), merge_lora=merge, **common)
        assert together(processes, tmp_path / "out", train, config) == [3, 3]
    ids = torch.arange(1, 33)[None]
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "False" / "model").eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "True" / "model").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-2)


def load_and_save(config):
    """Write what was loaded under the next step's name."""
    with distributed.joined("cpu") as ranks:
        run = loop.Run(config, loop.Path(config.output_dir), open_device("cpu"), loop.Listener(), ranks)
        run.step += 1
        run.keeper.save(run)


class PatientGPU(VirtualGPU):
    """Waits before each phase: a thread of gloo's may hold a tensor for a moment after the collective is over."""

    def phase(self, name):
        time.sleep(0.05)
        return super().phase(name)


class LettingGo:
    """A gathering of which gloo's thread holds nothing that is booked, as it may for a moment after it is over."""

    def __init__(self, gather, whole, own, how):
        with _disable_current_modes():
            self.whole, self.found = whole, torch.empty_like(whole)
            self.work = gather(self.found, own.clone(), **how)

    def wait(self):
        with _disable_current_modes():
            self.work.wait()
            self.whole.copy_(self.found)


def real_peak(model, config):
    gather = peers.all_gather
    peers.all_gather = lambda whole, own, **how: LettingGo(gather, whole, own, how)
    device = PatientGPU(1 << 40, record_history=True)
    with distributed.joined("cpu") as ranks, device.active():
        play(
            assemble(resolve(model), config, device, fill=True, ranks=ranks),
            config,
            Layout.uniform(LENGTHS, config),
            ranks=ranks,
        )
    return figures(device)


def figures(device):
    profile = device.profile(max_points=None)
    phases = {name: phase.allocated_bytes for name, phase in profile.phases.items()}
    return [
        profile.peak_allocated_bytes,
        profile.peak_reserved_bytes,
        dict(profile.peak_bytes_by_category),
        phases,
    ]


@pytest.mark.parametrize("route", some(MEMORY, "samples", "llama-tied", "qwen", "lora", "nf4"))
def test_each_process_peaks_where_the_rehearsal_says(make_checkpoint, tmp_path, processes, route):
    architecture, tied, settings = MEMORY[route]
    model = str(make_checkpoint(architecture, tied=tied))
    config = make_config(model, "none", "none", **{"dtype": "bf16", "per_device_train_batch_size": 1, **settings})
    fake = virtual_device()
    rehearse(resolve(model), config, fake, kernel="auto", layout=Layout.uniform(LENGTHS, config), gpus=2)
    expected = json.loads(json.dumps(figures(fake)))
    reached = [None, None]
    for attempt in range(3):  # where the machine is busy, a thread of gloo's can hold a tensor past a wait too
        now = together(processes, tmp_path / f"out-{attempt}", real_peak, model, config)
        reached = [was if was == expected else figures for was, figures in zip(reached, now, strict=True)]
        if reached == [expected, expected]:
            break
    assert reached == [expected, expected]


# Ends


def out_of_memory_in_one(config, rank, allocation):
    """Train on GPUs of which that of ``rank`` refuses an allocation."""

    def open_one(name):
        device = VirtualGPU(1 << 30)
        if os.environ["RANK"] == str(rank):
            device.fail_at(allocation)
        return device

    loop.open_device = open_one
    return train(config)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_out_of_memory_in_one_ends_all_with_one_message(make_checkpoint, corpus, tmp_path, processes, rank):
    settings = dict(gpu="virtual:1GiB", eval_fraction=0, recover_from_oom=False)
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", **settings)
    ends = together(processes, tmp_path / "out", out_of_memory_in_one, config, rank, 1000)
    assert ends[rank].startswith(f"TrainingError: process {rank} of 2 ran out of memory (CUDA out of memory.")
    assert "Allocation 1000" in ends[rank]
    assert ends[1 - rank].startswith("TrainingError: another of the 2 processes ended or cannot be reached")
    assert (tmp_path / "out" / f"{rank}.told").read_text() == "False"


def dies(config, rank, name, number):
    """Train, but kill the process ``rank`` in the middle of the ``number``-th call of ``checkpoint`` or ``save``'s ``name``."""
    owner = save if hasattr(save, name) else checkpoint
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def or_die(path, *arguments):
        if next(calls) == number:
            if name == "write_parts":  # half of what it would have written
                with path.open("r+b") as file:
                    file.write(b"\0" * (path.stat().st_size // 2))
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *arguments)

    if os.environ["RANK"] == str(rank):
        setattr(owner, name, or_die)
    return train(config)


DEATHS = {
    "first, with an empty file": (0, "begin_safetensors", 4),
    "first, before the rename": (0, "put_in_place", 2),
    "second, with half a file": (1, "write_parts", 3),
}


@pytest.fixture(scope="module")
def straight(make_checkpoint, corpus, tmp_path_factory):
    """A run of one process that nothing happened to, whose effective batch is that of two with the same settings."""
    out = tmp_path_factory.mktemp("straight")
    one = make_config(make_checkpoint("llama"), corpus, out, dtype="fp32", gradient_accumulation_steps=2)
    loop.train(one)
    return out


@pytest.mark.parametrize("death", some(DEATHS, "second, with half a file"))
def test_killed_while_saving(make_checkpoint, corpus, tmp_path, processes, straight, death):
    """The other process ends by itself; the checkpoint before is whole, and the run ends as one that was never killed."""
    rank, name, number = DEATHS[death]
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", dtype="fp32")
    ends = together(processes, tmp_path / "out", dies, config, rank, name, number)
    assert ends[rank] is None
    assert ends[1 - rank].startswith("TrainingError: another of the 2 processes ended or cannot be reached")
    found = list_checkpoints(tmp_path / "run")
    assert [(one.step, damage(one)) for one in found] == [(3, None)]
    assert together(processes, tmp_path / "out", train, again(config)) == [6, 6]
    assert_same_losses(straight, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".checkpoint*"))


@pytest.mark.slow
def test_killed_at_random_moments(make_checkpoint, corpus, tmp_path, processes):
    """One of two or both, a checkpoint at every step, so that most kills hit a write."""
    chance = random.Random(3)
    kills = 12
    settings = dict(dtype="fp32", max_steps=4 * kills, save_steps=1, save_total_limit=3, eval_fraction=0)
    broken = make_config(make_checkpoint("llama"), corpus, tmp_path / "broken", resume=True, **settings)
    metrics = tmp_path / "broken" / "metrics.jsonl"

    def steps_written():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    for _ in range(kills):
        before = steps_written()
        victims = begin(processes, tmp_path / "out", train, broken)
        while steps_written() <= before and all(victim.is_alive() for victim in victims):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        for victim in chance.choice([victims, victims[:1], victims[1:]]):
            victim.kill()
        ends = end(victims, tmp_path / "out")
        assert all(text is None or text.startswith("TrainingError: another of the 2 processes ended") for text in ends)
        found = list_checkpoints(tmp_path / "broken")
        assert [damage(one) for one in found] == [None] * len(found)
    assert together(processes, tmp_path / "out", train, broken) == [4 * kills] * 2
    one = make_config(broken.model, corpus, tmp_path / "one", **settings, gradient_accumulation_steps=2)
    loop.train(one)
    assert_same_losses(tmp_path / "one", tmp_path / "broken", 1e-4)


def terminated(config, rank):
    """Train, and get SIGTERM in one process after step 2."""

    class Watching(loop.Listener):
        def stepped(self, metrics):
            if metrics["step"] == 2 and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), signal.SIGTERM)

    result = loop.train(config, Watching())
    return [result.interrupted, result.steps]


def test_sigterm_to_one_saves_and_ends_all(make_checkpoint, corpus, tmp_path, processes):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", dtype="fp32")
    assert together(processes, tmp_path / "out", terminated, config, 1) == [[True, 2], [True, 2]]
    assert [(one.step, damage(one)) for one in list_checkpoints(tmp_path / "run")] == [(2, None)]


def terminated_in_a_step(config, rank, call):
    """Train, and get SIGTERM in one process before its ``call``-th loss."""
    original, calls = TrainingStep._loss, iter(range(1, 1000))

    def loss(self, *arguments, **more):
        if next(calls) == call and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **more)

    TrainingStep._loss = loss
    result = loop.train(config)
    return [result.interrupted, result.steps]


@pytest.mark.parametrize("parts", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_step_that_would_outlast_the_grace_of_one_is_abandoned_by_all(
    make_checkpoint, corpus, tmp_path, processes, parts
):
    """Asked for in the first of the two micro-batches of step 3."""
    settings = dict(dtype="fp32", trainable=parts, gradient_accumulation_steps=2, save_steps=1, eval_fraction=0)
    settings |= dict(lora_r=4, quantization="nf4", lora_dropout=0.2) if parts == "lora" else {}
    config = make_config(
        make_checkpoint("llama"), corpus, tmp_path / "run", preemption_grace_s=1e-6, max_steps=4, **settings
    )
    ends = together(processes, tmp_path / "out", terminated_in_a_step, config, 1, 2 * 2 + 1)
    assert ends == [[True, 2], [True, 2]]
    assert together(processes, tmp_path / "out", train, again(config)) == [4, 4]
    one = TrainConfig.from_mapping(
        {**config.to_dict(), "output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 4}
    )
    loop.train(one)
    assert_same_losses(tmp_path / "one", tmp_path / "run")


def bad_once(config, step):
    """Train, but the step ``step`` is judged to be bad the first time."""
    original, asked = BadLoss.judge, []

    def judge(self, number, loss, norm):
        if number == step and not asked:
            asked.append(number)
            self.in_a_row += 1
            return "it is said to be"
        return original(self, number, loss, norm)

    BadLoss.judge = judge
    try:
        return loop.train(config).steps
    finally:
        BadLoss.judge = original


@pytest.mark.parametrize("parts", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_all_rewind_as_one_does(make_checkpoint, corpus, tmp_path, processes, parts):
    settings = dict(dtype="fp32", trainable=parts, on_bad_loss="rewind", max_steps=6)
    settings |= dict(lora_r=4, quantization="nf4", lora_dropout=0.2) if parts == "lora" else {}
    two = make_config(make_checkpoint("llama"), corpus, tmp_path / "two", **settings)
    assert together(processes, tmp_path / "out", bad_once, two, 5) == [6, 6]
    one = TrainConfig.from_mapping(
        {**two.to_dict(), "output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 2}
    )
    assert bad_once(one, 5) == 6
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    answers = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "answer" in line]
        for run in (tmp_path / "one", tmp_path / "two")
    ]
    assert answers[0] == answers[1]
    assert answers[0][0]["blocks"] == [16, 17, 18, 19]


def full_disk_in_one(config, rank):
    """Train, but ``rank`` finds no room whenever it writes its part."""
    if os.environ["RANK"] == str(rank):

        def refuse(path, *arguments):
            raise OSError(28, "No space left on device", str(path))

        save.write_parts = refuse
    return train(config)


def test_a_disk_that_is_full_for_one_ends_all(make_checkpoint, corpus, tmp_path, processes):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", dtype="fp32", save_steps=2)
    ends = together(processes, tmp_path / "out", full_disk_in_one, config, 1)
    assert ends[1].startswith("CheckpointError: the checkpoint of step 4 could not be written: No space left on device")
    assert "process 1: [Errno 28] No space left on device" in ends[0]
    assert sorted((tmp_path / "out" / f"{rank}.told").read_text() for rank in (0, 1)) == ["False", "True"]
    assert not list((tmp_path / "run").glob("*checkpoint*"))


# What cannot be


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(optimizer_in_backward=True), "sharding: replicate can"),
        (dict(trainable="lora", lora_dropout=0.1, mlp_tiles=2), "inside of tiles"),
    ],
)
def test_refused_before_anything_starts(settings, reason):
    with pytest.raises(ConfigError, match=f"^{next(reversed(settings))} cannot be used with several GPUs: .*{reason}"):
        sharding.check(make_config("none", "none", "none", **settings), 2)


def test_sharding_is_refused_where_it_is_not_there(make_checkpoint):
    with pytest.raises(ConfigError, match="^sharding: shard cannot be used here: adafactor needs whole matrices"):
        sharding.check(make_config("none", "none", "none", sharding="shard", optimizer="adafactor"), 2)
    folder = str(make_checkpoint("llama"))
    with pytest.raises(ConfigError, match="^sharding: shard has no effect on one GPU: remove it"):
        assemble(resolve(folder), make_config(folder, "none", "none", sharding="shard"), virtual_device(), fill=False)


def test_refused_of_the_surroundings(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HardwareError, match="torchrun gives each process a GPU of its own"):
        open_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is set by torchrun to a whole number; got 'two'"):
        distributed.world_size()


# The planner


def train_pick(setting, settings, capacity_bytes):
    """Two steps, an evaluation and a save with real tensors inside GPUs of that size."""
    device, config = VirtualGPU(capacity_bytes), setting.config(settings)
    with distributed.joined("cpu") as ranks, device.active():
        parts = assemble(setting.spec, config, device, fill=True, ranks=ranks)
        play(parts, config, ranks=ranks)
    return device.usage().peak_reserved_bytes


@pytest.mark.slow
def test_the_pick_for_two_trains_in_two_and_is_better_than_that_for_one(make_checkpoint, tmp_path, processes):
    folder = make_checkpoint("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    given = {"model": str(folder), "data": "-", "output_dir": "-", "max_seq_length": 64, "tokens_per_step": 512}
    one = Target(
        name="a small GPU",
        capacity_bytes=12 << 20,
        outside_bytes=0,
        workspace_bytes=0,
        compute_capability=(8, 0),
        kernel="auto",
    )
    two = replace(one, gpus=2)
    spec = resolve(str(folder))
    picks = [search(spec, given, target, processes=1) for target in (one, two)]
    assert str(picks[1].picked.quality) == "full, AdamW, fp32 masters"
    assert str(picks[0].picked.quality) != "full, AdamW, fp32 masters"
    assert picks[1].config.tokens_per_step is None
    assert 2 * picks[1].config.blocks_per_step * 64 == 512
    setting = Setting(spec=spec, target=two, base=given)
    peaks = together(processes, tmp_path / "out", train_pick, setting, picks[1].picked.settings, two.capacity_bytes)
    assert peaks == [picks[1].plan.needed_bytes] * 2


@pytest.mark.full_length
def test_where_nothing_else_fits_two_they_stream(make_checkpoint, tmp_path, processes):
    """And train in the memory that the plan says."""
    folder = make_checkpoint("llama", hidden_size=256, intermediate_size=768, num_hidden_layers=8)
    given = {"model": str(folder), "data": "-", "output_dir": "-", "max_seq_length": 64, "tokens_per_step": 128}
    given |= {"trainable": "lora", "lora_r": 4, "dtype": "bf16", "optimizer": "adamw", "weight_precision": "stochastic"}
    given |= {"gradient_checkpointing": True, "offload_optimizer": False, "max_grad_norm": 1.0}
    spec, none = resolve(str(folder)), dict(outside_bytes=0, workspace_bytes=0, margin_bytes=0, host_bytes=None)
    large = replace(target_for("2xRTX4090"), kernel="auto", **none)
    kept = search(spec, given | {"stream_frozen": False}, large, processes=1)
    small = replace(large, capacity_bytes=4 << 20)
    found = search(spec, given, small, processes=1)
    assert kept.config.sharding == "replicate"
    assert found.config.stream_frozen
    assert found.plan.needed_bytes <= small.capacity_bytes < kept.plan.needed_bytes
    setting = Setting(spec=spec, target=small, base=given)
    peaks = together(processes, tmp_path / "out", train_pick, setting, found.picked.settings, small.capacity_bytes)
    assert peaks == [found.plan.needed_bytes] * 2


@pytest.mark.slow
def test_what_fits_each_of_two_is_whole_on_both(make_checkpoint, tmp_path, processes):
    """Which is faster, as nothing is gathered before a layer; and where it does not fit, parts are."""
    folder = make_checkpoint("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    given = {"model": str(folder), "data": "-", "output_dir": "-", "max_seq_length": 64, "tokens_per_step": 512}
    large = replace(target_for("2xT4"), outside_bytes=0, workspace_bytes=0, margin_bytes=0, host_bytes=None)
    spec = resolve(str(folder))
    whole = search(spec, given, large, processes=1)
    assert whole.config.sharding == "replicate"
    parts = search(spec, {**given, "sharding": "shard"}, large, processes=1)
    assert parts.plan.needed_bytes < whole.plan.needed_bytes
    small = replace(large, capacity_bytes=parts.plan.needed_bytes)
    found = search(spec, given, small, processes=1)
    assert found.config.sharding == "auto"
    assert found.picked.quality == whole.picked.quality


def test_a_count_before_the_name_is_a_target():
    one, two = target_for("T4"), target_for("2xT4")
    assert (one.gpus, two.gpus, two.name) == (1, 2, "2 x T4")
    assert two.capacity_bytes == one.capacity_bytes
    assert two.outside_bytes > one.outside_bytes  # NCCL
    assert two.host_bytes == one.host_bytes // 2


def test_a_step_is_shared_out_or_refused():
    config = make_config("none", "none", "none", per_device_train_batch_size=1, tokens_per_step=6 * 64)
    assert sharding.shared(config, 1) is config
    each = sharding.shared(config, 3)
    assert (each.tokens_per_step, each.gradient_accumulation_steps) == (None, 2)
    with pytest.raises(ConfigError, match=r"a multiple of GPUs x .*, 4 x 1 x 64; got 384: use 512"):
        sharding.shared(config, 4)
