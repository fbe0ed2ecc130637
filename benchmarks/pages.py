"""The step `pages` of reliability.py: how large reports are, and how soon a browser opens them."""

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from tradeoff import ROOT

FOLDER = ROOT / "build" / "reports"  # a stopped report goes on there
WIDTHS = {"phone": (390, 844), "desk": (1440, 900)}
RUNS = 5


def make(name: str) -> Path:
    import fallow

    FOLDER.mkdir(parents=True, exist_ok=True)
    fallow.report([name], FOLDER / f"{name}.html")
    return FOLDER / f"{name}.html"


def measure(name: str) -> dict[str, Any]:
    """Seconds until a page has loaded and its first figure is drawn, each time in a new browser."""
    from playwright.sync_api import sync_playwright

    page = make(name)
    found: dict[str, Any] = {"model": name, "mb": page.stat().st_size / 1e6, "seconds": {}}
    faults: list[str] = []
    with sync_playwright() as playwright:
        for kind, (width, height) in WIDTHS.items():
            seconds = []
            for _ in range(RUNS):
                browser = playwright.chromium.launch(
                    executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
                    args=["--no-sandbox"],
                )
                view = browser.new_page(viewport={"width": width, "height": height})
                view.on("pageerror", lambda error: faults.append(str(error)))
                view.on("console", lambda message: faults.append(message.text))
                start = time.monotonic()
                view.goto(page.as_uri(), wait_until="load")
                first = view.locator(".drawing").first
                first.scroll_into_view_if_needed()
                first.locator(".main-svg").first.wait_for()
                seconds.append(time.monotonic() - start)
                found["figures"] = view.locator(".drawing").count()
                browser.close()
            found["seconds"][kind] = {"median": median(seconds), "most": max(seconds)}
    return found | {"faults": faults}
