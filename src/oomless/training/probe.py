"""Two questions to the real model before it trains, because architectures differ and a wrong guess would be silent.

Does its body followed by its head give its logits? Then the loss may be taken in chunks from the hidden states.
Do packed documents see nothing of each other? Then packing teaches what the documents alone would teach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oomless.config import Packing
from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.training.loss import logit_transform

_LENGTH = 12
_CUT = 5
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@torch.no_grad()
def check_architecture(model: Any, packing: Packing, device: Device) -> None:
    """Ask ``model`` both questions with a dozen tokens.

    Raises:
        ModelError: the head's logits are not the model's, or documents in one block see each other.
    """
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = device.put((torch.arange(1, _LENGTH + 1) * 7919 % vocabulary)[None])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = _head(model, hidden)
    if not _close(model(input_ids=ids, use_cache=False).logits, logits, model.dtype):
        raise ModelError(
            f"the logits of {type(model).__name__} are not its head applied to its last hidden state, so its loss cannot "
            "be taken in chunks: this architecture is not supported yet"
        )
    if packing == "concatenate":
        return
    positions = device.put(torch.cat([torch.arange(_CUT), torch.arange(_LENGTH - _CUT)])[None])
    packed = model.base_model(
        input_ids=ids, position_ids=positions, document_lengths=((_CUT, _LENGTH - _CUT),), use_cache=False
    ).last_hidden_state
    alone = model.base_model(input_ids=ids[:, _CUT:], use_cache=False).last_hidden_state
    if not _close(packed[:, _CUT:], alone, model.dtype):
        raise ModelError(
            f"in {type(model).__name__} packed documents see each other (its layers carry state that is not attention): "
            "use packing: concatenate"
        )


def _head(model: Any, hidden: Tensor) -> Tensor:
    softcap, scale = logit_transform(model.config)
    logits: Tensor = model.get_output_embeddings()(hidden) * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def _close(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    # A model that overflows already is no question of architecture; training will say where it does.
    left, right = left.float().nan_to_num(), right.float().nan_to_num()
    return bool((left - right).norm() <= _TOLERANCE[dtype] * right.norm())
