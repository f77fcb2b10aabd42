"""Tokenizers of both great families, and text of every kind that tends to be lost."""

import pytest

from oomless.data.encode import Encoder

SCRIPTS = {
    "cjk": "天地玄黃，宇宙洪荒。日本語のテキスト、한국어 문장입니다。𠮷野家",
    "arabic": "بِسْمِ ٱللَّٰهِ \u200fمرحبا\u200f ١٢٣",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭",
    "combining": "e\u0301 é ñ n\u0303 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L",
    "nul": "before\x00after\x00\x00",
    "crlf": "one\r\ntwo\r\n\r\nthree",
    "cr": "one\rtwo\r\rthree\r",
    "bom": "\ufefffirst \ufeffmiddle\ufeff",
    "spaces": "  two,\t tab,   three,\u00a0nbsp \u3000 wide  ",
    "separators": "line\u2028paragraph\u2029next\x0bvt\x0cff\x85nel\x1c",
    "lines": "\n\n\n  indented\n\n\n\n",
    "private": "\ue000\ufffd\uffff\U0010ffff\ufffe",
}


@pytest.fixture(params=SCRIPTS, ids=list(SCRIPTS))
def script(request) -> str:
    return SCRIPTS[request.param]


def _sentencepiece_like(texts, normalising):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = trained.get_vocab()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(learnt, key=learnt.get)])}
    merges = [tuple(pair) for pair in _merges(trained)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalising:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _merges(tokenizer):
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]


@pytest.fixture(scope="session")
def encoders(tokenizer_folder, texts) -> dict[str, Encoder]:
    """A byte-level one; two in SentencePiece's manner with byte fallback; RoBERTa's, which puts a space in front."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    byte_level = AutoTokenizer.from_pretrained(tokenizer_folder)
    prefixed = AutoTokenizer.from_pretrained(tokenizer_folder)
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "byte-level": Encoder(byte_level),
        "metaspace": Encoder(_sentencepiece_like(texts, normalising=False)),
        "prepend": Encoder(_sentencepiece_like(texts, normalising=True)),
        "prefix-space": Encoder(prefixed),
    }


@pytest.fixture(params=["byte-level", "metaspace", "prepend", "prefix-space"])
def any_encoder(request, encoders) -> Encoder:
    return encoders[request.param]


@pytest.fixture(scope="session")
def encoder(encoders) -> Encoder:
    return encoders["byte-level"]
