"""The README's two commands, from a fresh clone, in an empty environment."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"^(scripts/\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_readme_has_two_commands_and_ci_runs_the_second():
    assert COMMANDS[:2] == ["scripts/demo", "scripts/check"]
    assert "scripts/check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fresh_clone(tmp_path):
    clone = tmp_path / "oomless"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
    # Nothing of this environment but where pip may look and what a login shell has.
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name in ("HOME", "LANG")}
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if "venv" not in p and str(ROOT) not in p)
    environment = kept | {"PATH": path, "PYTHON": os.environ.get("PYTHON", "python3"), "COLUMNS": "110"}
    environment["OMP_NUM_THREADS"] = "1"  # two that wait for each other beside another test are many times slower

    def run(*command):
        return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)

    demo = run(COMMANDS[0])
    assert demo.returncode == 0, demo.stdout[-2000:] + demo.stderr[-2000:]
    assert run("bash", "-c", "source .venv/bin/activate && oomless --version").stdout.startswith("oomless 0.")
    for part in ("continued pretraining", "Held-out loss", "learnt", "peak memory", "sample after", "run folder"):
        assert part in demo.stdout, part
    assert (clone / "runs" / "demo-1" / "continued" / "model" / "model.safetensors").is_file()
    # The whole of it is what runs this test; here a corner, to see that it sets itself up and ends well.
    check = run(COMMANDS[1], "tests/test_units.py")
    assert check.returncode == 0, check.stdout[-2000:] + check.stderr[-2000:]
    assert re.search(r"\d+ passed", check.stdout)
