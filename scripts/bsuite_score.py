"""Trains agents on settings of bsuite and prints bsuite's own scores.

    python scripts/bsuite_score.py --config configs/bsuite.yaml --results runs/bsuite memory_len/0 memory_len/9 memory_len/16
    python scripts/bsuite_score.py --config configs/bsuite.yaml --results runs/bsuite_plain memory_len/16 --critic.kind none
    python scripts/bsuite_score.py --results runs/bsuite       # scores of what is there

Each setting is an agent of its own, trained for the number of episodes that bsuite asks for (10,000 in most experiments), counted
over all its environments; the score is about how it did meanwhile. The records are bsuite's CSV files, one for each setting, and what
is there is skipped. `--run.total_steps` bounds nothing here, but the learning rate falls to 0 over it unless
algorithm.anneal_learning_rate is false. An experiment's score in the sense of bsuite is that of all its settings.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from agents.config import TrainConfig, parse_train_config
from agents.train import NonFiniteError, Trainer
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a setting could not be trained; the others are."""
    parser = argparse.ArgumentParser(
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
    arguments, options = parser.parse_known_args(argv)
    failed = False
    for bsuite_id in arguments.ids:
        if record_path(arguments.results, bsuite_id).exists():
            continue
        files = [part for file in arguments.config for part in ("--config", file)]
        config, _ = parse_train_config([*files, *options, "--env.id", f"bsuite/{bsuite_id}"])
        try:
            recorder = train_and_record(config, bsuite_id)
        except (ValueError, ImportError, NonFiniteError) as error:
            print(f"bsuite_score.py: {error}", file=sys.stderr)
            failed = True
            continue
        file = recorder.save(arguments.results)
        print(
            f"{bsuite_id}: {recorder.episodes:,} episodes in {recorder.rows[-1]['steps']:,} steps; {file}", flush=True
        )
    try:
        scores = bsuite_scores(arguments.results)
    except (ValueError, ImportError) as error:
        print(f"bsuite_score.py: {error}", file=sys.stderr)
        return 1
    print("\n| experiment | score | settings |\n|---|---|---|")
    for experiment, (score, ids) in scores.items():
        print(f"| {experiment} | {score:.3f} | {', '.join(ids)} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
