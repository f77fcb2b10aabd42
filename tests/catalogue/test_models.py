import inspect
import logging
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from oomless import catalogue
from oomless.errors import ModelError

# Fields on which neither memory nor work depends, or that follow from stored ones: no entry needs them.
NOT_NEEDED_TO_PLAN = """
    bos_token_id eos_token_id pad_token_id initializer_range use_cache pretraining_tp is_decoder
    router_aux_loss_coef router_jitter_noise output_router_logits classifier_dropout swiglu_alpha swiglu_limit
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn add_cross_attention
    use_bidirectional_attention rope_interleave partial_rotary_factor num_nextn_predict_layers
    qk_head_dim head_dim sliding_window _sliding_window_pattern max_window_layers no_rope_layer_interval
    embedding_multiplier logits_scaling residual_multiplier attention_multiplier time_step_limit indexer_types mtp_layers_block_type
"""


_SPARSE = ("deepseek_v32", "glm_moe_dsa")
"""Their layers are all of one type, which transformers 5.17 and 5.23 call by two names."""

_EXPECTED = re.compile(
    "high_freq_factor field must be greater than low_freq_factor"  # Llama 4 Scout is published with two that are equal
    "|Unrecognized keys in `rope_parameters` for 'rope_type'='dynamic': {'alpha'}"  # read by Hunyuan's own code
    "|Reading global config value for per-layer attribute"  # asked for below, of Gemma 4
)


@pytest.fixture
def transformers_log(caplog, monkeypatch):
    """What transformers says of a config; its own handler does not reach pytest."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize("name", catalogue.models())
def test_the_real_class_has_the_published_number_of_parameters(name, transformers_log):
    stored = catalogue.model_config(name)
    config = AutoConfig.for_model(**catalogue.model_config(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == catalogue.parameters(name)
    assert [type(model).__name__] == stored["architectures"]
    layers = stored.pop("per_layer_config", {})
    assert config.to_dict().get("per_layer_config", {}) == layers
    config.allow_global_per_layer_attribute_access = bool(layers)
    assert {key: getattr(config, key) for key in stored if key != "dtype"} == {
        key: value for key, value in stored.items() if key != "dtype"
    }
    assert config.dtype == getattr(torch, stored["dtype"])
    said = [record.getMessage() for record in transformers_log.records]
    assert not [message for message in said if not _EXPECTED.search(message)]


@pytest.mark.parametrize("name", catalogue.models())
def test_nothing_is_misspelt_and_nothing_is_left_to_a_default(name):
    stored = catalogue.model_config(name)
    config = AutoConfig.for_model(**catalogue.model_config(name))
    field_of_key = {key: config.attribute_map.get(key, key) for key in stored}
    fields = type(config)().to_dict().keys()
    modelling = inspect.getsource(inspect.getmodule(AutoModelForCausalLM._model_mapping[type(config)]))
    for key, field in field_of_key.items():
        assert field in fields or f'"{key}"' in modelling, f"{key} is no field of a {config.model_type} config"
    of_any_config = PreTrainedConfig().to_dict().keys()
    not_needed = {*NOT_NEEDED_TO_PLAN.split(), *(["layer_types"] if config.model_type in _SPARSE else [])}
    assert fields - of_any_config - set(field_of_key.values()) <= not_needed
    assert stored.keys() >= {"model_type", "architectures", "dtype", "tie_word_embeddings"}


@pytest.mark.parametrize("name", catalogue.models())
def test_entries_hold_together(name):
    entry = catalogue.model(name)
    assert len(entry.config.get("layer_types", [])) in (0, entry.config.get("num_hidden_layers"))
    assert entry.source
    assert name.count("/") == 1


def test_there_are_enough_models_of_every_family():
    names = catalogue.models()
    assert len(names) >= 250
    for family in [
        "Llama-2",
        "Llama-3-",
        "Llama-3.1",
        "Llama-3.2",
        "Llama-3.3",
        "gemma-7b",
        "gemma-2-",
        "gemma-3-",
    ]:
        assert any(family in name for name in names), family
    for family in [
        "Qwen2.5",
        "Qwen3-0.6B",
        "Qwen3-Coder-480B",
        "Kimi-K2",
        "Mistral-7B",
        "Mixtral",
        "phi-4",
        "Phi-3",
    ]:
        assert any(family in name for name in names), family
    for family in [
        "SmolLM2",
        "TinyLlama",
        "OLMo-2",
        "DeepSeek-V3",
        "DeepSeek-R1-Distill",
        "gpt-oss",
        "gpt2",
        "pythia",
    ]:
        assert any(family in name for name in names), family


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        ("unsloth/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        (" gemma-7b ", "google/gemma-7b"),
        ("gpt2", "openai-community/gpt2"),
    ],
)
def test_spellings(spelling, name):
    assert catalogue.model(spelling).name == name
    assert catalogue.model_config(spelling) == catalogue.model_config(name)


def test_no_spelling_means_two_models():
    spellings = [
        name.lower() for entry in map(catalogue.model, catalogue.models()) for name in (entry.name, *entry.also)
    ]
    assert len(spellings) == len(set(spellings))
    for spelling in spellings:
        catalogue.model(spelling.rpartition("/")[2])


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("meta-llama/Llama-3.2-1C", "meta-llama/Llama-3.2-1B"),
        ("Qwen-2.5-7B", "Qwen2.5-7B"),
        ("gema-7b", "gemma-7b"),
    ],
)
def test_an_unknown_name_gets_the_nearest(wrong, near):
    with pytest.raises(ModelError, match=f"does not know '{wrong}'. Did you mean '.*{near}'"):
        catalogue.model_config(wrong)


def test_a_config_is_the_callers_own():
    catalogue.model_config("Llama-3.2-1B")["rope_parameters"]["factor"] = 0
    assert catalogue.model_config("Llama-3.2-1B")["rope_parameters"]["factor"] == 32.0
