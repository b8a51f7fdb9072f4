"""The browser of the viewer's tests, and the type of the fixture that starts a viewer."""

import shutil
from collections.abc import Callable

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
Viewer = Callable[..., str]
