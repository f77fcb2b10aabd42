"""What each setting may be and may not be, made from its own declaration, and what else it has no effect without."""

import itertools
import random
import typing

from oomless.config import LORA_DEFAULTS, OPTIMIZER_DEFAULTS, TrainConfig, outrank, read
from oomless.config.values import Range, kinds, plain_kind
from oomless.errors import ConfigError
from oomless.planning.strategies import require_any

KINDS = kinds(TrainConfig)
LENGTH = 32
GIVEN = {"model", "data", "output_dir", "gpu", "max_steps", "resume"}
"""What every run of these tests is given."""

OF_CHATS = {"chat_template", "loss_on"}
"""What has no effect on the text of these tests; ``tests/data`` has chats."""

OF_SEVERAL_GPUS = {"sharding"}
"""What means nothing on the one GPU of these tests; ``tests/training/test_several_gpus.py`` has two."""

CHOSEN = {
    "tokenizer": ["{model}", "{tokenizer}", "{copy}"],
    "trust_remote_code": [True, False],
    "eval_data": ["{corpus}", "{corpus},name=held out", "{folder}"],
    "general_data": ["builtin", "builtin,name=many languages", "{corpus},name=general"],
    "replay_data": ["{corpus},name=old", "{folder}", "{corpus},name=2024"],
    "text_field": ["text", "body", "ä [x]"],
    "encoding": ["utf-8", "latin-1", "utf-8-sig"],
    "eval_fraction": [0, 0.1, 0.5],
    "max_seq_length": [16, LENGTH, 48],
    "cache_dir": ["{out}/2024", "{out}/ä [x]", "{out}/a/b"],
    "trainable": ["full", "lm_head", "lora", "lora+embed_tokens+lm_head", "model.layers.1.*"],
    "tied_weights": ["shared", "untied"],
    "trainable_rows": ["5", "5,10-20", "0-3,500"],
    "lora_r": [1, 4, 16],
    "lora_alpha": [0.5, 16, 32.0],
    "lora_target_modules": ["all-linear", "q_proj", "q_proj,v_proj", r".*\.0\..*_proj"],
    "per_device_train_batch_size": [1, 2, 3],
    "tokens_per_step": [LENGTH, 2 * LENGTH, 4 * LENGTH],
    "num_train_epochs": [0.001, 0.01, 0.02],
    "max_tokens": [1, LENGTH, 70],
    "optimizer": list(OPTIMIZER_DEFAULTS),
    "learning_rate": [1e-5, 1e-3, 0.1],
    "embedding_learning_rate": [1e-5, 1e-3, 0.1],
    "loss_chunk_bytes": [1 << 16, 1 << 20, 64 << 20],
    "mlp_tiles": [2, 3, 100],
    "checkpointed_layers": [1, 2, 3],
    "max_grad_norm": [0.0, 0.5, 5, float("inf")],
    "seed": [0, 7, 1 << 40],
    "sample_prompts": ["a", "def f(", "天\n\n{{}}"],
    "report_to": ["none", "tensorboard", " tensorboard "],
    "save_steps": [1, 2, 100],
    "host_reserve_bytes": [0, 1, 1 << 20],
    "preemption_grace_s": [0.5, 5, 30],
    "bad_loss_factor": [1.5, 10, 1e6],
}
WRONG = {
    "text_field": ["nothing", "", "Text"],
    "encoding": ["utf-9", "", "base64"],
    "sample_prompts": ["", " \n", "\t"],
    "tokenizer": ["/nowhere", "{corpus}", ""],
    "eval_data": ["/nowhere", "", "{out}/*.none"],
    "report_to": ["", "tensorbord", "tensorboard,tensorboard", "none,tensorboard"],
    "general_data": ["/nowhere", "", "{out}/*.none"],
    "replay_data": ["/nowhere", "", "{out}/*.none"],
    "cache_dir": ["{corpus}/below", "/proc/below", ""],
    "trainable": ["", "lora+", "full+lora", "layers.99", "lm_hed"],
    "trainable_rows": ["x", "20-10", "5,,6", "99999", "-1"],
    "lora_target_modules": ["nothing", "", "q_prj", "q_proj("],
    "optimizer": ["adam", "", "AdamW"],
    "max_seq_length": ["1", "1.5", "100000", "x"],
}
NEEDS = {
    "trainable_rows": {"trainable": "embed_tokens+lm_head"},
    "tied_weights": {"trainable": "lm_head"},
    "quantization": {"trainable": "lora"},
    "stream_frozen": {"trainable": "lora"},
    "checkpointed_layers": {"gradient_checkpointing": True},
    "offload_activations": {"gradient_checkpointing": True},
    "momentum": {"optimizer": "sgd"},
    "allow_leaner_optimizer": {"optimizer": "adamw"},
    "embedding_learning_rate": {"trainable": "embed_tokens+lm_head"},
    "experts_on_host": {"trainable": "lora"},
    "embeddings_on_host": {"trainable": "lora"},
    "sample_tokens": {"sample_prompts": "import"},
    "replay": {"replay_data": "{corpus},name=old"},
    **{n: {"eval_steps": 1, "eval_fraction": 0.1} for n in ("load_best_model_at_end", "early_stopping_patience")},
    **{name: {"trainable": "lora"} for name in LORA_DEFAULTS},
}


OFF_ALONE = {
    "stream_frozen",
    "offload_activations",
    "experts_on_host",
    "embeddings_on_host",
    "allow_leaner_optimizer",
    "load_best_model_at_end",
}
"""Switches that may be off in any run."""

OF_EXPERTS = {"router_aux_loss_coef", "experts_on_host"}
"""What has no effect on a model without them."""


def valid(name):
    """At least two values that the setting may be: two of a switch, every choice, three of a number or a text."""
    if name in CHOSEN:
        return CHOSEN[name]
    kind = plain_kind(KINDS[name])
    if is_switch(name):
        return [True, False]
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    assert kind in (int, float), f"{name} is text: say in CHOSEN and WRONG what it may be and may not be"
    limits = range_of(name)
    if kind is int:
        return [int(limits.least), int(limits.least) + 1, int(limits.least) + 6]
    low = limits.least if limits.least is not None else limits.above + 1e-5
    return [low, 0.5, 0.875 if limits.below <= 1 else 3]


def is_switch(name):
    return plain_kind(KINDS[name]) is bool


def least_valid(name):
    """How many values ``valid`` has at least: both of a switch, every choice, three of all else."""
    kind = plain_kind(KINDS[name])
    if is_switch(name):
        return 2
    return len(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else 3


def invalid(name):
    """Three values at least that the setting may not be, from its declaration: texts, or for a switch what a YAML may hold."""
    if name in WRONG:
        return WRONG[name]
    kind = plain_kind(KINDS[name])
    if is_switch(name):
        return ["maybe", 2, [True]]
    if typing.get_origin(kind) is typing.Literal:
        return ["", "nonsense", "0"]
    limits = range_of(name)
    edge = [limits.least - 1 if limits.least is not None else limits.above, limits.below]
    wrong = ["x", "", "nan", "1e999" if kind is int else "-1"]
    return [*wrong, *(str(kind(number)) for number in edge if number < float("inf"))]


def range_of(name):
    return next(extra for extra in KINDS[name].__metadata__ if isinstance(extra, Range))


def needs(name, value):
    """What else has to be set for ``value`` to have an effect."""
    if value is False and name in OFF_ALONE:
        return {}
    if name == "on_bad_loss" and value == "rewind":
        return {"save_steps": 1}
    return NEEDS.get(name, {})


def names():
    return [name for name in KINDS if name not in GIVEN | OF_CHATS | OF_SEVERAL_GPUS]


def combinations(seed=0, settings=40):
    """Yield runs of so many settings that go together, pairs that were not together yet before others."""
    draw = random.Random(seed)
    every = [(name, number) for name in names() for number in range(len(valid(name)))]
    apart = {frozenset((a, b)) for a in every for b in every if a[0] < b[0]}
    while True:
        chosen, run = [], {"max_seq_length": LENGTH}
        order = draw.sample(every, len(every))
        # What has met the fewest others comes first.
        order.sort(key=lambda one: -sum(frozenset((one, other)) in apart for other in chosen))
        for one in order:
            name, value = one[0], valid(one[0])[one[1]]
            if len(chosen) == settings:
                break
            extra = {**needs(name, value), name: value}
            if name in run and run[name] != value and name != "max_seq_length":
                continue
            if any(run.get(key, wanted) != wanted for key, wanted in extra.items() if key != name):
                continue
            if chosen and not any(frozenset((one, other)) in apart for other in chosen) and draw.random() < 0.9:
                continue
            if agree({**run, **extra}):
                chosen.append(one)
                run |= extra
        apart -= {frozenset((a, b)) for a in chosen for b in chosen if a != b}
        yield run


DRAWN, DRAWING = [], combinations()


def combination(number):
    """The run of that number; each is drawn once, since it rests on all before it."""
    DRAWN.extend(itertools.islice(DRAWING, max(0, number + 1 - len(DRAWN))))
    return DRAWN[number]


def agree(run):
    """Whether the settings of ``run`` say nothing against each other."""
    try:
        TrainConfig.from_mapping({"model": "-", "data": "-", "output_dir": "-", "max_steps": 2, **length_of(run)})
        require_any(read(length_of(run)))
    except ConfigError:
        return False
    return True


def length_of(run):
    """``run`` with its own length in the place of the tests'."""
    return outrank({"max_steps": 2}, run)[0]
