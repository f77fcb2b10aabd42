"""Text in three scripts from CLDR's locale data, as Babel ships it, and tokenizers of three kinds that know none of them."""

import random
from functools import cache

from babel import Locale
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SCRIPTS = {"Georgian": "ka", "Amharic": "am", "Hindi": "hi"}
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def names(script):
    """All names of languages, territories, currencies and scripts in a language."""
    locale = Locale(SCRIPTS[script])
    parts = (locale.languages, locale.territories, locale.currencies, locale.scripts)
    return [str(name) for part in parts for _, name in sorted(part.items())]


def documents(script, count=200, seed=0):
    """Documents of sentences of names, most often of the first hundred."""
    chance, known = random.Random(seed), names(script)
    often = [1 / (1 + place // 10) for place in range(len(known))]
    return [
        "\n".join(", ".join(chance.choices(known, often, k=8)) + "." for _ in range(chance.randint(2, 8)))
        for _ in range(count)
    ]


def bytes_bpe(texts, size=480, **settings):
    tokenizer = Tokenizer(models.BPE(**settings))
    split = pre_tokenizers.Split(Regex(CUT), "isolated")
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, of_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens(["<|turn|>"], special_tokens=True)  # an id above those of the model
    return fast


def characters_bpe(texts, size=480):
    """As Gemma's: no words, characters that are not known as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer.from_str(_without_bytes(tokenizer.to_str()))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_tokens(["<|turn|>"], special_tokens=True)
    return fast


def unigram(texts, size=480):
    """As XGLM's, and with bytes for what is not known, so that all text comes back."""
    tokenizer = Tokenizer(models.Unigram(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    import json

    said = json.loads(_without_bytes(tokenizer.to_str()))
    said["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(said))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_tokens(["<|turn|>"], special_tokens=True)
    return fast


def _without_bytes(text):
    """The tokenizer in JSON, whose bytes are pieces of its model and no added tokens."""
    import json

    said = json.loads(text)
    said["added_tokens"] = [added for added in said["added_tokens"] if not added["content"].startswith("<0x")]
    return json.dumps(said)


KINDS = {"byte-level BPE": bytes_bpe, "BPE": characters_bpe, "Unigram": unigram}
