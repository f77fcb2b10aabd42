"""Documents that were there before: the same, or nearly the same.

``exact``  a document whose tokens are those of an earlier one; 16 bytes are held of each
``near``   one that shares most of its runs of five tokens with an earlier one: their Jaccard similarity, estimated by MinHash
           with 128 permutations and found by locality-sensitive hashing (``datasketch``), is about 0.8 or more
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from oomless.errors import DataError

RUN_TOKENS = 5
SIMILARITY = 0.8
_PERMUTATIONS = 128


class Duplicates:
    """What has been seen of one source."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    @staticmethod
    def of(kind: str | None) -> Duplicates | None:
        """Return what finds duplicates of this ``kind``: exact or near; ``None`` where none are looked for."""
        return {"exact": Duplicates, "near": NearDuplicates}[kind]() if kind is not None else None

    def is_new(self, ids: Any) -> bool:
        """Whether no document like ``ids`` was asked about before."""
        digest = hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16).digest()
        new = digest not in self.seen
        self.seen.add(digest)
        return new


class NearDuplicates(Duplicates):
    """Documents by the runs of tokens that they share."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from datasketch import MinHashLSH
        except ImportError as error:
            raise DataError("deduplicate: near needs datasketch: pip install 'oomless[deduplicate]'") from error
        self.index = MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS)
        self.count = 0

    def is_new(self, ids: Any) -> bool:
        """Whether no document like ``ids`` was asked about before."""
        from datasketch import MinHash

        if not super().is_new(ids):
            return False
        sketch = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        sketch.update_batch(_runs(ids).tolist())
        if self.index.query(sketch):
            return False
        self.count += 1
        self.index.insert(self.count, sketch)
        return True


def _runs(ids: Any) -> Any:
    """Return a 32-bit hash of every run of five tokens in ``ids``, each once."""
    ids = np.asarray(ids, dtype=np.uint64)
    size = min(RUN_TOKENS, len(ids))
    mixed = np.zeros(len(ids) - size + 1, dtype=np.uint64)
    for place in range(size):
        mixed = (mixed ^ ids[place : place + len(mixed)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed >> np.uint64(32))
