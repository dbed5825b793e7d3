"""Predicted and true gradients by lag: the toy tasks of Pemberton & Costa, "BP(lambda): Online learning via synthetic gradients" (2024).

python -m dni_rl.experiments.alignment --preset laptop --run-folder runs/alignment
python -m dni_rl.experiments.alignment --preset laptop --tasks fixed --num-points 8 --run-folder runs/alignment-8
python -m dni_rl.experiments.alignment --preset paper --tasks learned --target every --run-folder runs/alignment-line

A linear recurrent net sees its input at the first step alone, and is told a point on the unit circle at the last:

    h_t = A h_{t-1} + B x_t + b,    h_0 = 0,    y = C h_T + c,    l = 1/2 |y - target|^2
    true gradient at lag k:    d l / d h_{T-k} = (y - target) C A^k

so that a linear critic M(h) can be compared with the truth at every lag, the number of steps to the end. Two tasks:

    fixed      the net never learns, the critic alone does. How well do predicted and true gradients align, at each lag, after so
               many updates, and when learning has come to rest? The critic at rest has a closed form, `critic_at_rest`
    learned    the net learns as well, from what is predicted; inputs are noisy

and arms, in cells "arm@window":

    dni          the critic learns at every cut from a window of truncated BPTT, bootstrapped with itself (Jaderberg et al. 2017). With
                 a window n > 1 that is at the lags T - n, T - 2n, .. alone; at the others nothing has taught it what it says
    bp_LAMBDA    BP(lambda), for example bp_0.9: the critic learns by eligibility traces; at window 1 without any BPTT
    none         truncated BPTT without a critic, and with a window as long as the sequence full BPTT; in task learned

In every arm the critic is updated once for each batch of sequences, so that arms differ in their targets and not in the number of updates.
dni@1 and bp_0@1 are the same method in two implementations. summary.json, table.md and the figures (PNG) are those of the whole; folders,
cells and `--resume` are as in `dni_rl.experiments.copy`.

The code that belongs to the paper (https://github.com/neuralml/bp_lambda, as its settings were left) gives: 30 linear units, weights
uniform within 30^-1/2; 10 steps; inputs of 10 random bits; targets at the last step or at every step along a line from the origin;
batches of 10; a linear critic that starts at zero, and Adam, one update a batch. Fixed net: one point, no noise, learning rate 1e-4,
1,000 batches. Learned net: three points, noise 0.1, learning rates 1e-3, 10,000 batches, gradients clipped at norm 1. No source at hand
gives the paper's results in numbers, nor says which settings belong to which of its figures. The cells, the values of lambda, and all in
the preset "laptop" that differs are choices of ours; so is that the critic's own gradient is not clipped.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_rl
from dni_rl.experiments import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = ("fixed", "learned")
TARGETS = ("last", "every")
OUTPUT_SIZE = 2  # a point of the plane
ALIGNED, REACHED = 0.9, 0.5  # cosines: for the updates it took, and for the lag that is reached, as in `dni_rl.horizon`
_BP = "bp_"


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """One run."""

    task: str = "fixed"
    arm: str = "bp_1"
    window: int = 1  # steps
    target: str = "last"  # the last step, or every step along a line from the origin
    sequence_length: int = 10  # T, steps
    hidden_size: int = 30
    input_size: int = 10  # bits
    num_points: int = 1  # inputs, each with a point on the circle
    input_noise: float = 0.0  # standard deviation, at every step
    spectral_radius: float | None = None  # of A; None for what is drawn, near 0.58
    batch_size: int = 10  # sequences
    learning_rate: float = 1e-3  # Adam; of a net that learns
    max_gradient_norm: float | None = 1.0  # of that net's gradient
    critic_learning_rate: float = 1e-4  # Adam
    num_steps: int = 1_000  # batches, one update each
    log_every_steps: int = 10
    eval_every_steps: int = 10
    checkpoint_every_steps: int = 1_000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, task=TASKS, target=TARGETS)
        common.check_at_least(self, 1, "window", "hidden_size", "input_size", "num_points", "batch_size", "num_steps")
        common.check_at_least(self, 1, "log_every_steps", "eval_every_steps", "checkpoint_every_steps")
        common.check_at_least(self, 2, "sequence_length")
        for name in ("learning_rate", "critic_learning_rate", "max_gradient_norm", "spectral_radius"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name}: found {value}, allowed above 0")
        if not self.input_noise >= 0.0:
            raise ValueError(f"input_noise: found {self.input_noise}, allowed 0 or more")
        if self.input_size > 20 or self.num_points >= 2**self.input_size:
            raise ValueError(
                f"num_points, input_size: found {self.num_points} of {self.input_size} bits, allowed fewer points than patterns, and at "
                "most 20 bits"
            )
        if self.arm == "none" and self.task == "fixed":
            raise ValueError(
                "arm: none has no critic to be compared with, and a fixed net nothing to learn; use --tasks learned"
            )
        longest = self.sequence_length - (self.arm != "none")
        if self.window > longest:
            raise ValueError(
                f"window: found {self.window}, allowed 1 to {longest}; a critic needs a cut before the last step"
            )
        _ = self.lambda_

    @property
    def lambda_(self) -> float | None:
        """Lambda of an arm of BP(lambda), None of the others; ValueError if the arm is unknown."""
        if self.arm in ("none", "dni"):
            return None
        try:
            lambda_ = float(self.arm.removeprefix(_BP)) if self.arm.startswith(_BP) else -1.0
        except ValueError:
            lambda_ = -1.0
        if not 0.0 <= lambda_ <= 1.0:
            raise ValueError(f"arm: found {self.arm!r}, allowed none, dni, or bp_LAMBDA with 0 to 1, such as bp_0.9")
        return lambda_


_CRITICS = (*common.grid(("dni",), (1, 2, 5)), *common.grid(("bp_0", "bp_0.5", "bp_0.9", "bp_1"), (1,)))
_LEARNED: dict[str, Any] = {"task": "learned", "num_points": 3, "input_noise": 0.1, "critic_learning_rate": 1e-3}
# By preset: seeds, jobs, and for each task its cells and settings.
PRESETS: dict[str, dict[str, Any]] = {
    # seconds: shows that every arm runs, and the effect in the small
    "smoke": {
        "seeds": (0,),
        "fixed": {
            "cells": ("dni@1", "dni@3", "bp_0@1", "bp_1@1"),
            "sequence_length": 6,
            "hidden_size": 6,
            "batch_size": 1,
            "spectral_radius": 0.9,
            "critic_learning_rate": 1e-2,
            "num_steps": 30,
            "checkpoint_every_steps": 15,
        },
        "learned": {
            **_LEARNED,
            "cells": ("none@2", "none@6", "dni@2", "bp_1@1"),
            "sequence_length": 6,
            "hidden_size": 6,
            "learning_rate": 1e-2,
            "critic_learning_rate": 1e-2,
            "num_steps": 30,
            "checkpoint_every_steps": 15,
        },
    },
    # a few minutes on two cores
    "laptop": {
        "seeds": (0, 1, 2),
        "jobs": 2,
        "fixed": {
            "cells": _CRITICS,
            "hidden_size": 16,
            "spectral_radius": 0.9,
            "batch_size": 1,  # ten of one and the same sequence are one
            "critic_learning_rate": 1e-3,
            "num_steps": 300,
        },
        "learned": {
            **_LEARNED,
            "cells": ("none@1", "none@5", "none@10", "dni@1", "dni@5", "bp_1@1"),
            "input_noise": 0.0,
            "hidden_size": 16,
            "critic_learning_rate": 1e-2,  # ten times the net's: a critic at the pace of what it predicts aligns in no arm
            "num_steps": 400,
        },
    },
    "paper": {
        "seeds": (0, 1, 2),
        "fixed": {"cells": _CRITICS},
        "learned": {
            **_LEARNED,
            "cells": (*common.grid(("none",), (1, 2, 5, 10)), *_CRITICS),
            "num_steps": 10_000,
            "log_every_steps": 100,
            "eval_every_steps": 100,
        },
    },
}


# Net and data


class LinearCore(dni_rl.Core):
    """h_t = A h_{t-1} + B x_t + b; the state is (h,).

    Args:
        input_size: D.
        hidden_size: H.
        spectral_radius: A is scaled to it; None leaves A as drawn, uniform within H^-1/2.
    """

    def __init__(self, input_size: int, hidden_size: int, spectral_radius: float | None = None):
        super().__init__()
        self.input_size, self.output_size, self.state_sizes = input_size, hidden_size, (hidden_size,)
        bound = hidden_size**-0.5

        def uniform(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float64).uniform_(-bound, bound)

        recurrent = uniform(hidden_size, hidden_size)
        if spectral_radius is not None:
            recurrent *= spectral_radius / torch.linalg.eigvals(recurrent).abs().max()
        self.recurrent = nn.Parameter(recurrent)  # A
        self.weight = nn.Parameter(uniform(hidden_size, input_size))  # B
        self.bias = nn.Parameter(uniform(hidden_size) + uniform(hidden_size))  # two, as those of nn.RNN

    def forward(self, x: Tensor, state: dni_rl.State) -> tuple[Tensor, dni_rl.State]:
        """Takes one step: x [B, D], state ([B, H],) to the output [B, H] and the next state, which are the same."""
        h = F.linear(state[0], self.recurrent) + F.linear(x, self.weight, self.bias)
        return h, (h,)


@dataclass(frozen=True)
class Points:
    """Inputs and what they stand for; float64.

    Attributes:
        bits: [P, D], 0 or 1, no two alike and none all zero.
        targets: [T, P, 2].
        told: [T], 1 where a step has a loss, otherwise 0.
    """

    bits: Tensor
    targets: Tensor
    told: Tensor

    @classmethod
    def of(cls, config: AlignmentConfig) -> "Points":
        """Those of a run; the inputs depend on its seed alone."""
        T, D, P = config.sequence_length, config.input_size, config.num_points
        use: dict[str, Any] = {"dtype": torch.float64, "device": config.device}
        patterns = 1 + torch.randperm(2**D - 1, generator=torch.Generator().manual_seed(config.seed))[:P]
        bits = (patterns.unsqueeze(1) >> torch.arange(D)) & 1
        angle = 2.0 * torch.pi * torch.arange(P, **use) / P
        along = torch.linspace(0.0, 1.0, T, **use)  # from the origin to the circle
        told = torch.ones(T, **use)
        if config.target == "last":
            told[:-1] = 0.0
        circle = torch.stack([angle.sin(), angle.cos()], dim=-1)
        return cls(bits.to(**use), along.view(T, 1, 1) * circle, told)

    def sequences(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [T, B, D], seen at the first step alone, and targets [T, B, 2] of the points `index` [B]."""
        inputs = self.bits.new_zeros(len(self.targets), len(index), self.bits.shape[1])
        inputs[0] = self.bits[index]
        return inputs, self.targets[:, index]


def true_gradients(core: LinearCore, readout: nn.Linear, states: Tensor, targets: Tensor, told: Tensor) -> Tensor:
    """The gradient of all later losses at every state but the last.

        G_T = 0,    G_t = (r_{t+1} + G_{t+1}) A,    r_t = told_t (C h_t + c - target_t) C

    With one loss, at the last step, G_{T-k} = (C h_T + c - target) C A^k.

    Args:
        core: of the net.
        readout: of the net, (C, c).
        states: [T, P, H], h_1 .. h_T.
        targets: [T, P, 2].
        told: [T].

    Returns:
        [T - 1, P, H], G_1 .. G_{T-1}, without gradient.
    """
    with torch.no_grad():
        local = told.view(-1, 1, 1) * (readout(states) - targets) @ readout.weight
        gradient, gradients = torch.zeros_like(states[0]), []
        for r in local[1:].flip(0):  # t + 1 = T, ..., 2
            gradient = (r + gradient) @ core.recurrent
            gradients.append(gradient)
    return torch.stack(gradients[::-1])


def critic_at_rest(states: Tensor, local: Tensor, jacobian: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """The linear critic at which learning comes to rest, in closed form.

    With cuts k = 1 .. K, from each to the next the Jacobian J and the local gradient R_k of the losses between them:

        sum_k (M(s_k) - G_k) [s_k, 1]^T = 0,    G_k = R_k + ((1 - lambda) M(s_{k+1}) + lambda G_{k+1}) J,    M(s_{K+1}) = G_{K+1} = 0

    the fixed point of the forward view of BP(lambda), which is what its updates sum to, and with lambda = 0 that of n-step
    bootstrapping. lambda = 1 is the least-squares fit of the true gradients; below, bootstrapping adds a bias unless a linear critic can
    be exact, as it can where states and 1 are linearly independent: then every lambda has the true gradients for its fixed point.
    Tsitsiklis & Van Roy, "An analysis of temporal-difference learning with function approximation" (1997), for values.

    Solved for the predictions Y = U Z with U an orthonormal basis of what a linear critic can say about these states, where the
    condition becomes Z = U^T G(Z): states that differ little do not spoil it.

    Args:
        states: [K, P, H] of P sequences at the cuts.
        local: [K, P, H] R_k.
        jacobian: [H, H] J.
        lambda_: in [0, 1].

    Returns:
        Weight [H, H] and bias [H], the least of those at rest, which is the one that gradient steps from zero lead to.
    """
    K, P, H = states.shape
    features = torch.cat([states, states.new_ones(K, P, 1)], dim=-1).flatten(0, 1)  # [K * P, H + 1]
    U, S, Vh = torch.linalg.svd(features, full_matrices=False)
    smallest = S[0] * max(features.shape) * torch.finfo(S.dtype).eps
    rank = int((smallest < S).sum())
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    constant, at = torch.zeros_like(local), local.new_zeros(P, H)  # what of G does not depend on the critic
    for k in reversed(range(K)):
        at = local[k] + lambda_ * at @ jacobian
        constant[k] = at
    # vec(X Z Y) = (Y^T kron X) vec(Z), columns on top of each other
    by_cut, power = U.view(K, P, rank), torch.eye(H, dtype=U.dtype, device=U.device)
    system = torch.eye(H * rank, dtype=U.dtype, device=U.device)
    for m in range(1, K):
        power = power @ jacobian
        overlap = torch.einsum("kpi,kpj->ij", by_cut[:-m], by_cut[m:])
        system -= (1.0 - lambda_) * lambda_ ** (m - 1) * torch.kron(power.T.contiguous(), overlap)
    Z = torch.linalg.solve(system, (U.T @ constant.flatten(0, 1)).T.flatten()).view(H, rank).T
    theta = Vh.T @ (Z / S.unsqueeze(1))  # [H + 1, H]
    return theta[:-1].T, theta[-1]


def cosines(predicted: Tensor, true: Tensor) -> list[float]:
    """By lag 1, 2, ..: the mean cosine over sequences of [T - 1, P, H] gradients; 0 where nothing is predicted."""
    tiny = torch.finfo(true.dtype).tiny
    cosine = (predicted * true).sum(-1) / (predicted.norm(dim=-1) * true.norm(dim=-1)).clamp_min(tiny)
    return cosine.mean(-1).flip(0).tolist()


# Run


class Experiment(common.Experiment):
    """The net of a run with its critic, what it reads, and how far it has come. float64: far from the end gradients are small."""

    config: AlignmentConfig

    def __init__(self, config: AlignmentConfig):
        super().__init__(config)
        self.points = Points.of(config)
        torch.manual_seed(config.seed)  # the net depends on it alone, not on the arm
        self.core = LinearCore(config.input_size, config.hidden_size, config.spectral_radius)
        self.readout = nn.Linear(config.hidden_size, OUTPUT_SIZE, dtype=torch.float64)
        self.net = nn.ModuleDict({"core": self.core, "readout": self.readout}).to(config.device)
        self.optimizer: torch.optim.Optimizer | None = None
        if config.task == "learned":
            self.optimizer = torch.optim.Adam(self.net.parameters(), config.learning_rate)
        else:
            self.net.requires_grad_(False)
        self.critic: dni_rl.GradientCritic | None = None
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if config.arm != "none":
            # as in both papers: linear, targets as they are, and those of a window at its start alone
            self.critic = dni_rl.GradientCritic(
                state_sizes=self.core.state_sizes, normalize_targets=False, dense_targets=False
            ).to(config.device, torch.float64)
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_learning_rate)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs [T, B, D] and targets [T, B, 2] of the next update; they depend on the seed and the step alone."""
        config = self.config
        generator = torch.Generator().manual_seed(1_000_003 * (config.seed + 1) + self.step)
        index = torch.randint(config.num_points, (config.batch_size,), generator=generator)
        inputs, targets = self.points.sequences(index.to(config.device))
        if config.input_noise:
            noise = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
            inputs = inputs + config.input_noise * noise.to(config.device)
        return inputs, targets

    def losses(self, outputs: Tensor, targets: Tensor, told: Tensor) -> Tensor:
        """[T, B] losses of outputs [T, B, H]: half the squared distance to targets [T, B, 2] where told [T] is 1."""
        return 0.5 * (self.readout(outputs) - targets).square().sum(-1) * told.unsqueeze(-1)

    def update(self) -> dict[str, Tensor]:
        """Learns from the next batch of sequences, window by window; returns metrics, still on the device."""
        config = self.config
        inputs, targets = self.batch()
        T, B = inputs.shape[:2]
        first = torch.zeros(T, B, dtype=torch.bool, device=inputs.device)
        first[0] = True
        state: dni_rl.State = self.core.initial_state(B)
        trace = None
        if config.lambda_ is not None:
            assert self.critic is not None
            trace = dni_rl.bp_lambda_trace(self.critic, B)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        reports, loss = [], inputs.new_zeros(())
        for begin in range(0, T, config.window):
            window = slice(begin, begin + config.window)
            start = dni_rl.cut(state)
            outputs, end = self.core.unroll(inputs[window], start, first[window])
            state = tuple(s.detach() for s in end)
            losses = self.losses(outputs, targets[window], self.points.told[window])
            loss = loss + losses.detach().sum(0).mean()
            ends = window.stop >= T
            # the mean over sequences of a sum over steps, in every window; nothing lies beyond the last one
            given: dict[str, Any] = {"start": start, "end": end, "weight": 1.0 / B, "critic": self.critic}
            given["alive"] = losses.new_zeros(B) if ends else None
            if trace is not None:
                assert config.lambda_ is not None
                report, trace = dni_rl.bp_lambda_backward(
                    losses, trace=trace, lambda_=config.lambda_, first=first[window], **given
                )
            else:
                # the state before the first step is no cut: nothing is to be predicted there
                report = dni_rl.backward(losses, fit=begin > 0, **given)
            if begin > 0:
                reports.append(report)
        if self.optimizer is not None and config.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), config.max_gradient_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        metrics = {"train/loss": loss}
        if self.critic is not None:
            metrics |= {f"critic/{name}": value for name, value in dni_rl.Report.mean_of(reports).as_dict().items()}
        self.step += 1
        return metrics

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the net and the critic, those that there are."""
        return [one for one in (self.optimizer, self.critic_optimizer) if one is not None]

    @torch.no_grad()
    def visited(self) -> tuple[Tensor, Tensor]:
        """States [T, P, H] of every point without noise, h_1 .. h_T, and targets [T, P, 2]."""
        inputs, targets = self.points.sequences(torch.arange(self.config.num_points, device=self.config.device))
        states, _ = self.core.unroll(inputs, self.core.initial_state(self.config.num_points))
        return states, targets

    def evaluate(self) -> dict[str, Any]:
        """The loss without noise, by lag the cosine of predicted with true gradients, and the relative error of all of them."""
        states, targets = self.visited()
        told = self.points.told
        with torch.no_grad():
            found: dict[str, Any] = {"loss": self.losses(states, targets, told).sum(0).mean().item()}
            if self.critic is not None:
                true = true_gradients(self.core, self.readout, states, targets, told)
                (predicted,) = self.critic((states[:-1],))
                found["cosines"] = cosines(predicted, true)
                found["mean_cosine"] = statistics.fmean(found["cosines"])
                found["misalignment"] = 1.0 - found["mean_cosine"]
                found["relative_error"] = ((predicted - true).norm() / true.norm()).item()
        return found

    def at_rest(self) -> tuple[Tensor, Tensor] | None:
        """`critic_at_rest` of this run's arm, window and points without noise; None without a critic, of a net that moves or overflows."""
        config = self.config
        if self.critic is None or config.task == "learned":
            return None
        states, targets = self.visited()
        T, n = config.sequence_length, config.window
        cuts = range(n - 1, T - 1, n)  # h_n, h_2n, ..
        local = []
        with torch.no_grad():
            for begin in cuts:
                inside = slice(begin, min(begin + n + 1, T))  # a cut, and the states up to the next
                told = self.points.told[inside]
                local.append(true_gradients(self.core, self.readout, states[inside], targets[inside], told)[0])
            jacobian = torch.linalg.matrix_power(self.core.recurrent, n)
        given = states[cuts], torch.stack(local), jacobian
        if not all(one.isfinite().all() for one in given):
            return None
        return critic_at_rest(*given, config.lambda_ or 0.0)

    def cosines_at_rest(self) -> list[float] | None:
        """By lag, those of `at_rest`."""
        rest = self.at_rest()
        if rest is None:
            return None
        states, targets = self.visited()
        true = true_gradients(self.core, self.readout, states, targets, self.points.told)
        return cosines(F.linear(states[:-1], *rest), true)

    def evaluation(self) -> dict[str, float]:
        """Evaluates, and appends to the curve."""
        found = self.evaluate()
        self.add_to_curve(**found)
        row = {f"test/{name}": value for name, value in found.items() if name != "cosines"}
        return row | {f"cosine/lag_{i}": value for i, value in enumerate(found.get("cosines", ()), start=1)}

    def note(self) -> str:
        """The last evaluation."""
        if not self.curve:
            return ""
        last = self.curve[-1]
        return f"cosine {last['mean_cosine']:.2f}" if "mean_cosine" in last else f"loss {last['loss']:.4f}"

    def result(self) -> dict[str, Any]:
        """The final loss and cosines, with their curve, and what the cosines come to at rest."""
        result: dict[str, Any] = {"loss": common.final(self.curve, "loss"), "cosines": None, "aligned_after": None}
        if self.critic is not None:
            late = [point["cosines"] for point in self.curve if point["step"] > 0.9 * self.step]
            result["cosines"] = _mean_by_lag(late)
            result["relative_error"] = self.curve[-1]["relative_error"]
            result["aligned_after"] = common.reached(self.curve, "misalignment", 1.0 - ALIGNED, "step")
        result["at_rest"] = self.cosines_at_rest()
        return result | self.account()

    def parts(self) -> dict[str, Any]:
        """Net, critic and optimisers."""
        optimizers = {"optimizer": self.optimizer, "critic_optimizer": self.critic_optimizer}
        return {"net": self.net, "critic": self.critic, **optimizers}


run = functools.partial(common.carry_out, Experiment)
"""One run, of an `AlignmentConfig`: see `common.carry_out`."""


# Summary


def _mean_by_lag(found: Sequence[Sequence[float | None] | None]) -> list[float | None] | None:
    """Over seeds; None where there is nothing, and at lags where a seed diverged."""
    known = [one for one in found if one is not None]
    return [common.mean(of_lag) for of_lag in zip(*known, strict=True)] if known else None


def reach(by_lag: Sequence[float | None]) -> int:
    """The lag up to which every cosine is above `REACHED`; 0 if that of lag 1 is not."""
    return next((lag for lag, cosine in enumerate(by_lag) if cosine is None or not cosine > REACHED), len(by_lag))


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """For each task the cells' cosines by lag, at the end and at rest, and what else `table` shows; seeds averaged."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(member.config.task for member in matrix):
        rows = []
        of_task = [member for member in matrix if member.config.task == task]
        for cell, by_seed in common.by_cell(of_task, results).items():
            found = list(by_seed.values())
            by_lag = _mean_by_lag([one["cosines"] for one in found])
            at_rest = _mean_by_lag([one["at_rest"] for one in found])
            per_seed = {str(s): None if r["cosines"] is None else common.mean(r["cosines"]) for s, r in by_seed.items()}
            curve = common.by_step([one["curve"] for one in found])
            rows.append(
                {
                    "arm": cell.arm,
                    "window": cell.window,
                    "cosines": by_lag,
                    "at_rest": at_rest,
                    "per_seed": per_seed,
                    "cosine": common.spread(list(per_seed.values())),
                    "reach": None if by_lag is None else reach(by_lag),
                    "aligned_after": common.mean(one["aligned_after"] for one in found),
                    "loss": common.spread([one["loss"] for one in found]),
                    "seconds": common.mean(one["seconds"] for one in found),
                    "curve": [
                        {
                            name: common.mean(p[name] for p in points)
                            for name in ("step", "loss", "mean_cosine")
                            if name in points[0]
                        }
                        for points in curve
                    ],
                }
            )
        config = of_task[0].config
        tasks[task] = {"lags": config.sequence_length - 1, "updates": config.num_steps, "cells": rows}
    return {"experiment": "alignment", "tasks": tasks}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown, a table for each task."""

    def two(value: float | None) -> str | None:
        return None if value is None else f"{value:.2f}"

    shown = []
    for task, found in summary["tasks"].items():
        lags = range(1, found["lags"] + 1)
        head = (
            "arm",
            "window",
            *(f"lag {lag}" for lag in lags),
            "mean",
            "std",
            "at rest",
            "reach",
            f"updates to {ALIGNED}",
        )
        rows = []
        for row in found["cells"]:
            rest = None if row["at_rest"] is None else common.mean(row["at_rest"])
            after = None if row["aligned_after"] is None else round(row["aligned_after"])
            rows.append(
                (
                    row["arm"],
                    row["window"],
                    *(map(two, row["cosines"]) if row["cosines"] else [None] * len(lags)),
                    two(row["cosine"]["mean"]),
                    two(row["cosine"]["std"]),
                    two(rest),
                    row["reach"],
                    after,
                    common.shown(row["loss"]["mean"], 4),
                    round(row["seconds"]),
                )
            )
        text = common.markdown((*head, "loss", "seconds"), rows)
        shown.append(
            f"Task {task}: cosine of predicted and true gradient by lag, after {found['updates']} updates.\n\n{text}"
        )
    note = (
        "Mean and std: of the mean over lags, over seeds. At rest: where that mean is heading, in closed form. Reach: lag up to which "
        f"every cosine is above {REACHED}. Updates to {ALIGNED}: of the mean over lags, a dash where a seed never came there. "
        f"Loss: {common.DIVERGED} where that of a seed is not finite. dni with a window above 1 is taught at its cuts alone."
    )
    return "\n\n".join((*shown, note))


# Figures


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes a figure for each task, as PNG, beside the summary."""
    for task, found in summary["tasks"].items():
        figure(task, found).savefig(folder / f"{task}.png")


def figure(task: str, found: Mapping[str, Any]) -> "Figure":
    """By lag, the cosine at the end and, dotted, at rest; against updates, the mean cosine, and the loss of a net that learns."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = 3 if task == "learned" else 2
    chart = Figure(figsize=(4.2 * panels, 3.4), dpi=110, layout="constrained")
    by_lag, by_update, *by_loss = chart.subplots(1, panels)
    for i, row in enumerate(found["cells"]):
        colour, name = colormaps["tab10"](i % 10), f"{row['arm']}@{row['window']}"
        steps = [point["step"] for point in row["curve"]]
        if row["cosines"] is not None:
            lags = range(1, found["lags"] + 1)
            by_lag.plot(lags, row["cosines"], "o-", color=colour, label=name, markersize=3)
            if row["at_rest"] is not None:
                by_lag.plot(lags, row["at_rest"], ":", color=colour, linewidth=1.0)
            by_update.plot(steps, [point["mean_cosine"] for point in row["curve"]], color=colour)
        for panel in by_loss:
            panel.plot(steps, [point["loss"] for point in row["curve"]], color=colour, label=name)
            panel.set(xlabel="updates", title="loss", yscale="log")
            panel.legend(fontsize=7)
    at_rest = "; dotted: at rest" if task == "fixed" else ""
    by_lag.set(xlabel="lag, steps to the end", title=f"cosine with the true gradient{at_rest}", ylim=(-0.55, 1.05))
    by_update.set(xlabel="updates", title="mean over lags", ylim=(-0.55, 1.05))
    by_lag.legend(fontsize=7)
    return chart


# Command line


def members(
    tasks: Sequence[str],
    preset: str,
    given: Mapping[str, Any],
    *,
    cells: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[common.Member]:
    """All runs, task by task.

    Args:
        tasks: to run.
        preset: one of `PRESETS`.
        given: settings of the user, for all tasks.
        cells: as "arm@window"; None for the preset's.
        seeds: None for the preset's.

    Raises:
        ValueError: if a task or an arm is unknown, there is nothing to run, or a setting is out of range.
    """
    if not tasks or len(set(tasks)) < len(tasks) or not set(tasks) <= set(TASKS):
        raise ValueError(f"tasks: found {' '.join(tasks) or 'none'}, allowed {', '.join(TASKS)}, each once")
    matrix = []
    for task in tasks:
        settings = dict(PRESETS[preset][task])
        of_preset = settings.pop("cells")
        of_task = common.members(
            AlignmentConfig,
            of_preset if cells is None else cells,
            PRESETS[preset]["seeds"] if seeds is None else seeds,
            {**settings, "task": task},
            given=given,
        )
        matrix += [dataclasses.replace(member, name=f"{task}-{member.name}") for member in of_task]
    return matrix


def plan(arguments: Sequence[str] | None = None) -> common.Plan:
    """The runs of a command line: tasks, a preset, cells and seeds, and every field of `AlignmentConfig` to override it."""
    parser = common.matrix_parser("alignment", __doc__, PRESETS)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}; by default all")
    parser.add_argument("--cells", nargs="*", metavar="ARM@WINDOW", help="arms and windows; by default the preset's")
    parser.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True)
    option, given = common.parse(parser, arguments, AlignmentConfig, leave_out=("task", "arm", "window", "seed"))
    matrix = members(option.tasks, option.preset, given, cells=option.cells, seeds=option.seeds)
    return common.Plan(option, matrix, PRESETS[option.preset].get("jobs", 1))


main = functools.partial(common.main, "alignment", plan, run, summarize, table, draw=draw)


if __name__ == "__main__":
    main()
