"""Time in turns, ratios, memory, and what a result was measured on: what all benchmarks share."""

import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dni_rl.files import write_text

MIB = 2**20

Result = TypeVar("Result")


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds until the device has done `work`."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def in_turns(contenders: Mapping[str, Callable[[], Result]], rounds: int, label: str) -> dict[str, list[Result]]:
    """What every contender returns in every round, after one round of warm-up."""
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            result = contender()
            if round_:
                results[name].append(result)
        print(f"{label}: round {round_} of {rounds}", file=sys.stderr)
    return results


@dataclass(frozen=True)
class Ratio:
    """Median, least and greatest over rounds of the ratio within a round."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float], reference: Sequence[float]) -> "Ratio":
        """values / reference, round by round."""
        ratios = [a / b for a, b in zip(values, reference, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f})"


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory that PyTorch's allocator had given out at once during `work`, beyond what it had before, in bytes.

    On a CUDA device by the allocator's own counters. On the CPU, which has none, by the profiler's record of every block that was
    allocated and freed. Neither knows what libraries take past the allocator, nor unused blocks that it keeps.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that blocks from before are freed meanwhile, which is left out as it should
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return _peak(event["args"] | {"time": event["ts"]} for event in events if event.get("name") == "[memory]")


def _peak(events: Iterable[Mapping[str, Any]]) -> int:
    """The highest sum of blocks alive, of those allocated within these events (signed "Bytes" at an "Addr" and a "time")."""
    alive: dict[int, int] = {}
    total = highest = 0
    for event in sorted(events, key=lambda event: event["time"]):
        if event["Bytes"] > 0:
            total += event["Bytes"] - alive.get(event["Addr"], 0)
            alive[event["Addr"]] = event["Bytes"]
            highest = max(highest, total)
        else:
            total -= alive.pop(event["Addr"], 0)
    return highest


def tensor_bytes(nested: object) -> int:
    """Bytes of all tensors in nested dicts and lists, what they share counted once."""
    sizes: dict[int, int] = {}

    def visit(item: object) -> None:
        if isinstance(item, Tensor):
            sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            for value in item.values():
                visit(value)
        elif isinstance(item, list | tuple):
            for value in item:
                visit(value)

    visit(nested)
    return sum(sizes.values())


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What a result was measured on, and when."""
    description: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        description |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return description


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(results: dict[str, Any], output: Path | None) -> None:
    """Writes results as JSON, if asked to."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(results, indent=1) + "\n")
