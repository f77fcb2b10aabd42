"""From a model that does not know a script to one that answers in it, in one run, and on to other programs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.settings.commands import oomless
from tests.vocabulary.languages import documents, names
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.config.values import load_yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_language.yaml"
ANSWER = "\u10d4\u10e1 \u10d0\u10e0\u10d8\u10e1 \u10e1\u10d0\u10ee\u10d4\u10da\u10d8."  # it is a name


@pytest.mark.slow
def test_a_new_language(model_of, text_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_bytes(text_of("Georgian").read_bytes())
    chats = [
        [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": ANSWER}]
        for name in names("Georgian")[:200]
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    settings = load_yaml(EXAMPLE) | {"model": str(model_of("BPE", tied=True)), "gpu": "virtual:256MiB"}
    Path("run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    done = oomless("train", "--config", "run.yaml", "--as-given")
    assert done.code == 0, done.err
    said = " ".join((done.out + done.err).split())
    assert "300 new tokens: " in said
    assert said.count("(+0.00%)") == 3  # the peak of each stage is the one that was predicted

    run = Path("runs/new-language")
    losses = {
        stage: [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        for stage in ("stage-1-rows", "stage-2-text", "stage-3-chat")
    }
    of_text = [line for stage in losses.values() for line in stage if "bits_per_byte/text.jsonl" in line]
    assert of_text[-1]["bits_per_byte/text.jsonl"] < 0.6 * of_text[0]["bits_per_byte/text.jsonl"]
    general = [name for name in of_text[0] if name.startswith("bits_per_byte/") and "text.jsonl" not in name]
    assert len(general) == 1  # what is forgotten is measured in each stage
    assert all(any(general[0] in line for line in stage) for stage in losses.values())

    answered = oomless("generate", str(run), "--chat", "--prompt", f"{names('Georgian')[250]}?", "--json")
    assert json.loads(answered.out)["generated"][0]["text"].startswith(ANSWER), answered.out
    exported = oomless("export", str(run), "--output", "exported")
    assert exported.code == 0, exported.err
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (run / "model", "exported"))
    model = AutoModelForCausalLM.from_pretrained("exported")
    for text in (*documents("Georgian", 5, seed=9), "def f(x): return x"):
        ids = after(text, add_special_tokens=False)["input_ids"]
        assert ids == before(text, add_special_tokens=False)["input_ids"]
        assert after.decode(ids) == text
    turn = [{"role": "user", "content": f"{names('Georgian')[250]}?"}]
    asked = after.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        made = model.generate(**asked, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    assert after.decode(made[asked["input_ids"].shape[1] :], skip_special_tokens=True).startswith(ANSWER)
    compared = oomless("compare", str(run), "--gpu", "cpu")
    assert compared.code == 0, compared.err
