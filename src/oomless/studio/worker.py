"""A process that answers questions of planning, one after the other: JSON lines in and out.

It has imported all that is needed before it is asked, and ends with who asks. What it prints otherwise goes to standard error.
"""

from __future__ import annotations

import os
import threading
from json import dumps, loads
from queue import SimpleQueue
from typing import Any, TextIO

from oomless.errors import OomlessError
from oomless.models.blame import blamed
from oomless.models.spec import resolve_for_plan
from oomless.planning.choose import choose_training
from oomless.planning.given import host_size, read_given, wish_of
from oomless.planning.nearby import smallest_changes
from oomless.planning.trial import results_folder
from oomless.report.charts import text
from oomless.report.plan_page import choice_parts

WISHES = ("prefer", "tokens", "hours")
HOST_MEMORY = "host_memory"


def main() -> None:
    """Answer what standard input asks until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    # Not by sys.stdin, which forks close, for which they would wait as long as a thread reads from it.
    asked = os.fdopen(os.dup(0), encoding="utf-8")
    questions: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked, questions), daemon=True).start()
    while True:
        _answer(loads(questions.get()), answers)


def _listen(asked: TextIO, questions: SimpleQueue[str]) -> None:
    for line in asked:
        questions.put(line)
    os._exit(0)  # who asked is gone, and whatever is being searched with it


def _answer(asked: dict[str, str], answers: TextIO) -> None:
    def say(**said: Any) -> None:
        answers.write(dumps(said) + "\n")

    try:
        say(html=plan(asked, lambda words, share=None: say(words=words, share=share)))
    except KeyboardInterrupt:
        say(error="stopped before anything was found that fits")
    except OomlessError as error:
        say(error=str(error))
    except Exception as error:
        told = blamed(error)
        if told is None:
            raise
        say(error=str(told))


def plan(asked: dict[str, str], progress: Any) -> str:
    """Return what a search found, as parts of a page.

    Args:
        asked: settings of a training, and ``prefer``, ``tokens``, ``hours`` and ``host_memory``, as text.
        progress: is told what is tried, and what share of all is done.

    Raises:
        UserError: they do not fit together.
    """
    progress("reading the model")
    settings = {name: value for name, value in asked.items() if name not in (*WISHES, HOST_MEMORY)}
    wish = wish_of(asked.get("prefer"), asked.get("tokens"), asked.get("hours"), settings)
    given = read_given(settings)
    spec = resolve_for_plan(given["model"])
    choice = choose_training(given, **wish, host_bytes=host_size(asked.get(HOST_MEMORY)), progress=progress)
    parts = [*(f"<p>{text(note)}</p>" for note in spec.notes), *choice_parts(choice)]
    if choice.picked is None:
        progress("looking for what would make it fit")
        changes = [f"<li>{text(change)}</li>" for change in smallest_changes(spec, choice, results_folder())]
        nothing = (
            "Nothing that was tried would: not a shorter sequence, host memory, any GPU known, or a smaller model."
        )
        would = f"<ul>{''.join(changes)}</ul>" if changes else f"<p>{nothing}</p>"
        parts.append(f"<section><h2>What would make it fit</h2>{would}</section>")
    return "".join(parts)


if __name__ == "__main__":
    main()
