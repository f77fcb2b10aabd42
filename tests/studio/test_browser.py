"""The studio in a real browser: Debian's Chromium, driven by Selenium, against a real server."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
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

UNNAMED = """
return [...document.querySelectorAll('a, button, input, select, textarea, progress, svg, [role=region]')]
  .filter((one) => one.offsetParent !== null || one.tagName === 'svg')
  .filter((one) => !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim()))
  .map((one) => one.outerHTML.slice(0, 200));
"""
FAINT = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return 'rgb(255, 255, 255)';
};
return [...document.querySelectorAll('body *')].filter((one) => one.offsetParent && [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
  .filter((one) => {
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map((one) => one.outerHTML.slice(0, 120));
"""


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


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
    """Nothing that the browser complains of, no control without a name, no text too faint to read, nothing wider than a phone."""
    assert [line for line in browser.get_log("browser") if "403" not in line["message"]] == []
    assert browser.execute_script(UNNAMED) == []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        assert browser.execute_script(FAINT) == [], scheme
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
    begun = begin(make_checkpoint("llama"), corpus, run)
    try:
        until(lambda: "trains" in read(browser, "#runs tbody"))
        first = until(lambda: re.search(r"(\d+) steps of", read(browser, "#runs-shown")))
        until(lambda: int(re.search(r"(\d+) steps of", read(browser, "#runs-shown"))[1]) > int(first[1]))
        assert browser.title == "Runs - oomless studio"
        assert len(browser.find_elements(By.CSS_SELECTOR, "#runs-shown svg")) == 5
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


def test_a_plan_from_an_empty_page_to_a_command_that_trains(browser, serve, make_checkpoint, corpus, tmp_path):
    """By keyboard; a second tab asks the same and something else, and does not wait; the address is the question."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    model = tmp_path / "models" / "tiny"
    shutil.copytree(make_checkpoint("llama"), model)
    _, address = serve(tmp_path / "models")
    browser.get(address)
    browser.find_element(By.LINK_TEXT, "Plan").click()
    until(lambda: browser.execute_script("return document.querySelectorAll('#plan-models option').length") > 400)
    browser.find_element(By.ID, "plan-model").send_keys(
        "tiny", Keys.TAB, "virtual:256MiB", Keys.TAB, "64", Keys.TAB, "1M"
    )
    browser.execute_script("document.querySelector('#plan-form details').open = true")
    browser.find_element(By.ID, "plan-trainable").send_keys("lora")
    browser.find_element(By.ID, "plan-quantization").send_keys("nf4")
    browser.find_element(By.ID, "plan-optimizer").send_keys("AdamW", Keys.ENTER)
    browser.find_element(By.ID, "plan-model").send_keys(Keys.ENTER)
    until(lambda: "model=tiny&gpu=virtual%3A256MiB" in browser.current_url)
    until(lambda: re.search(r"\d+ s", read(browser, "#plan-answers")), 10)
    question, asked = browser.current_window_handle, browser.current_url

    browser.switch_to.new_window("tab")
    browser.get(asked.replace("gpu=virtual%3A256MiB", "gpu=NoSuchGpu"))
    until(lambda: "NoSuchGpu" in read(browser, "#plan-answers .error"))
    browser.get(asked)

    for tab in (browser.current_window_handle, question):
        browser.switch_to.window(tab)
        command = until(lambda: read(browser, "pre[aria-label=Command]"), 240)
    no_faults(browser)
    browser.find_element(By.CSS_SELECTOR, "button.copy").click()
    until(lambda: browser.find_element(By.CSS_SELECTOR, "button.copy").text != "Copy")
    assert command.startswith("oomless train --model=")
    trained = oomless(
        *command.split()[1:-4],
        *(
            "--data",
            corpus,
            "--output-dir",
            tmp_path / "run",
            "--max-steps",
            1,
            "--learning-rate",
            "1e-3",
            "--eval-fraction",
            0,
        ),
    )
    assert command.split()[-4:] == ["--data", "...", "--output-dir", "..."]
    assert trained.returncode == 0, trained.stderr


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


def test_a_pasted_log_is_explained(browser, serve, tmp_path):
    from selenium.webdriver.common.by import By

    _, address = serve(tmp_path)
    browser.get(address)
    browser.find_element(By.LINK_TEXT, "Explain").click()
    browser.find_element(By.ID, "explain-log").send_keys(f"{HOSTILE} {LOG}")
    browser.find_element(By.CSS_SELECTOR, "#explain-form button").click()
    until(lambda: "answered" in read(browser, "#explain-said"))
    assert "1002.00 MiB" in read(browser, "#explain-answers")
    assert browser.title == "Explain - oomless studio"
    no_faults(browser)
