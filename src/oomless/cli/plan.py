"""``oomless plan``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from shlex import quote
from typing import Any

import typer

from oomless.cli.command import AS_GIVEN, CONFIG, HOST_MEMORY, own
from oomless.cli.options import (
    given_settings,
    gpus_to_compare,
    host_size,
    models_to_compare,
    require_form_of_timeline,
    require_writable,
)
from oomless.errors import ConfigError
from oomless.planning.given import as_config, read_given

OPTIONS = (
    CONFIG,
    AS_GIVEN,
    own("what_if", str, "GPUs to compare: gpu=RTX4090,L4."),
    HOST_MEMORY,
    own("write", Path, "Write the pick as YAML for oomless train --config."),
    own("json", bool, "Print the answer as JSON."),
    own("timeline", Path, "Write memory over time as .html or .png."),
    own("snapshot", Path, "Write what PyTorch's memory visualiser opens."),
)
FIRST = (
    *("model", "gpu", "max_seq_length", "tokens_per_step", "trainable", "tied_weights", "quantization"),
    *("optimizer", "weight_precision", "dtype"),
)
EXAMPLES = """
# will it fit?
oomless plan --model meta-llama/Llama-3.2-1B --gpu T4 --max-seq-length 2048
# which GPU?
oomless plan --model gemma-7b --what-if gpu=RTX4090,L4,A100-40G
# how long may a sequence be?
oomless plan --model gemma-7b --gpu L4 --max-seq-length max
"""


def plan(
    config: Path | None,
    as_given: bool,
    what_if: str | None,
    host_memory: str | None,
    write: Path | None,
    json: bool,
    timeline: Path | None,
    snapshot: Path | None,
    **settings: Any,
) -> None:
    """Choose the best training that fits a GPU. It is asked before a run and needs none; every strategy is rehearsed.

    What is given is kept, the rest is chosen. --model a,b and --what-if gpu=T4,L4 compare; --max-seq-length max finds the
    longest sequence.
    """
    for file in (write, timeline, snapshot):
        require_writable(file)
    if timeline is not None:
        require_form_of_timeline(timeline)
    given = given_settings(config, settings)
    models, gpus = models_to_compare(given.get("model")), gpus_to_compare(what_if)
    host_bytes = host_size(host_memory)
    compares = len(models) > 1 or bool(gpus)
    if compares and (as_given or write or timeline or snapshot):
        raise ConfigError(
            "a comparison goes without --as-given, --write, --timeline and --snapshot: plan one of them for these"
        )
    if as_given and (write is not None or host_memory is not None):
        raise ConfigError(
            "--write and --host-memory have no effect with --as-given, where nothing is chosen; remove them"
        )
    given = as_config(given).to_dict() if as_given else read_given(given)

    from oomless.cli.searching import explain_nothing_fits, searching
    from oomless.cli.voice import aside, launcher, out, say_notes
    from oomless.models.spec import resolve_for_plan
    from oomless.planning.choose import choose_training, compare, picked_settings
    from oomless.planning.plan import plan_training
    from oomless.planning.throughput import speed_of
    from oomless.report import choice as report
    from oomless.report.plan import print_plan, write_timeline

    screen = out()
    for model in filter(None, models):
        say_notes(resolve_for_plan(model, trust_remote_code=bool(given.get("trust_remote_code"))))
    if compares:
        with searching(aside()) as say:
            compared = compare(given, models, gpus or [given.get("gpu", "auto")], host_bytes=host_bytes, progress=say)
        if json:
            screen.out(dumps(report.compared_to_dict(compared), indent=2))
        else:
            report.print_comparison(screen, compared)
        return
    if as_given:
        asked = as_config(given)
        answer, picked = plan_training(asked, snapshot=snapshot is not None), None
        speed = speed_of(answer, asked)
    else:
        with searching(aside()) as say:
            picked = choose_training(given, host_bytes=host_bytes, progress=say)
        if picked.config is None or picked.plan is None:
            if json:
                screen.out(dumps(picked.to_dict(), indent=2))
                raise typer.Exit(1)
            report.print_choice(screen, picked)
            explain_nothing_fits(screen, picked)
        answer = picked.plan
        if snapshot is not None:
            answer = plan_training(picked.config, snapshot=True)
        speed = None  # stands in the table
    if json:
        screen.out(dumps(picked.to_dict() if picked else report.plan_to_dict(answer, speed), indent=2))
    else:
        if picked is not None:
            report.print_choice(screen, picked)
        print_plan(screen, answer)
        if speed is not None:
            report.print_speed(screen, speed, asked, answer.target.gpus)
    if write is not None and picked is not None:
        _write_pick(aside() if json else screen, write, picked_settings(picked), launcher(picked.target.gpus))
    if timeline is not None:
        write_timeline(answer.profile, timeline)
    if snapshot is not None:
        from oomless.memory.snapshot import write_snapshot

        assert answer.device is not None
        write_snapshot(answer.device.allocator, snapshot)
    if not answer.fits:
        raise typer.Exit(1)


def _write_pick(screen: Any, path: Path, settings: dict[str, Any], program: str) -> None:
    import yaml

    from oomless.training.checkpoint import write_atomically

    write_atomically(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    missing = [f"--{name.replace('_', '-')} ..." for name in ("data", "output_dir") if name not in settings]
    screen.print(
        f"written to {path}: {program} train --config {' '.join([quote(str(path)), *missing])}", soft_wrap=True
    )
