"""Chats become the tokens that their template writes, and what is learnt of them is each answer, to the token, once."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tests.data.conftest import SCRIPTS

from oomless.config import DataSource, TrainConfig
from oomless.data.chat import TEMPLATES, ChatEncoder, form_of, load_template, read
from oomless.data.encode import Encoder
from oomless.data.loader import Loader
from oomless.data.pack import IGNORED
from oomless.data.prepare import prepare
from oomless.errors import ConfigError, DataError

SPECIAL = re.compile(
    r"<\|[^|<>\s']+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<[a-z]+_of_turn>|\[/?[A-Z_]+\]|<end_of_utterance>|<turn\|>|<\|turn>|<sop>"
)
"""What looks like a special token in a template."""


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*contents, system=None):
    """Return turns of the user and the assistant, one after the other."""
    turns = [turn("user" if number % 2 == 0 else "assistant", content) for number, content in enumerate(contents)]
    return [turn("system", system), *turns] if system else turns


CHATS = [
    chat("What is it?", "A thing."),
    chat("What is it?", "A thing.", " And now?\n", "  Nothing\n\nmore.  ", "ok", "fine \U0001f44d!"),
    chat("Hi", "Hello there", "bye", "Bye.", system="Be short."),
    chat("x", "y", "no answer"),
]


@pytest.fixture(scope="session")
def make_tokenizer(tokenizer_folder):
    """Return a function that makes a tokenizer with a template, and of its own what looks like special tokens there."""
    from transformers import AutoTokenizer

    def make(template=None, special=None):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, bos_token="<|start|>")
        found = SPECIAL.findall(template or "") if special is None else special
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(found))})
        tokenizer.chat_template = template
        return tokenizer

    return make


def encoded(tokenizer, *records, loss_on="assistant", notes=None):
    """Return the ids of each document, and which are learnt."""
    notes = Counter() if notes is None else notes
    conversations = [read(f"record {n}", record, form_of(record)) for n, record in enumerate(records, start=1)]
    chats = ChatEncoder(tokenizer, Encoder(tokenizer), loss_on)
    return [(ids.tolist(), learnt.tolist()) for ids, learnt in chats.documents(conversations, np.uint32, notes)]


def parts(tokenizer, document):
    """Return the text of each run of learnt tokens."""
    ids, learnt = document
    runs = [[]]
    for number, is_learnt in zip(ids, learnt, strict=True):
        if is_learnt:
            runs[-1].append(number)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.backend_tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


# Against TRL


SAME_AS_TRL = (
    *("cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl"),
    *("qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
)
"""Templates of models whose marked variants in TRL mark what follows the template's prompt for an answer, no more, no less. Some
mark the prompt's own tokens too, and some write reasoning that the model's template leaves out."""


def trl_template(name):
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_answers_found_in_a_template_without_marks_are_those_that_trl_marks(make_tokenizer, name):
    tokenizer = make_tokenizer(trl_template(name))
    marked = trl_template(f"{name}_training")
    compared = 0
    for messages in CHATS:
        try:
            expected = tokenizer.apply_chat_template(
                messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            with pytest.raises(DataError, match=re.escape(str(error))):
                encoded(tokenizer, {"messages": messages})
            continue
        ((ids, learnt),) = encoded(tokenizer, {"messages": messages})
        assert ids == expected["input_ids"]
        assert learnt == [bool(is_marked) for is_marked in expected["assistant_masks"]]
        compared += sum(learnt) > 0
    assert compared >= 3


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_marks_are_taken_as_they_are(make_tokenizer, name):
    tokenizer, plain = make_tokenizer(trl_template(f"{name}_training")), make_tokenizer(trl_template(name))
    assert encoded(tokenizer, {"messages": CHATS[1]}) == encoded(plain, {"messages": CHATS[1]})
    assert encoded(tokenizer, {"messages": CHATS[1]}, loss_on="completion") == encoded(
        plain, {"messages": CHATS[1]}, loss_on="completion"
    )


def test_a_template_that_rewrites_earlier_answers(make_tokenizer):
    """Qwen 3 writes (empty) reasoning before the last answer alone: each answer is learnt as the model would give it, once."""
    tokenizer = make_tokenizer(trl_template("qwen3"))
    notes = Counter()
    documents = encoded(tokenizer, {"messages": chat("a", "one", "b", "two", "c", "three")}, notes=notes)
    assert sorted(text for document in documents for text in parts(tokenizer, document)) == [
        f"<think>\n\n</think>\n\n{answer}<|im_end|>\n" for answer in ("one", "three", "two")
    ]
    assert notes["answers as documents of their own, because the chat template rewrites earlier ones"] == 2
    for document in documents:
        assert tokenizer.decode(document[0]).count("<think>") == 1


def test_what_the_prompt_for_an_answer_holds_is_not_learnt(make_tokenizer):
    """DeepSeek R1 opens its reasoning in the prompt, and leaves it out of answers."""
    tokenizer = make_tokenizer(trl_template("deepseek_r1_distill"))
    (document,) = encoded(tokenizer, {"messages": chat("a", "one", "b", "two")})
    assert parts(tokenizer, document) == [
        f"{answer}<\uff5cend\u2581of\u2581sentence\uff5c>" for answer in ("one", "two")
    ]


def test_a_template_that_ends_answers_by_nothing(make_tokenizer):
    """In GLM 4 the next role ends an answer, and behind the last answer is none."""
    tokenizer = make_tokenizer(trl_template("glm4moe"))
    notes = Counter()
    (document,) = encoded(tokenizer, {"messages": chat("a", "one")}, notes=notes)
    assert document[0][-1] == tokenizer.eos_token_id
    assert parts(tokenizer, document)[-1].endswith("one<|endoftext|>")
    assert notes["answers ended by eos_token, because the chat template ends them by nothing"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_AS_TRL[:10])
def test_tokens_labels_and_loss_of_trl(make_tokenizer, make_checkpoint, tmp_path, name):
    """SFTTrainer prepares the same chats and computes the loss of one batch, with a model that has random weights."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer(trl_template(name))
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"), attn_implementation="eager")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    chats = [messages for messages in CHATS if name != "gemma" or messages[0]["role"] != "system"]
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, packing=False, max_length=4096, report_to="none",
        per_device_train_batch_size=len(chats), use_cpu=True, bf16=False, activation_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"messages": messages} for messages in chats])
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    theirs = next(iter(trainer.get_train_dataloader()))
    documents = encoded(make_tokenizer(trl_template(name)), *({"messages": messages} for messages in chats))
    ours = sorted(
        [token if is_learnt else IGNORED for token, is_learnt in zip(*document, strict=True)] for document in documents
    )
    rows = zip(theirs["labels"], theirs["attention_mask"], strict=True)
    assert sorted(labels[mask.bool()].tolist() for labels, mask in rows) == ours
    rows = zip(theirs["input_ids"], theirs["attention_mask"], strict=True)
    assert sorted(ids[mask.bool()].tolist() for ids, mask in rows) == sorted(ids for ids, _ in documents)
    with torch.no_grad():
        expected = float(trainer.compute_loss(model, dict(theirs)))
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
        config = make_config(tmp_path / "chats.jsonl", tmp_path, max_seq_length=4096, eval_fraction=0.0)
        blocks = list(prepare(config, make_tokenizer(trl_template(name))).train.sources[0])
        total, count = 0.0, 0
        for block in blocks:
            begins = np.cumsum([0, *block.document_lengths])
            for begin, end in zip(begins, begins[1:], strict=False):
                labels = torch.from_numpy(block.labels[begin:end])
                if (labels != IGNORED).any():
                    logits = model(torch.from_numpy(block.input_ids[None, begin:end])).logits[0].float()
                    total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                    count += int((labels != IGNORED).sum())
    assert total / count == pytest.approx(expected, rel=1e-5)


# What a record is


def test_records_are_recognised_by_their_keys():
    records = [
        {"messages": []},
        {"conversations": []},
        {"prompt": "", "completion": ""},
        {"instruction": "", "input": "", "output": "", "text": ""},
        {"instruction": "", "context": "", "response": ""},
        {"text": ""},
        {"prompt": ""},
        {"instruction": ""},
    ]
    forms = ["messages", "conversations", "completion", "instruction", "instruction", None, None, None]
    assert [form_of(record) for record in records] == forms


def test_every_form_says_the_same(make_tokenizer):
    asked, answer = "Add:\n\n1 and 2", "3"
    forms = [
        {"messages": chat(asked, answer, system="Be short.")},
        {
            "messages": [
                turn("system", "Be short."),
                turn("user", [{"type": "text", "text": asked}]),
                turn("assistant", answer),
            ]
        },
        {
            "messages": [
                {**message, "tool_calls": None, "name": None} for message in chat(asked, answer, system="Be short.")
            ]
        },
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}], "system": "Be short."},
        {"conversations": chat(asked, answer, system="Be short.")},
        {"prompt": chat(asked, system="Be short."), "completion": [turn("assistant", answer)]},
        {"instruction": "Add:", "input": "1 and 2", "output": answer, "system": "Be short."},
        {"instruction": "Add:", "context": "1 and 2", "response": answer, "system": "Be short."},
        {"instruction": asked, "output": answer, "system": "Be short."},
    ]
    tokenizer = make_tokenizer(TEMPLATES["plain"])
    documents = encoded(tokenizer, *forms)
    assert documents == [documents[0]] * len(forms)
    assert tokenizer.decode(documents[0][0]) == f"System: Be short.\nUser: {asked}\nAssistant: 3<|endoftext|>\n"
    assert parts(tokenizer, documents[0]) == [" 3<|endoftext|>\n"]


@pytest.mark.parametrize("name", ["plain", "chatml"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_in_any_script_are_learnt_to_the_token(make_tokenizer, name, script):
    answers = [SCRIPTS[script], f"{SCRIPTS[script]} again"]
    template = TEMPLATES[name]
    begin, end = {"plain": (" ", "<|endoftext|>\n"), "chatml": ("", "<|im_end|>\n")}[name]
    if name == "chatml" and script == "lines":
        begin = "\n"  # one token holds the line end of the prompt and those of the answer
    tokenizer = make_tokenizer(template, special=["<|im_start|>", "<|im_end|>"])
    (document,) = encoded(tokenizer, {"messages": chat("first " + answers[0], answers[0], answers[0], answers[1])})
    assert parts(tokenizer, document) == [begin + answer + end for answer in answers]


def test_an_assistant_that_speaks_first(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["plain"])
    (document,) = encoded(tokenizer, {"messages": [turn("assistant", "Hello."), *chat("a", "one")]})
    assert parts(tokenizer, document) == [" Hello.<|endoftext|>\n", " one<|endoftext|>\n"]


def test_what_loss_is_on(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["plain"])
    record = {"messages": chat("a", "one", "b", "two")}

    def learnt(loss_on, record=record):
        (document,) = encoded(tokenizer, record, loss_on=loss_on)
        return parts(tokenizer, document)

    assert learnt("assistant") == [" one<|endoftext|>\n", " two<|endoftext|>\n"]
    assert learnt("completion") == [" two<|endoftext|>\n"]
    assert learnt("all") == ["User: a\nAssistant: one<|endoftext|>\nUser: b\nAssistant: two<|endoftext|>\n"]
    prompted = {"prompt": chat("a", "one", "b"), "completion": [turn("assistant", "two")]}
    assert learnt("assistant", prompted) == learnt("completion", prompted) == [" two<|endoftext|>\n"]


def test_prompt_and_completion_are_read_as_they_are(make_tokenizer):
    tokenizer = make_tokenizer(None)
    (document,) = encoded(tokenizer, {"prompt": "1 + 2 =", "completion": " 3"})
    assert tokenizer.decode(document[0]) == "1 + 2 = 3<|endoftext|>"
    assert parts(tokenizer, document) == [" 3<|endoftext|>"]
    (document,) = encoded(tokenizer, {"prompt": "1 + 2 =", "completion": " 3"}, loss_on="all")
    assert parts(tokenizer, document) == ["1 + 2 = 3<|endoftext|>"]


def test_tools_are_given_to_the_template(make_tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
    called = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        turn("user", "1 + 1"),
        turn("assistant", None, tool_calls=called),
        turn("tool", "2"),
        turn("assistant", "It is 2."),
    ]
    tokenizer = make_tokenizer(trl_template("qwen3_instruct_2507"))
    documents = encoded(
        tokenizer, {"messages": messages, "tools": tools}, {"messages": messages, "tools": json.dumps(tools)}
    )
    assert documents[0] == documents[1]
    assert '"name": "add"' in tokenizer.decode(documents[0][0]).split("1 + 1")[0]
    first, second = parts(tokenizer, documents[0])
    assert first.endswith('{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n')
    assert second == "It is 2.<|im_end|>\n"
    notes = Counter()
    encoded(make_tokenizer(trl_template("llama3")), {"messages": CHATS[0], "tools": tools}, notes=notes)
    assert notes["chats whose tools are left out, because the chat template has no place for them"] == 1


# What is wrong with them


BAD = [
    ({"messages": "text"}, "messages must be a list of turns; got str"),
    ({"messages": None}, "messages must be a list of turns; got NoneType"),
    ({"messages": ["text"]}, "turn 1 of messages must be an object with a role and its content; got text"),
    ({"messages": [{"content": "a"}]}, "turn 1 of messages must be an object with a role"),
    ({"messages": [{"role": 3, "content": "a"}]}, "turn 1 of messages must be an object with a role"),
    (
        {"messages": [turn("user", "a"), turn("robot", "b")]},
        "turn 2 of messages has the role 'robot'; known are system, ",
    ),
    ({"messages": [turn("user", 3)]}, "turn 1 of messages must hold text; got int"),
    ({"messages": [turn("user", {"a": 1})]}, "turn 1 of messages must hold text; got dict"),
    ({"messages": [turn("user", [{"type": "image", "url": "x"}])]}, "turn 1 of messages holds 'image', and only text"),
    ({"messages": [turn("user", [3])]}, "turn 1 of messages holds 'int', and only text"),
    ({"messages": [turn("user", "half \ud83d")]}, r"turn 1 of messages holds U\+D83D, half of a character"),
    ({"messages": CHATS[0], "tools": "{"}, "tools is not JSON"),
    ({"messages": CHATS[0], "tools": {"a": 1}}, "tools must be a list of objects"),
    ({"messages": CHATS[0], "tools": ["a"]}, "tools must be a list of objects"),
    ({"messages": CHATS[0], "tools": [{"a": 1}]}, "the chat template refuses it: it has no place for tools"),
    ({"messages": [turn("user", "a"), turn("assistant", "", tool_calls=[{}])]}, "it has no place for tools"),
    ({"conversations": 3}, "conversations must be a list of turns; got int"),
    ({"conversations": [{"value": "a"}]}, "turn 1 of conversations must be an object with a role"),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "turn 1 of conversations has the role 'narrator'"),
    ({"conversations": [{"from": "human", "value": ["a", 1]}]}, "turn 1 of conversations holds 'int'"),
    ({"prompt": 3, "completion": "a"}, "prompt must be a list of turns; got int"),
    ({"prompt": "a", "completion": [turn("assistant", "b")]}, "prompt must be a list of turns; got str"),
    ({"prompt": [turn("user", "a")], "completion": None}, "completion must be a list of turns; got NoneType"),
    ({"instruction": 3, "output": "a"}, "the field 'instruction' must be text; got int"),
    ({"instruction": "a", "output": None}, "the field 'output' must be text; got NoneType"),
    ({"instruction": "a", "input": [1], "output": "b"}, "the field 'input' must be text; got list"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records(make_tokenizer, record, message):
    with pytest.raises(DataError, match=rf"record 1\b.*{message}"):
        encoded(make_tokenizer(TEMPLATES["plain"]), record)


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"messages": []}, "chats left out, no answer to learn"),
        ({"messages": chat("a")}, "chats left out, no answer to learn"),
        ({"messages": [turn("user", "a"), turn("assistant", " \n")]}, "chats left out, a turn is empty"),
        ({"messages": [turn("user", ""), turn("assistant", "b")]}, "chats left out, a turn is empty"),
        ({"messages": [turn("user", "a"), {"role": "assistant"}]}, "chats left out, a turn is empty"),
        ({"prompt": "a", "completion": ""}, "chats left out, no answer to learn"),
        ({"prompt": chat("a", "b", "c"), "completion": [turn("user", "d")]}, "chats left out, no answer to learn"),
        ({"instruction": "a", "output": ""}, "chats left out, a turn is empty"),
    ],
)
def test_what_is_left_out_is_counted(make_tokenizer, record, rule):
    notes = Counter()
    kept = encoded(make_tokenizer(TEMPLATES["plain"]), record, {"messages": CHATS[0]}, notes=notes)
    assert len(kept) == 1
    assert notes[rule] == 1


def test_templates_that_refuse_or_do_not_fit(make_tokenizer):
    record = {"messages": chat("a", "b", system="c")}
    with pytest.raises(
        DataError, match="the chat template refuses it: System role not supported .its roles are system, user"
    ):
        encoded(make_tokenizer(trl_template("gemma")), record)
    with pytest.raises(DataError, match="the chat template refuses it: .*roles must alternate"):
        encoded(make_tokenizer(trl_template("gemma")), {"messages": [turn("assistant", "a"), turn("assistant", "b")]})
    with pytest.raises(
        DataError, match="record 1 is a chat, and the tokenizer has no chat template: set chat_template"
    ):
        encoded(make_tokenizer(None), record)
    turned_round = (
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match="writes an answer in another way than it asks for one.*generation"):
        encoded(make_tokenizer(turned_round), {"messages": chat("a", "b")})


def test_special_tokens_in_a_text_are_counted(make_tokenizer):
    notes = Counter()
    encoded(make_tokenizer(TEMPLATES["plain"]), {"messages": chat("a<|endoftext|>", "b")}, notes=notes)
    assert notes["chats whose text holds special tokens, read as such"] == 1


def test_a_template_is_named_by_its_name_a_file_or_a_tokenizer(make_tokenizer, tokenizer_folder, tmp_path):
    assert load_template("plain") == TEMPLATES["plain"]
    (tmp_path / "mine.jinja").write_text(TEMPLATES["chatml"])
    assert load_template(str(tmp_path / "mine.jinja")) == TEMPLATES["chatml"]
    make_tokenizer(trl_template("llama3")).save_pretrained(tmp_path / "llama3")
    assert load_template(str(tmp_path / "llama3")) == trl_template("llama3")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    for name, message in (
        (tmp_path / "bad.jinja", "is no Jinja template"),
        (tmp_path / "none", "chat_template must be plain, chatml, a file, or a tokenizer"),
        (tokenizer_folder, "has no chat template: name another, or plain or chatml"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_template(str(name))


# In a run


def make_config(path, folder, **settings):
    values = dict(
        model="none", output_dir="none", data=(DataSource(path=str(path)),), cache_dir=str(folder / "cache"), gpu="cpu"
    )
    return TrainConfig(**{**values, "eval_fraction": 0.0, "max_seq_length": 64, **settings})


@pytest.fixture
def chats(tmp_path, texts):
    """Sixty chats of very different lengths, as a file."""
    records = [
        {"messages": chat(f"{number}: {text[:9]}", text[: 7 * number % 150], "and?", f"end {number}")}
        for number, text in enumerate(texts, start=1)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("packing", ["documents", "best_fit", "concatenate"])
def test_chats_are_packed_whole_and_every_answer_is_predicted_once(make_tokenizer, chats, tmp_path, packing):
    tokenizer = make_tokenizer(TEMPLATES["plain"])
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    documents = encoded(tokenizer, *records)
    config = make_config(chats, tmp_path, packing=packing)
    data = prepare(config, tokenizer)
    (blocks,) = data.train.sources
    kept = [(ids[:65], learnt[:65]) for ids, learnt in documents]
    left_out = sum(not any(learnt[1:]) for _, learnt in kept)
    expected = [(ids, learnt) for ids, learnt in kept if any(learnt[1:])]
    found = []
    for block in blocks:
        begins = np.cumsum([0, *block.document_lengths])
        if packing == "concatenate":
            assert block.document_lengths == (64,)
        for begin, end in zip(begins, begins[1:], strict=False):
            labels = block.labels[begin:end]
            if (labels != IGNORED).any():
                assert block.position_ids[begin] == 0
                found.append((block.input_ids[begin:end].tolist(), labels.tolist()))
    wanted = [
        (ids[:-1], [t if is_learnt else IGNORED for t, is_learnt in zip(ids[1:], learnt[1:], strict=True)])
        for ids, learnt in expected
    ]
    if packing == "concatenate":
        wanted = [(ids + [0] * (64 - len(ids)), labels + [IGNORED] * (64 - len(ids))) for ids, labels in wanted]
    assert sorted(found) == sorted(wanted)
    assert blocks.targets == sum(sum(label != IGNORED for label in labels) for _, labels in wanted)
    cut = sum(len(ids) > 65 and any(learnt[1:65]) for ids, learnt in documents)
    assert cut > 3
    (line,) = (line for line in data.summary if "longer than max_seq_length" in line)
    assert f"{cut:,} chats longer than max_seq_length, cut at the end; {left_out:,} left out, no answer" in line
    assert "read as messages: 60" in data.summary[0]


def test_chats_and_text_in_one_run(make_tokenizer, chats, corpus, tmp_path):
    sources = (DataSource(path=str(chats), name="chats"), DataSource(path=str(corpus), name="text"))
    config = make_config(chats, tmp_path, data=sources, chat_template="chatml", eval_fraction=0.1)
    tokenizer = make_tokenizer(None)
    data = prepare(config, tokenizer)
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    chat_blocks, text_blocks = data.train.sources
    assert (chat_blocks.store.learnt is not None, text_blocks.store.learnt is None) == (True, True)
    assert (chat_blocks.packing, text_blocks.packing) == ("best_fit", "documents")
    assert set(data.evaluation) == {"chats", "text"}
    held_out = data.evaluation["chats"]
    firsts = set(chat_blocks.store.starts.tolist())
    assert set(held_out.starts.tolist()) <= firsts
    assert not set(held_out.starts.tolist()) & set(chat_blocks.starts.tolist())
    first = Loader(data.train)
    begun = first.take(7)
    resumed = Loader(prepare(config, make_tokenizer(None)).train)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    straight = Loader(data.train).take(20)
    for block, expected in zip(begun + resumed.take(13), straight, strict=True):
        assert block.input_ids.tolist() == expected.input_ids.tolist()
        assert block.labels.tolist() == expected.labels.tolist()


def test_chats_in_parquet_and_other_forms(make_tokenizer, chats, tmp_path):
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(60), "messages": [record["messages"] for record in records]}),
        tmp_path / "chats.parquet",
    )
    (tmp_path / "chats.json").write_text(json.dumps(records))
    tokenizer = make_tokenizer(TEMPLATES["plain"])

    def store(path):
        return prepare(make_config(path, tmp_path), tokenizer).train.sources[0].store

    stores = [store(tmp_path / f"chats.{suffix}") for suffix in ("jsonl", "parquet", "json")]
    for other in stores[1:]:
        assert other.tokens.tolist() == stores[0].tokens.tolist()
        assert other.learnt.tolist() == stores[0].learnt.tolist()


def test_what_the_tokens_of_chats_rest_on_is_their_key(make_tokenizer, chats, corpus, tmp_path):
    def key(path=chats, template="plain", **settings):
        return (
            prepare(make_config(path, tmp_path, **settings), make_tokenizer(TEMPLATES[template], ["<|im_end|>"]))
            .train.sources[0]
            .store.key
        )

    assert (
        len(
            {
                key(),
                key(template="chatml"),
                key(loss_on="all"),
                key(loss_on="completion"),
            }
        )
        == 4
    )
    assert key(corpus) == key(corpus, template="chatml")


def test_settings_and_sources_that_do_not_fit(make_tokenizer, chats, corpus, tmp_path):
    tokenizer = make_tokenizer(TEMPLATES["plain"])
    for setting in (dict(loss_on="all"), dict(chat_template="plain")):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} is for chats, and data holds none"):
            prepare(make_config(corpus, tmp_path, **setting), tokenizer)
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.jsonl").write_text(chats.read_text())
    (tmp_path / "both" / "b.txt").write_text("text")
    with pytest.raises(
        DataError, match="b.txt holds chats and text, or other files of its source do: name them as two"
    ):
        prepare(make_config(tmp_path / "both", tmp_path), tokenizer)
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": CHATS[0]}))
    with pytest.raises(DataError, match="one.jsonl is one chat, which cannot be held out"):
        prepare(make_config(tmp_path / "one.jsonl", tmp_path, eval_fraction=0.1), tokenizer)
    (tmp_path / "none.jsonl").write_text(json.dumps({"messages": chat("a")}))
    with pytest.raises(
        DataError, match="holds nothing to learn: chats left out, no answer to learn: 1; read as messages: 1"
    ):
        prepare(make_config(tmp_path / "none.jsonl", tmp_path), tokenizer)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    with pytest.raises(DataError, match="no field 'text'.*Chats have messages, conversations"):
        prepare(make_config(tmp_path / "odd.jsonl", tmp_path), tokenizer)
