"""Settings and real things that every test shares: a trained tokenizer, real text, checkpoints made by transformers."""

import json
import os
import sysconfig
import time
from pathlib import Path

import pytest
import torch

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of processes too: two threads that wait for each other beside another test take ten times as long
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose kernels then run on the CPU

import peft  # noqa: F401 (what it logs when it is first imported, pytest keeps, with all that the frames there hold)

BEGAN = "OOMLESS_TESTS_BEGAN"
"""When the tests began, for all of their processes."""

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


def pytest_addoption(parser):
    parser.addoption(
        "--full-length", action="store_true", help="run tests of chance as long as bench/full_length.py does"
    )
    parser.addoption(
        "--slow-minutes", type=float, help="begin no slow test after so many minutes: those that are left are skipped"
    )


def pytest_configure(config):
    """What is kept between runs is kept between runs of the tests as well, and apart from the user's own."""
    os.environ.setdefault(BEGAN, str(time.time()))
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("user-cache"))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full-length"):
        longest = [item for item in items if item.get_closest_marker("full_length")]
        config.hook.pytest_deselected(items=longest)
        items[:] = [item for item in items if item not in set(longest)]
    items.sort(key=_place)


def _place(item):
    """Slow tests come after the others; of each, what takes longest begins first, so that no process waits for it at the end."""
    marker = item.get_closest_marker("timeout")
    return item.get_closest_marker("slow") is not None, -marker.args[0] if marker is not None else 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    minutes = item.config.getoption("--slow-minutes")
    if minutes is None or item.get_closest_marker("slow") is None:
        return
    if time.time() - float(os.environ[BEGAN]) > minutes * 60:
        pytest.skip(f"slow tests are begun within {minutes:g} minutes")


@pytest.fixture
def full_length(request) -> bool:
    """Whether a test of chance should run as long as the claims in the documentation say, which takes minutes."""
    return request.config.getoption("--full-length")


@pytest.fixture(autouse=True)
def _one_thread():
    """What tests compute is too small for more, and two threads that wait for each other on a busy machine are many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty documents of very different lengths from the standard library."""
    paths = sorted(STANDARD_LIBRARY.glob("*.py"))[:60]
    return [path.read_text(encoding="utf-8")[: 200 + 97 * number] for number, path in enumerate(paths)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, texts) -> Path:
    """A byte-level BPE tokenizer of 512 tokens, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    """The texts as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "library.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


ARCHITECTURES = {
    "llama": dict(model_type="llama"),
    "gemma": dict(model_type="gemma", head_dim=16, hidden_activation="gelu_pytorch_tanh"),
    "gemma4": dict(
        **dict(
            model_type="gemma4_text",
            head_dim=16,
            global_head_dim=32,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
        ),
        **dict(layer_types=["sliding_attention", "full_attention"], sliding_window=32, hidden_size_per_layer_input=0),
    ),
    "gemma2": dict(model_type="gemma2", head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "gpt2": dict(model_type="gpt2", n_layer=2, n_head=4, n_positions=512),
    "deepseek_v2": dict(
        model_type="deepseek_v2",
        **dict(num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8),
        **dict(v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1),
        **dict(first_k_dense_replace=1, n_group=1, topk_group=1),
    ),
    "bert": dict(model_type="bert", is_decoder=True),
    "gpt_neox": dict(model_type="gpt_neox"),
    "jetmoe": dict(model_type="jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=16),
    "longcat_flash": dict(
        model_type="longcat_flash",
        **dict(num_hidden_layers=4, n_routed_experts=4, zero_expert_num=2, moe_topk=3, expert_ffn_hidden_size=32),
        **dict(ffn_hidden_size=96, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16),
        **dict(v_head_dim=16, head_dim=16, num_key_value_heads=4),
    ),
    "mamba": dict(model_type="mamba", state_size=8, time_step_rank=4, expand=2),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "llama4_text": dict(
        model_type="llama4_text",
        **dict(num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=1),
        **dict(intermediate_size_mlp=48, head_dim=16),
    ),
}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tokenizer_folder):
    """A function that makes a tiny model of an architecture with transformers, saves it, and returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    made: dict[tuple, Path] = {}

    def make(architecture: str = "llama", *, tied: bool = False, dtype: torch.dtype = torch.float32, **changes) -> Path:
        key = (architecture, tied, dtype, str(sorted(changes.items())))
        if key not in made:
            settings = dict(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=tied,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=None,
            )
            config = AutoConfig.for_model(**{**settings, **ARCHITECTURES[architecture], **changes})
            torch.manual_seed(1)
            folder = tmp_path_factory.mktemp(f"{architecture}-{'tied' if tied else 'untied'}")
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def gpt_oss_checkpoint(make_checkpoint, tmp_path_factory):
    """A tiny gpt-oss as it is published, its experts in MXFP4."""
    from tests.gpt_oss import GPT_OSS, publish

    return publish(make_checkpoint("llama", **GPT_OSS), tmp_path_factory.mktemp("gpt-oss") / "published")
