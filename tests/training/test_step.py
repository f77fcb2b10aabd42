"""A step never waits for the device, whatever it trains with; ``tests/techniques/test_pairs.py`` says what it computes."""

import pytest
import torch
from tests.blank import blank_batch
from torch.utils._python_dispatch import TorchDispatchMode

from oomless.config import OPTIMIZER_DEFAULTS, DataSource, TrainConfig
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.training.assemble import assemble

SAVING = {
    "gradient_checkpointing": True,
    "offload_activations": True,
    "cheap_recompute": True,
    "mlp_tiles": 2,
    "gradient_accumulation_steps": 2,
}
READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_dim,
}


class NeverWaits(TorchDispatchMode):
    """Refuses what reads a tensor back to the host: operators whose Python result or shape depends on its values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in READS:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZER_DEFAULTS)
@pytest.mark.parametrize("way", ["plain", "in backward", "offloaded"])
def test_never_waits_for_the_device(make_checkpoint, optimizer, way):
    """fp16 with its loss scale, clipping, corrections, everything that saves activations, frozen layers in 4 bits."""
    settings = SAVING | {"optimizer": optimizer, "dtype": "fp16", "weight_precision": "correction"}
    if way == "in backward":
        settings |= {"optimizer_in_backward": True}
    elif way == "offloaded":
        settings |= {"offload_optimizer": True, "trainable": "lora+lm_head+embed_tokens", "quantization": "nf4"}
    folder = make_checkpoint("llama", tied=True, vocab_size=1024)
    device = VirtualGPU(1 << 30)
    with device.active():
        config = TrainConfig(
            model=str(folder), data=(DataSource(path="none"),), output_dir="none", max_seq_length=32, **settings
        )
        step = assemble(resolve(str(folder)), config, device, fill=True).step
        batches = [blank_batch(1, (10, 22), device) for _ in range(2)]
        with NeverWaits():
            for _ in range(2):
                result = step.run(batches)
        with NeverWaits(), pytest.raises(AssertionError, match="waits for the device"):
            result.loss.item()
