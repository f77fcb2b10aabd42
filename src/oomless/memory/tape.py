"""What a stretch of a rehearsal asked of the books, to be asked again without running it.

A transformer updates hundreds of parameters of a few shapes, each with the same operators on other numbers. In a rehearsal
there are no numbers: the second update of a shape asks for the same bytes, in the same order, as the first. So the first is
written down here, and for the others the requests are made again, of the same allocator in whatever state it is by then.

A stretch can be repeated if it leaves nothing behind and frees nothing that it did not ask for.
"""

from __future__ import annotations

from typing import Any


class Tape:
    """Requests, frees and labels in their order."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []
        self._alive: dict[int, int] = {}
        self._foreign = False

    @property
    def repeatable(self) -> bool:
        """Whether nothing is left of what was asked for, and nothing else was freed."""
        return not self._alive and not self._foreign

    def allocated(self, ledger: Any, size_bytes: int, operation: object, allocation: Any) -> None:
        """Note a request that was served."""
        self._alive[id(allocation)] = len(self._events)
        self._events.append((ledger, size_bytes, operation))

    def freed(self, allocation: Any) -> None:
        """Note that ``allocation`` was given back."""
        number = self._alive.pop(id(allocation), None)
        self._foreign |= number is None
        self._events.append((number,))

    def labelled(self, allocation: Any, category: object) -> None:
        """Note what ``allocation`` is for."""
        number = self._alive.get(id(allocation))
        if number is not None:
            self._events.append((number, category))

    def repeat(self) -> None:
        """Ask all of it again.

        Raises:
            torch.OutOfMemoryError: there is no room by now; what was served before that is given back.
        """
        served: dict[int, tuple[Any, Any]] = {}
        try:
            for number, event in enumerate(self._events):
                if len(event) == 3:
                    ledger, size_bytes, operation = event
                    served[number] = (ledger, ledger.allocate(size_bytes, operation))
                elif len(event) == 2:
                    served[event[0]][1].category = event[1]
                else:
                    ledger, allocation = served.pop(event[0])
                    ledger.free(allocation)
        except BaseException:
            for ledger, allocation in served.values():
                ledger.free(allocation)
            raise
