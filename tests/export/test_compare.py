"""Base and trained model side by side: what a comparison says is what the run measured and what each model writes."""

import io
import json
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from oomless.errors import ConfigError, DataError, HardwareError
from oomless.export import compare, comparison
from oomless.export.compare import Pair
from oomless.export.generate import Sampling
from oomless.export.source import find_two
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.report.compare import print_comparison
from oomless.report.run import read_run, run_page
from oomless.report.screen import Screen
from oomless.units import KiB, MiB

LORA = {"trainable": "lora", "lora_r": 4}
HELD_OUT = {"eval_fraction": 0.05}
MODES = {
    "full": ("llama", False, {"trainable": "full"}),
    "lora": ("gemma2", True, LORA),
    "untied head": ("llama", True, {"trainable": "lm_head", "tied_weights": "untied"}),
    "rows": ("qwen2", False, {"trainable": "embed_tokens+lm_head", "trainable_rows": "7"}),
    "experts": ("mixtral", False, LORA),
}
PROMPT = "def export(self, name):\n    return"


def greedy(folder, ids, count):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]


@pytest.mark.parametrize("mode", MODES)
def test_it_is_what_the_run_measured_and_what_transformers_writes(make_run, mode):
    architecture, tied, settings = MODES[mode]
    run = make_run(architecture, tied=tied, **HELD_OUT, **settings)
    pair = Pair(run, [PROMPT], sampling=Sampling(max_new_tokens=12))
    found = pair.compare()
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    name = "library.jsonl"
    assert found.base.losses[name] == pytest.approx(evaluated[0][f"eval_loss/{name}"], abs=1e-5)
    assert found.trained.losses[name] == pytest.approx(evaluated[-1][f"eval_loss/{name}"], abs=1e-5)
    assert found.base.losses[name] != pytest.approx(found.trained.losses[name], abs=1e-4)
    assert found.base.tokens[name] == found.trained.tokens[name] > 0
    for side, folder in ((found.base, pair.begun.folder), (found.trained, run / "model")):
        wanted = pair.tokenizer.decode(greedy(folder, pair.ids[0], 12), skip_special_tokens=True)
        assert side.texts == [wanted]


def test_what_is_known_is_not_asked_again(make_run, monkeypatch):
    run = make_run("llama", **HELD_OUT, **LORA)
    first = Pair(run, [PROMPT]).compare()
    loaded = []

    class Watched(compare.Speaker):
        def __init__(self, merged, *more):
            loaded.append(merged.source.name)
            super().__init__(merged, *more)

    monkeypatch.setattr(compare, "Speaker", Watched)
    assert Pair(run, [PROMPT]).compare().to_dict() == first.to_dict() == comparison.read(run).to_dict()
    assert not loaded
    more = Pair(run, [PROMPT, "import os"]).compare()
    assert more.base.texts[0] == first.base.texts[0]
    assert loaded == [first.base.name, first.trained.name]
    adapter = run / "checkpoint-2" / "adapter_model.safetensors"
    adapter.touch()
    Pair(run, [PROMPT]).compare()
    assert loaded[2:] == [first.trained.name]


def test_the_page_of_a_run_shows_it(make_run):
    run = make_run("llama", **HELD_OUT, **LORA)
    found = Pair(run, ["<b>import os"]).compare()
    page = run_page(read_run(run))
    assert f"{found.trained.losses['library.jsonl']:.4f}" in page
    assert "&lt;b&gt;import os" in page
    whole = json.loads((run / "compare.json").read_text())
    for damage in ({"base": 3}, {"prompts": []}, {"trained": {**whole["trained"], "losses": {"x": "y"}}}):
        (run / "compare.json").write_text(json.dumps({**whole, **damage}))
        assert "Beside the model" not in run_page(read_run(run))


def test_one_model_at_a_time(make_run):
    """What is held at most is what was said before, of one of them, but for the masks and counters of transformers' own."""
    run = make_run("llama", **HELD_OUT, **LORA)
    room = Pair(run, [PROMPT], most_blocks=3).room()
    most = room.weights_bytes + max(room.text_bytes, room.blocks_bytes)
    device = VirtualGPU(64 * MiB)
    Pair(run, [PROMPT], most_blocks=3, device=device).compare()
    assert 0 <= device.usage().peak_allocated_bytes - most <= 16 * KiB < room.weights_bytes
    assert device.usage().allocated_bytes == 0
    small = Pair(run, [PROMPT], most_blocks=3, device=VirtualGPU(room.weights_bytes + room.blocks_bytes - 1)).room()
    with pytest.raises(HardwareError, match="--no-loss"):
        small.require()


def test_adapters_and_moved_bases(make_run, make_checkpoint, tmp_path):
    run = make_run("llama", **HELD_OUT, **LORA)
    found = Pair(run / "checkpoint-2", [PROMPT], held_out=False).compare()
    assert not found.base.losses
    assert found.trained.texts == Pair(run, [PROMPT]).compare().trained.texts
    whole = make_run("llama", **HELD_OUT, trainable="full")
    trained, begun = find_two(whole, None, str(make_checkpoint("llama", tied=True)))
    assert begun.folder == make_checkpoint("llama", tied=True)
    assert trained.kind == begun.kind == "model"


def test_what_cannot_be_compared(make_run, make_checkpoint, corpus, tmp_path):
    with pytest.raises(ConfigError, match="held out: give --prompt"):
        Pair(make_run("llama", **LORA))
    with pytest.raises(ConfigError, match="prompts alone are compared: give --prompt"):
        Pair(make_run("llama", **HELD_OUT, **LORA), held_out=False)
    with pytest.raises(ConfigError, match="what it was trained from"):
        Pair(make_checkpoint("llama"), [PROMPT])
    text = tmp_path / "library.jsonl"
    text.write_bytes(corpus.read_bytes())
    run = make_run("llama", data=str(text), **HELD_OUT, **LORA)
    text.write_text("".join(corpus.read_text().splitlines(keepends=True)[5:]))
    with pytest.raises(DataError, match="may have been learnt"):
        Pair(run)
    assert Pair(run, [PROMPT], held_out=False).compare().trained.texts


@pytest.mark.parametrize("width", [80, 50])
def test_a_screen(make_run, width):
    found = Pair(make_run("llama", **HELD_OUT, **LORA), [PROMPT, "\x1b[31m"]).compare()
    file = io.StringIO()
    print_comparison(Screen(file, width=width), found)
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert max(map(len, lines[3:])) <= width
    assert any("library.jsonl" in line for line in lines)
    assert any(line.startswith("base ") and "trained" in line for line in lines[6:]) == (width == 80)


def test_the_command(make_run):
    run = make_run("llama", **HELD_OUT, **LORA)
    command = [sys.executable, "-m", "oomless", "compare", str(run), "--prompt", "-", "--max-new-tokens", "8", "--json"]
    ended = subprocess.run(command, input=PROMPT, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == comparison.read(run).to_dict()
