"""One optimizer step, the thing that oomless rehearses and the thing that it trains with.

The loss is the sum of the cross-entropy over all predicted tokens of the step, divided by their number: how the step's
blocks are cut into micro-batches changes nothing. Logits are never held whole (``ops.linear_cross_entropy``), and a
body that does not train builds no graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oomless.config import TrainConfig
from oomless.data.loader import MicroBatch
from oomless.memory.device import Device
from oomless.models import attention
from oomless.optim import FusedBackward, MemoryLeanOptimizer, clip_coefficient, global_gradient_norm
from oomless.techniques import block_dropout, in_flight, one_gradient_buffer, sharding
from oomless.techniques.balancing import Balance
from oomless.training.distributed import ALONE, Ranks
from oomless.training.loss import head_loss, hidden_states
from oomless.training.precision import LossScale


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step measured, still on the device so that nothing waits for it; all are 0-dim."""

    loss: Tensor
    """Mean cross-entropy of the step's predicted tokens."""

    gradient_norm: Tensor
    """Global norm before clipping."""

    found_inf: Tensor
    """1 where a gradient was not finite or a limit was reached, and the step changed nothing, else 0."""


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
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        fused_loss: bool = False,
        balance: Balance | None = None,
        in_backward: bool = False,
        ranks: Ranks = ALONE,
        sharded: sharding.Sharded | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.device = device
        self.max_grad_norm = max_grad_norm
        self.loss_chunk_bytes = loss_chunk_bytes
        self.label_smoothing = label_smoothing
        self.z_loss, self.fused_loss = z_loss, fused_loss
        self.balance = balance
        self.ranks, self.sharded = ranks, sharded
        self.parameters: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.fused = FusedBackward(optimizer, self._sum_over_processes) if in_backward else None
        self.limits = (math.inf, math.inf)
        """What loss and gradient norm must stay below, or the step changes nothing; not looked at with ``in_backward``."""
        self.before_micro_batch: Callable[[], None] = lambda: None
        """May raise: no weight has been touched then, in any mode."""
        self._block_dropout = block_dropout.of(model)
        self._destination = one_gradient_buffer.head_destination(model)

    def run(self, micro_batches: Sequence[MicroBatch], tokens: int | None = None) -> StepResult:
        """Train on ``micro_batches``, which together are one optimizer step, or one process's part of it.

        ``tokens`` is how many the step predicts in all processes; by default those of ``micro_batches``.
        """
        tokens = self._begin(micro_batches, tokens)
        if self.fused is None:
            loss = self.ranks.sum(self.accumulate(micro_batches, tokens))
            with self.device.phase("optimizer"):
                norm, found_inf = self._update(loss)
                self.optimizer.zero_grad(set_to_none=True)
        else:
            loss = self.accumulate(micro_batches[:-1], tokens)
            with self.fused.updating(1 / self.loss_scale.scale):
                loss += self.accumulate(micro_batches[-1:], tokens)
            loss = self.ranks.sum(loss)
            norm, found_inf = self.fused.finish()
            norm = norm / self.loss_scale.scale
        self.loss_scale.update(~torch.isfinite(norm))
        return StepResult(loss=loss, gradient_norm=norm, found_inf=found_inf)

    def _begin(self, micro_batches: Sequence[MicroBatch], tokens: int | None = None) -> int:
        """Begin a step, and return how many tokens it predicts: ``tokens``, or those of ``micro_batches``."""
        if self._block_dropout is not None:
            # Random numbers are the same in all processes, each of which has as many of the step's blocks.
            self._block_dropout.begin_step(self.ranks.rank * sum(len(batch.input_ids) for batch in micro_batches))
        return max(1, tokens or sum(batch.target_count for batch in micro_batches))

    def rehearse(self, micro_batches: Sequence[MicroBatch], tokens: int | None = None) -> int:
        """Ask for all the memory that ``run`` asks for and change no weight and no state; gradients are left.

        Returns:
            The most that the update asked for beyond what was there; 0 where it lies inside backward.
        """
        tokens = self._begin(micro_batches, tokens)
        if self.fused is None:
            loss = self.ranks.sum(self.accumulate(micro_batches, tokens))
            with self.device.phase("optimizer"):
                return self.device.most_beyond(lambda: self._update(loss, changes_nothing=True))
        loss = self.accumulate(micro_batches[:-1], tokens)
        with self.fused.updating(1 / self.loss_scale.scale, changes_nothing=True):
            loss += self.accumulate(micro_batches[-1:], tokens)
        self.ranks.sum(loss)
        self.fused.finish()
        return 0

    def abandon(self) -> None:
        """Leave nothing of a step that failed, whose error is forgotten: no gradient, no bookkeeping, nothing on its way."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.fused is not None:
            self.fused.abandon()
        in_flight.drop(self.model)
        with self.device.host():  # what a failed backward left in autograd's queue goes when the next one begins
            torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        """Give the step up in all processes, whose collectives fail from now on; until ``meet`` there are none."""
        if self.ranks.groups is not None:
            if self.sharded is not None:
                self.sharded.leave()
            self.ranks.groups.leave()

    def meet(self, what: Any) -> list[Any]:
        """Meet all processes, which left the same step, and return what each says, where this one says ``what``."""
        if self.ranks.groups is None:
            return [what]
        self.ranks.groups.meet()
        if self.sharded is not None:
            self.sharded.join()
        return self.ranks.groups.tell(what)

    def _update(self, loss: Tensor, *, changes_nothing: bool = False) -> tuple[Tensor, Tensor]:
        norm = self._gradient_norm().div_(self.loss_scale.scale)
        found_inf = (~((loss < self.limits[0]) & (norm < self.limits[1]))).float()
        if changes_nothing:
            found_inf.fill_(1.0)
        coefficient = 1 / self.loss_scale.scale
        if self.max_grad_norm:
            coefficient = coefficient * clip_coefficient(norm, self.max_grad_norm)
        self.optimizer.step(gradient_scale=coefficient, found_inf=found_inf)
        return norm, found_inf

    def _sum_over_processes(self, gradient: Tensor) -> None:
        with self.device.counting_update():  # as elsewhere gradients are exchanged once a step
            self.ranks.sum(gradient)

    def _gradient_norm(self) -> Tensor:
        """Return the norm of all gradients; those of parts are then where the optimizer, which has plain tensors, finds them."""
        if self.sharded is None:
            self.ranks.sum_gradients(self.parameters)
            return global_gradient_norm(self.parameters)
        parts = [sharding.local(parameter) for parameter in self.parameters]
        for parameter, part in zip(self.parameters, parts, strict=True):
            if parameter.grad is not None:
                part.grad, parameter.grad = sharding.local(parameter.grad), None
        return self.ranks.sum(global_gradient_norm(parts).square_()).sqrt_()

    def accumulate(self, micro_batches: Sequence[MicroBatch], tokens: int) -> Tensor:
        """Add the scaled gradients of the loss over ``tokens`` to those of the parameters; return the loss, 0-dim."""
        total = torch.zeros((), device=self.device.torch_device)
        self.model.train()
        for batch in micro_batches:
            self.before_micro_batch()
            if self.ranks.groups is not None:
                self.ranks.groups.check()
            if self._block_dropout is not None:
                self._block_dropout.begin(*batch.input_ids.shape)
            if self.balance is not None:
                self.balance.begin(self.loss_scale.scale * (batch.target_count / tokens))
            loss = self._loss(
                batch, self.loss_scale.scale / tokens, label_smoothing=self.label_smoothing, z_loss=self.z_loss
            )
            total += loss.detach() / self.loss_scale.scale
            with self.device.phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, int]:
        """Return the summed cross-entropy over the predicted tokens of ``batches``, and their number.

        It is the plain one, whatever smoothing or z-loss the training adds, so that runs can be compared.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        tokens = 0
        self.model.eval()
        with self.device.phase("evaluation"):
            for batch in batches:
                add = partial(self._add_loss, total, batch)
                if in_flight.has_any(self.model):
                    add()
                else:
                    self.device.repeating(("evaluation", batch.document_lengths, self.loss_chunk_bytes), add)
                tokens += batch.target_count
        return total, tokens

    def _add_loss(self, total: Tensor, batch: MicroBatch) -> None:
        total += self._loss(batch, 1.0)

    @torch.no_grad()
    def write(self, row: Tensor, given: int, new: int) -> list[int]:
        """Return the likeliest ``new`` tokens after the first ``given`` of ``row``, int64 [T] on the host, which has room for both.

        Each is a pass over the whole row, as a step has it and without a cache: what comes later in it changes nothing.
        """
        self.model.eval()
        length = len(row)
        with self.device.phase("evaluation"):
            with self.device.host():
                positions_on_host = torch.arange(length)[None]
            tokens, positions = self.device.put(row[None]), self.device.put(positions_on_host)

            def likeliest(hidden: Tensor) -> Tensor:
                with self.device.phase("loss"):
                    logits: Tensor = self.model.get_output_embeddings()(hidden[:, at - 1])
                    return logits.argmax(-1)

            packed = attention.packed(self.model, ((length,),), self.device)
            body = partial(hidden_states, self.model, tokens, positions, packed)
            for at in range(given, given + (min(new, 2) if self.device.fake else new)):  # each asks for the same
                tokens[:, at] = self._run(body, likeliest)
            written: list[int] = self.device.numbers(tokens[0], [0] * length)[given : given + new]
        return written

    @torch.no_grad()
    def run_whole(self, function: Callable[[], None]) -> None:
        """Run ``function``, which may use the model as it likes, but not train it."""
        sharded = self.sharded
        if sharded is None:
            function()
        else:
            sharded.run(lambda: sharded.with_head(function))

    def _loss(self, batch: MicroBatch, scale: Tensor | float, **added: float) -> Tensor:
        """Return ``scale`` times the summed cross-entropy of ``batch``, with what ``head_loss`` may add to it."""
        put = self.device.put

        def loss_of_head(hidden: Tensor) -> Tensor:
            with self.device.phase("loss"):
                labels = put(batch.labels)
                return head_loss(
                    self.model,
                    hidden,
                    labels,
                    scale,
                    self.loss_chunk_bytes,
                    self._destination,
                    fused=self.fused_loss,
                    **added,
                )

        def hidden() -> Tensor:
            packed = attention.packed(self.model, batch.document_lengths, self.device)
            return hidden_states(self.model, put(batch.input_ids), put(batch.position_ids), packed)

        return self._run(hidden, loss_of_head)

    def _run(self, body: Callable[[], Tensor], of_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what ``of_head`` makes of what ``body`` hands to the head."""
        sharded = self.sharded

        def whole() -> Tensor:
            with self.device.phase("forward"):
                hidden = body()
            return of_head(hidden) if sharded is None else sharded.with_head(of_head, hidden)

        return whole() if sharded is None else sharded.run(whole)


def passes_of(config: TrainConfig) -> int:
    """Return how many passes of a step are rehearsed: the first makes the gradients, further ones add, the last may use them up."""
    return min(3 if config.optimizer_in_backward else 2, config.gradient_accumulation_steps)
