import pytest
import torch

from oomless import catalogue
from oomless.errors import HardwareError
from oomless.hardware import Hardware, detect, require_dtype, resolve
from oomless.units import GiB


def test_resolve_a_name():
    assert resolve("T4") == Hardware(gpu=catalogue.gpu("T4"))
    assert str(resolve("t4")) == "T4"


@pytest.mark.parametrize("text", ["2xT4", "2 x Tesla T4", "2×t4", "2*T4"])
def test_resolve_several(text):
    assert resolve(text) == Hardware(gpu=catalogue.gpu("T4"), count=2)
    assert str(resolve(text)) == "2 x T4"


@pytest.mark.parametrize("text", ["2x8xT4", "2 x 8 x Tesla T4", "2×8×t4", "2*8*T4"])
def test_resolve_several_machines(text):
    found = resolve(text)
    assert found == Hardware(gpu=catalogue.gpu("T4"), count=16, machines=2)
    assert str(found) == "2 machines of 8 T4"
    assert found.capacity_bytes == resolve("16xT4").capacity_bytes
    assert resolve("1x8xT4") == resolve("8xT4")
    assert resolve("2x2x24GiB").count == 4


def test_resolve_a_size():
    assert resolve("24GiB").gpu.usable_bytes == 24 * GiB
    assert resolve("4x24 GiB").count == 4
    assert resolve("4x4090").gpu.name == "RTX 4090"


def test_resolve_the_cpu():
    assert resolve("CPU") is None


def test_auto_is_what_is_there():
    assert resolve("auto") == detect()
    assert (detect() is None) == (not torch.cuda.is_available() and not torch.backends.mps.is_available())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_detect_reads_the_device():
    found = detect()
    assert found.detected
    assert found.gpu.usable_bytes == torch.cuda.get_device_properties(0).total_memory
    assert found.gpu.capability == torch.cuda.get_device_capability(0)


@pytest.mark.parametrize("text", ["0xT4", "T5000", "", "x", "2x"])
def test_resolve_refuses(text):
    with pytest.raises(HardwareError):
        resolve(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0x8xT4", "number of machines must be at least 1; got 0"),
        ("2x0xT4", "number of GPUs must be at least 1; got 0"),
        ("2x2x2xT4", r"at most two numbers, machines x GPUs, such as 2x8xT4; got 3 in '2x2x2xT4'"),
        ("2x8xT5", "got 'T5'"),
    ],
)
def test_resolve_refuses_machines(text, words):
    with pytest.raises(HardwareError, match=words):
        resolve(text)


def test_capacity_leaves_out_what_lies_outside_the_allocator():
    one, two = resolve("T4"), resolve("2xT4")
    context, nccl = (catalogue.overhead(name, one.gpu) for name in ("context", "nccl"))
    assert one.outside_allocator == (context,)
    assert two.outside_allocator == (context, nccl)
    assert one.capacity_bytes == one.gpu.usable_bytes - context.bytes_expected
    assert two.capacity_bytes == one.capacity_bytes - nccl.bytes_expected
    assert one.capacity_low_bytes < one.capacity_bytes < one.capacity_high_bytes < one.gpu.usable_bytes
    assert resolve("apple:16GiB").capacity_bytes == catalogue.gpu("apple:16GiB").usable_bytes


def test_a_gpu_that_holds_nothing_is_refused():
    with pytest.raises(HardwareError, match=r"more than the 542.72 MiB that lie outside .* got 256.00 MiB"):
        resolve("256MiB")


@pytest.mark.parametrize("name", ["T4", "V100-32GB", "P100", "RTX 2080 Ti"])
def test_bf16_is_refused_before_capability_8(name):
    with pytest.raises(HardwareError, match=r"capability 8.0 or later; .* has [67]\.\d: use fp16"):
        require_dtype(resolve(name), "bf16")
    require_dtype(resolve(name), "fp16")
    require_dtype(resolve(name), "fp32")


@pytest.mark.parametrize("name", ["cpu", "RTX 3060 12GB", "H100", "MI300X", "apple:16GiB", "24GiB"])
def test_bf16_is_accepted_elsewhere(name):
    require_dtype(resolve(name), "bf16")
