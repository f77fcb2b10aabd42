"""Run by test_export.py in a mount namespace of its own: exports to a file system that is too small by ever fewer pages, then files, or is read-only.

RUN FOLDER STRIDE: prints how many sizes and how many numbers of files were too small.
"""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import torch

from oomless.errors import CheckpointError
from oomless.export.plan import make_plan
from oomless.export.run import export

LARGE, MANY = 1 << 30, 100_000


def mounted(size_bytes=LARGE, files=MANY, *more):
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},nr_inodes={files}", *more, "none", DISK], check=True
    )


def fails(plan):
    """Whether there is no room for the export; nothing of it is left then."""
    try:
        export(plan)
    except CheckpointError as error:
        said = str(error)
    else:
        return False
    assert f"{plan.target} could not be written" in said, said
    assert not list(DISK.iterdir()), list(DISK.iterdir())
    return True


def until_it_fits(plan, undisturbed, sizes):
    """Return how many of ``sizes`` were too small; with room the export is the undisturbed one."""
    for count, (size_bytes, files) in enumerate(sizes):
        mounted(size_bytes, files)
        failed = fails(plan)
        if failed and count % 10 == 0:  # room is made
            mounted(LARGE, MANY, "-o", "remount")
            assert not fails(plan)
        if not failed or count % 10 == 0:
            names = sorted(path.name for path in undisturbed.iterdir())
            assert names == sorted(path.name for path in plan.target.iterdir())
            assert filecmp.cmpfiles(undisturbed, plan.target, names, shallow=False)[1:] == ([], [])
        subprocess.run(["umount", "--lazy", DISK], check=True)
        if not failed:
            return count
    raise AssertionError("the largest size is too small as well")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run, folder, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    DISK = folder / "disk"
    DISK.mkdir()
    found = {}
    for to in ("safetensors", "adapter", "gguf"):
        undisturbed = folder / to
        export(make_plan(run, to, output=undisturbed, verify="sample"))
        used = sum(-(-path.stat().st_size // 4096) for path in undisturbed.iterdir())
        files = len(list(undisturbed.iterdir()))
        mounted()
        plan = make_plan(run, to, output=DISK / "out", verify="sample")
        mounted(LARGE, MANY, "-o", "remount,ro")
        assert fails(plan)
        subprocess.run(["umount", "--lazy", DISK], check=True)
        pages = until_it_fits(plan, undisturbed, ((4096 * n, MANY) for n in range(2, 4 * used, stride)))
        inodes = until_it_fits(plan, undisturbed, ((LARGE, n) for n in range(2, 4 * files)))
        found[to] = [pages * stride, used, inodes, files]
    print(json.dumps(found))
