"""Train only some parts.

Saves: gradients and optimizer state of everything else, and the activations below the lowest trainable layer, because
autograd keeps nothing for what needs no gradient. Costs: what the frozen parts could have learnt.

A *tied* model (Llama 3.2 1B, Gemma) has one matrix as ``embed_tokens`` and ``lm_head``. "Train lm_head but not
embed_tokens" is then no setting of flags but a choice, which the user makes with ``tied_weights``:

``shared``  the one matrix is trained. Its gradient is the true one, from both of its uses, so backward runs through the
            whole model down to the embedding.
``untied``  lm_head becomes a matrix of its own: vocabulary x width more weights on the device and in the checkpoint,
            whose config.json then says ``tie_word_embeddings: false``. With lm_head alone backward ends at the head.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from oomless.config import TrainConfig, adapter
from oomless.errors import ConfigError, nearest
from oomless.memory.device import Device
from oomless.techniques import frozen_layers, lora, trained_rows
from oomless.techniques.kinds import body_of, kind_in, kind_of
from oomless.units import format_bytes

NAMED_PARTS = ("full", "lora", "lm_head", "embed_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainableRow:
    """One line of the parameter table: a module kind and what of it trains."""

    name: str
    parameters: int
    trainable: int
    dtype: str


def is_tied(model: Any) -> bool:
    """Return whether the model's input and output embeddings are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def apply(model: Any, config: TrainConfig, device: Device, unreached: Collection[str] = ()) -> None:
    """Make exactly the parts that ``config.trainable`` names require gradients, untying and adding LoRA as asked.

    Args:
        model: the model.
        config: the run's.
        device: where what is added goes.
        unreached: kinds of parameters that the loss does not reach (``models.form.unreached``): they cannot train.

    Raises:
        ConfigError: a part names nothing in the model, or nothing that can train, or the choice for a tied matrix is missing or
            moot.
    """
    parts = config.trainable_parts
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = trained_modules(model, config)
    parameters = {id(parameter) for module in modules for parameter in module.parameters()}
    if is_tied(model):
        _decide_tied(model, config, device, modules)
        if config.tied_weights == "untied" and ("lm_head" in parts or "full" in parts):
            parameters.add(id(head.weight))
        if config.tied_weights == "untied" and not _covers(embedding, modules):
            parameters.discard(id(embedding.weight))
    elif config.tied_weights is not None:
        raise ConfigError(
            "tied_weights is for models whose embed_tokens and lm_head are one matrix; this one has two: remove it"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in parameters and kind_in(model, name) not in unreached)
    if config.trainable_rows is not None:
        trained_rows.apply(model, config.trainable_rows, device)
    if "lora" in parts:
        if config.tied_weights == "untied" and len(trained_rows.owners(model)) == 2:
            raise ConfigError(
                "trainable_rows beside LoRA cannot train embed_tokens and lm_head apart where they were one matrix, for which "
                "peft keeps one set of rows: choose tied_weights shared, train one of the two, or leave trainable_rows out"
            )
        lora.inject(model, config, device, unreached)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"trainable: {config.trainable!r} leaves nothing to train that the loss reaches")


def trained_modules(model: Any, config: TrainConfig) -> list[nn.Module]:
    """Return the modules that ``config.trainable`` names, each with everything inside it; LoRA's come later.

    Raises:
        ConfigError: a part names nothing in the model.
    """
    wanted = {
        "full": [model],
        "lm_head": [model.get_output_embeddings()],
        "embed_tokens": [model.get_input_embeddings()],
        "lora": [],
    }
    return [
        module
        for part in config.trainable_parts
        for module in (wanted[part] if part in wanted else _matching(model, part))
    ]


def _matching(model: Any, pattern: str) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if name and fnmatchcase(name, pattern)]
    if not any(True for module in found for _ in module.parameters()):
        examples = [name for name, module in model.named_modules() if name and list(module.parameters(recurse=False))]
        raise ConfigError(
            f"trainable: {pattern!r} is neither {', '.join(NAMED_PARTS)} nor a pattern that matches a module of this "
            f"model; its modules are named like {', '.join(examples[:: max(1, len(examples) // 4)][:4])}."
            + nearest(pattern, NAMED_PARTS)
        )
    return found


def _covers(target: nn.Module, modules: list[nn.Module]) -> bool:
    """Whether ``target`` is one of ``modules`` or inside one of them."""
    return any(child is target for module in modules for child in module.modules())


def _decide_tied(model: Any, config: TrainConfig, device: Device, modules: list[nn.Module]) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wants_embedding, wants_head = _covers(embedding, modules), _covers(head, modules)
    weight = embedding.weight
    more_bytes = weight.numel() * weight.element_size()
    if not (wants_embedding or wants_head):
        if config.tied_weights is not None:
            raise ConfigError("tied_weights has no effect: neither embed_tokens nor lm_head is trained; remove it")
        return
    rows_of_both = config.trainable_rows is not None and adapter.folder_of(config.model) is not None  # as peft has them
    if rows_of_both and config.tied_weights == "untied":
        raise ConfigError(
            "the adapter that is the model trains rows of embed_tokens and lm_head as one matrix, and goes on so: leave tied_weights out",
            "tied_weights",
        )
    if wants_embedding != wants_head and config.tied_weights is None and not rows_of_both:
        part = "lm_head" if wants_head else "embed_tokens"
        reach = "ends at the head" if wants_head else "runs through the whole model, as with shared"
        raise ConfigError(
            f"this model's embed_tokens and lm_head are one matrix ({weight.shape[0]} x {weight.shape[1]}), so "
            f"training {part} alone needs a choice. tied_weights: shared trains the one matrix, from both of its uses; backward "
            f"runs through the whole model. tied_weights: untied gives lm_head a matrix of its own: "
            f"{format_bytes(more_bytes)} more weights, and backward {reach}."
        )
    if config.tied_weights == "untied":
        untie(model, device)


def untie(model: Any, device: Device) -> None:
    """Give ``lm_head`` its own copy of the shared matrix and say so in the model's config."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    device.label([head.weight], "weights")
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def table(model: Any) -> list[TrainableRow]:
    """Return the parameter table: the model's parameters by kind of module, layers taken together, tied ones once."""
    rows: dict[str, list[Any]] = {}
    found = [
        (name, parameter.numel(), parameter.requires_grad, str(parameter.dtype).removeprefix("torch."))
        for name, parameter in model.named_parameters()
    ]
    for name, layer in frozen_layers.frozen_weights(model).items():
        found.append((name, math.prod(layer.shape), False, layer.form))
    for name, count, trains, dtype in found:
        row = rows.setdefault(kind_of(name), [0, 0, dtype])
        row[0] += count
        row[1] += count if trains else 0
    return [
        TrainableRow(name=kind, parameters=total, trainable=trains, dtype=dtype)
        for kind, (total, trains, dtype) in rows.items()
    ]


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """Return the distinct matrices of ``embed_tokens`` and ``lm_head``, and what trains in their place."""
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    return matrices + [
        rows for rows, _ in map(trained_rows.rows_of, (model.get_input_embeddings(), head)) if rows is not None
    ]


def body_trains(model: Any) -> bool:
    """Return whether any parameter before ``lm_head`` trains, so that the body's forward must build a graph."""
    body: nn.Module = body_of(model)
    return any(parameter.requires_grad for parameter in body.parameters())
