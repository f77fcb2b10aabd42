"""From what the config says of text to blocks that train and blocks that evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from oomless.config import DataSource, Packing, TrainConfig
from oomless.config.data import BUILTIN
from oomless.data.chat import ChatEncoder, load_template
from oomless.data.encode import Encoder
from oomless.data.mix import BlockStream
from oomless.data.pack import IGNORED, Block, PackedBlocks, SomeBlocks, count_targets
from oomless.data.read import Manner
from oomless.data.store import TokenStore, open_store, source_name, user_cache_dir
from oomless.errors import ConfigError, DataError
from oomless.units import counted

GENERAL_TEXT = Path(__file__).parent / "general.jsonl"
"""The beginnings of the Universal Declaration of Human Rights in 40 languages; see general.license.txt."""

MOST_TOKENS = 1 << 23
"""From so many, chosen by chance, what a tokenizer is taught is learnt."""
_PIECE_TOKENS = 1 << 12
_PIECES_AT_ONCE = 64
_NEAR = 0.9
"""Share of the tokens to hold out from which whole documents are near enough, and none is cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """The data of a run."""

    train: BlockStream
    evaluation: Mapping[str, PackedBlocks | SomeBlocks]
    """Held-out or separate blocks by the name of their source."""

    summary: tuple[str, ...]
    """Lines for a person."""

    general: frozenset[str] = frozenset()
    """Which of them the run is not judged by: text that says what is forgotten."""

    bytes_per_token: Mapping[str, float] = field(default_factory=dict)
    """How many bytes of text a token to predict is, by source."""


def prepare(config: TrainConfig, tokenizer: Any, progress: Callable[[int, int], None] | None = None) -> PreparedData:
    """Read, tokenise (or find tokenised), split and pack the text that ``config`` names.

    Raises:
        DataError: text is missing, empty or cannot be read, or is too little to hold any of it out.
        ConfigError: two sources have one name.
    """
    general = [_shipped(source) for source in config.general_data]
    learnt_from = (*config.data, *config.replay_data)
    opened = _opener(config, tokenizer, progress)

    def packed(store: TokenStore, spans: Any) -> PackedBlocks:
        return PackedBlocks(store, spans, config.max_seq_length, config.packing)

    stores, eval_stores = opened(learnt_from), [*opened(config.eval_data), *opened(general)]
    for name in ("chat_template", "loss_on"):
        if getattr(config, name) is not None and all(store.learnt is None for store in (*stores, *eval_stores)):
            raise ConfigError(f"{name} is for chats, and data holds none: remove it", name)
    splits = [_split(store, config.eval_fraction or 0.0, config.seed, config.packing) for store in stores]
    train = [packed(store, learnt) for store, (learnt, _) in zip(stores, splits, strict=True)]
    evaluation = {s.name: packed(s, held_out) for s, (_, held_out) in zip(stores, splits, strict=True) if len(held_out)}
    evaluation |= {store.name: packed(store, store.spans) for store in eval_stores}
    for blocks in (*train, *evaluation.values()):
        if not len(blocks):
            raise DataError(f"{blocks.store.name} holds no text to learn from: its documents are empty")
    weights = _weights(config, train)
    stream = BlockStream(
        train,
        weights,
        seed=config.seed,
        shuffle=config.shuffle,
        fingerprint=_fingerprint(stores, splits, weights, config),
        replayed=len(config.replay_data),
    )
    lines = [store.describe() for store in stores]
    lines += [line for blocks in train for line in _shortened(blocks, blocks.store.name)]
    lines += _mixture(stream) if len(stores) > 1 else []
    for name, blocks in evaluation.items():
        lines += [
            f"evaluation on {name}: {counted(blocks.targets, 'token')}",
            *_shortened(blocks, f"evaluation on {name}"),
        ]
    chosen: dict[str, PackedBlocks | SomeBlocks] = {**evaluation}
    for name, blocks in evaluation.items():
        if config.max_eval_blocks is not None and config.max_eval_blocks < len(blocks):
            chosen[name] = SomeBlocks(blocks, config.max_eval_blocks)
            lines.append(f"evaluation on {name}: {config.max_eval_blocks:,} of its {counted(len(blocks), 'block')}")
    return PreparedData(
        train=stream,
        evaluation=chosen,
        summary=tuple(lines),
        general=general_names(config),
        bytes_per_token={name: _bytes_per_token(blocks, tokenizer) for name, blocks in chosen.items()},
    )


def general_names(config: TrainConfig) -> frozenset[str]:
    """Return what the sources are called by which a run is not judged."""
    return frozenset(source_name(_shipped(source)) for source in config.general_data)


def _shipped(source: DataSource) -> DataSource:
    """Return ``source``, or the file that comes with oomless where it names that."""
    if source.path != BUILTIN:
        return source
    return DataSource(path=str(GENERAL_TEXT), name=source.name or "general", text_field="text", encoding="utf-8")


def _weights(config: TrainConfig, blocks: Sequence[PackedBlocks]) -> list[float]:
    """Return the weights of the sources of ``blocks``, those that are replayed last."""
    weights = [
        float(source.weight or len(own))
        for source, own in zip((*config.data, *config.replay_data), blocks, strict=True)
    ]
    if config.replay is None:
        return weights
    new, old = weights[: len(config.data)], weights[len(config.data) :]
    times = config.replay / (1 - config.replay) * sum(new) / sum(old)
    return [*new, *(weight * times for weight in old)]


def _bytes_per_token(blocks: Iterable[Block], tokenizer: Any) -> float:
    """Return how many bytes of UTF-8 a token to predict in ``blocks`` stands for."""
    tokens = size_bytes = 0
    for block in blocks:
        learnt = block.labels[block.labels != IGNORED]
        tokens += len(learnt)
        size_bytes += len(tokenizer.decode(learnt.tolist(), skip_special_tokens=True).encode())
    return max(1, size_bytes) / max(1, tokens)


def _opener(
    config: TrainConfig, tokenizer: Any, progress: Callable[[int, int], None] | None
) -> Callable[[Sequence[DataSource]], list[TokenStore]]:
    """Return what opens the stores of sources, as ``config`` and ``tokenizer`` make tokens of their text."""
    learnt_from = (*config.data, *config.replay_data)
    _check_names(learnt_from)
    _check_names([*(config.eval_data or learnt_from), *map(_shipped, config.general_data)])
    if config.chat_template is not None:
        tokenizer.chat_template = load_template(config.chat_template)
    encoder = Encoder(tokenizer)
    chats = ChatEncoder(tokenizer, encoder, config.loss_on or "assistant")
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else user_cache_dir()

    def opened(sources: Sequence[DataSource]) -> list[TokenStore]:
        return [
            open_store(source, encoder, cache_dir, manner=_manner(source, config), chats=chats, progress=progress)
            for source in sources
        ]

    return opened


class TrainingText:
    """The text that ``config`` trains on, as ``tokenizer`` gives it back, in lists of pieces: at most ``MOST_TOKENS`` of it.

    What another tokenizer may hold out is left out: as the order in which documents are held out does not hang on it, twice as much
    as this one holds out.

    Raises:
        DataError: as ``prepare``.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, progress: Callable[[int, int], None] | None = None) -> None:
        held_out = config.eval_fraction or 0.0
        self._tokenizer = tokenizer
        self._stores = _opener(config, tokenizer, progress)(config.data)
        more = min(2 * held_out, (1 + held_out) / 2)
        spans = [_split(store, more, config.seed, config.packing)[0] for store in self._stores]
        tokens = sum(int((span[:, 1] - span[:, 0]).sum()) for span in spans)
        share = min(1.0, MOST_TOKENS / max(1, tokens))
        self._spans = [_some(span, share, config.seed) for span in spans]
        self.contents = [[store.contents, more, share, config.seed, config.packing] for store in self._stores]
        """What tells it from any other."""

    def __iter__(self) -> Iterator[list[str]]:
        for store, spans in zip(self._stores, self._spans, strict=True):
            pieces = (
                store.tokens[place : min(place + _PIECE_TOKENS, end)].tolist()
                for begin, end in spans.tolist()
                for place in range(begin, end, _PIECE_TOKENS)
            )
            while some := list(islice(pieces, _PIECES_AT_ONCE)):
                yield self._tokenizer.backend_tokenizer.decode_batch(some, skip_special_tokens=True)


def _some(spans: Any, share: float, seed: int) -> Any:
    """Return whole ``spans`` by chance, and the beginning of one more, that have ``share`` of their tokens."""
    if share == 1.0:
        return spans
    shuffled = spans[np.random.default_rng(seed).permutation(len(spans))].copy()
    sizes = shuffled[:, 1] - shuffled[:, 0]
    before = np.cumsum(sizes) - sizes
    wanted = int(share * sizes.sum())
    shuffled[:, 1] = shuffled[:, 0] + np.clip(wanted - before, 0, sizes)
    return shuffled[shuffled[:, 1] > shuffled[:, 0]]


def _manner(source: DataSource, config: TrainConfig) -> Manner:
    return Manner(
        text_field=source.text_field or config.text_field,
        encoding=source.encoding or config.encoding,
        errors=config.encoding_errors,
        deduplicate=config.deduplicate,
    )


def _check_names(sources: Sequence[DataSource]) -> None:
    names = [source_name(source) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sources are called {name!r}: give each a name of its own")


def _split(store: TokenStore, fraction: float, seed: int, packing: Packing) -> tuple[Any, Any]:
    """Return the spans to learn and those to hold out, which together predict every token of the documents once.

    Whole documents are held out in a random order while they fit into ``fraction`` of what there is to predict. Where they
    come to less than nine tenths of that, the end of one more document is held out as well. Chats are held out whole, at least one.
    """
    if not fraction:
        return store.spans, store.spans[:0]
    spans = store.spans
    targets = count_targets(store, spans)
    total = int(targets.sum())
    if total < 2:
        raise DataError(
            f"{store.name} holds {total} tokens to predict, too few to hold any out: set eval_fraction: 0, or name eval_data"
        )
    wanted = min(total - 1, max(1, round(fraction * total)))
    order = np.random.default_rng([seed, int(store.text[:12], 16)]).permutation(store.documents)
    sums = np.cumsum(targets[order])
    count = int(np.searchsorted(sums, wanted, side="right"))
    if store.learnt is not None:  # what is left of a chat means nothing without its beginning
        if store.documents < 2:
            raise DataError(
                f"{store.name} is one chat, which cannot be held out: set eval_fraction: 0, or name eval_data"
            )
        count = min(max(1, count), store.documents - 1)
        return np.sort(spans[order[count:]], axis=0), np.sort(spans[order[:count]], axis=0)
    held = int(sums[count - 1]) if count else 0
    held_out, learnt = spans[order[:count]], spans[order[count:]].copy()
    if held < _NEAR * wanted:
        tail = learnt[0].copy()
        learnt[0, 1] -= wanted - held
        # The last token that is learnt is the first input of what is held out, as at the end of a block; in one stream that
        # is the token before it, which is none only at the very start.
        follows = packing == "concatenate" and count > 0 and held_out[:, 0].min() < tail[0]
        tail[0] = learnt[0, 1] - (not follows)
        held_out = np.concatenate([held_out, tail[None]])
    return np.sort(learnt, axis=0), np.sort(held_out, axis=0)


def _shortened(blocks: PackedBlocks, title: str) -> list[str]:
    found = blocks.shortened
    if found is None or not found.shortened + found.left_out:
        return []
    return [
        f"{title}: {counted(found.shortened, 'chat')} longer than max_seq_length, cut at the end; {found.left_out:,} left out, no "
        f"answer within it; {counted(found.lost_tokens, 'token')} lost"
    ]


def _mixture(stream: BlockStream) -> list[str]:
    """Return what an epoch takes of each source, for a person."""
    parts = [
        f"{source.store.name} {share:.1%} ({stream.blocks_per_epoch * share / len(source):.3g} x in an epoch)"
        for source, share in zip(stream.sources, stream.shares, strict=True)
    ]
    return [f"shares of the training tokens: {', '.join(parts)}"]


def _fingerprint(
    stores: Sequence[TokenStore], splits: Sequence[tuple[Any, Any]], weights: Sequence[float], config: TrainConfig
) -> str:
    facts = [
        [store.contents for store in stores],
        [float(weight) for weight in weights],
        [config.max_seq_length, config.packing, config.seed, config.shuffle],
    ]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    for learnt, _ in splits:
        digest.update(np.ascontiguousarray(learnt).tobytes())
    return digest.hexdigest()
