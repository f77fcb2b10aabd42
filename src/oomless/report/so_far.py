"""What a search has looked at until there is an answer; without torch, for the first bar does not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from oomless.report.pictures import DOES_NOT_FIT, FITS, OTHERS, ranked

if TYPE_CHECKING:
    from oomless.planning.row import Row


def found_so_far(weights_bytes: int, rows: Sequence[Row], usable: tuple[str, int]) -> str:
    """Return the weights, and the strategies that were looked at, as bars beside what is ``usable``, and its name."""
    bars = [("the weights alone, in 16 bits", weights_bytes, OTHERS)]
    bars += [
        (f"{row.quality}{'' if row.fits else ' (does not fit)'}", row.needed_bytes, FITS if row.fits else DOES_NOT_FIT)
        for row in rows
    ]
    return ranked("Looked at so far", bars, [(usable[0], float(usable[1]))])
