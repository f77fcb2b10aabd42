"""LitGPT's own fine-tuning steps on an A100 and an A10G: its code as it was then, rehearsed in a process of its own.

The figures are of github.com/Lightning-AI/litgpt (Apache 2.0), printed to 0.01 GB. The model, its LoRA and its loss in chunks are
those of the repository at the commit of the day; what is written here anew is the loop around them. It needs a clone of the repository,
and ``lightning``, which may lie beside (pip install --no-deps --target DIR lightning lightning-utilities torchmetrics, and DIR on
PYTHONPATH).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

CODE = {"0cc02afa": ("0cc02afa", "lit_gpt"), "apr24": ("5895df10", "litgpt"), "sep24": ("00af8b0d", "litgpt")}
"""From what a figure names to the commit and its package."""

GPUS = {"A100-40G": "A100-40GB", "A10G": "A10G"}
PROJECTIONS = ("query", "key", "value", "projection", "mlp", "head")


def rehearse(settings: dict[str, Any], source: str, clone: Path) -> dict[str, int]:
    """Return the peak allocated by the step that ``settings`` describe, with the code that ``source`` names."""
    commit, package = next(code for name, code in CODE.items() if f"code of {name}" in source)
    archive = subprocess.run(["git", "-C", clone, "archive", commit, package], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        asked = json.dumps({**settings, "code": folder, "package": package})
        done = subprocess.run([sys.executable, __file__], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return {"allocated": int(done.stdout.splitlines()[-1])}


def step(asked: dict[str, Any]) -> int:
    """Return the peak of a few steps; at first, where LitGPT put it then, the longest batch, or all of one length."""
    sys.path.insert(0, asked["code"])
    import lightning
    import torch

    import oomless

    package, batch, length = asked["package"], asked["batch"], asked["tokens"]
    full, early = asked["trainable"].startswith("full"), package == "lit_gpt"
    model_code = import_module(f"{package}.model" if full else f"{package}.lora")
    loss_of = import_module(f"{package}.utils").chunked_cross_entropy
    accumulated = 128 if early else 4 if full else 8 // batch
    with oomless.rehearsal(GPUS[asked["gpu"]]):
        fabric = lightning.Fabric(devices=1, accelerator="cuda", precision="bf16-true")
        config = model_code.Config.from_name(asked["model"], **({} if full else _lora(asked["trainable"], early)))
        with fabric.init_module(empty_init=False):
            model = model_code.GPT(config)
        if not full:
            model_code.mark_only_lora_as_trainable(model)
        model = fabric.setup_module(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=2e-4))
        model.max_seq_length = length
        for number in range(1, 4 if early else 2 * accumulated + 1):
            tokens = torch.randint(0, 1000, (batch, length if number == 1 or not early else 300)).cuda()
            steps = number % accumulated == 0
            with fabric.no_backward_sync(model, enabled=not steps):
                if full:
                    logits = model(tokens)
                    loss = loss_of(logits[..., :-1, :], tokens[..., 1:])
                else:
                    logits = model(tokens, lm_head_chunk_size=128)
                    logits[-1] = logits[-1][..., :-1, :]
                    loss = loss_of(logits, tokens[..., 1:])
                fabric.backward(loss / accumulated)
            if steps:
                optimizer.step()
                optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()


def _lora(trainable: str, early: bool) -> dict[str, Any]:
    every = "ALL" in trainable
    sizes = {"r": 8 if "r=8" in trainable else 32, "alpha": 16, "dropout": 0.1 if every else 0.05}
    places = {name: every or name in ("query", "value") for name in PROJECTIONS}
    if early:
        return {**sizes, **{f"to_{name}": on for name, on in places.items()}}
    return {f"lora_{name}": value for name, value in {**sizes, **places}.items()}


if __name__ == "__main__":
    print(step(json.loads(sys.stdin.read())))
