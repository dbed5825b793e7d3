"""Learning: truncated BPTT over windows of a rollout, with or without an error critic, by A2C or PPO.

A rollout of T steps is T / K windows of K = `bptt_horizon` steps. All windows of all environments are unrolled side by side as one
batch, each from the state that the actor had at its start; nothing but the error critic carries gradient from one window to
the one before. With `critic=None` the same code is plain truncated BPTT, and with K = T it is BPTT over the whole rollout.

BP(lambda) and RTRL carry derivatives forward instead, from each window to the next and from rollout to rollout: there the windows
are learned from one after the other, all with the parameters that acted, and one step of the optimisers ends the rollout. With a
multi-timescale core, K counts ticks of each level, and a window has K * periods[-1] steps (`MultiTimescaleCore.unroll_in_ticks`).

With other processes (`agents.parallel`), each has B environments, and gradients, statistics and decisions are those of all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dni_rl
from agents.build import build_auxiliary
from agents.config import AlgorithmConfig, CriticConfig
from agents.losses import ActorCriticLoss, actor_critic_loss, generalized_advantages, normalized_advantages
from agents.model import ActorCritic
from agents.parallel import ALONE, Workers
from agents.rollout import Rollout
from dni_rl.cores import State
from dni_rl.cores.base import UnrolledState
from dni_rl.cores.timescales import LevelledState

COSINE = "/cosine"  # NaN where a window had no target; its means leave it out


@dataclass(slots=True)
class Windows:
    """A batch of windows: K steps, N = (number of windows) * (environments).

    Attributes:
        observation, action_tm1, reward, first: [K, N, ...] what the network reads.
        action, advantage, value_target, behaviour_log_prob: [K, N].
        valid: [K, N] bool, False at LAST steps, whose action does nothing.
        alive: [K + 1, N] bool, False where nothing follows the state before a step, or at the window's end: steps between two episodes, and
            ends of them. What `dni_rl.backward` takes.
        context: [K + 1, N, Z] what error critics are told, or None.
        privileged: [K, N, Z] what the value function is told, or None.
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
    privileged: Tensor | None
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
        # Nothing follows the state before a LAST step, and nothing before a FIRST step is remembered.
        alive=torch.cat([windows(valid), ~(rollout.first | rollout.last)[K::K].flatten().unsqueeze(0)]),
        context=context,
        privileged=None if rollout.privileged is None else windows(rollout.privileged[:-1]),
        state=tuple(s.flatten(0, 1) for s in rollout.states),
    )


def with_inputs(
    rollout: Rollout, model: ActorCritic, config: CriticConfig, before: Tensor | None = None
) -> tuple[Rollout, Tensor | None]:
    """The rollout with a context that also tells of what the agent has seen and will see, where the configuration says so.

    Behind the privileged context for the kind cdni, alone for others: first the averages of past observations, then what the core will
    read in the next `future_steps` steps. The torso is taken as it is now. See `dni_rl.past_inputs` and `dni_rl.future_inputs`.

    Args:
        rollout: T steps of B environments.
        model: whose torso and core inputs they are.
        config: of the critic.
        before: [B, Z] averages that the rollout before ended with; None at the beginning.

    Returns:
        The rollout, and the averages that it ends with, or None where there are none.
    """
    if not (config.future_steps or config.past_steps) or not config.predicts:
        return rollout, None
    contexts = [rollout.context] if config.kind == "cdni" and rollout.context is not None else []
    # of the states before each of the T + 1 observations; the state behind the last one is not there
    averages = None
    with torch.no_grad():
        if config.past_steps:
            observed = model.observed(rollout.observation)
            past = dni_rl.past_inputs(observed, rollout.first, config.past_steps, before=before)[:-1]
            averages = past[-1]
            contexts.append(past)
        if config.future_steps:
            inputs = model.core_inputs(rollout.observation, rollout.action_tm1, rollout.reward, rollout.first)
            contexts.append(dni_rl.future_inputs(inputs, rollout.first, config.future_steps)[:-1])
    return replace(rollout, context=torch.cat(contexts, dim=-1)), averages


def select_sequences(windows: Windows, environments: Tensor, num_envs: int) -> Windows:
    """The windows of some environments only: minibatches hold whole sequences.

    Args:
        windows: all windows, N = W * num_envs.
        environments: [M] int64 indices of environments.
        num_envs: B.
    """
    W = windows.alive.shape[1] // num_envs
    return _select(
        windows, (torch.arange(W, device=environments.device).unsqueeze(1) * num_envs + environments).flatten()
    )


def windows_in_order(windows: Windows, num_envs: int) -> Iterator[Windows]:
    """The windows of a rollout one after the other, each with N = num_envs."""
    if windows.alive.shape[1] == num_envs:
        yield windows
        return
    for rows in torch.arange(windows.alive.shape[1], device=windows.alive.device).split(num_envs):
        yield _select(windows, rows)


def _select(windows: Windows, rows: Tensor) -> Windows:
    """Some of N windows, by their indices [M] int64."""

    def pick(x: Tensor) -> Tensor:
        return x.index_select(1, rows)  # [K, N, ...] -> [K, M, ...]

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
        alive=pick(windows.alive),
        context=None if windows.context is None else pick(windows.context),
        privileged=None if windows.privileged is None else pick(windows.privileged),
        state=tuple(s[rows] for s in windows.state),
    )


class Learner:
    """Updates a model, and its error critic, from rollouts.

    Args:
        model: the actor-critic network.
        critic: the error critic, or None for plain truncated BPTT and for RTRL.
        algorithm: settings of A2C or PPO.
        critic_config: settings of the critics' optimiser and of the auxiliary task; its kind tells whether to learn by BP(lambda) or
            RTRL.
        num_envs: B.
        seed: of the stream that shuffles minibatches.
        interfaces: critics of the messages upwards in a multi-timescale core, or none.
        workers: the processes that learn together.

    Attributes:
        window_length: agent steps of a window.
        entropy_cost: as it is now, see `set_progress`.
        trace: of BP(lambda), after the last window learned from; None for other kinds.
        sensitivity: of RTRL, likewise.
        averages: [B, Z] of past inputs, where the critic is given them, after the last rollout learned from; None before.

    Raises:
        ValueError: if the traces of BP(lambda) would not fit, or a critic or core is not of the kind that was asked for.
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
        interfaces: Sequence[dni_rl.GradientCritic] = (),
        workers: Workers = ALONE,
    ):
        self.model, self.critic = model, critic
        self.interfaces = list(interfaces)
        self.algorithm, self.critic_config = algorithm, critic_config
        self.num_envs = num_envs
        self.workers = workers
        self.entropy_cost = algorithm.entropy_cost
        self.generator = torch.Generator().manual_seed(seed)
        self.auxiliary = None if critic is None else build_auxiliary(critic_config, model)
        if isinstance(model.core, dni_rl.LSTM) and critic is None:
            model.core.targets_per_window = 0  # nobody will ask for gradients inside its windows
        # The auxiliary head is a part of the model: one optimiser, one clipped norm. The actor has no use for it.
        self.learned = model if self.auxiliary is None else nn.ModuleList([model, self.auxiliary])
        self.optimizer = _adam(self.learned, algorithm)
        self.critics = nn.ModuleList([*([] if critic is None else [critic]), *self.interfaces])
        self.critic_optimizer = _adam(self.critics, critic_config) if len(self.critics) else None
        core = model.core
        self.levelled = core if isinstance(core, dni_rl.MultiTimescaleCore) else None
        self.window_length = algorithm.bptt_horizon * (1 if self.levelled is None else self.levelled.periods[-1])
        self.trace: Tensor | None = None
        self.sensitivity: dni_rl.Sensitivity | None = None
        self.averages: Tensor | None = None
        self.num_updates = 0
        if critic_config.kind == "bp_lambda":
            self.trace = _initial_trace(critic, num_envs)
        elif critic_config.kind == "rtrl":
            if not isinstance(core, dni_rl.ElementwiseLSTM):
                raise ValueError(f"model: expected an ElementwiseLSTM core for RTRL, got {type(core).__name__}")
            self.sensitivity = core.initial_sensitivity(num_envs)
        workers.synchronize(self.learned, self.critics)

    def set_progress(self, fraction: float) -> None:
        """Anneals linearly what is to be annealed: learning rates of both sides, entropy cost; `fraction` of the run is done."""
        fallen = fraction * (1.0 - self.algorithm.final_entropy_share) if self.algorithm.anneal_entropy else 0.0
        self.entropy_cost = self.algorithm.entropy_cost * (1.0 - fallen)
        remaining = 1.0
        if self.algorithm.anneal_learning_rate:
            remaining = min(1.0, (1.0 - fraction) / (1.0 - self.algorithm.learning_rate_hold))
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
        rollout, self.averages = with_inputs(rollout, self.model, self.critic_config, self.averages)
        windows = make_windows(rollout, self.window_length, algorithm.discount, algorithm.gae_lambda)
        collected: dict[str, list[Tensor]] = {}
        is_due = self.num_updates % self.critic_config.fit_interval == 0
        self.num_updates += 1
        for epoch, minibatch in self._minibatches(windows):
            metrics = self._update_minibatch(minibatch, is_due and epoch < self.critic_config.epochs)
            for name, value in metrics.items():
                collected.setdefault(name, []).append(value)
            # The one decision that needs the host: read only if it was asked for.
            target_kl = algorithm.target_kl if algorithm.name == "ppo" else None
            if target_kl is not None:
                divergence = self.workers.mean(metrics["losses/approx_kl"], minibatch.valid)
                if divergence.item() > target_kl:
                    break
        return {name: _mean(name, values) for name, values in collected.items()}

    def _minibatches(self, windows: Windows) -> Iterator[tuple[int, Windows]]:
        """Each with the number of its epoch, from 0."""
        algorithm = self.algorithm
        if algorithm.name == "a2c":
            yield 0, windows
            return
        size = self.num_envs // algorithm.minibatches
        for epoch in range(algorithm.epochs):
            if algorithm.minibatches == 1:
                yield epoch, windows
                continue
            order = torch.randperm(self.num_envs, generator=self.generator).to(windows.action.device, non_blocking=True)
            for environments in order.split(size):
                yield epoch, select_sequences(windows, environments, self.num_envs)

    def _update_minibatch(self, batch: Windows, fit: bool) -> dict[str, Tensor]:
        if self.algorithm.normalize_advantages:
            advantage = normalized_advantages(batch.advantage, batch.valid, self.workers.total)
            batch = replace(batch, advantage=advantage)

        self.optimizer.zero_grad(set_to_none=True)
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)
        if self.trace is None and self.sensitivity is None:
            metrics = self._backward(batch, fit=fit)
        else:
            parts = list(windows_in_order(batch, self.num_envs))
            metrics = _means([self._backward(part, weight=1.0 / batch.action.numel()) for part in parts])
            _divide_gradients(self.critics, len(parts))
        self.workers.average_gradients(self.learned, *([self.critics] if fit else []))
        metrics["losses/gradient_norm"] = _clip(self.learned, self.algorithm.max_grad_norm)
        self.optimizer.step()
        if self.critic_optimizer is not None and fit:
            metrics["sg/gradient_norm"] = _clip(self.critics, self.critic_config.max_grad_norm)
            self.critic_optimizer.step()
        return metrics

    def _backward(self, batch: Windows, *, weight: float | None = None, fit: bool = True) -> dict[str, Tensor]:
        """Fills `.grad` on both sides from windows that are unrolled side by side.

        Args:
            batch: windows; in one by one learning, those of all environments at the same time.
            weight: of each loss in the model's gradient; None for the mean over this batch.
            fit: whether the critics learn, too.
        """
        model, critic, alive = self.model, self.critic, batch.alive
        state = dni_rl.cut(batch.state)
        inputs = model.core_inputs(batch.observation, batch.action_tm1, batch.reward, batch.first)
        context = batch.context if critic is not None and critic.context_size else None
        with self._recording(fit):
            outputs, next_state, bootstraps = self._unroll(batch, inputs, state, context)
        loss = self.losses(*model.heads(outputs, batch.privileged), batch)
        total, metrics = loss.total, loss.metrics
        if bootstraps is not None:
            total = total + bootstraps
        if self.auxiliary is not None and critic is not None:
            assert isinstance(next_state, UnrolledState)
            num_windows = self.algorithm.rollout_length // self.window_length
            targets, valid = dni_rl.later_synthetic_gradients(critic, next_state, num_windows, alive, context)
            auxiliary_loss = self.auxiliary(outputs, targets, valid)
            total = total + auxiliary_loss
            metrics["losses/auxiliary_loss"] = auxiliary_loss.detach().sum() / valid.sum().clamp_min(1)
        if self.trace is not None:
            assert isinstance(critic, dni_rl.GradientCritic)
            report, self.trace = dni_rl.bp_lambda_backward(
                total,
                start=state,
                end=next_state,
                critic=critic,
                trace=self.trace,
                lambda_=self.critic_config.trace_lambda,
                alive=alive,
                weight=weight,
                jacobian=dni_rl.state_jacobian(model.core, inputs, state, batch.first),
            )
        else:
            report = dni_rl.backward(
                total,
                start=state,
                end=next_state,
                critic=critic,
                alive=alive,
                context=context,
                weight=weight,
                fit=fit,
            )
        if self.sensitivity is not None:
            assert isinstance(model.core, dni_rl.ElementwiseLSTM)
            self.sensitivity = model.core.advance(self.sensitivity, inputs, next_state)
        if critic is not None:
            metrics["sg/synthetic_norm"] = report.synthetic_norm
        if critic is not None and fit:
            metrics |= {
                "sg/loss": report.critic_loss,
                "sg/error": report.error,
                "sg/target_variance": report.target_variance,
                "sg/cosine": report.cosine,
                "sg/predicted_norm": report.predicted_norm,
                "sg/target_norm": report.target_norm,
            }
        if self.interfaces and fit:
            assert isinstance(next_state, LevelledState)
            for level, found in enumerate(dni_rl.fit_interfaces(next_state, self.interfaces, weight=weight), 1):
                metrics[f"sg/interface_{level}/loss"] = found.loss.detach()
                metrics[f"sg/interface_{level}/error"] = found.error
                metrics[f"sg/interface_{level}/target_variance"] = found.target_variance
                metrics[f"sg/interface_{level}/cosine"] = found.cosine
        return metrics

    def losses(self, logits: Tensor, values: Tensor, windows: Windows) -> ActorCriticLoss:
        """What is minimised, [K, N], of logits [K, N, A] and values [K, N]; advantages are taken as the windows have them."""
        return actor_critic_loss(
            logits,
            values,
            windows.action,
            windows.advantage,
            windows.value_target,
            windows.valid,
            entropy_cost=self.entropy_cost,
            baseline_cost=self.algorithm.baseline_cost,
            behaviour_log_probs=windows.behaviour_log_prob if self.algorithm.name == "ppo" else None,
            clip_ratio=self.algorithm.clip_ratio,
        )

    @contextmanager
    def _recording(self, fit: bool) -> Iterator[None]:
        """Meanwhile the core records no more of its windows than the critic will ask for, which is faster."""
        core, critic = self.model.core, self.critic
        if not isinstance(core, dni_rl.LSTM) or critic is None or self.auxiliary is not None:
            yield
            return
        core.targets_per_window = critic.targets_per_window if fit and critic.dense_targets else 0
        try:
            yield
        finally:
            core.targets_per_window = None

    def _unroll(
        self, batch: Windows, inputs: Tensor, state: State, context: Tensor | None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Outputs [K, N, H], the state after the windows, and what inner cuts add to the losses, [K, N] or None."""
        core = self.model.core
        if self.levelled is not None:
            return self.levelled.unroll_in_ticks(
                inputs,
                state,
                batch.first,
                ticks=self.algorithm.bptt_horizon,
                critic=self.critic,
                context=context,
                alive=batch.valid,
                interface_critics=self.interfaces or None,
            )
        if self.sensitivity is not None:
            assert isinstance(core, dni_rl.ElementwiseLSTM)
            state = core.attach(state, self.sensitivity)
        return *core.unroll(inputs, state, batch.first), None

    def state_dict(self) -> dict[str, object]:
        """Model, critic, optimisers and the minibatch stream; where there are any, the state of other parts."""
        extras: dict[str, object] = {} if self.auxiliary is None else {"auxiliary": self.auxiliary.state_dict()}
        if self.interfaces:
            extras["interfaces"] = [critic.state_dict() for critic in self.interfaces]
        if self.trace is not None:
            extras["trace"] = self.trace
        if self.sensitivity is not None:
            extras["sensitivity"] = {"h": self.sensitivity.h, "c": self.sensitivity.c}
        if self.averages is not None:
            extras["averages"] = self.averages
        return extras | {
            "model": self.model.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic_optimizer": None if self.critic_optimizer is None else self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "num_updates": self.num_updates,
            "entropy_cost": self.entropy_cost,
        }

    def own_state_dict(self) -> dict[str, object]:
        """The part of `state_dict` that other processes do not have."""
        own = ("generator", "trace", "sensitivity", "averages")
        return {name: value for name, value in self.state_dict().items() if name in own}

    def load_state_dict(self, state: dict) -> None:
        """Restores `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        for critic, saved in zip(self.interfaces, state.get("interfaces", ()), strict=True):
            critic.load_state_dict(saved)
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if self.trace is not None:
            self.trace = state["trace"].to(self.trace.device)
        if self.sensitivity is not None:
            device = self.sensitivity.h.device
            self.sensitivity = dni_rl.Sensitivity(**{name: s.to(device) for name, s in state["sensitivity"].items()})
        averages = state.get("averages")
        self.averages = None if averages is None else averages.to(next(self.model.parameters()).device)
        self.generator.set_state(state["generator"].cpu())
        self.num_updates = state["num_updates"]
        self.entropy_cost = state.get("entropy_cost", self.entropy_cost)  # older checkpoints have none


def _initial_trace(critic: dni_rl.ErrorCritic | None, num_envs: int) -> Tensor:
    if not isinstance(critic, dni_rl.GradientCritic):
        raise ValueError(f"critic: expected a GradientCritic for BP(lambda), got {type(critic).__name__}")
    try:
        return dni_rl.bp_lambda_trace(critic, num_envs)
    except ValueError as error:
        raise ValueError(
            f"critic.kind: found 'bp_lambda'; {error}; in a configuration, lower env.num_envs or model.hidden_size"
        ) from error


def _means(metrics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _mean(name, [each[name] for each in metrics]) for name in metrics[0]}


def _mean(name: str, values: Sequence[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.stack(list(values)).nanmean() if name.endswith(COSINE) else torch.stack(list(values)).mean()


def _divide_gradients(module: nn.Module, divisor: int) -> None:
    """Makes the mean over windows of a critic's gradient out of the sum."""
    for p in module.parameters():
        if p.grad is not None:
            p.grad /= divisor


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
    if max_norm is None:
        return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return nn.utils.clip_grad_norm_(module.parameters(), max_norm)
