"""Text of what was trained is that of plain transformers on its export."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.errors import ConfigError, HardwareError, ModelError
from oomless.export import room
from oomless.export.generate import Sampling, Speaker, ids_of
from oomless.export.hugging_face import tokenizer_of
from oomless.export.merged import Merged
from oomless.export.plan import make_plan
from oomless.export.room import Room
from oomless.export.run import export
from oomless.export.source import find
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.report.screen import visible
from oomless.units import KiB, MiB

LORA = {"trainable": "lora", "lora_r": 4}
PROMPT = "def export(self, name):\n    return"
MODES = {
    "full, tied": ("llama", True, {"trainable": "full"}),
    "dora": ("qwen2", False, {**LORA, "use_dora": True}),
    "rows, nf4": ("llama", True, {"trainable": "embed_tokens+lm_head", "trainable_rows": "7", "quantization": "nf4"}),
    "untied head": ("llama", True, {"trainable": "lm_head", "tied_weights": "untied"}),
    "lora, int8": ("llama", False, {**LORA, "quantization": "int8"}),
}


def speaker_of(place):
    merged = Merged(find(place))
    return Speaker(merged, tokenizer_of(merged.source))


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
        speaker, pieces = speaker_of(place), []
        assert speaker.go_on(ids, Sampling(max_new_tokens=20), pieces.append) == text
        assert "".join(pieces) == text


def test_a_seed_repeats_what_is_drawn(make_run):
    speaker = speaker_of(make_run("llama", **LORA))
    ids = ids_of(speaker.tokenizer, PROMPT)
    first, same, other = (
        speaker.go_on(ids, Sampling(max_new_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", LORA),
        ("gemma2", LORA),
        ("mixtral", LORA),
        ("mamba", {"trainable": "full", "packing": "concatenate"}),
        ("gpt2", LORA),
    ],
)
@pytest.mark.parametrize(("prompt", "new"), [(400, 100), (400, 1), (2, 300)])
def test_what_it_takes_is_said_before(make_run, architecture, settings, prompt, new):
    """But for the masks and counters of transformers' own, of a model on a virtual GPU that makes its text for real."""
    merged = Merged(find(make_run(architecture, **settings)))
    tokenizer = tokenizer_of(merged.source)
    ids, sampling = ids_of(tokenizer, "x = 1\n" * 200)[:, :prompt], Sampling(max_new_tokens=new)
    room = Room(merged, tokenizer, prompts=[ids], sampling=sampling)
    device = VirtualGPU(64 * MiB)
    with device.active():
        speaker = Speaker(merged, tokenizer, device)
        assert device.usage().allocated_bytes == room.weights_bytes
        device.reset_peak()
        speaker.model.generation_config.eos_token_id = None
        speaker.go_on(ids, sampling)
    beyond = device.usage().peak_allocated_bytes - room.weights_bytes
    assert 0 <= beyond - room.text_bytes <= 16 * KiB


def test_what_does_not_fit_is_refused_with_what_does(make_run):
    merged = Merged(find(make_run("llama", **LORA)))
    tokenizer = tokenizer_of(merged.source)
    ids = ids_of(tokenizer, PROMPT * 10)

    def of(size, ids=ids, new=200):
        return Room(merged, tokenizer, VirtualGPU(size), prompts=[ids], sampling=Sampling(max_new_tokens=new))

    whole = of(64 * MiB, ids=ids[:, :3])
    whole.require()
    most = whole.weights_bytes + whole.text_bytes
    of(most, ids=ids[:, :3]).require()
    with pytest.raises(HardwareError, match=r"--max-new-tokens \d+ fits") as error:
        of(most - 1, ids=ids[:, :3]).require()
    fitting = int(re.search(r"tokens (\d+) fits", str(error.value))[1])
    of(most - 1, ids=ids[:, :3], new=fitting).require()
    with pytest.raises(HardwareError, match=r"a prompt of \d+ tokens fits") as error:
        of(whole.weights_bytes + 200_000).require()
    fitting = int(re.search(r"prompt of (\d+) tokens fits", str(error.value))[1])
    of(whole.weights_bytes + 200_000, ids=ids[:, :fitting], new=1).require()
    with pytest.raises(HardwareError, match="weights"):
        of(whole.weights_bytes - 1).require()


def test_what_cannot_be_is_said(make_run, tmp_path, monkeypatch):
    (tmp_path / "model-q8_0.gguf").touch()
    with pytest.raises(ModelError, match="which llama.cpp and Ollama read"):
        find(tmp_path)
    merged = Merged(find(make_run("llama", **LORA)))
    tokenizer = tokenizer_of(merged.source)
    ids = ids_of(tokenizer, PROMPT)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        Room(merged, tokenizer, prompts=[ids], sampling=Sampling(max_new_tokens=10**6)).require()
    for wrong in ({"max_new_tokens": 0}, {"temperature": float("nan")}, {"top_p": 0.5}, {"top_p": 0.0}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)
    monkeypatch.setattr(room, "available_host_bytes", lambda: 1000)
    with pytest.raises(HardwareError, match="memory"):
        Room(merged, tokenizer, prompts=[ids]).require()


def test_the_command_writes_text_alone_to_standard_output(make_run):
    run = make_run("llama", **LORA)
    speaker = speaker_of(run)
    wanted = speaker.go_on(ids_of(speaker.tokenizer, PROMPT), Sampling(max_new_tokens=40))
    command = [sys.executable, "-m", "oomless", "generate", str(run), "--prompt", "-", "--max-new-tokens", "40"]
    plain, machine = (
        subprocess.run([*command, *more], input=PROMPT, capture_output=True, text=True, check=True)
        for more in ([], ["--json"])
    )
    assert json.loads(machine.stdout)["generated"] == [{"prompt": PROMPT, "text": wanted}]
    assert plain.stdout == visible(wanted) + "\n"
    assert "Traceback" not in plain.stderr
