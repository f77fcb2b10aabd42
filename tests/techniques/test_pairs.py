"""Any two techniques together train what plain transformers and torch train; pairs that cannot are refused, with the reason."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.planning.rehearse import blank_batch
from oomless.techniques.frozen_layers import frozen_layers
from oomless.training.assemble import assemble

LENGTH, BLOCKS, STEPS, VOCABULARY = 24, 2, 2, 1024
CHECKPOINTING = {"gradient_checkpointing": True}
TECHNIQUES = {
    "loss in chunks": {"loss_chunk_bytes": 1 << 16},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "checkpointing": CHECKPOINTING,
    "two layers": CHECKPOINTING | {"checkpointed_layers": 2},
    "offloaded activations": CHECKPOINTING | {"offload_activations": True},
    "cheap recomputation": {"cheap_recompute": True},
    "tiles": {"mlp_tiles": 3},
    "in backward": {"optimizer_in_backward": True},
    "offloaded optimizer": {"offload_optimizer": True},
    "embeddings and head": {"trainable": "lm_head+embed_tokens"},
    "two layers train": {"trainable": "model.layers.2.*+model.layers.3.*+model.embed_tokens"},
    "streamed layers": {"trainable": "lm_head+embed_tokens", "stream_frozen": True},
    "nf4": {"trainable": "lm_head+embed_tokens", "quantization": "nf4"},
}
MODELS = {"llama": True, "gemma": True, "qwen2": False}


def agree(first, second):
    """Whether no setting has two values."""
    return all(second.get(key, value) == value for key, value in first.items())


PAIRS = [
    pair
    for pair in itertools.combinations(TECHNIQUES, 2)
    if pair != ("streamed layers", "nf4")
    and (
        agree(*(TECHNIQUES[name] for name in pair))
        or {"nf4", "streamed layers"} & set(pair)
        and "embeddings and head" in pair
    )
]


def blocks():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (STEPS, BLOCKS, LENGTH + 1), generator=generator)


def ours(folder, settings):
    """Return the losses of the steps, the weights at the end, and the frozen weights as they were rounded."""
    config = TrainConfig(
        model=str(folder),
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=LENGTH,
        **{
            **dict(dtype="fp32", optimizer="sgd", learning_rate=0.5, per_device_train_batch_size=BLOCKS),
            **({} if settings.get("optimizer_in_backward") else {"max_grad_norm": 0.0}),
            **settings,
        },
    )
    device = VirtualGPU(1 << 30)
    losses = []
    with device.active():
        parts = assemble(resolve(str(folder)), config, device, fill=True)
        for step in blocks():
            batches = []
            for rows in step.split(config.per_device_train_batch_size):
                batch = blank_batch(len(rows), (LENGTH,), device)
                positions = torch.arange(LENGTH).expand(len(rows), -1)
                batches.append(
                    dataclasses.replace(batch, input_ids=rows[:, :-1], labels=rows[:, 1:], position_ids=positions)
                )
            losses.append(float(parts.step.run(batches).loss))
        rounded = {f"{name}.weight": layer.stored.unpack(torch.float32) for name, layer in frozen_layers(parts.model)}
        weights = {name: p.detach().clone() for name, p in parts.model.named_parameters() if p.requires_grad}
    return losses, weights, rounded


def plain(folder, trained, rounded):
    """Return losses and weights of transformers' model, torch's cross-entropy and torch's SGD."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in rounded.items():
            model.get_parameter(name).copy_(weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    losses = []
    for step in blocks():
        logits = model(step[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), step[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("pair", PAIRS, ids=", ".join)
def test_two_together_are_the_plain_path(make_checkpoint, pair, architecture):
    folder = make_checkpoint(
        architecture, tied=MODELS[architecture], num_hidden_layers=4, vocab_size=VOCABULARY, attention_dropout=0.0
    )
    settings = TECHNIQUES[pair[0]] | TECHNIQUES[pair[1]]
    if MODELS[architecture] and settings.get("trainable", "").endswith("model.embed_tokens"):
        settings = settings | {"tied_weights": "shared"}
    losses, weights, rounded = ours(folder, settings)
    expected, plain_weights = plain(folder, set(weights), rounded)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert weights.keys() == plain_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain_weights[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "known only after the first weights"),
        ({"quantization": "nf4", "trainable": "full"}, "freezes none"),
        ({"quantization": "int8", "trainable": "lora", "use_dora": True}, "use_dora needs the norms"),
        ({"quantization": "nf4", "stream_frozen": True, "trainable": "lm_head"}, "cannot be joined"),
        ({"stream_frozen": True, "trainable": "full"}, "freezes none"),
        ({"checkpointed_layers": 2}, "no effect without gradient_checkpointing"),
        ({"offload_activations": True}, "no effect without gradient_checkpointing"),
        *(({"weight_precision": way, "dtype": "fp32"}, "no effect on fp32") for way in ("stochastic", "correction")),
        ({"lora_r": 4, "trainable": "lm_head"}, "lora_r belongs to LoRA"),
        ({"momentum": 0.9, "optimizer": "adafactor"}, "momentum belongs to"),
    ],
    ids=str,
)
def test_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        TrainConfig.from_mapping({"model": "x", "data": ["x"], "output_dir": "x", **settings})
