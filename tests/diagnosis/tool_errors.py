"""A child process of `test_real_tools.py`: `tool_errors.py MOST SCRIPT ARGUMENTS...` prints real errors of a script as JSON.

``=BYTES`` in place of ``MOST`` tries a GPU of this size alone; ``peak`` prints the most that it allocates where memory has no end.

The script runs on a rehearsed GPU without an end, which says at which sizes of GPU different requests are the first that find
no room; then it runs at ``MOST`` of these sizes.
"""

import gc
import json
import runpy
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from oomless.planning.plan import target_for
from oomless.programs import cuda
from oomless.programs.child import Enough, _changes, owner_of
from oomless.programs.stage import Stage

MiB = 1 << 20


def attempt(script, capacity=None):
    """Return the stage, and the traceback of the error that ended the script there, if one did."""
    stage = Stage(
        target_for(f"virtual:{capacity}B" if capacity else "virtual:1024GiB"),
        owner_of(script.parent),
        limited=bool(capacity),
    )
    text = None
    with tempfile.TemporaryDirectory() as scratch, stage.active(), cuda.patched(_changes(stage, Path(scratch), 2)):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Enough:
            pass
        except torch.OutOfMemoryError as error:
            text = "".join(traceback.format_exception(error))
            traceback.clear_frames(error.__traceback__)
    gc.collect()
    return stage, text


def capacities(device, most):
    """Return at most so many sizes of GPU at which different requests of what ran on ``device`` are the first that find no room."""
    recorder = device._recorder
    highest, found, allocations = 0, {}, iter(recorder._allocations)
    for event, reserved in zip(recorder._events, recorder._reserved, strict=True):
        if event <= 0:
            continue
        asked = next(allocations)
        if reserved > highest:
            if asked.requested_bytes > 10 * MiB:  # smaller ones share segments, whose size says nothing
                found.setdefault((asked.phase, str(asked.operation), asked.requested_bytes), reserved - 2 * MiB)
            highest = reserved
    chosen = list(found.values())
    return [chosen[i * len(chosen) // most] for i in range(most)] if len(chosen) > most else chosen


def main():
    asked, script = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.argv = sys.argv[2:]
    if asked == "peak":
        print("\n" + json.dumps(attempt(script)[0].gpu.profile().peak_allocated_bytes))
        return
    errors = []
    for capacity in [int(asked[1:])] if asked[0] == "=" else capacities(attempt(script)[0].gpu, int(asked)):
        stage, text = attempt(script, capacity)
        if text is not None:
            request = stage.gpu.profile().failures[-1]
            errors.append({"capacity": capacity, "text": text, "request": asdict(request)})
    print("\n" + json.dumps(errors))


if __name__ == "__main__":
    main()
