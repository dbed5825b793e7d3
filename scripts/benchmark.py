"""Measures speed and memory, in one run, contenders in turn, as ratios.

    OMP_NUM_THREADS=1 python scripts/benchmark.py speed --output docs/results/speed.json
    OMP_NUM_THREADS=1 python scripts/benchmark.py overhead --output docs/results/overhead.json
    python scripts/benchmark.py gpu --output gpu.json
    python scripts/benchmark.py workers --config configs/tmaze.yaml --output docs/results/workers.json

`speed` trains on MiniGrid-MemoryS7-v0 and on Breakout (LSTM-128, 8 environments, rollout 128, one thread) with this project and with
sb3-contrib's RecurrentPPO at the same settings, and on our own T-maze (64 environments). Both sides have one LSTM shared by
policy and value, the same torso, heads, epochs, minibatches of the same size, and neither sees the previous action or reward.
RecurrentPPO acts through the environment stack that its authors document. A round is one rollout and its updates; all contenders take
their turn in every round, and a ratio is the median over rounds of the ratio within a round. Each task has a process of its own.

`overhead` has the learners of all methods learn from a stored rollout, again and again: what a method adds to plain truncated BPTT
with the same window, without environments and acting. Beside it the memory of one long sequence, window by window.

`gpu` trains each method with environments, acting and learning on one device, beside the same run without a critic and beside PyTorch's
LSTM (cuDNN) alone; measures how fast the gridworlds train, peak memory and waits of the host; and lets each method learn an easy
task for seconds. In under eight minutes; without a CUDA device the same in a small form.

`workers` trains a configuration in one process, in several that learn together under torchrun, and in as many that know nothing of each
other, which is the most that the machine has to give. What it does not know are options of train.py: --env.num_envs 256.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import dni_rl
from agents.config import (
    AlgorithmConfig,
    CriticConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    load_config,
    require_device,
)
from agents.metrics import read_metrics
from agents.train import Trainer

REFERENCE = "sb3-contrib RecurrentPPO, 4 epochs"
NUM_ENVS, ROLLOUT, HIDDEN = 8, 128, 128
GOALS = {  # ratios to RecurrentPPO, from the project's issue: MiniGrid, Breakout
    "PPO, 4 epochs, window 128": (4.6, 2.8),
    "A2C, one pass, window 128": (6.1, 5.0),
}

Update = Callable[[], int]  # one rollout and its updates; returns the number of agent steps


def ours(env: EnvConfig, model: ModelConfig, algorithm: AlgorithmConfig, critic: CriticConfig) -> Update:
    """One update of this project's trainer, with the checks for non-finite losses that training has."""
    config = TrainConfig(
        env=env, model=model, algorithm=algorithm, critic=critic, run=RunConfig(threads=1, total_steps=10**9)
    )
    trainer = Trainer(config)
    # The first 16 windows are all looked at for the bound of synthetic gradients; what is timed is the rest of a run, one in eight.
    for critic_ in trainer.learner.critics:
        critic_.set_extra_state({"windows_seen": 16})

    def update() -> int:
        metrics = trainer.update()
        assert trainer.first_non_finite(metrics) is None
        return trainer.steps_per_update

    return update


def recurrent_ppo(task: str) -> Update:
    """One update of sb3-contrib's RecurrentPPO."""
    try:
        import gymnasium
        from sb3_contrib import RecurrentPPO
        from stable_baselines3.common.env_util import make_atari_env, make_vec_env
        from stable_baselines3.common.vec_env import VecTransposeImage
    except ImportError as error:
        raise SystemExit(f"benchmark.py: {error.name} is missing; pip install -e '.[benchmark]'") from None
    shared = {"lstm_hidden_size": HIDDEN, "shared_lstm": True, "enable_critic_lstm": False}
    if task == "minigrid":
        import minigrid.wrappers

        def make():
            return gymnasium.wrappers.FlattenObservation(
                minigrid.wrappers.ImgObsWrapper(gymnasium.make("MiniGrid-MemoryS7-v0"))
            )

        env, policy, shared["net_arch"] = make_vec_env(make, NUM_ENVS, seed=0), "MlpLstmPolicy", [64]
    else:
        import ale_py

        gymnasium.register_envs(ale_py)
        # sticky actions, no lost-life episodes and no forced fire, as in our environment
        wrapper = {"noop_max": 0, "terminal_on_life_loss": False, "action_repeat_probability": 0.25}
        env = make_atari_env(
            "ALE/Breakout-v5",
            NUM_ENVS,
            seed=0,
            wrapper_kwargs=wrapper,
            env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0},
        )
        env, policy, shared["net_arch"] = VecTransposeImage(env), "CnnLstmPolicy", []
    model = RecurrentPPO(
        policy, env, n_steps=ROLLOUT, batch_size=2 * ROLLOUT, n_epochs=4, policy_kwargs=shared, seed=0, device="cpu"
    )

    def update() -> int:
        model.learn(NUM_ENVS * ROLLOUT, reset_num_timesteps=False)
        return NUM_ENVS * ROLLOUT

    return update


def contenders(task: str) -> dict[str, Update]:
    """Contenders of one task, by name."""
    none, dni = CriticConfig(kind="none"), CriticConfig(kind="dni", max_norm_ratio=1.0)
    cdni = replace(dni, kind="cdni")
    if task == "tmaze":
        env = EnvConfig(id="PassiveTMaze", num_envs=64, kwargs={"corridor_length": 20, "num_distractors": 4})
        model = ModelConfig(hidden_size=32, torso_sizes=(64,))
        a2c = AlgorithmConfig(rollout_length=ROLLOUT, bptt_horizon=8)
        return {
            "A2C, window 8, no critic": ours(env, model, a2c, none),
            "A2C, window 8, synthetic gradients": ours(env, model, a2c, dni),
            "A2C, window 8, synthetic gradients with context": ours(env, model, a2c, cdni),
        }
    if task == "minigrid":
        env = EnvConfig(id="MiniGrid-MemoryS7-v0", num_envs=NUM_ENVS, kwargs={"encoding": "symbolic"})
        model = ModelConfig(
            torso="none", head_sizes=(64,), hidden_size=HIDDEN, previous_action=False, previous_reward=False
        )
    else:
        env = EnvConfig(id="ALE/Breakout-v5", num_envs=NUM_ENVS, kwargs={"num_threads": 1})
        model = ModelConfig(torso_sizes=(512,), hidden_size=HIDDEN, previous_action=False, previous_reward=False)

    def algorithm(name: str, window: int) -> AlgorithmConfig:
        return AlgorithmConfig(name=name, rollout_length=ROLLOUT, bptt_horizon=window, epochs=4, minibatches=4)

    updates = {
        REFERENCE: recurrent_ppo(task),
        "PPO, 4 epochs, window 128": ours(env, model, algorithm("ppo", 128), none),
        "PPO, 4 epochs, window 16": ours(env, model, algorithm("ppo", 16), none),
        "PPO, 4 epochs, window 16, synthetic gradients": ours(env, model, algorithm("ppo", 16), dni),
        "A2C, one pass, window 128": ours(env, model, algorithm("a2c", 128), none),
        "A2C, one pass, window 16": ours(env, model, algorithm("a2c", 16), none),
        "A2C, one pass, window 16, synthetic gradients": ours(env, model, algorithm("a2c", 16), dni),
    }
    if task == "minigrid":  # what of it is the agent and what the environment
        env = replace(env, kwargs={**env.kwargs, "fast_view": False})
        updates["PPO, 4 epochs, window 128, view computed by MiniGrid"] = ours(env, model, algorithm("ppo", 128), none)
        updates["A2C, one pass, window 128, view computed by MiniGrid"] = ours(env, model, algorithm("a2c", 128), none)
    return updates


def measure(task: str, rounds: int) -> dict[str, list[float]]:
    """Steps per second of every contender in every round, after one round of warm-up."""
    torch.set_num_threads(1)
    updates = contenders(task)
    speeds: dict[str, list[float]] = {name: [] for name in updates}
    for round_ in range(rounds + 1):
        for name, update in updates.items():
            started = time.perf_counter()
            steps = update()
            while time.perf_counter() - started < 0.5:  # the short ones run long enough to be timed
                steps += update()
            if round_:
                speeds[name].append(steps / (time.perf_counter() - started))
        print(f"{task}: round {round_} of {rounds}", file=sys.stderr)
    return speeds


def table(task: str, speeds: dict[str, list[float]]) -> tuple[str, list[dict]]:
    """Markdown table and its rows."""
    plain_of = {name: name.split(", synthetic")[0] for name in speeds}
    if task == "tmaze":
        plain_of = dict.fromkeys(speeds, "A2C, window 8, no critic")
    lines = [
        "| contender | steps/s, median (min to max) | ratio to RecurrentPPO | goal | ratio to no critic |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for name, values in speeds.items():
        ratio = (
            statistics.median(a / b for a, b in zip(values, speeds[REFERENCE], strict=True))
            if REFERENCE in speeds
            else None
        )
        against_plain = None
        if plain_of[name] != name:
            against_plain = statistics.median(a / b for a, b in zip(values, speeds[plain_of[name]], strict=True))
        goal = GOALS[name][task == "breakout"] if name in GOALS else None
        median = statistics.median(values)
        cells = [f"{x:.2f}" if x is not None else "" for x in (ratio, goal, against_plain)]
        lines.append(
            f"| {name} | {median:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {cells[0]} | {cells[1]} | {cells[2]} |"
        )
        rows.append(
            {
                "task": task,
                "contender": name,
                "steps_per_second": values,
                "ratio_to_recurrent_ppo": ratio,
                "goal": goal,
                "ratio_to_no_critic": against_plain,
            }
        )
    return "\n".join(lines), rows


def speed(tasks: list[str], rounds: int, output: Path | None) -> None:
    """Runs the speed benchmark and prints its tables."""
    results: dict = {
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}, torch {torch.__version__}, 1 thread",
        "rounds": rounds,
        "rows": [],
    }
    for task in tasks:
        # What one task leaves behind, imported packages and scattered memory, is no part of the next one's time.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            speeds = process.submit(measure, task, rounds).result()
        text, rows = table(task, speeds)
        print(f"\n### {task}\n\n{text}")
        results["rows"] += rows
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1))


# What `overhead` and `gpu` share

WINDOW, PERIODS = 8, (1, 8)  # of all methods but those of windows of one step; ticks of the multi-timescale levels
PLAIN = "none"
UNFUSED = (
    "none, without the fused kernel"  # on the CPU: which part of a critic's time is that of the kernel it cannot use
)
ROOT = Path(__file__).resolve().parent.parent
KINDS = ROOT / "configs" / "kinds"
DUE_EVERY = 32  # a multiple of all windows from one look at the yardstick of the bound to the next, see `ErrorCritic.window_is_due`
MIB = 2**20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Method:
    """A run to measure: `baseline` is the name of the same run without what the method adds, `kind` a file of configs/kinds."""

    config: TrainConfig
    baseline: str = PLAIN
    kind: str | None = None


def methods(
    hidden_size: int, *, num_envs: int, online_envs: int, rollout_length: int, device: str, threads: int
) -> dict[str, Method]:
    """All methods on the T-maze with distractors, by name, each behind its baseline.

    Args:
        hidden_size: H of the core, of every level for multi_timescale.
        num_envs: B.
        online_envs: B for BP(lambda), whose traces grow with the cube of the state, and for its baseline.
        rollout_length: T of all but those two, whose rollouts have 2 steps; a multiple of 64, the window of the slowest level.
        device: where everything lives.
        threads: of PyTorch on the CPU.
    """

    def run(
        kind: str, *, window: int = WINDOW, core: str = "lstm", batch: int = num_envs, **critic: Any
    ) -> TrainConfig:
        # the bound and its yardstick belong to the method as it is used, see configs/tmaze.yaml
        bound = {} if kind in ("none", "rtrl", "bp_lambda") else {"max_norm_ratio": 1.0}
        rollout = 2 if window == 1 else rollout_length
        return from_dict(
            {
                "env": {"num_envs": batch, "kwargs": {"corridor_length": 20, "num_distractors": 4}},
                "model": {
                    "core": core,
                    "hidden_size": hidden_size,
                    "periods": PERIODS,
                    "chrono_max": 40,
                    "input_gain": 3.0,
                },
                # It learns slowly: the same rollout many times must not end in a policy without entropy.
                "algorithm": {"rollout_length": rollout, "bptt_horizon": window, "learning_rate": 1e-5},
                "critic": {"kind": kind, "learning_rate": 1e-5} | bound | critic,
                "run": {"device": device, "threads": threads, "total_steps": 10**12},
            }
        )

    return {
        PLAIN: Method(run("none"), kind="none"),
        "dni": Method(run("dni"), kind="dni"),
        "dni, linear path and MLP of 128": Method(run("dni", hidden_sizes=(128,))),
        "dni, one target per window": Method(run("dni", dense_targets=False)),
        "dni, one target, every second update": Method(
            run("dni", dense_targets=False, fit_interval=2, yardstick_interval=16)
        ),
        "cdni": Method(run("cdni"), kind="cdni"),
        "dni_aux": Method(run("dni_aux"), kind="dni_aux"),
        "loss_critic": Method(run("loss_critic"), kind="loss_critic"),
        "sobolev": Method(run("sobolev"), kind="sobolev"),
        "none, full BPTT": Method(run("none", window=rollout_length)),
        "none, elementwise_lstm": Method(run("none", core="elementwise_lstm"), "none, elementwise_lstm"),
        "rtrl": Method(run("rtrl", core="elementwise_lstm"), "none, elementwise_lstm", "rtrl"),
        "none, multi_timescale": Method(run("none", core="multi_timescale"), "none, multi_timescale"),
        "dni, multi_timescale": Method(run("dni", core="multi_timescale"), "none, multi_timescale", "multi_timescale"),
        "none, window 1": Method(run("none", window=1, batch=online_envs), "none, window 1"),
        "bp_lambda": Method(
            run("bp_lambda", window=1, batch=online_envs, hidden_sizes=(), normalize_targets=False),
            "none, window 1",
            "bp_lambda",
        ),
    }


def comparable(method: Method, other: Method) -> bool:
    """Whether an update of both learns from as many steps, and a ratio means something."""
    return (method.config.env.num_envs, method.config.algorithm.rollout_length) == (
        other.config.env.num_envs,
        other.config.algorithm.rollout_length,
    )


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
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# overhead


class StoredRollout:
    """A method's learner and one rollout to learn from again and again.

    Args:
        config: of the method.
        fused: False takes the written-out LSTM where short windows without dense targets would have the CPU's fused kernel.
    """

    def __init__(self, config: TrainConfig, *, fused: bool = True):
        self.trainer = Trainer(config)
        self.learner, self.device = self.trainer.learner, self.trainer.device
        core = self.learner.model.core
        if isinstance(core, dni_rl.LSTM) and not fused:
            core.targets_per_window = None
        self.rollout = self.trainer.actor.collect()
        self._count_windows(2 * DUE_EVERY)  # as later in a run: the yardstick is looked at as often as it will be

    def seconds_per_update(self) -> float:
        """Mean over as many updates as there are from one look at the yardstick to the next."""
        return seconds_of(self._updates, self.device) / DUE_EVERY

    def peak_bytes(self) -> int:
        """Memory of an update, the yardstick's second backward pass included: what lives between updates and the most that joins it.

        Parameters, optimisers' state, traces and sensitivities live between updates; the rollout is not counted.
        """
        learner = self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.critic_optimizer is not None:
            learner.critic_optimizer.zero_grad(set_to_none=True)
        self._count_windows(3 * DUE_EVERY - 1)  # the next one is due
        held = tensor_bytes(learner.state_dict())
        return held + peak_bytes(lambda: learner.update(self.rollout), self.device)

    def _updates(self) -> None:
        for _ in range(DUE_EVERY):
            self.learner.update(self.rollout)

    def _count_windows(self, seen: int) -> None:
        for critic in self.learner.critics:
            critic.set_extra_state({"windows_seen": seen})


def sequence_peak(kind: str, length: int, hidden_size: int, batch_size: int, device: torch.device) -> int:
    """Memory of learning from sequences of so many steps, from window to window, in bytes; see `peak_bytes`.

    The loop of the README: cut, unroll, backward, step. Inputs are drawn for each window, so that they do not count.

    Args:
        kind: "none", "dni" (with a window of WINDOW steps), or "full" (one window).
        length: steps, a multiple of WINDOW.
        hidden_size: H of the LSTM.
        batch_size: B.
        device: where everything lives.
    """
    torch.manual_seed(0)
    window = length if kind == "full" else WINDOW
    core, head = dni_rl.LSTM(64, hidden_size).to(device), nn.Linear(hidden_size, 1).to(device)
    critic = None
    if kind == "dni":
        critic = dni_rl.GradientCritic(state_sizes=core.state_sizes, max_norm_ratio=1.0).to(device)
    core.targets_per_window = 0 if critic is None else None
    optimizer = torch.optim.Adam([*core.parameters(), *head.parameters(), *(critic.parameters() if critic else ())])

    def learn(num_windows: int) -> None:
        state = core.initial_state(batch_size)
        for _ in range(num_windows):
            state = dni_rl.cut(state)
            outputs, next_state = core.unroll(torch.randn(window, batch_size, 64, device=device), state)
            losses = head(outputs).squeeze(-1).square()
            dni_rl.backward(losses, start=state, end=next_state, critic=critic)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state = next_state

    learn(1)  # the optimiser's state is there
    held = tensor_bytes([list(core.parameters()), list(head.parameters()), optimizer.state_dict()])
    held += tensor_bytes(critic.state_dict()) if critic is not None else 0
    return held + peak_bytes(lambda: learn(length // window), device)


def overhead(
    hidden_sizes: Sequence[int],
    rounds: int,
    device: torch.device,
    *,
    num_envs: int = 16,
    online_envs: int = 2,
    rollout_length: int = 64,
    lengths: Sequence[int] = (64, 128, 256, 512, 1024),
    threads: int = 1,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures time and memory per learner update, and memory by length of the sequence; prints tables, returns all figures.

    Args:
        hidden_sizes: widths of the LSTM.
        rounds: behind the warm-up.
        device: where everything lives.
        num_envs: as all that follow, see `methods`.
        online_envs: B for BP(lambda).
        rollout_length: T.
        lengths: of the sequences; those are left out where only some methods are asked for.
        threads: of PyTorch on the CPU.
        only: names of methods, which are measured beside their baselines and plain truncated BPTT; all of them if empty.

    Raises:
        ValueError: if a name is unknown.
    """
    torch.set_num_threads(threads)
    settings = {"num_envs": num_envs, "online_envs": online_envs, "rollout_length": rollout_length}
    results: dict[str, Any] = {
        "command": "overhead",
        "machine": machine(device, threads),
        "settings": {"window": WINDOW, "rounds": rounds, "updates_per_round": DUE_EVERY} | settings,
        "rows": [],
    }
    for hidden_size in hidden_sizes:
        matrix = methods(hidden_size, device=str(device), threads=threads, **settings)
        if device.type == "cpu":
            matrix[UNFUSED] = matrix[PLAIN]
        if unknown := [name for name in only if name not in matrix]:
            raise ValueError(f"--methods: found {unknown[0]!r}, allowed {', '.join(map(repr, matrix))}")
        if only:
            wanted = {PLAIN, *only, *(matrix[name].baseline for name in only)}
            matrix = {name: method for name, method in matrix.items() if name in wanted}
        refused: dict[str, str] = {}
        learners: dict[str, StoredRollout] = {}
        for name, method in matrix.items():
            try:
                learners[name] = StoredRollout(method.config, fused=name != UNFUSED)
            except ValueError as error:  # traces that would not fit
                refused[name] = str(error)
        turns = {name: learner.seconds_per_update for name, learner in learners.items()}
        seconds = in_turns(turns, rounds, f"LSTM {hidden_size}")
        peaks = {name: learner.peak_bytes() for name, learner in learners.items()}
        rows = [
            overhead_row(name, matrix, seconds, peaks) | {"hidden_size": hidden_size}
            if name in seconds
            else {"method": name, "refused": refused[name], "hidden_size": hidden_size}
            for name in matrix
        ]
        print(f"\n### LSTM {hidden_size}\n\n{overhead_table(rows)}")
        results["rows"] += rows
    if only:
        return results
    results["sequences"] = {
        kind: {str(length): sequence_peak(kind, length, 128, num_envs, device) for length in lengths}
        for kind in ("none", "dni", "full")
    }
    print(f"\n### Memory by length of the sequence, LSTM 128, MiB\n\n{sequence_table(results['sequences'])}")
    return results


def overhead_row(
    name: str, matrix: Mapping[str, Method], seconds: Mapping[str, list[float]], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Figures of one method, as ratios to its baseline and to plain truncated BPTT of the LSTM."""
    baseline = matrix[name].baseline
    row: dict[str, Any] = {
        "method": name,
        "baseline": baseline,
        "seconds": seconds[name],
        "peak_bytes": peaks[name],
        "time_ratio": vars(Ratio.of(seconds[name], seconds[baseline])),
        "memory_ratio": peaks[name] / peaks[baseline],
    }
    if comparable(matrix[name], matrix[PLAIN]):
        row["time_ratio_to_plain_lstm"] = vars(Ratio.of(seconds[name], seconds[PLAIN]))
        row["memory_ratio_to_plain_lstm"] = peaks[name] / peaks[PLAIN]
    return row


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; ratios of time and memory, above 1 is more."""
    header = [
        "method",
        "ms per update",
        "baseline",
        "time / baseline",
        "memory, MiB",
        "memory / baseline",
        "time, memory / none",
    ]
    lines = []
    for row in rows:
        if "refused" in row:
            lines.append([row["method"], f"refused: {row['refused'].split('; ')[1]}", *[""] * 5])
            continue
        is_baseline = row["baseline"] == row["method"]
        lines.append(
            [
                row["method"],
                f"{1e3 * statistics.median(row['seconds']):.1f}",
                "" if is_baseline else row["baseline"],
                "" if is_baseline else str(Ratio(**row["time_ratio"])),
                f"{row['peak_bytes'] / MIB:.1f}",
                "" if is_baseline else f"{row['memory_ratio']:.2f}",
                ""
                if row["method"] == PLAIN or "time_ratio_to_plain_lstm" not in row
                else f"{row['time_ratio_to_plain_lstm']['median']:.2f}, {row['memory_ratio_to_plain_lstm']:.2f}",
            ]
        )
    return markdown(header, lines)


def sequence_table(peaks: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown, one column for each length."""
    names = {"none": f"none, window {WINDOW}", "dni": f"dni, window {WINDOW}", "full": "none, full BPTT"}
    header = ["method", *(f"{length} steps" for length in peaks["none"])]
    return markdown(header, [[names[kind], *(f"{b / MIB:.2f}" for b in by.values())] for kind, by in peaks.items()])


# gpu


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


# workers


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
            name: lambda count=count, joined=joined: train_speed(options, count, joined, steps)
            for name, (count, joined) in forms.items()
        },
        rounds,
        "workers",
    )
    rows = [
        {
            "run": name,
            "processes": forms[name][0],
            "steps_per_second": statistics.median(values),
            "ratio": vars(Ratio.of(values, speeds["one process"])),
            "measurements": values,
        }
        for name, values in speeds.items()
    ]
    print(
        markdown(
            ("run", "processes", "steps/s", "ratio to one process"),
            [
                (row["run"], str(row["processes"]), f"{row['steps_per_second']:,.0f}", str(Ratio(**row["ratio"])))
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
        if any(process.returncode for process in started):
            said = [error.strip().splitlines()[-1] for error in errors if error.strip()]
            raise RuntimeError(f"train.py: {said[0] if said else 'failed'}")
        return sum(read_metrics(Path(scratch) / str(i))[-1]["charts/SPS"] for i in range(len(commands)))


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("speed", help="steps per second beside RecurrentPPO")
    command.add_argument(
        "--tasks", nargs="+", choices=["minigrid", "breakout", "tmaze"], default=["minigrid", "breakout", "tmaze"]
    )
    command.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    command.add_argument("--output", type=Path, help="writes every measurement as JSON")
    command = commands.add_parser("overhead", help="time and memory per learner update, beside plain truncated BPTT")
    command.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="widths of the LSTM")
    command.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="rows of the table; by default all")
    _measuring_options(command, rounds=5)
    command = commands.add_parser("gpu", help="the whole battery on one device; without one, its small form")
    _measuring_options(command, rounds=3)
    command = commands.add_parser("workers", help="steps per second of several processes beside one")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--steps", type=int, default=500_000, help="of each process")
    command.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    command.add_argument("--output", type=Path, help="writes every measurement as JSON")
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.command != "workers":
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    warnings.filterwarnings("ignore", module="gymnasium|stable_baselines3|pygame")
    if arguments.command == "speed":
        speed(arguments.tasks, arguments.rounds, arguments.output)
        return 0
    if arguments.command == "workers":
        try:
            results = workers(options, arguments.processes, arguments.steps, arguments.rounds)
        except RuntimeError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 2
        write(results, arguments.output)
        return 0
    try:
        device = require_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:
        print(
            f"benchmark.py: {str(error).replace('--run.device', '--device').replace('run.device', '--device')}",
            file=sys.stderr,
        )
        return 2
    if arguments.command == "overhead":
        try:
            results = overhead(
                arguments.sizes, arguments.rounds, device, threads=arguments.threads, only=arguments.methods
            )
        except ValueError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 2
    else:
        form = DEVICE_FORM if device.type == "cuda" else CPU_FORM
        results = gpu(form, arguments.rounds, device, arguments.threads)
    write(results, arguments.output)
    return 0


def _measuring_options(command: argparse.ArgumentParser, rounds: int) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:<index>; by default the first CUDA device, or the CPU")
    command.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    command.add_argument("--rounds", type=int, default=rounds, help="rounds after the warm-up")
    command.add_argument("--output", type=Path, help="writes every measurement as JSON")


if __name__ == "__main__":
    sys.exit(main())
