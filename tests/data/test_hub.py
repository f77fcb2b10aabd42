"""A data set on the Hub, read from the Hub's own cache: in order, of one revision, and on from where a killed run stopped."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from oomless.config import DataSource
from oomless.data.hub import HubRows
from oomless.data.read import Manner
from oomless.errors import DataError

pytest.importorskip("datasets")
COMMITS = {"main": "a" * 40, "old": "b" * 40}


def write_commit(hub, texts, revision, records):
    """Write a commit of a data set with two configs as the Hub's cache holds it."""
    folder = hub / "datasets--someone--library"
    snapshot = folder / "snapshots" / COMMITS[revision]
    for path, rows in records.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), snapshot / path, row_group_size=5)
    (snapshot / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  data_files:\n  - {split: train, path: plain/train-*}\n"
        "  - {split: test, path: plain/test-*}\n- config_name: talk\n  data_files:\n  - {split: only, path: talk/*}\n---\n"
    )
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(COMMITS[revision])


@pytest.fixture(scope="module")
def hub(tmp_path_factory, texts):
    """Return the folder of a Hub's cache with a data set of four shards."""
    home = tmp_path_factory.mktemp("home")
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    talk = [
        {"messages": [{"role": "user", "content": "What next?"}, {"role": "assistant", "content": text[:50]}]}
        for text in texts[:9]
    ]
    shards = {f"plain/train-{n:05}-of-00004.parquet": rows[10 * n : 10 * n + 10] for n in range(4)}
    write_commit(
        home / "hub",
        texts,
        "main",
        {**shards, "plain/test-00000-of-00001.parquet": rows[40:], "talk/all.parquet": talk},
    )
    write_commit(home / "hub", texts, "old", {"plain/train-0.parquet": rows[5:8], "plain/test-0.parquet": rows[:1]})
    return home


READ = """
import json, os, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from oomless.config import TrainConfig
from oomless.data import build
from oomless.data.prepare import prepare

settings, tokenizer, part, pause = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
build.PART_CHARACTERS = part
seen = []

def progress(done, total):
    seen.append(done)
    if pause:
        print("row", len(seen), flush=True)
        time.sleep(pause)

tokenizer = AutoTokenizer.from_pretrained(tokenizer)
try:
    store = prepare(TrainConfig(model="m", output_dir="o", eval_fraction=0.0, **settings), tokenizer, progress).train.sources[0].store
    texts = [tokenizer.decode(store.tokens[a : b - 1].tolist()) for a, b in store.spans.tolist()]
    result = {"texts": texts, "rows": len(seen), "line": store.describe(), "key": store.key, "chats": store.learnt is not None}
except Exception as error:
    result = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(result))
"""


@pytest.fixture
def reading(hub, tokenizer_folder, tmp_path):
    """Start a process that reads a data set, with the Hub's cache and without a network."""
    started = []

    def start(path, part=1 << 24, pause=0.0, cache="cache", **settings):
        entry = {"path": path, **{name: settings.pop(name) for name in ("split", "revision") if name in settings}}
        settings = {"data": [entry], "cache_dir": str(tmp_path / cache), **settings}
        environment = {
            **os.environ,
            "HF_HOME": str(hub),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", READ, json.dumps(settings), str(tokenizer_folder), str(part), str(pause)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def result(process):
    output, errors = process.communicate(timeout=120)
    assert output, errors
    return json.loads(output.splitlines()[-1])


def test_what_is_read(reading, texts):
    plain = result(reading("hf:someone/library:plain"))
    assert plain["texts"] == texts[:40]
    assert "read from the Hub's cache, as the Hub could not be asked: 1" in plain["line"]


@pytest.mark.slow
def test_splits_configs_and_revisions(reading, texts):
    test = result(reading("hf:someone/library:plain", split="test"))
    talk = result(reading("hf:someone/library:talk", chat_template="plain"))
    old = result(reading("hf:someone/library:plain", revision="old"))
    assert test["texts"] == texts[40:]
    assert talk["chats"]
    assert "read as messages: 9" in talk["line"]
    assert old["texts"] == texts[5:8]
    assert len({test["key"], talk["key"], old["key"]}) == 3


@pytest.mark.slow
def test_what_is_tokenised_is_kept(reading, texts):
    first, second = (result(reading("hf:someone/library:plain")) for _ in range(2))
    assert (first["rows"], second["rows"]) == (40, 0)
    assert first["texts"] == second["texts"] == texts[:40]


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", [None, "exact"])
def test_a_killed_run_goes_on_from_its_last_part(reading, texts, tmp_path, deduplicate):
    settings = {"deduplicate": deduplicate} if deduplicate else {}
    process = reading("hf:someone/library:plain", part=4000, pause=0.05, **settings)
    while process.poll() is None and process.stdout.readline() != "row 25\n":
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    (state,) = (tmp_path / "cache").glob(".*.unfinished/state.json")
    kept = json.loads(state.read_text())["source"]["row"]
    assert 0 < kept <= 25
    tokens = state.parent / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes() + b"torn")  # what was written behind the last part does not count
    resumed = result(reading("hf:someone/library:plain", part=4000, **settings))
    assert resumed["rows"] == 40 - kept
    straight = result(reading("hf:someone/library:plain", cache="other", **settings))
    assert resumed["texts"] == straight["texts"] == texts[:40]
    stores = [np.fromfile(tmp_path / name / straight["key"] / "tokens.bin", np.uint16) for name in ("cache", "other")]
    assert np.array_equal(*stores)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.slow
def test_two_processes_read_once(reading, texts):
    processes = [reading("hf:someone/library:plain", pause=0.01) for _ in range(2)]
    results = [result(process) for process in processes]
    assert [found["texts"] for found in results] == [texts[:40]] * 2
    assert sorted(found["rows"] for found in results) == [0, 40]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        (
            "hf:someone/nothing",
            {},
            "DataError: hf:someone/nothing needs the Hub, which cannot be reached, and there is no copy",
        ),
        (
            "hf:someone/library:plain",
            {"split": "tset"},
            "has the splits train, test, and no 'tset'. Did you mean 'test'?",
        ),
        ("hf:someone/library:none", {}, "DataError: hf:someone/library:none cannot be read: .*none"),
        ("hf:someone/library", {}, "DataError: hf:someone/library cannot be read: Config name is missing"),
        (
            "hf:someone/library:plain",
            {"text_field": "txet"},
            "has no field 'txet'; it has id, text. Did you mean 'text'?",
        ),
        ("hf:someone/library:plain", {"revision": "gone"}, "needs the Hub, which cannot be reached"),
    ],
)
def test_what_cannot_be_had(reading, path, settings, message):
    import re

    assert re.search(message, result(reading(path, **settings))["error"], re.DOTALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "hf:"}, "a name on the Hub is hf:owner/name or hf:owner/name:config; got 'hf:'"),
        ({"path": "hf:a/b/c"}, "a name on the Hub is hf:owner/name"),
        ({"path": "hf:a/b", "exclude": "*.txt"}, "exclude has no effect on hf:a/b"),
        ({"path": "hf:a/b", "encoding": "utf-16"}, "encoding has no effect on hf:a/b"),
    ],
)
def test_bad_names(settings, message):
    with pytest.raises(DataError, match=message):
        HubRows(DataSource(**settings), Manner())
