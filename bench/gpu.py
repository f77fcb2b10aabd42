"""Time and memory of a step on a GPU: oomless beside transformers with liger-kernel and bitsandbytes, in one run.

    python bench/gpu.py          on a machine with a CUDA GPU; liger-kernel is used where it is installed
    python bench/gpu.py --tiny   anywhere: a tiny model on the CPU, to see that the script works

Both sides train Llama 3.2 1B's shape (its config, weights of no particular values) on the same tokens. A row is a way to
train; the sides take turns, each in memory of its own, and show the peak allocated and the median time of a step. What oomless
predicts for its own side stands beside it, as lines for `measured` in src/oomless/catalogue/efficiency.yaml, which calibrate
the predictions for this GPU. Without a GPU and without --tiny it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from memory_table import ADAFACTOR, ADAM, CHECKPOINTING, IN_BACKWARD, LLAMA, SMALLEST_ACTIVATIONS
from oomless.config import TrainConfig
from oomless.memory.device import CudaDevice, Device
from oomless.models.spec import ModelSpec, resolve_for_plan
from oomless.planning.plan import Target, target_for
from oomless.planning.rehearse import blank_batch, rehearse, virtual_device
from oomless.planning.throughput import throughput
from oomless.training.assemble import assemble
from predicted_vs_measured import shrunk
from provenance import provenance, write

WARM_UP, STEPS = 2, 8


@dataclass(frozen=True)
class Row:
    """A way to train: oomless' settings, and what a user of transformers would write for the same."""

    name: str
    ours: dict[str, Any]
    optimizer: str = "AdamW"
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    trained: tuple[str, ...] = field(default=("",))


ROWS = [
    Row("everything in fp32, AdamW", {"dtype": "fp32"}),
    Row("everything in 16 bits, AdamW", {}, dtype=torch.bfloat16),
    Row("the same, checkpointing", CHECKPOINTING, checkpointing=True, dtype=torch.bfloat16),
    Row("8-bit Adam, checkpointing", ADAM | CHECKPOINTING, "AdamW8bit", checkpointing=True, dtype=torch.bfloat16),
    Row(
        "8-bit Adam, checkpointing, in backward",
        ADAM | CHECKPOINTING | IN_BACKWARD,
        "AdamW8bit",
        checkpointing=True,
        dtype=torch.bfloat16,
    ),
    Row(
        "Adafactor, everything that saves",
        ADAFACTOR | SMALLEST_ACTIVATIONS | IN_BACKWARD,
        "Adafactor",
        checkpointing=True,
        dtype=torch.bfloat16,
    ),
    Row(
        "lm_head only, parted",
        {"trainable": "lm_head", "tied_weights": "untied"} | ADAM,
        "AdamW8bit",
        dtype=torch.bfloat16,
        trained=("lm_head",),
    ),
]


def timed(step: Callable[[], Any], device: Device) -> dict[str, float]:
    """Return the peak and the median time of ``step`` after a warm-up."""
    seconds = []
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            device.reset_peak()
        _synchronise(device)
        began = time.perf_counter()
        step()
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return {
        "peak_allocated_bytes": device.usage().peak_allocated_bytes,
        "seconds": statistics.median(seconds[WARM_UP:]),
    }


def _synchronise(device: Device) -> None:
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()


def config_of(row: Row, spec: ModelSpec, device: Device, length: int) -> TrainConfig:
    settings = {key: value for key, value in row.ours.items() if device.capacity_bytes or "offload" not in key}
    common = {"model": spec.name, "data": "-", "output_dir": "-", "max_seq_length": length, "packing": "concatenate"}
    return TrainConfig.from_mapping(common | {"dtype": "bf16"} | settings)


def predicted(row: Row, spec: ModelSpec, device: Device, length: int, target: Target) -> float | None:
    """Return the tokens a second that are predicted without any measured point."""
    config = config_of(row, spec, device, length)
    rehearsed = virtual_device(name=target.name, compute_capability=target.compute_capability)
    work = rehearse(spec, config, rehearsed, steps=1, whole=False).work
    speed = None if work is None else throughput(work, target, config, ())
    return None if speed is None else speed.tokens_per_second


def ours(row: Row, spec: ModelSpec, device: Device, length: int) -> dict[str, float]:
    config = config_of(row, spec, device, length)
    with device.active():
        parts = assemble(spec, config, device, fill=False)
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.normal_(std=0.02)
        batch = [blank_batch(1, (length,), device)]
        return timed(lambda: parts.step.run(batch), device)


def theirs(row: Row, spec: ModelSpec, device: Device, length: int, liger: bool) -> dict[str, float]:
    with device.torch_device:
        config = type(spec.config).from_dict(
            spec.config.to_dict() | {"tie_word_embeddings": spec.config.tie_word_embeddings and row.trained == ("",)}
        )
        model: Any = AutoModelForCausalLM.from_config(config, dtype=row.dtype)
    if liger:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model)
    if row.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(row.trained))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if row.optimizer == "AdamW8bit":
        optimizer: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit(trained)
    else:
        optimizer = getattr(torch.optim, row.optimizer)(trained, lr=1e-5)
    ids = torch.zeros(1, length, dtype=torch.int64, device=device.torch_device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--tiny tries the script itself on the CPU)")
        return
    device = Device() if tiny else CudaDevice()
    spec = resolve_for_plan(LLAMA)
    spec, length = (shrunk(spec), 64) if tiny else (spec, 2048)
    liger = not tiny and importlib.util.find_spec("liger_kernel") is not None
    target = target_for("L4" if tiny else "auto")
    name = "none (--tiny)" if tiny else target.name
    rows, points = [], []
    for row in ROWS:
        gc.collect()
        device.empty_cache()
        found: dict[str, Any] = {"row": row.name, "liger": liger, "ours": ours(row, spec, device, length)}
        gc.collect()
        device.empty_cache()
        try:
            found["theirs"] = theirs(row, spec, device, length, liger)
        except torch.OutOfMemoryError as error:
            found["theirs"] = {"error": str(error).split(". ")[0]}
        rows.append(found)
        speed = predicted(row, spec, device, length, target)
        if speed is not None and target.gpu is not None:
            source = f"bench/gpu.py {provenance()['commit']}, {row.name}"
            measured = length / found["ours"]["seconds"]
            points.append(f"  - {{gpu: {name}, predicted: {speed:.0f}, measured: {measured:.0f}, source: '{source}'}}")
        print(row.name, {side: found[side] for side in ("ours", "theirs")}, flush=True)
    print("\n".join(["measured:", *points]))
    if not tiny:
        print(f"written to {write('gpu', {'rows': rows})}")


if __name__ == "__main__":
    main()
