"""What synthetic gradients do to a net: Czarnecki et al., "Understanding Synthetic Gradients and Decoupled Neural Interfaces" (2017).

python -m dni_rl.experiments.understanding --preset laptop --run-folder runs/understanding
python -m dni_rl.experiments.understanding --parts rdm --preset paper --device cuda --run-folder runs/understanding-paper --resume

Four parts, all of them unless --parts says otherwise:

    linear    linear and deep-linear models on artificial data, squared and log loss: how far the loss that they reach with a critic is
              from the one that backpropagation reaches. The paper: at most 4e-5 under squared loss, where a critic that is linear
              in (h, y) can be exact; up to 0.0855 under log loss, where it cannot, and where one of the form sigma(W h + b) - y can
    surface   the loss whose gradient the critic is, recovered by integrating it, beside the true loss
    rdm       what the layers of a deep net represent, trained with backpropagation, one critic in the middle, a critic at every layer or
              direct feedback alignment: dissimilarity matrices and linear probes
    signals   a net trained with each of `dni_rl.experiments.signals`, how well each points along the true gradient, and the
              identities between them

A run is an arm (a data set in the first two parts, a signal in the others) and a seed; its folder holds what those of
`dni_rl.experiments.copy` hold. summary.json, table.md and the figures (PNG) are those of the whole.

What no source at hand tells, and is assumed here: the four artificial data sets, of which the paper says that there are versions of 2 and
100 dimensions (linearly separable; the same with a tenth of the labels flipped; XOR; labels at random), each of 1,000 points;
critics of deep models in the middle; every length of training; log loss for two classes; critics that see the label everywhere;
probes by least squares.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_rl
from dni_rl import data
from dni_rl.critics import GradientRegression
from dni_rl.experiments import common, images, signals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("linear", "surface", "rdm", "signals")
DATA_SETS = tuple(f"{kind}{size}" for size in (2, 100) for kind in ("linear", "noisy", "xor", "random"))
ARMS: dict[str, tuple[str, ...]] = {
    "linear": DATA_SETS,
    "surface": DATA_SETS,
    "rdm": ("backprop", "sg_prop", "sg", "dfa", "fa"),
    "signals": signals.SIGNALS,
}
# Largest gap over data sets and models, by loss and form of the critic: Czarnecki et al. (2017), as secondary sources quote them.
PUBLISHED_GAP = {("mse", "linear"): 4e-5, ("log", "linear"): 0.0855}
DISSIMILARITY_FILE = "dissimilarity.npy"


@dataclass(frozen=True, kw_only=True)
class UnderstandingConfig:
    """One run."""

    part: str = "rdm"
    arm: str = "backprop"  # what the part compares
    dataset: str = "mnist"  # rdm, signals; "synthetic" needs no files
    num_layers: int = 20  # hidden ones; of the deep-linear models in linear and surface
    hidden_size: int = 256
    critic_hidden_sizes: tuple[int, ...] = ()  # rdm, signals; the paper studies linear critics
    num_points: int = 1_000  # linear, surface
    batch_size: int = 256  # rdm, signals; the others take all points at once
    learning_rate: float = 1e-3  # Adam
    critic_learning_rate: float = 1e-3  # Adam
    linear_learning_rate: float = 0.01  # Adam, of linear models: problems that are convex
    linear_critic_learning_rate: float = 0.1  # Adam, of their critics
    learning_rate_drop_steps: tuple[int, ...] = ()  # both are divided by 10 at each
    num_steps: int = 100_000
    log_every_steps: int = 100
    eval_every_steps: int = 1_000
    checkpoint_every_steps: int = 1_000
    num_shown: int = 200  # rdm: images in a dissimilarity matrix, equally many of each class
    num_probed: int = 10_000  # rdm: training images that linear probes are fitted to
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, part=PARTS, dataset=images.DATASETS)
        if self.arm not in ARMS[self.part]:
            raise ValueError(f"arm: found {self.arm!r}, allowed in part {self.part}: {', '.join(ARMS[self.part])}")
        counts = ("num_steps", "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "num_points")
        common.check_at_least(self, 1, *counts, "hidden_size", "num_probed")
        common.check_at_least(self, 2, "num_layers", "batch_size")
        common.check_at_least(self, 2 * images.NUM_CLASSES, "num_shown")
        for name in (
            "learning_rate",
            "critic_learning_rate",
            "linear_learning_rate",
            "linear_critic_learning_rate",
        ):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, allowed above 0")


# By preset: seeds, jobs, and for each part its arms and settings.
PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that every part runs
    "smoke": {
        "seeds": (0,),
        "linear": {
            "arms": ("noisy2", "linear100"),
            "num_layers": 2,
            "hidden_size": 4,
            "num_points": 200,
            "learning_rate": 3e-2,
            "critic_learning_rate": 3e-2,
            "num_steps": 40,
            "log_every_steps": 20,
            "eval_every_steps": 20,
            "checkpoint_every_steps": 20,
        },
        "surface": {
            "arms": ("noisy2",),
            "num_layers": 2,
            "hidden_size": 4,
            "num_points": 200,
            "learning_rate": 3e-2,
            "critic_learning_rate": 3e-2,
            "num_steps": 40,
            "log_every_steps": 20,
            "checkpoint_every_steps": 20,
        },
        "rdm": {
            "arms": ("backprop", "sg_prop", "sg", "dfa"),
            "dataset": "synthetic",
            "num_layers": 4,
            "hidden_size": 16,
            "batch_size": 32,
            "num_steps": 40,
            "log_every_steps": 20,
            "eval_every_steps": 20,
            "checkpoint_every_steps": 20,
            "num_shown": 40,
            "num_probed": 500,
        },
        "signals": {
            "arms": signals.SIGNALS,
            "dataset": "synthetic",
            "num_layers": 3,
            "hidden_size": 16,
            "batch_size": 32,
            "num_steps": 40,
            "log_every_steps": 20,
            "eval_every_steps": 20,
            "checkpoint_every_steps": 20,
        },
    },
    # Under half an hour on two cores. Critics learn ten to thirty times as fast as models: at the same rate, or thrice it, single runs
    # of linear models come to rest elsewhere, and deep ones hardly learn.
    "laptop": {
        "seeds": (0, 1, 2),
        "jobs": 2,
        "linear": {
            "arms": DATA_SETS,
            "num_layers": 10,
            "hidden_size": 10,
            "learning_rate": 3e-3,
            "critic_learning_rate": 3e-2,
            "learning_rate_drop_steps": (2_400, 2_700),
            "num_steps": 3_000,
            "eval_every_steps": 250,
        },
        "surface": {
            "arms": ("noisy2",),
            "num_layers": 10,
            "hidden_size": 10,
            "learning_rate": 3e-3,
            "critic_learning_rate": 3e-2,
            "num_steps": 1_000,
        },
        "rdm": {
            "arms": ("backprop", "sg_prop", "sg", "dfa"),
            "hidden_size": 128,
            "critic_learning_rate": 3e-2,
            "num_steps": 2_000,
            "eval_every_steps": 250,
        },
        "signals": {
            "arms": signals.SIGNALS,
            "num_layers": 4,
            "hidden_size": 128,
            "critic_learning_rate": 3e-2,
            "num_steps": 2_000,
            "eval_every_steps": 250,
        },
    },
    "paper": {
        "seeds": (0, 1, 2),
        "linear": {
            "arms": DATA_SETS,
            "num_layers": 10,
            "hidden_size": 10,
            "learning_rate": 3e-3,
            "critic_learning_rate": 3e-2,
            "learning_rate_drop_steps": (20_000, 25_000),
            "num_steps": 30_000,
        },
        "surface": {
            "arms": DATA_SETS,
            "num_layers": 10,
            "hidden_size": 10,
            "learning_rate": 3e-3,
            "critic_learning_rate": 3e-2,
            "num_steps": 10_000,
        },
        "rdm": {"arms": ("backprop", "sg_prop", "sg", "dfa")},
        "signals": {"arms": signals.SIGNALS, "num_layers": 4},
    },
}


# Artificial data, and models of two halves


def points(name: str, num_points: int, seed: int) -> tuple[Tensor, Tensor]:
    """An artificial data set of two classes.

    Args:
        name: one of `DATA_SETS`: kind and dimensions D.
        num_points: N.
        seed: of its randomness.

    Returns:
        Standard normal points [N, D] and labels [N, 1], 0 or 1; float64.
    """
    kind = name.rstrip("0123456789")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_points, int(name[len(kind) :]), generator=generator, dtype=torch.float64)
    chance = torch.rand(num_points, generator=generator, dtype=torch.float64)
    if kind == "xor":
        y = x[:, 0] * x[:, 1] > 0
    elif kind == "random":
        y = chance < 0.5
    else:
        y = x @ torch.randn(x.shape[1], generator=generator, dtype=torch.float64) > 0
        if kind == "noisy":
            y = y ^ (chance < 0.1)
    return x, y.to(x.dtype).unsqueeze(1)


def losses_of(loss: str, output: Tensor, y: Tensor) -> Tensor:
    """[B] losses of outputs [B, 1] and labels [B, 1]: "mse", (output - y)^2, or "log", with the output as a logit."""
    if loss == "mse":
        return (output - y).square().squeeze(-1)
    return F.binary_cross_entropy_with_logits(output, y, reduction="none").squeeze(-1)


class _SigmoidForm(nn.Module):
    """[h, y] to V (sigma(w h + b) - y); V is zero at the start."""

    def __init__(self, size: int):
        super().__init__()
        self.logit = nn.Linear(size, 1)
        self.spread = nn.Linear(1, size, bias=False)
        nn.init.zeros_(self.spread.weight)

    def forward(self, x: Tensor) -> Tensor:
        h, y = x[..., :-1], x[..., -1:]
        return self.spread(self.logit(h).sigmoid() - y)


class SigmoidGradientCritic(GradientRegression):
    """Predicts the gradient of a log loss in the form that it has where all that is above h is linear.

        M(h, y) = rms * V (sigma(w h + b) - y)

    A logit w h + b has the gradient (sigma(w h + b) - y) w with respect to h. A critic that is linear in h and y can follow neither; this
    is the form with which, in Czarnecki et al. (2017), the gap under log loss closes. Zero at the start as every critic.

    Args:
        state_size: H.
    """

    def __init__(self, state_size: int):
        super().__init__(state_sizes=(state_size,), context_size=1)
        self._set_net(_SigmoidForm(state_size))

    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        self._check_context(joined, context)
        assert context is not None
        return net(torch.cat([joined, context.to(joined.dtype)], dim=-1)) * self.target_rms


@dataclass(frozen=True, order=True)
class Case:
    """A model, a loss, and what the lower half of the model learns from.

    Attributes:
        model: "linear", cut at its output, or "deep", cut in the middle.
        loss: "mse" or "log".
        form: of the critic: "linear", "sigmoid" or "mlp"; "backprop" for none.
    """

    model: str
    loss: str
    form: str

    def __str__(self) -> str:
        return f"{self.model}_{self.loss}_{self.form}"


FORMS = {
    "linear": {"mse": ("backprop", "linear"), "log": ("backprop", "linear", "sigmoid")},
    "surface": {"mse": ("linear", "mlp"), "log": ("linear", "sigmoid", "mlp")},
}


def cases(part: str) -> list[Case]:
    """All cases of the parts with artificial data."""
    return [
        Case(model, loss, form) for model in ("linear", "deep") for loss, forms in FORMS[part].items() for form in forms
    ]


class Student:
    """One case in the making: halves, interface, critic and optimisers.

    Args:
        case: what it is.
        num_inputs: D.
        config: of the run.
    """

    def __init__(self, case: Case, num_inputs: int, config: UnderstandingConfig):
        torch.manual_seed(config.seed)  # the halves depend on it and the model alone
        widths = [num_inputs, *[config.hidden_size] * (config.num_layers if case.model == "deep" else 0), 1]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        for layer in layers if case.model == "deep" else ():
            nn.init.orthogonal_(layer.weight)  # the signal does not fade with depth
            nn.init.zeros_(layer.bias)
        middle = len(layers) // 2 if case.model == "deep" else 1
        self.case = case
        self.lower, self.upper = nn.Sequential(*layers[:middle]), nn.Sequential(*layers[middle:])
        size = layers[middle - 1].out_features
        self.critic: GradientRegression | None = None
        if case.form == "sigmoid":
            self.critic = SigmoidGradientCritic(size)
        elif case.form != "backprop":
            hidden = (32,) if case.form == "mlp" else ()
            self.critic = dni_rl.GradientCritic(state_sizes=(size,), hidden_sizes=hidden, context_size=1)
        self.learning_rates = (config.learning_rate, config.critic_learning_rate)
        if case.model == "linear":
            self.learning_rates = (config.linear_learning_rate, config.linear_critic_learning_rate)
        self.modules = nn.ModuleDict({"lower": self.lower, "upper": self.upper}).to(config.device).double()
        self.optimizers = [torch.optim.Adam(self.modules.parameters(), self.learning_rates[0])]
        if self.critic is not None:
            self.critic.to(config.device).double()
            self.optimizers.append(torch.optim.Adam(self.critic.parameters(), self.learning_rates[1]))
        self.interface = dni_rl.Interface(self.critic, "locked" if self.critic is None else "decoupled")

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on all points; returns the mean loss before it, without gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with dni_rl.DecoupledPass(context=y):
            loss = losses_of(self.case.loss, self.upper(self.interface(self.lower(x))), y).mean()
            loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def loss(self, x: Tensor, y: Tensor) -> float:
        """The mean loss."""
        return losses_of(self.case.loss, self.upper(self.lower(x)), y).mean().item()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "modules": self.modules.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.modules.load_state_dict(state["modules"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def least_log_loss(features: Tensor, y: Tensor, num_iterations: int = 50) -> float:
    """The least mean log loss of logits that are linear in features [N, D] and a constant, by Newton's method; float64.

    Of classes that can be separated it is 0, which is only approached.
    """
    x = torch.cat([features / features.std(0), torch.ones_like(y)], dim=1)
    weights = x.new_zeros(x.shape[1], 1)
    loss = losses_of("log", x @ weights, y).mean()
    for _ in range(num_iterations):
        probability = (x @ weights).sigmoid()
        curvature = x.T @ (x * probability * (1.0 - probability)) / len(y)
        curvature += 1e-12 * torch.eye(len(curvature), dtype=y.dtype, device=y.device)
        step = torch.linalg.solve(curvature, x.T @ (probability - y) / len(y))
        while (lower := losses_of("log", x @ (weights - step), y).mean()) > loss and step.norm() > 1e-9:
            step = step / 2.0
        if not lower < loss:
            break
        weights, loss = weights - step, lower
    return loss.item()


def predicted_gap(x: Tensor, y: Tensor) -> float:
    """What a linear model under log loss loses to backpropagation when it has come to rest with a linear critic at its output.

    At rest sum_n M(h_n, y_n) (x_n, 1) = 0 with M = a h + c y + d: h is the least-squares fit of y, scaled and shifted. The critic's own
    regression then makes the true gradient orthogonal to h and 1: scale and shift are the best for this direction. So the gap is what
    the direction of least squares loses to that of logistic regression.

    Args:
        x: [N, D].
        y: [N, 1].
    """
    features = torch.cat([x, torch.ones_like(y)], dim=1)
    direction = features @ torch.linalg.lstsq(features, y).solution
    return least_log_loss(direction, y) - least_log_loss(x, y)


class Artificial(common.Experiment):
    """All cases of one data set side by side: parts linear and surface."""

    config: UnderstandingConfig

    def __init__(self, config: UnderstandingConfig):
        super().__init__(config)
        x, y = points(config.arm, config.num_points, config.seed)
        self.x, self.y = x.to(config.device), y.to(config.device)
        self.students = [Student(case, x.shape[1], config) for case in cases(config.part)]
        self.surfaces: list[dict[str, Any]] = []

    def update(self) -> dict[str, Tensor]:
        """One step of every case; returns losses before it."""
        started = time.monotonic()
        metrics = {}
        for student in self.students:
            _set_learning_rates(student.optimizers, student.learning_rates, self.config, self.step)
            metrics[f"loss/{student.case}"] = student.update(self.x, self.y)
        self.step += 1
        self.seconds += time.monotonic() - started
        return metrics

    def evaluation_is_due(self, before: int) -> bool:
        """Surface: after 10, 100, ... steps."""
        if self.config.part == "surface":
            return self.step >= 10 and math.log10(self.step).is_integer()
        return super().evaluation_is_due(before)

    def evaluation(self) -> dict[str, float]:
        """Linear: the losses. Surface: recovers it."""
        if self.config.part == "surface":
            self.surfaces += self._surfaces()
            return {}
        found = {str(student.case): student.loss(self.x, self.y) for student in self.students}
        self.add_to_curve(**found)
        return {f"eval/{name}": loss for name, loss in found.items()}

    def _surfaces(self) -> list[dict[str, Any]]:
        return [{"step": self.step, **surface(student, self.x, self.y)} for student in self.students]

    def note(self) -> str:
        """The data set."""
        return self.config.arm

    def result(self) -> dict[str, Any]:
        """Linear: losses, and gaps to backpropagation. Surface: all surfaces."""
        if self.config.part == "surface":
            last = [] if self.surfaces and self.surfaces[-1]["step"] == self.step else self._surfaces()
            return {**self.account(), "surfaces": self.surfaces + last}
        losses = {student.case: student.loss(self.x, self.y) for student in self.students}
        gaps = {
            str(case): loss - losses[Case(case.model, case.loss, "backprop")]
            for case, loss in losses.items()
            if case.form != "backprop"
        }
        return {
            **self.account(),
            "losses": {str(case): loss for case, loss in losses.items()},
            "gaps": gaps,
            "predicted_gap": predicted_gap(self.x, self.y),  # of linear_log_linear, after training without end
        }

    def parts(self) -> dict[str, Any]:
        """The students."""
        return {str(student.case): student for student in self.students}

    def state_dict(self) -> dict[str, Any]:
        """The surfaces, too."""
        return {**super().state_dict(), "surfaces": self.surfaces}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        super().load_state_dict(state)
        self.surfaces = list(state["surfaces"])


def _set_learning_rates(
    optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[float], config: UnderstandingConfig, step: int
) -> None:
    """Sets each to its rate, divided by 10 at each of the config's drops."""
    factor = 0.1 ** sum(step >= drop for drop in config.learning_rate_drop_steps)
    for optimizer, rate in zip(optimizers, rates, strict=False):  # there may be no critic
        for group in optimizer.param_groups:
            group["lr"] = rate * factor


# The loss that a critic implies


def implied_loss(critic: dni_rl.ErrorCritic, path: Tensor, context: Tensor) -> Tensor:
    """The loss along a path whose gradient the critic would be, by the trapezoidal rule.

        L(h_p) = integral from h_0 to h_p of <M(h, z), dh>,     L(h_0) = 0

    Czarnecki et al. (2017) draw it for outputs of one dimension, where every function is a gradient. In more dimensions a
    critic need not be the gradient of anything, and the integral is that along this path.

    Args:
        critic: of states [H].
        path: [P, H], from its start to its end.
        context: [Z], the same along the path.

    Returns:
        [P], without gradient; exact on a straight path where the critic is linear in h.
    """
    with torch.no_grad():
        (gradient,) = critic((path,), context.expand(len(path), -1))
        steps = ((gradient[1:] + gradient[:-1]) / 2.0 * path.diff(dim=0)).sum(-1)
        return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


@torch.no_grad()
def surface(student: Student, x: Tensor, y: Tensor, num_points: int = 41) -> dict[str, Any]:
    """The true and the implied loss, on the line through the two classes' means of h, as far as the data reach along it.

    A loss is known from its gradient up to a constant, for each label; it is set so that the two agree on average where the data are.
    The error is the RMS of what remains there, over the standard deviation of the true loss there.

    Args:
        student: with a critic.
        x: [N, D].
        y: [N, 1].
        num_points: P, on the line.
    """
    assert student.critic is not None
    h = student.lower(x)
    is_one = y.squeeze(1) > 0.5
    means = [h[~is_one].mean(0), h[is_one].mean(0)]
    direction = (means[1] - means[0]) / (means[1] - means[0]).norm().clamp_min(1e-12)
    along = (h - means[0]) @ direction
    line = torch.linspace(along.min().item(), along.max().item(), num_points, dtype=h.dtype, device=h.device)
    path = means[0] + line.unsqueeze(1) * direction
    found: dict[str, Any] = {"case": str(student.case), "along": line.tolist(), "classes": []}
    for label, rows in enumerate((~is_one, is_one)):
        label_of_path = y.new_full((num_points, 1), float(label))
        true = losses_of(student.case.loss, student.upper(path), label_of_path)
        implied = implied_loss(student.critic, path, y.new_full((1,), float(label)))
        share = torch.histc(along[rows], num_points, line[0].item(), line[-1].item())
        share = share / share.sum()
        implied = implied + (share * (true - implied)).sum()
        deviation = (share * (true - (share * true).sum()).square()).sum().sqrt()
        error = (share * (true - implied).square()).sum().sqrt() / deviation.clamp_min(1e-12)
        found["classes"].append({"true": true.tolist(), "implied": implied.tolist(), "error": error.item()})
    return found


# Deep nets with any signal


@functools.cache  # the runs of one process read it once
def load(dataset: str, split: data.Split) -> data.Images:
    """A split by the name of its data set; see `images.load`."""
    return images.load(dataset, split)


def dissimilarity(features: Tensor) -> Tensor:
    """1 - the correlation of every two rows of features [N, H]: [N, N], between 0 and 2.

    Kriegeskorte et al., "Representational similarity analysis" (2008). Rows that are constant have correlation 0 with all.
    """
    centred = features.double() - features.double().mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (1.0 - unit @ unit.T).clamp(0.0, 2.0)


def probe_error(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, ridge: float = 1e-3
) -> float:
    """Test error of a linear classifier of features, by least squares on one-hot labels.

    Args:
        train: features [N, H] and labels [N].
        test: the same.
        num_classes: C.
        ridge: penalty, in units of a standardised feature's variance.
    """
    mean, std = train[0].double().mean(0), train[0].double().std(0)
    scale = torch.where(std > 0, std, 1.0)  # a unit that is always dead stays zero
    features, test_features = ((part[0].double() - mean) / scale for part in (train, test))
    target = F.one_hot(train[1], num_classes).double()
    gram = features.T @ features / len(features)
    gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram, features.T @ (target - target.mean(0)) / len(features))
    predicted = (test_features @ weights + target.mean(0)).argmax(1)
    return (predicted != test[1]).double().mean().item()


class Deep(common.Experiment):
    """A net of dense layers that learns from one signal: parts rdm and signals.

    Part rdm tells ten classes apart, with batch normalisation. Part signals tells odd from even labels, with one output and without
    normalisation, so that every signal is defined.

    Args:
        config: of the run.
        folder: where rdm puts its matrices.
    """

    config: UnderstandingConfig

    def __init__(self, config: UnderstandingConfig, folder: Path):
        super().__init__(config)
        self.folder = folder
        self.train, self.test = load(config.dataset, "train"), load(config.dataset, "test")
        self.batches = images.Batches(self.train, config.batch_size, config.seed, config.device)
        self.is_rdm = config.part == "rdm"
        num_outputs = images.NUM_CLASSES if self.is_rdm else 1
        torch.manual_seed(config.seed)  # the net depends on it alone, not on the arm
        num_inputs = self.train.images[0].numel()
        self.layers = signals.dense_layers(
            num_inputs, config.hidden_size, config.num_layers, num_outputs, normalize=self.is_rdm
        )
        self.signal = signals.make_signal(
            config.arm,
            self.layers,
            context_size=images.NUM_CLASSES if self.is_rdm else 1,
            critic_hidden_sizes=config.critic_hidden_sizes,
            seed=config.seed,
        )
        self.net = nn.Sequential(*self.layers).to(config.device)
        self.signal.to(config.device)
        self.optimizers = [torch.optim.Adam(self.net.parameters(), config.learning_rate)]
        if list(self.signal.parameters()):
            self.optimizers.append(torch.optim.Adam(self.signal.parameters(), config.critic_learning_rate))

    def _targets(self, labels: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The losses, and the context of critics, for labels [B]."""
        if self.is_rdm:
            context = F.one_hot(labels, images.NUM_CLASSES).float()
            return lambda outputs: F.cross_entropy(outputs, labels, reduction="none"), context
        y = (labels % 2).float().unsqueeze(1)
        return lambda outputs: losses_of("log", outputs, y), y

    def _wrong(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.is_rdm:
            return outputs.argmax(-1) != labels
        return (outputs.squeeze(-1) > 0) != (labels % 2 == 1)

    def update(self) -> dict[str, Tensor]:
        """Learns from the next batch; returns metrics, still on the device."""
        started = time.monotonic()
        rates = (self.config.learning_rate, self.config.critic_learning_rate)
        _set_learning_rates(self.optimizers, rates, self.config, self.step)
        x, labels = self.batches[self.step]
        losses, context = self._targets(labels)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        found = signals.signal_pass(self.layers, self.signal, x, losses, context)
        found.add_gradients()
        metrics = {
            "train/loss": found.losses.mean(),
            "train/error": self._wrong(found.outputs, labels).float().mean(),
        }
        for i, junction in enumerate(found.junctions):
            fit = self.signal.fit(i, junction)
            if fit is not None:
                fit.loss.backward()
                metrics[f"critic_{i + 1}/cosine"] = fit.cosine
                metrics[f"critic_{i + 1}/explained_variance"] = fit.explained_variance
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        return metrics

    @torch.no_grad()
    def evaluate(self) -> float:
        """Share of test images told wrongly, batch normalisation in eval mode."""
        self.net.eval()
        try:
            wrong = 0
            for pictures, labels in zip(self.test.images.split(1000), self.test.labels.split(1000), strict=True):
                outputs = self.net(images.pixels(pictures.to(self.config.device)))
                wrong += int(self._wrong(outputs, labels.to(self.config.device)).sum())
        finally:
            self.net.train()
        return wrong / len(self.test.labels)

    def alignment(self) -> list[float]:
        """For each hidden layer, the mean over test images of the cosine between the signal and the true gradient there."""
        count = self.config.batch_size
        x = images.pixels(self.test.images[:count].to(self.config.device))
        losses, context = self._targets(self.test.labels[:count].to(self.config.device))
        found, true = (
            signals.signal_pass(self.layers, signal, x, losses, context).deltas
            for signal in (self.signal, signals.Backprop())
        )
        return [F.cosine_similarity(a, b, dim=1, eps=1e-30).mean().item() for a, b in zip(found, true, strict=True)]

    def evaluation(self) -> dict[str, float]:
        """Evaluates, and appends to the curve."""
        error = self.evaluate()
        if self.is_rdm:
            self.add_to_curve(error=error)
            return {"test/error": error}
        cosines = self.alignment()  # without normalisation a pass leaves nothing behind
        self.add_to_curve(error=error, cosines=cosines)
        return {"test/error": error} | {f"cosine/layer_{i}": cosine for i, cosine in enumerate(cosines, start=1)}

    def note(self) -> str:
        """The last test."""
        return f"test error {self.curve[-1]['error']:.1%}" if self.curve else ""

    def result(self) -> dict[str, Any]:
        """The final error with its curve; rdm: what each layer represents as well."""
        found = {"error": self.evaluate(), **self.account()}
        return found | ({"layers": self._representations()} if self.is_rdm else {"cosines": self.alignment()})

    @torch.no_grad()
    def _representations(self) -> list[dict[str, float]]:
        """For each hidden layer dissimilarities within and between classes, their distance to the last layer's, and the probe's error.

        The distance is that of Czarnecki et al. (2017): the L2 norm of the difference of the two layers' dissimilarities of
        images of one class.
        """
        device = self.config.device
        each = self.config.num_shown // images.NUM_CLASSES
        rows = torch.cat(
            [(self.test.labels == label).nonzero().flatten()[:each] for label in range(images.NUM_CLASSES)]
        )
        shown_labels = self.test.labels[rows]
        same = shown_labels.unsqueeze(1) == shown_labels
        off_diagonal = ~torch.eye(len(rows), dtype=torch.bool)
        count = self.config.num_probed
        labels = self.train.labels[:count].to(device), self.test.labels.to(device)
        h_train, h_test, h_shown = (
            images.pixels(pictures.to(device))
            for pictures in (self.train.images[:count], self.test.images, self.test.images[rows])
        )
        matrices, errors = [], []
        self.net.eval()
        try:
            for layer in self.layers[:-1]:
                h_train, h_test, h_shown = layer(h_train), layer(h_test), layer(h_shown)
                matrices.append(dissimilarity(h_shown).cpu())
                errors.append(probe_error((h_train, labels[0]), (h_test, labels[1]), images.NUM_CLASSES))
        finally:
            self.net.train()
        np.save(self.folder / DISSIMILARITY_FILE, torch.stack(matrices).numpy().astype(np.float16))
        return [
            {
                "within": matrix[same & off_diagonal].mean().item(),
                "between": matrix[~same].mean().item(),
                "distance_to_last": (matrix - matrices[-1])[same].norm().item(),
                "probe_error": error,
            }
            for matrix, error in zip(matrices, errors, strict=True)
        ]

    def parts(self) -> dict[str, Any]:
        """Net, signal and optimisers."""
        optimizers = {f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return {"net": self.net, "signal": self.signal, **optimizers}


def run(config: UnderstandingConfig, folder: Path, **how: Any) -> dict[str, Any]:
    """One run of one part: see `common.carry_out`, which takes the options."""
    make: Callable[[UnderstandingConfig], common.Experiment] = Artificial
    if config.part in ("rdm", "signals"):
        make = functools.partial(Deep, folder=folder)
    return common.carry_out(make, config, folder, **how)


# Identities


class Oracle:
    """A critic that answers with gradients it was given; for checks.

    Args:
        gradient: [B, H], of one example's loss.
    """

    def __init__(self, gradient: Tensor):
        self.gradient = gradient

    def synthetic_gradient(self, state: dni_rl.State, context: Tensor | None = None) -> dni_rl.State:
        """The given gradient."""
        return (self.gradient,)

    def fit(self, state: dni_rl.State, target: dni_rl.State, context: Tensor | None = None) -> dni_rl.CriticFit:
        """An oracle has nothing to learn."""
        raise RuntimeError("fit: an oracle learns nothing")


def identities(seed: int = 0) -> dict[str, float]:
    """How far each signal is from backpropagation where it must be the same: largest difference of gradients over the largest gradient.

    In float64, on random nets: an oracle critic in the middle, oracles at every layer, feedback alignment with the weights themselves,
    direct feedback alignment in a linear net with the products of all weights above, kickback with one hidden layer.
    """
    torch.manual_seed(seed)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    losses: Callable[[Tensor], Tensor] = functools.partial(losses_of, "log", y=(y > 0).to(y.dtype))
    deep = [layer.double() for layer in signals.dense_layers(5, 6, 3, 1, normalize=True)]
    shallow = [layer.double() for layer in signals.dense_layers(5, 6, 1, 1, normalize=False)]
    linear = [signals.Layer(a, b, rectify=False).double() for a, b in itertools.pairwise((5, 6, 6, 1))]
    true = signals.signal_pass(deep, signals.Backprop(), x, losses).deltas
    feedback, direct = signals.make_signal("fa", deep), signals.make_signal("dfa", linear)
    for buffer, above in zip(feedback.buffers(), deep[1:], strict=True):
        buffer.copy_(above.linear.weight.detach())
    product = torch.eye(1, dtype=torch.float64)
    for buffer, above in zip(reversed(list(direct.buffers())), reversed(linear[1:]), strict=True):
        product = product @ above.linear.weight.detach()
        buffer.copy_(product)
    checks: dict[str, tuple[list[signals.Layer], signals.Signal]] = {
        "sg_prop, oracle in the middle": (deep, signals.SyntheticGradients([None, Oracle(true[1]), None])),
        "sg, oracles everywhere": (deep, signals.SyntheticGradients([Oracle(delta) for delta in true])),
        "fa, feedback = weights": (deep, feedback),
        "dfa, linear net, feedback = products of weights": (linear, direct),
        "kickback, one hidden layer": (shallow, signals.make_signal("kickback", shallow)),
    }
    found = {}
    for name, (layers, signal) in checks.items():
        wanted, given = (signals.signal_pass(layers, one, x, losses).gradients for one in (signals.Backprop(), signal))
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        found[name] = max((given[p] - wanted[p]).abs().max().item() for p in wanted) / largest
    return found


# Summary


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What summary.json holds, by part."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        of_part = [member for member in matrix if member.config.part == part]
        if of_part:
            by_arm = {cell.arm: list(by_seed.values()) for cell, by_seed in common.by_cell(of_part, results).items()}
            parts[part] = _SUMMARIES[part](by_arm)
    return {"experiment": "understanding", "seeds": sorted({member.config.seed for member in matrix}), "parts": parts}


def _linear_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Gaps by data set; and for each loss and form the largest over data sets, models and seeds beside the published one."""
    rows: list[dict[str, Any]] = []
    largest: dict[str, dict[str, Any]] = {}
    for arm, found in by_arm.items():
        gaps = {name: common.spread([result["gaps"][name] for result in found]) for name in found[0]["gaps"]}
        in_the_end = common.spread([result["predicted_gap"] for result in found])
        rows.append({"data": arm, "gaps": gaps, "predicted_gap": in_the_end})
    for loss, forms in FORMS["linear"].items():
        for form in forms[1:]:
            gaps_of_form = [row["gaps"][str(Case(model, loss, form))] for row in rows for model in ("linear", "deep")]
            ends = [gap[end] for gap in gaps_of_form for end in ("min", "max")]
            largest[f"{loss}, {form}"] = {
                "gap": None if None in ends else max(map(abs, ends)),  # None: some run has diverged
                "published": PUBLISHED_GAP.get((loss, form)),
            }
    return {"rows": rows, "largest": largest}


def _surface_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean errors of the implied loss, by data set, case and step; and the surfaces of the first seed, for the figure."""
    rows = []
    for arm, found in by_arm.items():
        for surfaces in zip(*(result["surfaces"] for result in found), strict=True):
            errors = [of_class["error"] for one in surfaces for of_class in one["classes"]]
            rows.append(
                {"data": arm, "case": surfaces[0]["case"], "step": surfaces[0]["step"], **common.spread(errors)}
            )
    return {"rows": rows, "first": {arm: found[0]["surfaces"] for arm, found in by_arm.items()}}


def _rdm_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Test errors by signal, and by layer what the representations are like, as means over seeds."""
    rows = []
    for arm, found in by_arm.items():
        layers = [
            {name: common.spread([of_layer[name] for of_layer in of_seeds])["mean"] for name in of_seeds[0]}
            for of_seeds in zip(*(result["layers"] for result in found), strict=True)
        ]
        errors = [result["error"] for result in found]
        seconds = common.spread([result["seconds"] for result in found])["mean"]
        rows.append({"arm": arm, "per_seed": errors, **common.spread(errors), "seconds": seconds, "layers": layers})
    return {"rows": rows}


def _signals_summary(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Test errors and cosines with the true gradient by signal, and the identities."""
    rows = []
    for arm, found in by_arm.items():
        cosines = [common.spread(of_layer)["mean"] for of_layer in zip(*(r["cosines"] for r in found), strict=True)]
        curve = [
            {"step": points[0]["step"], "error": common.spread([point["error"] for point in points])["mean"]}
            for points in zip(*(result["curve"] for result in found), strict=True)
        ]
        errors = [result["error"] for result in found]
        rows.append({"arm": arm, "per_seed": errors, **common.spread(errors), "cosines": cosines, "curve": curve})
    return {"rows": rows, "identities": identities()}


_SUMMARIES: dict[str, Callable[[Mapping[str, Sequence[Mapping[str, Any]]]], dict[str, Any]]] = {
    "linear": _linear_summary,
    "surface": _surface_summary,
    "rdm": _rdm_summary,
    "signals": _signals_summary,
}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown, a section for each part."""
    return "\n\n".join(_TABLES[part](found) for part, found in summary["parts"].items())


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"


def _linear_table(found: Mapping[str, Any]) -> str:
    names = [str(case) for case in cases("linear") if case.form != "backprop"]
    gaps = common.markdown(
        ("data", *(name.replace("_", ", ") for name in names), "linear, log, linear: predicted"),
        [
            (
                row["data"],
                *(_digits(row["gaps"][name]["mean"]) for name in names),
                _digits(row["predicted_gap"]["mean"]),
            )
            for row in found["rows"]
        ],
    )
    largest = common.markdown(
        ("loss, critic", "largest gap", "published"),
        [(name, _digits(entry["gap"]), _digits(entry["published"])) for name, entry in found["largest"].items()],
    )
    note = (
        "Loss with a critic less loss of backpropagation after as many steps, by model, loss and critic; mean over seeds. Predicted: "
        "after training without end."
    )
    return f"{note}\n\n{gaps}\n\n{largest}"


def _surface_table(found: Mapping[str, Any]) -> str:
    shown = common.markdown(
        ("data", "model, loss, critic", "step", "error of the implied loss", "least", "largest"),
        [
            (row["data"], row["case"].replace("_", ", "), row["step"], row["mean"], row["min"], row["max"])
            for row in found["rows"]
        ],
    )
    return f"Error: RMS where the data are, in standard deviations of the true loss there; over seeds and labels.\n\n{shown}"


def _rdm_table(found: Mapping[str, Any]) -> str:
    depth = len(found["rows"][0]["layers"])
    chosen = sorted({1, (depth + 2) // 4, depth // 2, depth // 2 + 1, (3 * depth + 2) // 4, depth} - {0})
    rows = []
    for row in found["rows"]:
        for name in ("probe_error", "within", "between", "distance_to_last"):
            values = [row["layers"][i - 1][name] for i in chosen]
            rows.append((row["arm"], row["mean"], row["std"], name.replace("_", " "), *values))
    return common.markdown(("signal", "test error", "std", "measure", *(f"layer {i}" for i in chosen)), rows)


def _signals_table(found: Mapping[str, Any]) -> str:
    learned = common.markdown(
        ("signal", "test error, by seed", "mean", "cosine with the true gradient, by layer"),
        [
            (
                row["arm"],
                " ".join(f"{error:.4f}" for error in row["per_seed"]),
                f"{row['mean']:.4f}",
                " ".join(f"{cosine:.2f}" for cosine in row["cosines"]),
            )
            for row in found["rows"]
        ],
    )
    equal = common.markdown(
        ("identity with backpropagation", "relative difference"),
        [(name, f"{value:.0e}") for name, value in found["identities"].items()],
    )
    return f"{learned}\n\n{equal}"


_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "linear": _linear_table,
    "surface": _surface_table,
    "rdm": _rdm_table,
    "signals": _signals_table,
}


# Figures


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes the figures of the parts that were run, as PNG, beside the summary."""
    parts = summary["parts"]
    if "surface" in parts:
        for arm, surfaces in parts["surface"]["first"].items():
            surface_figure(surfaces).savefig(folder / f"surface-{arm}.png")
    if "rdm" in parts:
        matrices: dict[str, np.ndarray] = {}
        for name, config in summary["configs"].items():  # those of the first seed
            if config["part"] == "rdm" and config["arm"] not in matrices:
                matrices[config["arm"]] = np.load(folder / name / DISSIMILARITY_FILE)
        dissimilarity_figure(matrices).savefig(folder / "dissimilarity.png")
        layers_figure(parts["rdm"]["rows"]).savefig(folder / "layers.png")
    if "signals" in parts:
        signals_figure(parts["signals"]["rows"]).savefig(folder / "signals.png")


def surface_figure(surfaces: Sequence[Mapping[str, Any]]) -> "Figure":
    """A row for each model and step, a column for each loss and critic: true losses dashed, a colour for each label."""
    from matplotlib.figure import Figure

    names, steps = (list(dict.fromkeys(one[key] for one in surfaces)) for key in ("case", "step"))
    models = list(dict.fromkeys(name.partition("_")[0] for name in names))
    wide = len(names) // len(models)
    chart = Figure(figsize=(2.4 * wide, 1.7 * len(models) * len(steps)), dpi=110, layout="constrained")
    panels = chart.subplots(len(models) * len(steps), wide, squeeze=False)
    for one in surfaces:
        block, column = divmod(names.index(one["case"]), wide)
        panel = panels[block * len(steps) + steps.index(one["step"])][column]
        for label, (of_class, colour) in enumerate(zip(one["classes"], ("tab:blue", "tab:orange"), strict=True)):
            panel.plot(one["along"], of_class["true"], "--", color=colour, linewidth=1.0)
            panel.plot(one["along"], of_class["implied"], color=colour, label=f"label {label}")
        panel.set_title(f"{one['case'].replace('_', ', ')}; step {one['step']}", fontsize=7)
        panel.tick_params(labelsize=6)
    panels[0][0].legend(fontsize=6)
    chart.supxlabel("h, along the line through the classes' means", fontsize=8)
    chart.supylabel("loss (dashed: true)", fontsize=8)
    return chart


def dissimilarity_figure(matrices: Mapping[str, np.ndarray]) -> "Figure":
    """A row for each signal, some layers from the first to the last; images are in the order of their labels."""
    from matplotlib.figure import Figure

    depth = len(next(iter(matrices.values())))
    shown = sorted({round(i) for i in np.linspace(0, depth - 1, min(depth, 7))} | {depth // 2})
    chart = Figure(figsize=(1.5 * len(shown) + 1.0, 1.6 * len(matrices)), dpi=110, layout="constrained")
    panels = chart.subplots(len(matrices), len(shown), squeeze=False)
    for row, (arm, of_layers) in zip(panels, matrices.items(), strict=True):
        for panel, i in zip(row, shown, strict=True):
            drawn = panel.imshow(of_layers[i].astype(np.float32), vmin=0.0, vmax=1.5, cmap="viridis")
            panel.set(xticks=[], yticks=[])
            panel.set_title(f"layer {i + 1}", fontsize=7)
        row[0].set_ylabel(arm, fontsize=8)
    chart.colorbar(drawn, ax=panels.ravel().tolist(), shrink=0.6, label="1 - correlation")
    return chart


def layers_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """By layer: the error of linear probes, dissimilarity between less within classes, and distance to the last layer."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(11.0, 3.2), dpi=110, layout="constrained")
    probes, contrast, distance = chart.subplots(1, 3)
    for row in rows:
        layers = range(1, len(row["layers"]) + 1)
        probes.plot(layers, [layer["probe_error"] for layer in row["layers"]], label=row["arm"])
        contrast.plot(layers, [layer["between"] - layer["within"] for layer in row["layers"]])
        distance.plot(layers, [layer["distance_to_last"] for layer in row["layers"]])
    probes.set(xlabel="layer", title="test error of a linear probe", yscale="log")
    contrast.set(xlabel="layer", title="dissimilarity between less within classes")
    distance.set(xlabel="layer", title="distance to the last layer's")
    probes.legend(fontsize=7)
    return chart


def signals_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Test error against steps, and the cosine with the true gradient by layer."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(8.0, 3.2), dpi=110, layout="constrained")
    errors, cosines = chart.subplots(1, 2)
    for row in rows:
        errors.plot(
            [point["step"] for point in row["curve"]], [point["error"] for point in row["curve"]], label=row["arm"]
        )
        cosines.plot(range(1, len(row["cosines"]) + 1), row["cosines"], "o-")
    errors.set(xlabel="step", title="test error", yscale="log")
    errors.legend(fontsize=7)
    cosines.set(xlabel="layer", title="cosine with the true gradient, at the end", ylim=(-0.25, 1.05))
    return chart


# Command line


def members(
    parts: Sequence[str],
    preset: str,
    given: Mapping[str, Any],
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[common.Member]:
    """All runs, seeds outermost.

    Args:
        parts: to run.
        preset: one of `PRESETS`.
        given: settings of the user, for all parts.
        arms: only these, in the parts that have them; None for the preset's.
        seeds: None for the preset's.

    Raises:
        ValueError: if a part or an arm is unknown, there is nothing to run, or a setting is out of range.
    """
    seeds = PRESETS[preset]["seeds"] if seeds is None else seeds
    common.check_each_once(parts=parts, seeds=seeds)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"parts: found {unknown[0]!r}, allowed {', '.join(PARTS)}")
    allowed = {arm for part in parts for arm in ARMS[part]}
    if unknown := [arm for arm in arms or () if arm not in allowed]:
        raise ValueError(f"arms: found {unknown[0]!r}, allowed {', '.join(sorted(allowed))}")
    matrix = []
    for seed in seeds:
        for part in parts:
            settings = dict(PRESETS[preset][part])
            of_part = settings.pop("arms")
            for arm in of_part if arms is None else [arm for arm in ARMS[part] if arm in arms]:
                config = UnderstandingConfig(**{**settings, **given, "part": part, "arm": arm, "seed": seed})
                cell = common.Cell(arm, config.num_layers)
                matrix.append(common.Member(f"{part}-{arm}-seed{seed}", cell, config))
    return matrix


def plan(arguments: Sequence[str] | None = None) -> common.Plan:
    """The runs of a command line: parts, a preset, arms and seeds, and every field of `UnderstandingConfig` to override it."""
    parser = common.matrix_parser("understanding", __doc__, PRESETS)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--arms", nargs="*", help="data sets or signals; by default the preset's")
    parser.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True)
    option, given = common.parse(parser, arguments, UnderstandingConfig, leave_out=("part", "arm", "seed"))
    matrix = members(option.parts, option.preset, given, arms=option.arms, seeds=option.seeds)
    return common.Plan(option, matrix, PRESETS[option.preset].get("jobs", 1))


main = functools.partial(common.main, "understanding", plan, run, summarize, table, draw=draw)


if __name__ == "__main__":
    main()
