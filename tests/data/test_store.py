"""Text is tokenised once; what lies in the cache is whole, verified or refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oomless.config import DataSource
from oomless.data import prepare
from oomless.data import store as store_module
from oomless.data.encode import Encoder
from oomless.data.read import PIECE_CHARACTERS, Manner
from oomless.data.store import open_store
from oomless.errors import DataError

BENCH = Path(__file__).parents[2] / "bench"


def opened(path, encoder, cache_dir, **settings):
    """Return the store, and whether it was tokenised for it."""
    tokenised = []
    source = DataSource(path=str(path), name=settings.pop("name", None))
    manner = Manner(**settings)
    store = open_store(source, encoder, cache_dir, manner=manner, progress=lambda *where: tokenised.append(where))
    return store, bool(tokenised)


def documents(store, encoder):
    return [
        encoder.tokenizer.decode(store.tokens[begin : end - 1].tolist(), skip_special_tokens=False)
        for begin, end in zip(store.starts[:-1], store.starts[1:], strict=True)
    ]


def test_what_is_stored_is_the_text(corpus, texts, encoder, tmp_path):
    store, tokenised = opened(corpus, encoder, tmp_path)
    assert tokenised
    assert store.documents == len(texts)
    assert documents(store, encoder) == texts
    assert (store.tokens[store.starts[1:] - 1] == encoder.eos).all()
    assert store.text_bytes == corpus.stat().st_size
    assert store.describe().startswith(f"library.jsonl: 60 documents, {len(store.tokens):,} tokens, ")


def test_a_folder_of_every_format(tmp_path, texts, encoder):
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts[:5]):
        (tmp_path / "text" / f"{number}.py").write_bytes(text.encode())
    (tmp_path / "text" / "9.jsonl").write_text(json.dumps({"text": texts[5]}))
    (tmp_path / "text" / "picture.png").touch()
    store, _ = opened(tmp_path / "text", encoder, tmp_path / "cache")
    assert documents(store, encoder) == texts[:6]
    assert store.describe().endswith("; passed over: 1 .png")


def test_progress_goes_from_nothing_to_all_bytes(corpus, encoder, tmp_path):
    seen = []
    open_store(DataSource(path=str(corpus)), encoder, tmp_path, progress=lambda *where: seen.append(where))
    assert seen == sorted(seen)
    assert seen[-1] == (corpus.stat().st_size,) * 2


def test_the_second_time_nothing_is_tokenised(corpus, encoder, tmp_path):
    first, tokenised = opened(corpus, encoder, tmp_path)
    again, tokenised_again = opened(corpus, encoder, tmp_path)
    assert (tokenised, tokenised_again) == (True, False)
    assert first.key == again.key
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.starts, again.starts)


def test_what_is_held_out_rests_on_tokens_and_not_on_the_code_that_made_them(corpus, encoder, tmp_path, monkeypatch):
    """Else another version would evaluate a run on text that it learnt, and not resume it."""

    def split():
        store = opened(corpus, encoder, tmp_path / "cache")[0]
        return store.key, [spans.tolist() for spans in prepare._split(store, 0.1, 0, "documents")], store.contents

    key, parts, contents = split()
    made = store_module._key
    monkeypatch.setattr(store_module, "_key", lambda *facts: made(*facts)[::-1])
    other_key, other_parts, other_contents = split()
    assert key != other_key
    assert (parts, contents) == (other_parts, other_contents)


def test_the_key_follows_content_and_settings_but_not_place_and_time(corpus, encoders, encoder, tmp_path):
    def key(path, used=encoder, **settings):
        return opened(path, used, tmp_path / "cache", **settings)[0].key

    copy = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(corpus, copy)
    original = key(corpus)
    assert key(copy, name="other") == original
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b"import", b"export", 1))
    os.utime(copy, ns=(corpus.stat().st_atime_ns, corpus.stat().st_mtime_ns))
    assert copy.stat().st_size == corpus.stat().st_size
    others = [key(copy), key(corpus, encoders["metaspace"]), key(corpus, errors="replace")]
    (tmp_path / "elsewhere.txt").write_bytes(content)
    others.append(key(tmp_path / "elsewhere.txt"))
    copy.write_bytes(content.replace(b'"text"', b'"body"'))
    others.append(key(copy, text_field="body"))
    assert len({original, *others}) == 6


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "header.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "emptied"])
def test_a_damaged_cache_is_refused(corpus, encoder, tmp_path, name, damage):
    store, _ = opened(corpus, encoder, tmp_path)
    path = tmp_path / store.key / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0x10
    elif damage == "truncated":
        del content[-2:]
    path.unlink() if damage == "missing" else path.write_bytes(b"" if damage == "emptied" else content)
    with pytest.raises(DataError, match=f"cache .*{store.key} is damaged.*remove that folder"):
        opened(corpus, encoder, tmp_path)
    shutil.rmtree(tmp_path / store.key)
    assert opened(corpus, encoder, tmp_path)[1]


@pytest.mark.parametrize(("extra", "dtype"), [(0, np.uint16), (65536 - 512, np.uint16), (65537 - 512, np.uint32)])
def test_ids_take_16_bits_where_the_vocabulary_allows(tokenizer_folder, tmp_path, extra, dtype):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(extra)])
    last = f"<extra{extra - 1}>" if extra else "a"
    (tmp_path / "a.txt").write_text(f"text{last}")
    encoder = Encoder(tokenizer)
    store, _ = opened(tmp_path / "a.txt", encoder, tmp_path / "cache")
    assert store.tokens.dtype == dtype
    assert documents(store, encoder) == [f"text{last}"]
    if extra:
        assert store.tokens[-2] == 511 + extra


def test_no_text(tmp_path, encoder):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        opened(tmp_path / "a.jsonl", encoder, tmp_path / "cache")


@pytest.mark.parametrize("blocked", ["cache", "cache/deeper"])
def test_a_cache_that_cannot_be_written(corpus, encoder, tmp_path, blocked):
    (tmp_path / "cache").write_text("a file in the folder's place")
    with pytest.raises(DataError, match="could not be written.*set cache_dir"):
        opened(corpus, encoder, tmp_path / blocked)


def test_an_error_while_reading_leaves_nothing(tmp_path, encoder):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 100_000 + "broken")
    with pytest.raises(DataError, match="line 100001 is not JSON"):
        opened(tmp_path / "a.jsonl", encoder, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_that_changes_while_it_is_read(tmp_path, encoder):
    path = tmp_path / "a.txt"
    path.write_text("before " * 1000)
    with pytest.raises(DataError, match="changed while they were read"):
        open_store(
            DataSource(path=str(path)), encoder, tmp_path / "cache", progress=lambda *_: path.write_text("after")
        )
    assert documents(opened(path, encoder, tmp_path / "cache")[0], encoder) == ["after"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_was_abandoned_is_removed_after_a_day(corpus, encoder, tmp_path):
    """Only when nothing in it was written for a day: another run may be at work in it."""
    for name, hours in (("old", 25), ("working", 1)):
        (tmp_path / f".{name}.unfinished").mkdir()
        written = tmp_path / f".{name}.unfinished" / "tokens.bin"
        written.write_bytes(b"some")
        for path, age in ((written, hours), (written.parent, 25)):
            os.utime(path, (time.time() - age * 3600,) * 2)
    store, _ = opened(corpus, encoder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {store.key, ".working.unfinished"}


def test_beyond_its_bound_the_folder_loses_what_was_not_used_for_longest(corpus, texts, encoder, tmp_path, monkeypatch):
    def open_number(number):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"{number} " + texts[0] * 20)
        return opened(path, encoder, tmp_path / "cache")

    def age(store, hours):
        os.utime(tmp_path / "cache" / store.key, (time.time() - hours * 3600,) * 2)

    first, second = (open_number(number)[0] for number in range(2))
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "cache" / first.key).iterdir())
    monkeypatch.setattr(store_module, "MOST_BYTES", int(2.5 * size_bytes))
    age(first, 3), age(second, 2)
    assert not open_number(0)[1]  # used again, so the second is now the oldest
    before = second.tokens[:].tolist()
    third, _ = open_number(2)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {first.key, third.key}
    second.check_unchanged()
    assert second.tokens[:].tolist() == before  # whoever uses it still may
    monkeypatch.setattr(store_module, "MOST_BYTES", 10)
    fourth, _ = open_number(3)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [fourth.key]
    assert open_number(1)[1]


def test_a_store_that_is_removed_just_before_it_is_opened_is_made_again(corpus, texts, encoder, tmp_path, monkeypatch):
    opened(corpus, encoder, tmp_path)
    really, removed = store_module._open, []

    def removing(folder, *rest):
        if not removed:
            removed.append(shutil.rmtree(folder))
        return really(folder, *rest)

    monkeypatch.setattr(store_module, "_open", removing)
    store, tokenised = opened(corpus, encoder, tmp_path)
    assert tokenised
    assert documents(store, encoder) == texts


def test_other_versions_and_other_code_have_other_keys(corpus, encoder, tmp_path, monkeypatch):
    keys = {opened(corpus, encoder, tmp_path)[0].key}
    for library in ("tokenizers", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{library}.__version__", "0")
            keys.add(opened(corpus, encoder, tmp_path)[0].key)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_code", lambda: "other")
        keys.add(opened(corpus, encoder, tmp_path)[0].key)
    assert len(keys) == 4


# Duplicates


def lines(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def test_the_same_documents_are_left_out_and_counted(texts, encoder, tmp_path):
    long = "".join(texts) * 30
    path = lines(tmp_path / "a.jsonl", [texts[0], long, texts[1], texts[0], "", long, texts[2], "", texts[1] + " "])
    assert len(long) > 2 * PIECE_CHARACTERS  # written in pieces
    store, _ = opened(path, encoder, tmp_path / "cache", deduplicate="exact")
    assert documents(store, encoder) == [texts[0], long, texts[1], "", texts[2], texts[1] + " "]
    assert store.notes == {"duplicates left out": 3}
    whole, _ = opened(path, encoder, tmp_path / "cache")
    assert whole.documents == 9


def test_documents_that_are_nearly_the_same_are_left_out(texts, encoder, tmp_path):
    """A word changed in a long text, or a line added, makes it no new one; another text does, and so does half of it."""
    first, second = texts[50], texts[51]
    changed = first.replace(first.split()[20], "other", 1)
    path = lines(
        tmp_path / "a.jsonl", [first, second, changed, first + "\nend", first[: len(first) // 2], texts[52], second]
    )
    store, _ = opened(path, encoder, tmp_path / "cache", deduplicate="near")
    assert documents(store, encoder) == [first, second, first[: len(first) // 2], texts[52]]
    assert store.notes == {"duplicates left out": 3}


def test_real_documents_are_not_taken_for_each_other(corpus, texts, encoder, tmp_path):
    """Against Jaccard similarity counted in full: nothing far below 0.8 is left out, nothing far above it is kept."""
    store, _ = opened(corpus, encoder, tmp_path, deduplicate="near")
    kept = documents(store, encoder)
    runs = [set(zip(*(encoder.tokenizer.encode(text).ids[n:] for n in range(5)), strict=False)) for text in texts]

    def nearest_before(number):
        return max(
            (len(runs[number] & other) / max(1, len(runs[number] | other)) for other in runs[:number]), default=0
        )

    for number, text in enumerate(texts):
        similarity = nearest_before(number)
        if similarity < 0.6:
            assert text in kept
        elif similarity > 0.95:
            assert text not in kept


BUILD = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from oomless.config import DataSource
from oomless.data.encode import Encoder
from oomless.data.read import PIECE_CHARACTERS, Manner
from oomless.data.store import open_store

tokenizer, path, cache_dir = sys.argv[1:]

def wait(*_):
    print("building", flush=True)
    sys.stdin.readline()

open_store(DataSource(path=path), Encoder(AutoTokenizer.from_pretrained(tokenizer)), Path(cache_dir), progress=wait)
"""


@pytest.fixture
def building(tokenizer_folder, tmp_path):
    """Start processes that have each begun to build the same store and wait."""
    started = []

    def start(path, count):
        command = [sys.executable, "-c", BUILD, str(tokenizer_folder), str(path), str(tmp_path / "cache")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for _ in range(count):
            started.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            )
        for process in started:
            assert process.stdout.readline() == "building\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_that_build_at_once(building, corpus, texts, encoder, tmp_path):
    processes = building(corpus, 2)
    assert len(list((tmp_path / "cache").glob(".*.unfinished"))) == 2
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0]
    store, tokenised = opened(corpus, encoder, tmp_path / "cache")
    assert not tokenised
    assert documents(store, encoder) == texts
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [store.key]


def test_a_process_killed_while_it_builds_breaks_nothing(building, corpus, texts, encoder, tmp_path):
    (process,) = building(corpus, 1)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert list((tmp_path / "cache").glob(".*.unfinished"))
    store, tokenised = opened(corpus, encoder, tmp_path / "cache")
    assert tokenised
    assert documents(store, encoder) == texts
    assert not opened(corpus, encoder, tmp_path / "cache")[1]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("records", marks=pytest.mark.full_length),
        pytest.param("one file", marks=pytest.mark.slow),
        pytest.param("parquet", marks=pytest.mark.full_length),
    ],
)
def test_memory_stays_bounded(tmp_path, kind):
    """As bench/data_memory.py, on 120 MB."""
    subprocess.run(
        [sys.executable, str(BENCH / "data_memory.py"), "--kinds", kind, "--megabytes", "120", "--dry"],
        check=True,
        timeout=900,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
