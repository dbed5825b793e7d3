"""Linear and deep-linear models on artificial data: gaps of the loss, and the loss that a critic implies."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dni_rl
from dni_rl.critics import GradientRegression
from dni_rl.experiments import common
from dni_rl.experiments.theory.config import UnderstandingConfig

LINE_POINTS = 41  # of the line on which `surface` compares losses


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
        self.set_net(_SigmoidForm(state_size))

    def _gradient(self, net: nn.Module, joined: Tensor, context: Tensor | None) -> Tensor:
        self._check_context(joined, context)
        assert context is not None
        return net(torch.cat([joined, context.to(joined.dtype)], dim=-1)) * self.target_rms


@dataclass(frozen=True)
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
        rates = (config.learning_rate, config.critic_learning_rate)
        if case.model == "linear":
            rates = (config.linear_learning_rate, config.linear_critic_learning_rate)
        self.modules = nn.ModuleDict({"lower": self.lower, "upper": self.upper}).to(config.device).double()
        self.optimizers = [torch.optim.Adam(self.modules.parameters(), rates[0])]
        if self.critic is not None:
            self.critic.to(config.device).double()
            self.optimizers.append(torch.optim.Adam(self.critic.parameters(), rates[1]))
        self.learning_rates = rates[: len(self.optimizers)]
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
        metrics = {}
        drop_steps = self.config.learning_rate_drop_steps
        for student in self.students:
            common.set_learning_rates(student.optimizers, student.learning_rates, drop_steps, self.step)
            metrics[f"loss/{student.case}"] = student.update(self.x, self.y)
        self.step += 1
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
def surface(student: Student, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The true and the implied loss, on the line through the two classes' means of h, as far as the data reach along it.

    A loss is known from its gradient up to a constant, for each label; it is set so that the two agree on average where the data are.
    The error is the RMS of what remains there, over the standard deviation of the true loss there. Of a model that has diverged all of
    it is NaN.

    Args:
        student: with a critic.
        x: [N, D].
        y: [N, 1].
    """
    assert student.critic is not None
    h = student.lower(x)
    is_one = y.squeeze(1) > 0.5
    means = [h[~is_one].mean(0), h[is_one].mean(0)]
    direction = (means[1] - means[0]) / (means[1] - means[0]).norm().clamp_min(1e-12)
    along = (h - means[0]) @ direction
    line = torch.linspace(along.min().item(), along.max().item(), LINE_POINTS, dtype=h.dtype, device=h.device)
    path = means[0] + line.unsqueeze(1) * direction
    found: dict[str, Any] = {"case": str(student.case), "along": line.tolist(), "classes": []}
    if not line.isfinite().all():  # the model has diverged
        nowhere = [math.nan] * LINE_POINTS
        return {**found, "classes": [{"true": nowhere, "implied": nowhere, "error": math.nan} for _ in means]}
    for label, rows in enumerate((~is_one, is_one)):
        label_of_path = y.new_full((LINE_POINTS, 1), float(label))
        true = losses_of(student.case.loss, student.upper(path), label_of_path)
        implied = implied_loss(student.critic, path, y.new_full((1,), float(label)))
        share = torch.histc(along[rows], LINE_POINTS, line[0].item(), line[-1].item())
        share = share / share.sum()
        implied = implied + (share * (true - implied)).sum()
        deviation = (share * (true - (share * true).sum()).square()).sum().sqrt()
        error = (share * (true - implied).square()).sum().sqrt() / deviation.clamp_min(1e-12)
        found["classes"].append({"true": true.tolist(), "implied": implied.tolist(), "error": error.item()})
    return found
