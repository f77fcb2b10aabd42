"""A plan trains in exactly its size: runs of random settings in a virtual GPU of the bytes that their plan names.

Nothing runs out, and what is allocated and reserved at most is what was planned, to the byte: from the build to the final model,
with recovery as it is by default.
"""

import json
import random

import pytest
from transformers import AutoTokenizer

from oomless.config import TrainConfig
from oomless.data.loader import micro_batches
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.planning.choose import choose_training
from oomless.planning.layout import SHORT_RUN_STEPS, Layout
from oomless.planning.plan import plan_training
from oomless.training import loop
from oomless.training.distributed import Ranks

SHAPES = {
    "llama": [dict(), dict(hidden_size=256, intermediate_size=700, vocab_size=4096)],
    "gemma": [dict(), dict(hidden_size=256, vocab_size=4096)],
    "gemma2": [dict(num_hidden_layers=3)],
    "qwen3": [dict(), dict(hidden_size=256, intermediate_size=700)],
    "deepseek_v2": [dict(), dict(hidden_size=256)],
    "gpt2": [dict(n_embd=64), dict(n_embd=256, vocab_size=4096)],
}
BASE = dict(max_seq_length=128, learning_rate=1e-3, max_steps=4, logging_steps=1)


def settings_of(chance):
    """Return an architecture, whether it is tied, its shape, and settings to train it with."""
    architecture = chance.choice([*SHAPES, "llama"])
    settings = BASE | dict(
        packing=chance.choice(["documents", "best_fit", "concatenate"]),
        dtype=chance.choice(["fp32", "bf16", "fp16"]),
        optimizer=chance.choice(["adamw", "adamw_8bit", "adafactor", "sgd", "apollo", "galore", "muon"]),
        per_device_train_batch_size=chance.choice([1, 2, 4]),
        gradient_accumulation_steps=chance.choice([1, 2, 3]),
        max_seq_length=chance.choice([64, 256]),
        per_device_eval_batch_size=chance.choice([1, 8]),
    )
    maybe = [
        dict(trainable="lora", lora_r=4, lora_dropout=chance.choice([0.0, 0.2])),
        dict(optimizer_in_backward=True),
        dict(gradient_checkpointing=True),
        dict(cheap_recompute=True),
        dict(mlp_tiles=2),
        dict(eval_steps=2),
        dict(sample_prompts=["def main(", "import sys\n\n"], sample_tokens=chance.choice([1, 20])),
        dict(save_steps=2),
        dict(recover_from_oom=False),
        dict(undo_updates=True),
        dict(loss_chunk_bytes=1 << 20),
    ]
    for given in maybe:
        if chance.random() < 0.25:
            settings |= given
    if settings.get("recover_from_oom") is False:
        settings.pop("undo_updates", None)
    return architecture, chance.random() < 0.5, chance.choice(SHAPES[architecture]), settings


class Ear(loop.Listener):
    def __init__(self):
        self.heard = []

    def said(self, message):
        self.heard.append(message)


def in_its_size(config, monkeypatch):
    """Train as ``config`` says in a virtual GPU of the bytes that its plan names, and compare."""
    planned = plan_training(config)
    assert planned.fits
    size = planned.needed_bytes
    device, ear = VirtualGPU(size), Ear()
    monkeypatch.setattr(loop, "open_device", lambda name: device)
    result = loop.train(TrainConfig.from_mapping(config.to_dict() | {"gpu": f"virtual:{size}B"}), ear)
    assert result.model_dir is not None
    assert not [said for said in ear.heard if "memory" in said]
    reached = device.usage()
    assert reached.peak_allocated_bytes - planned.profile.peak_allocated_bytes == 0
    assert reached.peak_reserved_bytes - size == 0


def configure(folder, corpus, out, **settings):
    common = dict(model=str(folder), data=str(corpus), cache_dir=str(out / "cache"), output_dir=str(out / "run"))
    return TrainConfig.from_mapping(common | dict(gpu="virtual:1024GiB") | settings)


def play(seed, make_checkpoint, corpus, tmp_path, monkeypatch):
    architecture, tied, shape, settings = settings_of(random.Random(seed))
    folder = make_checkpoint(architecture, tied=tied, **shape)
    try:
        config = configure(folder, corpus, tmp_path, **settings)
        plan_training(config)
    except ConfigError as error:
        pytest.skip(f"these do not go together: {error}")
    in_its_size(config, monkeypatch)


CASES = {
    "documents": ("llama", dict(), dict(per_device_train_batch_size=2, eval_steps=2, save_steps=2)),
    "eight blocks evaluated": ("gemma", dict(), dict(packing="best_fit", per_device_eval_batch_size=8)),
    "in backward": ("llama", dict(hidden_size=256), dict(optimizer_in_backward=True, gradient_accumulation_steps=2)),
    "dropout": ("gpt2", dict(n_embd=64), dict(dtype="fp16", per_device_train_batch_size=2)),
    "samples": ("llama", dict(), dict(sample_prompts=["def main(", "天" * 30], sample_tokens=20, eval_fraction=0.0)),
    "samples of a short step": (
        *("gemma", dict(vocab_size=4096)),
        dict(max_seq_length=64, eval_steps=2, sample_prompts=["import " * 9], optimizer_in_backward=True, dtype="bf16"),
    ),
    "mla": ("deepseek_v2", dict(), dict(dtype="bf16", optimizer="adamw_8bit")),
    "heads of two widths, tables on the host": (
        *("gemma4", dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=512)),
        dict(dtype="bf16", trainable="lora", lora_r=4, embeddings_on_host=True),
    ),
    "streamed": (
        *("llama", dict(num_hidden_layers=6)),
        dict(
            dtype="bf16",
            trainable="lora",
            lora_r=4,
            stream_frozen=True,
            gradient_accumulation_steps=2,
            eval_steps=2,
            save_steps=2,
        ),
    ),
    "a body that ends in fp32": (
        "mamba",
        dict(),
        dict(dtype="bf16", packing="concatenate", max_seq_length=16, sample_prompts=["def"]),
    ),
    "lora": ("qwen3", dict(), dict(trainable="lora", lora_r=4, lora_dropout=0.2, gradient_checkpointing=True)),
}


def test_the_heaviest_evaluation_comes_late(make_checkpoint, tmp_path, monkeypatch):
    """A soft cap has scores of each pair of tokens; the one long document comes after eight batches of short ones."""
    short, held_out = tmp_path / "short.jsonl", tmp_path / "held_out.jsonl"
    lines = [json.dumps({"text": "import os"}) + "\n"] * 500
    short.write_text("".join(lines), encoding="utf-8")
    held_out.write_text("".join([*lines, json.dumps({"text": "import os " * 600}) + "\n"]), encoding="utf-8")
    settings = dict(trainable="lm_head", eval_data=str(held_out), per_device_eval_batch_size=1)
    config = configure(make_checkpoint("gemma2"), short, tmp_path, **BASE | settings)
    in_its_size(config, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_the_size_of_its_plan(make_checkpoint, corpus, tmp_path, monkeypatch, case):
    architecture, shape, settings = CASES[case]
    folder = make_checkpoint(architecture, tied=True, **shape)
    in_its_size(configure(folder, corpus, tmp_path, **BASE | settings), monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        dict(recover_from_oom=False),
        pytest.param(dict(optimizer_in_backward=True, eval_steps=4, save_steps=5), marks=pytest.mark.slow),
    ],
)
def test_a_long_run_is_planned_by_its_heaviest_blocks(make_checkpoint, tmp_path, monkeypatch, settings):
    """It is not played whole, and what weighs most comes in the middle of it, when the numbers of a step before are there."""
    lines = ["def a(b):\n    return b + 1\n" * (40 if number == 40 else 1 + number % 3) for number in range(200)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    long = dict(max_steps=SHORT_RUN_STEPS + 4, shuffle=False, eval_fraction=0.02)
    folder = make_checkpoint("gemma2", tied=True)
    in_its_size(configure(folder, text, tmp_path, **BASE | long | settings), monkeypatch)


def test_short_documents_weigh_what_the_allocator_makes_of_them(
    make_checkpoint, tokenizer_folder, tmp_path, monkeypatch
):
    """A block of 32 documents of four tokens fills whole blocks of the allocator; one of 25 of five tokens takes more."""
    tokens_of = AutoTokenizer.from_pretrained(tokenizer_folder)
    source = "import os, sys, re\n" * 8
    of_four, of_five = (next(t for t in cut(source) if len(tokens_of(t)["input_ids"]) == count) for count in (4, 5))
    text = tmp_path / "text.jsonl"
    lines = [of_four] * 32 * 8 + [of_five] * 26 + [of_four] * 32 * 8
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    long = dict(max_steps=SHORT_RUN_STEPS + 4, shuffle=False, eval_fraction=0, dtype="fp32", trainable="lora", lora_r=4)
    folder = make_checkpoint("llama", tied=True)
    in_its_size(configure(folder, text, tmp_path, **BASE | long), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "deepseek_v2"])
def test_dropout_and_latent_attention_see_many_short_documents(make_checkpoint, tmp_path, monkeypatch, architecture):
    """What GPT-2's dropout and DeepSeek's attention ask for follows from each document's length: some thirty in a block here."""
    chance = random.Random(0)
    text = tmp_path / "text.jsonl"
    lines = ["import os, sys, re\n"[: chance.randrange(2, 14)] for _ in range(300)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    short = dict(packing="best_fit", max_steps=2)
    in_its_size(configure(make_checkpoint(architecture, tied=True), text, tmp_path, **BASE | short), monkeypatch)


def cut(text):
    return (text[:size] for size in range(1, len(text)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_runs_in_the_size_of_their_plans(make_checkpoint, corpus, tmp_path, monkeypatch, seed):
    play(seed, make_checkpoint, corpus, tmp_path, monkeypatch)


@pytest.mark.full_length
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_random_runs_in_the_size_of_their_plans(make_checkpoint, corpus, tmp_path, monkeypatch, seed):
    play(seed, make_checkpoint, corpus, tmp_path, monkeypatch)


def test_a_resumed_run_fits_too(make_checkpoint, corpus, tmp_path, monkeypatch):
    folder = make_checkpoint("llama", tied=True, hidden_size=256)
    config = configure(folder, corpus, tmp_path, **BASE | dict(save_steps=2, eval_steps=2))
    in_its_size(config, monkeypatch)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "aside")
    size, ear = plan_training(config).needed_bytes, Ear()
    device = VirtualGPU(size)
    monkeypatch.setattr(loop, "open_device", lambda name: device)
    result = loop.train(TrainConfig.from_mapping(config.to_dict() | {"resume": True}), ear)
    assert result.steps == 4
    assert not [said for said in ear.heard if "memory" in said]


@pytest.mark.slow
def test_a_pick_trains_in_the_size_that_it_was_picked_for(make_checkpoint, corpus, tmp_path, monkeypatch):
    """Also where the text was not known when it was picked."""
    folder = make_checkpoint("llama", tied=True, hidden_size=256, vocab_size=4096)
    given = dict(model=str(folder), gpu="virtual:34MiB", max_seq_length=256)
    picked = choose_training(given, tokens=100_000, host_bytes=8 << 30, keep_trials=False)
    assert picked.plan is not None
    size = picked.plan.needed_bytes
    assert size <= 34 << 20
    settings = picked.config.to_dict() | dict(
        data=[{"path": str(corpus)}], cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "run"), max_steps=3
    )
    device, ear = VirtualGPU(34 << 20), Ear()
    monkeypatch.setattr(loop, "open_device", lambda name: device)
    loop.train(TrainConfig.from_mapping({k: v for k, v in settings.items() if k != "num_train_epochs"}), ear)
    assert not [said for said in ear.heard if "memory" in said]


def test_the_first_of_several_gpus_evaluates_every_batch_once():
    """In the size that it has: a last one that is not full is not filled up with itself."""
    config = TrainConfig(model="-", data="-", output_dir="-", max_seq_length=8, per_device_eval_batch_size=2)
    lengths = tuple((number, 8 - number) for number in range(1, 6))
    blank = Layout(train=((8,),), ranked=(((0, (8,)),),), evaluation=(lengths,)).data(config, 3)
    (blocks,) = blank.evaluation.values()
    batches = Ranks(count=3).share_batches(micro_batches(blocks, 2))
    assert [batch.document_lengths for batch in batches] == [lengths[:2], lengths[2:4], lengths[4:]]
