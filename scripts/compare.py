"""Runs a matrix of methods, windows, tasks and seeds, and writes a report (table, figures, JSON) and a TensorBoard board.

    python scripts/compare.py configs/compare/tmaze.yaml --jobs 2 --report docs/results/tmaze
    python scripts/compare.py configs/compare/tmaze.yaml --jobs 8 --devices cuda:0 cuda:1
    tensorboard --logdir runs/tmaze

Every member of the matrix is a process of `scripts/train.py`. What is done is skipped, what was interrupted is resumed from its last
checkpoint, and a member that fails is reported and does not stop the others, unless it turns out not to log the metric. `--report-only`
writes the report of what is there. With `--keep` a report grows: members that have no run here are not run, but taken from its JSON as it
is, if that has them with these settings. A report that would have less than the one in its place is refused, if possible before anything
is run. What stands on its page from "**Reading.**" on is written by hand, and kept; a page that another program or a hand has made is
refused, unless it begins with that.

The matrix is a YAML file:

    title, config       of the page; a file of configs/ that all members start from
    metric, bar         what is compared, by its name in metrics.jsonl; the value from which on a task counts as solved
    seeds               a list, of every method on every task that has no list of its own among the overrides
    tasks, methods      settings by name, as train.py's options without the dashes
    windows             optional: windows of truncated BPTT, as a list, or with settings of their own as a mapping. Each method is then
                        run at each of them as "<method>, window <K>", but for those that set algorithm.bptt_horizon themselves
    dial                optional: the task setting that says how far credit has to reach, or that number by task. It is the x-axis of
                        the board, and solved lengths are in its unit
    overrides           optional: settings of one "<method> / <task>", and its seeds; null leaves it out

Statistics follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021): interquartile means
over finished seeds with 95 % percentile bootstrap intervals, computed by scipy; over several tasks those of the seeds that are finished
on all of them, stratified by task. Memory is the largest resident set of the member's process, interpreter and PyTorch included; what
it holds on a GPU is not in it.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from commandline import OneLineParser, stop_as_ctrl_c_does
from comparison.board import write_board
from comparison.matrix import Member, load_matrix, members
from comparison.outcome import check_nothing_is_lost, collect, kept_failures, kept_rows, refusal
from comparison.report import PROGRAM, command_of, reading_of, write_report
from comparison.running import noted_failure, run_all


def main() -> int:
    """Runs the matrix and writes the report. Returns 1 if a member failed, 130 after Ctrl-C."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="YAML file: config, methods, tasks, seeds")
    parser.add_argument("--jobs", type=int, help="processes side by side; default one for each device")
    parser.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="cpu, cuda:0, ...; jobs are dealt to them in turn"
    )
    parser.add_argument("--runs", type=Path, help="folder of the runs; default runs/<name of the file>")
    parser.add_argument("--report", type=Path, help="writes <report>.md, .json and .png; default <runs>/report")
    parser.add_argument("--board", type=Path, help="folder of the TensorBoard board; default <runs>/board")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="runs these only; the report has all")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="runs these only; the report has all")
    parser.add_argument(
        "--credit", action="store_true", help="also measures credit horizons at the end, where training logged none"
    )
    parser.add_argument(
        "--keep", action="store_true", help="members of <report>.json that have no run here are kept, and not run"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="runs nothing; a page that is there keeps the command it was made by"
    )
    arguments = parser.parse_args()
    jobs = len(arguments.devices or ("cpu",)) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        parser.error(f"--jobs: found {jobs}; allowed an integer of at least 1")
    matrix = load_matrix(arguments.matrix)
    runs = arguments.runs or Path("runs") / arguments.matrix.stem
    for name in ("methods", "tasks"):
        unknown = set(getattr(arguments, name) or ()) - set(matrix[name])
        if unknown:
            parser.error(f"--{name}: found {sorted(unknown)}; allowed {list(matrix[name])}")
    report, board = arguments.report or runs / "report", arguments.board or runs / "board"
    if not report.name:
        parser.error(
            f"--report: found {str(report)!r}; allowed a name for the page, without .md; add one to the folder"
        )
    file = report.with_name(f"{report.name}.json")
    try:
        kept = kept_rows(matrix, runs, file) if arguments.keep else {}
        failures = kept_failures(matrix, runs, file) if arguments.keep else {}
    except ValueError as error:
        parser.error(f"--keep: {error}")
    todo = [
        member
        for member in ([] if arguments.report_only else members(matrix))
        if member.name not in kept
        and member.method in (arguments.methods or matrix["methods"])
        and member.task in (arguments.tasks or matrix["tasks"])
    ]

    def check_report(members_in_it: Iterable[Member]) -> None:
        found = {*kept, *(member.name for member in members_in_it if refusal(matrix, member, runs) is None)}
        try:
            check_nothing_is_lost(matrix, runs, file, found)
            reading_of(report)
        except ValueError as error:
            parser.error(f"--report: {error}")

    check_report(todo)
    written = {"report": report.parent, "board": board, **({"runs": runs} if todo else {})}
    for option, folder in written.items():  # found out before hours of training
        parser.check_writable(f"--{option}", folder)
    try:
        now_failed = run_all(
            todo, runs, metric=matrix["metric"], jobs=jobs, devices=arguments.devices, measure=arguments.credit
        )
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130
    rows = collect(matrix, runs, kept)
    there = {(row["method"], row["task"], row["seed"]) for row in rows}
    # Again, as where the metric is not logged there are neither rows nor further runs.
    check_report(m for m in todo if m.name in now_failed or (m.method, m.task, m.seed) in there)
    for member in members(matrix):
        why = refusal(matrix, member, runs) or noted_failure(member, runs)
        if why and member.name not in kept:
            failures[member.name] = why
        elif (runs / member.name).exists():
            failures.pop(member.name, None)
    failures |= now_failed
    command = (command_of(report) if arguments.report_only else None) or _command(arguments)
    text = write_report(matrix, rows, failures, command, report)
    try:
        write_board(matrix, rows, failures, board)
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return 1 if now_failed else 0


def _command(arguments: argparse.Namespace) -> str:
    """What makes the page, as it was given; without what chose a part of the matrix for this call, as the page has all of it."""
    words = [*PROGRAM.split(), arguments.matrix]
    for name in ("jobs", "devices", "runs", "report", "board"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return shlex.join([*map(str, words), *(["--credit"] if arguments.credit else [])])


if __name__ == "__main__":
    stop_as_ctrl_c_does()
    sys.exit(main())
