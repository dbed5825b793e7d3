"""`workers`: steps per second of several processes beside one."""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.metrics import read_metrics
from benchmarks.measuring import Ratio, in_turns, machine, markdown
from benchmarks.methods import ROOT
from commandline import why_it_failed


def workers(options: Sequence[str], processes: int, steps: int, rounds: int) -> dict[str, Any]:
    """Steps per second of one process, of several together, and of several apart; prints a table, returns all figures.

    Args:
        options: of train.py.
        processes: how many.
        steps: of each process.
        rounds: after one of warm-up.
    """
    forms = {"one process": (1, False), "together": (processes, True), "apart": (processes, False)}
    speeds = in_turns(
        {
            name: functools.partial(train_speed, options, count, joined, steps)
            for name, (count, joined) in forms.items()
        },
        rounds,
        "workers",
    )
    ratios = {name: Ratio.of(values, speeds["one process"]) for name, values in speeds.items()}
    rows: list[dict[str, Any]] = [
        {
            "run": name,
            "processes": forms[name][0],
            "steps_per_second": statistics.median(values),
            "ratio": vars(ratios[name]),
            "measurements": values,
        }
        for name, values in speeds.items()
    ]
    print(
        markdown(
            ("run", "processes", "steps/s", "ratio to one process"),
            [
                (row["run"], str(row["processes"]), f"{row['steps_per_second']:,.0f}", str(ratios[row["run"]]))
                for row in rows
            ],
        )
    )
    settings = {"options": list(options), "steps": steps, "rounds": rounds}
    return {"command": "workers", "machine": machine(torch.device("cpu"), 1), "settings": settings, "rows": rows}


def train_speed(options: Sequence[str], processes: int, together: bool, steps: int) -> float:
    """Agent steps per second of training in so many processes, without their start; RuntimeError if one fails.

    Args:
        options: of train.py.
        processes: how many.
        together: whether they learn as one, under torchrun, or each runs by itself at the same time.
        steps: of each process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        train = [str(ROOT / "scripts" / "train.py"), *options, "--run.output_dir", scratch]
        train += ["--run.tensorboard", "false", "--run.progress", "false"]
        if together:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc-per-node", str(processes)]
            commands = [[*torchrun, *train, "--run.name", "0", "--run.total_steps", str(processes * steps)]]
        else:
            commands = [
                [sys.executable, *train, "--run.name", str(i), "--run.total_steps", str(steps), "--run.seed", str(i)]
                for i in range(processes)
            ]
        started = [
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
            for command in commands
        ]
        errors = [process.communicate()[1] for process in started]
        for process, error in zip(started, errors, strict=True):
            if process.returncode:
                # torchrun goes on about what it saw of it
                said = [line for line in error.splitlines() if line.startswith("train.py: ")]
                raise RuntimeError(said[0] if said else why_it_failed(process.returncode, error))
        return sum(read_metrics(Path(scratch) / str(i))[-1]["charts/SPS"] for i in range(len(commands)))
