"""How a file appears on a disk, whole or not at all, and how one is opened that may be something else.

`write_atomically` leaves the order on the disk to the file system; a caller that must know that a name
is there for good calls `flush_folder`.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_private(path: str, flags: int) -> int:
    """An `opener` of files that may hold secrets: a new one is readable for its user only, whatever the umask."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_atomically(path: Path, data: bytes, *, private: bool = False, durable: bool = True) -> None:
    """Writes a file so that it appears whole or not at all.

    Args:
        path: The file; its folder is made if it is not there.
        data: Its bytes.
        private: Whether it is readable for its user only, whatever the umask.
        durable: Whether its bytes are on the disk before it gets its name. Without that it appears whole to other
            processes, but may be empty after the machine has lost power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if private:
        temporary.unlink(missing_ok=True)
    with open(temporary, "wb", opener=open_private if private else None) as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; never waits, as a named pipe in its place would make it.

    Raises:
        OSError: It is not there, cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def flush_folder(folder: Path) -> None:
    """Returns once the names in a folder are on disk, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not flush folders
            raise
    finally:
        os.close(descriptor)
