import gymnasium
import minigrid.wrappers  # registers its ids
import numpy as np
import pytest
import torch

from envs import make
from envs.adapters import gymnasium_vector
from envs.minigrid import MINIGRID_SIZES, FastView, image_view, minigrid_context, minigrid_view

# Doors that open, things that are carried, obstacles that move, lava and floors, a view through walls, grids wider than high.
IDS = (
    "MiniGrid-MemoryS7-v0",
    "MiniGrid-MemoryS13Random-v0",
    "MiniGrid-RedBlueDoors-8x8-v0",
    "MiniGrid-DoorKey-8x8-v0",
    "MiniGrid-Dynamic-Obstacles-8x8-v0",
    "MiniGrid-LavaCrossingS9N2-v0",
    "MiniGrid-MultiRoom-N6-v0",
    "MiniGrid-KeyCorridorS4R3-v0",
    "MiniGrid-ObstructedMaze-2Dlhb-v1",
    "MiniGrid-Playground-v0",
    "MiniGrid-Empty-Random-6x6-v0",
    "BabyAI-GoToImpUnlock-v0",
)


@pytest.mark.parametrize("size", [None, 3, 9])
@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_fast_view_is_that_of_the_package(env_id, size):
    env = gymnasium.make(env_id, disable_env_checker=True)
    assert FastView.fits(env)
    view = FastView(env, size)
    rng = np.random.default_rng(0)
    seen = set()
    env.reset(seed=1)
    for _ in range(200):
        grid, visible = env.unwrapped.gen_obs_grid(size)
        expected, found = grid.encode(visible), view()["image"]
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
        seen.add(expected.tobytes())
        _, _, terminated, truncated, _ = env.step(int(rng.choice([0, 1, 2, 2, 2, 3, 4, 5]) % env.action_space.n))
        if terminated or truncated:
            env.reset()
    assert len(seen) > 8  # it moved about


def test_the_fast_view_sees_through_walls_where_the_environment_does():
    env = gymnasium.make("MiniGrid-MultiRoom-N6-v0", disable_env_checker=True)
    env.reset(seed=0)
    base = env.unwrapped
    behind_walls = FastView(env)()["image"]
    base.see_through_walls = True
    grid, visible = base.gen_obs_grid()
    assert np.array_equal(FastView(env)()["image"], grid.encode(visible))
    assert not np.array_equal(FastView(env)()["image"], behind_walls)


@pytest.mark.parametrize("size", [None, 3])
def test_episodes_are_the_same_with_and_without_the_fast_view(size):
    fast, slow = (
        image_view(gymnasium.make("MiniGrid-MemoryS7-v0", disable_env_checker=True), size, is_fast)
        for is_fast in (True, False)
    )
    assert fast.observation_space == slow.observation_space
    assert isinstance(fast.unwrapped.gen_obs, FastView) and not isinstance(slow.unwrapped.gen_obs, FastView)
    rng = np.random.default_rng(0)
    assert np.array_equal(fast.reset(seed=3)[0], slow.reset(seed=3)[0])
    for _ in range(400):
        action = int(rng.integers(7))
        (observation, *rest), (expected, *expected_rest) = fast.step(action), slow.step(action)
        assert np.array_equal(observation, expected) and rest == expected_rest
        assert fast.observation_space.contains(np.ascontiguousarray(observation))
        if rest[1] or rest[2]:
            assert np.array_equal(fast.reset()[0], slow.reset()[0])


def test_a_subclass_with_a_view_of_its_own_keeps_it():
    class Blind(type(gymnasium.make("MiniGrid-Empty-5x5-v0").unwrapped)):
        def gen_obs(self):
            return {**super().gen_obs(), "image": np.zeros((7, 7, 3), np.uint8)}

    assert not FastView.fits(Blind())
    assert not image_view(Blind(), None, True).reset(seed=0)[0].any()


def test_the_packages_view_can_be_asked_for():
    envs = [gymnasium_vector("MiniGrid-MemoryS7-v0", 2, seed=0, fast_view=fast) for fast in (True, False)]
    assert [isinstance(env.envs[0].unwrapped.gen_obs, FastView) for env in envs] == [True, False]
    assert torch.equal(*(env.reset().observation for env in envs))


def test_a_success_at_the_last_step_counts_and_running_out_of_time_does_not():
    left, right, forward, done = 0, 1, 2, 6
    env = make("MiniGrid-Empty-5x5-v0", num_envs=1, seed=0, max_steps=10)
    threshold = env.spec.success_reward
    for way in ([done] * 5 + [forward, forward, right, forward, forward], [left] * 10):
        env.reset()
        steps = [env.step(torch.tensor([action])) for action in way]
        assert [step.last.item() for step in steps] == [False] * 9 + [True]
        total = sum(step.reward.item() for step in steps)
        arrived = way[0] == done
        assert total == pytest.approx(0.1 if arrived else 0.0)  # 1 - 0.9 * (share of the time used)
        assert (total >= threshold) == arrived


def test_planes_are_rows_and_columns():
    view = np.zeros((1, 7, 7, 3), np.uint8)
    view[0, 2, 5] = (4, 1, 2)  # column 2, row 5: a locked green door
    planes = minigrid_view(view)
    assert planes[0, :, 5, 2].nonzero()[0].tolist() == [4, 11 + 1, 17 + 2]
    assert planes[0, :, 2, 5].nonzero()[0].tolist() == [0, 11, 17]


def test_constants_are_those_of_the_package():
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    assert tuple(len(table) for table in (OBJECT_TO_IDX, COLOR_TO_IDX, STATE_TO_IDX)) == MINIGRID_SIZES


def test_context_tells_where_the_agent_is_and_what_it_carries():
    env = gymnasium.make("MiniGrid-DoorKey-5x5-v0").unwrapped
    env.reset(seed=0)
    before = minigrid_context(env)
    env.agent_pos, env.agent_dir = (4, 0), 2
    env.carrying = next(cell for cell in env.grid.grid if cell is not None and cell.type == "key")
    after = minigrid_context(env)
    assert np.array_equal(before[:75], after[:75])
    assert before[-2:].tolist() == [-1, -1] and after[75:81].tolist() == [1, -1, 0, 0, 1, 0]
    assert after[-2] == pytest.approx(2 * 5 / 10 - 1)  # a key is object 5 of 0 to 10


@pytest.mark.parametrize(
    "name",
    ["RGBImgPartialObsWrapper", "RGBImgObsWrapper", "OneHotPartialObsWrapper", "FullyObsWrapper", "SymbolicObsWrapper"],
)
def test_images_that_are_no_symbolic_view_are_refused(name):
    wrapper = getattr(minigrid.wrappers, name)

    def wrapped():
        return wrapper(gymnasium.make("MiniGrid-MemoryS7-v0", disable_env_checker=True))

    with pytest.raises(ValueError, match=f"the image of MemoryEnv is what {name} makes of it"):
        gymnasium_vector(wrapped, 2, seed=0)


def test_pixels_of_minigrid_are_an_image_as_any_other():
    def pixels():
        env = gymnasium.make("MiniGrid-MemoryS7-v0", disable_env_checker=True)
        return minigrid.wrappers.ImgObsWrapper(minigrid.wrappers.RGBImgPartialObsWrapper(env))

    env = gymnasium_vector(pixels, 2, seed=0)
    assert env.spec.observation_shape == (3, 56, 56) and env.spec.observation_scale == 255


def test_numbers_that_are_none_of_the_encoding_are_refused():
    view = np.zeros((1, 7, 7, 3), np.uint8)
    view[0, 2, 3] = 11, 0, 0
    with pytest.raises(ValueError, match=r"found up to \[11, 0, 0\] .*expected less than \[11, 6, 3\]"):
        minigrid_view(view)


def test_missions_that_differ_are_refused_unless_they_are_to_be_ignored():
    with pytest.raises(ValueError, match="the mission of BabyAI-GoToObj-v0 differs between episodes"):
        gymnasium_vector("BabyAI-GoToObj-v0", 2, seed=0)
    assert gymnasium_vector("BabyAI-GoToObj-v0", 2, seed=0, ignore_mission=True)
