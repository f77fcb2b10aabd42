"""What a user may say, and what each wrong thing is answered."""

import re

import pytest
import yaml

from oomless.config import DataSource, TrainConfig
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


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "must be a mapping")])
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_yaml(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "other.yaml")
