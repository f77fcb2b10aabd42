"""Mixtures of experts: equal to transformers' own, in every form that the experts may lie in, and rehearsed to the byte."""

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.conftest import ARCHITECTURES
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from oomless.config import DataSource, TrainConfig
from oomless.data.loader import MicroBatch
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models import experts
from oomless.models.spec import resolve
from oomless.planning.layout import Layout
from oomless.planning.rehearse import play, rehearse, virtual_device
from oomless.techniques import routes
from oomless.techniques.experts import expert_modules
from oomless.training import loop
from oomless.training.assemble import assemble
from oomless.training.checkpoint import list_checkpoints

LENGTHS = (20, 1, 43)
FAMILIES = {
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, head_dim=16
    ),
    "qwen2_moe": dict(
        model_type="qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
    ),
    "olmoe": dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(
        model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, intermediate_size=64
    ),
    "glm4_moe": dict(
        model_type="glm4_moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        first_k_dense_replace=1,
    ),
    "ernie4_5_moe": dict(model_type="ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32),
    "llama4_text": ARCHITECTURES["llama4_text"],
    "jetmoe": ARCHITECTURES["jetmoe"],
    "longcat_flash": ARCHITECTURES["longcat_flash"],
}


@pytest.fixture(scope="session")
def make_mixture(make_checkpoint):
    """A function that makes a tiny mixture of a family."""
    return lambda family, **changes: make_checkpoint("llama", **{**FAMILIES[family], **changes})


def make_config(folder, corpus="none", out="none", **settings):
    defaults = {"max_seq_length": sum(LENGTHS), "dtype": "fp32"}
    return TrainConfig(
        model=str(folder), data=(DataSource(path=str(corpus)),), output_dir=str(out), **{**defaults, **settings}
    )


def losses_and_gradients(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_architectures_own_experts(make_mixture, family):
    """Where every token visits each of its experts in turn: the loss and every gradient."""
    own = AutoModelForCausalLM.from_pretrained(make_mixture(family), experts_implementation="eager")
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # fresh biases and gates are 0
    ours = copy.deepcopy(own)
    experts.register()
    ours.set_experts_implementation(experts.NAME)
    experts.place(ours, VirtualGPU(1 << 30))
    assert any(expert_modules(ours))
    ids = torch.arange(96).view(2, 48) * 7919 % 512
    loss, gradients = losses_and_gradients(own, ids)
    our_loss, our_gradients = losses_and_gradients(ours, ids)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_choices_of_no_expert_add_nothing(make_mixture):
    """Other implementations mark a choice that is another process's with a number beyond the experts'."""
    model = AutoModelForCausalLM.from_pretrained(make_mixture("mixtral"))
    experts.place(model, VirtualGPU(1 << 30))
    _, module = next(expert_modules(model))
    hidden = torch.randn(5, 64, requires_grad=True)
    chosen, weights = torch.tensor([[0, 4], [4, 4], [1, 0], [3, 2], [4, 0]]), torch.rand(5, 2)
    result = experts.experts_forward(module, hidden, chosen, weights)
    known = ALL_EXPERTS_FUNCTIONS["batched_mm"](module, hidden, chosen.clamp(max=3), weights * (chosen < 4))
    assert torch.allclose(result, known, atol=1e-6)
    (gradient,) = torch.autograd.grad(result.square().sum(), hidden)
    (expected,) = torch.autograd.grad(known.square().sum(), hidden)
    assert torch.allclose(gradient, expected, atol=1e-6)


def both_profiles(folder, settings):
    """Return the profiles of a real run on a virtual GPU, where tokens go where they go, and of its rehearsal."""
    spec, config = resolve(str(folder)), make_config(folder, **settings)
    real = VirtualGPU(1 << 40, name="virtual GPU", record_history=True)
    with real.active():
        play(assemble(spec, config, real, fill=True), config, Layout.uniform(LENGTHS, config))
    fake = rehearse(spec, config, virtual_device(), kernel="auto", layout=Layout.uniform(LENGTHS, config))
    return real.profile(max_points=None), fake.device.profile(max_points=None)


EXACT = [
    {"dtype": "fp32", "optimizer": "sgd"},
    {"dtype": "fp16", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    {"dtype": "bf16", "optimizer": "adafactor", "optimizer_in_backward": True, "per_device_train_batch_size": 2},
    {"dtype": "bf16", "trainable": "lora", "quantization": "nf4", "gradient_checkpointing": True},
    {"dtype": "bf16", "trainable": "lora", "stream_frozen": True, "gradient_checkpointing": True},
    {"dtype": "bf16", "trainable": "lora", "experts_on_host": True, "quantization": "int8", "lora_dropout": 0.2},
    {"dtype": "bf16", "trainable": "model.layers.0.*", "experts_on_host": True},
]


def pairs(settings, **families):
    """Return ``families`` with all of ``settings``; of each is said which of these are quick and which slow, the others are longer."""

    def mark(number, quick, slow):
        return [] if number in quick else pytest.mark.slow if number in slow else pytest.mark.full_length

    return [
        pytest.param(
            family,
            setting,
            id="-".join([family, *(str(value) for value in setting.values())]),
            marks=mark(number, *kinds),
        )
        for family, kinds in families.items()
        for number, setting in enumerate(settings)
    ]


ALL, NONE = range(9), ()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *pairs(
            EXACT,
            **dict(qwen3_moe=(ALL, NONE), gpt_oss=([3], ALL), llama4_text=(NONE, [3, 5])),
            **dict(glm4_moe=(NONE, [2]), jetmoe=(NONE, [3, 5]), longcat_flash=(NONE, [0])),
        ),
        ("mixtral", {"router_aux_loss_coef": 0.1, "gradient_checkpointing": True}),
    ],
)
def test_a_rehearsal_that_knows_no_routes_is_exact(make_mixture, family, settings):
    real, fake = both_profiles(make_mixture(family), settings)
    assert fake.peak_allocated_bytes == real.peak_allocated_bytes
    assert fake.peak_reserved_bytes == real.peak_reserved_bytes
    assert fake.peak_bytes_by_category == real.peak_bytes_by_category
    assert fake.phases == real.phases


# What is trained, kept and written.

RUNS = [
    {"trainable": "full"},
    {"trainable": "lora", "lora_r": 4},
    {"trainable": "lora", "lora_r": 4, "quantization": "nf4"},
    {"trainable": "lora+lm_head", "lora_r": 4, "quantization": "int8", "lora_dropout": 0.1},
]


def train(folder, corpus, out, monkeypatch, **settings):
    """Train a few steps; return the live model, merged or not, and the folder of the final one."""
    runs = []
    original = loop.Run.__init__
    monkeypatch.setattr(loop.Run, "__init__", lambda run, *given: (original(run, *given), runs.append(run))[0])
    result = loop.train(make_config(folder, corpus, out, max_steps=3, learning_rate=1e-2, **settings))
    return runs[0].assembly.model.eval(), result.model_dir


@torch.no_grad()
def logits(model):
    ids = torch.arange(1, 41)[None] * 7919 % 512
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "settings"),
    pairs(
        RUNS,
        **dict(qwen2_moe=(ALL, NONE), gpt_oss=([2], ALL), qwen3_moe=(NONE, ALL), llama4_text=(NONE, ALL)),
        **dict(glm4_moe=(NONE, [1]), jetmoe=(NONE, [1, 3]), longcat_flash=(NONE, [0, 2])),
    ),
)
def test_the_final_model_is_the_live_one_under_the_names_of_the_base(
    make_mixture, corpus, tmp_path, monkeypatch, family, settings
):
    folder = make_mixture(family)
    live, final = train(folder, corpus, tmp_path, monkeypatch, **settings)
    loaded, report = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert load_file(final / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    base = AutoModelForCausalLM.from_pretrained(folder)
    close = 1e-5 * logits(loaded).norm()
    assert (logits(base) - logits(loaded)).norm() > 100 * close
    if "quantization" not in settings:  # else the live one's frozen weights are rounded
        assert (logits(live) - logits(loaded)).norm() <= close
    if settings["trainable"] != "full":
        adapter = list_checkpoints(tmp_path)[-1].folder
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # peft warns of what it leaves out
            warnings.filterwarnings("ignore", category=FutureWarning)
            adapted = PeftModel.from_pretrained(base, adapter)
        assert (logits(adapted) - logits(loaded)).norm() <= close


@pytest.mark.parametrize(
    "beside",
    [
        {"trainable": "lora+lm_head", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"trainable": "lora", "quantization": "nf4", "gradient_checkpointing": True, "offload_activations": True},
        {"trainable": "lora", "quantization": "int8", "optimizer_in_backward": True, "max_grad_norm": 0.0},
        {"trainable": "model.layers.0.*", "router_aux_loss_coef": 0.1, "momentum": 0.5},
        {"trainable": "embed_tokens", "trainable_rows": "3-400", "dtype": "bf16", "fp32_residual": True},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_experts_on_the_host_change_no_result(make_mixture, beside):
    folder = make_mixture("qwen3_moe")

    def trained(**settings):
        torch.manual_seed(0)
        device = VirtualGPU(1 << 30)
        config = make_config(folder, **{"learning_rate": 0.5, "optimizer": "sgd", **beside, **settings})
        with device.active():
            built = assemble(resolve(str(folder)), config, device, fill=True)
            for seed in range(2):
                with device.host():
                    tokens = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(seed))
                    batch = MicroBatch(
                        input_ids=tokens,
                        labels=tokens.roll(-1),
                        position_ids=torch.arange(64)[None],
                        document_lengths=((64,),),
                        target_count=64,
                    )
                built.step.run([batch] * config.gradient_accumulation_steps)
            peak = device.usage().peak_allocated_bytes
            return peak, {n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad}

    peak, expected = trained()
    leaner, found = trained(experts_on_host=True)
    assert leaner < peak
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        # A matrix that lies elsewhere in memory may be summed in another order.
        assert (found[name] - parameter).norm() <= 1e-5 * parameter.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "ernie4_5_moe"])
def test_the_balancing_loss_has_the_gradients_of_the_architectures_own(make_mixture, family, checkpointing):
    folder = make_mixture(family)
    own = AutoModelForCausalLM.from_pretrained(folder, output_router_logits=True, router_aux_loss_coef=0.5)
    ids = torch.arange(64)[None] * 7919 % 512
    output = own.train()(input_ids=ids, use_cache=False)
    (cross_entropy(output.logits[0], ids[0], reduction="mean") + 0.5 * output.aux_loss).backward()
    settings = make_config(
        folder, gradient_checkpointing=checkpointing, router_aux_loss_coef=0.5, packing="concatenate", optimizer="sgd"
    )
    device = VirtualGPU(1 << 30)
    with device.active():
        built = assemble(resolve(str(folder)), settings, device, fill=True)
        positions = torch.arange(64)[None]
        batch = MicroBatch(
            input_ids=ids, labels=ids, position_ids=positions, document_lengths=((64,),), target_count=64
        )
        built.step.accumulate([batch], 64)
    ours = dict(built.model.named_parameters())
    for name, parameter in own.named_parameters():
        if parameter.grad is not None:
            difference = ours[name].grad.float() - parameter.grad
            assert difference.norm() <= 2e-5 * parameter.grad.norm() + 1e-9, name
    plain = assemble(
        resolve(str(folder)), make_config(folder, router_aux_loss_coef=0.0), VirtualGPU(1 << 30), fill=True
    )
    assert plain.step.balance is None


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (None, {"router_aux_loss_coef": 0.1}, "has no balancing loss"),
        ("glm4_moe", {"router_aux_loss_coef": 0.1}, "has no balancing loss"),
        ("olmoe", {"router_aux_loss_coef": 0.1, "trainable": "lm_head"}, "nothing before lm_head trains"),
        (None, {"trainable": "lora", "experts_on_host": True}, "no frozen experts"),
        ("olmoe", {"trainable": "model.layers.*", "experts_on_host": True}, "no frozen experts"),
        ("olmoe", {"trainable": "lora", "use_dora": True}, "use_dora is for linear layers, not for experts"),
    ],
)
def test_refused(make_checkpoint, make_mixture, family, settings, message):
    folder = make_checkpoint("llama") if family is None else make_mixture(family)
    with pytest.raises(ConfigError, match=message):
        rehearse(resolve(str(folder)), make_config(folder, **settings), virtual_device())


@pytest.mark.parametrize("family", ["afmoe", "jetmoe"])
def test_routers_are_neither_rounded_nor_adapted(make_mixture, make_checkpoint, family):
    """Their linear layer lies inside them."""
    afmoe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, num_dense_layers=1)
    folder = make_mixture(family) if family in FAMILIES else make_checkpoint("llama", model_type=family, **afmoe)
    config, device = make_config(folder, trainable="lora", quantization="nf4"), VirtualGPU(1 << 30)
    with device.active():
        model = assemble(resolve(str(folder)), config, device, fill=True).model
    routers = [m for name, m in model.named_modules() if name.endswith(("router.gate", "router.layer"))]
    assert routers
    assert {type(router) for router in routers} == {torch.nn.Linear}


@pytest.mark.parametrize(
    "settings", [{}, {"quantization": "nf4", "gradient_checkpointing": True}], ids=["plain", "nf4"]
)
def test_where_tokens_go_is_what_the_routers_chose(make_mixture, settings):
    folder = make_mixture("qwen3_moe")
    device, config = VirtualGPU(1 << 30), make_config(folder, trainable="lora", lora_r=4, dtype="fp32", **settings)
    ids, positions = torch.arange(1, 65)[None] * 7 % 500, torch.arange(64)[None]
    batch = MicroBatch(input_ids=ids, labels=ids, position_ids=positions, document_lengths=((64,),), target_count=64)
    with device.active():
        parts = assemble(resolve(str(folder)), config, device, fill=True)
        parts.step.evaluate([batch])
        assert routes.take(parts.model) is None
        parts.step.accumulate([batch], 64)
        found = routes.take(parts.model)
        assert routes.take(parts.model) is None
    own = AutoModelForCausalLM.from_pretrained(folder)(ids, output_router_logits=True).router_logits
    counts = [torch.bincount(logits.topk(3).indices.flatten(), minlength=8) for logits in own]
    if not settings:  # frozen weights in 4 bits choose a little otherwise
        assert found.busiest == pytest.approx(sum(int(c.max()) for c in counts) / (len(counts) * 64 * 3))
        assert found.unused == sum(int((c == 0).sum()) for c in counts)
    assert found.busiest == pytest.approx(sum(int(c.max()) for c in counts) / (len(counts) * 64 * 3), abs=0.05)
    assert (found.even, found.experts) == (1 / 8, 8 * len(counts))


def test_a_run_says_and_records_where_tokens_go(make_mixture, corpus, tmp_path):
    said = []
    listener = loop.Listener()
    listener.said = said.append
    config = make_config(
        make_mixture("olmoe"),
        corpus,
        tmp_path,
        trainable="lora",
        lora_r=4,
        max_steps=2,
        logging_steps=1,
        gpu="virtual:64MiB",
    )
    loop.train(config, listener)
    assert len([text for text in said if "the busiest expert of a layer gets" in text]) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shares = [line["busiest_expert_share"] for line in lines if "gradient_norm" in line]
    assert len(shares) == 2
    assert all(1 / 4 <= share <= 1 for share in shares)
