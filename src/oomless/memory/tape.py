"""What a stretch of a rehearsal asked of the books, to be asked again without running it.

A transformer has many layers of one shape and updates hundreds of parameters of a few, each with the same operators on other
numbers. In a rehearsal there are no numbers: the second time asks for the same bytes, in the same order, as the first. So the
first is written down here, and for the others the requests are made again, of the same allocator in whatever state it is by then.

What is asked for gets the tape's name and a number. What a stretch frees and did not ask for must be known to it by a name, or
the stretch cannot be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Held = tuple[Any, Any]
"""A ledger and its allocation."""


class Tape:
    """Requests, frees, labels and phases in their order.

    Args:
        name: of the stretch.
        known: names of what it may free and did not ask for.
    """

    def __init__(self, name: str = "", known: Mapping[Any, Any] | None = None) -> None:
        self.name = name
        self._events: list[tuple[Any, ...]] = []
        self._alive = {id(allocation): (name, allocation) for name, allocation in (known or {}).items()}
        self._foreign = False

    @property
    def repeatable(self) -> bool:
        """Whether nothing was freed that has no name."""
        return not self._foreign

    @property
    def alive(self) -> dict[Any, Any]:
        """The allocations that are left, known ones among them, by name."""
        return dict(self._alive.values())

    def same_as(self, other: Tape) -> bool:
        """Return whether the same was asked for, in the same order."""
        return self._events == other._events

    def name_of(self, allocation: Any) -> Any:
        """Return the name of what is alive; ``None`` where it is not known."""
        return self._alive.get(id(allocation), (None, None))[0]

    def allocated(self, ledger: Any, size_bytes: int, operation: object, allocation: Any) -> None:
        """Note a request that was served."""
        name = (self.name, len(self._events))
        self._alive[id(allocation)] = (name, allocation)
        self._events.append((name, ledger, size_bytes, operation))

    def freed(self, allocation: Any) -> None:
        """Note that ``allocation`` was given back."""
        name, _ = self._alive.pop(id(allocation), (None, None))
        self._foreign |= name is None
        self._events.append((name,))

    def labelled(self, allocation: Any, category: object) -> None:
        """Note what ``allocation`` is for."""
        name = self.name_of(allocation)
        if name is not None:
            self._events.append((name, category))

    def phase_changed(self, phase: str | None) -> None:
        """Note that ``phase`` begins, or with ``None`` that the one that began last ends."""
        self._events.append((None, None, phase))

    def repeat(
        self,
        held: dict[Any, Held],
        allocate: Callable[[Any, int, object], Any],
        free: Callable[[Any, Any], None],
        label: Callable[[Any, object], None],
        change_phase: Callable[[Any], None],
    ) -> None:
        """Ask all of it again; ``held`` has what it knows by name, and gets what is left at the end.

        Raises:
            torch.OutOfMemoryError: there is no room by now; what it was served before that is given back.
        """
        try:
            for event in self._events:
                if len(event) == 4:
                    name, ledger, size_bytes, operation = event
                    held[name] = (ledger, allocate(ledger, size_bytes, operation))
                elif len(event) == 3:
                    change_phase(event[2])
                elif len(event) == 2:
                    label(held[event[0]][1], event[1])
                else:
                    free(*held.pop(event[0]))
        except BaseException:
            for name in [name for name in held if isinstance(name, tuple) and name[0] == self.name]:
                free(*held.pop(name))
            raise
