"""An experiment: which error critic learns the gradient that carries a memory, and how fast?

    OMP_NUM_THREADS=1 python scripts/critic_fit.py --report docs/results/critic_fit

Hypothesis: critics differ less in what they can represent than in what they find under the noise, because nearly all of the variance of
a gradient target is noise. So the agent is frozen: plain truncated BPTT trains it on the distractor T-maze (corridor 40) until it walks
to the junction and guesses there. The true gradient that carries the cue, d(future loss)/d(state) averaged over episodes with cue +1
minus the same with cue -1, is measured by full BPTT at several positions. Then critics are trained on the frozen agent's rollouts, with
windows of 8, and their answer is held against the truth: cosine (direction) and ratio of norms (strength).
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import dni_rl
from agents.build import build_environment, spread_seeds
from agents.config import TrainConfig, load_config
from agents.learner import Learner, Windows, make_windows
from agents.rollout import Actor
from agents.train import Trainer
from commandline import OneLineParser
from dni_rl.cores import State, UnrolledState
from dni_rl.files import write_text
from reading import handwritten, write_above

ROOT = Path(__file__).resolve().parent.parent
CORRIDOR, WINDOW = 40, 8
POSITIONS = (8, 24, 38)
TRAINED_STEPS = 400_000  # of the agent, before it is frozen
ROLLOUTS = 8  # of 256 environments and 128 steps each, for the true gradient
REPORTED_UPDATES = (50, 100, 200, 400)
MADE_BY = "Made by `python scripts/critic_fit.py`"  # stands on the page


class MLPAlone(nn.Sequential):
    """What a critic's net would be without the linear path: zero at the start as well."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        head = nn.Linear(hidden, outputs)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        super().__init__(nn.Linear(inputs, hidden), nn.Tanh(), head)


def variants(state_sizes: tuple[int, ...], context_size: int) -> dict[str, dni_rl.GradientCritic]:
    """The critics compared, by name; all of them are linear in the last layer and start at zero."""

    def critic(hidden_sizes: tuple[int, ...], discount: float) -> dni_rl.GradientCritic:
        return dni_rl.GradientCritic(
            state_sizes=state_sizes, hidden_sizes=hidden_sizes, context_size=context_size, gradient_discount=discount
        )

    alone = critic((128,), 0.98)
    alone.net = MLPAlone(sum(state_sizes) + context_size, 128, sum(state_sizes))
    return {
        "MLP without a linear path, g = 0.98": alone,
        "linear, g = 0.98": critic((), 0.98),
        "linear + MLP, g = 0.98": critic((128,), 0.98),
        "linear + MLP, g = 0.9": critic((128,), 0.9),
    }


def losses_of(learner: Learner, windows: Windows, state: State) -> tuple[Tensor, State]:
    """Unreduced losses of the frozen agent, and the state after the windows."""
    logits, values, end = learner.model.unroll(
        windows.observation, windows.action_tm1, windows.reward, windows.first, state, windows.privileged
    )
    return learner.losses(logits, values, windows).total, end


def true_cue_gradients(
    config: TrainConfig, trainer: Trainer, env_seed: int, actor_seed: int
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """By position: the gradient that carries the cue [n], and states [N, n] and contexts [N, Z] there."""
    environment = build_environment(replace(config.env, num_envs=256), env_seed, trainer.device)
    names = environment.context_names  # type: ignore[attr-defined]
    cue, position = names.index("cue"), names.index("position")
    length, reach = 128, 64  # losses up to `reach` steps ahead are inside the rollout: an episode is shorter
    actor = Actor(environment, trainer.learner.model, rollout_length=length, bptt_horizon=length, seed=actor_seed)
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {p: [] for p in POSITIONS}
    for _ in range(ROLLOUTS):
        windows = make_windows(actor.collect(), length, config.algorithm.discount, config.algorithm.gae_lambda)
        losses, end = losses_of(trainer.learner, windows, dni_rl.cut(windows.state))
        losses.sum().backward()
        assert isinstance(end, UnrolledState) and windows.context is not None
        gradient, states = torch.cat(end.history.gradients, -1), torch.cat(end.history.states, -1)
        context = windows.context[:-1]
        inside = (torch.arange(length) < length - reach).unsqueeze(1) & ~windows.first & windows.valid
        for p in POSITIONS:
            rows = ((context[..., position] * CORRIDOR).round() == p) & inside
            found[p].append((gradient[rows], states[rows], context[rows]))
    result = {}
    for p, parts in found.items():
        gradient, states, context = (torch.cat(part) for part in zip(*parts, strict=True))
        up = context[:, cue] > 0
        result[p] = (gradient[up].mean(0) - gradient[~up].mean(0)) / 2, states, context
    return result


def answer(critic: dni_rl.GradientCritic, states: Tensor, context: Tensor) -> Tensor:
    """The cue-carrying part of a critic's prediction, [n]. Cue is the first entry of the context."""
    with torch.no_grad():
        predicted = torch.cat(critic(states.split(critic.state_sizes, dim=-1), context), dim=-1)
    up = context[:, 0] > 0
    return (predicted[up].mean(0) - predicted[~up].mean(0)) / 2


def experiment(seed: int) -> list[dict]:
    """All critics on one frozen agent."""
    config = load_config(ROOT / "configs" / "tmaze.yaml")
    kwargs = {**config.env.kwargs, "corridor_length": CORRIDOR, "time_limit": CORRIDOR + 9}
    config = replace(
        config,
        env=replace(config.env, kwargs=kwargs),
        model=replace(config.model, chrono_max=2 * CORRIDOR),
        critic=replace(config.critic, kind="none"),
        run=replace(config.run, seed=seed, total_steps=1_000_000),
    )
    trainer = Trainer(config)
    while trainer.step < TRAINED_STEPS:
        trainer.update()
    *_, env_seed, actor_seed, truth_env_seed, truth_actor_seed = spread_seeds(seed, 16)  # training has the first few
    truth = true_cue_gradients(config, trainer, truth_env_seed, truth_actor_seed)
    context_size = trainer.environment.spec.context_size
    rows = []
    for name, critic in variants(trainer.learner.model.core.state_sizes, context_size).items():
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.9, 0.99))
        environment = build_environment(replace(config.env, num_envs=64), env_seed, trainer.device)
        actor = Actor(environment, trainer.learner.model, rollout_length=16, bptt_horizon=WINDOW, seed=actor_seed)
        for update in range(1, REPORTED_UPDATES[-1] + 1):
            windows = make_windows(actor.collect(), WINDOW, config.algorithm.discount, config.algorithm.gae_lambda)
            state = dni_rl.cut(windows.state)
            losses, end = losses_of(trainer.learner, windows, state)
            optimizer.zero_grad()
            report = dni_rl.backward(
                losses, start=state, end=end, critic=critic, alive=windows.alive, context=windows.context
            )
            optimizer.step()
            if update in REPORTED_UPDATES:
                for p, (true, states, context) in truth.items():
                    said = answer(critic, states, context)
                    cosine = torch.cosine_similarity(said, true, dim=0).item()
                    ratio = (said.norm() / true.norm()).item()
                    rows.append(
                        {
                            "critic": name,
                            "seed": seed,
                            "update": update,
                            "position": p,
                            "cosine": cosine,
                            "ratio": ratio,
                        }
                    )
        print(f"seed {seed}: {name}: explained variance {report.explained_variance:.3f}", file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict], seeds: list[int]) -> str:
    """Median over seeds (and range) of cosine and ratio, by critic, update and position."""
    lines = [
        "# Which error critic finds the gradient that carries a memory?",
        "",
        *(__doc__ or "").strip().splitlines()[4:],
        "",
        f"{MADE_BY}, seeds {seeds}. Each cell: median over seeds (minimum to maximum) of the cosine; of the ratio.",
        "",
        f"| critic | updates | {' | '.join(f'{p} steps from the start' for p in POSITIONS)} |",
        f"|---|---|{'---|' * len(POSITIONS)}",
    ]
    for name in dict.fromkeys(row["critic"] for row in rows):
        for update in REPORTED_UPDATES:
            cells = []
            for p in POSITIONS:
                chosen = [r for r in rows if (r["critic"], r["update"], r["position"]) == (name, update, p)]
                cells.append(
                    "; ".join(
                        f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})"
                        for v in ([r["cosine"] for r in chosen], [r["ratio"] for r in chosen])
                    )
                )
            lines.append(f"| {name} | {update} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parses the command line, runs all seeds, writes the report."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--report", type=Path, help="writes <report>.md and .json; keeps what is written by hand below")
    arguments = parser.parse_args()
    if any(not 0 <= seed < 2**32 for seed in arguments.seeds):
        parser.error(f"--seeds: found {arguments.seeds}; allowed integers from 0 to 2**32 - 1")
    report = arguments.report
    if report is not None:
        if not report.name:
            parser.error(
                f"--report: found {str(report)!r}; allowed a name for the page, without .md; add one to the folder"
            )
        page, file = (report.with_name(f"{report.name}.{ending}") for ending in ("md", "json"))
        parser.check_writable("--report", report.parent)
        try:  # found out before hours of training
            handwritten(page, MADE_BY)
        except ValueError as error:
            parser.error(f"--report: {error}")
    rows = [row for seed in arguments.seeds for row in experiment(seed)]
    text = markdown(rows, arguments.seeds)
    print(text)
    if report is not None:
        write_text(file, json.dumps(rows))
        write_above(page, text, handwritten(page, MADE_BY))  # as it is now, hours later


if __name__ == "__main__":
    main()
