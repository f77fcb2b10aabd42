"""llama.cpp cuts text as transformers does. `scripts/llama.cpp` builds it, which takes minutes; without it these are skipped."""

import sys
from pathlib import Path

import pytest
from tests.vocabulary.languages import KINDS, SCRIPTS, documents
from transformers import AutoTokenizer

from oomless.config import TrainConfig
from oomless.export.plan import make_plan
from oomless.export.run import export
from oomless.training import loop

pytestmark = pytest.mark.slow
OLD = "def f(x):\n    return f'{x:>12}', 345  # What's it?\n"


@pytest.fixture(scope="module")
def llama_cpp():
    """The Python binding, where it was built or installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / ".llama.cpp")])
        yield pytest.importorskip("llama_cpp", reason="llama.cpp is not there: scripts/llama.cpp builds it")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_cuts_the_same(model_of, text_of, tmp_path, llama_cpp, kind, script):
    settings = dict(max_seq_length=64, max_steps=1, gpu="cpu", dtype="fp32", trainable="embed_tokens")
    places = dict(model=str(model_of(kind)), data=str(text_of(script)), output_dir=str(tmp_path / "run"))
    result = loop.train(TrainConfig.from_mapping({**places, **settings, "extend_tokenizer": 300}))
    plan = make_plan(tmp_path / "run", "gguf", output=tmp_path / "out", verify="none")
    export(plan)
    model = llama_cpp.Llama(str(next((tmp_path / "out").glob("*.gguf"))), vocab_only=True, verbose=False)
    fast = AutoTokenizer.from_pretrained(result.model_dir)
    assert bool(plan.files.notes) == (kind == "Unigram")
    compared = 0
    for text in (*documents(script, 20, seed=3), OLD, f"<|turn|>{documents(script, 1)[0]}<|turn|>a"):
        ids = fast(text, add_special_tokens=False)["input_ids"]
        tokens = fast.convert_ids_to_tokens(ids)
        if kind == "Unigram" and any(token.startswith("<0x") for token in tokens):
            continue  # of which the note says that it differs
        compared += 1
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ids, text
    assert compared > (
        1 if (kind, script) == ("Unigram", "Amharic") else 12
    )  # whose letters are bytes there, most often
