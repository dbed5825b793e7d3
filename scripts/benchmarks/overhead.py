"""`overhead`: what a method adds to an update of the learner, in time and memory."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import dni_rl
from agents.config import TrainConfig
from agents.train import Trainer
from benchmarks.measuring import MIB, Ratio, in_turns, machine, markdown, peak_bytes, seconds_of, tensor_bytes
from benchmarks.methods import DUE_EVERY, PLAIN, UNFUSED, WINDOW, Method, comparable, methods


class StoredRollout:
    """A method's learner and one rollout to learn from again and again.

    Args:
        config: of the method.
        fused: False takes the written-out LSTM where short windows without dense targets would have the CPU's fused kernel.
    """

    def __init__(self, config: TrainConfig, *, fused: bool = True):
        self.trainer = Trainer(config)
        self.learner, self.device = self.trainer.learner, self.trainer.device
        core = self.learner.model.core
        if isinstance(core, dni_rl.LSTM) and not fused:
            core.targets_per_window = None
        self.rollout = self.trainer.actor.collect()
        # As later in a run, behind the first 16 windows, all of which are looked at: of the next DUE_EVERY as many are as of any others.
        self._count_windows(16 + 2 * DUE_EVERY)

    def seconds_per_update(self) -> float:
        """Mean over as many updates as there are from one look at the yardstick to the next."""
        return seconds_of(self._updates, self.device) / DUE_EVERY

    def peak_bytes(self) -> int:
        """Memory of an update, the yardstick's second backward pass included: what lives between updates and the most that joins it.

        Parameters, optimisers' state, traces and sensitivities live between updates; the rollout is not counted.
        """
        learner = self.learner
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.critic_optimizer is not None:
            learner.critic_optimizer.zero_grad(set_to_none=True)
        self._count_windows_until_one_is_due()
        held = tensor_bytes(learner.state_dict())
        return held + peak_bytes(lambda: learner.update(self.rollout), self.device)

    def _updates(self) -> None:
        for _ in range(DUE_EVERY):
            self.learner.update(self.rollout)

    def _count_windows(self, seen: int) -> None:
        for critic in self.learner.critics:
            critic.set_extra_state(torch.tensor(seen))

    def _count_windows_until_one_is_due(self) -> None:
        for critic in self.learner.critics:
            assert isinstance(critic, dni_rl.ErrorCritic)
            seen = 16 + 3 * DUE_EVERY
            critic.set_extra_state(torch.tensor(seen))
            while critic.max_norm_ratio is not None and not critic.window_is_due():
                seen += 1
            critic.set_extra_state(torch.tensor(seen))


def sequence_peak(kind: str, length: int, hidden_size: int, batch_size: int, device: torch.device) -> int:
    """Memory of learning from sequences of so many steps, from window to window, in bytes; see `peak_bytes`.

    The loop of the README: cut, unroll, backward, step. Inputs are drawn for each window, so that they do not count.

    Args:
        kind: "none", "dni" (with a window of WINDOW steps), or "full" (one window).
        length: steps, a multiple of WINDOW.
        hidden_size: H of the LSTM.
        batch_size: B.
        device: where everything lives.
    """
    torch.manual_seed(0)
    window = length if kind == "full" else WINDOW
    core, head = dni_rl.LSTM(64, hidden_size).to(device), nn.Linear(hidden_size, 1).to(device)
    critic = None
    if kind == "dni":
        critic = dni_rl.GradientCritic(state_sizes=core.state_sizes, max_norm_ratio=1.0).to(device)
    core.targets_per_window = 0 if critic is None else None
    optimizer = torch.optim.Adam([*core.parameters(), *head.parameters(), *(critic.parameters() if critic else ())])

    def learn(num_windows: int) -> None:
        state = core.initial_state(batch_size)
        for _ in range(num_windows):
            state = dni_rl.cut(state)
            outputs, next_state = core.unroll(torch.randn(window, batch_size, 64, device=device), state)
            losses = head(outputs).squeeze(-1).square()
            dni_rl.backward(losses, start=state, end=next_state, critic=critic)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state = next_state

    learn(1)  # the optimiser's state is there
    held = tensor_bytes([list(core.parameters()), list(head.parameters()), optimizer.state_dict()])
    held += tensor_bytes(critic.state_dict()) if critic is not None else 0
    return held + peak_bytes(lambda: learn(length // window), device)


def overhead(
    hidden_sizes: Sequence[int],
    rounds: int,
    device: torch.device,
    *,
    num_envs: int = 16,
    online_envs: int = 2,
    rollout_length: int = 64,
    lengths: Sequence[int] = (64, 128, 256, 512, 1024),
    threads: int = 1,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures time and memory per learner update, and memory by length of the sequence; prints tables, returns all figures.

    Args:
        hidden_sizes: widths of the LSTM.
        rounds: behind the warm-up.
        device: where everything lives.
        num_envs: as all that follow, see `methods`.
        online_envs: B for BP(lambda).
        rollout_length: T.
        lengths: of the sequences; those are left out where only some methods are asked for.
        threads: of PyTorch on the CPU.
        only: names of methods, which are measured beside their baselines and plain truncated BPTT; all of them if empty.

    Raises:
        ValueError: if a name is unknown.
    """
    torch.set_num_threads(threads)
    settings = {"num_envs": num_envs, "online_envs": online_envs, "rollout_length": rollout_length}
    results: dict[str, Any] = {
        "command": "overhead",
        "machine": machine(device, threads),
        "settings": {"window": WINDOW, "rounds": rounds, "updates_per_round": DUE_EVERY} | settings,
        "rows": [],
    }
    for hidden_size in hidden_sizes:
        matrix = methods(hidden_size, device=str(device), threads=threads, **settings)
        if device.type == "cpu":
            matrix[UNFUSED] = matrix[PLAIN]
        if unknown := [name for name in only if name not in matrix]:
            raise ValueError(f"--methods: found {unknown[0]!r}, allowed {', '.join(map(repr, matrix))}")
        if only:
            wanted = {PLAIN, *only, *(matrix[name].baseline for name in only)}
            matrix = {name: method for name, method in matrix.items() if name in wanted}
        refused: dict[str, str] = {}
        learners: dict[str, StoredRollout] = {}
        for name, method in matrix.items():
            try:
                learners[name] = StoredRollout(method.config, fused=name != UNFUSED)
            except ValueError as error:  # traces that would not fit
                refused[name] = str(error)
        turns = {name: learner.seconds_per_update for name, learner in learners.items()}
        seconds = in_turns(turns, rounds, f"LSTM {hidden_size}")
        peaks = {name: learner.peak_bytes() for name, learner in learners.items()}
        rows = [
            overhead_row(name, matrix, seconds, peaks) | {"hidden_size": hidden_size}
            if name in seconds
            else {"method": name, "refused": refused[name], "hidden_size": hidden_size}
            for name in matrix
        ]
        print(f"\n### LSTM {hidden_size}\n\n{overhead_table(rows)}")
        results["rows"] += rows
    if only:
        return results
    results["sequences"] = {
        kind: {str(length): sequence_peak(kind, length, 128, num_envs, device) for length in lengths}
        for kind in ("none", "dni", "full")
    }
    print(f"\n### Memory by length of the sequence, LSTM 128, MiB\n\n{sequence_table(results['sequences'])}")
    return results


def overhead_row(
    name: str, matrix: Mapping[str, Method], seconds: Mapping[str, list[float]], peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Figures of one method, as ratios to its baseline and to plain truncated BPTT of the LSTM."""
    baseline = matrix[name].baseline
    row: dict[str, Any] = {
        "method": name,
        "baseline": baseline,
        "seconds": seconds[name],
        "peak_bytes": peaks[name],
        "time_ratio": vars(Ratio.of(seconds[name], seconds[baseline])),
        "memory_ratio": peaks[name] / peaks[baseline],
    }
    if comparable(matrix[name], matrix[PLAIN]):
        row["time_ratio_to_plain_lstm"] = vars(Ratio.of(seconds[name], seconds[PLAIN]))
        row["memory_ratio_to_plain_lstm"] = peaks[name] / peaks[PLAIN]
    return row


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; ratios of time and memory, above 1 is more."""
    header = [
        "method",
        "ms per update",
        "baseline",
        "time / baseline",
        "memory, MiB",
        "memory / baseline",
        "time, memory / none",
    ]
    lines = []
    for row in rows:
        if "refused" in row:
            lines.append([row["method"], f"refused: {row['refused'].split('; ')[1]}", *[""] * 5])
            continue
        is_baseline = row["baseline"] == row["method"]
        lines.append(
            [
                row["method"],
                f"{1e3 * statistics.median(row['seconds']):.1f}",
                "" if is_baseline else row["baseline"],
                "" if is_baseline else str(Ratio(**row["time_ratio"])),
                f"{row['peak_bytes'] / MIB:.1f}",
                "" if is_baseline else f"{row['memory_ratio']:.2f}",
                ""
                if row["method"] == PLAIN or "time_ratio_to_plain_lstm" not in row
                else f"{row['time_ratio_to_plain_lstm']['median']:.2f}, {row['memory_ratio_to_plain_lstm']:.2f}",
            ]
        )
    return markdown(header, lines)


def sequence_table(peaks: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown, one column for each length."""
    names = {"none": f"none, window {WINDOW}", "dni": f"dni, window {WINDOW}", "full": "none, full BPTT"}
    header = ["method", *(f"{length} steps" for length in peaks["none"])]
    return markdown(header, [[names[kind], *(f"{b / MIB:.2f}" for b in by.values())] for kind, by in peaks.items()])
