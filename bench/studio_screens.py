"""Pictures of an open studio, to look at: each room light and dark, wide and on a phone; how soon it is painted and answers, and how it scrolls.

    oomless studio runs --no-open            # prints ADDRESS
    python bench/studio_screens.py ADDRESS FOLDER '#runs?run=first' '#plan?model=Qwen/Qwen2.5-0.5B&gpu=T4&max_seq_length=1024'
    python bench/studio_screens.py ADDRESS FOLDER '#explain' error.log

A log is explained in the room that stands before it. Needs chromium and chromedriver. Of a room are printed: the first paint after the
page was asked for; its first chart after it was asked, which of a plan is the first bar; the share of frames of two seconds of scrolling that came
within 1/30 s, and the longest. A room is drawn when its answer is there, or after three minutes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
SIZES = {"wide": (1280, 1500, False), "phone": (390, 1500, True)}
FORM_S = 10
"""So long a person takes to fill a form in, in which what a search needs is imported."""

WAIT_S = 180
PAINTED = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
DRAWN = "return document.querySelector('section:not([hidden]) article :is(svg, pre)') !== null"
GOING = "return document.querySelector('section:not([hidden]) [aria-busy=true]') !== null"
ASK = """
document.querySelector('#explain-log').value = arguments[0];
document.querySelector('#explain-form button').click();
"""
FRAMES = """
const done = arguments[0], times = [];
const end = document.documentElement.scrollHeight - innerHeight;
const next = (now) => {
  times.push(now);
  const share = (now - times[0]) / 2000;
  scrollTo(0, end * (1 - Math.abs(1 - 2 * share)));
  if (share < 1) requestAnimationFrame(next);
  else {
    scrollTo(0, 0);
    done(times.slice(1).map((time, number) => time - times[number]));
  }
};
requestAnimationFrame(next);
"""


def open_browser() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in (*FLAGS, f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def main(address: str, folder: Path, asked: list[str]) -> None:
    browser = open_browser()
    browser.get(address)
    for place, room in enumerate(asked):
        if room.startswith("#"):
            following = asked[place + 1 : place + 2]
            draw(browser, address.split("#")[0] + room, room, folder, next((o for o in following if o[0] != "#"), None))
    browser.quit()


def draw(browser: Any, address: str, room: str, folder: Path, log: str | None) -> None:
    browser.get(address.partition("?")[0])
    browser.refresh()
    if not room.startswith("#runs"):
        time.sleep(FORM_S)
    painted = browser.execute_script(PAINTED)
    browser.get(address)
    if log is not None:
        browser.execute_script(ASK, Path(log).read_text(encoding="utf-8"))
    began = time.monotonic()
    while not browser.execute_script(DRAWN) and time.monotonic() < began + WAIT_S:
        time.sleep(0.02)
    first = time.monotonic() - began
    while browser.execute_script(GOING) and time.monotonic() < began + WAIT_S:
        time.sleep(0.1)
    time.sleep(1)
    frames = browser.execute_async_script(FRAMES)
    print(
        f"{room}: first paint after {painted:.0f} ms, first chart after {1000 * first:.0f} ms; scrolling, "
        f"{sum(frame < 1000 / 30 for frame in frames) / len(frames):.0%} of {len(frames)} frames within 33 ms, the longest {max(frames):.0f} ms"
    )
    for size, (width, height, mobile) in SIZES.items():
        for scheme in ("light", "dark"):
            how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            time.sleep(0.3)
            browser.save_screenshot(str(folder / f"studio-{room.partition('?')[0].strip('#')}-{size}-{scheme}.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
