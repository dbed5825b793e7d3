"""A recurrent net that learns from one short window of endless sequences after the other: what copy and ptb have in common.

The state is carried from window to window and never cleared. An arm says what stands in for the losses beyond the window:

    none             nothing: truncated BPTT, the baseline
    dni              an error critic
    dni_recent       an error critic that also reads the last inputs, nothing privileged
    dni_aux          an error critic, and the core predicts the synthetic gradients of the next window (needs to see that window)
    sobolev          a critic that predicts the future loss, trained on its values and gradients
    bp_lambda        a linear critic that learns by eligibility traces; each window is one step of theirs. For small cores
    timescales       as none, with a core of two levels: the slow one is cut after as many of its own, longer steps
    timescales_dni   the same with an error critic at every cut
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dni_rl
from dni_rl.cores.base import StateHistory, UnrolledState
from dni_rl.experiments.common import check_allowed, check_at_least, check_critic

ARMS = ("none", "dni", "dni_recent", "dni_aux", "sobolev", "bp_lambda", "timescales", "timescales_dni")
BITS_PER_NAT = 1.0 / math.log(2.0)


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How a recurrent net learns, whatever the task. Programs add to it."""

    arm: str = "dni"
    window: int = 5  # T, steps; of each level's own steps in a core of two
    hidden_size: int = 256  # LSTM units; halved between the two levels of a core that has them
    period: int = 4  # steps between two ticks of the slow level
    chrono_max: float | None = None  # steps; chrono initialisation, which the paper did not know
    batch_size: int = 256  # sequences side by side
    learning_rate: float = 7e-5  # Adam
    critic_learning_rate: float = 7e-5  # Adam
    critic_hidden_sizes: tuple[int, ...] = (256,)  # the paper: one layer as wide as the LSTM
    critic_scale: float = 0.1  # the paper's; where it is applied, so that it discounts per cut as well
    gradient_discount: float = 1.0  # per cut
    max_norm_ratio: float | None = None  # bound of the synthetic gradient, in norms of the true one
    # The critic learns, but is not believed; without, the auxiliary task starts with a burst. Not of bp_lambda
    warmup_updates: int = 100
    recent_steps: int = 12  # of dni_recent: how many inputs
    auxiliary_cost: float = 0.02  # a guess: the paper gives none
    lambda_: float = 0.9  # of bp_lambda, per window
    num_steps: int = 1_000_000  # of each sequence
    log_every_steps: int = 1_000
    checkpoint_every_steps: int = 10_000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        check_allowed(self, arm=ARMS)
        counts = ("window", "hidden_size", "batch_size", "num_steps", "log_every_steps", "checkpoint_every_steps")
        check_at_least(self, 1, *counts, "recent_steps")
        check_at_least(self, 2, "period")
        check_critic(self)
        for name in ("learning_rate", "critic_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, allowed above 0")
        if not 0.0 <= self.lambda_ <= 1.0:
            raise ValueError(f"lambda: found {self.lambda_}, allowed 0 to 1")
        if self.arm == "bp_lambda" and (self.critic_hidden_sizes or self.max_norm_ratio is not None):
            raise ValueError(
                "arm: bp_lambda has a linear critic without bound; use --critic-hidden-sizes --max-norm-ratio none"
            )

    @property
    def steps_per_update(self) -> int:
        """Steps that an update takes: a window, or the window of the slowest level."""
        return self.window * (self.period if self.arm.startswith("timescales") else 1)


class Learner:
    """A recurrent net with its critic, auxiliary task and optimisers, and the state in which the sequences stand.

    Args:
        config: of the run. Parameters depend on its seed alone, and those of the net not on the arm, cores of two levels apart.
        make_encoder: makes the module that maps inputs [T, B, ...] to [T, B, input_size]; called once the seed is set.
        input_size: of the core.
        num_classes: outputs of the linear readout.
    """

    trace: Tensor | None = None
    recent: Tensor | None = None  # [B, Z], what dni_recent's critic reads beside the state

    def __init__(self, config: WindowConfig, make_encoder: Callable[[], nn.Module], input_size: int, num_classes: int):
        torch.manual_seed(config.seed)
        self.config = config
        core: dni_rl.Core
        if config.arm.startswith("timescales"):
            width = max(config.hidden_size // 2, 1)
            periods = (1, config.period)
            core = dni_rl.MultiTimescaleCore(input_size, (width, width), periods, chrono_max=config.chrono_max)
        else:
            core = dni_rl.LSTM(input_size, config.hidden_size, chrono_max=config.chrono_max)
        readout = nn.Linear(core.output_size, num_classes)
        self.net = nn.ModuleDict({"encoder": make_encoder(), "core": core, "readout": readout})
        self.core = core
        self.critic = self._make_critic(input_size)
        self.auxiliary = None
        if config.arm == "dni_aux":
            self.auxiliary = dni_rl.AuxiliaryTask(
                output_size=core.output_size, state_sizes=core.state_sizes, cost=config.auxiliary_cost
            )
            self.net["auxiliary"] = self.auxiliary
        self.net.to(config.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), config.learning_rate)
        self.critic_optimizer = None
        if self.critic is not None:
            self.critic.to(config.device)
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_learning_rate)
        self.state = core.initial_state(config.batch_size)
        if config.arm == "bp_lambda":
            assert isinstance(self.critic, dni_rl.GradientCritic)
            self.trace = dni_rl.bp_lambda_trace(self.critic, config.batch_size)

    def _make_critic(self, input_size: int) -> dni_rl.ErrorCritic | None:
        config, sizes = self.config, self.core.state_sizes
        use: dict[str, Any] = {"scale": config.critic_scale, "gradient_discount": config.gradient_discount}
        if config.arm in ("none", "timescales"):
            return None
        if config.arm == "bp_lambda":
            return dni_rl.GradientCritic(state_sizes=sizes, normalize_targets=False, **use)
        if config.arm == "dni_recent":
            use["context_size"] = config.recent_steps * (input_size + 1)
        kind = dni_rl.SobolevCritic if config.arm == "sobolev" else dni_rl.GradientCritic
        return kind(
            state_sizes=sizes,
            hidden_sizes=config.critic_hidden_sizes,
            max_norm_ratio=config.max_norm_ratio,
            warmup_updates=config.warmup_updates,
            **use,
        )

    def logits(self, outputs: Tensor) -> Tensor:
        """[T, B, H] outputs of the core to [T, B, classes]."""
        return self.net["readout"](outputs)

    def update(
        self, inputs: Tensor, loss: Callable[[Tensor], Tensor], upcoming: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Learns from one window, and carries the state to its end.

        Args:
            inputs: [T, B, ...], T = config.steps_per_update.
            loss: logits [T, B, classes] to losses [T, B] in nats.
            upcoming: inputs of the window after; needed by dni_aux alone.

        Returns:
            Metrics, still on the device.
        """
        config, encoded = self.config, self.net["encoder"](inputs)
        start = dni_rl.cut(self.state)
        extra: Tensor | None = None
        context: Tensor | None = None
        if config.arm == "dni_recent":
            context = dni_rl.recent_inputs(encoded, None, config.recent_steps, before=self.recent)
            self.recent = context[-1]
        if isinstance(self.core, dni_rl.MultiTimescaleCore):
            outputs, levelled_end, extra = self.core.unroll_in_ticks(
                encoded, start, ticks=config.window, critic=self.critic
            )
            end: dni_rl.State = levelled_end
        else:
            outputs, end = self.core.unroll(encoded, start)
        losses = loss(self.logits(outputs))
        metrics = {}
        if self.auxiliary is not None:
            if upcoming is None:
                raise ValueError("upcoming: dni_aux needs the inputs of the next window")
            extra = self.auxiliary(outputs, self._later_synthetic_gradients(end, upcoming))
            metrics["auxiliary/loss"] = extra.detach().mean()
        if extra is not None:
            losses = losses + extra
        self.optimizer.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        if self.trace is not None:
            assert isinstance(self.critic, dni_rl.GradientCritic)
            report, self.trace = dni_rl.bp_lambda_backward(
                losses, start=start, end=end, critic=self.critic, trace=self.trace, lambda_=config.lambda_
            )
        else:
            report = dni_rl.backward(losses, start=start, end=end, critic=self.critic, context=context)
        self.optimizer.step()
        if self.critic_optimizer is not None:
            self.critic_optimizer.step()
            metrics |= {f"critic/{name}": value for name, value in report.as_dict().items()}
        self.state = tuple(s.detach() for s in end)
        return metrics

    def _later_synthetic_gradients(self, end: dni_rl.State, upcoming: Tensor) -> dni_rl.State:
        """Targets of the auxiliary task, tuple of [T, B, size]; the net as it stands runs ahead through the next window."""
        assert self.critic is not None and isinstance(end, UnrolledState)
        with torch.no_grad():
            _, later = self.core.unroll(self.net["encoder"](upcoming), tuple(s.detach() for s in end))
        assert isinstance(later, UnrolledState)
        pair = [(end.history.states, later.history.states), (end, later)]
        states, ends = (tuple(torch.cat([a.detach(), b], dim=-2) for a, b in zip(*both, strict=True)) for both in pair)
        both = UnrolledState.of(ends, StateHistory(states, torch.cat([end.history.valid, later.history.valid], dim=1)))
        targets, _ = dni_rl.later_synthetic_gradients(self.critic, both, num_windows=2)
        return tuple(g[:, : self.config.batch_size] for g in targets)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had never stopped."""
        return {
            "net": self.net.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "critic_optimizer": None if self.critic_optimizer is None else self.critic_optimizer.state_dict(),
            "state": self.state,
            "trace": self.trace,
            "recent": self.recent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.state, self.trace = tuple(state["state"]), state["trace"]
        self.recent = state.get("recent")  # older checkpoints have none
