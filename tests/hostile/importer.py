"""A process that imports archives, one a line of its input, and answers each with a line of JSON.

    python -m tests.hostile.importer SANDBOX

Whatever it opens for writing, makes, moves or removes outside of the destination is reported and not done.
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from pointillist.errors import PointillistError
from pointillist.images import ImageLimits
from pointillist.upkeep.archive import import_run

_WRITES = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0, "os.chmod": 0,
           "os.truncate": 0, "os.mkfifo": 0}  # fmt: skip


class OutsideError(BaseException):
    """Something outside of the destination was about to be written; no handler of errors may catch it."""


def _watch(allowed: Path, seen: list[str]) -> None:
    real = os.path.realpath

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(c in str(mode) for c in "wax+")
        elif event in _WRITES:
            path, writes = arguments[_WRITES[event]], True
        else:
            return
        inside = isinstance(path, int) or Path(real(os.fsdecode(path))).is_relative_to(allowed)
        if writes and not inside and os.fsdecode(path) != os.devnull:
            seen.append(f"{event} {os.fsdecode(path)[:200]}")
            raise OutsideError(event)

    sys.addaudithook(hook)


def main() -> None:
    """Imports until its input ends."""
    destination = Path(sys.argv[1]).resolve() / "imported"
    seen: list[str] = []
    sys.dont_write_bytecode = True
    destination.mkdir(parents=True, exist_ok=True)
    os.chdir(destination)  # where what is named by a folder's descriptor would be looked for
    _watch(destination, seen)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        run, seen[:] = destination / str(number), []
        try:
            counts = import_run(Path(line.rstrip("\n")), run, ImageLimits())
            answer = {"status": "imported", "note": f"{counts.images} images"}
        except PointillistError as error:
            answer = {"status": "refused", "note": str(error)}
        except OutsideError:
            answer = {"status": "outside", "note": "; ".join(seen)}
        except Exception as error:  # the harness names it
            answer = {"status": "failed", "note": f"{type(error).__name__}: {error}"}
        if seen:
            answer = {"status": "outside", "note": "; ".join(seen)}
        shutil.rmtree(run, ignore_errors=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**answer, "note": answer["note"][:300], "peak_kib": peak}), flush=True)


if __name__ == "__main__":
    main()
