"""Trains a recurrent actor-critic agent, with or without an error critic.

    python scripts/train.py --config configs/tmaze.yaml --run.seed 1
    python scripts/train.py --resume runs/PassiveTMaze_cdni_k8_seed1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 scripts/train.py --config configs/tmaze.yaml

Under torchrun every process has env.num_envs environments of its own, gradients are averaged, and total_steps counts those of all
processes. After a worker has failed, --max-restarts lets all of them continue from the last checkpoint; it takes --standalone or an
--rdzv-id that no other run has, which tell whose the checkpoint is.

Results (config.yaml, metrics.jsonl, TensorBoard events, checkpoints) are left in one folder per run.
"""

import contextlib
import io
import logging
import sys
from pathlib import Path

from agents.config import TrainConfig, parse_train_config
from agents.parallel import ALONE, LostWorkerError, connect, is_first_process
from agents.train import NonFiniteError, train


def main() -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C."""
    # Of several processes one speaks.
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING if is_first_process() else logging.ERROR
    )
    with contextlib.ExitStack() as stack:
        if not is_first_process():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        config, resume = parse_train_config()
    code, line = run(config, resume)
    if line:
        print(line, file=sys.stderr if code else sys.stdout)
    return code


def run(config: TrainConfig, resume: Path | None) -> tuple[int, str]:
    """Trains, together with the other processes that torchrun has started. Returns the exit code and a line to print, or ""."""
    workers = ALONE
    try:
        with connect(config.run.device) as workers:
            directory = train(config, resume, workers)
        return 0, f"results in {directory}" if workers.is_first else ""
    except (NonFiniteError, LostWorkerError) as error:
        code, line = 1, str(error)
    except (ValueError, ImportError) as error:  # a missing package is named with the extra that brings it
        code, line = 2, str(error)
    except OSError as error:
        if isinstance(error, ConnectionError):  # to an environment's process, which says itself what went wrong
            raise
        where = f" {error.filename}" if error.filename else ""
        code, line = (
            1,
            f"found{where} that cannot be written or read ({error.strerror or error}); what was saved before stands",
        )
    except KeyboardInterrupt as error:
        code, line = 130, f"interrupted; {error if error.args else 'nothing new was saved'}"
    return code, f"train.py: {line}" if workers.speaks else ""


if __name__ == "__main__":
    sys.exit(main())
