"""Optimizers of other libraries, as far as their memory goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AdamW8bit(torch.optim.Optimizer):
    """Holds what bitsandbytes' AdamW8bit holds (0.50: bitsandbytes/optim/optimizer.py), and computes nothing."""

    def __init__(self, parameters: list[Tensor], in_32_bits: list[Tensor]) -> None:
        super().__init__(parameters, {})
        self._whole = {id(parameter) for parameter in in_32_bits}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: D102
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if parameter.grad is None or state:
                continue
            whole = parameter.numel() < 4096 or id(parameter) in self._whole
            for moment in ("1", "2"):
                state[f"state{moment}"] = torch.zeros_like(parameter, dtype=torch.float32 if whole else torch.uint8)
                if not whole:
                    blocks = -(-parameter.numel() // 256)
                    state[f"absmax{moment}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
