"""A process that answers questions, one after the other: JSON lines in and out.

It imports all that is needed while nothing is asked yet, and ends with who asks. What it prints otherwise goes to standard error.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from json import dumps, loads
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from oomless import catalogue
from oomless.diagnosis.first_answer import first_answer, usable
from oomless.errors import OomlessError, UserError
from oomless.report.charts import text
from oomless.report.first_answer import print_first_answer
from oomless.report.paper import Paper
from oomless.report.so_far import found_so_far

Say = Callable[..., None]
"""Is told ``words`` on what is done, what ``share`` of all is done, and a ``partial`` answer."""

LOG, SNAPSHOT, RUN = "log", "snapshot", "run"
"""By these a question is one of an error, or of a run and what it began with; else of a plan."""

WISHES = ("prefer", "tokens", "hours")
HOST_MEMORY = "host_memory"
BUDGET_S = 60.0
"""So long the rehearsals of an explanation may take."""


def main() -> None:
    """Answer what standard input asks until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    # Not by sys.stdin, which forks close, for which they would wait as long as a thread reads from it.
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    questions: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked, questions), daemon=True).start()
    IMPORTED.start()
    while True:
        _answer(loads(questions.get()), answers)


def _listen(asked: TextIO, questions: SimpleQueue[str]) -> None:
    for line in asked:
        questions.put(line)
    os._exit(0)  # who asked is gone, and whatever is being searched with it


def _import() -> None:
    import oomless.diagnosis.explain
    import oomless.planning.choose
    import oomless.report.diagnosis
    import oomless.report.plan_page  # noqa: F401


IMPORTED = threading.Thread(target=_import, daemon=True)
"""What a log says by itself does not wait for it."""


def _answer(asked: dict[str, str], answers: TextIO) -> None:
    def say(**said: Any) -> None:
        answers.write(dumps(said) + "\n")

    try:
        if LOG in asked or SNAPSHOT in asked:
            say(html=explain(asked, say))
        elif RUN in asked:
            say(html=compare(asked, say))
        else:
            say(**plan(asked, say))
    except KeyboardInterrupt:
        say(error="stopped before anything was found that fits")
    except OomlessError as error:
        say(error=str(error))
    except Exception as error:
        from oomless.models.blame import blamed

        told = blamed(error)
        if told is None:
            raise
        say(error=str(told))


def plan(asked: Mapping[str, str], say: Say) -> dict[str, Any]:
    """Return what a search found: parts of a page, the pick in short, and the settings that train it.

    Args:
        asked: settings of a training, and ``prefer``, ``tokens``, ``hours`` and ``host_memory``, as text.
        say: is told how far it is.

    Raises:
        UserError: they do not fit together.
    """
    say(words="reading the model", partial=_known_at_once(asked))
    _imported()
    from oomless.models.build import parameter_count
    from oomless.models.spec import resolve_for_plan
    from oomless.planning.choose import choose_training, picked_settings
    from oomless.planning.given import host_size, read_given, wish_of
    from oomless.planning.layout import with_new_tokens
    from oomless.planning.nearby import smallest_changes
    from oomless.planning.plan import target_for
    from oomless.planning.strategies import UNPLANNED
    from oomless.planning.trial import results_folder
    from oomless.report.plan_page import choice_parts, in_short

    settings = {name: value for name, value in asked.items() if name not in (*WISHES, HOST_MEMORY)}
    wish = wish_of(asked.get("prefer"), asked.get("tokens"), asked.get("hours"), settings)
    given, host_bytes = read_given(settings), host_size(asked.get(HOST_MEMORY))
    spec, target = resolve_for_plan(given["model"]), target_for(str(given.get("gpu", "auto")), host_bytes)
    weights_bytes, fills = 2 * parameter_count(spec), ("a plan may fill", target.usable_bytes - target.margin_bytes)
    say(words="building it", partial=found_so_far(weights_bytes, [], fills))
    choice = choose_training(
        given,
        **wish,
        host_bytes=host_bytes,
        progress=lambda words, share: say(words=words, share=share),
        heard=lambda rows: say(partial=found_so_far(weights_bytes, rows, fills)),
    )
    with with_new_tokens(spec, {**UNPLANNED, **given}) as (grown, _):
        parts = [
            *(f"<p>{text(note)}</p>" for note in grown.notes_with(given.get("quantization"))),
            *choice_parts(choice),
        ]
    if choice.picked is not None:
        answer = {"html": "".join(parts), "pick": in_short(choice)}
        if target.machines > 1:  # each of which begins it by itself
            return answer
        return {**answer, "train": {"settings": picked_settings(choice), "gpus": target.gpus}}
    say(words="looking for what would make it fit")
    changes = [f"<li>{text(change)}</li>" for change in smallest_changes(spec, choice, results_folder())]
    nothing = "Nothing that was tried would: not a shorter sequence, host memory, any GPU known, or a smaller model."
    would = f"<ul>{''.join(changes)}</ul>" if changes else f"<p>{nothing}</p>"
    parts.append(f"<section><h2>What would make it fit</h2>{would}</section>")
    return {"html": "".join(parts), "pick": in_short(choice)}


def _known_at_once(asked: Mapping[str, str]) -> str | None:
    """Return the weights of a model beside a GPU as bars, where both are known by name."""
    with suppress(UserError):
        gpu = catalogue.gpu(asked.get("gpu", ""))
        weights_bytes = 2 * catalogue.parameters(asked.get("model", ""))
        return found_so_far(weights_bytes, [], ("the allocator can have", gpu.usable_bytes))
    return None


def explain(asked: Mapping[str, str], say: Say) -> str:
    """Return the diagnosis of a log or a snapshot as parts of a page; ``say`` is told it as it is found.

    Args:
        asked: the text of a ``log``, the path of a ``snapshot``, and settings, as text.
        say: is told how far it is.

    Raises:
        UserError: the snapshot cannot be read, and there is no log.
    """
    say(words="reading")
    notes: list[str] = []
    given = usable({name: value for name, value in asked.items() if name not in (LOG, SNAPSHOT)}, notes)
    snapshot = Path(asked[SNAPSHOT]) if SNAPSHOT in asked else None
    first = first_answer(asked.get(LOG, ""), given, snapshot=snapshot, notes=tuple(notes))
    paper = Paper()
    print_first_answer(paper, first)
    say(words="read; rehearsing the run and its cures", partial="".join(paper.parts()))
    _imported()
    from oomless.diagnosis.explain import rehearse_answer
    from oomless.report.diagnosis import Printer, print_holders

    if first.snapshot is not None:
        print_holders(paper, first)
    printer = Printer(paper, first, lambda words: say(words=words, partial="".join(paper.parts())))
    printer.close(rehearse_answer(first, BUDGET_S, printer))
    return "".join(paper.parts())


def compare(asked: Mapping[str, str], say: Say) -> str:
    """Return the model that a run made beside the one that it began with, as a part of a page.

    Args:
        asked: the path of a ``run``, ``texts`` to go on from with an empty line between two, and ``no_loss`` where held-out text is not measured.
        say: is told how far it is.

    Raises:
        UserError: there are no two models, there is nothing to compare them on, or no room.
    """
    _imported()
    from oomless.export.compare import Pair
    from oomless.export.generate import Sampling
    from oomless.report.compare import section
    from oomless.training.assemble import open_device

    prompts = [prompt for prompt in re.split(r"\n\s*\n", asked.get("texts", "")) if prompt.strip()]
    pair = Pair(
        Path(asked[RUN]),
        prompts,
        sampling=Sampling(max_new_tokens=64),
        held_out="no_loss" not in asked,
        device=open_device("auto"),
        say=lambda words, share: say(words=words, share=share),
    )
    pair.room().require()
    return section(pair.compare())


def _imported() -> None:
    if IMPORTED.ident is not None:
        IMPORTED.join()


if __name__ == "__main__":
    main()
