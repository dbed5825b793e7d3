"""Images read row by row, after the sequential MNIST of Pemberton & Costa, "BP(lambda): Online learning via synthetic gradients" (2024).

python -m dni_rl.experiments.sequential_mnist --preset laptop --run-folder runs/sequential_mnist
python -m dni_rl.experiments.sequential_mnist --preset laptop --cells none@4 dni@4 sobolev@4 --run-folder runs/sequential_mnist-4
python -m dni_rl.experiments.sequential_mnist --preset paper --device cuda --run-folder runs/sequential_mnist-paper --resume

A small LSTM reads an image as 28 rows of 28 pixels, and tells its class after the last one. It is cut into windows of so many rows, so
that the one loss, which lies in the last window, reaches the first rows by no gradient but a predicted one. Arms, in cells
"arm@window":

    none         nothing beyond the window: truncated BPTT, and with a window as long as the image full BPTT
    dni          an error critic
    cdni         an error critic that is told the class
    sobolev      a critic that predicts the loss, trained on its values and gradients
    bp_lambda    a linear critic that learns by eligibility traces, without BPTT at window 1; each window is one step of theirs

In every arm the net is updated once for each batch of images, with the sum of what its windows send, and the critic once for each
window. So arms and windows differ in the gradient alone, not in the number of updates. The score is the error on the test images,
averaged over the last tenth of training; the table also has the share of the way from truncated to full BPTT that an arm went.
No source at hand gives the paper's results in numbers. Folders, cells and `--resume` are as in `dni_rl.experiments.copy`.

An LSTM of 30 units, Adam at 1e-4, batches of 50, gradients clipped at norm 1 and 40 epochs are the settings of sequential MNIST in the
code that belongs to Pemberton, Boven, Apps & Costa, "Cortico-cerebellar networks as decoupling neural interfaces" (2021), and are taken
over here; the critic's settings are assumed.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_rl
from dni_rl.experiments import common, images

ARMS = ("none", "dni", "cdni", "sobolev", "bp_lambda")
DATASETS = ("mnist", "fashion_mnist", "synthetic")


@dataclass(frozen=True, kw_only=True)
class SequentialMnistConfig:
    """One run."""

    arm: str = "dni"
    window: int = 7  # rows
    dataset: str = "mnist"  # "synthetic" needs no files: ten noisy patterns of 8 rows
    hidden_size: int = 30  # LSTM units
    batch_size: int = 50  # images
    learning_rate: float = 1e-4  # Adam
    max_gradient_norm: float | None = 1.0  # of the net's gradient, clipped before its update
    critic_learning_rate: float = 1e-3  # Adam
    critic_hidden_sizes: tuple[int, ...] = (30,)
    critic_scale: float = 1.0  # at every cut; the one loss lies many of them away
    gradient_discount: float = 1.0  # at every cut
    warmup_updates: int = 100  # windows in which the critic learns, but is not believed; not of bp_lambda
    lambda_: float = 0.9  # of bp_lambda, per window
    num_steps: int = 48_000  # batches, one update each: 40 epochs of MNIST
    log_every_steps: int = 100
    eval_every_steps: int = 1_200
    checkpoint_every_steps: int = 1_200
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, arm=ARMS, dataset=DATASETS)
        counts = ("window", "hidden_size", "batch_size", "num_steps")
        common.check_at_least(self, 1, *counts, "log_every_steps", "eval_every_steps", "checkpoint_every_steps")
        common.check_critic(self)
        for name in ("learning_rate", "critic_learning_rate", "max_gradient_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name}: found {value}, allowed above 0")
        if not 0.0 <= self.lambda_ <= 1.0:
            raise ValueError(f"lambda: found {self.lambda_}, allowed 0 to 1")
        if self.arm == "bp_lambda" and self.critic_hidden_sizes:
            raise ValueError("arm: bp_lambda has a linear critic; use --critic-hidden-sizes without numbers")


_BP_LAMBDA = {"critic_hidden_sizes": ()}
PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that every arm runs
    "smoke": {
        "cells": ("none@2", "none@8", *common.grid(("dni", "cdni", "sobolev"), (2,)), "bp_lambda@4"),
        "seeds": (0,),
        "arms": {"bp_lambda": {**_BP_LAMBDA, "hidden_size": 6}},
        "dataset": "synthetic",
        "hidden_size": 10,
        "critic_hidden_sizes": (16,),
        "batch_size": 32,
        "learning_rate": 3e-2,
        "critic_learning_rate": 1e-2,
        "warmup_updates": 20,
        "num_steps": 80,
        "log_every_steps": 20,
        "eval_every_steps": 10,
        "checkpoint_every_steps": 40,
    },
    # Under half an hour on two cores; each run of bp_lambda@7 takes twice that, for 60 backward passes a window.
    "laptop": {
        "cells": (*common.grid(("none",), (4, 7, 14, 28)), *common.grid(("dni", "cdni", "sobolev"), (7,))),
        "seeds": (0, 1, 2),
        "jobs": 2,
        "arms": {"bp_lambda": _BP_LAMBDA},
        "learning_rate": 2e-3,
        "num_steps": 7_200,
        "eval_every_steps": 120,
        "checkpoint_every_steps": 1_200,
    },
    "paper": {
        "cells": (*common.grid(("none",), (1, 2, 4, 7, 14, 28)), *common.grid(ARMS[1:], (1, 2, 4, 7))),
        "seeds": (0, 1, 2),
        "arms": {"bp_lambda": _BP_LAMBDA},
    },
}


def as_rows(pixels: Tensor, num_rows: int) -> Tensor:
    """[B, Y * X] pixels, row after row, to a sequence of rows [Y, B, X], the topmost first."""
    return pixels.unflatten(1, (num_rows, -1)).transpose(0, 1)


# Run


class Experiment(common.Experiment):
    """The net of a run with its critic, what it reads, and how far it has come."""

    config: SequentialMnistConfig

    def __init__(self, config: SequentialMnistConfig):
        super().__init__(config)
        train, test = images.load(config.dataset, "train"), images.load(config.dataset, "test")
        self.batches = images.Batches(train, config.batch_size, config.seed, config.device)
        self.test_images, self.test_labels = test.images.to(config.device), test.labels.to(config.device)
        self.num_rows = train.images.shape[-2]
        if config.window > self.num_rows:
            raise ValueError(f"window: found {config.window}, allowed 1 to {self.num_rows}, the rows of an image")
        torch.manual_seed(config.seed)  # the net depends on it alone, not on the arm
        self.core = dni_rl.LSTM(train.images.shape[-1], config.hidden_size)
        self.net = nn.ModuleDict({"core": self.core, "readout": nn.Linear(config.hidden_size, images.NUM_CLASSES)})
        self.net.to(config.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), config.learning_rate)
        self.critic = self._make_critic()
        self.critic_optimizer = None
        if self.critic is not None:
            self.critic.to(config.device)
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_learning_rate)

    def _make_critic(self) -> dni_rl.ErrorCritic | None:
        config, sizes = self.config, self.core.state_sizes
        use: dict[str, Any] = {"scale": config.critic_scale, "gradient_discount": config.gradient_discount}
        if config.arm == "none":
            return None
        if config.arm == "bp_lambda":
            return dni_rl.GradientCritic(state_sizes=sizes, normalize_targets=False, **use)
        kind = dni_rl.SobolevCritic if config.arm == "sobolev" else dni_rl.GradientCritic
        return kind(
            state_sizes=sizes,
            hidden_sizes=config.critic_hidden_sizes,
            context_size=images.NUM_CLASSES if config.arm == "cdni" else 0,
            warmup_updates=config.warmup_updates,
            **use,
        )

    def update(self) -> dict[str, Tensor]:
        """Reads the next batch of images, and learns from it; returns metrics, still on the device."""
        config = self.config
        pixels, labels = self.batches[self.step]
        windows = as_rows(pixels, self.num_rows).split(config.window)
        context = None
        if config.arm == "cdni":
            context = F.one_hot(labels, images.NUM_CLASSES).to(pixels.dtype)
        trace = None
        if config.arm == "bp_lambda":
            assert isinstance(self.critic, dni_rl.GradientCritic)
            trace = dni_rl.bp_lambda_trace(self.critic, config.batch_size)
        state: dni_rl.State = self.core.initial_state(config.batch_size)
        reports, loss, logits = [], pixels.new_zeros(()), pixels.new_zeros(())
        self.optimizer.zero_grad()
        for i, inputs in enumerate(windows):
            is_last = i == len(windows) - 1
            start = dni_rl.cut(state)
            outputs, end = self.core.unroll(inputs, start)
            state = tuple(s.detach() for s in end)
            losses = 0.0 * outputs.sum(-1)  # [T, B], nothing is told before the last row
            if is_last:
                logits = self.net["readout"](outputs[-1])
                told = F.cross_entropy(logits, labels, reduction="none")
                losses = torch.cat([losses[:-1], told.unsqueeze(0)])
                loss = told.detach().mean()
            elif self.critic is None:
                continue  # there is nothing to learn from
            report, trace = self._backward(losses, start, end, trace, context, is_last)
            reports.append(report)
        if config.max_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), config.max_gradient_norm)
        self.optimizer.step()
        metrics = {"train/loss": loss, "train/error": (logits.argmax(-1) != labels).float().mean()}
        if self.critic is not None:
            metrics |= {f"critic/{name}": value for name, value in dni_rl.Report.mean_of(reports).as_dict().items()}
        self.step += 1
        return metrics

    def _backward(
        self,
        losses: Tensor,
        start: dni_rl.State,
        end: dni_rl.State,
        trace: Tensor | None,
        context: Tensor | None,
        is_last: bool,
    ) -> tuple[dni_rl.Report, Tensor | None]:
        """Adds the gradient of one window to the net's, and updates the critic; see `update`."""
        T, B = losses.shape
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        # Every window counts the same in the batch's gradient, however many rows it has: the mean over images of a sum over rows.
        given: dict[str, Any] = {"start": start, "end": end, "weight": 1.0 / B}
        given["alive"] = losses.new_zeros(B) if is_last else None  # nothing lies beyond the last row
        if trace is not None:
            assert isinstance(self.critic, dni_rl.GradientCritic)
            report, trace = dni_rl.bp_lambda_backward(
                losses, critic=self.critic, trace=trace, lambda_=self.config.lambda_, **given
            )
        else:
            if context is not None:
                given["context"] = context.expand(T + 1, *context.shape)
            report = dni_rl.backward(losses, critic=self.critic, **given)
        if self.critic_optimizer is not None:
            self.critic_optimizer.step()
        return report, trace

    def evaluate(self) -> float:
        """Share of test images told wrongly."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.test_labels.device)
        with torch.no_grad():
            for pictures, labels in zip(self.test_images.split(1000), self.test_labels.split(1000), strict=True):
                outputs, _ = self.core.unroll(
                    as_rows(images.pixels(pictures), self.num_rows), self.core.initial_state(len(labels))
                )
                wrong += (self.net["readout"](outputs[-1]).argmax(-1) != labels).sum()
        return wrong.item() / len(self.test_labels)

    def evaluation(self) -> dict[str, float]:
        """Evaluates, and appends to the curve."""
        error = self.evaluate()
        self.add_to_curve(error=error)
        return {"test/error": error}

    def note(self) -> str:
        """The last test."""
        return f"test error {self.curve[-1]['error']:.1%}" if self.curve else ""

    def result(self) -> dict[str, Any]:
        """The final error, with its curve."""
        return {"error": common.final(self.curve, "error"), **self.account()}

    def parts(self) -> dict[str, Any]:
        """Net, critic and optimisers."""
        optimizers = {"optimizer": self.optimizer, "critic_optimizer": self.critic_optimizer}
        return {"net": self.net, "critic": self.critic, **optimizers}


run = functools.partial(common.carry_out, Experiment)
"""One run, of a `SequentialMnistConfig`: see `common.carry_out`."""


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The table of a matrix: every cell's final errors by seed, and the share of the gap that it closes.

    The gap is that between the mean errors of "none" at the cell's window and at the longest one, which stands for full BPTT; 0 is
    truncated BPTT, 1 full BPTT, and None where either is missing or they are the same cell.
    """
    cells = common.by_cell(matrix, results)
    means = {cell: common.mean(r["error"] for r in by_seed.values()) for cell, by_seed in cells.items()}
    full = max((cell for cell in cells if cell.arm == "none"), key=lambda cell: cell.window, default=None)
    rows = []
    for cell, by_seed in cells.items():
        error, truncated = means[cell], means.get(common.Cell("none", cell.window))
        reference = None if full is None else means[full]
        gap = None if truncated is None or reference is None else truncated - reference  # 0 in the cells of full BPTT
        rows.append(
            {
                "arm": cell.arm,
                "window": cell.window,
                "per_seed": {str(seed): result["error"] for seed, result in by_seed.items()},
                **common.spread([result["error"] for result in by_seed.values()]),
                "gap_closed": (truncated - error) / gap
                if gap and error is not None and truncated is not None
                else None,
                "seconds": common.mean(result["seconds"] for result in by_seed.values()),
            }
        )
    return {
        "experiment": "sequential_mnist",
        "dataset": matrix[0].config.dataset,
        "full": None if full is None else str(full),
        "cells": rows,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    shown = common.markdown(
        ("arm", "window", "test error, by seed", "mean", "std", "gap closed", "seconds"),
        [
            (
                row["arm"],
                row["window"],
                " ".join(f"{error:.4f}" for error in row["per_seed"].values()),
                None if row["mean"] is None else f"{row['mean']:.4f}",
                None if row["std"] is None else f"{row['std']:.4f}",
                row["gap_closed"],
                None if row["seconds"] is None else round(row["seconds"]),
            )
            for row in summary["cells"]
        ],
    )
    note = f"Gap closed: share of the way from truncated BPTT, none at the same window, to {summary['full']}."
    return f"{shown}\n\n{note}" if summary["full"] else shown


plan = functools.partial(common.cells_plan, "sequential_mnist", __doc__, SequentialMnistConfig, PRESETS)
"""The runs of a command line: a preset, its cells and seeds, and every field of `SequentialMnistConfig` to override it."""
main = functools.partial(common.main, "sequential_mnist", plan, run, summarize, table)


if __name__ == "__main__":
    main()
