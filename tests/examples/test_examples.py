"""Every example runs."""

import importlib.util
from pathlib import Path

import pytest

from oomless.config import TrainConfig
from oomless.config.values import load_yaml
from oomless.training import loop

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path, texts):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(texts))
    return path


def test_own_loop(make_checkpoint, text):
    losses = example("own_loop").main(str(make_checkpoint("llama")), str(text))
    assert losses[-1] < losses[0] - 1


def test_hf_trainer_gives_the_trainer_s_own_loss(make_checkpoint, text, tmp_path):
    module = example("hf_trainer")
    ours = module.main(str(make_checkpoint("llama")), str(text), str(tmp_path / "a"))
    del module.LeanTrainer.compute_loss
    theirs = module.main(str(make_checkpoint("llama")), str(text), str(tmp_path / "b"))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_yaml(make_checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("new-text", "old-text")):
        Path(folder).mkdir()
        for place, content in enumerate(texts[number::2]):
            Path(folder, f"{place}.py").write_text(content)
    settings = load_yaml(EXAMPLES / "continued_pretraining.yaml")
    settings |= {"model": str(make_checkpoint("llama")), "output_dir": "run", "gpu": "cpu"}
    result = loop.train(TrainConfig.from_mapping(settings))
    assert set(result.eval_after) == {"new-text", "old-text"}


def test_a_pinned_plan():
    example("test_memory").test_the_training_fits_the_gpu_that_we_have()
