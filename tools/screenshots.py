"""The pictures of docs/atlas.md, as Chromium draws them: atlas-slide.jpg and atlas-gallery.jpg.

    make demo
    .venv/bin/lgd synth runs/drawn --slides-only 1
    .venv/bin/python tools/screenshots.py --model runs/demo --slides runs/drawn/HE

The first slide is scored, and its middle queried; of the gallery it is the first patch of the split test that has the
highest label.
"""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
SIZE = 1280, 860
_QUALITY = 85
_SECONDS = 1800
"""In which a slide is scored."""


@contextmanager
def run_service(*options: str) -> Iterator[str]:
    """The address of `lgd serve`, which runs meanwhile."""
    command = [sys.executable, "-m", "lgd", "serve", "--port=0", *options]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            found = (line.split()[3] for line in process.stdout if line.startswith("LGD answers at "))
            if not (url := next(found, "")):
                raise SystemExit("lgd serve did not start: its message stands above")
            yield url
        finally:
            process.send_signal(signal.SIGTERM)


class Browser:
    """A page in Chromium."""

    def __init__(self, url: str) -> None:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in ("headless=new", "no-sandbox", "force-prefers-reduced-motion", f"window-size={SIZE[0]},{SIZE[1]}"):
            options.add_argument(f"--{flag}")
        self.driver = Chrome(options, ChromeService(shutil.which("chromedriver")))
        size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(url)

    def wait(self, script: str) -> None:
        """Until a script gives something true."""
        WebDriverWait(self.driver, _SECONDS).until(lambda driver: driver.execute_script(f"return {script}"))

    def find(self, selector: str) -> WebElement:
        """An element, once it is seen."""
        self.wait(f"document.querySelector({selector!r})?.checkVisibility()")
        return self.driver.find_element("css selector", selector)

    def save(self, path: Path) -> None:
        """The window, once an answer is there with all images."""
        self.wait("document.querySelector('.neighbours') && [...document.images].every((one) => one.naturalWidth)")
        # What the keyboard has in focus is framed.
        self.driver.execute_script("document.activeElement.blur()")
        shots = [b"", self.driver.get_screenshot_as_png()]
        while shots[-1] != shots[-2]:
            time.sleep(1)
            shots.append(self.driver.get_screenshot_as_png())
        Image.open(io.BytesIO(shots[-1])).convert("RGB").save(path, quality=_QUALITY, optimize=True)
        print(path, path.stat().st_size // 1000, "KB")


def draw_pictures(url: str, out: Path) -> None:
    """Both pictures."""
    browser = Browser(url)
    try:
        browser.find("#slides button").click()
        browser.wait("document.getElementById('slide-state').innerText")
        if (score := browser.driver.find_element("id", "score-slide")).is_displayed():
            score.click()
        browser.find("#slide-score table")
        browser.find(".openseadragon-canvas").send_keys(Keys.ENTER)
        browser.save(out / "atlas-slide.jpg")
        browser.find("#open-gallery").click()
        Select(browser.find("#split")).select_by_value("test")
        label = Select(browser.find("#label"))
        label.select_by_index(len(label.options) - 1)
        browser.wait("document.querySelectorAll('#patches img').length")
        browser.find("#patches button").click()
        browser.save(out / "atlas-gallery.jpg")
    finally:
        browser.driver.quit()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", help="the run")
    parser.add_argument("--slides", default="runs/drawn/HE", help="folder of slides")
    parser.add_argument("--out", default=ROOT / "docs", type=Path, help="folder of the pictures")
    arguments = parser.parse_args()
    with run_service("--model", arguments.model, "--slides", arguments.slides) as url:
        draw_pictures(url, arguments.out)


if __name__ == "__main__":
    main()
