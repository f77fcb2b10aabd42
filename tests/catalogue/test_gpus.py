import subprocess
import sys

import pytest

from oomless import catalogue
from oomless.catalogue._data import read_yaml
from oomless.errors import HardwareError
from oomless.units import GiB, MiB

NAMES = [gpu.name for gpu in catalogue.gpus()]


def test_there_are_enough():
    assert len(NAMES) >= 30
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("gpu", catalogue.gpus(), ids=NAMES)
def test_entries_are_plausible(gpu):
    assert 0.92 * gpu.total_bytes < gpu.usable_bytes < gpu.total_bytes
    assert 100e9 < gpu.bandwidth_bytes_per_s < 10e12
    assert gpu.source
    assert gpu.usable_source
    rates = gpu.peak_flops
    assert 1e12 < rates["fp32"] <= rates["fp16"] < 1e16
    assert ("bf16" in rates) == ("tf32" in rates) == gpu.supports_bf16
    if gpu.supports_bf16:
        assert rates["bf16"] == rates["fp16"] == pytest.approx(2 * rates["tf32"], rel=0.02)
    assert ("fp8" in rates) == (gpu.capability >= (8, 9))
    if "fp8" in rates:
        assert rates["fp8"] == pytest.approx(2 * rates["fp16"], rel=0.02)


@pytest.mark.parametrize("gpu", catalogue.gpus(), ids=NAMES)
def test_every_spelling_finds_its_entry(gpu):
    for spelling in (gpu.name, gpu.name.lower(), gpu.name.replace(" ", "").replace("-", ""), gpu.name + " "):
        assert catalogue.gpu(spelling) == gpu
    for alias in gpu.aliases:
        try:
            assert catalogue.gpu(alias) == gpu
        except HardwareError as error:
            assert repr(gpu.name) in str(error)  # noqa: PT017  an alias of several sizes names them all


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("T4", "T4"),
        ("Tesla T4", "T4"),
        ("rtx 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("A100-40G", "A100-40GB"),
        ("a100 80gb", "A100-80GB"),
        ("rtx 4060-ti 16 g", "RTX 4060 Ti 16GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("mi300x", "MI300X"),
    ],
)
def test_spellings(spelling, name):
    assert catalogue.gpu(spelling).name == name


def test_a_name_of_several_sizes_is_refused():
    with pytest.raises(HardwareError, match="several memory sizes: use one of 'RTX 3060 8GB', 'RTX 3060 12GB'"):
        catalogue.gpu("RTX 3060")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(HardwareError, match="got 'RTX 4091'. Did you mean 'RTX 4090'?"):
        catalogue.gpu("RTX 4091")


@pytest.mark.parametrize("text", ["4096", "24", "apple:24", "-1GiB", ""])
def test_a_size_needs_its_unit(text):
    with pytest.raises(HardwareError):
        catalogue.gpu(text)


def test_a_size_is_a_gpu():
    gpu = catalogue.gpu("14.5 GiB")
    assert gpu.usable_bytes == gpu.total_bytes == int(14.5 * GiB)
    assert gpu.capability == (8, 0)
    assert "assumed" in gpu.source
    assert gpu.bandwidth_bytes_per_s is None
    assert not gpu.peak_flops
    assert gpu.host_link_bytes_per_s is None


def test_apple_memory_is_partly_usable():
    small, large = catalogue.gpu("apple:16GiB"), catalogue.gpu("Apple:64GiB")
    assert small.usable_bytes == 16 * GiB * 2 // 3
    assert large.usable_bytes == 48 * GiB
    assert small.supports_bf16
    assert small.capability is None
    assert catalogue.overheads(small) == ()


def test_host_link():
    assert catalogue.gpu("T4").host_link_bytes_per_s == pytest.approx(15.75e9, rel=1e-3)
    assert catalogue.gpu("RTX 4060").host_link_bytes_per_s == pytest.approx(15.75e9, rel=1e-3)
    assert catalogue.gpu("H100").host_link_bytes_per_s == pytest.approx(63.0e9, rel=1e-3)


def test_recognise_takes_memory_from_the_device():
    gpu = catalogue.recognise("NVIDIA GeForce RTX 4060 Ti", 15_900 * MiB, (8, 9))
    assert gpu.name == "RTX 4060 Ti 16GB"
    assert gpu.usable_bytes == 15_900 * MiB
    assert gpu.peak_flops == catalogue.gpu("RTX 4060 Ti 16GB").peak_flops
    assert catalogue.recognise("NVIDIA GeForce RTX 4060 Ti", 7_800 * MiB, (8, 9)).name == "RTX 4060 Ti 8GB"


def test_recognise_accepts_what_it_does_not_know():
    gpu = catalogue.recognise("Voodoo 2", 12 * MiB, (3, 5))
    assert (gpu.name, gpu.usable_bytes, gpu.capability) == ("Voodoo 2", 12 * MiB, (3, 5))
    assert not gpu.supports_bf16
    assert gpu.source == "not in the catalogue"
    assert catalogue.overhead("context", gpu).bytes_expected > 0
    radeon = catalogue.recognise("Radeon RX 7900 XTX", 24 * GiB, (11, 0), vendor="amd")
    assert catalogue.overhead("cublas workspace", radeon).bytes_low == 32 * MiB


@pytest.mark.parametrize("gpu", catalogue.gpus(), ids=NAMES)
def test_overheads(gpu):
    items = {item.name: item for item in catalogue.overheads(gpu)}
    assert {"context", "cublas workspace"} <= items.keys()
    for item in items.values():
        assert 0 <= item.bytes_low <= item.bytes_expected <= item.bytes_high < GiB
        assert item.source
        assert catalogue.overhead(item.name, gpu) == item
    assert items["context"].bytes_low >= 0.1 * GiB
    assert not items["context"].inside_allocator


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [("T4", 8_519_680), ("A100-80GB", 8_519_680), ("H100", 32 * MiB), ("RTX 5090", 32 * MiB)],
)
def test_cublas_workspace_follows_pytorchs_rule(name, size_bytes):
    workspace = catalogue.overhead("cublas workspace", catalogue.gpu(name))
    assert workspace.bytes_expected == size_bytes
    assert workspace.inside_allocator


def test_the_catalogue_loads_neither_torch_nor_transformers():
    program = "import sys, oomless.hardware; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize("gpu", catalogue.gpus(), ids=NAMES)
def test_a_network_is_assumed_and_says_so(gpu):
    one, eight = (catalogue.assumed_network(gpu, count) for count in (1, 8))
    assert 1e9 < one.bytes_per_s <= eight.bytes_per_s < 1e12
    assert one.source.startswith("assumed: ")


def test_networks_are_those_of_known_gpus():
    assert set(read_yaml("networks.yaml")["per_gpu"]) <= set(NAMES)
    assert catalogue.assumed_network(catalogue.gpu("H100"), 8).bytes_per_s == 8 * 400e9 / 8
