"""The studio in a real browser: Debian's Chromium, driven by Selenium, against a real server."""

import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import axe_core_python
import pytest
import yaml
from tests.cli.test_cli import ENVIRONMENT, oomless
from tests.studio.test_explain import LOG
from tests.studio.test_runs import begin

from oomless.training.run_files import writer

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
    ),
]
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900"),
)
HOSTILE = "<img src=x onerror=document.title='taken'>"

SEED = "meta-llama/Llama-3.2-1B"
DROP = """
const given = new DataTransfer();
given.items.add(new File([arguments[0]], "error.log"));
document.querySelector("#explain-log").dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
"""
AXE = Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
FAULTS = """
const done = arguments[0];
axe.run().then((found) => done(found.violations.map((one) => [one.impact, one.id, ...one.nodes.map((node) => node.html.slice(0, 200))])));
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One for all, as each server is another origin to it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """It with one tab, empty, and with no complaints of earlier pages."""
    first, *others = chromium.window_handles
    for tab in others:
        chromium.switch_to.window(tab)
        chromium.close()
    chromium.switch_to.window(first)
    chromium.get("about:blank")
    chromium.get_log("browser")
    return chromium


@pytest.fixture
def serve(tmp_path):
    """A function that starts the studio of a folder and returns its process and its address."""
    started = []

    def start(folder):
        command = [sys.executable, "-m", "oomless", "studio", str(folder), "--no-open"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        started.append(process)
        return process, re.search(r"http://\S+", process.stdout.readline())[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(found, seconds=120):
    """Return what ``found`` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return answer


def read(browser, selector):
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def no_faults(browser):
    """Nothing that the browser complains of, nothing that axe-core finds, light and dark, and nothing wider than a phone."""
    refused = re.compile("status of (403|422)")  # which the page tells
    assert [line for line in browser.get_log("browser") if not refused.search(line["message"])] == []
    browser.execute_script(AXE)
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        assert browser.execute_async_script(FAULTS) == [], scheme
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_run_is_watched_stopped_and_resumed_and_outlives_the_studio(
    browser, serve, make_checkpoint, corpus, tmp_path
):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    top = tmp_path / "runs"
    run = top / HOSTILE.replace("/", "")
    top.mkdir()
    studio, address = serve(top)
    browser.get(address)
    until(lambda: "No run lies below" in read(browser, "#runs"))
    assert "token" not in browser.current_url
    begun = begin(make_checkpoint("llama"), corpus, run, "--sample-prompts", HOSTILE, "--sample-tokens", "2")
    try:
        until(lambda: "trains" in read(browser, "#runs tbody"))
        first = until(lambda: re.search(r"(\d+) steps of", read(browser, "#runs-shown")))
        until(lambda: int(re.search(r"(\d+) steps of", read(browser, "#runs-shown"))[1]) > int(first[1]))
        assert browser.title == "Runs - oomless studio"
        assert len(browser.find_elements(By.CSS_SELECTOR, "#runs-shown svg")) == 5
        assert f"Written on the way\n{HOSTILE}\nafter step 0" in read(browser, "#runs-shown")
        no_faults(browser)
        # By keyboard alone.
        browser.execute_script("document.querySelector('#runs tbody button[data-does=stop]').focus()")
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        assert begun.wait(60) == 130
    finally:
        begun.kill()
        begun.communicate()
    until(lambda: "stopped" in read(browser, "#runs tbody"))
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "button[data-does=resume]"))[0].click()
    until(lambda: "trains" in read(browser, "#runs tbody"))
    os.kill(writer(run).pid, signal.SIGKILL)
    until(lambda: "stopped" in read(browser, "#runs tbody"))
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "button[data-does=resume]"))[0].click()
    until(lambda: "trains" in read(browser, "#runs tbody"))
    process = writer(run)
    try:
        os.killpg(studio.pid, signal.SIGINT)
        assert studio.wait(30) == 0
        until(lambda: "The studio does not answer" in read(browser, "#trouble"))
        assert writer(run) == process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def test_who_does_not_know_the_token_sees_nothing(browser, serve, tmp_path):
    (tmp_path / "secret-run").mkdir()
    (tmp_path / "secret-run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    _, address = serve(tmp_path)
    browser.get(address.split("#")[0])
    until(lambda: "does not know the token" in read(browser, "#trouble"))
    assert "secret-run" not in browser.page_source
    browser.get(address.replace("token=", "token=x"))
    until(lambda: "does not know the token" in read(browser, "#trouble"))
    browser.get("about:blank")
    browser.get(address)
    until(lambda: "secret-run" in read(browser, "#runs tbody"))


def test_a_plan_from_an_empty_page_to_a_run(browser, serve, make_checkpoint, corpus, tmp_path):
    """By keyboard; a second tab asks the same and something else, and does not wait; the address is the question. The command to copy
    has what the YAML has; the run begins from the page, and is compared with the model that it began with."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    top = tmp_path / "work"
    shutil.copytree(make_checkpoint("llama"), top / "tiny")
    shutil.copy(corpus, top / "library.jsonl")
    _, address = serve(top)
    browser.get(address)
    browser.find_element(By.LINK_TEXT, "Plan").click()
    until(lambda: browser.execute_script("return document.querySelectorAll('#plan-models option').length") > 400)
    browser.find_element(By.ID, "plan-model").send_keys(
        "tiny", Keys.TAB, "virtual:256MiB", Keys.TAB, "64", Keys.TAB, "1M"
    )
    browser.execute_script("document.querySelector('#plan-form details').open = true")
    browser.find_element(By.ID, "plan-trainable").send_keys("full")
    browser.find_element(By.ID, "plan-dtype").send_keys("fp32")
    browser.find_element(By.ID, "plan-optimizer").send_keys("AdamW", Keys.ENTER)
    browser.find_element(By.ID, "plan-model").send_keys(Keys.ENTER)
    until(lambda: "model=tiny&gpu=virtual%3A256MiB" in browser.current_url)
    until(lambda: "the weights alone" in read(browser, "#plan-answers svg") or read(browser, "pre[aria-label=Command]"))
    question, asked = browser.current_window_handle, browser.current_url

    browser.switch_to.new_window("tab")
    browser.get(asked.replace("gpu=virtual%3A256MiB", "gpu=NoSuchGpu,virtual%3A0MiB"))
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, "#plan-answers.beside .error")) == 2)
    browser.get(asked)
    for tab in (browser.current_window_handle, question):
        browser.switch_to.window(tab)
        command = until(lambda: read(browser, "pre[aria-label=Command]"), 240)
    no_faults(browser)
    browser.find_element(By.CSS_SELECTOR, "button.copy").click()
    until(lambda: browser.find_element(By.CSS_SELECTOR, "button.copy").text != "Copy")
    assert command.startswith("oomless train --model=")
    assert command.split()[-4:] == ["--data", "...", "--output-dir", "..."]
    options = yaml.safe_load(read(browser, "pre[aria-label=YAML]"))
    assert sorted(command.split()[2:-4]) == sorted(
        f"--{name.replace('_', '-')}={value}" for name, value in options.items()
    )

    # What the slider rests on is asked, and the pick of each stop is told.
    slider = browser.find_element(By.ID, "plan-way-max_seq_length")
    assert slider.get_attribute("aria-valuetext").startswith("64 tokens: full, AdamW, ")
    browser.get(asked.replace("max_seq_length=64", "max_seq_length=256"))
    until(lambda: read(browser, "pre[aria-label=Command]"), 240)
    browser.find_element(By.ID, "plan-way-max_seq_length").send_keys(Keys.ARROW_RIGHT)
    until(lambda: "max_seq_length=512" in browser.current_url)
    until(lambda: "512 tokens" in read(browser, "#plan-ways p"), 240)
    assert "256 tokens to 512 tokens: full, AdamW" in read(browser, "#plan-ways p")

    browser.get(asked)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#plan-way-gpu"), 60).pop().send_keys(Keys.ARROW_RIGHT)
    until(lambda: "gpu=virtual" not in browser.current_url)
    told = "return document.querySelector('#plan-way-gpu')?.getAttribute('aria-valuetext') ?? ''"
    until(lambda: ": full, AdamW, " in browser.execute_script(told), 240)
    assert f"gpu={browser.execute_script(told).split(':')[0].replace(' ', '+')}" in browser.current_url

    browser.get(asked)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, ".begin"), 60)
    for name, value in (("data", "library.jsonl"), ("name", HOSTILE), ("max_steps", "2"), ("sample_prompts", "def")):
        browser.find_element(By.CSS_SELECTOR, f".begin [name={name}]").send_keys(value)
    browser.find_element(By.CSS_SELECTOR, ".begin [name=name]").send_keys(Keys.ENTER)
    until(lambda: "img src=x" in read(browser, "#runs tbody"))
    until(lambda: "finished" in read(browser, "#runs tbody"), 240)
    until(lambda: "after step 2" in read(browser, "#runs-shown"))
    no_faults(browser)

    browser.find_element(By.LINK_TEXT, "Compare").click()
    until(lambda: "not compared yet" in read(browser, "#compare-answers"))
    browser.find_element(By.ID, "compare-texts").send_keys(f"import {HOSTILE}")
    browser.find_element(By.CSS_SELECTOR, "#compare-form button").click()
    until(lambda: "answered" in read(browser, "#compare-said"))
    assert f"import {HOSTILE}" in read(browser, "#compare-answers")
    assert "library.jsonl" in read(browser, "#compare-answers td")
    no_faults(browser)
    assert browser.title == "Compare - oomless studio"


def test_the_seed_case_from_an_empty_page_to_a_command_that_trains(browser, serve, make_checkpoint, corpus, tmp_path):
    """The command is copied; what it sets trains, here with a small model in the place of the one that is not on this machine. Then every
    other GPU is asked for, and the page left: the search ends."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "work").mkdir()
    studio, address = serve(tmp_path / "work")
    browser.get(address)
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    browser.find_element(By.LINK_TEXT, "Plan").click()
    known = "return [...document.querySelectorAll('#plan-models option')].some((one) => one.value === arguments[0])"
    until(lambda: browser.execute_script(known, SEED))
    browser.find_element(By.ID, "plan-model").send_keys(SEED, Keys.TAB, "T4", Keys.TAB, "512", Keys.ENTER)
    until(lambda: read(browser, "pre[aria-label=Command]"), 400)
    assert f"{SEED} on T4" in read(browser, "#plan-answers")
    no_faults(browser)
    browser.find_element(By.CSS_SELECTOR, "button.copy").click()
    until(lambda: browser.find_element(By.CSS_SELECTOR, "button.copy").text == "Copied")
    copied = browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    program, verb, *options = shlex.split(copied)
    assert (program, verb, options[-4:]) == ("oomless", "train", ["--data", "...", "--output-dir", "..."])
    assert {f"--model={SEED}", "--max-seq-length=512"} <= set(options)
    larger = make_checkpoint("llama", hidden_size=256, intermediate_size=700, vocab_size=4096)
    here = ("--model", larger, "--gpu", "virtual:1GiB", "--data", corpus, "--output-dir", tmp_path / "run")
    trained = oomless(verb, *options[:-4], *here, "--max-steps", 1, "--eval-fraction", 0)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "model").is_dir()

    hit = "return [...document.querySelectorAll('#plan-answers svg .hit title')].map((one) => one.textContent)"
    named = [said for said in browser.execute_script(hit) if said.startswith("weights: ")]
    assert any("model.embed_tokens.weight" in said for said in named), named
    assert "model.embed_tokens.weight" in read(browser, "#plan-answers")
    browser.find_element(By.CSS_SELECTOR, "[aria-label='Plan every GPU']").click()
    until(lambda: re.search(r"; \d+ to plan", read(browser, "#plan-around-said")) and searching(studio))
    busy = searching(studio)
    browser.find_element(By.LINK_TEXT, "Runs").click()
    until(lambda: busy - searching(studio))
    until(lambda: not read(browser, "#plan-around-said"))


def searching(studio):
    """The processes of a studio that search or could."""
    listed = subprocess.run(
        ["pgrep", "-P", str(studio.pid), "-f", "oomless.studio.worker"], capture_output=True, text=True
    )
    return set(listed.stdout.split())


def test_a_long_run_is_small_on_the_page(browser, serve, tmp_path):
    """100,000 steps are as few elements as 300, and are drawn anew within a second of the browser's time."""
    run = tmp_path / "long"
    run.mkdir()
    record = {
        "learning_rate": 1e-4,
        "tokens_per_second": 5.0,
        "memory_bytes": 1 << 20,
        "peak_memory_bytes": 1 << 21,
        "gradient_norm": 1.0,
    }
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 2.0 + n % 7, **record}) + "\n" for n in range(1, 100_001))
    )
    _, address = serve(tmp_path)
    browser.get(address)
    until(lambda: "100,000 steps" in read(browser, "#runs-shown"))
    assert browser.execute_script("return document.querySelectorAll('*').length") < 5000


def test_a_pasted_log_and_a_snapshot_are_explained(browser, serve, tmp_path):
    from selenium.webdriver.common.by import By

    _, address = serve(tmp_path)
    browser.get(address)
    browser.find_element(By.LINK_TEXT, "Explain").click()
    browser.execute_script(DROP, f"{HOSTILE} {LOG}")
    until(lambda: browser.find_element(By.ID, "explain-log").get_property("value") == f"{HOSTILE} {LOG}")
    browser.find_element(By.ID, "explain-log").clear()
    browser.find_element(By.ID, "explain-log").send_keys(f"{HOSTILE} {LOG}")
    browser.find_element(By.CSS_SELECTOR, "#explain-form button").click()
    until(lambda: "answered" in read(browser, "#explain-said"))
    assert "1002.00 MiB" in read(browser, "#explain-answers")
    assert "What filled the GPU, by the message" in read(browser, "#explain-answers")
    assert browser.title == "Explain - oomless studio"
    no_faults(browser)
    (tmp_path / f"{HOSTILE.replace('/', '')}.pickle").write_bytes(pickle.dumps(os.getcwd))
    browser.find_element(By.ID, "explain-log").clear()
    browser.find_element(By.ID, "explain-file").send_keys(str(next(tmp_path.glob("*.pickle"))))
    until(lambda: "Snapshot: <img" in read(browser, "#explain-taken"))
    browser.find_element(By.CSS_SELECTOR, "#explain-form button").click()
    until(lambda: "could run code: refused" in read(browser, "#explain-answers .error"))
    no_faults(browser)
