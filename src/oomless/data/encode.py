"""Documents to token ids, on all cores, in bounded memory, and so that the ids give the same text back.

A long document is encoded in pieces. Where it is cut matters: the ids of the pieces must decode to the text. Most
byte-level tokenizers split before a line's first letter anyway, so a cut there changes nothing. Tokenizers in
SentencePiece's manner put a space before every text they are given; for them each later piece is encoded behind an
anchor, a character that merges with nothing, whose own ids are then taken off again. What the tokenizer needs is found
by trying, and a tokenizer for which nothing gives the text back encodes its documents whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from oomless.data.read import PIECE_CHARACTERS, Pieces
from oomless.errors import DataError, ModelError

BATCH_CHARACTERS = 1 << 20
WHOLE_DOCUMENT_CHARACTERS = 1 << 26
MOST_TOKENS = 1 << 24
"""No vocabulary is larger; the tokenizers library counts up to the last number, however large."""

_ANCHORS = ("", "\0", "\n")
_LINE_START = re.compile(r"\n(?=\S)")
_WORD_START = re.compile(r"(?<=\S)(?= \S)")
_PROBE = ("def first():\n    return 'one'\n", "Second line, 第二行, naïve\n", "  indented\n", "last")
_HARD_PROBE = ("a", "\n\n", "\n b", "  c", " ", "\r\n", "天", "\u0301!", "\0", "1")


class Encoder:
    """Encodes with a copy of a fast transformers tokenizer, without its truncation and padding."""

    def __init__(self, tokenizer: Any) -> None:
        """Copy ``tokenizer``.

        Raises:
            ModelError: it has no token that ends a document, or its tokens' numbers are wrong.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos_token, which oomless puts between documents: set one")
        vocabulary: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        last = max(vocabulary.values())
        if last > MOST_TOKENS:
            raise ModelError(f"the tokenizer has a token of number {last}: numbers end at {MOST_TOKENS}")
        self.serialised: str = tokenizer.backend_tokenizer.to_str()
        try:
            self.tokenizer = Tokenizer.from_str(self.serialised)
        except Exception as error:
            raise ModelError(
                f"the tokenizer does not agree with itself, as where two tokens have one number: {error}"
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos: int = tokenizer.eos_token_id
        special = self.tokenizer.encode("", add_special_tokens=True).ids
        self.start: list[int] = [tokenizer.bos_token_id] if tokenizer.bos_token_id in special else []
        self.vocabulary = 1 + last
        self.anchor = next((anchor for anchor in _ANCHORS if self._fits(anchor)), None)
        """What later pieces are encoded behind; None where documents must stay whole."""

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _behind(self, anchor: str, texts: list[str]) -> list[list[int]]:
        """Return the ids that ``texts`` have behind ``anchor``, without the anchor's."""
        anchor_ids = self._plain([anchor])[0] if anchor else []
        kept = len(anchor_ids)
        encoded = self._plain([anchor + text for text in texts])
        for text, ids in zip(texts, encoded, strict=True):
            if ids[:kept] != anchor_ids:
                raise DataError(
                    f"a long document cannot be encoded in parts where {text[:20]!r} begins: split its file there"
                )
        return [ids[kept:] for ids in encoded]

    def _fits(self, anchor: str) -> bool:
        for probe in (_PROBE, _HARD_PROBE):
            whole = self._plain(["".join(probe)])[0]
            try:
                ids = sum([*self._plain([probe[0]]), *self._behind(anchor, list(probe[1:]))], [])
            except DataError:
                return False
            texts = self.tokenizer.decode_batch([ids, whole], skip_special_tokens=False)
            if texts[0] != texts[1] or (probe is _PROBE and len(ids) > len(whole)):
                return False
        return True

    def documents(
        self, documents: Iterable[Pieces], dtype: type[np.unsignedinteger[Any]]
    ) -> Iterator[tuple[Any, bool]]:
        """Yield ``(ids, is_last)`` for each piece of each document, BOS and EOS included, in order."""
        batch: list[tuple[str, int, bool]] = []
        waiting = 0
        for pieces in documents:
            for number, text, is_last in self._cut_pieces(pieces):
                batch.append((text, number, is_last))
                waiting += len(text)
                if waiting >= BATCH_CHARACTERS:
                    yield from self._encode(batch, dtype)
                    batch, waiting = [], 0
        yield from self._encode(batch, dtype)

    def _encode(
        self, batch: list[tuple[str, int, bool]], dtype: type[np.unsignedinteger[Any]]
    ) -> Iterator[tuple[Any, bool]]:
        first = iter(self._plain([text for text, number, _ in batch if number == 0]))
        later = iter(self._behind(self.anchor or "", [text for text, number, _ in batch if number > 0]))
        for _, number, is_last in batch:
            ids = next(later) if number else [*self.start, *next(first)]
            yield np.array([*ids, self.eos] if is_last else ids, dtype=dtype), is_last

    def _cut_pieces(self, pieces: Pieces) -> Iterator[tuple[int, str, bool]]:
        """Yield ``(number, text, is_last)``: the document cut where encoding the parts gives the whole back."""
        number, rest = 0, ""
        limit = WHOLE_DOCUMENT_CHARACTERS if self.anchor is None else PIECE_CHARACTERS
        for piece in pieces:
            rest += piece
            while len(rest) >= 2 * limit:
                if self.anchor is None:
                    raise DataError(
                        f"a document is longer than {WHOLE_DOCUMENT_CHARACTERS:,} characters, and this tokenizer cannot "
                        "encode a document in parts: split the file into several documents"
                    )
                at = _last_boundary(rest, limit)
                yield number, rest[:at], False
                number, rest = number + 1, rest[at:]
        yield number, rest, True


def _last_boundary(text: str, limit: int) -> int:
    """Return where to cut ``text``: before a line's first letter, else before a word, near ``limit`` from below."""
    for pattern in (_LINE_START, _WORD_START):
        for start in (limit - limit // 8, 1):
            cuts = [match.end() for match in pattern.finditer(text, start, limit)]
            if cuts:
                return cuts[-1]
    return limit


def check_tokenizer(tokenizer: Any, vocabulary_rows: int) -> None:
    """Check that every id of ``tokenizer`` has a row in an embedding of ``vocabulary_rows``.

    Raises:
        ModelError: some have none.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary_rows:
        raise ModelError(
            f"the tokenizer's ids go up to {largest}, but the model's embedding has {vocabulary_rows} rows (0 to "
            f"{vocabulary_rows - 1}): the two do not belong together; give the model's own tokenizer"
        )
