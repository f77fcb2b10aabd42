"""Text of what was trained is that of plain transformers on its export."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.errors import ConfigError, HardwareError
from oomless.export import generate
from oomless.export.generate import Sampling, Speaker
from oomless.export.plan import make_plan
from oomless.export.run import export
from oomless.export.source import find
from oomless.report.screen import visible

LORA = {"trainable": "lora", "lora_r": 4}
PROMPT = "def export(self, name):\n    return"
MODES = {
    "full, tied": ("llama", True, {"trainable": "full"}),
    "dora": ("qwen2", False, {**LORA, "use_dora": True}),
    "rows, nf4": ("llama", True, {"trainable": "embed_tokens+lm_head", "trainable_rows": "7", "quantization": "nf4"}),
    "untied head": ("llama", True, {"trainable": "lm_head", "tied_weights": "untied"}),
    "lora, int8": ("llama", False, {**LORA, "quantization": "int8"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_text_is_that_of_transformers(make_run, tmp_path, mode):
    architecture, tied, settings = MODES[mode]
    run = make_run(architecture, tied=tied, **settings)
    export(make_plan(run, "safetensors", output=tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert text
    for place in (run, tmp_path / "out"):
        speaker, pieces = Speaker(find(place)), []
        assert speaker.go_on(speaker.ids(PROMPT), Sampling(max_new_tokens=20), pieces.append) == text
        assert "".join(pieces) == text


def test_a_seed_repeats_what_is_drawn(make_run):
    speaker = Speaker(find(make_run("llama", **LORA)))
    ids = speaker.ids(PROMPT)
    first, same, other = (
        speaker.go_on(ids, Sampling(max_new_tokens=20, temperature=1.0, seed=seed), lambda piece: None)
        for seed in (1, 1, 2)
    )
    assert first == same != other


def test_what_cannot_be_is_said(make_run, monkeypatch):
    run = make_run("llama", **LORA)
    speaker = Speaker(find(run))
    with pytest.raises(ConfigError, match="shorten the prompt"):
        speaker.go_on(speaker.ids(PROMPT), Sampling(max_new_tokens=10**6), lambda piece: None)
    for wrong in ({"max_new_tokens": 0}, {"temperature": float("nan")}, {"top_p": 0.5}, {"top_p": 0.0}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)
    monkeypatch.setattr(generate, "available_host_bytes", lambda: 1000)
    with pytest.raises(HardwareError, match="memory"):
        Speaker(find(run))


def test_the_command_writes_text_alone_to_standard_output(make_run):
    run = make_run("llama", **LORA)
    speaker = Speaker(find(run))
    wanted = speaker.go_on(speaker.ids(PROMPT), Sampling(max_new_tokens=40), lambda piece: None)
    command = [sys.executable, "-m", "oomless", "generate", str(run), "--prompt", "-", "--max-new-tokens", "40"]
    plain, machine = (
        subprocess.run([*command, *more], input=PROMPT, capture_output=True, text=True, check=True)
        for more in ([], ["--json"])
    )
    assert json.loads(machine.stdout)["generated"] == [{"prompt": PROMPT, "text": wanted}]
    assert plain.stdout == visible(wanted) + "\n"
    assert "Traceback" not in plain.stderr
