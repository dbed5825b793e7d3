"""How far back do the gradients of a trained agent reach? Measures the credit horizon of a run's last checkpoint.

    python scripts/horizon.py runs/PassiveTMaze_cdni_k8_seed0 --plot horizon.png

The agent acts in fresh environments; then, by lag, the true gradient of each loss with respect to earlier states (full BPTT over the
batch) is held against what truncated windows deliver, with the run's error critic and without. See `dni_rl.horizon.credit_horizon`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.build import build_environment
from agents.checkpoint import load_checkpoint
from agents.config import CONFIG_FILE, load_config
from agents.learner import make_windows
from agents.losses import actor_critic_loss
from agents.rollout import Actor
from agents.train import Trainer
from dni_rl.horizon import CreditHorizon, credit_horizon


def measure(run: Path, *, length: int, num_envs: int, seed: int) -> dict[str, CreditHorizon]:
    """Credit horizons of a run, by name: with the run's critic (if it has one) and without.

    Args:
        run: the run's folder.
        length: T, steps of the batch.
        num_envs: B.
        seed: of environments and actions.
    """
    config = load_config(run / CONFIG_FILE)
    trainer = Trainer(replace(config, run=replace(config.run, device="cpu")))
    trainer.learner.load_state_dict(load_checkpoint(run)["learner"])
    model, critic, algorithm = trainer.learner.model, trainer.learner.critic, config.algorithm
    environment = build_environment(replace(config.env, num_envs=num_envs), seed, trainer.device)
    actor = Actor(environment, model, rollout_length=length, bptt_horizon=length, seed=seed)
    actor.collect()  # so that the batch begins in the middle of episodes, as in training
    windows = make_windows(actor.collect(), length, algorithm.discount, algorithm.gae_lambda)
    inputs = model.core_inputs(windows.observation, windows.action_tm1, windows.reward, windows.first).detach()

    def losses(outputs: Tensor) -> Tensor:
        logits, values = model.heads(outputs)
        return actor_critic_loss(
            logits,
            values,
            windows.action,
            windows.advantage,
            windows.value_target,
            windows.valid,
            entropy_cost=algorithm.entropy_cost,
            baseline_cost=algorithm.baseline_cost,
        ).total

    horizons = {}
    arms = (
        {"truncated BPTT alone": None} if critic is None else {"with its critic": critic, "truncated BPTT alone": None}
    )
    for name, arm in arms.items():
        horizons[name] = credit_horizon(
            model.core,
            losses,
            inputs,
            windows.state,
            windows.first,
            window=algorithm.bptt_horizon,
            critic=arm,
            context=windows.context if arm is not None and arm.context_size else None,
            num_lags=length // 2,
            margin=length // 2,
        )
    trainer.close()
    environment.close()
    return horizons


def plot(horizons: dict[str, CreditHorizon], path: Path) -> None:
    """Norms and cosines by lag."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chart, (norms, cosines) = plt.subplots(1, 2, figsize=(9, 3.4))
    first = next(iter(horizons.values()))
    lags = np.arange(1, len(first.cosine) + 1)
    norms.semilogy(lags, first.true_norm.numpy(), color="black", label="true gradient")
    for name, horizon in horizons.items():
        norms.semilogy(lags, horizon.delivered_norm.clamp_min(1e-12).numpy(), label=f"delivered {name}")
        cosines.plot(lags, horizon.cosine.numpy(), label=name)
    cosines.axhline(0.5, color="grey", linewidth=0.8)
    norms.set(
        xlabel="lag in steps", ylabel="RMS norm", ylim=(float(first.true_norm[first.true_norm > 0].min()) / 10, None)
    )
    cosines.set(xlabel="lag in steps", ylabel="cosine with the true gradient")
    norms.legend(fontsize=7)
    cosines.legend(fontsize=7)
    chart.tight_layout()
    chart.savefig(path, dpi=110)


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument(
        "--length", type=int, default=256, help="steps of the batch; at least twice the memory asked about"
    )
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="writes the curves as PNG")
    arguments = parser.parse_args()
    if arguments.length < 4 or arguments.num_envs < 1:
        parser.error("--length must be at least 4 and --num-envs at least 1")
    torch.set_num_threads(1)
    try:
        horizons = measure(arguments.run, length=arguments.length, num_envs=arguments.num_envs, seed=arguments.seed)
    except (ValueError, ImportError) as error:
        print(f"horizon.py: {error}", file=sys.stderr)
        return 2
    print(
        "| gradient | reach (cosine above 0.5) | 90 % of the norm within | true gradient: 90 % within | norm delivered |"
    )
    print("|---|---|---|---|---|")
    for name, horizon in horizons.items():
        print(
            f"| {name} | {int(horizon.reach)} steps | {int(horizon.lag_90)} steps | {int(horizon.true_lag_90)} steps | "
            f"{float(horizon.delivered_share):.0%} |"
        )
    if arguments.plot is not None:
        plot(horizons, arguments.plot)
        print(f"curves in {arguments.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
