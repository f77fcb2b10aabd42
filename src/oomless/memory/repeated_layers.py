"""Layers of one kind, run once in a rehearsal; what the others would ask for is asked again.

The layers of a transformer differ in their numbers, and a rehearsal has none. Of each kind the first layer's forward and the
last layer's backward are written down on tapes (``tape.py``); every layer between hands on a tensor of the right size, keeps
what the first kept, and asks in its own backward for what the last asked for. The allocator sees the same requests in the same order as
if all had run, so the books are the same to the byte, which ``tests/planning/test_repeated_layers.py`` compares.

Where backward runs through a layer is known exactly: autograd calls the node before it when its gradient is complete. What crosses
from one layer to the next is the hidden state, its gradient, what backward carries on (a running norm, an input that is fetched
ahead), and where inputs go to the host the one of the layer before, which the next layer frees. What comes ahead of a layer
is in truth the next layer's that runs, and must be as large as the next layer's own. A layer that frees anything else cannot be
repeated, and ``CannotRepeat`` says so: then all layers have to be run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oomless.memory.tape import Held, Tape
from oomless.memory.tracker import Booking
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.memory.work import Counted

INPUT, GRADIENT, PREVIOUS = "input", "gradient", "the input of the layer before"


class CannotRepeat(Exception):
    """A layer leaves or frees what is not known, so that each has to be run."""


@contextmanager
def repeated_layers(
    model: nn.Module,
    layers: Sequence[nn.Module],
    kinds: Sequence[Hashable],
    device: VirtualGPU,
    coming: Callable[[], Sequence[Tensor]],
) -> Iterator[None]:
    """Inside, only some of ``layers`` run: of each kind the first and the last, and the first and last of all.

    Args:
        model: what they are part of.
        layers: in forward's order; each takes a hidden state first and returns one of its shape.
        kinds: for each of them, equal for those that ask for the same.
        device: with fake tensors and a history.
        coming: returns what one layer fetched for the next.

    Raises:
        CannotRepeat: from a forward or backward inside.
    """
    names = {id(module): name for name, module in model.named_modules()}
    inner = range(1, len(layers) - 1)
    members: dict[Hashable, list[int]] = {kind: [] for kind in kinds}
    for place in inner:
        members[kinds[place]].append(place)
    stack = _Stack(device, kinds, coming)
    places = []
    for place, layer in enumerate(layers if any(len(alike) > 2 for alike in members.values()) else ()):
        alike, name = members[kinds[place]], names[id(layer)]
        repeats = place in inner and len(alike) > 2
        part = _Layer(
            layer,
            name,
            stack.kinds.setdefault(kinds[place], _Kind()),
            stack,
            runs=not repeats or place in (alike[0], alike[-1]),
            keeps_tape=repeats,
            leads=repeats and place == alike[0],
            place=place,
        )
        if not place:
            stack.first = part
        parent, _, child = name.rpartition(".")
        places.append((model.get_submodule(parent), child, layer))
        setattr(model.get_submodule(parent), child, part)
    try:
        yield
        stack.check()
    except torch.OutOfMemoryError:
        stack.check()
        raise
    finally:
        for parent_module, child, layer in places:
            setattr(parent_module, child, layer)


@contextmanager
def all_run(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of ``model`` runs, such as for a pass without gradients between a forward and its backward."""
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, _Layer)]
    for name, part in parts:
        model.set_submodule(name, part.layer)
    try:
        yield
    finally:
        for name, part in parts:
            model.set_submodule(name, part)


class _Kind:
    """What layers of one kind ask for in the current micro-batch."""

    def __init__(self) -> None:
        self.forward: Tape | None = None
        self.output: Any = None
        self.coming: list[Any] = []
        self.left: dict[str, list[int]] = {}
        """How large what comes ahead of the next layer is when one of those that are repeated ends, forward and backward."""

        self.counted_forward: Counted = ()
        self.keeps_input = False
        self.frees_previous = False
        """Whether a layer's forward frees the input of the one before, as where inputs are copied to the host."""

        self.backward: Tape | None = None
        self.input_gradient: Any = None
        self.gradients: dict[str, Any] = {}
        self.carried: list[Any] = []
        self.counted_backward: Counted = ()


class _Stack:
    """What the layers share."""

    def __init__(self, device: VirtualGPU, kinds: Sequence[Hashable], coming: Callable[[], Sequence[Tensor]]) -> None:
        assert device._recorder is not None
        assert device._fake_mode is not None
        self.tracker, self.recorder, self.work = device._tracker, device._recorder, device._fake_mode.work
        self.kinds: dict[Hashable, _Kind] = {}
        self.kinds_in_order, self.coming = kinds, coming
        self.left: dict[str, dict[int, list[int]]] = {"forward": {}, "backward": {}}
        """How large what had come ahead was when layers that run ended, in bytes: by their places, as they ran in the current pass."""

        self.carried: list[Booking] = []
        """Of tensors that one layer's backward leaves for the next; their allocation is the newest."""

        self.lingering: Booking | None = None
        """Of the input of the layer before, where something still holds it."""

        self.first: _Layer | None = None
        self.before: _Layer | None = None

    def booking(self, tensor: Tensor) -> Booking:
        found = self.tracker.find(tensor)
        if len(found) != 1 or found[0].allocation is None:
            raise CannotRepeat("a hidden state or gradient is not one booked storage")
        return found[0]

    def ahead(self) -> list[Booking]:
        """Return what has come ahead of the next layer."""
        return [self.booking(tensor) for tensor in self.coming()]

    def sizes(self) -> list[int]:
        return [booking.size_bytes for booking in self.ahead()]

    def check(self) -> None:
        """Check that each layer of the pass that ends left what the next one, of all, finds; and begin another."""
        kinds = self.kinds_in_order
        for direction, step in (("forward", 1), ("backward", -1)):
            ended = self.left[direction]
            found = {kinds[place]: sizes for place, sizes in zip([*ended][1:], ended.values(), strict=False)}
            for place, kind in enumerate(kinds if ended else ()):
                following, left = place + step, ended.get(place, self.kinds[kind].left.get(direction))
                if left and 0 <= following < len(kinds) and found.get(kinds[following], left) != left:
                    raise CannotRepeat(
                        "what comes ahead of the next layer that runs is not what comes ahead of the next"
                    )
            ended.clear()

    def taken(self, booking: Booking) -> Held:
        """Return what ``booking`` holds, which is the caller's from now on."""
        allocation, booking.allocation = booking.allocation, None
        return booking.ledger, allocation

    def holder(self, allocation: Any) -> Booking:
        for booking in self.tracker._bookings.values():
            if booking.allocation is allocation:
                return booking
        raise CannotRepeat("a layer's backward leaves memory that no tensor has")


class _Layer(nn.Module):
    """Stands in for ``layer``: runs it and writes down what it asks for, or asks for that again."""

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        kind: _Kind,
        stack: _Stack,
        *,
        runs: bool,
        keeps_tape: bool,
        leads: bool,
        place: int,
    ) -> None:
        super().__init__()
        self.__dict__["layer"] = layer
        # Parameters keep their names.
        self._modules, self._parameters, self._buffers = layer._modules, layer._parameters, layer._buffers
        self.name, self.kind, self.stack = name, kind, stack
        self.trained = [(name, parameter) for name, parameter in layer.named_parameters() if parameter.requires_grad]
        self.runs, self.keeps_tape, self.leads, self.place = runs, keeps_tape, leads, place
        self.tape: Tape | None = None
        self.booking: Any = None
        self.input: Any = None
        self.counted: Counted = ()
        self.keeps_input = False

    def __getattr__(self, name: str) -> Any:
        """Return what a model reads of its layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return a hidden state like ``hidden``."""
        stack, before = self.stack, self.stack.before
        stack.tracker.settle()
        if stack.first is self:
            before, stack.carried = None, []
            stack.check()
        stack.before = self
        if before is None or before.runs:
            stack.lingering = None if before is None else before.note_whether_input_is_kept()
        self.booking = stack.booking(hidden)
        self.input = self.booking.allocation
        if not self.runs:
            if self.kind.forward is None or before is None:
                raise CannotRepeat("layers run in another order")
            before.keeps_input &= not self.kind.frees_previous
            stack.recorder.module_started(self.name)
            try:
                return _Repetition.apply(hidden, self)  # type: ignore[no-untyped-call, no-any-return]
            finally:
                stack.recorder.module_ended()
        passed = _marked(hidden, self.backward_ended)
        previous = None if stack.lingering is None else stack.lingering.allocation
        known = {} if previous is None else {PREVIOUS: previous}
        known |= {("coming", place): booking.allocation for place, booking in enumerate(stack.ahead())}
        self.tape = Tape("forward", known)
        counted = stack.work.snapshot()
        stack.tracker.start(self.tape)
        try:
            output = self.layer(passed, *args, **kwargs)
        finally:
            stack.tracker.stop(self.tape)
        if type(output) is not torch._subclasses.FakeTensor:
            raise CannotRepeat("a layer returns more than a hidden state")
        freed = previous is not None and self.tape.name_of(previous) is None
        if freed and before is not None:
            before.keeps_input = False
        stack.left["forward"][self.place] = stack.sizes()
        if self.keeps_tape:
            self._forward_ended(output, stack.work.since(counted), frees_previous=freed)
        return _marked(output, self.backward_begins)

    def _forward_ended(self, output: Tensor, counted: Counted, *, frees_previous: bool) -> None:
        assert self.tape is not None
        kind = self.kind
        if not self.tape.repeatable:
            raise CannotRepeat("a layer's forward frees what it did not make")
        if self.leads:
            kind.forward, kind.backward, kind.counted_forward = self.tape, None, counted
            kind.frees_previous = frees_previous
            kind.left = {"forward": self.stack.sizes()}
            kind.output = self.tape.name_of(self.stack.booking(output).allocation)
            kind.coming = [self.tape.name_of(booking.allocation) for booking in self.stack.ahead()]
            if kind.output is None or None in kind.coming:
                raise CannotRepeat("a layer returns what it did not make")
        elif kind.forward is None or not self.tape.same_as(kind.forward):
            raise CannotRepeat("layers of one kind ask for different memory in forward")

    def note_whether_input_is_kept(self) -> Booking | None:
        """Look, when the next layer begins, whether something holds this one's input, and return its booking if so."""
        self.keeps_input = self.input.block is not None
        if self.keeps_tape:
            self.kind.keeps_input = self.keeps_input and not self.kind.frees_previous
        return self.booking if self.keeps_input else None

    # A layer that runs: its backward lies between the marks that call these two.

    def backward_begins(self, gradient: Tensor) -> None:
        """Start to write down this layer's backward; ``gradient`` is that of its output."""
        stack = self.stack
        stack.tracker.settle()
        assert self.tape is not None
        known: dict[Any, Any] = self.tape.alive
        known.pop(PREVIOUS, None)
        known[GRADIENT] = stack.booking(gradient).allocation
        if self.keeps_tape:
            for name in (self.kind.output, *self.kind.coming):  # the next layer's by now
                known.pop(name, None)
        if self.keeps_input:
            known[INPUT] = self.input
        known |= {("carried", place): booking.allocation for place, booking in enumerate(stack.carried)}
        known |= {("old", name): stack.booking(old).allocation for name, old in self._gradients()}
        self.tape = Tape("backward", known)
        self.counted = stack.work.snapshot()
        stack.tracker.start(self.tape)

    def _gradients(self) -> list[tuple[str, Tensor]]:
        return [(name, p.grad) for name, p in self.trained if p.grad is not None]

    def backward_ended(self, gradient: Tensor) -> None:
        """Keep what was written down; ``gradient`` is that of this layer's input."""
        stack, tape, kind = self.stack, self.tape, self.kind
        if tape is None or tape.name != "backward":
            raise CannotRepeat("a layer's backward ended before it began")
        stack.tracker.stop(tape)
        alive = tape.alive
        input_gradient = tape.name_of(stack.booking(gradient).allocation)
        gradients = {name: tape.name_of(stack.booking(new).allocation) for name, new in self._gradients()}
        for name in (input_gradient, *gradients.values(), GRADIENT):
            alive.pop(name, None)
        carried = [name for name in alive if name[0] == "carried"] + [name for name in alive if name[0] == "backward"]
        stack.carried = [stack.holder(alive.pop(name)) for name in carried]
        stack.left["backward"][self.place] = stack.sizes()
        if not self.keeps_tape or self.leads:  # the leading one is the last to go, with what its kind shares
            return
        if alive or not tape.repeatable or input_gradient is None:
            raise CannotRepeat(f"a layer's backward leaves {list(alive)} or frees what is not known")
        kind.left["backward"] = stack.sizes()
        kind.backward, kind.counted_backward = tape, stack.work.since(self.counted)
        kind.input_gradient, kind.gradients, kind.carried = input_gradient, gradients, carried

    # A layer that is repeated.

    def repeat_forward(self) -> tuple[Held, dict[Any, Held]]:
        """Ask for what a forward asks for; return what the output is booked as, and what is kept for backward."""
        stack, kind = self.stack, self.kind
        assert kind.forward is not None
        held: dict[Any, Held] = {}
        if not kind.frees_previous:
            stack.lingering = None
        elif stack.lingering is None:
            raise CannotRepeat("a layer's input is gone before the next one begins")
        else:
            held[PREVIOUS] = stack.taken(stack.lingering)
        coming = stack.ahead()
        if len(coming) != len(kind.coming):
            raise CannotRepeat("layers fetch ahead in one pass and not in another")
        held |= {("coming", place): stack.taken(booking) for place, booking in enumerate(coming)}
        stack.tracker.repeat(kind.forward, held)
        for booking, name in zip(coming, kind.coming, strict=True):
            booking.ledger, booking.allocation = held.pop(name)
        stack.work.repeat(kind.counted_forward)
        if stack.lingering is not None:  # what held that holds this one's input from now on
            stack.lingering.ledger, stack.lingering.allocation = stack.taken(self.booking)
        return held.pop(kind.output), held

    def repeat_backward(self, hidden: Tensor | None, gradient: Tensor, held: dict[Any, Held]) -> Tensor:
        """Ask for what a backward asks for; return the gradient of the input, and leave those of the parameters."""
        stack, kind = self.stack, self.kind
        if kind.backward is None or len(kind.carried) != len(stack.carried):
            raise CannotRepeat("backward runs in another order")
        given: dict[Any, Booking] = {GRADIENT: stack.booking(gradient)}
        if hidden is not None:
            given[INPUT] = stack.booking(hidden)
        given |= {("carried", place): booking for place, booking in enumerate(stack.carried)}
        given |= {("old", name): stack.booking(old) for name, old in self._gradients()}
        held |= {name: stack.taken(booking) for name, booking in given.items()}
        stack.tracker.repeat(kind.backward, held)
        stack.work.repeat(kind.counted_backward)
        new = [held.pop(name) for name in kind.carried]
        for booking, (ledger, allocation) in zip(stack.carried, new, strict=True):
            booking.ledger, booking.allocation = ledger, allocation
        self._leave_gradients(held, given)
        result = gradient
        if kind.input_gradient != GRADIENT:
            result = stack.tracker.adopt(lambda: torch.empty_like(gradient), held.pop(kind.input_gradient))
        if GRADIENT in held:
            given[GRADIENT].allocation = held.pop(GRADIENT)[1]
        if held:
            raise CannotRepeat(f"a layer's backward would leave {list(held)}")
        return result

    def _leave_gradients(self, held: dict[Any, Held], given: Mapping[Any, Booking]) -> None:
        for name, parameter in self.trained:
            called = self.kind.gradients.get(name)
            if called is None:
                parameter.grad = None
            elif called == ("old", name):
                given[called].allocation = held.pop(called)[1]
            else:
                make = partial(torch.empty_like, parameter, requires_grad=False)
                parameter.grad = self.stack.tracker.adopt(make, held.pop(called))


class _Mark(torch.autograd.Function):
    """Hands on a hidden state, and tells when backward has come back to it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        ctx.tell = tell
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tell(gradient)
        return gradient, None


def _marked(hidden: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
    return _Mark.apply(hidden, tell) if hidden.requires_grad else hidden  # type: ignore[no-untyped-call]


class _Repetition(torch.autograd.Function):
    """A layer that does not run."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: _Layer) -> Tensor:
        output, kept = layer.repeat_forward()
        ctx.layer, ctx.kept = layer, kept
        ctx.hidden = hidden.detach() if layer.kind.keeps_input else None
        return layer.stack.tracker.adopt(lambda: torch.empty_like(hidden), output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        hidden, ctx.hidden = ctx.hidden, None
        return ctx.layer.repeat_backward(hidden, gradient, ctx.kept), None
