"""Tasks of bsuite and POPGym; what needs those packages is skipped where they are not installed."""

import sys
from types import SimpleNamespace

import dm_env
import numpy as np
import pytest
import torch
from dm_env import specs

from envs import ArgumentError, make
from envs.adapters import DmEnvs
from envs.gridworlds import PassiveTMaze, RepeatFirst
from envs.third_party import BsuiteRecorder, FirstObservation, bsuite_scores, make_bsuite, record_path
from scripts import bsuite_score
from tests.envs.conformance import check_environment

BSUITE = ["memory_len/3", "memory_size/2", "umbrella_length/4", "discounting_chain/1"]
POPGYM = ["RepeatFirstEasy", "RepeatPreviousEasy", "AutoencodeEasy", "ConcentrationEasy"]


@pytest.fixture
def bsuite():
    pytest.importorskip("bsuite", reason="the extra `bsuite` is not installed")


@pytest.fixture
def popgym():
    pytest.importorskip("popgym", reason="the extra `popgym` is not installed")


class Guess(dm_env.Environment):
    """Episodes of a given length, paid at every step with the action; counts what it paid, as bsuite's environments do."""

    bsuite_num_episodes = 4

    def __init__(self, length):
        self.length, self.time, self.paid = length, 0, 0

    def reset(self):
        self.time = 0
        return dm_env.restart(np.zeros(1, np.float32))

    def step(self, action):
        self.time += 1
        self.paid += int(action)
        transition = dm_env.termination if self.time == self.length else dm_env.transition
        return transition(float(action), np.zeros(1, np.float32))

    def observation_spec(self):
        return specs.Array((1,), np.float32)

    def action_spec(self):
        return specs.DiscreteArray(2)

    def bsuite_info(self):
        return {"total_regret": -self.paid}


# What needs neither package


@pytest.mark.parametrize(
    ("env_id", "package"), [("bsuite/memory_len/0", "bsuite"), ("popgym-RepeatFirstEasy-v0", "popgym")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, env_id, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{env_id} needs the package {package}: pip install -e '\.\[{package}\]'"):
        make(env_id, num_envs=1, seed=0)


def test_the_context_is_the_episodes_first_observation_and_the_present_one():
    env = FirstObservation(PassiveTMaze(2, num_envs=8, seed=0, time_limit=4, num_distractors=1))
    assert env.spec.context_size == 8 and env.spec.observation_shape == (4,)
    step = env.reset()
    first = step.observation
    episodes = others = 0
    for t in range(20):
        others += int((first != step.observation).any(1).sum())
        assert torch.equal(step.context, torch.cat((first, step.observation), dim=1))
        step = env.step(torch.full((8,), t % 4))
        first = torch.where(step.first[:, None], step.observation, first)
        episodes += int(step.first.sum())
    assert episodes > 8 and others > 8


def test_with_its_first_observation_an_environment_keeps_its_promises():
    def make_env(num_envs, seed):
        return FirstObservation(RepeatFirst(2, num_envs=num_envs, seed=seed, num_answers=2))

    assert check_environment(make_env, num_steps=40).terminations


def test_images_have_no_first_observation_as_context():
    env = make("MiniGrid-MemoryS7-v0", num_envs=1, seed=0)
    with pytest.raises(ValueError, match=r"needs float32 observations, got torch\.uint8"):
        FirstObservation(env)


def test_the_record_counts_episodes_of_all_environments_as_they_end():
    env = DmEnvs([Guess(2), Guess(3)])
    recorder = BsuiteRecorder(env, "guess/0")
    assert recorder.num_episodes == 4
    env.reset()
    for t in range(8):  # ends: the first at steps 2, 5, 8, the second at 3, 7; a reset takes a step of its own
        env.step(torch.tensor([1, int(t == 0)]))
    columns = ("episode", "steps", "total_return", "episode_len", "episode_return", "total_regret")
    assert [tuple(row[name] for name in columns) for row in recorder.rows] == [
        (1, 2, 2.0, 2, 2.0, -3.0),  # the other one's unfinished return counts in its own total only
        (2, 5, 3.0, 3, 1.0, -3.0),
        (3, 7, 5.0, 2, 2.0, -5.0),
        (4, 10, 5.0, 3, 0.0, -5.0 - 1.0),
        (5, 12, 7.0, 2, 2.0, -7.0),
    ]


def test_a_record_has_rows_at_round_numbers_of_episodes():
    env = DmEnvs([Guess(1)])
    recorder = BsuiteRecorder(env, "guess/0")
    env.reset()
    for _ in range(2 * 250):
        env.step(torch.tensor([0]))
    tens = [10, 12, 14, 17, 20, 25, 30, 40, 50, 60, 70, 80, 90]
    assert [row["episode"] for row in recorder.rows] == [*range(1, 10), *tens, 100, 120, 140, 170, 200, 250]


class Logger:
    """What bsuite's does: it writes its file anew at every row, and refuses one that is there."""

    stops_before = None  # the row at which it is cut off

    def __init__(self, bsuite_id, results_dir):
        self.file = record_path(results_dir, bsuite_id)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.episodes = []
        if self.file.exists():
            raise ValueError("already exists")

    def write(self, row):
        if row["episode"] == self.stops_before:
            raise KeyboardInterrupt
        self.episodes.append(row["episode"])
        self.file.write_text("".join(f"{episode}\n" for episode in self.episodes))


def test_a_record_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bsuite.logging.csv_logging", SimpleNamespace(Logger=Logger))
    env, folder = DmEnvs([Guess(1)]), tmp_path / "new" / "records"
    recorder = BsuiteRecorder(env, "guess/0")
    env.reset()
    for _ in range(5):
        env.step(torch.tensor([1]))
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "stops_before", 2)
        with pytest.raises(KeyboardInterrupt):
            recorder.save(folder)
    assert not list(folder.iterdir())
    file = recorder.save(folder)
    assert list(folder.iterdir()) == [file] and file == record_path(folder, "guess/0")
    assert file.read_text() == "1\n2\n3\n"
    file.write_text("of another agent")
    with pytest.raises(ValueError, match=r"guess-0\.csv: found a record of guess/0, allowed none; remove it, or "):
        recorder.save(folder)
    assert list(folder.iterdir()) == [file] and file.read_text() == "of another agent"


def test_a_recorder_wants_an_environment_of_bsuite():
    with pytest.raises(ValueError, match="expected an environment of make_bsuite, got PassiveTMaze"):
        BsuiteRecorder(PassiveTMaze(2, num_envs=1, seed=0), "memory_len/0")


def test_scores_of_an_empty_folder_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="found no records of bsuite"):
        bsuite_scores(tmp_path)
    assert bsuite_score.main(["--results", str(tmp_path)]) == 1
    assert "bsuite_score.py: " in capsys.readouterr().err


@pytest.mark.parametrize("env_id", ["MiniGrid-MemoryS17Random-v0", "MiniGrid-RedBlueDoors-6x6-v0"])
@pytest.mark.parametrize("view_size", [3, 7])
def test_minigrid_tells_successes(env_id, view_size):
    env = make(env_id, num_envs=2, seed=0, view_size=view_size)
    assert env.spec.observation_shape == (20, view_size, view_size)
    base = env.envs[0].unwrapped
    base.step_count = base.max_steps  # the latest success
    assert base._reward() >= env.spec.success_reward > 0


# bsuite


@pytest.mark.usefixtures("bsuite")
@pytest.mark.parametrize("bsuite_id", BSUITE)
def test_bsuite_keeps_the_promises_of_an_environment(bsuite_id):
    def make_env(num_envs, seed):
        return make(f"bsuite/{bsuite_id}", num_envs=num_envs, seed=seed, context="first_observation")

    varies = not bsuite_id.startswith("discounting_chain")  # it has nothing random
    assert check_environment(make_env, num_steps=220, varies_with_seed=varies).terminations


@pytest.mark.usefixtures("bsuite")
def test_bsuite_memory_is_solved_by_the_context_and_success_is_told():
    env = make("bsuite/memory_len/3", num_envs=8, seed=0, context="first_observation")
    step = env.reset()
    successes = []
    for _ in range(60):
        cue = step.context[:, 2]  # the first observation's [time, query, cue]
        step = env.step((cue > 0).long())
        successes += (step.reward[step.last] >= env.spec.success_reward).tolist()
    assert len(successes) > 50 and all(successes)


@pytest.mark.usefixtures("bsuite")
@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        (
            "bsuite/memory_ln/0",
            {},
            r"unknown environment 'bsuite/memory_ln/0'; the nearest are \['bsuite/memory_len/0'",
        ),
        ("bsuite/?", {}, "see bsuite.sweep.SWEEP"),
        ("bsuite/memory_len/0", {"contxt": 1}, "did you mean 'context'"),
        ("bsuite/memory_len/0", {"context": "grid"}, "context: found 'grid'; allowed 'first_observation' or None"),
    ],
)
def test_what_bsuite_does_not_have_is_refused(env_id, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(env_id, num_envs=1, seed=0, **kwargs)


@pytest.mark.usefixtures("bsuite")
@pytest.mark.parametrize("bsuite_id", BSUITE)
def test_with_one_environment_the_record_is_bsuites_own(bsuite_id):
    from bsuite.utils.wrappers import Logging

    written = []
    logger = type("Logger", (), {"write": lambda self, row: written.append(row)})()
    ours, theirs = (make_bsuite(f"bsuite/{bsuite_id}", 1, seed=3) for _ in range(2))
    recorder = BsuiteRecorder(ours, bsuite_id)
    theirs.envs = [Logging(theirs.envs[0], logger)]
    generator = torch.Generator().manual_seed(0)
    for env in (ours, theirs):
        generator.manual_seed(0)
        env.reset()
        for _ in range(1500):
            env.step(torch.randint(env.spec.num_actions, (1,), generator=generator))
    assert recorder.episodes > 10 and recorder.rows == [pytest.approx(row) for row in written]


@pytest.mark.usefixtures("bsuite")
@pytest.mark.filterwarnings("default")  # of plotnine's and pandas' own
def test_a_perfect_agent_scores_one_and_a_random_one_zero(tmp_path):
    for name, perfect in (("perfect", True), ("random", False)):
        env = make("bsuite/memory_len/0", num_envs=32, seed=0, context="first_observation")
        recorder = BsuiteRecorder(env, "memory_len/0")
        step = env.reset()
        while recorder.episodes < 1000:
            step = env.step((step.context[:, 2] > 0).long() if perfect else torch.randint(2, (32,)))
        file = recorder.save(tmp_path / name)
        assert file.exists()
        with pytest.raises(ValueError, match="found a record of memory_len/0"):
            recorder.save(tmp_path / name)
    assert bsuite_scores(tmp_path / "perfect") == {"memory_len": (1.0, ["memory_len/0"])}
    assert bsuite_scores(tmp_path / "random") == {"memory_len": (0.0, ["memory_len/0"])}


@pytest.mark.usefixtures("bsuite")
@pytest.mark.filterwarnings("default")
def test_the_command_trains_records_scores_and_skips_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bsuite.environments.memory_chain.MemoryChain.bsuite_num_episodes", 50, raising=False)
    monkeypatch.setattr("bsuite.experiments.memory_len.sweep.NUM_EPISODES", 50)
    options = ["--results", str(tmp_path), "--env.num_envs", "4", "--critic.kind", "none", "--model.hidden_size", "8"]
    assert bsuite_score.main(["memory_len/0", "memory_len/1", *options]) == 0
    out = capsys.readouterr().out
    assert "memory_len/1: " in out and " episodes in " in out and "| memory_len | " in out
    for index in (0, 1):
        text = (tmp_path / f"bsuite_id_-_memory_len-{index}.csv").read_text()
        assert [int(line.split(",")[1]) for line in text.splitlines()[1:]].count(50) == 1
    assert "| memory_len/0, memory_len/1 |" in out
    monkeypatch.setattr(bsuite_score, "train_and_record", None)  # would fail if it were called
    assert bsuite_score.main(["memory_len/0", *options]) == 0


# POPGym


@pytest.mark.usefixtures("popgym")
@pytest.mark.parametrize("name", POPGYM)
@pytest.mark.parametrize("context", ["state", None])
def test_popgym_keeps_the_promises_of_an_environment(name, context):
    def make_env(num_envs, seed):
        return make(f"popgym-{name}-v0", num_envs=num_envs, seed=seed, context=context)

    report = check_environment(make_env, num_steps=120)
    assert report.terminations + report.time_limits


@pytest.mark.usefixtures("popgym")
def test_popgym_repeat_first_is_solved_by_the_hidden_state():
    env = make("popgym-RepeatFirstEasy-v0", num_envs=4, seed=0, context="state")
    step = env.reset()
    assert torch.equal(step.context[:, :4], step.observation)  # the first card, one-hot
    total = step.reward
    while not step.last.any():
        step = env.step(step.context[:, :4].argmax(1))
        total = total + step.reward
    assert step.last.all()
    torch.testing.assert_close(total, torch.ones(4))


@pytest.mark.usefixtures("popgym")
def test_popgym_passes_arguments_on_and_refuses_others():
    assert make("popgym-RepeatPreviousEasy-v0", num_envs=1, seed=0, k=2, context="state").spec.context_size == 2 * 4 + 4
    with pytest.raises(ValueError, match="has no argument 'kk'; did you mean 'k'"):
        make("popgym-RepeatPreviousEasy-v0", num_envs=1, seed=0, kk=2)
    with pytest.raises(ValueError, match="context: found 'grid'; allowed 'state' or None"):
        make("popgym-RepeatFirstEasy-v0", num_envs=1, seed=0, context="grid")
    with pytest.raises(ValueError, match=r"the nearest are .*popgym-RepeatFirstEasy-v0"):
        make("popgym-RepeatFrstEasy-v0", num_envs=1, seed=0)
    with pytest.raises(
        ArgumentError, match=r"^k: found 'x'; allowed what popgym-RepeatPreviousEasy-v0 takes \(\w+Error"
    ):
        make("popgym-RepeatPreviousEasy-v0", num_envs=1, seed=0, k="x")
