"""The record of a run: hand-worked categories, who asked for the peak, and its form as JSON."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from oomless.memory.profile import CATEGORIES, MemoryProfile
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.report.plan import held_by

KIB = 1024


class Scale(nn.Module):
    """Multiplies by 256 weights (1 KiB) and takes the exponential, which saves its result (1 KiB)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256))

    def forward(self, x):
        return (x * self.weight).exp()


class Network(nn.Module):
    def __init__(self, checkpointing=False):
        super().__init__()
        self.first, self.second = Scale(), Scale()
        self.checkpointing = checkpointing

    def forward(self, x):
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


@pytest.fixture(params=["real", "fake"])
def gpu(request):
    gpu = VirtualGPU(1 << 30, record_history=True, fake=request.param == "fake")
    with gpu.active():
        yield gpu


def train(gpu, checkpointing=False, steps=1):
    with gpu.phase("load"):
        model = Network(checkpointing)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, foreach=False)
    gpu.watch(model, optimizer)
    for _ in range(steps):
        with gpu.phase("forward"):
            x = torch.zeros(256)
            hidden = model(x)
        with gpu.phase("loss"):
            loss = hidden.square().sum()
        with gpu.phase("backward"):
            loss.backward()
        del x, hidden, loss
        with gpu.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def categories_at_the_end_of(profile, phase):
    """Return the bytes of each category after the last event of the first stretch of ``phase``; no zeros."""
    phases = profile.timeline.phases
    last = next(i for i in range(len(phases)) if phases[i] == phase and phases[i + 1] != phase)
    return {category: values[last] for category, values in profile.timeline.bytes_by_category.items() if values[last]}


def test_categories_worked_out_by_hand(gpu):
    kept = train(gpu)
    profile = gpu.profile(max_points=None)
    weights = {"weights": 2 * KIB}
    assert categories_at_the_end_of(profile, "load") == weights
    # The input, which is saved for the first weight's gradient, and both exponentials.
    assert categories_at_the_end_of(profile, "forward") == weights | {"saved activations": 3 * KIB}
    # The sum; square saves its input, which is there already.
    assert categories_at_the_end_of(profile, "loss") == weights | {
        "saved activations": 3 * KIB,
        "logits and loss": 512,
    }
    assert categories_at_the_end_of(profile, "backward") == weights | {
        "saved activations": 2 * KIB,
        "logits and loss": 512,
        "gradients": 2 * KIB,
    }
    assert categories_at_the_end_of(profile, "optimizer") == weights | {"optimizer state": 2 * KIB}
    del kept


def test_what_dies_in_its_phase_was_temporary_and_a_gradient_was_one_from_birth(gpu):
    kept = train(gpu)
    profile = gpu.profile(max_points=None)
    temporaries = profile.timeline.bytes_by_category["temporaries"]
    by_phase = {
        phase: max(value for value, of in zip(temporaries, profile.timeline.phases, strict=True) if of == phase)
        for phase in profile.phases
    }
    assert by_phase["load"] == by_phase["loss"] == 0
    assert by_phase["forward"] == KIB, "the product, until its exponential is there"
    gradients = profile.timeline.bytes_by_category["gradients"]
    assert sorted(set(gradients)) == [0, KIB, 2 * KIB]
    del kept


def test_recomputed_activations_are_saved_activations(gpu):
    kept = train(gpu, checkpointing=True)
    profile = gpu.profile(max_points=None)
    phases = profile.timeline.phases
    saved = profile.timeline.bytes_by_category["saved activations"]
    at_start = saved[phases.index("backward")]
    in_backward = max(value for value, phase in zip(saved, phases, strict=True) if phase == "backward")
    assert in_backward - at_start >= KIB, "the exponential of the second layer is there again"
    del kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_categories_sum_to_the_total_at_every_event(gpu, checkpointing):
    kept = train(gpu, checkpointing, steps=3)
    profile = gpu.profile(max_points=None)
    timeline = profile.timeline
    assert len(timeline.events) == profile.event_count > 100
    sums = [sum(values) for values in zip(*timeline.bytes_by_category.values(), strict=True)]
    assert sums == list(timeline.allocated_bytes)
    assert min(min(values) for values in timeline.bytes_by_category.values()) == 0
    assert sums[-1] == gpu.usage().allocated_bytes
    assert max(sums) == gpu.usage().peak_allocated_bytes == profile.peak_allocated_bytes
    assert max(timeline.reserved_bytes) == gpu.usage().peak_reserved_bytes == profile.peak_reserved_bytes
    assert sum(profile.peak_bytes_by_category.values()) == profile.peak_allocated_bytes
    del kept


def test_the_peak_names_operation_module_and_phase(gpu):
    with gpu.phase("load"):
        model = nn.Sequential(Scale(), nn.Linear(256, 1024, bias=False), nn.Linear(1024, 16, bias=False))
    gpu.watch(model)
    with gpu.phase("forward"):
        model[1](torch.ones(256, 256))
    peak = gpu.profile().peak
    assert (peak.phase, peak.operation, peak.module) == ("forward", "aten.mm.default", "1")
    assert peak.size_bytes == 256 * 1024 * 4


def test_backward_is_put_down_to_the_module_that_made_the_node(gpu):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
    model[0].requires_grad_(False)
    gpu.watch(model)
    with gpu.phase("forward"):
        total = model(torch.ones(1, 64)).sum()
    with gpu.phase("backward"):
        total.backward()
    peak = gpu.profile().peak
    assert (peak.phase, peak.operation, peak.module) == ("backward", "aten.mm.default", "1")
    assert peak.size_bytes == 64 * 64 * 4


def test_the_model_itself_goes_by_its_class(gpu):
    class Whole(nn.Module):
        def forward(self, x):
            return x.exp()

    model = Whole()
    gpu.watch(model)
    model(torch.ones(256))
    assert gpu.profile().peak.module == "Whole"


def test_module_that_fails_is_left(gpu):
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError

    model = nn.Sequential(Failing())
    gpu.watch(model)
    with pytest.raises(KeyError):
        model(1)
    x = torch.ones(256)
    assert gpu.profile().peak.module == ""
    del x


def test_backward_of_the_loss_is_logits_and_loss(gpu):
    w = torch.ones(256, requires_grad=True)
    with gpu.phase("forward"):
        hidden = w * 2
    with gpu.phase("loss"):
        loss = hidden.exp().sum()
    with gpu.phase("backward"):
        loss.backward()
    profile = gpu.profile(max_points=None)
    in_backward = [
        value
        for value, phase in zip(
            profile.timeline.bytes_by_category["logits and loss"], profile.timeline.phases, strict=True
        )
        if phase == "backward"
    ]
    # The exponential, the sum, its gradient; then the gradient of the exponential.
    assert max(in_backward) == 2 * KIB + 512, "the exponential, the sum, and the gradient of the exponential"


def test_labels_outrank_the_rules_and_the_last_one_holds(gpu):
    with gpu.phase("load"):
        model = Scale()
        packed = torch.zeros(256, dtype=torch.uint8)
        rest = torch.zeros(512, dtype=torch.uint8)
    gpu.label([packed], "temporaries")
    gpu.label([packed.view(16, 16)], "quantisation")
    gpu.watch(model)
    assert gpu.profile().peak_bytes_by_category == dict.fromkeys(CATEGORIES, 0) | {
        "weights": KIB + 512,
        "quantisation": 512,
    }
    del rest


def test_watching_does_not_overwrite_a_label(gpu):
    model = Scale()
    gpu.label(model.parameters(), "quantisation")
    gpu.watch(model)
    assert gpu.profile().peak_bytes_by_category["quantisation"] == KIB


def test_gradients_and_state_set_by_hand_are_found_when_a_phase_ends(gpu):
    model = Scale()
    optimizer = torch.optim.SGD(model.parameters())
    gpu.watch(model, optimizer)
    with gpu.phase("backward"):
        model.weight.grad = torch.ones(256)
    with gpu.phase("load"):
        optimizer.state[model.weight]["momentum_buffer"] = torch.ones(256)
    at_peak = gpu.profile().peak_bytes_by_category
    assert (at_peak["gradients"], at_peak["optimizer state"]) == (KIB, KIB)


def test_watching_anew_forgets_the_old_model(gpu):
    old, new = Scale(), Scale()
    gpu.watch(old)
    gpu.watch(new)
    y = old(torch.zeros(256))
    assert gpu.profile().peak.module == ""
    del y


def test_an_inner_phase_owns_what_is_born_in_it(gpu):
    with gpu.phase("evaluation"):
        with gpu.phase("forward"):
            hidden = torch.ones(256)
        scores = torch.ones(256)
    assert gpu.profile().peak_bytes_by_category == dict.fromkeys(CATEGORIES, 0) | {
        "saved activations": KIB,
        "temporaries": KIB,
    }
    assert list(gpu.profile().phases) == ["evaluation", "forward", "other"]
    del hidden, scores


def test_phase_peaks_are_the_highest_level_while_the_phase_ran(gpu):
    with gpu.phase("load"):
        kept = torch.ones(256)
    with gpu.phase("forward"):
        torch.ones(512)
    with gpu.phase("evaluation"):
        pass
    peaks = gpu.profile().phases
    assert peaks["load"].allocated_bytes == KIB
    assert peaks["forward"].allocated_bytes == 3 * KIB
    assert peaks["evaluation"].allocated_bytes == KIB
    assert peaks["evaluation"].reserved_bytes >= peaks["forward"].allocated_bytes
    del kept


def test_failures_are_on_record(gpu):
    gpu.fail_at(gpu.allocation_count)
    with gpu.phase("forward"), pytest.raises(torch.OutOfMemoryError):
        torch.ones(256)
    (failure,) = gpu.profile().failures
    assert (failure.phase, failure.operation, failure.size_bytes) == ("forward", "aten.ones.default", KIB)


def test_what_a_crowded_device_holds_beyond_its_tensors():
    gpu = VirtualGPU(1 << 30, outside_bytes=100 << 20, record_history=True)
    with gpu.active():
        kept = torch.ones(256)
    profile = gpu.profile()
    assert profile.capacity_bytes == 1 << 30
    assert profile.outside_bytes == 100 << 20
    assert profile.cached_bytes == gpu.usage().reserved_bytes - KIB
    del kept


def test_a_thinned_timeline_keeps_the_peak(gpu):
    kept = train(gpu, steps=3)
    whole, thin = gpu.profile(max_points=None), gpu.profile(max_points=7)
    assert len(thin.timeline.events) == 7
    assert max(thin.timeline.allocated_bytes) == whole.peak_allocated_bytes
    assert replace(thin, timeline=whole.timeline) == whole
    at = thin.timeline.events[3]
    for category in CATEGORIES:
        assert thin.timeline.bytes_by_category[category][3] == whole.timeline.bytes_by_category[category][at]
    highest = thin.timeline.events.index(whole.peak.event)
    assert (thin.timeline.operations[highest], thin.timeline.modules[highest]) == (
        whole.peak.operation,
        whole.peak.module,
    )
    said = held_by(thin).moments[highest]
    assert said.startswith(f"{whole.peak.phase}: {whole.peak.operation}")
    del kept


def test_the_holders_at_the_peak_are_named_and_sum_to_it(gpu):
    """Weights, gradients and state by the tensor that they belong to, the rest by who asked."""
    kept = train(gpu, steps=2)
    profile = gpu.profile()
    held = profile.peak_holders
    assert {category: sum(one.size_bytes for one in holders) for category, holders in held.items()} == {
        category: size for category, size in profile.peak_bytes_by_category.items() if size
    }
    both = {("first.weight", 1, KIB), ("second.weight", 1, KIB)}
    for category in ("weights", "optimizer state"):
        assert {(one.name, one.allocations, one.size_bytes) for one in held[category]} == both, category
    assert {one.name for one in held["saved activations"]} >= {"aten.exp.default in first"}
    named = {name for name in gpu.profile(max_points=None).timeline.tensors if name}
    assert named == {"first.weight", "second.weight"}
    del kept


def test_what_is_not_among_the_largest_is_counted(gpu):
    with gpu.phase("load"):
        model = nn.ModuleList(nn.Linear(128 * width, 1, bias=False) for width in range(1, 41))
    gpu.watch(model)
    *largest, rest = gpu.profile().peak_holders["weights"]
    assert [one.name for one in largest][:2] == ["39.weight", "38.weight"]
    assert (rest.name, rest.allocations) == ("", 40 - len(largest))
    del model


def test_json_round_trip(gpu):
    kept = train(gpu)
    gpu.fail_at(gpu.allocation_count)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(256)
    profile = gpu.profile()
    assert MemoryProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    del kept


def test_empty_record_round_trip():
    profile = VirtualGPU(1 << 30, record_history=True).profile()
    assert profile.peak is None
    assert profile.peak_allocated_bytes == profile.cached_bytes == 0
    assert MemoryProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize("broken", [{}, {"timeline": 3}, {"unknown": 1}])
def test_what_is_no_profile_is_refused(broken):
    plain = VirtualGPU(1 << 30, record_history=True).profile().to_dict()
    with pytest.raises(ValueError, match="the fields that to_dict writes"):
        MemoryProfile.from_dict(plain | broken if broken else {})


def test_without_history_there_is_no_profile():
    gpu = VirtualGPU(1 << 30)
    with gpu.active(), gpu.phase("forward"):
        gpu.watch(Scale())
        gpu.label([torch.ones(1)], "weights")
    with pytest.raises(RuntimeError, match="record_history=True"):
        gpu.profile()
