"""One optimizer step, the thing that oomless rehearses and the thing that it trains with.

The loss is the sum of the cross-entropy over all predicted tokens of the step, divided by their number: how the step's
blocks are cut into micro-batches changes nothing. Logits are never held whole (``ops.linear_cross_entropy``), and a
body that does not train builds no graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oomless.data.loader import MicroBatch
from oomless.memory.device import Device
from oomless.ops.linear_cross_entropy import linear_cross_entropy
from oomless.optim.base import MemoryLeanOptimizer, clip_coefficient, global_gradient_norm
from oomless.techniques.trainable import body_trains
from oomless.training.precision import LossScale


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step measured, still on the device so that nothing waits for it; all are 0-dim."""

    loss: Tensor
    """Mean cross-entropy of the step's predicted tokens."""

    gradient_norm: Tensor
    """Global norm before clipping."""

    found_inf: Tensor
    """1 where a gradient was not finite and the step changed nothing, else 0."""


class TrainingStep:
    """Runs forward, backward and update of ``model`` on ``device``."""

    def __init__(
        self,
        model: Any,
        optimizer: MemoryLeanOptimizer,
        loss_scale: LossScale,
        device: Device,
        *,
        max_grad_norm: float,
        loss_chunk_bytes: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.device = device
        self.max_grad_norm = max_grad_norm
        self.loss_chunk_bytes = loss_chunk_bytes
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.body_trains = body_trains(model)

    def run(self, micro_batches: Sequence[MicroBatch], *, before_update: Any = None) -> StepResult:
        """Train on ``micro_batches``, which together are one optimizer step."""
        loss = self.accumulate(micro_batches)
        if before_update is not None:
            before_update()
        with self.device.phase("optimizer"):
            norm = global_gradient_norm(self.parameters) / self.loss_scale.scale
            found_inf = (~torch.isfinite(norm)).float()
            coefficient = 1 / self.loss_scale.scale
            if self.max_grad_norm:
                coefficient = coefficient * clip_coefficient(norm, self.max_grad_norm)
            self.optimizer.step(gradient_scale=coefficient, found_inf=found_inf)
            self.optimizer.zero_grad(set_to_none=True)
            self.loss_scale.update(found_inf)
        return StepResult(loss=loss, gradient_norm=norm, found_inf=found_inf)

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Leave the step's scaled gradients in the parameters; return its mean loss, 0-dim."""
        tokens = max(1, sum(batch.target_count for batch in micro_batches))
        total = torch.zeros((), device=self.device.torch_device)
        self.model.train()
        for batch in micro_batches:
            loss = self._loss(batch, self.loss_scale.scale / tokens)
            total += loss.detach() / self.loss_scale.scale
            with self.device.phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, int]:
        """Return the summed cross-entropy over the predicted tokens of ``batches``, and their number."""
        total = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        tokens = 0
        self.model.eval()
        with self.device.phase("evaluation"):
            for batch in batches:
                total += self._loss(batch, 1.0)
                tokens += batch.target_count
        return total, tokens

    def _loss(self, batch: MicroBatch, scale: Tensor | float) -> Tensor:
        """Return ``scale`` times the summed cross-entropy of ``batch``."""
        with self.device.phase("forward"):
            hidden = hidden_states(self.model, batch, self.device, with_graph=self.body_trains)
        with self.device.phase("loss"):
            head = self.model.get_output_embeddings()
            softcap, logit_scale = logit_transform(self.model.config)
            return linear_cross_entropy(
                hidden.flatten(0, -2),
                head.weight,
                self.device.put(batch.labels).flatten(),
                bias=head.bias,
                scale=scale,
                softcap=softcap,
                logit_scale=logit_scale,
                chunk_bytes=self.loss_chunk_bytes,
            )


def hidden_states(model: Any, batch: MicroBatch, device: Device, *, with_graph: bool) -> Tensor:
    """Return what the body of ``model`` hands to its head for ``batch``: [B, T, D]."""
    with nullcontext() if with_graph else torch.no_grad():
        output = model.base_model(
            input_ids=device.put(batch.input_ids),
            position_ids=device.put(batch.position_ids),
            document_lengths=batch.document_lengths,
            use_cache=False,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def logit_transform(config: Any) -> tuple[float | None, float]:
    """Return the soft cap (or ``None``) and the factor that the architecture applies to its logits."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap: float | None = getattr(text, "final_logit_softcapping", None)
    return softcap, scale
