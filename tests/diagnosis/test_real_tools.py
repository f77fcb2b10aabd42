"""Real errors of the tools that people use: their own code runs out of memory on a GPU that is not there, and is explained.

`tool_script.py` is the user's script: transformers' Trainer, accelerate's loop, TRL's SFTTrainer and DPOTrainer, in full and through
LoRA, of dense models and mixtures of experts. What truly asked is known from the device; what is said comes from the traceback alone,
the model, the GPU and what the user says of the run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.diagnosis.test_real import Run
from tests.diagnosis.test_real import truth as truth_of_a_step

from oomless.diagnosis.explain import explain
from oomless.memory.profile import Request
from oomless.models.spec import resolve

HERE = Path(__file__).parent
BATCH, LENGTH, EVAL_BATCH, HALF, GPUS = 2, 2048, 8, {"bf16", "half"}, 2
_LOSS_OF_TRL = ": outputs = model(**inputs, fused_lm_head=True)"
OF_TRL = {
    "sft": f"SFTTrainer{_LOSS_OF_TRL}",
    "dpo": f"DPOTrainer{_LOSS_OF_TRL}",
    "kto": f"KTOTrainer{_LOSS_OF_TRL}",
    "gkd": "GKDTrainer, lmbda=0.0",
    "reward": "RewardTrainer",
    "grpo": f"GRPOTrainer, vllm_mode=server, max_prompt_length=512, max_completion_length=1536{_LOSS_OF_TRL}",
}
"""What the user's text shows of a script of TRL."""

STARTED = {
    "ddp": f"torchrun --nproc_per_node {GPUS} train.py",
    "fsdp": f"torchrun --nproc_per_node {GPUS} train.py --fsdp full_shard",
}
"""How the user starts a script on several GPUs."""

SHAPE = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen3": ("Qwen3Config", SHAPE | dict(head_dim=64, tie_word_embeddings=True)),
    "mixtral": ("MixtralConfig", SHAPE | dict(intermediate_size=3072, vocab_size=32000, num_local_experts=8)),
}
KINDS = [
    ("transformers", "llama"),
    ("transformers bf16", "llama"),
    ("transformers bf16 checkpointing evaluation", "qwen3"),
    ("transformers half lora evaluation", "llama"),
    ("transformers half", "mixtral"),
    ("transformers bf16 eager", "llama"),
    ("accelerate bf16", "llama"),
    ("sft bf16", "llama"),
    ("sft half packing", "qwen3"),
    ("sft lora half", "mixtral"),
    ("dpo half", "llama"),
    ("dpo lora half", "llama"),
    ("transformers half ddp", "llama"),
    ("transformers bf16 fsdp", "llama"),
    ("sft half fsdp checkpointing", "qwen3"),
    ("reward half", "llama"),
    ("grpo half", "llama"),
    ("kto half", "llama"),
]
NOT_ON_A_GPU = re.compile(
    r'  File "[^"]*(?:/oomless/(?:memory|programs)/|torch/overrides\.py|tool_errors\.py|runpy>)[^"]*", line \d+, in \S+\n'
    r"(?:    .*\n)*?(?=  File|\S)"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("models")
    for name, (kind, shape) in MODELS.items():
        getattr(transformers, kind)(**shape).save_pretrained(folder / name)
    return folder


def errors_of(kind, model, folder, most, changes=None, capacity=None):
    """Return real errors of a script of ``kind``, at ``capacity`` or at sizes of which each stops another request first."""
    asked = str(most) if capacity is None else f"={capacity}"
    return asked_of_tool(asked, kind, model, folder, changes)


def asked_of_tool(asked, kind, model, folder, changes=None):
    if kind.split()[0] in OF_TRL:
        pytest.importorskip("trl")
    done = subprocess.run(
        [sys.executable, str(HERE / "tool_errors.py"), asked, str(HERE / "tool_script.py"), kind, str(folder / model),
         str(folder / "out"), json.dumps(changes or {})],
        capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "TQDM_DISABLE": "1"} | processes_of(kind),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def started(kind):
    """Return the command that starts the script where it is on several GPUs."""
    return "".join(f"{STARTED[option]}\n" for option in kind.split() if option in STARTED)


def processes_of(kind):
    return {"WORLD_SIZE": str(GPUS)} if started(kind) else {}


def told(kind, model, folder, capacity):
    """Return what the user says of the run, and what it casts to."""
    _, *options = kind.split()
    given = {
        "model": str(folder / model),
        "gpu": f"virtual:{capacity}B",
        "per_device_train_batch_size": BATCH,
        "max_seq_length": LENGTH,
        "dtype": "bf16" if "half" in options else "fp32",
        "gradient_checkpointing": "checkpointing" in options,
    }
    if "evaluation" in options:
        given["per_device_eval_batch_size"] = EVAL_BATCH
    if "lora" in options:
        given |= {"trainable": "lora", "lora_r": 16}
    return given, "bf16" if "bf16" in options else None


def explained(kind, model, folder, error):
    given, mixed_precision = told(kind, model, folder, error["capacity"])
    words = started(kind) + (f"{OF_TRL['grpo']}\n" if kind.startswith("grpo") else "")
    return given, explain(words + NOT_ON_A_GPU.sub("", error["text"]), given, mixed_precision=mixed_precision)


def truth(kind, request, text, config):
    """Name what truly asked: a pattern for the kind, from the module, the operator, the size and the line of code."""
    tool, *options = kind.split()
    evaluates = request["phase"] == "evaluation" and "evaluation" in options
    blocks = EVAL_BATCH if evaluates else BATCH * (2 if tool in ("dpo", "reward") else 1)
    rows, size, module = blocks * LENGTH, request["size_bytes"], request["module"]
    code = [line.strip() for line in text.splitlines() if line.startswith("    ") and set(line) - set(" ^~")][-1]
    if "reducer = dist.Reducer(" in text.rsplit("Traceback", 1)[1]:
        return "bucket of gradients"
    if ("_fsdp_collectives.py" in text or "_fsdp_param.py" in text) and request["phase"] != "load":
        return "gathered|gradients of a layer"
    if code.startswith("mm_buf ="):
        return "chunk of the logits"
    if "weight[start:end]" in code:
        return "chunk of lm_head"
    if "torch.zeros(weight.shape" in code or "grad_weight" in code:
        return "gradient of a weight"
    if "torch.zeros(hidden.shape" in code:
        return "gradient of the hidden states"
    if "masking_utils" in text.split("Traceback")[-1].rsplit("  File ", 1)[1]:
        return "attention mask"
    if "experts" in module and request["phase"] != "load":
        wide = rows * config.num_experts_per_tok * config.intermediate_size
        return (
            "activations of the experts"
            if size in (wide * 2, wide * 4, wide * 8)
            else "hidden states sent to the experts"
        )
    matrices = {config.hidden_size * n * 2 for n in (config.hidden_size, config.intermediate_size, config.vocab_size)}
    if request["operation"].startswith("aten._to_copy") and "bf16" in options and size in matrices and "proj" in module:
        return (
            "copy of a weight in 16 bits"
            if size != rows * config.hidden_size * 2
            else "copy of a weight in 16 bits|hidden"
        )
    run = Run(kind, dtype="bf16" if HALF & set(options) else "fp32", length=LENGTH, batch=blocks, evaluates=0)
    phase = "forward" if request["phase"] == "evaluation" else request["phase"]
    return truth_of_a_step(run, config, Request(**{**request, "phase": phase}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "apart_bytes"),
    [
        ("transformers half", 40_000),
        ("transformers half lora", 600_000),
        ("sft half", 140_000),
        ("dpo lora half", 500_000),
        ("kto half", 2_000_000),
        ("gkd half", 600_000),
        ("reward half", 70_000),
        ("grpo half", 140_000),
        ("transformers half ddp", 20_000),
        ("transformers half lora fsdp", 600_000),
        pytest.param("dpo half", 2_000_000, marks=pytest.mark.full_length),
        pytest.param("kto lora half", 500_000, marks=pytest.mark.full_length),
        pytest.param("sft half fsdp", 2_000_000, marks=pytest.mark.full_length),
    ],
)
def test_the_step_that_stands_for_a_tool_holds_what_the_tool_holds(model_folder, kind, apart_bytes):
    """Of gigabytes; on a GPU with CUDA's attention. peft's adapters are in fp32, and what goes into each is cast and kept."""
    peak_bytes = asked_of_tool("peak", kind, "llama", model_folder)
    given = told(kind, "llama", model_folder, 0)[0] | {"gpu": "1000GiB"}
    text = started(kind) + OF_TRL.get(kind.split()[0], "")
    answer = explain(text, given, tool="trainer" if "transformers" in kind else "trl", budget_s=0.5)
    of_cublas = (
        2 * answer.run.target.workspace_bytes
    )  # of forward's and backward's thread, which the script's GPU leaves out
    assert abs(answer.without_limit.allocated_bytes - of_cublas - peak_bytes) <= apart_bytes


IN_THE_SCRIPT = {
    "dtype": dict.fromkeys(("bf16", "fp16", "auto"), "half"),
    "trainable": {"lora": "lora"},
    "gradient_checkpointing": {True: "checkpointing"},
}
NO_MORE = {("mixed_precision", None): "bf16", ("attention", "sdpa"): "eager"}
ARGUMENTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def with_cure(kind, cure):
    """Return the kind and the changed arguments of the script with ``cure``; ``None`` where it has no such change."""
    changes = {}
    for name, value in cure.settings.items():
        if name in ARGUMENTS:
            changes[name] = value
        elif name == "optimizer" and value in ("adamw_8bit", "adafactor"):
            changes["optim"] = value
        elif value in IN_THE_SCRIPT.get(name, ()):
            kind += f" {IN_THE_SCRIPT[name][value]}"
        elif (name, value) in NO_MORE:
            kind = kind.replace(f" {NO_MORE[name, value]}", "")
        elif name != "lora_r":
            return None
    return kind, changes


def examine(kind, model, folder, error):
    """Return (named rightly, what was true, what was said, whether the first cure that the script can try cures) of one error."""
    given, answer = explained(kind, model, folder, error)
    expected = truth(kind, error["request"], NOT_ON_A_GPU.sub("", error["text"]), resolve(given["model"]).config)
    first = answer.suspects[0] if answer.suspects else None
    said = None if first is None else (first.tensor.kind, first.size_bytes)
    right = (
        first is not None and bool(re.match(expected, first.tensor.kind)) and said[1] == error["request"]["size_bytes"]
    )
    cures = answer.cures.tried if answer.cures else ()
    for cure in cures:
        assert cure.saved_bytes > 0, cure.title
        assert not cure.settings.items() & given.items(), cure.title
    fitting = [cure for cure in cures if cure.fits]
    changed = (with_cure(kind, cure) for cure in fitting if cure.config is None)
    cured = next((one for one in changed if one is not None), None)
    still = None if cured is None else errors_of(cured[0], model, folder, 1, cured[1], error["capacity"])
    return right, (expected, error["request"]), said, None if still is None else not still


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kind", "model", "most"),
    [
        pytest.param(*KINDS[8], 3, marks=pytest.mark.slow, id="three"),
        *(pytest.param(*kind, 6, marks=pytest.mark.full_length, id=", ".join(kind)) for kind in KINDS),
    ],
)
def test_what_asked_is_named(model_folder, record_property, kind, model, most):
    outcomes = []
    for error in errors_of(kind, model, model_folder, most):
        if error["request"]["size_bytes"] > 2 << 20:  # smaller ones share segments, whose size says nothing
            outcomes.append((error["capacity"], *examine(kind, model, model_folder, error)))
            print(outcomes[-1], flush=True)
    wrong = [outcome for outcome in outcomes if not outcome[1]]
    cured = [outcome[4] for outcome in outcomes if outcome[4] is not None]
    for name, count in (("errors", len(outcomes)), ("named", len(outcomes) - len(wrong)), ("cured", sum(cured))):
        record_property(name, count)
    assert len(outcomes) >= most - 2
    assert not wrong
    assert all(cured), [outcome for outcome in outcomes if outcome[4] is False]
