"""A corpus of out-of-memory messages in every form, written from the rules of each form, and read to the byte."""

import itertools
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomless.diagnosis.first_answer import first_answer
from oomless.diagnosis.logs import read, streams
from oomless.diagnosis.messages import find_messages
from oomless.diagnosis.sizes import ByteRange, printed_size

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def size(n):
    """PyTorch's rule for printing a size."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if n > unit:
            return f"{n / unit:.2f} {name}"
    return f"{n} bytes"


CASES = [
    # requested, capacity, allocated, reserved, free, outside
    dict(r=2 * MiB, c=15_843_721_216, a=14_000_000_000, v=14_300_000_000, f=7_405_568, o=120_000_000),
    dict(r=1_050_673_152, c=15_634_661_376, a=9_876_543_210, v=13_958_643_712, f=1_010_000_000, o=500),
    dict(r=2_748_779_069, c=85_000_000_000, a=80_123_456_789, v=80_123_456_789, f=0, o=1024),
]
HINT_OLD = " If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation.  See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF"
HINT_NEW = " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"


def old(n, *, word="reserved in total by PyTorch", head="RuntimeError: CUDA", hint="", allowed=None, gpu=0):
    limit = f"{size(allowed)} allowed; " if allowed else ""
    return (
        f"{head} out of memory. Tried to allocate {size(n['r'])} (GPU {gpu}; {size(n['c'])} total capacity; {size(n['a'])} "
        f"already allocated; {size(n['f'])} free; {limit}{size(n['v'])} {word}){hint}"
    )


def new(
    n,
    *,
    word="capacity",
    head="torch.OutOfMemoryError: CUDA",
    process="this",
    limit=None,
    pools=None,
    gpu=0,
    hint=HINT_NEW,
):
    used = size(n["v"] + n["o"])
    spoken = f"Including non-PyTorch memory, this process has {used} memory in use. "
    if process != "this":
        others = "".join(f"Process {pid} has {size(held)} memory in use. " for pid, held in process)
        spoken = others + (spoken if len(process) > 1 else "")
    allowed = f"{size(limit)} allowed; " if limit else ""
    private = f", with {size(pools)} allocated in private pools (e.g., CUDA Graphs)" if pools else ""
    return (
        f"{head} out of memory. Tried to allocate {size(n['r'])}. GPU {gpu} has a total {word} of {size(n['c'])} of which "
        f"{size(n['f'])} is free. {spoken}{allowed}Of the allocated memory {size(n['a'])} is allocated by PyTorch{private}, and "
        f"{size(n['v'] - n['a'])} is reserved by PyTorch but unallocated.{hint}"
    )


def asynchronous(n):
    return (
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)\n"
        f"Currently allocated     : {size(n['a'])}\nRequested               : {size(n['r'])}\nDevice limit            : "
        f"{size(n['c'])}\nFree (according to CUDA): {size(n['f'])}\nPyTorch limit (set by user-supplied memory fraction)\n"
        "                        : 17179869184.00 GiB"
    )


OLD = {"requested": "r", "capacity": "c", "allocated": "a", "free": "f", "reserved": "v"}
NEW = {"requested": "r", "capacity": "c", "allocated": "a", "free": "f"}
FORMS = {
    "up to 1.3": (lambda n: old(n, word="cached"), OLD),
    "1.4": (old, OLD),
    "1.10, with the hint": (lambda n: old(n, hint=HINT_OLD), OLD),
    "1.13": (lambda n: old(n, head="torch.cuda.OutOfMemoryError: CUDA", hint=HINT_OLD), OLD),
    "HIP": (lambda n: old(n, head="RuntimeError: HIP"), OLD),
    "a limit for the process, old": (lambda n: old(n, allowed=12 * GiB), OLD | {"allowed": 12 * GiB}),
    "GPU 3": (lambda n: old(n, gpu=3), OLD),
    "2.1, misspelt": (
        lambda n: new(n, word="capacty", process=[(2070, n["v"] + n["o"])], head="OutOfMemoryError: CUDA"),
        NEW,
    ),
    "2.2": (lambda n: new(n, process=[(31337, n["v"])], head="torch.cuda.OutOfMemoryError: CUDA"), NEW),
    "2.5": (new, NEW),
    "2.9": (lambda n: new(n, hint=HINT_NEW.replace("PYTORCH_CUDA_ALLOC", "PYTORCH_ALLOC")), NEW),
    "a limit for the process": (lambda n: new(n, limit=11 * GiB), NEW | {"allowed": 11 * GiB}),
    "private pools": (lambda n: new(n, pools=436 * MiB), NEW | {"private_pools": 436 * MiB}),
    "several processes": (lambda n: new(n, process=[(11, 3 * GiB), (12, 5 * GiB + 7)]), NEW),
    "HIP, new": (lambda n: new(n, head="torch.OutOfMemoryError: HIP"), NEW),
    "GPU 1, no hint": (lambda n: new(n, gpu=1, hint=""), NEW),
    "cudaMallocAsync": (asynchronous, NEW),
}
CORPUS = {f"{name}, {number}": (make(n), {k: n.get(v, v) for k, v in fields.items()})
          for name, (make, fields) in FORMS.items() for number, n in enumerate(CASES)}  # fmt: skip


def spread(message):
    return {name: (found.low, found.high) for name, found in message.sizes().items()}


@pytest.mark.parametrize("name", CORPUS)
def test_forms_to_the_byte(name):
    text, expected = CORPUS[name]
    (message,) = find_messages(text)
    assert message.kind == "allocator"
    for field, true in expected.items():
        found = getattr(message, field)
        assert true in found, field
        # Everything in the range is printed so, and nothing beside it.
        number, unit = found.text.split()
        for inside in (found.low, found.high, found.middle):
            rounded = abs(inside / {"bytes": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB}[unit] - float(number))
            assert rounded <= 0.005 + 1e-9
        for outside in (found.low - 1, found.high + 1):
            assert outside < 0 or size(outside) != found.text
    assert message.gpu == (3 if "GPU 3" in name else 1 if "GPU 1" in name else 0)
    if "several" in name:
        assert [(pid, 3 * GiB in found) for pid, found in message.processes] == [(11, True), (12, False)]
        assert message.in_use is not None
    if "reserved" not in expected and "Async" not in name:
        n = CASES[int(name[-1])]
        assert n["v"] in message.reserved_bytes


RELATIVES = [
    ("RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", "driver", "CUDA", None),
    ("RuntimeError: CUDA driver error: out of memory", "driver", "CUDA", None),
    ("RuntimeError: HIP error: out of memory", "driver", "HIP", None),
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate more than 1EB memory.", "allocator", "CUDA", None),
    ("torch.OutOfMemoryError: CUDA out of memory. Allocation was preemptively rejected because it would exceed "
     "per_process_memory_fraction limit. Requested size: 3.00 GiB", "allocator", "CUDA", 3 * GiB),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "library", "cuBLAS", None),
    ("RuntimeError: CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling hipblasCreate", "library", "cuBLAS", None),
    ("RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "library", "cuDNN", None),
    ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", "library", "cuSOLVER", None),
    ("ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 6291456 bytes", "library", "NCCL", 6291456),
    ("Last error:\nCuda failure 2 'out of memory'", "library", "NCCL", None),
    ("Error out of memory at line 380 in file /src/csrc/pythonInterface.c", "library", "bitsandbytes", None),
    ("Error, out of memory at line 70 in file ops.cu", "library", "bitsandbytes", None),
    ("RuntimeError: Triton Error [CUDA]: out of memory", "driver", "Triton", None),
    ("triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 114688, Hardware limit: 101376. "
     "Reducing block sizes or `num_stages` may help.", "kernel", "Triton", 114688),
    ("expandable_segments: memory mapping failed with OOM on device 0", "driver", "CUDA", None),
    ("MPS backend out of memory (MPS allocated: 42.28 GiB, other allocations: 720.00 KiB, max allowed: 42.43 GiB). "
     "Tried to allocate 384.00 MiB on shared pool.", "allocator", "MPS", 384 * MiB),
    ("MPS backend out of memory (MPS allocated: 17.36 GB, other allocations: 613.56 MB, max allowed: 18.13 GB). Tried to "
     "allocate 192.00 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0", "allocator", "MPS", 192 * MiB),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
     "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)", "host", "PyTorch on the host", 17179869184),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
     "234881024 bytes.", "host", "PyTorch on the host", 234881024),
    ("numpy.core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data "
     "type float64", "host", "NumPy", 8_000_000_000),
    ("Traceback ...\nMemoryError", "host", "Python", None),
    ("Loading checkpoint shards: 33%\nKilled", "killed", "the shell", None),
    ("run.sh: line 3: 12345 Killed                  python train.py", "killed", "the shell", None),
    ("container exited with code 137", "killed", "the container", None),
    ("reason: OOMKilled", "killed", "the container", None),
    ("[launch.py:325:sigkill_handler] ['python', 'train.py'] exits with return code = -9", "killed", "the launcher", None),
    ("torch.distributed.elastic: failed (exitcode: -9) local_rank: 0 (pid: 1234)", "killed", "the launcher", None),
    ("Out of memory: Killed process 4321 (python) total-vm:41943040kB", "killed", "the kernel", None),
    ("Your session crashed after using all available RAM.", "killed", "Colab", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "source", "requested"), RELATIVES)
def test_relatives(text, kind, source, requested):
    (message,) = find_messages(text)
    assert (message.kind, message.source) == (kind, source)
    assert message.requested is None if requested is None else requested in message.requested


def test_the_corpus_is_large():
    assert len(CORPUS) + len(RELATIVES) >= 60


DECORATIONS = {
    "colours": lambda text: "\x1b[31m" + text.replace("CUDA", "\x1b[1mCUDA\x1b[0m") + "\x1b[0m",
    "html": lambda text: "<pre><span style='x'>" + text.replace(">>", "&gt;&gt;") + "</span></pre>",
    "wrapped at blanks": lambda text: "\n".join(textwrap.wrap(text, 61)),
    "wrapped by a terminal": lambda text: "\n".join(text[i : i + 80] for i in range(0, len(text), 80)),
    "rank": lambda text: "[rank3]: " + text,
    "carriage returns": lambda text: "10%|#  | 3/30 [00:01<]\r" + text + "\r\n",
    "in a string": lambda text: "['line\\n" + text + "\\n']",
    "twice": lambda text: text + "\nDuring handling of the above exception\n" + text,
}


@pytest.mark.parametrize("decoration", DECORATIONS)
@pytest.mark.parametrize("form", ["1.10, with the hint, 1", "2.5, 1", "several processes, 1", "2.1, misspelt, 0"])
def test_dress_changes_nothing(form, decoration):
    text = CORPUS[form][0]
    (plain,) = find_messages(text)
    (occurrence,) = read(DECORATIONS[decoration](text)).occurrences
    assert occurrence.message.facts() == plain.facts()
    assert occurrence.count == (2 if decoration == "twice" else 1)
    assert occurrence.ranks == ((3,) if decoration == "rank" else ())


def test_ranks_interleaved_line_by_line():
    first, second = CORPUS["2.5, 0"][0], CORPUS["1.13, 1"][0]
    lines = [[f"[rank{rank}]: {line}" for line in ["Traceback (most recent call last):", *textwrap.wrap(text, 70)]]
             for rank, text in enumerate((first, second))]  # fmt: skip
    mixed = "\n".join(line for pair in itertools.zip_longest(*lines) for line in pair if line)
    found = {o.ranks: o.message.facts() for o in read(mixed).occurrences}
    assert found == {(0,): find_messages(first)[0].facts(), (1,): find_messages(second)[0].facts()}
    assert [rank for rank, _ in streams(mixed)] == [0, 1]


def test_nonsense_sizes_are_unknown():
    text = old(CASES[0]).replace(f"{size(CASES[0]['f'])} free", "17179869184.00 GiB free")
    (message,) = find_messages(text)
    assert message.free is None
    assert message.reserved is not None


@pytest.mark.parametrize(
    ("number", "unit", "low", "high"),
    [
        ("2.00", "MiB", 2_091_910, 2_102_394),
        ("1.00", "GiB", GiB + 1, 1_079_110_533),
        ("1024.00", "MiB", 1_073_736_582, GiB),
        ("512", "bytes", 512, 512),
        ("0", "bytes", 0, 0),
        ("2.5", "GB", 2_450_000_000, 2_738_041_651),
    ],
)
def test_ranges(number, unit, low, high):
    found = printed_size(number, unit)
    assert (found.low, found.high) == (low, high)


@pytest.mark.parametrize(("number", "unit"), [("x", "GiB"), ("1.0", "furlong"), ("", "MiB")])
def test_no_sizes(number, unit):
    with pytest.raises(ValueError, match="size"):
        printed_size(number, unit)


ALL_TEXTS = [text for text, _ in CORPUS.values()] + [text for text, *_ in RELATIVES]
NOISE = st.text(alphabet="0123456789. \n;GPUMiBKxo\x1b[m&<>\r\t{}\\\"'", max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cut_mixed_and_noisy_text_never_lends_a_number(data):
    chosen = data.draw(st.lists(st.sampled_from(ALL_TEXTS), min_size=1, max_size=3))
    pieces, allowed = [], set()
    for text in chosen:
        for message in find_messages(text):
            allowed |= {(name, r.text, r.low, r.high) for name, r in message.sizes().items()}
            allowed |= {("process", r.text, r.low, r.high) for _, r in message.processes}
        first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        cut = text[first:second]
        where = data.draw(st.integers(0, len(cut)))
        if data.draw(st.booleans()):
            cut = cut[:where] + "\n" + data.draw(NOISE) + "\n" + cut[where:]
        pieces.append(cut.split("\n"))
    lines = [line for group in itertools.zip_longest(*pieces) for line in group if line is not None]
    text = "\n".join(lines) + data.draw(NOISE)
    for occurrence in read(text).occurrences:
        for name, found in occurrence.message.sizes().items():
            # A size is one that an original says, or (where noise ran into a number) one that stands in the text as it is.
            standing = (found.text, f"Hardware limit: {found.text.removesuffix(' bytes')}.")
            assert (name, found.text, found.low, found.high) in allowed or any(
                said in " ".join(text.split()) for said in standing
            )


@pytest.mark.parametrize(("ending", "read_as"), [("101376.", 101_376), ("101376", None), ("10", None), ("", None)])
def test_a_limit_that_may_be_cut_in_its_digits_is_not_read(ending, read_as):
    (message,) = find_messages(f"out of resource: shared memory, Required: 114688, Hardware limit: {ending}")
    assert (message.requested.low, message.capacity and message.capacity.low) == (114_688, read_as)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CORPUS)), st.data())
def test_a_cut_message_says_a_part_of_the_whole(name, data):
    text = CORPUS[name][0]
    (whole,) = find_messages(text)
    first, second = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    for message in find_messages(text[first:second]):
        assert spread(message).items() <= spread(whole).items()
        assert set(message.processes) <= set(whole.processes)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_can_be_read(text):
    reading = read(text)
    assert all(isinstance(r, ByteRange) for o in reading.occurrences for r in o.message.sizes().values())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", ["130.00", "256.00", "258.00", "512.00", "514.00"])
def test_a_size_that_grows_no_more_with_the_tokens_is_looked_at_once(size):
    """TRL's loss holds chunks of at most 4,096 tokens: a million lengths have the same size."""
    text = (
        'File "/lib/python3.10/site-packages/torch/optim/adamw.py", line 606, in _multi_tensor_adamw\n'
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size} MiB. GPU 0 has a total capacity of 94.99 GiB of which "
        "87.19 MiB is free."
    )
    assert first_answer(text).situation.reading.first is not None
