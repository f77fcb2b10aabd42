"""Settings that every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_per_worker(worker_id):
    """Under xdist each worker keeps to one core."""
    if worker_id != "master":
        torch.set_num_threads(1)
