"""Who may ask the studio, and what nobody gets."""

import json
import re
import subprocess
import sys
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient
from tests.cli.test_cli import ENVIRONMENT

from oomless.errors import ConfigError
from oomless.studio.runs import Runs
from oomless.studio.safety import TOKEN
from oomless.studio.server import application

TOLD = "the-token"
HOSTILE = "<img src=x onerror=alert(1)> \u202e\x1b[2J"


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def client(folder, **headers):
    return TestClient(application([folder], TOLD), base_url="http://127.0.0.1:8000", headers={TOKEN: TOLD, **headers})


def a_run(folder, loss=2.0, config="model: m\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.mark.parametrize(
    "headers",
    [
        {TOKEN: ""},
        {TOKEN: "another"},
        {TOKEN: "caf\xe9".encode("latin-1")},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
    ],
)
def test_who_may_not_is_refused(top, headers):
    """Without the token, by a name that leads here from outside, or from another page: even with the token."""
    a_run(top / "one")
    for answer in (
        client(top, **headers).get("/api/runs"),
        client(top, **headers).post("/api/runs/stop", json={"name": "one"}),
    ):
        assert answer.status_code == 403
        assert "one" not in answer.json().get("runs", "")
    assert client(top, origin="http://127.0.0.1:8000").get("/api/runs").status_code == 200


def test_the_page_may_run_nothing_but_its_own_script(top):
    for path in ("/", "/studio.js", "/studio.css", "/studio.svg", "/nowhere", "/api/runs"):
        answer = client(top).get(path)
        assert answer.headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'; style-src 'self';"
        )
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    page = client(top).get("/").text
    assert not re.search(r"https?://|\son\w+=|<script(?![^>]* src=)|\sstyle=", page)
    assert TOLD not in page


@pytest.mark.parametrize(
    "name", ["../secret", "/etc", "one/../../secret", "linked", "outside", "..%2Fsecret", "one\0", ""]
)
def test_no_path_leads_out_of_the_folders(top, name):
    secret = a_run(top.parent / "secret", config="password: hunter2\n")
    a_run(top / "one")
    (top / "linked").symlink_to(secret)
    (top / "outside").mkdir()
    (top / "outside" / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    for path, asked in (("show", {"names": [name]}), ("stop", {"name": name}), ("resume", {"name": name})):
        answer = client(top).post(f"/api/runs/{path}", json=asked)
        assert answer.status_code == 422
        assert "hunter2" not in answer.text
    assert [run["name"] for run in client(top).get("/api/runs").json()["runs"]] == ["one"]
    assert "hunter2" not in client(top).get(f"/{quote(name)}").text


def test_no_text_of_a_run_is_markup(top):
    run = a_run(top / "<b onload=x>", config=f"model: {HOSTILE}\n")
    (run / "studio.log").write_text(HOSTILE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, f"eval_loss/{HOSTILE}": 2.0}) + "\n")
    a_run(top / "two")
    for names in (["<b onload=x>"], ["<b onload=x>", "two"]):
        html = client(top).post("/api/runs/show", json={"names": names}).json()["html"]
        assert "&lt;" in html
        assert not re.search(r"<(img|b|script)\b|\x1b|\u202e| style=", html)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"[" * 100_000, b'{"names": "one"}', b'{"names": []}', b'{"names": [1]}', b"\xff"]
)
def test_what_is_no_question_is_refused(top, body):
    assert client(top).post("/api/runs/show", content=body).status_code == 400
    assert client(top).post("/api/runs/show", content=b" " * (9 << 20)).status_code == 413
    assert client(top).get("/api/runs/show").status_code == 405


def test_the_server_begins_without_what_takes_long_to_import():
    code = "import sys, oomless.studio.serve; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("../out", {"data": "text"}, "a run has a name below"),
        ("", {"data": "text"}, "a run has a name below"),
        (".", {"data": "text"}, "a run has a name below"),
        ("one", {"data": "text"}, "choose another name"),
        ("new", {"data": "../secret"}, "lies in the folders"),
        ("new", {"data": "/etc/passwd"}, "lies in the folders"),
        ("new", {"data": "linked"}, "lies in the folders"),
        ("new", {}, "lies in the folders"),
        ("new", {"data": "nowhere"}, "no text at"),
        ("new", {"data": "text", "output_dir": "/tmp"}, "not begun here with output_dir"),
        ("new", {"data": "text", "trust_remote_code": "true"}, "not begun here with trust_remote_code"),
        ("new", {"data": "text", "max_steps": "many"}, "max_steps"),
    ],
)
def test_no_run_is_begun_outside_the_folders_or_with_what_no_plan_is_asked_for(top, name, given, said):
    a_run(top / "one")
    (top / "text").mkdir()
    (top.parent / "secret").mkdir()
    (top / "linked").symlink_to(top.parent / "secret")
    with pytest.raises(ConfigError, match=said):
        Runs([top]).begin(name, {"model": "gpt2", "max_seq_length": 64}, given, 1)
    assert not (top / "new").exists()
    assert not (top.parent / "out").exists()


def test_a_run_begins_from_a_plan_alone(top):
    asked = {"question": {"model": "gpt2", "gpu": "T4"}, "name": "new", "given": {"data": "text"}}
    answer = client(top).post("/api/runs/begin", json=asked)
    assert answer.status_code == 422
    assert "plan it again" in answer.json()["error"]
    assert client(top).post("/api/runs/begin", json={**asked, "given": {"data": 1}}).status_code == 400
    assert not (top / "new").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc", "", "linked"])
def test_nothing_is_compared_outside_the_folders(top, name):
    secret = a_run(top.parent / "secret")
    (secret / "compare.json").write_text("{}")
    (top / "linked").symlink_to(secret)
    asking = client(top)
    for path, asked in (
        ("compare/show", {"name": name}),
        ("look", {"question": {"run": name, "texts": "def"}, "viewer": "v"}),
    ):
        answer = asking.post(f"/api/{path}", json=asked)
        assert answer.status_code == 422
        assert "there is no run" in answer.json()["error"]
    assert asking.get("/api/compare").json() == {"runs": []}


def test_other_machines_reach_it_by_its_name_or_address_alone(top):
    asking = TestClient(application([top], TOLD, ["box.lan"]), headers={TOKEN: TOLD})
    for host, status in (
        ("box.lan:80", 200),
        ("10.0.0.7", 200),
        ("[fe80::1]:80", 200),
        ("box.lan.evil", 403),
        ("10.0.0.7.nip.io", 403),
    ):
        assert asking.get("/api/runs", headers={"host": host}).status_code == status, host
    assert asking.get("/api/runs", headers={"host": "box.lan", TOKEN: ""}).status_code == 403
