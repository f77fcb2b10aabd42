"""Low-rank adapters of experts: for every expert of a stack a pair of thin matrices of its own.

Saves and costs what LoRA does for a linear layer (``lora.py``), for each expert. peft adapts a stack as a parameter
(``target_parameters``) by adding all products to all matrices in every forward, which takes a whole stack; here each token's
rows go through the two thin matrices of their expert. The two tensors of a stack have peft's shapes and, in files, its names:
A is [E x rank, in], B is [out, rank x E], the expert the slowest in A and the fastest in B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.grouped_linear import Groups, grouped_linear
from oomless.techniques import sharding
from oomless.techniques.experts import STACKS, expert_modules

PREFIX = "lora_"


class ExpertAdapter(nn.Module):
    """The adapter of one stack of ``shape``, [E, rows, columns] of the matrices, which are [in, out] if ``transposed``.

    ``turned``: peft takes them for what they are not, [out, in]: A and B have its shapes, and rows go through B first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        transposed: bool,
        turned: bool,
        config: TrainConfig,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
        device: Device,
    ) -> None:
        super().__init__()
        self.experts, rows, columns = shape
        self.inputs, self.outputs = (rows, columns) if transposed != turned else (columns, rows)
        self.rank, self.transposed, self.turned = rank, transposed, turned
        self.dropout = nn.Dropout(config.lora_dropout or 0.0)
        self.scaling = alpha / (math.sqrt(self.rank) if config.use_rslora else self.rank)
        self.merged_experts = 0
        self.A = nn.Parameter(
            torch.empty(self.experts * self.rank, self.inputs, dtype=dtype, device=device.torch_device)
        )
        self.B = nn.Parameter(
            torch.zeros(self.outputs, self.rank * self.experts, dtype=dtype, device=device.torch_device)
        )
        _initialise(self.A)

    def add(self, rows: Tensor, base: Tensor, groups: Groups, places: Tensor) -> Tensor:
        """Return ``base`` with what the adapters make of ``rows``, added in place: [S, out].

        ``places``, int64 [N, K], says which rows are each token's, to whose block masks of dropout belong.
        """
        if self.merged_experts:
            return base
        if self.dropout.p > 0:
            rows = self.dropout(rows, places)
        first, second = self.A.view(self.experts, self.rank, self.inputs), self._expert_major()
        if self.turned:
            first, second = second, first
        low = grouped_linear(rows, first, groups, transposed=self.turned)
        return grouped_linear(low, second, groups, base=base, scale=self.scaling, transposed=self.turned)

    def _expert_major(self) -> Tensor:
        """Return B as [E, out, rank]."""
        return self.B.view(self.outputs, self.rank, self.experts).permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def delta(self, expert: int, device: Device) -> Tensor:
        """Return what is added to the matrix of ``expert``, as that one lies, in fp32 on the host."""
        a = device.fetch(self.A.view(self.experts, self.rank, self.inputs)[expert])
        b = device.fetch(self.B.view(self.outputs, self.rank, self.experts)[:, :, expert])
        with device.host():
            return self.product(a.float(), b.float())

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return what [rank, in] and [out, rank] of an expert add to its matrix, as that one lies."""
        added = b @ a * self.scaling
        return added.t() if self.transposed != self.turned else added

    @torch.no_grad()
    def merge(self, stack: nn.Parameter, device: Device) -> None:
        """Add what the adapters add into ``stack``, in place and one expert at a time; cut short, it goes on with the next."""
        for expert in range(self.merged_experts, self.experts):
            with device.host():
                merged = device.fetch(stack[expert]) + self.delta(expert, device).to(stack.dtype)
            stack[expert].copy_(merged)
            self.merged_experts += 1


def _initialise(a: Tensor) -> None:
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as the weight of an nn.Linear


@torch.no_grad()
def initialise_parts(model: Any, device: Device) -> None:
    """Initialise adapters of which each process holds a part, as ``lora.initialise_parts``."""
    # In the order in which ``inject`` makes them.
    for _, _, adapter in sorted(adapters(model), key=lambda found: f"{found[0]}.{found[1]}"):
        whole = torch.empty(adapter.A.shape, dtype=adapter.A.dtype, device=device.torch_device)
        _initialise(whole)
        sharding.fill(adapter.A, whole)
        sharding.local(adapter.B).zero_()


@torch.no_grad()
def merge_parts(model: Any) -> None:
    """Add adapters of experts into their stacks, in place, where each process holds some experts of these and a part of the adapters."""
    modules = dict(model.named_modules())
    for name, stack, adapter in adapters(model):
        held: Any = getattr(modules[name], stack)
        a, b = (parameter.full_tensor().float() for parameter in (adapter.A, adapter.B))  # type: ignore[attr-defined]
        a, b = a.view(adapter.experts, adapter.rank, -1), b.view(-1, adapter.rank, adapter.experts)
        own, first = sharding.local(held), sharding.first_element(held) // (held.numel() // held.shape[0])
        for place, matrix in enumerate(own):
            matrix.copy_(matrix.float() + adapter.product(a[first + place], b[:, :, first + place]))


def targets(model: Any) -> dict[str, tuple[Any, str]]:
    """Return the stacks of experts that do not train, by name, each with the module that holds it and its name there."""
    found = {}
    for name, module in expert_modules(model):
        for stack in STACKS:
            held = getattr(module, stack, None)
            if held is not None and not getattr(held, "requires_grad", False):
                found[f"{name}.{stack}"] = (module, stack)
    return found


def is_transposed_for_peft(module: Any) -> bool:
    """Return whether peft takes the matrices of ``module`` for [in, out]."""
    return bool(getattr(module, "is_transposed_for_peft", module.is_transposed))


def inject(
    model: Any, names: list[str], config: TrainConfig, device: Device, settings: Any, dtype: torch.dtype
) -> None:
    """Give the stacks ``names`` of ``model`` their adapters in ``dtype``, of the ranks and scales that peft's ``settings`` say.

    Raises:
        ConfigError: they are to be DoRA's, which peft has no form for.
    """
    if names and config.use_dora:
        raise ConfigError(
            "use_dora is for linear layers, not for experts: name other lora_target_modules, such as "
            "q_proj,k_proj,v_proj,o_proj, or leave use_dora out",
            *("use_dora", "lora_target_modules"),
        )
    from peft.utils.other import get_pattern_key

    known = targets(model)
    for name in names:
        module, stack = known[name]
        rank, alpha = (
            pattern.get(get_pattern_key(list(pattern), name), usual)
            for pattern, usual in ((settings.rank_pattern, settings.r), (settings.alpha_pattern, settings.lora_alpha))
        )
        shape = getattr(module, stack).shape
        turned = module.is_transposed != is_transposed_for_peft(module)
        adapter = ExpertAdapter(shape, module.is_transposed, turned, config, rank, alpha, dtype, device)
        setattr(module, PREFIX + stack, adapter)


def of(module: Any, stack: str) -> ExpertAdapter | None:
    """Return the adapter of one of the stacks that ``module`` holds, or ``None``."""
    adapter: ExpertAdapter | None = module._modules.get(PREFIX + stack)
    return adapter


def adapters(model: Any) -> Iterator[tuple[str, str, ExpertAdapter]]:
    """Yield for each adapter in ``model`` the name of the module of experts, that of the stack in it, and the adapter."""
    for name, module in expert_modules(model):
        for stack in STACKS:
            adapter = of(module, stack)
            if adapter is not None:
                yield name, stack, adapter


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters under peft's names, without its prefix.

    peft wraps the module of experts once for each stack, the first inside, and calls what is wrapped ``base_layer``.
    """
    of_module: dict[str, list[ExpertAdapter]] = {}
    for name, _, adapter in adapters(model):
        of_module.setdefault(name, []).append(adapter)
    found = {}
    for name, own in of_module.items():
        for outside, adapter in enumerate(reversed(own)):
            wrapped = name + ".base_layer" * outside
            found[f"{wrapped}.lora_A.weight"] = adapter.A
            found[f"{wrapped}.lora_B.weight"] = adapter.B
    return found


def merge(model: Any, device: Device) -> None:
    """Add adapters of experts into their stacks, in place, where those hold plain numbers; what was cut short may be begun again."""
    modules = dict(model.named_modules())
    for name, stack, adapter in adapters(model):
        if isinstance(getattr(modules[name], stack), nn.Parameter):
            adapter.merge(getattr(modules[name], stack), device)
