"""The methods that `overhead` and `gpu` measure, each beside the same run without what it adds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.config import NO_CRITIC, TrainConfig, from_dict

WINDOW, PERIODS = 8, (1, 8)  # of all methods but those of windows of one step; ticks of the multi-timescale levels
PLAIN = "none"
UNFUSED = (
    "none, without the fused kernel"  # on the CPU: which part of a critic's time is that of the kernel it cannot use
)
ROOT = Path(__file__).resolve().parents[2]
KINDS = ROOT / "configs" / "kinds"
DUE_EVERY = 64  # a multiple of all updates from one look at the yardstick of the bound to the next, see `ErrorCritic.window_is_due`


@dataclass(frozen=True)
class Method:
    """A run to measure: `baseline` is the name of the same run without what the method adds, `kind` a file of configs/kinds."""

    config: TrainConfig
    baseline: str = PLAIN
    kind: str | None = None


def methods(
    hidden_size: int, *, num_envs: int, online_envs: int, rollout_length: int, device: str, threads: int
) -> dict[str, Method]:
    """All methods on the T-maze with distractors, by name, each behind its baseline.

    Args:
        hidden_size: H of the core, of every level for multi_timescale.
        num_envs: B.
        online_envs: B for BP(lambda), whose traces grow with the cube of the state, and for its baseline.
        rollout_length: T of all but those two, whose rollouts have 2 steps; a multiple of 64, the window of the slowest level.
        device: where everything lives.
        threads: of PyTorch on the CPU.
    """

    def run(
        kind: str, *, window: int = WINDOW, core: str = "lstm", batch: int = num_envs, **critic: Any
    ) -> TrainConfig:
        # the bound and its yardstick belong to the method as it is used, see configs/tmaze.yaml
        bound = {} if kind in (*NO_CRITIC, "bp_lambda") else {"max_norm_ratio": 1.0}
        rollout = 2 if window == 1 else rollout_length
        return from_dict(
            {
                "env": {"num_envs": batch, "kwargs": {"corridor_length": 20, "num_distractors": 4}},
                "model": {
                    "core": core,
                    "hidden_size": hidden_size,
                    "periods": PERIODS,
                    "chrono_max": 40,
                    "input_gain": 3.0,
                },
                # It learns slowly: the same rollout many times must not end in a policy without entropy.
                "algorithm": {"rollout_length": rollout, "bptt_horizon": window, "learning_rate": 1e-5},
                "critic": {"kind": kind, "learning_rate": 1e-5} | bound | critic,
                "run": {"device": device, "threads": threads, "total_steps": 10**12},
            }
        )

    return {
        PLAIN: Method(run("none"), kind="none"),
        "dni": Method(run("dni"), kind="dni"),
        "dni, linear path and MLP of 128": Method(run("dni", hidden_sizes=(128,))),
        "dni, one target per window": Method(run("dni", dense_targets=False)),
        "dni, one target, every second update": Method(
            run("dni", dense_targets=False, fit_interval=2, yardstick_interval=16)
        ),
        "dni, one target, every fourth update": Method(
            run("dni", dense_targets=False, fit_interval=4, yardstick_interval=16)
        ),
        "cdni": Method(run("cdni"), kind="cdni"),
        "dni_aux": Method(run("dni_aux"), kind="dni_aux"),
        "loss_critic": Method(run("loss_critic"), kind="loss_critic"),
        "sobolev": Method(run("sobolev"), kind="sobolev"),
        "none, full BPTT": Method(run("none", window=rollout_length)),
        "none, elementwise_lstm": Method(run("none", core="elementwise_lstm"), "none, elementwise_lstm"),
        "rtrl": Method(run("rtrl", core="elementwise_lstm"), "none, elementwise_lstm", "rtrl"),
        "none, multi_timescale": Method(run("none", core="multi_timescale"), "none, multi_timescale"),
        "dni, multi_timescale": Method(run("dni", core="multi_timescale"), "none, multi_timescale", "multi_timescale"),
        "none, window 1": Method(run("none", window=1, batch=online_envs), "none, window 1"),
        "bp_lambda": Method(
            run("bp_lambda", window=1, batch=online_envs, hidden_sizes=(), normalize_targets=False),
            "none, window 1",
            "bp_lambda",
        ),
    }


def comparable(method: Method, other: Method) -> bool:
    """Whether an update of both learns from as many steps, and a ratio means something."""
    return (method.config.env.num_envs, method.config.algorithm.rollout_length) == (
        other.config.env.num_envs,
        other.config.algorithm.rollout_length,
    )
