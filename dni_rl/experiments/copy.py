"""Copy and repeat copy with short windows, after the recurrent networks of Jaderberg et al., "Decoupled Neural Interfaces" (2017).

python -m dni_rl.experiments.copy --preset laptop --run-folder runs/copy
python -m dni_rl.experiments.copy --preset laptop --cells none@4 sobolev@4 timescales_dni@4 --run-folder runs/copy-more
python -m dni_rl.experiments.copy --preset paper --task repeat_copy --device cuda --run-folder runs/repeat-copy --resume

A net reads N symbols, a stop mark and a count R, writes the symbols R times in order, then a stop symbol (copy: R = 1). One episode
follows the other without a sign; windows of truncated BPTT are far shorter than an episode. Whenever the average error falls under
0.15 bits the episodes get longer; the score is the length N R + 3 of the longest that was solved. Cells "arm@window" (arms in
`dni_rl.experiments.recurrent`) times seeds are the runs of one command. Each has a folder with config.json, metrics.jsonl, TensorBoard
events, a checkpoint and result.json; summary.json sets all of them beside the published figures. `--resume` goes on as if nothing
had been cut off, and skips what is done.

What the paper leaves open, and is assumed here: the symbols (8, one-hot), the count (one number), an average over 1,024 finished
episodes and over predictions, a start at N = R = 1, and steps of the curriculum that lengthen N, then R in turn. The last is read off
the published figures: those of repeat copy, less 3, are all k^2 or k (k + 1). A length of N R + 3 counts the steps from the stop mark
on; reading takes N more.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rl.experiments import common
from dni_rl.experiments.recurrent import BITS_PER_NAT, Learner, WindowConfig

TASKS = ("copy", "repeat_copy")
IGNORED = -100  # target of steps that are not scored
# Length of the longest episode solved, by task, arm and window: Jaderberg et al. (2017), as secondary sources quote them.
PUBLISHED = {
    "copy": {
        "none": {2: 7, 3: 8, 4: 10, 5: 8},
        "dni": {2: 16, 3: 14, 4: 18, 5: 18},
        "dni_aux": {2: 16, 3: 17, 4: 19, 5: 18},
    },
    "repeat_copy": {
        "none": {2: 7, 3: 5, 4: 19, 5: 23},
        "dni": {2: 39, 3: 33, 4: 39, 5: 59},
        "dni_aux": {2: 39, 3: 59, 4: 67, 5: 59},
    },
}


@dataclass(frozen=True, kw_only=True)
class CopyConfig(WindowConfig):
    """One run. Defaults are the paper's, as far as it states them."""

    task: str = "copy"
    num_symbols: int = 8
    solved_bits: float = 0.15  # average error per prediction under which the task is made harder
    average_episodes: int = 1_024  # over how many finished episodes, of all sequences together

    def __post_init__(self):
        super().__post_init__()
        common.check_allowed(self, task=TASKS)
        common.check_at_least(self, 2, "num_symbols")
        common.check_at_least(self, 1, "average_episodes")
        if not self.solved_bits > 0.0:
            raise ValueError(f"solved_bits: found {self.solved_bits}, allowed above 0")


# A linear critic, and a core whose trace fits; Pemberton & Costa (2024) use an LSTM of 30.
_BP_LAMBDA = {"critic_hidden_sizes": (), "max_norm_ratio": None, "hidden_size": 30}
PRESETS: dict[str, dict[str, Any]] = {
    # seconds: shows that every arm runs
    "smoke": {
        "cells": common.grid(
            ("none", "dni", "dni_recent", "dni_aux", "sobolev", "bp_lambda", "timescales", "timescales_dni"), (4,)
        ),
        "seeds": (0,),
        "arms": {"bp_lambda": {**_BP_LAMBDA, "hidden_size": 8}},
        "num_symbols": 2,
        "hidden_size": 24,
        "batch_size": 16,
        "learning_rate": 2e-2,
        "critic_learning_rate": 1e-2,
        "critic_hidden_sizes": (8,),
        "gradient_discount": 0.9,
        "warmup_updates": 20,
        "average_episodes": 32,
        "num_steps": 320,
        "log_every_steps": 40,
        "checkpoint_every_steps": 160,
    },
    # Under half an hour on two cores; dni_aux takes as long again. Two symbols, so that the first lengths are solved in seconds.
    "laptop": {
        "cells": common.grid(("none", "dni"), (2, 3, 4, 5)),
        "seeds": (0, 1, 2),
        "jobs": 2,
        "arms": {
            "bp_lambda": {**_BP_LAMBDA, "critic_learning_rate": 1e-3, "critic_scale": 0.1, "gradient_discount": 1.0}
        },
        "num_symbols": 2,
        "hidden_size": 64,
        "batch_size": 32,
        "learning_rate": 2e-3,
        # A critic must learn much faster than the core, whose gradient it predicts (docs/results/learning_rate.md); bounded, it can
        # then be believed in full.
        "critic_learning_rate": 3e-2,
        "critic_hidden_sizes": (64,),
        "critic_scale": 1.0,
        "gradient_discount": 0.9,
        "max_norm_ratio": 0.5,
        "num_steps": 100_000,
        "checkpoint_every_steps": 20_000,
    },
    "paper": {
        "cells": common.grid(("none", "dni", "dni_aux"), (2, 3, 4, 5)),
        "seeds": (0, 1, 2),
        "arms": {"bp_lambda": {**_BP_LAMBDA, "batch_size": 64}},
    },
}


# Task


def symbols_and_repeats(task: str, level: int) -> tuple[int, int]:
    """N and R of a level of the curriculum: both 1 at level 0; then N grows, in repeat copy N and R in turn."""
    if task == "copy":
        return level + 1, 1
    return 1 + (level + 1) // 2, 1 + level // 2


def episode_length(task: str, level: int) -> int:
    """N R + 3, the paper's length of an episode: stop mark, count, N R symbols and a stop symbol."""
    num_symbols, repeats = symbols_and_repeats(task, level)
    return num_symbols * repeats + 3


class Batch(NamedTuple):
    """A window of the streams.

    Attributes:
        inputs: [T, B, num_symbols + 2], a symbol as one-hot, the stop mark, the count.
        targets: [T, B] int64, a symbol, num_symbols for the stop symbol, or IGNORED.
        levels: [T, B] int64, level of the episode that the step belongs to.
    """

    inputs: Tensor
    targets: Tensor
    levels: Tensor


class Streams:
    """Endless sequences of episodes, on the CPU; each episode takes the level that holds when it starts.

    The first episode of each sequence is entered at a random step, so that windows cut episodes at every place.

    Args:
        task: "copy" or "repeat_copy".
        batch_size: B.
        num_symbols: number of different symbols.
        seed: of all randomness.
    """

    def __init__(self, task: str, batch_size: int, num_symbols: int, seed: int):
        self.task, self.num_symbols, self.level = task, num_symbols, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.position = torch.zeros(batch_size, dtype=torch.int64)  # steps into the episode
        self.levels = torch.zeros(batch_size, dtype=torch.int64)
        self.read_steps = torch.zeros(batch_size, dtype=torch.int64)  # N
        self.write_steps = torch.zeros(batch_size, dtype=torch.int64)  # N R
        self.symbols = torch.zeros(batch_size, 1, dtype=torch.int64)  # [B, largest N so far]
        self._start_episodes(torch.ones(batch_size, dtype=torch.bool))
        steps = int(self.read_steps[0]) + episode_length(task, 0)
        self.position = torch.randint(0, steps, (batch_size,), generator=self.generator)

    def take(self, num_steps: int) -> Batch:
        """The next `num_steps` steps of every sequence."""
        V, B = self.num_symbols, len(self.position)
        inputs = torch.zeros(num_steps, B, V + 2)
        targets = torch.full((num_steps, B), IGNORED)
        levels = torch.empty(num_steps, B, dtype=torch.int64)
        for t in range(num_steps):
            p, n = self.position, self.read_steps
            written = p - n - 2
            reads, writes, ends = p < n, (written >= 0) & (written < self.write_steps), written == self.write_steps
            place = torch.where(reads, p, torch.where(writes, written % n, 0))
            symbol = self.symbols.gather(1, place.unsqueeze(1)).squeeze(1)
            inputs[t].scatter_(1, symbol.unsqueeze(1), reads.float().unsqueeze(1))
            inputs[t, :, V] = (p == n).float()
            inputs[t, :, V + 1] = (self.write_steps // n) * (p == n + 1)
            targets[t] = torch.where(writes, symbol, torch.where(ends, V, IGNORED))
            levels[t] = self.levels
            self.position = p + 1
            if ends.any():
                self._start_episodes(ends)
        return Batch(inputs, targets, levels)

    def _start_episodes(self, rows: Tensor) -> None:
        num_symbols, repeats = symbols_and_repeats(self.task, self.level)
        self.position[rows] = 0
        self.levels[rows] = self.level
        self.read_steps[rows], self.write_steps[rows] = num_symbols, num_symbols * repeats
        if num_symbols > self.symbols.shape[1]:
            self.symbols = F.pad(self.symbols, (0, num_symbols - self.symbols.shape[1]))
        size = (int(rows.sum()), num_symbols)
        self.symbols[rows, :num_symbols] = torch.randint(0, self.num_symbols, size, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to continue."""
        names = ("level", "position", "levels", "read_steps", "write_steps", "symbols")
        return {"generator": self.generator.get_state(), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for name, value in state.items():
            if name == "generator":
                self.generator.set_state(value.cpu())
            else:
                setattr(self, name, value.cpu() if isinstance(value, Tensor) else value)


class Curriculum:
    """Advances when the average error over so many finished episodes of the level is small enough, and else averages anew.

    Args:
        solved_bits: bits per prediction to fall under.
        average_episodes: finished episodes in an average.
    """

    def __init__(self, solved_bits: float, average_episodes: int):
        self.solved_bits, self.average_episodes = solved_bits, average_episodes
        self.level = 0
        self.last_average: float | None = None
        self._start_average()

    def _start_average(self) -> None:
        self.bits: Tensor | float = 0.0
        self.predictions = self.episodes = 0

    def observe(self, bits: Tensor, batch: Batch, stop_symbol: int) -> bool:
        """Takes in a window's errors; returns whether the level rises.

        Args:
            bits: [T, B] errors, on any device, 0 where nothing is predicted.
            batch: the window, on the CPU.
            stop_symbol: the target with which an episode ends.
        """
        counts = (batch.levels == self.level) & (batch.targets != IGNORED)
        self.bits = self.bits + (bits * counts.to(bits.device)).sum()
        self.predictions += int(counts.sum())
        self.episodes += int((counts & (batch.targets == stop_symbol)).sum())
        if self.episodes < self.average_episodes:
            return False
        self.last_average = float(self.bits) / self.predictions  # a synchronisation, once for many episodes
        solved = self.last_average < self.solved_bits
        self.level += solved
        self._start_average()
        return solved

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to continue."""
        return {name: getattr(self, name) for name in ("level", "last_average", "bits", "predictions", "episodes")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


# Run


class Experiment(common.Experiment):
    """The net of a run, what it reads, and how far it has come."""

    config: CopyConfig

    def __init__(self, config: CopyConfig):
        super().__init__(config)
        self.learner = Learner(config, nn.Identity, config.num_symbols + 2, config.num_symbols + 1)
        self.streams = Streams(config.task, config.batch_size, config.num_symbols, config.seed)
        self.curriculum = Curriculum(config.solved_bits, config.average_episodes)
        self.batch = self.streams.take(config.steps_per_update)
        self.solved: list[dict[str, float]] = []  # length, step and seconds, of every level

    def update(self) -> dict[str, Tensor]:
        """Learns from the next window; returns metrics, still on the device."""
        config, batch = self.config, self.batch
        self.batch = self.streams.take(config.steps_per_update)
        targets = batch.targets.to(config.device)
        found: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
            found.append(losses.detach().view_as(targets))
            return losses.view_as(targets)

        upcoming = self.batch.inputs.to(config.device) if config.arm == "dni_aux" else None
        metrics = self.learner.update(batch.inputs.to(config.device), loss, upcoming)
        bits = found[0] * BITS_PER_NAT
        metrics["train/bits"] = bits.sum() / (targets != IGNORED).sum().clamp_min(1)
        advances = self.curriculum.observe(bits, batch, config.num_symbols)
        self.step += config.steps_per_update
        if advances:
            length = episode_length(config.task, self.curriculum.level - 1)
            self.solved.append({"length": length, "step": self.step, "seconds": round(self.seconds, 3)})
            self.streams.level = self.curriculum.level
        return metrics

    @property
    def solved_length(self) -> int:
        """Length of the longest episode solved, 0 if none was."""
        return int(self.solved[-1]["length"]) if self.solved else 0

    def figures(self) -> dict[str, float]:
        """The score, and the average that the curriculum last took."""
        average = self.curriculum.last_average
        return {"train/solved_length": self.solved_length} | (
            {} if average is None else {"train/average_bits": average}
        )

    def evaluation_is_due(self, before: int) -> bool:
        """Never: the score is taken from training, as in the paper."""
        return False

    def note(self) -> str:
        """The score."""
        return f"solved {self.solved_length}"

    def result(self) -> dict[str, Any]:
        """The score, and when each length was solved."""
        return {
            "solved_length": self.solved_length,
            "solved": self.solved,
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "final_average_bits": self.curriculum.last_average,
        }

    def parts(self) -> dict[str, Any]:
        """Learner, streams and curriculum."""
        return {"learner": self.learner, "streams": self.streams, "curriculum": self.curriculum}

    def state_dict(self) -> dict[str, Any]:
        """The score and the next batch, too."""
        return {**super().state_dict(), "solved": self.solved, "batch": tuple(self.batch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        super().load_state_dict(state)
        self.solved = list(state["solved"])
        self.batch = Batch(*(part.cpu() for part in state["batch"]))


run = functools.partial(common.carry_out, Experiment)
"""One run, of a `CopyConfig`: see `common.carry_out`."""


def summarize(matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The table of a matrix: every cell's solved lengths, by seed, beside the published one and the baseline's.

    A cell's `ratio` is its mean over that of "none" at the same window.
    """
    task = matrix[0].config.task
    cells = common.by_cell(matrix, results)
    lengths = {cell: {seed: r["solved_length"] for seed, r in seeds.items()} for cell, seeds in cells.items()}
    rows = []
    for cell, by_seed in lengths.items():
        statistics = common.spread(list(by_seed.values()))
        baseline = common.mean(lengths.get(common.Cell("none", cell.window), {}).values())
        published = PUBLISHED[task]
        known, known_baseline = (published.get(arm, {}).get(cell.window) for arm in (cell.arm, "none"))
        rows.append(
            {
                "arm": cell.arm,
                "window": cell.window,
                "per_seed": {str(seed): length for seed, length in by_seed.items()},
                **statistics,
                "ratio": statistics["mean"] / baseline if statistics["mean"] is not None and baseline else None,
                "published": known,
                "published_ratio": known / known_baseline if known and known_baseline else None,
                "seconds": sum(r["seconds"] for r in cells[cell].values()) / len(by_seed),
            }
        )
    return {"experiment": "copy", "task": task, "cells": rows}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    return common.markdown(
        ("arm", "window", "solved length, by seed", "mean", "ratio to none", "published", "published ratio", "seconds"),
        [
            (
                row["arm"],
                row["window"],
                " ".join(str(length) for length in row["per_seed"].values()),
                row["mean"],
                row["ratio"],
                row["published"],
                row["published_ratio"],
                round(row["seconds"]),
            )
            for row in summary["cells"]
        ],
    )


plan = functools.partial(common.cells_plan, "copy", __doc__, CopyConfig, PRESETS)
"""The runs of a command line: a preset, its cells and seeds, and every field of `CopyConfig` to override it."""
main = functools.partial(common.main, "copy", plan, run, summarize, table)


if __name__ == "__main__":
    main()
