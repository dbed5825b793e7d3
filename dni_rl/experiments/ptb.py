"""The Penn Treebank read in short windows, after the recurrent networks of Jaderberg et al., "Decoupled Neural Interfaces" (2017).

python -m dni_rl.experiments.ptb --preset laptop --run-folder runs/ptb
python -m dni_rl.experiments.ptb --preset laptop --level words --cells none@20 dni@5 --run-folder runs/ptb-words
python -m dni_rl.experiments.ptb --preset paper --device cuda --run-folder runs/ptb-paper --resume

An LSTM predicts the next character (or word) of a text that it reads in windows. Each run is measured in bits per token on the
validation split while it trains, against tokens read and against seconds of training, and at the end on the test split with the
parameters that did best in validation; perplexity is 2^bits. summary.json compares every cell with "none" at window 20 and at its longest
window: which share of their tokens and of their seconds the cell took to reach the same bits. Folders, `--resume`, cells and arms are as
in `dni_rl.experiments.copy`.

What the paper leaves open, and is assumed here: batch 64, an embedding of 128, no dropout and no clipping, the length of training.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rl import data
from dni_rl.experiments import common
from dni_rl.experiments.recurrent import BITS_PER_NAT, Learner, WindowConfig

DATASETS = ("ptb", "synthetic")
LEVELS = ("characters", "words")
# Test bits per character, by arm and window: Jaderberg et al. (2017), as secondary sources quote them.
PUBLISHED = {
    "none": {2: 1.39, 3: 1.38, 4: 1.37, 5: 1.37, 8: 1.35, 20: 1.35, 40: 1.34},
    "dni": {2: 1.37, 3: 1.36, 4: 1.35, 5: 1.35, 8: 1.34},
    "dni_aux": {2: 1.37, 3: 1.36, 4: 1.35, 5: 1.35, 8: 1.33},
}
# By window of "none": bits, and the shares of its data and of its time that cells took to them. Window 20: the same. Window 40: a later
# account, of twice the speed and nothing on data.
PUBLISHED_RATIOS: dict[int, tuple[float, dict[common.Cell, dict[str, float]]]] = {
    20: (1.35, {common.Cell("dni_aux", 5): {"data_ratio": 0.58, "time_ratio": 0.5}}),
    40: (1.34, {common.Cell("dni", 8): {"time_ratio": 0.5}}),
}


@dataclass(frozen=True, kw_only=True)
class PtbConfig(WindowConfig):
    """One run. Defaults are the paper's, as far as it states them."""

    dataset: str = "ptb"  # "synthetic" needs no files: words drawn from a small lexicon
    level: str = "characters"  # what a token is: "characters" or "words"
    hidden_size: int = 1024
    critic_hidden_sizes: tuple[int, ...] = (1024,)
    batch_size: int = 64
    embedding_size: int = 128
    num_steps: int = 3_000_000  # of each sequence: about 38 readings of the characters
    eval_every_steps: int = 25_000
    eval_columns: int = 8  # the text is cut in so many, read side by side
    valid_tokens: int | None = None  # only so many at the start of the validation split; None for all

    def __post_init__(self):
        super().__post_init__()
        common.check_allowed(self, dataset=DATASETS, level=LEVELS)
        common.check_at_least(self, 1, "embedding_size", "eval_every_steps", "eval_columns")
        if self.valid_tokens is not None:
            common.check_at_least(self, 2, "valid_tokens")


PRESETS: dict[str, dict[str, Any]] = {
    # seconds, needs no files: shows that every arm runs
    "smoke": {
        "cells": ("none@3", "none@6", "dni@3", "dni_aux@3"),
        "seeds": (0,),
        "dataset": "synthetic",
        "hidden_size": 16,
        "critic_hidden_sizes": (16,),
        "embedding_size": 8,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "gradient_discount": 0.9,
        "warmup_updates": 20,
        "num_steps": 600,
        "log_every_steps": 60,
        "eval_every_steps": 120,
        "checkpoint_every_steps": 300,
    },
    # Under half an hour on two cores; dni_aux@5 takes as long as the other three together. With a fourth of the updates in as many
    # characters window 20 wants another learning rate than window 5: each cell has the best of those tried on seed 0
    # (docs/results/log.md).
    "laptop": {
        "cells": ("none@5", "none@20", "dni@5"),
        "seeds": (0, 1, 2),
        "jobs": 2,
        "arms": {"none@20": {"learning_rate": 2e-3}},
        "hidden_size": 256,
        "critic_hidden_sizes": (),
        "embedding_size": 64,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-2,
        "num_steps": 100_000,
        "eval_every_steps": 5_000,
        "checkpoint_every_steps": 20_000,
        "valid_tokens": 40_000,
    },
    "paper": {
        "cells": (*common.grid(("none",), (2, 3, 4, 5, 8, 20, 40)), *common.grid(("dni", "dni_aux"), (2, 3, 4, 5, 8))),
        "seeds": (0, 1, 2),
    },
}


def perplexity(bits: float) -> float:
    """2^bits; infinite where that is too large for a float."""
    return 2.0**bits if not bits >= 1024.0 else math.inf


# Text


@functools.cache  # the runs of one process read it once
def load(dataset: str, level: str, split: data.Split) -> data.Text:
    """A split by the name of its data set; "synthetic" is drawn, the same every time."""
    if dataset == "ptb":
        return data.penn_treebank(split, level="characters" if level == "characters" else "words")
    letters, end = 6, "<eos>"
    generator = torch.Generator().manual_seed(0)
    lexicon = [torch.randint(letters, (2 + i % 4,), generator=generator) for i in range(8)]
    generator.manual_seed({"train": 1, "valid": 2, "test": 3}[split])
    words = torch.randint(len(lexicon), (1_500 if split == "train" else 100,), generator=generator)
    if level == "words":
        return data.Text(words, tuple(f"w{i}" for i in range(len(lexicon))))
    tokens = torch.cat([torch.cat([lexicon[word], torch.tensor([letters])]) for word in words.tolist()])
    return data.Text(tokens, (*"abcdef", end))


def training_window(tokens: Tensor, batch_size: int, step: int, num_steps: int) -> Tensor:
    """What the sequences read from `step` on: sequence b starts at b N / B, and all go round the text of N tokens for ever.

    So every token is read equally often, and no sequence ever jumps but at the end of the text.

    Args:
        tokens: [N].
        batch_size: B.
        step: steps before.
        num_steps: T.

    Returns:
        [T + 1, B]: inputs, and shifted by one the targets.
    """
    starts = torch.arange(batch_size, device=tokens.device) * len(tokens) // batch_size
    steps = torch.arange(step, step + num_steps + 1, device=tokens.device)
    return tokens[(steps.unsqueeze(1) + starts) % len(tokens)]


def evaluation_windows(tokens: Tensor, columns: int, num_steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Reads a text once, in columns side by side, from first to last token.

    Args:
        tokens: [N], at least 2. Every one but the first is a target exactly once.
        columns: how many parts; each starts without memory, so that few are closer to reading the text in one.
        num_steps: the longest window.

    Yields:
        inputs [T, C], targets [T, C], and [T, C] bool, False beyond the end of the text; T up to num_steps.
    """
    count = len(tokens) - 1
    rows = -(-count // columns)
    at = torch.arange(columns, device=tokens.device) * rows + torch.arange(rows, device=tokens.device).unsqueeze(1)
    for part in at.split(num_steps):
        inside = part < count
        part = part.clamp_max(count - 1)
        yield tokens[part], tokens[part + 1], inside


# Run


class Experiment(common.Experiment):
    """The net of a run, its text, and how far it has come."""

    config: PtbConfig

    def __init__(self, config: PtbConfig):
        super().__init__(config)
        splits: tuple[data.Split, ...] = ("train", "valid", "test")
        texts = {split: load(config.dataset, config.level, split) for split in splits}
        self.text: dict[str, Tensor] = {split: text.tokens.to(config.device) for split, text in texts.items()}
        self.text["valid"] = self.text["valid"][: config.valid_tokens]
        if len(self.text["train"]) < config.batch_size:
            raise ValueError(f"batch_size: found {config.batch_size}, allowed at most {len(self.text['train'])} tokens")
        size = len(texts["train"].vocabulary)
        self.learner = Learner(config, lambda: nn.Embedding(size, config.embedding_size), config.embedding_size, size)
        self.best: dict[str, Tensor] = {}  # parameters at the best validation
        self.best_bits = math.inf

    def update(self) -> dict[str, Tensor]:
        """Learns from the next window; returns metrics, still on the device."""
        config, T = self.config, self.config.steps_per_update
        window = training_window(self.text["train"], config.batch_size, self.step, 2 * T)
        inputs, targets = window[:T], window[1 : T + 1]
        found: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
            found.append(losses.detach())
            return losses

        metrics = self.learner.update(inputs, loss, window[T : 2 * T] if config.arm == "dni_aux" else None)
        metrics["train/bits"] = found[0].mean() * BITS_PER_NAT
        self.step += T
        return metrics

    def evaluate(self, split: str, num_steps: int = 50) -> float:
        """Bits per token of a split, the state carried from its first token to its last."""
        net, core, tokens = self.learner.net, self.learner.core, self.text[split]
        nats = torch.zeros((), dtype=torch.float64, device=tokens.device)
        with torch.no_grad():
            state = core.initial_state(self.config.eval_columns)
            for inputs, targets, inside in evaluation_windows(tokens, self.config.eval_columns, num_steps):
                outputs, state = core.unroll(net["encoder"](inputs), state)
                logits = self.learner.logits(outputs)
                losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
                nats += losses.double().masked_fill(~inside.flatten(), 0.0).sum()
        return nats.item() * BITS_PER_NAT / (len(tokens) - 1)

    def evaluation(self) -> dict[str, float]:
        """Validates, appends to the curve, and keeps the parameters if they are the best so far, and have not diverged."""
        bits = self.evaluate("valid")
        self.add_to_curve(tokens=self.step * self.config.batch_size, bits=bits)
        if bits < self.best_bits and math.isfinite(perplexity(bits)):
            self.best_bits = bits
            self.best = {name: value.clone() for name, value in self.learner.net.state_dict().items()}
        return {"valid/bits": bits, "valid/perplexity": perplexity(bits)}

    def test(self) -> float:
        """Bits per token of the test split, with the parameters of the best validation; the net keeps its own.

        NaN if the run has diverged before the first validation: no perplexity was a number.
        """
        if not self.best:
            return math.nan
        present = {name: value.clone() for name, value in self.learner.net.state_dict().items()}
        self.learner.net.load_state_dict(self.best)
        try:
            return self.evaluate("test")
        finally:
            self.learner.net.load_state_dict(present)

    def note(self) -> str:
        """The best validation."""
        return f"best {self.best_bits:.3f} bits" if self.curve else ""

    def result(self) -> dict[str, Any]:
        """Tests, and returns the figures of the run with its curve."""
        test_bits = self.test()
        return {
            "test_bits": test_bits,
            "test_perplexity": perplexity(test_bits),
            "best_valid_bits": self.best_bits,
            "tokens": self.step * self.config.batch_size,
            **self.account(),
        }

    def parts(self) -> dict[str, Any]:
        """The learner."""
        return {"learner": self.learner}

    def state_dict(self) -> dict[str, Any]:
        """The parameters of the best validation, too."""
        return {**super().state_dict(), "best": self.best, "best_bits": self.best_bits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        super().load_state_dict(state)
        self.best, self.best_bits = dict(state["best"]), state["best_bits"]


run = functools.partial(common.carry_out, Experiment)
"""One run, of a `PtbConfig`: see `common.carry_out`."""


def summarize(
    matrix: Sequence[common.Member], results: Mapping[str, dict[str, Any]], threshold_bits: float | None = None
) -> dict[str, Any]:
    """The table of a matrix: every cell's test bits by seed, beside the published ones, and what it took to reach certain bits.

    See `ratios` for the latter.

    Args:
        matrix: the runs.
        results: by name of the member.
        threshold_bits: validation bits per token to compare data and time at, or None.
    """
    cells = common.by_cell(matrix, results)
    config = matrix[0].config
    is_published = config.level == "characters" and config.dataset == "ptb"
    rows = []
    for cell, by_seed in cells.items():
        bits = [result["test_bits"] for result in by_seed.values()]
        rows.append(
            {
                "arm": cell.arm,
                "window": cell.window,
                "per_seed": {str(seed): result["test_bits"] for seed, result in by_seed.items()},
                **common.spread(bits),
                "test_perplexity": common.mean(result["test_perplexity"] for result in by_seed.values()),
                "published": PUBLISHED.get(cell.arm, {}).get(cell.window) if is_published else None,
                "seconds": common.mean(result["seconds"] for result in by_seed.values()),
            }
        )
    return {
        "experiment": "ptb",
        "dataset": config.dataset,
        "level": config.level,
        "cells": rows,
        "ratios": ratios(cells, threshold_bits, is_published=is_published),
    }


def ratios(
    cells: Mapping[common.Cell, Mapping[int, Mapping[str, Any]]],
    threshold_bits: float | None = None,
    *,
    is_published: bool = False,
) -> list[dict[str, Any]]:
    """What every cell took to reach certain bits in validation, as shares of what "none" at window 20 and at its longest window took.

    The ratios are means over seeds of the tokens and seconds of a cell, over those of the baseline; None where a seed did not get there.

    Args:
        cells: results by cell and seed.
        threshold_bits: the bits to reach; None for the lowest that all seeds of the cell and of the baseline reached.
        is_published: whether to compare at the bits of the published ratios as well, where the baseline came to them or there is one.
    """
    windows = {cell.window for cell in cells if cell.arm == "none"}
    found = []
    for window in sorted({20, max(windows, default=0)} & windows):
        baseline = common.Cell("none", window)
        published_bits, published = PUBLISHED_RATIOS.get(window, (None, {}))
        for cell, by_seed in cells.items():
            both = list(by_seed.values()), list(cells[baseline].values())
            if cell != baseline:
                found.append(
                    _ratio(cell, baseline, _lowest(*both) if threshold_bits is None else threshold_bits, *both)
                )
            if cell != baseline and is_published and published_bits is not None:
                row = _ratio(cell, baseline, published_bits, *both) | {
                    f"published_{name}": value for name, value in published.get(cell, {}).items()
                }
                if cell in published or row["data_ratio"] is not None:
                    found.append(row)
    return found


def _lowest(*cells: Sequence[Mapping[str, Any]]) -> float | None:
    """Bits that all seeds of some cells reached; None if one never had any."""
    reached = [result["best_valid_bits"] for results in cells for result in results]
    return None if None in reached else max(reached)


def _ratio(
    cell: common.Cell,
    baseline: common.Cell,
    bits: float | None,
    results: Sequence[Mapping[str, Any]],
    of_baseline: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": cell.arm, "window": cell.window, "baseline": str(baseline), "threshold_bits": bits}
    for name, axis in (("data_ratio", "tokens"), ("time_ratio", "seconds")):
        took, baseline_took = (
            None if bits is None else common.mean(common.reached(run["curve"], "bits", bits, axis) for run in runs)
            for runs in (results, of_baseline)
        )
        row |= {name: took / baseline_took if took is not None and baseline_took else None, f"published_{name}": None}
    return row


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    words = summary["level"] == "words"

    def measure(bits: float | None) -> float | None:
        return bits if bits is None or not words else perplexity(bits)

    rows = [
        (
            row["arm"],
            row["window"],
            " ".join(common.shown(measure(bits), 3) for bits in row["per_seed"].values()),
            row["test_perplexity"] if words else row["mean"],
            row["published"],
        )
        for row in summary["cells"]
    ]
    header = ("arm", "window", f"test {'perplexity' if words else 'bits per character'}, by seed", "mean", "published")
    return "\n\n".join([common.markdown(header, rows), *ratio_tables(summary)])


def ratio_tables(summary: Mapping[str, Any]) -> list[str]:
    """The ratios of a summary as Markdown, with a note; none where there are none."""
    if not summary["ratios"]:
        return []
    names = ("data_ratio", "published_data_ratio", "time_ratio", "published_time_ratio")
    rows = [
        (row["arm"], row["window"], row["baseline"], row["threshold_bits"], *(row[name] for name in names))
        for row in summary["ratios"]
    ]
    header = ("arm", "window", "over", "bits to reach", "data ratio", "published", "wall-clock ratio", "published")
    note = (
        "Ratios: tokens and seconds of training to so many bits in validation, over those of the cell that is named; unless the bits "
        "are given, or those of a published ratio, they are the lowest that all seeds of both reached."
    )
    return [common.markdown(header, rows), note]


_THRESHOLD = (
    "validation bits per token to compare data and time at; by default the lowest that all seeds compared reached"
)
_MORE = {"threshold_bits": {"type": float, "help": _THRESHOLD}}
plan = functools.partial(common.cells_plan, "ptb", __doc__, PtbConfig, PRESETS, more_options=_MORE)
"""The runs of a command line: a preset, its cells and seeds, and every field of `PtbConfig` to override it."""
main = functools.partial(common.main, "ptb", plan, run, summarize, table)


if __name__ == "__main__":
    main()
