"""The settings of one run of `dni_rl.experiments.understanding`, and what its parts compare."""

from dataclasses import dataclass

from dni_rl.experiments import common, images, signals

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
        common.check_critic(self)
        common.check_at_least(self, 2 * images.NUM_CLASSES, "num_shown")
        for name in (
            "learning_rate",
            "critic_learning_rate",
            "linear_learning_rate",
            "linear_critic_learning_rate",
        ):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name}: found {getattr(self, name)}, allowed above 0")
