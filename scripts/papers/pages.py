"""The pages of docs/results, and their list."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dni_rl.files import write_text
from papers.entries import ENTRIES, PRESETS, Entry
from papers.figures import curves_figure, windows_figure
from papers.findings import FREE_FIELDS, fits, planned_runs, section
from papers.tables import comparisons_shown, tables, wrapped
from reading import handwritten, write_above

MADE_BY = "Made by `python scripts/experiments.py report`"  # stands on every page of this script
LIST_START, LIST_END = "<!-- written by scripts/experiments.py report -->", "<!-- end -->"  # in the list of pages
MAX_PICTURE_BYTES = 250_000  # of a program's own figure; larger ones are stored in fewer colours

# Title of a page, and what else to say of it; a page that is not here has its program's own words.
TITLES = {
    "images": (
        "Images with every layer decoupled",
        "Fully connected nets whose layers learn from synthetic gradients; now and then, in random order (p below 1), and on synthetic "
        'inputs as well ("complete unlock"). Jaderberg et al. (2017), sec. 3.1 and appendix, report about 2 % error on MNIST at p = 0.2 '
        "and about 2 % unlocked.",
    ),
    "images_fashion": (
        "Fashion-MNIST with every layer decoupled",
        "The net and the arms of [images](images.md), on a data set that Jaderberg et al. (2017) do not have.",
    ),
    "images_cifar10": (
        "CIFAR-10 with every layer decoupled",
        "Fully connected nets whose layers learn from synthetic gradients. Jaderberg et al. (2017), sec. 3.1.",
    ),
    "cnn": (
        "Convolutional nets with every layer decoupled",
        "Layers of 5 x 5 filters that learn from synthetic gradients of their feature maps. Jaderberg et al. (2017), sec. 3.1.",
    ),
    "greedy_cnn": (
        "A published negative result, run again",
        "Belilovsky et al. (2020) report that on CIFAR-10 a net of three convolutions reaches with DNI far less than by backpropagation. "
        'The arms "published" have the critic as they published it, the others start at zero and have normalised targets.',
    ),
    "copy": (
        "Copy and repeat copy with short windows",
        "Length of the longest episode solved, after Jaderberg et al. (2017), sec. 3.2. `none` is truncated BPTT.",
    ),
    "ptb": (
        "Penn Treebank, character by character",
        "Bits per character with short windows, after Jaderberg et al. (2017), sec. 3.2. `none` is truncated BPTT.",
    ),
    "two_networks": (
        "Two networks at two speeds",
        "Network A ticks at every step and counts odd digits, network B ticks every T steps and counts 3s; what A learns from B's error "
        "is the arm. Jaderberg et al. (2017), sec. 3.3.",
    ),
    "sequential_mnist": (
        "Sequential MNIST",
        "Digits read row by row by a small LSTM, after Pemberton & Costa (2024), whose results no source at hand gives in numbers. "
        "`none` is truncated BPTT, and at the longest window full BPTT.",
    ),
    "understanding": ("Understanding synthetic gradients", "The studies of Czarnecki et al. (2017), part by part."),
    "asynchronous": (
        "Asynchronous layers",
        "Layers that learn in random order in one process, and in processes of their own with messages that are late.",
    ),
}


Content = dict[str, dict[str, dict[str, Any]]]  # sections by preset and entry


def page_text(
    page: str, content: Content, pictures: Mapping[str, Sequence[str]], absent: Mapping[str, Mapping[str, int]]
) -> str:
    """A page without what is written by hand.

    Args:
        page: its name.
        content: all that it shows.
        pictures: file names by preset.
        absent: by preset and entry, how many runs there are to be of what has none yet.
    """
    title, intro = _words(page, content)
    lines = [
        f"# {title}",
        "",
        wrapped(intro),
        "",
        wrapped(
            f"{MADE_BY} from the runs of the commands below; settings, curves and all figures are in [{page}.json]({page}.json). "
            "Intervals over seeds are t intervals. Ratios that are compared are of geometric means, with Welch's t interval of the mean "
            "logarithms (where a seed has 0: of means, without interval); those in columns of results are of means. Seconds are of one "
            "run's training. Published figures are of the papers' settings, whatever the preset."
        ),
    ]
    for preset, sections in content.items():
        lines += ["", f"## Preset `{preset}`"]
        if absent[preset]:
            missing = ", ".join(f"{name} ({count} runs)" for name, count in absent[preset].items())
            lines += ["", wrapped(f"**Not run:** {missing}.")]
        for entry, found in sections.items():
            lines += ["", f"### {entry}"] if len(sections) > 1 else []
            lines += ["", f"    {found['command']}", "", _about(found)]
            for table in tables(found):
                lines += ["", table]
        compared = list(comparisons_shown(sections))
        lines += ["", "### Compared"] if compared and len(sections) > 1 else []
        for shown in compared:
            lines += ["", shown]
        for picture in pictures[preset]:
            lines += ["", f"![{Path(picture).stem.replace('_', ' ')}]({picture})"]
    return "\n".join(lines) + "\n"


def _words(page: str, content: Content) -> tuple[str, str]:
    """Title and introduction."""
    if page in TITLES:
        return TITLES[page]
    found = next(iter(next(iter(content.values())).values()))
    documentation = importlib.import_module(f"dni_rl.experiments.{found['program']}").__doc__ or ""
    return page.replace("_", " ").capitalize(), documentation.strip().partition("\n")[0]


def _about(found: Mapping[str, Any]) -> str:
    """How complete the runs of an entry are, where they were made, and what they have in common."""
    seeds = ", ".join(map(str, found["seeds"]))
    state = "All" if found["finished"] == found["planned"] else "**Not complete:**"
    lines = [f"{state} {found['finished']} of {found['planned']} runs, seeds: {seeds}."]
    if found["missing"]:
        lines.append(wrapped(f"Not finished when this page was made: {', '.join(found['missing'])}."))
    for name, why in found["left_out"].items():
        lines.append(f"Left out: {name} ({why}).")
    lines += _made_on(found["machines"])
    hidden = (*FREE_FIELDS, "eval_every_steps", "arm", "seed")
    settings = [f"{name} {_setting(value)}" for name, value in found["settings"].items() if name not in hidden]
    return "\n".join(lines) + "\n\n" + wrapped(f"Settings of all of them: {', '.join(settings)}.")


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + " ".join(map(str, value)) + ")"
    return f"{value:,}" if type(value) is int else str(value)


def _made_on(machines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each machine that made runs, with the days."""
    days: dict[str, list[str]] = {}
    for call in machines:
        gpu = f"{call['gpu']}, " if call["gpu"] else ""
        what = f"{gpu}{call['processor']}, {call['cores']} cores, PyTorch {call['torch']}"
        days.setdefault(what, []).append(call["date"][:10])
    for what, dates in days.items():
        span = min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"
        yield f"Made on {what}, {span}."


def write_page(page: str, entries: Sequence[Entry], presets: Sequence[str], runs: Path, output: Path) -> str | None:
    """Writes a page with its figures and its JSON; see `_chosen` for what it keeps of an earlier JSON.

    Args:
        page: its name.
        entries: that it shows, each in its presets.
        presets: whose runs to look for.
        runs: folder of all.
        output: folder of the pages.

    Returns:
        In one line what there is, for the list of pages; None if there is nothing.

    Raises:
        ValueError: if a program refuses an entry's options, the page's JSON is damaged, or the page is not of this script.
    """
    file, beside = output / f"{page}.md", output / f"{page}.json"
    new: Content = {}
    for preset in presets:
        of_preset = [entry for entry in entries if preset in entry.presets]
        found = {entry.name: section(entry, preset, runs / preset / entry.name) for entry in of_preset}
        new[preset] = {name: of_entry for name, of_entry in found.items() if of_entry is not None}
    kept = _of_earlier_page(beside)
    if not any(new.values()) and not kept:
        return None
    reading = handwritten(file, MADE_BY)
    content: Content = {}
    for preset in PRESETS:
        of_old, of_new = {} if preset == "smoke" else kept.get(preset, {}), new.get(preset, {})
        both = {
            entry.name: _chosen(entry, preset, of_old.get(entry.name), of_new.get(entry.name), beside)
            for entry in entries
            if entry.name in of_old or entry.name in of_new
        }
        if both:
            content[preset] = both
    output.mkdir(parents=True, exist_ok=True)
    pictures = {
        preset: _draw(
            page, preset, sections, [n for n, s in sections.items() if s is new.get(preset, {}).get(n)], runs, output
        )
        for preset, sections in content.items()
    }
    absent = {
        preset: {
            e.name: len(planned_runs(e, preset)) for e in entries if preset in e.presets and e.name not in sections
        }
        for preset, sections in content.items()
    }
    text = page_text(page, content, pictures, absent)
    # first: without it nothing can be made again
    write_text(beside, json.dumps({"presets": content}, indent=None) + "\n")
    write_above(file, text, reading)
    of_presets = []
    for preset, sections in content.items():
        finished, planned = (sum(found[key] for found in sections.values()) for key in ("finished", "planned"))
        of_presets.append(f"`{preset}`, {finished} of {planned + sum(absent[preset].values())} runs")
    return f"- [{page}]({page}.md): {_words(page, content)[0]}; {'; '.join(of_presets)}."


def _of_earlier_page(file: Path) -> Content:
    """What the JSON of a page has; ValueError if it is damaged, since it may be all that there is of another machine's runs."""
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["presets"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: found a damaged file, allowed the JSON of this page; bring back an earlier version, or remove it to start anew from "
            "the runs at hand"
        ) from error


def _chosen(
    entry: Entry, preset: str, old: dict[str, Any] | None, new: dict[str, Any] | None, file: Path
) -> dict[str, Any]:
    """The section of an entry: that of the runs at hand, unless the page has one of the same settings with more finished runs.

    Another machine has made those, and what the page has of them is all that there is here. It is kept, and said to be.
    """
    if old is None or new is None:
        found = new if old is None else old
        assert found is not None
        return found
    if old["finished"] <= new["finished"] or not fits(entry, preset, old):
        return new
    print(
        f"{entry.name}: found {new['finished']} finished runs of preset {preset}, and {old['finished']} in {file}, which are kept; finish "
        "the others, bring those runs here, or remove that file to start anew",
        file=sys.stderr,
    )
    return old


def _draw(
    page: str,
    preset: str,
    sections: Mapping[str, dict[str, Any]],
    at_hand: Iterable[str],
    runs: Path,
    output: Path,
) -> list[str]:
    """Draws the figures of a preset, takes over those that the programs drew of entries at hand, and returns the names of all."""
    stem = f"{page}_{preset}"
    for figure, name in ((curves_figure, f"{stem}.png"), (windows_figure, f"{stem}_windows.png")):
        if not figure(sections, output / name):
            (output / name).unlink(missing_ok=True)  # of runs that the page has no longer
    for entry in at_hand:
        for drawn in (runs / preset / entry).glob("*.png"):
            copy = output / f"{stem}_{drawn.name}"
            shutil.copyfile(drawn, copy)
            if copy.stat().st_size > MAX_PICTURE_BYTES:
                with Image.open(drawn) as picture:
                    picture.convert("RGB").quantize(64).save(copy, optimize=True)
    return sorted(picture.name for picture in output.glob(f"{stem}*.png"))


def write_list(output: Path, lines: Mapping[str, str]) -> None:
    """Puts lines into the list of pages, README.md, between two marks; those of pages that were not made now stay."""
    path = output / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if LIST_START not in text or LIST_END not in text:
        return
    before, _, rest = text.partition(LIST_START)
    block, _, after = rest.partition(LIST_END)
    there = {line[3:].partition("]")[0]: line for line in block.strip().splitlines() if line.startswith("- [")}
    there |= lines
    block = "\n".join(there[page] for page in [*dict.fromkeys(_pages())] if page in there)
    write_text(path, f"{before}{LIST_START}\n\n{block}\n\n{LIST_END}{after}")


def _pages() -> list[str]:
    return list(dict.fromkeys(entry.page or entry.name for entry in ENTRIES))


def report(presets: Sequence[str], runs: Path, output: Path) -> int:
    """Writes all pages, and says of those that cannot be written why. Returns 1 if none was written, otherwise 0."""
    lines: dict[str, str] = {}
    refused = False
    for page in _pages():
        of_page = [entry for entry in ENTRIES if (entry.page or entry.name) == page]
        try:
            line = write_page(page, of_page, presets, runs, output)
        except (ValueError, OSError) as problem:
            print(f"experiments.py: {problem}", file=sys.stderr)
            refused = True
            continue
        if line is not None:
            lines[page] = line
            print(line)
    if not lines:
        if not refused:
            print(
                f"--runs: found no finished runs of preset {' or '.join(presets)} in {runs}; make some with `experiments.py run`",
                file=sys.stderr,
            )
        return 1
    write_list(output, lines)
    return 0
