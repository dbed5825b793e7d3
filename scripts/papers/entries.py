"""The commands that make up the papers' experiments, and where their results are shown."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

RUNS, PAGES = Path("runs/experiments"), Path("docs/results")
PRESETS = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class Entry:
    """One command, and where its results are shown.

    Attributes:
        name: of the entry and of its folder.
        program: a module of `dni_rl.experiments`.
        options: of its command line, beside the preset.
        page: on which it is shown; by default one of its own.
        presets: that it belongs to; in the others its runs need files, take too long, or are another entry's.
        more: further options, by preset.
    """

    name: str
    program: str
    options: str = ""
    page: str = ""
    presets: tuple[str, ...] = PRESETS
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        """The program."""
        return importlib.import_module(f"dni_rl.experiments.{self.program}")

    @property
    def is_matrix(self) -> bool:
        """Whether it plans a matrix of arms and seeds, with `plan`; asynchronous layers have results of their own."""
        return self.program != "asynchronous"

    def arguments(self, preset: str, folder: Path) -> list[str]:
        """Of its command line."""
        options = f"{self.options} {self.more.get(preset, '')}".split()
        return ["--preset", preset, *options, "--run-folder", str(folder), "--resume"]

    def command(self, preset: str) -> str:
        """The command as it stands on a page."""
        folder = RUNS / preset / self.name
        return f"python -m dni_rl.experiments.{self.program} {' '.join(self.arguments(preset, folder))}"


_ARMS = "--arms backprop none dni cdni"
_BEYOND_SMOKE = ("laptop", "paper")
# Smoke has every program and kind of net, without data files, in a few minutes.
ENTRIES = (
    Entry("images", "images", _ARMS),
    Entry("images_p0.2", "images", "--arms dni cdni --update-probability 0.2", page="images"),
    Entry(
        "images_p0.05",
        "images",
        "--arms cdni --update-probability 0.05",
        page="images",
        presets=_BEYOND_SMOKE,
        # half as many updates of a layer as at p = 1, in half an hour
        more={"laptop": "--num-steps 80000 --learning-rate-drop-steps 55000 70000"},
    ),
    Entry(
        "images_unlocked",
        "images",
        "--arms dni cdni --unlocked",
        page="images",
        # models of the inputs keep up with layers that are slow for their critics' sake (docs/results/log.md)
        more={"laptop": "--input-learning-rate 3e-3"},
    ),
    Entry("images_fashion", "images", f"{_ARMS} --dataset fashion_mnist", page="images_fashion", presets=_BEYOND_SMOKE),
    Entry(
        "images_cifar10",
        "images",
        f"{_ARMS} --dataset cifar10",
        page="images_cifar10",
        presets=_BEYOND_SMOKE,
        more={"laptop": "--hidden-size 256 --num-steps 3000 --learning-rate-drop-steps 2000 2600"},
    ),
    # four layers are above
    *(
        Entry(
            f"{page}_{num_layers}_layers",
            "images",
            f"{_ARMS} --dataset {dataset} --num-layers {num_layers}",
            page=page,
            presets=("paper",),
        )
        for page, dataset in (("images", "mnist"), ("images_cifar10", "cifar10"))
        for num_layers in (3, 5, 6)
    ),
    Entry("cnn", "images", "--model cnn --arms"),
    *(
        Entry(
            f"cnn_{dataset}_{num_layers}_layers",
            "images",
            f"--model cnn --arms --dataset {dataset} --num-layers {num_layers}",
            page="cnn",
            presets=("paper",),
        )
        for dataset, num_layers in (("mnist", 3), ("cifar10", 3), ("cifar10", 4))
    ),
    Entry("greedy_cnn", "images", "--model greedy_cnn --arms"),
    Entry("copy", "copy"),
    Entry("copy_fresh", "copy", "--seeds 4 5 6", page="copy", presets=("laptop",)),  # on which nothing was chosen
    # BPTT through windows that hold whole episodes: what there is to reach in as many steps
    Entry("copy_long", "copy", "--cells none@20 none@40", page="copy", presets=("laptop",)),
    # not the paper's
    Entry(
        "copy_recent",
        "copy",
        "--cells dni_recent@2 dni_recent@3 dni_recent@4 dni_recent@5 --seeds 0 1 2 4 5 6",
        page="copy",
        presets=("laptop",),
    ),
    Entry("repeat_copy", "copy", "--task repeat_copy", page="copy"),
    # In the paper's preset it is an arm of copy and ptb; here it takes as long as they do.
    Entry("copy_aux", "copy", "--cells dni_aux@2 dni_aux@3 dni_aux@4 dni_aux@5", page="copy", presets=("laptop",)),
    Entry(
        "copy_sobolev",
        "copy",
        "--cells sobolev@2 sobolev@3 sobolev@4 sobolev@5",
        page="copy",
        presets=_BEYOND_SMOKE,
    ),
    Entry("copy_timescales", "copy", "--cells timescales@4 timescales_dni@4", page="copy", presets=_BEYOND_SMOKE),
    Entry("copy_bp_lambda", "copy", "--cells bp_lambda@4", page="copy", presets=_BEYOND_SMOKE),
    Entry("ptb", "ptb"),
    Entry("ptb_aux", "ptb", "--cells dni_aux@5", page="ptb", presets=("laptop",)),
    Entry("two_networks", "timescales"),
    Entry("sequential_mnist", "sequential_mnist"),
    Entry("alignment", "alignment"),
    Entry("understanding", "understanding"),
    Entry("asynchronous", "asynchronous"),
)
