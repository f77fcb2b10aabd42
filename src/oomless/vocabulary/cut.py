"""How a fast tokenizer cuts text, as what new tokens can be learnt from; and the same tokenizer with them in its model.

The tokens become part of the model, as entries of the vocabulary with merges (BPE) or with scores (Unigram), and not "added tokens",
which would be looked for before text is cut into words, so that what else reads ``tokenizer.json`` cuts as transformers does.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from oomless.errors import ModelError
from oomless.vocabulary.learn import Alphabet, Learnt, Word

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_EDGE = 0.01
"""How much better than its pieces a token of a Unigram model is, for each token that it saves."""
_UNKNOWN_IS_WORSE = 10.0
"""By how much an unknown character is worse than the worst piece, in Unigram models."""
_LONGEST_WORD = 128
"""What is longer is no word."""


class Cut:
    """How ``tokenizer``, a fast one of transformers, cuts text.

    Raises:
        ModelError: it is of a kind that cannot be given tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.said: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self.said["model"]
        kind = model.get("type")
        if kind not in ("BPE", "Unigram"):
            why = {
                "WordPiece": "a WordPiece model takes the longest token that a word begins with, so that any new one changes how old text is "
                "cut",
                "WordLevel": "a WordLevel model has a token for each word and none for its pieces, of which a row could be made",
            }
            raise ModelError(
                f"extend_tokenizer is for BPE and Unigram tokenizers; this is {kind}"
                + (f": {why[kind]}" if kind in why else "")
            )
        self.is_unigram = kind == "Unigram"
        parts = json.dumps([self.said.get("pre_tokenizer"), self.said.get("decoder")])
        self.by_bytes = '"ByteLevel"' in parts
        vocabulary = (
            {entry[0]: number for number, entry in enumerate(model["vocab"])} if self.is_unigram else model["vocab"]
        )
        self.texts = {number: text for text, number in vocabulary.items()}
        self.special = {added["id"]: added["content"] for added in self.said["added_tokens"]}
        self.first = 1 + max(*self.texts, *self.special)
        self.prefix = str(model.get("continuing_subword_prefix") or "")
        self.unknown = model.get("unk_id") if self.is_unigram else vocabulary.get(model.get("unk_token"))
        fallback = bool(model.get("byte_fallback"))
        self.bytes = {n: int(m[1], 16) for n, t in self.texts.items() if fallback and (m := _BYTE.fullmatch(t))}
        self.tokenizer = Tokenizer.from_str(json.dumps(_steady(self.said)))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._characters: dict[str, int] = {}
        self._unknown: list[tuple[str, Word]] = []
        self._kinds: dict[int, tuple[str, str]] = {}

    @property
    def alphabet(self) -> Alphabet:
        """What the symbols of the words that were counted are."""
        return Alphabet(texts=self.texts | self.special, unknown=self._unknown, first=self.first, prefix=self.prefix)

    def count(self, texts: Sequence[str], words: Counter[Word]) -> int:
        """Add the words of ``texts`` to ``words``; return how many tokens the texts have."""
        tokens = 0
        for text, encoding in zip(texts, self.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens += len(encoding.ids)
            for word in self._words(text, encoding):
                if 1 <= len(word) <= _LONGEST_WORD:
                    words[tuple(word)] += 1
        return tokens

    def _words(self, text: str, encoding: Any) -> Iterator[list[int]]:
        ids, numbers = encoding.ids, encoding.word_ids
        start = 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or numbers[place] != numbers[start]:
                if self.by_bytes:
                    yield ids[start:place]
                elif ids[start] not in self.special or ids[start] in self.bytes:
                    yield from self._apart(self._symbols(text, encoding, start, place))
                start = place

    def _symbols(self, text: str, encoding: Any, start: int, end: int) -> Iterator[int | None]:
        """Yield what a stretch consists of, characters instead of bytes and unknowns; ``None`` where there is no telling."""
        pending: list[int] = []
        for number, place in zip(encoding.ids[start:end], encoding.offsets[start:end], strict=True):
            if number in self.bytes:
                pending.append(number)
                try:
                    character = bytes(self.bytes[one] for one in pending).decode()
                except UnicodeDecodeError:
                    if len(pending) == 4:
                        pending.clear()
                        yield None
                    continue
                yield self._character(character, tuple(pending))
                pending.clear()
                continue
            if pending:
                pending.clear()
                yield None
            if number == self.unknown:
                for character in text[slice(*place)]:
                    if self.tokenizer.normalizer is not None:
                        character = self.tokenizer.normalizer.normalize_str(character).lstrip(_SPACE)
                    yield self._character(character, (number,)) if len(character) == 1 else None
            else:
                yield number

    def _character(self, character: str, ids: Word) -> int | None:
        if self.prefix or not character.isprintable() or character.isspace():
            return None
        if character not in self._characters:
            self._unknown.append((character, ids))
            self._characters[character] = -len(self._unknown)
        return self._characters[character]

    def _apart(self, symbols: Iterator[int | None]) -> Iterator[list[int]]:
        """Cut a stretch into words: where a space begins, and where letters, digits and signs meet."""
        word: list[int] = []
        for symbol in symbols:
            if word and (symbol is None or self._parts(word[-1], symbol)):
                yield word
                word = []
            if symbol is not None:
                word.append(symbol)
        if word:
            yield word

    def _parts(self, before: int, after: int) -> bool:
        last, first = self._kind(before)[1], self._kind(after)[0]
        if last == "space":
            return False
        return first != last or first == "digit"

    def _kind(self, symbol: int) -> tuple[str, str]:
        if symbol not in self._kinds:
            text = self.texts.get(symbol, self._unknown[-symbol - 1][0] if symbol < 0 else " ")
            self._kinds[symbol] = (_kind_of(text[:1]), _kind_of(text[-1:]))
        return self._kinds[symbol]

    def extended(self, learnt: Learnt) -> str:
        """Return the ``tokenizer.json`` with the tokens of ``learnt`` in its model."""
        said = json.loads(json.dumps(self.said))
        model = said["model"]
        # An id of an added token that the model does not know is counted on from the model's size, and would become another.
        fill = {number: text for number, text in self.special.items() if number not in self.texts}
        if self.is_unigram:
            self._extend_unigram(model["vocab"], fill, learnt)
            return json.dumps(said, ensure_ascii=False)
        model["vocab"] |= {text: number for number, text in fill.items()}
        model["vocab"] |= {text: self.first + number for number, text in enumerate(learnt.texts)}
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] += [list(parts) for parts in learnt.parts if parts is not None]
        return json.dumps(said, ensure_ascii=False)

    def _extend_unigram(self, entries: list[list[Any]], fill: dict[int, str], learnt: Learnt) -> None:
        """Add pieces whose scores are a little better than those of what they stand for.

        So a path through old pieces is as good as before, and the best of all goes through as many new ones as it can. None is worse than
        the worst old piece, by which unknown characters are scored. No two are the same, and all are numbers of 32 bits: equally good paths
        would be taken by each program as it rounds.
        """
        worst = min(score for _, score in entries)
        scores = dict(enumerate(score for _, score in entries))
        better: dict[str, float] = {}
        chance = random.Random(0)
        if self.unknown is not None:
            scores[self.unknown] = worst - _UNKNOWN_IS_WORSE
        entries += [[fill.get(number, f"<unused{number}>"), worst] for number in range(len(entries), self.first)]
        for text, parts, pieces in zip(learnt.texts, learnt.parts, learnt.pieces, strict=True):
            saved = len(pieces) if parts is None else 1
            better[text] = _EDGE * saved + sum(better.get(part, 0.0) for part in parts or ())
            made = self._score(pieces, scores, worst - _UNKNOWN_IS_WORSE) + better[text]
            entries.append([text, float(np.float32(max(worst, made) + _EDGE / 4 * (0.01 + chance.random())))])

    def _score(self, pieces: Word, scores: dict[int, float], unknown: float) -> float:
        """Return the score of the path through ``pieces``, where the bytes of a character count as one unknown."""
        characters = sum(self.bytes[piece] & 0xC0 != 0x80 for piece in pieces if piece in self.bytes)
        return sum(scores[piece] for piece in pieces if piece not in self.bytes) + unknown * characters


def _kind_of(character: str) -> str:
    if character in (_SPACE, " ", ""):
        return "space"
    major = unicodedata.category(character)[0]
    return {"L": "letter", "M": "letter", "N": "digit", "Z": "gap", "C": "gap"}.get(major, "sign")


def _steady(said: dict[str, Any]) -> dict[str, Any]:
    """Return ``said`` without what is drawn by chance."""
    return said | {"model": said["model"] | ({"dropout": None} if "dropout" in said["model"] else {})}
