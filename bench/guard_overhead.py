"""What the guard costs where nothing goes wrong: its own time in a step, over the time of the step inside it.

python bench/guard_overhead.py

Both are taken in the same step, because the difference of guarded and plain steps drowns in their noise. What the guard does
(cutting batches, one call before each parameter's update, one request before the first) is work of the host and the same on any
device; ``undo_updates``,
which copies, is not part of it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import MicroBatch
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import ModelSpec
from oomless.training.assemble import assemble
from oomless.training.guard import Guard
from provenance import write

LENGTH, BLOCKS, STEPS = 256, 4, 20


class Clock:
    """Adds up the time that functions take, their callees' included."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return run


def main() -> None:
    model = AutoConfig.for_model(
        "llama", vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8
    )
    config = TrainConfig(
        model="-", data=(DataSource(path="-"),), output_dir="-", dtype="fp32", max_seq_length=LENGTH, max_grad_norm=0
    )
    device = VirtualGPU(2 << 30)
    with device.active():
        parts = assemble(ModelSpec(name="-", config=model, folder=None), config, device, fill=False)
        with torch.no_grad():
            for parameter in parts.step.parameters:
                parameter.normal_(std=0.02)
        with device.host():
            ids = torch.randint(8192, (BLOCKS, LENGTH))
            positions = torch.arange(LENGTH).expand(BLOCKS, LENGTH)
        batch = MicroBatch(
            input_ids=ids,
            labels=ids,
            position_ids=positions,
            document_lengths=((LENGTH,),) * BLOCKS,
            target_count=ids.numel(),
        )
        guard = Guard(parts.step, device, print, micro_batch=BLOCKS, undo=False)
        guard.rehearse([batch])
        clock = Clock()
        parts.step.run = clock.timed(parts.step.run, "step")  # type: ignore[method-assign]
        hook = parts.optimizer.before_update
        assert hook is not None
        parts.optimizer.before_update = clock.timed(hook, "guard in the step")
        for number in range(STEPS + 2):
            if number == 2:
                clock.seconds.clear()
            clock.timed(guard.run, "all")([batch])
    seconds = clock.seconds
    own_s = seconds["all"] - seconds["step"] + seconds["guard in the step"]
    ratio = own_s / (seconds["all"] - own_s)
    print(
        f"the guard takes {ratio:.3%} of the step: {1e6 * own_s / STEPS:.0f} of {1e6 * seconds['all'] / STEPS:.0f} us"
    )
    result = {"guard_over_step": ratio, "guard_s": own_s / STEPS, "step_s": seconds["all"] / STEPS, "steps": STEPS}
    print(f"written to {write('guard_overhead', result)}")


if __name__ == "__main__":
    main()
