"""A studio to ask, without a browser."""

import pytest
from starlette.testclient import TestClient
from tests.cli.test_cli import ENVIRONMENT

from oomless.studio.safety import TOKEN
from oomless.studio.server import application


@pytest.fixture
def studio(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    with TestClient(application([tmp_path], "t"), base_url="http://localhost", headers={TOKEN: "t"}) as client:
        yield client
