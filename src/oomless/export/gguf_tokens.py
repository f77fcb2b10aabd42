"""A fast tokenizer in the terms of llama.cpp: byte-level BPE with the name of how text is cut first, or SentencePiece's two with scores."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from oomless.errors import ModelError
from oomless.export.gguf_models import CONVERTER

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS_SPELT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    f"{_CONTRACTIONS}|{_REST % '{1,3}'}": "dbrx",
    f"{_CONTRACTIONS}|{_REST % ''}": "qwen2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
"""The expressions by which text is cut, and llama.cpp's names for them."""

_IGNORING_MERGES = {"dbrx": "llama-bpe"}
"""Those of tokenizers that take a word that is a token whole, whatever the merges say."""


def describe(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Tell ``writer``, gguf's, of ``tokenizer``, of a model with ``vocabulary`` rows.

    Raises:
        ModelError: llama.cpp has no tokenizer like it.
    """
    from gguf import TokenType

    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    unigram = model["type"] == "Unigram"
    if not unigram and model["type"] != "BPE":
        raise _unknown(f"is {model['type']}")
    vocab = {text: number for number, (text, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    unknown = model["unk_id"] if unigram else vocab.get(model.get("unk_token"))
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
    by_bytes = (
        not unigram
        and "ByteLevel" in json.dumps(said.get("decoder"))
        or "ByteLevel" in json.dumps(said.get("pre_tokenizer"))
    )
    if not (by_bytes or unigram) and not model.get("byte_fallback"):
        raise _unknown("has neither bytes nor SentencePiece's fallback to them")
    beyond = max([*vocab.values(), *(added["id"] for added in said["added_tokens"])])
    if beyond >= vocabulary:
        raise ModelError(
            f"the tokenizer has a token of number {beyond}, and the model rows for {vocabulary} tokens: the two do not belong together"
        )
    texts = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [TokenType.UNUSED] * vocabulary
    for text, number in vocab.items():
        texts[number] = text
        kinds[number] = TokenType.BYTE if not by_bytes and _BYTE.fullmatch(text) else TokenType.NORMAL
        if number == unknown:
            kinds[number] = TokenType.UNKNOWN
    for added in said["added_tokens"]:
        number, text = added["id"], added["content"]
        if kinds[number] == TokenType.UNKNOWN:
            continue
        texts[number] = text if added["special"] else text.replace(_SPACE, " ")
        kinds[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2" if by_bytes else "t5" if unigram else "llama")
    writer.add_tokenizer_pre(_cut(said["pre_tokenizer"], bool(model.get("ignore_merges"))) if by_bytes else "default")
    writer.add_token_list(texts)
    if not by_bytes:
        if unigram:
            _describe_spelling(writer, said)
            writer.add_token_scores([*(score for _, score in model["vocab"]), *[0.0] * (vocabulary - len(vocab))])
        else:
            writer.add_token_scores(_scores(texts, kinds, merges))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(_SPACE))
    writer.add_token_types(kinds)
    if by_bytes:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    _describe_special(writer, tokenizer)


def notes(tokenizer: Any) -> tuple[str, ...]:
    """Return what llama.cpp cuts otherwise than ``tokenizer``, of one that it has."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] == "Unigram":
        known = "characters that the tokenizer does not know are its unknown token in llama.cpp, and bytes elsewhere"
        return (known,) if model.get("byte_fallback") else ()
    special = next(iter(tokenizer.all_special_tokens), None)
    if special is None or not tokenizer.tokenize("a")[0].startswith(_SPACE):
        return ()
    texts = ("a", f"{special}a", f"{special} a")
    alone, after, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    if after[1:] == alone and spaced != after:
        return ()
    return ("after a special token llama.cpp puts a space before the text, always; this tokenizer does not",)


def _describe_spelling(writer: Any, said: dict[str, Any]) -> None:
    """Tell how a Unigram tokenizer spells text before it cuts it.

    Raises:
        ModelError: llama.cpp does not do so.
    """
    normalizers, cuts = _parts(said.get("normalizer"), "normalizers"), _parts(said["pre_tokenizer"], "pretokenizers")
    charsmaps = [part["precompiled_charsmap"] for part in normalizers if part["type"] == "Precompiled"]
    one_space = any(part["type"] == "Replace" and part["pattern"].get("Regex") == " {2,}" for part in normalizers)
    known = {"Precompiled", "Replace"} | ({"Strip"} if one_space else set())
    known_cuts = {"Metaspace"} | ({"WhitespaceSplit"} if charsmaps and one_space else set())
    replaces = sum(part["type"] == "Replace" for part in normalizers)
    if {part["type"] for part in normalizers} - known or len(charsmaps) > 1 or replaces > one_space:
        raise _unknown("spells text in a way that llama.cpp does not")
    if {part["type"] for part in cuts} - known_cuts or not cuts:
        raise _unknown("cuts text in a way that is none of llama.cpp's that are known here")
    if charsmaps:
        writer.add_precompiled_charsmap(base64.b64decode(charsmaps[0]))
    writer.add_remove_extra_whitespaces(one_space)


def _parts(said: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the parts of a sequence, one after the other."""
    if said is None:
        return []
    return [part for one in said[name] for part in _parts(one, name)] if said["type"] == "Sequence" else [said]


def _scores(texts: list[str], kinds: list[Any], merges: list[list[str]]) -> list[float]:
    """Return SentencePiece's scores: the earlier a token is merged, the higher."""
    from gguf import TokenType

    ranks: dict[str, int] = {}
    for pair in merges:
        ranks.setdefault("".join(pair), len(ranks))
    last = len(ranks)
    return [
        -float(ranks.get(text, last)) if kind == TokenType.NORMAL else 0.0
        for text, kind in zip(texts, kinds, strict=True)
    ]


def _cut(before: dict[str, Any], ignores_merges: bool) -> str:
    parts = _parts(before, "pretokenizers")
    expressions = [part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split"]
    bytes_part = next((part for part in parts if part["type"] == "ByteLevel"), {})
    others = [part["type"] for part in parts if part["type"] not in ("Split", "ByteLevel")]
    name = None
    if bytes_part.get("add_prefix_space"):
        raise _unknown("puts a space before a text")
    if len(expressions) == 1 and not others and not bytes_part.get("use_regex"):
        name = _CUTS.get(expressions[0].replace(_CONTRACTIONS_SPELT, _CONTRACTIONS))
    elif not expressions and bytes_part.get("use_regex", True):
        individual = [part for part in parts if part["type"] == "Digits" and part.get("individual_digits")]
        name = "gpt-2" if not others else "smollm" if others == ["Digits"] and individual else None
    if name is None:
        raise _unknown("cuts text in a way that is none of llama.cpp's that are known here")
    return _IGNORING_MERGES.get(name, name) if ignores_merges else name


def _describe_special(writer: Any, tokenizer: Any) -> None:
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        writer.add_chat_template(template if isinstance(template, str) else template["default"])


def _unknown(how: str) -> ModelError:
    return ModelError(
        f"the tokenizer {how}: export the model with --to safetensors, then {CONVERTER} FOLDER, which knows some by their names"
    )
