"""Two networks at two speeds: the multi-network system of Jaderberg et al., "Decoupled Neural Interfaces" (2017), sec. 3.3.

python -m dni_rl.experiments.timescales --preset laptop --run-folder runs/timescales
python -m dni_rl.experiments.timescales --preset laptop --cells dni@4 --carry-state --run-folder runs/timescales-carried
python -m dni_rl.experiments.timescales --preset paper --device cuda --run-folder runs/timescales-paper --resume

Network A reads a stream of digits, one at every step, and after T steps gives the number of odd ones among them. It then sends a
message to network B, which ticks every T steps, and after T ticks gives the number of 3s among the last T^2 digits; all that B knows
of the digits is what A writes. Arms, in cells "arm@T", say what A learns from the error of B:

    backprop    its gradient. The system is locked: one update of both networks every T^2 steps
    none        nothing: the message is no part of what A learns. A is updated every T steps, B every T^2
    dni         a synthetic gradient of the message, so that A is updated every T steps; the critic learns when B has its gradient
    cdni        the same, and the critic is told how many 3s the message is about

Averaged over all that a message leaves open, the gradient of a loss vanishes wherever B is calibrated; so a critic that sees the
message alone knows a direction only as long as B is not, and one that is told the answer always does.

Both networks are measured on a stream of test digits while they train. The published claim is about steps: summary.json and the table
have the share of the locked system's steps that an arm took to the locked system's final error of network A. Folders, cells and
`--resume` are as in `dni_rl.experiments.copy`.

What the paper leaves open, or no source at hand tells, and is assumed here: both networks start their counts from an empty state (A
every T, B every T^2 steps), so that nothing but the message is cut and the locked arm is exact; `--carry-state` never empties them,
and then cuts A every T steps where it is decoupled. Digits are drawn with replacement. Each network is an LSTM without normalisation;
batch normalisation stands in the two layers of A below it and on the message. B is scored at the last tick of its window alone.
Batch 64, Adam with the 7e-5 of the paper's other recurrent nets, and the length of training.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_rl
from dni_rl import data
from dni_rl.experiments import common, images

ARMS = ("backprop", "none", "dni", "cdni")
DATASETS = ("mnist", "fashion_mnist", "synthetic")
LOCKED = "backprop"
# Final error of network B at T = 4, by arm: Jaderberg et al. (2017), as secondary sources quote them.
PUBLISHED_B_ERROR = {("backprop", 4): 0.305, ("none", 4): 0.65, ("dni", 4): 0.33}
# Share of the locked system's steps that A took to its final error: the same; an upper bound ("under half").
PUBLISHED_STEPS_RATIO = {("dni", 4): 0.5}


@dataclass(frozen=True, kw_only=True)
class TimescalesConfig:
    """One run. Defaults are the paper's, as far as it states them."""

    arm: str = "dni"
    window: int = 4  # T: steps between two ticks of B, and ticks in a window of B
    dataset: str = "mnist"  # "synthetic" needs no files: ten noisy patterns
    hidden_size: int = 256  # LSTM units of each network; also the width of A's two layers
    message_size: int = 256
    carry_state: bool = False  # whether the networks never empty their states
    batch_size: int = 64  # streams side by side
    learning_rate: float = 7e-5  # Adam
    critic_learning_rate: float = 7e-5  # Adam
    critic_hidden_sizes: tuple[int, ...] = (256,)
    critic_scale: float = 1.0  # of the synthetic gradient; the paper's 0.1 is for cuts in time
    warmup_updates: int = 0  # of B, while the critic learns but is not believed
    num_steps: int = 4_000_000  # digits of each stream
    log_every_steps: int = 1_600
    eval_every_steps: int = 40_000
    eval_windows: int = 32  # of B, in each of as many test streams as there are streams to learn from
    checkpoint_every_steps: int = 40_000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, arm=ARMS, dataset=DATASETS)
        sizes = ("window", "hidden_size", "message_size", "num_steps", "log_every_steps", "checkpoint_every_steps")
        common.check_at_least(self, 1, *sizes, "eval_every_steps", "eval_windows")
        common.check_critic(self)
        if self.batch_size < 2:
            raise ValueError(f"batch_size: found {self.batch_size}, allowed 2 or more, for batch normalisation")
        for name in ("learning_rate", "critic_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, allowed above 0")


PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that every arm runs
    "smoke": {
        "cells": common.grid(ARMS, (2,)),
        "seeds": (0,),
        "dataset": "synthetic",
        "hidden_size": 16,
        "message_size": 8,
        "critic_hidden_sizes": (16,),
        "batch_size": 32,
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "num_steps": 640,
        "log_every_steps": 40,
        "eval_every_steps": 80,
        "eval_windows": 8,
        "checkpoint_every_steps": 320,
    },
    # under half an hour on two cores
    "laptop": {
        "cells": common.grid(ARMS, (4,)),
        "seeds": (0, 1, 2),
        "jobs": 2,
        "hidden_size": 64,
        "message_size": 32,
        "critic_hidden_sizes": (),
        "batch_size": 32,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1.5e-2,
        "num_steps": 120_000,
        "eval_every_steps": 1_600,
        "eval_windows": 32,
        "checkpoint_every_steps": 16_000,
    },
    "paper": {"cells": common.grid(ARMS, (4,)), "seeds": (0, 1, 2)},
}


# Streams


class Counts(NamedTuple):
    """What there is to tell of a window of digits.

    Attributes:
        odd: [T, B] int64, odd digits among the T before each tick: what A gives.
        threes: [T, B] int64, 3s among them.
        all_threes: [B] int64, 3s in the window: what B gives.
    """

    odd: Tensor
    threes: Tensor
    all_threes: Tensor


def counts(labels: Tensor) -> Counts:
    """Counts in labels [T, T, B], of which the first axis are ticks and the second steps between them."""
    threes = (labels == 3).sum(1)
    return Counts((labels % 2).sum(1), threes, threes.sum(0))


class Streams:
    """Endless streams of digits, drawn with replacement; a window depends on the key and its number alone.

    Args:
        digits: to draw from.
        num_streams: B.
        window: T.
        key: of the randomness; different keys share none of their first million windows.
        device: of what `window` returns.
    """

    def __init__(self, digits: data.Images, num_streams: int, window: int, key: int, device: str):
        self.images, self.labels = digits.images.to(device), digits.labels.to(device)
        self.shape = (window, window, num_streams)
        self.key = key

    def window(self, number: int) -> tuple[Tensor, Tensor]:
        """Pixels [T, T, B, D] in [-0.5, 0.5] and labels [T, T, B] of a window: tick, step, stream."""
        generator = torch.Generator().manual_seed(1_000_003 * self.key + number)
        rows = torch.randint(len(self.labels), self.shape, generator=generator).to(self.labels.device)
        return images.pixels(self.images[rows.flatten()]).unflatten(0, self.shape), self.labels[rows]


# Networks


class NetworkA(nn.Module):
    """Reads digits, gives the number of odd ones, and writes messages.

    Args:
        num_inputs: D, pixels.
        hidden_size: of the LSTM and of the two layers below.
        message_size: M.
        window: T.
    """

    def __init__(self, num_inputs: int, hidden_size: int, message_size: int, window: int):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (num_inputs, hidden_size):
            layers += [nn.Linear(inputs, hidden_size), nn.BatchNorm1d(hidden_size), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.core = dni_rl.LSTM(hidden_size, hidden_size)
        self.readout = nn.Linear(hidden_size, window + 1)
        self.message = nn.Sequential(nn.Linear(hidden_size, message_size), nn.BatchNorm1d(message_size))

    def forward(self, pixels: Tensor, state: dni_rl.State) -> tuple[Tensor, Tensor, dni_rl.State]:
        """Takes T steps, up to a tick of B.

        Args:
            pixels: [T, B, D].
            state: before them.

        Returns:
            [B, T + 1] logits of the number of odd digits, [B, M] message, and the next state.
        """
        features = self.encoder(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        outputs, state = self.core.unroll(features, state)
        return self.readout(outputs[-1]), self.message(outputs[-1]), state


class NetworkB(nn.Module):
    """Reads messages, and gives the number of 3s.

    Args:
        message_size: M.
        hidden_size: of the LSTM.
        window: T.
    """

    def __init__(self, message_size: int, hidden_size: int, window: int):
        super().__init__()
        self.core = dni_rl.LSTM(message_size, hidden_size)
        self.readout = nn.Linear(hidden_size, window**2 + 1)

    def forward(self, messages: Tensor, state: dni_rl.State) -> tuple[Tensor, dni_rl.State]:
        """Takes T ticks: messages [T, B, M] and the state before them to [B, T^2 + 1] logits and the next state."""
        outputs, state = self.core.unroll(messages, state)
        return self.readout(outputs[-1]), state


def _detached(state: dni_rl.State) -> dni_rl.State:
    return tuple(s.detach() for s in state)


# Run


class Experiment(common.Experiment):
    """The networks of a run, the interface between them, and how far it has come."""

    config: TimescalesConfig

    def __init__(self, config: TimescalesConfig):
        super().__init__(config)
        train, test = images.load(config.dataset, "train"), images.load(config.dataset, "test")
        B, T = config.batch_size, config.window
        self.train_streams = Streams(train, B, T, config.seed + 1, config.device)
        self.test_streams = Streams(test, B, T, 0, config.device)  # the same for every run
        torch.manual_seed(config.seed)  # both networks depend on it alone, not on the arm
        self.a = NetworkA(train.images[0].numel(), config.hidden_size, config.message_size, T).to(config.device)
        self.b = NetworkB(config.message_size, config.hidden_size, T).to(config.device)
        self.critic = None
        if config.arm in ("dni", "cdni"):
            self.critic = dni_rl.GradientCritic(
                state_sizes=(config.message_size,),
                hidden_sizes=config.critic_hidden_sizes,
                context_size=T + 1 if config.arm == "cdni" else 0,
                scale=config.critic_scale,
                warmup_updates=config.warmup_updates,
            ).to(config.device)
        self.locked = config.arm == LOCKED
        self.interface = dni_rl.Interface(self.critic, "locked" if self.locked else "decoupled")
        self.optimizers = {
            "a": torch.optim.Adam(self.a.parameters(), config.learning_rate),
            "b": torch.optim.Adam(self.b.parameters(), config.learning_rate),
        }
        if self.critic is not None:
            self.optimizers["critic"] = torch.optim.Adam(self.critic.parameters(), config.critic_learning_rate)
        self.states = self._empty()

    def _empty(self) -> dict[str, dni_rl.State]:
        return {name: net.core.initial_state(self.config.batch_size) for name, net in (("a", self.a), ("b", self.b))}

    def update(self) -> dict[str, Tensor]:
        """Learns from the next window of B; returns metrics, still on the device.

        The loss of A at every tick and that of B are sums over a stream's window and means over streams, in every arm: what a message
        sends to A weighs the same whether it is a gradient or a synthetic one.
        """
        config, T = self.config, self.config.window
        pixels, labels = self.train_streams.window(self.step // T**2)
        target = counts(labels)
        empty = self._empty()
        state = self.states["a"]
        losses_a, wrong_a, messages = [], [], []
        if self.locked:
            self.optimizers["a"].zero_grad()
        with dni_rl.DecoupledPass(weight=1.0 / config.batch_size) as decoupled:
            for k in range(T):
                if not config.carry_state:
                    state = empty["a"]
                if not self.locked:
                    self.optimizers["a"].zero_grad()
                logits, message, state = self.a(pixels[k], state)
                context = F.one_hot(target.threes[k], T + 1).to(message.dtype) if config.arm == "cdni" else None
                messages.append(self.interface(message, context))
                loss = F.cross_entropy(logits, target.odd[k])
                losses_a.append(loss)
                wrong_a.append((logits.argmax(-1) != target.odd[k]).float().mean())
                if not self.locked:
                    loss.backward()
                    self.optimizers["a"].step()
                    state = _detached(state)
            self.optimizers["b"].zero_grad()
            if "critic" in self.optimizers:
                self.optimizers["critic"].zero_grad()
            logits, state_b = self.b(torch.stack(messages), self.states["b"] if config.carry_state else empty["b"])
            loss_b = F.cross_entropy(logits, target.all_threes)
            (torch.stack([*losses_a, loss_b]).sum() if self.locked else loss_b).backward()
        for name in ("a", "b", "critic") if self.locked else ("b", "critic"):
            if name in self.optimizers:
                self.optimizers[name].step()
        if config.carry_state:
            self.states = {"a": _detached(state), "b": _detached(state_b)}
        metrics = {
            "a/loss": torch.stack(losses_a).detach().mean(),
            "a/error": torch.stack(wrong_a).mean(),
            "b/loss": loss_b.detach(),
            "b/error": (logits.argmax(-1) != target.all_threes).float().mean(),
        }
        if self.critic is not None:
            fit = decoupled.fits[self.interface]
            metrics |= {f"critic/{name}": value for name, value in fit.as_dict().items()}
        self.step += T**2
        return metrics

    def evaluate(self) -> tuple[float, float]:
        """Errors of A and B on test streams, batch normalisation in eval mode: shares of counts that are not exactly right."""
        config = self.config
        wrong_a = wrong_b = torch.zeros((), dtype=torch.int64, device=config.device)
        self.a.eval()
        self.b.eval()
        try:
            with torch.no_grad():
                states = self._empty()
                for number in range(config.eval_windows):
                    pixels, labels = self.test_streams.window(number)
                    target = counts(labels)
                    messages = []
                    for k in range(config.window):
                        if not config.carry_state:
                            states |= {"a": self._empty()["a"]}
                        logits, message, states["a"] = self.a(pixels[k], states["a"])
                        wrong_a = wrong_a + (logits.argmax(-1) != target.odd[k]).sum()
                        messages.append(message)
                    if not config.carry_state:
                        states |= {"b": self._empty()["b"]}
                    logits, states["b"] = self.b(torch.stack(messages), states["b"])
                    wrong_b = wrong_b + (logits.argmax(-1) != target.all_threes).sum()
        finally:
            self.a.train()
            self.b.train()
        scored = config.eval_windows * config.batch_size
        return wrong_a.item() / (scored * config.window), wrong_b.item() / scored

    def evaluation(self) -> dict[str, float]:
        """Evaluates, and appends to the curve."""
        a, b = self.evaluate()
        self.add_to_curve(a_error=a, b_error=b)
        return {"test/a_error": a, "test/b_error": b}

    def note(self) -> str:
        """Both errors."""
        return f"A {self.curve[-1]['a_error']:.1%} B {self.curve[-1]['b_error']:.1%}" if self.curve else ""

    def result(self) -> dict[str, Any]:
        """The final errors with their curve."""
        return {
            "a_error": common.final(self.curve, "a_error"),
            "b_error": common.final(self.curve, "b_error"),
            **self.account(),
        }

    def parts(self) -> dict[str, Any]:
        """Both networks, the critic and optimisers."""
        optimizers = {f"optimizer_{name}": optimizer for name, optimizer in self.optimizers.items()}
        return {"a": self.a, "b": self.b, "critic": self.critic, **optimizers}

    def state_dict(self) -> dict[str, Any]:
        """The states of both cores, too."""
        return {**super().state_dict(), "states": {name: tuple(state) for name, state in self.states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        super().load_state_dict(state)
        self.states = dict(state["states"])


run = functools.partial(common.carry_out, Experiment)
"""One run, of a `TimescalesConfig`: see `common.carry_out`."""


# Measures


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The table of a matrix: every cell's final errors by seed, beside the published ones, and what it took to the locked system's.

    For each network, `..._steps_ratio` is the mean over seeds of the steps to the final error of the locked arm at the same T, the
    worst of its seeds', over what the locked arm itself took; None where a seed never got there.
    """
    cells = common.by_cell(matrix, results)
    rows = []
    for cell, by_seed in cells.items():
        found = list(by_seed.values())
        baseline = list(cells.get(common.Cell(LOCKED, cell.window), {}).values())
        row: dict[str, Any] = {"arm": cell.arm, "window": cell.window}
        for network in ("a", "b"):
            name = f"{network}_error"
            row[name] = {
                "per_seed": {str(seed): result[name] for seed, result in by_seed.items()},
                **common.spread([result[name] for result in found]),
            }
            row[f"{network}_steps_ratio"] = _steps_ratio(found, baseline, name)
        published = matrix[0].config.dataset == "mnist"
        row["published_b_error"] = PUBLISHED_B_ERROR.get((cell.arm, cell.window)) if published else None
        row["published_a_steps_ratio"] = PUBLISHED_STEPS_RATIO.get((cell.arm, cell.window)) if published else None
        row["seconds"] = common.mean(result["seconds"] for result in found)
        rows.append(row)
    return {"experiment": "timescales", "dataset": matrix[0].config.dataset, "cells": rows}


def _steps_ratio(
    results: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], name: str
) -> float | None:
    if not baseline:
        return None
    threshold = max(result[name] for result in baseline)
    took, locked = (
        common.mean(common.reached(result["curve"], name, threshold, "step") for result in runs)
        for runs in (results, baseline)
    )
    return took / locked if took is not None and locked else None


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""

    def by_seed(errors: Mapping[str, Any]) -> str:
        return " ".join(f"{error:.3f}" for error in errors["per_seed"].values())

    rows = [
        (
            row["arm"],
            row["window"],
            by_seed(row["a_error"]),
            row["a_error"]["mean"],
            row["a_steps_ratio"],
            None if row["published_a_steps_ratio"] is None else f"under {row['published_a_steps_ratio']}",
            by_seed(row["b_error"]),
            row["b_error"]["mean"],
            row["published_b_error"],
            row["b_steps_ratio"],
            round(row["seconds"]),
        )
        for row in summary["cells"]
    ]
    header = (
        *("arm", "T", "error of A, by seed", "mean", "steps ratio of A", "published"),
        *("error of B, by seed", "mean", "published", "steps ratio of B", "seconds"),
    )
    note = f"Steps ratio: steps to the final error of {LOCKED}, over those that {LOCKED} took."
    return f"{common.markdown(header, rows)}\n\n{note}"


plan = functools.partial(common.cells_plan, "timescales", __doc__, TimescalesConfig, PRESETS)
"""The runs of a command line: a preset, its cells and seeds, and every field of `TimescalesConfig` to override it."""
main = functools.partial(common.main, "timescales", plan, run, summarize, table)


if __name__ == "__main__":
    main()
