"""Micro-batches of no particular tokens."""

import torch

from oomless.data.loader import MicroBatch


def blank_batch(blocks, lengths, device):
    """Return a micro-batch of ``blocks`` blocks, documents of ``lengths`` in each."""
    length = sum(lengths)
    with device.host():
        tokens = torch.zeros(blocks, length, dtype=torch.int64)
    return MicroBatch(
        input_ids=tokens,
        labels=tokens,
        position_ids=tokens,
        document_lengths=(lengths,) * blocks,
        target_count=blocks * length,
    )
