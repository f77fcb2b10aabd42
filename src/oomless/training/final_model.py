"""What a run leaves: the model alone, in the Hugging Face layout, adapters added and frozen layers in their full precision."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from oomless.memory.device import Device
from oomless.models import save
from oomless.models.verify import check_saved
from oomless.techniques import frozen_layers, lora, sharding
from oomless.training import checkpoint
from oomless.training.distributed import Ranks


def write(
    target: Path,
    last: checkpoint.Checkpoint,
    model: Any,
    tokenizer: Any,
    source: Path,
    merge: bool,
    device: Device,
    ranks: Ranks,
    live: Callable[[], Tensor | None],
) -> None:
    """Write ``model`` to the folder ``target``.

    Args:
        target: the folder.
        last: the checkpoint of the model as it is.
        model: the model.
        tokenizer: its tokenizer.
        source: where the model came from, for what it holds in fewer bits.
        merge: add adapters to it; or else they are written alone, as they are in ``last``.
        device: where it lies.
        ranks: the processes, of which each may hold a part of it.
        live: gives its logits to compare, as in ``check_saved``.

    Raises:
        CheckpointError: the disk is full, read-only or failing.
        ModelError: what was written does not load as the model that was trained.
    """
    adapted = checkpoint.is_adapted(model)
    late = save.original_weights(model, source, device) if frozen_layers.has_frozen_layers(model) else {}
    in_parts = (
        sharding.has_parts(model) and not late
    )  # what is cut beside packed weights is read from the files as they are

    def fill(folder: Path) -> None:
        if adapted and not merge:
            take_over(last.folder, folder)
            return
        if adapted:
            lora.merge(model, device)
        if adapted or late:
            save.save_model(model, folder, save.model_tensors(model, device, late), device, source)
            checkpoint.save_tokenizer(tokenizer, folder)
        else:
            take_over(last.folder, folder)
        check_saved(folder, model, device, late, alone=not in_parts, live=live)

    with device.phase("save"), checkpoint.clear_disk_errors("the final model"):
        if adapted and merge and in_parts:
            _write_merged_parts(target, model, tokenizer, source, device, ranks)
            return
        with ranks.together("the final model"):
            if ranks.writes:
                checkpoint.write_folder(target, fill)


def _write_merged_parts(target: Path, model: Any, tokenizer: Any, source: Path, device: Device, ranks: Ranks) -> None:
    """Write a model with adapters of which each process holds, merges and writes a part."""
    lora.merge_parts(model)
    files = save.weight_files(save.model_tensors(model, device))

    def describe(folder: Path) -> None:
        save.save_config(model, folder, source)
        save.write_index(files, folder)
        checkpoint.save_tokenizer(tokenizer, folder)

    def check(folder: Path) -> None:
        check_saved(folder, model, device, {}, alone=False)

    checkpoint.write_model_folder(target, describe, files, check, device, ranks)


def take_over(source: Path, folder: Path) -> None:
    """Have the files of the model in ``source`` in ``folder`` too."""
    for path in source.iterdir():
        if path.is_file():
            _link_or_copy(path, folder / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
