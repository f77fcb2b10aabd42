"""``oomless explain``: what people bring, answered; what cannot be read, one error; a run's own end, explained."""

import json
import pickle
import re
import subprocess
import sys

import pytest

from tests.cli.test_cli import oomless, plain

MESSAGE = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a total capacity of 14.74 GiB of "
    "which 240.12 MiB is free. Process 2345 has 14.50 GiB memory in use. Of the allocated memory 13.90 GiB is allocated by "
    "PyTorch, and 455.00 MiB is reserved by PyTorch but unallocated."
)


def words(result):
    return " ".join(plain(result.stdout).split())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "google/gemma-7b"])
def test_the_seed_cases_with_nothing_else_known(model):
    arguments = ("--model", model, "--gpu", "T4", "--per-device-train-batch-size", "1", "--budget", "600")
    result = oomless("explain", *arguments)
    assert result.returncode == 0, result.stderr
    text = words(result)
    for part in ("No batch size and no sequence length can help", "1. fits:", "dtype=torch.float16"):
        assert part in text, part
    assert "smaller batch" not in text


@pytest.mark.slow
def test_the_seed_case_with_its_message(tmp_path):
    page = tmp_path / "page.html"
    arguments = ("--model", "meta-llama/Llama-3.2-1B", "--gpu", "T4", "--html", page)
    result = oomless("explain", "--message", MESSAGE, *arguments)
    assert result.returncode == 0, result.stderr
    assert "logits" in words(result)
    assert "128,256 x 4 B = 1,050,673,152 bytes" in words(result)
    assert "max_seq_length 2048 (from the message)" in words(result)
    assert "logits" in page.read_text()


def test_a_message_alone_as_json():
    result = oomless("explain", "--message", MESSAGE, "--json")
    assert result.returncode == 0, result.stderr
    assert "1002.00 MiB" in json.dumps(json.loads(result.stdout))


def test_the_reading_is_printed_before_anything_heavy_is_imported():
    """In a real process whose imports and words go into one pipe: however slow the machine, the words come first."""
    arguments = ("--message", MESSAGE, "--model", "meta-llama/Llama-3.2-1B", "--max-seq-length", "2048")
    command = [sys.executable, "-X", "importtime", "-m", "oomless", "explain", *arguments]
    before = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            imported = re.match(r"import time: +\d+ \| +\d+ \| +(\w+)", line)
            if imported and imported[1] in ("torch", "transformers", "numpy"):
                break
            before.append(line)
        else:
            pytest.fail("nothing was rehearsed")
        process.kill()
    text = "".join(line for line in before if not line.startswith("import time:"))
    for part in ("asked for", "logits in fp32", "240.12 MiB"):
        assert part in text
    assert len(before) < 900, "the reading takes too many modules"


class Hostile:
    """Would write a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_what_cannot_be_read_is_one_error(tmp_path):
    snapshot, marker = tmp_path / "hostile.pickle", tmp_path / "it-ran"
    snapshot.write_bytes(pickle.dumps(Hostile(marker)))
    for arguments in (["--snapshot", snapshot], [tmp_path / "missing.log"], ["--message", MESSAGE, "--budget", "-1"]):
        result = oomless("explain", *arguments)
        assert result.returncode == 2, (arguments, result.stdout)
        assert result.stderr.count("error:") == 1
        assert "Traceback" not in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--tool", "trainr"), "--tool trainr: taken as trainer"),
        (("--gpu", "T5"), "'T5'"),
        (("--model", "somebody/Strange-3B"), "somebody/Strange-3B"),
        (("--max-seq-length", "long"), "max_seq_length long is left out"),
        (("--attention", "fast"), "--attention fast is left out"),
    ],
)
def test_what_cannot_be_used_is_a_line_and_not_an_end(arguments, line):
    result = oomless("explain", "--message", MESSAGE, "--budget", "0", *arguments)
    assert result.returncode == 0, result.stderr
    assert line in words(result)
    assert "What to try" in words(result)


def test_a_text_without_an_error_is_answered(tmp_path):
    (tmp_path / "calm.log").write_text("step 1: loss 2.0\n")
    result = oomless("explain", tmp_path / "calm.log")
    assert result.returncode == 0, result.stderr
    assert "No out-of-memory error is in the text" in words(result)


def test_a_training_that_runs_out_is_explained(make_checkpoint, corpus, tmp_path):
    arguments = ("--model", make_checkpoint("llama"), "--data", corpus, "--output-dir", tmp_path / "run")
    result = oomless(
        "train", *arguments, "--gpu", "virtual:3MiB", "--max-seq-length", "512", "--max-steps", "2", "--as-given"
    )
    assert result.returncode == 1
    assert "What asked for" in plain(result.stdout + result.stderr)
    assert "Traceback" not in result.stderr
