import dataclasses

import pytest
import torch
from torch import Tensor

from envs.gridworlds import (
    ActiveTMaze,
    KeyToDoor,
    MatchToSample,
    MemoryCorridor,
    MultiRoomKeyDoor,
    PassiveTMaze,
    RepeatFirst,
    RepeatPrevious,
)
from envs.gridworlds.key_to_door import APPLE_ROOM, DOOR_ROOM, KEY_ROOM
from envs.registry import GRIDWORLDS
from tests.envs.conformance import assert_same_steps, check_environment, rollout

RIGHT, UP, LEFT, DOWN = range(4)

TASKS = {
    "passive": (PassiveTMaze, {"corridor_length": 3}),
    "passive, shortest": (PassiveTMaze, {"corridor_length": 1, "time_limit": 2}),
    "passive, lengths and distractors": (
        PassiveTMaze,
        {"corridor_length": 4, "min_corridor_length": 2, "num_distractors": 3},
    ),
    "active": (ActiveTMaze, {"corridor_length": 2, "num_distractors": 2}),
    "active, lengths": (ActiveTMaze, {"corridor_length": 3, "min_corridor_length": 1, "penalty": 0.0}),
    "key to door": (KeyToDoor, {"distractor_length": 5, "room_size": 3}),
    "key to door, two doors": (KeyToDoor, {"distractor_length": 4, "room_size": 4, "num_doors": 2}),
    "key to door, no apples": (KeyToDoor, {"distractor_length": 0, "room_size": 2, "num_apples": 0}),
    "repeat first": (RepeatFirst, {"delay": 5, "num_answers": 3}),
    "repeat first, POPGym": (RepeatFirst, {"delay": 1, "num_answers": 12, "num_distractors": 0}),
    "repeat previous": (RepeatPrevious, {"delay": 2, "num_answers": 10}),
    "repeat previous, POPGym": (RepeatPrevious, {"delay": 3, "max_gap": 1, "num_symbols": 2, "num_distractors": 0}),
    "match to sample": (MatchToSample, {"delay": 5}),
    "match to sample, hidden": (
        MatchToSample,
        {"delay": 3, "min_delay": 3, "hidden_sample": True, "num_choices": 3, "num_colours": 3, "num_distractors": 0},
    ),
    "match to sample, smallest": (MatchToSample, {"delay": 1, "room_size": 2, "sample_steps": 1, "choice_steps": 2}),
    "memory corridor": (MemoryCorridor, {"length": 5, "penalty": 0.0}),
    "memory corridor, shortest": (MemoryCorridor, {"length": 3, "num_distractors": 0}),
    "memory corridor, cue to be fetched": (MemoryCorridor, {"length": 4, "start_distance": 3, "time_limit": 20}),
    "rooms": (MultiRoomKeyDoor, {"num_rooms": 3}),
    "rooms, two": (MultiRoomKeyDoor, {"num_rooms": 2, "num_distractors": 0, "time_limit": 40}),
    "rooms, large": (MultiRoomKeyDoor, {"num_rooms": 2, "room_size": 4, "time_limit": 60}),
}
WITHOUT_TIME_LIMIT = {KeyToDoor, RepeatFirst, RepeatPrevious, MatchToSample}  # their clock belongs to the task
every_task = pytest.mark.parametrize("task", TASKS)


def make(task: str, num_envs: int = 64, seed: int = 0, **more):
    cls, dials = TASKS[task]
    return cls(num_envs=num_envs, seed=seed, **{**dials, **more})


def act(env, *actions: int) -> list:
    """Steps all rows by the same actions."""
    return [env.step(torch.full((env.num_envs,), action)) for action in actions]


def success_rate(env, policy, num_steps: int) -> float:
    """Share of successes among the episodes that end within num_steps; `policy` maps a TimeStep to actions."""
    step, episode_return, outcomes = env.reset(), torch.zeros(env.num_envs, device=env.device), []
    for _ in range(num_steps):
        step = env.step(policy(step))
        episode_return += step.reward
        outcomes.append(episode_return[step.last] >= env.spec.success_reward)
        episode_return *= ~step.last
    assert len(torch.cat(outcomes)) >= env.num_envs
    return torch.cat(outcomes).float().mean().item()


def column(env, step, name: str) -> Tensor:
    """The entry `name` of the context."""
    return step.context[:, env.context_names.index(name)]


@every_task
def test_conforms(task):
    report = check_environment(lambda num_envs, seed: make(task, num_envs, seed), num_steps=120, num_envs=5)
    assert report.terminations
    assert report.time_limits or TASKS[task][0] in WITHOUT_TIME_LIMIT or task == "passive, shortest"


def test_every_gridworld_conforms():
    assert {cls.__name__ for cls, _ in TASKS.values()} == set(GRIDWORLDS)


@every_task
def test_reference_policy_always_succeeds(task):
    env = make(task)
    assert success_rate(env, lambda _: env.reference_policy(), 100) == 1.0


@every_task
def test_observation_and_context_stay_in_range_and_have_names(task):
    env = make(task)
    assert len(env.observation_names) == env.spec.observation_shape[0]
    assert len(env.context_names) == env.spec.context_size
    actions = torch.randint(env.spec.num_actions, (150, 64), generator=torch.Generator().manual_seed(0))
    for step in rollout(env, list(actions)):
        assert step.observation.abs().max() <= 1
        assert step.context.abs().max() <= 1 + 1e-6


@every_task
def test_saved_state_survives_a_file_and_counts_every_draw(task, tmp_path):
    env = make(task, num_envs=4)
    env.reset()
    for num_steps in (31, 1, 1, 40):  # 32 steps share a draw: save on its edges
        act(env, *[RIGHT] * num_steps)
        torch.save(env.state_dict(), tmp_path / "state.pt")
        expected = act(env, *[UP] * 40)
        other = make(task, num_envs=4, seed=5)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert_same_steps(act(other, *[UP] * 40), expected, "the loaded environment went another way")


@every_task
def test_a_state_saved_before_reset_restores_the_stream(task):
    env, other = make(task, seed=3), make(task, seed=4)
    other.load_state_dict(env.state_dict())
    assert_same_steps([other.reset()], [env.reset()], "the streams differ")
    other.reseed(3)
    with pytest.raises(RuntimeError, match="call reset"):
        act(other, RIGHT)
    assert_same_steps([other.reset()], [make(task, seed=3).reset()], "reseed must restart the stream")


def test_loading_a_state_of_another_task_or_batch_says_so():
    state = PassiveTMaze(5, num_envs=2, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"corridor_length=5.*corridor_length=6.*same dials"):
        PassiveTMaze(6, num_envs=2, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2 environments, expected num_envs=3"):
        PassiveTMaze(5, num_envs=3, seed=0).load_state_dict(state)


def test_step_before_reset_says_so():
    with pytest.raises(RuntimeError, match=r"before reset: call reset\(\) first"):
        act(PassiveTMaze(num_envs=1, seed=0), RIGHT)


def test_rows_differ_and_change_between_episodes():
    env = PassiveTMaze(1, num_envs=256, seed=0)
    cues = torch.stack([env.reset().observation[:, 0] for _ in range(50)])  # [50, B]
    assert cues.mean().abs() < 0.05
    assert torch.corrcoef(cues.T[:64]).fill_diagonal_(0).abs().max() < 0.8
    assert (cues[1:] * cues[:-1]).mean().abs() < 0.05


# The T-mazes


@pytest.mark.parametrize("cls", [PassiveTMaze, ActiveTMaze])
@pytest.mark.parametrize("penalty", [None, 0.0])
def test_guessing_at_the_junction_gets_chance(cls, penalty):
    env = cls(4, num_envs=512, seed=0, num_distractors=2, penalty=penalty)
    best_guess = lambda step: torch.where(step.observation[:, 1] == 1, UP, RIGHT)  # noqa: E731
    assert success_rate(env, best_guess, 60) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("cue", [-1.0, 1.0])
@pytest.mark.parametrize("turn", [UP, DOWN])
def test_passive_t_maze_step_by_step(cue, turn):
    env = PassiveTMaze(2, num_envs=16, seed=0, penalty=0.1)
    rows = env.reset().observation[:, 0] == cue
    env = PassiveTMaze(2, num_envs=16, seed=0, penalty=0.1)
    start = env.reset()
    middle, junction, bump, end, again = act(env, RIGHT, RIGHT, RIGHT, turn, DOWN)
    reward = float((turn == UP) == (cue > 0))

    def seen(step):
        return step.observation[rows].unique(dim=0).squeeze(0).tolist()

    assert seen(start) == [cue, 0, 1]
    assert seen(middle) == [0, 0, 0]
    assert seen(junction) == seen(bump) == [0, 1, 0]
    assert [step.reward[rows].unique().item() for step in (middle, junction, bump, end)] == pytest.approx(
        [0, 0, -0.1, reward]
    )
    assert end.last.all() and (end.discount == 0).all()
    assert again.first.all() and (again.reward == 0).all() and (again.discount == 1).all()


@pytest.mark.parametrize("cue", [-1.0, 1.0])
def test_active_t_maze_step_by_step(cue):
    env = ActiveTMaze(2, num_envs=16, seed=0, penalty=0.05, time_limit=15)
    start = env.reset()
    rows = column(env, start, "cue") == cue
    steps = [start, *act(env, UP, RIGHT, LEFT, LEFT, LEFT, RIGHT, LEFT, RIGHT, RIGHT, UP, RIGHT, UP)]

    def of_rows(x):
        return x[rows].unique(dim=0).squeeze(0).tolist()

    observations, rewards = [of_rows(s.observation) for s in steps], [of_rows(s.reward) for s in steps]
    at_start, nothing, junction = [0, 0, 1], [0, 0, 0], [0, 1, 0]
    assert observations == [
        *(at_start, at_start, nothing, at_start),  # up into the wall, right, left
        *([cue, 0, 0], nothing, at_start, nothing),  # the oracle, into its wall, and back to it: no cue any more
        *(at_start, nothing, nothing, junction, junction),  # to the junction, with a bump, and the turn
    ]
    fine = -0.05  # all but forward steps, the first one onto the oracle, and the turn
    expected = [0, fine, 0, fine, 0, fine, 0, fine, 0, 0, fine, 0, float(cue > 0)]
    assert rewards == pytest.approx(expected)
    assert [bool(step.last.any()) for step in steps] == [False] * 12 + [True]


@pytest.mark.parametrize("cls", [PassiveTMaze, ActiveTMaze])
def test_time_limit_cuts_without_terminating(cls):
    env = cls(3, num_envs=4, seed=0, time_limit=7)
    env.reset()
    *mids, last = act(env, *[UP] * 7)
    assert not any(step.last.any() for step in mids)
    assert last.last.all() and (last.discount == 1).all()
    assert (column(env, last, "time_left") == 0).all()


def test_a_turn_in_the_last_moment_terminates():
    env = PassiveTMaze(3, num_envs=4, seed=0, time_limit=4)
    env.reset()
    last = act(env, RIGHT, RIGHT, RIGHT, UP)[-1]
    assert last.last.all() and (last.discount == 0).all()


@pytest.mark.parametrize("cls", [PassiveTMaze, ActiveTMaze])
@pytest.mark.parametrize("penalty", [None, 0.0, 0.05])
def test_the_worst_success_beats_the_best_failure(cls, penalty):
    env = cls(4, num_envs=64, seed=0, min_corridor_length=2, penalty=penalty)
    steps = [env.reset()]

    def dawdle(step):  # bumps into the wall as long as time allows
        needed = 4 + 1 + 2 * (cls is ActiveTMaze)
        left = (column(env, step, "time_left") * env.time_limit).round()
        return torch.where(left > needed, DOWN, env.reference_policy())

    total = torch.zeros(64)
    while not steps[-1].last.any():
        steps.append(env.step(dawdle(steps[-1])))
        total += steps[-1].reward
    worst = total[steps[-1].last]
    assert (worst >= env.spec.success_reward).all()
    assert (worst > 0).all() and env.spec.success_reward > 0


def test_the_highest_fine_leaves_more_between_success_and_failure_than_rounding():
    """Statistics of episodes allow for 1e-6, which must not make a success of a failure that returns 0."""
    assert PassiveTMaze(num_envs=1, seed=0, penalty=0.047614).spec.success_reward > 1e-5
    assert MemoryCorridor(5, num_envs=1, seed=0, penalty=0.07691).spec.success_reward > 1e-5
    for cls, dials in ((PassiveTMaze, {"penalty": 0.047619}), (MemoryCorridor, {"length": 5, "penalty": 0.076923})):
        with pytest.raises(ValueError, match=r"penalty: found .*; allowed up to"):
            cls(num_envs=1, seed=0, **dials)


def test_apples_that_are_worth_as_much_as_the_door_leave_no_success_to_tell():
    dials = {"num_envs": 1, "seed": 0, "num_apples": 8, "door_reward": 1.0}
    assert KeyToDoor(distractor_length=5, apple_reward=0.1249999, **dials).spec.success_reward is None
    assert KeyToDoor(distractor_length=5, apple_reward=0.12, **dials).spec.success_reward == pytest.approx(0.98)


def test_lengths_are_uniform_and_the_corridor_is_featureless():
    env = PassiveTMaze(6, num_envs=2000, seed=0, min_corridor_length=3)
    steps = [env.reset(), *act(env, *[RIGHT] * 6)]
    lengths = torch.stack([1 - s.observation[:, 1] for s in steps]).sum(0)  # steps until the junction is seen
    counts = lengths.long().bincount(minlength=7)
    assert counts[:3].sum() == 0
    assert (counts[3:] / 2000 - 0.25).abs().max() < 0.04
    in_corridor = (steps[1].context[:, 3] == 0) & (steps[1].context[:, 4] == 0)
    assert not steps[1].observation[in_corridor].any()
    assert (lengths / 6 == column(env, steps[0], "distance")).all()


def test_corridor_observations_tell_nothing_of_position_cue_or_length():
    env = PassiveTMaze(30, num_envs=400, seed=0, min_corridor_length=20, num_distractors=3)
    start, *steps = [env.reset(), *act(env, *[RIGHT] * 19)]
    cue = start.observation[:, 0]
    observations = torch.stack([s.observation for s in steps])  # [T, B, 6]
    assert not observations[:, :, :3].any()
    distractors = torch.cat((start.observation[None, :, 3:], observations[:, :, 3:]))
    assert (distractors.abs() == 1).all()
    assert distractors.mean().abs() < 0.02
    assert (distractors * cue[:, None]).mean(dim=(0, 1)).abs().max() < 0.03
    assert (distractors[1:] * distractors[:-1]).mean().abs() < 0.02
    assert (distractors[..., 0] * distractors[..., 1]).mean().abs() < 0.03


def test_context_of_the_t_maze_in_numbers():
    env = ActiveTMaze(4, num_envs=1, seed=0)
    start, oracle, *_, middle = [env.reset(), *act(env, LEFT, RIGHT, RIGHT)]
    cue = column(env, start, "cue").item()
    #                                     cue  position  distance  start  junction  seen  time left
    assert start.context[0].tolist() == pytest.approx([cue, 0.0, 4 / 5, 1, 0, 0, 1.0])
    assert oracle.context[0].tolist() == pytest.approx([cue, -1 / 4, 5 / 5, 0, 0, 1, 13 / 14])
    assert middle.context[0].tolist() == pytest.approx([cue, 1 / 4, 3 / 5, 0, 0, 1, 11 / 14])


# Key to door


def play(env, policy_by_room: dict[int, str]) -> list:
    """One episode in which each room is played by "reference" or by bumping into the bottom wall."""
    steps = [env.reset()]
    while not steps[-1].last.any():
        room = int(steps[-1].context[0, :3].argmax())
        wait = torch.full((env.num_envs,), DOWN)
        steps.append(env.step(env.reference_policy() if policy_by_room.get(room) == "reference" else wait))
    return steps


def test_the_rooms_follow_the_clock():
    env = KeyToDoor(4, num_envs=2, seed=0, room_size=3, key_steps=3, door_steps=2)
    rooms = [int(step.context[0, :3].argmax()) for step in play(env, {})]
    assert rooms == [KEY_ROOM] * 3 + [APPLE_ROOM] * 4 + [DOOR_ROOM] * 3
    steps = play(env, {})
    assert (steps[-1].discount == 0).all() and steps[-1].last.all()
    assert all((step.observation[:, -3:] == step.context[:, :3]).all() for step in steps)


@pytest.mark.parametrize("num_doors", [1, 2])
def test_the_door_pays_only_with_the_key(num_doors):
    env = KeyToDoor(4, num_envs=32, seed=0, num_doors=num_doors, num_apples=0)
    with_key = play(env, {KEY_ROOM: "reference", DOOR_ROOM: "reference"})
    without = play(env, {DOOR_ROOM: "reference"})
    assert sum(step.reward for step in with_key).tolist() == [1.0] * 32
    assert sum(step.reward for step in without).tolist() == [0.0] * 32
    assert without[-1].last.all() and len(without) < env.episode_length
    assert (column(env, with_key[-1], "has_key") == 1).all() and (column(env, without[-1], "has_key") == 0).all()


def test_the_key_shows_its_colour_until_taken_and_never_again():
    env = KeyToDoor(4, num_envs=64, seed=0, num_doors=2, room_size=3)
    steps = play(env, {KEY_ROOM: "reference", DOOR_ROOM: "reference"})
    colour = column(env, steps[0], "key_colour")
    assert 10 < (colour > 0).sum() < 54
    for step in steps:
        key_map = step.observation[:, 9:18]
        visible = (step.context[:, 0] == 1) & (column(env, step, "has_key") == 0)
        assert (key_map.sum(1) == colour * visible).all()
        door_map = step.observation[:, 27:36]
        assert (door_map == torch.tensor([-1.0, 0, 1, 0, 0, 0, 0, 0, 0]) * step.context[:, 2:3]).all()


def test_what_is_seen_after_the_key_room_does_not_tell_the_key():
    env = KeyToDoor(6, num_envs=512, seed=0, num_doors=2)
    nearest = play(env, {KEY_ROOM: "reference"})
    door_room = [step for step in nearest if step.context[0, 2] == 1]
    assert (door_room[0].observation == door_room[0].observation[0]).all()


def test_always_the_same_of_two_doors_gets_chance():
    env = KeyToDoor(4, num_envs=256, seed=0, num_doors=2, room_size=3)
    left_door = lambda step: torch.where(step.context[:, 7] > -1, UP, LEFT)  # noqa: E731

    def policy(step):
        return torch.where(step.context[:, 2] == 1, left_door(step), env.reference_policy())

    assert success_rate(env, policy, 40) == pytest.approx(0.5, abs=0.07)


def test_each_apple_pays_once():
    env = KeyToDoor(40, num_envs=128, seed=0, room_size=3, num_apples=5, apple_reward=0.1, num_doors=2)
    env.reset()
    act(env, *[DOWN] * 15)
    step = act(env, DOWN)[0]
    apples = step.observation[:, 18:27].clone()
    assert (apples.sum(1) == 5).all()
    assert not apples[:, 7].any()  # the agent's cell
    eaten = torch.zeros(128)
    for action in [LEFT, UP, UP, RIGHT, DOWN, DOWN, UP, RIGHT, DOWN, UP, UP, LEFT]:  # every cell, some twice
        before, (step,) = apples, act(env, action)
        apples = step.observation[:, 18:27].clone()
        assert torch.allclose(step.reward, 0.1 * (before - apples).sum(1))
        eaten += before.sum(1) - apples.sum(1)
    assert (eaten == 5).all()
    assert (column(env, step, "apples_left") == 0).all()


def test_keys_lie_everywhere_but_under_the_agent():
    env = KeyToDoor(4, num_envs=4000, seed=0, room_size=3)
    frequency = env.reset().observation[:, 9:18].mean(0)
    assert frequency[7] == 0
    assert (frequency[torch.arange(9) != 7] - 1 / 8).abs().max() < 0.02


def test_a_return_that_cannot_tell_success_is_not_offered():
    assert KeyToDoor(num_envs=1, seed=0, num_apples=8, apple_reward=0.125).spec.success_reward is None
    assert KeyToDoor(num_envs=1, seed=0, num_apples=8, apple_reward=0.1).spec.success_reward == pytest.approx(0.9)


# Errors


@pytest.mark.parametrize(
    ("cls", "dials", "message"),
    [
        (PassiveTMaze, {"corridor_length": 0}, r"^corridor_length: found 0; allowed an integer of at least 1"),
        (PassiveTMaze, {"corridor_length": 2.0}, r"^corridor_length: found 2\.0; allowed an integer of at least 1"),
        (PassiveTMaze, {"num_distractors": -1}, r"^num_distractors: found -1; allowed an integer of at least 0"),
        (
            ActiveTMaze,
            {"corridor_length": 5, "min_corridor_length": 6},
            r"^min_corridor_length: found 6; allowed an integer from 1 to 5; None keeps",
        ),
        (
            PassiveTMaze,
            {"corridor_length": 5, "time_limit": 5},
            r"^time_limit: found 5; allowed .* at least 6; the longest",
        ),
        (
            ActiveTMaze,
            {"corridor_length": 5, "time_limit": 7},
            r"^time_limit: found 7; allowed .* at least 8; the longest",
        ),
        (PassiveTMaze, {"penalty": -0.1}, r"^penalty: found -0\.1; allowed a number from 0 to 1; .* 0 turns it off"),
        (PassiveTMaze, {"penalty": "0"}, r"^penalty: found '0'; allowed a number from 0 to 1"),
        (PassiveTMaze, {"penalty": 0.5}, r"^penalty: found 0\.5; allowed up to 0\.0476143, .*; lower it"),
        (PassiveTMaze, {"num_envs": 0}, r"^num_envs: found 0; allowed an integer of at least 1"),
        (PassiveTMaze, {"seed": -1}, r"^seed: found -1; allowed an integer from 0 to \d+"),
        (KeyToDoor, {"distractor_length": -1}, r"^distractor_length: found -1; allowed an integer of at least 0"),
        (KeyToDoor, {"num_doors": 3}, r"^num_doors: found 3; allowed an integer from 1 to 2"),
        (KeyToDoor, {"room_size": 1}, r"^room_size: found 1; allowed an integer of at least 2"),
        (KeyToDoor, {"key_steps": 5}, r"^key_steps: found 5; allowed .* at least 6; room_size=5 has a cell"),
        (KeyToDoor, {"door_steps": 3}, r"^door_steps: found 3; allowed .* at least 4; room_size=5 has a door"),
        (KeyToDoor, {"num_apples": 25}, r"^num_apples: found 25; allowed an integer from 0 to 24; room_size=5"),
        (KeyToDoor, {"apple_reward": -1}, r"^apple_reward: found -1; allowed a number from 0"),
        (KeyToDoor, {"door_reward": 0}, r"^door_reward: found 0; allowed a number from 1e-06"),
        (RepeatFirst, {"delay": 0}, r"^delay: found 0; allowed an integer of at least 1"),
        (RepeatFirst, {"delay": 3, "min_delay": 4}, r"^min_delay: found 4; allowed an integer from 1 to 3; 3 keeps"),
        (RepeatFirst, {"num_answers": 0}, r"^num_answers: found 0; allowed an integer of at least 1"),
        (RepeatPrevious, {"delay": 0}, r"^delay: found 0; allowed an integer of at least 1"),
        (RepeatPrevious, {"max_gap": 0}, r"^max_gap: found 0; allowed an integer of at least 1"),
        (RepeatPrevious, {"num_symbols": 1}, r"^num_symbols: found 1; allowed an integer of at least 2"),
        (RepeatPrevious, {"num_distractors": -1}, r"^num_distractors: found -1; allowed an integer of at least 0"),
        (MatchToSample, {"delay": 2, "min_delay": 0}, r"^min_delay: found 0; allowed an integer from 1 to 2; 2 keeps"),
        (MatchToSample, {"hidden_sample": 1}, r"^hidden_sample: found 1; allowed true or false"),
        (MatchToSample, {"num_choices": 4}, r"^num_choices: found 4; allowed an integer from 2 to 3; as many as"),
        (
            MatchToSample,
            {"sample_steps": 3, "hidden_sample": True},
            r"^sample_steps: found 3; allowed .* at least 4; with",
        ),
        (MatchToSample, {"choice_steps": 2}, r"^choice_steps: found 2; allowed .* at least 3; room_size=3 has a cell"),
        (MultiRoomKeyDoor, {"num_rooms": 1}, r"^num_rooms: found 1; allowed an integer of at least 2"),
        (
            MultiRoomKeyDoor,
            {"num_rooms": 3, "min_rooms": 4},
            r"^min_rooms: found 4; allowed an integer from 2 to 3; 3 keeps",
        ),
        (MultiRoomKeyDoor, {"room_size": 2}, r"^room_size: found 2; allowed an integer of at least 3; the doors"),
        (
            MultiRoomKeyDoor,
            {"num_rooms": 2, "time_limit": 14},
            r"^time_limit: found 14; allowed .* at least 15; it bounds the longest",
        ),
        (MemoryCorridor, {"length": 2}, r"^length: found 2; allowed an integer of at least 3; a shorter corridor"),
        (
            MemoryCorridor,
            {"length": 5, "min_length": 6},
            r"^min_length: found 6; allowed an integer from 3 to 5; 5 keeps",
        ),
        (
            MemoryCorridor,
            {"length": 8, "start_distance": 5},
            r"^start_distance: found 5; allowed .* from 0 to 4; it must lie",
        ),
        (MemoryCorridor, {"length": 5, "time_limit": 6}, r"^time_limit: found 6; allowed .* at least 7; the longest"),
        (
            MemoryCorridor,
            {"length": 5, "penalty": 0.1},
            r"^penalty: found 0\.1; allowed up to 0\.0769154, .*; lower it",
        ),
    ],
)
def test_a_wrong_dial_is_named_with_what_is_allowed(cls, dials, message):
    with pytest.raises(ValueError, match=message) as error:
        cls(**{"num_envs": 1, "seed": 0, **dials})
    assert "\n" not in str(error.value)


def test_a_wrong_type_of_action_is_named():
    env = PassiveTMaze(num_envs=2, seed=0)
    env.reset()
    with pytest.raises(ValueError, match=r"int64 of shape \(2,\) on cpu, got torch.int32"):
        env.step(torch.zeros(2, dtype=torch.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_task
def test_conforms_on_a_gpu(task):
    check_environment(lambda num_envs, seed: make(task, num_envs, seed, device="cuda"), num_steps=120, num_envs=5)
    env = make(task, device="cuda")
    assert success_rate(env, lambda _: env.reference_policy(), 100) == 1.0


def test_steps_share_no_memory():
    env = PassiveTMaze(3, num_envs=2, seed=0, num_distractors=1)
    steps = [env.reset(), *act(env, RIGHT, RIGHT)]
    tensors = [t for s in steps for f in dataclasses.fields(s) if (t := getattr(s, f.name)) is not None]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


# The conformance check itself notices what it promises to notice


class Broken:
    """A T-maze in which one thing is wrong."""

    def __init__(self, break_step=None, **overrides):
        self._break_step = break_step or (lambda step, t: step)
        self._overrides = overrides

    def __call__(self, *, num_envs: int, seed: int):
        env = PassiveTMaze(2, num_envs=num_envs, seed=seed, num_distractors=1)
        clock = iter(range(10**6))
        reset, step = env.reset, env.step
        env.reset = lambda: self._break_step(reset(), next(clock))
        env.step = lambda actions: self._break_step(step(actions), next(clock))
        for name, value in self._overrides.items():
            setattr(env, name, value(env))
        return env


def replaced(**changes):
    return lambda step, t: dataclasses.replace(step, **{name: f(step, t) for name, f in changes.items()})


def scribble(step, t):
    """Writes into a step that was handed out before."""
    if scribble.kept is not None:
        scribble.kept.observation[:] = 7.0
    scribble.kept = step
    return step


scribble.kept = None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Broken(replaced(first=lambda s, t: torch.zeros_like(s.first))), "every row of reset"),
        (Broken(replaced(first=lambda s, t: s.first | (t == 5))), "FIRST must follow LAST|FIRST and LAST"),
        (Broken(replaced(reward=lambda s, t: s.reward + 1)), r"the reward of reset\(\) must be 0"),
        (Broken(replaced(reward=lambda s, t: s.reward + s.first * (t > 0))), "reward must be 0 on a FIRST step"),
        (Broken(replaced(discount=lambda s, t: s.discount * (t != 1))), "discount must be 1 while"),
        (Broken(replaced(discount=lambda s, t: s.discount * 0.9)), "discount"),
        (Broken(replaced(reward=lambda s, t: s.reward.double())), "reward is .*float64.*expected"),
        (Broken(replaced(observation=lambda s, t: s.observation[:, :-1])), "observation is .*expected"),
        (Broken(replaced(context=lambda s, t: None)), "context must be a tensor"),
        (Broken(replaced(observation=lambda s, t: s.observation + torch.rand(1))), "the same seed"),
        (Broken(scribble), "a TimeStep changed"),
        (Broken(reseed=lambda env: None, load_state_dict=lambda env: lambda state: None), "did not continue"),
        (Broken(_raise_if_out_of_range=lambda env: lambda low, high: None), "IndexError|DID NOT RAISE|out of range"),
    ],
)
def test_the_conformance_check_notices(broken, message):
    with pytest.raises((AssertionError, IndexError, pytest.fail.Exception), match=message):
        check_environment(broken, num_steps=60)
