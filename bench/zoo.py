"""Every text model of transformers' registry, tiny: what oomless does with it, or why it refuses.

    python bench/zoo.py [--models llama,bloom,...] [--write]

Each is built from its config class with small sizes (``models.twin``), saved by transformers, and put through:

``loss``      the loss of a block is that of plain transformers with its own attention, to 1e-5
``packing``   documents packed into a block are apart, or that packing is refused
``fused``     fused parts of layers (their plain form, as on any virtual GPU) and a fused loss give the same loss and gradients as
              the architecture's own, to 1e-5; in full and with LoRA, each kept, recomputed (``cheap_recompute``), checkpointed, both
``plan``      a rehearsal runs to its end
``full``, ``lora``, ``nf4 + lora``, ``rows``
              two real steps; what they leave is loaded by plain transformers, whole, and gives the live model's logits
              (``models.verify`` inside the run; here once more that nothing is missing and that something was learnt)

A cell is "yes", or "refused: why" before anything was trained. Anything else is a fault: "CRASH", "WRONG".
``--write`` renews these cells of ``results/zoo.json``, and ``results/zoo.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from oomless.config import TrainConfig
from oomless.data.loader import MicroBatch
from oomless.errors import ConfigError, OomlessError, TrainingError
from oomless.memory.device import Device
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models import build, form
from oomless.models.make import sees, ties
from oomless.models.spec import ModelSpec, resolve
from oomless.models.twin import small_config
from oomless.planning.plan import plan_training
from oomless.techniques import lora
from oomless.training.assemble import assemble
from oomless.training.loop import train
from oomless.training.loss import causal_lm_loss
from provenance import RESULTS, write

VOCABULARY = 512
SETTINGS: dict[str, dict[str, Any]] = {
    # Defaults that transformers itself cannot build or run, and switches that a default leaves without effect.
    **{
        name: {"is_decoder": True}
        for name in ("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie")
    },
    **{
        name: {"is_decoder": True}
        for name in ("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert")
    },
    **{name: {"is_decoder": True} for name in ("roformer", "xlm-roberta", "xlm-roberta-xl", "big_bird")},
    **{name: {"head_dim": 128} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"num_key_value_heads": 8},
    # Kinds of layers that the published models have, and a default hides.
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid"] * 3, "num_mem_blocks": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    # What is compressed 128 tokens at a time gets no gradient from texts of 64.
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
}
CELLS = ("loss", "packing", "fused", "plan", "full", "lora", "nf4 + lora", "rows")
WORDS = {"yes": "yes", "refused": "refused before training", "WRONG": "wrong", "CRASH": "crashes"}
TRAINABLE: dict[str, dict[str, Any]] = {
    "full": {"trainable": "full"},
    "lora": {"trainable": "lora", "lora_r": 4},
    "nf4 + lora": {"trainable": "lora", "lora_r": 4, "quantization": "nf4"},
    "rows": {"trainable": "lm_head", "trainable_rows": "5-20"},
}


def make_tokenizer(folder: Path) -> list[str]:
    """Write a byte-level tokenizer to ``folder``, and return the texts that it was trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        path.read_text(encoding="utf-8")[:3000] for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:12]
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return texts


def make_model(model_type: str, folder: Path) -> None:
    """Save a tiny random model of ``model_type`` to ``folder``."""
    config = small_config(AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {})))
    for name in ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"):
        if getattr(config.get_text_config(), name, None):
            setattr(config.get_text_config(), name, VOCABULARY)
    for factor in (3, 1):  # larger than fresh matrices, where the model bears it
        torch.manual_seed(1)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and 0 < parameter.std() < 0.05:
                    parameter *= factor
            logits = model(input_ids=torch.arange(64)[None], use_cache=False).logits
        if torch.isfinite(logits).all():
            break
    model.save_pretrained(folder)


def auto_class(config: Any) -> Any:
    """Return what makes and loads models of ``config`` in transformers."""
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def cell(function: Callable[[], str]) -> str:
    """Return what ``function`` found, or how it ended."""
    try:
        return function()
    except TrainingError as error:
        return f"WRONG: stopped while training: {_line(error)}"
    except OomlessError as error:  # what is found wrong when it is saved comes after the training
        return f"{'WRONG' if 'not the one that was trained' in str(error) else 'refused'}: {_line(error)}"
    except AssertionError as error:
        return f"WRONG: {_line(error)}"
    except Exception as error:  # what the zoo is for
        return f"CRASH: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]


def row(model_type: str, place: Path, cells: tuple[str, ...] = CELLS) -> dict[str, str]:
    """Return what each of ``cells`` finds for ``model_type``; files go below ``place``."""
    folder = place / model_type
    texts = make_tokenizer(folder)
    data = place / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    try:
        make_model(model_type, folder)
    except Exception as error:
        return dict.fromkeys(cells, f"not made: {type(error).__name__}: {_line(error)[:100]}")
    try:
        form.choose(resolve(str(folder)), "documents")
        packing = "documents"
    except OomlessError:
        packing = "concatenate"

    def config(**settings: Any) -> TrainConfig:
        common = {
            "model": str(folder),
            "data": str(data),
            "max_seq_length": 64,
            "packing": packing,
            "dtype": "fp32",
            "max_steps": 2,
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
            "seed": 1,
            "eval_fraction": 0.0,
        }
        return TrainConfig(**(common | settings))

    def trained(name: str) -> str:
        output = place / f"{model_type}-{name.replace(' ', '')}"
        tied = ties(resolve(str(folder)).config)
        choice = {"tied_weights": "untied"} if name == "rows" and tied else {}
        result = train(config(output_dir=str(output), gpu="cpu", **TRAINABLE[name], **choice))
        check_result(Path(result.model_dir or ""), folder)
        return "yes"

    functions: dict[str, Callable[[], str]] = {
        "loss": lambda: same_loss(folder, packing),
        "packing": lambda: "yes" if packing == "documents" else _refused(folder),
        "fused": lambda: same_when_fused(resolve(str(folder)), config(output_dir="none", gpu="virtual:1GiB")),
        "plan": lambda: planned(
            config(output_dir=str(place / "x"), gpu="virtual:1GiB", trainable="full", optimizer="adamw")
        ),
        **{name: lambda name=name: trained(name) for name in TRAINABLE},
    }
    return {name: cell(functions[name]) for name in cells}


def _refused(folder: Path) -> str:
    form.choose(resolve(str(folder)), "documents")
    return "yes"


def planned(config: TrainConfig) -> str:
    """Rehearse ``config``."""
    plan = plan_training(config)
    assert plan.fits, plan.out_of_memory
    return "yes"


@torch.no_grad()
def same_loss(folder: Path, packing: Any) -> str:
    """Compare the loss of packed documents, or of one, with that of plain transformers on each."""
    spec = resolve(str(folder))
    model = build.build(spec, device=Device(), dtype=torch.float32, form=form.choose(spec, packing))
    build.load_weights(model, spec, device=Device())
    model.eval()
    ids = torch.arange(1, 41)[None] * 17 % VOCABULARY
    labels = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    lengths = (13, 27) if packing == "documents" else (40,)
    labels[:, [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ours = float(causal_lm_loss(model, ids, labels, position_ids=positions, document_lengths=(lengths,)))
    plain = auto_class(spec.config).from_pretrained(folder, attn_implementation="eager").eval()
    theirs, start = 0.0, 0
    for length in lengths:
        part = slice(start, start + length)
        logits = plain(input_ids=ids[:, part], use_cache=False).logits[0].float()
        theirs += float(functional.cross_entropy(logits, labels[0, part], reduction="sum"))
        start += length
    assert abs(ours - theirs) <= 1e-5 * abs(theirs), f"the loss is {ours:.6f}, by plain transformers {theirs:.6f}"
    return "yes"


def same_when_fused(spec: ModelSpec, config: TrainConfig) -> str:
    """Compare the loss and all gradients of the forms in which a GPU trains with those of plain kernels that keep everything."""
    lengths = (13, 51) if config.packing == "documents" else (64,)
    ids = torch.arange(1, 65)[None] * 17 % VOCABULARY
    labels = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    labels[:, [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = MicroBatch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        document_lengths=(lengths,),
        target_count=int((labels >= 0).sum()),
    )

    def trained(**settings: Any) -> dict[str, torch.Tensor]:
        device = VirtualGPU(1 << 30)
        with device.active():
            torch.manual_seed(1)
            assembly = assemble(spec, replace(config, **settings), device, fill=True)
            named = dict(assembly.model.named_parameters())
            for name, parameter in named.items():
                if lora.is_adapter(name):
                    torch.nn.init.normal_(parameter, std=0.1)
            loss = assembly.step.accumulate([batch], assembly.step._begin([batch]))
            return {"loss": loss} | {name: p.grad.clone() for name, p in named.items() if p.grad is not None}

    for trainable in (TRAINABLE["full"], TRAINABLE["lora"]):
        plain = trained(kernels="plain", **trainable)
        least = 1e-2 * max(float(wanted.norm()) for wanted in plain.values())
        for kept, cheap in product((False, True), repeat=2):
            form = {"gradient_checkpointing": not kept, "cheap_recompute": cheap}
            try:
                fused = trained(kernels="fused", **trainable, **form)
            except ConfigError as error:
                if "has no effect" in str(error):
                    continue
                raise
            assert fused.keys() == plain.keys(), f"gradients with {form}: {sorted(fused.keys() ^ plain.keys())[:3]}"
            for name, wanted in plain.items():
                error = float((fused[name] - wanted).norm()) / max(float(wanted.norm()), least)
                assert error <= 1e-5, f"{trainable['trainable']}, {form}: {name} is off by {error:.1e}"
    return "yes"


@torch.no_grad()
def check_result(result: Path, base: Path) -> None:
    """Load ``result`` with plain transformers: whole, finite, and changed from ``base``."""
    auto = auto_class(resolve(str(base)).config)
    model, report = auto.from_pretrained(result, output_loading_info=True, attn_implementation="eager")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], f"{kind} of the saved model: {sorted(map(str, report[kind]))[:3]}"
    before = auto.from_pretrained(base, attn_implementation="eager").eval()
    ids = torch.arange(1, 31)[None]
    now, then = (m(input_ids=ids, use_cache=False).logits for m in (model.eval(), before))
    assert torch.isfinite(now).all(), "the saved model's logits are not finite"
    assert not torch.equal(now, then), "the saved model is the base"


def table(rows: dict[str, dict[str, str]], cells: tuple[str, ...] = CELLS) -> str:
    """Return the table, its reasons as notes below."""
    reasons: dict[str, int] = {}
    lines = ["| " + " | ".join(("model", *cells)) + " |", "| --- " * (len(cells) + 1) + "|"]
    for name, found in rows.items():
        shown = []
        for value in (found.get(key, "not run") for key in cells):
            word, _, reason = value.partition(": ")
            shown.append(f"{word} [{reasons.setdefault(_general(reason), len(reasons) + 1)}]" if reason else word)
        lines.append("| " + " | ".join((name, *shown)) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes, ""])


def _general(reason: str) -> str:
    """Return ``reason`` without the name of the class that it was said of."""
    return " ".join(
        "the class"
        if word[:1].isalpha() and word.strip(".,:").endswith(("LM", "LMHeadModel", "Decoder", "Generation", "Head"))
        else word
        for word in reason.split()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    quiet()
    cells = tuple(arguments.cells.split(","))
    rows: dict[str, dict[str, str]] = {}
    for name in arguments.models.split(","):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
            rows[name] = row(name, Path(place), cells)
        print(
            f"{name} ({time.perf_counter() - began:.0f} s)",
            *(f"  {k}: {v}" for k, v in rows[name].items()),
            sep="\n",
            flush=True,
        )
        if arguments.write:
            renew({name: rows[name]})


def renew(rows: dict[str, dict[str, str]]) -> None:
    """Put the cells of ``rows`` into ``results/zoo.json``, and make ``results/zoo.md`` of all that it then holds."""
    path = RESULTS / "zoo.json"
    held = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    rows = dict(sorted((held | {name: held.get(name, {}) | found for name, found in rows.items()}).items()))
    write("zoo", {"rows": rows})
    made = {name: found for name, found in rows.items() if not found["loss"].startswith("not made")}
    (RESULTS / "zoo.md").write_text(f"{count(rows, made)}\n\n{table(made)}", encoding="utf-8")


def count(rows: dict[str, dict[str, str]], made: dict[str, dict[str, str]]) -> str:
    """Return how many cells of ``made`` are what, and which architectures are not among them."""
    words = Counter(value.partition(":")[0] for found in made.values() for value in found.values())
    counts = ", ".join(f"{words[word]} {what}" for word, what in WORDS.items())
    absent = {
        "No small model could be made of": sorted(rows.keys() - made.keys()),
        "Not run": sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - rows.keys()),
    }
    others = " ".join(f"{what}: {', '.join(names)}." for what, names in absent.items() if names)
    return (
        f"{len(made)} of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} architectures of transformers' registry, {words.total()} cells: "
        f"{counts}. {others}"
    )


def quiet() -> None:
    """Leave the output to the zoo."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
