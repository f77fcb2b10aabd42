"""What trials tell about strategies that were not tried, beside trials of these."""

import itertools

import pytest

from oomless.memory.work import Work
from oomless.models.spec import resolve
from oomless.planning.known import Known
from oomless.planning.plan import Target
from oomless.planning.trial import Setting, Trial, state_bytes, try_out
from oomless.planning.trial import measure_parts as parts_of

MiB = 1 << 20
OPTIMIZERS = [
    {"optimizer": "adamw", "weight_precision": "master"},
    {"optimizer": "adamw_8bit", "weight_precision": "stochastic", "offload_optimizer": True},
    {"optimizer": "adafactor", "weight_precision": "correction"},
]
RUNGS = [
    {"cheap_recompute": True},
    {"cheap_recompute": True, "gradient_checkpointing": True, "mlp_tiles": 4},
]
SIZE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def setting(make_checkpoint):
    folder = make_checkpoint("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=1024)
    target = Target(
        name="64 MiB",
        capacity_bytes=64 * MiB,
        outside_bytes=0,
        workspace_bytes=0,
        compute_capability=(8, 0),
        kernel="auto",
    )
    base = {"model": str(folder), "data": "-", "output_dir": "-", "max_seq_length": 128, "packing": "concatenate"}
    return Setting(spec=resolve(str(folder)), target=target, base=base)


@pytest.fixture(scope="module", params=["full", "lora+embed_tokens+lm_head"])
def trials(request, setting):
    """Every optimizer with every rung: settings, trial, and the bytes of weights, state and gradients."""
    trainable, found = request.param, []
    built = parts_of(setting, {"trainable": trainable, "optimizer": "adamw"})
    for optimizer, rung in itertools.product(OPTIMIZERS, RUNGS):
        settings = {"trainable": trainable, **optimizer, **SIZE, **rung}
        total, movable = state_bytes(built.trainable, optimizer["optimizer"], settings["weight_precision"])
        fixed = built.weight_bytes + built.trainable_bytes + total - movable * ("offload_optimizer" in settings)
        trial = try_out(setting, settings, limited=False)
        assert trial.fits
        found.append((settings, trial, fixed))
    return found


def test_the_work_of_a_strategy_is_that_of_the_passes_of_one_and_the_update_of_another(trials):
    known = Known(64 * MiB)
    rows = [trials[index : index + len(RUNGS)] for index in range(0, len(trials), len(RUNGS))]
    assert known.work(rows[0][0][0]) is None
    for settings, trial, fixed in [*rows[0], *(row[0] for row in rows[1:])]:
        known.learn(settings, trial, fixed)
    for settings, trial, _ in trials:
        assert known.work(settings) == Work.from_dict(trial.work), settings


def test_what_offloading_adds_is_no_part_of_the_least(trials):
    known = Known(64 * MiB)
    on_host = next(entry for entry in trials if "offload_optimizer" in entry[0])
    settings = {name: value for name, value in on_host[0].items() if name != "offload_optimizer"}
    known.learn(settings, *trials[0][1:])
    assert known.work(on_host[0]) is None
    assert known.least_work(on_host[0]) == known.work(settings)


def test_with_something_on_the_host_passes_hold_no_less(trials):
    settings, trial, fixed = trials[0]
    known = Known(trial.passes_bytes * 15 // 16)
    for place in ("offload_optimizer", "embeddings_on_host", "stream_frozen"):
        moved = settings | {place: True}
        assert not known.asks_too_much(moved, fixed)
        assert not known.tells(settings)
    known.learn(settings, trial, fixed)
    assert known.tells(settings)
    assert known.asks_too_much(settings, fixed)
    for place in ("offload_optimizer", "embeddings_on_host", "stream_frozen"):
        assert known.asks_too_much(settings | {place: True}, fixed)
        assert not known.asks_too_much(settings | {place: True}, fixed - trial.passes_bytes // 8)


def test_passes_hold_the_same_whatever_the_optimizer_is_and_so_some_are_known_not_to_fit(trials):
    for (settings, trial, fixed), (others, other, others_fixed) in itertools.permutations(trials, 2):
        if settings.get("mlp_tiles") != others.get("mlp_tiles"):
            continue
        expected = trial.passes_bytes - fixed + others_fixed
        assert abs(expected - other.passes_bytes) <= other.passes_bytes // 64
        ladder = [others, others | {"gradient_checkpointing": True, "offload_activations": True}]
        for usable, first in ((other.passes_bytes, 0), (other.passes_bytes * 15 // 16, 1)):
            known = Known(usable)
            assert known.first_possible(ladder, others_fixed) == 0
            known.learn(settings, trial, fixed)
            assert known.first_possible(ladder, others_fixed) == first
            assert known.first_possible(ladder[:1], others_fixed) == 0  # the leanest is tried


def test_what_is_tried_first_is_guessed_and_a_wrong_guess_is_not_repeated():
    ladder = [{"trainable": "full", "checkpointed_layers": count} for count in range(12)]
    known = Known(100)
    assert known.probes(ladder, 40, -1, 12, at_once=2) == [0, 1]  # nothing is known
    assert known.probes(ladder, 40, 1, 12, at_once=2) == [4, 8]  # nor of what did not fit
    assert known.probes(ladder, 40, 8, 12, at_once=2) == [10, 11]
    assert known.probes(ladder[:2], 40, -1, 2, at_once=2) == [0, 1]
    assert known.probes(ladder[:1], 40, -1, 1, at_once=2) == [0]
    for count, beyond in ((0, 200), (4, 70), (6, 60), (11, 20)):
        known.learn({**ladder[count], "trainable": "lora"}, trial(needed_bytes=beyond), 0)
    assert known.probes(ladder, 40, -1, 12, at_once=2) == [5, 6]
    assert known.probes(ladder, 40, -1, 12, at_once=1) == [5, 6]
    assert known.probes(ladder, 28, -1, 12, at_once=2) == [3, 4]  # as 4 and 6 go on, not as 0 and 4
    assert known.probes(ladder, 90, -1, 12, at_once=2) == [4, 8]  # leaner than all that is known
    assert known.probes(ladder, 40, 6, 11, at_once=2) == [8, 9]  # 6 was to fit: halves from here on
    known.learn(ladder[6], trial(needed_bytes=65), 0)
    assert known.probes(ladder, 40, -1, 12, at_once=2) == [6, 7]  # what the same parts needed counts for more


def trial(needed_bytes):
    return Trial(fits=True, needed_bytes=needed_bytes, passes_bytes=needed_bytes)
