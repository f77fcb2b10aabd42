"""Names that people use lead to shapes, offline; those that mean nothing get a line that helps."""

import pytest

from oomless import catalogue
from oomless.errors import ModelError
from oomless.models import names
from oomless.models.spec import resolve, resolve_for_plan

MEANT = {
    "llama-8b": "meta-llama/Llama-3.1-8B",
    "llama 1b": "meta-llama/Llama-3.2-1B",
    "LLAMA_3.2_3B": "meta-llama/Llama-3.2-3B",
    "qwen3 4b": "Qwen/Qwen3-4B",
    "qwen 0.6b": "Qwen/Qwen3-0.6B",
    "gemma-9b": "google/gemma-2-9b",
    "gemma 3 4b": "google/gemma-3-4b-pt",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mixtral 8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "gpt-oss 20b": "openai/gpt-oss-20b",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "olmoe 1b-7b": "allenai/OLMoE-1B-7B-0924",
    "phi 4": "microsoft/phi-4",
    "gpt2-xl": "openai-community/gpt2-xl",
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": "meta-llama/Llama-3.2-1B",
    "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit": "meta-llama/Llama-3.1-8B",
    "unsloth/gemma-3-4b-it-qat-GGUF": "google/gemma-3-4b-pt",
    "unsloth/gpt-oss-20b-unsloth-bnb-4bit": "openai/gpt-oss-20b",
    "mlx-community/Llama-3.2-3B-Instruct-4bit": "meta-llama/Llama-3.2-3B",
    "mlx-community/Qwen3-4B-4bit-DWQ": "Qwen/Qwen3-4B",
    "NousResearch/Meta-Llama-3-8B": "meta-llama/Meta-Llama-3-8B",
    "NousResearch/Hermes-3-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "TheBloke/Mistral-7B-v0.1-GPTQ": "mistralai/Mistral-7B-v0.1",
    "TheBloke/Llama-2-7B-Chat-AWQ": "meta-llama/Llama-2-7b-hf",
    "neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B",
    "RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w4a16": "meta-llama/Llama-3.1-70B",
    "bartowski/Qwen2.5-7B-Instruct-GGUF": "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-4B-Instruct-2507-FP8": "Qwen/Qwen3-4B-Instruct-2507",
    "cognitivecomputations/dolphin-2.9-llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "Qwen/Qwen3-8B",
    "Qwen/Qwen3-VL-4B-Instruct": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen 9b": "Qwen/Qwen3.5-9B",
    "Qwen/Qwen3.6-35B-A3B-FP8": "Qwen/Qwen3.5-35B-A3B",
    "unsloth/gemma-4-31B-it-GGUF": "google/gemma-4-31B",
    "gemma-3n e2b": "google/gemma-3n-E2B",
    "unsloth/gpt-oss-safeguard-20b-GGUF": "openai/gpt-oss-20b",
    "unsloth/Nemotron-3-Nano-30B-A3B": "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Ministral-3-14B": "mistralai/Ministral-3-14B-Base-2512",
    "tencent/Hunyuan-7B-Instruct-AWQ-Int4": "tencent/Hunyuan-7B-Instruct",
    "unsloth/Phi-4-4-bit": "microsoft/phi-4",
}


@pytest.mark.parametrize("name", MEANT)
def test_variants_lead_to_the_same_shapes_and_it_is_said(name):
    spec = resolve_for_plan(name)
    assert spec.name == MEANT[name]
    known = {
        spelling.lower() for entry in map(catalogue.model, catalogue.models()) for spelling in (entry.name, *entry.also)
    }
    short = {spelling.rpartition("/")[2] for spelling in known}
    if name.lower() not in known | short:
        assert spec.notes == (
            f"{name}: taken as {spec.name}, whose shapes it has by its name (the catalogue of {catalogue.MADE})",
        )
    else:
        assert spec.notes == ()


def test_at_least_250_published_names_resolve_offline(monkeypatch):
    """Each with the parameters of its entry, which are asserted against the real class in tests/catalogue."""
    monkeypatch.setattr(names, "hub_is_near", lambda: pytest.fail("the network was asked"))
    published = [s for entry in map(catalogue.model, catalogue.models()) for s in (entry.name, *entry.also)]
    assert len(published) >= 450
    for name in published:
        found = names.find(name).model
        assert found is not None
        assert name in (found.name, *found.also)
        packed = names.by_shape("unsloth/" + name.rpartition("/")[2] + "-bnb-4bit")
        assert packed is not None, name
        assert packed.parameters == found.parameters, (name, packed.name)


NOTHING_ALIKE = [
    "foo/bar-9b",
    "nothing",
    "8b",
    "Qwen3-5B",
    "llama-9b",
    "gemma-13b",
    "no-such-owner/no-such-model",
    "gpt-5",
    "claude-7b",
    "xyzzy/plugh-3b",
    "mistral-99b",
    "mixtral-3x7b",
    "phi-99",
    "olmo-300b",
    "deepseek-9b",
    "falcon-3.14b",
    "bloom-42b",
    "opt-99b",
    "pythia-13b",
    "smollm-9b",
    "my-model",
    "./not/here",
    "model.safetensors",
    "best-model-70",
    "checkpoint-500",
    # A family within a family, another version, another number of active parameters: other shapes, whatever the size says.
    "gemma-3n-4b",
    "gemma-3n-E3B",
    "gemma-4-12B-it",
    "gpt-oss-guardian-20b",
    "gpt-neo-20b",
    "gptneox-20b",
    "Qwen3.7-4B",
    "Qwen3-4B-Coder",
    "Qwen3.5-9B-Math",
    "Qwen3-Omni-30B-A3B-Instruct",
    "Qwen3-30B-A5B",
    "Qwen3-VL-Embedding-8B",
    "DeepSeek-R1-Distill-Qwen-8B",
    "R1-Distill-Qwen-7B",
    "GLM-4.8-Flash",
    "translategemma-4b",
    "medgemma-1.5-4b",
    "granite-code-8b",
    "yi-coder-9b",
    "LFM2.5-350M",
    "qwen3-4b-vision-xl",
    "OpenLLaVA-Qwen3-8B",
    "yi-34b-tiny-draft",
    "qwen3",
]
ALIKE = {
    "lama-7b": "meta-llama/Llama-2-7b-hf",
    "llamma-3.2-1b": "meta-llama/Llama-3.2-1B",
    "Qwem3-4B": "Qwen/Qwen3-4B",
    "gema-7b": "google/gemma-7b",
    "gemmma-3-12b": "google/gemma-3-12b-pt",
    "mistrall-7b": "mistralai/Mistral-7B-v0.3",
    "mixtrall-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "pythja-1.4b": "EleutherAI/pythia-1.4b",
    "smolm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "starcodr2-3b": "bigcode/starcoder2-3b",
    "granit-3.1-2b": "ibm-granite/granite-3.1-2b-base",
    "falcn3-7b": "tiiuae/Falcon3-7B-Base",
    "stablelmm-2-12b": "stabilityai/stablelm-2-12b",
    "deepseek-r1-distil-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "Llama-Gard-3-8B": "meta-llama/Llama-Guard-3-8B",
    "Qwen3-4B-Instrct": "Qwen/Qwen3-4B",
    "Kimi-Linaer-48B-A3B": "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "Devstral-Small-2": "mistralai/Devstral-Small-2-24B-Instruct-2512",
}


def refused(name):
    with pytest.raises(ModelError) as raised:
        resolve_for_plan(name)
    message = str(raised.value)
    for part in (
        repr(name),
        f"the catalogue of {catalogue.MADE}",
        "local cache",
        "the Hub",
        "--model path/to/config.json",
    ):
        assert part in message
    return message


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(names, "hub_is_near", lambda: False)


def test_there_are_40_names_that_mean_nothing():
    assert len(NOTHING_ALIKE) + len(ALIKE) >= 40


@pytest.mark.parametrize("name", NOTHING_ALIKE)
def test_a_name_that_is_like_none_is_told_what_was_tried_and_given_no_other(name):
    assert "Did you mean" not in refused(name)


@pytest.mark.parametrize("name", ALIKE)
def test_a_misspelt_name_is_given_one_of_its_family_and_size(name):
    said = refused(name)
    assert f"{ALIKE[name]}" in said.partition("Did you mean ")[2].partition("?")[0]


def test_a_known_name_whose_weights_are_not_here_is_not_given_itself():
    with pytest.raises(ModelError) as refused:
        resolve("meta-llama/Llama-3.2-1B")
    assert "Did you mean" not in str(refused.value)
    assert "`oomless plan` works" in str(refused.value)


def test_a_config_in_the_local_hub_cache_is_taken(make_checkpoint, tmp_path, monkeypatch):
    """The real layout of the cache, read by huggingface_hub itself."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--tiny-thing" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_bytes((make_checkpoint("llama") / "config.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = resolve_for_plan("someone/tiny-thing")
    assert spec.config.hidden_size == 64
    assert "local cache" in spec.notes[0]


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    assert not names.hub_is_near()
    assert "could not be reached" in refused("no-such-owner/no-such-model")
