"""The processes of a search end with it, whatever ends it."""

import os
import subprocess
import sys
import time

from tests.cli.test_cli import ENVIRONMENT

KILLED = """
import os, signal, sys, time
from oomless.planning.trial import Laboratory

def work(setting, pipe):
    os.write(pipe, f"{os.getpid()} ".encode())
    time.sleep(60)

reading, writing = os.pipe()
laboratory = Laboratory(None, 2, None)
for _ in range(2):
    laboratory._submit(work, writing)
found = b""
while found.count(b" ") < 2:
    found += os.read(reading, 100)
print(found.decode(), flush=True)
if hasattr(laboratory._ended, "_cond"):  # an Event's lock, which its own set() holds for a moment
    laboratory._ended._cond.acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(process: int) -> bool:
    """Return whether the process is there and no zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_they_end_with_a_search_that_is_killed(tmp_path):
    said = tmp_path / "processes"
    with said.open("w") as printed:  # no pipe, which those that are left would keep open
        subprocess.run([sys.executable, "-c", KILLED], stdout=printed, env=ENVIRONMENT, timeout=100)
    processes = [int(text) for text in said.read_text().split()]
    assert len(processes) == 2
    until = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.1)
    left = [process for process in processes if alive(process)]
    for process in left:
        os.kill(process, 9)
    assert left == []
