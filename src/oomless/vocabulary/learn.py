"""Which pieces to join: byte-pair encoding that goes on where a tokenizer stopped.

Text comes as the tokenizer cuts it, words of token ids with how often each is there. The pair of neighbours that is found most often
in words becomes a token, again and again. As each new token is made of pieces that the old tokenizer leaves, and comes after all
that it knew, text in which no new token lies is cut as before; and what a merge does inside a stretch does not hang on what is
around it, so that each token is also what its own text alone becomes.

Characters that the tokenizer does not know, which it writes as bytes or as an unknown, become tokens by how often they are there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise

LEAST_OFTEN = 2
"""A token is made of what is there so often."""

MOST_CHARACTERS = 48
"""The length of a token, in letters of the tokenizer's own alphabet, of which a byte may be one."""

Word = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alphabet:
    """What the symbols of words are."""

    texts: Mapping[int, str]
    """Of tokens, as the tokenizer's model writes them."""

    unknown: Sequence[tuple[str, Word]]
    """Characters that are no token and the ids that stand for them; symbol -1 is the first of them."""

    first: int
    """The id of the first new token."""

    prefix: str = ""
    """What a piece inside a word begins with."""


@dataclass(kw_only=True, slots=True)
class Learnt:
    """New tokens, in the order in which they were made."""

    texts: list[str] = field(default_factory=list)
    parts: list[tuple[str, str] | None] = field(default_factory=list)
    """The two that each joins; ``None`` of a character."""

    pieces: list[Word] = field(default_factory=list)
    """The old tokens for which each stands."""

    existing: int = 0
    """Joins that are tokens already, and were passed over."""


def learn(words: Mapping[Word, int], alphabet: Alphabet, count: int) -> Learnt:
    """Return up to ``count`` tokens that make ``words``, with how often each is there, shorter."""
    state = _State(words, alphabet)
    while len(state.learnt.texts) < count and state.step():
        pass
    return state.learnt


class _State:
    """Words as they are cut by now, and how often which neighbours are there."""

    def __init__(self, words: Mapping[Word, int], alphabet: Alphabet) -> None:
        self.alphabet, self.learnt = alphabet, Learnt()
        self.texts, self.known = dict(alphabet.texts), set(alphabet.texts.values())
        self.pieces: dict[int, Word] = {}
        self.words = [list(word) for word in words]
        self.often = list(words.values())
        self.totals: Counter[Word] = Counter()
        """How often each pair of tokens, and each unknown character, is there."""
        self.places: dict[Word, set[int]] = defaultdict(set)
        for number in range(len(self.words)):
            self._count(number, 1)
        self.passed_over: set[Word] = set()
        self.heap = [(-self._worth(what), what) for what in self.totals]
        heapify(self.heap)

    def _count(self, number: int, sign: int) -> list[Word]:
        """Add what is in a word to the totals, or take it away; return what that is."""
        word, often = self.words[number], sign * self.often[number]
        found: list[Word] = [pair for pair in pairwise(word) if pair[0] >= 0 and pair[1] >= 0]
        found += [(symbol,) for symbol in word if symbol < 0]
        for what in found:
            self.totals[what] += often
            if sign > 0:
                self.places[what].add(number)
        return found

    def _worth(self, what: Word) -> int:
        """Return how many tokens fewer the text would have."""
        saved = 1 if len(what) == 2 else max(1, len(self.alphabet.unknown[-what[0] - 1][1]) - 1)
        return self.totals[what] * saved

    def step(self) -> bool:
        """Make the next token; return whether there was one to make."""
        while self.heap:
            worth, what = heappop(self.heap)
            now = self._worth(what)
            if now != -worth:
                if now > 0:
                    heappush(self.heap, (-now, what))
            elif self.totals[what] < LEAST_OFTEN:
                continue
            elif self._make(what):
                return True
        return False

    def _make(self, what: Word) -> bool:
        parts: tuple[str, str] | None = None
        if len(what) == 1:
            text, pieces = self.alphabet.unknown[-what[0] - 1]
        else:
            parts = (self.texts[what[0]], self.texts[what[1]])
            text = parts[0] + parts[1].removeprefix(self.alphabet.prefix)
            pieces = self._pieces_of(what[0]) + self._pieces_of(what[1])
        if text in self.known or len(text) > MOST_CHARACTERS:
            self.learnt.existing += text in self.known and what not in self.passed_over
            self.passed_over.add(what)
            return False
        made = self.alphabet.first + len(self.learnt.texts)
        self.texts[made], self.pieces[made] = text, pieces
        self.known.add(text)
        self.learnt.texts.append(text)
        self.learnt.parts.append(parts)
        self.learnt.pieces.append(pieces)
        changed: set[Word] = set()
        for number in sorted(self.places.pop(what)):
            self._count(number, -1)
            self.words[number] = _joined(self.words[number], what, made)
            changed.update(found for found in self._count(number, 1) if made in found)
        for new in sorted(changed):
            heappush(self.heap, (-self._worth(new), new))
        return True

    def _pieces_of(self, symbol: int) -> Word:
        return self.pieces.get(symbol, (symbol,))


def _joined(word: Sequence[int], what: Word, made: int) -> list[int]:
    """Return ``word`` with ``made`` wherever ``what`` was, from the left."""
    found: list[int] = []
    place, size = 0, len(what)
    while place < len(word):
        if tuple(word[place : place + size]) == what:
            found.append(made)
            place += size
        else:
            found.append(word[place])
            place += 1
    return found
