"""Memory corridor: an object seen at one end of a corridor tells which of two at the other end to go to.

After MiniGrid's Memory environments (Chevalier-Boisvert et al., "Minigrid & Miniworld: Modular & Customizable
Reinforcement Learning Environments for Goal-Oriented Tasks", 2023). What differs here: a view of 3 x 3 cells, an alcove
instead of the start room, an end of the corridor right at the two objects, one action to reach them, distractor inputs,
and a fine for idling instead of a discount on the reward.

        c           a        c: the cue, one of two kinds     s: the start, looking east
        s - - - - - j        a, b: one object of each kind    j: the junction, `length` cells east of the start
                    b

Small enough to be written out as tables, so that a step of the batch is a few lookups.
"""

import torch
from torch import Tensor

from envs.arguments import refuse, require_integer, require_number
from envs.gridworlds.batched import SUCCESS_MARGIN, BatchedGridworld
from envs.timestep import EnvSpec, TimeStep

TURN_LEFT, TURN_RIGHT, FORWARD = range(3)  # MiniGrid's order
EAST, SOUTH, WEST, NORTH = range(4)  # clockwise, MiniGrid's order
_STEP = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]])  # column and row of one step ahead, by direction

# What the agent sees, relative to itself, (ahead, to the right): its own row and the two before it, without its own cell.
_VIEW = [(ahead, right) for ahead in (2, 1, 0) for right in (-1, 0, 1) if (ahead, right) != (0, 0)]


class MemoryCorridor(BatchedGridworld):
    """The agent looks about in a corridor with a view of 3 x 3 cells, and must find the object that it saw at the start.

    Memory length: `length` steps from the last sight of the cue to the turn at the junction. Credit assignment length:
    with `start_distance=0` the cue is in sight in the first step, and only the last two steps, the turn and the one
    after it, earn credit. Otherwise an episode starts 0 to `start_distance` cells down the corridor, looking away from
    the cue (as in MiniGrid, where it may be any cell of the corridor), and turning back to fetch the cue is paid at the
    end only: up to length + start_distance + 2 steps later.

    A cue seen from the corridor cannot be stored in the world: behind the first three cells it is out of sight whichever
    way the agent looks, and each time that it gets there it is in the same cell, looking east. So an agent without
    memory succeeds at most in half of the episodes.

    A state is the tuple (length, cell, direction, cue, side, seen), flattened: a cell is counted from the start, the side
    is that of the object which equals the cue, and seen tells whether the cue was in sight so far.

    Observation, float32 [16 + num_distractors], from the agent's point of view, the row two ahead first, left to right:
    which of the 8 cells around and ahead are walls; which are objects, and of which kind (+-1); and values of +-1 drawn
    anew at every step, independent of everything. Walls do not block the view. All cells from the fourth to the last but
    three look the same, in both directions along the corridor, and so the length, which varies, cannot be counted off.

    Actions: 0 turn left, 1 turn right, 2 forward. A move into a wall or the cue stays. A move onto an object at the
    junction ends the episode (discount 0) with reward 1 if it is of the cue's kind and 0 otherwise; the last observation
    is the one before that move.

    Every step that does not bring the agent nearer to the objects, turns counted, has reward -penalty, whether it saw
    the cue or not: the fine tells nothing of the cue, and does not pay for fetching it. A success is worth more than any
    failure.

    Time limit: twice the length + start_distance + 2 steps needed; it cuts, that is the last step keeps discount 1.

    Context, in [-1, 1]: cue; side (+1: the object like the cue is in the north); position / length; distance to the
    junction / length; looks east, south, west, north; cue seen; share of the time limit left. An episode is a success
    (return >= spec.success_reward) exactly if it ended at the right object; guessing succeeds in half of them.
    """

    state_names = ("_state", "_time")
    context_names = (
        *("cue", "side", "position", "distance", "looks_east", "looks_south", "looks_west", "looks_north"),
        *("cue_seen", "time_left"),
    )

    def __init__(
        self,
        length: int = 20,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        min_length: int | None = None,
        start_distance: int = 0,
        num_distractors: int = 4,
        penalty: float | None = None,
        time_limit: int | None = None,
    ):
        """Builds the corridors; episodes start with `reset`.

        Args:
            length: N, cells from the start to the junction: the dial of memory length; the largest, where it varies.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            min_length: each episode's length is uniform in [this, length]; None: half of it, rounded up, but at least 3;
                `length`: all are the same. The tables grow with the number of lengths times N.
            start_distance: an episode starts uniformly 0 to this many cells down the corridor; 0: at the cue.
            num_distractors: random inputs beside the informative ones.
            penalty: cost of a step that does not lead to the objects; None: 1 / time_limit; 0 turns it off.
            time_limit: steps after which an episode is cut; None: 2 (N + start_distance + 2).

        Raises:
            ValueError: if a setting is out of range.
        """
        require_integer("length", length, 3, None, "a shorter corridor shows cue and objects at once")
        shortest = max(3, (length + 1) // 2) if min_length is None else min_length
        require_integer("min_length", shortest, 3, length, f"{length} keeps the length fixed")
        require_integer("start_distance", start_distance, 0, shortest, "it must lie within the shortest corridor")
        require_integer("num_distractors", num_distractors, 0)
        steps_needed = length + start_distance + 2
        limit = 2 * steps_needed if time_limit is None else time_limit
        require_integer(
            "time_limit", limit, steps_needed, None, "the longest corridor must be solvable; None is twice that"
        )
        cost = 1.0 / limit if penalty is None else penalty
        require_number("penalty", cost, 0.0, 1.0, "it is subtracted; 0 turns it off")
        worst_success = 1.0 - cost * (limit - 1)  # the last step is never fined
        if worst_success < SUCCESS_MARGIN:  # the best failure returns 0
            refuse(
                "penalty",
                cost,
                f"up to {(1 - SUCCESS_MARGIN) / (limit - 1):g}, so that a late success beats a failure",
                "lower it, or time_limit, or leave it None",
            )
        dials = {
            "length": length,
            "min_length": shortest,
            "start_distance": start_distance,
            "num_distractors": num_distractors,
            "penalty": cost,
            "time_limit": limit,
        }
        super().__init__(num_envs=num_envs, seed=seed, device=device, dials=dials)
        self.time_limit = limit
        self.num_distractors = num_distractors
        cells = [f"{('beside', 'ahead', '2_ahead')[a]}_{('left', 'middle', 'right')[r + 1]}" for a, r in _VIEW]
        self.observation_names = (
            *(f"{what}_{cell}" for what in ("wall", "object") for cell in cells),
            *(f"distractor_{i}" for i in range(num_distractors)),
        )
        self.spec = EnvSpec(
            observation_shape=(len(self.observation_names),),
            observation_dtype=torch.float32,
            num_actions=3,
            context_size=len(self.context_names),
            success_reward=0.5 * worst_success,
        )
        self._build_tables(shortest, length, start_distance, cost)
        self._state = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._time = torch.zeros(num_envs, dtype=torch.int64, device=self.device)  # steps since the episode's first

    def reference_policy(self) -> Tensor:
        """Looks at the cue, walks to the junction, turns to the object like it, takes it: [B] actions."""
        return self._reference_actions.index_select(0, self._state)

    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        shape, generator, device = (num_steps, self.num_envs), self._generator, self.device
        low, high = self._num_entries - self._num_starts, self._num_entries
        starts = torch.randint(low, high, shape, generator=generator, device=device)
        return starts, self._draw_distractors(num_steps, self.num_distractors)

    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        start, distractors = draws
        first = self._last
        entry = torch.where(first, start, torch.add(actions, self._state, alpha=3))  # 3 actions
        state = self._next_state.index_select(0, entry)
        reward = self._reward.index_select(0, entry)
        discount = self._discount.index_select(0, entry)
        time = (self._time + 1).masked_fill_(first, 0)
        last = (time == self.time_limit).logical_or_(discount == 0)

        observation = torch.cat((self._visible.index_select(0, state), distractors), dim=1)
        context = self._hidden.index_select(0, state).add_(self._clock.index_select(0, time))
        self._state, self._time, self._last = state, time, last.clone()
        return TimeStep(observation, reward, discount, first, last, context)

    def _build_tables(self, shortest: int, longest: int, start_distance: int, cost: float) -> None:
        """Writes the corridor out: about 200 bytes for each of S = 32 (N - min + 1) (N + 1) states."""
        lengths = torch.arange(shortest, longest + 1)
        signs = torch.tensor([-1, 1])
        grid = torch.meshgrid(
            lengths, torch.arange(longest + 1), torch.arange(4), signs, signs, torch.arange(2), indexing="ij"
        )
        length, cell, direction, cue, side, seen = (x.flatten() for x in grid)  # [S] each
        wall, item, sees_cue = self._look(length, cell, direction, cue, side)

        def state_index(
            length: Tensor, cell: Tensor, direction: Tensor, cue: Tensor, side: Tensor, seen: Tensor
        ) -> Tensor:
            index = (length - shortest) * (longest + 1) + cell
            return (((index * 4 + direction) * 2 + (cue > 0)) * 2 + (side > 0)) * 2 + seen

        # [S, 3], one column per action
        turn = torch.tensor([-1, 1, 0])
        moves = torch.tensor([False, False, True])
        next_direction = (direction[:, None] + turn) % 4
        step_east = _STEP[direction, 0]
        next_cell = torch.where(moves, (cell + step_east)[:, None], cell[:, None]).clamp(min=0)
        next_cell = next_cell.minimum(length[:, None])
        across = (direction == NORTH) | (direction == SOUTH)
        at_junction = cell == length
        takes = moves & (at_junction & across)[:, None]
        facing_side = torch.where(direction == NORTH, 1, -1)
        succeeds = takes & (facing_side == side)[:, None]

        # The way to the objects, whether the cue was seen or not: east, and across at the junction.
        turns_to = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]])  # quarter turns between two

        def turns_needed(direction: Tensor) -> Tensor:
            junction = at_junction if direction.dim() == 1 else at_junction[:, None]
            either = torch.minimum(turns_to[direction, NORTH], turns_to[direction, SOUTH])
            return torch.where(junction, either, turns_to[direction, EAST])

        needed = turns_needed(direction)
        is_free = torch.where(moves, (needed == 0)[:, None], turns_needed(next_direction) < needed[:, None])
        reward = succeeds.float() - cost * (~is_free).float()
        wide = [x[:, None].expand_as(next_cell) for x in (length, cue, side, seen)]
        unseen_next = state_index(wide[0], next_cell, next_direction, wide[1], wide[2], torch.zeros_like(wide[3]))
        next_state = unseen_next + (wide[3] | sees_cue[unseen_next].long())

        # An episode starts with any length, place, cue and side, looking east.
        start = torch.meshgrid(lengths, torch.arange(start_distance + 1), signs, signs, indexing="ij")
        start_length, start_cell, start_cue, start_side = (x.flatten() for x in start)
        east = torch.full_like(start_cell, EAST)
        starts = state_index(start_length, start_cell, east, start_cue, start_side, torch.zeros_like(start_cell))
        starts = starts + sees_cue[starts].long()
        self._num_starts = len(starts)
        self._num_entries = next_state.numel() + len(starts)
        self._next_state = torch.cat((next_state.flatten(), starts)).to(self.device)  # [E]
        self._reward = torch.cat((reward.flatten(), torch.zeros(len(starts)))).to(self.device)  # [E]
        self._discount = torch.cat((1.0 - takes.flatten().float(), torch.ones(len(starts)))).to(self.device)  # [E]

        # West until the cue is seen, then east, then across.
        across_to = torch.where(side > 0, NORTH, SOUTH)
        heading = torch.where(seen == 0, WEST, torch.where(at_junction, across_to, EAST))
        right_turns = (heading - direction) % 4
        turning = torch.where(right_turns == 1, TURN_RIGHT, TURN_LEFT)
        self._reference_actions = torch.where(right_turns == 0, FORWARD, turning).to(self.device)  # [S]
        self._visible = torch.cat((wall, item), dim=1).float().to(self.device)  # [S, 16]
        looks = [direction == d for d in range(4)]
        position, distance = cell / longest, (length - cell).clamp(min=0) / longest
        hidden = (cue, side, position, distance, *looks, seen, torch.zeros_like(cue))
        self._hidden = torch.stack([x.float() for x in hidden], dim=1).to(self.device)  # [S, Z]
        clock = torch.zeros(self.time_limit + 1, len(self.context_names))
        clock[:, -1] = torch.linspace(1.0, 0.0, self.time_limit + 1)
        self._clock = clock.to(self.device)  # [time_limit + 1, Z]

    @staticmethod
    def _look(length: Tensor, cell: Tensor, direction: Tensor, cue: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        """Returns which of the 8 cells in view are walls [S, 8], the kinds of objects there [S, 8], and if one is the cue [S]."""
        view = torch.tensor(_VIEW)  # [8, 2]
        ahead, to_the_right = _STEP[direction], _STEP[(direction + 1) % 4]  # [S, 2]
        offset = view[:, :1] * ahead[:, None] + view[:, 1:] * to_the_right[:, None]  # [S, 8, 2]
        x, y = cell[:, None] + offset[..., 0], offset[..., 1]
        in_corridor = (y == 0) & (x >= 0) & (x <= length[:, None])
        at_cue = (x == 0) & (y == -1)
        at_item = (x == length[:, None]) & (y.abs() == 1)
        # The object on the cue's side is of the cue's kind; row -1 is north, which is side +1.
        kind = cue[:, None] * torch.where(at_cue, 1, -y * side[:, None])
        item = torch.where(at_cue | at_item, kind, 0)
        return (~in_corridor & (item == 0)).long(), item, at_cue.any(1)
