"""Key, rooms, door, treasure: a key taken in the first of many rooms opens one of two doors in the last."""

import torch
from torch import Tensor

from envs.arguments import require_integer
from envs.gridworlds.batched import BatchedGridworld
from envs.gridworlds.rooms import RIGHT, SquareRoom
from envs.timestep import EnvSpec, TimeStep

FIRST_ROOM, MIDDLE_ROOM, LAST_ROOM = range(3)


class MultiRoomKeyDoor(BatchedGridworld):
    """A row of rooms that the agent must find its way through; a key from the first opens a door in the last.

    The rooms are those of MiniGrid's MultiRoom (Chevalier-Boisvert et al., "Minigrid & Miniworld", 2023), the key whose
    use comes late is that of Hung et al., "Optimizing agent behavior over long time scales by transporting value"
    (2019). In this project's `KeyToDoor` the clock moves the agent on; here its own steps do, so that how long the key
    must be remembered depends on the agent, on the way through each room, and on the number of rooms, which varies.

    Memory length: at least `room_size` steps for each room between the first and the last, and those in the last.
    Credit assignment length: the same, and what lies between the key and the first exit: the step onto the key is paid
    when its door opens. Both grow with `num_rooms`.

    A room is a square of `room_size` cells a side, seen as a whole. The agent enters each in the middle of the left
    column and leaves it by a move to the right from the exit, a random cell of the right column; there is no way back,
    so that a room keeps no trace of what was done in the one before. The key, of one of two colours, is on a random
    other cell of the first room; stepping onto it takes it, which is seen then and never again. Keys in the rooms
    between look the same but cannot be taken. The last room has doors in the corners of the right column, one of each
    colour, in random order. Stepping onto a door ends the episode (discount 0), with reward 1 if it has the colour of
    the key that was taken, and 0 otherwise. That is all the reward there is.

    Observation, float32 [2 * room_size**2 + 2 * room_size + 3 + num_distractors]: maps, rows from top to bottom, of the
    agent and of keys (their colour, +-1); the right column's exit, and its doors (their colour); whether this is the
    first room, one between, or the last; values of +-1 drawn anew at every step, independent of everything.

    Actions: 0 right, 1 up, 2 left, 3 down. A move into a wall stays.

    Time limit: four times (num_rooms + 1) (2 room_size - 1), a bound on the longest way; it cuts, that is the last step keeps discount 1.

    Context, in [-1, 1]: the kind of room, one-hot; share of rooms still to come; has key; its colour; row and column of
    the agent and of the key in this room (the last room's has none: 0); row of the way on, that is the exit or the door
    of the key's colour; share of the time limit left. An episode is a success (return >= spec.success_reward) exactly
    if the door opened. Without memory half of them can.
    """

    state_names = (
        *("_cell", "_room", "_num_rooms", "_key_cell", "_colour", "_exit_row"),
        *("_key_colour", "_has_key", "_time"),
    )
    context_names = (
        *("in_first_room", "between", "in_last_room", "rooms_left", "has_key", "key_colour"),
        *("row", "column", "key_row", "key_column", "way_on_row", "time_left"),
    )

    def __init__(
        self,
        num_rooms: int = 4,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        min_rooms: int | None = None,
        room_size: int = 3,
        num_distractors: int = 4,
        time_limit: int | None = None,
    ):
        """Builds the rooms; episodes start with `reset`.

        Args:
            num_rooms: first and last included: the dial of memory and credit length; the largest, where it varies.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            min_rooms: each episode's number is uniform in [this, num_rooms]; None: half of it, rounded up, but at least
                2; `num_rooms`: all are the same.
            room_size: cells a side.
            num_distractors: random inputs beside the informative ones.
            time_limit: steps after which an episode is cut; None: 4 (num_rooms + 1) (2 room_size - 1).

        Raises:
            ValueError: if a setting is out of range.
        """
        require_integer("num_rooms", num_rooms, 2)
        fewest = max(2, (num_rooms + 1) // 2) if min_rooms is None else min_rooms
        require_integer("min_rooms", fewest, 2, num_rooms, f"{num_rooms} keeps the number fixed")
        require_integer("room_size", room_size, 3, None, "the doors must leave a cell between them")
        require_integer("num_distractors", num_distractors, 0)
        steps_needed = (num_rooms + 1) * (2 * room_size - 1)  # once through each room, and the first one twice
        limit = 4 * steps_needed if time_limit is None else time_limit
        require_integer("time_limit", limit, steps_needed, None, "it bounds the longest way; None is four times that")
        dials = {
            "num_rooms": num_rooms,
            "min_rooms": fewest,
            "room_size": room_size,
            "num_distractors": num_distractors,
            "time_limit": limit,
        }
        super().__init__(num_envs=num_envs, seed=seed, device=device, dials=dials)
        self.num_rooms, self.min_rooms, self.room_size = num_rooms, fewest, room_size
        self.num_distractors, self.time_limit = num_distractors, limit
        cells = [f"{row}_{column}" for row in range(room_size) for column in range(room_size)]
        self.observation_names = (
            *(f"{what}_{cell}" for what in ("agent", "key") for cell in cells),
            *(f"{what}_{row}" for what in ("exit", "door") for row in range(room_size)),
            *self.context_names[:3],
            *(f"distractor_{i}" for i in range(num_distractors)),
        )
        self.spec = EnvSpec(
            observation_shape=(len(self.observation_names),),
            observation_dtype=torch.float32,
            num_actions=4,
            context_size=len(self.context_names),
            success_reward=0.5,
        )
        self._build_tables()

        def zeros(dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_envs, dtype=dtype, device=self.device)

        self._cell, self._room, self._num_rooms, self._time = zeros(), zeros(), zeros() + fewest, zeros()
        # Of this room. In the last one the key's colour is that of the upper door.
        self._key_cell, self._exit_row, self._colour = zeros(), zeros(), zeros(torch.float32)
        # Of the key of the first room.
        self._key_colour, self._has_key = zeros(torch.float32), zeros(torch.bool)

    def reference_policy(self) -> Tensor:
        """Takes the key, walks from exit to exit, opens the door of the key's colour: [B] actions."""
        way_on = self._way_on_row() * self.room_size + (self.room_size - 1)
        fetches = (self._room == 0) & ~self._has_key
        target = torch.where(fetches, self._key_cell, way_on)
        # Sideways first: in the last room the way along the middle row passes no door. On its exit the agent goes out.
        return self._map.action_towards[self._cell, target].masked_fill_(self._cell == target, RIGHT)

    def _kind(self) -> Tensor:
        return torch.where(self._room == self._num_rooms - 1, LAST_ROOM, (self._room > 0).long())

    def _way_on_row(self) -> Tensor:
        door_row = torch.where(self._colour == self._key_colour, 0, self.room_size - 1)
        return torch.where(self._room == self._num_rooms - 1, door_row, self._exit_row)

    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        shape, generator, device = (num_steps, self.num_envs), self._generator, self.device
        num_rooms = torch.randint(self.min_rooms, self.num_rooms + 1, shape, generator=generator, device=device)
        key_cell = torch.randint(self.room_size**2 - 1, shape, generator=generator, device=device)
        key_cell += key_cell >= self._start_cell  # every cell but the entrance
        colour = torch.randint(2, shape, generator=generator, device=device).mul_(2).sub_(1).float()
        exit_row = torch.randint(self.room_size, shape, generator=generator, device=device)
        return num_rooms, key_cell, colour, exit_row, self._draw_distractors(num_steps, self.num_distractors)

    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        new_num_rooms, new_key_cell, new_colour, new_exit_row, distractors = draws
        first = self._last
        goes_on = ~first
        time = (self._time + 1).masked_fill_(first, 0)

        # What the move did, in the room in which it was made.
        size = self.room_size
        in_last_room = (self._room == self._num_rooms - 1) & goes_on
        exit_cell = self._exit_row * size + (size - 1)
        leaves = (self._cell == exit_cell) & (actions == RIGHT) & goes_on & ~in_last_room
        cell = self._map.move(self._cell, actions)
        takes_key = (cell == self._key_cell) & (self._room == 0) & goes_on
        has_key = (self._has_key & goes_on) | takes_key
        door = self._upper_or_lower.index_select(0, cell) * self._colour * in_last_room  # its colour, or 0
        opens = (door == self._key_colour) & has_key
        last = (door != 0).logical_or_(time == self.time_limit)

        # Perhaps a new room, in a new episode or not.
        enters = first | leaves
        self._room = (self._room + leaves).masked_fill_(first, 0)
        self._cell = cell.masked_fill_(enters, self._start_cell)
        self._num_rooms = torch.where(first, new_num_rooms, self._num_rooms)
        self._key_colour = torch.where(first, new_colour, self._key_colour)
        self._key_cell = torch.where(enters, new_key_cell, self._key_cell)
        self._colour = torch.where(enters, new_colour, self._colour)
        self._exit_row = torch.where(enters, new_exit_row, self._exit_row)
        self._has_key, self._time, self._last = has_key, time, last.clone()

        kind = self._kind()
        observation = torch.cat((*self._observe(kind), self._one_hot_room.index_select(0, kind), distractors), dim=1)
        discount = (door == 0).float()
        return TimeStep(observation, opens.float(), discount, first, last, self._describe(kind))

    def _observe(self, kind: Tensor) -> tuple[Tensor, ...]:
        is_last = kind == LAST_ROOM
        shows_key = ~is_last & ~((kind == FIRST_ROOM) & self._has_key)
        return (
            self._map.one_hot.index_select(0, self._cell),
            self._map.one_hot.index_select(0, self._key_cell).mul_((self._colour * shows_key).unsqueeze(1)),
            self._one_hot_row.index_select(0, self._exit_row).mul_((~is_last).unsqueeze(1)),
            self._doors * (self._colour * is_last).unsqueeze(1),
        )

    def _describe(self, kind: Tensor) -> Tensor:
        rooms_left = (self._num_rooms - 1 - self._room) / self.num_rooms
        key_place = self._map.coordinates.index_select(0, self._key_cell) * (kind != LAST_ROOM).unsqueeze(1)
        parts = (
            self._one_hot_room.index_select(0, kind),
            torch.stack((rooms_left, self._has_key.float(), self._key_colour), dim=1),
            self._map.coordinates.index_select(0, self._cell),
            key_place,
            self._map.coordinates.index_select(0, self._way_on_row() * self.room_size)[:, :1],
            (1.0 - self._time / self.time_limit).unsqueeze(1),
        )
        return torch.cat(parts, dim=1)

    def _build_tables(self) -> None:
        square = self._map = SquareRoom(self.room_size, self.device)
        size = square.size
        self._start_cell = size // 2 * size
        doors = torch.zeros(size)
        doors[0], doors[-1] = 1.0, -1.0
        self._doors = doors.to(self.device)  # [size], times the colour of the upper door
        self._upper_or_lower = torch.where(square.column == size - 1, self._doors[square.row], 0.0)  # [cells]
        self._one_hot_row = torch.eye(size, device=self.device)
        self._one_hot_room = torch.eye(3, device=self.device)
