"""Real games, briefly: starting an emulator takes a tenth of a second, and 200 frames another."""

import itertools
import re

import ale_py
import numpy as np
import pytest
import torch

from envs.arguments import ArgumentError
from envs.atari import Atari, game_name
from tests.envs.conformance import check_environment


def breakout(**settings):
    return Atari("breakout", **{"num_envs": 2, "seed": 3, "num_threads": 1, **settings})


@pytest.fixture(scope="module")
def shared():
    """Two games for the tests that do not mind what was played before."""
    env = breakout()
    yield env
    env.close()


def play(env, num_steps, seed=0):
    """Random steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = [env.reset()]
    for _ in range(num_steps):
        actions = torch.randint(env.spec.num_actions, (env.num_envs,), generator=generator)
        steps.append(env.step(actions))
    env.close()
    return steps


def test_conforms():
    report = check_environment(
        lambda num_envs, seed: breakout(
            num_envs=num_envs, seed=seed, max_frames=120, episodic_life=True, flicker_probability=0.3
        ),
        num_steps=40,
        num_envs=1,
    )
    assert report.terminations or report.time_limits


def test_one_grey_frame_by_default(shared):
    step = shared.reset()
    assert step.observation.shape == (2, 1, 84, 84) and step.observation.dtype == torch.uint8
    assert step.first.all() and not step.last.any() and step.reward.sum() == 0 and step.discount.sum() == 2


def test_stored_steps_are_never_overwritten(shared):
    stored = [shared.reset()]
    copies = [stored[0].observation.clone()]
    for t in range(60):
        stored.append(shared.step(torch.tensor([t % 4, 1])))
        copies.append(stored[-1].observation.clone())
    assert all(torch.equal(step.observation, copy) for step, copy in zip(stored, copies, strict=True))
    assert len({step.observation.data_ptr() for step in stored}) == len(stored)


def test_environments_of_neighbouring_runs_differ():
    def tape(seed):
        env = breakout(seed=seed)
        env.reset()
        return torch.stack([env.step(torch.full((2,), t % 4)).observation for t in range(60)], 1)  # [B, T, ...]

    rows = torch.cat([tape(3), tape(4)]).flatten(1)
    # With ale_py's own integer seeds environment 1 of a run is environment 0 of the next.
    assert len(rows.unique(dim=0)) == 4


def test_a_game_ends_once_and_starts_again_with_the_next_step():
    steps = play(breakout(num_envs=1, noop_max=5), 400)
    ends = [t for t, step in enumerate(steps) if step.last]
    assert ends
    for t, step in enumerate(steps):
        assert step.game_over is None  # that is `last`
        assert step.discount == 1.0 - step.last.float()
        assert step.first == (t == 0 or steps[t - 1].last)


def test_a_time_limit_keeps_the_discount():
    env = breakout(num_envs=1, max_frames=40)  # ten steps of four frames
    steps = play(env, 23)
    assert [t for t, step in enumerate(steps) if step.last.all()] == [10, 21]
    assert [t for t, step in enumerate(steps) if step.first.all()] == [0, 11, 22]
    assert all(step.discount.eq(1).all() for step in steps)


def test_a_lost_life_ends_the_episode_but_not_the_game():
    whole = play(breakout(num_envs=1, sticky_actions=0.0), 60)
    steps = play(breakout(num_envs=1, sticky_actions=0.0, episodic_life=True), 400)
    games = sum(bool(step.game_over) for step in steps)
    ends = sum(bool(step.last) for step in steps)
    assert games >= 1 and 5 * games <= ends <= 5 * games + 4  # Breakout has five lives
    for before, after in itertools.pairwise(steps):
        if before.last:
            assert before.discount == 0 and after.first and after.reward == 0 and after.discount == 1
            # Bricks, score and lives on the screen show whether the game went on.
            assert torch.equal(after.observation, steps[0].observation) == bool(before.game_over)
    first_end = next(t for t, step in enumerate(steps) if step.last)
    for t in range(first_end + 1):  # up to there nothing is changed
        assert torch.equal(steps[t].observation, whole[t].observation)


def test_the_score_of_a_game_can_be_added_up_over_lost_lives():
    class Emulators:
        """Plays a tape: three lives, points in every step, the last life ends the game."""

        tape = (
            *((3, 5, False), (2, 1, False), (2, 7, False), (1, -4, False), (1, 0, False)),
            *((0, 3, False), (0, 2, True), (3, 0, False)),  # as in Q*bert, the game runs on a little without a life
        )

        def __init__(self):
            self.actions = []

        def step(self, actions):
            lives, points, over = self.tape[len(self.actions)]
            self.actions.append(int(actions[0]))
            observation = np.zeros((1, 1, 84, 84), np.uint8)
            info = {"lives": np.array([lives])}
            return observation, np.array([points]), np.array([over]), np.array([False]), info

    env = breakout(num_envs=1, episodic_life=True)
    env.reset()
    env._emulators, env._lives = Emulators(), np.array([3])
    steps = [env.step(torch.tensor([2])) for _ in range(8)]
    assert [step.last.item() for step in steps] == [False, True, False, True, False, False, True, False]
    assert [step.first.item() for step in steps] == [False, False, True, False, True, False, False, True]
    assert [step.discount.item() for step in steps] == [1, 0, 1, 0, 1, 1, 0, 1]
    assert [step.reward.item() for step in steps] == [1, 1, 0, -1, 0, 1, 1, 0]
    assert [step.raw_reward.item() for step in steps] == [5, 1, 7, -4, 0, 3, 2, 0]
    assert [step.game_over.item() for step in steps] == [False] * 6 + [True, False]
    assert env._emulators.actions == [2, 2, 0, 2, 0, 2, 2, 0]  # a no-op for every ignored action


def test_a_game_that_ends_in_the_noop_after_a_lost_life_is_not_bootstrapped_into_the_next():
    class Emulators:
        tape = iter([(1, False), (1, True), (2, False)])  # a life lost, the game over in the no-op, a new game

        def step(self, actions):
            lives, over = next(self.tape)
            arrays = np.zeros((1, 1, 84, 84), np.uint8), np.array([0]), np.array([over]), np.array([False])
            return *arrays, {"lives": np.array([lives])}

    env = breakout(num_envs=1, episodic_life=True)
    env.reset()
    env._emulators, env._lives = Emulators(), np.array([2])
    steps = [env.step(torch.tensor([1])) for _ in range(3)]
    assert [step.last.item() for step in steps] == [True, False, False]
    assert [step.first.item() for step in steps] == [False, True, True]
    assert [step.discount.item() for step in steps] == [0, 1, 0]


def test_points_are_kept_beside_the_clipped_reward():
    env = Atari("ms_pacman", num_envs=1, seed=0, num_threads=1)
    steps = play(env, 120)
    raw = torch.cat([step.raw_reward for step in steps])
    assert raw.max() >= 10  # a pellet
    assert torch.equal(torch.cat([step.reward for step in steps]), raw.clamp(-1, 1))
    plain = play(Atari("ms_pacman", num_envs=1, seed=0, num_threads=1, clip_rewards=False), 120)
    assert torch.equal(torch.cat([step.reward for step in plain]), raw) and plain[0].raw_reward is None


def test_flicker_blanks_the_stated_share_of_the_frames_and_leaves_the_game_alone():
    plain = play(breakout(num_envs=1), 200)
    flickering = play(breakout(num_envs=1, flicker_probability=0.5), 200)
    black = torch.stack([step.observation.flatten(1).eq(0).all(1) for step in flickering])
    assert 0.4 < black.float().mean() < 0.6
    for clear, step, is_black in zip(plain, flickering, black, strict=True):
        assert torch.equal(step.observation[~is_black], clear.observation[~is_black])
        assert torch.equal(step.reward, clear.reward)


def test_a_black_frame_stays_black_in_the_stack():
    steps = play(breakout(num_envs=1, frame_stack=3, flicker_probability=0.5), 40)
    black = torch.stack([step.observation[0].flatten(1).eq(0).all(1) for step in steps[3:]])  # [T, frame_stack]
    assert black.any() and not black.all()
    assert torch.equal(black[1:, :-1], black[:-1, 1:])


def test_frame_stack_and_action_space_are_in_the_spec(shared):
    env = breakout(num_envs=1, frame_stack=4, full_action_space=True, frame_skip=2)
    assert env.spec.observation_shape == (4, 84, 84) == tuple(env.reset().observation.shape[1:])
    assert env.spec.num_actions == 18 and env.spec.frames_per_step == 2
    assert shared.spec.num_actions == 4


def test_fire_reset_starts_the_ball():
    def lives_after_waiting(**settings):
        env = breakout(num_envs=1, sticky_actions=0.0, **settings)
        env.reset()
        for _ in range(60):
            env.step(torch.tensor([0]))
        return env._lives.item()

    assert lives_after_waiting() == 5 and lives_after_waiting(use_fire_reset=True) == 4


@pytest.mark.timeout(30)
@pytest.mark.parametrize("actions", [[0, 4], [-1, 0], [0], [0.0, 1.0], [True, False]])
def test_bad_actions_are_refused_before_the_emulators_hang_on_them(shared, actions):
    shared.reset()
    with pytest.raises(ValueError, match="actions"):
        shared.step(torch.tensor(actions))
    shared.step(torch.tensor([0, 1]))  # and they still run


def test_the_action_after_the_last_step_may_be_anything():
    env = breakout(num_envs=1, max_frames=4)
    env.reset()
    assert env.step(torch.tensor([0])).last
    assert env.step(torch.tensor([99])).first


@pytest.mark.parametrize("name", ["ALE/MsPacman-v5", "MsPacman", "ms_pacman"])
def test_names_of_games(name):
    assert game_name(name) == "ms_pacman"


def test_an_unknown_game_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown Atari game 'ALE/Brekout-v5'; the nearest is 'ALE/Breakout-v5'"):
        Atari("ALE/Brekout-v5", num_envs=1, seed=0)


def test_games_whose_rom_would_end_the_process_are_unknown():
    assert "combat" in ale_py.roms.get_all_rom_ids()
    with pytest.raises(ValueError, match="unknown Atari game"):
        Atari("combat", num_envs=1, seed=0)


def test_a_missing_rom_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"^the ROM of 'pong' is missing or damaged"):
        Atari("pong", num_envs=1, seed=0)


@pytest.mark.parametrize(
    "setting",
    [
        {"context": "ram"},
        {"frame_stack": 0},
        {"frame_skip": 0},
        {"sticky_actions": 1.5},
        {"flicker_probability": -0.1},
        {"max_frames": 3},
        {"noop_max": -1},
        {"num_envs": 0},
        {"seed": -1},
    ],
)
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}"):
        breakout(**setting)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("frame_skip", "4x", "an integer of at least 1"),
        ("frame_skip", 2.5, "an integer of at least 1"),
        ("frame_stack", True, "an integer of at least 1"),
        ("max_frames", None, "an integer of at least 4; an action takes frame_skip of them"),
        ("num_threads", "many", "an integer of at least 0"),
        ("noop_max", [1], "an integer of at least 0"),
        ("sticky_actions", None, "a number from 0 to 1"),
        ("flicker_probability", "0.1", "a number from 0 to 1"),
        ("clip_rewards", "no", "true or false"),
        ("episodic_life", None, "true or false"),
        ("full_action_space", 1, "true or false"),
        ("use_fire_reset", "yes", "true or false"),
    ],
)
def test_settings_of_another_type_are_named(name, value, allowed):
    with pytest.raises(
        ArgumentError, match=f"^{name}: found {re.escape(repr(value))}; allowed {allowed}; leave it out"
    ):
        breakout(**{name: value})


def test_the_order_of_calls():
    env = breakout(num_envs=1)
    with pytest.raises(RuntimeError, match="reset before step"):
        env.step(torch.tensor([0]))
    assert not env.resumable
    with pytest.raises(RuntimeError, match="cannot be saved"):
        env.state_dict()
    with pytest.raises(RuntimeError, match="cannot be restored"):
        env.load_state_dict({})
    env.reset()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(torch.tensor([0]))
