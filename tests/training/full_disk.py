"""Run by test_survival.py in a mount namespace of its own: a run that resumes on a file system that is too small.

MODEL CORPUS FOLDER STRIDE: prints how many sizes and how many numbers of files were too small, and what is said where the
room is asked for before the first write.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from test_survival import Ear, again, same_result, stop_a_run

from oomless.errors import CheckpointError
from oomless.training import checkpoint, loop


def mounted(size_bytes, files=100_000, *, again=False):
    options = f"size={size_bytes},nr_inodes={files}" + (",remount" if again else "")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", DISK], check=True)


def fails(config):
    """Whether the disk is too small to go on; what was saved before is whole in any case, and nothing half is left."""
    try:
        loop.train(again(config), Ear())
    except CheckpointError as error:
        complaint = str(error)
    else:
        return None
    assert "could not be written" in complaint, complaint
    assert "--resume" in complaint, complaint
    assert checkpoint.damage(checkpoint.Checkpoint(folder=RUN / "checkpoint-2", step=2)) is None
    half = [p for p in RUN.glob(".*") if p.name != ".lock"]
    assert not half, half
    return complaint


def until_it_fits(config, template, sizes):
    """Return how many of ``sizes`` were too small; each starts from the run that was stopped."""
    for count, (size_bytes, files) in enumerate(sizes):
        mounted(1 << 30)
        shutil.copytree(template, RUN)
        mounted(size_bytes, files, again=True)
        if fails(config) is None:
            same_result(FINISHED, RUN, 4)
            subprocess.run(["umount", "--lazy", DISK], check=True)
            return count
        if count % 5 == 0:  # room is made
            mounted(1 << 30, again=True)
            assert fails(config) is None
            same_result(FINISHED, RUN, 4)
        subprocess.run(["umount", "--lazy", DISK], check=True)
    raise AssertionError("the largest size is too small as well")


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, corpus, folder = map(Path, sys.argv[1:4])
    stride = int(sys.argv[4])
    DISK = folder / "disk"
    DISK.mkdir()
    RUN, FINISHED = DISK / "run", folder / "finished"
    mounted(1 << 30)
    config, _ = stop_a_run(model, corpus, RUN)
    shutil.copytree(RUN, folder / "template")
    shutil.copytree(DISK / "finished", FINISHED)
    used = sum(-(-p.stat().st_size // 4096) for p in RUN.rglob("*") if p.is_file())
    files = sum(1 for _ in RUN.rglob("*")) + 2
    subprocess.run(["umount", "--lazy", DISK], check=True)

    mounted(1 << 30)
    shutil.copytree(folder / "template", RUN)
    mounted(4096 * (used + 10), again=True)
    complaint = fails(config)
    subprocess.run(["umount", "--lazy", DISK], check=True)

    checkpoint._require_room = lambda *_: None  # or no write would be the one that fails
    pages = until_it_fits(config, folder / "template", ((4096 * n, 100_000) for n in range(used, 9 * used, stride)))
    inodes = until_it_fits(config, folder / "template", ((1 << 30, n) for n in range(files, 9 * files)))
    print(json.dumps([pages * stride, inodes, complaint]))
