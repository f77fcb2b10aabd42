"""After a failure anywhere in a step nothing of it lives on, whatever the technique: the next attempt has all the memory."""

import random
from contextlib import contextmanager, suppress

import pytest
from tests.blank import blank_batch
from tests.techniques.test_pairs import OPTIMIZERS, PAIRS, TECHNIQUES, configure, together

from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.training.assemble import assemble
from oomless.training.guard import GoBack, Guard

LENGTHS = (10, 14)
PHASES = ("forward", "loss", "backward", "optimizer")
MODELS = {
    "dropout": dict(attention_dropout=0.3),
    "experts": dict(architecture="mixtral"),
}
"""The techniques that a model brings along."""
ALL = TECHNIQUES | {"lora dropout": {"trainable": "lora", "lora_dropout": 0.3}} | dict.fromkeys(MODELS, {})
LARGE = {"offloaded optimizer": 1024}
"""Only larger matrices' state goes to the host."""

pytestmark = pytest.mark.usefixtures("frozen_garbage")


class Phased(VirtualGPU):
    """A virtual GPU that knows which allocations each phase asked for."""

    def __init__(self):
        super().__init__(1 << 30)
        self.asked = {}

    @contextmanager
    def phase(self, name):
        first = self.allocation_count
        with super().phase(name):
            yield
        self.asked.setdefault(name, []).extend(range(first, self.allocation_count))


def assert_nothing_lives_on(make_checkpoint, names, faults):
    """Fail ``faults`` allocations of each phase, one in each step, at the first rung and at the last; return how many."""
    settings = together(names) if len(names) == 2 else ALL[names[0]]
    model = dict(architecture="llama", num_hidden_layers=3, vocab_size=1024, attention_dropout=0.0)
    for name in names:
        model |= MODELS.get(name, {}) | ({"intermediate_size": LARGE[name]} if name in LARGE else {})
    device, chance, held, failed = Phased(), random.Random(repr(names)), [], 0
    config = configure(make_checkpoint(**model), settings)
    with device.active():
        parts = assemble(resolve(config.model), config, device, fill=True)
        size = config.per_device_train_batch_size
        batches = [blank_batch(size, LENGTHS, device) for _ in range(config.gradient_accumulation_steps)]
        guard = Guard(
            parts.step, device, lambda _: held.append(device.usage().allocated_bytes), micro_batch=size, undo=False
        )
        for level in {0, len(guard.rungs) - 1}:
            guard.standing.level = level
            for _ in range(2):
                device.asked = {}
                first = device.allocation_count
                guard.run(batches)
            places = {phase: [index - first for index in device.asked.get(phase, ())] for phase in PHASES}
            parts.step.abandon()  # what is fetched ahead of the next step as well
            before = device.usage().allocated_bytes
            assert not held
            for phase, asked in places.items():
                assert asked or config.optimizer_in_backward, phase
                late = asked[len(asked) // 2 :]  # when there is much that could live on
                for place in chance.sample(late, min(faults, len(late))):
                    guard.standing.level = level
                    device.fail_at(device.allocation_count + place)
                    with suppress(GoBack):
                        guard.run(batches)
                    assert held == [before], (phase, place)
                    held.clear()
                    failed += 1
    return failed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in OPTIMIZERS else ()) for name in ALL]
)
def test_nothing_of_a_failed_step_lives_on(make_checkpoint, name, full_length, record_property):
    record_property("faults", assert_nothing_lives_on(make_checkpoint, (name,), 8 if full_length else 1))


@pytest.mark.full_length
@pytest.mark.parametrize("first", TECHNIQUES)
def test_nothing_of_a_failed_step_of_two_techniques_lives_on(make_checkpoint, first, record_property):
    pairs = [pair for pair in PAIRS if pair[0] == first]
    record_property("faults", sum(assert_nothing_lives_on(make_checkpoint, pair, 1) for pair in pairs))
