"""Every architecture computes what plain transformers computes, in the form that is chosen for it, or is refused before it loads."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from oomless.config import TrainConfig
from oomless.errors import ConfigError, ModelError
from oomless.memory.device import Device
from oomless.models import build, form
from oomless.models.make import without_memory
from oomless.models.spec import most_positions, resolve
from oomless.models.twin import small_config
from oomless.ops.attention import attention_kernel
from oomless.planning.rehearse import virtual_device
from oomless.training.assemble import check_length
from oomless.training.loss import causal_lm_loss
from oomless.training.probe import check_architecture

IDS = torch.arange(1, 41)[None] * 17 % 128
LABELS = torch.cat([IDS[:, 1:], torch.tensor([[-100]])], dim=1)

OWN_ATTENTION = (
    *("bloom", "codegen", "xglm", "gpt_neox_japanese", "trocr", "mvp", "mpt", "falcon", "gptj"),
    *("deepseek_v4", "deepseek_v32", "inkling2_text", "llama4_text", "doge"),
)
OURS = ("llama", "recurrent_gemma", "mamba", "afmoe", "bart", "deepseek_v3", "modernbert-decoder", "roberta")
BEHIND_PADDING = ("roberta", "camembert", "data2vec-text", "roberta-prelayernorm")
BY_OWN_MASKS = ("stablelm", "nemotron", "codegen")
NOT_APART = ("bloom", "mamba", "falcon_h1", "qwen3_next", "recurrent_gemma", "bart", "llama4_text", "lfm3")
NOT_CAUSAL = ("bert", "electra", "xlm")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that saves a tiny random model of a type of transformers' registry, and returns its folder."""

    def make(model_type, **settings):
        settings |= {"is_decoder": True} if model_type in BEHIND_PADDING else {}
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(1)
        config = small_config(AutoConfig.for_model(model_type, **settings))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter *= 4
        model.save_pretrained(folder)
        return folder

    return make


def built(folder, packing):
    spec = resolve(str(folder))
    chosen = form.choose(spec, packing)
    model = build.build(spec, device=Device(), dtype=torch.float32, form=chosen)
    build.load_weights(model, spec, device=Device())
    return chosen, model.eval()


def their_loss(folder, ids, labels):
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    logits = plain(input_ids=ids, use_cache=False).logits
    return float(functional.cross_entropy(logits[0].float(), labels[0], reduction="sum"))


@pytest.mark.parametrize("model_type", [*OWN_ATTENTION, *OURS])
@torch.no_grad()
def test_loss_of_one_stream_is_that_of_plain_transformers(folder_of, model_type):
    folder = folder_of(model_type)
    chosen, model = built(folder, "concatenate")
    assert (chosen.attention == form.OWN_ATTENTION) == (model_type in OWN_ATTENTION)
    check_architecture(model, "concatenate", Device())
    ours = float(causal_lm_loss(model, IDS, LABELS, document_lengths=((40,),)))
    assert ours == pytest.approx(their_loss(folder, IDS, LABELS), rel=1e-5)


@pytest.mark.parametrize("model_type", [*BY_OWN_MASKS, "modernbert-decoder", "afmoe", *BEHIND_PADDING])
@torch.no_grad()
def test_loss_of_packed_documents_is_that_of_each_alone(folder_of, model_type):
    folder = folder_of(model_type, **({"num_key_value_heads": 8} if model_type == "nemotron" else {}))
    chosen, model = built(folder, "documents")
    assert (chosen.attention == form.OWN_ATTENTION) == (model_type in BY_OWN_MASKS)
    assert chosen.after_padding == (model_type in BEHIND_PADDING)
    check_architecture(model, "documents", Device())
    labels = LABELS.clone()
    labels[:, 12] = -100
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    ours = float(causal_lm_loss(model, IDS, labels, position_ids=positions, document_lengths=((13, 27),)))
    theirs = [their_loss(folder, IDS[:, part], labels[:, part]) for part in (slice(13), slice(13, 40))]
    assert ours == pytest.approx(sum(theirs), rel=1e-5)


@pytest.mark.parametrize("model_type", NOT_APART)
def test_packing_that_cannot_be_kept_apart_is_refused(folder_of, model_type):
    spec = resolve(str(folder_of(model_type)))
    with pytest.raises(ModelError, match="see each other"):
        form.choose(spec, "documents")


@pytest.mark.parametrize("model_type", NOT_CAUSAL)
def test_what_is_not_causal_is_refused(folder_of, model_type):
    spec = resolve(str(folder_of(model_type)))
    with pytest.raises(ModelError, match="sees those behind it"):
        form.choose(spec, "concatenate")


def test_bert_that_is_a_decoder_trains(folder_of):
    chosen, model = built(folder_of("bert", is_decoder=True), "documents")
    assert chosen.whole_forward
    check_architecture(model, "documents", Device())


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_the_real_model_is_asked_too(folder_of, packing):
    """The attention is lost after the form was chosen: no mask, so tokens see later ones."""
    _, model = built(folder_of("bloom"), "concatenate")
    model.config._attn_implementation_internal = "oomless"
    with pytest.raises(ModelError):
        check_architecture(model, packing, Device())


def test_a_rehearsal_asks_as_a_run_does(folder_of):
    """A rehearsal has fake tensors, books what is made, and calls the kernels of a GPU that is not there."""
    spec = resolve(str(folder_of("llama")))
    device = virtual_device()
    with device.active(), attention_kernel("efficient"):
        assert form.choose(spec, "documents") == form.Form()
    assert device.usage().peak_allocated_bytes == 0


def test_a_cap_that_only_large_logits_reach_is_seen_in_16_bits():
    config = small_config(AutoConfig.for_model("recurrent_gemma"))
    assert form.body.logit_transform(config)[0] == config.logits_soft_cap == 30.0


@pytest.mark.parametrize(
    ("model_type", "settings", "kinds"),
    [
        (
            "zamba2",
            {},
            {"Zamba2MambaMixer", "Zamba2Attention"},
        ),  # the first hybrid layer is the 7th, the second the 13th
        ("bamba", {"attn_layer_indices": [9, 18, 27]}, {"BambaMixer", "BambaAttention"}),
        ("recurrent_gemma", {}, {"RecurrentGemmaRecurrentBlock", "RecurrentGemmaAttention"}),
        ("jamba", {}, {"JambaMambaMixer", "JambaAttention", "JambaExperts"}),
    ],
)
def test_a_twin_has_layers_of_each_kind(model_type, settings, kinds):
    small = small_config(AutoConfig.for_model(model_type, **settings))
    assert kinds <= {type(module).__name__ for module in without_memory(small).modules()}


def test_positions_without_limit_are_none_to_exceed(folder_of):
    spec = resolve(str(folder_of("xlnet", d_model=64, n_layer=2, n_head=4, d_inner=96)))
    assert most_positions(spec.config) is None
    with pytest.raises(ModelError, match="a token sees those behind it"):
        form.choose(spec, "concatenate")


def test_positions_up_to_that_of_padding_are_no_tokens(folder_of):
    folder = folder_of("roberta", max_position_embeddings=52)
    config = TrainConfig.from_mapping({"model": str(folder), "data": "x", "output_dir": "y", "max_seq_length": 50})
    check_length(resolve(str(folder)), config)
    with pytest.raises(
        ConfigError, match="max_position_embeddings less the first 2, which its tokens do not have, 50; got 51"
    ):
        check_length(resolve(str(folder)), replace(config, max_seq_length=51))
