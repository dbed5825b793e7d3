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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dni_rl.experiments import common, signals
from dni_rl.experiments.theory.artificial import Artificial
from dni_rl.experiments.theory.config import ARMS, DATA_SETS, PARTS, UnderstandingConfig
from dni_rl.experiments.theory.deep import Deep
from dni_rl.experiments.theory.figures import draw
from dni_rl.experiments.theory.summary import summarize, table

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


def run(config: UnderstandingConfig, folder: Path, **how: Any) -> dict[str, Any]:
    """One run of one part: see `common.carry_out`, which takes the options."""
    make: Callable[[UnderstandingConfig], common.Experiment] = Artificial
    if config.part in ("rdm", "signals"):
        make = functools.partial(Deep, folder=folder)
    return common.carry_out(make, config, folder, **how)


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
    common.check_each_once(parts=parts, **({} if arms is None else {"arms": arms}))
    common.check_seeds(seeds)
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
