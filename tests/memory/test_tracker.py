"""The books of storages: against hand counts, against torch's own CPU allocator, and through autograd."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from oomless.memory.tracker import StorageTracker

KIB = 1024


class Ledger:
    """A plain sum of bytes, with the order of events."""

    def __init__(self, capacity_bytes=1 << 40):
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.peak_bytes = 0
        self.events = []

    def allocate(self, size_bytes, operation):
        if self.allocated_bytes + size_bytes > self.capacity_bytes:
            raise torch.OutOfMemoryError(f"no room for {size_bytes}")
        self.allocated_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        self.events.append(size_bytes)
        return size_bytes

    def free(self, allocation):
        self.allocated_bytes -= allocation
        self.events.append(-allocation)


@pytest.fixture(params=["real", "fake"])
def tracked(request):
    """A ledger of what the test creates, with real and with fake tensors."""
    ledger = Ledger()
    if request.param == "real":
        with StorageTracker(ledger):
            yield ledger
    else:
        with FakeTensorMode(), StorageTracker(ledger):
            yield ledger


def kibibyte(count=1):
    return torch.zeros(count * 256)


def test_new_tensors_are_booked_and_released_at_once(tracked):
    first = kibibyte()
    second = kibibyte(3)
    assert tracked.allocated_bytes == 4 * KIB
    del first
    assert tracked.allocated_bytes == 3 * KIB
    del second
    assert tracked.events == [KIB, 3 * KIB, -KIB, -3 * KIB]


def test_views_and_in_place_operators_book_nothing(tracked):
    x = kibibyte()
    views = [
        x.view(16, 16),
        x[3:],
        x.detach(),
        x.expand(5, 256),
        x.view(16, 16).t(),
        *x.split(100),
        x.reshape(8, 32),
    ]
    x.add_(1).mul_(2).zero_()
    x.view(16, 16)[1].copy_(x[:16])
    torch._foreach_add_([x], 1.0)
    assert tracked.events == [KIB]
    del x
    assert tracked.events == [KIB], "the views keep the storage alive"
    del views
    assert tracked.allocated_bytes == 0


@pytest.mark.parametrize(
    ("make", "size_bytes"),
    [
        (lambda: torch.tensor([1.0] * 256), KIB),
        (lambda: torch.as_tensor([1.0] * 256), KIB),
        (lambda: torch.scalar_tensor(1.0), 4),
        (lambda: torch.ones(1).expand(256), 4),
        (lambda: torch.ones(256, dtype=torch.bfloat16).float(), KIB),
        (lambda: nn.Parameter(torch.empty(256)), KIB),
        (lambda: nn.Linear(16, 15, bias=True), KIB - 4),
        (lambda: torch.add(torch.ones(256), 1, out=torch.empty(0)), KIB),
        (lambda: torch.empty(0).resize_(256), KIB),
        (lambda: torch.empty(256).resize_(0), KIB),
        (lambda: torch.empty(4, 64, device="meta"), 0),
        (lambda: torch.zeros(4, 64).topk(32, dim=1), 4 * 32 * (4 + 8)),
        (lambda: torch._foreach_mul([torch.ones(128), torch.ones(128)], 2.0), KIB),
    ],
)
def test_whatever_makes_a_tensor_books_its_storage(tracked, make, size_bytes):
    kept = make()
    assert tracked.allocated_bytes == size_bytes
    del kept
    assert tracked.allocated_bytes == 0


def test_inference_mode_books_what_no_grad_books(tracked):
    """There torch hands composite operators to modes whole: a cast looks like a view, and what a norm makes is not seen."""
    events = []
    for mode in (torch.no_grad, torch.inference_mode):
        tracked.events.clear()
        with mode():
            x = kibibyte().view(4, 64)
            kept = [x.half(), x.t().reshape(-1), nn.functional.linear(x, x), nn.functional.rms_norm(x, (64,))]
            kept.append(nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], x @ x.t()))
            del kept, x
        events.append(list(tracked.events))
    assert events[0] == events[1]
    assert len(events[0]) > 20


def test_memory_from_elsewhere_is_not_booked():
    before = torch.ones(256)
    ledger = Ledger()
    with StorageTracker(ledger):
        view = before.view(16, 16)
        view.add_(1)
        buffer = torch.frombuffer(bytearray(KIB), dtype=torch.uint8)
        parts = buffer.split(100)
    assert ledger.events == []
    del parts


def test_storage_resized_to_nothing_and_back(tracked):
    """FSDP2 frees an unsharded parameter so and refills it; the tensor and its views live on."""
    x = kibibyte()
    view = x.view(16, 16)
    x.untyped_storage().resize_(0)
    assert tracked.allocated_bytes == 0
    view.untyped_storage().resize_(KIB)
    assert tracked.allocated_bytes == KIB
    x.untyped_storage().resize_(2 * KIB)
    assert tracked.events == [KIB, -KIB, KIB, 2 * KIB, -KIB], "CUDA takes the new before it gives the old back"
    del x, view
    assert tracked.allocated_bytes == 0


def test_a_refill_that_does_not_fit_leaves_the_storage_empty():
    ledger = Ledger(capacity_bytes=KIB)
    with StorageTracker(ledger):
        x = kibibyte()
        x.untyped_storage().resize_(0)
        other = kibibyte()
        with pytest.raises(torch.OutOfMemoryError):
            x.untyped_storage().resize_(KIB)
        assert x.untyped_storage().nbytes() == 0
        assert ledger.allocated_bytes == KIB
        del other
        x.untyped_storage().resize_(KIB)
    assert ledger.allocated_bytes == KIB


def test_what_only_autograd_holds_stays_booked_until_backward(tracked):
    w = kibibyte().requires_grad_()
    y = w.exp()
    total = y.sum()
    del y
    assert tracked.allocated_bytes == 2 * KIB + 4, "exp saved its result"
    total.backward()
    assert tracked.allocated_bytes == 2 * KIB + 4, "the saved result is gone, the gradient has come"
    w.grad = None
    assert tracked.allocated_bytes == KIB + 4


def test_storages_that_only_a_cycle_holds_go_with_the_collector(tracked):
    gc.collect()
    cycle = [kibibyte()]
    cycle.append(cycle)
    del cycle
    assert tracked.allocated_bytes == KIB
    gc.collect()
    assert tracked.allocated_bytes == 0


def test_gradient_is_taken_over_not_copied(tracked):
    w = kibibyte().requires_grad_()
    (w * 2.0).sum().backward()
    assert tracked.peak_bytes == 2 * KIB + 8, "w and its gradient; the product died before, the sum and its gradient"
    assert w.grad is not None


def test_gradient_accumulates_in_place(tracked):
    w = kibibyte().requires_grad_()
    for _ in range(3):
        (w * 2.0).sum().backward()
    assert tracked.allocated_bytes == 2 * KIB
    assert tracked.peak_bytes == 3 * KIB + 8


class _SaveExponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * y


def test_custom_functions_are_booked_in_both_directions(tracked):
    w = kibibyte().requires_grad_()
    _SaveExponential.apply(w).sum().backward()
    assert tracked.events[:4] == [KIB, KIB, 4, 4], "w, y, the sum, its gradient"
    assert tracked.events[4] == KIB, "the product in backward"
    assert tracked.allocated_bytes == 2 * KIB


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_booked(tracked, use_reentrant):
    w = kibibyte().requires_grad_()
    y = checkpoint(lambda x: x.exp().exp(), w, use_reentrant=use_reentrant)
    assert tracked.allocated_bytes - 2 * KIB < 64, "w and the output; at most a saved random state besides"
    start = len(tracked.events)
    y.sum().backward()
    recomputed = [size for size in tracked.events[start:] if size == KIB]
    assert len(recomputed) == 4, "two exponentials again, two gradients"


def test_wrapper_subclasses_are_booked_by_their_parts(tracked):
    tracker = torch.utils._python_dispatch._get_current_dispatch_mode_stack()[-1]
    pair = TwoTensor(kibibyte(), kibibyte(2)[:256])
    total = pair + pair
    assert tracked.events == [KIB, 2 * KIB, KIB, KIB]
    assert [booking.size_bytes for booking in tracker.find(pair)] == [KIB, 2 * KIB]
    del pair, total
    assert tracked.allocated_bytes == 0


def test_sparse_gradients_are_booked_by_their_parts():
    ledger = Ledger()
    with StorageTracker(ledger):
        embedding = nn.Embedding(64, 4, sparse=True)
        embedding(torch.tensor([1, 2])).sum().backward()
        assert ledger.allocated_bytes == 64 * 16 + 2 * 8 + 2 * 16
    del embedding
    assert ledger.allocated_bytes == 0


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def _train_residual_network():
    model = nn.Sequential(*[_Residual(64) for _ in range(3)])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        model(torch.randn(32, 64)).exp().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _large(events):
    return [size for size in events if abs(size) > KIB]


def test_books_equal_those_of_the_cpu_allocator_without_the_tracker():
    """Byte for byte and in order; a mode alone would change autograd's in-place sums at the residuals.

    Below 1 KiB the CPU pads scalars, so only larger allocations are compared.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        _train_residual_network()
    memory_events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    ledger = Ledger()
    with StorageTracker(ledger):
        _train_residual_network()
    assert len(_large(ledger.events)) > 100
    assert _large(ledger.events) == _large(event.nbytes() for event in memory_events)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x[torch.zeros(2, dtype=torch.int64)],
        lambda x: x.gather(0, torch.zeros(2, dtype=torch.int64)),
        lambda x: x.max(0).values,
        lambda x: x.topk(2).values,
        lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["index", "gather", "max", "topk", "index_select"],
)
def test_what_autograd_writes_into_its_own_zeros_is_booked_once(tracked, use):
    """Under a mode autograd writes out of place; without one there is one tensor of this size in backward."""
    x = kibibyte().requires_grad_()
    result = use(x).sum()
    del tracked.events[:]
    result.backward()
    assert [size for size in tracked.events if abs(size) == KIB] == [KIB]
    assert x.grad is not None


def test_books_of_indexing_equal_those_of_the_cpu_allocator_without_the_tracker():
    """A tensor that somebody else holds is not taken over: the backward of ``index_put`` copies, with and without a mode."""

    def run():
        index = torch.arange(0, 256, 2)
        x = kibibyte(2).requires_grad_()
        y = (x * 2.0).index_put((index,), torch.ones(128))
        (y[index].sum() + y.gather(0, index).sum()).backward()

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    memory_events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    ledger = Ledger()
    with StorageTracker(ledger):
        run()
    assert _large(ledger.events) == _large(event.nbytes() for event in memory_events)


def test_sums_that_autograd_does_not_do_in_place_are_booked(tracked):
    """A double-backward graph adds out of place, and so does a sum that a formula writes itself."""
    w = kibibyte().requires_grad_()

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            first, second = gradient * 2, gradient * 3
            total = first + second
            return total + first

    Formula.apply(w).sum().backward()
    in_backward = [size for size in tracked.events if abs(size) == KIB]
    assert in_backward == [KIB, KIB, -KIB, KIB, KIB, KIB, KIB, -KIB, -KIB, -KIB]


def test_out_of_memory_drops_the_result_and_keeps_the_books():
    ledger = Ledger(capacity_bytes=3 * KIB)
    with StorageTracker(ledger):
        x = kibibyte()
        with pytest.raises(torch.OutOfMemoryError, match="no room for 1024"):
            torch._foreach_add([x, x, x], 1.0)
        assert ledger.events == [KIB, KIB, KIB, -KIB, -KIB]
        y = x + 1
    assert ledger.allocated_bytes == 2 * KIB
    assert y[0] == 1


def test_an_error_that_is_kept_keeps_no_tensor_alive():
    """CUDA's error comes from C++, where a backward pass's own tensors die with the stack."""
    ledger = Ledger()
    with StorageTracker(ledger):
        w = kibibyte().requires_grad_()
        y = w.exp().exp().exp()
        start = torch.ones(1).expand(256)
        before = ledger.allocated_bytes
        ledger.capacity_bytes = before + KIB
        with pytest.raises(torch.OutOfMemoryError) as caught:
            y.backward(start)
        assert ledger.peak_bytes == before + KIB, "the first product fitted, the second did not"
        assert ledger.allocated_bytes == before
    assert caught.value.__traceback__ is not None


def test_an_error_that_was_handled_is_gone():
    ledger = Ledger(capacity_bytes=2 * KIB)

    def fail():
        on_the_stack = kibibyte()
        return on_the_stack + kibibyte()

    gc.collect()
    gc.disable()
    try:
        with StorageTracker(ledger):
            for _ in range(2):
                try:
                    fail()
                except torch.OutOfMemoryError:
                    pass
                else:
                    pytest.fail("three tensors do not fit")
                assert ledger.allocated_bytes == 0
    finally:
        gc.enable()


class _CollectingLedger(Ledger):
    """Lets a tensor die while it is busy, as Python's collector may at any allocation."""

    def __init__(self):
        super().__init__()
        self.held = []
        self.busy = False

    def allocate(self, size_bytes, operation):
        self.busy = True
        self.held.clear()
        allocation = super().allocate(size_bytes, operation)
        self.busy = False
        return allocation

    def free(self, allocation):
        assert not self.busy
        super().free(allocation)


def test_a_storage_that_dies_inside_the_ledger_waits_its_turn():
    ledger = _CollectingLedger()
    with StorageTracker(ledger):
        ledger.held.append(kibibyte())
        kept = kibibyte(2)
    assert ledger.events == [KIB, 2 * KIB, -KIB]
    del kept
    assert ledger.allocated_bytes == 0


def test_storages_may_die_in_another_thread():
    ledger = Ledger()
    with StorageTracker(ledger):
        held = [kibibyte() for _ in range(100)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        others = [kibibyte() for _ in range(100)]
        thread.join()
    assert ledger.allocated_bytes == 100 * KIB
    del others
    assert ledger.allocated_bytes == 0


def test_the_tracker_keeps_nothing_alive():
    tracker = StorageTracker(Ledger())
    with tracker:
        x = kibibyte()
    gone = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert gone() is not None, "the storage's booking needs it"
    del x
    gc.collect()
    assert gone() is None


def test_fifty_steps_are_flat(tracked):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    held = []
    for _ in range(50):
        model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        held.append(tracked.allocated_bytes)
    parameter_bytes = 4 * (8 * 16 + 16 + 16 * 8 + 8)
    assert set(held) == {3 * parameter_bytes + 4 * 4}, "weights, two moments, and four step counts"


IMPORTS = """
from oomless.memory.tracker import import_unbooked
from oomless.memory.virtual_gpu import VirtualGPU
device = VirtualGPU(1 << 30, fake=True)
with device.active():
    for name in ("peft", "bitsandbytes", "torch.distributed.fsdp"):
        import_unbooked(name)
print(device.allocation_count)
"""


def test_what_is_imported_late_is_not_booked():
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert result.stdout == "0\n", result.stderr
