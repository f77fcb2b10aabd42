"""Time and memory of a step on a GPU: oomless beside transformers with liger-kernel, bitsandbytes and peft, in one run.

    python bench/gpu.py          on a machine with a CUDA GPU; liger-kernel is used where it is installed
    python bench/gpu.py --tiny   anywhere: tiny models on the CPU, to see that the script works

A row is a row of `bench/memory_table.py`: a technique and what it stands beside there, and each of the bars. Both sides train a
model of the row's shape (its config, weights of no particular values) on the same random tokens, one after the other, each
in memory of its own, and show the peak allocated and the median time of a step; what runs out of memory says so. The other side
is what a user of transformers would write for the same training (`Other`): 16-bit weights as they are or, on a GPU without
bf16, fp32 weights under fp16 autocast. What has no counterpart there has none here.

What oomless predicts for its own side stands beside it, as lines for `measured` in src/oomless/catalogue/efficiency.yaml, which
calibrate the predictions for this GPU. Without a GPU and without --tiny it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tests.blank import blank_batch
from torch import nn
from transformers import AutoModelForCausalLM

from memory_table import BARS, LLAMA, TECHNIQUES
from oomless.calibration.points import assembled, shrunk
from oomless.config import TrainConfig
from oomless.memory.device import CudaDevice, Device
from oomless.models.spec import ModelSpec, resolve_for_plan
from oomless.planning.plan import Target, target_for
from oomless.planning.rehearse import rehearse, virtual_device
from oomless.planning.throughput import throughput
from provenance import provenance, write

WARM_UP, STEPS = 2, 8
RATE = 1e-5
NEEDS_A_GPU = {"offload_activations", "offload_optimizer", "stream_frozen"}


@dataclass(frozen=True)
class Row:
    """A way to train: oomless' settings."""

    name: str
    ours: dict[str, Any]
    model: str = LLAMA
    length: int = 2048


def rows() -> list[Row]:
    """Return the rows of the memory table, and what its techniques stand beside."""
    found = []
    for technique in TECHNIQUES:
        found.append(Row(f"without: {technique.name}", technique.without))
        fp32 = technique.without.get("dtype") == "fp32"
        found.append(Row(technique.name, technique.settings if fp32 else technique.without | technique.settings))
    found += [Row(f"bar: {bar.name}", bar.settings, bar.model, bar.max_seq_length) for bar in BARS]
    once: dict[str, Row] = {}
    for row in found:
        once.setdefault(repr((sorted(row.ours.items(), key=str), row.model, row.length)), row)
    return list(once.values())


@dataclass(frozen=True)
class Other:
    """What a user of transformers would write for the same training."""

    model: str
    length: int
    optimizer: str
    fp32: bool
    checkpointing: bool
    trainable: str
    parted: bool
    quantization: str | None
    lora_r: int | None


def counterpart(row: Row, config: TrainConfig) -> Other | None:
    """Return the other side of ``row``, or ``None`` where it has none."""
    optimizers = {"adamw": "AdamW", "adamw_8bit": "AdamW8bit", "adafactor": "Adafactor"}
    if config.optimizer not in optimizers or config.offload_optimizer:
        return None
    return Other(
        model=row.model,
        length=config.max_seq_length,
        optimizer=optimizers[config.optimizer],
        fp32=config.dtype == "fp32",
        checkpointing=config.gradient_checkpointing,
        trainable=config.trainable,
        parted=config.tied_weights == "untied",
        quantization=config.quantization,
        lora_r=config.lora_r,
    )


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


def config_of(row: Row, spec: ModelSpec, device: Device) -> TrainConfig:
    settings = {key: value for key, value in row.ours.items() if device.capacity_bytes or key not in NEEDS_A_GPU}
    if settings.get("checkpointed_layers") == 0.5:
        settings["checkpointed_layers"] = spec.config.num_hidden_layers // 2
    on_cpu = {"dtype": "bf16"} if device.capacity_bytes is None else {}
    common = {"model": spec.name, "data": "-", "output_dir": "-", "max_seq_length": row.length}
    return TrainConfig.from_mapping(common | {"packing": "concatenate"} | on_cpu | settings)


def predicted(config: TrainConfig, spec: ModelSpec, target: Target) -> float | None:
    """Return the tokens a second that are predicted without any measured point."""
    rehearsed = virtual_device(name=target.name, compute_capability=target.compute_capability)
    work = rehearse(spec, config, rehearsed, steps=1, whole=False).work
    speed = None if work is None else throughput(work, target, config, ())
    return None if speed is None else speed.tokens_per_second


def random_tokens(spec: ModelSpec, length: int) -> torch.Tensor:
    """Return [1, length + 1]; with one token again and again, the embedding's backward would be another."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(spec.config.vocab_size, (1, length + 1), generator=generator)


def ours(config: TrainConfig, spec: ModelSpec, device: Device) -> dict[str, float]:
    tokens = random_tokens(spec, config.max_seq_length)
    with device.active():
        parts = assembled(spec, config, device)
        batch = dataclasses.replace(
            blank_batch(1, (config.max_seq_length,), device),
            input_ids=tokens[:, :-1],
            labels=tokens[:, 1:],
            position_ids=torch.arange(config.max_seq_length)[None],
        )
        return timed(lambda: parts.step.run([batch]), device)


def theirs(other: Other, spec: ModelSpec, device: Device, liger: bool) -> dict[str, float]:
    mixed = device.compute_capability is not None and device.compute_capability < (8, 0)
    dtype = torch.float32 if other.fp32 or (mixed and not other.quantization) else torch.bfloat16
    if mixed and other.quantization:
        dtype = torch.float16
    model: Any = other_model(other, spec, device, dtype)
    if liger:
        importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model=model)
    if other.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = train_parts(model, other)
    if other.optimizer == "AdamW8bit":
        optimizer: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit(trained, lr=RATE)
    else:
        optimizer = getattr(torch.optim, other.optimizer)(trained, lr=RATE)
    half = mixed and not other.fp32
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    ids = random_tokens(spec, other.length)[:, :-1].to(device.torch_device)
    model.train()

    def step() -> None:
        context: AbstractContextManager[Any] = torch.autocast("cuda", torch.float16) if half else nullcontext()
        with context:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, device)


def other_model(other: Other, spec: ModelSpec, device: Device, dtype: torch.dtype) -> Any:
    """Return transformers' model on ``device``; a quantised one is made on the host and goes over layer by layer."""
    tied = spec.config.tie_word_embeddings and not other.parted
    config = type(spec.config).from_dict(spec.config.to_dict() | {"tie_word_embeddings": tied})
    with torch.device("cpu") if other.quantization else device.torch_device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not other.quantization:
        return model
    for parent, name, layer in list(linear_layers(model)):
        setattr(parent, name, quantised(layer, other.quantization, dtype, device))
    return model.to(device.torch_device)


def linear_layers(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.base_model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                yield parent, name, layer


def quantised(layer: nn.Linear, kind: str, dtype: torch.dtype, device: Device) -> nn.Module:
    modules = importlib.import_module("bitsandbytes.nn")
    shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if kind == "nf4":
        made = modules.Linear4bit(*shape, bias=bias, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    else:
        made = modules.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    ready: nn.Module = made.to(device.torch_device).requires_grad_(False)
    return ready


def train_parts(model: Any, other: Other) -> list[nn.Parameter]:
    """Have the parts of ``other`` train, through peft where there is LoRA; return what trains."""
    parts = other.trainable.split("+")
    whole = [part for part in parts if part in ("lm_head", "embed_tokens")]
    if "lora" in parts:
        peft = importlib.import_module("peft")
        tied = model.config.tie_word_embeddings and whole != []
        settings = {"r": other.lora_r, "target_modules": "all-linear", "ensure_weight_tying": tied}
        settings["modules_to_save"] = ["embed_tokens"] if tied else whole or None
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        if other.checkpointing:
            model.enable_input_require_grads()
    elif "full" not in parts:
        model.requires_grad_(False)
        ends = {"lm_head": model.get_output_embeddings(), "embed_tokens": model.get_input_embeddings()}
        for part in whole:
            ends[part].requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tried(measure: Callable[[], dict[str, float]], device: Device) -> dict[str, Any]:
    """Return what ``measure`` finds, or that memory ran out, with nothing left of it on the device."""
    gc.collect()
    device.empty_cache()
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return {"error": str(error).split(". ")[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    tiny = options.tiny
    if not tiny and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--tiny tries the script itself on the CPU)")
        return
    device = Device() if tiny else CudaDevice()
    liger = not tiny and importlib.util.find_spec("liger_kernel") is not None
    target = target_for("L4" if tiny else "auto")
    name = "none (--tiny)" if tiny else target.name
    results, points = [], []
    others: dict[Other, dict[str, Any]] = {}
    for row in (row for row in rows() if options.only in row.name):
        spec = resolve_for_plan(row.model)
        if tiny:
            spec, row = shrunk(spec), dataclasses.replace(row, length=64)
        config = config_of(row, spec, device)
        found: dict[str, Any] = {"row": row.name, "model": row.model, "liger": liger}
        found["ours"] = tried(lambda config=config, spec=spec: ours(config, spec, device), device)
        other = counterpart(row, config)
        if other is None:
            found["theirs"] = {"error": "no counterpart"}
        else:
            if other not in others:
                others[other] = tried(lambda other=other, spec=spec: theirs(other, spec, device, liger), device)
            found["theirs"] = others[other]
        results.append(found)
        speed = predicted(config, spec, target)
        if speed is not None and target.gpu is not None and "seconds" in found["ours"]:
            source = f"bench/gpu.py {provenance()['commit']}, {row.name}"
            measured = row.length / found["ours"]["seconds"]
            points.append(f"  - {{gpu: {name}, predicted: {speed:.0f}, measured: {measured:.0f}, source: '{source}'}}")
        print(row.name, {side: found[side] for side in ("ours", "theirs")}, flush=True)
    print("\n".join(["measured:", *points]))
    if not tiny:
        print(f"written to {write('gpu', {'rows': results})}")


if __name__ == "__main__":
    main()
