"""`speed`: steps per second of training, beside sb3-contrib's RecurrentPPO."""

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from agents.config import AlgorithmConfig, CriticConfig, EnvConfig, ModelConfig, RunConfig, TrainConfig, load_config
from agents.train import Trainer
from benchmarks.measuring import Ratio, in_turns, machine, markdown

ROOT = Path(__file__).resolve().parents[2]
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
        critic_.set_extra_state(torch.tensor(16))

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
    shared: dict[str, Any] = {"lstm_hidden_size": HIDDEN, "shared_lstm": True, "enable_critic_lstm": False}
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
    if task == "tmaze":
        return tmaze_contenders()
    none, dni = CriticConfig(kind="none"), CriticConfig(kind="dni", max_norm_ratio=1.0)
    if task == "minigrid":
        env = EnvConfig(id="MiniGrid-MemoryS7-v0", num_envs=NUM_ENVS, kwargs={"encoding": "symbolic"})
        model = ModelConfig(
            torso="none", head_sizes=(64,), hidden_size=HIDDEN, previous_action=False, previous_reward=False
        )
    else:
        env = EnvConfig(id="ALE/Breakout-v5", num_envs=NUM_ENVS, kwargs={"num_threads": 1})
        model = ModelConfig(torso_sizes=(512,), hidden_size=HIDDEN, previous_action=False, previous_reward=False)

    def algorithm(name: Literal["a2c", "ppo"], window: int) -> AlgorithmConfig:
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


def tmaze_contenders() -> dict[str, Update]:
    """Our own maze in rollouts that are long, and in those of configs/tmaze.yaml, with which it is learned: 16 times as many updates."""
    config = load_config(ROOT / "configs/tmaze.yaml")
    critics = {
        "": replace(config.critic, kind="none"),
        ", synthetic gradients": replace(config.critic, kind="dni"),
        ", synthetic gradients with context": config.critic,
        ", synthetic gradients with past observations": replace(config.critic, kind="dni", past_steps=(10, 100)),
    }
    return {
        f"A2C, window 8, rollouts of {length}{name}": ours(
            config.env, config.model, replace(config.algorithm, rollout_length=length), critic
        )
        for length in (ROLLOUT, config.algorithm.rollout_length)
        for name, critic in critics.items()
    }


def speed_of(update: Update) -> float:
    """Steps per second over half a second or one update, whichever is longer."""
    started, steps = time.perf_counter(), update()
    while time.perf_counter() - started < 0.5:
        steps += update()
    return steps / (time.perf_counter() - started)


def measure(task: str, rounds: int) -> dict[str, list[float]]:
    """Steps per second of every contender in every round, after one round of warm-up."""
    torch.set_num_threads(1)
    turns = {name: functools.partial(speed_of, update) for name, update in contenders(task).items()}
    return in_turns(turns, rounds, task)


def table(task: str, speeds: Mapping[str, Sequence[float]]) -> tuple[str, list[dict[str, Any]]]:
    """Markdown table and its rows; ratios are those within rounds."""
    rows, lines = [], []
    for name, values in speeds.items():
        plain = name.split(", synthetic")[0]
        ratios = {
            "ratio_to_recurrent_ppo": REFERENCE if REFERENCE in speeds and name != REFERENCE else None,
            "ratio_to_no_critic": plain if plain != name else None,
        }
        found = {key: Ratio.of(values, speeds[of]) if of else None for key, of in ratios.items()}
        goal = GOALS[name][task == "breakout"] if name in GOALS else None
        speed = f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        lines.append(
            [name, speed, *(str(x) if x else "" for x in found.values()), "" if goal is None else f"{goal:.2f}"]
        )
        rows.append(
            {"task": task, "contender": name, "steps_per_second": list(values), "goal": goal}
            | {key: vars(ratio) if ratio else None for key, ratio in found.items()}
        )
    header = ("contender", "steps/s, median (least to greatest)", "ratio to RecurrentPPO", "ratio to no critic", "goal")
    return markdown(header, lines), rows


def speed(tasks: Sequence[str], rounds: int) -> dict[str, Any]:
    """Runs the speed benchmark; prints its tables, returns all figures."""
    results: dict[str, Any] = {"machine": machine(torch.device("cpu"), threads=1), "rounds": rounds, "rows": []}
    for task in tasks:
        # What one task leaves behind, imported packages and scattered memory, is no part of the next one's time.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            speeds = process.submit(measure, task, rounds).result()
        text, rows = table(task, speeds)
        print(f"\n### {task}\n\n{text}")
        results["rows"] += rows
    return results
