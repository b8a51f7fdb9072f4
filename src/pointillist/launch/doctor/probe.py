"""The other process of the folder's check: what does it see of what this one writes?

Run as `python -m pointillist.launch.doctor.probe FOLDER`; prints one line of JSON. It imports nothing but the standard
library, so that it starts at once.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Final

PATIENCE_SECONDS: Final = 10.0
"""How long either side waits for a file of the other."""

FROM_DOCTOR: Final = "from-doctor"
FROM_PROBE: Final = "from-probe"
SWAPPED: Final = "swapped"
"""A file that is replaced again and again; every reader must see one version or another, whole."""

STOP: Final = "stop"


def wait_for(path: Path) -> float | None:
    """Seconds until a file could be seen; None if it could not."""
    started = time.monotonic()
    while not path.exists():
        if time.monotonic() - started > PATIENCE_SECONDS:
            return None
        time.sleep(0.002)
    return time.monotonic() - started


def main(folder: Path) -> None:
    """Reads, answers, and then watches `SWAPPED` until `STOP` is there."""
    seen = wait_for(folder / FROM_DOCTOR) is not None
    digest = hashlib.sha256((folder / FROM_DOCTOR).read_bytes()).hexdigest() if seen else None
    (folder / FROM_PROBE).write_text(str(digest), encoding="ascii")
    deadline = time.monotonic() + PATIENCE_SECONDS
    reads = missing = torn = 0
    while not (folder / STOP).exists() and time.monotonic() < deadline:
        reads += 1
        try:
            data = (folder / SWAPPED).read_bytes()
        except OSError:
            missing += 1
        else:
            torn += not data or data != data[:1] * len(data)
    print(json.dumps({"reads": reads, "missing": missing, "torn": torn}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
