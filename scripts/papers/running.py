"""Carries out the commands of the entries, one after the other; each in a process of its own, and resumable."""

import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from commandline import why_it_failed
from dni_rl.experiments import common
from papers.entries import Entry

# In an entry's folder: where its runs were made, and what they printed.
RECORD_FILE, LOG_FILE = "machine.json", "output.log"


def run_entry(entry: Entry, preset: str, runs: Path, jobs: int | None = None, device: str | None = None) -> str | None:
    """Carries out what is left of an entry.

    Args:
        entry: of ENTRIES.
        preset: one of PRESETS.
        runs: folder of all.
        jobs: runs at a time; None for the preset's.
        device: None for the preset's.

    Returns:
        None, or in one line the reason why it failed.
    """
    folder = runs / preset / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"dni_rl.experiments.{entry.program}", *entry.arguments(preset, folder)]
    command += ["--jobs", str(jobs)] if jobs is not None and entry.is_matrix else []
    command += ["--device", device] if device is not None else []
    # The nets of smoke are so small that threads would wait for each other most of the time.
    environment = {**({"OMP_NUM_THREADS": "1"} if preset == "smoke" else {}), **os.environ}
    before, started = _results_there(folder), time.monotonic()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(folder / LOG_FILE, "ab+") as log:
        log.seek(0, os.SEEK_END)
        start = log.tell()
        # In a session of its own, so that it is told to stop once, together with its workers, whoever told this process.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
        finally:
            made = sorted(name for name, when in _results_there(folder).items() if before.get(name) != when)
            if made:
                call = {"date": date, "seconds": round(time.monotonic() - started, 1), "runs": made}
                _add_record(folder, call | _machine(device))
        log.seek(start)
        output = log.read().decode(errors="replace")
    return None if code == 0 else why_it_failed(code, output)


def _results_there(folder: Path) -> dict[str, Any]:
    """What says of each run that it is done, and when it was: rows of one file, or else a file in each folder."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        together = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
        return {name: row["seconds"] for name, row in together.items()}
    return {f.parent.name: f.stat().st_mtime_ns for f in folder.glob(f"*/{common.RESULT_FILE}")}


def _machine(device: str | None) -> dict[str, Any]:
    """What runs of this call are made on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    on_gpu = device is not None and device.startswith("cuda") and torch.cuda.is_available()
    gpu = torch.cuda.get_device_name(device) if on_gpu else None
    return {"processor": processor, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}


def _add_record(folder: Path, call: Mapping[str, Any]) -> None:
    common.write_json(folder / RECORD_FILE, [*read_json(folder / RECORD_FILE, []), call])


def read_json(path: Path, otherwise: Any) -> Any:
    """What a file has, or `otherwise` if it is not there or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return otherwise


def run_all(entries: Sequence[Entry], preset: str, runs: Path, jobs: int | None, device: str | None) -> int:
    """Carries out entries one after the other, a line for each. Returns 1 if one failed, 130 after Ctrl-C, otherwise 0."""
    failed = []
    for number, entry in enumerate(entries, 1):
        started = time.monotonic()
        try:
            problem = run_entry(entry, preset, runs, jobs, device)
        except KeyboardInterrupt:
            print(f"{entry.name}: stopped; the same command goes on from the last checkpoints", file=sys.stderr)
            return 130
        seconds = round(time.monotonic() - started)
        took = f"{seconds // 60}:{seconds % 60:02d}"
        print(
            f"{number} of {len(entries)}: {entry.name}: {f'failed after {took}: {problem}' if problem else f'done in {took}'}",
            flush=True,
        )
        if problem:
            failed.append(entry.name)
    if failed:
        print(f"{len(failed)} of {len(entries)} failed: {', '.join(failed)}; {LOG_FILE} in their folders has the rest")
    return 1 if failed else 0
