"""What is kept between runs: keys, bounds, damage, several processes."""

import os
import threading

import pytest

from oomless import kept
from oomless.kept import Kept, key_of


@pytest.mark.parametrize("name", kept.RESTS_ON)
def test_another_version_is_another_key(monkeypatch, name):
    before = key_of("trial", {"a": 1})
    assert key_of("trial", {"a": 1}) == before
    assert key_of("trial", {"a": 2}) != before
    for other in ("0.0.1", None):
        monkeypatch.setattr(kept, "_versions", lambda other=other: {**dict.fromkeys(kept.RESTS_ON, "9"), name: other})
        assert key_of("trial", {"a": 1}) != before
        before = key_of("trial", {"a": 1})


def test_the_catalogue_is_in_the_key(monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "catalogue").mkdir(parents=True)
    (package / "catalogue" / "gpus.yaml").write_text("T4: 14 GiB")
    monkeypatch.setattr(kept, "__file__", str(package / "kept.py"))
    first = kept._package.__wrapped__()
    (package / "catalogue" / "gpus.yaml").write_text("T4: 15 GiB")
    assert kept._package.__wrapped__() != first


def test_what_is_damaged_or_gone_is_not_there(tmp_path):
    folder = Kept(tmp_path / "new")
    assert folder.get("a") is None
    folder.put("a", {"fits": True})
    assert folder.get("a") == {"fits": True}
    for damage in ("", "{", "[1]"):
        (tmp_path / "new" / "a.json").write_text(damage)
        assert folder.get("a") is None


def test_the_folder_has_a_bound_and_keeps_what_is_used(tmp_path):
    folder = Kept(tmp_path, most_files=20)
    for number in range(24):
        folder.put(str(number), {"number": number})
        os.utime(tmp_path / f"{number}.json", (number, number))
    assert folder.get("0") == {"number": 0}  # and so it was used last
    folder.clear_oldest()
    left = {int(path.stem) for path in tmp_path.iterdir()}
    assert left == {0, *range(10, 24)}


def test_two_writers_and_a_clearer(tmp_path):
    """Whatever another does, a reader finds a whole result or none."""
    wrong = []

    def work(writer):
        folder = Kept(tmp_path, most_files=30)
        for number in range(150):
            folder.put(str(number % 40), {"text": "x" * 2000, "writer": writer})
            found = folder.get(str((number * 7) % 40))
            if found is not None and len(found["text"]) != 2000:
                wrong.append(found)
            folder.clear_oldest()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not list(tmp_path.glob("*.new"))
    assert len(list(tmp_path.glob("*.json"))) <= 40
