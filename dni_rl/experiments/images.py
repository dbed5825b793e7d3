"""Classifying images with every layer decoupled: Jaderberg et al., "Decoupled Neural Interfaces" (2017), sec. 3.1.

python -m dni_rl.experiments.images --preset laptop --arm cdni --run-folder runs/images/cdni
python -m dni_rl.experiments.images --preset laptop --arm dni --update-probability 0.2 --run-folder runs/images/dni-0.2
python -m dni_rl.experiments.images --preset laptop --arm cdni --unlocked --run-folder runs/images/unlocked
python -m dni_rl.experiments.images --preset laptop --model cnn --arms --run-folder runs/images/cnn
python -m dni_rl.experiments.images --preset laptop --model greedy_cnn --arms --run-folder runs/greedy
python -m dni_rl.experiments.images --preset laptop --arms --seeds 3 --validation-size 10000 --run-folder runs/images/rates

A fully connected net, or with `--model cnn` a convolutional one (see `conv_layers`), learns by backpropagation, by its last layer
alone ("none"), or with a synthetic gradient above every layer,
plain ("dni") or conditioned on the label ("cdni"); decoupled layers may also learn now and then, in random order, or on synthetic inputs.
A run's folder holds config.json, metrics.jsonl, result.json, TensorBoard events and a checkpoint, from which `--resume` continues as if the
run had never stopped. With --arms there is one run for each arm and seed, in folders below, and a summary.json with the table of all.
To choose settings there is --validation-size: errors are those of training images that are held out, and the test split is not read.

`--model greedy_cnn` is a published negative result, run again: Belilovsky et al., "Decoupled greedy learning of CNNs" (2020),
report that on CIFAR-10 a net of three convolutions reaches 84.7 % by backpropagation, 82.2 % with cDNI and 62.3 % with DNI. In the
code that they published the critic's last layer starts with zero weights, but with a random bias, and predicts the gradient of
the mean over the batch, beside which that bias is enormous. Net, critic, batch and learning rate are theirs; the arms "dni" and
"cdni" start at zero, and have normalised targets. With a suffix they are

    dni-random_bias    normalised targets, and the random bias, which is then small beside them
    dni-batch_unit     the zero start, and targets as gradients of the batch's mean
    dni-published      both as published
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rl import data
from dni_rl.critics import ConvGradientCritic, GradientCritic, dense_net
from dni_rl.experiments import common
from dni_rl.feedforward import DecoupledSequential

ARMS = ("backprop", "none", "dni", "cdni")
DATASETS = ("mnist", "fashion_mnist", "cifar10", "synthetic", "synthetic_rgb")
MODELS = ("dense", "cnn", "greedy_cnn")
NUM_CLASSES = 10
# Settings that the suffix of an arm stands for; see above.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "random_bias": {"critic_start": "random_bias"},
    "batch_unit": {"target_unit": "batch_mean"},
    "published": {"critic_start": "random_bias", "target_unit": "batch_mean"},
}
# Test errors by model, data set, arm and number of layers. Those of dense and cnn: Jaderberg et al. (2017), as secondary sources
# quote them. Those of greedy_cnn: Belilovsky et al. (2020).
PUBLISHED = {
    ("dense", "mnist", "none"): {3: 0.093, 4: 0.126, 5: 0.162, 6: 0.214},
    ("dense", "mnist", "backprop"): {3: 0.020, 4: 0.018, 5: 0.018, 6: 0.018},
    ("dense", "mnist", "dni"): {3: 0.019, 4: 0.022, 5: 0.034, 6: 0.043},
    ("dense", "mnist", "cdni"): {3: 0.022, 4: 0.019, 5: 0.017, 6: 0.016},
    ("dense", "cifar10", "none"): {3: 0.549, 4: 0.572, 5: 0.596, 6: 0.619},
    ("dense", "cifar10", "backprop"): {3: 0.435, 4: 0.430, 5: 0.417, 6: 0.420},
    ("dense", "cifar10", "dni"): {3: 0.425, 4: 0.450, 5: 0.469, 6: 0.497},
    ("dense", "cifar10", "cdni"): {3: 0.485, 4: 0.451, 5: 0.435, 6: 0.468},
    ("cnn", "mnist", "none"): {3: 0.009, 4: 0.028},
    ("cnn", "mnist", "backprop"): {3: 0.008, 4: 0.006},
    ("cnn", "mnist", "dni"): {3: 0.009, 4: 0.007},
    ("cnn", "mnist", "cdni"): {3: 0.010, 4: 0.008},
    ("cnn", "cifar10", "none"): {3: 0.287, 4: 0.381},
    ("cnn", "cifar10", "backprop"): {3: 0.179, 4: 0.157},
    ("cnn", "cifar10", "dni"): {3: 0.195, 4: 0.195},
    ("cnn", "cifar10", "cdni"): {3: 0.190, 4: 0.164},
    ("greedy_cnn", "cifar10", "backprop"): {4: 0.153},
    ("greedy_cnn", "cifar10", "dni-published"): {4: 0.377},
    ("greedy_cnn", "cifar10", "cdni-published"): {4: 0.178},
}


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """One run. Defaults are the paper's for MNIST, as far as it states them."""

    arm: str = "cdni"
    model: str = "dense"  # or "cnn", "greedy_cnn"
    dataset: str = (
        "mnist"  # "synthetic" and "synthetic_rgb" need no files: ten noisy patterns, 8 x 8 grey and 32 x 32 in colour
    )
    num_layers: int = 4  # with weights, the output layer too; the paper: 3 to 6; cnn: 3 or 4; greedy_cnn: always 4
    hidden_size: int = 256  # the paper: 256 on MNIST, 1000 on CIFAR-10; of cnn filters, 64 and 128; greedy_cnn: 128
    # The paper, MNIST: 1024 1024 for DNI, none (linear) for cDNI; cnn: channels, for both 64 64 on MNIST, 128 128 on CIFAR-10
    critic_hidden_sizes: tuple[int, ...] = ()
    critic_start: str = "zero"  # cnn, greedy_cnn: or "random_bias", of the critic's last layer
    target_unit: str = "rms"  # cnn, greedy_cnn: normalised targets, or "batch_mean", gradients of the batch's mean
    validation_size: int = 0  # the last so many training images are held out, and errors are theirs
    augment: bool = False  # whether training images are shifted by up to 4 pixels and mirrored
    update_probability: float = 1.0  # of each layer at each step
    unlocked: bool = False  # whether layers compute on synthetic inputs
    batch_size: int = 256
    num_steps: int = 500_000
    learning_rate: float = 3e-5  # Adam, for layers
    critic_learning_rate: float | None = None  # Adam, for critics; None for the same
    input_learning_rate: float | None = None  # Adam, for input models; None for that of the layers
    learning_rate_drop_steps: tuple[int, ...] = (300_000, 400_000)  # all are divided by 10 at each
    log_every_steps: int = 100
    eval_every_steps: int = 5_000
    checkpoint_every_steps: int = 5_000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, arm=ARMS, dataset=DATASETS, model=MODELS)
        common.check_allowed(self, critic_start=("zero", "random_bias"), target_unit=("rms", "batch_mean"))
        common.check_at_least(self, 2, "num_layers")
        self._check_model()
        counts = ("hidden_size", "num_steps", "log_every_steps", "eval_every_steps", "checkpoint_every_steps")
        common.check_at_least(self, 1, *counts)
        if self.batch_size < 2:
            raise ValueError(f"batch_size: found {self.batch_size}, allowed 2 or more, for batch normalisation")
        common.check_at_least(self, 0, "validation_size")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate: found {self.learning_rate}, allowed above 0")
        for name in ("critic_learning_rate", "input_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0.0:
                raise ValueError(f"{name}: found {rate}, allowed above 0, or none for that of the layers")
        common.check_critic(self)
        if self.arm == "backprop" and (self.unlocked or self.update_probability != 1.0):
            raise ValueError("arm: 'backprop' is locked; leave out --unlocked and --update-probability")

    def _check_model(self) -> None:
        if self.model == "dense":
            if (self.critic_start, self.target_unit) != ("zero", "rms"):
                raise ValueError(
                    f"critic_start, target_unit: found {self.critic_start}, {self.target_unit}, allowed zero, rms with model dense; "
                    "use --model cnn or --model greedy_cnn"
                )
            return
        if self.model == "greedy_cnn" and (self.num_layers != 4 or self.unlocked or self.critic_hidden_sizes):
            raise ValueError(
                "model: greedy_cnn has 4 layers, a critic of its own and no synthetic inputs; leave out --num-layers, "
                "--critic-hidden-sizes and --unlocked"
            )
        if self.num_layers not in (3, 4):
            raise ValueError(f"num_layers: found {self.num_layers}, allowed 3 or 4 with model cnn, or --model dense")
        if self.unlocked:
            raise ValueError(
                "unlocked: found True with model cnn, allowed False; use --model dense for synthetic inputs"
            )
        if self.dataset == "synthetic":
            raise ValueError(
                f"dataset: found 'synthetic', too small for model {self.model}; use --dataset synthetic_rgb"
            )


PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that the program runs
    "smoke": {
        "dataset": "synthetic",
        "hidden_size": 32,
        "batch_size": 32,
        "num_steps": 400,
        "learning_rate": 1e-2,
        "learning_rate_drop_steps": (),
        "log_every_steps": 20,
        "eval_every_steps": 200,
        "checkpoint_every_steps": 200,
    },
    # Under half an hour on two cores. Critics have to keep up with layers that move. With the label ten times their rate is enough; plain
    # DNI needs critics that could do the layers' own task, and layers so slow that these can follow (docs/results/log.md).
    "laptop": {
        "jobs": 2,
        "num_steps": 8_000,
        "learning_rate": 1e-3,
        "learning_rate_drop_steps": (5_500, 7_000),
        "eval_every_steps": 500,
        "checkpoint_every_steps": 1_000,
        "of_arms": {
            "dni": {"learning_rate": 3e-5, "critic_learning_rate": 3e-3, "critic_hidden_sizes": (512, 512)},
            "cdni": {"critic_learning_rate": 1e-2},
        },
    },
    "paper": {"of_arms": {"dni": {"critic_hidden_sizes": (1024, 1024)}}},
}


GREEDY_PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that the program runs
    "smoke": {
        "arms": ("backprop", "dni", "cdni", "dni-published"),
        "seeds": (0,),
        "dataset": "synthetic_rgb",
        "hidden_size": 4,
        "batch_size": 16,
        "num_steps": 32,
        "learning_rate": 1e-2,
        "learning_rate_drop_steps": (),
        "log_every_steps": 8,
        "eval_every_steps": 16,
        "checkpoint_every_steps": 16,
    },
    # Under half an hour on two cores. What to look at are cdni and its variant: in so few steps a critic that does not see the label
    # explains next to nothing of the topmost gradient, however it starts.
    "laptop": {
        "arms": ("backprop", "none", "dni", "cdni", "dni-published", "cdni-published"),
        "seeds": (0, 1, 2),
        "jobs": 2,
        "dataset": "cifar10",
        "hidden_size": 16,
        "batch_size": 128,
        "num_steps": 2_000,
        "learning_rate": 1e-3,
        "learning_rate_drop_steps": (),
        "eval_every_steps": 250,
        "checkpoint_every_steps": 500,
    },
    # 2,000 epochs, which is how long the published runs are logged
    "paper": {
        "arms": ("backprop", "none", *(f"{arm}-{v}".rstrip("-") for arm in ("dni", "cdni") for v in VARIANTS)),
        "seeds": (0, 1, 2),
        "dataset": "cifar10",
        "hidden_size": 128,
        "augment": True,
        "num_steps": 390_000,
        "learning_rate_drop_steps": (),
    },
}


# The paper's filters and critics where a preset does not name any: `make_config`.
CNN_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**GREEDY_PRESETS["smoke"], "arms": ARMS},
    # Under half an hour on two cores. Three layers: with four the last critic sees one number of each filter, too little for plain DNI
    # with 16 filters and so few steps. At equal learning rates of layers and critics plain DNI gained little on "none".
    "laptop": {
        "arms": ARMS,
        "seeds": (0, 1, 2),
        "jobs": 2,
        "num_layers": 3,
        "hidden_size": 16,
        "batch_size": 128,
        "num_steps": 2_000,
        "learning_rate": 3e-4,
        "critic_learning_rate": 3e-3,
        "learning_rate_drop_steps": (1_600, 1_800),
        "eval_every_steps": 200,
        "checkpoint_every_steps": 500,
    },
    "paper": {"arms": ARMS, "seeds": (0, 1, 2)},
}
CONV_PRESETS = {"cnn": CNN_PRESETS, "greedy_cnn": GREEDY_PRESETS}


def settings_of(preset: str, model: str) -> dict[str, Any]:
    """A preset's settings for a model, with the arms, seeds and jobs of its matrix, and what single arms have otherwise ("of_arms")."""
    if model in CONV_PRESETS:
        return {"model": model, "jobs": 1, **CONV_PRESETS[model][preset]}
    return {"arms": ARMS, "seeds": (0,) if preset == "smoke" else (0, 1, 2), "jobs": 1, **PRESETS[preset]}


def make_config(preset: str, **overrides: Any) -> ImagesConfig:
    """A preset with settings replaced; the paper's filters and critics where neither says otherwise."""
    of_preset = settings_of(preset, overrides.get("model", "dense"))
    of_arm = of_preset.pop("of_arms", {}).get(overrides.get("arm", ImagesConfig.arm), {})
    settings = {**of_preset, **of_arm, **overrides}
    for name in ("arms", "seeds", "jobs"):
        settings.pop(name)
    model = settings.get("model", "dense")
    if model == "cnn":
        settings.setdefault("hidden_size", 128 if settings.get("dataset") == "cifar10" else 64)
        settings.setdefault("critic_hidden_sizes", (settings["hidden_size"],) * 2)
    if model == "dense" and settings.get("dataset") == "cifar10":
        settings.setdefault("hidden_size", 1_000)
    share = settings.get("update_probability", 1.0)
    if preset == "laptop" and 0.0 < share < 1.0:
        # So few steps are too few at a fifth of the updates: as many updates of a layer as without. The paper has as many steps.
        longer = {"num_steps": round(of_preset["num_steps"] / share)}
        longer["learning_rate_drop_steps"] = tuple(round(s / share) for s in of_preset["learning_rate_drop_steps"])
        settings |= {name: value for name, value in longer.items() if name not in overrides}
    return ImagesConfig(**settings)


# Data


def evaluated_split(config: ImagesConfig) -> str:
    """Whose errors a run measures: "test", or "validation"."""
    return "validation" if config.validation_size else "test"


def splits(config: ImagesConfig) -> tuple[data.Images, data.Images]:
    """The images that a run learns from, and those that it is evaluated on.

    Raises:
        ValueError: if nothing is left to learn from.
    """
    train, size = load(config.dataset, "train"), config.validation_size
    if not size:
        return train, load(config.dataset, "test")
    if size >= len(train.labels):
        raise ValueError(f"validation_size: found {size}, allowed less than the {len(train.labels)} training images")
    held_out = data.Images(train.images[-size:], train.labels[-size:])
    return data.Images(train.images[:-size], train.labels[:-size]), held_out


@functools.cache  # the runs of one process read it once
def load(dataset: str, split: data.Split) -> data.Images:
    """Images and labels of a data set by its name; synthetic ones are drawn, the same every time. Not to be written to."""
    if dataset == "synthetic_rgb":
        small = load("synthetic", split)
        return data.Images(small.images.repeat(1, 3, 4, 4)[:256], small.labels[:256])
    if dataset != "synthetic":
        return {"mnist": data.mnist, "fashion_mnist": data.fashion_mnist, "cifar10": data.cifar10}[dataset](split)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (NUM_CLASSES, 1, 8, 8), generator=generator)
    generator.manual_seed(1 if split == "train" else 2)
    labels = torch.randint(0, NUM_CLASSES, (1024 if split == "train" else 256,), generator=generator)
    noise = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=generator)
    return data.Images(((patterns[labels] + 2 * noise) // 3).to(torch.uint8), labels)


class Batches:
    """Pixels in [-0.5, 0.5] as vectors, in an order that depends on seed and step alone, so that a resumed run sees the same.

    Args:
        images: to draw from.
        batch_size: B.
        seed: of the order.
        device: of what is drawn.
        augment: whether images are shifted and mirrored at random, `augmented`.
    """

    def __init__(self, images: data.Images, batch_size: int, seed: int, device: str, augment: bool = False):
        if len(images.labels) < batch_size:
            raise ValueError(
                f"batch_size: found {batch_size}, allowed at most {len(images.labels)}, the number of images"
            )
        self.images, self.labels = images.images.to(device), images.labels.to(device)
        self.batch_size, self.seed, self.epoch, self.augment = batch_size, seed, -1, augment

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, len(self.labels) // self.batch_size)
        if epoch != self.epoch:
            self.epoch = epoch
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self.order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        rows = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        chosen = self.images[rows]
        if self.augment:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
            chosen = augmented(chosen, generator)
        return pixels(chosen), self.labels[rows]


def augmented(images: Tensor, generator: torch.Generator, margin: int = 4) -> Tensor:
    """Images [N, C, Y, X] shifted by up to `margin` pixels each way, with black moved in, and half of them mirrored."""
    N, _, Y, X = images.shape
    device = images.device
    shift = torch.randint(2 * margin + 1, (2, N, 1), generator=generator).to(device)
    mirrored = (torch.rand(N, 1, generator=generator) < 0.5).to(device)
    rows, columns = shift[0] + torch.arange(Y, device=device), torch.arange(X, device=device).expand(N, -1)
    columns = shift[1] + torch.where(mirrored, X - 1 - columns, columns)  # [N, X], as rows [N, Y] of the padded image
    padded = F.pad(images, (margin,) * 4).permute(0, 2, 3, 1)  # [N, Y + 2 margin, X + 2 margin, C]
    which = torch.arange(N, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def pixels(images: Tensor) -> Tensor:
    """[N, C, Y, X] uint8 to [N, C * Y * X] in [-0.5, 0.5]."""
    return images.flatten(1).float() / 255.0 - 0.5


# Net


def dense_layers(config: ImagesConfig, num_inputs: int) -> list[nn.Module]:
    """A fully connected net: `num_layers - 1` hidden layers with batch normalisation and ReLU, and an output layer."""
    widths = [num_inputs, *[config.hidden_size] * (config.num_layers - 1)]
    return [*_hidden_layers(widths), nn.Linear(config.hidden_size, NUM_CLASSES)]


def _hidden_layers(widths: Sequence[int]) -> list[nn.Sequential]:
    """From each width to the next, with batch normalisation and ReLU."""
    return [
        nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
        for inputs, outputs in itertools.pairwise(widths)
    ]


def conv_layers(
    num_layers: int, channels: int, shape: tuple[int, int, int]
) -> tuple[list[nn.Module], list[tuple[int, int, int]]]:
    """The convolutional net of Jaderberg et al. (2017), and with 4 layers that of Belilovsky et al. (2020), who keep all layers apart.

    `num_layers - 1` blocks, each a padded 5 x 5 convolution, batch normalisation, ReLU and pooling of 3 x 3 pixels to one, max in the
    first and mean in the others; then a linear layer. That the windows of pooling do not overlap is the reading of the latter.

    Args:
        num_layers: with weights.
        channels: of each block.
        shape: (C, Y, X) of an image, which comes as a vector; Y and X at least 3^(num_layers - 1).

    Returns:
        The layers, and (C, Y, X) of what each block puts out.
    """
    layers: list[nn.Module] = []
    shapes = [shape]
    for i in range(num_layers - 1):
        inputs, Y, X = shapes[-1]
        pool = nn.AvgPool2d(3) if i else nn.MaxPool2d(3)
        block = (nn.Conv2d(inputs, channels, 5, padding=2), nn.BatchNorm2d(channels), nn.ReLU(), pool)
        layers.append(nn.Sequential(*([] if layers else [nn.Unflatten(1, shape)]), *block))
        shapes.append((channels, Y // 3, X // 3))
    C, Y, X = shapes[-1]
    return [*layers, nn.Sequential(nn.Flatten(), nn.Linear(C * Y * X, NUM_CLASSES))], shapes[1:]


class DenseLayerCritic(GradientCritic):
    """The critic of Jaderberg et al. (2017) between the layers of `dense_layers`, with hidden layers as theirs.

    Batch normalisation and ReLU follow each; the label, if there is any, is an input. Between such layers it learns far more than
    `GradientCritic` with hidden layers of tanh (docs/results/log.md). The last layer starts at zero.

    Args:
        width: of the activation.
        hidden_sizes: of its hidden layers, at least one.
        context_size: Z.
    """

    def __init__(self, width: int, hidden_sizes: Sequence[int], context_size: int):
        super().__init__(state_sizes=(width,), context_size=context_size)
        widths = [width + context_size, *hidden_sizes]
        last = dense_net(widths[-1], (), width)
        self.set_net(nn.Sequential(*_hidden_layers(widths), last))


class _Synthesizer(nn.Module):
    """Padded 5 x 5 convolutions with batch normalisation and ReLU between; the label is added, through a linear map, to the first."""

    def __init__(self, channels: int, hidden_channels: Sequence[int], context_size: int, zero_bias: bool):
        super().__init__()
        self.channels = channels
        widths = [channels, *hidden_channels, channels]
        *hidden, self.last = (nn.Conv2d(i, o, 5, padding=2) for i, o in itertools.pairwise(widths))
        self.hidden = nn.ModuleList(hidden)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in hidden_channels])
        self.context = nn.Linear(context_size, widths[1], bias=bool(hidden)) if context_size else None
        nn.init.zeros_(self.last.weight)
        if self.context is not None and not hidden:
            nn.init.zeros_(self.context.weight)  # adds to the prediction itself
        if zero_bias:
            assert self.last.bias is not None
            nn.init.zeros_(self.last.bias)

    def forward(self, maps: Tensor) -> Tensor:
        x = maps[:, : self.channels]
        # constant over the map
        label = 0.0 if self.context is None else self.context(maps[:, self.channels :, 0, 0])[:, :, None, None]
        for conv, norm in zip(self.hidden, self.norms, strict=True):
            x, label = norm(conv(x) + label).relu(), 0.0
        return self.last(x) + label


class LayerCritic(ConvGradientCritic):
    """The critic of Jaderberg et al. (2017) and Belilovsky et al. (2020) between the layers of `conv_layers`.

    With `target_unit` "batch_mean" the unit of its targets, and of its predictions, is not their running RMS but the batch size: then
    its net predicts the gradient of the mean loss over the batch, and regresses on that.

    Args:
        shape: (C, Y, X) of the activation.
        hidden_channels: of its hidden layers; theirs has two, as wide as the activation.
        context_size: Z.
        config: of the run.
    """

    def __init__(
        self, shape: tuple[int, int, int], hidden_channels: Sequence[int], context_size: int, config: ImagesConfig
    ):
        super().__init__(state_shapes=(shape,), context_size=context_size)
        self.set_net(_Synthesizer(shape[0], hidden_channels, context_size, zero_bias=config.critic_start == "zero"))
        self._has_fixed_unit = config.target_unit == "batch_mean"
        if self._has_fixed_unit:
            self.target_rms.fill_(config.batch_size)

    def _update_target_statistics(self, square: Tensor) -> None:
        if self._has_fixed_unit:
            self.num_updates += 1
        else:
            super()._update_target_statistics(square)


def _critics(config: ImagesConfig, shapes: Sequence[tuple[int, int, int]]) -> list[nn.Module | None]:
    """One for each hidden layer; `shapes` are those of convolutional ones."""
    if config.arm not in ("dni", "cdni"):
        return [None] * (config.num_layers - 1)
    context_size = NUM_CLASSES if config.arm == "cdni" else 0
    hidden = (config.hidden_size,) * 2 if config.model == "greedy_cnn" else config.critic_hidden_sizes
    if config.model != "dense":
        return [LayerCritic(shape, hidden, context_size, config) for shape in shapes]
    if hidden:
        return [DenseLayerCritic(config.hidden_size, hidden, context_size) for _ in range(config.num_layers - 1)]
    return [
        GradientCritic(state_sizes=(config.hidden_size,), context_size=context_size)
        for _ in range(config.num_layers - 1)
    ]


class Experiment:
    """The net of a run with its critics and optimisers."""

    def __init__(self, config: ImagesConfig, num_inputs: int):
        torch.manual_seed(config.seed)
        shapes: list[tuple[int, int, int]] = []
        if config.model == "dense":
            layers = dense_layers(config, num_inputs)
        else:
            layers, shapes = conv_layers(config.num_layers, config.hidden_size, _shape(num_inputs))
        critics = _critics(config, shapes)
        input_models = [
            nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width))
            for width in [config.hidden_size] * (config.num_layers - 1)
            if config.unlocked
        ]
        for module in (*layers, *critics, *input_models):
            if module is not None:
                module.to(config.device)
        of_layers = [torch.optim.Adam(layer.parameters(), config.learning_rate) for layer in layers]
        critic_rate = config.learning_rate if config.critic_learning_rate is None else config.critic_learning_rate
        of_critics = [None if c is None else torch.optim.Adam(c.parameters(), critic_rate) for c in critics]
        input_rate = config.learning_rate if config.input_learning_rate is None else config.input_learning_rate
        of_inputs = [torch.optim.Adam(model.parameters(), input_rate) for model in input_models]
        self.config = config
        self.optimizers = [o for o in (*of_layers, *of_critics, *of_inputs) if o is not None]
        self.learning_rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.net = DecoupledSequential(
            layers,
            critics,
            of_layers,
            of_critics,
            mode="locked" if config.arm == "backprop" else "unlocked" if config.unlocked else "decoupled",
            update_probability=config.update_probability,
            input_models=input_models,
            input_optimizers=of_inputs,
            seed=config.seed,
        )

    def update(self, step: int, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step; returns metrics, still on the device."""
        self.set_learning_rates(step)
        report = self.net.update(
            x,
            lambda logits: F.cross_entropy(logits, labels, reduction="none"),
            F.one_hot(labels, NUM_CLASSES) if self.config.arm == "cdni" else None,
        )
        metrics = {
            "train/loss": report.losses.mean(),
            "train/error": (report.outputs.argmax(-1) != labels).float().mean(),
        }
        for i, fit in enumerate(report.fits):
            if fit is not None:
                metrics |= {f"critic_{i + 1}/{name}": value for name, value in fit.as_dict().items()}
        for i, loss in enumerate(report.input_losses):
            if loss is not None:
                metrics[f"input_{i + 1}/loss"] = loss
        return metrics

    def set_learning_rates(self, step: int) -> None:
        """Sets those of `step`."""
        common.set_learning_rates(self.optimizers, self.learning_rates, self.config.learning_rate_drop_steps, step)

    def error(self, images: data.Images) -> float:
        """Share of images classified wrongly, batch normalisation in eval mode."""
        self.net.eval()
        try:
            with torch.no_grad():
                wrong = sum(
                    (self.net(pixels(x)).argmax(-1) != labels).sum()
                    for x, labels in zip(images.images.split(1000), images.labels.split(1000), strict=True)
                )
        finally:
            self.net.train()
        return float(wrong) / len(images.labels)


def _shape(num_pixels: int) -> tuple[int, int, int]:
    """(C, Y, X) of square images with so many pixels, those of colour channels together."""
    for channels in (1, 3):
        side = math.isqrt(num_pixels // channels)
        if channels * side**2 == num_pixels:
            return channels, side, side
    raise ValueError(f"images: found {num_pixels} numbers each, allowed square images, grey or of three colours")


# Run


class Training(common.Experiment):
    """A run in the making: the net, its images, and how far it has come."""

    config: ImagesConfig

    def __init__(self, config: ImagesConfig):
        super().__init__(config)
        train, evaluated = splits(config)
        self.batches = Batches(train, config.batch_size, config.seed, config.device, config.augment)
        self.evaluated = data.Images(evaluated.images.to(config.device), evaluated.labels.to(config.device))
        self.experiment = Experiment(config, train.images[0].numel())

    def update(self) -> dict[str, Tensor]:
        """Learns from the next batch; returns metrics, still on the device."""
        metrics = self.experiment.update(self.step, *self.batches[self.step])
        self.step += 1
        return metrics

    def evaluation(self) -> dict[str, float]:
        """Classifies the images that are not learned from, and appends to the curve."""
        error = self.experiment.error(self.evaluated)
        self.add_to_curve(error=error)
        return {f"{evaluated_split(self.config)}/error": error}

    def note(self) -> str:
        """The last error."""
        return f"{evaluated_split(self.config)} error {self.curve[-1]['error']:.1%}" if self.curve else ""

    def result(self) -> dict[str, Any]:
        """The error at the end, with its curve."""
        return {"error": self.curve[-1]["error"], **self.account()}

    def parts(self) -> dict[str, Any]:
        """The net, which holds critics and optimisers."""
        return {"net": self.experiment.net}


run = functools.partial(common.carry_out, Training, free=(*common.FREE_FIELDS, "eval_every_steps"))
"""One run, of an `ImagesConfig`: see `common.carry_out`. The result's "error" is that of the end, 0 to 1."""


# Matrices


def members(preset: str, arms: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any]) -> list[common.Member]:
    """One run for each seed and arm, seeds outermost.

    Args:
        preset: of the settings.
        arms: of `ARMS`, those with critics optionally with a suffix of `VARIANTS`, as in "dni-published".
        seeds: of each arm.
        given: settings of the user.

    Raises:
        ValueError: if arms or seeds are missing, repeated or unknown, or a setting is out of range.
    """
    common.check_each_once(arms=arms)
    common.check_seeds(seeds)
    known = (*ARMS, *(f"{arm}-{variant}" for arm in ("dni", "cdni") for variant in VARIANTS if variant))
    matrix = []
    for seed in seeds:
        for name in arms:
            if name not in known:
                raise ValueError(f"arms: found {name!r}, allowed {', '.join(known)}")
            arm, _, variant = name.partition("-")
            config = make_config(preset, **{**given, **VARIANTS[variant], "arm": arm, "seed": seed})
            matrix.append(common.Member(f"{name}-seed{seed}", common.Cell(name, config.num_layers), config))
    return matrix


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The table of a matrix: every arm's errors by seed, beside the published one."""
    config = matrix[0].config
    rows = []
    for cell, by_seed in common.by_cell(matrix, results).items():
        errors = [result["error"] for result in by_seed.values()]
        published = PUBLISHED.get((config.model, config.dataset, cell.arm), {}).get(cell.window)
        # the figures are of none of these
        if config.unlocked or config.update_probability != 1.0 or config.validation_size:
            published = None
        rows.append(
            {
                "arm": cell.arm,
                "num_layers": cell.window,
                "per_seed": {str(seed): result["error"] for seed, result in by_seed.items()},
                **common.spread(errors),
                "published": published,
                "seconds": common.mean(result["seconds"] for result in by_seed.values()),
            }
        )
    return {
        "experiment": "images",
        "model": config.model,
        "dataset": config.dataset,
        "split": evaluated_split(config),
        "rows": rows,
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown; errors in per cent."""

    def percent(error: float | None) -> str | None:
        return None if error is None else f"{100.0 * error:.2f}"

    rows = [
        (
            row["arm"],
            row["num_layers"],
            " ".join(f"{100.0 * error:.2f}" for error in row["per_seed"].values()),
            percent(row["mean"]),
            percent(row["std"]),
            percent(row["published"]),
            round(row["seconds"]),
        )
        for row in summary["rows"]
    ]
    header = ("arm", "layers", f"{summary['split']} error by seed, %", "mean", "std", "published", "seconds")
    return f"{summary['model']} on {summary['dataset']}\n\n{common.markdown(header, rows)}"


def plan(arguments: Sequence[str] | None = None) -> common.Plan:
    """The runs of a command line: a preset, every field of `ImagesConfig` to override it, and with --arms a matrix.

    Without --arms it is one run without a name, in the run folder itself.
    """
    parser = common.matrix_parser("images", __doc__, PRESETS)
    parser.add_argument(
        "--arms", nargs="*", help="one run for each of these, and each of --seeds; by default the preset's"
    )
    option, given = common.parse(parser, arguments, ImagesConfig)
    if option.arms is None:
        if option.seeds is not None or option.jobs is not None:
            raise ValueError("seeds, jobs: they belong to a matrix of runs; add --arms, or use --seed")
        config = make_config(option.preset, **given)
        common.check_seeds((config.seed,))
        return common.Plan(option, [common.Member("", common.Cell(config.arm, config.num_layers), config)])
    if "arm" in given or "seed" in given:
        raise ValueError("arm, seed: they belong to one run; leave out --arms, or use --arms and --seeds alone")
    of_preset = settings_of(option.preset, given.get("model", "dense"))
    seeds = of_preset["seeds"] if option.seeds is None else option.seeds
    return common.Plan(
        option, members(option.preset, option.arms or of_preset["arms"], seeds, given), of_preset["jobs"]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a single run ends with a line on its error."""
    with common.one_line_errors("images"):
        asked = plan(arguments)
        option = asked.option
        if option.arms is None:
            config = asked.matrix[0].config
            error = run(config, option.run_folder, resume=option.resume, tensorboard=option.tensorboard)["error"]
            print(
                f"{config.arm} on {config.dataset}, {config.num_layers} layers, {config.num_steps} steps: "
                f"{evaluated_split(config)} error {error:.2%}"
            )
            return
    common.main("images", lambda _: asked, run, summarize, table)


if __name__ == "__main__":
    main()
