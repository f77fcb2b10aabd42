"""The virtual GPU: fake equals real to the byte, running out of memory and going on, host against device."""

import functools
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from oomless.memory.virtual_gpu import VirtualGPU

KIB = 1024
VOCABULARY = 96


def causal_attention(module, query, key, value, mask, scaling=None, **_):
    """What a GPU's fused attention does: no mask tensor, keys and values expanded to the query's heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("test_causal", causal_attention)

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
OPTIMIZERS = {
    "foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "for-loop": functools.partial(torch.optim.AdamW, foreach=False),
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
}


def train(gpu, architecture, *, dtype, checkpointing, optimizer, eager=False, shape=(2, 24), accumulation=1):
    """Build a tiny model on ``gpu`` and take two optimizer steps, with the phases that training has."""
    torch.manual_seed(0)
    batch, length = shape
    with gpu.active():
        with gpu.phase("load"):
            model = transformers.AutoModelForCausalLM.from_config(
                CONFIGS[architecture](), dtype=dtype, attn_implementation="eager" if eager else "test_causal"
            ).train()
            if checkpointing:
                for layer in model.model.layers:
                    layer.gradient_checkpointing = True
                    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        optimizer = OPTIMIZERS[optimizer](model.parameters())
        gpu.watch(model, optimizer)
        for _ in range(2):
            for _ in range(accumulation):
                with gpu.host():
                    tokens = torch.randint(0, VOCABULARY, shape)
                tokens = gpu.put(tokens)
                with gpu.phase("forward"):
                    mask = torch.zeros(batch, 1, length, length, dtype=dtype) if eager else None
                    hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
                with gpu.phase("loss"):
                    logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
                    loss = nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())
                    del logits
                with gpu.phase("backward"):
                    loss.backward()
                del hidden, loss, tokens, mask
            with gpu.phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
    return model, optimizer


def both_worlds(architecture, **options):
    """Return the profiles, every event in them, of the same training on real and on fake tensors."""
    profiles = []
    for fake in (False, True):
        gpu = VirtualGPU(1 << 40, record_history=True, fake=fake)
        kept = train(gpu, architecture, **options)
        profiles.append(gpu.profile(max_points=None))
        assert profiles[-1].peak_allocated_bytes == gpu.usage().peak_allocated_bytes
        assert profiles[-1].peak_reserved_bytes == gpu.usage().peak_reserved_bytes
        del kept
        gc.collect()
        assert gpu.usage().allocated_bytes == 0
        assert gpu.host_allocated_bytes == 0
    return profiles


QUICK = [
    (architecture, dtype, checkpointing, optimizer)
    for dtype in (torch.float32, torch.bfloat16)
    for checkpointing in (False, True)
    for architecture, optimizer in (
        ("llama", "foreach"),
        ("gemma", "for-loop"),
        ("qwen2", "fused"),
        ("qwen3", "for-loop"),
        ("gemma3", "momentum"),
    )
]
SLOW = [
    (architecture, dtype, checkpointing, optimizer)
    for architecture in CONFIGS
    for dtype in (torch.float32, torch.bfloat16)
    for checkpointing in (False, True)
    for optimizer in OPTIMIZERS
    # On the CPU the grouped matmul takes float32; its fake kernel takes bfloat16 only, as on CUDA.
    if (architecture, dtype) != ("qwen3_moe", torch.float32)
    and (architecture, dtype, checkpointing, optimizer) not in QUICK
]


@pytest.mark.parametrize(
    ("architecture", "dtype", "checkpointing", "optimizer"),
    [*QUICK, *(pytest.param(*combination, marks=pytest.mark.slow) for combination in SLOW)],
)
def test_fake_equals_real_at_every_event(architecture, dtype, checkpointing, optimizer):
    real, fake = both_worlds(
        architecture,
        dtype=dtype,
        checkpointing=checkpointing,
        optimizer=optimizer,
        eager=architecture == "gemma2",
    )
    assert real == fake


@pytest.mark.parametrize(
    "options",
    [{"eager": True}, {"shape": (1, 7)}, {"shape": (3, 63)}, {"accumulation": 3}],
    ids=["attention with a mask", "odd length", "batch of three", "accumulation"],
)
def test_fake_equals_real_in_other_shapes(options):
    real, fake = both_worlds("llama", dtype=torch.bfloat16, checkpointing=False, optimizer="for-loop", **options)
    assert real == fake


def test_fake_tensors_take_no_memory():
    gpu = VirtualGPU(8 << 40, fake=True)
    with gpu.active():
        layer = nn.Linear(1 << 19, 1 << 19, bias=False)
        layer(torch.ones(2, 1 << 19)).sum().backward()
    assert gpu.usage().allocated_bytes == 2 << 40


# Running out of memory.


def message_of_running_out(step):
    """Return the message of the error that ``step()`` ends with, keeping nothing else; empty if none."""
    try:
        step()
    except torch.OutOfMemoryError as error:
        return str(error)
    return ""


@pytest.fixture
def step():
    """One training step on a virtual GPU of its own; returns the loss."""
    torch.manual_seed(0)
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        x = torch.ones(32, 64)

        def step():
            try:
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                return loss.item()
            finally:
                optimizer.zero_grad()

        step.gpu, step.model, step.optimizer, step.inputs = gpu, model, optimizer, x
        yield step


def test_every_allocation_of_a_step_may_fail_and_training_goes_on(step):
    gpu = step.gpu
    step()
    held = gpu.usage().allocated_bytes
    first = gpu.allocation_count
    step()
    count = gpu.allocation_count - first
    assert count > 20
    for index in range(count):
        gpu.fail_at(gpu.allocation_count + index)
        assert "CUDA out of memory. Tried to allocate" in message_of_running_out(step)
        assert gpu.usage().allocated_bytes == held, f"allocation {index} left something behind"
        step()
        assert gpu.usage().allocated_bytes == held


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_full_device_ends_the_step_where_it_is_reached(where):
    """The capacity is what the step needs up to that part, so that the part itself runs out."""
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        weight = nn.Parameter(torch.ones(4 << 20))  # 16 MiB, a segment of its own.
        used = slice(1) if where == "optimizer" else slice(None)
        x = torch.ones_like(weight[used])
        optimizer = torch.optim.AdamW([weight], foreach=True)

        def step(parts=("forward", "backward", "optimizer")):
            try:
                for part in parts:
                    reached.append(part)
                    if part == "forward":
                        loss = (weight[used] * x).square().mean()
                    elif part == "backward":
                        loss.backward()
                    else:
                        optimizer.step()
            finally:
                optimizer.zero_grad()

        reached = []
        step()
        held = gpu.usage().allocated_bytes
        gpu.empty_cache()
        gpu.reset_peak()
        step(parts=("forward", "backward", "optimizer")[: ("forward", "backward", "optimizer").index(where)])
        needed_bytes = gpu.usage().peak_reserved_bytes
        gpu.empty_cache()
        gpu.set_capacity(needed_bytes)
        assert "CUDA out of memory. Tried to allocate" in message_of_running_out(step)
        assert reached[-1] == where
        assert gpu.usage().allocated_bytes == held
        gpu.set_capacity(1 << 30)
        step()
        assert gpu.usage().allocated_bytes == held


def test_only_an_allocation_to_come_can_be_made_to_fail(step):
    with pytest.raises(ValueError, match="allocation_index must be at least"):
        step.gpu.fail_at(0)
    step.gpu.fail_at(step.gpu.allocation_count)
    step.gpu.fail_at(None)
    step()


def test_outside_bytes_are_not_for_tensors():
    gpu = VirtualGPU(64 << 20, outside_bytes=40 << 20)
    with gpu.active(), pytest.raises(torch.OutOfMemoryError):
        torch.empty(30 << 20, dtype=torch.uint8)
    with gpu.active():
        torch.empty(22 << 20, dtype=torch.uint8)


# Host against device.


@pytest.fixture(params=["real", "fake"])
def gpu(request):
    gpu = VirtualGPU(1 << 30, fake=request.param == "fake")
    with gpu.active():
        yield gpu


def test_host_tensors_are_counted_apart(gpu):
    with gpu.host():
        on_host = torch.ones(1024)
        with gpu.host():
            view = on_host.view(32, 32)
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (0, 4 * KIB)
    on_device = view + 1
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (4 * KIB, 4 * KIB)
    with gpu.host():
        on_device.add_(1)
        inner = on_device[:10]
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (4 * KIB, 4 * KIB), "nothing moved"
    del on_device, inner, view, on_host
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (0, 0)
    assert gpu.host_peak_allocated_bytes == 4 * KIB
    gpu.reset_peak()
    assert gpu.host_peak_allocated_bytes == 0
    assert gpu.usage().peak_allocated_bytes == 0


def test_put_and_fetch_copy_into_the_other_memory(gpu):
    with gpu.host():
        on_host = torch.arange(1024.0)
    on_device = gpu.put(on_host, torch.bfloat16)
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (2 * KIB, 4 * KIB)
    again = gpu.put(on_host)
    assert again.untyped_storage() is not on_host.untyped_storage()
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (6 * KIB, 4 * KIB)
    back = gpu.fetch(on_device.requires_grad_())
    assert not back.requires_grad
    assert back.dtype == torch.bfloat16
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (6 * KIB, 6 * KIB)
    with gpu.host():
        inside = gpu.put(back)
    assert (gpu.usage().allocated_bytes, gpu.host_allocated_bytes) == (8 * KIB, 6 * KIB), "put means the device"
    assert inside.shape == (1024,)


def test_put_takes_what_was_never_booked(gpu):
    with gpu.host():
        tokens = torch.from_numpy(np.arange(512))
    assert gpu.put(tokens).dtype == torch.int64
    assert gpu.host_allocated_bytes == 4 * KIB
    assert gpu.usage().peak_allocated_bytes == 4 * KIB


def test_put_of_a_tensor_from_outside():
    outside = torch.ones(1024)
    for fake in (False, True):
        gpu = VirtualGPU(1 << 30, fake=fake)
        with gpu.active():
            inside = gpu.put(outside)
        assert gpu.usage().allocated_bytes == 4 * KIB
        assert inside.shape == outside.shape


def test_put_carries_gradients_and_values():
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        with gpu.host():
            weight = torch.ones(4, requires_grad=True)
        gpu.put(weight).mul(3).sum().backward()
        assert weight.grad.tolist() == [3.0] * 4
        assert gpu.fetch(weight).tolist() == [1.0] * 4


def test_put_and_fetch_refuse_to_work_unbooked():
    gpu = VirtualGPU(1 << 30)
    with pytest.raises(RuntimeError, match="only inside active"):
        gpu.put(torch.ones(1))
    with pytest.raises(RuntimeError, match="only inside active"):
        gpu.fetch(torch.ones(1))


# The device as a context.


def test_active_may_be_nested_and_left():
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        with gpu.active():
            inner = torch.ones(1024)
        outer = torch.ones(1024)
    unbooked = torch.ones(1024)
    assert gpu.usage().allocated_bytes == 8 * KIB
    del inner, outer, unbooked
    assert gpu.usage().allocated_bytes == 0, "a storage is released also after the context"


def test_fake_device_goes_on_with_its_own_tensors():
    gpu = VirtualGPU(1 << 30, fake=True)
    assert gpu.fake
    with gpu.active():
        x = torch.ones(1024)
    with gpu.active():
        total = (x + x).sum()
        assert total.shape == ()
    assert gpu.usage().peak_allocated_bytes == 8 * KIB + 512


def test_an_error_inside_leaves_the_host_and_the_device():
    gpu = VirtualGPU(1 << 30)
    with pytest.raises(KeyError), gpu.active(), gpu.host():
        raise KeyError
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    with gpu.active():
        kept = torch.ones(1024)
    assert gpu.usage().allocated_bytes == kept.untyped_storage().nbytes()


def test_empty_cache_gives_reserved_memory_back():
    gpu = VirtualGPU(1 << 30)
    with gpu.active():
        torch.empty(4 << 20)
        assert gpu.usage().reserved_bytes >= 16 << 20
        gpu.empty_cache()
    assert gpu.usage().reserved_bytes == 0


def test_the_documented_example_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "virtual_gpu.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert "'weights': 1073807360" in capsys.readouterr().out


# Sharded over several GPUs.


def test_fully_sharded_parameters_are_booked_as_they_come_and_go():
    """FSDP2 over four ranks, of which this is one; gathered parameters come and go by resized storages."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        profiles = []
        for fake in (False, False, True):  # DTensor fills caches the first time.
            gpu = VirtualGPU(1 << 30, record_history=True, fake=fake)
            with gpu.active():
                model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)])
                for part in (*model, model):
                    fully_shard(part, mesh=mesh)
                whole_bytes = 4 * 256 * KIB
                assert gpu.usage().allocated_bytes == whole_bytes // 4
                for _ in range(2):
                    model(torch.ones(4, 256)).sum().backward()
                    assert gpu.usage().allocated_bytes == 2 * whole_bytes // 4, "the gradients are sharded too"
                    for parameter in model.parameters():
                        parameter.grad = None
                    assert gpu.usage().allocated_bytes == whole_bytes // 4
            profiles.append(gpu.profile(max_points=None))
        assert profiles[1] == profiles[2]
    finally:
        dist.destroy_process_group()
