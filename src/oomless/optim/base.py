"""What every optimizer here has in common: one parameter at a time, in slices, decided on the device.

Three promises, which torch's own optimizers do not make together:

- **No temporary beyond ``slice_bytes``.** A parameter is updated slice by slice, so that the largest matrix
  (the embedding of a 256,000-word vocabulary) asks for no second tensor of its size. Slicing costs kernel
  launches, not memory traffic.
- **No wait for the device.** Step counters, the gradient's scale and the overflow flag are tensors on the
  device. Nothing is read back, so a step also runs under ``FakeTensorMode``, where a rehearsal predicts its
  memory.
- **State is tensors only**, with stable names, restored bit for bit. It is allocated when the optimizer is
  made: a run that does not fit fails before it has trained, and its second step needs no more than its first.

``gradient_scale`` joins unscaling (1 / loss scale) and clipping (``clip_coefficient``) into one number that
multiplies the gradient as it is read. Gradients are used up by a step: those in fp32 are scaled in place, as
torch's fused optimizers do. Where ``found_inf`` is 1 a step changes nothing: no weight, no state, no counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oomless.optim.fused import Terms, Update
from oomless.optim.noise import noise_constants, noise_key
from oomless.optim.offload import SMALLEST_OFFLOADED, HostMemory, staged, to_host
from oomless.optim.precision import WeightPrecision, weight_precision
from oomless.units import MiB

DEFAULT_SLICE_BYTES = 64 * MiB
SLICE_MULTIPLE = 256
"""Slices start at multiples of this many elements, which keeps blocks of quantised state whole."""

SCALAR_BYTES = 4096
"""Left over in each slice for a step's 0-dim tensors and tables."""

_TRIED_SHAPE, _TRIED_RATE = (17, SLICE_MULTIPLE), 1e-2

WEIGHT_STATE_NAMES = frozenset({"master", "correction"})
"""State that belongs to the weight's own precision."""

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]
Group = dict[str, Any]
State = dict[str, Tensor]


class MemoryLeanOptimizer(Optimizer):
    """Base of the optimizers: loops, slices, state, checks. Subclasses give the state and the update.

    Args:
        parameters: tensors, or groups as for any ``torch.optim.Optimizer``. A group may also set
            ``weight_precision`` (``precision.py``).
        defaults: hyperparameters of groups that do not set them.
        weight_precision: how sixteen-bit weights take updates; None for fp32 weights.
        slice_bytes: upper bound of the temporaries of a step, in bytes.
        seed: of stochastic rounding.
        offload: the device whose pinned host memory keeps the state of larger parameters (``offload.py``).

    Raises:
        ValueError: a hyperparameter is out of range, a weight's dtype does not fit ``weight_precision``, or nothing of the
            optimizer's state could be offloaded.
    """

    sliced_state: frozenset[str] = WEIGHT_STATE_NAMES
    """The state that the update reads slice by slice, and which can therefore lie on the host."""

    fused: bool = False
    """Whether elementwise updates are one operator each, without temporaries (``fused.py``), or their plain forms in slices."""

    def __init__(
        self,
        parameters: Parameters,
        defaults: dict[str, Any],
        *,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
        offload: HostMemory | None = None,
    ) -> None:
        if slice_bytes < 64 * SLICE_MULTIPLE:
            raise ValueError(f"slice_bytes must be at least {64 * SLICE_MULTIPLE}; got {slice_bytes}")
        self.slice_bytes = slice_bytes
        self.before_update: Callable[[Tensor], None] | None = None
        """Called with each parameter before anything of it or its state changes."""
        self._offload = offload
        self._offloaded: dict[Tensor, int] = {}
        self._index: dict[Tensor, int] = {}
        self._shapes: dict[tuple[int, torch.Size, torch.dtype], State] = {}
        super().__init__(parameters, {**defaults, "weight_precision": weight_precision, "seed": seed})
        if offload is not None and not self._offloaded:
            raise ValueError(
                f"offload_optimizer has no effect: {type(self).__name__} keeps nothing of these parameters that could lie on the "
                "host; leave it out"
            )

    # -- what a subclass gives -------------------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        """Raise a ValueError where a group's hyperparameters are out of range."""
        require_range("lr", group["lr"], 0.0)
        require_range("weight_decay", group["weight_decay"], 0.0)

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        """Return the first state of ``parameter``, without counter and weight precision."""
        raise NotImplementedError

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update one parameter and its state in place; the counter has already moved."""
        raise NotImplementedError

    # -- the step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradient_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients; called first, its result is returned.
            gradient_scale: 0-dim fp32 tensor on the device; multiplies every gradient as it is read.
            found_inf: 0-dim fp32 tensor on the device; where it is 1 nothing changes.

        Raises:
            ValueError: a gradient is sparse, not contiguous, or of another shape than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(
                        parameter, parameter.grad, group, gradient_scale=gradient_scale, found_inf=found_inf
                    )
        return loss

    @torch.no_grad()
    def step_parameter(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        *,
        gradient_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update one parameter of ``group`` with ``gradient``, which is used up; see ``step``."""
        if gradient.layout != torch.strided or not gradient.is_contiguous() or gradient.shape != parameter.shape:
            strides = gradient.stride() if gradient.layout == torch.strided else "none"
            raise ValueError(
                f"gradients must be dense, contiguous and shaped as the parameter, {tuple(parameter.shape)}; "
                f"got layout {gradient.layout}, shape {tuple(gradient.shape)}, strides {strides}"
            )
        if self.before_update is not None:
            self.before_update(parameter)
        state: State = self.state[parameter]
        state["step"].add_(1.0 if found_inf is None else 1.0 - found_inf)
        self._update(parameter, gradient, group, state, gradient_scale, found_inf)

    def _place_state(self, parameter: Tensor, group: Group) -> State:
        """Make the state of ``parameter`` where it belongs, without holding it where it does not."""
        if self._offload is None or parameter.numel() < SMALLEST_OFFLOADED:
            return self._new_state(parameter, group)
        shapes = self._shapes_of_state(parameter, group)
        if not self.sliced_state & shapes.keys():
            return self._new_state(parameter, group)
        self._note_offloaded(parameter, shapes)
        host = self._offload.fetch(parameter)
        with self._offload.host():
            state = self._new_state(host, group)
        del host
        return to_host(state, self.sliced_state, self._offload)

    def _shapes_of_state(self, parameter: Tensor, group: Group) -> State:
        """Return the state of ``parameter``, of the group that is being added, without memory: made once for all of its kind."""
        kind = (len(self.param_groups), parameter.shape, parameter.dtype)
        if kind not in self._shapes:
            self._shapes[kind] = self._new_state(parameter.detach().to("meta"), group)
        return self._shapes[kind]

    def _new_state(self, parameter: Tensor, group: Group) -> State:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **self._new_moments(parameter, group),
            **weight_precision_of(parameter, group).new_state(parameter),
        }

    # -- slices ----------------------------------------------------------------------------------------------

    def _slices(self, count: int, temporary_bytes: int) -> Iterator[slice]:
        """Cut ``count`` elements so that ``temporary_bytes`` per element stay within ``slice_bytes``."""
        length = max(1, count)
        if temporary_bytes:
            length = (self.slice_bytes - SCALAR_BYTES) // temporary_bytes // SLICE_MULTIPLE * SLICE_MULTIPLE
        for start in range(0, count, length):
            yield slice(start, min(start + length, count))

    def _update_slices(
        self,
        update: Update,
        rates: tuple[float, ...],
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        plain_bytes: int,
    ) -> None:
        """Update element by element, in slices whose temporaries take ``plain_bytes`` an element, or none where fused."""
        precision = weight_precision_of(parameter, group)
        terms = Terms(
            precision=precision,
            rates=rates,
            step=state["step"],
            scale=gradient_scale,
            found_inf=found_inf,
            noise=self._noise_constants(parameter, group),
        )
        weights, gradients = parameter.view(-1), gradient.view(-1)
        temporary_bytes = 0 if self.fused else max(plain_bytes, precision.peak_bytes)
        pieces = self._slices(parameter.numel(), temporary_bytes + self._staged_bytes(parameter))
        update_slice = update if self.fused else update.plain
        for piece, part in self._with_state(parameter, state, pieces, state_slice):
            update_slice(weights[piece], gradients[piece], part, terms, piece.start)

    def _with_state(
        self, parameter: Tensor, state: State, pieces: Iterable[slice], cut: Callable[[State, slice], State]
    ) -> Iterator[tuple[slice, State]]:
        """Yield each piece with its state on the device, as ``cut`` gives it."""
        if self._offload is None or parameter not in self._offloaded:
            return ((piece, cut(state, piece)) for piece in pieces)
        return staged(pieces, lambda piece: cut(state, piece), self.sliced_state, self._offload)

    def _staged_bytes(self, parameter: Tensor) -> int:
        """Return what the slices of offloaded state that are on the device take, in bytes per element."""
        return self._offloaded.get(parameter, 0)

    def _noise_constants(self, parameter: Tensor, group: Group) -> tuple[int, int] | None:
        """Return what the random bits for ``parameter`` follow from beside the step, or None where none are needed."""
        if not weight_precision_of(parameter, group).needs_noise:
            return None
        return noise_constants(group["seed"], self._index[parameter])

    def _noise_key(self, parameter: Tensor, group: Group, state: State) -> Tensor | None:
        """Return the key of this step's random bits for ``parameter``, or None where none are needed."""
        constants = self._noise_constants(parameter, group)
        return None if constants is None else noise_key(constants, state["step"])

    # -- fused updates ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def try_fused(self) -> None:
        """Update small tensors of every kind that trains in both ways, where the weights lie.

        Raises:
            RuntimeError: the results are not the same to rounding. What a compiler raises goes through.
        """
        tried = set()
        for group in self.param_groups:
            for parameter in group["params"]:
                way = weight_precision_of(parameter, group)
                kind = (
                    parameter.dtype,
                    parameter.dim() > 1,
                    way,
                    *(tensor.dtype for tensor in self.state[parameter].values()),
                )
                if kind not in tried:
                    tried.add(kind)
                    ours, plain = (self._tried(parameter, group, fused) for fused in (True, False))
                    # Two roundings may fall apart by one neighbour.
                    allowed = plain.abs() * (0.0 if way.value_bytes == 0 else torch.finfo(parameter.dtype).eps)
                    if not bool(((ours - plain).abs() <= allowed + _TRIED_RATE / 50).all()):
                        raise RuntimeError(f"fused updates of {parameter.dtype} differ from their plain form")

    def _tried(self, parameter: Tensor, group: Group, fused: bool) -> Tensor:
        """Return the values of a small weight like ``parameter`` after three updates."""
        wave = torch.arange(math.prod(_TRIED_SHAPE), dtype=torch.float32, device=parameter.device).mul_(0.37).sin_()
        if parameter.dim() > 1:
            wave = wave.view(_TRIED_SHAPE)
        group = {**group, "lr": _TRIED_RATE}
        weight = wave.to(parameter.dtype)
        state = self._new_state(weight, group)
        scale, found_inf = torch.ones_like(state["step"]), torch.zeros_like(state["step"])
        self._index[weight], before, self.fused = self._index[parameter], self.fused, fused
        try:
            for factor in (1.0, -0.5, 3.0):
                state["step"].add_(1.0)
                self._update(weight, (wave.cos() * factor).to(weight.dtype), group, state, scale, found_inf)
        finally:
            self.fused = before
            del self._index[weight]
        return weight_precision_of(weight, group).read(weight, state).float()

    # -- where state lies ------------------------------------------------------------------------------------

    def movable_bytes(self) -> int:
        """Return how much of the state lies on the device and could lie on the host."""
        return sum(
            self.state[parameter][name].nbytes
            for parameter in self._index
            if parameter not in self._offloaded
            for name in self._movable(parameter)
        )

    def _movable(self, parameter: Tensor) -> list[str]:
        return (
            [] if parameter.numel() < SMALLEST_OFFLOADED else sorted(self.sliced_state & self.state[parameter].keys())
        )

    @torch.no_grad()
    def offload_state(self, device: HostMemory) -> None:
        """Move what can lie on the host to pinned memory of ``device``; what lies there already stays."""
        self._offload = device
        for parameter in self._index:
            names = self._movable(parameter)
            if names and parameter not in self._offloaded:
                state = self.state[parameter]
                state |= to_host({name: state[name] for name in names}, self.sliced_state, device)
                self._note_offloaded(parameter, state)

    @torch.no_grad()
    def fetch_state(self) -> None:
        """Move all state to the device; where it ends for lack of room each parameter's lies in one place or the other."""
        for parameter in list(self._offloaded):
            assert self._offload is not None
            here = {name: self._offload.put(self.state[parameter][name]) for name in self._movable(parameter)}
            self._offload.label(here.values(), "optimizer state")
            self.state[parameter] |= here
            del self._offloaded[parameter]

    def _note_offloaded(self, parameter: Tensor, state: State) -> None:
        bytes_ = sum(state[name].nbytes for name in self.sliced_state & state.keys())
        self._offloaded[parameter] = 3 * -(-bytes_ // parameter.numel())

    # -- state -----------------------------------------------------------------------------------------------

    def state_tensors(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of ``parameter`` by name; the tensors themselves, not copies."""
        return dict(self.state[parameter])

    def load_state_tensors(self, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        """Copy what ``state_tensors`` returned into the state of ``parameter``, bit for bit.

        Raises:
            ValueError: the names, dtypes or shapes differ: another optimizer or other settings wrote it.
        """
        self._check_layout(parameter, tensors)
        for name, tensor in tensors.items():
            self.state[parameter][name].copy_(tensor)

    def state_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes of state that a parameter of this shape and dtype would have, with the defaults.

        Nothing is allocated: the state is built on the meta device by the code that builds the real one.
        """
        parameter = torch.empty(tuple(shape), dtype=dtype, device="meta")
        group = {**self.defaults}
        if dtype == torch.float32:
            group["weight_precision"] = None
        return sum(tensor.nbytes for tensor in self._new_state(parameter, group).values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, bit for bit, on each parameter's device.

        torch's own version would cast every state tensor to its parameter's dtype.

        Raises:
            ValueError: the groups differ in number or size, or a tensor does not fit its parameter.
        """
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(f"the saved parameter groups have sizes {saved_sizes}; this optimizer's have {sizes}")
        groups = [
            {**group, **deepcopy(saved), "params": group["params"]}
            for group, saved in zip(self.param_groups, saved_groups, strict=True)
        ]
        tensors: dict[Tensor, State] = {}
        for group, saved in zip(groups, saved_groups, strict=True):
            self._check_group(group)
            for parameter, identifier in zip(group["params"], saved["params"], strict=True):
                tensors[parameter] = state_dict["state"].get(identifier, {})
                self._check_layout(parameter, tensors[parameter])
        for parameter, state in tensors.items():
            self.load_state_tensors(parameter, state)
        self.__setstate__({"state": self.state, "param_groups": groups})

    def _check_layout(self, parameter: Tensor, tensors: State) -> None:
        needed, given = (
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
            for state in (self.state[parameter], tensors)
        )
        if needed != given:
            raise ValueError(
                f"a saved state must fit its parameter; number {self._index[parameter]} needs {needed}; "
                f"got {given}; resume with the optimizer and settings that wrote it"
            )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters and allocate their state; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for parameter in group["params"]:
                if not parameter.is_contiguous():
                    raise ValueError(f"parameters must be contiguous; got strides {parameter.stride()}")
                weight_precision_of(parameter, group)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            self._index[parameter] = len(self._index)
            self.state[parameter] = self._place_state(parameter, group)


def weight_precision_of(parameter: Tensor, group: Group) -> WeightPrecision:
    """Return how ``parameter`` takes its updates.

    Raises:
        ValueError: the group's ``weight_precision`` is unknown or does not fit the parameter's dtype.
    """
    return weight_precision(group["weight_precision"], parameter.dtype)


def state_slice(state: State, piece: slice) -> State:
    """Return the state of the elements in ``piece``, flat; the counter as it is, scales by their blocks."""

    def cut(name: str, tensor: Tensor) -> Tensor:
        if name == "step":
            return tensor
        if name.endswith("_scale"):
            return tensor[piece.start // SLICE_MULTIPLE : -(-piece.stop // SLICE_MULTIPLE)]
        return tensor.view(-1)[piece]

    return {name: cut(name, tensor) for name, tensor in state.items()}


def weight_state_slice(state: State, piece: slice) -> State:
    """Return what the weight's own precision keeps of the elements in ``piece``, flat."""
    return {name: tensor.view(-1)[piece] for name, tensor in state.items() if name in WEIGHT_STATE_NAMES}


def store_unless(found_inf: Tensor | None, target: Tensor, new: Tensor) -> None:
    """Copy ``new`` to ``target``, or nothing where ``found_inf`` is 1; both have one dtype."""
    if found_inf is None:
        target.copy_(new)
    else:
        torch.where(found_inf.bool(), target, new, out=target)


def require_range(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raise a ValueError unless ``value`` is a number with ``low <= value < high``."""
    if isinstance(value, Tensor) or not low <= value < high:
        raise ValueError(f"{name} must be a number from {low} to below {high}; got {value!r}")
