"""Classifying images with every layer decoupled: Jaderberg et al., "Decoupled Neural Interfaces" (2017), sec. 3.1.

python -m dni_rl.experiments.images --preset laptop --arm cdni --run-folder runs/images/cdni
python -m dni_rl.experiments.images --preset laptop --arm dni --update-probability 0.2 --run-folder runs/images/dni-0.2
python -m dni_rl.experiments.images --preset laptop --arm cdni --unlocked --run-folder runs/images/unlocked

A fully connected net learns by backpropagation, by its last layer alone ("none"), or with a synthetic gradient above every layer,
plain ("dni") or conditioned on the label ("cdni"); decoupled layers may also learn now and then, in random order, or on synthetic inputs.
A run's folder holds config.json, metrics.jsonl, TensorBoard events and a checkpoint, from which `--resume` continues as if the run had
never stopped.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rl import data
from dni_rl.critics import CriticFit, GradientCritic
from dni_rl.experiments import common
from dni_rl.feedforward import DecoupledSequential

ARMS = ("backprop", "none", "dni", "cdni")
DATASETS = ("mnist", "fashion_mnist", "cifar10", "synthetic")
NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """One run. Defaults are the paper's for MNIST, as far as it states them."""

    arm: str = "cdni"
    dataset: str = "mnist"  # "synthetic" needs no files: ten noisy patterns
    num_layers: int = 4  # with weights, the output layer among them; the paper: 3 to 6
    hidden_size: int = 256  # the paper: 256 on MNIST, 1000 on CIFAR-10
    critic_hidden_sizes: tuple[int, ...] = ()  # the paper, MNIST: 1024 1024 for DNI, none (linear) for cDNI
    update_probability: float = 1.0  # of each layer at each step
    unlocked: bool = False  # whether layers compute on synthetic inputs
    batch_size: int = 256
    num_steps: int = 500_000
    learning_rate: float = 3e-5  # Adam, for layers, critics and input models
    learning_rate_drop_steps: tuple[int, ...] = (300_000, 400_000)  # divided by 10 at each
    log_every_steps: int = 100
    eval_every_steps: int = 5_000
    checkpoint_every_steps: int = 5_000
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        common.check_allowed(self, arm=ARMS, dataset=DATASETS)
        common.check_at_least(self, 2, "num_layers")
        counts = ("hidden_size", "num_steps", "log_every_steps", "eval_every_steps", "checkpoint_every_steps")
        common.check_at_least(self, 1, *counts)
        if self.batch_size < 2:
            raise ValueError(f"batch_size: found {self.batch_size}, allowed 2 or more, for batch normalisation")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate: found {self.learning_rate}, allowed above 0")
        if self.arm == "backprop" and (self.unlocked or self.update_probability != 1.0):
            raise ValueError("arm: 'backprop' is locked; leave out --unlocked and --update-probability")


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
    # minutes on a CPU
    "laptop": {
        "num_steps": 6_000,
        "learning_rate": 1e-3,
        "learning_rate_drop_steps": (4_000, 5_000),
        "eval_every_steps": 500,
        "checkpoint_every_steps": 1_000,
    },
    "paper": {},
}


def make_config(preset: str, **overrides: Any) -> ImagesConfig:
    """A preset with settings replaced; the paper's critic for plain DNI where neither says otherwise."""
    settings = {**PRESETS[preset], **overrides}
    if preset != "smoke" and settings.get("arm") == "dni":
        settings.setdefault("critic_hidden_sizes", (1024, 1024))
    return ImagesConfig(**settings)


# Data


def load(dataset: str, split: data.Split) -> data.Images:
    """Images and labels of a data set by its name; "synthetic" is drawn, the same every time."""
    if dataset != "synthetic":
        return {"mnist": data.mnist, "fashion_mnist": data.fashion_mnist, "cifar10": data.cifar10}[dataset](split)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (NUM_CLASSES, 1, 8, 8), generator=generator)
    generator.manual_seed(1 if split == "train" else 2)
    labels = torch.randint(0, NUM_CLASSES, (1024 if split == "train" else 256,), generator=generator)
    noise = torch.randint(0, 256, (len(labels), 1, 8, 8), generator=generator)
    return data.Images(((patterns[labels] + 2 * noise) // 3).to(torch.uint8), labels)


class Batches:
    """Pixels in [-0.5, 0.5] as vectors, in an order that depends on seed and step alone, so that a resumed run sees the same."""

    def __init__(self, images: data.Images, batch_size: int, seed: int, device: str):
        if len(images.labels) < batch_size:
            raise ValueError(
                f"batch_size: found {batch_size}, allowed at most {len(images.labels)}, the number of images"
            )
        self.images, self.labels = images.images.to(device), images.labels.to(device)
        self.batch_size, self.seed, self.epoch = batch_size, seed, -1

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, len(self.labels) // self.batch_size)
        if epoch != self.epoch:
            self.epoch = epoch
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self.order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        rows = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        return pixels(self.images[rows]), self.labels[rows]


def pixels(images: Tensor) -> Tensor:
    """[N, C, Y, X] uint8 to [N, C * Y * X] in [-0.5, 0.5]."""
    return images.flatten(1).float() / 255.0 - 0.5


# Net


class Experiment:
    """The net of a run with its critics and optimisers."""

    def __init__(self, config: ImagesConfig, num_inputs: int):
        torch.manual_seed(config.seed)
        widths = [num_inputs, *[config.hidden_size] * (config.num_layers - 1)]
        layers: list[nn.Module] = [
            nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
            for inputs, outputs in itertools.pairwise(widths)
        ]
        layers.append(nn.Linear(config.hidden_size, NUM_CLASSES))
        critics: list[nn.Module | None] = [
            GradientCritic(
                state_sizes=(config.hidden_size,),
                hidden_sizes=config.critic_hidden_sizes,
                context_size=NUM_CLASSES if config.arm == "cdni" else 0,
            )
            if config.arm in ("dni", "cdni")
            else None
            for _ in widths[1:]
        ]
        input_models = [
            nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width))
            for width in widths[1:]
            if config.unlocked
        ]
        for module in (*layers, *critics, *input_models):
            if module is not None:
                module.to(config.device)
        of_layers = [torch.optim.Adam(layer.parameters(), config.learning_rate) for layer in layers]
        of_critics = [None if c is None else torch.optim.Adam(c.parameters(), config.learning_rate) for c in critics]
        of_inputs = [torch.optim.Adam(model.parameters(), config.learning_rate) for model in input_models]
        self.config = config
        self.optimizers = [o for o in (*of_layers, *of_critics, *of_inputs) if o is not None]
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
        drops = sum(step >= drop for drop in self.config.learning_rate_drop_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * 0.1**drops
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
                metrics |= {f"critic_{i + 1}/{name}": value for name, value in _scalars(fit).items()}
        for i, loss in enumerate(report.input_losses):
            if loss is not None:
                metrics[f"input_{i + 1}/loss"] = loss
        return metrics

    def test_error(self, images: data.Images) -> float:
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


def _scalars(fit: CriticFit) -> dict[str, Tensor]:
    return {f.name: getattr(fit, f.name).detach() for f in dataclasses.fields(fit)}


# Run


def run(config: ImagesConfig, folder: Path, *, resume: bool = False, tensorboard: bool = True) -> float:
    """Trains, logs, evaluates and keeps a checkpoint.

    Args:
        config: the run.
        folder: for its files, made if missing.
        resume: continue from the folder's checkpoint, if it has one; more steps than before are allowed.
        tensorboard: whether to write TensorBoard events as well.

    Returns:
        The test error at the end, 0 to 1.

    Raises:
        ValueError: if the folder holds another run.
        dni_rl.data.DataError: if the data set cannot be had.
    """
    train, test = load(config.dataset, "train"), load(config.dataset, "test")
    batches = Batches(train, config.batch_size, config.seed, config.device)
    test = data.Images(test.images.to(config.device), test.labels.to(config.device))
    experiment = Experiment(config, train.images[0].numel())
    checkpoint_file = folder / "checkpoint.pt"
    first_step = _restore(experiment, checkpoint_file, resume)
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "config.json", dataclasses.asdict(config))
    error = experiment.test_error(test)
    start_sec = time.monotonic()
    with common.Log(folder, first_step, tensorboard) as log:
        for step in range(first_step, config.num_steps):
            metrics = experiment.update(step, *batches[step])
            done = step + 1
            last = done == config.num_steps
            if done % config.log_every_steps == 0 or last:
                log.write(done, {name: value.item() for name, value in metrics.items()})
            if done % config.eval_every_steps == 0 or last:
                error = experiment.test_error(test)
                log.write(done, {"test/error": error})
                print(f"step {done}: test error {error:.2%}, {time.monotonic() - start_sec:.0f} s", file=sys.stderr)
            if done % config.checkpoint_every_steps == 0 or last:
                _save(experiment, checkpoint_file, done)
    return error


def _save(experiment: Experiment, path: Path, step: int) -> None:
    state = {"step": step, "config": dataclasses.asdict(experiment.config), "net": experiment.net.state_dict()}
    common.save_checkpoint(path, state)


def _restore(experiment: Experiment, path: Path, resume: bool) -> int:
    """Loads the checkpoint if there is one and it is wanted; returns the step to continue from."""
    free = ("num_steps", "device", "log_every_steps", "eval_every_steps", "checkpoint_every_steps")
    state = common.load_checkpoint(path, experiment.config, resume=resume, free=free)
    if state is None:
        return 0
    experiment.net.load_state_dict(state["net"])
    return state["step"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: a preset, and every field of `ImagesConfig` to override it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--run-folder", type=Path, default=Path("runs/images"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True)
    common.add_settings(parser, ImagesConfig)
    settings = vars(parser.parse_args(arguments))
    preset, folder = settings.pop("preset"), settings.pop("run_folder")
    resume, tensorboard = settings.pop("resume"), settings.pop("tensorboard")
    try:
        config = make_config(preset, **common.as_settings(settings))
        error = run(config, folder, resume=resume, tensorboard=tensorboard)
    except (ValueError, data.DataError) as problem:
        parser.exit(2, f"images: {problem}\n")
    print(
        f"{config.arm} on {config.dataset}, {config.num_layers} layers, {config.num_steps} steps: test error {error:.2%}"
    )


if __name__ == "__main__":
    main()
