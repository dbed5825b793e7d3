"""Match to sample: a colour is shown, a wait follows, and then that colour has to be chosen among others."""

import torch
from torch import Tensor

from envs.arguments import require_flag, require_integer
from envs.gridworlds.batched import BatchedGridworld
from envs.gridworlds.rooms import SquareRoom
from envs.timestep import EnvSpec, TimeStep

SAMPLE_ROOM, WAITING_ROOM, CHOICE_ROOM = range(3)


class MatchToSample(BatchedGridworld):
    """Three rooms in turn: one with a coloured sample, one to wait in, one with objects of which the sample's colour pays.

    Delayed matching to sample is a classic test of working memory in animals (Blough, "Delayed matching in the pigeon",
    1959); the rooms follow this project's `KeyToDoor`, without rewards in the middle one.

    Memory length: the wait, `min_delay` to `delay` steps, and the walk in the last room, at most room_size - 1 +
    room_size // 2 steps; the sample_steps come on top where the colour is looked at only once. Credit assignment length:
    with a sample in plain sight that walk; with `hidden_sample` the step onto the sample is what pays in the end, so that
    it grows with `delay`, too.

    A room is a square of `room_size` cells a side, seen as a whole. The agent enters each at the middle of the bottom
    row, wherever it left the one before, so that the rooms forget what was done in them. The sample lies on a random
    other cell, visible all the time; if hidden, only its place is, and the colour only while the agent is on it.
    In the waiting room a decoy of random colour jumps to a random cell at every step. In the choice room `num_choices`
    objects of different colours, one of them the sample's, are in random cells of the top row; stepping onto one ends
    the episode. So does the end of the time in the last room; the clock belongs to the task, so this terminates the
    episode (discount 0), too. The wait is of random length, so that no clock tells when to have the colour ready.

    Observation, float32 [(num_colours + 1) * room_size**2 + 3 + num_distractors], one more room_size**2 if hidden: maps,
    rows from top to bottom, of the agent, of a hidden sample's place, of the objects of each colour; which room this is,
    one-hot; values of +-1 drawn anew at every step, independent of everything.

    Actions: 0 right, 1 up, 2 left, 3 down. A move into a wall stays. Reward: 1 for the right choice, otherwise 0.

    Context, in [-1, 1]: the room, one-hot; shares left of the episode's and the room's time; whether the colour was
    seen; the sample's colour, one-hot; row and column of the agent and of the sample; column of the right choice. An
    episode is a success (return >= spec.success_reward) exactly if the choice was right; guessing succeeds in one of
    num_choices.
    """

    state_names = ("_cell", "_time", "_delay", "_colour", "_sample_cell", "_seen", "_choices")

    def __init__(
        self,
        delay: int = 20,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        min_delay: int | None = None,
        hidden_sample: bool = False,
        num_colours: int = 4,
        num_choices: int = 2,
        room_size: int = 3,
        sample_steps: int | None = None,
        choice_steps: int | None = None,
        num_distractors: int = 4,
    ):
        """Builds the rooms; episodes start with `reset`.

        Args:
            delay: steps in the waiting room: the dial of memory length; the largest, where it varies.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            min_delay: each episode's delay is uniform in [this, delay]; None: half of it, rounded up; `delay`: all are
                the same.
            hidden_sample: the colour must be fetched: long credit assignment, too.
            num_colours: of samples.
            num_choices: objects in the last room.
            room_size: cells a side.
            sample_steps: steps in the sample room; None: twice the longest walk in it.
            choice_steps: steps in the choice room; None: twice the longest walk in it.
            num_distractors: random inputs beside the informative ones.

        Raises:
            ValueError: if a setting is out of range.
        """
        require_integer("delay", delay, 1)
        shortest = (delay + 1) // 2 if min_delay is None else min_delay
        require_integer("min_delay", shortest, 1, delay, f"{delay} keeps the delay fixed")
        require_flag("hidden_sample", hidden_sample)
        require_integer("num_colours", num_colours, 2)
        require_integer("room_size", room_size, 2)
        most = min(num_colours, room_size)
        require_integer("num_choices", num_choices, 2, most, "as many as there are colours, and columns of the room")
        walk = room_size - 1 + room_size // 2
        sample_steps = 2 * walk if sample_steps is None else sample_steps
        choice_steps = 2 * walk if choice_steps is None else choice_steps
        needed = walk + 1 if hidden_sample else 1  # the colour is seen on arrival
        require_integer(
            "sample_steps", sample_steps, needed, None, f"with room_size={room_size} the sample may be that far"
        )
        require_integer("choice_steps", choice_steps, walk, None, f"room_size={room_size} has a cell that far away")
        require_integer("num_distractors", num_distractors, 0)
        dials = {
            "delay": delay,
            "min_delay": shortest,
            "hidden_sample": hidden_sample,
            "num_colours": num_colours,
            "num_choices": num_choices,
            "room_size": room_size,
            "sample_steps": sample_steps,
            "choice_steps": choice_steps,
            "num_distractors": num_distractors,
        }
        super().__init__(num_envs=num_envs, seed=seed, device=device, dials=dials)
        self.delay, self.min_delay, self.hidden_sample = delay, shortest, hidden_sample
        self.num_colours, self.num_choices, self.room_size = num_colours, num_choices, room_size
        self.sample_steps, self.choice_steps, self.num_distractors = sample_steps, choice_steps, num_distractors
        self.episode_length = sample_steps + delay + choice_steps  # steps at most

        rooms = ("in_sample_room", "in_waiting_room", "in_choice_room")
        maps = ("agent", *(("hidden_sample",) if hidden_sample else ()), *(f"colour_{i}" for i in range(num_colours)))
        cells = [f"{row}_{column}" for row in range(room_size) for column in range(room_size)]
        self.observation_names = (
            *(f"{what}_{cell}" for what in maps for cell in cells),
            *rooms,
            *(f"distractor_{i}" for i in range(num_distractors)),
        )
        self.context_names = (
            *rooms,
            *("time_left", "room_time_left", "colour_seen"),
            *(f"colour_is_{i}" for i in range(num_colours)),
            *("row", "column", "sample_row", "sample_column", "target_column"),
        )
        self.spec = EnvSpec(
            observation_shape=(len(self.observation_names),),
            observation_dtype=torch.float32,
            num_actions=4,
            context_size=len(self.context_names),
            success_reward=0.5,
        )
        self._build_tables()

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_envs, *shape, dtype=dtype, device=self.device)

        self._cell, self._sample_cell, self._colour = zeros(), zeros(), zeros()
        self._time, self._delay = zeros(), zeros()  # steps since the episode's first, and in the waiting room
        self._seen = zeros(dtype=torch.bool)
        self._choices = zeros(room_size)  # colour in each column of the choice room's top row; num_colours: none

    def reference_policy(self) -> Tensor:
        """Goes to the sample, waits for the choice room, aligns with the right column there and goes up: [B] actions."""
        in_choice_room = self._room() == CHOICE_ROOM
        target = torch.where(in_choice_room, self._target_column(), self._sample_cell)  # top row: a cell is its column
        # Sideways first: the way through the rows below the top one is free.
        return self._map.action_towards[self._cell, target]

    def _room(self) -> Tensor:
        waits = self._time >= self.sample_steps
        chooses = self._time >= self._delay + self.sample_steps
        return waits.long().add_(chooses)

    def _target_column(self) -> Tensor:
        return (self._choices == self._colour.unsqueeze(1)).long().argmax(dim=1)

    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        shape, num_cells = (num_steps, self.num_envs), self.room_size**2
        generator, device = self._generator, self.device
        colour = torch.randint(self.num_colours, shape, generator=generator, device=device)
        sample_cell = torch.randint(num_cells - 1, shape, generator=generator, device=device)
        sample_cell += sample_cell >= self._start_cell  # every cell but the start
        delay = torch.randint(self.min_delay, self.delay + 1, shape, generator=generator, device=device)
        # The colours and columns with the lowest of random ranks meet; the sample's colour is always among them.
        colour_ranks = torch.rand((*shape, self.num_colours), generator=generator, device=device)
        colour_ranks.scatter_(-1, colour.unsqueeze(-1), -1.0)
        colours = colour_ranks.topk(self.num_choices, largest=False).indices
        column_ranks = torch.rand((*shape, self.room_size), generator=generator, device=device)
        columns = column_ranks.topk(self.num_choices, largest=False).indices
        choices = torch.full((*shape, self.room_size), self.num_colours, device=device).scatter_(-1, columns, colours)
        decoy = torch.randint(self.num_colours * num_cells, shape, generator=generator, device=device)
        return colour, sample_cell, delay, choices, decoy, self._draw_distractors(num_steps, self.num_distractors)

    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        new_colour, new_sample_cell, new_delay, new_choices, decoy, distractors = draws
        first = self._last
        acts_in_choice_room = (self._room() == CHOICE_ROOM).logical_and_(~first)
        time = (self._time + 1).masked_fill_(first, 0)
        self._colour = torch.where(first, new_colour, self._colour)
        self._sample_cell = torch.where(first, new_sample_cell, self._sample_cell)
        self._delay = torch.where(first, new_delay, self._delay)
        self._choices = torch.where(first.unsqueeze(1), new_choices, self._choices)
        self._time = time

        # What the move did, in the room in which it was made.
        cell = self._map.move(self._cell, actions)
        column = cell.clamp(max=self.room_size - 1).unsqueeze(1)
        in_top_row = cell < self.room_size
        chosen = self._choices.gather(1, column).squeeze(1).masked_fill_(~(in_top_row & acts_in_choice_room), -1)
        chooses = (chosen >= 0).logical_and_(chosen < self.num_colours)
        reward = (chosen == self._colour).float()
        last = (time == self._delay + (self.sample_steps + self.choice_steps)).logical_or_(chooses)

        # What is seen next, perhaps in the next room.
        room = self._room()
        entered_at = (room >= WAITING_ROOM) * self.sample_steps + (room == CHOICE_ROOM) * self._delay
        self._cell = torch.where((time == entered_at) | first, self._start_cell, cell)
        self._last = last.clone()
        in_sight = (room == SAMPLE_ROOM).logical_and_(
            self._cell == self._sample_cell if self.hidden_sample else torch.ones_like(last)
        )
        self._seen = self._seen.masked_fill(first, False).logical_or_(in_sight)
        observation = self._observe(room, in_sight, decoy, distractors)
        return TimeStep(observation, reward, (~last).float(), first, last, self._describe(room, entered_at))

    def _observe(self, room: Tensor, in_sight: Tensor, decoy: Tensor, distractors: Tensor) -> Tensor:
        num_cells, nothing = self.room_size**2, self._num_places
        parts = [self._map.one_hot.index_select(0, self._cell)]
        if self.hidden_sample:
            covered = (room == SAMPLE_ROOM).logical_and_(~in_sight)
            parts.append(self._map.one_hot.index_select(0, self._sample_cell).mul_(covered.unsqueeze(1)))
        # A place is a cell in the map of a colour. The sample or the decoy is one place, the choices are a row of them.
        sample = torch.add(self._sample_cell, self._colour, alpha=num_cells).masked_fill_(~in_sight, nothing)
        place = torch.where(room == WAITING_ROOM, decoy, sample)
        columns = self._choices * num_cells + self._columns  # [B, room_size]
        is_hidden = (self._choices == self.num_colours) | (room != CHOICE_ROOM).unsqueeze(1)
        places = torch.cat((place.unsqueeze(1), columns.masked_fill_(is_hidden, nothing)), dim=1)
        colours = torch.zeros(self.num_envs, nothing + 1, device=self.device).scatter_(1, places, 1.0)
        parts += [colours[:, :nothing], self._one_hot_room.index_select(0, room), distractors]
        return torch.cat(parts, dim=1)

    def _describe(self, room: Tensor, entered_at: Tensor) -> Tensor:
        length = self._delay + (self.sample_steps + self.choice_steps)
        lengths = (torch.full_like(room, self.sample_steps), self._delay, torch.full_like(room, self.choice_steps))
        room_length = torch.stack(lengths, dim=1).gather(1, room.unsqueeze(1)).squeeze(1)
        clock = (1.0 - self._time / length, 1.0 - (self._time - entered_at) / room_length, self._seen.float())
        parts = (
            self._one_hot_room.index_select(0, room),
            torch.stack(clock, dim=1),
            self._one_hot_colour.index_select(0, self._colour),
            self._map.coordinates.index_select(0, self._cell),
            self._map.coordinates.index_select(0, self._sample_cell),
            self._map.coordinates.index_select(0, self._target_column())[:, 1:],  # the top row: a column is its cell
        )
        return torch.cat(parts, dim=1)

    def _build_tables(self) -> None:
        square = self._map = SquareRoom(self.room_size, self.device)
        size, num_cells = square.size, square.num_cells
        self._start_cell = num_cells - size + size // 2
        self._num_places = self.num_colours * num_cells
        self._columns = torch.arange(size, device=self.device)
        self._one_hot_room = torch.eye(3, device=self.device)
        self._one_hot_colour = torch.eye(self.num_colours, device=self.device)
