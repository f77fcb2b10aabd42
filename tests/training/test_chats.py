"""A run over chats: the loss that is reported is that of the answers, and the model answers with the template it learnt."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.config import DataSource, TrainConfig
from oomless.training import loop


@pytest.fixture
def chats(tmp_path, texts):
    records = [
        {
            "messages": [
                {"role": "user", "content": f"What follows {text[:10]}?"},
                {"role": "assistant", "content": text[10 : 20 + number]},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": text[20 + number : 60]},
            ]
        }
        for number, text in enumerate(texts)
        if text[10:20].strip() and text[20 + number : 60].strip()
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path, records


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_a_run_over_chats(make_checkpoint, chats, corpus, tmp_path, packing):
    path, records = chats
    folder = make_checkpoint("llama")
    config = TrainConfig(
        model=str(folder),
        data=(DataSource(path=str(path), name="chats"), DataSource(path=str(corpus), name="text")),
        eval_data=(DataSource(path=str(path), name="answers"),),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        chat_template="plain",
        packing=packing,
        max_seq_length=256,
        max_steps=3,
        learning_rate=1e-3,
        gpu="cpu",
        dtype="fp32",
    )
    result = loop.train(config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")

    def loss_of_answers(model_folder):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        total, count = 0.0, 0
        for record in records:
            ids = tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"]
            labels = torch.full((len(ids),), -100)
            for number in (1, 3):  # an answer is what follows the prompt for it, to the end of its turn
                begin, end = (
                    len(
                        tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)[
                            "input_ids"
                        ]
                    )
                    for messages, asks in (
                        (record["messages"][:number], True),
                        (record["messages"][: number + 1], False),
                    )
                )
                labels[begin:end] = torch.tensor(ids[begin:end])
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            count += int((labels[1:] != -100).sum())
        return total / count

    assert result.eval_before["answers"] == pytest.approx(loss_of_answers(folder), rel=1e-4)
    assert result.eval_after["answers"] == pytest.approx(loss_of_answers(tmp_path / "run" / "model"), rel=1e-4)
    assert result.eval_after["answers"] < result.eval_before["answers"]
