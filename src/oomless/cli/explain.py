"""``oomless explain``."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from oomless.cli.command import CONFIG, own
from oomless.cli.options import given_settings, require_writable
from oomless.config import plain, read
from oomless.errors import ConfigError, nearest

OPTIONS = (
    ("file", Annotated[str | None, typer.Argument(help="A log with the error; - for standard input.")], None),
    CONFIG,
    own("message", str, "The error itself."),
    own("snapshot", Path, "A file of torch.cuda.memory._dump_snapshot."),
    own("tool", str, "What ran: trainer, trl, peft, unsloth, axolotl, accelerate, torch or oomless."),
    own("mixed_precision", str, "fp16 or bf16: weights in fp32, arithmetic cast."),
    own("attention", str, "sdpa, or eager with its scores in full."),
    own("json", bool, "Print the diagnosis as JSON."),
    own("html", Path, "Also write it as a page."),
)
FIRST = (
    *("model", "gpu", "max_seq_length", "per_device_train_batch_size", "trainable", "optimizer", "dtype"),
    *("quantization", "gradient_checkpointing", "per_device_eval_batch_size"),
)
EXAMPLES = """
# a log
oomless explain error.log --model meta-llama/Llama-3.2-1B --gpu T4
# what is piped in
python train.py 2>&1 | oomless explain - --tool trainer
# a message
oomless explain --message 'CUDA out of memory. Tried to allocate 1002.00 MiB. ...'
"""


def explain(
    file: str | None,
    config: Path | None,
    message: str | None,
    snapshot: Path | None,
    tool: str | None,
    mixed_precision: str | None,
    attention: str | None,
    json: bool,
    html: Path | None,
    **settings: Any,
) -> None:
    """Say what an out-of-memory error means. What asked, what held the rest, and which cures, rehearsed, fit.

    FILE is a log, a notebook or a pasted message; - reads what is piped in. What it does not say can be given as settings.
    """
    require_writable(html)

    from oomless.cli.searching import searching
    from oomless.cli.voice import aside, out, say_notes
    from oomless.diagnosis.explain import explain as diagnose
    from oomless.diagnosis.explain import read_text
    from oomless.diagnosis.tools import TOOLS
    from oomless.report.diagnosis import print_diagnosis, write_page

    for name, value, known in (
        ("tool", tool, TOOLS),
        ("mixed-precision", mixed_precision, ("fp16", "bf16")),
        ("attention", attention, ("sdpa", "eager")),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}.{nearest(value, known)}")
    if file is not None and message is not None:
        raise ConfigError("an error is given as FILE or as --message, not as both")
    text = message or ""
    if file is not None:
        text = sys.stdin.buffer.read().decode(errors="replace") if file == "-" else read_text(file)
    given = plain(read(given_settings(config, settings)))
    how = {"tool": tool, "mixed_precision": mixed_precision, "attention": attention}
    with searching(aside()) as say:
        answer = diagnose(text, given, snapshot=snapshot, **how, progress=say)
    if answer.run.spec is not None:
        say_notes(answer.run.spec)
    if json:
        out().out(dumps(answer.to_dict(), indent=2))
    else:
        print_diagnosis(out(), answer)
    if html is not None:
        write_page(answer, html)
