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


def replace_file(path: Path, *pieces: bytes | memoryview, former: Path | None = None) -> None:
    """Puts a new file in the place of what is there. Whoever is cut off here, by a crash or the power, leaves the old file.

    It is written beside its place as `<name>.part`, and renamed once it is on the disk: a rename may get there before what was written.
    A link stays one, to the new file; what is no file, as a pipe or /dev/stdout, is written to.

    Args:
        path: of the file, in a folder that is there.
        pieces: its content, one after the other.
        former: where what is there goes first. Between these two renames there is no file at `path`.

    Raises:
        OSError: if it cannot be written; what was there before stands.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            file.writelines(pieces)
        return
    path = path.resolve()
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk is not filled further
        raise
    if former is not None and path.exists():
        os.replace(path, former)
    os.replace(part, path)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """As `replace_file`, of text in UTF-8."""
    replace_file(path, text.encode())


def _sync_folder(folder: Path) -> None:
    """Makes renames survive a power cut; where folders cannot be opened (Windows), that is left to the system."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
