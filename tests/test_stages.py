"""What a user may say of stages, and what each wrong thing is answered."""

import pytest

from oomless.config import TrainConfig
from oomless.config.stages import after, check_form, goes_on, stages_of, together
from oomless.errors import ConfigError

AROUND = {"model": "m", "output_dir": "out", "max_steps": 5, "lora_r": 8, "trainable": "lora"}


def stages(*listed, **around):
    return stages_of({**AROUND, **around, "stages": list(listed)})


def test_a_stage_is_what_is_around_it_but_for_what_it_says():
    text, chat = stages(
        {"name": "text", "data": "a"}, {"data": "b", "num_train_epochs": 2, "trainable": "full", "loss_on": "all"}
    )
    assert text.settings == {**AROUND, "data": "a"}
    # What contradicts what a stage says gives way to it: the length around it, and LoRA's rank.
    assert chat.settings == {
        "model": "m",
        "output_dir": "out",
        "trainable": "full",
        "num_train_epochs": 2,
        "data": "b",
        "loss_on": "all",
    }
    assert [str(text), str(chat)] == ["stage 1 (text)", "stage 2"]
    assert [text.folder, chat.folder] == ["stage-1-text", "stage-2"]
    assert stages_of(AROUND) == ()


def test_what_is_stronger_outranks_every_stage():
    found = stages_of(
        {**AROUND, "stages": [{"data": "a", "num_train_epochs": 3}, {"data": "b"}]}, {"max_steps": 9, "data": ["c"]}
    )
    assert [(one.settings["max_steps"], one.settings["data"]) for one in found] == [(9, ["c"])] * 2
    assert "num_train_epochs" not in found[0].settings


def test_written_and_read_again_they_are_the_same():
    listed = stages(
        {"name": "text", "data": "a", "trainable": "lora"}, {"name": "chat", "data": "b", "trainable": "full"}
    )
    configs = [TrainConfig.from_mapping(stage.settings) for stage in listed]
    written = together([(stage, config.to_dict()) for stage, config in zip(listed, configs, strict=True)])
    assert written["model"] == "m"
    assert {"name", "data", "lora_r", "trainable"} <= set(written["stages"][0])
    again = stages_of(written)
    assert [TrainConfig.from_mapping(stage.settings) for stage in again] == configs


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "stages is a list of sets of settings, at least one; got []"),
        (None, "at least one; got None"),
        ({"name": "text"}, "stages is a list of sets of settings"),
        ("text", "got 'text'"),
        (["text"], "stage 1: a stage is a mapping of settings to values; got 'text'"),
        ([{"data": "a"}, None], "stage 2: a stage is a mapping"),
        ([{"data": "a"}, {"dta": "b"}], "stage 2: unknown setting 'dta'. Did you mean 'data'?"),
        ([{"name": "chat", "max_steps": 0}], "stage 1 (chat): max_steps must be at least 1; got 0"),
        ([{"name": "a"}, {"name": "A"}], "stages 1 and 2 are both called 'A': give each a name of its own"),
        ([{"name": "2"}, {}], "stages 1 and 2 are both called '2'"),
        ([{"name": "../out"}], "a stage's name is up to 50 letters"),
        ([{"name": "a/b"}], "got 'a/b'"),
        ([{"name": "x" * 51}], "up to 50 letters"),
        ([{"name": ["a"]}], "a stage's name is"),
        ([{"output_dir": "b"}], "stage 1: output_dir is one for all stages: say it outside of them"),
        ([{}, {"gpu": "cpu"}], "stage 2: gpu is one for all stages"),
        ([{}, {"model": "n"}], "model is one for all stages"),
        ([{}, {"resume": True}], "resume is one for all stages"),
        ([{"tokenizer": "t"}], "tokenizer is one for all stages"),
        ([{}, {"extend_tokenizer": 9}], "stage 2: extend_tokenizer belongs to the first stage"),
        ([{"stages": []}], "a stage has no stages of its own"),
        ([{"merge_lora": False}, {}], "stage 1: merge_lora is about the final model, so it belongs to the last stage"),
        ([{"data": {"path": "a", "wieght": 1}}], "stage 1: unknown setting 'wieght' in data. Did you mean 'weight'?"),
    ],
)
def test_wrong_stages_are_clear_errors(listed, message):
    with pytest.raises(ConfigError) as error:
        stages_of({**AROUND, "stages": listed})
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def config(**settings):
    return TrainConfig.from_mapping({"model": "m", "data": "a", "output_dir": "out", **settings})


def test_which_adapters_go_on():
    lora = config(trainable="lora+lm_head", lora_r=4)
    assert goes_on(lora, config(trainable="lm_head+lora", lora_r=4, quantization="nf4", merge_lora=False))
    for other in (
        dict(trainable="lora", lora_r=4),
        dict(trainable="lora+lm_head", lora_r=8),
        dict(trainable="lora+lm_head", lora_r=4, use_dora=True),
        dict(trainable="lora+lm_head", lora_r=4, tied_weights="untied"),
        dict(trainable="full"),
    ):
        assert not goes_on(lora, config(**other)), other
    pattern = config(trainable="lora+model.layers.1.*")
    assert not goes_on(pattern, pattern)  # an adapter says of whole modules only how their names end


def test_experts_stay_as_stored_while_one_adapter_trains():
    kept = dict(trainable="lora", quantization="mxfp4")
    check_form([config(**kept), config(trainable="lora"), config(**kept)])
    check_form([config(**kept), config(trainable="lm_head")])
    check_form([config(trainable="lm_head"), config(**kept | {"quantization": "nf4"})])
    for before in (dict(trainable="lm_head", quantization="mxfp4"), kept | {"lora_r": 8}):
        with pytest.raises(ConfigError, match="a stage before this one leaves a whole model in plain weights"):
            check_form([config(**before), config(**kept), config(**kept)])


def test_what_is_untied_stays_so():
    untied = [config(trainable="lm_head", tied_weights="untied")]
    assert "tied_weights" not in after(config(trainable="lm_head", tied_weights="untied").to_dict(), untied)
    with pytest.raises(ConfigError, match="an earlier stage unties"):
        after(config(trainable="lm_head", tied_weights="shared").to_dict(), untied)
    assert after({"tied_weights": "shared", "tokenizer": "t"}, []) == {"tied_weights": "shared", "tokenizer": "t"}
