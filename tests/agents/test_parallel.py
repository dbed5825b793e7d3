"""Agents in two gloo processes on loopback: against one process with all rollouts; to the end, interrupted, resumed, killed."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dni_rl
from agents import train as train_module
from agents.build import EVALUATION_KEY, build_critic, build_interfaces, spread_seeds
from agents.checkpoint import load_checkpoint
from agents.config import AlgorithmConfig, CriticConfig, save_config
from agents.learner import Learner, select_sequences
from agents.parallel import ALONE, Workers, connect
from agents.rollout import Actor, Rollout
from agents.train import NonFiniteError, Trainer, run_directory, train
from dni_rl.distributed import launch
from envs.gridworlds import PassiveTMaze
from tests.agents.scripted_env import ScriptedEnv, make_model
from tests.agents.small_runs import assert_equal, make_config, rows_of

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]
SCRIPTED = "tests.agents.scripted_env:ScriptedEnv"
B, UPDATES, DOUBLE = 4, 4, torch.float64


class MortalMaze(PassiveTMaze):
    """A T-maze that kills the second process of a run once, in the step that an environment variable tells."""

    _steps = 0

    def step(self, actions):
        self._steps += 1
        is_due = os.environ.get("DIES_AT_STEP") == str(self._steps)
        if is_due and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(actions)


# Two processes take the steps of one that learned from all rollouts


@dataclass(frozen=True)
class Case:
    critic: dict[str, Any]
    algorithm: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ppo(self) -> bool:
        return self.algorithm.get("name") == "ppo"


BOUND = {"hidden_sizes": (6,), "max_norm_ratio": 0.3, "yardstick_interval": 2}
PPO = {"name": "ppo", "epochs": 3, "minibatches": 2}
CASES = {
    "a2c, cdni": Case({"kind": "cdni", **BOUND}),
    "a2c, none": Case({"kind": "none"}),
    "a2c, dni_aux, normalised advantages": Case({"kind": "dni_aux", **BOUND}, {"normalize_advantages": True}),
    "a2c, past and future": Case({"kind": "dni", "past_steps": (2, 8), "future_steps": 2, **BOUND}),
    "ppo, cdni": Case({"kind": "cdni", "epochs": 2, **BOUND}, PPO | {"normalize_advantages": True}),
    "ppo, target_kl": Case({"kind": "dni", **BOUND}, PPO | {"minibatches": 1, "target_kl": 2e-4}),
    "sobolev": Case({"kind": "sobolev", **BOUND}),
    "rtrl": Case({"kind": "rtrl"}, {"bptt_horizon": 2}, {"core": "elementwise_lstm"}),
    "multi_timescale": Case(
        {"kind": "dni", "interfaces": True, **BOUND},
        {"bptt_horizon": 2},
        {"core": "multi_timescale", "periods": (1, 2)},
    ),
}


def make_learner(case: Case, seed: int, num_envs: int, workers: Workers = ALONE) -> Learner:
    model = make_model(**{"core": "lstm", **case.model}, seed=seed)
    config = CriticConfig(**case.critic)
    algorithm = AlgorithmConfig(**{"rollout_length": 8, "bptt_horizon": 4, "learning_rate": 0.01, **case.algorithm})
    critic = build_critic(config, model, ScriptedEnv(num_envs=1, seed=0).spec)
    interfaces = build_interfaces(config, model)
    for each in [*interfaces, *([] if critic is None else [critic])]:
        for p in each.double().parameters():
            torch.nn.init.normal_(p, std=0.5)
    learner = Learner(
        model.double(), critic, algorithm, config, num_envs=num_envs, seed=0, interfaces=interfaces, workers=workers
    )
    if learner.auxiliary is not None:
        learner.auxiliary.double()
    if learner.sensitivity is not None:
        learner.sensitivity = dni_rl.Sensitivity(learner.sensitivity.h.double(), learner.sensitivity.c.double())
    return learner


def make_rollouts(case: Case, environments: int) -> list[Rollout]:
    """What a model acted, of B environments; the same whoever learns from it."""
    model = make_model(**{"core": "lstm", **case.model}, seed=0)
    env = ScriptedEnv(num_envs=B, seed=environments)
    horizon = case.algorithm.get("bptt_horizon", 4) * (2 if case.model.get("core") == "multi_timescale" else 1)
    actor = Actor(env, model, rollout_length=8, bptt_horizon=horizon, seed=environments)
    return [doubled(actor.collect()) for _ in range(UPDATES)]


def doubled(rollout: Rollout) -> Rollout:
    def double(x):
        if isinstance(x, tuple):
            return tuple(map(double, x))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return replace(rollout, **{name: double(getattr(rollout, name)) for name in Rollout.__dataclass_fields__})


def joined(rollouts: list[Rollout]) -> Rollout:
    def cat(parts):
        if parts[0] is None:
            return None
        return tuple(map(cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts, dim=1)

    return Rollout(**{name: cat([getattr(r, name) for r in rollouts]) for name in Rollout.__dataclass_fields__})


def snapshot(learner: Learner) -> dict[str, Any]:
    sides = {"model": learner.learned, "critics": learner.critics}
    values = {f"{side}.{k}": v for side, m in sides.items() for k, v in m.state_dict().items()}
    return {name: v.tolist() for name, v in values.items() if isinstance(v, torch.Tensor)}


def learn(learner: Learner, rollouts: list[Rollout]) -> dict[str, Any]:
    counts = []
    backward = learner._backward
    learner._backward = lambda *a, **k: (counts.append(1), backward(*a, **k))[1]  # type: ignore[method-assign]
    for rollout in rollouts:
        learner.update(rollout)
    return {"parameters": snapshot(learner), "minibatches": len(counts)}


def in_this_of_two(workers: Workers, case: Case) -> dict[str, Any]:
    learner = make_learner(case, seed=workers.rank, num_envs=B, workers=workers)
    return learn(learner, make_rollouts(case, workers.rank))


def in_one(case: Case) -> dict[str, Any]:
    learner = make_learner(case, seed=0, num_envs=2 * B)
    if case.is_ppo and learner.algorithm.minibatches > 1:
        generator = torch.Generator().manual_seed(0)

        def minibatches(windows):
            """The two halves of the environments shuffled as the two processes do."""
            for epoch in range(learner.algorithm.epochs):
                order = torch.randperm(B, generator=generator)
                for environments in order.split(B // learner.algorithm.minibatches):
                    yield epoch, select_sequences(windows, torch.cat([environments, environments + B]), 2 * B)

        learner._minibatches = minibatches  # type: ignore[method-assign]
    return learn(learner, [joined(list(pair)) for pair in zip(*(make_rollouts(case, i) for i in (0, 1)), strict=True)])


# Runs of two processes, each in its own folder


def configure(folder: Path, name: str, *, critic=None, **settings):
    """A tiny run of two processes, with a bound."""
    return make_config(folder, name, critic={"max_norm_ratio": 1.0} | (critic or {}), update_steps=64, **settings)


METHODS: dict[str, dict[str, Any]] = {
    "a2c": {},
    "ppo": {"critic": {"kind": "dni", "past_steps": [2]}, "algorithm": {"name": "ppo", "epochs": 2, "minibatches": 2}},
    "rtrl": {"critic": {"kind": "rtrl"}, "model": {"core": "elementwise_lstm"}},
}


MORTAL = {"env": {"id": "tests.agents.test_parallel:MortalMaze", "kwargs": {"corridor_length": 3}}}


def interrupted(config, workers: Workers, update: int, rank: int, resume: Path | None = None) -> str:
    """Ctrl-C in one process, during its `update`-th update. Returns what the run says."""
    original, calls = Trainer.update, []

    def patched(self):
        calls.append(1)
        if len(calls) == update and self.workers.rank == rank:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    Trainer.update = patched  # type: ignore[method-assign]
    try:
        train(config, resume, workers)
    except KeyboardInterrupt as error:
        return str(error)
    finally:
        Trainer.update = original  # type: ignore[method-assign]
    return "not interrupted"


def message(error_type: type[Exception], function, *arguments) -> str:
    try:
        function(*arguments)
    except error_type as error:
        return str(error)
    return "nothing happened"


def many_runs(folder: Path) -> list[dict[str, Any]]:
    """All that two processes do here, started once. Returns what each of them found."""
    found: dict[str, Any] = {}
    with connect() as workers:
        found["cases"] = {name: in_this_of_two(workers, case) for name, case in CASES.items()}
        for name, settings in METHODS.items():
            train(configure(folder, f"{name}_whole", **settings), None, workers)
            parts = configure(folder, f"{name}_parts", **settings)
            found[f"{name}_said"] = interrupted(parts, workers, update=7, rank=1)
            torch.manual_seed(99 + workers.rank)  # nothing may depend on what the process did before
            train(parts, run_directory(parts), workers)
        train(configure(folder, "maze", **MORTAL), None, workers)
        for field_ in ("reward", "observation"):
            env = {"id": SCRIPTED, "kwargs": {}}
            if workers.rank == 1:
                env["kwargs"] = {"nan_field": field_, "nan_step": 8 * 6 + 3}
            config = configure(folder, f"nan_{field_}", env=env)
            found[f"nan_{field_}"] = message(NonFiniteError, train, config, None, workers)
        found["bp_lambda"] = message(
            ValueError,
            train,
            configure(
                folder,
                "bp",
                critic={
                    "kind": "bp_lambda",
                    "hidden_sizes": [],
                    "normalize_targets": False,
                    "max_norm_ratio": None,
                },
            ),
            None,
            workers,
        )
        found["short"] = message(ValueError, train, configure(folder, "short", total_steps=40), None, workers)
        trainer = Trainer(configure(folder, "unused"), workers)
        model = [p.tolist() for p in trainer.learner.model.parameters()]
        drawn = torch.rand(3).tolist()
        rollout = trainer.actor.collect()
        found["start"] = {
            "model": model,
            "observation": rollout.observation.tolist(),
            "action": rollout.action.tolist(),
            "generator": trainer.learner.generator.initial_seed(),
            "own_model": [p.tolist() for p in Trainer(configure(folder, "unused")).learner.model.parameters()],
            "global": drawn,
        }
        found["means"] = {
            "weighted": {
                name: float(value)
                for name, value in workers.means(
                    {
                        "a": torch.tensor(math.nan if workers.rank else 3.0),
                        "n": torch.tensor(0.0 if workers.rank else 4),
                    },
                    "n",
                ).items()
            },
            "one_nan": float(workers.means({"a": torch.tensor(math.nan if workers.rank else 3.0)})["a"]),
            "plain": float(workers.means({"a": torch.tensor(1.0 + workers.rank)})["a"]),
            "all_nan": float(workers.means({"a": torch.tensor(math.nan), "n": torch.tensor(0.0)}, "n")["a"]),
            "kl": float(
                workers.mean(torch.tensor(1.0 + workers.rank), torch.tensor([True, bool(workers.rank), True, False]))
            ),
        }
        everyone = workers.all(found)
    return everyone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def two(folder):
    return launch(many_runs, 2, folder, timeout_sec=150.0)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_that_learned_from_all_rollouts(two, name):
    expected = in_one(CASES[name])
    for found in (one["cases"][name] for one in two):
        assert found["minibatches"] == expected["minibatches"]
        if "target_kl" in CASES[name].algorithm:
            assert UPDATES < expected["minibatches"] < UPDATES * CASES[name].algorithm["epochs"]
        assert found["parameters"].keys() == expected["parameters"].keys()
        for key, value in expected["parameters"].items():
            torch.testing.assert_close(
                torch.tensor(found["parameters"][key], dtype=DOUBLE),
                torch.tensor(value, dtype=DOUBLE),
                rtol=1e-9,
                atol=1e-9,
                msg=lambda text, key=key: f"{key}: {text}",
            )


def test_statistics_weigh_every_episode_and_every_step_alike(two):
    for one in two:
        assert one["means"]["weighted"] == {"a": 3.0, "n": 4.0}
        assert one["means"]["plain"] == 1.5 and one["means"]["one_nan"] == 3.0
        assert math.isnan(one["means"]["all_nan"])
        assert one["means"]["kl"] == pytest.approx((1.0 * 2 + 2.0 * 3) / 5)


# Seeds


def test_processes_start_with_the_model_of_the_first_and_streams_of_their_own(two, folder):
    one, other = (each["start"] for each in two)
    assert one["model"] == one["own_model"] == other["model"]
    for stream in ("observation", "action", "generator", "global"):
        assert one[stream] != other[stream], stream


def test_seeds_of_processes_and_runs_never_coincide():
    seeds = [seed for run in range(20) for rank in range(64) for seed in Workers(rank, 64).spread_seeds(run, 4)]
    assert len(set(seeds)) == len(seeds)
    assert Workers(0, 64).spread_seeds(3, 4) == spread_seeds(3, 4)


def test_seeds_of_processes_resumed_runs_and_evaluations_never_coincide():
    workers = [Workers(rank, 16) for rank in range(16)]
    steps = (0, 1, 2, 15, 2048, 2**32 + 1)
    seeds = [
        seed for run in range(20) for one in workers for step in steps for seed in one.spread_seeds(run, 4, step=step)
    ]
    seeds += [seed for run in range(20) for seed in spread_seeds(run, 4, key=EVALUATION_KEY)]
    assert len(set(seeds)) == len(seeds)


# Whole runs


def results_of(directory):
    """Rows of metrics without the speed, and the checkpoint without what tells of the launch."""
    state = load_checkpoint(directory)
    state.pop("launch", None)
    del state["config"]["run"]
    return rows_of(directory), state


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_and_resumed_run_equals_one_that_never_stopped(two, folder, name):
    for one in two:
        assert one[f"{name}_said"].startswith(f"a checkpoint of step {7 * 64} was saved; ")
    (rows, state), (resumed_rows, resumed_state) = (
        results_of(folder / f"{name}_{part}") for part in ("whole", "parts")
    )
    assert state["step"] == 20 * 64
    assert [row["step"] for row in rows] == [*range(192, 1280, 192), 1280]
    assert rows == resumed_rows
    assert_equal(state, resumed_state)
    assert len(state["others"]) == 1
    assert not torch.equal(state["actor"]["generator"], state["others"][0]["actor"]["generator"])


def test_episodes_of_all_processes_are_counted(two, folder):
    """5 steps an episode at most: both processes end at least one per environment and row of 24 steps."""
    rows, _ = results_of(folder / "a2c_whole")
    assert sum(row["charts/episodes"] for row in rows[1:]) > 2 * 4 * 4
    assert all(0 <= row["charts/success_rate"] <= 1 for row in rows[1:])


@pytest.mark.parametrize("field", ["reward", "observation"])
def test_nan_in_one_process_ends_all_with_the_same_line(two, folder, field):
    one, other = (each[f"nan_{field}"] for each in two)
    assert one == other
    assert one.startswith(f"rollout.{field} of process 1: NaN or infinity at step {7 * 64}; stopped, the last good ")
    assert load_checkpoint(folder / f"nan_{field}")["step"] == 5 * 64


def test_what_cannot_be_done_together_is_refused_in_one_line(two):
    for one in two:
        assert one["bp_lambda"].startswith("critic.kind: found 'bp_lambda' in 2 processes; allowed every other kind; ")
        assert one["short"].startswith(
            "run.total_steps: found 40; allowed at least one rollout of each of 2 processes, 64 "
        )


def test_another_number_of_processes_cannot_continue_a_run(two, folder, tmp_path):
    config = configure(folder, "a2c_whole")
    with pytest.raises(ValueError) as error:
        train(config, folder / "a2c_whole")
    assert str(error.value) == (
        "processes: found 1; allowed 2, as in the run to resume; use torchrun --standalone --nproc-per-node 2, or start a new run"
    )
    directory = train(configure(tmp_path, "alone"))
    with pytest.raises(ValueError, match="processes: found 2; allowed 1, as in the run to resume; leave torchrun out"):
        train_module._check_count(Workers(0, 2), 1 + len(load_checkpoint(directory).get("others", ())))


# Restarts


def test_a_restart_before_the_first_checkpoint_starts_again(tmp_path, monkeypatch):
    config = configure(tmp_path, "run")
    update = Trainer.update

    def crash(self):
        if self.step >= 4 * 32:  # rows of metrics are there, a checkpoint of the schedule is not
            raise OSError("a crash")
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", crash)
        with pytest.raises(OSError, match="a crash"):
            train(config, None, Workers(launch="this"))
    assert load_checkpoint(tmp_path / "run")["step"] == 0
    train(config, None, Workers(launch="this", restarted=True))
    train(configure(tmp_path, "whole"))
    (rows, state), (expected_rows, expected_state) = (results_of(tmp_path / name) for name in ("run", "whole"))
    assert rows == expected_rows
    assert_equal(state, expected_state)


@pytest.mark.parametrize("launch_of_the_other", [None, "another"])
def test_a_restart_does_not_take_the_folder_of_another_run(tmp_path, launch_of_the_other):
    config = configure(tmp_path, "run")
    train(config, None, Workers(launch=launch_of_the_other))
    with pytest.raises(ValueError, match=r"metrics.jsonl: found metrics of an earlier run, "):
        train(config, None, Workers(launch="this", restarted=True))


def test_a_restart_that_torchrun_has_no_id_for_is_refused_in_one_line(tmp_path):
    config = configure(tmp_path, "run")
    train(config, None, Workers(launch="none"))  # perhaps somebody else's
    with pytest.raises(ValueError) as error:
        train(config, None, Workers(launch="none", restarted=True))
    assert str(error.value).startswith("torchrun: found a restart of a run without an id, ")
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in ("--standalone", "--rdzv-id", f"--resume {tmp_path / 'run'}"))


def test_a_restarted_run_that_was_resumed_goes_on_from_what_it_had_saved_since(tmp_path):
    constant = {"anneal_learning_rate": False}
    config = configure(tmp_path, "run", algorithm=constant)
    train(config)
    old = tmp_path / "run" / "checkpoint.previous.pt"
    longer = configure(tmp_path, "run", algorithm=constant, total_steps=2000)
    train(longer, tmp_path / "run", Workers(launch="this"))
    workers = Workers(launch="this", restarted=True)
    assert train_module._checkpoint_to_continue(old, tmp_path / "run", workers)["step"] >= 2000
    assert train_module._checkpoint_to_continue(old, tmp_path / "run", Workers(launch="this"))["step"] < 2000


# torchrun


def torchrun(*arguments, max_restarts=0, **environment):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(f"--max-restarts={max_restarts}", str(ROOT / "scripts" / "train.py"), *map(str, arguments)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """stdout, and the lines of train.py on stderr."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its workers, which a kill would leave behind
            process.wait(40)
    return out, [line for line in err.splitlines() if line.startswith("train.py: ")], err


def as_file(config, folder):
    save_config(config, folder / "given.yaml")
    return "--config", folder / "given.yaml"


def test_a_killed_worker_continues_from_the_last_checkpoint_as_if_nothing_had_happened(two, folder, tmp_path):
    config = configure(tmp_path, "maze", **MORTAL)
    died = torchrun(*as_file(config, tmp_path), max_restarts=1, DIES_AT_STEP=str(8 * 8 + 3))  # in the ninth update
    out, lines, err = finish(died)
    assert died.returncode == 0, err
    assert out == f"results in {tmp_path / 'maze'}\n"
    assert len(lines) <= 1  # the first process may have had the time to tell that it lost the other
    (rows, state), (expected_rows, expected_state) = (results_of(run / "maze") for run in (tmp_path, folder))
    assert rows == expected_rows
    assert_equal(state, expected_state)


def test_ctrl_c_saves_one_checkpoint_and_tells_so_once(tmp_path):
    config = configure(tmp_path, "run", total_steps=10**9, checkpoint_every_steps=10**9)
    process = torchrun(*as_file(config, tmp_path))
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None:  # of step 0
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, lines, err = finish(process)
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] > 0, err
    assert state["step"] % 64 == 0
    saved = f"a checkpoint of step {state['step']} was saved; continue with --resume {tmp_path / 'run'}"
    assert lines == [f"train.py: interrupted; {saved}"]
    assert len(state["others"]) == 1
