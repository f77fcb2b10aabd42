"""A run in stages: the run of each, one after the other, in a folder of its own inside that of the whole.

A stage is over when its final model is there, which is the last thing that it writes. So going on is: pass over the stages that
are over, and have the next one go on as any run does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from oomless.config import TrainConfig
from oomless.config.stages import Stage, after, as_runs, check_form, stages_of, together
from oomless.config.values import load_yaml
from oomless.data.chat import load_template
from oomless.data.encode import check_tokenizer
from oomless.data.prepare import prepare
from oomless.errors import CheckpointError, ConfigError
from oomless.models import extension
from oomless.models.spec import resolve
from oomless.models.tokenizer import load_tokenizer
from oomless.training import checkpoint, distributed, final_model, machines, resuming, trackers
from oomless.training.assemble import check_length, open_device
from oomless.training.listening import Listener, RunResult
from oomless.training.loop import train
from oomless.training.run_files import CONFIG, LENGTH, MODEL
from oomless.training.run_folder import locked, remove_leftovers
from oomless.vocabulary import extend

Ended = Callable[[Stage, RunResult], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A stage with the settings that it trains with."""

    stage: Stage
    config: TrainConfig
    """As if it were a run by itself that begins with the model of the first."""

    prediction: Mapping[str, Any] | None = None


def train_stages(planned: Sequence[Planned], listener: Listener | None = None, ended: Ended | None = None) -> RunResult:
    """Train the stages that are not over yet, tell ``ended`` of each, and return what came of the last one.

    Raises:
        UserError: what was given cannot work, in whichever stage.
        TrainingError: a stage went wrong and was stopped.
    """
    listener = listener or Listener()
    planned = [replace(one, config=one.config.from_anywhere()) for one in planned]
    pairs = [(one.stage, one.config) for one in planned]
    run, model = Path(planned[0].config.output_dir), planned[0].config.model
    device_type = open_device(planned[0].config.gpu).torch_device.type
    with distributed.joined(device_type) as ranks, ExitStack() as stack:
        ranks = machines.settled(ranks, run, listener.said)
        with ranks.together("the lock of the run folder"):
            if ranks.writes:
                stack.enter_context(locked(run))
        for one in planned[:-1]:
            machines.on_all(ranks, run / one.stage.folder / MODEL, listener.said)
        over = ranks.from_writer(lambda: _begin(run, planned, listener))
        machines.require_same(ranks, {"number of stages that are over": over})
        for place, one in enumerate(planned[over:], over):
            folder, last = run / one.stage.folder, place + 1 == len(planned)
            listener.said(f"{one.stage} of {len(planned)}")
            if place:
                model = str(run / planned[place - 1].stage.folder / MODEL)
            with one.stage.named():
                config = as_runs(run, pairs, place, model=model)
                if place and config.trainable_rows == extend.NEW:
                    config = replace(config, trainable_rows=_new_rows(run / planned[0].stage.folder))
                resume = config.resume and ranks.any(folder.is_dir())
                result = train(replace(config, resume=resume), listener, one.prediction)
            if ended is not None:
                ended(one.stage, result)
            if result.interrupted:
                return result
            with ranks.together("what is left of a stage"):
                if ranks.writes:
                    _leave(run, folder, listener, last)
    return replace(result, output_dir=run, model_dir=run / MODEL)


def _new_rows(first: Path) -> str:
    """Return the rows of the tokens that the stage in the folder ``first`` has learnt."""
    noted = extension.read(first / extend.FOLDER)
    if noted is None:
        raise ConfigError(
            "trainable_rows: new is the rows of new tokens, and the first stage has none: set extend_tokenizer, or name rows",
            "trainable_rows",
        )
    return noted.new_rows


def is_over(folder: Path) -> bool:
    """Return whether the stage in ``folder`` has ended."""
    return (folder / MODEL).is_dir()


def stages_in(run: Path) -> tuple[Stage, ...]:
    """Return the stages of the run in the folder ``run``; none where it has none, or is no run's."""
    config = run / CONFIG
    return stages_of(load_yaml(config)) if config.is_file() else ()


def _begin(run: Path, planned: Sequence[Planned], listener: Listener) -> int:
    """Check all that can be known of every stage, write what the run is, and return how many stages are passed over.

    The last one is never: a run that has ended may go on, where it is made longer.
    """
    remove_leftovers(run)
    resuming.require_no_checkpoints(run)
    folders = [run / one.stage.folder for one in planned]
    over = len(list(takewhile(is_over, folders[:-1])))
    begun = [one for one, folder in zip(planned, folders, strict=True) if folder.exists()]
    if begun and not planned[0].config.resume:
        raise ConfigError(
            f"{run} holds the stages of an earlier run: give --resume to go on with it, or another output_dir"
        )
    if begun and begun[-1].stage.number > over + 1:
        raise CheckpointError(
            f"{begun[-1].stage} has begun, and the model of {planned[over].stage}, from which it follows, is not there any more: bring "
            "that back, or start anew in another output_dir"
        )
    _check_over(run, planned[:over])
    for folder in folders[:over]:
        _leave(run, folder, listener, last=False)
    _check_text(planned, over, listener)
    settings = together([(one.stage, one.config.to_dict()) for one in planned])
    with checkpoint.clear_disk_errors(f"the config of {run}"):
        checkpoint.write_atomically(run / CONFIG, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        checkpoint.write_atomically(run / LENGTH, json.dumps({"stages": len(planned)}))
    return over


def _check_over(run: Path, over: Sequence[Planned]) -> None:
    """Check that stages that are ``over`` are still what is asked for.

    Raises:
        ConfigError: one is not.
    """
    for began, one in zip(stages_in(run), over, strict=False):
        with one.stage.named():
            resuming.check_same_config(
                TrainConfig.from_mapping(began.settings), one.config, resuming.MAY_CHANGE - set(resuming.LENGTHS)
            )


def _check_text(planned: Sequence[Planned], over: int, listener: Listener) -> None:
    """Read the text of the stages that come later, so that what is wrong with it shows before hours of training; ``over`` are done.

    Raises:
        UserError: text is missing or cannot be used, or is longer than the model reads.
    """
    begun = planned[0].config
    spec = resolve(begun.model, trust_remote_code=begun.trust_remote_code)
    tokenizer = load_tokenizer(begun.tokenizer or begun.model, trust_remote_code=begun.trust_remote_code)
    rows = spec.config.get_text_config().vocab_size
    if not extend.tokens_without_rows(tokenizer, rows):
        check_tokenizer(tokenizer, rows)
    for place, one in enumerate(planned):
        with one.stage.named():
            after(one.config.to_dict(), [earlier.config for earlier in planned[:place]])
            check_form([earlier.config for earlier in planned[: place + 1]])
            check_length(spec, one.config)
            trackers.require(one.config)
            if one.config.chat_template is not None:
                tokenizer.chat_template = load_template(one.config.chat_template)
            if place > over:
                prepare(one.config, tokenizer, listener.tokenising)


def _leave(run: Path, folder: Path, listener: Listener, last: bool) -> None:
    """Keep of a stage that is over what is needed after it: its model alone, which is that of the run where it is the ``last``."""
    if not last:
        for saved in checkpoint.list_checkpoints(folder):
            with checkpoint.clear_disk_errors(str(saved.folder)):
                checkpoint.remove_folder(saved.folder)
        return
    with checkpoint.clear_disk_errors("the final model"):
        checkpoint.write_folder(run / MODEL, lambda target: final_model.take_over(folder / MODEL, target))
    listener.saved(run / MODEL)
