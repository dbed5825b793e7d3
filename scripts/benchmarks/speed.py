"""`speed`: steps per second of training, beside sb3-contrib's RecurrentPPO."""

import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from agents.config import AlgorithmConfig, CriticConfig, EnvConfig, ModelConfig, RunConfig, TrainConfig
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


def speed(tasks: list[str], rounds: int) -> dict[str, Any]:
    """Runs the speed benchmark; prints its tables, returns all figures."""
    results: dict[str, Any] = {
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
    return results
