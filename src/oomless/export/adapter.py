"""What an adapter, or a checkpoint of what trained alone, changes: by the name of the parameter in the plain model.

The names and shapes are peft's, so adapters of whatever program writes them are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oomless.config.adapter import AGAIN, beyond_lora, require_scale
from oomless.errors import ModelError
from oomless.export.changes import Added, Change, LowRank, Replaced, Rows, low_rank
from oomless.export.source import TRAINED, Source
from oomless.models.weights import adapter_file, open_file, shown
from oomless.techniques import trained_rows
from oomless.techniques.expert_adapters import is_transposed_for_peft
from oomless.techniques.experts import STACKS, expert_modules

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.*?)(?P<inside>(\.base_layer)*)"
    r"\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)(\.default)?(\.weight|(?P<bias>\.bias))?"
)


@dataclass(frozen=True, slots=True)
class LowRankExperts:
    """The low-rank change of every matrix of a stack: A is [E x rank, in], B is [out, rank x E]."""

    a: Callable[[], Tensor]
    b: Callable[[], Tensor]
    experts: int
    scale: float
    transposed: bool

    def fits(self, shape: tuple[int, ...]) -> bool:  # noqa: D102
        inputs, outputs = self.a().shape[1], self.b().shape[0]
        return shape == (self.experts, *((inputs, outputs) if self.transposed else (outputs, inputs)))

    def of_expert(self, matrix: Tensor, expert: int, dtype: torch.dtype) -> Tensor:
        """Return ``matrix``, the one of ``expert``, as it is after training."""
        a = self.a().view(self.experts, -1, matrix.shape[0 if self.transposed else 1])[expert]
        b = self.b().view(matrix.shape[1 if self.transposed else 0], -1, self.experts)[:, :, expert]
        return low_rank(matrix, a.float(), b.float(), self.scale, self.transposed, None, dtype)

    def of(self, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:  # noqa: D102
        return torch.stack([self.of_expert(matrix, expert, dtype) for expert, matrix in enumerate(read())])


def file_of(source: Source) -> Path:
    """Return the file of what ``source`` changes."""
    return adapter_file(source.folder) if source.kind == "adapter" else source.folder / TRAINED


def changes(source: Source, model: Any) -> dict[str, Change]:
    """Return what ``source``, no whole model, changes of the plain ``model``, which has no memory.

    Raises:
        ModelError: it is of another model, or of a kind that cannot be merged.
    """
    path = file_of(source)
    late = {name: partial(_tensor, path, name) for name in open_file(path).keys()}  # noqa: SIM118
    return _of_adapter(source, model, late) if source.kind == "adapter" else _of_trained(source, model, late)


def _tensor(path: Path, name: str) -> Tensor:
    tensor: Tensor = open_file(path).get_tensor(name)
    return tensor


Late = Mapping[str, Callable[[], Tensor]]


def _of_trained(source: Source, model: Any, late: Late) -> dict[str, Change]:
    found: dict[str, Change] = {}
    for name, new in late.items():
        if not trained_rows.is_rows(name):
            found[name] = Replaced(new)
            continue
        assert source.run is not None
        assert source.run.trainable_rows is not None
        module = name.removesuffix(f".{trained_rows.NAME}")
        vocabulary = model.get_submodule(module).weight.shape[0]
        ids = torch.tensor(trained_rows.parse(source.run.trainable_rows, vocabulary))
        found[f"{module}.weight"] = Rows(ids, new)
    return _known(source, model, found)


def _of_adapter(source: Source, model: Any, late: Late) -> dict[str, Change]:
    settings = source.adapter
    _require_mergeable(source, settings)
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {}
    found: dict[str, Change] = {}
    for full, new in late.items():
        name = full.removeprefix(_PREFIX)
        match = _PART.fullmatch(name)
        if match is None:
            found[name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = Replaced(new)
        else:
            parts.setdefault(f"{match['module']}{match['inside']}", {})[match["part"] + (match["bias"] or "")] = new
    experts = dict(expert_modules(model))
    for place, own in parts.items():
        module = place.partition(".base_layer")[0]
        if module in experts:
            stack = _stack(settings, module, place.count(".base_layer"), experts[module])
            count = getattr(experts[module], stack).shape[0]
            found[f"{module}.{stack}"] = LowRankExperts(
                own["lora_A"],
                own["lora_B"],
                count,
                _scale(settings, f"{module}.{stack}", own["lora_A"]().shape[0] // count),
                is_transposed_for_peft(experts[module]),
            )
        else:
            found[f"{module}.weight"] = changed = _of_module(settings, module, own, model)
            if bias := own.get("lora_B.bias"):
                assert isinstance(changed, LowRank)
                found[f"{module}.bias"] = Added(bias, changed.scale, found.get(f"{module}.bias"))
    return _known(source, model, found)


def _of_module(settings: Any, module: str, own: Mapping[str, Callable[[], Tensor]], model: Any) -> Change:
    from transformers.pytorch_utils import Conv1D

    if "token_adapter.trainable_tokens_delta" in own:
        wanted = settings.get("trainable_token_indices")
        if isinstance(wanted, Mapping):
            wanted = next(ids for name, ids in wanted.items() if module == name or module.endswith(f".{name}"))
        return Rows(torch.tensor(wanted), own["token_adapter.trainable_tokens_delta"])
    if "lora_embedding_A" in own:  # [rank, vocabulary] and [width, rank]
        rank = own["lora_embedding_A"]().shape[0]
        return LowRank(
            own["lora_embedding_A"], own["lora_embedding_B"], _scale(settings, module, rank), transposed=True
        )
    target = dict(model.named_modules()).get(module)
    scale = _scale(settings, module, own["lora_A"]().shape[0])
    begun = settings.get("init_lora_weights")
    return LowRank(
        own["lora_A"],
        own["lora_B"],
        scale,
        isinstance(target, Conv1D),
        own.get("lora_magnitude_vector"),
        begun if begun in AGAIN else None,
    )


def _stack(settings: Mapping[str, Any], module: str, inside: int, experts: Any) -> str:
    """Return which stack the adapter under ``inside`` wrappers is of: peft wraps one by one, the first inside."""
    named = settings.get("target_parameters") or ()
    stacks = [
        stack
        for stack in STACKS
        if getattr(experts, stack, None) is not None
        and any(f"{module}.{stack}" == name or f"{module}.{stack}".endswith(f".{name}") for name in named)
    ]
    return stacks[len(stacks) - 1 - inside]


def _scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    pattern = settings.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(pattern.keys(), name), settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _require_mergeable(source: Source, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    odd = beyond_lora(settings, to_merge=True)
    if kind != "LORA":
        raise ModelError(f"{source.folder} is an adapter of the kind {kind}; LORA is merged: merge it with peft")
    require_scale(source.folder, settings)
    if odd:
        how = "merge it with peft"
        if odd[-1].startswith("init_lora_weights"):  # of which not even peft can tell afterwards what it took off
            how = "have peft save it as LoRA, with path_initial_model_for_weight_conversion"
        raise ModelError(f"the adapter in {source.folder} has {', '.join(odd)}, which is not merged here: {how}")


def _known(source: Source, model: Any, found: dict[str, Change]) -> dict[str, Change]:
    """Return ``found`` where ``model`` has all of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    alone = [name for name, change in found.items() if isinstance(change, Added) and name not in shapes]
    if alone:
        raise ModelError(
            f"the adapter in {source.folder} has biases of its own (lora_bias), and {source.base.name} has no {shown(alone)} to add them "
            "to: it cannot be merged; --to adapter leaves it as it is"
        )
    unknown = [name for name, change in found.items() if name not in shapes or not change.fits(shapes[name])]
    if unknown:
        raise ModelError(
            f"{source.folder} changes {shown(sorted(unknown))}, which {source.base.name} has not, or not in this shape: it is of "
            "another model; name the right one with --base"
        )
    return found
