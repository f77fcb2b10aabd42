"""Runs whose tokenizer is extended: planned to the byte, resumed, saved, and read by others."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tests.settings.commands import oomless
from tests.vocabulary.languages import documents
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from oomless.config import TrainConfig
from oomless.data.prepare import TrainingText, prepare
from oomless.errors import ConfigError, ModelError
from oomless.models import extension
from oomless.planning.choose import choose_training, picked_settings
from oomless.planning.plan import plan_training
from oomless.training import loop
from oomless.vocabulary import extend

SLOW = pytest.mark.slow
ROWS = {"trainable": "lora+embed_tokens+lm_head", "trainable_rows": "new", "lora_r": 4}
KINDS = ["byte-level BPE", "BPE", "Unigram"]


@pytest.fixture
def run_of(model_of, text_of, tmp_path):
    def make(kind="BPE", script="Georgian", *, tied=False, architecture="llama", **settings):
        usual = dict(extend_tokenizer=200, max_seq_length=64, max_steps=3, gpu="virtual:64MiB", dtype="fp32")
        return TrainConfig.from_mapping(
            {
                "model": str(model_of(kind, tied=tied, architecture=architecture)),
                "data": str(text_of(script)),
                "output_dir": str(tmp_path / "run"),
                **usual,
                **settings,
            }
        )

    return make


@pytest.mark.parametrize(
    ("kind", "tied", "settings"),
    [
        ("byte-level BPE", False, {"trainable": "full"}),
        ("BPE", True, {**ROWS, "merge_lora": False}),
        pytest.param("BPE", True, {"trainable": "full", "dtype": "bf16"}, marks=SLOW),
        pytest.param("Unigram", False, {"trainable": "embed_tokens+lm_head", "trainable_rows": "new"}, marks=SLOW),
        pytest.param("BPE", True, {"trainable": "lora", "quantization": "nf4", "dtype": "bf16"}, marks=SLOW),
    ],
    ids=str,
)
def test_a_plan_knows_its_peak_to_the_byte(run_of, kind, tied, settings):
    config = run_of(kind, tied=tied, **settings)
    planned = plan_training(config)
    result = loop.train(config)
    assert planned.profile.peak_allocated_bytes == result.peak_memory_bytes
    smaller = plan_training(run_of(kind, tied=tied, **{**settings, "extend_tokenizer": None, "trainable_rows": None}))
    rows = (768 - 512) + (200 if "trainable_rows" in settings else 0)  # those that train are a parameter of their own
    assert planned.parameters - smaller.parameters == rows * 64 * (1 if tied else 2)


@pytest.mark.parametrize(("kind", "tied"), [("BPE", True), *(pytest.param(kind, False, marks=SLOW) for kind in KINDS)])
def test_rows_are_the_mean_of_their_pieces(run_of, kind, tied):
    config = run_of(kind, tied=tied, **ROWS)
    loop.train(config)
    folder = loop.Path(config.output_dir) / "extended"
    noted, new = extension.read(folder), AutoTokenizer.from_pretrained(folder)
    old = AutoTokenizer.from_pretrained(config.model)
    model, _ = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    before = AutoModelForCausalLM.from_pretrained(config.model)
    assert (noted.first, noted.added, noted.rows, len(new)) == (481, 200, 768, 681)
    assert model.config.vocab_size == 768
    assert model.config.tie_word_embeddings == tied
    for place in ("get_input_embeddings", "get_output_embeddings"):
        rows, was = getattr(model, place)().weight, getattr(before, place)().weight
        assert torch.equal(rows[:481], was[:481])
        for number in (481, 500, 680):
            text = new.convert_ids_to_tokens(number)
            pieces = [token.id for token in old.backend_tokenizer.model.tokenize(text)]
            torch.testing.assert_close(rows[number], was[pieces].mean(0))
        torch.testing.assert_close(rows[700], was.mean(0))
    for name, tensor in before.state_dict().items():
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(model.state_dict()[name], tensor)


def test_only_new_rows_move_and_the_final_model_is_whole(run_of):
    config = run_of(trainable="embed_tokens+lm_head", trainable_rows="new", learning_rate=0.1)
    result = loop.train(config)
    run = loop.Path(config.output_dir)
    before = AutoModelForCausalLM.from_pretrained(run / "extended").state_dict()
    after = load_file(result.model_dir / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in after.items():
        moved = (tensor != before[name]).view(len(tensor), -1).any(1).nonzero()[:, 0].tolist()
        assert set(moved) <= set(range(481, 681))
        assert bool(moved) == ("embed_tokens" in name or "lm_head" in name)
    AutoModelForCausalLM.from_pretrained(result.model_dir)
    text = documents("Georgian", 1, seed=3)[0]
    ids = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (run / "extended", result.model_dir)]
    assert ids[0] == ids[1]
    assert max(ids[0]) >= 481


def test_the_adapter_is_peft_s_own_on_the_extended_model(run_of):
    config = run_of(**ROWS, merge_lora=False, learning_rate=0.1)
    result = loop.train(config)
    said = json.loads((result.model_dir / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(said["base_model_name_or_path"])
    assert base.config.vocab_size == 768
    ids = torch.tensor([[481, 490, 5, 600]])
    plain = base(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, result.model_dir)(ids).logits, plain)


@pytest.mark.parametrize(
    "settings", [pytest.param({"trainable": "full"}, marks=SLOW), ROWS], ids=["full", "new rows and LoRA"]
)
def test_a_resumed_run_is_the_same(run_of, settings, tmp_path):
    whole = loop.train(run_of(**settings, max_steps=4, save_steps=2))
    loop.train(run_of(**settings, max_steps=4, save_steps=2, output_dir=str(tmp_path / "b")))
    for made in ("model", "checkpoint-4"):
        (tmp_path / "b" / made).rename(tmp_path / f"was-{made}")
    again = loop.train(run_of(**settings, max_steps=4, resume=True, output_dir=str(tmp_path / "b")))
    left, right = (load_file(folder / "model.safetensors") for folder in (whole.model_dir, again.model_dir))
    assert all(torch.equal(left[name], right[name]) for name in left)
    (tmp_path / "b" / "checkpoint-4").rename(tmp_path / "was-4")
    of_config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text(encoding="utf-8"))
    last = loop.train(TrainConfig.from_mapping({**of_config, "resume": True}))
    right = load_file(last.model_dir / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_that_has_begun_keeps_its_tokens(run_of):
    loop.train(run_of())
    folder = loop.Path(run_of().output_dir) / "extended"
    before = (folder / "tokenizer.json").read_bytes()
    for settings, named in (
        ({"extend_tokenizer": 100}, "extend_tokenizer"),
        ({"extend_tokenizer": 100, "resume": True}, "extend_tokenizer"),
        ({"model": str(run_of("Unigram").model), "resume": True}, "model"),
    ):
        with pytest.raises(ConfigError, match=f"now {named} is .*start anew"):
            loop.train(run_of(**{"max_steps": 6, **settings}))
    assert (folder / "tokenizer.json").read_bytes() == before
    with pytest.raises(ConfigError, match="give --resume"):
        loop.train(run_of())


def held_out_texts(blocks, tokenizer):
    sizes = np.diff(blocks.ends, prepend=0) + 1
    spans = zip(blocks.starts.tolist(), sizes.tolist(), strict=True)
    return {tokenizer.decode(blocks.store.tokens[a : a + n].tolist(), skip_special_tokens=True) for a, n in spans}


def test_what_may_be_held_out_is_not_learnt_from(run_of, tokenizer_of):
    config = run_of(eval_fraction=0.2)
    old = tokenizer_of("BPE")
    read = "".join(text for some in TrainingText(config, old) for text in some)
    loop.train(config)
    new = AutoTokenizer.from_pretrained(loop.Path(config.output_dir) / "extended")
    (held_out,) = prepare(config, new).evaluation.values()
    texts = held_out_texts(held_out, new)
    assert len(texts) > 20
    assert not [text for text in texts if text in read]
    everything = documents("Georgian")
    assert 0.5 < len(read) / sum(map(len, everything)) < 0.7


def test_the_same_documents_are_held_out_whatever_the_tokenizer(run_of, tokenizer_of):
    """So that losses per byte compare."""
    held_out = []
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        (blocks,) = prepare(run_of(kind, eval_fraction=0.1), tokenizer).evaluation.values()
        held_out.append(held_out_texts(blocks, tokenizer))
    assert len(held_out[0] & held_out[1] & held_out[2]) >= 0.8 * len(held_out[0])


@pytest.mark.slow
def test_the_search_plans_and_returns_what_was_given(run_of):
    config = run_of(trainable="full")
    kept = ("model", "data", "max_seq_length", "gpu", "trainable", "extend_tokenizer")
    given = {name: value for name, value in config.to_dict().items() if name in kept}
    choice = choose_training({**given, "trainable_rows": "new"}, keep_trials=False)
    assert picked_settings(choice)["extend_tokenizer"] == 200
    assert picked_settings(choice)["trainable_rows"] == choice.config.trainable_rows == "new"
    assert (choice.config.model, choice.config.tokenizer) == (config.model, None)
    assert choice.plan.parameters == plan_training(choice.config).parameters
    planned = {**choice.config.to_dict(), "output_dir": config.output_dir, "max_steps": 2, "num_train_epochs": None}
    result = loop.train(TrainConfig.from_mapping(planned))
    assert result.peak_memory_bytes == choice.plan.profile.peak_allocated_bytes


def test_what_is_said(run_of):
    config = run_of()
    plan = ["plan", "--model", config.model, "--gpu", "virtual:64MiB", "--max-seq-length", "64", "--as-given"]
    plan += ["--extend-tokenizer", "200"]
    done = oomless(*plan, "--data", config.data[0].path)
    assert done.code == 0
    said = " ".join((done.out + done.err).split())
    for part in ("200 new tokens: ", "tokens a word before", "their rows take 128.00 KiB more as weights"):
        assert part in said
    done = oomless(*plan)
    assert "200 tokens are taken as given" in " ".join((done.out + done.err).split())


@pytest.fixture
def with_added_tokens(model_of, tmp_path):
    """A function that adds tokens to the tokenizer of a model, 481 of whose 512 rows have one, and returns its folder."""

    def make(added, kind="BPE"):
        folder = tmp_path / "with-added"
        shutil.copytree(model_of(kind), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<|kept_{number}|>" for number in range(512 - len(tokenizer))])
        tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.save_pretrained(folder)
        return folder

    return make


TURNS = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BPE", {"trainable": "embed_tokens+lm_head", "trainable_rows": "new", "learning_rate": 0.1}),
        pytest.param("byte-level BPE", ROWS, marks=SLOW),
        pytest.param("Unigram", {"trainable": "full"}, marks=SLOW),
    ],
    ids=str,
)
def test_added_tokens_without_rows_are_given_rows(run_of, with_added_tokens, kind, settings, tmp_path):
    folder = with_added_tokens(TURNS, kind)
    config = run_of(kind, model=str(folder), extend_tokenizer=None, max_steps=2, save_steps=1, **settings)
    planned = plan_training(config)
    result = loop.train(config)
    assert planned.profile.peak_allocated_bytes == result.peak_memory_bytes
    old = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "extended").get_input_embeddings().weight
    assert grown.shape == (640, old.shape[1])
    for number, text in enumerate(TURNS, start=512):
        pieces = AutoTokenizer.from_pretrained(model_of_run(config)).encode(text, add_special_tokens=False)
        assert pieces == [number]
        without = tokenizer_without(folder, 512).encode(text, add_special_tokens=False).ids
        torch.testing.assert_close(grown[number], old[without].mean(0))
    torch.testing.assert_close(grown[600], old.mean(0))
    again = loop.train(replace(config, max_steps=3, resume=True))
    _, loaded = AutoModelForCausalLM.from_pretrained(again.model_dir, output_loading_info=True)
    assert not any(loaded.values())


def model_of_run(config):
    return loop.Path(config.output_dir) / "model"


def tokenizer_without(folder, rows):
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    said["added_tokens"] = [one for one in said["added_tokens"] if one["id"] < rows]
    return Tokenizer.from_str(json.dumps(said))


def test_only_added_tokens_may_have_no_row(with_added_tokens):
    tokenizer = AutoTokenizer.from_pretrained(with_added_tokens(TURNS))
    assert extend.tokens_without_rows(tokenizer, 514) == {}
    assert extend.tokens_without_rows(tokenizer, 512) == dict(enumerate(TURNS, start=512))
    assert len(extend.tokens_without_rows(tokenizer, 481)) == 33
    assert extend.tokens_without_rows(tokenizer, 479) == {}  # one of its own has none: it is another model's


def test_chats_and_little_text(run_of, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(documents("Georgian", 20), documents("Georgian", 20, seed=1), strict=True)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = run_of(data=str(path), chat_template="chatml", extend_tokenizer=100_000, max_seq_length=256)
    loop.train(config)
    noted = extension.read(loop.Path(config.output_dir) / "extended")
    assert 300 < noted.added < noted.asked == 100_000
    assert "of 100,000 asked for: the text has no more" in noted.notes()[0]
    assert noted.tokens_after < 0.2 * noted.tokens_before


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"extend_tokenizer": 0}, ConfigError, "extend_tokenizer must be at least 1; got 0"),
        ({"extend_tokenizer": -5}, ConfigError, "extend_tokenizer must be at least 1"),
        ({"extend_tokenizer": "many"}, ConfigError, "must be a whole number; got 'many'"),
        ({"extend_tokenizer": {}}, ConfigError, "a number of tokens, or {tokens: 4000}; got {}"),
        ({"extend_tokenizer": {"tokens": 5, "how": 1}}, ConfigError, "a number of tokens"),
        ({"extend_tokenizer": {"tokens": None}}, ConfigError, "a number of tokens"),
        ({"extend_tokenizer": [5]}, ConfigError, "must be a whole number"),
        (
            {"extend_tokenizer": None, "trainable_rows": "new", "trainable": "lm_head"},
            ConfigError,
            "has none: set extend",
        ),
        ({"trainable_rows": "newer", "trainable": "lm_head"}, ConfigError, "token ids and ranges"),
        ({"trainable_rows": "new", "trainable": "lora"}, ConfigError, "neither embed_tokens nor lm_head trains"),
    ],
    ids=str,
)
def test_wrong_settings(run_of, settings, error, match):
    with pytest.raises(error, match=match):
        loop.train(run_of(**settings))


def test_wrong_models_and_texts(run_of, tmp_path, model_of):
    twice = tmp_path / "twice.txt"
    twice.write_text("\u10d0", encoding="utf-8")
    with pytest.raises(ConfigError, match="finds nothing to add"):
        loop.train(run_of(data=str(twice), eval_fraction=0.0))
    assert not (tmp_path / "run" / "extended").exists()
    adapter = loop.train(run_of(**ROWS, merge_lora=False)).model_dir
    with pytest.raises(ConfigError, match=r"is an adapter: merge it first"):
        loop.train(run_of(model=str(adapter), output_dir=str(tmp_path / "other")))
    (tmp_path / "run" / "extended" / extension.FILE).write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        loop.train(run_of(resume=True, **ROWS, merge_lora=False))


def test_in_yaml_and_on_the_command_line_it_is_one_setting(run_of):
    assert run_of(extend_tokenizer={"tokens": 200}) == run_of(extend_tokenizer="200") == run_of()
    assert TrainConfig.from_mapping(yaml.safe_load(run_of().to_yaml())) == run_of()


def test_a_model_that_was_extended_has_new_rows_in_a_later_run(run_of, tmp_path):
    first = loop.train(run_of(**ROWS))
    later = dict(model=str(first.model_dir), extend_tokenizer=None, output_dir=str(tmp_path / "later"))
    second = loop.train(run_of(**later, trainable="embed_tokens+lm_head", trainable_rows="new", learning_rate=0.1))
    before, after = (load_file(folder / "model.safetensors") for folder in (first.model_dir, second.model_dir))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (before[name] != after[name]).any(1).nonzero()[:, 0].tolist()
        assert moved
        assert set(moved) <= set(range(481, 681))
