"""A pinned plan in CI: this test fails when a change makes the training need more memory than the GPU has."""

import oomless


def train() -> None:
    """Stand for your own training: it puts a model on "cuda" and makes a few steps."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024)).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(3):
        loss = model(torch.randn(64, 1024, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_training_fits_the_gpu_that_we_have() -> None:
    """On a T4, of which it may need 256 MiB."""
    with oomless.rehearsal("T4") as gpu:
        train()
    assert gpu.needed_bytes < 256 * 2**20, f"most is held at {gpu.line}"
