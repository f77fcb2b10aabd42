"""Every setting through every command: no traceback, exit code 0, 1 or 2, and what was given is what is done."""

import functools
import json
import random
import re
import shutil

import pytest
import yaml

from oomless.config import read
from oomless.models import extension
from oomless.planning.given import LONGEST, read_given
from oomless.vocabulary.extend import FOLDER
from tests.settings import values
from tests.settings.commands import devices, flags, oomless

ROOMY = "virtual:64MiB"
LAYERS = 3
MESSAGE = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 14.56 GiB"
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def places(make_checkpoint, gpt_oss_checkpoint, corpus, tokenizer_folder, tmp_path):
    return {
        "make": functools.partial(make_checkpoint, num_hidden_layers=LAYERS),
        "model": make_checkpoint("llama"),
        "gpt-oss": gpt_oss_checkpoint,
        "corpus": with_more_fields(corpus, tmp_path / "library.jsonl"),
        "folder": corpus.parent,
        "tokenizer": tokenizer_folder,
        "copy": shutil.copytree(tokenizer_folder, tmp_path / "ä [x] 2024"),
        "out": tmp_path,
    }


def with_more_fields(corpus, target):
    """Write ``corpus`` to ``target`` with its text in other fields too."""
    texts = (json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines())
    lines = (json.dumps(dict.fromkeys(("text", "body", "ä [x]"), text)) for text in texts)
    target.write_text("\n".join(lines), encoding="utf-8")
    return target


def base(run, places, *, out=None):
    kind = "mixtral" if values.OF_EXPERTS & set(run) else "qwen2" if "bias" in run else "llama"
    larger = {"vocab_size": 2048} if run.get("offload_optimizer") else {}
    made = functools.partial(places["make"], kind, tied="tied_weights" in run, **larger)
    model = places["gpt-oss"] if run.get("quantization") == "mxfp4" else made()
    given = {"model": str(model), "data": str(places["corpus"]), "max_steps": 2, "max_seq_length": values.LENGTH, **run}
    given |= {} if out is None else {"output_dir": str(out)}
    evaluates = bool({"eval_data", "general_data"} & set(run)) or str(run.get("eval_fraction", 0)) not in ("0", "0.0")
    given |= {"max_eval_blocks": 16} if evaluates and "max_eval_blocks" not in run else {}
    return values.outrank({"max_steps": 2}, {k: v for k, v in given.items() if k != "max_steps"})[0]


def honoured(run, places, settings, *, but=()):
    """Check that everything of ``run`` is in ``settings``, which a command wrote."""
    placed = {k: v.format(**places) if isinstance(v, str) else v for k, v in run.items()}
    for key in {"eval_data", "general_data", "replay_data"} & set(placed):
        path, _, source = placed[key].partition(",name=")
        placed[key] = [{"path": path, **({"name": source} if source else {})}]
    asked, got = read(placed), read(settings)
    assert {name: got.get(name) for name in asked if name not in but} == {
        name: value for name, value in asked.items() if name not in but
    }


def settings_of(run_folder):
    """Return what a run did; one with new tokens has a model of its own, which says what it was made for."""
    settings = yaml.safe_load((run_folder / "config.yaml").read_text())
    noted = extension.read(run_folder / FOLDER)
    return settings if noted is None else settings | {"tokenizer": noted.tokenizer, "extend_tokenizer": noted.asked}


def through_every_command(run, places, tmp_path):
    """Return the exit codes of the commands, each checked for what it did with ``run``."""
    codes, out = {}, tmp_path / "run"
    # Plan, with the pick written.
    pick = tmp_path / "pick.yaml"
    arguments = flags(base(run, places), **places)
    said = oomless("plan", *arguments, "--gpu", ROOMY, "--json", "--write", pick)
    codes["plan"] = said.code
    assert said.code in (0, 1, 2), said.err
    if said.code == 0:
        honoured(run, places, said.json["config"])
        written = yaml.safe_load(pick.read_text())
        honoured(run, places, written)
        size = said.json["plan"]["needed_bytes"]
        # Exactly the planned size, and on from its checkpoint.
        more = () if "save_steps" in run else ("--save-steps", 1)
        train = ("--config", pick, "--output-dir", out, "--gpu", f"virtual:{size}", "--as-given", *more)
        planned = oomless("plan", *train, "--json")
        assert planned.code == 0, planned.err
        assert planned.json["needed_bytes"] == size
        with devices() as opened:
            first = oomless("train", *train)
            codes["train on a virtual GPU"] = first.code
            assert first.code == 0, first.err + first.out[-2000:]
            honoured(run, places, settings_of(out))
            again = oomless("train", *train, "--resume")
            codes["resume"] = again.code
            assert again.code == 0, again.err + again.out[-2000:]
        reached = opened[0].usage()
        peak = planned.json["profile"]["peak_allocated_bytes"]
        assert (reached.peak_allocated_bytes - peak, reached.peak_reserved_bytes - size) == (0, 0)
    elif said.code == 2:
        assert said.err.startswith("error: "), said.err
    # What is given and nothing else.
    said = oomless("plan", *arguments, "--gpu", ROOMY, "--json", "--as-given")
    codes["plan --as-given"] = said.code
    assert said.code in (0, 1, 2), said.err
    if said.code < 2:
        assert said.json["fits"] == (said.code == 0)
    # On the CPU.
    on_cpu = base(run, places, out=tmp_path / "cpu")
    said = oomless("train", *flags(on_cpu, **places), "--gpu", "cpu")
    codes["train on the CPU"] = said.code
    assert said.code in (0, 2), said.err + said.out[-2000:]
    if said.code == 0:
        honoured(run, places, settings_of(tmp_path / "cpu"))
    # Explain, as if it had been another's run.
    said = oomless("explain", "--message", MESSAGE, *arguments, "--gpu", "T4", "--json")
    codes["explain"] = said.code
    assert said.code in (0, 2), said.err
    if said.code == 0:
        assert said.json
    return codes


COMBINATIONS = 200
OPENED_BY_TRAINING = ("tokenizer", "eval_data", "general_data", "replay_data", "cache_dir", "text_field", "encoding")
"""Which a plan opens only where there is something to read."""

ALONE = [(name, number) for name in values.names() for number in range(len(values.valid(name)))]
SHOWN = random.Random(0).sample(ALONE, len(ALONE))


def sampled(cases, by_default, slow):
    """Mark ``cases``: the first run by default, those before ``slow`` in CI, the others at full length."""
    tiers = ((), pytest.mark.slow, pytest.mark.full_length)
    return [
        pytest.param(*case, marks=tiers[(number >= by_default) + (number >= slow)], id="-".join(map(str, case)))
        for number, case in enumerate(cases)
    ]


def record(codes, record_property):
    for command, code in codes.items():
        record_property(command, code)


@pytest.mark.parametrize(("name", "number"), sampled(SHOWN, 2, 8))
def test_a_setting_alone(places, tmp_path, name, number, record_property):
    value = values.valid(name)[number]
    run = {**values.needs(name, value), name: value}
    codes = through_every_command(run, places, tmp_path)
    record(codes, record_property)
    assert codes["plan"] == 0
    assert codes["resume"] == 0


CHOSEN_BY_NO_PLAN = {"momentum", "replay", "sample_tokens", "load_best_model_at_end", "early_stopping_patience"}
"""What has no effect without a setting that a plan never chooses."""


@pytest.mark.parametrize("name", [name for name in values.names() if name not in CHOSEN_BY_NO_PLAN])
def test_a_plan_takes_a_setting_without_what_it_needs(name):
    """It narrows the search to what it has an effect on."""
    for value in values.valid(name):
        for length in {values.LENGTH, LONGEST} if name != "max_seq_length" else {value}:
            assert name in read_given({"model": "m", name: value, "max_seq_length": length})


@pytest.mark.parametrize("number", sampled([(number,) for number in range(COMBINATIONS)], 1, 1))
def test_settings_together(places, tmp_path, number, record_property):
    run = of_use(values.combination(number), places)
    record_property("settings", len(run))
    record(through_every_command(run, places, tmp_path), record_property)


def of_use(run, places):
    """Return ``run`` without what its model has no use for, which each refusal has to name."""
    while True:
        said = oomless("plan", *flags(base(run, places), **places), "--gpu", ROOMY, "--json", "--as-given")
        if said.code != 2:
            return run
        named = [name for name in run if re.search(rf"\b{name}\b", said.err)]
        assert named, said.err
        first = min(named, key=said.err.index)
        run = {name: value for name, value in run.items() if name != first}


@pytest.mark.parametrize("name", values.names())
def test_a_wrong_value_is_one_clear_error(places, tmp_path, name):
    wrong = values.invalid(name)
    assert len(wrong) >= 3
    assert len(values.valid(name)) >= values.least_valid(name)
    for text in wrong:
        run = {**values.NEEDS.get(name, {}), name: text}
        for command in ("plan", "train"):
            given = base(run, places, out=tmp_path / "run")
            gpu = ROOMY if command == "plan" else "cpu"
            more = ("--as-given",) if command == "plan" else ()
            if values.is_switch(name):  # which the command line cannot give a value
                given.pop(name)
                (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({name: text}))
                more += ("--config", tmp_path / "wrong.yaml")
            said = oomless(command, *flags(given, **places), "--gpu", gpu, *more)
            if command == "plan" and name in OPENED_BY_TRAINING:
                continue  # which a plan does not open
            assert said.code == 2, (command, text, said.out[-500:])
            assert said.err.startswith("error: "), said.err
            assert not (tmp_path / "run" / "model").exists()


def test_the_longest_sequence_is_found_and_trained(places, tmp_path):
    run = tmp_path / "run"
    given = ("train", "--model", places["model"], "--data", places["corpus"], "--output-dir", run)
    given += ("--max-seq-length", "max", "--max-steps", 1, "--eval-fraction", 0)
    for gpu, more in (("cpu", ()), ("virtual:12MiB", ("--as-given",))):
        refused = oomless(*given, "--gpu", gpu, *more)
        assert refused.code == 2
        assert "max is found by a search" in refused.err
    page = tmp_path / "plan.html"
    planned = oomless("plan", *given[1:], "--gpu", "virtual:12MiB", "--why", "--html", page)
    assert planned.code == 0, planned.err
    assert re.search(r"blocks? of\s+512\s+tokens", planned.out)
    assert page.exists()
    first = oomless(*given, "--gpu", "virtual:12MiB")
    assert first.code == 0, first.err
    assert yaml.safe_load((run / "config.yaml").read_text())["max_seq_length"] == 512
    again = oomless(*given, "--gpu", "virtual:12MiB", "--resume", "--max-steps", 2)
    assert again.code == 0, again.err
