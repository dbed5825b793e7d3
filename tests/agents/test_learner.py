import copy

import pytest
import torch
import torch.nn.functional as F

import dni_rl
from agents.config import AlgorithmConfig, CriticConfig
from agents.learner import Learner, make_windows, select_sequences
from agents.rollout import Actor, Rollout
from tests.agents.scripted_env import ScriptedEnv, make_model, naive_row

CORES = [("lstm", 1), ("lstm", 2), ("gru", 1), ("gru", 2), ("elementwise_lstm", 1)]
UNROLLED = [*CORES, ("multi_timescale", 1)]
B, DISCOUNT, LAMBDA = 4, 0.9, 0.8


def act(model, *, T=8, K=4, same_step=False, rollouts=1, num_envs=B):
    env = ScriptedEnv(num_envs=num_envs, seed=0, same_step=same_step)
    actor = Actor(env, model, rollout_length=T, bptt_horizon=K, seed=1)
    return [actor.collect() for _ in range(rollouts)]


def make_learner(model, critic=None, *, T=8, K=4, critic_settings=None, **settings):
    algorithm = AlgorithmConfig(
        rollout_length=T,
        bptt_horizon=K,
        discount=DISCOUNT,
        gae_lambda=LAMBDA,
        **{"max_grad_norm": None, "entropy_cost": 0.1, **settings},
    )
    return Learner(model, critic, algorithm, CriticConfig(**(critic_settings or {})), num_envs=B, seed=0)


def make_critic(model, **settings):
    return dni_rl.GradientCritic(state_sizes=model.core.state_sizes, **{"hidden_sizes": (6,), **settings})


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# What the learner computes is what the actor computed


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(("core", "num_layers"), UNROLLED)
@pytest.mark.parametrize("K", [1, 4, 8])
def test_unrolled_logits_and_values_equal_those_of_the_actor(core, num_layers, same_step, K):
    model = make_model(core, num_layers)
    boundaries = 0
    for rollout in act(model, K=K, same_step=same_step, rollouts=3):
        windows = make_windows(rollout, K, DISCOUNT, LAMBDA)
        logits, values, end = model.unroll(
            windows.observation, windows.action_tm1, windows.reward, windows.first, windows.state
        )
        for w in range(8 // K):
            part, rows = slice(w * K, w * K + K), slice(w * B, w * B + B)
            torch.testing.assert_close(logits[:, rows], rollout.logits[part])
            torch.testing.assert_close(values[:, rows], rollout.value[part])
            if w:  # a window ends in the state with which the next one starts
                for component, stored in zip(end, rollout.states, strict=True):
                    torch.testing.assert_close(component[(w - 1) * B : w * B], stored[w])
            for component, stored in zip(windows.state, rollout.states, strict=True):
                assert torch.equal(component[rows], stored[w])
        boundaries += rollout.first[:-1].sum().item()
    assert boundaries > 10


def test_windows_are_cuts_of_the_rollout():
    (rollout,) = act(make_model(), T=6, K=2)
    windows = make_windows(rollout, 2, DISCOUNT, LAMBDA)
    for w in range(3):
        part, rows = slice(2 * w, 2 * w + 2), slice(w * B, w * B + B)
        for name in ("observation", "action_tm1", "reward", "first", "action"):
            assert torch.equal(getattr(windows, name)[:, rows], getattr(rollout, name)[part]), name
        assert torch.equal(windows.context[:, rows], rollout.context[2 * w : 2 * w + 3])
        assert torch.equal(windows.valid[:, rows], ~rollout.last[part])
        log_prob = F.log_softmax(rollout.logits[part], -1).gather(-1, rollout.action[part].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(windows.behaviour_log_prob[:, rows], log_prob)
        end = 2 * w + 2
        ended = rollout.first[end] | rollout.last[end]
        assert torch.equal(windows.alive[:, rows], torch.stack([*~rollout.last[part], ~ended]))
    assert 0 < windows.alive[-1].sum() < len(windows.alive[-1])


# Value targets


def _rollout(*, rewards, discounts, first, last, values, final_values=None):
    """T steps of one environment; lists have T + 1 entries."""

    def column(x, dtype=torch.float32):
        return torch.tensor(x, dtype=dtype).unsqueeze(1)

    T = len(rewards) - 1
    return Rollout(
        observation=torch.zeros(T + 1, 1, 3),
        action_tm1=torch.zeros(T + 1, 1, dtype=torch.int64),
        reward=column(rewards),
        discount=column(discounts),
        first=column(first, torch.bool),
        last=column(last, torch.bool),
        context=None,
        action=torch.zeros(T, 1, dtype=torch.int64),
        logits=torch.zeros(T, 1, 3),
        value=column(values),
        final_value=column(values if final_values is None else final_values),
        states=(torch.zeros(1, 1, 5),),
    )


@pytest.mark.parametrize("terminates", [False, True])
def test_value_targets_at_an_end_with_next_step_autoreset(terminates):
    # Steps: MID, MID, LAST, FIRST, MID. The value of the LAST observation, 30, counts after a time limit only.
    rollout = _rollout(
        rewards=[0, 1, 2, 0, 4],
        discounts=[1, 1, 0 if terminates else 1, 1, 1],
        first=[0, 0, 0, 1, 0],
        last=[0, 0, 1, 0, 0],
        values=[10, 20, 30, 40, 50],
    )
    windows = make_windows(rollout, 4, 0.5, 1.0)
    at_end = 2 + (0 if terminates else 0.5 * 30)
    assert windows.value_target[[0, 1, 3], 0].tolist() == [1 + 0.5 * at_end, at_end, 4 + 0.5 * 50]
    assert windows.advantage[:, 0].tolist() == [1 + 0.5 * at_end - 10, at_end - 20, 0, 4 + 0.5 * 50 - 40]
    assert windows.valid[:, 0].tolist() == [True, True, False, True]


@pytest.mark.parametrize("terminates", [False, True])
def test_value_targets_at_an_end_with_same_step_autoreset(terminates):
    # Steps: MID, MID, FIRST (of the next episode, with the reward of the one before), MID. 30 is the value of the
    # observation in which the time limit cut, 40 that of the new episode's first one.
    rollout = _rollout(
        rewards=[0, 1, 2, 4],
        discounts=[1, 1, 0 if terminates else 1, 1],
        first=[0, 0, 1, 0],
        last=[0, 0, 0, 0],
        values=[10, 20, 40, 50],
        final_values=[10, 20, 40 if terminates else 30, 50],
    )
    windows = make_windows(rollout, 3, 0.5, 1.0)
    at_end = 2 + (0 if terminates else 0.5 * 30)
    assert windows.value_target[:, 0].tolist() == [1 + 0.5 * at_end, at_end, 4 + 0.5 * 50]
    assert windows.valid.all()


@pytest.mark.parametrize(("terminates", "target"), [(False, 1 + 0.5 * 20), (True, 1)])
def test_value_target_of_a_rollout_of_one_step(terminates, target):
    rollout = _rollout(
        rewards=[0, 1], discounts=[1, 0 if terminates else 1], first=[0, 0], last=[0, 1], values=[10, 20]
    )
    windows = make_windows(rollout, 1, 0.5, 0.9)
    assert windows.value_target.tolist() == [[target]]
    assert windows.alive.tolist() == [[True], [False]]


@pytest.mark.parametrize("same_step", [False, True])
def test_value_targets_of_a_run_match_those_of_its_episodes(same_step):
    """Both kinds of autoreset give the returns that the script implies, by the values that the network has."""
    model = make_model()
    env = ScriptedEnv(num_envs=3, seed=0, same_step=same_step)
    rollout = Actor(env, model, rollout_length=30, bptt_horizon=30, seed=1).collect()
    windows = make_windows(rollout, 30, DISCOUNT, 1.0)
    for row in range(3):
        steps, finals = naive_row(model, env, row, rollout.action[:, row])
        index, start = 0, 0
        while True:
            episode = env.episode(row, index)
            length = len(episode.rewards)
            end = start + length
            if end > 30:
                break
            g = 0.0
            if not episode.terminates:
                g = (finals[end] if same_step else steps[end][2]).item()
            for t in reversed(range(length)):
                g = episode.rewards[t].item() + DISCOUNT * g
                assert windows.value_target[start + t, row].item() == pytest.approx(g, abs=1e-5)
            index, start = index + 1, end + (not same_step)


# Gradients


def _gradients_by_hand(model, rollout, K, learner):
    """Truncated BPTT with plain autograd, environment by environment, step by step."""
    model = copy.deepcopy(model)
    algorithm, T = learner.algorithm, len(rollout.action)
    total = torch.zeros(())
    for b in range(B):
        value, reward, discount = rollout.value[:, b], rollout.reward[:, b], rollout.discount[:, b] * DISCOUNT
        first, last = rollout.first[:, b], rollout.last[:, b]
        state = tuple(s[0, b : b + 1] for s in rollout.states)
        for t in range(T):
            if t % K == 0:
                state = tuple(s.detach() for s in state)
            logits, output, state = model.act(
                *(x[t, b : b + 1] for x in (rollout.observation, rollout.action_tm1, rollout.reward, rollout.first)),
                model.core.initial_state(1) if first[t] else state,
            )
            v = model.value_of(output, rollout.context[t, b : b + 1] if model.privileged_size else None)
            if last[t]:
                continue
            advantage, weight = 0.0, 1.0  # next-step autoreset: an episode runs up to its LAST step
            for k in range(t, T):
                advantage += weight * (reward[k + 1] + discount[k + 1] * value[k + 1] - value[k])
                weight *= LAMBDA * discount[k + 1]
                if last[k + 1]:
                    break
            policy = torch.distributions.Categorical(logits=logits[0])
            total = total - advantage * policy.log_prob(rollout.action[t, b])
            total = total + algorithm.baseline_cost * 0.5 * (v[0] - (advantage + value[t])) ** 2
            total = total - algorithm.entropy_cost * policy.entropy()
    (total / (T * B)).backward()
    return gradients(model)


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize(("core", "num_layers"), CORES)
@pytest.mark.parametrize("K", [8, 4, 1])
def test_without_a_critic_the_update_is_truncated_bptt_by_autograd(core, num_layers, K, privileged):
    model = make_model(core, num_layers, head_sizes=(6,), privileged_value=privileged)
    rollout = act(model, K=K, rollouts=2)[1]  # the second one starts with a memory
    learner = make_learner(model, K=K)
    expected = _gradients_by_hand(model, rollout, K, learner)
    learner.update(rollout)
    torch.testing.assert_close(gradients(model), expected)


def test_ppo_with_one_epoch_and_one_minibatch_has_the_gradient_of_a2c():
    (rollout,) = act(make_model())
    results = []
    for settings in ({"name": "a2c"}, {"name": "ppo", "epochs": 1, "minibatches": 1}):
        model = make_model()
        metrics = make_learner(model, **settings).update(rollout)
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1])
    assert abs(metrics["losses/approx_kl"].item()) < 1e-6
    assert metrics["losses/clip_fraction"].item() == 0


def test_the_first_update_with_a_critic_is_that_without():
    (rollout,) = act(make_model())
    models = [make_model(), make_model()]
    critics = [None, make_critic(models[1])]
    for model, critic in zip(models, critics, strict=True):
        make_learner(model, critic).update(rollout)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)  # the first synthetic gradient is zero
    assert all(p.grad.abs().sum() > 0 for p in list(critics[1].parameters())[-2:])


@pytest.mark.parametrize("context_size", [0, 2])
def test_later_updates_differ_by_the_synthetic_gradient_and_both_sides_move(context_size):
    rollouts = act(make_model(), rollouts=3)
    models = [make_model(), make_model()]
    critic = make_critic(models[1], context_size=context_size)
    before = copy.deepcopy(critic.state_dict())
    learners = [make_learner(models[0]), make_learner(models[1], critic, critic_settings={"learning_rate": 0.01})]
    for rollout in rollouts:
        metrics = [learner.update(rollout) for learner in learners]
    recurrent = [model.core.rnn.weight_hh_l0 for model in models]
    assert not torch.equal(*recurrent)
    assert all(not torch.equal(p, before[name]) for name, p in critic.named_parameters())
    assert not any(name.startswith("sg/") for name in metrics[0])
    assert metrics[1].keys() > metrics[0].keys()
    assert metrics[1]["sg/synthetic_norm"] > 0


def test_nothing_is_predicted_beyond_the_end_of_an_episode():
    rollout = act(make_model(), K=2)[0]
    model = make_model()
    critic = make_critic(model, hidden_sizes=())
    with torch.no_grad():
        critic.net[-1].bias.fill_(1.0)  # predicts 1 everywhere
    learner = make_learner(model, critic, K=2)
    alive = make_windows(rollout, 2, DISCOUNT, LAMBDA).alive[-1]
    metrics = learner.update(rollout)
    norm_of_ones = sum(model.core.state_sizes) ** 0.5
    assert metrics["sg/synthetic_norm"].item() == pytest.approx(alive.float().mean().item() * norm_of_ones, rel=1e-5)


def test_clipping_acts_per_side():
    rollouts = act(make_model(), rollouts=2)
    results = []
    for bound in (None, 1e-3):
        model = make_model()
        critic = make_critic(model)
        learner = make_learner(model, critic, critic_settings={"max_grad_norm": bound})
        metrics = [learner.update(rollout) for rollout in rollouts]
        results.append((gradients(model), metrics))
        norm = torch.stack([p.grad.norm() for p in critic.parameters()]).norm().item()
        assert (norm <= 1.001e-3) == (bound is not None)
    torch.testing.assert_close(results[0][1][0], results[1][1][0])  # norms are those before clipping

    model = make_model()
    make_learner(model, max_grad_norm=1e-3).update(rollouts[0])
    assert torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() <= 1.001e-3


# Minibatches


def test_minibatches_hold_whole_sequences():
    (rollout,) = act(make_model(privileged_value=True), K=2)
    windows = make_windows(rollout, 2, DISCOUNT, LAMBDA)
    rows = torch.tensor([3, 1])
    part = select_sequences(windows, rows, B)
    expected = make_windows(
        Rollout(
            **{
                name: tuple(s[:, rows] for s in rollout.states) if name == "states" else getattr(rollout, name)[:, rows]
                for name in Rollout.__dataclass_fields__
            }
        ),
        2,
        DISCOUNT,
        LAMBDA,
    )
    for name in windows.__dataclass_fields__:
        if name == "state":
            assert all(torch.equal(a, b) for a, b in zip(part.state, expected.state, strict=True))
        else:
            torch.testing.assert_close(getattr(part, name), getattr(expected, name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_every_epoch_takes_every_environment_once_and_its_first_ratio_is_1(minibatches):
    model = make_model()
    (rollout,) = act(model)
    learner = make_learner(model, name="ppo", epochs=3, minibatches=minibatches)
    windows = make_windows(rollout, 4, DISCOUNT, LAMBDA)
    windows.value_target = torch.arange(B).repeat(2).expand(4, -1)  # marks every row with its environment
    numbers, batches = zip(*learner._minibatches(windows), strict=True)
    assert numbers == tuple(epoch for epoch in range(3) for _ in range(minibatches))
    for epoch in range(3):
        seen = torch.cat([batch.value_target for batch in batches[epoch * minibatches : (epoch + 1) * minibatches]], 1)
        assert seen[0].bincount().tolist() == [2] * B  # two windows each
    for batch in batches:  # the model has not moved yet
        logits, _, _ = model.unroll(batch.observation, batch.action_tm1, batch.reward, batch.first, batch.state)
        log_prob = F.log_softmax(logits, -1).gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close((log_prob - batch.behaviour_log_prob).exp(), torch.ones(4, 2 * B // minibatches))


def test_epochs_move_the_policy_and_metrics_are_means_over_minibatches():
    model = make_model()
    (rollout,) = act(model)
    metrics = make_learner(model, name="ppo", epochs=4, minibatches=2, learning_rate=0.01).update(rollout)
    assert metrics["losses/approx_kl"] > 1e-5
    assert all(value.dim() == 0 for value in metrics.values())


@pytest.mark.parametrize(("epochs", "critic_epochs"), [(4, 1), (4, 3), (2, 4)])
def test_the_critic_learns_in_the_first_epochs_only(epochs, critic_epochs):
    model = make_model()
    rollouts = act(model, rollouts=2)
    critic = make_critic(model)
    learner = make_learner(
        model, critic, name="ppo", epochs=epochs, minibatches=2, critic_settings={"epochs": critic_epochs}
    )
    for rollout in rollouts:
        metrics = learner.update(rollout)
    first = next(critic.parameters())
    assert learner.critic_optimizer.state[first]["step"].item() == 2 * 2 * min(epochs, critic_epochs)
    assert learner.optimizer.state[model.value_head[-1].weight]["step"].item() == 2 * 2 * epochs
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["sg/synthetic_norm"] > 0


@pytest.mark.parametrize(("name", "interval", "fits"), [("a2c", 1, 5), ("a2c", 2, 3), ("ppo", 3, 2)])
def test_the_critic_learns_at_every_so_many_updates_and_is_used_at_all_of_them(name, interval, fits):
    model = make_model()
    critic = make_critic(model)
    learner = make_learner(model, critic, name=name, minibatches=1, critic_settings={"fit_interval": interval})
    fitted, applied = [], []
    for rollout in act(model, rollouts=5):
        metrics = learner.update(rollout)
        fitted.append("sg/loss" in metrics)
        applied.append(metrics["sg/synthetic_norm"] > 0)
        assert int(critic.num_updates) == sum(fitted)
    assert fitted == [update % interval == 0 for update in range(5)]
    assert sum(fitted) == fits
    assert all(applied[1:])  # before the first fit the prediction is zero


def test_ppo_counts_warm_up_and_looks_at_the_yardstick_in_minibatches():
    """The critic's fits; `fit_interval` counts rollouts, see above."""
    model = make_model()
    critic = make_critic(model, warmup_updates=5, max_norm_ratio=1.0, yardstick_interval=3)
    learner = make_learner(model, critic, name="ppo", epochs=3, minibatches=2, critic_settings={"epochs": 2})
    looks = []
    observe = critic.observe_window
    critic.observe_window = lambda norm, stands_for: looks.append(stands_for) or observe(norm, stands_for)
    applied = []
    for rollout in act(model, rollouts=6):
        applied.append((learner.update(rollout)["sg/synthetic_norm"] > 0).item())
    assert int(critic.num_updates) == 6 * 2 * 2
    assert applied == [
        False,
        True,
        True,
        True,
        True,
        True,
    ]  # after 4 fits, and from the second minibatch of the next four on
    assert looks == [1] * 16 + [3] * 3  # of the fits 17 to 24, those that 3 divides


def test_a_resumed_learner_goes_on_with_its_count_of_updates():
    model = make_model()
    rollout = act(model)[0]
    learner = make_learner(model, make_critic(model), critic_settings={"fit_interval": 2})
    learner.update(rollout)
    other = make_learner(make_model(), make_critic(model), critic_settings={"fit_interval": 2})
    other.load_state_dict(learner.state_dict())
    assert "sg/loss" not in other.update(rollout)


def test_the_clip_ratio_bounds_the_epochs_after_the_first():
    (rollout,) = act(make_model())
    clipped, parameters = [], []
    for epochs in (1, 4):
        for clip_ratio in (0.01, 0.5):
            model = make_model()
            settings = {"epochs": epochs, "minibatches": 1, "learning_rate": 0.02, "clip_ratio": clip_ratio}
            metrics = make_learner(model, name="ppo", **settings).update(rollout)
            clipped.append(metrics["losses/clip_fraction"].item())
            parameters.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*parameters[:2])  # every ratio is 1
    assert not torch.allclose(*parameters[2:])
    assert clipped[:2] == [0, 0] and clipped[2] > clipped[3]


def test_a_target_kl_ends_the_epochs():
    norms = []
    for target_kl in (None, 1e-9):
        model = make_model()
        (rollout,) = act(model)
        learner = make_learner(model, name="ppo", epochs=4, minibatches=1, learning_rate=0.01, target_kl=target_kl)
        learner.update(rollout)
        norms.append(learner.optimizer.state[model.value_head[-1].weight]["step"].item())
    assert norms == [4, 2]  # the first pass has no divergence yet


# Settings


def test_normalised_advantages_count_real_steps_only(monkeypatch):
    import agents.learner

    model = make_model()
    (rollout,) = act(model)
    seen = []
    loss = agents.learner.actor_critic_loss

    def record(*args, **kwargs):
        seen.append((args[3], args[5]))
        return loss(*args, **kwargs)

    monkeypatch.setattr(agents.learner, "actor_critic_loss", record)
    make_learner(model, normalize_advantages=True).update(rollout)
    ((advantage, valid),) = seen
    assert not valid.all()
    assert advantage[valid].mean().item() == pytest.approx(0, abs=1e-6)
    assert advantage[valid].std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("decays", [(0.1, 0.2), (0.0, 0.2), (0.1, 0.0)])
def test_each_side_has_the_optimiser_of_its_own_settings(decays):
    model_settings, critic_settings = (
        {"learning_rate": rate, "adam_betas": betas, "adam_eps": eps, "weight_decay": decay}
        for rate, betas, eps, decay in zip((0.3, 0.4), ((0.5, 0.6), (0.7, 0.8)), (1e-4, 1e-3), decays, strict=True)
    )
    model = make_model()
    learner = make_learner(model, make_critic(model), critic_settings=critic_settings, **model_settings)
    for optimizer, settings in ((learner.optimizer, model_settings), (learner.critic_optimizer, critic_settings)):
        # not Adam, whose decay is an L2 penalty that enters the moments
        assert type(optimizer) is (torch.optim.AdamW if settings["weight_decay"] else torch.optim.Adam)
        (group,) = optimizer.param_groups
        names = {"lr": "learning_rate", "betas": "adam_betas", "eps": "adam_eps", "weight_decay": "weight_decay"}
        assert {name: group[name] for name in names} == {name: settings[ours] for name, ours in names.items()}


@pytest.mark.parametrize(
    ("anneals", "hold", "expected"),
    [
        (True, 0.0, [0.25, 0.5]),
        (True, 0.5, [0.5, 1.0]),
        (True, 0.75, [1.0, 2.0]),
        (True, 0.9, [1.0, 2.0]),
        (False, 0.0, [1.0, 2.0]),
    ],
)
def test_learning_rates_fall_linearly_on_both_sides(anneals, hold, expected):
    """With a quarter of the run left, and a rate of 1 for the model, 2 for the critic."""
    model = make_model()
    learner = make_learner(
        model,
        make_critic(model),
        learning_rate=1.0,
        anneal_learning_rate=anneals,
        learning_rate_hold=hold,
        critic_settings={"learning_rate": 2.0},
    )
    learner.set_progress(0.75)
    optimizers = (learner.optimizer, learner.critic_optimizer)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == expected


@pytest.mark.parametrize(("anneals", "left", "expected"), [(True, 0.0, 0.05), (True, 0.4, 0.11), (False, 0.0, 0.2)])
def test_the_entropy_cost_falls_linearly(anneals, left, expected):
    """With a quarter of the run left, a learner takes the step that one with what is left of the cost takes at its start."""
    rollout = act(make_model(), rollouts=1)[0]
    settings = {"anneal_entropy": anneals, "final_entropy_share": left, "anneal_learning_rate": False}
    learners = [make_learner(make_model(), None, entropy_cost=cost, **settings) for cost in (0.2, expected)]
    learners[0].set_progress(0.75)
    for learner in learners:
        learner.update(rollout)
    assert learners[0].entropy_cost == pytest.approx(expected)
    for one, two in zip(*(learner.model.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_a_learner_continues_exactly_from_its_saved_state(name):
    rollouts = act(make_model(), rollouts=4)
    learners = []
    for seed in (0, 5):
        model = make_model(seed=seed)
        learners.append(make_learner(model, make_critic(model), name=name, epochs=2, minibatches=2))
    for rollout in rollouts[:2]:
        learners[0].update(rollout)
    learners[1].load_state_dict(copy.deepcopy(learners[0].state_dict()))
    metrics = [[learner.update(rollout) for rollout in rollouts[2:]] for learner in learners]
    assert metrics[0] == metrics[1]
    for one, two in zip(learners[0].model.parameters(), learners[1].model.parameters(), strict=True):
        assert torch.equal(one, two)
