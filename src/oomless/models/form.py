"""How an architecture is run: whose attention, and whether its body's output is what its head is given.

Nothing is known by name. Three questions are put to a model, in the form that it would train in:

1. Is its head, applied to what the head is given, its own forward with its own attention and masks?
2. Does a later token change what comes before it?
3. Do documents packed into a block see each other?

``choose`` puts them to a twin of the model (``models.twin``), before anything is loaded and in every plan: oomless' attention
is taken where it computes the same function, else the model's own, else the run is refused. ``training.probe`` puts them to
the model that is about to train, on its device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from oomless.config import Packing
from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import attention, body, twin
from oomless.models.spec import ModelSpec, most_positions
from oomless.techniques.kinds import kind_in

OWN_ATTENTION = "eager"
LENGTH = 40
HOST = Device()
_EXACT = 2e-4
_ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How an architecture is run."""

    attention: str = attention.NAME
    """oomless' attention, or the model's own, whose masks and scores take memory that grows with the square of the length."""

    whole_forward: bool = False
    """Whether the model's own forward runs as far as its head, instead of its body alone."""

    after_padding: bool = False
    """Whether positions begin behind the one that is padding's, as RoBERTa's do."""


_FORMS = (
    Form(),
    Form(whole_forward=True),
    Form(attention=OWN_ATTENTION),
    Form(attention=OWN_ATTENTION, whole_forward=True),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a model from being trained in a form: the question that it fails, and in words."""

    question: int
    text: str


def choose(spec: ModelSpec, packing: Packing) -> Form:
    """Return the form in which the model of ``spec`` trains on blocks of ``packing``.

    A config of which no twin can be made gets the usual form: ``training.probe`` asks the model itself.

    Raises:
        ModelError: in no form does it compute what it computes by itself and keep documents apart.
    """
    found = _choose(_Key(spec), packing)
    if isinstance(found, Problem):
        raise ModelError(found.text)
    return found


class _Key:
    """A spec, known by what its config says."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.text = spec, f"{type(spec.config).__qualname__} {spec.config.to_json_string(use_diff=False)}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=64)
def _choose(key: _Key, packing: Packing) -> Form | Problem:
    attention.register()
    spec = key.spec
    with twin.on_the_host(), torch.no_grad():
        try:
            own = twin.twin(spec.config, OWN_ATTENTION, trust_remote_code=spec.trust_remote_code)
            logits = own_logits(own, LENGTH)
        except Exception:  # a model's own code raises what it likes
            return Form()
        problems = []
        behind = [replace(form, after_padding=True) for form in _FORMS] if body.first_position(own.config) else []
        for form in (*_FORMS, *behind):
            try:
                model = twin.twin(spec.config, form.attention, trust_remote_code=spec.trust_remote_code)
                model.load_state_dict(own.state_dict())
                apply(model, form)
                problem = find_problem(model, logits, packing)
            except Exception as error:  # so do classes that have no such attention
                problem = Problem(0, f"{type(own).__name__} does not run: {error}")
            if problem is None:
                return form
            problems.append(problem)
    return max(problems, key=lambda problem: problem.question)


def unreached(spec: ModelSpec) -> frozenset[str]:
    """Return the kinds of parameters (``kind_in``) of the model of ``spec`` that the loss has no gradient for.

    What only chooses (an indexer), attends to an encoder that is not there, or belongs to other modalities.
    """
    return _unreached(_Key(spec))


@lru_cache(maxsize=64)
def _unreached(key: _Key) -> frozenset[str]:
    spec = key.spec
    with twin.on_the_host(), torch.enable_grad():
        try:
            model = twin.twin(spec.config, OWN_ATTENTION, trust_remote_code=spec.trust_remote_code)
            model.requires_grad_()
            own_logits(model, LENGTH).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
        except Exception:  # as in _choose; then the audit watches the first steps
            return frozenset()
        reached = {kind_in(model, name) for name, parameter in model.named_parameters() if parameter.grad is not None}
        return frozenset(kind_in(model, name) for name, _ in model.named_parameters()) - reached


def apply(model: Any, form: Form) -> None:
    """Have ``model``, which was built with the attention of ``form``, run as ``form`` says."""
    setattr(model, body.WHOLE, form.whole_forward)
    setattr(model, body.FIRST, body.first_position(model.config) if form.after_padding else 0)


def longest(spec: ModelSpec, packing: Packing) -> int | None:
    """Return how many tokens the model of ``spec`` has positions for in blocks of ``packing``; ``None`` where they are unlimited."""
    positions, first = most_positions(spec.config), body.first_position(spec.config)
    if positions is None or not first:
        return positions
    try:
        return positions - first if choose(spec, packing).after_padding else positions
    except ModelError:  # whoever builds it will say so
        return positions


def own_logits(model: Any, length: int) -> Tensor:
    """Return what the forward of ``model`` makes of the first ``length`` tokens that it is asked about."""
    logits: Tensor = model(input_ids=probe_ids(model, length), use_cache=False).logits
    return logits


def find_problem(
    model: Any, logits: Tensor, packing: Packing, tolerance: float | None = None, device: Device = HOST
) -> Problem | None:
    """Return what keeps ``model`` from being trained as it is on blocks of ``packing``, or ``None``.

    Args:
        model: in evaluation.
        logits: what it makes of the same tokens with its own attention: ``own_logits``.
        packing: how documents lie in a block.
        tolerance: by how much half of the tokens may be off; by default all must be as near as fp32 rounds.
        device: where the model lies.
    """
    name, length = type(model).__name__, logits.shape[1]
    ids = probe_ids(model, length)
    positions = torch.arange(length, device=ids.device)[None]
    whole = {"position_ids": positions, **attention.packed(model, ((length,),), device)}
    hidden = body.run(model, input_ids=ids, **whole)
    if not same(_head(model, hidden), logits, tolerance, device):
        return Problem(
            1,
            f"{name} gives other logits by itself than its head makes of what it is given in a block with positions from 0 on, so "
            "its loss cannot be taken in chunks: this architecture is not supported yet",
        )
    changed = length * 3 // 4
    later = ids.clone()
    later[:, changed] = later[:, 0]
    if not same(body.run(model, input_ids=later, **whole)[:, :changed], hidden[:, :changed], tolerance, device):
        return Problem(
            2,
            f"in {name} a token sees those behind it, so there is nothing to predict: this is no causal language model as it is "
            "configured (where its config.json has is_decoder, it must be true)",
        )
    if packing == "concatenate":
        return None
    cut = length // 3
    both = {"position_ids": torch.cat([positions[:, :cut], positions[:, : length - cut]], dim=1)}
    both |= attention.packed(model, ((cut, length - cut),), device)
    packed = body.run(model, input_ids=ids, **both)
    if not same(packed[:, cut:], body.run(model, input_ids=ids[:, cut:]), tolerance, device):
        return Problem(
            3,
            f"in {name} documents that are packed into a block see each other (its layers carry a state or a position on from "
            "one to the next): use packing: concatenate, where that is wanted",
        )
    return None


def length_for(model: Any) -> int:
    """Return how many tokens ``model`` is asked about: no more than it has positions for."""
    return min(LENGTH, most_positions(model.config) or LENGTH)


def tolerance(model: Any) -> float:
    """Return by how much kernels of a device may be off in the dtype of ``model``."""
    return _ROUNDED[model.dtype]


def probe_ids(model: Any, length: int) -> Tensor:
    """Return the first ``length`` tokens that ``model`` is asked about, none of them padding, [1, T], where it lies."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids: Tensor = (torch.arange(1, length + 1, device=model.device) * 7919 % vocabulary)[None]
    padding = body.first_position(model.config) - 1
    return ids + (ids == padding) if padding >= 0 else ids


def _head(model: Any, hidden: Tensor) -> Tensor:
    softcap, scale = body.logit_transform(model.config)
    logits: Tensor = model.get_output_embeddings()(hidden) * scale
    return (logits / softcap).tanh() * softcap if softcap else logits


def same(left: Tensor, right: Tensor, tolerance: float | None, device: Device) -> bool:
    """Return whether two tensors [B, T, D] hold the same numbers; ``tolerance`` and ``device`` as in ``find_problem``."""
    if left.shape != right.shape:
        return False
    # A model that overflows already is no question of architecture; training will say where it does.
    left, right = left.float().nan_to_num(), right.float().nan_to_num()
    errors = (left - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    error, most = (errors.max(), _EXACT) if tolerance is None else (errors.median(), tolerance)
    return bool(device.number(error) <= most)
