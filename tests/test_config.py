"""What a user may say, and what each wrong thing is answered."""

import re
from pathlib import Path

import pytest
import yaml

import oomless
from oomless.config import DataSource, TrainConfig, outrank
from oomless.config.values import field_help, load_yaml
from oomless.errors import ConfigError

LEAST = {"model": "m", "data": "text", "output_dir": "out"}


def make(**settings):
    return TrainConfig.from_mapping({**LEAST, **settings})


def test_resolved_yaml_reproduces_the_config():
    config = make(
        data=[{"path": "a", "weight": 1}, {"path": "b", "weight": 2, "text_field": "body"}],
        trainable="lora+lm_head",
        learning_rate="3e-4",
        tied_weights="untied",
    )
    assert config.learning_rate == 3e-4
    assert config.lora_r == 16
    assert config.data[1] == DataSource(path="b", weight=2.0, text_field="body")
    assert TrainConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


def test_every_setting_has_help():
    helps = field_help(TrainConfig)
    assert set(helps) == set(TrainConfig.__dataclass_fields__)
    assert all(text.endswith((".", "]")) for text in helps.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "Did you mean 'learning_rate'?"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'?"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'?"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0; got 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number; got 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"max_seq_length": 0}, "max_seq_length must be at least 2; got 0"),
        ({"max_seq_length": 1.5}, "max_seq_length must be a whole number; got 1.5"),
        ({"shuffle": "yes"}, "shuffle must be true or false"),
        ({"model": None}, "model must be given"),
        ({"data": []}, "data is empty"),
        ({"report_to": "tensorbord"}, "got 'tensorbord'. Did you mean 'tensorboard'?"),
        ({"report_to": "wandb,wandb"}, "one or several, each once, joined by commas; got 'wandb,wandb'"),
        ({"replay": 0.1}, "replay: 0.1 of the training tokens are to be old text: name it as replay_data"),
        ({"replay": 0, "replay_data": "old"}, "replay must be a number above 0 and below 1; got 0"),
        ({"replay": 1, "replay_data": "old"}, "replay must be a number above 0 and below 1; got 1"),
        ({"replay_data": [{"path": "a", "weight": 1}, "b"]}, "all sources of replay_data or to none; b has none"),
        ({"general_data": {"path": "a", "weight": 1}}, "a weight has no effect in general_data"),
        ({"data": {"path": "x", "wieght": 1}}, "Did you mean 'weight'?"),
        ({"data": [3]}, "a path or a mapping with a path"),
        ({"data": {"path": "x", "weight": 0}}, "weight of a source of text must be a number above 0"),
        ({"max_steps": 3, "max_tokens": 5}, "max_steps and max_tokens: keep one"),
        ({"lora_r": 8}, "lora_r belongs to LoRA"),
        ({"momentum": 0.5}, "momentum belongs to the optimizers sgd, muon"),
        ({"optimizer": "sgd", "adam_beta1": 0.5}, "adam_beta1 belongs to the optimizers adamw"),
        ({"trainable": "full+lm_head"}, "full already trains everything"),
        ({"trainable": "lm_head+"}, "parts joined by +"),
        ({"eval_data": "e", "eval_fraction": 0.1}, "eval_data or eval_fraction, not both"),
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "cannot clip by the global norm"),
        ({"warmup_ratio": 1}, "warmup_ratio must be at least 0 and below 1"),
    ],
)
def test_one_clear_error(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(**settings)


def test_clipping_is_off_where_updates_run_in_backward():
    assert make().max_grad_norm == 1.0
    assert make(optimizer_in_backward=True).max_grad_norm == 0.0
    assert make(optimizer_in_backward=True, max_grad_norm=0).max_grad_norm == 0.0


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"data": "text"}, {"data": (DataSource(path="text"),)}),
        ({"data": Path("text"), "output_dir": Path("out")}, {"data": (DataSource(path="text"),), "output_dir": "out"}),
        (
            {"data": [{"path": Path("b"), "weight": "2"}]},
            {"data": (DataSource(path="b", weight=2),)},
        ),
        ({"output_dir": 2024, "trainable_rows": 5}, {"output_dir": "2024", "trainable_rows": "5"}),
        ({"max_grad_norm": "0.5", "max_steps": "3"}, {"max_grad_norm": 0.5, "max_steps": 3}),
        ({"max_grad_norm": "inf"}, {"max_grad_norm": float("inf")}),
        ({"max_grad_norm": "0.0"}, {"max_grad_norm": 0.0}),
        ({"weight_decay": 5, "max_seq_length": 64.0}, {"weight_decay": 5.0, "max_seq_length": 64}),
        ({"shuffle": None, "quantization": None}, {"shuffle": True, "quantization": None}),
    ],
)
def test_a_value_is_read_as_its_field_says_wherever_it_comes_from(given, read):
    for config in (make(**given), TrainConfig(**{**LEAST, **given})):
        found = {name: getattr(config, name) for name in read}
        assert found == read
        assert {name: type(value) for name, value in found.items()} == {n: type(value) for n, value in read.items()}
        assert TrainConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0}, {"shuffle": "yes"}, {"model": None}, {"data": []}, {"data": 3}, {"max_steps": True}]
    + [
        {"output_dir": 1.5},
        {"lora_r": "8.5", "trainable": "lora"},
        {"weight_decay": float("inf")},
        {"dtype": ["bf16"]},
    ],
)
def test_python_is_told_what_the_command_line_is_told(wrong):
    with pytest.raises(ConfigError) as from_mapping:
        make(**wrong)
    with pytest.raises(ConfigError) as direct:
        TrainConfig(**{**LEAST, **wrong})
    assert str(direct.value) == str(from_mapping.value)


@pytest.mark.parametrize("wrong", ["run.yaml", Path("run.yaml"), None, {"model": "m"}, 3])
def test_what_is_no_config_at_all_is_said_in_one_line(wrong):
    with pytest.raises(ConfigError, match="config must be a TrainConfig; got .*: make one"):
        oomless.train(wrong)
    if not isinstance(wrong, dict):
        for call in (TrainConfig.from_mapping, oomless.choose_training):
            with pytest.raises(ConfigError, match="must be a Mapping; got .* such as"):
                call(wrong)


STEP = {
    "max_seq_length": 64,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "tokens_per_step": 2048,
}
"""As a plan writes it."""


def step(**changes):
    return {name: value for name, value in {**STEP, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("file", "options", "left"),
    [
        ({"max_steps": 3, "seed": 1}, {"seed": 2}, {"max_steps": 3, "seed": 2}),
        ({"num_train_epochs": 1.0}, {"max_steps": 3}, {"max_steps": 3}),
        ({"eval_fraction": 0.01}, {"eval_data": "e"}, {"eval_data": "e"}),
        ({"trainable": "lora", "lora_r": 8}, {"trainable": "full"}, {"trainable": "full"}),
        ({"optimizer_in_backward": True}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
        ({"gradient_accumulation_steps": 3}, {"tokens_per_step": 2048}, {"tokens_per_step": 2048}),
        # Of what makes a step what follows from the others gives way, and then what does not go into them.
        (
            STEP,
            {"per_device_train_batch_size": 1},
            step(per_device_train_batch_size=1, gradient_accumulation_steps=None),
        ),
        (STEP, {"max_seq_length": 32}, step(max_seq_length=32, gradient_accumulation_steps=None)),
        (STEP, {"max_seq_length": 48}, step(max_seq_length=48, tokens_per_step=None)),
        (
            STEP,
            {"tokens_per_step": 64},
            step(tokens_per_step=64, per_device_train_batch_size=None, gradient_accumulation_steps=None),
        ),
        (STEP, {"gradient_accumulation_steps": 3}, step(gradient_accumulation_steps=3, tokens_per_step=None)),
        (STEP, {"sample_prompts": ["a"], "sample_tokens": 64}, step(sample_prompts=["a"], sample_tokens=64)),
        # One contradiction hides no other, and one within the file or the options stays.
        ({"num_train_epochs": 1}, {"lora_r": 8, "max_steps": 3}, {"lora_r": 8, "max_steps": 3}),
        ({"max_steps": 1, "max_tokens": 5}, {"seed": 2}, {"max_steps": 1, "max_tokens": 5, "seed": 2}),
    ],
)
def test_options_outrank_the_file_and_what_contradicts_them_in_it(file, options, left):
    both, gives_way = outrank(file, options)
    assert both == left
    assert set(gives_way) == set(file) - set(left)


def test_a_setting_given_twice_is_an_error(tmp_path):
    (tmp_path / "run.yaml").write_text("model: a\nseed: 1\ndata:\n- {path: x, path: y}\n")
    with pytest.raises(ConfigError, match="gives path twice, in lines 4 and 4"):
        load_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("model: a\nseed: 1\nmodel: b\n")
    with pytest.raises(ConfigError, match="gives model twice, in lines 1 and 3: keep one"):
        load_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "must be a mapping")])
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "other.yaml")
