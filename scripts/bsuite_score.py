"""Trains agents on settings of bsuite and prints bsuite's own scores.

    python scripts/bsuite_score.py --config configs/bsuite.yaml --results runs/bsuite memory_len/0 memory_len/9 memory_len/16
    python scripts/bsuite_score.py --config configs/bsuite.yaml --results runs/bsuite_plain memory_len/16 --critic.kind none
    python scripts/bsuite_score.py --results runs/bsuite       # scores of what is there

Each setting is an agent of its own, trained for the number of episodes that bsuite asks for (10,000 in most experiments), counted
over all its environments; the score is about how it did meanwhile. The records are bsuite's CSV files, one for each setting, and what
is there is skipped. An experiment's score in the sense of bsuite is that of all its settings.

Options are those of train.py, but for --resume; env.id is that of each ID. Of `run.*`, seed, device and threads count.
`--run.total_steps` bounds nothing here, but the learning rate falls to 0 over it unless algorithm.anneal_learning_rate is false. The
others have no effect, because there are no metrics and no checkpoints: output_dir, name, log_every_steps, checkpoint_every_steps,
credit_every_steps, credit_length, credit_num_envs, tensorboard, progress.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agents.config import TrainConfig, parse_train_config
from agents.train import NonFiniteError, Trainer
from commandline import OneLineParser
from envs.third_party import BsuiteRecorder, bsuite_scores, record_path


def train_and_record(config: TrainConfig, bsuite_id: str) -> BsuiteRecorder:
    """Trains an agent for the episodes of the setting, and returns their record.

    Raises:
        ValueError: if the configuration cannot be built.
        NonFiniteError: if a loss became NaN or infinite.
    """
    trainer = Trainer(config)
    try:
        recorder = BsuiteRecorder(trainer.environment, bsuite_id)
        while recorder.episodes < recorder.num_episodes:
            culprit = trainer.first_non_finite(trainer.update())
            if culprit is not None:
                raise NonFiniteError(
                    f"{culprit}: NaN or infinity after {recorder.episodes:,} episodes; nothing was saved"
                )
        return recorder
    finally:
        trainer.close()


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, TrainConfig]:
    """The arguments, and the configuration of every agent but for its env.id."""
    parser = OneLineParser(
        prog="bsuite_score.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("ids", nargs="*", metavar="ID", help="settings to train on, for example memory_len/9")
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="bsuite's records")
    parser.add_argument(
        "--config", default=[], action="append", metavar="FILE", help="as of train.py, with its options"
    )
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    # The parser, which does not know the options of train.py, would take their values for IDs.
    own: list[str] = []
    options: list[str] = []
    words = iter(sys.argv[1:] if argv is None else argv)
    for word in words:
        if re.match(r"--\w+\.", word):
            options += [word] if "=" in word else [word, *itertools.islice(words, 1)]
        else:
            own.append(word)
    arguments = parser.parse_intermixed_args(own)
    if arguments.resume is not None:
        parser.error(
            f"--resume: found {arguments.resume!r}; allowed new agents only, whose settings on record are skipped; leave it out"
        )
    files = [part for file in arguments.config for part in ("--config", file)]
    config, _ = parse_train_config([*files, *options])
    if arguments.ids:  # found out before hours of training
        parser.check_writable("--results", arguments.results)
    return arguments, config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a setting could not be trained (the others are), or 130 after Ctrl-C. Bad options end the program with 2."""
    arguments, config = _parse(argv)
    code = 0
    for bsuite_id in arguments.ids:
        if record_path(arguments.results, bsuite_id).exists():
            continue
        try:
            recorder = train_and_record(replace(config, env=replace(config.env, id=f"bsuite/{bsuite_id}")), bsuite_id)
            file = recorder.save(arguments.results)
        except (ValueError, ImportError, NonFiniteError, OSError) as error:
            print(f"bsuite_score.py: {error}", file=sys.stderr)
            code = 1
            continue
        except KeyboardInterrupt:
            print(
                f"bsuite_score.py: interrupted; {bsuite_id} has no record, and is begun anew next time", file=sys.stderr
            )
            code = 130
            break
        print(
            f"{bsuite_id}: {recorder.episodes:,} episodes in {recorder.rows[-1]['steps']:,} steps; {file}", flush=True
        )
    try:
        scores = bsuite_scores(arguments.results)
    except (ValueError, ImportError) as error:
        print(f"bsuite_score.py: {error}", file=sys.stderr)
        return code or 1
    print("\n| experiment | score | settings |\n|---|---|---|")
    for experiment, (score, ids) in scores.items():
        print(f"| {experiment} | {score:.3f} | {', '.join(ids)} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
