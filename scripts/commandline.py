"""What command lines of several scripts share: errors in one line, folders that are tried before hours of work, signals."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        print(f"{self.prog}: {message}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)

    def check_writable(self, option: str, folder: Path) -> None:
        """Makes the folder if there is none; an error of `option` if files cannot be written there."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            self.error(
                f"{option}: found {folder}, which cannot be made or written ({error.strerror}); allowed a folder that can"
            )

    def check_file(self, option: str, file: Path) -> None:
        """An error of `option` if the file cannot be written, or its folder does not exist."""
        if not file.parent.is_dir() or file.is_dir():
            self.error(f"{option}: found {file}; allowed a file in a folder that exists")
        self.check_writable(option, file.parent)


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes an integer within bounds."""
    last = "2**32 - 1" if most == 2**32 - 1 else most  # of seeds, as config files are told

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            allowed = f"of at least {least}" if most is None else f"from {least} to {last}"
            raise argparse.ArgumentTypeError(f"found {text!r}; allowed an integer {allowed}")
        return int(text)

    return parse


def why_it_failed(code: int, output: str) -> str:
    """The reason why a program ended with another exit code than 0, in one line, from what it wrote last.

    That is the last line; after a traceback, the exception before it, as a message of several lines ends without the type.
    """
    if code < 0:  # it had no time to say why
        return f"ended by signal {-code}, {signal.strsignal(-code)}"
    _, traceback, rest = output.rstrip().rpartition("Traceback (most recent call last):\n")
    lines = rest.split("\n")
    last = lines[-1].rpartition("\r")[2].strip()  # of a progress bar, as it looked in the end
    raised = next((line for line in lines if line and not line[0].isspace()), last) if traceback else last
    return (raised if raised == last else f"{raised} ... {last}") or f"exit code {code}"


def stop_as_ctrl_c_does() -> None:
    """Has SIGTERM and SIGHUP raise KeyboardInterrupt, unless they are ignored, as SIGHUP is under nohup."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
