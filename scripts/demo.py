"""Trains two agents on a memory task, side by side, and prints what each reached: what `make train` runs.

The task is the passive T-maze of `configs/tmaze.yaml`: a cue is seen in the first step only, the way to the junction is 20 steps,
and four random inputs change at every step. Both agents backpropagate through windows of 8 steps. They differ in one setting: one has
an error critic, which predicts the gradient from beyond the window, and the other has none.

    python scripts/demo.py --run.total_steps 2000000
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

from agents.metrics import read_metrics
from commandline import OneLineParser

ROOT = Path(__file__).resolve().parent.parent
ARMS = {  # method: value of critic.kind, the one setting in which they differ
    "decoupled (critic with context)": "cdni",
    "plain truncated BPTT": "none",
}
BAR = 0.95


def main() -> int:
    """Trains both arms in parallel processes. Returns 0 if the decoupled agent reached the bar, otherwise 1."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further options: those of train.py, for both agents, but for critic.kind, run.output_dir and run.name",
        allow_abbrev=False,
    )
    _, given = parser.parse_known_args()
    for option in given:
        if option.split("=")[0] in ("--critic.kind", "--run.output_dir", "--run.name", "--resume"):
            parser.error(f"{option.split('=')[0]}: set by this script; use scripts/train.py")
    options = ["--run.total_steps", "1500000", "--run.output_dir", "runs/demo", *given]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        "--config",
        str(ROOT / "configs" / "tmaze.yaml"),
        *options,
    ]
    runs = {}
    for method, kind in ARMS.items():
        folder = _free_folder(Path("runs/demo"), kind)
        # one progress bar is enough: that of the decoupled agent
        quiet = [] if kind == "cdni" else ["--run.progress", "false"]
        arguments = ["--critic.kind", kind, "--run.name", folder.name, *quiet]
        runs[method] = folder, subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
    print(
        "training two agents on a T-maze with a corridor of 20 steps, one with an error critic, one without ...",
        flush=True,
    )
    try:
        codes = [process.wait() for _, process in runs.values()]
    except KeyboardInterrupt:  # both received it too, and save a checkpoint
        for _, process in runs.values():
            process.wait()
        return 130
    if any(codes):
        return max(codes)

    success = {}
    print(f"\n| {'method':<32} | window | success at the end | steps to {BAR:.0%} | steps per second |")
    print(f"|{'-' * 34}|--------|--------------------|--------------|------------------|")
    for method, (folder, _) in runs.items():
        rows = read_metrics(folder)
        last = rows[-1]
        successes = [row.get("charts/success_rate", math.nan) for row in rows]
        # in a short last interval no episode may have ended
        success[method] = next((rate for rate in reversed(successes) if math.isfinite(rate)), math.nan)
        reached = next((f"{row['step']:,.0f}" for row in rows if row.get("charts/success_rate", 0) >= BAR), "never")
        print(
            f"| {method:<32} | {last['bptt/horizon']:>6.0f} | {success[method]:>18.1%} | {reached:>12} | {last['charts/SPS']:>16,.0f} |"
        )
    print(
        "\nChance is 50 %. Curves: tensorboard --logdir runs/demo; results:",
        *(str(folder) for folder, _ in runs.values()),
    )
    return 0 if success["decoupled (critic with context)"] >= BAR else 1


def _free_folder(parent: Path, name: str) -> Path:
    """`parent / name`, or with the first number behind it that no earlier run has taken."""
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
    raise RuntimeError(f"{parent}: ten thousand runs called {name}; delete some")


if __name__ == "__main__":
    sys.exit(main())
