"""Documents to blocks of T inputs and the T tokens that they should predict.

A target is the next token of the same document, so a document of n tokens has n - 1 of them and its first token is only
ever an input. Where a block's end cuts a document, the next block begins with the last token that was predicted: every
token but the first of its document is predicted exactly once, whatever the packing.

``documents``    end to end; positions restart and attention ends with each document (or the part of it in the block)
``best_fit``     the same, but a document is cut only where it is longer than a block; parts are packed best-fit
                 decreasing (Ding et al. 2024, "Fewer truncations improve language modeling") and blocks are padded
``concatenate``  one stream; documents follow each other as if they were one, and attention covers the block

A chat is never cut over two blocks, since its answers mean nothing without what they answer. In the first two, chats are packed
best-fit; in the third, each has a block. One that is longer than a block loses its end.

What is left at the end of a block is padding: it predicts nothing and is a document of its own (in ``concatenate``, the
end of the last block's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from oomless.config import Packing
from oomless.data.store import TokenStore

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """T inputs and what they predict; arrays are int64 [T]."""

    input_ids: Any
    labels: Any
    position_ids: Any
    document_lengths: tuple[int, ...]
    """How many consecutive inputs attend to each other; they sum to T."""


class PackedBlocks:
    """The blocks of some documents of a store, assembled when asked for."""

    def __init__(self, store: TokenStore, spans: Any, length: int, packing: Packing) -> None:
        """Plan blocks of ``length`` inputs from ``spans``: where each document or part of one begins and ends in the store."""
        self.store, self.length = store, length
        self.packing: Packing | Literal["one by one"] = packing
        self.shortened: Shortened | None = None
        if store.learnt is not None:
            spans, self.shortened = _shorten(store, spans, length)
            self.packing = "one by one" if packing == "concatenate" else "best_fit"
        self.starts = spans[:, 0]
        sizes = spans[:, 1] - self.starts
        if self.packing == "concatenate":
            self.ends = np.cumsum(sizes)
            self.count = -(-self.targets // length)
            return
        targets = np.maximum(sizes - 1, 0)
        if self.packing == "documents":
            self.ends = np.cumsum(targets)
            self.count = -(-int(self.ends[-1]) // length)
            return
        if self.packing == "best_fit":
            self.starts, targets, self.first_part = _best_fit(self.starts, targets, length)
        else:
            self.first_part = np.arange(len(spans) + 1)
        self.ends = np.cumsum(targets)
        self.count = len(self.first_part) - 1

    def __len__(self) -> int:
        return self.count

    def check_unchanged(self) -> None:
        """Check that the file under the blocks is the one that was opened.

        Raises:
            DataError: it was written to.
        """
        self.store.check_unchanged()

    @property
    def targets(self) -> int:
        """How many tokens one pass over the blocks predicts."""
        if self.shortened is not None:
            return self.shortened.targets
        last = int(self.ends[-1]) if len(self.ends) else 0
        return max(0, last - (self.packing == "concatenate"))

    def weights_of_blocks(self) -> tuple[Any, Any]:
        """Return for each block how many documents it holds, padding among them, and how long the longest of them is."""
        if self.packing in ("concatenate", "one by one"):
            return np.ones(self.count, dtype=np.int64), np.full(self.count, self.length, dtype=np.int64)
        begins = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        sizes = self.ends - begins
        padding = np.zeros(self.count, dtype=np.int64)
        if self.packing == "best_fit":
            padding += self.length - np.add.reduceat(sizes, self.first_part[:-1])
            longest = np.maximum.reduceat(sizes, self.first_part[:-1])
            return np.diff(self.first_part) + (padding > 0), np.maximum(longest, padding)
        begins, ends = begins[sizes > 0], self.ends[sizes > 0]
        first, last = begins // self.length, (ends - 1) // self.length
        # A document opens one count in its first block and closes it behind its last.
        steps = _changes(first, last + 1, self.count)
        longest = np.where(np.cumsum(_changes(first + 1, last, self.count))[: self.count] > 0, self.length, 0)
        np.maximum.at(longest, first, np.minimum(ends - begins, (first + 1) * self.length - begins))
        np.maximum.at(longest, last, ends - np.maximum(begins, last * self.length))
        padding[-1] = self.count * self.length - self.ends[-1]
        return np.cumsum(steps)[: self.count] + (padding > 0), np.maximum(longest, padding)

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Block:
        if not 0 <= number < self.count:
            raise IndexError(f"block {number} of {self.count}")
        if self.packing == "concatenate":
            return self._stream_block(number)
        if self.packing in ("best_fit", "one by one"):
            first, last = int(self.first_part[number]), int(self.first_part[number + 1])
            spans = [(int(self.starts[i]), self._size(i)) for i in range(first, last)]
        else:
            spans = self._spans(number * self.length, (number + 1) * self.length)
        return self._assemble(spans)

    def _size(self, part: int) -> int:
        return int(self.ends[part]) - (int(self.ends[part - 1]) if part else 0)

    def _spans(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return ``(start in the store, size)`` of what lies between two places of the documents laid end to end."""
        end = min(end, int(self.ends[-1]))
        spans = []
        part = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            skipped = begin - (int(self.ends[part - 1]) if part else 0)
            size = min(end, int(self.ends[part])) - begin
            if size:
                spans.append((int(self.starts[part]) + skipped, size))
            begin += size
            part += 1
        return spans

    def _assemble(self, spans: list[tuple[int, int]]) -> Block:
        inputs = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        lengths = [size for _, size in spans]
        at = 0
        for start, size in spans:
            inputs[at : at + size] = self.store.tokens[start : start + size]
            labels[at : at + size] = self.store.tokens[start + 1 : start + size + 1]
            if self.store.learnt is not None:
                labels[at : at + size][~self.store.learnt[start + 1 : start + size + 1]] = IGNORED
            at += size
        if self.packing == "one by one":
            lengths = [self.length]
        elif at < self.length:
            lengths.append(self.length - at)
        positions = np.concatenate([np.arange(size, dtype=np.int64) for size in lengths])
        return Block(input_ids=inputs, labels=labels, position_ids=positions, document_lengths=tuple(lengths))

    def _stream_block(self, number: int) -> Block:
        spans = self._spans(number * self.length, (number + 1) * self.length + 1)
        stream = np.concatenate([self.store.tokens[start : start + size] for start, size in spans]).astype(np.int64)
        size = len(stream) - 1
        inputs = np.zeros(self.length, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        inputs[:size], labels[:size] = stream[:-1], stream[1:]
        positions = np.arange(self.length, dtype=np.int64)
        return Block(input_ids=inputs, labels=labels, position_ids=positions, document_lengths=(self.length,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortened:
    """What became of chats that are longer than a block."""

    targets: int
    """Tokens to predict in all that is kept."""
    shortened: int = 0
    """Chats that lost their end."""
    lost_tokens: int = 0
    left_out: int = 0
    """Chats of which no answer is left."""


def _shorten(store: TokenStore, spans: Any, length: int) -> tuple[Any, Shortened]:
    """Return ``spans`` of chats without what lies beyond a block, and without those that hold no answer then."""
    ends = np.minimum(spans[:, 1], spans[:, 0] + length + 1)
    targets = count_targets(store, np.stack([spans[:, 0], ends], axis=1))
    cut, kept = ends < spans[:, 1], targets > 0
    return np.stack([spans[:, 0], ends], axis=1)[kept], Shortened(
        targets=int(targets.sum()),
        shortened=int((cut & kept).sum()),
        lost_tokens=int((spans[:, 1] - ends)[cut & kept].sum() + (spans[:, 1] - spans[:, 0])[~kept].sum()),
        left_out=int((~kept).sum()),
    )


def count_targets(store: TokenStore, spans: Any) -> Any:
    """Return how many tokens each of ``spans`` predicts alone."""
    if store.learnt is None:
        return np.maximum(spans[:, 1] - spans[:, 0] - 1, 0)
    return np.array([np.count_nonzero(store.learnt[begin + 1 : end]) for begin, end in spans], dtype=np.int64)


class SomeBlocks:
    """As many of ``blocks`` as are asked for, spread evenly over them."""

    def __init__(self, blocks: PackedBlocks, count: int) -> None:
        self.blocks, self.count = blocks, min(count, len(blocks))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Block]:
        return (self.blocks[number * len(self.blocks) // self.count] for number in range(self.count))

    def check_unchanged(self) -> None:
        """Check that the file under the blocks is the one that was opened."""
        self.blocks.check_unchanged()


def _best_fit(starts: Any, targets: Any, length: int) -> tuple[Any, Any, Any]:
    """Return the parts' starts and sizes in the order of their blocks, and each block's first part.

    Open blocks are kept by the room they have left; the bits of ``rooms`` say which rooms occur, so that the smallest
    that is large enough is found in one step.
    """
    whole = targets // length
    part_starts = np.concatenate([np.repeat(starts, whole) + length * _counts_up(whole), starts + whole * length])
    sizes = np.concatenate([np.full(int(whole.sum()), length, dtype=np.int64), targets % length])
    part_starts, sizes = part_starts[sizes > 0], sizes[sizes > 0]
    order = np.argsort(-sizes, kind="stable")
    block_of = np.empty(len(order), dtype=np.int64)
    full = int((sizes == length).sum())
    block_of[:full] = np.arange(full)
    open_blocks: list[list[int]] = [[] for _ in range(length + 1)]
    blocks, rooms = full, 0
    for place in range(full, len(order)):
        size = int(sizes[order[place]])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            block = open_blocks[room].pop()
            if not open_blocks[room]:
                rooms &= ~(1 << room)
        else:
            block, room, blocks = blocks, length, blocks + 1
        block_of[place] = block
        if room > size:
            open_blocks[room - size].append(block)
            rooms |= 1 << (room - size)
    by_block = np.argsort(block_of, kind="stable")
    first_part = np.searchsorted(block_of[by_block], np.arange(blocks + 1))
    return part_starts[order][by_block], sizes[order][by_block], first_part


def _changes(first: Any, behind: Any, count: int) -> Any:
    """Return what is added at each place where spans from ``first`` to before ``behind`` are counted; empty ones are not."""
    spans = behind > first
    return np.bincount(first[spans], minlength=count + 1) - np.bincount(behind[spans], minlength=count + 1)


def _counts_up(counts: Any) -> Any:
    """Return 0, 1, ... count - 1 for each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
