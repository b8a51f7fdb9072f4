"""Where the tests lie, and what a process holds open."""

import contextlib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def open_files(folder: Path) -> list[str]:
    """What this process holds open in a folder; threads that other tests have left may open and close other things."""
    held = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it is closed meanwhile, as the one that lists them is
            held.append(str(descriptor.readlink()))
    return [path for path in held if path.startswith(f"{folder.resolve()}/")]
