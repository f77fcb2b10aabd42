"""Every example runs."""

import importlib.util
import json
from pathlib import Path

import pytest

from oomless.config import TrainConfig
from oomless.config.stages import stages_of
from oomless.config.values import load_yaml
from oomless.training import loop, stages

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


def test_stages(make_checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("new-text").mkdir()
    for place, content in enumerate(texts):
        Path("new-text", f"{place}.py").write_text(content)
    turns = [
        [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}."}] for n in range(60)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in turns))
    settings = load_yaml(EXAMPLES / "stages.yaml")
    settings |= {"model": str(make_checkpoint("llama")), "gpu": "cpu"}
    found = [
        stages.Planned(stage=stage, config=TrainConfig.from_mapping(stage.settings)) for stage in stages_of(settings)
    ]
    result = stages.train_stages(found)
    assert result.eval_after["chats.jsonl"] < result.eval_before["chats.jsonl"]
    assert "<|im_start|>" in Path("runs/stages/model/chat_template.jinja").read_text()


def test_a_pinned_plan():
    example("test_memory").test_the_training_fits_the_gpu_that_we_have()
