"""Runs to export."""

from pathlib import Path

import pytest

from oomless.config import TrainConfig
from oomless.training.loop import train


@pytest.fixture(scope="session")
def make_run(make_checkpoint, corpus, tmp_path_factory):
    """A function that trains a tiny model for two steps, enough to change it, and returns the folder of the run."""
    made: dict[tuple, Path] = {}

    def make(architecture: str = "llama", *, tied: bool = False, shape=(), **settings) -> Path:
        key = (architecture, tied, tuple(shape), tuple(sorted(settings.items())))
        if key not in made:
            run = tmp_path_factory.mktemp("run")
            config = {
                "model": str(make_checkpoint(architecture, tied=tied, **dict(shape))),
                "data": str(corpus),
                "output_dir": str(run),
                "max_seq_length": 32,
                "max_steps": 2,
                "learning_rate": 0.02,
                "dtype": "fp32",
                "gpu": "cpu",
                "eval_fraction": 0.0,
                **settings,
            }
            train(TrainConfig.from_mapping(config))
            made[key] = run
        return made[key]

    return make
