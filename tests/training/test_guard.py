"""Running out of memory at every allocation of a step: the run goes on, and ends with the weights of the undisturbed one."""

import random
from dataclasses import replace

import pytest
import torch

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import Loader, micro_batches
from oomless.data.prepare import prepare
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models import save
from oomless.models.spec import resolve
from oomless.models.tokenizer import load_tokenizer
from oomless.techniques import block_dropout, frozen_layers, lora
from oomless.training import guard as guard_module
from oomless.training import loop
from oomless.training.assemble import assemble
from oomless.training.checkpoint import save_checkpoint
from oomless.training.guard import GoBack, Guard, is_out_of_memory
from oomless.training.ladder import Rung, ladder

OPTIMIZERS = {
    "adamw": dict(),
    "adamw_8bit": dict(optimizer="adamw_8bit", weight_precision="correction", dtype="bf16"),
    "adafactor": dict(optimizer="adafactor", weight_precision="stochastic", dtype="bf16"),
    "sgd": dict(optimizer="sgd"),
    "apollo": dict(optimizer="apollo"),
    "apollo_mini": dict(optimizer="apollo_mini"),
    "galore": dict(optimizer="galore"),
    "muon": dict(optimizer="muon"),
}
IN_STEPS = OPTIMIZERS | {
    "offload_optimizer": dict(offload_optimizer=True),
    "in_backward": dict(optimizer_in_backward=True),
    "lora_dropout": dict(trainable="lora", lora_dropout=0.5),
    "fp16_in_backward": dict(optimizer_in_backward=True, dtype="fp16"),
}


pytestmark = pytest.mark.usefixtures("frozen_garbage")


class Bench:
    """One assembled model whose weights and state can be set back, so that a fault costs one step and no build."""

    def __init__(self, folder, corpus, tmp_path, *, undo=True, leaner=False, length=32, **settings):
        self.device = VirtualGPU(256 << 20)
        self.folder = folder
        self.said = []
        config = TrainConfig(
            model=str(folder),
            data=(DataSource(path=str(corpus)),),
            output_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
            max_seq_length=length,
            per_device_train_batch_size=2,
            eval_fraction=0.0,
            **{"learning_rate": 1e-3, "dtype": "fp32", **settings},
        )
        blocks = Loader(prepare(config, load_tokenizer(str(folder))).train).take(2)
        self.blocks = blocks
        self.batches = list(micro_batches(blocks, 2))
        with self.device.active():
            self.parts = assemble(resolve(str(folder)), config, self.device, fill=True)
        self.guard = Guard(self.parts.step, self.device, self.said.append, micro_batch=2, undo=undo, leaner=leaner)
        self.start = [tensor.detach().clone() for tensor in self.tensors()]

    def tensors(self):
        parts = self.parts
        states = [parts.optimizer.state[p][name] for p in parts.step.parameters for name in parts.optimizer.state[p]]
        return [*parts.step.parameters, *states, *parts.loss_scale.tensors().values()]

    goes_back = False
    """Whether the start stands for a checkpoint, which a run would go back to."""

    @torch.no_grad()
    def go_to_start(self):
        self.device.wait()
        for tensor, value in zip(self.tensors(), self.start, strict=True):
            tensor.copy_(value)
        torch.manual_seed(5)

    def step(self, *faults, level=0):
        """Run a step from the start with faults at the given places; return weights and state after it, and its loss."""
        self.go_to_start()
        self.guard.standing.level = level
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
            try:
                loss = float(self.guard.run(self.batches).loss)
            except GoBack:
                if self.guard._undo is not None or not self.goes_back:
                    raise
                self.go_to_start()
                self.guard.went_back(1)
                loss = float(self.guard.run(self.batches).loss)
            self.guard._drop = drop
            self.device.fail_at(None)
            count = self.device.allocation_count - first
        return [tensor.detach().clone() for tensor in self.tensors()], loss, count


def assert_no_fault_changes_a_bit(bench, indices):
    """Return the allocations of the step, each of ``indices`` of which failed once."""
    bench.goes_back = True
    bench.step()
    expected, loss, count = bench.step()
    usage = bench.device.usage().allocated_bytes
    faults = indices(count)
    for index in faults:
        found, found_loss, _ = bench.step(index)
        assert found_loss == loss, index
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), index
        assert bench.device.usage().allocated_bytes == usage, index
        assert all(parameter.grad is None for parameter in bench.parts.step.parameters)
    assert len(bench.said) == len(faults)
    return faults


@pytest.mark.parametrize("undo", [True, False], ids=["undone", "gone_back"])
@pytest.mark.parametrize("mode", IN_STEPS)
def test_a_fault_at_any_allocation_changes_no_bit(
    make_checkpoint, corpus, tmp_path, mode, undo, full_length, record_property
):
    width = 1024 if mode == "offload_optimizer" else 96  # only larger matrices' state goes to the host
    folder = make_checkpoint("llama", num_hidden_layers=1, intermediate_size=width)
    bench = Bench(folder, corpus, tmp_path, undo=undo, **IN_STEPS[mode])
    stride, offset = (1, 0) if full_length else (240, 120 * undo)
    faults = assert_no_fault_changes_a_bit(bench, lambda count: [*range(offset, count, stride), count - 1])
    record_property("faults", len(faults))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["adamw", "in_backward"])
def test_a_fault_in_a_larger_model(make_checkpoint, corpus, tmp_path, mode, full_length, record_property):
    folder = make_checkpoint("llama", hidden_size=256, intermediate_size=704, num_hidden_layers=8)
    bench = Bench(folder, corpus, tmp_path, undo=False, length=128, **IN_STEPS[mode])
    chance, sample = random.Random(mode), 300 if full_length else 5
    faults = assert_no_fault_changes_a_bit(bench, lambda count: chance.sample(range(count), sample))
    record_property("faults", len(faults))


def test_two_faults_in_a_row_take_a_lower_rung(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path, optimizer="sgd")
    expected, loss, count = bench.step()
    for index in range(0, count, 15):
        found, found_loss, _ = bench.step(index, index)
        assert bench.guard.standing.level == 1
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for one, other in zip(found, expected, strict=True):
            assert float((one - other).norm()) <= 1e-6 * float(other.norm())


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other.double()).norm()) <= 1e-6 * float(other.double().norm())


MODES = {
    "plain": dict(),
    "in_backward": dict(optimizer_in_backward=True),
    "lora_dropout": dict(trainable="lora+lm_head", lora_dropout=0.5, trainable_changes=dict(attention_dropout=0.3)),
    "some_checkpointed": dict(gradient_checkpointing=True, checkpointed_layers=1),
    "cheap_recompute": dict(cheap_recompute=True),
    "tiles": dict(mlp_tiles=2, cheap_recompute=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_rung_is_the_same_step(make_checkpoint, corpus, tmp_path, mode):
    settings = dict(optimizer="sgd", max_grad_norm=0) | MODES[mode]
    changes = dict(intermediate_size=1024) | settings.pop("trainable_changes", {})
    bench = Bench(make_checkpoint("llama", **changes), corpus, tmp_path, **settings)
    expected, loss, _ = bench.step()
    usage = bench.device.usage().allocated_bytes
    for level in range(1, len(bench.guard.rungs)):
        found, found_loss, _ = bench.step(level=level)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert_close(found, expected)
        moved = sum(
            t.nbytes for p in bench.parts.optimizer._offloaded for t in [bench.parts.optimizer.state[p]["momentum"]]
        )
        assert bench.device.usage().allocated_bytes == usage - moved
        assert bool(moved) == bench.guard.rungs[level].offload_optimizer
    last = bench.guard.rungs[-1]
    assert last.checkpoint_all
    assert last.offload_activations
    assert last.offload_optimizer == (mode != "lora_dropout")
    assert all(
        layer.gradient_checkpointing == (mode == "some_checkpointed") for layer in bench.parts.model.model.layers[:1]
    )
    again, _, _ = bench.step()
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), "the way up leaves something behind"
    assert bench.device.usage().allocated_bytes == usage


def test_masks_of_dropout_belong_to_blocks(make_checkpoint, corpus, tmp_path):
    """Other masks are drawn for other blocks and at the next step, the same ones whatever the micro-batch."""
    bench = Bench(
        make_checkpoint("llama", attention_dropout=0.5),
        corpus,
        tmp_path,
        trainable="full",
        optimizer="sgd",
        momentum=0.0,
    )
    step, (batch,) = bench.parts.step, bench.batches
    twice = replace(
        batch, **{name: getattr(batch, name)[:1].repeat(2, 1) for name in ("input_ids", "labels", "position_ids")}
    )
    twice = replace(twice, document_lengths=batch.document_lengths[:1] * 2)
    with bench.device.active():
        losses = []
        for _ in range(2):
            with bench.device.host():
                parts = list(guard_module.split([twice], 1))
            step._begin(parts)
            losses += [float(step.accumulate([part], 1)) for part in parts]
        assert block_dropout.belongs_to_blocks(bench.parts.model, bench.device)
    assert len(set(losses)) == 4


def test_masks_of_the_adapters_of_experts_belong_to_blocks(make_checkpoint, corpus, tmp_path):
    """Though their rows are sorted by expert: one block at a time, the step is the same."""
    adapted = dict(trainable="lora", lora_dropout=0.5, lora_target_modules="gate_up_proj,down_proj")
    settings = dict(optimizer="sgd", max_grad_norm=0, gradient_checkpointing=True)
    bench = Bench(make_checkpoint("mixtral"), corpus, tmp_path, **settings, **adapted)
    expected, loss, _ = bench.step()
    assert bench.guard.rungs[1].micro_batch == 1
    found, found_loss, _ = bench.step(level=1)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_close(found, expected)


def test_masks_that_do_not_belong_to_blocks_are_seen(make_checkpoint, corpus, tmp_path):
    """A model that calls F.dropout by itself, and one whose MLPs are cut into tiles, are never cut into smaller micro-batches."""
    bench = Bench(make_checkpoint("llama", attention_dropout=0.5), corpus, tmp_path)
    layer = bench.parts.model.model.layers[0]
    forward = type(layer.mlp).forward
    layer.mlp.forward = lambda x: torch.nn.functional.dropout(forward(layer.mlp, x), 0.5)
    with bench.device.active():
        assert not block_dropout.belongs_to_blocks(bench.parts.model, bench.device)
    guard = Guard(bench.parts.step, bench.device, print, micro_batch=8, undo=False, may_split=False)
    assert {rung.micro_batch for rung in guard.rungs} == {8}
    tiled = Bench(make_checkpoint("llama"), corpus, tmp_path, trainable="lora", lora_dropout=0.5, mlp_tiles=2)
    with tiled.device.active():
        assert not block_dropout.belongs_to_blocks(tiled.parts.model, tiled.device)


def test_the_question_about_masks_changes_no_random_number(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama"), corpus, tmp_path, trainable="lora", lora_dropout=0.5)
    before = torch.get_rng_state()
    with bench.device.active():
        assert block_dropout.belongs_to_blocks(bench.parts.model, bench.device)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", IN_STEPS)
def test_a_rehearsed_step_changes_nothing(make_checkpoint, corpus, tmp_path, mode):
    """... be it the first or a later one, and though memory runs out in it."""
    width = 1024 if mode == "offload_optimizer" else 96
    folder = make_checkpoint("llama", num_hidden_layers=1, intermediate_size=width)
    bench = Bench(folder, corpus, tmp_path, **IN_STEPS[mode])
    device, guard = bench.device, bench.guard
    for _ in range(2):
        bench.said.clear()
        torch.manual_seed(5)
        start, random_state = [tensor.detach().clone() for tensor in bench.tensors()], torch.get_rng_state()
        held = device.usage().allocated_bytes
        with device.active():
            first = device.allocation_count
            guard.rehearse(bench.batches)
            count = device.allocation_count - first
            for index in (count // 2, count - 1):
                device.fail_at(device.allocation_count + index)
                guard.rehearse(bench.batches)
                device.fail_at(None)
        assert len(bench.said) == 2
        assert all(torch.equal(a, b) for a, b in zip(bench.tensors(), start, strict=True))
        assert torch.equal(torch.get_rng_state(), random_state)
        assert device.usage().allocated_bytes == held
        assert all(parameter.grad is None for parameter in bench.parts.step.parameters)
        bench.step()


@pytest.mark.parametrize("mode", ["adamw", "muon", "in_backward"])
def test_a_rehearsed_step_asks_for_what_a_step_asks_for(make_checkpoint, corpus, tmp_path, mode):
    bench = Bench(make_checkpoint("llama"), corpus, tmp_path, **IN_STEPS[mode])
    bench.step()
    step, device = bench.parts.step, bench.device
    peaks = []
    with device.active():
        for run in (step.run, step.rehearse):
            device.reset_peak()
            result = run(bench.batches)
            if mode != "in_backward" and run == step.rehearse:  # the peak before the update was reset
                assert 0 < result <= peaks[0] - device.usage().allocated_bytes + step.model.num_parameters() * 4
            else:
                peaks.append(device.usage().peak_allocated_bytes)
            del result
            step.abandon()
    assert len(set(peaks)) == 1


@pytest.mark.parametrize("mode", ["adamw_8bit", "adafactor", "muon", "galore"])
def test_an_update_has_its_memory_before_it_begins(make_checkpoint, corpus, tmp_path, mode):
    """A neighbour that takes all there is once the first weight changes finds the update's memory taken."""
    folder = make_checkpoint("llama", num_hidden_layers=1, intermediate_size=8192)
    bench = Bench(folder, corpus, tmp_path, **IN_STEPS[mode])
    device, guard, optimizer = bench.device, bench.guard, bench.parts.optimizer
    guard._undo = None
    expected, _, _ = bench.step()

    hogs = []

    def crowded(parameter):
        if guard._changed or guard._rehearsing:
            guard._before_update(parameter)
            return
        device.empty_cache()
        device.set_capacity(device.usage().reserved_bytes)
        for size in (8 << 20, 2 << 20, 1 << 19, 1 << 14, 512):
            while True:
                try:
                    hogs.append(torch.empty(size, dtype=torch.uint8))
                except torch.OutOfMemoryError:
                    break
        device.set_capacity(256 << 20)
        guard._before_update(parameter)
        device.set_capacity(device.usage().reserved_bytes)

    optimizer.before_update = crowded
    with pytest.raises(GoBack):  # nothing was measured yet
        bench.step()
    hogs.clear()
    device.set_capacity(256 << 20)
    with device.active():
        guard.rehearse(bench.batches)
    found, _, _ = bench.step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_leaner_optimizer_where_it_is_allowed(make_checkpoint, corpus, tmp_path):
    """The last rung; what it changes is small, stays on the way up, and is in the checkpoint."""
    bench = Bench(make_checkpoint("llama", intermediate_size=1024), corpus, tmp_path, leaner=True)
    rungs = bench.guard.rungs
    assert [rung.leaner_optimizer for rung in rungs] == [False] * (len(rungs) - 1) + [True]
    optimizer, parameters = bench.parts.optimizer, bench.parts.step.parameters
    with bench.device.active():
        bench.guard.run(bench.batches)  # moments that are not zero
        usage = bench.device.usage().allocated_bytes
        for level in (len(rungs) - 1, 0):
            bench.guard.standing.level = level
            bench.guard.run(bench.batches)
        saved = usage - bench.device.usage().allocated_bytes

    def block_bytes(size_bytes):
        return -(-size_bytes // 512) * 512

    large = [parameter.numel() for parameter in parameters if parameter.numel() >= 4096]
    kept = sum(2 * block_bytes(count) + 2 * block_bytes(4 * -(-count // 256)) for count in large)
    assert saved == sum(2 * block_bytes(4 * count) for count in large) - kept
    other = Bench(bench.folder, corpus, tmp_path / "other").parts  # a new optimizer takes what this one has come to
    with bench.device.active():
        for mine, theirs in zip(other.step.parameters, parameters, strict=True):
            other.optimizer.load_state_tensors(mine, optimizer.state_tensors(theirs))
    for mine, theirs in zip(other.step.parameters, parameters, strict=True):
        for name, tensor in optimizer.state_tensors(theirs).items():
            assert torch.equal(other.optimizer.state[mine][name], tensor)
            assert tensor.numel() < 2 or name == "step" or bool(tensor.any())


def test_the_ladder_ends_in_the_error(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        bench.step(*[3] * 20)
    assert bench.guard.standing.level == len(bench.guard.rungs) - 1


def test_without_undo_an_error_after_a_change_goes_back(make_checkpoint, corpus, tmp_path):
    bench = Bench(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path)
    _, _, count = bench.step()
    bench.guard._undo = None
    with pytest.raises(GoBack):
        bench.step(count - 1)
    assert bench.guard.standing.level == 0
    bench.guard.went_back(2)
    with pytest.raises(GoBack):
        bench.step(count - 1)
    assert bench.guard.standing.level == 1


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


SAVED = {
    "full": dict(),
    "tied": dict(),
    "in_backward": dict(optimizer_in_backward=True, dtype="fp16"),
    "offload_optimizer": dict(offload_optimizer=True),
    "lora": dict(trainable="lora+lm_head"),
    "nf4": dict(trainable="lora", quantization="nf4", dtype="bf16"),
    "stream_frozen": dict(trainable="lora", stream_frozen=True),
    "trainable_rows": dict(trainable="lm_head", trainable_rows="5,7-9"),
    "experts": dict(trainable="lora"),
}


@pytest.mark.parametrize("mode", SAVED)
def test_saving_takes_no_copy_of_the_model(make_checkpoint, corpus, tmp_path, mode):
    """No byte of the device: not for a checkpoint, nor for merging adapters or undoing quantisation."""
    folder = make_checkpoint("mixtral" if mode == "experts" else "llama", tied=mode == "tied", intermediate_size=1024)
    bench = Bench(folder, corpus, tmp_path, **SAVED[mode])
    bench.step()
    parts, device = bench.parts, bench.device
    spec = resolve(str(bench.folder))
    tokenizer = load_tokenizer(str(bench.folder))
    with device.active():
        device.reset_peak()
        before = device.usage().peak_allocated_bytes
        save_checkpoint(
            tmp_path,
            1,
            model=parts.model,
            tokenizer=tokenizer,
            optimizer=parts.optimizer,
            loss_scale=parts.loss_scale,
            state={},
            device=device,
            limit=2,
        )
        assert device.usage().peak_allocated_bytes == before
        if frozen_layers.has_frozen_layers(parts.model):
            save.save_model(
                parts.model,
                tmp_path / "m",
                save.model_tensors(parts.model, device, save.original_weights(parts.model, spec.folder, device)),
                device,
            )
        elif parts.model.__dict__.get("peft_config"):
            lora.merge(parts.model, bench.device)
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
    further = ("checkpoint_all", "offload_activations", "offload_optimizer", "leaner_optimizer")
    rungs = ladder(Rung(4, 16 << 20), may_split=True, **dict.fromkeys(further, True))
    assert [rung.micro_batch for rung in rungs] == [4, 2, 1, 1, 1, 1, 1, 1, 1]
    assert [rung.chunk_bytes >> 20 for rung in rungs] == [16, 16, 16, 4, 1, 1, 1, 1, 1]
    for place, name in enumerate(further):
        assert [getattr(rung, name) for rung in rungs] == [False] * (5 + place) + [True] * (4 - place)
    assert len(ladder(Rung(4, 1 << 20), may_split=False, **dict.fromkeys(further, False))) == 1


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
