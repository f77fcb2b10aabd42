"""Every GPU keeps a part of every weight, gradient and optimizer state: FSDP2 (torch's ``fully_shard``; ZeRO-3, Rajbhandari 2020).

Saves: with n GPUs all but 1/n of weights, gradients and optimizer state. Costs: each layer's weights are gathered before its
forward and again before its backward, and its gradients are summed and scattered; while a layer runs, it and the next one
are whole on every GPU, twice for a moment.

Weights are cut by rows. The layers are groups of their own, and so are ``embed_tokens`` and ``lm_head``, each whole only while
it is used; backward needs neither, so they are not gathered again. A tied matrix is used at both ends and stays whole through
the step, as everything else outside the layers does (the last norm).

The loss reads the head's matrix without calling the head, and a step calls the body and not the model, so FSDP's hooks
are hung on two modules that exist for this alone and run a given function while what belongs to them is whole.

Optimizers see plain tensors: each weight's local part (``local``). Those that update every element alone (AdamW, SGD) do in n parts
what they would do in one; 8-bit AdamW does where no part cuts a block of 256.

What cannot be cut (``why_whole``), or is not to be (``sharding: replicate``), is whole on every GPU instead, as in DDP: gradients are
summed before the update, which is then the same everywhere. That saves no memory, but the gathering before every layer. Packed
weights beside it, and those on the host, are cut as bytes (``peers.py``), and ends that do not train by rows (``vocabulary_parts.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from oomless.config import TrainConfig
from oomless.errors import ConfigError, ModelError
from oomless.memory.device import Device
from oomless.memory.tracker import import_unbooked
from oomless.optim.adamw import is_quantisable
from oomless.optim.blockwise import BLOCK
from oomless.techniques.block_dropout import belongs_to_blocks
from oomless.techniques.checkpointing import decoder_layers
from oomless.techniques.kinds import body_of

FSDP = "torch.distributed.fsdp"
ELEMENTWISE_OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
Result = TypeVar("Result")


def _has_frozen_bytes(config: TrainConfig) -> bool:
    """Return whether frozen weights are packed, or lie on the host."""
    return config.quantization is not None or config.experts_on_host or config.stream_frozen


def cuts_bytes(config: TrainConfig) -> bool:
    """Return whether each GPU keeps a part of every frozen weight that is packed or lies on the host."""
    return _has_frozen_bytes(config) and config.sharding != "replicate"


def why_whole(config: TrainConfig) -> str | None:
    """Return why every GPU holds the whole model, what ``cuts_bytes`` left aside; ``None`` where each holds a part of it."""
    if config.sharding == "replicate":
        return "sharding is replicate"
    if _has_frozen_bytes(config):
        return "it is small beside the rest"
    if config.embeddings_on_host:
        return "a model with tables on the host is cut only where its frozen weights are packed or lie there too"
    if config.optimizer not in ELEMENTWISE_OPTIMIZERS:
        return f"{config.optimizer} needs whole matrices"
    if config.trainable_rows:
        return "the rows of trainable_rows would lie on several GPUs"
    return "the norms of DoRA need whole matrices" if config.use_dora else None


def has_choice(config: TrainConfig) -> bool:
    """Return whether several GPUs may keep parts of what they could as well hold whole."""
    return cuts_bytes(config) or why_whole(config) is None


def check(config: TrainConfig, gpus: int) -> None:
    """Check that so many ``gpus`` can share what ``config`` asks for.

    Raises:
        ConfigError: they cannot.
    """
    if gpus == 1:
        if config.sharding == "shard":
            raise ConfigError("sharding: shard has no effect on one GPU: remove it, or start with torchrun")
        return
    whole = why_whole(config)
    if config.sharding == "shard" and not has_choice(config):
        raise ConfigError(
            f"sharding: shard cannot be used here: {whole}; remove it, and every GPU holds the whole model"
        )
    reasons = {
        "optimizer_in_backward": config.optimizer_in_backward
        and whole is None
        and "of a model in parts a gradient is complete only after backward has gone on; sharding: replicate can",
        "mlp_tiles": config.mlp_tiles
        and config.lora_dropout
        and "beside lora_dropout, masks inside of tiles do not belong to blocks, and GPUs would draw the same for other text",
    }
    for name, reason in reasons.items():
        if reason:
            raise ConfigError(f"{name} cannot be used with several GPUs: {reason}")


def can_share(config: TrainConfig, gpus: int) -> bool:
    """Return whether so many ``gpus`` can share what ``config`` asks for."""
    try:
        check(config, gpus)
    except ConfigError:
        return False
    return True


def check_dropout(model: Any, device: Device) -> None:
    """Check that masks of dropout of ``model`` on ``device`` are those of the step's blocks, whichever process has them.

    Raises:
        ConfigError: they are not.
    """
    if not belongs_to_blocks(model, device):
        raise ConfigError(
            f"dropout of {type(model).__name__} is not cut by blocks, so several GPUs would draw the same masks for other text: set "
            "the model's dropouts to 0"
        )


def shared(config: TrainConfig, gpus: int) -> TrainConfig:
    """Return the settings of each of ``gpus`` that train together: ``tokens_per_step`` is of all, the rest of each.

    Raises:
        ConfigError: the step cannot be shared out evenly.
    """
    if gpus == 1 or config.tokens_per_step is None:
        return config
    if config.gradient_accumulation_steps % gpus:
        least = gpus * config.per_device_train_batch_size * config.max_seq_length
        raise ConfigError(
            "tokens_per_step must be a multiple of GPUs x per_device_train_batch_size x max_seq_length, "
            f"{gpus} x {config.per_device_train_batch_size} x {config.max_seq_length}; got {config.tokens_per_step}: use "
            f"{max(1, round(config.tokens_per_step / least)) * least}"
        )
    passes = config.gradient_accumulation_steps // gpus
    return replace(config, tokens_per_step=None, gradient_accumulation_steps=passes)


class Whole(nn.Module):
    """Runs a function while the parameters of its parts are whole."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, function: Callable[..., Result], *given: Any) -> Result:
        """Return what ``function`` returns; tensors among ``given`` tell FSDP when their backward is over."""
        return function(*given)


class Sharded:
    """A model whose parameters are cut; what is to run with it goes through ``run``.

    Args:
        model: on the meta device, in its final form.
        mesh: the processes.
        materialise: allocates the parameters of a module on the device; they are cut one module at a time.

    Raises:
        ModelError: some of its parameters belong to two of its layers, or neither to its body nor to its head.
    """

    def __init__(self, model: Any, mesh: DeviceMesh, materialise: Callable[[nn.Module], None]) -> None:
        self._materialise, self._mesh = materialise, mesh
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        layers = decoder_layers(model)
        _require_apart(model, layers)
        for layer in layers:
            self._cut(layer)
        self._head = Whole(head)
        self._root = Whole(body_of(model), self._head)
        inside = {id(parameter) for parameter in self._root.parameters()}
        if outside := [name for name, parameter in model.named_parameters() if id(parameter) not in inside]:
            raise ModelError(
                f"{outside[0]} belongs neither to the body nor to the head of this model: it cannot be cut"
            )
        if not tied:
            for end in (embedding, self._head):
                cut = self._cut(end)
                cut.set_unshard_in_backward(False)
                cut.set_modules_to_backward_prefetch([cut])
        self._head_apart = not tied
        self._cut(self._root, reshard_after_forward=False)
        self._fetch_ahead(layers, any(parameter.requires_grad for parameter in embedding.parameters()))
        for module in self._root.modules():
            if isinstance(module, import_unbooked(FSDP).FSDPModule):
                # The loss is divided by all processes' tokens, so gradients are summed and not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _cut(self, module: nn.Module, *, reshard_after_forward: bool = True) -> Any:
        self._materialise(module)
        cut = import_unbooked(FSDP).fully_shard(module, mesh=self._mesh, reshard_after_forward=reshard_after_forward)
        if any(parameter.shape[0] % self._mesh.size() for parameter in module.parameters()):
            # On fake tensors FSDP makes padded parts anew at the first use, which has to come before ``local``.
            cut.unshard()
            cut.reshard()
        return cut

    def _fetch_ahead(self, layers: list[Any], reached: bool) -> None:
        """In backward, gather each layer while the one above it computes; said explicitly because evaluations mislead the default.

        Backward gets down to the embedding where it is ``reached``, else to the lowest layer in which something trains.
        """
        below: Any = None
        for layer in layers:
            reached = reached or any(parameter.requires_grad for parameter in layer.parameters())
            layer.set_modules_to_backward_prefetch([below or layer])
            below = layer if reached else None
        self._root.set_modules_to_backward_prefetch([below or self._root])  # type: ignore[operator]

    def run(self, function: Callable[[], Result]) -> Result:
        """Return what ``function``, which runs the body and then the head inside ``with_head``, returns."""
        result: Result = self._root(function)
        if not torch.is_grad_enabled():
            self._root.reshard()  # type: ignore[operator]
        return result

    def with_head(self, function: Callable[..., Result], *given: Any) -> Result:
        """Return ``function(*given)``, run while the head's matrix is whole."""
        if not self._head_apart:
            return function(*given)
        result: Result = self._head(function, *given)
        return result

    def leave(self) -> None:
        """Leave nothing of a step that failed: nothing gathered, scattered or on its way, and no hold on the processes' group.

        What torch 2.13 has for it (``reset_iter_state``) leaves gradients of gathered weights, and what a failed gathering had allocated.
        """
        states = self._states()
        if states[0]._is_root:  # it has run
            states[0]._comm_ctx = type(states[0]._comm_ctx)()
            states[0]._init_shared_state()
        states[0]._state_ctx.iter_forward_root = None
        states[0]._state_ctx.post_backward_final_callback_queued = False
        for state in states:
            state._training_state = type(state._training_state).IDLE
            group = state._fsdp_param_group
            if group is not None:
                group._training_state = state._training_state
                group._all_gather_result = group._post_reduce_event = group._reshard_after_forward_event = None
                group._post_forward_indices.clear()
                for parameter in group.fsdp_params:
                    parameter.to_sharded()
                    parameter.sharded_param.grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None
                group._to_sharded()
        self._hold(None)

    def join(self) -> None:
        """Use the processes' group of a new attempt."""
        self._hold(self._mesh.get_group())

    def _hold(self, group: Any) -> None:
        for state in self._states():
            if state._fsdp_param_group is not None:
                state._fsdp_param_group.mesh_info.shard_process_group = group

    def _states(self) -> list[Any]:
        """Return FSDP's state of each module that was cut, the root's first."""
        modules = (m for m in self._root.modules() if isinstance(m, import_unbooked(FSDP).FSDPModule))
        return [module._get_fsdp_state() for module in modules]


def _require_apart(model: Any, layers: list[Any]) -> None:
    owners = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    if shared := [name for name, parameter in model.named_parameters() if owners[id(parameter)] > 1]:
        raise ModelError(
            f"{shared[0]} belongs to two layers of {type(model).__name__} (tied, or one inside the other), which cannot be cut one by "
            "one: use sharding: replicate"
        )


def is_cut(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is one process's part of a whole, in torch's terms a ``DTensor``."""
    return hasattr(tensor, "device_mesh")


def has_parts(model: Any) -> bool:
    """Return whether this process holds only parts of ``model``."""
    return any(is_cut(parameter) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of ``tensor``: always the same object, ``tensor`` itself where it was not cut."""
    if not is_cut(tensor):
        return tensor
    cut: Any = tensor
    held: Any = getattr(cut, "held_here", None)
    if held is None:
        # What ``to_local`` returns is a new object each time, and optimizers know their parameters by identity.
        held = cut.to_local().detach()
        held.whole_numel, cut.held_here = cut.numel(), held
    return held  # type: ignore[no-any-return]


def first_element(parameter: Any) -> int:
    """Return how many elements of ``parameter``, flat, come before this process's part."""
    if not is_cut(parameter) or not parameter.numel():
        return 0
    rows = parameter.shape[0]
    each = -(-rows // parameter.device_mesh.size())
    return int(min(parameter.device_mesh.get_local_rank() * each, rows) * (parameter.numel() // rows))


@dataclass(frozen=True, slots=True)
class Part:
    """One process's part of a tensor: elements that follow each other, so that in a file they are one stretch of bytes."""

    shape: tuple[int, ...]
    """Of the whole."""

    start: int
    """How many elements come before."""

    local: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype, as a tensor has it."""
        return self.local.dtype

    def numel(self) -> int:
        """Return the elements of the whole."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Return the bytes of one element."""
        return self.local.element_size()

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a tensor that has the whole's shape."""
        return whole.reshape(-1)[self.start : self.start + self.local.numel()].view(self.local.shape)


def part(parameter: Any, state: Tensor | None = None, name: str = "") -> Part:
    """Return this process's part of ``parameter``, or of the optimizer's ``state`` called ``name`` beside it."""
    held = local(parameter) if state is None else state
    shape, start = _whole(parameter, held, name)
    if not shape and parameter.device_mesh.get_local_rank():
        held = held.new_empty(0)  # the first process writes what all of them have
    return Part(shape, start, held)


def _whole(parameter: Any, held: Tensor, name: str) -> tuple[tuple[int, ...], int]:
    """Return the shape of the whole that ``held`` is a part of, and how many of its elements come before."""
    start = first_element(parameter)
    if name.endswith("_scale"):
        return (-(-parameter.numel() // BLOCK),), start // BLOCK
    return ((), 0) if held.ndim == 0 else (tuple(parameter.shape), start)


def part_of_state(parameter: Tensor, whole: Tensor, name: str) -> Tensor:
    """Return of the optimizer's state ``whole``, called ``name``, what belongs beside this process's part of ``parameter``.

    Raises:
        ValueError: it belongs to another parameter.
    """
    if not is_cut(parameter) or whole.ndim == 0:
        return whole
    held = local(parameter)
    shape, start = _whole(parameter, held, name)
    if tuple(whole.shape) != shape:
        raise ValueError(f"{name} is {tuple(whole.shape)}, and its parameter needs {shape}")
    if name.endswith("_scale"):
        return whole[start : start + -(-held.numel() // BLOCK)]
    return Part(shape, start, held).of(whole)


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy from ``whole`` what this process has of ``parameter``."""
    local(parameter).copy_(part(parameter).of(whole) if is_cut(parameter) else whole)


def check_blocks(model: Any, why: str = "adamw_8bit", cure: str = "use adamw") -> None:
    """Check that no part of a weight ends inside a block of 8-bit state, as ``why`` asks for it.

    Raises:
        ConfigError: one does.
    """
    for name, parameter in model.named_parameters():
        if is_cut(parameter) and parameter.requires_grad and is_quantisable(parameter):
            count = parameter.device_mesh.size()
            each = -(-parameter.shape[0] // count) * (parameter.numel() // parameter.shape[0])
            if each % BLOCK:
                raise ConfigError(
                    f"{why} keeps state in blocks of {BLOCK}, and {name} {tuple(parameter.shape)} is cut after {each} elements "
                    f"for {count} GPUs: {cure}, or use a number of GPUs that divides its rows"
                )
