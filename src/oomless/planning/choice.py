"""What a search found: the strategies that it looked at, and the one that is picked, proved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from oomless.config import TrainConfig
from oomless.planning.plan import Plan, Target
from oomless.planning.row import Row
from oomless.planning.strategies import Prefer, Settings
from oomless.planning.wish import Wish
from oomless.vocabulary import extend

SCHEMA = 3
"""Of the JSON of a choice; docs/planner.md says what changed with each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a search found."""

    model: str
    target: Target
    given: Settings
    """What the search was told to keep."""

    rows: tuple[Row, ...]
    """Best quality first: what was rejected, and what fits."""

    config: TrainConfig | None
    """The run as it was picked; ``None`` where nothing fits."""

    plan: Plan | None
    trials: int
    """Rehearsals that were made, not read from earlier searches."""

    wish: Wish | None = None
    """What the pick was preferred for; ``None`` where it is the first that fits."""

    rates: str = ""
    """How fast the pick learns, for a person."""

    stopped: bool = False
    """Whether Ctrl-C ended the search, which then says the best of what it had found."""

    @property
    def picked(self) -> Row | None:
        """The row of the pick."""
        return next((row for row in self.rows if row.picked), None)

    @property
    def named(self) -> dict[Prefer, Row]:
        """The best that fits by each preference."""
        return {name: row for row in self.rows for name in row.named}

    def as_given(self, given: Settings) -> Choice:
        """Return it for the settings ``given``, of whose new tokens the search knew only what they come to."""
        config = self.config
        if config is not None:
            config = TrainConfig.from_mapping(extend.as_given(config.to_dict(), given))
        return replace(self, config=config, given=dict(given))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "gpu": self.target.name,
            "gpus": self.target.gpus,
            "machines": self.target.machines,
            "network_bytes_per_s": self.target.network_bytes_per_s,
            "usable_bytes": self.target.usable_bytes,
            "margin_bytes": self.target.margin_bytes,
            "host_bytes": self.target.host_bytes,
            "wish": None if self.wish is None else self.wish.to_dict(),
            "strategies": [self._with_wish(row) for row in self.rows],
            "stopped": self.stopped,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "config": None if self.config is None else self.config.to_dict(),
            "rates": self.rates,
            "trials": self.trials,
        }

    def _with_wish(self, row: Row) -> dict[str, Any]:
        return row.to_dict() if self.wish is None or not row.fits else row.to_dict() | self.wish.says_of(row)
