"""Tiny models whose tokenizers know English alone, and text in other scripts."""

import json

import pytest
import torch
from tests.vocabulary.languages import KINDS, SCRIPTS, documents


@pytest.fixture(scope="session")
def tokenizer_of(texts):
    """A function that returns a tokenizer of a kind."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = KINDS[kind](texts)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, tokenizer_of):
    """A function that returns the folder of a tiny model with the tokenizer of a kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(kind, *, tied=False, architecture="llama"):
        key = (kind, tied, architecture)
        if key not in made:
            config = AutoConfig.for_model(
                architecture,
                **dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2),
                **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512),
                **dict(tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, pad_token_id=None),
            )
            torch.manual_seed(1)
            made[key] = tmp_path_factory.mktemp("model")
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made[key])
            tokenizer_of(kind).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_of(tmp_path_factory):
    """A function that returns a file of documents in a script."""
    folder = tmp_path_factory.mktemp("text")

    def make(script):
        path = folder / f"{script}.jsonl"
        if not path.exists():
            lines = [json.dumps({"text": text}) + "\n" for text in documents(script)]
            path.write_text("".join(lines), encoding="utf-8")
        return path

    assert set(SCRIPTS) == {"Georgian", "Amharic", "Hindi"}
    return make
