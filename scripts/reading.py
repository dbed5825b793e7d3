"""Pages that a program writes and a hand continues: what was written by hand stays."""

from pathlib import Path

from dni_rl.files import write_text

READING = "**Reading.**"  # what stands on a page from here on was written by hand, and stays


def handwritten(page: Path, made_by: str) -> str:
    """What stands on a page from `READING` on; empty if nothing, or if there is no page.

    Args:
        page: its file.
        made_by: stands above that on every page of the program.

    Raises:
        ValueError: if what stands above that is not the program's, which would be lost.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):  # of the second, whoever makes the folder tells
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(
            f"{page}: found a file that cannot be read ({why}); allowed a page that this program made, or none; take another name"
        ) from error
    above, mark, below = text.partition(READING)
    if above.strip() and made_by not in above:
        raise ValueError(
            f"{page}: found a page that this program did not make; allowed one that it made, or none; take another name, or begin that "
            f"page with {READING}, and it stays below the report"
        )
    return mark + below


def write_above(page: Path, text: str, kept: str) -> None:
    """Writes a page, with what `handwritten` returned below it."""
    write_text(page, text + (f"\n{kept}" if kept else ""))
