"""The passive T-maze whose cue comes at any time."""

import pytest
import torch

from envs.gridworlds import PassiveTMaze
from envs.gridworlds.t_maze import LEFT, RIGHT
from tests.envs.conformance import check_environment

DIALS = {"corridor_length": 6, "min_corridor_length": 4, "max_cue_delay": 3, "num_distractors": 1}


def run(env, num_steps, choose):
    """Steps an environment; yields each TimeStep with the number of steps since its rows' first."""
    step, time = env.reset(), torch.zeros(env.num_envs, dtype=torch.int64)
    for _ in range(num_steps):
        yield step, time
        step = env.step(choose(env))
        time = torch.where(step.first, 0, time + 1)


def reference(env):
    return env.reference_policy()


def test_it_keeps_the_promises_of_an_environment():
    report = check_environment(
        lambda num_envs, seed: PassiveTMaze(num_envs=num_envs, seed=seed, time_limit=9, penalty=0.0, **DIALS),
        num_steps=200,
    )
    assert report.terminations and report.time_limits


def test_the_cue_is_shown_once_at_any_time_and_never_at_the_junction():
    env = PassiveTMaze(num_envs=64, seed=0, **DIALS)
    times, episodes = [], 0
    for step, time in run(env, 400, reference):
        shown = step.observation[:, 0] != 0
        times += time[shown].tolist()
        episodes += int(step.first.sum())
        assert not (shown & (step.observation[:, 1] == 1)).any()
        assert torch.equal(step.observation[shown, 0], step.context[shown, 0])
        assert (step.context[shown, 5] == 1).all()
    counts = torch.tensor(times).bincount()
    assert len(counts) == 4 and abs(len(times) - episodes) <= 64  # of episodes still under way
    assert ((counts / len(times) - 0.25).abs() < 0.03).all()


def test_a_cue_not_shown_yet_is_not_marked_as_seen():
    env = PassiveTMaze(num_envs=64, seed=0, **DIALS)
    seen = torch.zeros(64, dtype=torch.bool)
    unseen = 0
    for step, _ in run(env, 200, reference):
        seen = (seen & ~step.first) | (step.observation[:, 0] != 0)
        unseen += int((~seen).sum())
        assert torch.equal(step.context[:, 5] == 1, seen)
    assert unseen > 100


def test_the_reference_policy_always_succeeds_and_is_never_fined():
    env = PassiveTMaze(num_envs=64, seed=0, **DIALS)
    steps = [step for step, _ in run(env, 200, reference)]
    rewards, last = torch.stack([s.reward for s in steps]), torch.stack([s.last for s in steps])
    assert last.sum() > 500 and torch.equal(rewards, last.float())


def test_the_clock_shows_the_cue_wherever_the_agent_is():
    env = PassiveTMaze(num_envs=16, seed=0, **DIALS)  # which stays at the start, against the wall
    times = []
    for step, time in run(env, 4, lambda env: torch.full((env.num_envs,), LEFT)):
        times += time[step.observation[:, 0] != 0].tolist()
        assert (step.observation[:, 2] == 1).all()
        assert (step.reward < 0).all() or not time.any()  # idling is fined, here as anywhere
    assert len(times) == 16


def test_going_back_to_the_start_brings_no_cue():
    env = PassiveTMaze(num_envs=32, seed=0, **DIALS)
    actions = iter([RIGHT, LEFT, RIGHT, LEFT, RIGHT])
    shown = sum(
        (step.observation[:, 0] != 0).int() for step, _ in run(env, 5, lambda env: torch.full((32,), next(actions)))
    )
    assert (shown == 1).all()


def test_without_a_delay_nothing_has_changed():
    env = PassiveTMaze(6, num_envs=8, seed=0)
    assert env.state_dict().keys() == {"task", "started", "generator", "cursor", "_last", "_state", "_time"}
    assert "cue" not in env.state_dict()["task"]
    for step, time in run(env, 50, reference):
        assert torch.equal(step.observation[:, 0] != 0, time == 0)


@pytest.mark.parametrize("delay", [-1, 4, 1.5])
def test_the_cue_comes_before_the_shortest_corridor_ends(delay):
    with pytest.raises(
        ValueError, match=r"max_cue_delay: found .*; allowed an integer from 0 to 3; the cue must come before"
    ):
        PassiveTMaze(num_envs=1, seed=0, **{**DIALS, "max_cue_delay": delay})
