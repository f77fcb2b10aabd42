"""Masks of dropout that belong to a block and not to the micro-batch that it happens to be in.

A generator hands out masks in the order of the calls, so a step that is cut into smaller micro-batches, as it is after running
out of memory, would see other masks. Here the numbers of a block's masks come from a seed of their own, made of the step, the
block's place in it and the number of the call: however the step is cut, and whether a layer is computed again in backward or
not, the masks are the same. Costs: one small kernel for each block where there was one for all of them, and attention with
dropout block by block.

Calls are counted through the model, and set back where a checkpointed layer runs again (``recomputation``). What is not
known to be cut by blocks keeps the ordinary random numbers: a model's own calls of ``F.dropout``, and modules inside
``mlp_tiles``. ``belongs_to_blocks`` asks the model itself whether that leaves anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from oomless.memory.device import Device, random_state, set_random_state
from oomless.techniques.kinds import body_of

_LENGTH = 8
_SPREAD = 0x9E3779B97F4A7C15
_LARGEST_SEED = (1 << 63) - 1


class BlockDropout:
    """Which blocks of which step a model computes, and the random numbers that are theirs."""

    def __init__(self) -> None:
        self.strayed = False
        """Whether dropout was asked of a tensor that is not cut by blocks."""
        self._step = self._call = self._first = self._count = self._length = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def begin_step(self, first: int = 0) -> None:
        """Begin with block ``first`` of a new step, whose seed is the next of the ordinary random numbers."""
        with _disable_current_modes():
            self._step = int(torch.randint(1 << 62, ()))
        self._first, self._count = first, 0

    def begin(self, count: int, length: int) -> None:
        """Begin with the step's next ``count`` blocks of ``length`` tokens, until the next call."""
        self._first, self._count, self._length, self._call = self._first + self._count, count, length, 0

    def end(self) -> None:
        """Let masks be ordinary ones."""
        self._count = 0

    def dropout(self, x: Tensor, p: float, places: Tensor | None = None) -> Tensor:
        """Return ``F.dropout(x, p)`` with the masks of the blocks.

        Where the rows of ``x`` are sorted by expert, ``places``, int64 [N, K], says which of them are each token's.
        """
        rows = x.shape[0] if places is None else places.shape[0]
        if self._count == 0 or rows not in (self._count, self._count * self._length):
            self.strayed = True
            return F.dropout(x, p)
        generator = self._generators.get(x.device)
        if generator is None:
            generator = self._generators[x.device] = torch.Generator(x.device)
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        for part, seed in zip(kept.view(self._count, -1), self._seeds(), strict=True):
            generator.manual_seed(seed)
            part.bernoulli_(1 - p, generator=generator)
        if places is not None:
            kept = torch.empty_like(kept).index_copy_(0, places.view(-1), kept)
        return (x * kept).mul_(1 / (1 - p) if p < 1 else 0.0)

    def each_block(self, device: torch.device, count: int) -> Iterator[AbstractContextManager[None]]:
        """Yield for each of ``count`` blocks a context in which the ordinary random numbers are the block's."""
        if count != self._count:
            self.strayed = True
            return (_as_it_is() for _ in range(count))
        return (_seeded(device, seed) for seed in self._seeds())

    def _seeds(self) -> list[int]:
        self._call += 1
        key = self._step + 0x632BE59BD9B4E019 * self._call
        return [(key + _SPREAD * (self._first + block)) & _LARGEST_SEED for block in range(self._count)]

    def recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return ``context_fn`` of a checkpoint: the second counts calls from where the first began."""
        began = self._call

        @contextmanager
        def again() -> Iterator[None]:
            now, self._call = self._call, began
            try:
                yield
            finally:
                self._call = now

        return _as_it_is(), again()


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, the ordinary random numbers of ``device`` are those of ``seed``."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    else:
        generator = torch.default_generator
    with _disable_current_modes():
        before = generator.get_state()
        generator.manual_seed(seed)
    try:
        yield
    finally:
        with _disable_current_modes():
            generator.set_state(before)


class _Forward:
    """The forward of one dropout module."""

    def __init__(self, module: nn.Dropout, blocks: BlockDropout) -> None:
        self.module = weakref.proxy(module)  # the module holds this: a strong reference would keep both from dying
        self.blocks = blocks

    def __call__(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        return self.blocks.dropout(x, self.module.p, places) if self.module.training else x


def apply(model: Any) -> BlockDropout | None:
    """Have the masks of ``model`` belong to blocks; call before layers are checkpointed. Returns ``None`` without dropout."""
    if not has_dropout(model):
        return None
    blocks = BlockDropout()
    for module in model.modules():
        module.block_dropout = blocks  # for attention, which is handed its module
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = _Forward(module, blocks)  # type: ignore[method-assign, assignment]
    return blocks


def of(model: Any) -> BlockDropout | None:
    """Return what ``apply`` returned for ``model``."""
    found: BlockDropout | None = getattr(model, "block_dropout", None)
    return found


def has_dropout(model: Any) -> bool:
    """Return whether any dropout of ``model`` is switched on, be it a module's or one that its config names."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    return any(
        isinstance(value, float) and value > 0
        for name, value in model.config.get_text_config().to_dict().items()
        if ("drop" in name or "jitter" in name) and not name.startswith(("classifier", "summary"))
    )


@torch.no_grad()
def belongs_to_blocks(model: Any, device: Device) -> bool:
    """Return whether two blocks get the same masks together as each by itself; asks ``model`` with a few tokens."""
    blocks = of(model)
    if blocks is None:
        return True
    if any(isinstance(m, nn.Dropout) and m.p > 0 and "forward" not in vars(m) for m in model.modules()):
        return False
    vocabulary = model.get_input_embeddings().weight.shape[0]
    before = random_state(device)
    with device.host():
        ids = torch.arange(1, 2 * _LENGTH + 1).view(2, _LENGTH) * 7919 % vocabulary
    training = model.training
    model.train()
    blocks.strayed = False
    blocks.begin_step()
    results = []
    for cuts in (((0, 2),), ((0, 1), (1, 2))):
        blocks._first = blocks._count = 0
        for first, last in cuts:
            blocks.begin(last - first, _LENGTH)
            results.append(
                body_of(model)(input_ids=device.put(ids[first:last]), use_cache=False).last_hidden_state.float()
            )
    blocks.end()
    model.train(training)
    set_random_state(before, device)
    together, apart = results[0], torch.cat(results[1:])
    apart_by = device.number((together - apart).norm())
    return not blocks.strayed and bool(apart_by <= 0.05 * device.number(together.norm()))
