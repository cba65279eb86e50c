"""Take docs/app.png: PYTHONPATH=tests python tests/deploy/app_screenshot.py MODEL EXAMPLES docs/app.png"""

import os
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from test_app import ARGUMENTS, CHROMIUM

from nxtp.inference.recognizer import Recognizer


def main(model: str, examples: str, out: str) -> None:
    with tempfile.TemporaryDirectory() as uploads, sync_playwright() as driver:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        from nxtp.deploy.app.page import launch, make_page

        page = make_page(Recognizer.from_pretrained(model, device="cpu"), Path(examples))
        address = launch(page, Path(uploads), "127.0.0.1", 18741, 1 << 20)
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        shown = browser.new_page(viewport={"width": 1080, "height": 840})
        shown.goto(address)
        shown.locator("button.gallery-item").nth(1).click()
        rows = shown.locator("#labels .row")
        rows.first.wait_for()
        shown.locator("button.gallery-item").nth(5).click()  # the first prediction warms up
        shown.wait_for_timeout(1500)
        rows.first.click()
        shown.locator("#look img").wait_for()
        shown.wait_for_timeout(1000)
        shown.screenshot(path=out)
        browser.close()
        page.close(verbose=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
