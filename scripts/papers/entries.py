"""The commands that make up the papers' experiments, and where their results are shown."""

import importlib
from dataclasses import dataclass
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
    """

    name: str
    program: str
    options: str = ""
    page: str = ""

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
        return ["--preset", preset, *self.options.split(), "--run-folder", str(folder), "--resume"]

    def command(self, preset: str) -> str:
        """The command as it stands on a page."""
        folder = RUNS / preset / self.name
        return f"python -m dni_rl.experiments.{self.program} {' '.join(self.arguments(preset, folder))}"


ENTRIES = (
    Entry("images", "images", "--arms backprop none dni cdni"),
    Entry("images_p0.2", "images", "--arms dni cdni --update-probability 0.2", page="images"),
    Entry("images_unlocked", "images", "--arms dni cdni --unlocked", page="images"),
    Entry("cnn", "images", "--model cnn --arms"),
    Entry("greedy_cnn", "images", "--model greedy_cnn --arms"),
    Entry("copy", "copy"),
    Entry("repeat_copy", "copy", "--task repeat_copy", page="copy"),
    Entry("ptb", "ptb"),
    Entry("two_networks", "timescales"),
    Entry("sequential_mnist", "sequential_mnist"),
    Entry("alignment", "alignment"),
    Entry("understanding", "understanding"),
    Entry("asynchronous", "asynchronous"),
)
