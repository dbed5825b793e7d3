import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from agents.build import build_model
from agents.config import ModelConfig
from agents.rollout import Actor, EpisodeStatistics
from envs.gridworlds import PassiveTMaze
from envs.timestep import least_return
from tests.agents.scripted_env import LivesEnv, ScriptedEnv, make_model, naive_row

CORES = [("lstm", 1), ("lstm", 2), ("gru", 1), ("gru", 2)]


def collect(env, model, *, rollouts=3, rollout_length=8, bptt_horizon=4):
    actor = Actor(env, model, rollout_length=rollout_length, bptt_horizon=bptt_horizon, seed=1)
    return actor, [actor.collect() for _ in range(rollouts)]


@pytest.mark.parametrize(("same_step", "privileged"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("core", "num_layers"), CORES)
def test_the_actor_computes_what_a_fresh_memory_per_episode_would(core, num_layers, same_step, privileged):
    model = make_model(core, num_layers, privileged_value=privileged)
    env = ScriptedEnv(num_envs=3, seed=0, same_step=same_step)
    _, rollouts = collect(env, model)
    T, K = 8, 4
    cuts = 0
    for row in range(3):
        steps, finals = naive_row(model, env, row, torch.cat([r.action[:, row] for r in rollouts]))
        for i, rollout in enumerate(rollouts):
            expected = steps[i * T : i * T + T + 1]
            torch.testing.assert_close(rollout.logits[:, row], torch.cat([e[1] for e in expected[:T]]))
            torch.testing.assert_close(rollout.value[:, row], torch.cat([e[2] for e in expected]))
            for component, states in enumerate(rollout.states):  # what was stored, before any clearing
                assert states.shape == (T // K, 3, 5)
                torch.testing.assert_close(
                    states[:, row], torch.cat([expected[k][0][component] for k in range(0, T, K)])
                )
            for t, value in finals.items():
                if i * T < t <= (i + 1) * T:
                    cuts += 1
                    assert rollout.first[t - i * T, row]
                    torch.testing.assert_close(rollout.final_value[t - i * T, row], value.squeeze())
    assert (cuts > 3) == same_step


def test_an_environment_that_writes_all_observations_into_one_memory_is_refused():
    env = ScriptedEnv(num_envs=2, seed=0)
    step, memory = env.step, torch.zeros(2, 3)
    env.step = lambda actions: (lambda t: dataclasses.replace(t, observation=memory.copy_(t.observation)))(
        step(actions)
    )
    with pytest.raises(
        ValueError, match=r"^observation: found the memory of the last step's once more; allowed tensors of"
    ):
        collect(env, make_model())


@pytest.mark.parametrize(
    ("pay", "steps", "reward"), [(0.9, 50, 45.0), (99.7, 1, 99.7), (0.9, 49, 45.0), (0.1, 10, 1.0)]
)
def test_a_return_that_misses_its_mark_by_rounding_alone_is_a_success(pay, steps, reward):
    total = sum(torch.tensor(pay, dtype=torch.float32).double() for _ in range(steps))  # returns are summed in float64
    assert (total >= least_return(reward)).item() == math.isclose(pay * steps, reward)


def test_a_privileged_value_needs_the_context_of_the_observation_that_an_episode_ends_with():
    model, env = make_model(privileged_value=True), ScriptedEnv(num_envs=3, seed=0, same_step=True)
    with pytest.raises(ValueError, match=r"^model.privileged_value: found true .* set --model.privileged_value false$"):
        collect(env, model)


def test_a_rollout_holds_what_the_environment_showed_and_the_next_one_goes_on_from_there():
    model, env = make_model(), ScriptedEnv(num_envs=2, seed=0)
    actor, (a, b) = collect(env, model, rollouts=2, rollout_length=6, bptt_horizon=3)
    for field in ("observation", "reward", "discount", "first", "last", "context", "action_tm1"):
        one, two = getattr(a, field), getattr(b, field)
        assert len(one) == 7
        torch.testing.assert_close(two[0], one[6], rtol=0, atol=0)
    torch.testing.assert_close(b.value[0], a.value[6])  # values come in one call a rollout, which rounds otherwise
    for rollout in (a, b):
        assert torch.equal(rollout.action_tm1[1:], rollout.action)
        assert torch.equal(rollout.first[1:], rollout.last[:-1])
    assert actor.rollout is b
    script = env.episode(0, 0)
    length = len(script.rewards)
    assert torch.equal(a.observation[: length + 1, 0], script.observations)
    assert torch.equal(a.context[: length + 1, 0], script.contexts)
    assert torch.equal(a.reward[1 : length + 1, 0], script.rewards)
    assert a.last[:, 0].nonzero()[0] == length


def test_actions_are_drawn_from_the_policy():
    model, env = make_model(previous_action=False), ScriptedEnv(num_envs=500, seed=0)
    _, (rollout,) = collect(env, model, rollouts=1, rollout_length=4, bptt_horizon=4)
    expected = rollout.logits.softmax(-1).sum((0, 1))
    counts = F.one_hot(rollout.action, 3).sum((0, 1)).double()
    deviation = (rollout.logits.softmax(-1) * (1 - rollout.logits.softmax(-1))).sum((0, 1)).sqrt()
    assert ((counts - expected).abs() < 4 * deviation).all()


def test_an_environment_without_context_gives_none():
    _, (rollout,) = collect(ScriptedEnv(num_envs=2, seed=0, context_size=0), make_model(), rollouts=1)
    assert rollout.context is None


# Statistics


def _naive_statistics(env, num_steps):
    """Episodes that end within `num_steps` steps after the reset, from the script."""
    returns, lengths = [], []
    for row in range(env.num_envs):
        t, index = 0, 0
        while t + len(env.episode(row, index).rewards) <= num_steps:
            rewards = env.episode(row, index).rewards
            returns.append(rewards.double().sum().item())
            lengths.append(len(rewards))
            t += len(rewards) + (not env.same_step)  # the step from LAST to FIRST
            index += 1
    return returns, lengths


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("max_length", [1, 2, 5, 20])
@pytest.mark.parametrize("rollout_length", [1, 4, 24])
def test_statistics_match_a_naive_count(same_step, max_length, rollout_length):
    env = ScriptedEnv(num_envs=3, seed=0, same_step=same_step, max_length=max_length)
    actor = Actor(env, make_model(), rollout_length=rollout_length, bptt_horizon=1, seed=1)
    seen = {"episodes": 0.0, "return": 0.0, "length": 0.0, "success": 0.0}
    for _ in range(24 // rollout_length):
        actor.collect()
        popped = {name.removeprefix("charts/"): value.item() for name, value in actor.statistics.pop().items()}
        if popped["episodes"]:
            seen["episodes"] += popped["episodes"]
            for name, key in (
                ("return", "episodic_return"),
                ("length", "episodic_length"),
                ("success", "success_rate"),
            ):
                seen[name] += popped["episodes"] * popped[key]
        else:
            assert math.isnan(popped["episodic_return"])
    returns, lengths = _naive_statistics(env, 24)
    successes = sum(r >= env.spec.success_reward for r in returns)
    assert seen == pytest.approx(
        {"episodes": len(returns), "return": sum(returns), "length": sum(lengths), "success": successes}
    )


def test_statistics_prefer_raw_rewards():
    env = ScriptedEnv(num_envs=2, seed=0)
    clipped_step = env.step

    def step(actions):
        timestep = clipped_step(actions)
        return type(timestep)(
            **{
                name: getattr(timestep, name)
                for name in type(timestep).__dataclass_fields__
                if name not in ("reward", "raw_reward")
            },
            reward=timestep.reward.clamp(-0.1, 0.1),
            raw_reward=timestep.reward,
        )

    env.step = step
    actor, _ = collect(env, make_model())
    returns, _ = _naive_statistics(env, 24)
    assert actor.statistics.pop()["charts/episodic_return"].item() == pytest.approx(sum(returns) / len(returns))


def test_statistics_are_those_of_whole_games():
    """The same games as in the evaluation's test of lives."""
    env = LivesEnv(num_envs=1, seed=0)
    first, second = env.game(0, 0), env.game(0, 1)
    length = first[1] + 1 + second[1]  # and the step that starts the second game, which belongs to neither
    actor, _ = collect(env, make_model(), rollouts=1, rollout_length=length, bptt_horizon=length)
    assert {name: value.item() for name, value in actor.statistics.pop().items()} == pytest.approx(
        {
            "charts/episodic_return": (first[0] + second[0]) / 2,
            "charts/episodic_length": (first[1] + second[1]) / 2,
            "charts/episodes": 2,
            "charts/success_rate": ((first[0] >= 0) + (second[0] >= 0)) / 2,
        }
    )


def test_without_a_notion_of_success_there_is_no_success_rate():
    statistics = EpisodeStatistics(2, None, torch.device("cpu"))
    statistics.observe_rollout(
        torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    )
    assert {name: value.item() for name, value in statistics.pop().items()} == {
        "charts/episodic_return": 1.0,
        "charts/episodic_length": 1.0,
        "charts/episodes": 2.0,
    }


def test_statistics_carry_on_from_a_saved_state():
    def play(actor):
        actor.collect()
        return {name: value.item() for name, value in actor.statistics.pop().items()}

    actors = []
    for _ in range(2):
        actor = Actor(
            ScriptedEnv(num_envs=2, seed=0, max_length=20), make_model(), rollout_length=8, bptt_horizon=8, seed=1
        )
        actor.collect()
        actors.append(actor)
    other = EpisodeStatistics(2, 0.0, torch.device("cpu"))
    other.load_state_dict(actors[0].statistics.state_dict())
    actors[0].statistics = other
    assert play(actors[0]) == pytest.approx(play(actors[1]), nan_ok=True)


# Resume


def _maze_actor(env_seed=0, actor_seed=1):
    env = PassiveTMaze(3, num_envs=4, seed=env_seed, num_distractors=2)
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=5, torso_sizes=(4,)), env.spec)
    return Actor(env, model, rollout_length=5, bptt_horizon=5, seed=actor_seed)


def test_an_actor_continues_exactly_from_its_saved_state():
    actor, other = _maze_actor(), _maze_actor(env_seed=7, actor_seed=8)
    actor.collect()
    other.collect()
    other.load_state_dict(actor.state_dict())
    for _ in range(3):
        one, two = actor.collect(), other.collect()
        for field in ("observation", "action_tm1", "reward", "first", "last", "context", "logits", "value"):
            assert torch.equal(getattr(one, field), getattr(two, field)), field
        assert all(torch.equal(s, o) for s, o in zip(one.states, two.states, strict=True))
    assert actor.statistics.pop() == other.statistics.pop()


def test_a_saved_state_does_not_change_while_the_actor_goes_on():
    actor = _maze_actor()
    actor.collect()
    state = actor.state_dict()
    first = actor.collect()
    other = _maze_actor()
    other.load_state_dict(state)
    assert torch.equal(other.collect().logits, first.logits)


def test_without_a_resumable_environment_new_episodes_start():
    env = ScriptedEnv(num_envs=2, seed=0)
    actor, _ = collect(env, make_model())
    fresh = Actor(ScriptedEnv(num_envs=2, seed=0), make_model(), rollout_length=8, bptt_horizon=4, seed=9)
    fresh.load_state_dict(actor.state_dict())
    counted = actor.statistics.pop()
    assert counted["charts/episodes"] > 0
    carried = fresh.statistics.state_dict()
    assert carried["_done"].sum() == counted["charts/episodes"] and not carried["_length"].any()
    rollout = fresh.collect()
    assert rollout.first[0].all()
    assert all((s[0] == 0).all() for s in rollout.states)
