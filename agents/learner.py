"""Learning: truncated BPTT over windows of a rollout, with or without an error critic, by A2C or PPO.

A rollout of T steps is T / K windows of K = `bptt_horizon` steps. All windows of all environments are unrolled side by side as one
batch, each from the state that the actor had at its start; nothing but the error critic carries gradient from one window to
the one before. With `critic=None` the same code is plain truncated BPTT, and with K = T it is BPTT over the whole rollout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_rl
from agents.build import build_auxiliary
from agents.config import AlgorithmConfig, CriticConfig
from agents.losses import actor_critic_loss, generalized_advantages
from agents.model import ActorCritic
from agents.rollout import Rollout
from dni_rl.cores import State
from dni_rl.cores.base import UnrolledState


@dataclass(slots=True)
class Windows:
    """A batch of windows: K steps, N = (number of windows) * (environments).

    Attributes:
        observation, action_tm1, reward, first: [K, N, ...] what the network reads.
        action, advantage, value_target, behaviour_log_prob: [K, N].
        valid: [K, N] bool, False at LAST steps, whose action does nothing.
        alive: [N], 0 where the episode ended at the window's end.
        context: [K + 1, N, Z] or None.
        state: tuple of [N, n] the actor's state at the start of each window.
    """

    observation: Tensor
    action_tm1: Tensor
    reward: Tensor
    first: Tensor
    action: Tensor
    advantage: Tensor
    value_target: Tensor
    behaviour_log_prob: Tensor
    valid: Tensor
    alive: Tensor
    context: Tensor | None
    state: State


def make_windows(rollout: Rollout, bptt_horizon: int, discount: float, gae_lambda: float) -> Windows:
    """Computes advantages over the whole rollout, then cuts it into windows (the horizon of credit in time of the *critic of
    reward* has nothing to do with the truncation window of the *core*).

    Args:
        rollout: T steps of B environments.
        bptt_horizon: K, divides T.
        discount: per agent step.
        gae_lambda: of generalised advantage estimation.

    Returns:
        Windows with N = T / K * B, ordered by window, then environment.
    """
    K, W = bptt_horizon, len(rollout.action) // bptt_horizon
    valid = ~rollout.last[:-1]
    # Under same-step autoreset a `first` step comes with the reward of the episode before, whose last observation has a value of its own.
    values_t = torch.where(rollout.first[1:], rollout.final_value[1:], rollout.value[1:])
    advantage = generalized_advantages(
        rollout.reward[1:],
        rollout.discount[1:] * discount,
        rollout.value[:-1],
        values_t,
        rollout.first[1:] | rollout.last[1:],
        gae_lambda,
    ).masked_fill(~valid, 0.0)
    log_prob = F.log_softmax(rollout.logits, dim=-1).gather(-1, rollout.action.unsqueeze(-1)).squeeze(-1)

    def windows(x: Tensor) -> Tensor:
        """[T, B, ...] -> [K, W * B, ...]."""
        return x.unflatten(0, (W, K)).transpose(0, 1).flatten(1, 2)

    context = None
    if rollout.context is not None:
        ends = rollout.context[K::K].flatten(0, 1).unsqueeze(0)  # [1, W * B, Z], the step after each window
        context = torch.cat([windows(rollout.context[:-1]), ends])
    return Windows(
        observation=windows(rollout.observation[:-1]),
        action_tm1=windows(rollout.action_tm1[:-1]),
        reward=windows(rollout.reward[:-1]),
        first=windows(rollout.first[:-1]),
        action=windows(rollout.action),
        advantage=windows(advantage),
        value_target=windows(advantage + rollout.value[:-1]),
        behaviour_log_prob=windows(log_prob),
        valid=windows(valid),
        # Nothing follows a LAST step, and nothing before a FIRST step is remembered.
        alive=~(rollout.first | rollout.last)[K::K].flatten(),
        context=context,
        state=tuple(s.flatten(0, 1) for s in rollout.states),
    )


def select_sequences(windows: Windows, environments: Tensor, num_envs: int) -> Windows:
    """The windows of some environments only: minibatches hold whole sequences.

    Args:
        windows: all windows, N = W * num_envs.
        environments: [M] int64 indices of environments.
        num_envs: B.
    """
    W = windows.alive.shape[0] // num_envs
    rows = (torch.arange(W, device=environments.device).unsqueeze(1) * num_envs + environments).flatten()

    def pick(x: Tensor) -> Tensor:
        return x.index_select(1, rows)  # [K, N, ...] -> [K, W * M, ...]

    return Windows(
        observation=pick(windows.observation),
        action_tm1=pick(windows.action_tm1),
        reward=pick(windows.reward),
        first=pick(windows.first),
        action=pick(windows.action),
        advantage=pick(windows.advantage),
        value_target=pick(windows.value_target),
        behaviour_log_prob=pick(windows.behaviour_log_prob),
        valid=pick(windows.valid),
        alive=windows.alive[rows],
        context=None if windows.context is None else pick(windows.context),
        state=tuple(s[rows] for s in windows.state),
    )


class Learner:
    """Updates a model, and its error critic, from rollouts.

    Args:
        model: the actor-critic network.
        critic: the error critic, or None for plain truncated BPTT.
        algorithm: settings of A2C or PPO.
        critic_config: settings of the critic's optimiser, and of the auxiliary task; not used without a critic.
        num_envs: B.
        seed: of the stream that shuffles minibatches.
    """

    def __init__(
        self,
        model: ActorCritic,
        critic: dni_rl.ErrorCritic | None,
        algorithm: AlgorithmConfig,
        critic_config: CriticConfig,
        *,
        num_envs: int,
        seed: int,
    ):
        self.model, self.critic = model, critic
        self.algorithm, self.critic_config = algorithm, critic_config
        self.num_envs = num_envs
        self.generator = torch.Generator().manual_seed(seed)
        self.auxiliary = None if critic is None else build_auxiliary(critic_config, model)
        # The auxiliary head is a part of the model: one optimiser, one clipped norm. The actor has no use for it.
        self.learned = model if self.auxiliary is None else nn.ModuleList([model, self.auxiliary])
        self.optimizer = _adam(self.learned, algorithm)
        self.critic_optimizer = None if critic is None else _adam(critic, critic_config)

    def set_progress(self, fraction: float) -> None:
        """Anneals the learning rates of both sides linearly to zero; `fraction` of the run is done."""
        remaining = 1.0 - fraction if self.algorithm.anneal_learning_rate else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.algorithm.learning_rate * remaining
        if self.critic_optimizer is not None:
            for group in self.critic_optimizer.param_groups:
                group["lr"] = self.critic_config.learning_rate * remaining

    def update(self, rollout: Rollout) -> dict[str, Tensor]:
        """Learns from a rollout.

        Returns:
            Scalars by TensorBoard name, means over minibatches, still on the device.
        """
        algorithm = self.algorithm
        windows = make_windows(rollout, algorithm.bptt_horizon, algorithm.discount, algorithm.gae_lambda)
        collected: dict[str, list[Tensor]] = {}
        for minibatch in self._minibatches(windows):
            metrics = self._update_minibatch(minibatch)
            for name, value in metrics.items():
                collected.setdefault(name, []).append(value)
            # The one decision that needs the host: read only if it was asked for.
            target_kl = algorithm.target_kl if algorithm.name == "ppo" else None
            if target_kl is not None and metrics["losses/approx_kl"].item() > target_kl:
                break
        return {
            name: values[0] if len(values) == 1 else torch.stack(values).mean() for name, values in collected.items()
        }

    def _minibatches(self, windows: Windows) -> Iterator[Windows]:
        algorithm = self.algorithm
        if algorithm.name == "a2c":
            yield windows
            return
        size = self.num_envs // algorithm.minibatches
        for _ in range(algorithm.epochs):
            if algorithm.minibatches == 1:
                yield windows
                continue
            order = torch.randperm(self.num_envs, generator=self.generator).to(windows.action.device)
            for environments in order.split(size):
                yield select_sequences(windows, environments, self.num_envs)

    def _update_minibatch(self, batch: Windows) -> dict[str, Tensor]:
        algorithm, model, critic = self.algorithm, self.model, self.critic
        advantage = batch.advantage
        if algorithm.normalize_advantages:
            weight = batch.valid.to(advantage.dtype)
            count = weight.sum().clamp_min(2.0)
            mean = (weight * advantage).sum() / count
            std = ((weight * (advantage - mean).square()).sum() / count).sqrt()
            advantage = (advantage - mean) / (std + 1e-8)

        self.optimizer.zero_grad(set_to_none=True)
        state = dni_rl.cut(batch.state)
        inputs = model.core_inputs(batch.observation, batch.action_tm1, batch.reward, batch.first)
        outputs, next_state = model.core.unroll(inputs, state, batch.first)
        logits, values = model.heads(outputs)
        loss = actor_critic_loss(
            logits,
            values,
            batch.action,
            advantage,
            batch.value_target,
            batch.valid,
            entropy_cost=algorithm.entropy_cost,
            baseline_cost=algorithm.baseline_cost,
            behaviour_log_probs=batch.behaviour_log_prob if algorithm.name == "ppo" else None,
            clip_ratio=algorithm.clip_ratio,
        )
        if critic is not None and self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)
        context = batch.context if critic is not None and critic.context_size else None
        total, metrics = loss.total, loss.metrics
        if self.auxiliary is not None and critic is not None:
            assert isinstance(next_state, UnrolledState)
            num_windows = algorithm.rollout_length // algorithm.bptt_horizon
            targets, valid = dni_rl.later_synthetic_gradients(critic, next_state, num_windows, batch.alive, context)
            auxiliary_loss = self.auxiliary(outputs, targets, valid)
            total = total + auxiliary_loss
            metrics["losses/auxiliary_loss"] = auxiliary_loss.detach().sum() / valid.sum().clamp_min(1)
        report = dni_rl.backward(total, start=state, end=next_state, critic=critic, alive=batch.alive, context=context)
        metrics["losses/gradient_norm"] = _clip(self.learned, algorithm.max_grad_norm)
        self.optimizer.step()
        if critic is not None and self.critic_optimizer is not None:
            metrics["sg/gradient_norm"] = _clip(critic, self.critic_config.max_grad_norm)
            self.critic_optimizer.step()
            metrics |= {
                "sg/loss": report.critic_loss,
                "sg/explained_variance": report.explained_variance,
                "sg/cosine": report.cosine,
                "sg/norm_ratio": report.norm_ratio,
                "sg/target_norm": report.target_norm,
                "sg/synthetic_norm": report.synthetic_norm,
            }
        return metrics

    def state_dict(self) -> dict[str, object]:
        """Model, critic, optimisers and the minibatch stream; the auxiliary task where there is one."""
        auxiliary = {} if self.auxiliary is None else {"auxiliary": self.auxiliary.state_dict()}
        return auxiliary | {
            "model": self.model.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic_optimizer": None if self.critic_optimizer is None else self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.generator.set_state(state["generator"].cpu())


def _adam(module: nn.Module, config: AlgorithmConfig | CriticConfig) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    return kind(
        module.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        # Not the customary 1e-5: the gradients that carry the memory are far smaller than that.
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _clip(module: nn.Module, max_norm: float | None) -> Tensor:
    """Clips the gradient of one side and returns the norm it had."""
    return nn.utils.clip_grad_norm_(module.parameters(), float("inf") if max_norm is None else max_norm)
