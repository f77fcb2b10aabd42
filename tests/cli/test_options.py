"""What follows a path on the command line, and how sources of text are refused."""

import pytest

from oomless.cli.options import given_settings
from oomless.config import DataSource, TrainConfig
from oomless.errors import ConfigError


def source(text) -> DataSource:
    settings = given_settings(None, {"data": [text], "model": "m", "output_dir": "o"})
    return TrainConfig.from_mapping(settings).data[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("books", {"path": "books"}),
        ("books=0.25", {"path": "books", "weight": 0.25}),
        ("books,name=old,text_field=body", {"path": "books", "name": "old", "text_field": "body"}),
        ("books=2,name=old", {"path": "books", "weight": 2.0, "name": "old"}),
        ("a=b/books,exclude=*.log,exclude=tests/*", {"path": "a=b/books", "exclude": "*.log,tests/*"}),
        ("one,two,weight=3", {"path": "one,two", "weight": 3.0}),
        ("books,encoding=utf-16,split=test", {"path": "books", "encoding": "utf-16", "split": "test"}),
    ],
)
def test_settings_of_a_source_follow_its_path(text, expected):
    assert source(text) == DataSource(**expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("books,nmae=old", "unknown setting 'nmae' in data. Did you mean 'name'?"),
        ("books,weight=none", "weight of a source of text must be a number"),
        ("books=1,weight=2", "weight is given twice for books"),
        ("books,name=a,name=b", "name is given 2 times for books"),
        ("books,encoding=utf-99", "encoding must be the name of a text encoding.*'utf-99'"),
    ],
)
def test_settings_that_cannot_be(text, message):
    with pytest.raises(ConfigError, match=message):
        source(text)


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("new=0.9", "old,name=x"):
        (tmp_path / name).write_text("text")
        assert source(name) == DataSource(path=name)
    assert source("new=0.9=0.5") == DataSource(path="new=0.9", weight=0.5)
