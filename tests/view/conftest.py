"""A real viewer in a process of its own, and a real browser: `make test-view`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.helpers.made_run import MadeRun
from tests.helpers.processes import digits_run, wait_for  # noqa: F401 - one is a fixture
from tests.view.browser import CHROMIUM, Viewer


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 800})
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page on which no script may fail."""
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None)
    yield opened
    assert errors == []


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run")


@pytest.fixture
def viewer(tmp_path: Path) -> Iterator[Viewer]:
    """Starts `pointillist view` on runs; gives the address that it prints, without a slash at the end.

    `indexed` waits for the index; a run that is going, or one behind a token, is not waited for.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, indexed: bool = True) -> str:
        command = [sys.executable, "-m", "pointillist", "view", *map(str, arguments)]
        environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
        started.append(process)
        line = process.stdout.readline()
        assert ": http://" in line, line + process.stdout.read()
        address = line.split()[-1].rstrip("/")
        if indexed:
            runs = [index for index, argument in enumerate(arguments) if isinstance(argument, Path)]
            wait_for(lambda: all(_status(address, index)["percent"] == 100 for index in runs), seconds=600)
        return address

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=900)
        assert "Traceback" not in output, output


def _status(address: str, run: int) -> dict[str, Any]:
    return dict(httpx.get(f"{address}/runs/{run}/status", trust_env=False).json())
