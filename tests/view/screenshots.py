"""Pictures of every page for the documentation.

python -m tests.view.screenshots http://127.0.0.1:8000 ROLLOUT GROUP docs/images
"""

import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, sync_playwright

from tests.view.browser import CHROMIUM


def main() -> None:
    address, rollout, group, folder = sys.argv[1:]
    pages = {
        "overview": ("/", 1280, 1000, "light"),
        "rollouts": ("/runs/0/rollouts?split=train", 1280, 800, "light"),
        "group": (f"/runs/0/group?id={quote(group)}", 1280, 800, "light"),
        "rollout": (f"/runs/0/rollout?id={quote(rollout)}", 1280, 1100, "light"),
        "store": ("/runs/0/store", 1280, 800, "light"),
        "dark": ("/", 1280, 1000, "dark"),
        "phone": (f"/runs/0/rollout?id={quote(rollout)}", 390, 844, "dark"),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (path, width, height, scheme) in pages.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.goto(address.rstrip("/") + path, wait_until="networkidle")
            if name == "rollout":
                _point(page)
            page.screenshot(path=Path(folder) / f"view-{name}.png")
            context.close()
        browser.close()


def _point(page: Page) -> None:
    """The least likely token under the pointer."""
    tokens = page.locator(".t").all()
    page.evaluate("scrollTo(0, 0)")
    min(tokens, key=lambda token: float(token.get_attribute("data-p") or 1)).hover()


if __name__ == "__main__":
    main()
