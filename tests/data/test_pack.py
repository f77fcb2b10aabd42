"""Every token but each document's first is predicted exactly once, behind the right one, whatever the packing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomless.data.pack import IGNORED, PackedBlocks
from oomless.data.store import TokenStore

PACKINGS = ["documents", "best_fit", "concatenate"]


def make_store(sizes):
    """Return documents of the given numbers of tokens; every token is told apart by its id, counted from 1."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.arange(1, starts[-1] + 1, dtype=np.uint32)
    return TokenStore(name="made", key="0", tokens=tokens, starts=starts, text_bytes=0, passed_over=Counter())


def predictions(blocks):
    """Return (input, label) of every label that counts."""
    return [
        (int(token), int(label))
        for block in blocks
        for token, label in zip(block.input_ids, block.labels, strict=True)
        if label != IGNORED
    ]


document_sizes = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=150)
@given(sizes=document_sizes, length=st.integers(1, 33), packing=st.sampled_from(PACKINGS), data=st.data())
def test_every_token_is_predicted_once(sizes, length, packing, data):
    store = make_store(sizes)
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=1)))
    blocks = PackedBlocks(store, store.spans[chosen], length, packing)
    documents = [store.tokens[store.starts[d] : store.starts[d + 1]].tolist() for d in chosen]
    if packing == "concatenate":
        documents = [sum(documents, [])]
    expected = [pair for document in documents for pair in zip(document, document[1:], strict=False)]
    made = predictions(blocks)
    assert sorted(made) == sorted(expected)
    assert blocks.targets == len(expected)
    if packing != "best_fit":
        assert made == expected
        assert len(blocks) == -(-len(expected) // length)


@settings(deadline=None, max_examples=100)
@given(sizes=document_sizes, length=st.integers(1, 33), packing=st.sampled_from(PACKINGS))
def test_weights_of_blocks_are_what_blocks_hold(sizes, length, packing):
    store = make_store(sizes)
    blocks = PackedBlocks(store, store.spans, length, packing)
    if not len(blocks):
        return
    counts, longest = blocks.weights_of_blocks()
    for block, count, most in zip(blocks, counts, longest, strict=True):
        assert (len(block.document_lengths), max(block.document_lengths)) == (count, most)


@settings(deadline=None, max_examples=150)
@given(sizes=document_sizes, length=st.integers(1, 33), packing=st.sampled_from(PACKINGS))
def test_blocks_are_well_formed(sizes, length, packing):
    store = make_store(sizes)
    document_of = np.repeat(np.arange(len(sizes)), sizes)
    blocks = list(PackedBlocks(store, store.spans, length, packing))
    for block in blocks:
        for array in (block.input_ids, block.labels, block.position_ids):
            assert array.shape == (length,)
            assert array.dtype == np.int64
        assert sum(block.document_lengths) == length
        assert min(block.document_lengths) > 0
        assert (block.labels != IGNORED).any()
        assert block.position_ids.tolist() == [place for size in block.document_lengths for place in range(size)]
        if packing == "concatenate":
            assert block.document_lengths == (length,)
            continue
        at = 0
        for size in block.document_lengths:
            inputs, labels = block.input_ids[at : at + size], block.labels[at : at + size]
            at += size
            if (labels == IGNORED).any():
                assert at == length, "padding lies at the end"
                assert (labels == IGNORED).all(), "and is a document of its own"
                continue
            assert (labels == inputs + 1).all()
            assert len({int(document_of[token - 1]) for token in [*inputs, *labels]}) == 1
    padded = [block for block in blocks if (block.labels == IGNORED).any()]
    if packing != "best_fit":
        assert all(block is blocks[-1] for block in padded)


@settings(deadline=None, max_examples=150)
@given(sizes=document_sizes, length=st.integers(1, 33))
def test_best_fit_cuts_only_what_is_longer_than_a_block(sizes, length):
    """A document of n tokens has n - 1 inputs: in one part up to T, else in whole blocks and one rest."""
    store = make_store(sizes)
    document_of = np.repeat(np.arange(len(sizes)), sizes)
    parts = Counter()
    for block in PackedBlocks(store, store.spans, length, "best_fit"):
        at = 0
        for size in block.document_lengths:
            if block.labels[at] != IGNORED:
                parts[int(document_of[block.input_ids[at] - 1]), size] += 1
            at += size
    for document, size in enumerate(sizes):
        whole, rest = divmod(size - 1, length)
        of_document = Counter({part: count for (d, part), count in parts.items() if d == document})
        expected = Counter({length: whole}) + Counter({rest: 1} if rest else {})
        assert of_document == expected


@settings(deadline=None, max_examples=150)
@given(sizes=document_sizes, length=st.integers(1, 33))
def test_best_fit_needs_few_blocks(sizes, length):
    """Best-fit decreasing takes at most 11/9 of the fewest blocks plus 4 (Johnson 1973); all but one are half full."""
    store = make_store(sizes)
    blocks = PackedBlocks(store, store.spans, length, "best_fit")
    filled = sorted(int((block.labels != IGNORED).sum()) for block in blocks)
    fewest = -(-sum(filled) // length)
    parts = [size - 1 for size in sizes]
    large = sum(part // length + (part % length > length // 2) for part in parts)
    assert len(blocks) <= 11 / 9 * max(fewest, large) + 4 or len(blocks) <= 2 * fewest
    assert all(2 * count > length for count in filled[1:])


@pytest.mark.parametrize("length", [512, 2048])
def test_best_fit_wastes_little_on_real_documents(length):
    """Lengths as of real text (log-normal around 400 tokens): less than one part in five hundred is padding."""
    sizes = np.random.default_rng(0).lognormal(6.0, 1.2, 20_000).astype(int) + 1
    store = make_store(sizes)
    blocks = PackedBlocks(store, store.spans, length, "best_fit")
    assert 1 - blocks.targets / (len(blocks) * length) < 0.002


def test_a_block_is_the_same_whenever_it_is_asked_for():
    store = make_store([5, 40, 3, 17])
    for packing in PACKINGS:
        blocks = PackedBlocks(store, store.spans, 8, packing)
        in_order = list(blocks)
        for number in reversed(range(len(blocks))):
            assert np.array_equal(blocks[number].input_ids, in_order[number].input_ids)
        for number in (-1, len(blocks)):
            with pytest.raises(IndexError):
                blocks[number]


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_without_a_target(packing):
    """An empty text is its end token alone, which nothing predicts."""
    store = make_store([1])
    blocks = PackedBlocks(store, store.spans, 8, packing)
    assert len(blocks) == blocks.targets == len(list(blocks)) == 0
