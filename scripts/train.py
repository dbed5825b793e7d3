"""Trains a recurrent actor-critic agent, with or without an error critic.

    python scripts/train.py --config configs/tmaze20_cdni.yaml --run.seed 1
    python scripts/train.py --resume runs/PassiveTMaze_cdni_k8_seed1

Results (config.yaml, metrics.jsonl, TensorBoard events, checkpoints) are left in one folder per run.
"""

import logging
import sys

from agents.config import parse_train_config
from agents.train import NonFiniteError, train


def main() -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    config, resume = parse_train_config()
    try:
        directory = train(config, resume)
    except NonFiniteError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, ImportError) as error:  # a missing package is named with the extra that brings it
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"train.py: interrupted; {error if error.args else 'nothing new was saved'}", file=sys.stderr)
        return 130
    print(f"results in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
