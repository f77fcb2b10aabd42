"""A virtual GPU refuses what CUDA would refuse, and what would be read or changed while a copy is under way."""

import pytest
import torch

from oomless.memory.strict import DeviceMisuse
from oomless.memory.virtual_gpu import VirtualGPU


@pytest.fixture(params=[False, True], ids=["real", "fake"])
def gpu(request):
    device = VirtualGPU(1 << 30, fake=request.param)
    with device.active():
        yield device


def on_host(gpu, *shape):
    with gpu.host():
        return torch.zeros(shape)


def mixed_sum(gpu):
    return torch.zeros(8, 8) + on_host(gpu, 8, 8)


def mixed_product(gpu):
    return torch.nn.functional.linear(torch.zeros(8, 8), on_host(gpu, 8, 8))


def mixed_in_a_list(gpu):
    return torch.cat([torch.zeros(8), on_host(gpu, 8)])


def read_before_it_came(gpu):
    target = torch.zeros(8)
    gpu.start_copy(gpu.pinned_like(target), target)
    return target * 2


def written_before_it_came(gpu):
    target = torch.zeros(8)
    gpu.start_copy(gpu.pinned_like(target), target)
    target.zero_()


def view_read_before_it_came(gpu):
    target = torch.zeros(4, 8)
    gpu.start_copy(gpu.pinned_like(target), target)
    return target[0].sum(0)


def source_changed_while_it_leaves(gpu):
    source = torch.ones(8)
    gpu.start_copy(source, gpu.pinned_like(source))
    source.add_(1)


def pinned_source_changed_while_it_leaves(gpu):
    target = torch.zeros(8)
    host = gpu.pinned_like(target)
    gpu.start_copy(host, target)
    host.zero_()


def read_on_the_host_before_the_host_waited(gpu):
    source = torch.ones(8)
    host = gpu.pinned_like(source)
    gpu.start_copy(source, host)()
    with gpu.host():
        return host + 1


@pytest.mark.parametrize(
    "mistake",
    [
        mixed_sum,
        mixed_product,
        mixed_in_a_list,
        read_before_it_came,
        written_before_it_came,
        view_read_before_it_came,
        source_changed_while_it_leaves,
        pinned_source_changed_while_it_leaves,
        read_on_the_host_before_the_host_waited,
    ],
)
def test_a_mistake_is_refused(gpu, mistake):
    with pytest.raises(DeviceMisuse):
        mistake(gpu)


def test_what_is_in_order_is_not(gpu):
    """There and back with waits, two copies after each other, a scalar of the host, a tensor moved."""
    with gpu.host():
        scale = torch.tensor(2.0)
    here = torch.zeros(8) * scale
    host = gpu.pinned_like(here)
    gpu.start_copy(here, host)
    gpu.start_copy(host, here)()
    here.add_(1)
    gpu.number(here.sum())
    with gpu.host():
        host.add_(1)
    assert gpu.put(host).shape == gpu.fetch(here).shape == (8,)
    here.copy_(host)


def test_asking_for_the_form_of_what_comes_is_not_reading(gpu):
    target = torch.zeros(4, 8)
    gpu.start_copy(gpu.pinned_like(target), target)
    assert torch.ops.prim.device.default(target).type == "cpu"
    assert target[1:].shape == (3, 8)
    assert torch.empty_like(target).shape == target.new_zeros(4, 8).shape


def test_beside_what_comes_the_rest_may_be_used(gpu):
    slots = torch.zeros(2, 8)
    gpu.start_copy(gpu.pinned_like(slots[0]), slots[0])
    slots[1].add_(1)
    with pytest.raises(DeviceMisuse):
        slots.add_(1)
