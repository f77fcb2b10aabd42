"""Any two techniques together train what plain transformers and torch train; pairs that cannot are refused, with the reason.

The plain path is transformers' model, torch's cross-entropy, clipping and (AdamW, SGD) optimizers. What another optimizer does
to a given gradient is the business of ``tests/optim``; here it takes the plain path's gradients.
"""

import dataclasses
import itertools

import peft
import pytest
import torch
from tests.blank import blank_batch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from oomless import optim
from oomless.config import DataSource, TrainConfig
from oomless.config.memory import Memory
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.techniques.frozen_layers import frozen_layers
from oomless.techniques.trained_rows import parse
from oomless.training import rates
from oomless.training.assemble import assemble, parameter_groups

LENGTH, BLOCKS, STEPS, VOCABULARY = 24, 2, 2, 1024
CHECKPOINTING = {"gradient_checkpointing": True}
EMBEDDINGS = {"trainable": "lm_head+embed_tokens"}
# Where a gradient is next to nothing, a large epsilon keeps Adam and its kin from making an update of its last bits.
CALM = {"learning_rate": 1e-2, "adam_epsilon": 1e-3}
TECHNIQUES = {
    "loss in chunks": {"loss_chunk_bytes": 1 << 16},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05},
    "checkpointing": CHECKPOINTING,
    "two layers": CHECKPOINTING | {"checkpointed_layers": 2},
    "offloaded activations": CHECKPOINTING | {"offload_activations": True},
    "cheap recomputation": {"cheap_recompute": True},
    "tiles": {"mlp_tiles": 3},
    "in backward": {"optimizer_in_backward": True},
    "offloaded optimizer": {"offload_optimizer": True},
    "embeddings and head": EMBEDDINGS,
    "two layers train": {"trainable": "model.layers.1.*+model.layers.2.*+model.embed_tokens"},
    "rows": EMBEDDINGS | {"trainable_rows": "0-99,500-1023"},
    "lora": {"trainable": "lora+lm_head+embed_tokens", "lora_r": 4},
    "streamed layers": EMBEDDINGS | {"stream_frozen": True},
    "nf4": EMBEDDINGS | {"quantization": "nf4"},
    "int8": EMBEDDINGS | {"quantization": "int8"},
    "masters": {"dtype": "fp16", "weight_precision": "master"},
    "correction": {"dtype": "bf16", "weight_precision": "correction"},
    "stochastic rounding": {"dtype": "fp16", "weight_precision": "stochastic"},
    "wide residual": {"dtype": "fp16", "fp32_residual": True},
    "AdamW": {"optimizer": "adamw"} | CALM,
    "8-bit Adam": {"optimizer": "adamw_8bit"} | CALM,
    "Adafactor": {"optimizer": "adafactor", "learning_rate": 1e-2},
    "APOLLO": {"optimizer": "apollo"} | CALM,
    "APOLLO-Mini": {"optimizer": "apollo_mini"} | CALM,
    "GaLore": {"optimizer": "galore"} | CALM,
    "Muon": {"optimizer": "muon"} | CALM,
    "plain updates": {"kernels": "plain"},
}
REFUSED = {
    ("clipping", "in backward"): "known only after the first weights",
    ("streamed layers", "nf4"): "stream_frozen cannot be joined with quantization",
    ("streamed layers", "int8"): "stream_frozen cannot be joined with quantization",
    ("offloaded optimizer", "Adafactor"): "Adafactor keeps nothing of these parameters that could lie on the host",
    ("offloaded optimizer", "rows"): "SGD keeps nothing of these parameters that could lie on the host",
}
# Of the way that a weight goes; eight-bit codes and sixteen-bit weights round it.
TOLERANCE = {"adamw_8bit": 0.02, "fp16": 0.1, "bf16": 0.1}
MODELS = {"llama": True, "gemma": True, "qwen2": False}


def together(pair):
    """The settings of both, which may train the parts of both; ``None`` where one setting would need two values."""
    first, second = (TECHNIQUES[name] for name in pair)
    if any(second.get(key, value) != value for key, value in first.items() if key != "trainable"):
        return None
    parts = [part for one in (first, second) for part in one.get("trainable", "").split("+") if part]
    joined = {"trainable": "+".join(dict.fromkeys(parts))} if parts else {}
    return first | second | joined


PAIRS = [pair for pair in itertools.combinations(TECHNIQUES, 2) if pair not in REFUSED and together(pair) is not None]
# What a pair of these two kinds does hangs on no architecture.
SIXTEEN_BITS = {"masters", "correction", "stochastic rounding", "wide residual"}
OPTIMIZERS = {name for name, settings in TECHNIQUES.items() if {"optimizer", "kernels"} & settings.keys()}


def cases():
    """Each pair with one architecture, in turn, and where slow tests run with the other two."""
    for number, pair in enumerate(PAIRS):
        for place, name in enumerate(MODELS):
            first = number % 3 == place
            if first or not (SIXTEEN_BITS | OPTIMIZERS) & set(pair):
                marks = [] if first else [pytest.mark.slow]
                yield pytest.param(pair, name, id=f"{', '.join(pair)}-{name}", marks=marks)


def configure(folder, settings):
    defaults = {"dtype": "fp32", "optimizer": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": BLOCKS}
    defaults["weight_decay"] = 0.0
    return TrainConfig(
        model=str(folder),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=LENGTH,
        **(defaults | ({} if settings.get("optimizer_in_backward") else {"max_grad_norm": 0.0}) | settings),
    )


def blocks():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (STEPS, BLOCKS, LENGTH + 1), generator=generator)


def ours(folder, config):
    """Return the losses of the steps, weights before them, how far each went, and frozen weights as they were rounded."""
    device = VirtualGPU(1 << 30)
    losses = []
    with device.active():
        torch.manual_seed(0)
        parts = assemble(resolve(str(folder)), config, device, fill=True)
        start = trained(parts.model)
        for step in blocks():
            batches = []
            for rows in step.split(config.per_device_train_batch_size):
                batch = blank_batch(len(rows), (LENGTH,), device)
                positions = torch.arange(LENGTH).expand(len(rows), -1)
                batches.append(
                    dataclasses.replace(batch, input_ids=rows[:, :-1], labels=rows[:, 1:], position_ids=positions)
                )
            losses.append(float(parts.step.run(batches).loss))
        rounded = {f"{name}.weight": layer.unpack(torch.float32) for name, layer in frozen_layers(parts.model)}
        return losses, start, moved(parts.model, start), rounded


def trained(model):
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(model, start):
    return {name: weight - start[name] for name, weight in trained(model).items()}


PLAIN = {}


def plain(folder, config, start, rounded):
    """Return losses and ways of the plain path, made once for all pairs that it is the same for."""
    what = (config.trainable, config.trainable_rows, config.quantization, config.optimizer, config.max_grad_norm)
    begins = config.dtype if config.lora_r or rounded else None  # adapters begin rounded, and so are frozen weights
    key = (folder, *what, bool(rounded), begins)
    if key not in PLAIN:
        PLAIN[key] = plain_path(folder, config, start, rounded)
    return PLAIN[key]


def plain_path(folder, config, begun, rounded):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in rounded.items():
            model.get_parameter(name).copy_(weight)
    if config.lora_r:
        targets = [name.partition(".lora_A")[0] for name in begun if ".lora_A" in name]
        settings = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "target_modules": targets}
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    ids = parse(config.trainable_rows, VOCABULARY) if config.trainable_rows else None
    owners = [model.get_submodule(n.rpartition(".")[0]) for n in sorted(begun) if n.endswith(".trained_rows")]
    for module in owners:
        module.trained_rows = nn.Parameter(module.weight.detach()[ids])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in begun)
        if "lora_A" in name:
            parameter.data.copy_(begun[name])
    optimizer = plain_optimizer(model, config)
    start, losses = trained(model), []
    for module in owners:
        module.weight.requires_grad_()
    for step in blocks():
        logits = model(step[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), step[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        for module in owners:
            module.trained_rows.grad = module.weight.grad[ids]
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], config.max_grad_norm)
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            for module in owners:
                module.weight[ids] = module.trained_rows
    for module in owners:
        module.weight.requires_grad_(False)
    return losses, moved(model, start)


def plain_optimizer(model, config):
    config = rates.resolved(config, model.config)
    groups = parameter_groups(model, dataclasses.replace(config, weight_precision=None))
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    calm = {} if config.adam_epsilon is None else {"eps": config.adam_epsilon}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **calm)
    return optim.build(config.optimizer, groups, lr=config.learning_rate, **calm)


@pytest.mark.parametrize(("pair", "architecture"), list(cases()))
def test_two_together_are_the_plain_path(make_checkpoint, pair, architecture):
    tied = MODELS[architecture]
    folder = make_checkpoint(architecture, tied=tied, num_hidden_layers=3, vocab_size=VOCABULARY, attention_dropout=0.0)
    settings = together(pair)
    if tied and settings.get("trainable", "").endswith("model.embed_tokens"):
        settings = settings | {"tied_weights": "shared"}
    config = configure(folder, settings)
    losses, start, ways, rounded = ours(folder, config)
    expected, plain_ways = plain(folder, config, start, rounded)
    tolerance = TOLERANCE.get(config.dtype, TOLERANCE.get(config.optimizer, 1e-4))
    rounding = {"bf16": 2**-8, "fp16": 2**-10}.get(config.dtype, 1e-7)
    assert losses == pytest.approx(expected, rel=max(1e-5, tolerance / 20))
    assert abs(losses[0] - losses[1]) > 1e-4
    assert ways.keys() == plain_ways.keys()
    for name, way in plain_ways.items():
        if not name.endswith("k_proj.bias"):  # it adds the same to all scores of a query, and its gradient is nothing
            assert (ways[name] - way).norm() <= tolerance * way.norm() + rounding * start[name].norm(), name


def test_every_setting_of_memory_is_among_the_techniques():
    """The keys below the config's heading "Precision and memory", and those above it that decide what is held."""
    # test_experts.py, test_embeddings_on_host.py, test_several_gpus.py
    elsewhere = {"gpu", "experts_on_host", "embeddings_on_host", "sharding"}
    memory = {field.name for field in dataclasses.fields(Memory)} - elsewhere
    memory |= {"trainable", "trainable_rows", "lora_r", "optimizer", "max_grad_norm", "gradient_accumulation_steps"}
    assert memory <= {key for settings in TECHNIQUES.values() for key in settings}


@pytest.mark.parametrize("pair", REFUSED, ids=", ".join)
def test_a_pair_that_cannot_be_is_refused_with_the_reason(make_checkpoint, pair):
    folder = make_checkpoint("qwen2")
    settings = TECHNIQUES[pair[0]] | TECHNIQUES[pair[1]]
    if "trainable_rows" in settings:
        settings = settings | {"trainable_rows": "0-99"}
    device = VirtualGPU(1 << 30)
    with device.active(), pytest.raises(ConfigError, match=REFUSED[pair]):
        assemble(resolve(str(folder)), configure(folder, settings), device, fill=True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "known only after the first weights"),
        ({"quantization": "nf4", "trainable": "full"}, "freezes none"),
        ({"quantization": "int8", "trainable": "lora", "use_dora": True}, "use_dora needs the norms"),
        ({"stream_frozen": True, "trainable": "full"}, "freezes none"),
        ({"stream_frozen": True, "trainable": "lora", "use_dora": True}, "cannot be joined"),
        ({"checkpointed_layers": 2}, "no effect without gradient_checkpointing"),
        ({"offload_activations": True}, "no effect without gradient_checkpointing"),
        *(({"weight_precision": way, "dtype": "fp32"}, "no effect on fp32") for way in ("stochastic", "correction")),
        ({"lora_r": 4, "trainable": "lm_head"}, "lora_r belongs to LoRA"),
        ({"momentum": 0.9, "optimizer": "adafactor"}, "momentum belongs to"),
        ({"on_bad_loss": "skip", "optimizer_in_backward": True}, "needs the whole gradient before the first update"),
    ],
    ids=str,
)
def test_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        TrainConfig.from_mapping({"model": "x", "data": ["x"], "output_dir": "x", **settings})
