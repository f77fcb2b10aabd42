"""A user's loop on several GPUs: `several_gpus.py KINDS`, ddp or fsdp; with --on-cpu for real on the CPU, each peak then printed."""

import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

kinds, on_cpu = sys.argv[1].split(","), "--on-cpu" in sys.argv
device = "cpu" if on_cpu else "cuda"


def layer():
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))


def train(kind):
    if not dist.is_initialized():
        dist.init_process_group("gloo" if on_cpu else "nccl")
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 256), *[layer() for _ in range(4)], nn.Linear(256, 64))
    if kind.startswith("fsdp"):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bf16" in kind else MixedPrecisionPolicy()
        for part in (*model[1:-1], model):
            fully_shard(part, mesh=dist.init_device_mesh(device, (dist.get_world_size(),)), mp_policy=policy)
    else:
        model = DistributedDataParallel(model, bucket_cap_mb=1, gradient_as_bucket_view="view" in kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(3):
        if on_cpu and step == 1:  # in the first step DTensor asks for shapes, which these books take for memory
            gpu.reset_peak()
        model(torch.ones(512, 64, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, "here")
    assert set(told) == {"here"}


for kind in kinds:
    if on_cpu:
        from oomless.memory.virtual_gpu import VirtualGPU

        gpu = VirtualGPU(1 << 30)
    with gpu.active() if on_cpu else nullcontext():
        train(kind)
    if on_cpu and dist.get_rank() == 0:
        print(gpu.usage().peak_allocated_bytes, gpu.usage().peak_reserved_bytes)
dist.destroy_process_group()
if on_cpu:
    sys.stdout.flush()
    os._exit(
        0
    )  # where Python ends by itself on a busy machine, C++ at times ends it: "terminate called without an active exception"
