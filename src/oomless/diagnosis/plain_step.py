"""The step that people run: transformers' own loss over whole logits, torch's AdamW, on the same virtual GPU.

To say what held the memory of a run that was not oomless's, that run is rehearsed and not oomless's own. What differs
from ``planning.rehearse`` is what differs in the programs: all logits and their copy in fp32 exist, 16-bit weights are
updated as they are, and automatic casting keeps fp32 weights and makes 16-bit copies of them. Where the run has them,
adapters are peft's, the loss in chunks is TRL's, Adafactor is transformers' and 8-bit AdamW bitsandbytes'. Of several GPUs it is
the first: DDP's buckets of gradients, or a model cut by FSDP2 as accelerate cuts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oomless import optim
from oomless.config import TrainConfig
from oomless.diagnosis.losses import answers_loss, distillation_loss, fused_loss, generate, reward_loss
from oomless.diagnosis.plain_optimizers import AdamW8bit
from oomless.diagnosis.zero import Part, Zero
from oomless.errors import ModelError
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.device import Category, Device, nowhere
from oomless.memory.profile import Request
from oomless.memory.repeated_layers import CannotRepeat, all_run
from oomless.memory.tracker import import_unbooked
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models import build, form
from oomless.models.make import attend
from oomless.models.spec import ModelSpec
from oomless.ops.attention import Kernel, attention_kernel, kernel_for
from oomless.planning.plan import Target
from oomless.planning.rehearse import UNLIMITED_BYTES, layers_repeated
from oomless.techniques import checkpointing, frozen_layers, lora, quantization, sharding, trainable
from oomless.training import distributed
from oomless.training.assemble import check_length
from oomless.training.distributed import Ranks
from oomless.training.precision import choose_dtype

STEPS = 2
RATE = 1e-5
"""A learning rate, whichever: none changes what memory is asked for."""

REFERENCE = "reference_of_the_training"
ROOT = "root_of_fsdp"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainRun:
    """A run of another tool, in the terms of ``TrainConfig`` and what that does not have."""

    spec: ModelSpec
    config: TrainConfig
    mixed_precision: Literal["fp16", "bf16"] | None = None
    """Weights in fp32, arithmetic cast to this."""

    attention: Literal["sdpa", "eager"] = "sdpa"
    foreach: bool = False
    """Whether AdamW works on all tensors at once, with temporaries for each, instead of fused."""

    evaluates: bool = False
    fused_loss: Literal["liger", "trl"] | None = None
    """Whose loss it is that never holds all logits: TRL's own, or Liger's or Cut Cross-Entropy, rehearsed in oomless' form of it."""

    sequences_each: int = 1
    """Sequences that the model sees for each of a batch: two where chosen and rejected answers run together."""

    reference: bool = False
    """Whether a frozen copy of the weights computes log-probabilities beside the training."""

    base_is_reference: bool = False
    """Whether the model without its adapters computes them."""

    mismatched: bool = False
    """Whether answers to other prompts run through both models beside, without gradients, as KTO does for its KL term."""

    teacher: ModelSpec | None = None
    """The frozen model from whose logits it learns, as in TRL's GKD."""

    beta: float = 0.5
    """What weighs teacher against student there."""

    scores: bool = False
    """Whether a head of one number for each token stands in place of the vocabulary's, as in a reward model."""

    answers: int = 0
    """How many tokens at the end of a sequence the model has generated, of which the logits alone are needed; 0 for all."""

    generates: int = 0
    """How many sequences are generated at once before a step."""

    by_a_trainer: bool = True
    """Whether transformers' Trainer makes the optimizer, which keeps the moments of embeddings in 32 bits."""

    gpus: int = 1
    """How many share the model by FSDP."""

    zero: Zero | None = None
    """How DeepSpeed shares the training out, where it does."""

    buckets: bool = False
    """Whether DDP sums gradients over several GPUs, in buckets that lie beside them."""

    adapters_in_fp32: bool = True
    """Whether adapters are in fp32 whatever the model is in, as peft makes them; what goes into each is then cast, and kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the rehearsal of a run came to."""

    needed_bytes: int
    """The most that the allocator reserved."""

    fixed_bytes: int
    """Weights, gradients and optimizer state at their largest."""

    stopped_at: Request | None
    """The request that found no room; ``None`` where the run got through."""

    out_of_memory: str | None
    held_bytes: dict[Category, int]
    """By category: at the request that found no room, else at the peak."""

    reserved_bytes: int
    """What the allocator reserved at that moment."""

    device: VirtualGPU

    @property
    def allocated_bytes(self) -> int:
        """The sum of what was held."""
        return sum(self.held_bytes.values())


def rehearse_plain(
    run: PlainRun,
    target: Target,
    *,
    limited: bool,
    settings: AllocatorSettings | None = None,
    names_modules: bool = False,
) -> Outcome:
    """Run two steps of ``run`` on ``target``, or without an end of memory where not ``limited``.

    It takes more time where the outcome ``names_modules`` inside of layers.

    Raises:
        UserError: model, GPU and settings do not fit together.
    """
    # Layers that are gathered ask for each other's weights, and what takes a gradient takes every layer's.
    if not names_modules and run.gpus == 1 and run.zero is None:
        with suppress(CannotRepeat):
            return _rehearsed(run, target, limited, settings, layers_repeated)
    return _rehearsed(run, target, limited, settings, lambda model, device: nullcontext())


def _rehearsed(
    run: PlainRun,
    target: Target,
    limited: bool,
    settings: AllocatorSettings | None,
    repeated: Callable[[Any, VirtualGPU], AbstractContextManager[None]],
) -> Outcome:
    device = target.simulated(target.capacity_bytes if limited else UNLIMITED_BYTES, settings=settings)
    message = None
    with distributed.rehearsed(run.gpus) as ranks, device.active():
        try:
            arithmetic = choose_dtype(run.mixed_precision or run.config.dtype, device)
            kernel: Kernel = target.kernel or kernel_for(target.compute_capability, arithmetic)
            with attention_kernel(kernel):
                model, optimizer = build_plain(run, device, ranks)
                held = _buckets(run, model, device)
                part = _part(run, model, device)
                if part is not None:
                    optimizer = _optimizer(run, model, part.masters)
                    device.watch(model, optimizer)
                device.book_workspaces(target.workspace_bytes)
                with repeated(model, device):
                    for _ in range(STEPS):
                        train_step(run, model, optimizer, device, part)
                    if run.evaluates:
                        evaluation_step(run, model, device)
                del held, part
        except torch.OutOfMemoryError as error:
            message = str(error)
    return outcome(device, message)


def outcome(device: VirtualGPU, message: str | None) -> Outcome:
    """Return what the rehearsal on ``device`` came to, which ended with ``message`` or got through."""
    profile = device.profile()
    stopped = profile.failures[-1] if message is not None and profile.failures else None
    timeline = profile.timeline
    fixed: tuple[Category, ...] = ("weights", "gradients", "optimizer state")
    held = device.held_before(stopped.event) if stopped is not None else dict(profile.peak_bytes_by_category)
    reserved = profile.peak_reserved_bytes
    if stopped is None:
        reserved = profile.peak_allocated_bytes + profile.cached_bytes
    return Outcome(
        needed_bytes=profile.peak_reserved_bytes,
        fixed_bytes=sum(max(timeline.bytes_by_category[category], default=0) for category in fixed),
        stopped_at=stopped,
        out_of_memory=message,
        held_bytes=held,
        reserved_bytes=reserved,
        device=device,
    )


def build_plain(run: PlainRun, device: Device, ranks: Ranks) -> tuple[Any, torch.optim.Optimizer]:
    """Return model and optimizer as the tool has them when its first step begins; weights are not filled."""
    config, kind = run.config, run.config.quantization
    check_length(run.spec, config)
    dtype = torch.float32 if run.mixed_precision else choose_dtype(config.dtype, device)
    cut = run.gpus > 1

    def prepare(made: Any) -> None:
        if run.scores:
            made.set_output_embeddings(
                nn.Linear(made.get_input_embeddings().weight.shape[1], 1, bias=False, dtype=dtype, device="meta")
            )
        if kind is not None:
            quantization.replace(made, kind, trainable.trained_modules(made, config))
        if cut:
            _trained(run, made, nowhere())

    model = build.build(
        run.spec,
        device=device,
        dtype=dtype,
        form=_form(run),
        prepare=prepare,
        cut=(lambda made, materialise: _cut(run, made, ranks, materialise)) if cut else None,
    )
    with device.phase("load"):
        frozen_layers.rehearse_filling(model, device)
        if not cut:
            _trained(run, model, device)
        if run.attention == "eager":
            attend(model, "eager")
        if config.gradient_checkpointing:
            checkpointing.apply(model)
    beside = run.teacher or (run.spec if run.reference else None)
    if beside is not None:
        frozen = build.build(beside, device=device, dtype=dtype)
        with device.phase("load"):
            frozen_layers.rehearse_filling(frozen, device)
            frozen.requires_grad_(False)
        model.register_module(REFERENCE, frozen)
    optimizer = _optimizer(run, model)
    device.watch(model, optimizer)
    return model, optimizer


def _trained(run: PlainRun, model: Any, device: Device) -> None:
    trainable.apply(model, run.config, device)
    if run.adapters_in_fp32:
        _adapters_to_fp32(model, device)


def _cut(run: PlainRun, model: Any, ranks: Ranks, materialise: Callable[[nn.Module], None]) -> None:
    """Cut ``model`` as accelerate does (1.15: accelerate/utils/fsdp_utils.py): layers, embedding, the last norm with the head, the rest."""
    fsdp = import_unbooked(sharding.FSDP)
    how: dict[str, Any] = {"mesh": ranks.mesh}
    if run.mixed_precision:
        half = torch.float16 if run.mixed_precision == "fp16" else torch.bfloat16
        how["mp_policy"] = fsdp.MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    norm = [last for _, last in model.get_decoder().named_children() if "norm" in type(last).__name__.lower()][-1:]
    for part in [*checkpointing.decoder_layers(model), *([] if tied else [embedding])]:
        materialise(part)
        fsdp.fully_shard(part, **how)
    tail = [*norm, *([embedding] if tied else []), head]
    materialise(nn.ModuleList(tail))
    fsdp.fully_shard(tail, **how, reshard_after_forward=False)
    materialise(model)
    model.__dict__[ROOT] = fsdp.fully_shard(sharding.Whole(model), **how, reshard_after_forward=False)


def _buckets(run: PlainRun, model: nn.Module, device: Device) -> list[Tensor]:
    """Return what DDP sums gradients in, which lies beside them: buckets of 25 MiB, the first of 1 MiB."""
    if not run.buckets:
        return []
    trained: list[Tensor] = _parameters(model)[::-1]
    buckets, _ = dist._compute_bucket_assignment_by_size(trained, [1 << 20, 25 << 20])  # type: ignore[attr-defined]
    made = [
        torch.empty(sum(trained[i].numel() for i in bucket), dtype=trained[bucket[0]].dtype, device=trained[0].device)
        for bucket in buckets
    ]
    device.label(made, "gradients")
    return made


def _part(run: PlainRun, model: nn.Module, device: Device) -> Part | None:
    """Return DeepSpeed's part of the optimizer's work, made before the first step."""
    if run.zero is None:
        return None
    part = Part(zero=run.zero, trained=_parameters(model), device=device)  # type: ignore[arg-type]
    with device.phase("load"):
        part.build()
    part.listen()
    return part


def _adapters_to_fp32(model: Any, device: Device) -> None:
    for name, parameter in list(model.named_parameters()):
        if lora.is_adapter(name):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(parameter.detach().float()))
    device.label([p for name, p in model.named_parameters() if lora.is_adapter(name)], "weights")


def _form(run: PlainRun) -> form.Form:
    """Return the form whose attention this architecture has; one that oomless would not train gets the usual one."""
    try:
        return form.choose(run.spec, run.config.packing)
    except ModelError:
        return form.Form()


def _parameters(model: nn.Module) -> list[Tensor]:
    """Return what trains of ``model``."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(REFERENCE)]


def _optimizer(run: PlainRun, model: Any, of: Sequence[Tensor] | None = None) -> torch.optim.Optimizer:
    config = run.config
    parameters = list(of or (sharding.local(parameter) for parameter in _parameters(model)))
    if config.optimizer == "adamw":
        kind: dict[str, Any] = {"foreach": True} if run.foreach else {"fused": True}
        return torch.optim.AdamW(parameters, lr=RATE, **kind)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        made: torch.optim.Optimizer = Adafactor(parameters, lr=RATE, scale_parameter=False, relative_step=False)
        return made
    if config.optimizer == "adamw_8bit":
        embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and run.by_a_trainer]
        return AdamW8bit(parameters, embeddings)
    groups = [
        {
            "params": [p for p in parameters if (p.dtype == torch.float32) is single and (p.ndim > 1) is matrix],
            "weight_precision": None if single else "plain",
            **({"orthogonalise": matrix} if config.optimizer == "muon" else {}),
        }
        for single in (True, False)
        for matrix in (True, False)
    ]
    return optim.build(config.optimizer, [group for group in groups if group["params"]], lr=RATE)


def train_step(
    run: PlainRun, model: Any, optimizer: torch.optim.Optimizer, device: Device, part: Part | None = None
) -> None:
    """Run one optimizer step with its accumulation, as the ``Trainer`` does."""
    model.train()
    if run.generates:
        generate(model, run.generates, run.config.max_seq_length, device)
    for _ in range(min(2, run.config.gradient_accumulation_steps)):  # further passes repeat the second
        loss = _loss(run, model, device, run.config.per_device_train_batch_size)
        with device.phase("backward"):
            if part is not None:
                part.before_backward()
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
    with device.phase("optimizer"):
        if part is not None:
            part.step(optimizer)
            return
        trained = [(parameter, sharding.local(parameter)) for parameter in _parameters(model)]
        for parameter, own in trained:
            if own is not parameter:
                own.grad, parameter.grad = parameter.grad.to_local(), None  # type: ignore[union-attr]
        if run.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_([own for _, own in trained], run.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def evaluation_step(run: PlainRun, model: Any, device: Device) -> None:
    """Run the evaluation of one batch, whose logits are kept, in fp32, beside its loss."""
    model.eval()
    with torch.no_grad(), device.phase("evaluation"):
        batch = run.config.per_device_eval_batch_size or 1
        tokens = torch.zeros(batch, run.config.max_seq_length, dtype=torch.int64)

        def evaluate() -> Any:
            if run.teacher is not None:
                return _distillation_loss(run, model, tokens, device)
            if run.fused_loss == "trl":
                return fused_loss(model, tokens, device, "trl")
            logits = model(input_ids=tokens, use_cache=False).logits
            return model.loss_function(logits=logits, labels=tokens, vocab_size=logits.shape[-1])

        with _casting(run):
            _whole(model, evaluate)


def _whole(model: Any, function: Callable[[], Any]) -> Any:
    """Return what ``function`` returns, run where FSDP knows that a pass through ``model`` begins and ends."""
    root = model.__dict__.get(ROOT)
    return function() if root is None else root(function)


def _loss(run: PlainRun, model: Any, device: Device, batch: int) -> Tensor:
    batch *= run.sequences_each
    with device.host():
        host = torch.zeros(batch, run.config.max_seq_length, dtype=torch.int64)

    def compute() -> Any:
        with device.phase("forward"):
            tokens = device.put(host)
        if run.answers:  # these were scored where they were generated
            _passes_of_reference(run, model, tokens, device)
            return policy(tokens)
        if run.mismatched:
            with device.phase("forward"), torch.no_grad(), all_run(model):
                _log_probabilities(run, model, tokens, device)
        loss = policy(tokens)
        _passes_of_reference(run, model, tokens, device)
        return loss

    def policy(tokens: Tensor) -> Any:
        if run.scores:
            return reward_loss(model, tokens, device)
        if run.teacher is not None:
            return _distillation_loss(run, model, tokens, device)
        if run.fused_loss:
            return fused_loss(model, tokens, device, run.fused_loss)
        if run.answers:
            return answers_loss(model, tokens, run.answers, device, single=run.mixed_precision is not None)
        with device.phase("forward"):
            output = model(input_ids=tokens, use_cache=False)
        with device.phase("loss"):
            logits = output.logits.float() if run.mixed_precision else output.logits
            return model.loss_function(logits=logits, labels=tokens, vocab_size=logits.shape[-1])

    with _casting(run):
        loss: Tensor = _whole(model, compute)
    return loss / run.config.gradient_accumulation_steps


def _distillation_loss(run: PlainRun, model: Any, tokens: Tensor, device: Device) -> Tensor:
    def teacher() -> Any:
        with torch.no_grad(), all_run(model):
            return model.get_submodule(REFERENCE)(input_ids=tokens, use_cache=True)

    single = run.mixed_precision is not None
    return distillation_loss(model, teacher, tokens, device, single=single, beta=run.beta)


def _passes_of_reference(run: PlainRun, model: Any, tokens: Tensor, device: Device) -> None:
    """Run what scores ``tokens`` beside the model that trains: a frozen copy, or the model without its adapters."""
    if not run.reference and not run.base_is_reference:
        return
    reference = model.get_submodule(REFERENCE) if run.reference else model
    with device.phase("forward"), torch.no_grad(), all_run(model), lora.without_adapters(model):
        for _ in range(2 if run.mismatched else 1):
            _log_probabilities(run, reference, tokens, device)


def _log_probabilities(run: PlainRun, model: Any, tokens: Tensor, device: Device) -> None:
    if run.answers and not run.fused_loss:
        answers_loss(model, tokens, run.answers, device, single=run.mixed_precision is not None)
    elif run.fused_loss == "trl":
        fused_loss(model, tokens, device, "trl")
    else:
        model(input_ids=tokens, use_cache=False).logits.float().logsumexp(-1)


def _casting(run: PlainRun) -> AbstractContextManager[Any]:
    if run.mixed_precision is None:
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.float16 if run.mixed_precision == "fp16" else torch.bfloat16)
