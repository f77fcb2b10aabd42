"""What tests of training share."""

import gc

import pytest


@pytest.fixture
def frozen_garbage():
    """What imports left need not be looked at in each recovery's garbage collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
