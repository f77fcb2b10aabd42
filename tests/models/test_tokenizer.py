"""Tokenizers that are damaged: one clear error, from whatever the library makes of them."""

import json
import shutil

import pytest

from oomless.data.encode import Encoder
from oomless.errors import ModelError
from oomless.models.tokenizer import load_tokenizer

DAMAGE = {
    "a prefix that no merge has": (("model", "continuing_subword_prefix"), "x", "set it to null"),
    "a prefix that ends in a letter": (("model", "continuing_subword_prefix"), "é", "set it to null"),
    "a template of no token": (("post_processor",), {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }, "give the folder or name of one with --tokenizer"),
    "no model": (("model",), None, "give the folder or name of one with --tokenizer"),
    "merges of one": (("model", "merges"), [["a"]], "give the folder or name of one with --tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_is_one_clear_error(tokenizer_folder, tmp_path, damage):
    (*way, last), value, message = DAMAGE[damage]
    folder = shutil.copytree(tokenizer_folder, tmp_path / "damaged")
    said = json.loads((folder / "tokenizer.json").read_text())
    place = said
    for key in way:
        place = place[key]
    place[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(str(folder))


def test_merges_that_have_the_prefix_are_loaded(tokenizer_folder, tmp_path):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "prefixed")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["continuing_subword_prefix"] = "##"
    said["model"]["vocab"] |= {"##b": 60000, "ab": 60001}
    said["model"]["merges"] = [["a", "##b"]]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    assert load_tokenizer(str(folder)).convert_tokens_to_ids("ab") == 60001


@pytest.mark.parametrize(("number", "message"), [(2**31, "numbers end at"), (None, "two tokens have one number")])
def test_wrong_numbers_of_tokens_are_one_clear_error(tokenizer_folder, tmp_path, number, message):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "numbered")
    said = json.loads((folder / "tokenizer.json").read_text())
    first, second = ("".join(merge) for merge in said["model"]["merges"][:2])
    said["model"]["vocab"][first] = number or said["model"]["vocab"][second]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=message):
        Encoder(load_tokenizer(str(folder)))
