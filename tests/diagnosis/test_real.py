"""Real out-of-memory errors: transformers' own training step on virtual GPUs that are too small, explained and cured.

The step here is written for the tests and shares nothing with the rehearsal. What truly asked is known from the device: the
operator, its module and its size.
"""

import math
import re
import traceback
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from tests.diagnosis.tool_errors import capacities
from torch.utils.checkpoint import checkpoint

from oomless.diagnosis.explain import Listener, explain
from oomless.diagnosis.tensors import TOGETHER, Dimensions, matrices
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve, resolve_for_plan
from oomless.ops.linear_cross_entropy import linear_cross_entropy
from oomless.planning.rehearse import play
from oomless.training.assemble import assemble

SHAPE = dict(
    vocab_size=16384, hidden_size=128, intermediate_size=2048, num_hidden_layers=2, max_position_embeddings=2048
)
MATRICES = dict(vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8)


@dataclass(frozen=True)
class Run:
    """How the user trains."""

    name: str
    architecture: str = "llama"
    tied: bool = False
    dtype: str = "fp32"
    length: int = 512
    batch: int = 1
    attention: str = "sdpa"
    optimizer: str = "adamw"
    foreach: bool = False
    checkpointing: bool = False
    evaluates: int = 0
    head_alone: bool = False
    fused_loss: bool = False
    shape: dict = field(default_factory=dict, hash=False)


RUNS = [
    Run("full, fp32"),
    Run("full, bf16", dtype="bf16", length=1024),
    Run("two blocks", batch=2),
    Run("tied", tied=True, length=384),
    Run("eager attention", attention="eager", length=1024, shape=dict(vocab_size=4096, intermediate_size=256)),
    Run("eager attention, bf16", attention="eager", dtype="bf16", length=1024, shape=dict(vocab_size=4096, intermediate_size=256)),
    Run("foreach", foreach=True, length=256),
    Run("checkpointing", checkpointing=True, batch=4, shape=dict(num_hidden_layers=4)),
    Run("large vocabulary", length=256, shape=dict(vocab_size=65536, hidden_size=64)),
    Run("evaluation", evaluates=8, length=256),
    Run("wide MLP", shape=dict(vocab_size=4096, intermediate_size=16384), length=768),
    Run("gemma", architecture="gemma", tied=True, batch=2),
    Run("qwen2, bf16", architecture="qwen2", dtype="bf16", batch=2, tied=True),
    Run("lm_head alone", head_alone=True),
    Run("large matrices", length=64, shape=MATRICES),
    Run("large matrices, foreach", length=64, foreach=True, shape=MATRICES),
    Run("large matrices, bf16", length=64, dtype="bf16", shape=MATRICES | dict(intermediate_size=8192)),
    Run("many tokens", length=2048, batch=8, shape=dict(vocab_size=512, hidden_size=256, intermediate_size=512)),
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(run, folder, device):
    """Two steps as a script with transformers runs them, then an evaluation."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.optimization import Adafactor

    config = AutoConfig.from_pretrained(folder)
    with device.phase("load"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[run.dtype], attn_implementation=run.attention)
        if run.head_alone:
            model.requires_grad_(False)
            model.lm_head.requires_grad_(True)
        if run.checkpointing:
            model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    if run.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, **({"foreach": True} if run.foreach else {"fused": True}))
    elif run.optimizer == "adafactor":
        optimizer = Adafactor(trained, lr=1e-4, scale_parameter=False, relative_step=False)
    else:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
    device.watch(model, optimizer)
    model.train()
    tokens = torch.randint(0, 512, (run.batch, run.length))
    for _ in range(2):
        with device.phase("forward"):
            if run.fused_loss:
                hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
                loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens.flatten())
            else:
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        with device.phase("backward"):
            loss.backward()
        del loss
        with device.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    if run.evaluates:
        with device.phase("evaluation"):
            evaluate(model, run)


def evaluate(model, run):
    model.eval()
    tokens = torch.randint(0, 512, (run.evaluates, run.length))
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss


def attempt(run, folder, capacity=1 << 40, settings=None):
    """Return the device and the text of the error that ended the run there, if one did."""
    device = VirtualGPU(capacity, record_history=True, settings=settings)
    text = None
    with device.active():
        try:
            train(run, folder, device)
        except torch.OutOfMemoryError as error:
            text = "".join(traceback.format_exception(error))
            error.__traceback__ = None
    return device, text


def truth(run, config, request):
    """Name what truly asked, from the operator, its phase and its size: a pattern for the kind."""
    rows, item = run.batch * run.length, 4 if run.dtype == "fp32" else 2
    blocks = rows if request.phase != "evaluation" else run.evaluates * run.length
    vocabulary, size, operation = config.vocab_size, request.size_bytes, request.operation
    if request.phase == "load":
        return "weights in"
    if request.phase == "optimizer":
        return "optimizer state" if "zeros_like" in operation else "temporary of the optimizer"
    heads, backward = config.num_attention_heads, request.phase == "backward"
    scores = run.batch * heads * run.length**2
    if size in (scores * item, scores * 4) and "attn" in request.module:
        return "gradient of the attention scores" if backward else "attention scores"
    of_logits = ("softmax", "nll_loss", "_to_copy", "_unsafe_view")
    if size in (blocks * vocabulary * 4, blocks * vocabulary * 2) and (
        any(name in operation for name in of_logits) or "lm_head" in request.module
    ):
        if "_log_softmax_backward" in operation or "nll_loss_backward" in operation:
            return "gradient of the logits"
        if "_log_softmax" in operation:
            return "log-probabilities"
        if "_to_copy" in operation and backward:
            return "gradient of the logits in 16 bits"
        return "logits in fp32" if "_to_copy" in operation else "logits"
    weights = {config.intermediate_size * config.hidden_size, config.hidden_size**2, vocabulary * config.hidden_size}
    if backward and operation.startswith(("aten.mm", "aten.embedding_dense")) and size in {n * item for n in weights}:
        return "gradient of a weight"
    kind = "queries|keys or values|hidden states" if "attn" in request.module else "hidden states"
    wide = blocks * config.intermediate_size
    if size in (wide * item, wide * 4) and "mlp" in request.module:
        kind = "MLP activations"
    return f"gradient of the ({kind})" if backward else f"({kind})"


def shortened(text):
    """A traceback as a GPU's would be: without the frames of the device that stands in for one."""
    return re.sub(r'  File "[^"]*/oomless/memory/[^"]*", line \d+, in \S+\n(    .*\n)+?(?=  File|\S)', "", text)


def given(run, folder, capacity, *, length_known=True):
    settings = {
        "model": str(folder),
        "gpu": f"virtual:{capacity}B",
        "per_device_train_batch_size": run.batch,
        "dtype": run.dtype,
        "max_grad_norm": 0.0,
    }
    if length_known:
        settings["max_seq_length"] = run.length
    if run.checkpointing:
        settings["gradient_checkpointing"] = True
    if run.evaluates:
        settings["per_device_eval_batch_size"] = run.evaluates
    if run.head_alone:
        settings["trainable"] = "lm_head"
    return settings


AS_HERE = {
    "per_device_train_batch_size": "batch", "per_device_eval_batch_size": "evaluates", "max_seq_length": "length",
    "gradient_checkpointing": "checkpointing", "optimizer": "optimizer", "attention": "attention", "fused_loss": "fused_loss",
}  # fmt: skip


def cured(run, folder, capacity, cure):
    """Run the same training with the cure, for real; return whether it gets through, None where this step has no such change."""
    if cure.config is not None:
        device = VirtualGPU(capacity)
        with device.active():
            try:
                parts = assemble(resolve(str(folder)), cure.config, device, fill=True)
                play(parts, cure.config)
            except torch.OutOfMemoryError:
                return False
        return True
    changes = {
        name: value
        for name, value in cure.settings.items()
        if name not in ("gradient_accumulation_steps", "mixed_precision")
    }
    if changes.pop("dtype", None) is not None:
        run = replace(run, dtype="bf16")
    if changes.keys() - AS_HERE.keys():
        return None
    changed = replace(run, **{AS_HERE[name]: value for name, value in changes.items()})
    settings = AllocatorSettings(expandable_segments=True) if "expandable" in cure.changes else None
    return attempt(changed, folder, capacity, settings)[1] is None


def examine(run, folder, capacity, *, length_known=True):
    """Return (named rightly, what was true, what was said, whether the first cure cures) of one real error."""
    device, text = attempt(run, folder, capacity)
    if text is None:
        return None  # cached memory that was given back was enough
    request = device.profile().failures[-1]
    answer = explain(
        shortened(text), given(run, folder, capacity, length_known=length_known), tool="torch", attention=run.attention
    )
    config = resolve(str(folder)).config
    expected = truth(run, config, request)
    first = answer.suspects[0] if answer.suspects else None
    said = None if first is None else (first.tensor.kind, first.size_bytes)
    right = first is not None and bool(re.match(expected, first.tensor.kind)) and first.size_bytes == request.size_bytes
    for cure in answer.cures.tried:
        assert cure.saved_bytes > 0, cure.title
        already = given(run, folder, capacity, length_known=length_known) | {"attention": run.attention}
        assert not cure.settings.items() & already.items(), cure.title
    fitting = answer.cures.fitting
    return right, (expected, request), said, cured(run, folder, capacity, fitting[0]) if fitting else None


@pytest.fixture(scope="module")
def folder_of(make_checkpoint):
    def folder(run):
        return make_checkpoint(run.architecture, tied=run.tied, **{**SHAPE, **run.shape})

    return folder


@pytest.mark.parametrize("run", [RUNS[0], RUNS[1], RUNS[4]], ids=lambda run: run.name)
def test_a_real_error_is_named_and_cured(folder_of, run):
    folder = folder_of(run)
    (capacity,) = capacities(attempt(run, folder)[0], 1)
    right, expected, said, cures = examine(run, folder, capacity)
    assert right, (expected, said)
    assert cures is not False


def test_what_asked_is_told_before_more_is_rehearsed(folder_of):
    heard = []

    class Ear(Listener):
        def attributed(self, run, suspects):
            heard.append(suspects[0].tensor.kind)

    given = {"model": str(folder_of(RUNS[0])), "gpu": "virtual:70MiB", "dtype": "fp32", "max_seq_length": 512}
    explain("CUDA out of memory. Tried to allocate 32.00 MiB.", given, budget_s=0.5, listener=Ear(heard.append))
    assert heard[0] == "the run as it was"
    assert "logits" in heard[1]
    assert heard[2] == "the run as it was, without a limit"


@pytest.mark.parametrize(
    "name",
    ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3", "zai-org/GLM-4.5-Air"],
)  # fmt: skip
def test_the_matrices_that_the_reading_knows_are_those_of_the_model(name):
    spec = resolve_for_plan(name)
    real = {shape for _, shape in matrices(spec)}
    known = Dimensions.of_config(spec.config).matrices()
    not_fused = (TOGETHER, "mlp.experts.gate_proj or up_proj of one")  # as older versions have them
    assert not [(of, shape) for of, shape in known if shape not in real and of not in not_fused]
    assert max(real, key=math.prod) == known[0][1]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("runs", "sizes"),
    [
        pytest.param([RUNS[n] for n in (3, 7, 9, 15)], 2, marks=pytest.mark.slow, id="some"),
        pytest.param(RUNS, 4, marks=pytest.mark.full_length, id="all"),
    ],
)
def test_real_errors_of_every_kind(folder_of, record_property, runs, sizes):
    outcomes = []
    for run in runs:
        folder = folder_of(run)
        for number, capacity in enumerate(capacities(attempt(run, folder)[0], 4 if run.evaluates else sizes)):
            outcome = examine(run, folder, capacity, length_known=number != sizes - 1)
            if outcome is not None:
                outcomes.append((run.name, capacity, *outcome))
                print(outcomes[-1], flush=True)
    wrong = [outcome for outcome in outcomes if not outcome[2]]
    cured_ones = [outcome[5] for outcome in outcomes if outcome[5] is not None]
    for name, count in (("errors", len(outcomes)), ("named", len(outcomes) - len(wrong)), ("cured", sum(cured_ones))):
        record_property(name, count)
    assert len(outcomes) >= 0.8 * len(runs) * sizes
    assert len(wrong) <= 0.05 * len(outcomes), wrong
    assert all(cured_ones)
    assert len(cured_ones) >= 0.6 * len(outcomes)
    assert {outcome[3][1].phase for outcome in outcomes} >= {"load", "forward", "backward", "optimizer", "evaluation"}
