"""llama.cpp computes what was trained. `scripts/llama.cpp` builds it, which takes minutes; without it these are skipped."""

import ctypes
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.export.gguf_mixtures import QUANTIZATIONS
from oomless.export.k_quants import KINDS
from oomless.export.plan import make_plan
from oomless.export.run import export

from ..conftest import STANDARD_LIBRARY
from .test_gguf import CUT, SHAPES, byte_level, run_of, sentencepiece
from .test_k_quants import drawn, lost

pytestmark = pytest.mark.slow
TEXT = (
    "def export(self, name):\n    '''It's 1234 of them.'''\n    return self.what(name, x=[1, 2]) or None  # \u00e9\u4e2d\n"
    * 2
)


@pytest.fixture(scope="module")
def llama_cpp():
    """The Python binding, where it was built or installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / ".llama.cpp")])
        yield pytest.importorskip("llama_cpp", reason="llama.cpp is not there: scripts/llama.cpp builds it")


@pytest.fixture(scope="module")
def llama(llama_cpp):
    """A function that opens a GGUF file."""

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
    for kind, tolerance in (("fp32", 2e-3), ("fp16", 5e-3)):
        exported = export(make_plan(run, "gguf", dtype=kind, output=tmp_path / kind))
        model = llama(next(exported.folder.glob("*.gguf")))
        assert model.tokenize(TEXT.encode(), special=True) == ids
        assert model.detokenize(ids).decode() == TEXT
        found = logits_of(model, ids)
        off = (found - wanted).norm() / wanted.norm()
        record_property(f"{kind}: logits off by millionths", round(float(off) * 1e6))
        assert off < tolerance
        text = torch.tensor([ids[:20]])
        made = hf.generate(text, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert greedy(model, ids[:20]) == made[0, 20:].tolist()


CUT_BY = {
    "bytes": lambda texts: byte_level(texts, CUT),
    "bytes, whole words first": lambda texts: byte_level(texts, CUT, ignore_merges=True),
    "SentencePiece": lambda texts: sentencepiece(texts, "always"),
    "SentencePiece without a space": lambda texts: sentencepiece(texts, "never"),
}


@pytest.mark.parametrize("how", CUT_BY)
def test_llama_cpp_cuts_text_as_transformers_does(make_run, tmp_path, texts, llama, how):
    """Tokens that were added, and rows without a token, with them."""
    fast = CUT_BY[how](texts)
    fast.add_tokens([AddedToken("<|turn|>", special=True, normalized=False), AddedToken("<tool>", normalized=False)])
    shutil.copytree(run_of(make_run, "llama") / "model", tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    plan = make_plan(tmp_path / "model", "gguf", output=tmp_path / "out", verify="none")
    export(plan)
    model = llama(next((tmp_path / "out").glob("*.gguf")))
    spaced = () if plan.files.notes else ("<|turn|> None<tool> b",)  # of which the notes say that it differs
    for text in (
        TEXT,
        "<|turn|>def x(self):\n<tool>return<|turn|>None",
        "a<tool><tool>b",
        "\u12a0\u121b\u122d 12",
        *spaced,
    ):
        ids = fast(text)["input_ids"]
        assert model.tokenize(text.encode(), special=True) == ids, text
    assert len(fast) < 512


def perplexity(logits, ids):
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_few_bits_keep_what_was_learnt(make_run, tmp_path, llama, record_property, name, tied):
    """The perplexity of a text that was not trained on, of a model that has learnt: far from that of chance, which is 512."""
    sizes = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=256)
    shape = {**SHAPES[name], **{key: size for key, size in sizes.items() if name == "qwen3_moe" or "moe" not in key}}
    run = make_run(
        "llama",
        tied=tied or name in ("gemma", "gemma2"),
        shape=tuple(shape.items()),
        **dict(trainable="full", max_steps=60, max_seq_length=128, per_device_train_batch_size=4, learning_rate=2e-3),
    )
    hf = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager")
    text = (STANDARD_LIBRARY / "textwrap.py").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(run / "model")(text)["input_ids"][:500]
    with torch.no_grad():
        wanted = perplexity(hf(torch.tensor([ids])).logits[0], ids)
    record_property("perplexity in thousandths", round(wanted * 1e3))
    assert wanted < 200
    for kind, tolerance in (("q8_0", 0.01), ("q4_k_m", 0.05)):
        exported = export(make_plan(run, "gguf", quantize=kind, output=tmp_path / kind, verify="none"))
        off = perplexity(logits_of(llama(next(exported.folder.glob("*.gguf"))), ids), ids) / wanted - 1
        record_property(f"{kind}: perplexity higher by millionths", round(off * 1e6))
        assert abs(off) < tolerance


MANY = dict(num_hidden_layers=9, hidden_size=256, intermediate_size=256)
MIXED = {
    "llama": ("llama", False, {}),
    "heads that share keys": ("llama", True, dict(num_attention_heads=8, num_key_value_heads=2)),
    "80 layers": ("llama", False, dict(num_hidden_layers=80)),
    "narrow rows": ("llama", False, dict(hidden_size=96)),
    "qwen2": ("qwen2", True, {}),
    "8 experts": ("qwen3_moe", False, dict(num_experts=8, moe_intermediate_size=256)),
    "4 experts": ("qwen3_moe", True, dict(moe_intermediate_size=256)),
    "gemma2": ("gemma2", True, {}),
    "phi3": ("phi3", False, {}),
    "olmo2": ("olmo2", True, {}),
}


@pytest.mark.parametrize("case", MIXED)
def test_each_tensor_has_as_many_bits_as_llama_cpp_gives_it(make_checkpoint, tmp_path, llama_cpp, case):
    name, tied, changes = MIXED[case]
    folder = make_checkpoint("llama", tied=tied, **{**SHAPES[name], **MANY, **changes})

    def kinds(path):
        return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}

    def ours(how, **choice):
        exported = export(make_plan(folder, "gguf", output=tmp_path / how, verify="none", **choice))
        return next(exported.folder.glob("*.gguf"))

    exact, theirs = ours("fp32", dtype="fp32"), tmp_path / "theirs.gguf"
    for kind in QUANTIZATIONS:
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype, wanted.nthread = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]), 1
        assert not llama_cpp.llama_model_quantize(str(exact).encode(), str(theirs).encode(), ctypes.byref(wanted))
        assert kinds(ours(kind, quantize=kind)) == kinds(theirs), kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["normal", "long-tailed", "even"])
def test_less_is_lost_than_by_ggml(llama_cpp, record_property, how, kind):
    folder = Path(llama_cpp.__file__).parent / "lib"
    quantize = ctypes.CDLL(str(next(folder.glob("libggml-base.*")))).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    place, count = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, place, place, count, count, count, place]
    numbers, form = drawn(how), gguf.GGMLQuantizationType[kind.upper()]
    made = np.zeros(gguf.quant_shape_to_byte_shape(tuple(numbers.shape), form), np.uint8)
    quantize(int(form), numbers.numpy().ctypes.data, made.ctypes.data, 0, *numbers.shape, None)
    theirs = np.linalg.norm(gguf.dequantize(made, form) - numbers.numpy()) / float(numbers.norm())
    record_property("lost by ggml in millionths", round(float(theirs) * 1e6))
    record_property("lost by oomless in millionths", round(lost(numbers, kind) * 1e6))
    assert lost(numbers, kind) < theirs * (1.005 if how == "even" else 1)
