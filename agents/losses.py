"""Actor-critic losses, unreduced: one number per step and sequence, which is what `dni_rl.backward` wants.

Shapes: T unroll length, B batch. A transition t -> t + 1 is real unless step t was the LAST of its episode; there every loss is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, discounts: Tensor, values_tm1: Tensor, values_t: Tensor, cuts: Tensor, lambda_: float
) -> Tensor:
    """Generalised advantage estimates with episodes that end by termination, by time limit or not at all.

        delta_t = r_{t+1} + d_{t+1} V(x_{t+1}) - V(x_t)
        A_t     = delta_t + lambda d_{t+1} A_{t+1}       where step t + 1 belongs to the same episode, else delta_t

    Schulman et al., "High-dimensional continuous control using GAE" (2016), eq. 16. The value after a time limit is that of the
    episode's last observation: d_{t+1} is not 0 there, but nothing of what follows flows back.

    Args:
        rewards: [T, B] of the transition after step t.
        discounts: [T, B] of that transition, agent's discount included; 0 where it terminated the episode.
        values_tm1: [T, B] V(x_t).
        values_t: [T, B] V(x_{t+1}), of the observation in which the transition ended.
        cuts: [T, B] bool, True where the recursion must not continue into step t + 1.
        lambda_: in [0, 1].

    Returns:
        [T, B] advantages, without gradient.
    """
    with torch.no_grad():
        deltas = rewards + discounts * values_t - values_tm1
        decay = (lambda_ * discounts).masked_fill(cuts, 0.0)
        advantages = torch.empty_like(deltas)
        advantage = torch.zeros_like(deltas[0])
        for t in reversed(range(len(deltas))):
            advantage = torch.addcmul(deltas[t], decay[t], advantage, out=advantages[t])
        return advantages


def normalized_advantages(advantages: Tensor, valid: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over all valid steps; usual in PPO (Huang et al. 2022).

    Args:
        advantages: [T, B], 0 where not valid.
        valid: [T, B] bool.
        total: sums a scalar over processes, where several learn together.

    Returns:
        [T, B]; what is not valid has no meaning.
    """
    weight = valid.to(advantages.dtype)
    count = total(weight.sum()).clamp_min(1.0)
    mean = total((weight * advantages).sum()) / count
    std = (total((weight * (advantages - mean).square()).sum()) / count).sqrt()
    return (advantages - mean) / (std + 1e-8)


@dataclass(frozen=True, slots=True)
class ActorCriticLoss:
    """Losses [T, B] and the scalars worth logging (without gradient)."""

    total: Tensor
    metrics: dict[str, Tensor]


def actor_critic_loss(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    advantages: Tensor,
    returns: Tensor,
    valid: Tensor,
    *,
    entropy_cost: float,
    baseline_cost: float,
    behaviour_log_probs: Tensor | None = None,
    clip_ratio: float | None = None,
) -> ActorCriticLoss:
    """Policy, value and entropy loss of every step.

        A2C:  l = -A log pi(a) + baseline_cost/2 (V - R)^2 - entropy_cost H(pi)
        PPO:  the first term is -min(rho A, clip(rho, 1 - c, 1 + c) A),  rho = pi(a) / mu(a)

    Mnih et al. (2016), Schulman et al. "Proximal policy optimization algorithms" (2017), eq. 7.

    Args:
        logits: [T, B, A].
        values: [T, B].
        actions: [T, B] int64.
        advantages: [T, B], no gradient flows into them.
        returns: [T, B] value targets.
        valid: [T, B] bool, False where no transition happened: all losses are 0 there.
        entropy_cost: weight of the entropy bonus.
        baseline_cost: weight of the value loss.
        behaviour_log_probs: [T, B] log mu(a) for PPO, None for A2C.
        clip_ratio: c, for PPO.
    """
    log_policy = F.log_softmax(logits, dim=-1)
    log_probs = log_policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    value_error = values - returns
    value_loss = 0.5 * value_error.square()
    watched = {"losses/value_loss": value_loss, "losses/entropy": entropy}
    weight = valid.to(logits.dtype)
    count = weight.sum().clamp_min(1.0)  # of the metrics
    if behaviour_log_probs is None or clip_ratio is None:
        policy_loss = -advantages * log_probs
    else:
        log_ratio = log_probs - behaviour_log_probs
        ratio = log_ratio.exp()
        policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio) * advantages)
        with torch.no_grad():
            # Schulman, "Approximating KL divergence" (2020): unbiased, positive, of low variance.
            watched["losses/approx_kl"] = ratio - 1.0 - log_ratio
            watched["losses/clip_fraction"] = ((ratio - 1.0).abs() > clip_ratio).to(ratio.dtype)
    total = weight * (policy_loss + baseline_cost * value_loss - entropy_cost * entropy)
    watched["losses/policy_loss"] = policy_loss
    with torch.no_grad():
        # moments that an explained variance is made of, of several windows that of the means of each
        watched |= {
            "losses/value_error": value_error,
            "losses/value_target": returns,
            "losses/value_target_squared": returns.square(),
        }
        means = torch.stack(list(watched.values())).mul_(weight).flatten(1).sum(1) / count
    return ActorCriticLoss(total, dict(zip(watched, means.unbind(), strict=True)))
