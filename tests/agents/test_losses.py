import math

import pytest
import torch
import torch.nn.functional as F

from agents.losses import actor_critic_loss, generalized_advantages, normalized_advantages


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def _advantages(rewards, discounts, values_tm1, values_t, cuts, lambda_):
    """For one column, given as lists: `generalized_advantages` as a list."""
    columns = [torch.tensor(x, dtype=torch.float64).unsqueeze(1) for x in (rewards, discounts, values_tm1, values_t)]
    return generalized_advantages(*columns, torch.tensor(cuts).unsqueeze(1), lambda_).squeeze(1).tolist()


def test_normalised_advantages_have_mean_0_and_deviation_1_where_they_count(generator):
    advantages = 3.0 + 5.0 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(7, 4, generator=generator) < 0.7
    found = normalized_advantages(advantages.masked_fill(~valid, 0.0), valid)[valid]
    chosen = advantages[valid]
    torch.testing.assert_close(found, (chosen - chosen.mean()) / chosen.std(correction=0))
    assert torch.equal(normalized_advantages(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)), torch.zeros(2, 2))
    alone = torch.tensor([[True, False]])  # has nothing to be better than
    assert normalized_advantages(torch.tensor([[-50.0, 0.0]]), alone)[alone].item() == 0.0


def test_advantages_of_several_processes_are_normalised_together(generator):
    parts = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 9.0]).view(2, 1, 1)
    valid = torch.rand(2, 7, 4, generator=generator) < 0.7
    parts = parts.masked_fill(~valid, 0.0)
    expected = normalized_advantages(parts.flatten(0, 1), valid.flatten(0, 1)).unflatten(0, (2, 7))
    count = valid.sum()
    mean = parts.sum() / count
    square = (parts - mean).square()[valid].sum()
    for part, rows, result in zip(parts, valid, expected, strict=True):
        sums = iter((count.double(), parts.sum(), square))  # in the order in which they are asked for
        torch.testing.assert_close(normalized_advantages(part, rows, lambda _, sums=sums: next(sums)), result)


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("T", [1, 7])
def test_advantages_match_the_definition(generator, T, lambda_):
    B = 4
    rewards, values_tm1, values_t = torch.randn(3, T, B, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.rand(2, T, B, generator=generator) < 0.2
    discounts = 0.9 * (~terminated).double()
    cuts = terminated | truncated
    expected = torch.zeros(T, B, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for k in range(t, T):  # A_t = sum_k lambda^(k - t) (prod of discounts) delta_k, up to the episode's end
                delta = rewards[k, b] + discounts[k, b] * values_t[k, b] - values_tm1[k, b]
                expected[t, b] += lambda_ ** (k - t) * discounts[t:k, b].prod() * delta
                if cuts[k, b]:
                    break
    torch.testing.assert_close(
        generalized_advantages(rewards, discounts, values_tm1, values_t, cuts, lambda_), expected
    )


def test_with_lambda_1_advantages_are_returns_minus_values():
    advantages = _advantages([1, 2, 3], [0.5, 0.5, 0.5], [10, 20, 30], [20, 30, 40], [False] * 3, 1.0)
    returns = [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 40)), 2 + 0.5 * (3 + 0.5 * 40), 3 + 0.5 * 40]
    assert advantages == pytest.approx([returns[0] - 10, returns[1] - 20, returns[2] - 30])


def test_a_termination_bootstraps_nothing_and_a_time_limit_the_value_of_the_last_observation():
    # Both end in the second transition; 99 and 7 are what comes after it and must not leak back, but for the bootstrap.
    terminated = _advantages([1, 2, 99], [0.5, 0.0, 0.5], [3, 4, 7], [4, 8, 9], [False, True, False], 1.0)
    assert terminated[:2] == pytest.approx([1 + 0.5 * 2 - 3, 2 - 4])
    truncated = _advantages([1, 2, 99], [0.5, 0.5, 0.5], [3, 4, 7], [4, 8, 9], [False, True, False], 1.0)
    assert truncated[:2] == pytest.approx([1 + 0.5 * (2 + 0.5 * 8) - 3, 2 + 0.5 * 8 - 4])


def test_a_single_step_has_the_temporal_difference_for_advantage():
    assert _advantages([1], [0.9], [2], [3], [False], 0.95) == pytest.approx([1 + 0.9 * 3 - 2])


def test_advantages_carry_no_gradient():
    x = torch.ones(2, 1, requires_grad=True)
    assert not generalized_advantages(x, x, x, x, torch.zeros(2, 1, dtype=torch.bool), 0.9).requires_grad


def _batch(generator, T=3, B=2, A=3):
    logits = torch.randn(T, B, A, generator=generator, dtype=torch.float64).requires_grad_()
    values, advantages, returns = torch.randn(3, T, B, generator=generator, dtype=torch.float64)
    return {
        "logits": logits,
        "values": values.requires_grad_(),
        "actions": torch.randint(A, (T, B), generator=generator),
        "advantages": advantages,
        "returns": returns,
        "valid": torch.ones(T, B, dtype=torch.bool),
        "entropy_cost": 0.1,
        "baseline_cost": 0.3,
    }


def _log_probs(batch):
    return F.log_softmax(batch["logits"].detach(), -1).gather(-1, batch["actions"].unsqueeze(-1)).squeeze(-1)


def test_the_loss_of_a_step_by_hand():
    # pi = (1/4, 3/4), the second action taken, A = 2, V = 1, R = 4
    logits = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = actor_critic_loss(
        logits, one, torch.tensor([[1]]), 2 * one, 4 * one, one.bool(), entropy_cost=0.1, baseline_cost=0.5
    )
    policy_loss, value_loss = -2 * math.log(0.75), 0.5 * 9.0
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert loss.total.tolist() == [[pytest.approx(policy_loss + 0.5 * value_loss - 0.1 * entropy)]]
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(
        {
            "losses/policy_loss": policy_loss,
            "losses/value_loss": value_loss,
            "losses/entropy": entropy,
            "losses/value_error": -3.0,
            "losses/value_target": 4.0,
            "losses/value_target_squared": 16.0,
        }
    )


@pytest.mark.parametrize("clip_ratio", [None, 0.2])
def test_steps_without_a_transition_have_no_loss_and_no_gradient(generator, clip_ratio):
    batch = _batch(generator)
    batch["valid"][1] = False
    mu = None if clip_ratio is None else _log_probs(batch) - 0.1
    loss = actor_critic_loss(**batch, behaviour_log_probs=mu, clip_ratio=clip_ratio)
    assert (loss.total[1] == 0).all()
    assert (loss.total[[0, 2]] != 0).all()
    loss.total.sum().backward()
    assert (batch["logits"].grad[1] == 0).all()
    assert (batch["values"].grad[1] == 0).all()
    # means are over the steps that count
    without = {k: v if isinstance(v, float) else v.detach()[[0, 2]] for k, v in batch.items()}
    mu = None if mu is None else mu[[0, 2]]
    expected = actor_critic_loss(**without, behaviour_log_probs=mu, clip_ratio=clip_ratio)
    torch.testing.assert_close(loss.metrics, expected.metrics)


def test_at_ratio_1_ppo_has_the_gradient_of_a2c(generator):
    batch = _batch(generator)
    gradients = []
    for settings in ({}, {"behaviour_log_probs": _log_probs(batch), "clip_ratio": 0.2}):
        loss = actor_critic_loss(**batch, **settings)
        gradients.append(torch.autograd.grad(loss.total.sum(), [batch["logits"], batch["values"]]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate"),
    [(1.5, 1.0, 1.2), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.1, 1.0, 1.1)],
)
def test_the_clipped_surrogate_is_pessimistic(ratio, advantage, surrogate):
    logits = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)  # pi = 1/2
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = actor_critic_loss(
        logits,
        one,
        torch.tensor([[0]]),
        advantage * one,
        one,
        one.bool(),
        entropy_cost=0.0,
        baseline_cost=0.0,
        behaviour_log_probs=one * math.log(0.5 / ratio),
        clip_ratio=0.2,
    )
    assert loss.total.item() == pytest.approx(-surrogate)
    loss.total.sum().backward()
    is_clipped = surrogate != pytest.approx(ratio * advantage)
    assert (logits.grad == 0).all() == is_clipped
    assert loss.metrics["losses/approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert loss.metrics["losses/clip_fraction"].item() == float(abs(ratio - 1) > 0.2)
