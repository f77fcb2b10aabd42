"""``oomless demo``: the main job on text that every machine has.

A small Llama-architecture model is pretrained for a moment on the source code of Python's standard library, and saved as
a real checkpoint. That is the model that a user would bring. Then the main job: it goes on to learn Python's reference
manual, which ships with every Python as ``pydoc_data``, and is measured on held-out text of both kinds.
"""

from __future__ import annotations

import json
import sysconfig
import time
from pathlib import Path
from typing import Any

from rich.text import Text

from oomless.config import DataSource, TrainConfig
from oomless.report.screen import Screen
from oomless.report.tables import Grid
from oomless.report.terminal import TerminalListener, perplexity
from oomless.training.listening import RunResult
from oomless.training.loop import train
from oomless.units import format_bytes

CODE_BYTES = 3_000_000
VOCABULARY = 2048
SEQUENCE = 256
PROMPT = "The following sections describe the standard"


def run_demo(screen: Screen, output_dir: Path | None = None) -> RunResult:
    """Run the demo in ``output_dir`` (default: a new folder under ``runs``) and print what came of it."""
    began = time.perf_counter()
    folder = output_dir or _new_folder(Path("runs"))
    screen.print(Text.assemble(("1/4", "bold"), f" collecting text in {folder / 'text'}"), soft_wrap=True)
    collect_text(folder / "text")
    screen.say(("2/4", "bold"), f" training a byte-level BPE tokenizer of {VOCABULARY:,} tokens, making a small Llama")
    make_model(folder / "blank", folder / "text")
    listener = TerminalListener(screen)
    try:
        screen.say(("3/4", "bold"), " pretraining it on Python code: the model that you would bring")
        first = train(_config(folder, "blank", "code", "pretrained", max_steps=80, learning_rate=4e-3), listener)
        if first.interrupted:
            raise KeyboardInterrupt
        screen.say(
            ("4/4 ", "bold"), ("continued pretraining", "bold green"), " on Python's reference manual: the main job"
        )
        listener.close()
        second = train(
            _config(folder, "pretrained/model", "manual", "continued", max_steps=40, learning_rate=2e-3), listener
        )
        if second.interrupted:
            raise KeyboardInterrupt
    finally:
        listener.close()
    _summary(screen, first, second, folder)
    screen.print(f"{time.perf_counter() - began:.0f} s in all; everything is in {folder}", soft_wrap=True)
    return second


def _new_folder(parent: Path) -> Path:
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"


def _config(folder: Path, model: str, learn: str, run: str, *, max_steps: int, learning_rate: float) -> TrainConfig:
    text = folder / "text"
    return TrainConfig(
        model=str(folder / model),
        data=(DataSource(path=str(text / f"{learn}.jsonl"), name=learn),),
        eval_data=tuple(
            DataSource(path=str(text / f"{name}-held-out.jsonl"), name=name) for name in ("code", "manual")
        ),
        output_dir=str(folder / run),
        cache_dir=str(folder / "token-cache"),
        max_seq_length=SEQUENCE,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=max_steps,
        learning_rate=learning_rate,
        warmup_ratio=0.1,
        weight_decay=0.01,
        gpu="auto",
    )


def collect_text(folder: Path) -> None:
    """Write code and manual as JSON lines to ``folder``, every twentieth document held out."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(
        path for path in library.rglob("*.py") if not {"site-packages", "test", "pydoc_data"} & set(path.parts)
    )
    # A fixed stride takes some of every corner of the library.
    stride = max(1, sum(path.stat().st_size for path in modules) // CODE_BYTES)
    code = [path.read_text(encoding="utf-8", errors="replace") for path in modules[::stride]]
    for name, documents in (("code", code), ("manual", list(topics.values()))):
        documents = [text for text in documents if text]
        _write(folder / f"{name}-held-out.jsonl", documents[::20])
        _write(folder / f"{name}.jsonl", [text for number, text in enumerate(documents) if number % 20])


def _write(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def make_model(folder: Path, text: Path) -> None:
    """Train a tokenizer on both kinds of ``text`` and save it with a small, untrained Llama in ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (json.loads(line)["text"] for name in ("code", "manual") for line in (text / f"{name}.jsonl").open())
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)


def sample(model_dir: Path, prompt: str, *, max_new_tokens: int = 48, seed: int = 0) -> str:
    """Return ``prompt`` as the model in ``model_dir`` goes on with it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_k=20, temperature=0.8)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def _summary(screen: Screen, first: RunResult, second: RunResult, folder: Path) -> None:
    stages = ("blank", "pretrained on code", "then on the manual")
    grid = Grid(title="Held-out loss (perplexity)", columns=("text", *stages), numbers=frozenset(stages))
    for name, meaning in (("manual", "manual (new)"), ("code", "code (old)")):
        losses = (first.eval_before[name], second.eval_before[name], second.eval_after[name])
        grid.add(meaning, *(f"{loss:.3f} ({perplexity(loss)})" for loss in losses))
    grid.print(screen)
    learnt = second.eval_before["manual"] - second.eval_after["manual"]
    forgotten = second.eval_after["code"] - second.eval_before["code"]
    screen.print(
        f"learnt {learnt:.2f} nats per token of the manual, forgot {forgotten:.2f} of code "
        "(replaying some old text in `data` is the remedy)"
    )
    screen.print(
        f"peak memory {format_bytes(second.peak_memory_bytes)} of the process, {second.tokens_per_second:,.0f} tokens/s"
    )
    for label, run in (("before", "pretrained"), ("after", "continued")):
        screen.say((f"sample {label}: ", "bold"), repr(sample(folder / run / "model", PROMPT)))
    screen.print(f"run folder: {second.output_dir}", soft_wrap=True)
