"""Several sources in one endless, deterministic order of blocks.

Which block comes k-th is a function of the seed and k alone, so a run resumes anywhere without replaying. Sources are
interleaved evenly by their weights. Each is gone through in passes, every pass shuffled anew; an epoch of the run is one
pass over the source with the largest weight (of equal ones, the longest) of those that are not replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import numpy as np

from oomless.data.pack import Block, PackedBlocks

RANKED_BLOCKS = 64
Weigh = Callable[[Sequence[Sequence[int]]], int]
"""How heavy a batch is, in whose blocks the documents have these lengths."""


def heaviest(
    rankings: Sequence[Sequence[tuple[int, Any]]], count: int, weight: Callable[[Sequence[Any]], int]
) -> list[list[tuple[int, Any]]]:
    """Return the batch of ``count`` blocks of most ``weight``, and the first of each ranking but the first; each choice once.

    Blocks are taken over again where there are fewer. A batch may weigh what its heaviest blocks do together, or as if each were as
    heavy as one of them, beside which those that come first in the first ranking weigh most.
    """
    every = {number: block for ranking in rankings for number, block in ranking}
    by_weight = sorted(every.items(), key=lambda entry: -weight([entry[1]]))
    batches = [by_weight[:count]]
    if count > 1:
        batches += [
            [one, *[other for other in rankings[0] if other[0] != one[0]][: count - 1]] for one in every.items()
        ]
    heavy = max(batches, key=lambda batch: weight([block for _, block in batch]))
    found: list[list[tuple[int, Any]]] = []
    for chosen in (heavy, *(list(ranking[:count]) for ranking in rankings[1:])):
        numbers = sorted(number for number, _ in chosen)
        if chosen and numbers not in [sorted({number for number, _ in other}) for other in found]:
            found.append(list(islice(cycle(chosen), count)))
    return found


class BlockStream:
    """The training blocks of a run, by their number."""

    def __init__(
        self,
        sources: Sequence[PackedBlocks],
        weights: Sequence[float],
        *,
        seed: int,
        shuffle: bool,
        fingerprint: str,
        replayed: int = 0,
    ) -> None:
        """Mix ``sources``, of which the last are ``replayed``, which makes no epoch longer.

        ``fingerprint`` names data and settings, so that a resumed run can tell others apart.
        """
        self.sources, self.seed, self.shuffle, self.fingerprint = sources, seed, shuffle, fingerprint
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        main = max(range(len(sources) - replayed), key=lambda i: (weights[i], len(sources[i])))
        self.blocks_per_epoch = max(1, round(len(sources[main]) / self.shares[main]))
        self._order = lru_cache(maxsize=2 * len(sources))(self._permutation)

    def block(self, number: int) -> Block:
        """Return block ``number`` of the run, counted from 0 over all epochs."""
        source, place = self._place(number)
        turn, index = divmod(place, len(self.sources[source]))
        return self.sources[source][int(self._order(source, turn)[index]) if self.shuffle else index]

    def heaviest(self, count: int, weigh: Weigh) -> list[list[Block]]:
        """Return the ``count`` blocks of most weight, and the ``count`` with the longest documents, where those are others.

        Blocks are all equally long; what attention asks for depends on how documents lie in them. What ``weigh`` says is asked of
        those with the most documents and with the longest.
        """
        ranked = self.ranked(max(count, RANKED_BLOCKS))
        chosen = heaviest(ranked, count, lambda blocks: weigh([block.document_lengths for block in blocks]))
        return [[block for _, block in blocks] for blocks in chosen]

    def ranked(self, count: int) -> list[list[tuple[int, Block]]]:
        """Return the ``count`` blocks with the most documents, and with the longest, each block with a number of its own."""
        weights = [source.weights_of_blocks() for source in self.sources]
        firsts = np.cumsum([0, *map(len, self.sources)])
        rankings = []
        for measure in range(2):
            ranked = [
                (int(values[measure][index]), source, int(index))
                for source, values in enumerate(weights)
                for index in np.argsort(-values[measure], kind="stable")[:count]
            ]
            ranked.sort(key=lambda entry: -entry[0])
            rankings.append(
                [(int(firsts[source]) + index, self.sources[source][index]) for _, source, index in ranked[:count]]
            )
        return rankings

    def check_unchanged(self) -> None:
        """Check that the files under the blocks are those that were opened.

        Raises:
            DataError: one was written to.
        """
        for source in self.sources:
            source.check_unchanged()

    def _place(self, number: int) -> tuple[int, int]:
        """Return which source block ``number`` comes from, and how many of that source came before it.

        Each source in turn takes its share of what the sources before it left over, spread evenly.
        """
        left = 1.0
        for source, share in enumerate(self.shares[:-1]):
            before, after = (int(count * share / left + 0.5) for count in (number, number + 1))
            if after > before:
                return source, before
            number, left = number - before, left - share
        return len(self.shares) - 1, number

    def _permutation(self, source: int, turn: int) -> Any:
        return np.random.default_rng([self.seed, source, turn]).permutation(len(self.sources[source]))
