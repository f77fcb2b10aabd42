"""oomless beside the Hugging Face Trainer: same model, same blocks, same order, one run.

    python bench/against_trainer.py parity    100 steps in fp32: the losses, step by step
    python bench/against_trainer.py speed     tokens per second, rounds taken in turn, and tracked peak bytes of both

Parity uses ragged real documents, packed. Speed uses whole blocks, so that both compute the same attention; what
differs is what each program does around the same arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import Loader, micro_batches
from oomless.data.prepare import prepare
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.training import loop
from provenance import write


def make_model(folder: Path, vocabulary: int, **shape: Any) -> Path:
    """Save a Llama of the given shape with a tokenizer trained on the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4096),
        special_tokens=["<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(path) for path in library()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, eos_token_id=0, bos_token_id=None, max_position_embeddings=4096, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


class Blocks(torch.utils.data.IterableDataset):
    """The very blocks that oomless trains on, in its order, as the Trainer takes them."""

    def __init__(self, model: Path, config: TrainConfig, steps: int) -> None:
        data = prepare(config, AutoTokenizer.from_pretrained(model))
        self.batches = list(micro_batches(Loader(data.train).take(steps * config.blocks_per_step), 1))
        self.packing = config.packing

    def __iter__(self) -> Any:
        for batch in self.batches:
            block = {
                "input_ids": batch.input_ids[0],
                "labels": torch.where(batch.labels[0] == -100, -100, batch.input_ids[0]),
                "shift_labels": batch.labels[0],
            }
            # Position ids make transformers look for packed documents and build their mask.
            yield block | ({"position_ids": batch.position_ids[0]} if self.packing != "concatenate" else {})


class Recorder(TrainerCallback):
    """Remembers when each optimizer step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.times.append(time.perf_counter())


class RecordingTrainer(Trainer):
    """Keeps each micro-batch's loss unrounded."""

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


def run_trainer(model: Path, config: TrainConfig, out: Path, blocks: Blocks) -> tuple[list[float], list[float]]:
    """Return the loss and the end time of every step of a Trainer run with the settings of ``config``."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if config.trainable == "lm_head":
        network.requires_grad_(False)
        network.lm_head.requires_grad_(True)
    recorder = Recorder()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        weight_decay=0.0,
        per_device_train_batch_size=config.per_device_train_batch_size,
        lr_scheduler_type=config.lr_scheduler_type,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=config.seed,
    )
    trainer = RecordingTrainer(model=network, args=arguments, train_dataset=blocks, callbacks=[recorder])
    trainer.log = lambda *_, **__: None
    trainer.train()
    per_step = config.gradient_accumulation_steps
    losses = [sum(trainer.losses[i : i + per_step]) for i in range(0, len(trainer.losses), per_step)]
    return losses, recorder.times


class Ours(loop.Listener):
    """Remembers the loss and the end time of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def stepped(self, metrics: dict[str, Any]) -> None:
        self.losses.append(metrics["loss"])
        self.times.append(time.perf_counter())


def run_ours(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Return the loss and the end time of every step of an oomless run."""
    listener = Ours()
    loop.train(config, listener)
    return listener.losses, listener.times


def settings(model: Path, out: Path, **changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"eval_fraction": 0.0, "gpu": "cpu", "dtype": "fp32"}
    data = (DataSource(path=str(Path(sysconfig.get_path("stdlib")) / "*.py")),)
    return TrainConfig(model=str(model), data=data, output_dir=str(out), **defaults | changes)


def parity(folder: Path) -> dict[str, Any]:
    model = make_model(
        folder / "model",
        4096,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config = settings(
        model,
        folder / "ours",
        max_seq_length=256,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=100,
        learning_rate=1e-3,
    )
    theirs, _ = run_trainer(model, config, folder / "theirs", Blocks(model, config, 100))
    ours, _ = run_ours(config)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"100 steps: loss {ours[0]:.4f} -> {ours[-1]:.4f}; largest difference from the Trainer {difference:.2e}")
    return {"largest_difference": difference, "ours": ours, "trainer": theirs}


SPEED_CASES: dict[str, dict[str, Any]] = {
    # Everything trains.
    "full": {"vocabulary": 8192, "hidden_size": 256, "num_hidden_layers": 4, "tied": False, "train": {}},
    # Two matrices, one trains: neither program builds a graph for the body. The chunk is what this CPU's cache holds.
    "lm_head": {
        "vocabulary": 32000,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "tied": False,
        "train": {"trainable": "lm_head", "loss_chunk_bytes": 32 << 20},
    },
    # The seed case: one matrix. The Trainer can only train it as it is, through the whole model; oomless parts it.
    "lm_head of a tied model": {
        "vocabulary": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "tied": True,
        "train": {"trainable": "lm_head", "tied_weights": "untied"},
    },
}


def speed(folder: Path, rounds: int = 3, steps: int = 8) -> dict[str, Any]:
    result = {}
    for name, case in SPEED_CASES.items():
        shape = {"hidden_size": case["hidden_size"], "num_hidden_layers": case["num_hidden_layers"]}
        model = make_model(
            folder / name / "model",
            case["vocabulary"],
            **shape,
            intermediate_size=3 * case["hidden_size"],
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=case["tied"],
        )
        seconds: dict[str, list[float]] = {"ours": [], "trainer": []}
        common = {
            "max_seq_length": 512,
            "per_device_train_batch_size": 2,
            "max_steps": steps,
            "packing": "concatenate",
            "cache_dir": str(folder / "cache"),
            **case["train"],
        }
        for number in range(rounds):
            config = settings(model, folder / name / f"ours-{number}", **common)
            seconds["ours"] += _step_seconds(run_ours(config)[1])
            blocks = Blocks(model, config, steps)
            seconds["trainer"] += _step_seconds(run_trainer(model, config, folder / name / "theirs", blocks)[1])
        tokens = 2 * 512
        peaks = {}
        for program in seconds:
            config = settings(model, folder / name / f"{program}-tracked", **common | {"max_steps": 2})
            blocks = Blocks(model, config, 2)
            device = VirtualGPU(1 << 40)
            with device.active():
                if program == "ours":
                    run_ours(config)
                else:
                    run_trainer(model, config, folder / name / "tracked", blocks)
            peaks[program] = device.usage().peak_allocated_bytes
        rates = {program: tokens / statistics.median(values) for program, values in seconds.items()}
        result[name] = {
            "tokens_per_second": rates,
            "speed_ratio": rates["ours"] / rates["trainer"],
            "tracked_peak_bytes": peaks,
            "peak_ratio": peaks["ours"] / peaks["trainer"],
            "case": case,
        }
        print(
            f"{name}: {rates['ours']:,.0f} against {rates['trainer']:,.0f} tokens/s, ratio "
            f"{result[name]['speed_ratio']:.2f}; tracked peak {peaks['ours']:,} against {peaks['trainer']:,} bytes"
        )
    return result


def _step_seconds(times: list[float]) -> list[float]:
    """The duration of each step but the first two, which allocate and warm up."""
    return [later - earlier for earlier, later in zip(times[1:], times[2:], strict=False)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parity", "speed"])
    chosen = parser.parse_args().what
    with tempfile.TemporaryDirectory() as scratch:
        outcome = {"parity": parity, "speed": speed}[chosen](Path(scratch))
    print(f"written to {write(f'trainer_{chosen}', outcome)}")
