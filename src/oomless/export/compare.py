"""The model that a run began with and the one that it made, side by side: the loss of the text that was held out, and what each writes.

One of the two is in memory at a time. Each answer is kept under a key of all that it rests on, and not asked for again; the last comparison
stands in the run's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from oomless.config import TrainConfig
from oomless.data.pack import PackedBlocks, SomeBlocks
from oomless.data.prepare import prepare
from oomless.errors import ConfigError, DataError
from oomless.export.comparison import Comparison, Side
from oomless.export.generate import OWN, Sampling, Speaker, ids_of
from oomless.export.hugging_face import tokenizer_of
from oomless.export.merged import HOST, Merged
from oomless.export.plan import stamps
from oomless.export.room import Room
from oomless.export.source import Source, find_two
from oomless.kept import Kept, key_of, user_folder
from oomless.memory.device import Device
from oomless.models import form
from oomless.training import checkpoint
from oomless.training.guard import free
from oomless.training.run_files import COMPARISON

Say = Callable[[str, float], None]
"""Is told what is being done, and what share of it is."""


class Pair:
    """The two models of ``place``, found and ready to be compared; nothing is loaded yet.

    Args:
        place: a run, one of its checkpoints, or an adapter.
        prompts: what both go on from.
        sampling: how.
        chat: whether a prompt is what a user says.
        which: the checkpoint of a run, as in ``source.find``.
        base: the model that was begun with, where it is not where it was.
        held_out: whether the loss of the text that the run held out is measured.
        most_blocks: of each source at most so many blocks of it, spread evenly.
        device: where the models lie.
        say: is told how far it is.

    Raises:
        UserError: there are no two models, or nothing to compare them on.
    """

    def __init__(
        self,
        place: Path,
        prompts: Sequence[str] = (),
        *,
        sampling: Sampling = Sampling(max_new_tokens=64),
        chat: bool = False,
        which: str | None = None,
        base: str | None = None,
        held_out: bool = True,
        most_blocks: int | None = None,
        device: Device = HOST,
        say: Say = lambda text, share: None,
    ) -> None:
        self.prompts, self.sampling, self.device, self.say = prompts, sampling, device, say
        self.trained, self.begun = find_two(place, which, base)
        self.tokenizer, self.merged = tokenizer_of(self.trained), Merged(self.trained)
        self.ids = [ids_of(self.tokenizer, prompt, chat=chat) for prompt in prompts]
        self.blocks: Mapping[str, PackedBlocks | SomeBlocks] = {}
        self.form, self.chunk_bytes = OWN, 0
        run = self.trained.run
        if held_out and run is not None:
            self.blocks = _held_out(self.trained, run, most_blocks, say)
            self.chunk_bytes = run.loss_chunk_bytes
            if self.blocks:
                self.form = form.choose(self.begun.base, run.packing)
        if not self.blocks and not prompts:
            lacking = (
                "no text is known to have been held out" if held_out else "without the loss, prompts alone are compared"
            )
            raise ConfigError(f'{lacking}: give --prompt "some text"')

    @property
    def folder(self) -> Path | None:
        """The run's folder, where one is."""
        return None if self.trained.run is None else self.trained.folder.parent

    def room(self) -> Room:
        """Return what the larger of the two takes."""
        blocks = [next(iter(blocks)) for blocks in self.blocks.values()]
        return Room(
            self.merged,
            self.tokenizer,
            self.device,
            self.form,
            prompts=self.ids,
            sampling=self.sampling,
            blocks=blocks,
            chunk_bytes=self.chunk_bytes,
        )

    def compare(self) -> Comparison:
        """Ask both, one after the other, but for what is known of earlier, and keep what was found."""
        base = self._ask(self.begun, lambda: Merged(self.begun, self.merged.dtype), 0.0)
        trained = self._ask(self.trained, lambda: self.merged, 0.5)
        numbers = str(self.merged.dtype).removeprefix("torch.")
        found = Comparison(base=base, trained=trained, prompts=self.prompts, numbers=numbers)
        if self.folder is not None:
            with checkpoint.clear_disk_errors(str(self.folder / COMPARISON)):
                checkpoint.write_atomically(self.folder / COMPARISON, json.dumps(asdict(found), indent=2))
        return found

    def _questions(self) -> Iterator[_Question]:
        """Yield what each model is asked: the loss and the number of tokens of each source, then each text."""
        for blocks in self.blocks.values():
            yield _Question([self.chunk_bytes, _fingerprint(blocks)], len(blocks), partial(self._loss, blocks))
        for ids in self.ids:
            yield _Question([asdict(self.sampling), ids.tolist()], 1, partial(self._text, ids))

    def _loss(self, blocks: PackedBlocks | SomeBlocks, speaker: Speaker, done: Callable[[], None]) -> tuple[float, int]:
        return speaker.loss(blocks, self.chunk_bytes, done)

    def _text(self, ids: Tensor, speaker: Speaker, done: Callable[[], None]) -> str:
        text = speaker.go_on(ids, self.sampling)
        done()
        return text

    def _ask(self, source: Source, make: Callable[[], Merged], share: float) -> Side:
        """Return what the model of ``source`` answers; it is loaded where an answer is not known."""
        kept, questions = Kept(user_folder() / "compare"), list(self._questions())
        model = [*stamps(source), str(self.merged.dtype), self.device.name]
        keys = [key_of(model, question.rests_on) for question in questions]
        answers: list[Any] = [(kept.get(key) or {}).get("answer") for key in keys]
        missing = [number for number, answer in enumerate(answers) if answer is None]
        if missing:
            total, done = sum(questions[number].size for number in missing) + 1, 0

            def next_one() -> None:
                nonlocal done
                self.say(source.name, share + done / total / 2)
                done += 1

            next_one()
            with self.device.active():
                speaker: Any = Speaker(make(), self.tokenizer, self.device, self.form)
                for number in missing:
                    answers[number] = questions[number].ask(speaker, next_one)
                    kept.put(keys[number], {"answer": answers[number]})
                del speaker
                free(self.device)
            kept.clear_oldest()
        measured = dict(zip(self.blocks, answers, strict=False))
        return Side(
            name=source.name,
            losses={name: loss for name, (loss, _) in measured.items()},
            tokens={name: tokens for name, (_, tokens) in measured.items()},
            texts=answers[len(measured) :],
        )


@dataclass(frozen=True, slots=True)
class _Question:
    """What a model is asked."""

    rests_on: Any
    """All that decides the answer beside the model."""

    size: int
    """How often the function is told that a part is done."""

    ask: Callable[[Speaker, Callable[[], None]], Any]


def _held_out(
    source: Source, config: TrainConfig, most_blocks: int | None, say: Say
) -> Mapping[str, PackedBlocks | SomeBlocks]:
    """Return the text that the run of ``source`` held out.

    Raises:
        DataError: its text is not what it was, so that nobody knows what of it was held out.
    """
    tokenizer = tokenizer_of(source)
    if most_blocks is not None:
        config = replace(config, max_eval_blocks=most_blocks)
    data = prepare(config, tokenizer, lambda done, total: say("reading the text", done / max(1, total)))
    if source.saved is not None:
        fingerprint = checkpoint.read_state(source.saved)["loader"]["fingerprint"]
        if fingerprint != data.train.fingerprint:
            raise DataError(
                "the run's text, or its tokenizer, is not what it was when the run trained on it, so what was held out may have been "
                "learnt: set it back, or compare on prompts alone with --no-loss"
            )
    return data.evaluation


def _whole(blocks: PackedBlocks | SomeBlocks) -> PackedBlocks:
    return blocks.blocks if isinstance(blocks, SomeBlocks) else blocks


def _fingerprint(blocks: PackedBlocks | SomeBlocks) -> str:
    """Return a digest of the tokens that ``blocks`` predict and of what each of them sees."""
    whole = _whole(blocks)
    told = [whole.store.key, whole.length, whole.packing, len(blocks)]
    digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=16)
    for places in (whole.starts, whole.ends):
        digest.update(places.tobytes())
    return digest.hexdigest()
