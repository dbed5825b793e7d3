import subprocess
import sys

import dm_env
import gymnasium
import numpy as np
import pytest
import torch
from absl.testing import absltest
from dm_env import test_utils
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from envs import ArgumentError, exports
from envs.gridworlds import PassiveTMaze

RIGHT, UP = 0, 1
DIALS = {
    "PassiveTMaze": {"corridor_length": 3, "num_distractors": 2, "min_corridor_length": 2},
    "ActiveTMaze": {"corridor_length": 2},
    "KeyToDoor": {"distractor_length": 3, "room_size": 3, "num_doors": 2},
    "RepeatFirst": {"delay": 4},
    "RepeatPrevious": {"delay": 2, "num_answers": 5},
    "MatchToSample": {"delay": 3, "hidden_sample": True},
    "MemoryCorridor": {"length": 4, "start_distance": 2},
    "MultiRoomKeyDoor": {"num_rooms": 2, "time_limit": 20},
}
every_name = pytest.mark.parametrize("name", DIALS)


@pytest.fixture(autouse=True)
def _registered():
    exports.register()


def make(name, **more):
    return gymnasium.make(f"dni_rl/{name}-v0", **DIALS[name], **more)


def test_all_are_exported_and_registering_twice_changes_nothing():
    assert set(DIALS) == set(exports.GRIDWORLDS)
    before = dict(gymnasium.registry)
    ids = exports.register()  # gymnasium would warn of an overridden id
    assert ids == [f"dni_rl/{name}-v0" for name in exports.GRIDWORLDS]
    assert dict(gymnasium.registry) == before


def test_importing_registers_nothing():
    code = "import envs.exports, gymnasium; assert not [i for i in gymnasium.registry if i.startswith('dni_rl')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# gymnasium, one environment


@every_name
def test_gymnasium_checker_passes_without_a_warning(name):
    check_env(make(name).unwrapped)


@every_name
def test_gymnasium_episode_matches_the_tensors(name):
    env = make(name)
    observation, info = env.reset(seed=5)
    tensors = exports.GRIDWORLDS[name](
        num_envs=1, seed=int(np.random.default_rng(5).integers(2**63 - 1)), **DIALS[name]
    )
    step = tensors.reset()
    generator = np.random.default_rng(0)
    for _ in range(60):
        np.testing.assert_array_equal(observation, step.observation[0])
        np.testing.assert_array_equal(info["context"], step.context[0])
        action = int(generator.integers(env.action_space.n))
        observation, reward, terminated, truncated, info = env.step(action)
        step = tensors.step(torch.tensor([action]))
        assert reward == step.reward.item()
        assert (terminated or truncated) == step.last.item()
        assert terminated == (step.discount.item() == 0)
        if terminated or truncated:
            (observation, info), step = env.reset(), tensors.reset()


def test_gymnasium_tells_a_time_limit_from_an_end():
    env = gymnasium.make("dni_rl/PassiveTMaze-v0", corridor_length=1, time_limit=3)
    env.reset(seed=0)
    assert [env.step(UP)[2:4] for _ in range(1)] == [(False, False)]
    assert env.step(RIGHT)[2:4] == (False, False)
    assert env.step(RIGHT)[2:4] == (False, True)
    env.reset()
    env.step(RIGHT)
    assert env.step(UP)[2:4] == (True, False)
    with pytest.raises(RuntimeError, match=r"without an episode under way: call reset\(\) first"):
        env.unwrapped.step(UP)


def test_without_a_seed_every_environment_has_episodes_of_its_own():
    makers = (make, lambda name: gymnasium.make_vec(f"dni_rl/{name}-v0", num_envs=1, **DIALS[name]))
    for maker in makers:
        # cue and two distractors of each first step: that two agree by chance has a probability of 2^-192
        one, other = (np.stack([env.reset()[0] for _ in range(64)]) for env in (maker("PassiveTMaze") for _ in "ab"))
        assert (one != other).any()
        assert (one != one[0]).any()  # nor does an environment repeat itself


def test_observations_stay_as_they_were_returned():
    env = make("PassiveTMaze")
    kept = [env.reset(seed=0)[0], *(env.step(RIGHT)[0] for _ in range(3))]
    copies = [x.copy() for x in kept]
    for _ in range(50):
        if any(env.step(RIGHT)[2:4]):
            env.reset()
    for x, y in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(x, y)


# gymnasium, a batch


@every_name
def test_vector_environment_follows_gymnasiums_next_step_protocol(name):
    envs = gymnasium.make_vec(f"dni_rl/{name}-v0", num_envs=5, **DIALS[name])
    assert isinstance(envs, exports.GridworldVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.num_envs == 5
    observations, infos = envs.reset(seed=0)
    assert observations in envs.observation_space
    envs.action_space.seed(0)
    over, num_ends = np.zeros(5, dtype=bool), 0
    for _ in range(100):
        observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        assert rewards.shape == terminations.shape == truncations.shape == (5,)
        assert rewards.dtype == np.float32
        assert terminations.dtype == truncations.dtype == bool
        assert infos["context"].shape[0] == 5 and infos["_context"].all()
        assert not (terminations & truncations).any()
        assert (rewards[over] == 0).all()
        assert not (terminations | truncations)[over].any()
        over = terminations | truncations
        num_ends += over.sum()
    assert num_ends
    envs.close()
    envs.close()


def test_vector_environment_is_reproducible_and_equals_the_tensors():
    runs = []
    for seed in (1, 1, 2):
        envs = gymnasium.make_vec("dni_rl/PassiveTMaze-v0", num_envs=4, corridor_length=3, num_distractors=2)
        run = [envs.reset(seed=seed)[0]]
        run += [envs.step(np.full(4, RIGHT, dtype=np.int32))[0] for _ in range(20)]
        runs.append(np.stack(run))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    seed = int(np.random.default_rng(1).integers(2**63 - 1))
    tensors = PassiveTMaze(3, num_envs=4, seed=seed, num_distractors=2)
    steps = [tensors.reset(), *(tensors.step(torch.full((4,), RIGHT)) for _ in range(20))]
    np.testing.assert_array_equal(runs[0], torch.stack([step.observation for step in steps]))


def test_gymnasiums_own_vectorisation_works_too():
    dials = {"corridor_length": 2, "time_limit": 6}
    envs = gymnasium.make_vec("dni_rl/ActiveTMaze-v0", num_envs=2, vectorization_mode="sync", **dials)
    assert isinstance(envs, gymnasium.vector.SyncVectorEnv)
    start, _ = envs.reset(seed=0)
    assert start in envs.observation_space
    envs.action_space.seed(0)
    over, num_ends = np.zeros(2, dtype=bool), 0
    for _ in range(21):
        observations, rewards, terminations, truncations, _ = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        np.testing.assert_array_equal(observations[over], start[over])  # every episode begins in the same place
        assert (rewards[over] == 0).all()
        over = terminations | truncations
        num_ends += over.sum()
    assert num_ends >= 2 * 3  # at most six steps, and one that resets
    envs.close()


def test_vector_wrappers_of_gymnasium_apply():
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(gymnasium.make_vec("dni_rl/PassiveTMaze-v0", num_envs=3))
    envs.reset(seed=0)
    lengths = []
    for _ in range(100):
        *_, infos = envs.step(np.full(3, RIGHT))
        lengths += list(infos["episode"]["l"][infos["_episode"]]) if "episode" in infos else []
    assert set(lengths) == {42}  # the time limit of a corridor of 20


# dm_env


class _DmEnvContract(test_utils.EnvironmentTestMixin):
    name: str

    def make_object_under_test(self):
        return exports.GridworldDmEnv(self.name, seed=0, **DIALS[self.name])

    def make_action_sequence(self):
        generator = np.random.default_rng(0)
        num_actions = self.environment.action_spec().num_values
        for _ in range(100):  # several episodes
            yield generator.integers(num_actions, dtype=np.int32)


class PassiveTMazeDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "PassiveTMaze"


class ActiveTMazeDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "ActiveTMaze"


class KeyToDoorDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "KeyToDoor"


class RepeatFirstDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "RepeatFirst"


class RepeatPreviousDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "RepeatPrevious"


class MatchToSampleDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "MatchToSample"


class MemoryCorridorDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "MemoryCorridor"


class MultiRoomKeyDoorDmEnvTest(_DmEnvContract, absltest.TestCase):
    name = "MultiRoomKeyDoor"


def test_dm_env_tells_a_time_limit_from_an_end():
    env = exports.GridworldDmEnv("PassiveTMaze", seed=0, corridor_length=1, time_limit=3)
    env.reset()
    steps = [env.step(RIGHT) for _ in range(3)]
    assert [step.step_type for step in steps] == [dm_env.StepType.MID] * 2 + [dm_env.StepType.LAST]
    assert steps[-1].discount == 1.0
    assert env.step(RIGHT).first()
    env.step(RIGHT)
    end = env.step(UP)
    assert end.last() and end.discount == 0.0
    assert env.context.shape == (7,)


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "TMaze"}, r"^name must be one of \['ActiveTMaze', 'KeyToDoor', .*'PassiveTMaze', .*\], got 'TMaze'$"),
        (
            {"name": "PassiveTMaze", "corridor_length": 0},
            r"^corridor_length: found 0; allowed an integer of at least 1",
        ),
        ({"name": "PassiveTMaze", "render_mode": "human"}, r"^render_mode must be None .*, got 'human'$"),
    ],
)
def test_a_wrong_setting_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        exports.GridworldEnv(**kwargs)
    with pytest.raises(ValueError, match=message):
        exports.GridworldVectorEnv(num_envs=2, **kwargs)


def test_a_wrong_action_is_named():
    env, envs = exports.GridworldEnv("PassiveTMaze"), exports.GridworldVectorEnv(2, "PassiveTMaze")
    env.reset(seed=0)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be in \[0, 3\], got 4"):
        env.step(4)
    with pytest.raises(ValueError, match=r"actions must be in \[0, 3\], got -1"):
        envs.step(np.array([0, -1]))
    with pytest.raises(ValueError, match=r"actions must be integers in \[0, 3\], got \[1\.5\]"):
        env.step(1.5)
    with pytest.raises(ValueError, match="seed must be one int"):
        envs.reset(seed=[1, 2])


@pytest.mark.parametrize(("argument", "way_out"), [("seed", r"give it to reset\(seed=...\)"), ("num_envs", "make_vec")])
def test_what_is_no_dial_is_refused_by_name(argument, way_out):
    exports.register()
    with pytest.raises(ArgumentError, match=rf"^{argument}: found 5; allowed what PassiveTMaze takes .*; .*{way_out}"):
        gymnasium.make("dni_rl/PassiveTMaze-v0", **{argument: 5})
