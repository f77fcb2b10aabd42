"""GGUF files are read by readers that we did not write."""

import json
import re
import shutil

import gguf
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from oomless.errors import ConfigError, ModelError
from oomless.export.gguf_mixtures import QUANTIZATIONS
from oomless.export.plan import make_plan
from oomless.export.run import export
from oomless.export.stream import first_difference

from .test_export import MODES

LORA = {"trainable": "lora", "lora_r": 4}
TEXT = "def export(self, name):\n    return self.what(name) or None\n"
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, hidden_activation="gelu_pytorch_tanh")
SHAPES = {
    "llama": dict(),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        **dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    ),
    "gemma": dict(model_type="gemma", head_dim=16, hidden_activation="gelu_pytorch_tanh"),
    "gemma2": dict(model_type="gemma2", sliding_window=16, **GEMMA),
    "gemma3": dict(model_type="gemma3_text", sliding_window=16, num_hidden_layers=7, **GEMMA),
    "phi3": dict(model_type="phi3"),
    "olmo2": dict(model_type="olmo2"),
}
WIDE = (("hidden_size", 256),)
READ_BY_TRANSFORMERS = [name for name in SHAPES if name not in ("gemma", "olmo2")]


def run_of(make_run, name, tied=False, **settings):
    return make_run(
        "llama", tied=tied or name in ("gemma", "gemma2"), shape=tuple(SHAPES[name].items()), **{**LORA, **settings}
    )


def logits(folder, file=None, config=None):
    """What transformers makes of a text; of a GGUF file it takes the weights and the tokenizer, but not all of the config."""
    of_file = {} if file is None else {"gguf_file": file}
    ids = AutoTokenizer.from_pretrained(folder, **of_file)(TEXT, return_tensors="pt")["input_ids"]
    if config is not None and (of_config := AutoConfig.from_pretrained(config)).model_type != "mistral":
        of_file["config"] = of_config
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **of_file)
    with torch.no_grad():
        return ids, model(ids).logits


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, False) for name in READ_BY_TRANSFORMERS), ("llama", True), ("qwen3", True)]
)
def test_transformers_reads_what_was_trained(make_run, tmp_path, name, tied):
    run = run_of(make_run, name, tied)
    exported = export(make_plan(run, "gguf", output=tmp_path / "out"))
    assert exported.checked.how == "full"
    ids, found = logits(exported.folder, "model-f32.gguf", run / "model")
    wanted_ids, wanted = logits(run / "model")
    assert torch.equal(ids, wanted_ids)
    assert (found - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZATIONS if "_k" in kind])
def test_transformers_reads_k_quants(make_run, tmp_path, kind):
    """Of rows that are a multiple of 256 and of such that are not."""
    run = make_run("qwen2", shape=WIDE, trainable="full")
    plan = make_plan(run, "gguf", quantize=kind, output=tmp_path / "out")
    assert export(plan).checked.how == "full"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / f"model-{kind}.gguf").tensors}
    assert stored["blk.1.ffn_up.weight"].tensor_type.name == kind.upper()[:4]
    assert stored["blk.1.ffn_down.weight"].tensor_type.name in ("Q4_0", "Q5_0", "Q5_1", "Q8_0")
    assert kind[:4] in plan.files.dtype
    assert "not all rows are a multiple of 256" in plan.files.dtype


@pytest.mark.parametrize("name", ["gemma", "olmo2"])
def test_what_transformers_does_not_read_is_read_back(make_run, tmp_path, name):
    run = run_of(make_run, name)
    with pytest.raises(ConfigError, match="--verify sample"):
        make_plan(run, "gguf", output=tmp_path / "out", verify="full")
    assert export(make_plan(run, "gguf", output=tmp_path / "out")).checked.how == "sample"


OF_GGUF = {
    **{mode: made for mode, made in MODES.items() if made[0] in ("llama", "qwen2", "qwen3")},
    "experts": ("qwen3_moe", False, LORA),
    "experts, nf4": ("qwen3_moe", False, {**LORA, "quantization": "nf4"}),
    "experts, full": ("qwen3_moe", False, {"trainable": "full"}),
    # By a larger scale two steps leave logits that are almost the same for every token: what is left of them, four bits may lose.
    "rank-stabilised, tied": ("gemma2", True, {**LORA, "use_rslora": True, "lora_alpha": 8}),
}
TARGETS = dict.fromkeys(("fp32", "bf16", "fp16", *QUANTIZATIONS), pytest.mark.full_length)
TARGETS |= {"fp32": (), **dict.fromkeys(("fp16", "q8_0", "q4_k_m"), pytest.mark.slow)}


@pytest.mark.parametrize("mode", OF_GGUF)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=marks) for kind, marks in TARGETS.items()])
def test_every_mode_in_every_form(make_run, tmp_path, record_property, mode, kind):
    """Read by transformers, its logits are within the tolerance of the form; in fp32 they are those of the run's own final model."""
    name, tied, settings = OF_GGUF[mode]
    run = make_run("llama", tied=tied, shape=tuple(SHAPES[name].items()), **settings)
    choice = {"quantize": kind} if kind in QUANTIZATIONS else {"dtype": kind}
    exported = export(make_plan(run, "gguf", output=tmp_path / "out", verify="full", **choice))
    record_property("logits off by millionths", round(exported.checked.error * 1e6))
    assert exported.checked.error <= exported.checked.tolerance
    if kind == "fp32":
        _, found = logits(exported.folder, "model-f32.gguf", run / "model")
        _, wanted = logits(run / "model")
        assert (found - wanted).norm() / wanted.norm() < 1e-5


def merged_and_stored(make_run, tmp_path, kind):
    run = run_of(make_run, "qwen2")
    choice = {"quantize": kind} if kind in QUANTIZATIONS else {"dtype": kind}
    plan = make_plan(run, "gguf", output=tmp_path / kind, **choice)
    export(plan)
    (path,) = (tmp_path / kind).glob("*.gguf")
    reader = gguf.GGUFReader(path)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).state_dict()
    stored = {tensor.name: tensor for tensor in reader.tensors}
    return plan, reader, model["model.layers.1.mlp.down_proj.weight"], stored


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", *QUANTIZATIONS])
def test_each_form_is_as_exact_as_it_is_defined(make_run, tmp_path, kind):
    """Of the numbers of a block of 32, by a step of its scale."""
    plan, _, wanted, stored = merged_and_stored(make_run, tmp_path, kind)
    tensor = stored["blk.1.ffn_down.weight"]
    found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    blocks = wanted.unflatten(1, (-1, 32))
    wide = blocks.abs().amax(-1, keepdim=True)
    bits = {"F32": 24, "BF16": 9, "F16": 12}.get(tensor.tensor_type.name) or int(tensor.tensor_type.name[1])
    errors = ((found.unflatten(1, (-1, 32)) - blocks).abs() / wide).max()
    assert 0 <= float(errors) <= 2.0 ** (1 - bits) * 1.1
    assert (
        first_difference(plan.target / f"model-{tensor_kind(kind)}.gguf", next(iter(plan.files.streams.values())), int)
        is None
    )
    assert {t.tensor_type.name for name, t in stored.items() if "norm" in name or name.endswith("bias")} == {"F32"}


def tensor_kind(kind):
    return {"fp32": "f32", "fp16": "f16"}.get(kind, kind)


def test_what_is_said_of_the_model(make_run, tmp_path):
    _, reader, _, _ = merged_and_stored(make_run, tmp_path, "fp16")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "qwen2"
    assert said["qwen2.block_count"] == 2
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "qwen2"
    assert len(said["tokenizer.ggml.tokens"]) == 512
    assert said["tokenizer.ggml.eos_token_id"] == 0
    assert "FROM ./model-f16.gguf" in (tmp_path / "fp16" / "Modelfile").read_text()


CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(texts, cut, **settings):
    tokenizer = Tokenizer(models.BPE(**settings))
    split = pre_tokenizers.Split(Regex(cut), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<think>")])
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def sentencepiece(texts, space="first"):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=space)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("ignoring", "name"), [(False, "dbrx"), (True, "llama-bpe")])
def test_added_tokens_padding_and_a_template(make_run, tmp_path, texts, ignoring, name):
    run = tmp_path / "run"
    fast = byte_level(texts, CUT, ignore_merges=ignoring)
    said = said_with(make_run, run, fast)
    assert said["tokenizer.ggml.pre"] == name
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert (tokens[400], kinds[400]) == ("<|im_start|>", gguf.TokenType.CONTROL)
    assert (tokens[401], kinds[401]) == ("<think>", gguf.TokenType.USER_DEFINED)
    assert (tokens[511], kinds[511]) == ("[PAD511]", gguf.TokenType.UNUSED)
    assert said["tokenizer.chat_template"] == fast.chat_template


@pytest.mark.parametrize(("space", "said"), [("first", 1), ("always", 1), ("never", 0)])
def test_a_space_that_llama_cpp_puts_elsewhere_is_said(make_run, tmp_path, texts, space, said):
    folder = tmp_path / "model"
    shutil.copytree(run_of(make_run, "llama") / "model", folder)
    sentencepiece(texts, space).save_pretrained(folder)
    plan = make_plan(folder, "gguf", output=tmp_path / "out")
    assert len(plan.to_dict()["notes"]) == said


def test_a_way_to_cut_text_that_is_not_known_is_refused(make_run, tmp_path, texts):
    with pytest.raises(ModelError, match=re.escape("convert_hf_to_gguf.py")):
        said_with(make_run, tmp_path / "run", byte_level(texts, "[a-c]+"))


def said_with(make_run, run, fast):
    shutil.copytree(run_of(make_run, "llama") / "model", run)
    fast.save_pretrained(run)
    out = run.parent / "out"
    export(make_plan(run, "gguf", output=out, verify="sample"))
    return {name: field.contents() for name, field in gguf.GGUFReader(next(out.glob("*.gguf"))).fields.items()}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", dict(model_type="gpt2", n_layer=2, n_head=4, n_positions=512), "convert_hf_to_gguf.py"),
        ("llama", dict(mlp_bias=True), "mlp_bias"),
        ("llama", dict(hidden_act="relu"), "hidden_act relu"),
        ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob"),
        ("gemma2", dict(query_pre_attn_scalar=32), "query_pre_attn_scalar 32"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(make_checkpoint, tmp_path, name, changes, message):
    folder = make_checkpoint("llama", tied=name == "gemma2", **{**SHAPES[name], **changes})
    with pytest.raises(ModelError, match=message):
        make_plan(folder, "gguf", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"quantize": "iq4_xs"}, "got 'iq4_xs'.*llama-quantize"),
        ({"quantize": "q4-k-m"}, "Did you mean 'q4_k_m'?"),
        ({"quantize": "q8_0", "dtype": "bf16"}, "keep one"),
    ],
)
def test_what_is_not_made_is_said(make_run, tmp_path, choice, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(run_of(make_run, "llama"), "gguf", output=tmp_path / "out", **choice)


def test_factors_of_the_rotation(make_checkpoint, tmp_path):
    rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    folder = make_checkpoint_with(make_checkpoint, tmp_path, {**rope, "original_max_position_embeddings": 64})
    export(make_plan(folder, "gguf", output=tmp_path / "out", verify="sample"))
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors}
    assert list(tensors["rope_freqs.weight"][[0, -1]]) == pytest.approx([1, 8])


def make_checkpoint_with(make_checkpoint, tmp_path, rope):
    folder = tmp_path / "scaled"
    shutil.copytree(make_checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    return folder
