"""From what the config says of text to blocks that train and blocks that evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oomless.config import DataSource, TrainConfig
from oomless.data.encode import Encoder
from oomless.data.mix import BlockStream
from oomless.data.pack import PackedBlocks
from oomless.data.store import TokenStore, open_store, source_name
from oomless.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """The data of a run."""

    train: BlockStream
    evaluation: dict[str, PackedBlocks]
    """Held-out or separate blocks by the name of their source."""

    summary: tuple[str, ...]
    """Lines for a person."""


def prepare(
    config: TrainConfig, tokenizer: Any, cache_dir: Path, progress: Callable[[int, int], None] | None = None
) -> PreparedData:
    """Read, tokenise (or find tokenised), split and pack the text that ``config`` names.

    Raises:
        DataError: text is missing, empty or cannot be read, or is too little to hold any of it out.
        ConfigError: two sources have one name.
    """
    _check_names(config.data)
    _check_names(config.eval_data)
    encoder = Encoder(tokenizer)

    def opened(sources: Sequence[DataSource]) -> list[TokenStore]:
        return [
            open_store(source, encoder, cache_dir, encoding_errors=config.encoding_errors, progress=progress)
            for source in sources
        ]

    def packed(store: TokenStore, documents: Any) -> PackedBlocks:
        blocks = PackedBlocks(store, documents, config.max_seq_length, config.packing)
        if not len(blocks):
            raise DataError(f"{store.name} holds no text to learn from: its documents are empty")
        return blocks

    stores = opened(config.data)
    splits = [_split(store, config.eval_fraction or 0.0, config.seed) for store in stores]
    train = [packed(store, learnt) for store, (learnt, _) in zip(stores, splits, strict=True)]
    evaluation = {s.name: packed(s, held_out) for s, (_, held_out) in zip(stores, splits, strict=True) if len(held_out)}
    eval_stores = opened(config.eval_data)
    evaluation |= {store.name: packed(store, np.arange(store.documents)) for store in eval_stores}
    weights = [source.weight for source in config.data]
    stream = BlockStream(
        train, weights, seed=config.seed, shuffle=config.shuffle, fingerprint=_fingerprint(stores, weights, config)
    )
    lines = [store.describe() for store in stores]
    lines += [f"evaluation on {name}: {blocks.targets:,} tokens" for name, blocks in evaluation.items()]
    return PreparedData(train=stream, evaluation=evaluation, summary=tuple(lines))


def _check_names(sources: Sequence[DataSource]) -> None:
    names = [source_name(source) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sources are called {name!r}: give each a name of its own")


def _split(store: TokenStore, fraction: float, seed: int) -> tuple[Any, Any]:
    """Return the documents to learn and those to hold out, at least one of each where any are held out."""
    if not fraction:
        return np.arange(store.documents), np.arange(0)
    if store.documents < 2:
        raise DataError(
            f"{store.name} is one document, of which none can be held out: set eval_fraction: 0, or name eval_data"
        )
    count = min(store.documents - 1, max(1, round(fraction * store.documents)))
    order = np.random.default_rng([seed, int(store.key[:12], 16)]).permutation(store.documents)
    return np.sort(order[count:]), np.sort(order[:count])


def _fingerprint(stores: Sequence[TokenStore], weights: Sequence[float], config: TrainConfig) -> str:
    facts = [
        [store.key for store in stores],
        [float(weight) for weight in weights],
        [config.max_seq_length, config.packing, float(config.eval_fraction or 0), config.seed, config.shuffle],
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
