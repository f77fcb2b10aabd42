"""How documents lie in the blocks of a run: all that a rehearsal has to know of the text.

Tokens do not matter to memory, but documents do to attention. Where the text is at hand its own blocks are played; else two documents
fill each block: one by one a layer then keeps the documents' outputs and their concatenation, and further ones add only the rounding
of small tensors; in one launch they add at most a sum of exponentials for each query of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from oomless.config import TrainConfig
from oomless.config.data import BUILTIN, SOURCES, Data
from oomless.config.model import Model
from oomless.config.values import kinds
from oomless.data.files import find_files
from oomless.data.mix import RANKED_BLOCKS, Weigh, heaviest
from oomless.data.pack import Block
from oomless.data.prepare import PreparedData, prepare
from oomless.errors import UserError
from oomless.models.spec import ModelSpec
from oomless.models.tokenizer import load_tokenizer
from oomless.planning.given import LONGEST
from oomless.units import MiB
from oomless.vocabulary import extend

Documents = tuple[int, ...]
LARGEST_TEXT_BYTES = 64 * MiB
"""A plan does not read more text than this."""

OF_THE_TEXT = {*kinds(Model), *kinds(Data), "output_dir", "cache_dir", "seed", "per_device_eval_batch_size"}
"""The settings that decide it."""

LEARNT_BLOCKS = 512
EVALUATED_BATCHES, HEAVY_BATCHES = 8, 2
SHORT_RUN_STEPS = 8
"""A run of so many steps is played whole where its text is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The lengths of the documents in each block that is played."""

    train: tuple[Documents, ...]
    """In the order in which they are learnt; after the last comes the first again."""

    ranked: tuple[tuple[tuple[int, Documents], ...], ...]
    """Numbered blocks, those with the most documents first, and those with the longest; see ``BlockStream.ranked``."""

    evaluation: tuple[tuple[Documents, ...], ...]
    """Of each source that is evaluated the first batches, and those with the most documents and with the longest, in their order."""

    blocks_per_epoch: int | None = None
    """``None`` where the text is not known."""

    @classmethod
    def uniform(cls, documents: Documents, config: TrainConfig) -> Layout:
        """Return blocks all of ``documents``, for ``config``, which evaluates two batches of them if any."""
        evaluates = bool(config.eval_fraction or config.eval_data or config.general_data)
        held_out = ((documents,) * (2 * (config.per_device_eval_batch_size or 1)),) if evaluates else ()
        return cls(train=(documents,), ranked=(((0, documents),),), evaluation=held_out)

    @classmethod
    def of(cls, data: PreparedData, config: TrainConfig) -> Layout:
        """Return how ``data`` lie in the blocks of ``config``."""
        stream = data.train
        return cls(
            train=tuple(stream.block(number).document_lengths for number in range(LEARNT_BLOCKS)),
            ranked=tuple(
                tuple((number, block.document_lengths) for number, block in ranking)
                for ranking in stream.ranked(RANKED_BLOCKS)
            ),
            evaluation=tuple(
                _evaluated([block.document_lengths for block in blocks], config.per_device_eval_batch_size or 1)
                for blocks in data.evaluation.values()
            ),
            blocks_per_epoch=stream.blocks_per_epoch,
        )

    def data(self, config: TrainConfig, gpus: int = 1) -> PreparedData:
        """Return blank blocks that lie so; the first of several ``gpus`` gets every batch that is evaluated, whoever has it in a run."""
        train: Any = _Stream(self)
        size = config.per_device_eval_batch_size or 1
        evaluation: Any = {
            str(number): _Blocks(_of_the_first(blocks, size, gpus)) for number, blocks in enumerate(self.evaluation)
        }
        return PreparedData(train=train, evaluation=evaluation, summary=())


def _evaluated(blocks: Sequence[Documents], size: int) -> tuple[Documents, ...]:
    """Return those of ``blocks`` whose batches of ``size`` are played; see ``Layout.evaluation``."""
    batches = _batches(blocks, size)
    most = [-sum(map(len, batch)) for batch in batches]
    longest = [-max(map(max, batch)) for batch in batches]
    chosen = set(range(len(batches))[:EVALUATED_BATCHES])
    for measure in (most, longest):
        chosen.update(sorted(range(len(batches)), key=measure.__getitem__)[:HEAVY_BATCHES])
    return tuple(block for number in sorted(chosen) for block in batches[number])


def _of_the_first(blocks: Sequence[Documents], size: int, gpus: int) -> list[Documents]:
    """Return blocks of which the first of ``gpus`` gets every batch of ``size``; a smaller last one is its own, not filled up with itself."""
    whole = len(blocks) // size * size
    return [
        *(block for batch in _batches(blocks[:whole], size) for _ in range(gpus) for block in batch),
        *blocks[whole:],
    ]


def _batches(blocks: Sequence[Documents], size: int) -> list[Sequence[Documents]]:
    return [blocks[first : first + size] for first in range(0, len(blocks), size)]


def usual_documents(config: TrainConfig) -> Documents:
    """Return how documents are taken to lie in a block where the text is not known."""
    if config.packing == "concatenate":
        return (config.max_seq_length,)
    return (config.max_seq_length // 3, config.max_seq_length - config.max_seq_length // 3)


def of_the_text(settings: Mapping[str, Any]) -> TrainConfig:
    """Return a run of the text of ``settings``, of which others may not go together yet, and the length may still be looked for."""
    about = {name: value for name, value in settings.items() if name in OF_THE_TEXT}
    if about.get("max_seq_length") == LONGEST:
        del about["max_seq_length"]
    return TrainConfig.from_mapping(about)


def is_readable(config: TrainConfig) -> bool:
    """Return whether the text that ``config`` names and its tokenizer are here, and it is not too much."""
    try:
        named = [source for key in SOURCES for source in getattr(config, key) if source.path != BUILTIN]
        files = [file for source in named for file in find_files(source).files]
    except UserError:
        return False
    small = sum(file.size_bytes for file in files) <= LARGEST_TEXT_BYTES
    return small and Path(config.tokenizer or config.model).is_dir()


@contextmanager
def with_new_tokens(spec: ModelSpec, settings: Mapping[str, Any]) -> Iterator[tuple[ModelSpec, dict[str, Any]]]:
    """Give ``spec`` and ``settings`` with the tokens that ``extend_tokenizer`` adds, for as long as the context lasts.

    Raises:
        UserError: they cannot be added.
    """
    with TemporaryDirectory(prefix="oomless-") as folder:
        yield new_tokens(spec, settings, Path(folder))


def new_tokens(spec: ModelSpec, settings: Mapping[str, Any], folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Return ``spec`` and ``settings`` with the tokens that ``extend_tokenizer`` adds, whose tokenizer is written to ``folder``.

    Raises:
        UserError: they cannot be added.
    """
    about = of_the_text(settings)
    return extend.for_plan(spec, settings, about if is_readable(about) else None, folder)


def read_layout(config: TrainConfig) -> Layout | None:
    """Return how the text that ``config`` names lies in its blocks; ``None`` where there is none to read here, or too much.

    Raises:
        UserError: the text is there and cannot be used.
    """
    if not is_readable(config):
        return None
    name = config.tokenizer or config.model
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    return Layout.of(prepare(config, tokenizer), config)


class _Blocks:
    """Blocks of no particular tokens that lie as they are told; they stand for those of a source."""

    def __init__(self, layouts: Sequence[Documents]) -> None:
        self._layouts = layouts

    def __iter__(self) -> Iterator[Block]:
        return map(_blank, self._layouts)

    def check_unchanged(self) -> None:
        """They never change."""


class _Stream(_Blocks):
    """Stands for the stream of a run's blocks."""

    fingerprint = "blank"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.train)
        self._ranked = layout.ranked
        self.blocks_per_epoch = layout.blocks_per_epoch or 1 << 40

    def block(self, number: int) -> Block:
        return _blank(self._layouts[number % len(self._layouts)])

    def heaviest(self, count: int, weigh: Weigh) -> list[list[Block]]:
        return [[_blank(documents) for _, documents in chosen] for chosen in heaviest(self._ranked, count, weigh)]


def _blank(documents: Documents) -> Block:
    tokens = np.zeros(sum(documents), dtype=np.int64)
    return Block(input_ids=tokens, labels=tokens, position_ids=tokens, document_lengths=documents)
