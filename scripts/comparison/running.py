"""Carries out the runs of a matrix, each in a process of its own; what is done is skipped, what fails is reported."""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml

from agents.checkpoint import CHECKPOINT_FILE, PREVIOUS_FILE
from agents.config import CONFIG_FILE, NO_CRITIC, from_dict, load_config, to_dict
from agents.metrics import METRICS_FILE, read_metrics
from commandline import why_it_failed
from comparison.matrix import ROOT, Member
from dni_rl.files import write_text

EXPERIMENT = ("env", "model", "critic", "algorithm")  # sections of a configuration that say what a run is
OF_ONE_KIND = {"auxiliary_cost": "dni_aux", "trace_lambda": "bp_lambda"}  # settings that no other kind of critic reads
RECORD_FILE = "compare.json"  # in a run's folder: what only this script knows of it
_in_flight: set[int] = set()  # processes, to be told to stop
_stopping = threading.Event()  # after which none is started
_start_or_stop = threading.Lock()  # so that whoever tells them misses none that has just been started


def is_done(folder: Path, total_steps: int) -> bool:
    """Whether the run reached its last step."""
    try:
        return read_metrics(folder)[-1]["step"] >= total_steps
    except (ValueError, IndexError):
        return False


def is_finished(member: Member, runs: Path) -> bool:
    """Whether the member has a run here that is done, and is it."""
    return is_done(runs / member.name, member.total_steps) and made_with_other_settings(member, runs) is None


def made_with_other_settings(member: Member, runs: Path) -> str | None:
    """The first setting in which a run that exists is not the member of the matrix, in one line; None if there is none.

    Of a run with metrics it is also said if its settings, or the matrix's, cannot be read, as nobody knows then whether it is the member.
    What it logs and on which device it ran make no other experiment, nor do settings of a critic that is not there or of another kind. A
    shorter run can be continued, unless its rates were to fall to zero by its end.
    """
    folder = runs / member.name
    metrics = folder / METRICS_FILE
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    try:
        now = member.resolved()
    except ValueError as error:
        return str(error) if has_metrics else None  # where there is no run, train.py says it
    try:
        then = _settings_of_run(folder / CONFIG_FILE)
    except ValueError as error:
        if not has_metrics:
            return None
        return (
            f"{CONFIG_FILE}: found a run whose settings cannot be read ({error}); allowed those of the matrix; "
            "remove its folder, or choose another with --runs"
        )
    name = other_setting(now, then)
    total, allowed = then["run"]["total_steps"], now["run"]["total_steps"]
    anneals = now["algorithm"]["anneal_learning_rate"] or now["algorithm"]["anneal_entropy"]
    if name is None and (total > allowed or (anneals and total < allowed)):
        name = "run.total_steps"
    if name is None:
        return None
    section, key = name.split(".")
    return (
        f"{name}: found a run with {then[section][key]!r}; allowed {now[section][key]!r}, as in the matrix; "
        "remove its folder, or choose another with --runs"
    )


def missing_metric(member: Member, runs: Path, metric: str) -> str | None:
    """Why a member that is finished has no curve of the metric, in one line; None if it has one, or is not finished."""
    if not is_finished(member, runs):
        return None
    logged = read_metrics(runs / member.name)
    if any(math.isfinite(row.get(metric, math.nan)) for row in logged):
        return None
    if _is_logged(metric, logged):
        return f"metric: found no number for {metric} in {METRICS_FILE}, as where no episode ends; allowed one at least"
    names = sorted({name for row in logged for name in row} - {"step"})
    way_out = "set env.kwargs.success_reward, or " if metric == "charts/success_rate" else ""
    return (
        f"metric: found no {metric} in {METRICS_FILE}, which has {', '.join(names)}; allowed one that all members log; {way_out}"
        "choose another metric"
    )


def _is_logged(metric: str, logged: Sequence[Mapping[str, float]]) -> bool:
    """Whether a run writes the metric, be it a number or not."""
    return any(metric in row for row in logged)


def other_setting(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """The first setting that makes two full configurations different experiments, as <section>.<name>; None if none does."""
    for section in EXPERIMENT:
        has_none = section == "critic" and not (_has_critic(now[section]) or _has_critic(then[section]))
        for key in ("kind",) if has_none else now[section]:
            is_read = section != "critic" or now[section]["kind"] == OF_ONE_KIND.get(key, now[section]["kind"])
            if is_read and now[section][key] != then[section][key]:
                return f"{section}.{key}"
    return None


def _has_critic(critic: Mapping[str, Any]) -> bool:
    """Whether a section of a configuration has one: interfaces between levels do without one of the whole state."""
    return critic.get("kind") not in NO_CRITIC or bool(critic.get("interfaces"))


def _settings_of_run(file: Path) -> dict[str, dict[str, Any]]:
    """The full configuration that train.py saved. ValueError if it cannot be read."""
    try:
        return to_dict(load_config(file))
    except ValueError:
        try:
            sections = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            sections = None
        if not isinstance(sections, Mapping):
            raise
    return full_settings(sections)


def full_settings(sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The full configuration of an earlier run. ValueError if train.py refuses what makes it the experiment that it is.

    Settings that make no other experiment do no harm if a newer version refuses them: what it logs, and those of a critic that is not
    there.
    """
    try:
        return to_dict(from_dict(sections))
    except ValueError:
        counted = {name: sections[name] for name in EXPERIMENT if name in sections}
        critic, of_run = sections.get("critic"), sections.get("run")
        if isinstance(critic, Mapping) and "kind" in critic and not _has_critic(critic):
            counted["critic"] = {"kind": critic["kind"]}
        if isinstance(of_run, Mapping) and "total_steps" in of_run:
            counted["run"] = {"total_steps": of_run["total_steps"]}
        return to_dict(from_dict(counted))


def run(member: Member, runs: Path, device: str | None = None, measure: bool = False) -> str | None:
    """Trains one member.

    Args:
        member: of the matrix.
        runs: folder of the runs.
        device: where to run it; None for the configuration's.
        measure: whether to measure its credit horizon afterwards, unless training did.

    Returns:
        None, or the reason why it failed in one line. It is also kept beside the run, with the memory that the process took.
    """
    folder = runs / member.name
    problem = made_with_other_settings(member, runs)
    # A run that failed after its last step, as one whose checkpoint could not be written, is not skipped either.
    if problem is None and (not is_done(folder, member.total_steps) or noted_failure(member, runs)):
        command = [sys.executable, str(ROOT / "scripts" / "train.py")]
        if (folder / CHECKPOINT_FILE).exists() or (folder / PREVIOUS_FILE).exists():
            command += ["--resume", str(folder), "--run.total_steps", str(member.total_steps)]
        else:
            (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            command += ["--config", str(ROOT / member.config), "--run.output_dir", str(runs), "--run.name", member.name]
            command += ["--run.seed", str(member.seed), "--run.progress", "false"]
            for key, value in member.settings.items():
                is_text = isinstance(value, str) and not key.startswith("env.kwargs.")  # of which train.py reads YAML
                command += [f"--{key}", value if is_text else json.dumps(value)]
        if device is not None:
            command += ["--run.device", device]
        code, problem, memory = execute(command)
        record = read_record(folder)
        record["peak_memory_bytes"] = max(memory, record.get("peak_memory_bytes", 0))
        record.pop("horizon", None)  # of the run when it was shorter
        record["failure"] = None if code in (130, -2, -15) else problem  # an interrupted run has not failed
        record["settings"] = member.settings
        write_record(folder, record)
    if problem is None and measure and "horizon" not in read_record(folder) and not has_logged_horizons(folder):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "horizon.json"
            _, problem, _ = execute(
                [sys.executable, str(ROOT / "scripts" / "horizon.py"), str(folder), "--json", str(file)]
            )
            if problem is None:
                (measured,) = json.loads(file.read_text(encoding="utf-8"))
                write_record(folder, {**read_record(folder), "horizon": measured["horizon"]})
    return problem


def execute(command: Sequence[str]) -> tuple[int, str | None, int]:
    """Runs a command. Returns its exit code, None or the reason why it failed, and its largest resident set in bytes.

    Raises:
        CancelledError: if it was not started, as all are to stop.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        # In a session of its own, so that it is told to stop once, whoever told this process.
        with _start_or_stop:
            if _stopping.is_set():
                raise CancelledError
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
            _in_flight.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone, unlike RUSAGE_CHILDREN
        _in_flight.discard(process.pid)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        written = errors.read()
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return code, None if code == 0 else why_it_failed(code, written), memory


def _stop_all() -> None:
    """Tells the processes in flight to stop, and lets no other be started, such as the second one of a member."""
    with _start_or_stop:
        _stopping.set()
        for process in tuple(_in_flight):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)  # after which train.py saves a checkpoint


def read_record(folder: Path) -> dict[str, Any]:
    """What earlier calls of this script noted of a run; empty if nothing."""
    try:
        return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def noted_failure(member: Member, runs: Path) -> str | None:
    """Why a member failed in an earlier call, if it was this member then: folders are called by labels, which may come to mean others."""
    record = read_record(runs / member.name)
    return record.get("failure") if record.get("settings", member.settings) == member.settings else None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Notes something of a run, also of one that has left nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECORD_FILE, json.dumps(dict(record)))


def _as_completed(pending: Iterable[Future[str | None]]) -> Iterator[Future[str | None]]:
    """As in `concurrent.futures`, but looks up every second: a signal that comes just before a wait does not end it."""
    left = set(pending)
    while left:
        done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
        yield from done


def run_all(
    todo: Sequence[Member], runs: Path, *, metric: str, jobs: int, devices: Sequence[str] | None, measure: bool
) -> dict[str, str]:
    """Runs members side by side, each job on the next free device. Returns the reasons of those that failed, by name.

    One that does not log the metric at all has failed as well, and no further one is started after it: they would be run for nothing.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the members in flight have saved their checkpoints.
    """
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for job in range(jobs):
        free.put(devices[job % len(devices)] if devices else None)
    stop = threading.Event()
    not_started: list[str] = []

    def judge(member: Member) -> str | None:
        problem = missing_metric(member, runs, metric)
        if problem and not _is_logged(metric, read_metrics(runs / member.name)):
            stop.set()
        return problem

    def work(member: Member) -> str | None:
        if stop.is_set() and not is_finished(member, runs):
            not_started.append(member.name)
            return None
        device = free.get()  # as many as threads, so there always is one
        try:
            return run(member, runs, device, measure) or judge(member)
        finally:
            free.put(device)

    _stopping.clear()  # of an earlier call
    failures: dict[str, str] = {}
    for member in todo:  # those of earlier calls, before anything is started
        judge(member)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            pending = {pool.submit(work, member): member for member in todo}
            ended = (future for future in _as_completed(pending) if pending[future].name not in not_started)
            for number, future in enumerate(ended, 1):
                name, problem = pending[future].name, future.result()
                print(f"{number} of {len(todo)}: {name}: {problem or 'done'}", file=sys.stderr, flush=True)
                if problem:
                    failures[name] = problem
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            _stop_all()
            raise
    if not_started:
        print(f"{len(not_started)} of {len(todo)}: not started, as {metric} is not logged", file=sys.stderr, flush=True)
    return failures


def has_logged_horizons(folder: Path) -> bool:
    """Whether training measured the credit horizon itself."""
    try:
        return bool(measured(read_metrics(folder), "credit/horizon"))
    except ValueError:
        return False


def measured(logged: Sequence[Mapping[str, float]], name: str) -> dict[int, float]:
    """What training measured after its first update, by agent step."""
    return {int(row["step"]): row[name] for row in logged if row["step"] and math.isfinite(row.get(name, math.nan))}
