"""Evaluates the policy of a training run on fresh episodes.

    python scripts/evaluate.py runs/PassiveTMaze_cdni_k8_seed0 --episodes 100
    python scripts/evaluate.py runs/breakout --episodes 20 --video breakout.gif --json breakout.json

Actions are drawn from the policy, as in training, unless --greedy; Atari scores are raw points. Every environment plays the same
number of episodes, so that short ones do not count more often.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from agents.build import seed_global_generators
from agents.evaluate import (
    MAX_VIDEO_FRAMES,
    Film,
    check_filmable,
    evaluate,
    format_summary,
    load_policy,
    result_dict,
    summarize,
)
from commandline import OneLineParser, integer
from dni_rl.files import write_text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of the run, or one checkpoint in it")
    parser.add_argument("--episodes", type=integer(1), default=100, metavar="N", help="episodes to play (default: 100)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable action instead of drawing one")
    parser.add_argument(
        "--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="of environments and actions (default: 0)"
    )
    parser.add_argument(
        "--num_envs", type=integer(1), metavar="N", help="environments side by side (default: the run's)"
    )
    parser.add_argument("--video", type=Path, metavar="FILE", help="GIF of an episode, for image observations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all returns and the summary")
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        parser.check_file("--json", arguments.json)
    # A folder that is missing is told with all else about videos.
    if arguments.video is not None and arguments.video.parent.is_dir():
        parser.check_writable("--video", arguments.video.parent)
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    policy, make_environment = load_policy(arguments.run)
    torch.set_num_threads(policy.config.run.threads)
    seed_global_generators(arguments.seed)
    num_envs = min(arguments.num_envs or policy.config.env.num_envs, arguments.episodes)
    environment = make_environment(num_envs, arguments.seed)
    try:
        film = None
        if arguments.video is not None:
            check_filmable(environment.spec, arguments.video)
            film = Film(environment, is_stack=policy.config.env.id.startswith("ALE/"))
        with tqdm(total=arguments.episodes, unit=" episodes", disable=not sys.stderr.isatty(), leave=False) as progress:
            evaluation = evaluate(
                policy.model,
                environment,
                arguments.episodes,
                greedy=arguments.greedy,
                seed=arguments.seed,
                on_step=None if film is None else film.record,
                on_episodes=progress.update,
            )
    finally:
        environment.close()
    actions = "greedy" if arguments.greedy else "sampled"
    print(
        f"{policy.config.env.id} after {policy.step:,} agent steps: {arguments.episodes} episodes, {actions} actions, "
        f"seed {arguments.seed}"
    )
    print(format_summary(summarize(evaluation)))
    if arguments.json is not None:
        result = result_dict(policy, evaluation, greedy=arguments.greedy, seed=arguments.seed, num_envs=num_envs)
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
        print(f"results in {arguments.json}")
    if film is not None:
        frames_per_step = environment.spec.frames_per_step
        film.save(arguments.video, frames_per_second=60 / frames_per_step if frames_per_step > 1 else 10)
        note = f", cut after {MAX_VIDEO_FRAMES} frames" if len(film.frames) >= MAX_VIDEO_FRAMES else ""
        print(f"video in {arguments.video}{note}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    arguments = _parse(argv)
    try:
        _run(arguments)
    except (ValueError, ImportError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
