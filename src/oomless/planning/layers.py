"""How few layers have to be checkpointed for a training to fit: none is fastest, all is smallest.

Each number tried is a rehearsal. What a step needs falls with every further layer, so a bisection finds the smallest that
fits in about log2(layers) of them.
"""

from __future__ import annotations

from dataclasses import replace

from oomless.config import TrainConfig
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.models.spec import ModelSpec
from oomless.planning.plan import Target, plan
from oomless.planning.rehearse import virtual_device
from oomless.techniques.checkpointing import layers_of_backward
from oomless.training.assemble import assemble
from oomless.training.distributed import rehearsed


def fewest_checkpointed_layers(
    spec: ModelSpec, config: TrainConfig, target: Target, settings: AllocatorSettings | None = None
) -> TrainConfig | None:
    """Return ``config`` with the fewest checkpointed layers that let it fit ``target``; ``None`` if all do not suffice.

    What ``config`` says of checkpointing is replaced; ``offload_activations`` applies as soon as two layers are checkpointed.

    Raises:
        UserError: what is asked for does not fit together; the same as training would say.
    """
    plain = replace(config, gradient_checkpointing=False, checkpointed_layers=None, offload_activations=False)
    device = virtual_device()
    with rehearsed(target.gpus) as ranks, device.active():
        layers = len(layers_of_backward(assemble(spec, plain, device, fill=False, ranks=ranks).model))

    def with_layers(count: int) -> TrainConfig:
        if not count:
            return plain
        return replace(
            plain,
            gradient_checkpointing=True,
            checkpointed_layers=None if count == layers else count,
            offload_activations=config.offload_activations and count > 1,
        )

    def fits(count: int) -> bool:
        return plan(spec, with_layers(count), target, settings).fits

    if fits(0):
        return plain
    if not layers or not fits(layers):
        return None
    too_few, enough = 0, layers
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return with_layers(enough)
