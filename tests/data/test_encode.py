"""The ids of every text decode to the text, also where a long document is encoded in pieces."""

import numpy as np
import pytest

from oomless.data import encode
from oomless.data.encode import Encoder, check_tokenizer
from oomless.data.read import PIECE_CHARACTERS
from oomless.errors import DataError, ModelError

LONG = 2 * PIECE_CHARACTERS + 1000


def encoded(encoder, *documents, piece=PIECE_CHARACTERS):
    """Return each document's ids, piece by piece."""
    pieces = (iter([text[start : start + piece] for start in range(0, len(text), piece)]) for text in documents)
    result = [[]]
    for ids, is_last in encoder.documents(pieces, np.uint32):
        result[-1].append(ids.tolist())
        if is_last:
            result.append([])
    assert result.pop() == []
    return result


def decoded(encoder, pieces):
    ids = sum(pieces, [])
    assert ids[: len(encoder.start)] == encoder.start
    assert ids[-1] == encoder.eos
    return encoder.tokenizer.decode(ids[len(encoder.start) : -1], skip_special_tokens=False)


def changed(encoder, text):
    """Return what the tokenizer itself makes of ``text``; only spaces at the very start may differ."""
    result = encoder.tokenizer.decode(encoder.tokenizer.encode(text, add_special_tokens=False).ids)
    assert result.lstrip(" ") == text.lstrip(" ")
    assert abs(len(result) - len(text)) <= 1
    return result


def test_no_character_of_any_script_is_lost(any_encoder, script):
    (pieces,) = encoded(any_encoder, script)
    assert decoded(any_encoder, pieces) == changed(any_encoder, script)


def test_a_document_decodes_to_its_very_text(encoders, script):
    """Byte-level and Llama's way are exact; Metaspace swallows a first space, RoBERTa's way adds one."""
    for name in ("byte-level", "prepend"):
        assert changed(encoders[name], script) == script
    assert changed(encoders["metaspace"], script.lstrip(" ")) == script.lstrip(" ")


def test_how_each_is_cut(encoders):
    anchors = {name: encoder.anchor for name, encoder in encoders.items()}
    assert anchors == {"byte-level": "", "metaspace": "\0", "prepend": "\0", "prefix-space": "\0"}


def test_documents_are_kept_apart_whatever_their_length(any_encoder, texts):
    documents = ["", *texts, "", "a", "\n"]
    assert [decoded(any_encoder, pieces) for pieces in encoded(any_encoder, *documents)] == [
        changed(any_encoder, text) for text in documents
    ]


def repeated(text, length):
    return text * (length // len(text) + 1)


@pytest.mark.parametrize("line_ends", [True, False])
def test_a_long_document_in_pieces_decodes_to_its_text(any_encoder, texts, line_ends):
    text = repeated("".join(texts) if line_ends else "".join("".join(texts).split()), LONG)
    (pieces,) = encoded(any_encoder, text)
    assert len(pieces) >= 2
    assert decoded(any_encoder, pieces) == changed(any_encoder, text)


@pytest.mark.parametrize("line_end", ["", "\n"])
def test_any_script_in_pieces_decodes_to_its_text(any_encoder, script, line_end, monkeypatch):
    """With small pieces, cut in a hundred places."""
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 37)
    text = repeated(script + line_end, 4000)
    (pieces,) = encoded(any_encoder, text, piece=23)
    assert len(pieces) > 100
    assert decoded(any_encoder, pieces) == changed(any_encoder, text)


@pytest.mark.parametrize("unit", ["\n", "\r\n", " ", "a", "\0", "\n ", "天", "e\u0301"])
def test_one_thing_over_and_over(any_encoder, unit, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 37)
    text = repeated(unit, 4000)
    (pieces,) = encoded(any_encoder, text, piece=23)
    assert len(pieces) > 100
    assert decoded(any_encoder, pieces) == changed(any_encoder, text)


def test_pieces_have_the_ids_of_the_whole(any_encoder, texts, monkeypatch):
    """Real text, cut before a line's first letter or before a word: nothing tells that it was cut."""
    text = "".join(texts)
    (whole,) = encoded(any_encoder, text)
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 1000)
    (pieces,) = encoded(any_encoder, text)
    ids = sum(pieces, [])
    assert len(pieces) > 20
    assert len(ids) <= len(whole[0]) * 1.002
    assert len(whole) == 1


def test_a_tokenizer_that_starts_documents_with_bos(tokenizer_folder, encoders):
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<|endoftext|>")
    assert encoded(Encoder(tokenizer), "a")[0][0][0] != tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    (pieces,) = encoded(Encoder(tokenizer), "b" * LONG)
    assert sum(pieces, []).count(tokenizer.bos_token_id) == 2
    assert pieces[0][0] == pieces[-1][-1] == tokenizer.bos_token_id


def test_the_callers_truncation_and_padding_do_not_matter_and_stay(tokenizer_folder, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = encoded(Encoder(tokenizer), *texts)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    assert encoded(Encoder(tokenizer), *texts) == expected
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_tokenizer_that_cannot_encode_in_parts(tokenizer_folder, monkeypatch):
    """One that strips whatever it is given."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    whole = Encoder(tokenizer)
    assert whole.anchor is None
    text = "word\n" * (LONG // 5) + "end"
    (pieces,) = encoded(whole, text)
    assert len(pieces) == 1
    assert decoded(whole, pieces) == text
    monkeypatch.setattr(encode, "WHOLE_DOCUMENT_CHARACTERS", 1000)
    with pytest.raises(DataError, match="longer than 1,000 characters.*split the file"):
        encoded(whole, "a" * 2001)


def test_no_eos_token(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos_token"):
        Encoder(tokenizer)


def test_a_tokenizer_larger_than_the_embedding(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    check_tokenizer(tokenizer, 512)
    with pytest.raises(ModelError, match="go up to 511, but the model's embedding has 511 rows"):
        check_tokenizer(tokenizer, 511)
