"""Every cell of the notebook, in order, with a tiny model inside a virtual GPU in place of Llama on a T4."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
NOTEBOOK = PROJECT / "examples" / "colab_t4.ipynb"


def test_every_cell_runs(make_checkpoint, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    settings = {
        "MODEL": str(make_checkpoint("llama", tied=True)),
        "TEXT": str(corpus),
        "RUN": str(tmp_path / "run"),
        "GPU": "virtual:32MiB",
        "MAX_SEQ_LENGTH": 64,
        "MAX_STEPS": 8,
    }
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if "install" in tags:
            folder = re.fullmatch(r'OOMLESS = "(.+)"\n%pip install --quiet \{OOMLESS\}', source)[1]
            assert (NOTEBOOK.parent / folder).resolve() == PROJECT
        elif "settings" in tags:
            exec(compile(source, "settings", "exec"), names)
            assert names.keys() >= settings.keys()
            names |= settings
        else:
            exec(compile(source, cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert "gone" in said
    assert "resumed from checkpoint-4" in said
    assert names["choice"].picked.quality.trainable == "full"
    assert names["result"].steps == 8
    assert names["sample"]


@pytest.mark.slow
def test_what_it_installs_can_be_installed(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, PROJECT]
    subprocess.run(install, check=True)
    installed = subprocess.run(
        [sys.executable, "-c", "import oomless; print(oomless.__file__)"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert installed.stdout.startswith(str(tmp_path))
    assert (tmp_path / "bin" / "oomless").is_file()
