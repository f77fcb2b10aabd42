"""Blocks to the tensors that a step takes, from any place in the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oomless.data.mix import BlockStream
from oomless.data.pack import IGNORED, Block
from oomless.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """B blocks of T tokens, on the host; tensors are int64 [B, T]."""

    input_ids: Tensor
    labels: Tensor
    """The token that each input should predict, -100 for none; already shifted."""

    position_ids: Tensor
    document_lengths: tuple[tuple[int, ...], ...]
    """For each block, how many consecutive inputs attend to each other."""

    target_count: int
    """How many labels are not -100."""


def collate(blocks: Sequence[Block]) -> MicroBatch:
    """Return ``blocks`` as one micro-batch."""
    labels = np.stack([block.labels for block in blocks])
    return MicroBatch(
        input_ids=torch.from_numpy(np.stack([block.input_ids for block in blocks])),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.stack([block.position_ids for block in blocks])),
        document_lengths=tuple(block.document_lengths for block in blocks),
        target_count=int((labels != IGNORED).sum()),
    )


def micro_batches(blocks: Iterable[Block], size: int) -> Iterator[MicroBatch]:
    """Yield ``blocks`` in micro-batches of ``size``; the last may be smaller."""
    remaining = iter(blocks)
    while group := list(islice(remaining, size)):
        yield collate(group)


class Loader:
    """Goes through a stream of blocks and can say where it is."""

    def __init__(self, stream: BlockStream) -> None:
        self.stream = stream
        self.position = 0
        self.left_out: set[int] = set()
        """Numbers of blocks that are never taken."""
        self.taken: list[int] = []
        """Numbers of the blocks that ``take`` returned last."""

    def take(self, count: int) -> list[Block]:
        """Return the next ``count`` blocks.

        Raises:
            DataError: their file has changed since the run began; the place in the stream is what it was.
        """
        self.stream.check_unchanged()
        self.taken = []
        while len(self.taken) < count:
            if self.position not in self.left_out:
                self.taken.append(self.position)
            self.position += 1
        return [self.stream.block(number) for number in self.taken]

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream, for a checkpoint."""
        return {
            "position": self.position,
            "left_out": sorted(self.left_out),
            "fingerprint": self.stream.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that ``state`` says.

        Raises:
            CheckpointError: it is a place in other data.
        """
        if state["fingerprint"] != self.stream.fingerprint:
            raise CheckpointError(
                "the data or how it is packed differs from when the checkpoint was written: a resumed run needs the same; "
                "set it back, or start anew from the checkpoint's model in another output_dir"
            )
        self.position = int(state["position"])
        self.left_out = set(state["left_out"])
