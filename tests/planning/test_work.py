"""What a rehearsal counts, against what is counted by hand."""

import pytest
import torch

from oomless.config import TrainConfig
from oomless.memory.fake_mode import QuickFakeMode
from oomless.memory.work import cost_of
from oomless.models.spec import resolve
from oomless.planning import rehearse as rehearsal
from oomless.planning.layout import Layout
from oomless.planning.rehearse import rehearse, virtual_device

T, V, D, F, LAYERS = 64, 512, 64, 96, 2
LAYER = 2 * D * D + 2 * D * 32 + 3 * D * F  # queries and output, keys and values of half as many heads, the MLP
PAIRS = T * (T + 1) // 2  # of tokens, of which the earlier is seen by the later
ATTENTION = 2 * D * PAIRS  # one product of it, for all heads


def work(folder, steps=1, gpus=1, lengths=None, kernel=None, **settings):
    config = TrainConfig.from_mapping(
        {"model": str(folder), "data": "none", "output_dir": "none", "max_seq_length": T, "dtype": "fp32"}
        | {"packing": "concatenate"}
        | settings
    )
    how = {"layout": lengths and Layout.uniform(lengths, config), "kernel": kernel}
    found = rehearse(resolve(str(folder)), config, virtual_device(), steps=steps, whole=False, gpus=gpus, **how)
    assert found.out_of_memory is None
    return found.work


def moved(found):
    return sum(cost[2] * count for cost, count in (*found.of_passes, *found.of_update))


def test_operations_of_a_whole_model(make_checkpoint):
    found = work(make_checkpoint("llama"))
    parameters = LAYERS * LAYER + V * D
    assert found.flops() == {"fp32": 6 * parameters * T + LAYERS * 7 * ATTENTION}


def test_a_16_bit_head_is_multiplied_once_more(make_checkpoint):
    found = work(make_checkpoint("llama"), dtype="bf16")
    products = 6 * LAYERS * LAYER * T + 8 * V * D * T + LAYERS * 7 * ATTENTION
    assert found.flops() == {"bf16": products}


def test_checkpointing_adds_a_forward_of_the_layers_up_to_what_backward_needs(make_checkpoint):
    folder = make_checkpoint("llama")
    plain = work(folder).flops()["fp32"]
    last_product = 2 * D * F * T
    for layers in (1, 2):
        more = work(folder, gradient_checkpointing=True, checkpointed_layers=layers).flops()["fp32"] - plain
        assert more == layers * (2 * LAYER * T + 2 * ATTENTION - last_product)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_packed_documents_are_one_launch(make_checkpoint, kernel):
    """However many they are; and each costs what it costs alone."""
    folder, found = make_checkpoint("llama"), {}
    for count in (1, 2, 8, 32):
        lengths = (T // count,) * count
        done = work(folder, dtype="bf16", packing="documents", lengths=lengths, kernel=kernel)
        found[count] = sum(times for _, times in done.of_passes)
        attended = LAYERS * 7 * 2 * D * sum(length * (length + 1) // 2 for length in lengths)
        assert done.flops() == {"bf16": 6 * LAYERS * LAYER * T + 8 * V * D * T + attended}
    assert found[2] == found[8] == found[32] <= found[1]


def test_a_window_is_the_kernels_own(make_checkpoint):
    """Where it is flash; the others compute chunks of queries from plain products."""
    window = 24
    folder = make_checkpoint("qwen2", use_sliding_window=True, sliding_window=window, max_window_layers=0)
    for lengths in ((T,), (T - 8, 8)):
        done = work(folder, dtype="bf16", packing="documents", lengths=lengths, kernel="flash")
        pairs = sum(size * (size + 1) // 2 for size in lengths if size <= window)
        pairs += sum(window * (window + 1) // 2 + (size - window) * window for size in lengths if size > window)
        assert done.flops() == {"bf16": 6 * LAYERS * LAYER * T + 8 * V * D * T + LAYERS * 7 * 2 * D * pairs}


def test_micro_batches_count_each_and_the_update_once(make_checkpoint):
    folder = make_checkpoint("llama")
    one, two, many = (work(folder, gradient_accumulation_steps=count) for count in (1, 2, 9))
    assert (one.passes, two.passes, many.passes) == (1, 2, 2)
    assert many == two
    assert two.flops()["fp32"] == 2 * one.flops()["fp32"]
    assert two.of_update == one.of_update


def test_the_update_inside_backward_is_told_from_the_pass(make_checkpoint):
    folder = make_checkpoint("llama")
    settings = {"optimizer": "adafactor", "max_grad_norm": 0}
    apart, inside = (work(folder, optimizer_in_backward=within, **settings) for within in (False, True))

    def largest(costs):
        return max(cost[2] for cost, _ in costs)

    assert inside.flops() == apart.flops()
    assert largest(inside.of_update) == largest(apart.of_update)
    assert sum(count for _, count in inside.of_update) >= 100


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_8bit", "dtype": "bf16"},
        {"gradient_checkpointing": True, "offload_activations": True},
        {"trainable": "lora+lm_head", "stream_frozen": True},
        {"optimizer": "adafactor", "optimizer_in_backward": True},
    ],
    ids=str,
)
def test_every_step_costs_the_same_and_repeated_updates_are_counted(make_checkpoint, settings, monkeypatch):
    folder = make_checkpoint("llama")
    first, third = (work(folder, steps=steps, **settings) for steps in (1, 3))
    monkeypatch.setattr(rehearsal, "repeat_updates", lambda optimizer, device: None)
    run = work(folder, **settings)
    for found in (third, run):
        assert found.flops() == first.flops()
        assert moved(found) == moved(first)
        assert found.link_bytes_of_passes == first.link_bytes_of_passes
        assert found.link_bytes_of_update == first.link_bytes_of_update


BATCH = 3 * 8 * T  # tokens, labels and positions come from the host


def test_bytes_over_the_link(make_checkpoint):
    folder = make_checkpoint("llama", num_hidden_layers=4)
    plain = work(folder)
    assert (plain.link_bytes_of_passes, plain.link_bytes_of_update) == (BATCH, 0)
    activations = work(folder, gradient_checkpointing=True, checkpointed_layers=3, offload_activations=True)
    assert activations.link_bytes_of_passes == BATCH + 2 * 2 * (T * D * 4)  # the last stays; there and back


def test_optimizer_state_goes_out_and_back(make_checkpoint):
    folder = make_checkpoint("llama", intermediate_size=1024)
    found = work(folder, optimizer="adamw", offload_optimizer=True)
    offloaded = LAYERS * 3 * D * 1024  # the only matrices of 65,536 elements and more
    assert found.link_bytes_of_update == offloaded * (4 + 4) * 2
    assert found.link_bytes_of_passes == BATCH


def test_frozen_weights_are_fetched_for_every_product(make_checkpoint):
    found = work(make_checkpoint("llama"), trainable="lora+lm_head", stream_frozen=True, lora_r=4)
    into_the_first = D * D + 2 * D * 32  # its input is an embedding, which wants no gradient
    fetched = 4 * (2 * LAYERS * LAYER - into_the_first)
    assert found.link_bytes_of_passes == BATCH + fetched
    two = work(make_checkpoint("llama"), gpus=2, trainable="lora+lm_head", stream_frozen=True, lora_r=4)
    of_the_embedding, of_the_loss = T * (8 + 4 * D), 2 * 4
    assert two.link_bytes_of_passes == BATCH + fetched // 2
    assert two.exchanged_bytes_of_passes == fetched // 2 + of_the_embedding + of_the_loss


def test_what_several_gpus_send_each_other(make_checkpoint):
    """Layers are gathered for forward and for backward, the rest once; every gradient is scattered once."""
    folder = make_checkpoint("llama", num_hidden_layers=4)
    layers, rest = 4 * (LAYER + 2 * D), 2 * V * D + D
    number = 2 * 4  # the loss, and the gradients' norm: there and back
    two = work(folder, gpus=2)
    assert two.exchanged_bytes_of_passes == 4 * (3 * layers + 2 * rest) // 2 + number
    assert two.exchanged_bytes_of_update == number
    four = work(folder, gpus=4)
    assert four.exchanged_bytes_of_passes == 4 * (3 * layers + 2 * rest) * 3 // 4 + number
    assert two.flops() == four.flops() == work(folder).flops()
    head = work(folder, gpus=2, trainable="lm_head")
    assert head.exchanged_bytes_of_passes == 4 * (layers + rest + V * D) // 2 + number
    assert work(folder).exchanged_bytes_of_passes == work(folder).exchanged_bytes_of_update == 0


def test_gradients_of_whole_models_are_sent_once_a_step(make_checkpoint):
    """However many passes it has."""
    folder = make_checkpoint("llama", num_hidden_layers=4)
    weights = 4 * (LAYER + 2 * D) + 2 * V * D + D
    found = work(folder, gpus=2, sharding="replicate", gradient_accumulation_steps=2)
    assert found.passes == 2
    assert found.exchanged_bytes_of_update == 2 * 4 * weights
    assert found.exchanged_bytes_of_passes <= 2 * 2 * 4


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_a_pass_costs_the_same_however_many_are_rehearsed(make_checkpoint, gpus, whole):
    """Of text that is known several micro-batches are tried, by each measure of which is the heaviest."""
    folder = make_checkpoint("llama")
    config = TrainConfig.from_mapping(
        {"model": str(folder), "data": "none", "output_dir": "none", "max_seq_length": T, "dtype": "fp32"}
        | {"packing": "concatenate", "gradient_accumulation_steps": 16}
    )
    blocks = tuple((number, (T,)) for number in range(4))
    layout = Layout(train=((T,),) * 4, ranked=(blocks, blocks[::-1]), evaluation=(), blocks_per_epoch=400)
    found = rehearse(resolve(str(folder)), config, virtual_device(), layout=layout, whole=whole, gpus=gpus).work
    assert {rate: flops / found.passes for rate, flops in found.flops().items()} == work(folder).flops()


def test_what_is_frozen_costs_less(make_checkpoint):
    folder = make_checkpoint("llama")
    full, lora, head = (
        work(folder, trainable=parts, **rank)
        for parts, rank in (("full", {}), ("lora+lm_head", {"lora_r": 1}), ("lm_head", {}))
    )
    assert full.flops()["fp32"] > lora.flops()["fp32"] > head.flops()["fp32"]
    assert head.flops()["fp32"] == 2 * LAYERS * LAYER * T + LAYERS * 2 * ATTENTION + 4 * V * D * T
    assert moved(full) > moved(head)


def test_unpacking_counts(make_checkpoint):
    folder = make_checkpoint("llama")
    settings = {"trainable": "lora+lm_head", "lora_r": 4, "dtype": "bf16"}
    plain, quantised = work(folder, **settings), work(folder, quantization="nf4", **settings)
    assert quantised.flops() == plain.flops()
    assert moved(quantised) > moved(plain)


aten = torch.ops.aten
CASES = {
    "product": (aten.mm.default, lambda m: (m(4, 8), m(8, 2)), 2 * 4 * 8 * 2, 4 * (32 + 16 + 8)),
    "sum": (aten.add.Tensor, lambda m: (m(4, 8), m(4, 8)), 0, 4 * 3 * 32),
    "in place": (aten.mul_.Tensor, lambda m: (m(4, 8), m(8)), 0, 4 * (2 * 32 + 8)),
    "expanded": (aten.add.Tensor, lambda m: (m(4, 8), m(8).expand(4, 8)), 0, 4 * (2 * 32 + 8)),
    "overwritten": (aten.copy_.default, lambda m: (m(4, 8), m(4, 8)), 0, 4 * 2 * 32),
    "cleared": (aten.zero_.default, lambda m: (m(4, 8),), 0, 4 * 32),
    "like": (aten.zeros_like.default, lambda m: (m(4, 8),), 0, 4 * 32),
    "rows": (aten.embedding.default, lambda m: (m(100, 8), i(3)), 0, 4 * 2 * 24 + 8 * 3),
    "scattered": (aten.index_add_.default, lambda m: (m(100, 8), 0, i(3), m(3, 8)), 0, 4 * 3 * 24 + 8 * 3),
    "list": (aten.cat.default, lambda m: ([m(4, 8), m(2, 8)],), 0, 4 * 2 * 48),
}


def i(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


@pytest.mark.parametrize("name", CASES)
def test_cost_of_an_operator(name):
    operator, arguments, flops, bytes_moved = CASES[name]
    with QuickFakeMode():
        args = arguments(torch.empty)
        assert cost_of(operator, args, {}, operator(*args)) == ("fp32", flops, bytes_moved)


def test_an_out_argument_is_written_once():
    with QuickFakeMode():
        args, out = (torch.empty(4, 8), torch.empty(8, 2)), torch.empty(4, 2)
        result = aten.mm.out(*args, out=out)
        assert cost_of(aten.mm.out, args, {"out": out}, result) == ("fp32", 128, 4 * (32 + 16 + 8))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (aten.permute.default, ((1, 0),)),
        (aten.squeeze.dim, (0,)),
        (aten.alias.default, ()),
        (aten.empty_like.default, ()),
        (torch.ops.prim.device.default, ()),
    ],
)
def test_nothing_to_do(operator, arguments):
    with QuickFakeMode():
        tensor = torch.empty(4, 8)
        result = tensor.device if operator is torch.ops.prim.device.default else operator(tensor, *arguments)
        assert cost_of(operator, (tensor, *arguments), {}, result) is None


@pytest.mark.parametrize("kernel", ["efficient", "flash"])
@pytest.mark.parametrize(("causal", "pairs"), [(True, 16 * 17 // 2), (False, 16 * 16)])
def test_attention_skips_what_is_not_seen(kernel, causal, pairs):
    forward = getattr(aten, f"_scaled_dot_product_{kernel}_attention").default
    given = (None, True, 0.0, causal) if kernel == "efficient" else (0.0, causal)
    with QuickFakeMode():
        query, key, value = (torch.empty(2, heads, 16, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
        if kernel == "efficient":
            key, value = (torch.empty(2, 4, 16, 8, dtype=torch.bfloat16) for _ in range(2))
        args = (query, key, value, *given)
        cost = cost_of(forward, args, {}, forward(*args))
    assert cost[:2] == ("bf16", 2 * 2 * pairs * (2 * 4 * 8))
