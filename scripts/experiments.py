"""Carries out the papers' experiments one after the other, and writes the pages of docs/results from what they left.

    python scripts/experiments.py run                                       smoke: every program in minutes, without data files
    python scripts/experiments.py run --preset laptop --only copy ptb
    python scripts/experiments.py run --preset paper --device cuda --jobs 4
    python scripts/experiments.py report

Every entry is a command of `dni_rl.experiments` with a folder of its own, <runs>/<preset>/<entry>, and `--resume`: what is done is
skipped, what was interrupted goes on from its last checkpoint, and an entry that fails is reported and does not stop the others. What an
entry prints is in output.log in its folder. An experiment is added as a line of ENTRIES in papers/entries.py, where it may be left to some
of the presets.

The report has a page for each experiment, with figures (PNG) and JSON beside it. It counts runs that are finished and have the settings of
the entry's command, says which are missing and which were left out, and asks the program itself which there should be. Where the runs of
an entry are not at hand, because another machine made them, the page keeps what the JSON has of them; also where fewer are at hand than
the JSON has with the same settings, which is said. What stands on a page from "**Reading.**" on is written by hand, and kept; a page that
is not of this script and does not begin with that is left alone.

Intervals of means and of differences between two methods (seed by seed) are 95 % t intervals over seeds. Ratios between two methods are of
geometric means, with the 95 % interval that Welch's t distribution gives the difference of the mean logarithms; where a seed has 0 they
are of means, and have no interval, nor have they where the seeds of each method all agree. A bar is kept for certain ("yes") only by a
whole interval that has some width.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from commandline import OneLineParser, stop_as_ctrl_c_does
from papers.entries import ENTRIES, PAGES, PRESETS, RUNS
from papers.pages import report
from papers.running import run_all


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser("run", help="carry out what is left of the entries")
    run.add_argument("--preset", choices=PRESETS, default="smoke")
    run.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(entry.name for entry in ENTRIES)}")
    run.add_argument("--jobs", type=int, help="runs of an entry at a time; by default the preset's")
    run.add_argument("--device", help="cpu, cuda, ...; by default the preset's")
    write = commands.add_parser("report", help="write the pages from the runs that are there")
    write.add_argument("--preset", nargs="+", choices=PRESETS, default=["laptop", "paper"], dest="presets")
    write.add_argument("--output", type=Path, default=PAGES, help="folder of the pages")
    for command in (run, write):
        command.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs, as <preset>/<entry>")
    option = parser.parse_args(arguments)
    if option.what == "report":
        if "smoke" in option.presets and option.output.resolve() == PAGES.resolve():
            write.error(
                f"--preset: found smoke, whose runs show nothing but that they run; allowed with an --output beside {PAGES}"
            )
        return report(option.presets, option.runs, option.output)
    if option.jobs is not None and option.jobs < 1:
        run.error(f"--jobs: found {option.jobs}; allowed an integer of at least 1")
    of_preset = [entry for entry in ENTRIES if option.preset in entry.presets]
    names = [entry.name for entry in of_preset]
    if unknown := sorted(set(option.only or ()) - set(names)):
        run.error(f"--only: found {' '.join(unknown)}; allowed with --preset {option.preset}: {', '.join(names)}")
    run.check_writable("--runs", option.runs)
    chosen = [entry for entry in of_preset if entry.name in (option.only or names)]
    return run_all(chosen, option.preset, option.runs, option.jobs, option.device)


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # programs are stopped with it; ignored in the background otherwise
    stop_as_ctrl_c_does()
    sys.exit(main())
