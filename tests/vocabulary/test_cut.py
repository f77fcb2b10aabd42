"""Three scripts, three kinds of tokenizers: what is added is reached, and what was there is cut as before."""

import json
from collections import Counter

import pytest
from tests.vocabulary.languages import KINDS, SCRIPTS, documents
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oomless.errors import ModelError
from oomless.vocabulary.cut import Cut
from oomless.vocabulary.learn import Alphabet, learn

MIXED = "def f(x):\n    return 'ქართული \u12a0\u121b\u122d\u129b हिन्दी' # \u4e2d\U0001f600\n<|turn|>\t naïve  12,345\n"


def taught(tokenizer, texts, count=300):
    cut, words = Cut(tokenizer), Counter()
    before = cut.count(texts, words)
    learnt = learn(words, cut.alphabet, count)
    return cut, learnt, Tokenizer.from_str(cut.extended(learnt)), before


@pytest.fixture(scope="module", params=[(kind, script) for kind in KINDS for script in SCRIPTS], ids=str)
def case(request, tokenizer_of):
    kind, script = request.param
    texts = documents(script, 60)
    return kind, script, tokenizer_of(kind), texts, *taught(tokenizer_of(kind), texts)


def test_text_comes_back_and_is_shorter(case):
    _, script, tokenizer, texts, _, learnt, new, before = case
    assert len(learnt.texts) == 300
    for text in (*texts, *documents(script, 20, seed=1), MIXED):
        ids = new.encode(text, add_special_tokens=False).ids
        assert new.decode(ids, skip_special_tokens=False) == text
    now = sum(len(one.ids) for one in new.encode_batch(texts, add_special_tokens=False))
    assert now < 0.35 * before
    assert before == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def test_each_new_token_is_reached(case):
    cut, learnt, new = case[4:7]
    for number, text in enumerate(learnt.texts):
        assert [token.id for token in new.model.tokenize(text)] == [cut.first + number], text


def test_old_text_is_cut_as_before_where_no_new_token_applies(case, texts):
    """And where one does, it stands for just those old tokens that were there."""
    kind, script, tokenizer, own, cut, learnt, new, _ = case
    pieces = {cut.first + number: ids for number, ids in enumerate(learnt.pieces)}
    applied = 0
    for text in (*texts, *own, *documents(script, 20, seed=1), MIXED):
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = new.encode(text, add_special_tokens=False).ids
        applied += after != before
        assert after == before or set(after) & set(pieces)
        if kind != "Unigram":  # whose new pieces may win against an old one that covers a part of them
            assert [old for number in after for old in pieces.get(number, (number,))] == list(before)
    assert applied >= 80


def test_ids_of_old_tokens_stay(case):
    _, _, tokenizer, _, _, _, new, _ = case
    now = new.get_vocab(with_added_tokens=True)
    for text, number in tokenizer.get_vocab().items():
        assert now[text] == number
    assert new.encode("<|turn|>a<|turn|>", add_special_tokens=False).ids == tokenizer.encode("<|turn|>a<|turn|>")


def test_plain_transformers_reads_it_back(case, tmp_path):
    _, script, tokenizer, _, cut, learnt, new, _ = case
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(cut.extended(learnt), encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in (*documents(script, 5, seed=2), MIXED):
        wanted = new.encode(text, add_special_tokens=False).ids
        assert loaded(text, add_special_tokens=False)["input_ids"] == wanted
        assert again(text, add_special_tokens=False)["input_ids"] == wanted


def test_what_is_learnt_is_always_the_same(tokenizer_of):
    texts = documents("Georgian", 20)
    first, second = (taught(tokenizer_of("BPE"), texts)[1] for _ in range(2))
    assert first == second


def test_a_join_that_is_a_token_is_passed_over_and_counted():
    alphabet = Alphabet(texts={0: "a", 1: "b", 2: "c", 3: "ab"}, unknown=[], first=4)
    learnt = learn({(0, 1, 2): 5, (0, 1): 2, (0, 0): 1}, alphabet, 10)
    assert (learnt.texts, learnt.parts, learnt.existing) == (["bc", "abc"], [("b", "c"), ("a", "bc")], 1)
    assert learnt.pieces == [(1, 2), (0, 1, 2)]


def test_the_first_merges_are_those_of_tokenizers_own_trainer(texts):
    """From letters alone, with nothing learnt before, byte-pair encoding is byte-pair encoding."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10**6, min_frequency=40, show_progress=False)
    theirs.train_from_iterator(texts, trainer)
    wanted = json.loads(theirs.to_str())["model"]
    letters = {text: number for text, number in wanted["vocab"].items() if len(text) == 1}
    bare = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    cut, words = Cut(PreTrainedTokenizerFast(tokenizer_object=bare)), Counter()
    cut.by_bytes = True  # words as they are
    cut.count(texts, words)
    learnt = learn(words, cut.alphabet, 100)
    assert len(set(learnt.texts) & {"".join(pair) for pair in wanted["merges"][:100]}) > 95


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "longest token"),
        (models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "none for its pieces"),
    ],
    ids=["WordPiece", "WordLevel"],
)
def test_other_kinds_are_refused_with_the_reason(model, why):
    with pytest.raises(ModelError, match=why):
        Cut(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="a"))
