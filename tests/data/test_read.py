"""Every format gives the text that went in, to the character; what cannot be read says where."""

import gzip
import json
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from oomless.config import DataSource
from oomless.data.read import PIECE_CHARACTERS, find_files, read_documents
from oomless.errors import DataError

COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def records_bytes(kind, texts, field):
    if kind == ".jsonl":
        return "".join(
            json.dumps({"id": number, field: text}, ensure_ascii=number % 2 == 0) + "\n"
            for number, text in enumerate(texts)
        ).encode()
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), sink)
    return sink.getvalue().to_pybytes()


def read(path, *, field="text", errors="strict", progress=None):
    source = DataSource(path=str(path), text_field=field)
    files, _ = find_files(source)
    tell = progress.append if progress is not None else lambda _: None
    return ["".join(pieces) for file in files for pieces in read_documents(file, source, errors, tell)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".TXT"])
def test_a_text_file_is_one_document(tmp_path, texts, suffix, compression):
    path = tmp_path / f"some.thing{suffix}{compression}"
    text = "\n".join(texts) * 4
    path.write_bytes(COMPRESSIONS[compression](text.encode()))
    assert len(text) > PIECE_CHARACTERS
    progress = []
    assert read(path, progress=progress) == [text]
    assert progress == sorted(progress)
    assert progress[-1] == path.stat().st_size


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("field", ["text", "content"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_record_is_one_document(tmp_path, texts, suffix, field, compression):
    path = tmp_path / f"records{suffix}{compression}"
    documents = [*texts, "", "x" * (2 * PIECE_CHARACTERS + 3)] * 5
    path.write_bytes(COMPRESSIONS[compression](records_bytes(suffix, documents, field)))
    progress = []
    assert read(path, field=field, progress=progress) == documents
    assert progress == sorted(progress)
    assert progress[-1] == path.stat().st_size


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_no_character_of_any_script_is_lost(tmp_path, script, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(script.encode() if suffix == ".txt" else records_bytes(suffix, [script, script], "text"))
    assert set(read(path)) == {script}


def test_blank_json_lines_and_a_missing_last_line_end_are_fine(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n\n  \n{"text": "two"}')
    assert read(path) == ["one", "two"]


def test_several_members_in_one_compressed_file_are_all_read(tmp_path):
    for suffix, compress in COMPRESSIONS.items():
        (tmp_path / f"two.txt{suffix}").write_bytes(compress(b"first ") + compress(b"second"))
    assert read(tmp_path) == ["first second"] * 3


@pytest.fixture
def folder(tmp_path):
    for name in ("b.md", "a.txt", "deep/er/c.py", "deep/d.jsonl", "photo.png", "deep/photo.PNG", "LICENSE", "x.tar.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    for name in (".hidden.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("never")
    return tmp_path


def test_a_folder_is_read_in_order_and_the_files_passed_over_are_counted(folder):
    files, skipped = find_files(DataSource(path=str(folder)))
    assert [str(file.path.relative_to(folder)) for file in files] == ["a.txt", "b.md", "deep/d.jsonl", "deep/er/c.py"]
    assert skipped == {".png": 2, "no suffix": 1, ".tar": 1}


def test_globs(folder):
    def found(pattern):
        return [file.path.name for file in find_files(DataSource(path=str(folder / pattern)))[0]]

    assert found("*.txt") == ["a.txt"]
    assert found("**/*.py") == ["c.py"]
    assert found("deep/*") == ["d.jsonl"]


def test_a_file_that_is_named_is_read_whatever_its_suffix(folder):
    assert read(folder / "LICENSE") == ['{"text": "LICENSE"}']


def test_a_file_name_that_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert read(tmp_path / "a[1].txt") == ["text"]


@pytest.mark.parametrize("name", ["none.txt", "*.md", "empty"])
def test_no_such_path(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a file, a folder with files or a glob"):
        find_files(DataSource(path=str(tmp_path / name)))


def test_no_file_of_a_known_kind(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.zip").touch()
    with pytest.raises(DataError, match=r"no file of a known kind \(it has .png, .zip\)"):
        find_files(DataSource(path=str(tmp_path)))


@pytest.mark.parametrize(
    "offset",
    [0, 5, PIECE_CHARACTERS - 1, PIECE_CHARACTERS, PIECE_CHARACTERS + 7, 3 * PIECE_CHARACTERS - 2],
)
@pytest.mark.parametrize("bad", [b"\xff", b"\xe5\xa4", b"\xf0\x9f\x91x", b"\xed\xa0\x80"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path, bad, offset, compression):
    path = tmp_path / f"latin.txt{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"a" * offset + bad + b"b" * 10))
    with pytest.raises(DataError, match=rf"latin\.txt\S* is not UTF-8 at byte {offset} "):
        read(path)
    text = read(path, errors="replace")[0]
    assert text.startswith("a" * offset + "\ufffd")
    assert text.endswith("b" * 10)


def test_a_character_that_the_file_ends_within(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes(b"a" * PIECE_CHARACTERS + "天".encode()[:2])
    with pytest.raises(DataError, match=f"not UTF-8 at byte {PIECE_CHARACTERS} "):
        read(path)


@pytest.mark.parametrize("lead", range(4))
def test_characters_across_a_chunk_border_are_whole(tmp_path, lead):
    text = "a" * (PIECE_CHARACTERS - lead) + "👩é天" * 3
    (tmp_path / "border.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "border.txt") == [text]


def test_bytes_that_are_not_utf8_in_a_json_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"records\.jsonl is not UTF-8 at byte 27, line 2"):
        read(path)
    assert read(path, errors="replace") == ["fine", "\ufffd"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2 is not JSON"),
        ("[1]", r"line 2 must be a JSON object with the field 'text'; got '\[1\]"),
        ('{"test": "x", "id": 1}', "line 2 has no field 'text'; it has test, id. Did you mean 'test'?"),
        ('{"text": 3}', "line 2: the field 'text' must be text; got int"),
        ('{"text": null}', "line 2: the field 'text' must be text; got NoneType"),
        ('{"text": "half \\ud83d of a pair"}', r"line 2: .*U\+D83D"),
    ],
)
def test_bad_records(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(path)


def test_escaped_surrogate_pairs_are_one_character(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "\\ud83d\\udc4d"}\n', encoding="utf-8")
    assert read(path) == ["👍"]


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "records.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x", None], "number": [1, 2]}), path)
    with pytest.raises(DataError, match="has no field 'contents'; it has content, number. Did you mean 'content'?"):
        read(path, field="contents")
    with pytest.raises(DataError, match="row 1: the field 'number' must be text; got int"):
        read(path, field="number")
    with pytest.raises(DataError, match="row 2: the field 'content' must be text; got NoneType"):
        read(path, field="content")


@pytest.mark.parametrize("kind", [".txt.gz", ".jsonl.gz", ".parquet.gz", ".txt.zst", ".jsonl.zst", ".parquet.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not compressed"])
def test_damaged_compressed_files(tmp_path, texts, kind, damage):
    suffix, compression = kind.rsplit(".", 1)
    content = "".join(texts).encode() if suffix == ".txt" else records_bytes(suffix, texts, "text")
    checked = {**COMPRESSIONS, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    packed = bytearray(checked[f".{compression}"](content))
    if damage == "truncated":
        packed = packed[: len(packed) * 2 // 3]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0x55
    else:
        packed = content
    path = tmp_path / f"damaged{kind}"
    path.write_bytes(packed)
    with pytest.raises(DataError, match=rf"damaged{kind}(.* cannot be read to its end|.* is not UTF-8|, line \d+ )"):
        read(path)


def test_a_truncated_parquet_file(tmp_path, texts):
    path = tmp_path / "cut.parquet"
    path.write_bytes(records_bytes(".parquet", texts, "text")[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read to its end"):
        read(path)


def test_corrupt_deflate_data_is_not_taken_for_text(tmp_path):
    """A block of a reserved type: zlib's own error, which is no OSError."""
    packed = bytearray(gzip.compress(b"text" * 1000))
    packed[10] |= 0b110
    with pytest.raises(zlib.error):
        gzip.decompress(packed)
    (tmp_path / "a.txt.gz").write_bytes(packed)
    with pytest.raises(DataError, match="cannot be read to its end"):
        read(tmp_path / "a.txt.gz")
