"""Measures speed and memory, in one run, contenders in turn, as ratios.

    OMP_NUM_THREADS=1 python scripts/benchmark.py speed --output docs/results/speed.json
    OMP_NUM_THREADS=1 python scripts/benchmark.py overhead --output docs/results/overhead.json
    python scripts/benchmark.py gpu --output gpu.json
    python scripts/benchmark.py workers --config configs/tmaze.yaml --output docs/results/workers.json

`speed` trains on MiniGrid-MemoryS7-v0 and on Breakout (LSTM-128, 8 environments, rollout 128, one thread) with this project and with
sb3-contrib's RecurrentPPO at the same settings, and on our own T-maze (64 environments). Both sides have one LSTM shared by
policy and value, the same torso, heads, epochs, minibatches of the same size, and neither sees the previous action or reward.
RecurrentPPO acts through the environment stack that its authors document. A round is one rollout and its updates; all contenders take
their turn in every round, and a ratio is the median over rounds of the ratio within a round. Each task has a process of its own.

`overhead` has the learners of all methods learn from a stored rollout, again and again: what a method adds to plain truncated BPTT
with the same window, without environments and acting. Beside it the memory of one long sequence, window by window.

`gpu` trains each method with environments, acting and learning on one device, beside the same run without a critic and beside PyTorch's
LSTM (cuDNN) alone; measures how fast the gridworlds train, peak memory and waits of the host; and lets each method learn an easy
task for seconds. In under eight minutes; without a CUDA device the same in a small form.

`workers` trains a configuration in one process, in several that learn together under torchrun, and in as many that know nothing of each
other, which is the most that the machine has to give. What it does not know are options of train.py: --env.num_envs 256.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from agents.config import require_device
from benchmarks.gpu import CPU_FORM, DEVICE_FORM, gpu
from benchmarks.measuring import write
from benchmarks.overhead import overhead
from benchmarks.speed import speed
from benchmarks.workers import workers
from commandline import OneLineParser


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("speed", help="steps per second beside RecurrentPPO")
    command.add_argument(
        "--tasks", nargs="+", choices=["minigrid", "breakout", "tmaze"], default=["minigrid", "breakout", "tmaze"]
    )
    command.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    command.add_argument("--output", type=Path, help="writes every measurement as JSON")
    command = commands.add_parser("overhead", help="time and memory per learner update, beside plain truncated BPTT")
    command.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="widths of the LSTM")
    command.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="rows of the table; by default all")
    _measuring_options(command, rounds=5)
    command = commands.add_parser("gpu", help="the whole battery on one device; without one, its small form")
    _measuring_options(command, rounds=3)
    command = commands.add_parser("workers", help="steps per second of several processes beside one")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--steps", type=int, default=500_000, help="of each process")
    command.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    command.add_argument("--output", type=Path, help="writes every measurement as JSON")
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.command != "workers":
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    for name in ("rounds", "threads", "processes", "steps"):
        if getattr(arguments, name, 1) < 1:
            parser.error(f"--{name}: found {getattr(arguments, name)}; allowed an integer of at least 1")
    if arguments.output is not None:
        parser.check_writable("--output", arguments.output.parent)
    warnings.filterwarnings("ignore", module="gymnasium|stable_baselines3|pygame")
    if arguments.command == "speed":
        write(speed(arguments.tasks, arguments.rounds), arguments.output)
        return 0
    if arguments.command == "workers":
        try:
            results = workers(options, arguments.processes, arguments.steps, arguments.rounds)
        except RuntimeError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 2
        write(results, arguments.output)
        return 0
    try:
        device = require_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:
        print(
            f"benchmark.py: {str(error).replace('--run.device', '--device').replace('run.device', '--device')}",
            file=sys.stderr,
        )
        return 2
    if arguments.command == "overhead":
        try:
            results = overhead(
                arguments.sizes, arguments.rounds, device, threads=arguments.threads, only=arguments.methods
            )
        except ValueError as error:
            print(f"benchmark.py: {error}", file=sys.stderr)
            return 2
    else:
        form = DEVICE_FORM if device.type == "cuda" else CPU_FORM
        results = gpu(form, arguments.rounds, device, arguments.threads)
    write(results, arguments.output)
    return 0


def _measuring_options(command: argparse.ArgumentParser, rounds: int) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:<index>; by default the first CUDA device, or the CPU")
    command.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    command.add_argument("--rounds", type=int, default=rounds, help="rounds after the warm-up")
    command.add_argument("--output", type=Path, help="writes every measurement as JSON")


if __name__ == "__main__":
    sys.exit(main())
