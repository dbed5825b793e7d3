"""Files that are written as a whole or not at all, and files and folders that one process at a time may write.

One that dies gives them free. Without POSIX locks there is no protection.
"""

import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


def write_text(path: Path, text: str) -> None:
    """Puts `text` in the place of what is there; whoever is cut off here leaves the old file."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def hold(path: Path, *, wait: bool) -> IO[bytes]:
    """Opens a lock file, made if there is none, and holds it until it is closed.

    Raises:
        BlockingIOError: if another holds it, and there is to be no waiting.
        OSError: if it cannot be made, or the file system has no locks.
    """
    file = open(path, "ab")  # noqa: SIM115, whose closing gives the lock free
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            file.close()
            raise
    return file


def hold_run(folder: Path) -> IO[bytes] | None:
    """Holds the folder of a run until what it returns is closed; None where the file system has no locks.

    Raises:
        ValueError: if another process, or another writer of this one, holds it.
    """
    try:
        return hold(folder / LOCK_FILE, wait=False)
    except BlockingIOError:
        raise ValueError(
            f"{folder}: found another process that writes to this run, allowed one; wait for it, or choose another folder"
        ) from None
    except OSError:
        return None
