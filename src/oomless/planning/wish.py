"""What is wanted of a training, beside that it fits: how much text there is, how many hours, and what counts more.

Every strategy that fits has a *share*: what a token teaches beside what it teaches when nothing is given up
(``catalogue/learning.yaml``), and a speed. Of those that fit, the answer names three: the one with the largest share, the one with
the largest share for its time (balanced), and the fastest. The share counts more than once there, as the file says: what is given up
is lost for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oomless.catalogue import learning
from oomless.catalogue.learning import Share
from oomless.planning.row import Row
from oomless.planning.strategies import Prefer, Quality


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is wanted."""

    prefer: Prefer = "balanced"
    tokens: int | None = None
    """Of the whole run; ``None`` where they are not known."""

    basis: str = "given"
    """How they are known."""

    hours: float | None = None
    """That there are for it."""

    @property
    def text_tokens(self) -> int:
        """The tokens of the run, or what is assumed of them."""
        return self.tokens or int(learning.constant("assumed_tokens"))

    def tokens_read(self, row: Row) -> float:
        """Return how many tokens a run of ``row`` reads: all there are, or as many as there is time for."""
        there_are = self.tokens if self.tokens is not None else math.inf
        in_time = self.hours * 3600 / row.seconds if self.hours is not None else math.inf
        read = min(there_are, in_time)
        return read if read < math.inf else self.text_tokens

    def given_up(self, row: Row) -> list[Share]:
        """Return what ``row`` gives up, with its share."""
        return learning.shares(_given_up(row.quality), self.tokens_read(row))

    def share(self, row: Row) -> float:
        """Return what a token teaches with ``row``."""
        return math.prod(one.share for one in self.given_up(row))

    def leaner(
        self, first: Quality, others: Iterable[Quality], state_bytes: Callable[[Quality], int]
    ) -> Sequence[Quality]:
        """Return those of ``others`` that may be preferred to ``first`` for having less state, which takes less memory and less to update.

        Of two, the one that teaches no less with no more state is enough.
        """
        alike = [first, *(one for one in others if one.differs_in_state(first))]
        known = [
            (
                math.prod(one.share for one in learning.shares(_given_up(quality), self.text_tokens)),
                state_bytes(quality),
            )
            for quality in alike
        ]
        return [
            quality
            for quality, (share, size) in zip(alike, known, strict=True)
            if not any(best >= share and least <= size and (best, least) != (share, size) for best, least in known)
        ]

    def choices(self, rows: Sequence[Row]) -> dict[Prefer, Row]:
        """Return the best of ``rows``, which fit, by each preference; of equal ones the first."""
        weight, least = learning.constant("weight_of_what_is_given_up"), learning.constant("least_part_for_fastest")
        shares = [self.share(row) for row in rows]
        spare = learning.constant("weight_of_spare_speed")
        asked = self.tokens / (self.hours * 3600) if self.tokens and self.hours else math.inf
        """More tokens a second than the hours ask for are worth little."""

        def best(score: Callable[[float, float], float]) -> Row:
            scores = [(score(share, 1 / row.seconds), 1 / row.seconds) for share, row in zip(shares, rows, strict=True)]
            return rows[max(range(len(rows)), key=lambda place: (*scores[place], -place))]

        return {
            "quality": best(lambda share, speed: share * (min(speed, asked) if self.hours else 1)),
            "balanced": best(lambda share, speed: share**weight * min(speed, asked) * max(1, speed / asked) ** spare),
            "fast": best(lambda share, _: share >= least * max(shares)),
        }

    def hours_of(self, row: Row) -> tuple[float, float] | None:
        """Return the fewest and the most hours in which ``row`` reads the text; ``None`` where the GPU's rates are not known."""
        return None if row.speed is None else row.speed.hours(self.text_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def says_of(self, row: Row) -> dict[str, Any]:
        """Return what it says of a row that fits, as plain values for JSON."""
        return {
            "share": self.share(row),
            "given_up": [asdict(one) for one in self.given_up(row)],
            "hours": self.hours_of(row),
        }


def _given_up(quality: Quality) -> dict[str, str | None]:
    return {
        "trainable": quality.trainable,
        "quantization": quality.quantization,
        "optimizer": quality.optimizer,
        "weight_precision": quality.weight_precision,
        "no_clipping": None if quality.clips else "no_clipping",
    }
