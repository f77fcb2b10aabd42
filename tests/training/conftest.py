"""What tests of training share."""

import gc
import multiprocessing

import pytest


@pytest.fixture
def frozen_garbage():
    """What imports left need not be looked at in each recovery's garbage collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def processes():
    """Processes that start in a moment, because what they import is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oomless.training.stages", "transformers.models.auto.modeling_auto", "peft"])
    return context
