"""Every cell of the notebook, in order, with a tiny model inside a virtual GPU in place of Llama on a T4."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "colab_t4.ipynb"


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
            assert source == "%pip install --quiet oomless"
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
