"""`gpu`: training with environments, acting and learning on one device, within minutes."""

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from agents.config import TrainConfig, load_config, require_device
from agents.train import Trainer
from benchmarks.measuring import MIB, Ratio, in_turns, machine, markdown, peak_bytes, seconds_of, tensor_bytes
from benchmarks.methods import KINDS, PLAIN, WINDOW, Method, methods


@dataclass(frozen=True, kw_only=True)
class Form:
    """How large the battery is.

    Attributes:
        hidden_size: H.
        num_envs: B of the comparison of methods.
        online_envs: B of BP(lambda) and its baseline.
        speed_envs: each B that gridworld training speed is measured with.
        seconds: least duration of a contender's turn.
        learning_steps: agent steps of the short learning runs, unless their seconds are over.
        learning_seconds: of each.
        limit_seconds: of the whole battery; learning runs get shorter when it comes near.
    """

    hidden_size: int = 128
    num_envs: int = 4096
    online_envs: int = 16
    speed_envs: tuple[int, ...] = (1024, 4096, 16384)
    seconds: float = 1.0
    learning_steps: int = 500_000
    learning_seconds: float = 20.0
    limit_seconds: float = 480.0


DEVICE_FORM = Form()
CPU_FORM = Form(
    hidden_size=32,
    num_envs=8,
    online_envs=2,
    speed_envs=(8, 32),
    seconds=0.1,
    learning_steps=65_536,
    learning_seconds=5.0,
)
SPEED_GOAL = 1_000_000  # agent steps per second on one device, from the project's issue
SPEED_HORIZON = 64


@dataclass(frozen=True)
class Turn:
    """Mean seconds of one update: collecting a rollout, learning from it, and both without a wait in between."""

    acting: float
    learning: float
    training: float


class Training:
    """A method that trains on a device, environments included."""

    def __init__(self, config: TrainConfig, seconds: float):
        self.trainer, self.seconds = Trainer(config), seconds

    def turn(self) -> Turn:
        """Updates for some seconds."""
        trainer, device = self.trainer, self.trainer.device
        acting = learning = training = 0.0
        count = 0
        while count == 0 or training < self.seconds / 2:
            acting += seconds_of(trainer.actor.collect, device)
            learning += seconds_of(self._learn, device)
            training += seconds_of(trainer.update, device)
            count += 1
        return Turn(acting / count, learning / count, training / count)

    def _learn(self) -> None:
        rollout = self.trainer.actor.rollout
        assert rollout is not None
        self.trainer.learner.update(rollout)

    def peak_bytes(self) -> int:
        """Memory of an update with its rollout: what lives between updates, and the most that joins it."""
        trainer = self.trainer
        trainer.actor.rollout = None
        trainer.learner.optimizer.zero_grad(set_to_none=True)
        if trainer.learner.critic_optimizer is not None:
            trainer.learner.critic_optimizer.zero_grad(set_to_none=True)
        return tensor_bytes(trainer.learner.state_dict()) + peak_bytes(trainer.update, trainer.device)


class LSTMAlone:
    """PyTorch's LSTM over the windows of a rollout, forward and backward: cuDNN on a CUDA device."""

    def __init__(self, config: TrainConfig, input_size: int, seconds: float):
        algorithm, self.device, self.seconds = config.algorithm, require_device(config.run.device), seconds
        K = algorithm.bptt_horizon
        N = algorithm.rollout_length // K * config.env.num_envs
        self.lstm = nn.LSTM(input_size, config.model.hidden_size).to(self.device)
        self.inputs = torch.randn(
            K, N, input_size, device=self.device, requires_grad=True
        )  # a torso wants its gradient
        self.gradient = torch.ones(K, N, config.model.hidden_size, device=self.device)

    def turn(self) -> Turn:
        """Passes for some seconds."""
        total, count = 0.0, 0
        while count == 0 or total < self.seconds / 2:
            total += seconds_of(self._pass, self.device)
            count += 1
        return Turn(0.0, total / count, total / count)

    def _pass(self) -> None:
        self.lstm(self.inputs)[0].backward(self.gradient)


class _CountReads(TorchDispatchMode):
    """Counts tensors whose values decide something on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def host_reads(work: Callable[[], object], device: torch.device) -> int:
    """How often the host waits for the device during `work`, as PyTorch's debug mode finds it; on the CPU, how often it reads a value."""
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    with _CountReads() as counter:
        work()
    return counter.count


def learn_shortly(kind: str, form: Form, seconds: float, device: str, threads: int) -> dict[str, float]:
    """Trains with configs/kinds/KIND.yaml on a corridor of 4 instead of 20 steps.

    Within the window: whether a method learns on this device at all is asked here, not how far back.

    Returns:
        steps and seconds taken, and the success rate of the episodes that ended in the last quarter of the steps; in all of
        them where time was over before the first; NaN where none ended.
    """
    config = load_config(KINDS / f"{kind}.yaml")
    config = replace(
        config,
        env=replace(config.env, kwargs=config.env.kwargs | {"corridor_length": 4, "time_limit": 10}),
        model=replace(config.model, chrono_max=8),
        run=replace(config.run, device=device, threads=threads, total_steps=form.learning_steps),
    )
    trainer = Trainer(config)
    started, looked, success = time.perf_counter(), 0, math.nan
    while trainer.step < form.learning_steps and (trainer.step == 0 or time.perf_counter() - started < seconds):
        metrics = trainer.update()
        if trainer.step - looked >= form.learning_steps // 4:
            success = float(trainer.actor.statistics.pop()["charts/success_rate"])
            looked = trainer.step
    if math.isnan(success):
        success = float(trainer.actor.statistics.pop()["charts/success_rate"])
    culprit = trainer.first_non_finite(metrics, thorough=True)
    if culprit is not None:
        raise SystemExit(f"benchmark.py: {kind}: {culprit} is NaN or infinite at step {trainer.step}")
    trainer.close()
    return {"steps": trainer.step, "seconds": time.perf_counter() - started, "success": success}


def gpu(form: Form, rounds: int, device: torch.device, threads: int = 1) -> dict[str, Any]:
    """Runs the battery; prints its table, returns all figures."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    name_of_device = str(device)
    rows: list[dict[str, Any]] | None = None
    while rows is None:
        matrix = methods(
            form.hidden_size,
            num_envs=form.num_envs,
            online_envs=form.online_envs,
            rollout_length=SPEED_HORIZON,
            device=name_of_device,
            threads=threads,
        )
        try:
            rows = _compare(matrix, form, rounds, device)
        except torch.OutOfMemoryError:
            if form.num_envs < 2:
                raise
            form = replace(form, num_envs=form.num_envs // 2)
            print(f"out of memory; once more with {form.num_envs} environments", file=sys.stderr)
    results: dict[str, Any] = {
        "command": "gpu",
        "machine": machine(device, threads),
        "settings": {"window": WINDOW, "rounds": rounds} | vars(form),
        "rows": rows,
        "speed": _gridworld_speed(matrix, form, rounds, device),
    }
    kinds = [method.kind for method in matrix.values() if method.kind is not None]
    for i, kind in enumerate(kinds):
        left = 0.95 * form.limit_seconds - (time.perf_counter() - started)
        seconds = min(form.learning_seconds, max(left, 0.0) / (len(kinds) - i))
        learned = learn_shortly(kind, form, max(seconds, 0.01), name_of_device, threads)
        name = next(name for name, method in matrix.items() if method.kind == kind)
        next(row for row in results["rows"] if row["run"] == name)["learned"] = learned
        print(f"learning: {kind}: success {learned['success']:.2f} at {learned['steps']}", file=sys.stderr)
    results["seconds"] = time.perf_counter() - started
    print(f"\n{gpu_table(results)}")
    print(
        f"\n{results['seconds']:.0f} s of {form.limit_seconds:.0f} s; {results['machine']['device']}, torch {torch.__version__}"
    )
    return results


def _compare(matrix: Mapping[str, Method], form: Form, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Every method beside its baseline and beside PyTorch's LSTM."""
    trainings = {name: Training(method.config, form.seconds) for name, method in matrix.items()}
    input_size = trainings[PLAIN].trainer.learner.model.core.input_size
    alone = {  # windows of other shapes have another LSTM to compare with
        _windows_of(method.config): LSTMAlone(method.config, input_size, form.seconds) for method in matrix.values()
    }
    contenders: dict[str, Callable[[], Turn]] = {name: training.turn for name, training in trainings.items()}
    contenders |= {_alone_name(window): lstm.turn for window, lstm in alone.items()}
    turns = in_turns(contenders, rounds, "methods")
    rows: list[dict[str, Any]] = []
    for name, method in matrix.items():
        trainer = trainings[name].trainer
        reads = host_reads(trainer.update, device)
        peak = trainings[name].peak_bytes()
        trainer.close()
        lstm = _alone_name(_windows_of(method.config))
        steps = trainer.steps_per_update
        rows.append(
            {
                "run": name,
                "baseline": method.baseline,
                "num_envs": method.config.env.num_envs,
                "turns": [vars(turn) for turn in turns[name]],
                "steps_per_second": statistics.median(steps / turn.training for turn in turns[name]),
                "speed_to_baseline": vars(_speed_ratio(turns[name], turns[method.baseline], "training")),
                "learner_to_baseline": vars(_speed_ratio(turns[name], turns[method.baseline], "learning")),
                "learner_to_lstm_alone": vars(_speed_ratio(turns[name], turns[lstm], "learning")),
                "peak_bytes": peak,
                "host_reads": reads,
            }
        )
    for row in rows:
        row["memory_ratio"] = row["peak_bytes"] / next(r["peak_bytes"] for r in rows if r["run"] == row["baseline"])
    return rows


def _windows_of(config: TrainConfig) -> tuple[int, int]:
    """(K, N): steps of a window, and windows side by side."""
    K = config.algorithm.bptt_horizon
    return K, config.algorithm.rollout_length // K * config.env.num_envs


def _alone_name(window: tuple[int, int]) -> str:
    return f"nn.LSTM alone, {window[0]} steps, batch {window[1]}"


def _speed_ratio(turns: Sequence[Turn], reference: Sequence[Turn], phase: str) -> Ratio:
    """Of steps per second: above 1 is faster than the reference."""
    return Ratio.of([getattr(turn, phase) for turn in reference], [getattr(turn, phase) for turn in turns])


def _gridworld_speed(
    matrix: Mapping[str, Method], form: Form, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Training speed with windows of 64 steps, by number of environments; without a critic and with one."""
    rows = []
    for num_envs in form.speed_envs:
        for kind in ("none", "dni"):  # one after the other: the largest may need all of the memory
            try:
                rows.append(_training_speed(kind, matrix[kind].config, num_envs, form.seconds, rounds, device))
            except torch.OutOfMemoryError:
                print(f"{kind}, {num_envs} environments: out of memory", file=sys.stderr)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _training_speed(
    kind: str, config: TrainConfig, num_envs: int, seconds: float, rounds: int, device: torch.device
) -> dict[str, Any]:
    config = replace(
        config,
        env=replace(config.env, num_envs=num_envs),
        algorithm=replace(config.algorithm, bptt_horizon=SPEED_HORIZON, rollout_length=SPEED_HORIZON),
    )
    training = Training(config, seconds)
    turns = in_turns({kind: training.turn}, rounds, f"{kind}, {num_envs} environments")[kind]
    steps = training.trainer.steps_per_update
    row = {
        "run": f"{kind}, window {SPEED_HORIZON}",
        "num_envs": num_envs,
        "turns": [vars(turn) for turn in turns],
        "steps_per_second": statistics.median(steps / turn.training for turn in turns),
        "goal": SPEED_GOAL,
        "peak_bytes": training.peak_bytes(),
    }
    training.trainer.close()
    return row


def gpu_table(results: Mapping[str, Any]) -> str:
    """One Markdown table of the whole battery. Ratios of runs and learners are those of speed: above 1 is faster."""
    header = [
        "run",
        "environments",
        "steps/s",
        "goal",
        "speed / baseline",
        "learner / baseline",
        "learner / nn.LSTM alone",
        "memory, MiB (/ baseline)",
        "host reads per update",
        "short run: success (steps, s)",
    ]
    lines = []
    for row in results["rows"]:
        is_baseline = row["run"] == row["baseline"]
        learned = row.get("learned")
        lines.append(
            [
                row["run"],
                f"{row['num_envs']}",
                f"{row['steps_per_second']:,.0f}",
                "",
                "" if is_baseline else str(Ratio(**row["speed_to_baseline"])),
                "" if is_baseline else str(Ratio(**row["learner_to_baseline"])),
                str(Ratio(**row["learner_to_lstm_alone"])),
                f"{row['peak_bytes'] / MIB:,.1f}" + ("" if is_baseline else f" ({row['memory_ratio']:.2f})"),
                f"{row['host_reads']}",
                f"{learned['success']:.2f} ({learned['steps']:,}, {learned['seconds']:.0f})" if learned else "",
            ]
        )
    for row in results["speed"]:
        speed_, memory = f"{row['steps_per_second']:,.0f}", f"{row['peak_bytes'] / MIB:,.1f}"
        lines.append([row["run"], f"{row['num_envs']}", speed_, f"{row['goal']:,}", "", "", "", memory, "", ""])
    return markdown(header, lines)
