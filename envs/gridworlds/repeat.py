"""Repeat first, repeat previous: a stream of symbols, and questions about what it showed before.

After Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning" (2023), and its code. What differs
here: the symbols are drawn independently (theirs are suits of a deck, so that the cards left tell a little), questions
come at irregular times and are visible as such, there are distractor inputs, and a wrong answer costs nothing. Actions
change nothing but the reward, so these are the purest of memory tasks: what is to be learned is what to keep. Hide the
previous action from the agent (`model.previous_action: false`): who sees it can repeat the answer from step to step, and
remember nothing.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from envs.arguments import require_integer
from envs.gridworlds.batched import BatchedGridworld
from envs.timestep import EnvSpec, TimeStep

_SUCCESS = 0.9  # share of right answers that makes an episode a success


class _Repeat(BatchedGridworld):
    """A stream with events at random distances; all but the first `num_silent` events are questions.

    The answer to a question is the oldest entry of the memory. The subclass says which symbol is shown and which are
    remembered.
    """

    state_names = ("_memory", "_count", "_wait", "_asks")

    def __init__(
        self,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str,
        num_answers: int,
        num_symbols: int,
        num_distractors: int,
        memory_names: tuple[str, ...],
        num_silent: int,
        shortest_wait: int,
        longest_wait: int,
        dials: dict[str, int],
    ):
        require_integer("num_answers", num_answers, 1)
        require_integer("num_symbols", num_symbols, 2)
        require_integer("num_distractors", num_distractors, 0)
        dials = {
            **dials,
            "num_answers": num_answers,
            "num_symbols": num_symbols,
            "num_distractors": num_distractors,
        }
        super().__init__(num_envs=num_envs, seed=seed, device=device, dials=dials)
        self.num_answers, self.num_symbols, self.num_distractors = num_answers, num_symbols, num_distractors
        self._num_silent, self._shortest_wait, self._longest_wait = num_silent, shortest_wait, longest_wait
        self.episode_length = (num_silent + num_answers - 1) * longest_wait + 1  # steps at most
        self.observation_names = (
            *("at_start", "asks"),
            *(f"symbol_{i}" for i in range(num_symbols)),
            *(f"distractor_{i}" for i in range(num_distractors)),
        )
        self.context_names = (
            *(f"{name}_is_{i}" for name in memory_names for i in range(num_symbols)),
            *("asks", "wait_left", "events_left"),
        )
        self.spec = EnvSpec(
            observation_shape=(len(self.observation_names),),
            observation_dtype=torch.float32,
            num_actions=num_symbols,
            context_size=len(self.context_names),
            success_reward=(math.ceil(_SUCCESS * num_answers) - 0.5) / num_answers,
        )
        # One row per symbol, and a row of zeros for "none".
        self._one_hot = torch.eye(num_symbols + 1, num_symbols, device=self.device)
        self._memory = torch.full((num_envs, len(memory_names)), num_symbols, device=self.device)  # newest first
        self._count = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # events so far
        self._wait = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # steps until the next one
        self._asks = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    def reference_policy(self) -> Tensor:
        """Remembers everything: [B] actions, right wherever a question is asked."""
        return self._memory[:, -1].clamp(max=self.num_symbols - 1)  # where nothing is to be said yet, anything

    @abstractmethod
    def _take(self, symbol: Tensor, first: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the symbol shown [B] (`num_symbols`: none) and the memory [B, M] behind this step."""

    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        shape, generator, device = (num_steps, self.num_envs), self._generator, self.device
        symbol = torch.randint(self.num_symbols, shape, generator=generator, device=device)
        wait = torch.randint(self._shortest_wait, self._longest_wait + 1, shape, generator=generator, device=device)
        return symbol, wait, self._draw_distractors(num_steps, self.num_distractors)

    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        symbol, new_wait, distractors = draws
        first = self._last
        answered = self._asks & ~first
        right = answered & (actions == self._memory[:, -1])
        last = answered & (self._count == self._num_silent + self.num_answers)

        wait = (self._wait - 1).masked_fill_(first, 0)
        event = wait == 0
        self._wait = torch.where(event, new_wait, wait)
        self._count = self._count.masked_fill(first, 0).add_(event)
        self._asks = event & (self._count > self._num_silent) & ~last
        shown, self._memory = self._take(symbol, first, event)
        self._last = last.clone()

        flags = torch.stack((first, self._asks), dim=1).float()
        observation = torch.cat((flags, self._one_hot.index_select(0, shown), distractors), dim=1)
        reward = right.float().div_(self.num_answers)
        return TimeStep(observation, reward, (~last).float(), first, last, self._describe())

    def _describe(self) -> Tensor:
        num_events = self._num_silent + self.num_answers
        clock = (self._asks.float(), self._wait / self._longest_wait, (1.0 - self._count / num_events).clamp_(min=0.0))
        memory = self._one_hot.index_select(0, self._memory.flatten()).view(self.num_envs, -1)
        return torch.cat((memory, torch.stack(clock, dim=1)), dim=1)


class RepeatFirst(_Repeat):
    """The symbol of the first step is the answer to every question; other symbols are shown in every step after it.

    Memory length: `min_delay` to `delay` steps at the first question, up to `num_answers` times that at the last. Credit
    assignment length 1 in the terms of Ni et al. (2023): an answer is paid at once. With `delay=1` there is a question at
    every step, as in POPGym, whose three sizes have 51, 415 and 831 of them.

    Observation, float32 [2 + num_symbols + num_distractors]: whether this is the first step; whether a question is
    asked; the symbol, one-hot; values of +-1 drawn anew at every step, independent of everything. The symbols after the
    first step are uniform and independent, so that no observation but the first says anything about the answer, and the
    questions come after random waits, so that no fixed delay leads back to it.

    Actions: one per symbol; ignored where no question is asked. A right answer has reward 1 / num_answers, a wrong one
    0. The episode ends (discount 0) with the last answer.

    Context, in [0, 1]: the first symbol, one-hot; whether a question is asked; share of the longest wait until the next
    one; share of events (the first symbol and the questions) left. An episode is a success (return >=
    spec.success_reward) exactly if nine in ten answers were right. Without memory one in num_symbols is.
    """

    def __init__(
        self,
        delay: int = 10,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        min_delay: int | None = None,
        num_answers: int = 4,
        num_symbols: int = 4,
        num_distractors: int = 4,
    ):
        """Builds the streams; episodes start with `reset`.

        Args:
            delay: longest wait for a question, in steps: the dial of memory length.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            min_delay: each wait is uniform in [this, delay]; None: half of it, rounded up; `delay`: all are the same.
            num_answers: questions an episode.
            num_symbols: kinds of symbols, and actions.
            num_distractors: random inputs beside the informative ones.

        Raises:
            ValueError: if a setting is out of range.
        """
        require_integer("delay", delay, 1)
        shortest = (delay + 1) // 2 if min_delay is None else min_delay
        require_integer("min_delay", shortest, 1, delay, f"{delay} keeps the delay fixed")
        super().__init__(
            num_envs=num_envs,
            seed=seed,
            device=device,
            num_answers=num_answers,
            num_symbols=num_symbols,
            num_distractors=num_distractors,
            memory_names=("first",),
            num_silent=1,
            shortest_wait=shortest,
            longest_wait=delay,
            dials={"delay": delay, "min_delay": shortest},
        )

    def _take(self, symbol: Tensor, first: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
        return symbol, torch.where(first, symbol, self._memory[:, 0]).unsqueeze(1)


class RepeatPrevious(_Repeat):
    """Symbols come one by one, and the answer to each is the symbol `delay` symbols back.

    Memory length: `delay` symbols at once, each for `delay` to `delay * max_gap` steps, and only their order tells which
    one is due. Credit assignment length 1: an answer is paid at once. With `max_gap=1` every step shows a symbol, as in
    POPGym, whose three sizes reach back 3, 31 and 63 symbols (its k counts the one in sight).

    Observation, float32 [2 + num_symbols + num_distractors]: whether this is the first step; whether an answer is due;
    the symbol, one-hot, or zeros between two symbols; values of +-1 drawn anew at every step, independent of everything.
    Symbols are uniform and independent and come after random gaps, so that no fixed delay leads back to the answer.

    Actions: one per symbol; ignored where no answer is due, that is between symbols and at the first `delay` of them. A
    right answer has reward 1 / num_answers, a wrong one 0. The episode ends (discount 0) with the last answer.

    Context, in [0, 1]: the last delay + 1 symbols, newest first, one-hot each (zeros: none yet); whether an answer is
    due; share of the longest gap until the next symbol; share of symbols left. An episode is a success (return >=
    spec.success_reward) exactly if nine in ten answers were right. Without memory one in num_symbols is.
    """

    def __init__(
        self,
        delay: int = 4,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        max_gap: int = 3,
        num_answers: int = 20,
        num_symbols: int = 4,
        num_distractors: int = 4,
    ):
        """Builds the streams; episodes start with `reset`.

        Args:
            delay: how many symbols back the answer lies: the dial of memory length.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            max_gap: each symbol comes uniformly 1 to this many steps after the one before; 1: no gaps.
            num_answers: answers an episode; it shows delay + num_answers symbols.
            num_symbols: kinds of symbols, and actions.
            num_distractors: random inputs beside the informative ones.

        Raises:
            ValueError: if a setting is out of range.
        """
        require_integer("delay", delay, 1)
        require_integer("max_gap", max_gap, 1)
        super().__init__(
            num_envs=num_envs,
            seed=seed,
            device=device,
            num_answers=num_answers,
            num_symbols=num_symbols,
            num_distractors=num_distractors,
            memory_names=tuple(f"symbol_{i}_back" for i in range(delay + 1)),
            num_silent=delay,
            shortest_wait=1,
            longest_wait=max_gap,
            dials={"delay": delay, "max_gap": max_gap},
        )

    def _take(self, symbol: Tensor, first: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
        memory = self._memory.masked_fill(first.unsqueeze(1), self.num_symbols)
        pushed = torch.cat((symbol.unsqueeze(1), memory[:, :-1]), dim=1)
        return symbol.masked_fill(~event, self.num_symbols), torch.where(event.unsqueeze(1), pushed, memory)
