"""Pictures of an open studio, to look at: each room light and dark, wide and on a phone; and how soon its first paint was.

    oomless studio runs --no-open            # prints ADDRESS
    python bench/studio_screens.py ADDRESS FOLDER '#runs?run=first' '#plan?model=Qwen/Qwen2.5-0.5B&gpu=T4&max_seq_length=1024'

Needs chromium and chromedriver. A plan that is not answered yet is drawn as it is after ten seconds.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
SIZES = {"wide": (1280, 900, False), "phone": (390, 844, True)}
WAIT_S = 10
PAINTED = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def main(address: str, folder: Path, rooms: list[str]) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in (*FLAGS, f"--user-data-dir={tempfile.mkdtemp()}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    browser.get(address)
    for room in rooms:
        browser.get(address.split("#")[0] + room)
        browser.refresh()
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and not browser.execute_script(
            "return document.querySelector('section:not([hidden]) svg')"
        ):
            time.sleep(0.1)
        time.sleep(1)
        print(f"{room}: first paint after {browser.execute_script(PAINTED):.0f} ms")
        for size, (width, height, mobile) in SIZES.items():
            for scheme in ("light", "dark"):
                how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                browser.save_screenshot(str(folder / f"studio-{room.partition('?')[0].strip('#')}-{size}-{scheme}.png"))
    browser.quit()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
