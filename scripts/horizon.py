"""How far back do the gradients of trained agents reach? Measures the credit horizon of one or more runs.

    python scripts/horizon.py runs/PassiveTMaze_cdni_k8_seed0
    python scripts/horizon.py runs/*_seed* --json horizon.json --plot horizon.png

Each agent acts in fresh environments; then, by lag, the true gradient of each loss with respect to earlier states (full BPTT over the
batch) is held against what the run's method delivers: see `agents.credit.measure_credit` and `dni_rl.horizon.credit_horizon`. Several
runs are also put side by side, success and horizon by method and task, with medians over what differs in the seed alone.

Two horizons are shown. The effective one judges gradients one by one, and most of a policy gradient is noise that no critic can
foresee. The expected one judges their averages over sequences, told apart by what is to be remembered (the cue of a maze), where the
environment has a context that says so. It often reaches the length of a corridor before the corridor is solved, at times also where it
is not (docs/results/horizon.md), given enough sequences: --num_envs 128.

A checkpoint shows horizons as they are *after* learning. Once a task is solved its true gradients are small and mostly noise. What training
logged on the way there (`run.credit_every_steps`) is what says whether a memory could be learned.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from agents.checkpoint import load_checkpoint, restoring
from agents.config import TrainConfig, from_dict, to_dict
from agents.credit import credit_figure, measure_credit
from agents.metrics import read_metrics
from agents.train import Trainer
from commandline import OneLineParser, integer
from dni_rl.files import write_text
from dni_rl.horizon import CreditHorizon

SUCCESS, RETURN = "charts/success_rate", "charts/episodic_return"
LOGGED = ("credit/horizon", "credit/lag_90")  # by run.credit_every_steps
EXPECTED = "credit/expected_horizon"  # the same, where there is a context to tell what is to be remembered
SOLVED = 0.95  # success rate from which on there is nothing left to learn


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement of a run.

    Attributes:
        name: the run's folder, and the checkpoint's file where one was asked for.
        config: with run.credit_length, run.credit_num_envs and the seed as they were used.
        step: agent steps of the checkpoint.
        results: success rate and episodic return in the last rows of metrics up to there; those that exist.
        logged: rows of metrics up to there in which training logged its horizons, before the first update included; `solved` tells
            whether the task had been solved by then.
        bare: whether truncated BPTT alone was measured, in place of the run's method.
        horizon: the measurement.
    """

    name: str
    config: TrainConfig
    step: int
    results: dict[str, float]
    logged: list[dict[str, float]]
    bare: bool
    horizon: CreditHorizon

    @property
    def method(self) -> str:
        """Critic and what it is told, window, core if no LSTM; of a bare measurement, what the agent was trained by."""
        core = "" if self.config.model.core == "lstm" else f", {self.config.model.core}"
        critic = self.config.critic
        past = ", past observations" if critic.past_steps and critic.predicts else ""
        future = ", future inputs" if critic.future_steps and critic.predicts else ""
        bare = ", critics left out" if self.bare else ""
        return f"{critic.kind}{past}{future}, K = {self.config.algorithm.bptt_horizon}{core}{bare}"

    @property
    def reach(self) -> float:
        """The expected horizon at the checkpoint, or where there is none the effective one."""
        expected = self.horizon.expected_horizon
        return float(self.horizon.effective_horizon if expected is None else expected)

    @property
    def while_learning(self) -> float | None:
        """The median of the horizons, of the kind of `reach`, that training logged while there was something to learn.

        That is, after the first update and up to the first row with a success rate of `SOLVED`; to the end where there is none. None if
        training logged nothing then.
        """
        name = LOGGED[0] if self.horizon.expected_cosine is None else EXPECTED
        horizons = [row[name] for row in self.logged if row["step"] and not row["solved"] and name in row]
        return median(horizons) if horizons else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the curves, as plain values; null for what does not exist."""
        horizon, config = self.horizon, self.config
        return {
            "run": self.name,
            "method": self.method,
            "kind": config.critic.kind,
            "critics_left_out": self.bare,
            "window": config.algorithm.bptt_horizon,
            "core": config.model.core,
            "environment": config.env.id,
            "environment_kwargs": config.env.kwargs,
            "run_seed": config.run.seed,
            "step": self.step,
            "success_rate": self.results.get(SUCCESS),
            "episodic_return": self.results.get(RETURN),
            "length": config.run.credit_length,
            "num_envs": config.run.credit_num_envs,
            **{name: _finite(float(value)) for name, value in horizon.scalars("").items()},
            "lags": list(range(1, len(horizon.cosine) + 1)),
            "num_pairs": [int(count) for count in horizon.num_pairs],
            **{
                name: [_finite(x) for x in getattr(horizon, name).tolist()]
                for name in ("true_norm", "delivered_norm", "cosine", "expected_cosine")
                if getattr(horizon, name) is not None
            },
            "horizon_while_learning": None if self.bare else self.while_learning,
            "logged": {
                name.removeprefix("credit/"): [_finite(row[name]) for row in self.logged]
                for name in ("step", *LOGGED, EXPECTED)
                if all(name in row for row in self.logged)
            },
        }


def measure(
    path: Path,
    *,
    length: int | None = None,
    num_envs: int | None = None,
    seed: int | None = None,
    bare: Sequence[bool] = (False,),
) -> list[Measured]:
    """Measures a run at a checkpoint, on the CPU.

    Args:
        path: the run's folder, or a checkpoint in it.
        length: run.credit_length; None for the run's own, as num_envs and seed.
        num_envs: run.credit_num_envs.
        seed: of environments and actions.
        bare: False for the run's method, True for the same without its critics, where it has any; one measurement for each.

    Raises:
        ValueError: in one line, if the checkpoint is missing, damaged or of something else.
    """
    checkpoint = load_checkpoint(path)
    with restoring(path):
        config = from_dict(checkpoint["config"])
    run = replace(
        config.run,
        device="cpu",
        credit_length=config.run.credit_length if length is None else length,
        credit_num_envs=config.run.credit_num_envs if num_envs is None else num_envs,
    )
    config = replace(config, run=run)
    trainer = Trainer(config)
    try:
        with restoring(path):
            trainer.learner.load_state_dict(checkpoint["learner"])
        learner = trainer.learner
        is_bare = learner.critic is None and not learner.interfaces and learner.sensitivity is None
        results, logged = _metrics(path if path.is_dir() else path.parent, checkpoint["step"])
        return [
            Measured(
                name=path.name if path.is_dir() else f"{path.parent.name}/{path.name}",
                config=config,
                step=checkpoint["step"],
                results=results,
                logged=logged,
                bare=each,
                horizon=measure_credit(config, learner, seed=seed, with_critics=not each),
            )
            for each in bare
            if not (each and is_bare)
        ]
    finally:
        trainer.close()


def table(measured: Sequence[Measured]) -> str:
    """A row for each measurement."""
    lines = [
        "| run | method | step | success | expected horizon (cosine above 0.5) | its median while learning | effective horizon | "
        "90 % of the norm within | true gradient: 90 % within | norm delivered |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        horizon, expected = m.horizon, m.horizon.expected_horizon
        lines.append(
            f"| {m.name} | {m.method} | {m.step:,} | {_percent(m.results.get(SUCCESS))} | "
            f"{_steps(None if expected is None else int(expected))} | {_steps(None if m.bare else m.while_learning)} | "
            f"{int(horizon.effective_horizon)} steps | {int(horizon.lag_90)} steps | {int(horizon.true_lag_90)} steps | "
            f"{_percent(_finite(float(horizon.delivered_share)))} |"
        )
    return "\n".join(lines)


def side_by_side(measured: Sequence[Measured]) -> str:
    """Success and horizon of the methods, a row for each, and a column for each task."""
    measured = [m for m in measured if not m.bare]
    tasks = _tasks(measured)
    methods = _methods(measured, tasks)
    columns, rows = list(dict.fromkeys(tasks)), list(dict.fromkeys(methods))
    lines = [
        "Mean success; expected horizon (the effective one where no context tells what is to be remembered) while learning, median of the",
        "runs (every run); where training logged none, at the checkpoint, in italics. In steps.",
        "",
        f"| method | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for method in rows:
        cells = []
        for task in columns:
            chosen = [m for m, *cell in zip(measured, methods, tasks, strict=True) if cell == [method, task]]
            successes = [m.results[SUCCESS] for m in chosen if SUCCESS in m.results]
            success = "" if not successes else f"{mean(successes):.0%}; "
            learning = [m.while_learning for m in chosen]
            known = [x for x in learning if x is not None]
            mark, numbers = ("", known) if len(known) == len(chosen) else ("*", [m.reach for m in chosen])
            every = " ".join(f"{x:g}" for x in numbers)
            cells.append(f"{success}{mark}{median(numbers):g}{mark} ({every})" if chosen else "not measured")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _methods(measured: Sequence[Measured], tasks: Sequence[str]) -> list[str]:
    """The method of each, with those settings in which runs of the same method on the same task do not agree, but for the seed."""
    settings = [_settings(m) for m in measured]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    differing: dict[str, dict[str, None]] = {m.method: {} for m in measured}
    for m, task, own in zip(measured, tasks, settings, strict=True):
        first = cells.setdefault((m.method, task), own)
        differing[m.method] |= dict.fromkeys(name for name in own if own[name] != first[name])
    return [
        ", ".join([m.method, *(f"{name}={own[name]}" for name in differing[m.method])])
        for m, own in zip(measured, settings, strict=True)
    ]


def _settings(measured: Measured) -> dict[str, Any]:
    config, sections = measured.config, to_dict(measured.config)
    of_agent = {f"{s}.{name}": value for s in ("model", "algorithm", "critic") for name, value in sections[s].items()}
    # of how far it is, and by which length its rates fall: two checkpoints of one run are no two seeds
    progress = {"step": measured.step, "run.total_steps": config.run.total_steps}
    return {"env.num_envs": config.env.num_envs, **of_agent, **progress}


def _tasks(measured: Sequence[Measured]) -> list[str]:
    """The environment of each, with those of its arguments in which not all agree."""
    everything = [m.config.env.kwargs for m in measured]
    names = list(dict.fromkeys(name for kwargs in everything for name in kwargs))
    differing = [name for name in names if any(k.get(name) != everything[0].get(name) for k in everything)]
    return [
        " ".join([m.config.env.id, *(f"{name}={m.config.env.kwargs.get(name)}" for name in differing)])
        for m in measured
    ]


def _metrics(folder: Path, step: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What `Measured` has of the run's metrics up to `step`."""
    try:
        rows = [row for row in read_metrics(folder) if row["step"] <= step]
    except ValueError:  # a checkpoint can be measured without the metrics beside it
        return {}, []
    results: dict[str, float] = {}
    for row in rows:
        results |= {name: row[name] for name in (SUCCESS, RETURN) if math.isfinite(row.get(name, math.nan))}
    solved_at = next((row["step"] for row in rows if row.get(SUCCESS, 0.0) >= SOLVED), math.inf)
    logged = [row | {"solved": row["step"] >= solved_at} for row in rows if all(name in row for name in LOGGED)]
    return results, logged


def _steps(found: float | None) -> str:
    return "" if found is None else f"{found:g} steps"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="horizon.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or one checkpoint in it")
    parser.add_argument(
        "--length", type=integer(4), metavar="N", help="steps of the sequences (default: run.credit_length)"
    )
    parser.add_argument("--num_envs", type=integer(1), metavar="N", help="sequences (default: run.credit_num_envs)")
    parser.add_argument(
        "--seed",
        type=integer(0, 2**32 - 1),
        metavar="N",
        help="of environments and actions (default: that of the run, which repeats what training logged)",
    )
    parser.add_argument("--bare", action="store_true", help="also measure truncated BPTT alone, without the critics")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and curves")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves as PNG")
    arguments = parser.parse_args(argv)
    for option in ("json", "plot"):
        file = getattr(arguments, option)
        if file is not None:
            parser.check_file(f"--{option}", file)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables. Returns 0, 2 if the options are bad or any run could not be measured (the others are), or 130 after Ctrl-C."""
    arguments = _parse(argv)
    measured: list[Measured] = []
    code = 0
    try:
        for run in arguments.runs:
            try:
                measured += measure(
                    run,
                    length=arguments.length,
                    num_envs=arguments.num_envs,
                    seed=arguments.seed,
                    bare=(False, True) if arguments.bare else (False,),
                )
            except (ValueError, ImportError) as error:
                # what would not fit in memory is an option of this script, too
                print(f"horizon.py: {str(error).replace('--run.credit_', '--')}", file=sys.stderr)
                code = 2
    except KeyboardInterrupt:  # what has been measured may have taken minutes
        found = "what had been measured follows" if measured else "nothing had been measured"
        print(f"horizon.py: interrupted; {found}", file=sys.stderr)
        code = 130
    if measured:
        print(table(measured))
        if len(arguments.runs) > 1:
            print(f"\n{side_by_side(measured)}")
        if arguments.json is not None:
            text = json.dumps([m.as_dict() for m in measured], indent=1)
            write_text(arguments.json, f"{text}\n")
            print(f"numbers in {arguments.json}")
        if arguments.plot is not None:
            names = [f"{m.name}, {m.method}" for m in measured]
            chart = credit_figure(list(zip(names, (m.horizon for m in measured), strict=True)))
            chart.savefig(arguments.plot, format="png")
            print(f"curves in {arguments.plot}")
    return code


if __name__ == "__main__":
    sys.exit(main())
