"""Running out of memory in one of two real processes: both drop the step, meet again, and end with the weights of the undisturbed one."""

import gc
import os
import random
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_several_gpus import assert_same_losses, make_config, together

from oomless.config import TrainConfig
from oomless.data.loader import Loader, micro_batches
from oomless.data.prepare import prepare
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.models.tokenizer import load_tokenizer
from oomless.techniques import sharding
from oomless.training import distributed, loop
from oomless.training.assemble import assemble
from oomless.training.checkpoint import damage, list_checkpoints
from oomless.training.guard import GoBack, Guard
from oomless.training.step import TrainingStep

IN_BACKWARD = dict(optimizer_in_backward=True, max_grad_norm=None)
MODES = {
    "parts": dict(gradient_accumulation_steps=2),
    "parts, undone": dict(undo_updates=True),
    "nf4": dict(quantization="nf4", trainable="lora", lora_r=4, lora_dropout=0.3),
    "streamed": dict(stream_frozen=True, trainable="lora", lora_r=4, gradient_checkpointing=True),
    "whole": dict(sharding="replicate", optimizer="adafactor"),
    "whole, in backward": dict(sharding="replicate", **IN_BACKWARD),
    "whole, in backward, undone": dict(sharding="replicate", undo_updates=True, **IN_BACKWARD),
}
QUICK = ("parts", "nf4", "whole, in backward, undone")


def tensors(parts):
    """All that a step changes in this process."""
    step, states = parts.step, parts.optimizer.state
    held = [sharding.local(parameter) for parameter in step.parameters]
    return [
        *held,
        *(states[part][name] for part in held for name in states[part]),
        *parts.loss_scale.tensors().values(),
    ]


def in_modes(configs, failing, faults):
    """Return what ``steps_with_faults`` does of each config."""
    gc.freeze()
    with distributed.joined("cpu") as ranks:
        return [steps_with_faults(config, ranks, failing, faults) for config in configs]


def steps_with_faults(config, ranks, failing, faults):
    """Run a step from the same start while an allocation of the process ``failing`` fails, ``faults`` times elsewhere; tell what differs."""
    device, left = VirtualGPU(1 << 30), []
    with device.active():
        with device.host():
            prepared = partial(prepare, config, load_tokenizer(config.model))
            ranks.from_first(lambda: prepared() is None)  # the others find the cache
            blocks = Loader(prepared().train).take(config.blocks_per_step * ranks.count)
            every = list(micro_batches(blocks, config.per_device_train_batch_size))
        batches, tokens = ranks.share(every), sum(batch.target_count for batch in every)
        parts = assemble(resolve(config.model), config, device, fill=True, ranks=ranks)
        guard = Guard.of(config, parts.step, device, lambda _: left.append(device.usage().allocated_bytes))
        with device.host():
            start = [tensor.clone() for tensor in tensors(parts)]

        def step(fault=None):
            with torch.no_grad(), device.host():
                for tensor, value in zip(tensors(parts), start, strict=True):
                    tensor.copy_(value)
            torch.manual_seed(5)
            first = device.allocation_count
            if fault is not None and ranks.rank == failing:
                device.fail_at(first + fault)
            try:
                loss = float(guard.run(batches, tokens).loss)
            except GoBack:  # to the start, which stands for a checkpoint
                return step()
            with device.host():
                after = [tensor.clone() for tensor in tensors(parts)]
            return after, loss, device.allocation_count - first

        step()
        expected, loss, count = step()
        parts.step.abandon()  # what is fetched ahead of the next step as well
        held, wrong = device.usage().allocated_bytes, []
        chance = random.Random(config.sharding)
        count = ranks.from_first(lambda: count)
        places = sorted(chance.sample(range(count), min(faults, count)))
        for place in places:
            found, its_loss, _ = step(place)
            parts.step.abandon()
            same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            now = device.usage().allocated_bytes
            if not same or its_loss != loss or now != held or left != [held]:
                wrong.append([place, same, its_loss - loss, now - held, [one - held for one in left]])
            left.clear()
    return [len(places), wrong]


def configs_of(modes, folder, corpus, out):
    common = dict(gpu="virtual:1GiB", dtype="fp32", eval_fraction=0, max_seq_length=32)
    return [make_config(folder, corpus, out, **{**common, **MODES[mode]}) for mode in modes]


def test_a_fault_in_one_changes_no_bit_in_either(make_checkpoint, corpus, tmp_path, processes):
    configs = configs_of(QUICK, make_checkpoint("llama", num_hidden_layers=2), corpus, tmp_path / "run")
    found = together(processes, tmp_path / "out", in_modes, configs, 1, 5)
    assert found == [[[5, []]] * len(QUICK)] * 2


@pytest.mark.full_length
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_no_fault_in_one_of_three_changes_a_bit(
    make_checkpoint, corpus, tmp_path, processes, mode, failing, record_property
):
    configs = configs_of([mode], make_checkpoint("llama", num_hidden_layers=2), corpus, tmp_path / "run")
    found = together(processes, tmp_path / "out", in_modes, configs, failing, 67, count=3, longest_s=3600)
    assert found == [[[67, []]]] * 3
    record_property("faults", 67)


class Failing(VirtualGPU):
    """Refuses the allocation that comes so many after each call of ``soon``."""

    def soon(self, after):
        self.fail_at(self.allocation_count + after)


def train_with_faults(config, failing, faults, dropped=lambda device: None):
    """Train; memory runs out for the process ``failing`` at the moments that ``faults`` names, so many allocations later.

    An "update" has changed a weight when it begins to fail. ``dropped`` is called there after each attempt that was dropped.
    """
    gc.freeze()
    device, said, fails = Failing(1 << 30), [], os.environ["RANK"] == str(failing)
    left, at = dict(faults) if fails else {}, {"step": 1, "evaluation": 0}
    evaluate, drop, before_update = TrainingStep.evaluate, Guard._drop, Guard._before_update

    def comes(moment):
        if moment in left:
            device.soon(left.pop(moment))

    class Watching(loop.Listener):
        def said(self, message):
            if message.startswith(("out of memory", "back", "there is")):
                said.append(" ".join(message.split()[:7]))

        def prepared(self, facts):
            comes("heaviest")

        def stepped(self, metrics):
            at["step"] = metrics["step"] + 1
            comes(f"step {at['step']}")

    def evaluated(self, batches):
        at["evaluation"] += 1
        comes(f"evaluation {at['evaluation']}")
        return evaluate(self, batches)

    def updated(self, parameter):
        if self._changed:
            comes(f"update {at['step']}")
        before_update(self, parameter)

    def dropped_too(self, *given):
        drop(self, *given)
        if fails:
            dropped(device)

    loop.open_device = lambda name: device
    TrainingStep.evaluate, Guard._drop, Guard._before_update = evaluated, dropped_too, updated
    try:
        return [loop.train(config, Watching()).steps, said]
    finally:
        TrainingStep.evaluate, Guard._drop, Guard._before_update = evaluate, drop, before_update


RUNS = {
    "parts": (
        dict(trainable="lora", lora_r=4, save_steps=2, eval_steps=2),
        {"heaviest": 20, "step 2": 100, "evaluation 2": 20},
        ["out of memory: the step is run", "out of memory: the step is run", "out of memory: the evaluation is run"],
    ),
    "whole, in backward": (
        dict(sharding="replicate", eval_fraction=0, save_steps=2, **IN_BACKWARD),
        {"update 2": 0, "update 4": 0},
        [
            "out of memory after weights had changed:",
            "there is no checkpoint yet: the run",
            "out of memory after weights had changed:",
            "back to checkpoint-2",
        ],
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on(make_checkpoint, corpus, tmp_path, processes, run):
    settings, faults, expected = RUNS[run]
    two = make_config(
        make_checkpoint("llama"),
        corpus,
        tmp_path / "two",
        gpu="virtual:1GiB",
        dtype="fp32",
        **{"max_steps": 4, **settings},
    )
    found = together(processes, tmp_path / "out", train_with_faults, two, 1, faults)
    assert found == [[4, expected]] * 2
    one = {**two.to_dict(), "output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 2, "sharding": "auto"}
    loop.train(TrainConfig.from_mapping(one))
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def nothing_fits(config, failing):
    return train_with_faults(config, failing, {"step 3": 100}, lambda device: device.soon(20))


def test_where_nothing_fits_all_save_and_end(make_checkpoint, corpus, tmp_path, processes):
    """With one message, which names the process that ran out, and a checkpoint of the last good step."""
    settings = dict(gpu="virtual:1GiB", dtype="fp32", save_steps=None, eval_fraction=0, per_device_train_batch_size=1)
    settings |= dict(gradient_checkpointing=True, loss_chunk_bytes=1 << 20)
    config = make_config(make_checkpoint("llama", num_hidden_layers=1), corpus, tmp_path / "run", **settings)
    ends = together(processes, tmp_path / "out", nothing_fits, config, 1)
    assert [end.partition(" (CUDA")[0] for end in ends] == ["TrainingError: process 1 of 2 ran out of memory"] * 2
    assert "False" in [(tmp_path / "out" / f"{rank}.told").read_text() for rank in (0, 1)]
    assert [(one.step, damage(one)) for one in list_checkpoints(tmp_path / "run")] == [(2, None)]


def broken_while_it_recovers(config, failing):
    def broken(device):
        raise RuntimeError("broken")

    return train_with_faults(config, failing, {"heaviest": 20}, broken)


def test_another_failure_while_they_meet_ends_all(make_checkpoint, corpus, tmp_path, processes):
    config = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", gpu="virtual:1GiB", eval_fraction=0)
    ends = together(processes, tmp_path / "out", broken_while_it_recovers, config, 1)
    assert ends[0].startswith("TrainingError: another of the 2 processes ended or cannot be reached")
    assert ends[1] == "RuntimeError: broken"


def learns_while_it_computes():
    """The second process gives up; return what the first, which is in no collective, is told before its next micro-batch."""
    said = None
    with distributed.joined("cpu") as ranks:
        if ranks.first:
            ranks.groups.check()
        ranks.any(False)
        if not ranks.first:
            ranks.groups.leave()
        else:
            while not ranks.groups.is_over():
                time.sleep(0.01)
            try:
                ranks.groups.check()
            except RuntimeError as error:
                said = str(error)
            ranks.groups.leave()
        ranks.groups.meet()
        ranks.groups.check()
        return ranks.groups.tell(said)


def test_who_computes_learns_it_before_the_next_micro_batch(tmp_path, processes):
    told = together(processes, tmp_path / "out", learns_while_it_computes)
    assert told == [["another process gave the step up", None]] * 2


def train_at_the_last_rung(config):
    made = Guard.of

    def at_the_last_rung(*given):
        guard = made(*given)
        guard.standing.level = len(guard.rungs) - 1
        return guard

    Guard.of = at_the_last_rung
    try:
        return loop.train(config).steps
    finally:
        Guard.of = made


def test_moments_become_leaner_in_parts_as_in_the_whole(make_checkpoint, corpus, tmp_path, processes):
    settings = dict(gpu="virtual:1GiB", dtype="fp32", eval_fraction=0, max_steps=3, allow_leaner_optimizer=True)
    two = make_config(make_checkpoint("llama"), corpus, tmp_path / "two", **settings)
    assert together(processes, tmp_path / "out", train_at_the_last_rung, two) == [3, 3]
    one = {**two.to_dict(), "output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 2}
    assert train_at_the_last_rung(TrainConfig.from_mapping(one)) == 3
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    ours, theirs = (
        load_file(tmp_path / name / "checkpoint-3/trainer/optimizer.safetensors") for name in ("one", "two")
    )
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert any(name.endswith("first_moment_scale") for name in ours)


def test_moments_that_would_be_cut_inside_a_block_stay_wide(make_checkpoint, corpus, tmp_path, processes):
    settings = dict(gpu="virtual:1GiB", eval_fraction=0, allow_leaner_optimizer=True)
    three = make_config(make_checkpoint("llama"), corpus, tmp_path / "run", **settings)
    for end in together(processes, tmp_path / "out", train_at_the_last_rung, three, count=3):
        assert end.startswith("ConfigError: allow_leaner_optimizer keeps state in blocks of 256, and ")
        assert end.endswith(" for 3 GPUs: remove it, or use a number of GPUs that divides its rows")
