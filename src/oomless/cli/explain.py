"""``oomless explain``."""

from __future__ import annotations

import sys
import time
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from oomless.cli.command import CONFIG, own
from oomless.cli.options import given_settings, require_writable
from oomless.errors import ConfigError

OPTIONS = (
    ("file", Annotated[str | None, typer.Argument(help="A log with the error; - for standard input.")], None),
    CONFIG,
    own("message", str, "The error itself."),
    own("snapshot", Path, "A file of torch.cuda.memory._dump_snapshot."),
    own(
        "tool",
        str,
        "What ran: trainer, trl, peft, unsloth, axolotl, llamafactory, ms-swift, torchtune, verl, deepspeed, torch ...",
    ),
    own("budget", float, "Seconds that rehearsals may take; 0 reads alone. [default: 60]"),
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
    budget: float | None,
    mixed_precision: str | None,
    attention: str | None,
    json: bool,
    html: Path | None,
    **settings: Any,
) -> None:
    """Say what an out-of-memory error means. What asked, what held the rest, and which cures, rehearsed, fit.

    FILE is a log, a notebook or a pasted message; - reads what is piped in. What it does not say can be given as settings. The
    reading comes at once; rehearsals follow.
    """
    began = time.monotonic()
    require_writable(html)
    if budget is not None and not budget >= 0:
        raise ConfigError(f"--budget is a number of seconds, 0 or more; got {budget}")
    if file is not None and message is not None:
        raise ConfigError("an error is given as FILE or as --message, not as both")
    text = message or ""
    if file is not None:
        text = sys.stdin.buffer.read().decode(errors="replace") if file == "-" else _read_text(file)

    from oomless.cli.voice import out
    from oomless.diagnosis.first_answer import first_answer, usable
    from oomless.diagnosis.situation import why_not_rehearsed
    from oomless.report.first_answer import print_first_answer, print_missing, print_remedies, print_why_not

    notes: list[str] = []
    given = usable(given_settings(config, settings), notes)
    how: dict[str, str | None] = {"tool": tool}
    for name, value, known in (
        ("mixed_precision", mixed_precision, ("fp16", "bf16")),
        ("attention", attention, ("sdpa", "eager")),
    ):
        how[name] = value if value in known else None
        if value is not None and value not in known:
            notes.append(f"--{name.replace('_', '-')} {value} is left out: it is one of {', '.join(known)}")
    first = first_answer(text, given, snapshot=snapshot, notes=tuple(notes), **how)
    if not json:
        print_first_answer(out(), first)
        out().file.flush()
    why = why_not_rehearsed(first.situation)
    if why is not None and not json and html is None and first.snapshot is None:
        print_why_not(out(), first, why)
        print_remedies(out(), first)
        print_missing(out(), first.missing)
        return
    _rehearse(first, (60.0 if budget is None else budget) - (time.monotonic() - began), json, html)


def _rehearse(first: Any, budget: float, json: bool, html: Path | None) -> None:
    """Rehearse what can be, print it as it is found, and write what was asked for."""
    began = time.monotonic()
    from oomless.cli.searching import searching
    from oomless.cli.voice import aside, out
    from oomless.diagnosis.explain import Listener, rehearse_answer
    from oomless.report.diagnosis import Printer, print_holders, write_page

    screen = out()
    if not json and first.snapshot is not None:
        print_holders(screen, first)
    with searching(aside()) as say:
        printer = Printer(screen, first, say, say.hide)
        answer = rehearse_answer(first, budget - (time.monotonic() - began), Listener() if json else printer)
    if json:
        screen.out(dumps(answer.to_dict(), indent=2))
    else:
        printer.close(answer)
    if html is not None:
        write_page(answer, html)


def _read_text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the log {source} cannot be read: {error.strerror or error}") from error
