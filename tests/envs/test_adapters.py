import multiprocessing

import dm_env
import gymnasium
import numpy as np
import pytest
import torch
from dm_env import specs
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from envs import ArgumentError
from envs.adapters import (
    DmEnvs,
    GymnasiumEnvs,
    GymnasiumVector,
    checked_actions,
    environment_seeds,
    gymnasium_vector,
)
from envs.minigrid import MINIGRID_SIZES
from tests.envs.conformance import check_environment


class Counter(gymnasium.Env):
    """Counts its steps; action 1 terminates. Rewards are 10 times the count."""

    def __init__(self, observation_space=None, action_space=None, limit=3):
        self.observation_space = observation_space or spaces.Box(-100, 100, (1,), np.float64)
        self.action_space = action_space or spaces.Discrete(2)
        self.limit = limit
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.count = 0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count += 1
        return self._observation(), 10.0 * self.count, bool(action == 1), self.count >= self.limit, {}

    def _observation(self):
        return np.full(self.observation_space.shape, self.count, self.observation_space.dtype)


class Catch(dm_env.Environment):
    """A ball falls through three rows of three columns; the paddle at the bottom catches it."""

    def __init__(self, seed=0, observe=lambda ball, paddle: np.eye(3, dtype=np.float64)[ball], spec=None):
        self._generator = np.random.default_rng(seed)
        self._observe = observe
        self._spec = spec or specs.BoundedArray((3,), np.float64, 0, 1)
        self._row = None

    def reset(self):
        self._row, self._ball, self._paddle = 0, self._generator.integers(3), 1
        return dm_env.restart(self._observe(self._ball, self._paddle))

    def step(self, action):
        if self._row is None:
            return self.reset()
        self._row += 1
        self._paddle = int(np.clip(self._paddle + action, 0, 2))
        if self._row < 2:
            return dm_env.transition(0.0, self._observe(self._ball, self._paddle))
        self._row = None
        return dm_env.termination(float(self._ball == self._paddle), self._observe(self._ball, self._paddle))

    def observation_spec(self):
        return self._spec

    def action_spec(self):
        return specs.BoundedArray((), np.int32, -1, 1)


def zeros(env):
    return torch.zeros(env.num_envs, dtype=torch.int64)


# Seeds and actions


def test_seeds_of_neighbouring_runs_do_not_overlap():
    seeds = [seed for run in range(50) for seed in environment_seeds(run, 64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert environment_seeds(7, 4) == environment_seeds(7, 4) == environment_seeds(7, 9)[:4]
    assert environment_seeds(7, 3) == [1041839916, 1969781632, 2092892605]  # of the runs that there are


def test_colliding_seeds_are_drawn_again():
    assert len(set(environment_seeds(0, 100_000))) == 100_000  # two or three of so many collide


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="negative"):
        environment_seeds(-1, 2)


def test_ignored_actions_may_hold_anything():
    ignored = np.array([True, False])
    assert checked_actions(torch.tensor([9, 1]), 2, ignored).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"in \[0, 2\), got 9 for environment 1"):
        checked_actions(torch.tensor([1, 9]), 2, ignored)


# Single gymnasium environments


def test_serial_environments_follow_the_timeline():
    env = GymnasiumEnvs([Counter(), Counter()], seed=0)
    steps = [env.reset()]
    for actions in ([0, 0], [0, 1], [0, 7], [-3, 0]):  # row 1 terminates, row 0 runs into its limit
        steps.append(env.step(torch.tensor(actions)))
    timeline = {
        name: torch.stack([getattr(step, name) for step in steps], 1).tolist()
        for name in ("reward", "discount", "first", "last")
    }
    assert timeline == {
        "reward": [[0, 10, 20, 30, 0], [0, 10, 20, 0, 10]],
        "discount": [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]],
        "first": [[True, False, False, False, True], [True, False, False, True, False]],
        "last": [[False, False, False, True, False], [False, False, True, False, False]],
    }
    assert torch.stack([step.observation for step in steps], 1).squeeze(-1).tolist() == [
        [0, 1, 2, 3, 0],
        [0, 1, 2, 0, 1],
    ]
    assert steps[0].observation.dtype == torch.float32


def test_seeds_are_given_once():
    envs = [Counter(limit=1), Counter(limit=1)]
    env = GymnasiumEnvs(envs, seed=5)
    env.reset()
    env.step(zeros(env))
    env.step(zeros(env))
    env.reset()
    assert [inner.seeds for inner in envs] == [[seed, None, None] for seed in environment_seeds(5, 2)]


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Box(0, 255, (5, 6, 3), np.uint8), (3, 5, 6), torch.uint8),
        (spaces.Box(0, 255, (4, 5, 6), np.uint8), (4, 5, 6), torch.uint8),
        (spaces.Box(0, 255, (5, 6), np.uint8), (1, 5, 6), torch.uint8),
        (spaces.Box(0, 255, (128,), np.uint8), (128,), torch.float32),
        (spaces.Box(-1, 1, (5, 6), np.float64), (30,), torch.float32),
        (spaces.Box(-1, 1, (3, 5, 6), np.float32), (3, 5, 6), torch.float32),
        (spaces.Box(-1, 1, (), np.float32), (1,), torch.float32),
        (spaces.MultiBinary(4), (4,), torch.float32),
        (spaces.MultiDiscrete([3, 4]), (2,), torch.float32),
        (spaces.Discrete(5, start=-1), (5,), torch.float32),
    ],
)
def test_observations_become_what_the_spec_says(space, shape, dtype):
    env = GymnasiumEnvs([Counter(space), Counter(space)], seed=0)
    step = env.reset()
    assert (env.spec.observation_shape, env.spec.observation_dtype) == (shape, dtype)
    assert step.observation.shape == (2, *shape) and step.observation.dtype == dtype
    stored = step.observation.clone()
    env.step(zeros(env))
    assert torch.equal(step.observation, stored)


def test_image_channels_are_moved_not_reshaped():
    class Image(Counter):
        def _observation(self):
            return np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)

    class Wide(Counter):
        def _observation(self):
            return np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)

    step = GymnasiumEnvs([Wide(spaces.Box(0, 255, (5, 4, 3), np.uint8))], seed=0).reset()
    assert step.observation[0, 2, 4, 1] == (4 * 4 + 1) * 3 + 2
    stacked = GymnasiumEnvs([Image(spaces.Box(0, 255, (2, 4, 3), np.uint8))], seed=0).reset()
    assert stacked.observation.shape == (1, 2, 4, 3)  # two channels first


def test_discrete_observations_become_one_hot():
    class Numbers(Counter):
        def _observation(self):
            return np.int64(self.count + 3)

    env = GymnasiumEnvs([Numbers(spaces.Discrete(4, start=3))], seed=0)
    assert env.reset().observation.tolist() == [[1, 0, 0, 0]]
    assert env.step(zeros(env)).observation.tolist() == [[0, 1, 0, 0]]


def test_images_are_divided_by_the_highest_value_that_their_space_has():
    def scale(high, dtype=np.uint8):
        return GymnasiumEnvs([Counter(spaces.Box(0, high, (10, 10, 4), dtype))], seed=0).spec.observation_scale

    assert scale(1) == 1.0 and scale(255) == 255.0 and scale(1, np.float32) == 255.0


@pytest.mark.parametrize("vector", [False, True])
def test_actions_are_counted_from_zero(vector):
    def make():
        return Counter(action_space=spaces.Discrete(3, start=-1))

    env = GymnasiumVector(SyncVectorEnv([make]), seed=0) if vector else GymnasiumEnvs([make()], seed=0)
    assert env.spec.num_actions == 3
    env.reset()
    assert env.step(torch.tensor([0])).discount == 1 and env.step(torch.tensor([2])).discount == 0  # -1, and 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"action_space": spaces.Box(-1, 1, (2,))},
            r"action space is Box\(-1.0, 1.0, \(2,\), float32\), but only Disc",
        ),
        ({"action_space": spaces.MultiDiscrete([2, 2])}, r"action space is MultiDiscrete"),
        (
            {"observation_space": spaces.Dict(a=spaces.Discrete(2))},
            r"observation space is Dict\('a': Discrete\(2\)\), but",
        ),
        ({"observation_space": spaces.Box(0, 255, (2, 3, 4, 5), np.uint8)}, r"images of shape \(2, 3, 4, 5\)"),
    ],
)
def test_unsupported_spaces_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GymnasiumEnvs([Counter(**settings)], seed=0)


def test_differing_spaces_are_refused():
    with pytest.raises(ValueError, match="equal spaces; environment 1"):
        GymnasiumEnvs([Counter(), Counter(spaces.Box(0, 1, (2,)))], seed=0)


def test_an_environment_that_is_given_twice_is_refused():
    shared = Counter()
    with pytest.raises(ValueError, match="got the same one twice; build a new one each time"):
        gymnasium_vector(lambda: shared, 2, seed=0)


def test_context_is_a_function_of_the_environment():
    env = gymnasium_vector(Counter, 2, seed=0, context=lambda env: np.array([env.count, 7]))
    assert env.spec.context_size == 2
    assert env.reset().context.tolist() == [[0, 7], [0, 7]]
    assert env.step(torch.tensor([0, 0])).context.tolist() == [[1, 7], [1, 7]]
    assert env.step(torch.tensor([1, 0])).context.dtype == torch.float32
    assert env.step(torch.tensor([0, 0])).context.tolist() == [[0, 7], [3, 7]]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"count": 1}, "{'count': 1}"),
        (None, "None"),
        ("1", "'1'"),
        ([[1], [2, 3]], r"\[\[1\], \[2, 3\]\]"),
        (np.array([]), r"array\(\[\], dtype=float64\)"),
        (np.array([None] * 90).reshape(9, 10), "array"),  # of several lines
    ],
)
def test_a_context_that_is_no_array_of_numbers_is_refused(given, shown):
    line = f"^context: found a function that gives {shown}.*; allowed one that gives an array of numbers; return .*$"
    with pytest.raises(ArgumentError, match=line) as error:
        GymnasiumEnvs([Counter()], seed=0, context=lambda env: given)
    assert "\n" not in str(error.value)
    with pytest.raises(ArgumentError, match=line):
        DmEnvs(Catch, num_envs=1, seed=0, context=lambda env: given)


def test_a_context_that_misses_what_is_inside_of_wrappers_is_told_where_it_is():
    line = r"^context: found 'TimeLimit' object has no attribute 'count'; allowed .*; read it from env.unwrapped$"
    with pytest.raises(ArgumentError, match=line):
        gymnasium_vector(Counter, 1, seed=0, max_episode_steps=5, context=lambda env: np.array([env.count]))
    env = gymnasium_vector(Counter, 1, seed=0, max_episode_steps=5, context=lambda env: [env.unwrapped.count])
    assert env.reset().context.tolist() == [[0]]
    with pytest.raises(AttributeError, match="no attribute 'cue'"):  # a mistake of the function itself
        gymnasium_vector(Counter, 1, seed=0, context=lambda env: env.cue)


# Vector environments


def cartpole(mode, limit=6, num_envs=3):
    def make():
        return gymnasium.make("CartPole-v1", max_episode_steps=limit)

    return SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


def test_next_step_vectors_equal_serial_environments():
    vector = GymnasiumVector(cartpole(AutoresetMode.NEXT_STEP, limit=12), seed=4)
    serial = gymnasium_vector("CartPole-v1", 3, seed=4, max_episode_steps=12)
    generator = torch.Generator().manual_seed(0)
    pairs = [(vector.reset(), serial.reset())]
    for _ in range(40):
        actions = torch.randint(2, (3,), generator=generator)
        pairs.append((vector.step(actions), serial.step(actions)))
    assert any(a.last.any() for a, _ in pairs)
    for a, b in pairs:
        for name in ("observation", "reward", "discount", "first", "last"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.final_observation is None


def test_same_step_vectors_carry_the_end_in_the_first_step():
    """The two modes show the same episodes: what is `last` in one is `final_observation` in the other."""
    same = GymnasiumVector(cartpole(AutoresetMode.SAME_STEP), seed=4)
    following = GymnasiumVector(cartpole(AutoresetMode.NEXT_STEP), seed=4)
    same.reset()
    following.reset()
    for t in range(1, 25):
        actions = torch.full((3,), t % 2)  # CartPole balances for six steps under these
        a = same.step(actions)
        b = following.step(actions)
        assert not a.last.any() and torch.equal(a.first, b.last)
        assert torch.equal(a.reward, b.reward) and a.reward.all() and torch.equal(a.discount, b.discount)
        assert a.discount.all()  # cut by the time limit
        if b.last.any():
            assert b.last.all() and torch.equal(a.final_observation, b.observation)
            b = following.step(actions)
            assert b.first.all()
        else:
            assert a.final_observation is None
        assert torch.equal(a.observation, b.observation)


def test_final_observations_of_unfinished_rows_repeat_the_observation():
    limits = [2, 5, 9]
    vector = SyncVectorEnv([lambda limit=limit: Counter(limit=limit) for limit in limits], autoreset_mode="SameStep")
    env = GymnasiumVector(vector, seed=0)
    env.reset()
    assert env.step(torch.tensor([0, 0, 0])).final_observation is None
    step = env.step(torch.tensor([0, 0, 1]))  # row 0 cut, row 2 terminated
    assert step.first.tolist() == [True, False, True] and step.discount.tolist() == [1, 1, 0]
    assert step.reward.tolist() == [20, 20, 20]
    assert step.observation.squeeze(-1).tolist() == [0, 2, 0]
    assert step.final_observation.squeeze(-1).tolist() == [2, 2, 2]
    step = env.step(torch.tensor([1, 0, 0]))  # terminated only: nothing to bootstrap from
    assert step.discount.tolist() == [0, 1, 1] and step.final_observation is None


def test_final_observations_without_a_mask_are_those_of_the_rows_that_ended():
    class Unmasked(gymnasium.vector.VectorWrapper):
        """As ALE's vectors do: every row is there, and nothing says which ones count."""

        def step(self, actions):
            *arrays, info = super().step(actions)
            rows = info.get("final_obs", [None] * self.num_envs)
            filled = [np.full(1, -1.0) if row is None else row for row in rows]
            return *arrays, {"final_obs": np.stack(filled)}

    vector = SyncVectorEnv([lambda limit=limit: Counter(limit=limit) for limit in (1, 9)], autoreset_mode="SameStep")
    env = GymnasiumVector(Unmasked(vector), seed=0)
    env.reset()
    step = env.step(zeros(env))
    assert step.final_observation.squeeze(-1).tolist() == [1, 1]


def test_ale_vectors_that_reset_within_a_step():
    ale_py = pytest.importorskip("ale_py")
    options = {"max_num_frames_per_episode": 16, "noop_max": 0, "autoreset_mode": AutoresetMode.SAME_STEP}
    env = GymnasiumVector(ale_py.AtariVectorEnv("pong", 2, **options), seed=0)
    env.reset()
    finals = [step.final_observation for step in (env.step(zeros(env)) for _ in range(12))]
    assert any(final is not None and final.any() for final in finals)
    env.close()


# What environments return is what they say


class Wrong(Counter):
    """A mistake of somebody's."""

    def __init__(self, space=None, observation=None, reset=None, step=None, reward=1.0):
        super().__init__(observation_space=space)
        self.observation, self.given_reset, self.given_step, self.reward = observation, reset, step, reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return (self._shown(), {}) if self.given_reset is None else self.given_reset

    def step(self, action):
        return (self._shown(), self.reward, False, False, {}) if self.given_step is None else self.given_step

    def _shown(self):
        return np.zeros(self.observation_space.shape, np.float32) if self.observation is None else self.observation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"space": spaces.Discrete(5, start=1), "observation": 0},
            "found the observation 0; expected a number from 1 to 5",
        ),
        ({"space": spaces.Discrete(5), "observation": np.array([3])}, r"of shape \(1,\) .*expected shape \(\) "),
        ({"space": spaces.Discrete(5), "observation": 1.0}, "type float64; expected shape .* and type int64"),
        (
            {"space": spaces.Box(0, 1, (3,)), "observation": np.zeros(5)},
            r"of shape \(5,\) and type float64; expected shape \(3,\)",
        ),
        (
            {"space": spaces.Box(0, 255, (4, 4), np.uint8), "observation": np.zeros((4, 4))},
            "type float64; expected shape .* and type uint8, as its observation space says",
        ),
        ({"reset": np.zeros(1)}, r"Wrong.reset: found array\(\[0\.\]\); expected \(observation, info\)"),
        ({"step": (np.zeros(1), 1.0, False, {})}, r"Wrong.step: found .*expected \(observation, reward, terminated,"),
        ({"reward": [1.0, 2.0]}, r"Wrong.step: found a reward of \[1.0, 2.0\]; expected a number"),
    ],
)
def test_what_does_not_fit_its_space_is_refused(arguments, message):
    env = GymnasiumEnvs([Wrong(**arguments) for _ in range(2)], seed=0)
    with pytest.raises(ValueError, match=message) as error:
        env.reset()
        env.step(zeros(env))
    assert "\n" not in str(error.value)


class WrongVector(gymnasium.vector.VectorEnv):
    """Says that its observations are images, and gives something else from some step on."""

    num_envs = 2
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space, single_action_space = spaces.Box(0, 255, (4, 4), np.uint8), spaces.Discrete(2)

    def __init__(self, *given):
        self.given = list(given)

    def reset(self, *, seed=None, options=None):
        return self.given.pop(0), {}

    def step(self, actions):
        return self.given.pop(0), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), {}


@pytest.mark.parametrize(
    ("given", "found"),
    [(np.zeros((2, 4, 4)), r"\(4, 4\) and type float64"), (np.zeros((2, 8, 2), np.uint8), r"\(8, 2\) and type uint8")],
)
def test_what_does_not_fit_the_space_of_a_vector_is_refused(given, found):
    env = GymnasiumVector(WrongVector(np.zeros((2, 4, 4), np.uint8), given), seed=0)
    assert env.reset().observation.shape == (2, 1, 4, 4)
    with pytest.raises(
        ValueError, match=rf"WrongVector: found an observation of shape {found}; expected shape \(4, 4\)"
    ):
        env.step(zeros(env))


@pytest.mark.filterwarnings("ignore:.*(Received|Traceback|Raising|Calling `close`)(.|\n)*:UserWarning")  # gymnasium's
@pytest.mark.parametrize(
    "observation", [np.full((4, 4), 0.5), np.zeros((8, 2), np.uint8)], ids=["fractions", "another shape"]
)
def test_what_does_not_fit_its_space_is_refused_in_another_process_too(observation):
    """On the way from there it would be cast: fractions to zeros, one shape to another of as many numbers."""
    space = spaces.Box(0, 255, (4, 4), np.uint8)
    env = gymnasium_vector(Wrong, 1, seed=0, vectorization="async", space=space, observation=observation)
    try:
        with pytest.raises(ValueError, match=r"Wrong: found an observation of shape .*; expected shape \(4, 4\)"):
            env.reset()
    finally:
        env.close()


def test_numbers_of_another_width_are_taken():
    for space, observation in (
        (spaces.Box(0, 1, (3,), np.float32), np.zeros(3)),
        (spaces.Box(0, 1, (3,), np.float32), [0, 1, 0]),
        (spaces.Discrete(5), np.int32(3)),
        (spaces.MultiDiscrete([2, 2]), np.zeros(2, np.int32)),
        (spaces.MultiBinary(2), np.zeros(2)),
        (spaces.Box(0, 255, (3,), np.uint8), np.zeros(3, np.int64)),
    ):
        env = GymnasiumEnvs([Wrong(space, observation)], seed=0)
        assert env.step(zeros(env) if env.reset() else None).observation.dtype == torch.float32


def test_environments_of_gym_are_refused():
    class Old(Counter):
        def reset(self):
            return np.zeros(1)

    with pytest.raises(ValueError, match=r"Old.reset: found no argument seed; expected reset\(self, \*, seed=None"):
        gymnasium_vector(Old, 2, seed=0)

    class Spaceless(gymnasium.Env):
        action_space = spaces.Discrete(2)

    with pytest.raises(ValueError, match="Spaceless: found no observation_space"):
        gymnasium_vector(Spaceless, 2, seed=0)


def test_a_context_that_changes_its_length_is_refused():
    lengths = iter([1, 1, 1, 2, 1])
    env = GymnasiumEnvs([Counter(), Counter()], seed=0, context=lambda env: np.zeros(next(lengths)))
    env.reset()
    with pytest.raises(ValueError, match="context: found 2 numbers; expected 1, as it first gave"):
        env.step(zeros(env))


def test_a_context_leaves_the_random_stream_of_dm_environments_alone():
    plain, told = (
        DmEnvs(Catch, num_envs=2, seed=0, context=context) for context in (None, lambda env: np.array([env._ball]))
    )
    for _ in range(5):
        assert torch.equal(plain.reset().observation, told.reset().observation)


def test_dm_environments_with_other_actions_are_refused():
    class Later(Catch):
        def action_spec(self):
            return specs.BoundedArray((), np.int32, 7, 9)

    with pytest.raises(ValueError, match="expected equal specs"):
        DmEnvs([Catch(), Later()])


def test_a_same_step_vector_without_final_observations_is_refused_where_one_is_needed():
    class Forgetful(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            *arrays, _ = super().step(actions)
            return *arrays, {}

    vector = SyncVectorEnv([lambda: Counter(limit=1)] * 2, autoreset_mode="SameStep")
    env = GymnasiumVector(Forgetful(vector), seed=0)
    env.reset()
    with pytest.raises(RuntimeError, match="lacks the observation in which an episode ended"):
        env.step(zeros(env))


def test_vectors_that_do_not_reset_are_refused():
    with pytest.raises(ValueError, match=r"metadata\['autoreset_mode'\] = AutoresetMode.DISABLED"):
        GymnasiumVector(cartpole(AutoresetMode.DISABLED), seed=0)


def test_what_a_vector_reports_while_it_resets_is_not_part_of_the_episode():
    class Careless(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            observation, reward, terminated, truncated, info = super().step(actions)
            restarted = observation[:, 0] == 0
            return observation, reward + restarted, terminated | restarted, truncated, info

    env = GymnasiumVector(Careless(SyncVectorEnv([lambda: Counter(limit=1)] * 2)), seed=0)
    env.reset()
    assert env.step(zeros(env)).last.all()
    step = env.step(zeros(env))
    assert step.first.all() and not step.last.any() and step.discount.all() and not step.reward.any()


@pytest.mark.parametrize("shape", [(3,), (4, 5, 6), (5, 6), (5, 6, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_vectors_that_reuse_their_buffers_do_not_reach_stored_steps(shape, dtype):
    space = spaces.Box(0, 200, shape, dtype)
    env = GymnasiumVector(SyncVectorEnv([lambda: Counter(space)] * 2, copy=False), seed=0)
    step = env.reset()
    env.step(zeros(env))
    assert step.observation.eq(0).all()


def test_native_vector_environments_work():
    env = GymnasiumVector(gymnasium.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point"), seed=0)
    assert env.reset().observation.shape == (4, 4)
    assert env.step(zeros(env)).reward.tolist() == [1, 1, 1, 1]
    env.close()
    env.close()


def test_async_environments_equal_serial_ones():
    parallel = gymnasium_vector("CartPole-v1", 1, seed=1, vectorization="async")
    serial = gymnasium_vector("CartPole-v1", 1, seed=1)
    try:
        assert isinstance(parallel.vector_env, AsyncVectorEnv)
        assert torch.equal(parallel.reset().observation, serial.reset().observation)
        for _ in range(15):
            actions = torch.ones(1, dtype=torch.int64)
            assert torch.equal(parallel.step(actions).observation, serial.step(actions).observation)
    finally:
        parallel.close()


def test_no_process_is_left_where_a_space_is_refused():
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match=r"the action space is Box.*, but only Discrete is supported") as refused:
        gymnasium_vector("Pendulum-v1", 2, seed=0, vectorization="async")
    assert refused.tb  # whose frames hold what was built, so that no garbage collector closes it
    assert set(multiprocessing.active_children()) <= before


# MiniGrid


def test_minigrid_views_are_one_hot_planes():
    env = gymnasium_vector("MiniGrid-MemoryS7-v0", 3, seed=0)
    assert env.spec.observation_shape == (20, 7, 7) and env.spec.num_actions == 7
    step = env.reset()
    assert step.observation.dtype == torch.uint8 and set(step.observation.unique().tolist()) == {0, 255}
    # One object, one colour and one state in every cell.
    for planes in step.observation.split([11, 6, 3], dim=1):
        assert planes.eq(255).sum(1).eq(1).all()


def test_minigrid_symbols_and_view_size():
    env = gymnasium_vector("MiniGrid-MemoryS7-v0", 2, seed=0, view_size=3, encoding="symbolic")
    step = env.reset()
    assert step.observation.shape == (2, 3, 3, 3) and step.observation.max() <= 10


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_symbols_are_to_be_divided_by_the_largest_of_them_and_all_else_by_255(vectorization):
    def scale(**settings):
        env = gymnasium_vector("MiniGrid-MemoryS7-v0", 1, seed=0, vectorization=vectorization, **settings)
        env.close()
        return env.spec.observation_scale

    assert scale(encoding="symbolic") == max(MINIGRID_SIZES) - 1
    assert scale(encoding="one_hot") == scale() == 255.0


def test_minigrid_episodes_end_and_start_again():
    env = gymnasium_vector("MiniGrid-MemoryS7-v0", 2, seed=0, max_steps=5, context="grid")
    assert env.spec.context_size == 3 * 7 * 7 + 8
    steps = [env.reset()]
    for _ in range(6):
        steps.append(env.step(zeros(env)))  # turns left
    assert steps[5].last.all() and steps[5].discount.all() and steps[6].first.all()
    for step in steps:
        assert step.context.shape == (2, 155) and step.context.dtype == torch.float32
        assert step.context.abs().max() <= 1
    assert not torch.equal(steps[0].context, steps[1].context)  # the direction
    assert torch.equal(steps[0].context[:, :-8], steps[1].context[:, :-8])  # the grid


def test_a_mission_the_policy_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"mission of MiniGrid-Fetch-5x5-N2-v0 differs .* ignore_mission=True"):
        gymnasium_vector("MiniGrid-Fetch-5x5-N2-v0", 1, seed=0)
    assert gymnasium_vector("MiniGrid-Fetch-5x5-N2-v0", 1, seed=0, ignore_mission=True).reset().first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vectorization": "threads"}, "vectorization: found 'threads'; allowed 'sync' or 'async'; leave it out"),
        (
            {"vectorization": "async", "context": "grid"},
            "context: found 'grid'; allowed None with vectorization='async', .*; use vectorization='sync'",
        ),
        ({"context": "walls"}, "context: found 'walls'; allowed 'grid' with MiniGrid, 'module:function', a function"),
        ({"context": 3}, "context: found 3; allowed 'grid' with MiniGrid, 'module:function', a function"),
        ({"encoding": "pixels"}, "encoding: found 'pixels'; allowed 'one_hot' or 'symbolic'"),
        ({"encoding": 3}, "encoding: found 3; allowed 'one_hot' or 'symbolic'"),
        ({"fast_view": "no"}, "fast_view: found 'no'; allowed true or false"),
        ({"ignore_mission": 1}, "ignore_mission: found 1; allowed true or false"),
        ({"view_size": 4}, "view_size: found 4; allowed an odd integer of at least 3; leave it out for the default"),
        ({"view_size": 1}, "view_size: found 1; allowed an odd integer of at least 3"),
        ({"view_size": "3x"}, "view_size: found '3x'; allowed an odd integer of at least 3"),
        ({"view_size": "5", "vectorization": "async"}, "view_size: found '5'; allowed an odd integer of at least 3"),
        ({"size": "big"}, "size: found 'big'; allowed what MiniGrid-MemoryS7-v0 takes .TypeError: "),
        ({"max_steps": "x"}, "max_steps: found 'x'; allowed what MiniGrid-MemoryS7-v0 takes .AssertionError: "),
        ({"size": 0}, "size: found 0; allowed what MiniGrid-MemoryS7-v0 takes .AssertionError.; leave it out"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        gymnasium_vector("MiniGrid-MemoryS7-v0", **{"num_envs": 1, "seed": 0, **settings})


@pytest.mark.parametrize("settings", [{"view_size": 5}, {"encoding": "one_hot"}, {"context": "grid"}])
def test_settings_of_minigrid_are_refused_elsewhere(settings):
    with pytest.raises(ValueError, match="CartPole-v1 is not one of its environments"):
        gymnasium_vector("CartPole-v1", 1, seed=0, **settings)


# dm_env


def test_dm_environments_follow_the_timeline():
    env = DmEnvs(Catch, num_envs=4, seed=0)
    assert env.spec.num_actions == 3 and env.spec.observation_shape == (3,)
    steps = [env.reset()]
    ball = steps[0].observation.argmax(1)
    steps.append(env.step(ball))  # actions 0, 1, 2 move by -1, 0, 1 from the middle
    steps.append(env.step(torch.ones(4, dtype=torch.int64)))
    steps.append(env.step(torch.full((4,), 99)))
    assert [step.first.all().item() for step in steps] == [True, False, False, True]
    assert [step.last.all().item() for step in steps] == [False, False, True, False]
    assert [step.reward.tolist() for step in steps] == [[0] * 4, [0] * 4, [1] * 4, [0] * 4]
    assert [step.discount.tolist() for step in steps] == [[1] * 4, [1] * 4, [0] * 4, [1] * 4]


def test_dm_constructors_get_different_seeds_or_none():
    tape = torch.stack([DmEnvs(Catch, num_envs=32, seed=0).reset().observation for _ in range(2)])
    assert torch.equal(tape[0], tape[1]) and len(tape[0].unique(dim=0)) == 3
    same = DmEnvs(lambda: Catch(0), num_envs=4, seed=0).reset().observation
    assert len(same.unique(dim=0)) == 1


def test_dm_context_is_a_function_of_the_environment():
    env = DmEnvs(Catch, num_envs=4, seed=0, context=lambda env: np.array([env._ball, env._paddle]))
    assert env.spec.context_size == 2
    step = env.reset()
    assert step.context[:, 0].tolist() == step.observation.argmax(1).tolist()
    assert env.step(torch.tensor([0, 1, 2, 1])).context[:, 1].tolist() == [0, 1, 2, 1]


def test_dm_time_limits_keep_the_discount():
    class Cut(Catch):
        def step(self, action):
            step = super().step(action)
            return dm_env.truncation(step.reward, step.observation) if step.last() else step

    env = DmEnvs([Cut()])
    env.reset()
    env.step(zeros(env))
    step = env.step(zeros(env))
    assert step.last and step.discount == 1


def test_nested_dm_observations_are_concatenated_by_key():
    spec = {"paddle": specs.Array((), np.int64), "ball": (specs.Array((1, 2), np.float32), specs.Array((), np.bool_))}
    env = DmEnvs([Catch(observe=lambda ball, p: {"ball": (np.array([[ball, 9.0]]), True), "paddle": p}, spec=spec)])
    assert env.spec.observation_shape == (4,)
    ball, nine, true, paddle = env.reset().observation[0].tolist()
    assert ball in (0, 1, 2) and (nine, true, paddle) == (9, 1, 1)


def test_dm_images_stay_bytes():
    spec = {"board": specs.Array((4, 5, 3), np.uint8)}
    env = DmEnvs([Catch(observe=lambda ball, paddle: {"board": np.ones((4, 5, 3), np.uint8)}, spec=spec)])
    assert env.reset().observation.shape == (1, 3, 4, 5) and env.spec.observation_dtype == torch.uint8


@pytest.mark.parametrize(("highest", "scale"), [(1, 1.0), (255, 255.0), (0, 255.0)])
def test_dm_images_are_to_be_divided_by_the_largest_of_their_values(highest, scale):
    spec = specs.BoundedArray((4, 5, 3), np.uint8, 0, highest)
    env = DmEnvs([Catch(observe=lambda ball, paddle: np.zeros((4, 5, 3), np.uint8), spec=spec)])
    assert env.spec.observation_scale == scale


def test_discrete_dm_observations_become_one_hot():
    spec = specs.DiscreteArray(5)
    env = DmEnvs([Catch(observe=lambda ball, paddle: np.int64(3), spec=spec)])
    assert env.spec.observation_shape == (5,) and env.spec.observation_dtype == torch.float32
    assert env.reset().observation.tolist() == [[0, 0, 0, 1, 0]]
    assert env.step(zeros(env)).observation.tolist() == [[0, 0, 0, 1, 0]]


def test_unsupported_dm_specs_are_named():
    class Continuous(Catch):
        def action_spec(self):
            return specs.BoundedArray((2,), np.float32, -1, 1, name="torque")

    with pytest.raises(ValueError, match=r"action spec is BoundedArray.*torque.*only one discrete action"):
        DmEnvs([Continuous()])
    with pytest.raises(ValueError, match="not numeric"):
        DmEnvs([Catch(spec=specs.StringArray(()))])
    with pytest.raises(ValueError, match="needs num_envs and seed"):
        DmEnvs(Catch, num_envs=2)
    with pytest.raises(ValueError, match="go with a constructor"):
        DmEnvs([Catch()], seed=1)
    with pytest.raises(ValueError, match="those of environment 1 differ"):
        DmEnvs([Catch(), Catch(spec=specs.Array((4,), np.float32))])


# All of them


@pytest.mark.parametrize(
    "make_env",
    [
        lambda num_envs, seed: gymnasium_vector("CartPole-v1", num_envs, seed=seed, max_episode_steps=12),
        lambda num_envs, seed: GymnasiumVector(cartpole(AutoresetMode.NEXT_STEP, 12, num_envs), seed=seed),
        lambda num_envs, seed: GymnasiumVector(
            gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point"), seed=seed
        ),
    ],
    ids=["serial", "sync", "native"],
)
def test_next_step_adapters_conform(make_env):
    report = check_environment(make_env, num_steps=60)
    assert report.terminations


def test_same_step_adapter_conforms():
    report = check_environment(
        lambda num_envs, seed: GymnasiumVector(cartpole(AutoresetMode.SAME_STEP, 14, num_envs), seed=seed),
        num_steps=60,
        same_step=True,
    )
    assert report.terminations and report.time_limits


def test_minigrid_conforms():
    report = check_environment(
        lambda num_envs, seed: gymnasium_vector(
            "MiniGrid-MemoryS7-v0", num_envs, seed=seed, context="grid", max_steps=20
        ),
        num_steps=50,
    )
    assert report.time_limits


def test_dm_environments_conform():
    assert check_environment(lambda num_envs, seed: DmEnvs(Catch, num_envs=num_envs, seed=seed), num_steps=20)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GymnasiumVector(SyncVectorEnv([Counter] * 2), seed=0),
        lambda: GymnasiumEnvs([Counter(), Counter()], seed=0),
        lambda: DmEnvs(Catch, num_envs=2, seed=0),
    ],
)
def test_the_order_of_calls(build):
    env = build()
    with pytest.raises(RuntimeError, match="reset before step"):
        env.step(zeros(env))
    assert not env.resumable
    with pytest.raises(RuntimeError, match="cannot be saved"):
        env.state_dict()
    with pytest.raises(RuntimeError, match="cannot be saved"):
        env.load_state_dict({})
    env.reset()
    for actions in ([0, 3], [-1, 0], [0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="actions"):
            env.step(torch.tensor(actions))
    env.close()
    env.close()
