"""``oomless export``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from oomless.cli.options import OfBase, OfCheckpoint, Trained
from oomless.errors import ConfigError, nearest

_TO = ("safetensors", "adapter", "gguf")
_DTYPES = ("fp32", "bf16", "fp16")
_VERIFY = ("full", "sample", "none")


def export(
    run: Trained,
    to: Annotated[str, typer.Option(help=f"The form: {', '.join(_TO)}.")] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"The numbers: {', '.join(_DTYPES)}. [default: those of the training]", show_default=False),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="How matrices of a GGUF file are stored, such as q8_0 or q4_k_m.", show_default=False),
    ] = None,
    checkpoint: OfCheckpoint = None,
    base: OfBase = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write. [default: RUN/export/FORM]", show_default=False),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            help="full loads the result and compares logits; sample reads every tensor back; or none. [default: full where the memory "
            "is there, else sample]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it takes, and write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Write what was trained for other programs: whole models for transformers and vLLM, adapters for peft, GGUF for llama.cpp and Ollama.

    Adapters are merged in fp32 and rounded once, one tensor at a time: no GPU, and memory for a few tensors. What was killed goes on
    where it was. Example: oomless export runs/first --to gguf --quantize q8_0
    """
    for name, value, known in (("to", to, _TO), ("dtype", dtype, _DTYPES), ("verify", verify, _VERIFY)):
        if value is not None and value not in known:
            raise ConfigError(f"--{name} is one of {', '.join(known)}; got {value!r}.{nearest(value, known)}")

    from oomless.cli.voice import aside, out, say_notes
    from oomless.export.plan import make_plan
    from oomless.export.run import export as run_export
    from oomless.report.export import exporting, print_export, print_export_plan

    with exporting(aside()) as say:
        say("planning", 0.0)
        choices: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "verify": verify}
        plan = make_plan(run, to, which=checkpoint, base=base, output=output, **choices)  # type: ignore[arg-type]
    say_notes(plan.source.base.notes_read())
    print_export_plan(aside() if json else out(), plan)
    if dry_run:
        if json:
            out().out(dumps(plan.to_dict(), indent=2))
        return
    with exporting(aside()) as say:
        exported = run_export(plan, say)
    if json:
        out().out(dumps({**plan.to_dict(), **exported.to_dict()}, indent=2))
    else:
        print_export(out(), exported)
