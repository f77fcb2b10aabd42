"""Low-rank adapters (LoRA, Hu et al. 2021; rsLoRA, Kalajdzievski 2023; DoRA, Liu et al. 2024), through peft.

Saves: gradients and optimizer state of the adapted matrices; only r x (in + out) numbers train for each. Costs: a
second, thin matrix product, its activations, and what a low rank cannot express. peft's layers are put into the one
model given, in place; ``lm_head`` and ``embed_tokens`` beside LoRA are trained as they are, or some rows of them
(``trained_rows``), without peft's copies. Stacks of experts have adapters of our own (``expert_adapters``), which peft loads.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oomless.config import TrainConfig
from oomless.config import adapter as settings
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.tracker import import_unbooked
from oomless.techniques import expert_adapters, frozen_layers, sharding, tied_layers, trained_rows
from oomless.techniques.experts import expert_modules, routing_layers
from oomless.techniques.kinds import is_linear, kind_in, owner_using_weight

ADAPTER = "default"


def inject(model: Any, config: TrainConfig, device: Device, unreached: Collection[str] = ()) -> None:
    """Put LoRA layers into ``model``, in the dtype of the matrices that they adapt.

    Args:
        model: its other parameters are frozen, or train as they are.
        config: names the layers.
        device: where the adapters go.
        unreached: kinds of parameters that get no gradient; their layers get no adapter.

    Raises:
        ConfigError: ``lora_target_modules`` matches no linear layer, or names one that cannot have an adapter; or the biases that
            shall train, or be added to, are not there.
    """
    peft = import_unbooked("peft")
    dtype = model.dtype  # before there are adapters, which peft makes in fp32
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    linear, stacks = _targets(model, str(config.lora_target_modules), unreached)
    adapter = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=linear,
        task_type="CAUSAL_LM",
        **settings.beside_settings(config.model),
    )
    if linear:
        with warnings.catch_warnings(), torch.device("meta"):
            # peft asks transformers about gradient checkpointing under a name that transformers is giving up, says how GPT-2's
            # matrices lie, and takes patterns for experts to be of no use.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            warnings.filterwarnings(
                "ignore", "`lora_bias=True` was passed but the targeted layer"
            )  # _require_biases says it
            peft.inject_adapter_in_model(adapter, _Unknown(model), adapter_name=ADAPTER)
        tied_layers.replace(model, {module.get_base_layer(): module for module in _adapted_layers(model)})
    model.peft_config = {ADAPTER: adapter}
    expert_adapters.inject(model, stacks, config, device, adapter, dtype)
    adapter.bias = config.bias  # by which peft itself would train those that the loss does not reach too
    for module in _adapted_layers(model):
        _materialise(module, dtype, device)
    for parameter in [*trained, *_biases(model, config, unreached)]:
        parameter.requires_grad_(True)
    device.label([p for name, p in model.named_parameters() if "lora_" in name], "weights")


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Inside, ``model`` computes what it did before it had adapters."""
    adapted = [module for module in _adapted_layers(model) if not module.disable_adapters]
    for module in adapted:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in adapted:
            module._disable_adapters = False


def _biases(model: Any, config: TrainConfig, unreached: Collection[str]) -> list[nn.Parameter]:
    """Return the biases of ``model``, which has its adapters, that train beside these; check that there are those that ``config`` wants."""
    adapted = {f"{name}.base_layer.bias": module for name, module in model.named_modules() if _is_adapted(module)}
    biases = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and not is_adapter(name) and kind_in(model, name) not in unreached
    }
    lacking = [
        name
        for name, module in adapted.items()
        if name not in biases and config.merge_lora and any(module.lora_bias.values())
    ]
    if lacking:
        raise ConfigError(
            f"the adapter that is the model has biases of its own (lora_bias), and {lacking[0].removesuffix('.base_layer.bias')} has none "
            "that a merged model could add them to: give --merge-lora false, and the final model is the adapter",
            "merge_lora",
        )
    if config.bias == "none":
        return []
    found = [parameter for name, parameter in biases.items() if config.bias == "all" or name in adapted]
    if not found and settings.folder_of(config.model) is None:
        whose = "this model has" if config.bias == "all" else "the layers that LoRA is put into have"
        raise ConfigError(f"bias: {config.bias} has no effect: {whose} no biases; leave it out", "bias")
    return found


class _Unknown(nn.Module):
    """``model`` without its config, by which peft would take linear layers of a mixture for its experts' (``_TAKEN_FOR_EXPERTS``)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = model._modules


_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Names of linear layers that peft, in a mixture, takes for what earlier versions of transformers called the experts'."""


def _materialise(layer: Any, dtype: torch.dtype, device: Device) -> None:
    """Allocate and initialise what peft left on the meta device: A as an nn.Linear's weight, B as zeros."""
    for half in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
        for name, parameter in list(half.named_parameters()):
            setattr(half, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device.torch_device)))
    layer.reset_lora_parameters(ADAPTER, True)
    if layer.use_dora[ADAPTER]:
        # B is zero, so the magnitudes of the sum are those of the matrix.
        inputs = 0 if layer.fan_in_fan_out else 1
        magnitudes = torch.linalg.norm(layer.get_base_layer().weight.detach(), dim=inputs).to(dtype)
        layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(magnitudes)


def initialise_parts(model: Any, device: Device) -> None:
    """Initialise adapters of which each process holds a part: the whole is made as for one process, and cut."""
    expert_adapters.initialise_parts(model, device)
    for module in _adapted_layers(model):
        halves = (module.lora_A[ADAPTER], module.lora_B[ADAPTER])
        parts = [half.weight for half in halves]
        for half in halves:
            shape, dtype = half.weight.shape, half.weight.dtype
            half.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device.torch_device))
        module.reset_lora_parameters(ADAPTER, True)
        for half, part in zip(halves, parts, strict=True):
            with torch.no_grad():
                sharding.fill(part, half.weight)
            half.weight = part


@torch.no_grad()
def merge_parts(model: Any) -> None:
    """Add every adapter into its matrix, in place, where each process holds a part of both: rows, of a matrix that may lie [in, out]."""
    expert_adapters.merge_parts(model)
    for module in _adapted_layers(model):
        a, b = (half.weight.full_tensor().float() for half in (module.lora_A[ADAPTER], module.lora_B[ADAPTER]))
        weight = module.get_base_layer().weight
        own, first = sharding.local(weight), sharding.first_element(weight) // weight.shape[1]
        left, right = (a.t(), b.t()) if module.fan_in_fan_out else (b, a)
        added = left[first : first + len(own)] @ right * module.scaling[ADAPTER]
        own.copy_(own.float() + added)
        _give_bias(module)


def _give_bias(module: Any) -> None:
    """Move the bias that an adapter of peft's ``lora_bias`` has into its layer's, in place: the sum stays."""
    own = module.lora_B[ADAPTER].bias
    if own is not None:
        bias, added = sharding.local(module.get_base_layer().bias), sharding.local(own)
        bias.copy_(bias.float() + added.float() * module.scaling[ADAPTER])
        added.zero_()


def _adapted_layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if _is_adapted(module))


def _is_adapted(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A")


def _targets(model: Any, wanted: str, unreached: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the names of the linear layers, and of the stacks of experts, that ``wanted`` names; routers only by name."""
    head, modules = model.get_output_embeddings(), dict(model.named_modules(remove_duplicate=False))
    obstacles = {
        name: _obstacle(model, name, module, unreached)
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not trains(module)
    }
    linear = {name for name, obstacle in obstacles.items() if obstacle is None}
    stacks = set(expert_adapters.targets(model))
    if wanted == "all-linear":
        found = sorted(linear - routing_layers(model)), sorted(stacks)
        if not any(found):
            raise ConfigError("this model has no linear layer that can have an adapter: train it without lora")
        return found
    endings = [wanted] if _PATTERN.search(wanted) else [ending.strip() for ending in wanted.split(",")]
    for ending in endings:
        named = [name for name in [*obstacles, *stacks] if _is_named(name, ending)]
        if not named:
            known = sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in linear | stacks})
            raise ConfigError(
                f"lora_target_modules: {ending!r} names no linear layer of this model's body; it has {', '.join(known)} "
                "(lm_head and embed_tokens are trained whole: add them to trainable)"
            )
        if obstacle := next((obstacles[name] for name in named if obstacles.get(name)), None):
            raise ConfigError(f"lora_target_modules: {ending!r} cannot have an adapter: {obstacle}; leave it out")
    named = [name for name in sorted(linear | stacks) if any(_is_named(name, ending) for ending in endings)]
    layers = {modules[name] for name in named if name in linear}
    return [name for name in sorted(linear) if modules[name] in layers], [name for name in named if name in stacks]


_PATTERN = re.compile(r"[^\w.,\s-]")
"""What is in an expression, and in no name of a layer."""


def _is_named(name: str, ending: str) -> bool:
    """Return whether ``name`` is a name that ends in ``ending``, or that it, an expression, is all of.

    A stack that is its module's ``weight`` has the module's name.
    """
    name = name.removesuffix(".weight")
    if not _PATTERN.search(ending):
        return name == ending or name.endswith(f".{ending}")
    try:
        return re.fullmatch(ending, name) is not None
    except re.error as error:
        raise ConfigError(f"lora_target_modules: {ending!r} is no regular expression: {error}") from error


def _obstacle(model: Any, name: str, layer: nn.Module, unreached: Collection[str]) -> str | None:
    """Return why ``layer`` cannot have an adapter, which stands in its place and is called instead of it."""
    if kind_in(model, f"{name}.weight") in unreached:
        return "the loss does not reach it"
    if not (isinstance(layer, frozen_layers.FrozenLinear) or is_linear(layer)):
        return f"it is a {type(layer).__name__}, which does more than a linear layer"
    owner = owner_using_weight(model, name)
    return f"{owner} also uses its weight by itself (as fused kernels do)" if owner else None


def trains(layer: Any) -> bool:
    """Return whether the weight of ``layer`` trains; a quantised layer has none that could."""
    return layer.weight is not None and bool(layer.weight.requires_grad)


def is_adapter(name: str) -> bool:
    """Return whether the parameter ``name`` belongs to an adapter."""
    return ".lora_" in name


def checkpoint_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return what trains beside and inside the adapters, under the names of peft's ``adapter_model.safetensors``."""
    found = {f"base_model.model.{name}": parameter for name, parameter in expert_adapters.parameters(model).items()}
    known = {id(parameter) for parameter in found.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not trained_rows.is_rows(name) and id(parameter) not in known:
            name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
            found[f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"] = parameter
    for name, module in trained_rows.owners(model).items():
        found[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"] = module.trained_rows
    return found


def go_on(model: Any, folder: Path, tensors: Any, device: Device) -> tuple[str, ...]:
    """Put the adapter of ``folder`` into ``model``, whose adapters are of the same settings, and return what is to be said of it.

    Args:
        model: with adapters of its own.
        folder: named where the two differ.
        tensors: what the adapter's file holds.
        device: where the model lies.

    Raises:
        ConfigError: the adapter holds other tensors than the ones that train.
    """
    wanted = checkpoint_parameters(model)
    names = set(tensors.keys())
    other = sorted(names ^ set(wanted)) or [
        name for name in names if tuple(tensors.get_slice(name).get_shape()) != tuple(wanted[name].shape)
    ]
    if other:
        raise ConfigError(
            f"the adapter in {folder} is of other matrices than the ones that would train ({', '.join(other[:3])}): merge it first "
            f"(oomless export {folder} --output MERGED) and give --model MERGED"
        )
    rounded, filled = set(), dict[int, str]()
    rows = settings.row_ids(settings.facts(folder))
    with torch.no_grad():
        for name, parameter in wanted.items():
            with device.host():
                stored = tensors.get_tensor(name)
                if (
                    "trainable_tokens_delta" in name
                ):  # rows lie in the order of their ids here, and in peft's as they were named
                    ids = rows[name.removesuffix(".token_adapter.trainable_tokens_delta").rpartition(".")[2]]
                    stored = stored[torch.tensor(ids).argsort()]
                first = filled.setdefault(id(parameter), name)
                if name != first and not torch.equal(stored, tensors.get_tensor(first)):
                    raise ConfigError(
                        f"the adapter in {folder} has two different parts, {first} and {name}, for what is one matrix in this model: "
                        "they cannot be merged, nor trained as one; begin a new adapter"
                    )
                tensor = stored.to(parameter.dtype)
                if not torch.equal(tensor.to(stored.dtype), stored):
                    rounded.add(f"{stored.dtype} to {parameter.dtype}".replace("torch.", ""))
            sharding.fill(parameter, tensor)
    return tuple(f"the adapter in {folder} was rounded from {what}, in which it trains" for what in sorted(rounded))


def save_config(model: Any, folder: Path) -> None:
    """Write peft's ``adapter_config.json``; matrices that are trained whole are its ``modules_to_save``."""
    beside = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and not is_adapter(name) and not trained_rows.is_rows(name)
    ]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in beside}
    whole = {
        name.rpartition(".")[0] for name, owner in owners.items() if not (name.endswith(".bias") and not trains(owner))
    }
    rows = {name: module.trained_row_ids.tolist() for name, module in trained_rows.owners(model).items()}
    adapter = copy.deepcopy(model.peft_config[ADAPTER])
    adapter.modules_to_save = sorted(whole) or None
    adapter.trainable_token_indices = rows or None
    _name_expert_targets(model, adapter)
    adapter.base_model_name_or_path = model.config._name_or_path
    adapter.inference_mode = True
    adapter.save_pretrained(folder)


def _name_expert_targets(model: Any, adapter: Any) -> None:
    """Have peft find the adapters of experts, and those of linear layers that it would take for experts', as parameters' adapters."""
    stacks = [f"{name}.{stack}" for name, stack, _ in expert_adapters.adapters(model)]
    linear = set()
    if any(expert_modules(model)):
        linear = {name for name in adapter.target_modules if name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS}
    if stacks or linear:
        adapter.target_modules = sorted(set(adapter.target_modules) - linear)
        adapter.target_parameters = sorted([*stacks, *(f"{name}.weight" for name in linear)])
        adapter.lora_dropout = 0.0  # of no use in a finished adapter, and nothing that peft knows for parameters


def merge(model: Any, device: Device) -> None:
    """Add adapters into their matrices, and write the rows that train into theirs, in place; what was cut short may be begun again.

    The sums are made on the host, one after the other: the device holds no more than before. Matrices that are stored in another
    form stay as they are: ``delta`` is what is added to what is saved for them.
    """
    for module in _adapted_layers(model):
        if isinstance(module.get_base_layer(), frozen_layers.FrozenLinear):
            with torch.no_grad():
                _give_bias(module)
        elif not module.merged:
            with _on_the_host(module, device):
                module.merge(safe_merge=not device.fake)
    expert_adapters.merge(model, device)
    trained_rows.merge(model)


@contextmanager
def _on_the_host(module: nn.Module, device: Device) -> Iterator[None]:
    """Have the parameters of ``module`` on the host inside; afterwards they are as the body left them, where they were."""
    parameters = list(module.parameters())
    places = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = device.fetch(parameter)
        with device.host():
            yield
        for parameter, place in zip(parameters, places, strict=True):
            place.copy_(parameter.data)
    finally:
        for parameter, place in zip(parameters, places, strict=True):
            parameter.data = place


def delta(layer: Any, device: Device) -> Tensor | None:
    """Return what the adapter of ``layer``, a frozen one, adds to its matrix as the files have it, on the host, or ``None`` without one."""
    if not _is_adapted(layer):
        return None
    with _on_the_host(layer, device):
        added: Tensor = layer.get_delta_weight(ADAPTER).detach()
    return added.t() if layer.get_base_layer().transposed else added


def plain_tensors(model: Any, without: Collection[int] = ()) -> dict[str, Tensor]:
    """Return the tensors of a model, merged if it had adapters, under the names of the plain model, tied ones once.

    What an untied model still shares (BERT's bias of the head) is there under each of its names, as it is loaded one by one.
    ``without`` are ids of tensors that are left out.
    """
    tensors = {}
    seen = set(without)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not is_adapter(name) and not trained_rows.is_rows(name) and id(tensor) not in seen:
            if model.all_tied_weights_keys:
                seen.add(id(tensor))
            tensors[name.replace(".base_layer.", ".")] = tensor.detach()
    return tensors
