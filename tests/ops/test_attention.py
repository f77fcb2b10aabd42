"""Packed attention against a T x T mask and against each document alone; its bytes; every kernel in a rehearsal."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import oomless.ops.attention as attention
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.ops import documents
from oomless.ops.attention import attention_kernel, kernel_for, packed_attention

BLOCKS, HEADS, TOKENS, WIDTH = 2, 4, 40, 8
SCALE = WIDTH**-0.5
DOCUMENTS = ((7, 1, 32), (20, 20))
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
VARIANTS = {
    "causal": {},
    "window": dict(sliding_window=5),
    "window of one": dict(sliding_window=1),
    "window between the documents' lengths": dict(sliding_window=20),
    "window longer than any document": dict(sliding_window=100),
    "softcap": dict(softcap=1.5),
    "softcap and window": dict(softcap=1.5, sliding_window=6),
    "sinks": dict(sinks=True),
    "everything": dict(sinks=True, softcap=2.0, sliding_window=9),
}


def make_states(key_heads=HEADS, dtype=torch.float32):
    """Return query, key, value and sinks, laid out as a model's projections leave them, [B, T, H, D] in memory."""
    generator = torch.Generator().manual_seed(0)

    def states(heads):
        made = torch.randn(BLOCKS, TOKENS, heads, WIDTH, generator=generator, dtype=torch.float64)
        return made.to(dtype).transpose(1, 2)

    sinks = torch.randn(HEADS, generator=generator, dtype=torch.float64).to(dtype)
    return states(HEADS), states(key_heads), states(key_heads), sinks


def with_mask(query, key, value, *, document_lengths, scale, sliding_window=None, softcap=None, sinks=None):
    """The plain lines: all T x T scores, and a mask of who may see whom."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    place = torch.arange(query.shape[2])
    document = torch.stack(
        [torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) for sizes in document_lengths]
    )
    visible = (document[:, :, None] == document[:, None, :]) & (place[:, None] >= place[None])
    if sliding_window is not None:
        visible &= place[:, None] - place[None] < sliding_window
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : query.shape[2]]
    return (weights @ value).transpose(1, 2)


def output_and_gradients(function, states, *, sinks=None, **settings):
    leaves = [t.detach().clone().requires_grad_() for t in states]
    settings["sinks"] = leaves[3] if sinks else None
    output = function(*leaves[:3], scale=SCALE, **settings)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    output.backward(direction)
    return [output.detach(), *(leaf.grad for leaf in leaves[: 4 if sinks else 3])]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Scores in one chunk, or three queries at a time."""
    if request.param == "many chunks":
        monkeypatch.setattr(attention, "SCORE_BYTES", 3 * HEADS * TOKENS * 4 * attention.SCORE_COPIES)


# Values and gradients.


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.usefixtures("chunks")
def test_equals_a_mask(variant, key_heads):
    states = make_states(key_heads)
    ours = output_and_gradients(packed_attention, states, document_lengths=DOCUMENTS, **variant)
    expected = output_and_gradients(with_mask, states, document_lengths=DOCUMENTS, **variant)
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_each_document_alone(variant):
    states = make_states(2)
    settings = {**variant, "sinks": states[3] if "sinks" in variant else None}
    ours = packed_attention(*states[:3], document_lengths=DOCUMENTS, scale=SCALE, **settings)
    for block, lengths in enumerate(DOCUMENTS):
        start = 0
        for size in lengths:
            alone = [t[block : block + 1, :, start : start + size] for t in states[:3]]
            expected = packed_attention(*alone, scale=SCALE, **settings)
            torch.testing.assert_close(ours[block : block + 1, start : start + size], expected, **TOLERANCE)
            start += size


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_one_document_per_block_with_or_without_saying_so(variant):
    states = make_states(2)
    whole = ((TOKENS,),) * BLOCKS
    expected = output_and_gradients(with_mask, states, document_lengths=whole, **variant)
    for lengths in (None, whole):
        ours = output_and_gradients(packed_attention, states, document_lengths=lengths, **variant)
        torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_no_less_exact_than_a_mask_in_low_precision(dtype, variant):
    states = make_states(2, dtype)
    exact = [t.float() for t in states]
    truth = output_and_gradients(with_mask, exact, document_lengths=DOCUMENTS, **variant)
    naive = output_and_gradients(with_mask, states, document_lengths=DOCUMENTS, **variant)
    ours = output_and_gradients(packed_attention, states, document_lengths=DOCUMENTS, **variant)
    for true, rough, own in zip(truth, naive, ours, strict=True):
        assert own.dtype == dtype
        eps = torch.finfo(dtype).eps
        tolerance = 5 * eps * true.abs().clamp_min(true.abs().mean()) + eps / 10
        assert ((own.float() - true).abs() <= (rough.float() - true).abs() + tolerance).all()
        assert (own.float() - true).norm() <= 1.2 * (rough.float() - true).norm() + eps


@pytest.mark.parametrize(
    "lengths",
    [
        ((40,), (39,)),
        ((40,), (41,)),
        ((40,),),
        ((40,), (40,), (40,)),
        ((40, 0), (40,)),
        ((50, -10), (40,)),
        ((), (40,)),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit_are_refused(lengths):
    query, key, value, _ = make_states()
    with pytest.raises(ValueError, match="document lengths"):
        packed_attention(query, key, value, document_lengths=lengths, scale=SCALE)


# All documents in one launch. On the CPU its operators run their plain form.

ENDS = documents.starts_of([length for lengths in DOCUMENTS for length in lengths])
LAUNCHES = [
    (kernel, name, key_heads)
    for kernel, windows in (("flash", ["window", "window of one"]), ("efficient", []))
    for name in ("causal", "window longer than any document", *windows)
    for key_heads in (4, 2)
]


@pytest.fixture
def cut(request, monkeypatch):
    """Documents in several launches: what two of one token take is too much for one."""
    monkeypatch.setattr(documents, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(documents, "_rows", lambda count, tokens, longest, kernel: tokens * count)


@pytest.mark.parametrize(("kernel", "variant", "key_heads"), LAUNCHES)
def test_one_launch_equals_a_mask(kernel, variant, key_heads):
    states, settings = make_states(key_heads), {**VARIANTS[variant], "document_lengths": DOCUMENTS}
    expected = output_and_gradients(with_mask, states, **settings)
    with attention_kernel(kernel):
        ours = output_and_gradients(packed_attention, states, document_starts=ENDS, **settings)
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_several_launches_equal_a_mask(kernel):
    lengths = tuple(length for block in DOCUMENTS for length in block)
    assert documents.launches(lengths, kernel, 1) == [slice(0, 3), slice(3, 5)]
    test_one_launch_equals_a_mask(kernel, "causal", 2)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_one_launch_keeps_values_that_are_frozen_or_narrower(kernel):
    query, key, _, _ = make_states()
    value = torch.ones(BLOCKS, HEADS, TOKENS, 16 if kernel == "efficient" else WIDTH)
    key.requires_grad_()
    with attention_kernel(kernel):
        given = dict(document_lengths=DOCUMENTS, document_starts=ENDS, scale=SCALE)
        output = packed_attention(query, key, value, **given)
    output.sum().backward()  # weights sum to one, so that values of one make no gradient
    torch.testing.assert_close(output, torch.ones(BLOCKS, TOKENS, HEADS, value.shape[-1]))
    assert key.grad.abs().max() < 1e-5


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_launches_do_not_grow_with_documents(kernel, count):
    """Of an 8 B model's layer in a block of 2,048 tokens, as of all smaller ones."""
    assert documents.launches([2048 // count] * count, kernel, 32 * 128 * 4) == [slice(0, count)]


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_scratch_is_bounded(kernel):
    lengths = [1000, *[1] * 1048, 20_000, *[3] * 4000]
    row = 32 * 128 * 4
    found = documents.launches(lengths, kernel, row)
    assert [length for part in found for length in lengths[part]] == lengths
    most = max(2 * sum(lengths) * row, documents.SCRATCH_BYTES)
    for part in found:
        rows = documents._rows(part.stop - part.start, sum(lengths[part]), max(lengths[part]), kernel)
        assert rows * row <= most
    assert len(found) < 20


class Answering(TorchDispatchMode):
    """Answers for the memory-efficient kernel's backward, whose form for fake tensors leaves out an argument (torch 2.13)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._efficient_attention_backward.default:
            return (*(torch.empty(state.shape, dtype=state.dtype) for state in args[1:4]), torch.empty(0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_what_cuda_is_asked_for_binds_and_returns_what_is_booked(kernel, window):
    """The calls of PyTorch's own operators, as those are under fake tensors, of bytes that a rehearsal books for ours."""
    lengths = [100, 28, 384]
    how = {"lengths": lengths, "scale": 0.25, "window": window if kernel == "flash" else 0, "flash": kernel == "flash"}
    key_heads = 2 if kernel == "flash" else 4
    with FakeTensorMode(), Answering():
        states = [torch.empty(512, heads, 16, dtype=torch.bfloat16) for heads in (4, key_heads, key_heads)]
        starts = torch.empty(4, dtype=torch.int32)
        asked = documents.attention_of_documents(*states, starts, **how, for_backward=True)
        booked = documents._returned(*states, starts, **how, for_backward=True)
        given = (torch.empty_like(asked[0]), *states, *asked, starts)
        asked += documents.attention_of_documents_backward(*given, **how)
        booked += documents._returned_backward(*given)
    assert [(t.shape, t.stride(), t.dtype) for t in asked] == [(t.shape, t.stride(), t.dtype) for t in booked]


# The kernel of a device is compared with the plain form before anything rests on it.


def wrong(**changes):
    """Return the operator made wrong: it takes what it is given with ``changes``."""

    def operator(*states, starts, **how):
        how |= {name: change(how[name]) for name, change in changes.items() if name in how}
        return documents._plainly(*states, starts=changes.get("starts", lambda same: same)(starts), **how)

    return operator


FAULTS = {
    "documents see each other": wrong(starts=lambda starts: starts[[0, -1]]),
    "one begins late": wrong(starts=lambda starts: starts + torch.tensor([0, 0, 1, 0, 0, 0])),
    "another scale": wrong(scale=lambda scale: scale * 1.1),
    "another window": wrong(window=lambda window: window and window - 1),
}


def ask(windowed=True, dtype=torch.float32, kernel="flash"):
    documents.fault.cache_clear()
    return documents.fault(torch.device("cpu"), dtype, kernel, 16, 16, 2, windowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_fault_is_found_where_none_is(dtype):
    assert ask(dtype=dtype) is None
    assert ask(False, dtype, "efficient") is None


@pytest.mark.parametrize("operator", FAULTS.values(), ids=FAULTS)
def test_a_wrong_kernel_is_found(operator, monkeypatch):
    monkeypatch.setattr(documents, "_attention", operator)
    assert "off by" in ask(dtype=torch.bfloat16)


def test_a_wrong_gradient_is_found(monkeypatch):
    right = documents._plainly_backward
    monkeypatch.setattr(documents, "_attention_backward", lambda *given, **how: (*right(*given, **how)[:2], given[3]))
    assert "gradient of values is off by" in ask()


def test_a_kernel_that_fails_is_left_alone(monkeypatch):
    """CUDA's own operator is asked, which has no form for the CPU: windows are then computed from plain products."""
    settings = dict(document_lengths=((20, 20), (30, 10)), sliding_window=5)
    states, starts = make_states(2), documents.starts_of([20, 20, 30, 10])
    expected = output_and_gradients(with_mask, states, **settings)
    documents.fault.cache_clear()
    monkeypatch.setattr(documents, "_attention", documents.attention_of_documents)
    with attention_kernel("flash"), pytest.warns(UserWarning, match="one by one"):
        ours = output_and_gradients(packed_attention, states, document_starts=starts, **settings)
    assert "aten::_flash_attention_forward" in ask()
    documents.fault.cache_clear()
    torch.testing.assert_close(ours, expected, **TOLERANCE)


# Dropout.


@pytest.mark.parametrize("variant", ["causal", "window", "softcap", "sinks"])
@pytest.mark.usefixtures("chunks")
def test_dropout_is_seeded_and_backward_drops_what_forward_dropped(variant):
    query, key, value, sinks = make_states()
    settings = {**VARIANTS[variant], "sinks": sinks if variant == "sinks" else None}

    def attend(dropout, seed=3):
        torch.manual_seed(seed)
        return packed_attention(query, key, value, document_lengths=DOCUMENTS, scale=SCALE, dropout=dropout, **settings)

    value = value.detach().requires_grad_()
    output = attend(0.5)
    assert torch.equal(output, attend(0.5))
    assert not torch.equal(output, attend(0.5, seed=4))
    assert not torch.allclose(output, attend(0.0))
    direction = torch.randn_like(output)
    torch.manual_seed(99)
    output.backward(direction)
    # The output is linear in the values, with the kept weights as coefficients.
    torch.testing.assert_close((value.grad * value).sum(), (output * direction).sum(), rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean():
    query, key, value, _ = make_states()
    settings = dict(document_lengths=DOCUMENTS, scale=SCALE, softcap=2.0)
    torch.manual_seed(0)
    mean = sum(packed_attention(query, key, value, dropout=0.3, **settings) for _ in range(400)) / 400
    assert (mean - packed_attention(query, key, value, **settings)).abs().mean() < 0.03


# Bytes.

LONG, NARROW = 1024, 16
MANY = ((64,) * 16,)


def book(kernel, lengths, *, fake):
    """Return what attention of 4 heads on 2 holds for backward beside its inputs, and what it held at most."""
    gpu = VirtualGPU(1 << 40, fake=fake)
    with gpu.active(), attention_kernel(kernel):
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, sum(lengths), heads, 16) for heads in (4, 2, 2)]
        states = [torch.randn(shape, generator=None if fake else generator).bfloat16() for shape in shapes]
        states = [state.transpose(1, 2).requires_grad_() for state in states]
        starts = gpu.put(documents.starts_of(lengths))
        held = gpu.usage().allocated_bytes
        output = packed_attention(*states, document_lengths=(lengths,), document_starts=starts, scale=0.25)
        kept = gpu.usage().allocated_bytes - held
        gpu.reset_peak()
        output.backward(output.detach())
        return kept, gpu.usage().peak_allocated_bytes - held


@pytest.mark.parametrize("fake", [True, False], ids=["rehearsed", "run"])
def test_bytes_of_one_launch(fake):
    """Flash keeps its output and a sum for each query and head; the other a sum of the longest for each, and repeated keys and values.

    In backward both hold the queries' gradients in fp32, of 128 rows more for each document or of the longest one's for each.
    """
    lengths, heads = (100, 28, 384, 512), 4
    states = 1024 * heads * 16 * 2
    kept, rows = states + 1024 * heads * 4, 1024 + 4 * 128
    scratch = rows * heads * 4 + rows * heads * 32 * 4 + 2 * states
    assert book("flash", lengths, fake=fake) == (kept, kept + 2 * states + scratch)
    kept, rows = 3 * states + 4 * 512 * heads * 4, 4 * 512
    scratch = 1024 * heads * 4 + rows * heads * 64 * 4
    assert book("efficient", lengths, fake=fake) == (kept, kept + 3 * states + scratch)


def peak(lengths, dtype=torch.float32, *, key_heads=2, fake=False, kernel="auto", tokens=LONG, **settings):
    """Return the most bytes held above query, key and value (2 heads of width 16) in forward and backward."""
    gpu = VirtualGPU(1 << 40, fake=fake)
    with gpu.active():
        query = torch.ones(1, 2, tokens, NARROW, dtype=dtype, requires_grad=True)
        key, value = (torch.ones(1, key_heads, tokens, NARROW, dtype=dtype, requires_grad=True) for _ in range(2))
        if settings.pop("sinks", False):
            settings["sinks"] = torch.ones(2, dtype=dtype, requires_grad=True)
        held = gpu.usage().allocated_bytes
        gpu.reset_peak()
        with attention_kernel(kernel):
            output = packed_attention(query, key, value, document_lengths=lengths, scale=0.25, **settings)
            output.sum().backward()
        assert query.grad.shape == query.shape
        assert key.grad.shape == key.shape
        return gpu.usage().peak_allocated_bytes - held


STATES = 2 * LONG * NARROW * 4  # bytes of query, of key, of value, of output, and of each one's gradient
SQUARE = LONG * LONG  # the least that anything of T x T takes: a byte a pair, for all heads together
CASES = {
    "many documents": (MANY, {}),
    "documents and softcap": (MANY, dict(softcap=5.0)),
    "documents and sinks": (MANY, dict(sinks=True)),
    "documents and window": (MANY, dict(sliding_window=16)),
    "one document": (None, {}),
    "window": (None, dict(sliding_window=64)),
    "softcap": (None, dict(softcap=5.0)),
    "sinks": (None, dict(sinks=True)),
    "softcap, sinks and window": (None, dict(softcap=5.0, sinks=True, sliding_window=64)),
}


@pytest.mark.parametrize(("lengths", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_tokens_times_tokens(lengths, settings, dtype, monkeypatch):
    budget = 512 * 1024
    monkeypatch.setattr(attention, "SCORE_BYTES", budget)
    size = STATES * dtype.itemsize // 4
    # The output and its parts, the gradients of all four, and the sum of a chunk's gradient of the whole key or value.
    most = peak(lengths, dtype, **settings)
    assert most <= budget + 10 * size
    assert most < 2 * SQUARE * 4 / 3  # all scores of both heads, once, in fp32, are three times that


@pytest.mark.parametrize("settings", [dict(sliding_window=32), {}, dict(softcap=5.0)], ids=str)
def test_bytes_grow_with_tokens_and_not_their_square(settings, monkeypatch):
    monkeypatch.setattr(attention, "SCORE_BYTES", 1 << 18)
    short, long = (peak(((64,) * (tokens // 64),), tokens=tokens, **settings) for tokens in (256, 1024))
    assert long < 4.1 * short


@pytest.mark.parametrize(("lengths", "settings"), CASES.values(), ids=CASES)
def test_rehearsal_books_what_the_run_books(lengths, settings, monkeypatch):
    monkeypatch.setattr(attention, "SCORE_BYTES", 128 * 1024)
    short = lengths and (lengths[0][:4],)
    assert peak(short, fake=True, tokens=256, **settings) == peak(short, tokens=256, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_in_a_rehearsal(dtype):
    assert peak(MANY, dtype, fake=True, dropout=0.1, softcap=2.0) == peak(MANY, dtype, dropout=0.1, softcap=2.0)


@pytest.mark.parametrize("kernel", ["flash", "efficient", "math"])
@pytest.mark.parametrize("lengths", [None, MANY], ids=["one document", "many documents"])
@pytest.mark.parametrize("key_heads", [2, 1])
def test_every_kernel_in_a_rehearsal(kernel, lengths, key_heads):
    most = peak(lengths, torch.bfloat16, kernel=kernel, key_heads=key_heads, fake=True)
    scores = 2 * SQUARE * 2  # of both heads, in 16 bits
    assert (most > scores) == (kernel == "math" and lengths is None)


def test_flash_takes_key_heads_as_they_are():
    grouped, repeated = (peak(None, torch.bfloat16, kernel=k, key_heads=1, fake=True) for k in ("flash", "efficient"))
    assert repeated > grouped


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_values_that_are_narrower_than_queries_stay_so_in_a_rehearsal(kernel):
    """As in latent attention, for which a GPU has no flash kernel either."""
    gpu = VirtualGPU(1 << 40, fake=True)
    with gpu.active(), attention_kernel(kernel):
        query, key = (torch.ones(1, 2, 64, 24, dtype=torch.bfloat16) for _ in range(2))
        value = torch.ones(1, 2, 64, 16, dtype=torch.bfloat16)
        assert packed_attention(query, key, value, scale=0.25).shape == (1, 64, 2, 16)


def test_flash_is_left_to_heads_that_it_takes():
    """A model's layers may have heads of several widths, as Gemma 4's, whose rehearsal names one kernel for all."""
    device = torch.device("cpu")
    with attention_kernel("flash"):
        assert attention.choose_kernel(device, torch.bfloat16, 256, 256) == ("flash", True)
        assert attention.choose_kernel(device, torch.bfloat16, 512, 512) == ("efficient", False)


def test_kernel_is_chosen_within_only():
    states = make_states()[:3]
    with attention_kernel("math"):
        inside = packed_attention(*states, scale=SCALE)
        with attention_kernel("auto"):
            assert attention._kernel.get() == "auto"
        assert attention._kernel.get() == "math"
    assert attention._kernel.get() == "auto"
    torch.testing.assert_close(inside, packed_attention(*states, scale=SCALE), **TOLERANCE)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "kernel"),
    [
        ((8, 0), torch.bfloat16, 128, "flash"),
        ((9, 0), torch.float16, 256, "flash"),
        ((12, 0), torch.bfloat16, 64, "flash"),
        ((8, 6), torch.bfloat16, 257, "efficient"),
        ((8, 0), torch.float32, 64, "efficient"),
        ((7, 5), torch.float16, 64, "efficient"),
    ],
    ids=str,
)
def test_kernel_for(capability, dtype, width, kernel):
    assert kernel_for(capability, dtype, width) == kernel
