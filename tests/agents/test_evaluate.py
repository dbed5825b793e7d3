import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from agents.checkpoint import save_checkpoint
from agents.config import from_dict, save_config
from agents.evaluate import (
    Evaluation,
    Film,
    bootstrap_interval,
    check_filmable,
    evaluate,
    format_summary,
    load_policy,
    summarize,
    wilson_interval,
)
from agents.parallel import Workers
from agents.train import Trainer, run_directory, train
from envs.timestep import EnvSpec, TimeStep
from tests.agents.scripted_env import LivesEnv, ScriptedEnv, make_model


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("num_episodes", [3, 7])
def test_every_environment_plays_a_number_of_episodes_fixed_beforehand(same_step, num_episodes):
    env = ScriptedEnv(num_envs=3, seed=0, same_step=same_step)
    counted: list[int] = []
    result = evaluate(make_model(), env, num_episodes, on_episodes=counted.append)
    quota = {3: [1, 1, 1], 7: [3, 2, 2]}[num_episodes]
    episodes = [env.episode(row, index) for row in range(3) for index in range(quota[row])]
    assert result.returns.tolist() == pytest.approx([e.rewards.sum().item() for e in episodes], rel=1e-6)
    assert result.lengths.tolist() == [len(e.rewards) for e in episodes]
    assert result.successes.tolist() == [e.rewards.sum().item() >= env.spec.success_reward for e in episodes]
    assert sum(counted) == num_episodes


def test_fewer_episodes_than_environments_are_refused():
    with pytest.raises(ValueError, match="num_episodes: found 2, allowed at least one for each of 3 environments"):
        evaluate(make_model(), ScriptedEnv(num_envs=3, seed=0), 2)


@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_not_finite_is_refused(greedy):
    env = ScriptedEnv(num_envs=3, seed=0, nan_field="observation", nan_step=2)
    with pytest.raises(ValueError, match=r"^logits: found NaN or infinity; .* the environment returns$"):
        evaluate(make_model(), env, 6, greedy=greedy)


class _Recorder(ScriptedEnv):
    """Keeps the actions it was given."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.actions = []

    def step(self, actions):
        self.actions.append(actions)
        return super().step(actions)


def _actions(**settings):
    env = _Recorder(num_envs=4, seed=0)
    model = make_model()
    logits = []
    model.policy_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    evaluate(model, env, 8, **settings)
    return torch.stack(env.actions), torch.stack(logits)


def test_actions_are_drawn_unless_greedy():
    greedy, logits = _actions(greedy=True)
    assert torch.equal(greedy, logits.argmax(-1))
    one, two, other = (_actions(seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, greedy)


def test_a_game_is_its_raw_points_over_all_its_lives():
    env = LivesEnv(num_envs=2, seed=0)
    result = evaluate(make_model(), env, 4)
    games = [env.game(row, index) for row in range(2) for index in range(2)]
    assert result.returns.tolist() == pytest.approx([points for points, _ in games], rel=1e-5)
    assert result.lengths.tolist() == [length for _, length in games]


def test_a_film_of_a_game_goes_on_after_a_lost_life():
    env = LivesEnv(num_envs=1, seed=0)
    film, boundaries = Film(env, is_stack=False), []
    film._picture = lambda observation: observation.numpy()
    evaluate(make_model(), env, 2, on_step=lambda step: (film.record(step), boundaries.append(bool(step.game_over))))
    assert len(film.frames) == boundaries.index(True) + 1 == 1 + env.game(0, 0)[1]


# Numbers


def test_summary_by_hand():
    evaluation = Evaluation(np.array([0.0, 1.0, 1.0, 4.0]), np.array([2, 4, 6, 8]), np.array([False, True, True, True]))
    summary = summarize(evaluation)
    assert summary["return"] | {"low": 0, "high": 0} == pytest.approx(
        {"mean": 1.5, "std": math.sqrt(3), "median": 1.0, "min": 0.0, "max": 4.0, "low": 0, "high": 0}
    )
    assert summary["length"]["mean"] == 5
    assert summary["success"]["mean"] == 0.75
    assert len(format_summary(summary).splitlines()) == 4
    assert format_summary(summary).splitlines()[1].startswith("return        1.5")


def test_one_episode_has_no_spread():
    summary = summarize(Evaluation(np.array([2.0]), np.array([3]), None))
    assert math.isnan(summary["return"]["std"])
    assert math.isnan(summary["return"]["low"])
    assert "success" not in summary
    assert "nan" not in format_summary(summary)


def test_intervals():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0


# Loading


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = from_dict(
        {
            "env": {"num_envs": 4, "kwargs": {"corridor_length": 2}},
            "model": {"hidden_size": 6, "torso_sizes": [5]},
            "critic": {"kind": "cdni"},
            "algorithm": {"rollout_length": 8},
            "run": {"output_dir": str(tmp_path_factory.mktemp("runs")), "total_steps": 64, "tensorboard": False},
        }
    )
    train(config)
    return config


def test_the_policy_of_a_run_plays_new_episodes(run):
    policy, make_environment = load_policy(run_directory(run))
    assert policy.config == run
    assert policy.step == 64
    trained = Trainer(run)
    trained.update()
    trained.update()
    for name, p in trained.learner.model.named_parameters():
        assert torch.equal(p, policy.model.state_dict()[name])
    env = make_environment(2, run.run.seed)
    assert env.num_envs == 2
    seeds_of_training = {
        seed for run_seed in range(20) for rank in range(64) for seed in Workers(rank, 64).spread_seeds(run_seed, 4)
    }
    assert not {make_environment(1, seed)._generator.initial_seed() for seed in range(20)} & seeds_of_training
    assert len(evaluate(policy.model, env, 5).returns) == 5


def test_the_configuration_is_that_of_the_checkpoint_and_not_of_the_file_beside_it(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_directory(run), folder)
    save_config(replace(run, env=replace(run.env, kwargs={"corridor_length": 9})), folder / "config.yaml")
    assert load_policy(folder)[0].config == run
    (folder / "config.yaml").unlink()
    assert load_policy(folder)[0].config == run


@pytest.mark.parametrize("state", [{"x": 1}, {"config": {"run": {"sed": 1}}}, {"config": 3}])
def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path, state):
    save_checkpoint(tmp_path, state, 3)
    with pytest.raises(ValueError, match=r"found a checkpoint of another program or version \(.*\); allowed") as error:
        load_policy(tmp_path)
    assert "\n" not in str(error.value)


def test_episodes_depend_on_the_seed_of_the_evaluation(run):
    _, make_environment = load_policy(run_directory(run))
    # the cues of first steps, before anything was done
    one, same, other = (make_environment(64, seed).reset().observation for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# Video


class _Pictures:
    """One environment whose observation t is an image of brightness t; episodes of 3 steps."""

    num_envs, device = 1, torch.device("cpu")

    def __init__(self, channels=1, same_step=False):
        self.spec = EnvSpec((channels, 40, 50), torch.uint8, num_actions=3)
        self.same_step, self.t = same_step, 0

    def timestep(self):
        """Steps 0, 1, 2, 3 = LAST (or the first of the next episode), ..."""
        image = torch.full((1, *self.spec.observation_shape), self.t, dtype=torch.uint8)
        ended = self.t == 3
        final = image if ended and self.same_step else None
        if final is not None:
            image = torch.full_like(image, 99)
        flags = [torch.tensor([flag]) for flag in (self.t == 0 or final is not None, ended and not self.same_step)]
        self.t += 1
        return TimeStep(image, torch.zeros(1), torch.ones(1), *flags, final_observation=final)


@pytest.mark.parametrize("same_step", [False, True])
def test_a_film_ends_with_the_first_episode(same_step):
    env = _Pictures(same_step=same_step)
    film = Film(env, is_stack=False)
    for _ in range(8):
        film.record(env.timestep())
    assert [frame[0, 0] for frame in film.frames] == [0, 1, 2, 3]


@pytest.mark.parametrize(("channels", "is_stack", "shape"), [(1, True, ()), (3, True, ()), (3, False, (3,))])
def test_a_film_is_saved_as_a_gif_scaled_up(tmp_path, channels, is_stack, shape):
    env = _Pictures(channels)
    film = Film(env, is_stack=is_stack)
    for _ in range(4):
        film.record(env.timestep())
    assert film.frames[0].shape == (40, 50, *shape)
    film.save(tmp_path / "film.gif", frames_per_second=15)
    with Image.open(tmp_path / "film.gif") as gif:
        assert gif.n_frames == 4
        assert gif.size == (450, 360)
        assert gif.info["duration"] == 70


def test_only_pictures_can_be_filmed(tmp_path):
    path = tmp_path / "film.gif"
    check_filmable(_Pictures().spec, path)
    for spec in (EnvSpec((7,), torch.float32, 3), EnvSpec((3, 7, 7), torch.uint8, 3)):
        with pytest.raises(ValueError, match=r"--video: found observations .*; leave --video out"):
            check_filmable(spec, path)
    (tmp_path / "folder.gif").mkdir()
    for bad in (tmp_path / "film.mp4", tmp_path / "nowhere" / "film.gif", tmp_path / "folder.gif"):
        with pytest.raises(ValueError, match=r"--video: found .*; allowed the name of a .gif file"):
            check_filmable(_Pictures().spec, bad)
