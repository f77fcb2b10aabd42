"""Replay memory snapshots of real CUDA processes through the simulated allocator.

python bench/replay_snapshots.py FOLDER

Every allocation must lie at the address where the process had it, and every segment and page must be got from the device
and given back when the process did; the first difference ends the run. What was replayed is counted in a result. A snapshot
is what ``torch.cuda.memory._dump_snapshot`` writes; make some of your own and replay them to see whether oomless knows your
allocator.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from oomless.diagnosis.snapshots import load_snapshot
from oomless.memory.snapshot import DEVICE_EVENTS, replay
from provenance import write


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    rows = []
    for path in sorted(Path(sys.argv[1]).glob("*.pickle")):
        content = load_snapshot(path)
        for device, trace in enumerate(content["device_traces"]):
            if trace:
                replay(content, device=device, check_addresses=True)
                counted = Counter(entry["action"] for entry in trace)
                rows.append(
                    {
                        "file": path.name,
                        "device": device,
                        "events": len(trace),
                        "allocations": counted["alloc"],
                        "growths_and_shrinkings": sum(counted[action] for action in DEVICE_EVENTS),
                        "settings": content.get("allocator_settings", {}).get("PYTORCH_CUDA_ALLOC_CONF", ""),
                    }
                )
                print(rows[-1])
    if not rows:
        raise SystemExit(f"{sys.argv[1]} holds no snapshot (*.pickle) with a history")
    total = {key: sum(row[key] for row in rows) for key in ("events", "allocations", "growths_and_shrinkings")}
    print(f"all as recorded: {total}; {write('replayed_snapshots', {'total': total, 'rows': rows})}")


if __name__ == "__main__":
    main()
