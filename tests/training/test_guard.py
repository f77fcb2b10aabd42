"""Running out of memory at every allocation of a step: the run goes on, and ends with the weights of the undisturbed one."""

import gc

import pytest
import torch

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import Loader, micro_batches
from oomless.data.prepare import prepare
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import load_tokenizer, resolve
from oomless.training import guard as guard_module
from oomless.training import loop
from oomless.training.assemble import assemble
from oomless.training.checkpoint import save_checkpoint
from oomless.training.guard import Guard, is_out_of_memory, ladder

OPTIMIZERS = {
    "adamw": dict(),
    "adamw_8bit": dict(optimizer="adamw_8bit", weight_precision="correction", dtype="bf16"),
    "adafactor": dict(optimizer="adafactor", weight_precision="stochastic", dtype="bf16"),
    "sgd": dict(optimizer="sgd"),
    "apollo": dict(optimizer="apollo"),
    "apollo_mini": dict(optimizer="apollo_mini"),
    "galore": dict(optimizer="galore"),
    "muon": dict(optimizer="muon"),
    "offload_optimizer": dict(offload_optimizer=True),
    "in_backward": dict(optimizer_in_backward=True),
    "lora_dropout": dict(trainable="lora", lora_dropout=0.5),
    "fp16_in_backward": dict(optimizer_in_backward=True, dtype="fp16"),
}


@pytest.fixture(autouse=True)
def _quick():
    """Steps are too small for threads, and what imports left need not be looked at in each recovery's garbage collection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Bench:
    """One assembled model whose weights and state can be set back, so that a fault costs one step and no build."""

    def __init__(self, folder, corpus, tmp_path, **settings):
        self.device = VirtualGPU(256 << 20)
        self.folder = folder
        self.said = []
        config = TrainConfig(
            model=str(folder),
            data=(DataSource(path=str(corpus)),),
            output_dir=str(tmp_path),
            max_seq_length=32,
            per_device_train_batch_size=2,
            eval_fraction=0.0,
            **{"learning_rate": 1e-3, "dtype": "fp32", **settings},
        )
        blocks = Loader(prepare(config, load_tokenizer(str(folder)), tmp_path / "cache", lambda *_: None).train).take(2)
        self.blocks = blocks
        self.batches = list(micro_batches(blocks, 2))
        with self.device.active():
            self.parts = assemble(resolve(str(folder)), config, self.device, fill=True)
        self.guard = Guard(self.parts.step, self.device, self.said.append, micro_batch=2, undo=True)
        self.start = [tensor.detach().clone() for tensor in self.tensors()]

    def tensors(self):
        parts = self.parts
        states = [parts.optimizer.state[p][name] for p in parts.step.parameters for name in parts.optimizer.state[p]]
        return [*parts.step.parameters, *states, *parts.loss_scale.tensors().values()]

    def step(self, *faults, level=0):
        """Run a step from the start with faults at the given places; return weights and state after it, and its loss."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors(), self.start, strict=True):
                tensor.copy_(value)
        torch.manual_seed(5)
        self.guard.level = level
        with self.device.active():
            first = self.device.allocation_count
            self.device.fail_at(None)
            waiting = [first + fault for fault in faults]
            drop = self.guard._drop

            def and_fail_again(random_state):
                drop(random_state)
                if waiting:
                    self.device.fail_at(self.device.allocation_count + waiting.pop(0) - first)

            self.guard._drop = and_fail_again
            if waiting:
                self.device.fail_at(waiting.pop(0))
            loss = float(self.guard.run(self.batches).loss)
            self.guard._drop = drop
            self.device.fail_at(None)
            count = self.device.allocation_count - first
        return [tensor.detach().clone() for tensor in self.tensors()], loss, count


@pytest.mark.parametrize("stride", [48, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("mode", OPTIMIZERS)
def test_a_fault_at_any_allocation_changes_no_bit(make_checkpoint, corpus, tmp_path, mode, stride):
    width = 1024 if mode == "offload_optimizer" else 96  # only larger matrices' state goes to the host
    folder = make_checkpoint("llama", num_hidden_layers=1, intermediate_size=width)
    bench = Bench(folder, corpus, tmp_path, **OPTIMIZERS[mode])
    bench.step()
    expected, loss, count = bench.step()
    usage = bench.device.usage().allocated_bytes
    faults = [*range(0, count, stride), count - 1]
    for index in faults:
        found, found_loss, _ = bench.step(index)
        assert found_loss == loss, index
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), index
        assert bench.device.usage().allocated_bytes == usage, index
        assert all(parameter.grad is None for parameter in bench.parts.step.parameters)
    assert len(bench.said) == len(faults)


def test_two_faults_in_a_row_take_a_lower_rung(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path, optimizer="sgd")
    expected, loss, count = bench.step()
    for index in range(0, count, 15):
        found, found_loss, _ = bench.step(index, index)
        assert bench.guard.level == 1
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm()) <= 1e-6 * float(other.norm())


@pytest.mark.parametrize("settings", [dict(), dict(optimizer_in_backward=True)], ids=["plain", "in_backward"])
def test_every_rung_is_the_same_step(make_checkpoint, corpus, tmp_path, settings):
    settings |= dict(optimizer="sgd", max_grad_norm=0)
    bench = Bench(make_checkpoint("llama"), corpus, tmp_path, **settings)
    expected, loss, _ = bench.step()
    for level in range(1, len(bench.guard.rungs)):
        found, found_loss, _ = bench.step(level=level)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm()) <= 1e-6 * float(other.norm())
    assert bench.guard.rungs[-1].checkpoint_all
    assert not any(layer.gradient_checkpointing for layer in bench.parts.model.model.layers)


def test_the_ladder_ends_in_the_error(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        bench.step(*[3] * 20)
    assert bench.guard.level == len(bench.guard.rungs) - 1


def test_without_undo_an_error_inside_the_update_is_not_run_again(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path)
    _, _, count = bench.step()
    bench.guard._undo = None
    with pytest.raises(torch.OutOfMemoryError):
        bench.step(count - 1)


def test_evaluation_in_smaller_batches_is_the_same(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path)
    bench.step()
    weights = [tensor.clone() for tensor in bench.tensors()]
    device, guard = bench.device, bench.guard
    with device.active():
        first = device.allocation_count
        expected, tokens = guard.evaluate(bench.blocks, 2)
        for index in range(0, device.allocation_count - first, 5):
            device.fail_at(device.allocation_count + index)
            again, again_tokens = guard.evaluate(bench.blocks, 2)
            assert float(again) == float(expected)
            assert again_tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(bench.tensors(), weights, strict=True)), "an update was undone"


def test_saving_takes_no_byte_of_the_device(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path)
    bench.step()
    parts, device = bench.parts, bench.device
    with device.active():
        device.reset_peak()
        before = device.usage().peak_allocated_bytes
        save_checkpoint(
            tmp_path,
            1,
            model=parts.model,
            tokenizer=load_tokenizer(str(bench.folder)),
            optimizer=parts.optimizer,
            loss_scale=parts.loss_scale,
            state={},
            device=device,
            limit=2,
        )
        assert device.usage().peak_allocated_bytes == before


class Neighbour(loop.Listener):
    """Another process, which takes memory after the third step and gives it back after the sixth."""

    def __init__(self, capacity_bytes=None):
        self.capacity_bytes = capacity_bytes
        self.messages, self.lines = [], []

    def prepared(self, facts):
        self.device = facts.device

    def stepped(self, metrics):
        self.lines.append(metrics)
        if metrics["step"] == 3 and self.capacity_bytes:
            self.device.empty_cache()  # it can take only what this process does not hold
            self.device.set_capacity(self.capacity_bytes)
        if metrics["step"] == 6:
            self.device.set_capacity(1 << 30)

    def said(self, message):
        self.messages.append(message)


def test_a_neighbour_takes_memory_and_gives_it_back(make_checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "STEPS_BEFORE_CLIMBING", 4)
    heard = {}
    capacity_bytes = None
    for name in ("alone", "crowded"):
        config = TrainConfig(
            model=str(make_checkpoint("llama")),
            data=(DataSource(path=str(corpus)),),
            output_dir=str(tmp_path / name),
            gpu="virtual:1GiB",
            dtype="fp32",
            max_seq_length=256,
            per_device_train_batch_size=8,
            loss_chunk_bytes=2 << 20,
            max_steps=16,
            save_steps=5,
            eval_fraction=0.05,
        )
        listener = heard[name] = Neighbour(capacity_bytes)
        loop.train(config, listener)
        line = listener.lines[-1]
        capacity_bytes = (line["memory_bytes"] + line["peak_memory_bytes"]) // 2
    alone, crowded = heard["alone"].lines, heard["crowded"].lines
    assert [line["loss"] for line in crowded] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    rungs = [line.get("recovery_rung", 0) for line in crowded]
    assert rungs[:3] == [0, 0, 0]
    assert max(rungs) > 0
    assert rungs[-1] == 0
    assert any("out of memory" in message for message in heard["crowded"].messages)
    assert all("oom_recoveries" not in line for line in alone)


def test_nothing_to_undo_on_a_cpu(make_checkpoint, corpus, tmp_path):
    config = TrainConfig(
        model=str(make_checkpoint("llama")),
        data=(DataSource(path=str(corpus)),),
        output_dir=str(tmp_path),
        gpu="cpu",
        undo_updates=True,
        max_seq_length=64,
    )
    with pytest.raises(ConfigError, match="undo_updates has no effect on a CPU"):
        loop.train(config)


def test_rungs():
    rungs = ladder(4, 16 << 20, can_checkpoint=True)
    assert [rung.micro_batch for rung in rungs] == [4, 2, 1, 1, 1, 1]
    assert [rung.chunk_bytes >> 20 for rung in rungs] == [16, 16, 16, 4, 1, 1]
    assert [rung.checkpoint_all for rung in rungs] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: out of memory", True),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("expected all tensors to be on the same device", False),
    ],
)
def test_forms_of_the_error(message, expected):
    assert is_out_of_memory(RuntimeError(message)) is expected
