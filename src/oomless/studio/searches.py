"""The rooms of plans and explanations: searches in processes of their own, which end when nobody looks at them any more.

The same question is searched once, whoever asks; its answer is kept while the studio runs. A process that has answered waits for the next
question, as it has imported everything.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from json import dumps, loads
from pathlib import Path
from typing import Any

from oomless.errors import ConfigError
from oomless.studio.worker import LOG, RUN, SNAPSHOT

MOST_AT_ONCE = max(4, os.cpu_count() or 1)
"""So many searches run at a time; further ones wait."""

MOST_KEPT = 64
LEFT_S = 90.0
"""A browser asks at least once a minute for a page that is not seen; who does not for so long is gone."""

LAST_WORDS_BYTES = 2000

MOST_LOGS = 16
MOST_SNAPSHOTS = 4


class Worker:
    """A process of ``worker.py``."""

    def __init__(self, folder: Path) -> None:
        """Start it in ``folder``; it imports while nothing is asked yet."""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oomless.studio.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
            cwd=folder,
        )

    def ask(self, question: Mapping[str, str]) -> None:
        """Ask; what it answers is read from ``lines``."""
        assert self.process.stdin is not None
        self.process.stdin.write(dumps(question).encode() + b"\n")
        self.process.stdin.flush()

    def lines(self) -> Any:
        """Yield what it says until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield loads(line)

    def last_words(self) -> str:
        """Return how it ended, and the last line of what it complained of."""
        code = self.process.wait()
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
        words = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"the search ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}: {words[-1] if words else 'it said nothing'}"

    def end(self) -> None:
        """End it and what it has started; who follows it closes it then."""
        if self.process.poll() is None:  # else its number may be another's by now; what it started ends with it
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """End it, and let go of what it said."""
        self.end()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            if file is not None:
                with suppress(OSError):
                    file.close()


@dataclass(kw_only=True)
class Search:
    """One question, and how far its answer is."""

    question: Mapping[str, str]
    asked: Mapping[str, str]
    """The question with what its names stand for."""
    viewers: dict[str, float] = field(default_factory=dict)
    """Who looks at it, and when each asked last."""
    began: float = field(default_factory=time.monotonic)
    worker: Worker | None = None
    words: str = "waiting for another search to end"
    share: float | None = None
    partial: str | None = None
    """The answer as far as it goes."""
    html: str | None = None
    pick: dict[str, str] | None = None
    """The pick of a plan in short."""
    train: dict[str, Any] | None = None
    """The settings of the pick, and on how many GPUs it trains."""
    error: str | None = None
    stopped: bool = False
    """By who looks at it: it takes the best so far."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.html is not None or self.error is not None


class Searches:
    """The searches of a studio that may read models in ``folders``; ``run_of`` finds a run by its name."""

    def __init__(self, folders: list[Path], run_of: Callable[[str], Path]) -> None:
        """Search nothing yet."""
        self.folders, self.run_of = folders, run_of
        self._place = tempfile.TemporaryDirectory(prefix="oomless-studio-")
        self._snapshots: OrderedDict[str, Path] = OrderedDict()
        self._searches: OrderedDict[str, Search] = OrderedDict()
        self._spare: Worker | None = None
        self._logs: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.RLock()
        self._closed = False
        threading.Thread(target=self._watch, daemon=True).start()

    def warm(self) -> None:
        """Have a process import what a search needs, before one is asked for."""
        with self._lock:
            if self._spare is None and not self._closed:
                self._spare = Worker(self.folders[0])

    def keep(self, log: str) -> dict[str, str]:
        """Keep ``log`` for a question about it, and return its name."""
        name = hashlib.blake2b(log.encode(errors="replace"), digest_size=16).hexdigest()
        with self._lock:
            self._logs[name] = log
            while len(self._logs) > MOST_LOGS:
                self._logs.popitem(last=False)
        return {LOG: name}

    def place_for_snapshot(self) -> Path:
        """Return a new file into which a snapshot may be written; ``keep_snapshot`` keeps it."""
        handle, name = tempfile.mkstemp(dir=self._place.name)
        os.close(handle)
        return Path(name)

    def keep_snapshot(self, path: Path) -> dict[str, str]:
        """Keep the snapshot that was written to ``path`` for a question about it, and return its name."""
        with self._lock:
            self._snapshots[path.name] = path
            while len(self._snapshots) > MOST_SNAPSHOTS:
                self._snapshots.popitem(last=False)[1].unlink(missing_ok=True)
        return {SNAPSHOT: path.name}

    def training_of(self, question: Mapping[str, str]) -> dict[str, Any]:
        """Return the settings that train the pick of a plan, and on how many GPUs.

        Raises:
            ConfigError: there is no answer that picks something.
        """
        with self._lock:
            search = self._searches.get(dumps(question, sort_keys=True))
            if search is None or search.train is None:
                raise ConfigError("this plan is not here any more, or nothing of it fits: plan it again")
            return search.train

    def look(self, question: Mapping[str, str], viewer: str) -> dict[str, Any]:
        """Return how far the answer to ``question`` is; it is searched if nobody has asked it before.

        Raises:
            ConfigError: it is of a model outside the folders given, of a log or snapshot that is not kept any more, or of no run.
        """
        key = dumps(question, sort_keys=True)
        with self._lock:
            search = self._searches.get(key)
            if search is None:
                self._require_inside(question.get("model", ""))
                search = self._searches[key] = Search(question=question, asked=self._to_ask(question))
                self._begin_more()
                self._forget()
            self._searches.move_to_end(key)
            search.viewers[viewer] = time.monotonic()
            seconds = round(time.monotonic() - search.began)
            return {
                "html": search.html,
                "pick": search.pick,
                "trains": search.train is not None,
                "partial": search.partial,
                "error": search.error,
                "words": search.words,
                "share": search.share,
                "seconds": seconds,
            }

    def leave(self, question: Mapping[str, str], viewer: str) -> None:
        """Note that ``viewer`` does not look any more; the last one ends what still searches."""
        with self._lock:
            search = self._searches.get(dumps(question, sort_keys=True))
            if search is not None:
                search.viewers.pop(viewer, None)
                self._end_unseen()

    def enough(self, question: Mapping[str, str]) -> None:
        """Take the best that was found so far, as Ctrl-C does."""
        with self._lock:
            search = self._searches.get(dumps(question, sort_keys=True))
            if search is not None and search.worker is not None and not search.ended:
                search.stopped = True
                search.worker.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End every process."""
        with self._lock:
            self._closed = True
            if self._spare is not None:
                self._spare.close()
            for search in self._searches.values():
                if search.worker is not None:
                    search.worker.end()
            self._place.cleanup()

    def _require_inside(self, model: str) -> None:
        """Check that a model, where it is a path, lies in the folders given."""
        path = self.folders[0] / Path(model).expanduser()
        named = os.path.lexists(path) or model.startswith(("/", ".", "~"))
        read = (path.resolve(), (path / "config.json").resolve())
        if named and not any(all(one.is_relative_to(top) for one in read) for top in self.folders):
            raise ConfigError(
                f"{model} lies outside the folders that the studio was given: start oomless studio with its folder"
            )

    def _begin_more(self) -> None:
        running = sum(search.worker is not None for search in self._searches.values())
        for search in self._searches.values():
            if running < MOST_AT_ONCE and search.worker is None and not search.ended and not self._closed:
                running += 1
                search.worker, self._spare = self._spare or Worker(self.folders[0]), None
                search.words = "beginning"
                threading.Thread(target=self._follow, args=(search, search.worker), daemon=True).start()

    def _follow(self, search: Search, worker: Worker) -> None:
        """Ask, and note what comes until there is an answer."""
        with suppress(OSError, ValueError):
            worker.ask(search.asked)
            for said in worker.lines():
                with self._lock:
                    search.words, search.share = said.get("words", search.words), said.get("share", search.share)
                    search.partial = said.get("partial", search.partial)
                    search.pick, search.train = said.get("pick"), said.get("train")
                    search.html, search.error = said.get("html"), said.get("error")
                if search.ended:
                    break
        words = None if search.ended else worker.last_words()
        with self._lock:
            search.worker, search.asked, search.error = None, {}, search.error or words
            alive = worker.process.poll() is None and not search.stopped and not self._closed
            reused = alive and self._spare is None
            if reused:
                self._spare = worker
            self._begin_more()
        if not reused:
            worker.close()

    def _to_ask(self, question: Mapping[str, str]) -> dict[str, str]:
        """Return ``question`` with what its names stand for: where models, runs and snapshots lie, and what logs say."""
        asked = dict(question)
        model = question.get("model", "")
        path = self.folders[0] / Path(model).expanduser()
        if model and path.exists():
            asked["model"] = str(path)
        with self._lock:
            for name, kept in ((LOG, self._logs), (SNAPSHOT, self._snapshots)):
                if name in question:
                    if question[name] not in kept:
                        raise ConfigError(f"the {name} is not kept any more: give it again")
                    asked[name] = str(kept[question[name]])
        if RUN in question:
            asked[RUN] = str(self.run_of(question[RUN]))
        return asked

    def _watch(self) -> None:
        while not self._closed:
            time.sleep(1)
            with self._lock:
                now = time.monotonic()
                for search in self._searches.values():
                    search.viewers = {who: at for who, at in search.viewers.items() if now - at < LEFT_S}
                self._end_unseen()

    def _end_unseen(self) -> None:
        for key, search in [*self._searches.items()]:
            if not search.viewers and not search.ended:
                del self._searches[key]
                if search.worker is not None:
                    search.error = "nobody looked at it any more"
                    search.worker.end()

    def _forget(self) -> None:
        ended = [key for key, search in self._searches.items() if search.ended]
        for key in ended[: max(0, len(self._searches) - MOST_KEPT)]:
            del self._searches[key]
