"""Every format gives the text that went in, to the character; what cannot be read says where."""

import csv
import gzip
import html
import io
import json
import sys
import zlib
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from tests.data.conftest import SCRIPTS

from oomless.config import DataSource
from oomless.data import markup, records
from oomless.data.files import TextFile, find_files
from oomless.data.read import PIECE_CHARACTERS, Manner, read_documents
from oomless.errors import ConfigError, DataError

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


def read(path, *, field="text", errors="strict", encoding="utf-8", progress=None, notes=None, **settings):
    manner = Manner(text_field=field, errors=errors, encoding=encoding)
    tell = progress.append if progress is not None else lambda _: None
    files = find_files(DataSource(path=str(path), **settings)).files
    texts = ["".join(pieces) for file in files for pieces in read_documents(file, manner, tell)]
    if notes is not None:
        notes.update(manner.notes)
    return texts


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
    found = find_files(DataSource(path=str(folder)))
    names = [str(file.path.relative_to(folder)) for file in found.files]
    assert names == ["a.txt", "b.md", "deep/d.jsonl", "deep/er/c.py"]
    assert found.passed_over == {".png": 2, "no suffix": 1, ".tar": 1, "hidden": 2}


def test_globs(folder):
    def found(pattern):
        return [file.path.name for file in find_files(DataSource(path=str(folder / pattern))).files]

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
    with pytest.raises(DataError, match=r"records\.jsonl is not UTF-8 at byte 27 \(line 2, "):
        read(path)
    assert read(path, errors="replace") == ["fine", "\ufffd"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2 is not JSON"),
        ("[1]", r"line 2 must be a JSON object with a field that holds its text; got '\[1\]"),
        ('{"test": "x", "id": 1}', "line 2 has no field 'text'; it has test, id. Did you mean 'test'?"),
        ('{"text": 3}', "line 2: the field 'text' must be text; got int"),
        ('{"text": null}', "line 2: the field 'text' must be text; got NoneType"),
        ('{"text": ["a", "b"]}', "line 2: the field 'text' must be text; got list"),
        ('{"text": {"en": "a"}}', "line 2: the field 'text' must be text; got dict"),
        ('{"text": true}', "line 2: the field 'text' must be text; got bool"),
        ('{"text": "half \\ud83d of a pair"}', r"line 2: .*U\+D83D"),
    ],
)
def test_bad_records(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("column", "got"),
    [
        ([["a", "b"]], "list"),
        ([{"en": "a"}], "dict"),
        ([b"\xff\xfe"], "bytes"),
        ([1.5], "float"),
        ([[]], "list"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_that_is_no_text(tmp_path, column, got, suffix):
    path, table = tmp_path / f"records{suffix}", pyarrow.table({"text": column})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    with pytest.raises(DataError, match=f"row 1: the field 'text' must be text; got {got}"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_of_50_megabytes_is_a_document_like_any_other(tmp_path, suffix):
    path, row = tmp_path / f"records{suffix}", "a line of it\n" * 4_000_000
    assert len(row) > 50_000_000
    path.write_bytes(records_bytes(suffix, [row, "short"], "text"))
    assert read(path) == [row, "short"]


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


# Other files of records


def table_bytes(rows, delimiter=","):
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter).writerows(rows)
    return sink.getvalue().encode()


def arrow_bytes(texts, *, stream, rows=7):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue().to_pybytes()


def json_list(texts, **style):
    return json.dumps([{"id": number, "text": text} for number, text in enumerate(texts)], **style).encode()


RECORD_FILES = {
    "list.json": lambda texts: json_list(texts),
    "indented.json": lambda texts: b"\xef\xbb\xbf\n" + json_list(texts, indent=4, ensure_ascii=False),
    "lines.json": lambda texts: b"\n".join(json.dumps({"text": text}).encode() for text in texts),
    "one after the other.json": lambda texts: "".join(json.dumps({"text": t}, indent=1) for t in texts).encode(),
    "comma.csv": lambda texts: table_bytes([["id", "text"], *([n, text] for n, text in enumerate(texts))]),
    "semicolon.csv": lambda texts: table_bytes([["id", "text"], *([n, text] for n, text in enumerate(texts))], ";"),
    "excel.csv": lambda texts: b"\xef\xbb\xbf" + table_bytes([["text"], *([text] for text in texts)]),
    "tabs.tsv": lambda texts: table_bytes([["id", "text"], *([n, text] for n, text in enumerate(texts))], "\t"),
    "stream.arrow": lambda texts: arrow_bytes(texts, stream=True),
    "file.arrow": lambda texts: arrow_bytes(texts, stream=False),
    "one batch.arrow": lambda texts: arrow_bytes(texts, stream=True, rows=10_000),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", RECORD_FILES)
def test_every_file_of_records_gives_its_texts(tmp_path, texts, name, compression):
    documents = [*texts, *SCRIPTS.values(), "x" * (2 * PIECE_CHARACTERS + 3), "a,b;c\td \"quoted\" '}]{'"] * 3
    if name.endswith(("csv", "tsv")):
        documents = [text for text in documents if "\r" not in text.replace("\r\n", "")]
    (tmp_path / f"{name}{compression}").write_bytes(COMPRESSIONS[compression](RECORD_FILES[name](documents)))
    notes = Counter()
    assert read(tmp_path, notes=notes) == documents
    assert not notes


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_a_list_that_is_cut_anywhere_is_read_the_same(piece):
    values = [
        {"text": 'a "quoted" \\ \u00e9 \U0001f44d'},
        {"text": "", "n": [1, -2.5e-3, {"x": None}]},
        {"text": "true"},
    ]
    content = json.dumps(values, indent=2) + "\n"
    pieces = [content[at : at + piece] for at in range(0, len(content), piece)]
    file = TextFile(path=Path("cut.json"), kind="json", compression="", size_bytes=0)
    assert [record for _, record in records._values(file, pieces, is_list=True)] == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', "record 2 is not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "record 1 is not JSON: expected , or ]; got"),
        ('[{"text": "a"}, 3]', "record 2 must be a JSON object .*; got '3"),
        ('[{"text": "a"},]', "record 2 is not JSON"),
        ('[{"text": "a"}]x', "goes on behind the end of its list"),
        ('[{"text": "a"}', "record 1 is not JSON: expected"),
        ('[{"test": "a"}]', "record 1 has no field 'text'; it has test. Did you mean 'test'?.*exclude"),
        ('{"text": "a"}\n{"text": b}', "record 2 is not JSON"),
        ("[" + '{"a":' * 100_000, "record 1 is not JSON"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"name": "x"}', '{"a": [{"text": "b"}]}', "[1, 2]", "[]", '"text"', "not JSON", "", "[[{}]]"]
)
def test_other_json_is_plain_text_and_this_is_said(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    notes = Counter()
    assert read(tmp_path, notes=notes) == [content]
    assert notes == {".json read as plain text, not records": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n2\n", "line 3 has 1 fields, and the first row names 2"),
        ("id,text\n1,a,b\n", "line 2 has 3 fields"),
        ('id,text\n1,"open\n2,b\n', "line 2 is not a row of a table: unexpected end of data"),
        ('id,text\n1,"a"b\n', "line 2 is not a row of a table"),
        ("id,body\n1,a\n", "line 2 has no field 'text'; it has id, body"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_the_limit_of_a_table_s_fields_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * (before + 1))
    assert read(tmp_path) == ["x" * (before + 1)]
    assert csv.field_size_limit() == before


# Folders that datasets saved, links, and what is excluded


@pytest.fixture
def saved(tmp_path, texts):
    """Return a function that saves rows with the library itself."""
    datasets = pytest.importorskip("datasets")

    def save(name, count=len(texts), shards=None):
        rows = datasets.Dataset.from_dict({"id": list(range(count)), "text": texts[:count]})
        rows.save_to_disk(tmp_path / name, num_shards=shards)
        return rows

    return save


def test_a_folder_that_datasets_saved(tmp_path, texts, saved):
    saved("set", shards=3)
    (tmp_path / "set" / "cache-0123456789abcdef.arrow").write_bytes(arrow_bytes(["never"], stream=True))
    assert read(tmp_path / "set") == texts
    assert read(tmp_path) == texts


def test_splits_that_datasets_saved(tmp_path, texts, saved):
    import datasets

    rows = saved("set")
    datasets.DatasetDict(train=rows.select(range(40)), test=rows.select(range(40, 60))).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(other=rows).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "both") == texts[:40]
    assert read(tmp_path / "both", split="test") == texts[40:]
    assert read(tmp_path / "one") == texts
    assert find_files(DataSource(path=str(tmp_path / "both"))).passed_over == {"split 'test'": 1}
    with pytest.raises(DataError, match="has the splits train, test, and no 'tset'. Did you mean 'test'?"):
        read(tmp_path / "both", split="tset")
    with pytest.raises(DataError, match="split has no effect in .*set"):
        read(tmp_path / "set", split="train")


def test_links_are_followed_and_what_is_reached_twice_is_read_once(tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "a.txt").write_text("linked")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("own")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "away")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "twice.txt").symlink_to(tmp_path / "data" / "b.txt")
    (tmp_path / "data" / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_files(DataSource(path=str(tmp_path / "data")))
    assert [file.path.name for file in found.files] == ["b.txt", "a.txt"]
    assert found.passed_over == {"linked twice": 1, "broken link": 1}


def test_what_is_excluded(folder):
    def found(pattern, path=folder):
        result = find_files(DataSource(path=str(path), exclude=pattern))
        return [file.path.name for file in result.files], result.passed_over["excluded"]

    assert found("*.md") == (["a.txt", "d.jsonl", "c.py"], 1)
    assert found("deep") == (["a.txt", "b.md"], 1)
    assert found("deep/er/*, b.*") == (["a.txt", "d.jsonl"], 2)
    assert found("a.*", folder / "*.*")[0] == ["b.md"]
    with pytest.raises(DataError, match=r"exclude has no effect in .*: nothing there matches \*\.tex"):
        found("*.md,*.tex")
    with pytest.raises(DataError, match=r"exclude \(\*\) leaves no file of a known kind in .*: correct or remove it"):
        found("*")


# Encodings


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "gb18030"])
def test_text_in_other_encodings(tmp_path, texts, encoding):
    text = "".join(texts) * 4 + SCRIPTS["emoji"]
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.jsonl").write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(encoding))
    assert read(tmp_path, encoding=encoding) == [text, *texts]


def test_an_encoding_that_is_likely_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("some text".encode("utf-16"))
    with pytest.raises(
        DataError, match=r"is not UTF-8 at byte 0 \(line 1.* it begins as utf-16 does: set encoding: utf-16"
    ):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes("line\ncaf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"byte 8 \(line 2.*set encoding to the one it has, such as windows-1252"):
        read(tmp_path)
    assert read(tmp_path, encoding="windows-1252") == ["line\ncaf\xe9"]


def test_an_empty_encoding():
    with pytest.raises(ConfigError, match="encoding of a source of text is empty"):
        DataSource(path="a", encoding="")


@pytest.mark.parametrize("encoding", ["utf-99", "base64", "hex"])
def test_no_such_encoding(encoding):
    with pytest.raises(ConfigError, match="encoding must be the name of a text encoding"):
        DataSource(path="a", encoding=encoding)


# The text of pages and notebooks


PAGE = """<!DOCTYPE html><html><head><title>A  title</title><style>p { color: red }</style>
<script>if (a < b) { document.write("<p>never</p>") }</script></head>
<body><h1>Head&amp;line</h1><p>One
   paragraph with <b>bold</b>, <i>it</i>alic&nbsp;and &eacute;&#x1F44D;.</p>
<ul><li>first<li>second</ul><pre>  kept
    as it is</pre>line<br>break<br><br>gap
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table><!-- a comment --><template>no</template></body></html>"""
PAGE_TEXT = """A title

Head&line

One paragraph with bold, italic\xa0and \xe9\U0001f44d.

first
second

  kept
    as it is

line
break

gap

a\tb
1\t2"""


def test_the_text_of_a_page(tmp_path):
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    assert read(tmp_path) == [PAGE_TEXT]


@pytest.mark.parametrize("piece", [1, 2, 5, 31])
def test_a_page_that_is_cut_anywhere_has_the_same_text(piece):
    pieces = iter([PAGE[at : at + piece] for at in range(0, len(PAGE), piece)])
    assert "".join(markup.html_pieces(pieces)) == PAGE_TEXT


def test_a_long_page_keeps_all_its_words(tmp_path, texts):
    words = " ".join(texts).split()
    body = "".join(f"<p>{html.escape(' '.join(words[at : at + 9]))}</p>" for at in range(0, len(words), 9)) * 9
    (tmp_path / "a.html").write_text(f"<html><body>{body}</body></html>", encoding="utf-8")
    assert len(body) > 2 * PIECE_CHARACTERS
    assert read(tmp_path)[0].split() == words * 9


def test_the_text_of_a_notebook(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"text": ["never"]}]},
        {"cell_type": "code", "source": [], "outputs": []},
        {"cell_type": "code", "source": "a\n```\nb", "outputs": []},
        {"cell_type": "raw", "source": "raw"},
    ]
    notebook = {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    old = {
        "worksheets": [
            {"cells": [{"cell_type": "heading", "level": 2, "source": "H"}, {"cell_type": "code", "input": "x"}]}
        ]
    }
    (tmp_path / "b.ipynb").write_text(json.dumps(old))
    expected = "# Title\nwords\n\n```python\nprint(1)\n```\n\n````python\na\n```\nb\n````\n\nraw"
    assert read(tmp_path) == [expected, "## H\n\n```\nx\n```"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cells": [{}]}', '{"cells": 3}'])
def test_no_notebook(tmp_path, content):
    (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(DataError, match=r"a\.ipynb is not (JSON|a notebook)"):
        read(tmp_path)


# PDF and Word documents


def pdf_bytes(pages):
    """Return a PDF with a line of text on each page."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
        described = "/MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R {described} /Contents {5 + 2 * number} 0 R >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
    made, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    ending = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(made))
    return made + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + ending


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_text_of_a_pdf(tmp_path, compression):
    pytest.importorskip("pypdf")
    (tmp_path / f"a.pdf{compression}").write_bytes(
        COMPRESSIONS[compression](pdf_bytes(["First page.", "Second page."]))
    )
    (tmp_path / "scan.pdf").write_bytes(pdf_bytes([""]))
    notes = Counter()
    assert read(tmp_path, notes=notes) == ["First page.\n\nSecond page.", ""]
    assert notes == {".pdf without text, such as scans": 1}


def test_the_text_of_a_word_document(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("A title")
    document.add_paragraph("Words \u5929 and words.")
    table = document.add_table(rows=2, cols=2)
    for number in range(4):
        table.cell(number // 2, number % 2).text = str(number)
    document.add_paragraph("")
    document.add_paragraph("The end.")
    document.save(tmp_path / "a.docx")
    assert read(tmp_path) == ["A title\n\nWords \u5929 and words.\n\n0\t1\n2\t3\n\nThe end."]


@pytest.mark.parametrize(("name", "kind"), [("a.pdf", "PDF"), ("a.docx", "a Word document")])
def test_damaged_documents(tmp_path, name, kind):
    pytest.importorskip("pypdf")
    pytest.importorskip("docx")
    (tmp_path / name).write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(DataError, match=rf"{name} cannot be read as {kind}"):
        read(tmp_path)


def test_documents_without_their_library(tmp_path, monkeypatch):
    for name in ("a.pdf", "b.docx", "c.txt"):
        (tmp_path / name).write_bytes(b"text")
    for module in ("pypdf", "docx"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("oomless.data.files.find_spec", lambda name: None)
    found = find_files(DataSource(path=str(tmp_path)))
    assert [file.path.name for file in found.files] == ["c.txt"]
    assert found.passed_over == {".pdf (needs the extra documents)": 1, ".docx (needs the extra documents)": 1}
    with pytest.raises(DataError, match=r"a\.pdf needs another library to be read: pip install 'oomless\[documents\]'"):
        read(tmp_path / "a.pdf")
