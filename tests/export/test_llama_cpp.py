"""llama.cpp computes what was trained. `pip install llama-cpp-python` builds it, which takes minutes; without it these are skipped."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.export.plan import make_plan
from oomless.export.run import export

from .test_gguf import SHAPES, run_of

pytestmark = pytest.mark.slow
TEXT = (
    "def export(self, name):\n    '''It's 1234 of them.'''\n    return self.what(name, x=[1, 2]) or None  # \u00e9\u4e2d\n"
    * 2
)


@pytest.fixture(scope="module")
def llama():
    """A function that opens a GGUF file."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

    def open_file(path):
        return llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_batch=512,
            logits_all=True,
            verbose=False,
            n_threads=1,
            type_k=0,
            type_v=0,
            flash_attn=False,
        )

    return open_file


def logits_of(model, ids):
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def greedy(model, ids, count=12):
    made = []
    for _ in range(count):
        made.append(int(logits_of(model, ids + made)[-1].argmax()))
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_what_was_trained(make_run, tmp_path, llama, record_property, name, tied):
    run = run_of(make_run, name, tied)
    hf = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        wanted = hf(torch.tensor([ids])).logits[0]
    text_loss = torch.nn.functional.cross_entropy(wanted[:-1], torch.tensor(ids[1:]))
    for kind, tolerance in (("fp32", 2e-3), ("fp16", 5e-3), ("q8_0", None)):
        choice = {"quantize": kind} if kind == "q8_0" else {"dtype": kind}
        exported = export(make_plan(run, "gguf", output=tmp_path / kind, **choice))
        model = llama(next(exported.folder.glob("*.gguf")))
        assert model.tokenize(TEXT.encode(), special=True) == ids
        assert model.detokenize(ids).decode() == TEXT
        found = logits_of(model, ids)
        if tolerance is None:
            loss = torch.nn.functional.cross_entropy(found[:-1], torch.tensor(ids[1:]))
            off = abs(loss.exp() / text_loss.exp() - 1)
            record_property(f"{kind}: perplexity off by millionths", round(float(off) * 1e6))
            assert off < 0.01
            continue
        off = (found - wanted).norm() / wanted.norm()
        record_property(f"{kind}: logits off by millionths", round(float(off) * 1e6))
        assert off < tolerance
        text = torch.tensor([ids[:20]])
        made = hf.generate(text, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert greedy(model, ids[:20]) == made[0, 20:].tolist()
