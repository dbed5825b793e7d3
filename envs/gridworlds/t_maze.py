"""T-mazes: a cue, a corridor in which nothing tells how far one is, and a turn that only the cue can decide.

The T-maze goes back to Bakker, "Reinforcement Learning with Long Short-Term Memory" (2001). The passive and the active
one, the actions and the reward follow Ni et al., "When Do Transformers Shine in RL? Decoupling Memory from Credit
Assignment" (2023), section 4.1 and its code. What differs here: distractor inputs, corridors of random length, and
slack in the time limit, where theirs leaves just the steps that a perfect run needs.

           up (cue +1)                       a step costs `penalty` unless it is one forward, the turn, or
    o s - - - - - j                          the step onto an oracle not seen yet
           down (cue -1)

A T-maze is small enough to be written out as tables, so that a step of the batch is a few lookups.
"""

import torch
from torch import Tensor

from envs.arguments import refuse, require_integer, require_number
from envs.gridworlds.batched import SUCCESS_MARGIN, BatchedGridworld
from envs.timestep import EnvSpec, TimeStep

RIGHT, UP, LEFT, DOWN = range(4)  # Ni et al.'s order


class _TMaze(BatchedGridworld):
    """A T-maze whose oracle lies `oracle_distance` steps behind the start (0: the start is the oracle).

    A state is the tuple (length, cell, cue, view), flattened; a cell is counted from the oracle, and the view says
    whether the cue was not seen yet (0), is seen now (1), or was seen before (2). An entry is a pair of state and
    action, or one of the ways to start an episode; what follows from each entry stands in the tables.
    """

    state_names: tuple[str, ...] = ("_state", "_time")
    context_names = ("cue", "position", "distance", "at_start", "at_junction", "cue_seen", "time_left")

    def __init__(
        self,
        corridor_length: int,
        oracle_distance: int,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str,
        num_distractors: int,
        min_corridor_length: int | None,
        penalty: float | None,
        time_limit: int | None,
        max_cue_delay: int = 0,
    ):
        require_integer("corridor_length", corridor_length, 1)
        require_integer("num_distractors", num_distractors, 0)
        shortest = corridor_length if min_corridor_length is None else min_corridor_length
        require_integer("min_corridor_length", shortest, 1, corridor_length, "None keeps corridor_length fixed")
        require_integer(
            "max_cue_delay", max_cue_delay, 0, shortest - 1, "the cue must come before the junction can be reached"
        )
        steps_needed = corridor_length + 2 * oracle_distance + 1
        limit = 2 * steps_needed if time_limit is None else time_limit
        require_integer(
            "time_limit", limit, steps_needed, None, "the longest corridor must be solvable; None is twice that"
        )
        cost = 1.0 / (limit - 1) if penalty is None else penalty
        require_number("penalty", cost, 0.0, 1.0, "it is subtracted; 0 turns it off")
        wasted = limit - 1 - shortest  # most steps that an episode which still succeeds can be fined for
        worst_success = 1.0 - cost * wasted
        if worst_success < SUCCESS_MARGIN:  # the best failure returns 0
            refuse(
                "penalty",
                cost,
                f"up to {(1 - SUCCESS_MARGIN) / wasted:g}, so that a late success beats a failure",
                "lower it, or time_limit, or leave it None",
            )
        dials = {
            "corridor_length": corridor_length,
            "num_distractors": num_distractors,
            "min_corridor_length": shortest,
            "penalty": cost,
            "time_limit": limit,
        }
        if max_cue_delay:  # without it, the task and its random stream are those from before there was this dial
            dials["max_cue_delay"] = max_cue_delay
            self.state_names = (*self.state_names, "_cue_time")
        super().__init__(num_envs=num_envs, seed=seed, device=device, dials=dials)
        self.time_limit = limit
        self.num_distractors, self.max_cue_delay = num_distractors, max_cue_delay
        self.observation_names = (
            *("cue", "at_junction", "at_start"),
            *(f"distractor_{i}" for i in range(num_distractors)),
        )
        self.spec = EnvSpec(
            observation_shape=(len(self.observation_names),),
            observation_dtype=torch.float32,
            num_actions=4,
            context_size=len(self.context_names),
            success_reward=0.5 * worst_success,
        )
        self._build_tables(shortest, corridor_length, oracle_distance, cost)
        self._state = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._time = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # steps since the episode's first
        self._cue_time = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # when the cue is shown

    def reference_policy(self) -> Tensor:
        """Fetches the cue, walks to the junction, turns to the cue's side: [B] actions."""
        return self._reference_actions.index_select(0, self._state)

    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        shape = (num_steps, self.num_envs)
        starts = torch.randint(
            self._num_entries - self._num_starts,
            self._num_entries,
            shape,
            generator=self._generator,
            device=self.device,
        )
        distractors = self._draw_distractors(num_steps, self.num_distractors)
        if not self.max_cue_delay:
            return starts, distractors
        cue_times = torch.randint(self.max_cue_delay + 1, shape, generator=self._generator, device=self.device)
        return starts, distractors, cue_times

    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        start, distractors, *cue_time = draws
        first = self._last
        entry = torch.where(first, start, torch.add(actions, self._state, alpha=4))  # 4 actions
        state = self._next_state.index_select(0, entry)
        reward = self._reward.index_select(0, entry)
        discount = self._discount.index_select(0, entry)
        time = (self._time + 1).masked_fill_(first, 0)
        last = (time == self.time_limit).logical_or_(discount == 0)
        if cue_time:
            self._cue_time = torch.where(first, cue_time[0], self._cue_time)
            state = state + (time == self._cue_time)  # from "not seen yet" to "seen now"

        observation = self._visible.index_select(0, state)
        if self.num_distractors:
            observation = torch.cat((observation, distractors), dim=1)
        context = self._hidden.index_select(0, state).add_(self._clock.index_select(0, time))
        self._state, self._time, self._last = state, time, last.clone()
        return TimeStep(observation, reward, discount, first, last, context)

    def _build_tables(self, shortest: int, longest: int, oracle: int, cost: float) -> None:
        """Writes the maze out: about 100 bytes for each of S = 6 (N - min + 1) (N + 1 + oracle) states."""
        lengths = torch.arange(shortest, longest + 1)
        grid = torch.meshgrid(
            lengths, torch.arange(longest + oracle + 1), torch.tensor([-1, 1]), torch.arange(3), indexing="ij"
        )
        length, cell, cue, view = (x.flatten() for x in grid)  # [S] each
        junction = length + oracle
        at_start, at_junction = cell == oracle, cell == junction

        def state_index(length: Tensor, cell: Tensor, cue: Tensor, view: Tensor) -> Tensor:
            return (((length - shortest) * (longest + oracle + 1) + cell) * 2 + (cue > 0)) * 3 + view

        # [S, 4], one column per action
        action = torch.arange(4)
        move = (action == RIGHT).long() - (action == LEFT).long()
        sideways = (action == UP) | (action == DOWN)
        next_cell = (cell[:, None] + move).clamp(min=0).minimum(junction[:, None])
        seen = (view > 0)[:, None]
        fetches = ~seen & (next_cell == 0) & (not self.max_cue_delay)  # a cue that comes by the clock is not fetched
        next_view = torch.where(seen, 2, fetches.long())
        turns = at_junction[:, None] & sideways
        succeeds = turns & ((action == UP) == (cue > 0)[:, None])
        is_free = turns | (next_cell > cell[:, None]) | fetches
        reward = succeeds.float() - cost * (~is_free).float()
        next_state = state_index(length[:, None], next_cell, cue[:, None], next_view)

        # An episode starts with any length and cue, at the start; where that is the oracle the cue is seen, unless it comes later.
        start_length, start_cue = (x.flatten() for x in torch.meshgrid(lengths, torch.tensor([-1, 1]), indexing="ij"))
        start_view = torch.full_like(start_cue, int(oracle == 0 and not self.max_cue_delay))
        starts = state_index(start_length, torch.full_like(start_cue, oracle), start_cue, start_view)
        self._num_starts = len(starts)
        self._num_entries = next_state.numel() + len(starts)
        self._next_state = torch.cat((next_state.flatten(), starts)).to(self.device)  # [E]
        self._reward = torch.cat((reward.flatten(), torch.zeros(len(starts)))).to(self.device)  # [E]
        self._discount = torch.cat((1.0 - turns.flatten().float(), torch.ones(len(starts)))).to(self.device)  # [E]

        forward = torch.where(at_junction, torch.where(cue > 0, UP, DOWN), RIGHT)
        self._reference_actions = torch.where((view > 0) | (oracle == 0), forward, LEFT).to(self.device)  # [S]
        visible = (cue * (view == 1), at_junction, at_start)
        self._visible = torch.stack([x.float() for x in visible], dim=1).to(self.device)  # [S, 3]
        position, distance = (cell - oracle) / longest, (junction - cell) / (longest + oracle)
        hidden = (cue, position, distance, at_start, at_junction, view > 0, torch.zeros_like(cue))
        self._hidden = torch.stack([x.float() for x in hidden], dim=1).to(self.device)  # [S, Z]
        clock = torch.zeros(self.time_limit + 1, len(self.context_names))
        clock[:, -1] = torch.linspace(1.0, 0.0, self.time_limit + 1)
        self._clock = clock.to(self.device)  # [time_limit + 1, Z]


class PassiveTMaze(_TMaze):
    """The cue is seen in the first step only, or in a random one soon after; N steps from the start it decides the turn.

    Memory length N, credit assignment length 1 in the terms of Ni et al. (2023): the turn is paid at once, but must be
    chosen by what was seen N steps before. With `max_cue_delay` the cue comes up to so many steps later, by the clock and
    wherever the agent is, but never at the junction; with a random length as well, no fixed timing leads back to it.

    Observation, float32 [3 + num_distractors]: the cue (+1: up, -1: down) in the step in which it is shown, otherwise 0;
    whether this is the junction; whether this is the start; and `num_distractors` values of +-1 drawn anew at every
    step, independent of everything. All cells between start and junction look the same.

    Actions: 0 right (forward), 1 up, 2 left, 3 down. A move into a wall stays. A turn at the junction ends the episode
    (discount 0) with reward 1 on the cue's side and 0 on the other; the last observation still shows the junction.

    Every other step that does not lead forward has reward -penalty. Ni et al. fine, with 1/N, each step at which the
    agent is behind schedule; with slack in time that would fine a single early slip to the end, so here each idle step
    is fined once, and by default so little that a success is worth more than any failure.

    Time limit: twice the N + 1 steps needed (Ni et al. leave none to spare); it cuts, that is the last step keeps
    discount 1.

    Context, in [-1, 1]: cue, position / N, distance to the junction / N, at start, at junction, cue seen (always 1
    without max_cue_delay), share of the time limit left. An episode is a success (return >= spec.success_reward)
    exactly if it took the right turn; guessing succeeds in half of them.
    """

    def __init__(
        self,
        corridor_length: int = 20,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        num_distractors: int = 0,
        min_corridor_length: int | None = None,
        penalty: float | None = None,
        time_limit: int | None = None,
        max_cue_delay: int = 0,
    ):
        """Builds the mazes; episodes start with `reset`.

        Args:
            corridor_length: N, steps from the start to the junction; the largest, where lengths vary.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            num_distractors: random inputs beside the three informative ones.
            min_corridor_length: each episode's length is uniform in [this, corridor_length]; None: all are the same.
                The tables grow with the number of lengths times N: 7 MB for 1 to 100, 700 MB for 1 to 1000.
            penalty: cost of a step that does not lead forward; None: 1 / (time_limit - 1); 0 turns it off.
            time_limit: steps after which an episode is cut; None: 2 (N + 1).
            max_cue_delay: the cue is shown in a step uniform in [0, this], the first step being 0; less than the shortest
                corridor.

        Raises:
            ValueError: if a setting is out of range.
        """
        super().__init__(
            corridor_length,
            oracle_distance=0,
            num_envs=num_envs,
            seed=seed,
            device=device,
            num_distractors=num_distractors,
            min_corridor_length=min_corridor_length,
            penalty=penalty,
            time_limit=time_limit,
            max_cue_delay=max_cue_delay,
        )


class ActiveTMaze(_TMaze):
    """The cue must be fetched: the oracle lies one step behind the start, N + 1 steps from the junction.

    Memory length and credit assignment length both grow with N (Ni et al. 2023, whose oracle is one step away, too):
    the step to the oracle is paid N + 2 steps later.

    As PassiveTMaze, but the cue is 0 except in the step that first enters the oracle. The oracle itself looks like the
    corridor otherwise. The step onto an oracle not seen yet is free, as in Ni et al.; the time limit is twice the N + 3
    steps needed. In the context, position / N is -1 / N at the oracle, the distance is divided by N + 1, and cue_seen
    tells whether the oracle was visited (the cue itself is there from the start).
    """

    def __init__(
        self,
        corridor_length: int = 20,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        num_distractors: int = 0,
        min_corridor_length: int | None = None,
        penalty: float | None = None,
        time_limit: int | None = None,
    ):
        """Builds the mazes; see `PassiveTMaze` for the arguments (`time_limit` None is 2 (N + 3) here)."""
        super().__init__(
            corridor_length,
            oracle_distance=1,
            num_envs=num_envs,
            seed=seed,
            device=device,
            num_distractors=num_distractors,
            min_corridor_length=min_corridor_length,
            penalty=penalty,
            time_limit=time_limit,
        )
