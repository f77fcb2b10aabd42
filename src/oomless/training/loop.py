"""A whole run: prepare, train, evaluate, save, and leave a run folder that tells all of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from oomless.config import TrainConfig
from oomless.config.values import require_kind
from oomless.data.encode import check_tokenizer
from oomless.data.prepare import prepare
from oomless.memory.device import Device
from oomless.models import sample
from oomless.models.spec import resolve
from oomless.models.tokenizer import load_tokenizer
from oomless.techniques import sharding, trainable
from oomless.training import distributed, guard, machines, rates, resuming, script, trackers
from oomless.training.assemble import assemble, open_device
from oomless.training.distributed import Ranks
from oomless.training.guard import StartAgain
from oomless.training.interruption import Interruption
from oomless.training.life import Life, total_steps
from oomless.training.listening import Listener, RunFacts, RunResult
from oomless.training.run_folder import locked
from oomless.training.saving import RunFolder
from oomless.vocabulary import extend


def train(
    config: TrainConfig, listener: Listener | None = None, prediction: Mapping[str, Any] | None = None
) -> RunResult:
    """Train as ``config`` says and return what came of it; the run folder holds the rest, ``prediction`` too.

    Raises:
        UserError: what was given cannot work.
        TrainingError: the run went wrong and was stopped.
    """
    require_kind("config", config, TrainConfig, "make one, with TrainConfig(...) or TrainConfig.from_mapping(...)")
    run = Path(config.output_dir)
    gpus = distributed.world_size()
    config = sharding.shared(config.from_anywhere(), gpus)
    sharding.check(config, gpus)
    trackers.require(config)
    device = open_device(config.gpu)
    listener, standing = listener or Listener(), None
    with distributed.joined(device.torch_device.type) as ranks, ExitStack() as stack:
        ranks = machines.settled(ranks, run, listener.said)
        machines.require_same(ranks, machines.settings_of(config))
        with ranks.together("the lock of the run folder"):
            if ranks.writes:
                stack.enter_context(locked(run))
        stack.enter_context(device.active())
        guard.free(device)  # of what a run before it in this process has left
        device.reset_peak()
        asked, tell = config, listener.tokenising
        config = ranks.from_writer(lambda: extend.for_run(asked, run, tell))

        def make() -> Run:
            return Run(config, run, device, listener, ranks, interrupted, prediction)

        recovers = config.recover_from_oom and device.capacity_bytes is not None and ranks.count == 1
        interrupted = Interruption(config.preemption_grace_s, ranks.any)
        made: Run | None
        while True:
            try:
                made = guard.built(make, device, listener.said) if recovers else make()
                if standing is None:
                    stack.enter_context(interrupted.listening())  # from now on there is something to save
                else:
                    made.guard.standing = standing
                return made.execute()
            except StartAgain as error:
                standing, made = error.standing, None
            guard.free(device)


class Run(Life):
    """A run for real: with text, weights, and a folder."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        device: Device,
        listener: Listener,
        ranks: Ranks = distributed.ALONE,
        interrupted: Interruption | None = None,
        prediction: Mapping[str, Any] | None = None,
    ) -> None:
        start = resuming.checkpoint_to_resume(config, folder, ranks, listener.said)
        torch.manual_seed(config.seed)
        spec = resolve(config.model, trust_remote_code=config.trust_remote_code)
        for note in spec.notes_with(config.quantization):
            listener.said(note)
        tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
        check_tokenizer(tokenizer, spec.config.get_text_config().vocab_size)
        prepared = partial(prepare, config, tokenizer, listener.tokenising)
        if ranks.count > 1:
            ranks.from_machine(lambda: prepared() is None)  # the others find the cache
        data = prepared()
        machines.require_same(ranks, machines.facts_of(data))
        if start is not None:
            config = rates.kept(config, resuming.config_of(start))
        total = total_steps(config, data.train.blocks_per_epoch, ranks.count)
        config = rates.resolved(config, spec.config, total)
        reload_base = (
            start is None
            or "lora" in config.trainable_parts
            or config.quantization is not None
            or config.experts_on_host
            or config.stream_frozen
            or config.embeddings_on_host
        )
        run_folder = RunFolder(folder, config, tokenizer, spec, ranks, listener, start, prediction)
        super().__init__(
            config,
            device,
            ranks,
            listener,
            data=data,
            assembly=assemble(spec, config, device, fill=reload_base, ranks=ranks),
            keeper=run_folder,
            result=RunResult(output_dir=folder),
            interrupted=interrupted,
        )
        machines.require_same(ranks, {"model": getattr(self.assembly.model, sample.NAME, None)})
        for note in self.assembly.notes:
            listener.said(note)
        if start is not None:
            resuming.restore(self, spec, start)
            listener.said(f"resumed from {start.folder.name}")
        else:
            script.probe(self)
        run_folder.open(self.total_steps)

    def execute(self) -> RunResult:
        """Run to the end, or to the interruption."""
        facts = RunFacts(
            config=self.config,
            table=trainable.table(self.assembly.model),
            data=self.data,
            device=self.device,
            total_steps=self.total_steps,
            first_step=self.step,
            gpus=self.ranks.count,
            rates=rates.said(self.config, self.assembly.model.config, self.total_steps),
        )
        self.listener.prepared(facts)
        try:
            script.play(self)
        finally:
            self.keeper.close()
        result, usage = self.result, self.device.usage()
        result.interrupted = result.model_dir is None
        result.steps, result.tokens, result.peak_memory_bytes = self.step, self.tokens, usage.peak_allocated_bytes
        return result
