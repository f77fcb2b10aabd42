"""Block k is a function of the seed and k; shares hold everywhere; the loader resumes exactly; held-out is apart."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import Loader, collate, micro_batches
from oomless.data.mix import BlockStream, heaviest
from oomless.data.pack import IGNORED, PackedBlocks
from oomless.data.prepare import _split as split
from oomless.data.prepare import prepare
from oomless.data.store import TokenStore
from oomless.errors import CheckpointError, ConfigError, DataError


def make_stream(sizes, weights, *, seed=3, shuffle=True):
    """Return a stream whose blocks are (source, number)."""
    sources = [[(source, number) for number in range(size)] for source, size in enumerate(sizes)]
    return BlockStream(sources, weights, seed=seed, shuffle=shuffle, fingerprint="made")


mixes = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 30), min_size=count, max_size=count),
        st.lists(st.one_of(st.floats(0.01, 100), st.integers(1, 9)), min_size=count, max_size=count),
    )
)


@settings(deadline=None, max_examples=100)
@given(mix=mixes, seed=st.integers(0, 2**31), numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_a_block_is_a_function_of_seed_and_number(mix, seed, numbers):
    used, fresh = make_stream(*mix, seed=seed), None
    forwards = [used.block(number) for number in numbers]
    for number, block in zip(numbers, forwards, strict=True):
        fresh = make_stream(*mix, seed=seed)
        assert fresh.block(number) == block


@settings(deadline=None, max_examples=100)
@given(mix=mixes, start=st.integers(0, 10**9), length=st.integers(1, 2000))
def test_shares_hold_over_any_range(mix, start, length):
    """Off by less than a block for each rounding on the way to the source."""
    stream = make_stream(*mix)
    counts = Counter(stream.block(number)[0] for number in range(start, start + length))
    for source, share in enumerate(stream.shares):
        assert abs(counts[source] - share * length) <= 1 + source + 1e-3


@settings(deadline=None, max_examples=100)
@given(mix=mixes)
def test_every_pass_over_a_source_is_a_permutation(mix):
    stream = make_stream(*mix)
    passed = {source: [] for source in range(len(stream.sources))}
    for number in range(1500):
        source, index = stream.block(number)
        passed[source].append(index)
    for source, indices in passed.items():
        size = len(stream.sources[source])
        whole = [indices[at : at + size] for at in range(0, len(indices) - size + 1, size)]
        assert all(sorted(turn) == list(range(size)) for turn in whole)


def test_passes_differ_and_so_do_seeds():
    stream = make_stream([50], [1.0])
    first, second = ([stream.block(turn * 50 + number) for number in range(50)] for turn in (0, 1))
    other = make_stream([50], [1.0], seed=4)
    assert first != second
    assert first != [other.block(number) for number in range(50)]


def test_without_shuffling_order_is_that_of_the_text():
    stream = make_stream([3], [1.0], shuffle=False)
    assert [stream.block(number)[1] for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "weight", [lambda blocks: sum(map(len, blocks)) * max(map(max, blocks)), lambda blocks: sum(map(len, blocks))]
)
def test_the_heaviest_batch_of_all(count, weight):
    """Where a batch weighs what its blocks do together, or as if each document were as long as the longest."""
    blocks = [(5,) * 8, (33, 7), (20, 10, 5, 5), (12, 12, 12, 4), (39, 1), (2,) * 20, (30, *(1,) * 10)]
    numbered = list(enumerate(blocks))
    rankings = [sorted(numbered, key=lambda entry, of=of: -of(entry[1])) for of in (len, max)]
    found = [block for _, block in heaviest(rankings, count, weight)[0]]
    assert weight(found) == max(map(weight, combinations(blocks, count)))


@settings(deadline=None, max_examples=200)
@given(mix=mixes)
def test_an_epoch_is_one_pass_over_the_heaviest_source(mix):
    """Of equal ones, the longest; to within the block that its share may round to."""
    sizes, weights = mix
    stream = make_stream(sizes, weights)
    main = max(range(len(sizes)), key=lambda source: (weights[source], sizes[source]))
    count = sum(stream.block(number)[0] == main for number in range(stream.blocks_per_epoch))
    assert abs(count - sizes[main]) <= 1 + main
    assert stream.blocks_per_epoch == max(1, round(sizes[main] * sum(weights) / weights[main]))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prepared(corpus, tokenizer, cache_dir):
    def make(**changes):
        values = dict(data=(DataSource(path=str(corpus)),), eval_fraction=0.1, max_seq_length=32, gpu="cpu")
        values |= dict(model="none", output_dir="none", cache_dir=str(cache_dir))
        return prepare(TrainConfig(**{**values, **changes}), tokenizer)

    return make


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        and a.document_lengths == b.document_lengths
        for a, b in zip(first, second, strict=True)
    )


def test_take_gives_the_same_blocks_in_any_portions(prepared):
    stream = prepared().train
    expected = Loader(stream).take(40)
    for portions in ([1] * 40, [7, 0, 13, 20], [39, 1]):
        loader = Loader(stream)
        assert same([block for count in portions for block in loader.take(count)], expected)


@pytest.mark.parametrize("packing", ["documents", "best_fit", "concatenate"])
def test_resuming_is_exact(prepared, packing):
    expected = Loader(prepared(packing=packing).train).take(50)
    first = Loader(prepared(packing=packing).train)
    begun = first.take(23)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = Loader(prepared(packing=packing).train)
    resumed.load_state_dict(state)
    assert same(begun + resumed.take(27), expected)


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=7),
        dict(max_seq_length=33),
        dict(packing="best_fit"),
        dict(eval_fraction=0.2),
        dict(shuffle=False),
        "text",
    ],
)
def test_a_place_in_other_data_is_refused(prepared, change, tmp_path, corpus):
    state = Loader(prepared().train).state_dict()
    if change == "text":
        (tmp_path / "other.jsonl").write_bytes(corpus.read_bytes() + b'{"text": "more"}\n')
        change = dict(data=(DataSource(path=str(tmp_path / "other.jsonl")),))
    loader = Loader(prepared(**change).train)
    with pytest.raises(CheckpointError, match="differs from when the checkpoint was written"):
        loader.load_state_dict(state)
    assert loader.position == 0


def test_micro_batches(prepared):
    blocks = Loader(prepared().train).take(7)
    batches = list(micro_batches(blocks, 3))
    assert [len(batch.input_ids) for batch in batches] == [3, 3, 1]
    joined = collate(blocks)
    assert joined.input_ids.shape == joined.labels.shape == joined.position_ids.shape == (7, 32)
    assert joined.target_count == sum(batch.target_count for batch in batches)
    assert joined.target_count == sum(int((block.labels != IGNORED).sum()) for block in blocks)
    for row, block in enumerate(blocks):
        assert joined.input_ids[row].tolist() == block.input_ids.tolist()
        assert joined.labels[row].tolist() == block.labels.tolist()
        assert joined.position_ids[row].tolist() == block.position_ids.tolist()
        assert joined.document_lengths[row] == block.document_lengths


def predicted(blocks):
    """Return the place in the store of every token that ``blocks`` predict; the store must hold its own places as ids."""
    return [int(label) for block in blocks for label in block.labels if label != IGNORED]


def store_of_places(sizes):
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.arange(starts[-1], dtype=np.uint32)
    return TokenStore(name="made", key="0" * 32, tokens=tokens, starts=starts, text_bytes=0, passed_over=Counter())


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=30),
    fraction=st.one_of(st.floats(0.001, 0.999), st.sampled_from([0.01, 0.1, 0.5])),
    packing=st.sampled_from(["documents", "best_fit", "concatenate"]),
    seed=st.integers(0, 9),
)
def test_held_out_is_a_share_of_the_tokens(sizes, fraction, packing, seed):
    store = store_of_places(sizes)
    total = sum(size - 1 for size in sizes)
    if total < 2:
        with pytest.raises(DataError, match=f"holds {total} tokens to predict, too few to hold any out"):
            split(store, fraction, seed, packing)
        return
    learnt, held_out = (PackedBlocks(store, part, 16, packing) for part in split(store, fraction, seed, packing))
    both = predicted(learnt) + predicted(held_out)
    assert len(both) == len(set(both))
    firsts = set(store.starts[:-1].tolist())
    if (
        packing == "concatenate"
    ):  # one stream: only the first token of each of the two can be unpredicted, and is a first
        assert set(range(len(store.tokens))) - set(both) <= firsts
    else:
        assert set(both) == set(range(len(store.tokens))) - firsts
        wanted = min(total - 1, max(1, round(fraction * total)))
        assert 0.9 * wanted <= held_out.targets <= wanted
    assert learnt.targets > 0 < held_out.targets


def test_few_documents_hold_out_no_more_than_asked(prepared, tmp_path):
    """One large document and one small: whole ones would be all or nothing."""
    for name, count in (("large", 3400), ("small", 40)):
        (tmp_path / f"{name}.txt").write_text("word " * count)
    for seed in range(4):
        data = prepared(data=(DataSource(path=str(tmp_path)),), eval_fraction=0.01, seed=seed)
        (held_out,) = data.evaluation.values()
        everything = held_out.targets + data.train.sources[0].targets
        assert held_out.targets == pytest.approx(0.01 * everything, rel=0.12)


def test_of_many_documents_whole_ones_are_held_out(prepared):
    data = prepared(eval_fraction=0.3)
    (held_out,), learnt = data.evaluation.values(), data.train.sources[0]
    assert not set(held_out.starts.tolist()) & set(learnt.starts.tolist())
    assert set(held_out.starts.tolist()) | set(learnt.starts.tolist()) == set(learnt.store.starts[:-1].tolist())


def test_what_is_held_out_follows_from_the_seed(prepared):
    def held_out(seed):
        (blocks,) = prepared(seed=seed).evaluation.values()
        return blocks.starts.tolist()

    assert held_out(1) == held_out(1) != held_out(2)


def test_what_is_held_out_and_what_trains_is_all_there_is(prepared, texts, tokenizer):
    """Targets add up: every token of every document but its first is in exactly one of the two."""
    data = prepared()
    targets = data.train.sources[0].targets + data.evaluation["library.jsonl"].targets
    assert targets == sum(len(tokenizer(text).input_ids) for text in texts)


def test_separate_evaluation_data_and_weights(prepared, corpus, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * 500}"}}\n' * 20)
    data = prepared(
        data=(
            DataSource(path=str(tmp_path / "a.jsonl"), weight=3),
            DataSource(path=str(tmp_path / "b.jsonl"), weight=1),
        ),
        eval_data=(DataSource(path=str(corpus), name="library"),),
        eval_fraction=0.0,
    )
    assert list(data.evaluation) == ["library"]
    first = Counter(int(block.input_ids[5]) for block in Loader(data.train).take(400))
    assert sorted(first.values())[-1] > 200
    assert data.train.shares == [0.75, 0.25]


def test_a_single_text_file_trains(prepared, tmp_path):
    """Its end is held out, and predicted from the last token that is learnt on."""
    (tmp_path / "one.txt").write_text("text " * 1000)
    data = prepared(data=(DataSource(path=str(tmp_path / "one.txt")),))
    (held_out,), learnt = data.evaluation.values(), data.train.sources[0]
    tokens = learnt.store.tokens.tolist()
    assert (learnt.targets, held_out.targets) == (round(0.9 * (len(tokens) - 1)), round(0.1 * (len(tokens) - 1)))
    labels = [int(label) for blocks in (learnt, held_out) for block in blocks for label in block.labels]
    assert [label for label in labels if label != IGNORED] == tokens[1:]
    assert held_out[0].input_ids[0] == tokens[learnt.targets]


def test_sources_without_weights_are_each_learnt_once_in_an_epoch(prepared, corpus, tmp_path):
    (tmp_path / "small.txt").write_text("small " * 400)
    data = prepared(data=(DataSource(path=str(corpus)), DataSource(path=str(tmp_path / "small.txt"))))
    sizes = [len(source) for source in data.train.sources]
    assert sizes[0] > 5 * sizes[1]
    assert data.train.blocks_per_epoch == sum(sizes)
    places = Counter(data.train._place(number)[0] for number in range(sum(sizes)))
    assert [places[source] for source in range(2)] == sizes
    assert "small.txt" in data.summary[2]
    assert "(1 x in an epoch)" in data.summary[2]


@pytest.mark.parametrize("weights", [None, (1, 3)])
def test_replayed_text_has_its_share_and_makes_no_pass_over_the_data_longer(prepared, corpus, tmp_path, weights):
    for name in ("old", "older"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 4000)
    (tmp_path / "small.txt").write_text("small " * 400)
    paths = (corpus, tmp_path / "small.txt")
    data = prepared(
        data=tuple(DataSource(path=str(p), weight=weights and weights[n]) for n, p in enumerate(paths)),
        replay_data=tuple(DataSource(path=str(tmp_path / f"{name}.txt")) for name in ("old", "older")),
        replay=0.2,
    )
    stream, plain_stream = data.train, prepared(data=tuple(DataSource(path=str(p)) for p in paths)).train
    assert sum(stream.shares[2:]) == pytest.approx(0.2)
    main = 1 if weights else 0
    assert stream.blocks_per_epoch == round(len(stream.sources[main]) / stream.shares[main])
    if weights is None:
        assert stream.blocks_per_epoch == pytest.approx(plain_stream.blocks_per_epoch / 0.8, abs=1)
    places = Counter(stream._place(number)[0] for number in range(1000))
    assert places[2] + places[3] == pytest.approx(200, abs=3)
    assert set(data.evaluation) == {"library.jsonl", "small.txt", "old.txt", "older.txt"}
    assert "old.txt 8.6%" in " ".join(data.summary)


def test_how_often_a_weighted_source_is_repeated_is_said(prepared, corpus, tmp_path):
    (tmp_path / "small.txt").write_text("small " * 400)
    data = prepared(
        data=(DataSource(path=str(corpus), weight=1), DataSource(path=str(tmp_path / "small.txt"), weight=1))
    )
    times = len(data.train.sources[0]) / len(data.train.sources[1])
    assert f"small.txt 50.0% ({times:.3g} x in an epoch)" in data.summary[2]


def test_weights_that_only_some_have_or_that_do_nothing(prepared, corpus, tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    sources = (DataSource(path=str(corpus)), DataSource(path=str(tmp_path / "a.txt"), weight=0.1))
    with pytest.raises(ConfigError, match=r"all sources of data or to none; .*library\.jsonl has none"):
        prepared(data=sources)
    with pytest.raises(ConfigError, match="a weight has no effect in eval_data"):
        prepared(data=sources[:1], eval_data=sources[1:], eval_fraction=0.0)


def test_empty_documents_alone_teach_nothing(prepared, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(DataError, match="holds no text to learn from"):
        prepared(data=(DataSource(path=str(tmp_path / "empty.jsonl")),), eval_fraction=0.0)


def test_sources_of_one_name(prepared, corpus):
    with pytest.raises(ConfigError, match=r"two sources are called 'library\.jsonl'"):
        prepared(data=(DataSource(path=str(corpus)),) * 2)
