"""The search against all that it might have found, and its picks against the real thing."""

import itertools
import random
import time

import pytest
import torch

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve
from oomless.planning.choose import choose_training, picked_settings
from oomless.planning.plan import Target
from oomless.planning.rehearse import play
from oomless.planning.search import _Search, is_tied, search
from oomless.planning.strategies import (
    PREFERENCES,
    any_run,
    micro_batches,
    parts_in_order,
    placements,
    qualities,
    require_any,
)
from oomless.planning.trial import Laboratory, Setting, try_out
from oomless.planning.wish import Wish
from oomless.training.assemble import assemble

MiB = 1 << 20
SHAPE = {"hidden_size": 128, "intermediate_size": 384}
OFFLOADABLE = {"hidden_size": 256, "intermediate_size": 768}


def target_of(capacity_bytes, host_bytes=None):
    return Target(
        name=f"{capacity_bytes} bytes",
        capacity_bytes=capacity_bytes,
        outside_bytes=0,
        workspace_bytes=0,
        compute_capability=(8, 0),
        kernel="auto",
        host_bytes=host_bytes,
    )


def given_for(folder, **pins):
    return {
        "model": str(folder),
        "data": "-",
        "output_dir": "-",
        "max_seq_length": 64,
        "packing": "concatenate",
        **pins,
    }


def best_of_all(setting):
    """Return the best of every strategy there is, each rehearsed: its quality and its speed, or ``None`` where none fits."""
    pins, spec = setting.base, setting.spec
    laboratory = Laboratory(setting, 1, None)
    judge = _Search(setting, laboratory, lambda *_: None)
    for parts in parts_in_order(pins, tied=is_tied(spec)):
        built = laboratory.parts(any_run(pins, parts))
        if built.refused is not None:
            continue
        for quality in qualities(pins, parts, sixteen_bit=built.sixteen_bit):
            ways = itertools.product(placements(quality, pins), micro_batches(pins), built.rungs(pins))
            every = [quality.settings() | placement | size | rung for placement, size, rung in ways]
            trials = zip(every, laboratory.trials(every), strict=True)
            fitting = [judge._found(settings, trial) for settings, trial in trials if judge._fits(trial)]
            for found in sorted(fitting, key=lambda found: found.seconds):
                if laboratory.proof(found.settings)().fits:
                    return quality, found.seconds, judge
    return None


def some(cases, by_default, slow):
    """Mark ``cases``: those numbered ``by_default`` always run, those below ``slow`` in CI, the others at full length."""
    marked = []
    for number, case in enumerate(cases):
        marks = () if number in by_default else pytest.mark.slow if number < slow else pytest.mark.full_length
        marked.append(pytest.param(*case.values, id=case.id, marks=marks))
    return marked


WITHOUT_TILES = {"gradient_checkpointing": False}
PINS = [
    {"trainable": "full", "optimizer": "adamw_8bit", "weight_precision": "correction"},
    {"trainable": "full", "optimizer": "apollo", **WITHOUT_TILES},
    {"trainable": "full", "optimizer": "adafactor", "max_grad_norm": 1.0},
    {
        "trainable": "full",
        "optimizer": "adamw",
        "weight_precision": "stochastic",
        "tokens_per_step": 128,
        **WITHOUT_TILES,
    },
    {
        "trainable": "lora+embed_tokens+lm_head",
        "quantization": None,
        "optimizer": "adamw_8bit",
        "weight_precision": "master",
    },
    {"trainable": "lm_head", "optimizer": "adamw_8bit", "weight_precision": "master", **WITHOUT_TILES},
    {"trainable": "full", "dtype": "fp32", "max_grad_norm": 1.0, "gradient_checkpointing": True},
]


def cases():
    """(architecture, tied, pins, capacity) from a seed."""
    draw = random.Random(0)
    for number, architecture in enumerate(("gpt_neox", "mixtral")):
        yield pytest.param(architecture, False, PINS[0], (8 + 4 * number) * MiB, id=f"rungs-{architecture}")
    for number in range(52):
        architecture, tied = draw.choice(["llama", "gemma", "qwen2"]), draw.random() < 0.5
        pins = PINS[number % len(PINS)]
        yield pytest.param(architecture, tied, pins, draw.randrange(3, 12) * 2 * MiB, id=f"{number}-{architecture}")


@pytest.mark.parametrize(
    ("architecture", "tied", "pins", "capacity_bytes"),
    some(cases(), by_default=(0, 2, 4, 7), slow=10),
)
def test_the_pick_is_the_best_of_all(make_checkpoint, architecture, tied, pins, capacity_bytes):
    folder = make_checkpoint(architecture, tied=tied, **SHAPE)
    spec, target = resolve(str(folder)), target_of(capacity_bytes)
    given = given_for(folder, **pins)
    found = search(spec, given, target, processes=1)
    best = best_of_all(Setting(spec=spec, target=target, base=given))
    if best is None:
        assert found.picked is None
        return
    quality, seconds, judge = best
    assert found.picked is not None
    assert found.picked.quality == quality
    chosen = judge.laboratory.trials([found.picked.settings])[0]
    assert judge._found(found.picked.settings, chosen).seconds == seconds


def test_progress_is_told_in_order(make_checkpoint):
    folder = make_checkpoint("llama", tied=True, **SHAPE)
    told = []
    found = search(
        resolve(str(folder)),
        given_for(folder, trainable="full"),
        target_of(16 * MiB),
        processes=1,
        progress=lambda *now: told.append(now),
    )
    names, shares = zip(*told, strict=True)
    tried = [name for name in names if not name.startswith(("building", "proving"))]
    assert tried == [str(row.quality) for row in found.rows]
    assert shares[0] == 0
    assert list(shares) == sorted(shares)
    assert 0 <= shares[-2] < 1 == shares[-1]


def test_what_is_preferred_is_the_best_of_what_is_compared(make_checkpoint):
    """Each preference's answer is the best row there is, and what commonly is run is among them."""
    folder = make_checkpoint("llama", tied=True, **SHAPE)
    spec, given, target = resolve(str(folder)), given_for(folder, tokens_per_step=128), target_of(14 * MiB)
    picks = {}
    for prefer in PREFERENCES:
        found = search(spec, given, target, processes=1, wish=Wish(prefer=prefer))
        fitting = [row for row in found.rows if row.fits]
        picks[prefer] = found.picked.quality
        assert found.picked.quality == found.wish.choices(fitting)[prefer].quality
        assert found.named[prefer].picked
        assert {("full", None), ("lora", None), ("lora", "nf4")} <= {
            (row.quality.trainable, row.quality.quantization) for row in found.rows
        }
    assert (
        picks["quality"] == search(spec, given, target, processes=1).picked.quality
    )  # the first that fits gives up least
    assert len({row.quality for row in found.rows}) == len(found.rows)


def test_how_small_updates_are_kept_is_compared_where_the_first_that_fits_spends_time(make_checkpoint):
    """8 bits of correction teach as fp32 masters do: where these fit by computing again, and those without, those are picked."""
    folder = make_checkpoint("llama", tied=True, dtype=torch.float16, **OFFLOADABLE)
    pins = {"trainable": "full", "optimizer": "adamw", "max_grad_norm": 1.0, "offload_optimizer": False}
    given = given_for(folder, **pins, max_seq_length=256, per_device_train_batch_size=1, tokens_per_step=512)
    masters, correction = search(
        resolve(str(folder)), given, target_of(31 * MiB), processes=1, wish=Wish(prefer="quality")
    ).rows
    assert (masters.fits, masters.saves_by_time, masters.named) == (True, True, ())
    assert (correction.quality.weight_precision, correction.named) == ("correction", PREFERENCES)
    assert correction.seconds < masters.seconds


def test_ctrl_c_takes_the_best_so_far(make_checkpoint):
    folder = make_checkpoint("llama", tied=True, **SHAPE)
    told = []

    def interrupt(text, share):
        told.append(text)
        if "so far" in text:
            raise KeyboardInterrupt

    how = {"processes": 1, "wish": Wish(), "progress": interrupt}
    found = search(resolve(str(folder)), given_for(folder), target_of(1 << 30), **how)
    assert found.stopped
    assert any("so far lora, 4-bit" in text for text in told)
    assert (found.picked.quality.trainable, found.picked.quality.quantization) == ("lora", "nf4")
    assert found.plan.fits

    def at_once(text, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(resolve(str(folder)), given_for(folder), target_of(1 << 30), processes=1, wish=Wish(), progress=at_once)


def train_for_real(setting, settings, capacity_bytes):
    """Two steps, an evaluation and a save with real tensors inside a GPU of that size."""
    device = VirtualGPU(capacity_bytes)
    config = setting.config(settings)
    with device.active():
        parts = assemble(setting.spec, config, device, fill=True)
        play(parts, config)
    return device.usage()


def plans():
    draw = random.Random(1)
    for number in range(24):
        architecture, tied = draw.choice(["llama", "gemma", "qwen2", "qwen3"]), draw.random() < 0.5
        pins = draw.choice([{}, {"optimizer": "adamw"}, {"tokens_per_step": 128}, {"trainable": "full"}])
        yield pytest.param(architecture, tied, pins, draw.randrange(4, 16) * 2 * MiB, id=f"{number}-{architecture}")


@pytest.mark.parametrize(
    ("architecture", "tied", "pins", "capacity_bytes"),
    some(plans(), by_default=range(3), slow=10),
)
def test_the_pick_trains_and_the_next_better_runs_out(make_checkpoint, architecture, tied, pins, capacity_bytes):
    folder = make_checkpoint(architecture, tied=tied, **SHAPE)
    spec, target = resolve(str(folder)), target_of(capacity_bytes)
    setting = Setting(spec=spec, target=target, base=given_for(folder, **pins))
    found = search(spec, setting.base, target, processes=1)
    if found.picked is not None:
        usage = train_for_real(setting, found.picked.settings, capacity_bytes)
        assert usage.peak_reserved_bytes <= capacity_bytes
    rejected = [row.quality for row in found.rows if not row.fits]
    if rejected:
        laboratory = Laboratory(setting, 1, None)
        better = rejected[-1]
        built = laboratory.parts(
            any_run(
                setting.base, {name: getattr(better, name) for name in ("trainable", "tied_weights", "quantization")}
            )
        )
        leanest = built.rungs(setting.base)[-1]
        for placement in placements(better, setting.base):
            settings = better.settings() | placement | micro_batches({"max_seq_length": 64, **pins})[0] | leanest
            with pytest.raises(torch.OutOfMemoryError):
                train_for_real(setting, settings, capacity_bytes)
    assert found.picked is not None or rejected


def test_pins_are_kept_and_contradictions_named(make_checkpoint):
    folder = make_checkpoint("llama", tied=True)
    spec, target = resolve(str(folder)), target_of(1 << 30)
    pins = {"trainable": "lm_head", "tied_weights": "untied", "optimizer": "sgd", "per_device_train_batch_size": 2}
    found = search(spec, given_for(folder, **pins), target, processes=1)
    assert found.config is not None
    assert {name: getattr(found.config, name) for name in pins} == pins
    for wrong, message in (
        ({"trainable": "lm_hed"}, "Did you mean"),
        ({"trainable": "full", "quantization": "nf4"}, "freezes none"),
        ({"max_seq_length": 4096}, "max_position_embeddings"),
        ({"optimiser": "adamw"}, "unknown setting"),
        ({"optimizer": "adam"}, "must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(spec, given_for(folder, **wrong), target, processes=1)


NARROWED = [
    ({"lora_r": 8}, {"lora_r": 8}),
    ({"quantization": "nf4"}, {"quantization": "nf4"}),
    ({"stream_frozen": True}, {"stream_frozen": True}),
    ({"checkpointed_layers": 1}, {"checkpointed_layers": 1, "gradient_checkpointing": True}),
    ({"offload_activations": True}, {"offload_activations": True, "gradient_checkpointing": True}),
    ({"cheap_recompute": False, "gradient_checkpointing": True}, {"cheap_recompute": False}),
    ({"use_dora": True}, {"use_dora": True, "quantization": None}),
    ({"adam_beta1": 0.8}, {"adam_beta1": 0.8, "optimizer": "adamw"}),
    ({"on_bad_loss": "skip"}, {"optimizer_in_backward": False}),
    ({"optimizer": "muon", "trainable": "full"}, {"momentum": 0.95}),
    ({"trainable_rows": "5,10-20", "trainable": "lm_head"}, {"trainable_rows": "5,10-20"}),
]


@pytest.mark.parametrize(("pins", "picked"), NARROWED, ids=lambda value: "-".join(value))
def test_a_setting_of_one_choice_narrows_the_search_to_it(make_checkpoint, pins, picked):
    folder = make_checkpoint("llama", num_hidden_layers=3)
    found = search(resolve(str(folder)), given_for(folder, **pins), target_of(1 << 30), processes=1)
    assert {name: getattr(found.config, name) for name in picked} == picked
    given = picked_settings(found)
    assert set(given) - set(found.picked.settings) == {"model", "max_seq_length", "packing", *pins} - set(
        found.picked.settings
    )
    again = TrainConfig.from_mapping({**given, "data": "-", "output_dir": "-"})
    assert again == found.config


@pytest.mark.slow
def test_the_longest_sequence_gives_up_no_quality(make_checkpoint):
    """Frozen weights of few bits would leave room for a longer one."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 1024}
    folder = make_checkpoint("llama", dtype=torch.bfloat16, **shape)
    given = {
        "model": str(folder),
        "gpu": "virtual:19MiB",
        "packing": "concatenate",
        "dtype": "bf16",
        "max_grad_norm": 1.0,
    }
    given |= {"trainable": "lora", "lora_r": 1, "optimizer": "adamw", "gradient_checkpointing": True}
    given |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "loss_chunk_bytes": MiB}
    given |= dict.fromkeys(
        ("cheap_recompute", "offload_activations", "offload_optimizer", "stream_frozen", "embeddings_on_host"), False
    )

    def picked(length):
        return choose_training({**given, "max_seq_length": length}, host_bytes=MiB, keep_trials=False)

    short, longest = picked(256), picked("max")
    assert short.picked.quality.quantization is None
    assert longest.picked.quality == short.picked.quality
    longer = picked(longest.config.max_seq_length + 256)
    assert longer.picked.quality.quantization is not None


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"trainable": "full", "lora_r": 8}, "lora_r belongs to LoRA, and trainable is full: add --trainable lora"),
        ({"momentum": 0.5}, "momentum belongs to the optimizers sgd, muon"),
        ({"gradient_checkpointing": False, "offload_activations": True}, "no effect without gradient_checkpointing"),
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "cannot clip"),
        ({"lora_r": 8, "max_grad_norm": 1.0, "optimizer_in_backward": True}, "cannot clip"),
        ({"stream_frozen": True, "quantization": "int8"}, "stream_frozen cannot be joined with quantization"),
        ({"max_steps": 3, "max_tokens": 4}, "keep one"),
    ],
)
def test_what_no_strategy_agrees_with_is_named(pins, message):
    with pytest.raises(ConfigError, match=message):
        require_any(pins)


def test_what_does_not_fit_needs_something(make_checkpoint):
    """An optimizer of so little state has none to offload, which is not why the run does not fit."""
    pins = {"trainable": "lora", "optimizer": "adamw", "max_grad_norm": 1.0, "dtype": "fp32", "max_seq_length": 512}
    folder = make_checkpoint("llama")
    found = search(resolve(str(folder)), given_for(folder, **pins), target_of(2 << 20), processes=1)
    assert found.picked is None
    assert found.rows
    for row in found.rows:
        assert row.needed_bytes > 2 << 20
        assert "offload_optimizer" not in row.reason


def test_refusals_are_not_kept(make_checkpoint, tmp_path, monkeypatch):
    """What was refused for the want of a package is tried again when it is there."""
    from oomless.techniques import quantization

    folder = make_checkpoint("llama")
    spec, given = resolve(str(folder)), given_for(folder, quantization="nf4", trainable="lora", optimizer="adamw")

    def refuse(*_, **__):
        raise ConfigError("bitsandbytes is not there")

    with monkeypatch.context() as without:
        without.setattr(quantization, "replace", refuse)
        with pytest.raises(ConfigError, match="not there"):
            search(spec, given, target_of(1 << 30), processes=1, results=tmp_path)
    assert search(spec, given, target_of(1 << 30), processes=1, results=tmp_path).picked is not None


def test_trials_in_processes_are_those_in_this_one(make_checkpoint):
    folder = make_checkpoint("qwen2", tied=True, **SHAPE)
    spec, target = resolve(str(folder)), target_of(14 * MiB)
    alone, together = (search(spec, given_for(folder), target, processes=count, wish=Wish()) for count in (1, 2))
    assert alone.picked == together.picked
    assert [row.quality for row in alone.rows] == [row.quality for row in together.rows]


def test_offloading_stays_within_the_host(make_checkpoint):
    """The same GPU beside more host memory keeps a better optimizer."""
    folder = make_checkpoint("llama", tied=True, **OFFLOADABLE)
    spec = resolve(str(folder))
    pins = {"trainable": "full", "weight_precision": "master"}
    poor, rich = (
        search(spec, given_for(folder, **pins), target_of(16 * MiB, host), processes=1) for host in (MiB, 1 << 30)
    )
    assert rich.picked is not None
    assert rich.picked.settings.get("offload_optimizer")
    assert rich.picked.quality.optimizer == rich.rows[0].quality.optimizer == "adamw"
    assert poor.picked is None or poor.picked.quality.optimizer != "adamw"
    assert any(row.host_bytes > MiB for row in poor.rows)


@pytest.mark.parametrize(
    ("architecture", "kept", "left_out"),
    [
        ("gpt_neox", {"gradient_checkpointing": True}, {"cheap_recompute", "mlp_tiles"}),
        ("mixtral", {"offload_activations": True, "cheap_recompute": True}, {"mlp_tiles"}),
        ("llama", {"offload_activations": True, "cheap_recompute": True, "mlp_tiles": 8}, set()),
    ],
)
def test_a_model_without_the_parts_of_one_technique_has_the_others(make_checkpoint, architecture, kept, left_out):
    folder = make_checkpoint(architecture, num_hidden_layers=6)
    setting = Setting(spec=resolve(str(folder)), target=target_of(1 << 40), base=given_for(folder))
    built = Laboratory(setting, 1, None).parts({"trainable": "full", "optimizer": "adamw"})
    ladder = built.rungs(setting.base)
    assert kept.items() <= ladder[-1].items()
    assert not left_out & {name for rung in ladder for name in rung}
    chosen = {"trainable": "full", "optimizer": "adamw", "weight_precision": "stochastic"}
    needed = {}
    for number in (0, len(ladder) - 1):
        trial = try_out(setting, chosen | ladder[number])
        assert trial.refused is None
        needed[number] = trial.passes_bytes
    assert needed[len(ladder) - 1] < needed[0]


@pytest.mark.parametrize("way", [{}, {"offload_optimizer": True, "cheap_recompute": True}], ids=["plain", "lean"])
def test_a_trial_that_never_comes_to_its_limit_goes_as_without_one(make_checkpoint, way):
    folder = make_checkpoint("llama", **OFFLOADABLE)
    setting = Setting(spec=resolve(str(folder)), target=target_of(1 << 30), base=given_for(folder))
    chosen = {"trainable": "full", "optimizer": "adamw", "weight_precision": "stochastic", **way}
    assert try_out(setting, chosen).fits
    assert try_out(setting, chosen) == try_out(setting, chosen, limited=False)
    laboratory = Laboratory(setting, 1, None)
    assert laboratory.trials([chosen], limited=False) == laboratory.trials([chosen])
    assert laboratory.made == 1


def never_ends(setting, settings):
    settings["begun"].touch()
    time.sleep(100_000)


def test_dropped_trials_end_at_once(make_checkpoint, tmp_path):
    """And what is asked for afterwards gets other processes, as after Ctrl-C the proof of what was found so far."""
    folder = make_checkpoint("llama")
    setting = Setting(spec=resolve(str(folder)), target=target_of(1 << 30), base=given_for(folder))
    laboratory, begun = Laboratory(setting, 2, None), tmp_path / "begun"
    endless = laboratory._submit(never_ends, {"begun": begun})
    while not begun.exists():
        time.sleep(0.1)
    laboratory.drop()
    assert endless.done()
    assert laboratory.proof({"trainable": "full", "optimizer": "adamw", "weight_precision": "stochastic"})().fits
    laboratory.close()
