"""Key to door: what is done in the first room pays in the third, after a room full of distracting rewards."""

import torch
from torch import Tensor

from envs.arguments import require_integer, require_number
from envs.gridworlds.batched import SUCCESS_MARGIN, BatchedGridworld
from envs.gridworlds.rooms import SquareRoom
from envs.timestep import EnvSpec, TimeStep

KEY_ROOM, APPLE_ROOM, DOOR_ROOM, _NOWHERE = range(4)


class KeyToDoor(BatchedGridworld):
    """Three rooms in turn, each for a given number of steps: one with a key, one with apples, one with a door.

    After Hung et al., "Optimizing agent behavior over long time scales by transporting value" (2019), and Ni et al.,
    "When Do Transformers Shine in RL?" (2023), whose steps in the first and last room (15, 10) are the defaults here.
    The rooms are smaller and seen as a whole, apples do not grow back, a door can be entered without the key, in vain.
    Only who holds the key is paid at the door, and holding it is not visible. With one door, as in the sources, the
    credit assignment length grows with `distractor_length`, but no memory is needed to act well: go to the door in any
    case. With two doors the key has a colour, seen only in the first room, and only the door of that colour pays: then
    the memory length grows with `distractor_length`, too.

    A room is a square of `room_size` cells a side. The agent enters each at the middle of the bottom row. The key, and
    then the apples, lie on random other cells; stepping onto them takes them. The door is in the middle of the top row;
    of two doors, the one of colour -1 is in the top left corner and that of +1 in the top right one. Entering a door
    ends the episode. So does the end of the time in the last room; the clock belongs to the task, so this terminates
    the episode (discount 0), too.

    Observation, float32 [4 * room_size**2 + 3], rows from top to bottom: maps of the agent, of the key (its colour), of
    the apples, of the doors (their colour), and which room this is, one-hot. Colours are +-1, and +1 with one door.

    Actions: 0 right, 1 up, 2 left, 3 down. A move into a wall stays.

    Context, in [-1, 1]: the room, one-hot; shares left of the episode's and the room's time; has key; its colour; row
    and column of the agent and of the key; share of apples left (their map is in the observation while it matters).

    An episode is a success (return >= spec.success_reward) exactly if the right door was opened. Where all apples
    together are worth at least as much as the door, a return cannot tell, and spec.success_reward is None.
    """

    state_names = ("_cell", "_time", "_key_cell", "_key_colour", "_has_key", "_apples")
    context_names = (
        *("in_key_room", "in_apple_room", "in_door_room", "time_left", "room_time_left", "has_key", "key_colour"),
        *("row", "column", "key_row", "key_column", "apples_left"),
    )

    def __init__(
        self,
        distractor_length: int = 30,
        *,
        num_envs: int,
        seed: int,
        device: torch.device | str = "cpu",
        num_doors: int = 1,
        room_size: int = 5,
        key_steps: int = 15,
        door_steps: int = 10,
        num_apples: int = 8,
        apple_reward: float = 0.05,
        door_reward: float = 1.0,
    ):
        """Builds the rooms; episodes start with `reset`.

        Args:
            distractor_length: steps in the apple room: the dial of credit (and memory) length. 0 leaves it out.
            num_envs: B.
            seed: of the random stream.
            device: where all tensors live.
            num_doors: 1: credit assignment alone; 2: the key's colour must be remembered.
            room_size: cells a side.
            key_steps: steps in the key room.
            door_steps: most steps in the door room.
            num_apples: apples in each episode.
            apple_reward: of each apple.
            door_reward: of opening the right door.

        Raises:
            ValueError: if a setting is out of range.
        """
        require_integer("distractor_length", distractor_length, 0)
        require_integer("num_doors", num_doors, 1, 2)
        require_integer("room_size", room_size, 2)
        farthest = room_size - 1 + room_size // 2
        door_distance = room_size - 1 if num_doors == 1 else farthest
        require_integer("key_steps", key_steps, farthest, None, f"room_size={room_size} has a cell that far away")
        require_integer(
            "door_steps", door_steps, door_distance, None, f"room_size={room_size} has a door that far away"
        )
        require_integer("num_apples", num_apples, 0, room_size**2 - 1, f"room_size={room_size} has no more free cells")
        require_number("apple_reward", apple_reward, 0.0, 1e6)
        require_number("door_reward", door_reward, 1e-6, 1e6)
        dials = {
            "distractor_length": distractor_length,
            "num_doors": num_doors,
            "room_size": room_size,
            "key_steps": key_steps,
            "door_steps": door_steps,
            "num_apples": num_apples,
            "apple_reward": apple_reward,
            "door_reward": door_reward,
        }
        super().__init__(num_envs=num_envs, seed=seed, device=device, dials=dials)
        self.num_doors, self.room_size, self.num_apples = num_doors, room_size, num_apples
        self.apple_reward, self.door_reward = apple_reward, door_reward
        self.episode_length = key_steps + distractor_length + door_steps
        cells = [f"{row}_{column}" for row in range(room_size) for column in range(room_size)]
        self.observation_names = (
            *(f"{what}_{cell}" for what in ("agent", "key", "apple", "door") for cell in cells),
            *self.context_names[:3],
        )
        all_apples = num_apples * apple_reward if distractor_length else 0.0
        self.spec = EnvSpec(
            observation_shape=(len(self.observation_names),),
            observation_dtype=torch.float32,
            num_actions=4,
            context_size=len(self.context_names),
            success_reward=0.5 * (all_apples + door_reward) if all_apples + SUCCESS_MARGIN <= door_reward else None,
        )
        self._build_tables((key_steps, distractor_length, door_steps))

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_envs, *shape, dtype=dtype, device=self.device)

        self._cell, self._key_cell = zeros(dtype=torch.int64), zeros(dtype=torch.int64)
        self._time = zeros(dtype=torch.int64)  # steps since the episode's first
        self._key_colour, self._has_key = zeros(dtype=torch.float32), zeros(dtype=torch.bool)
        self._apples = zeros(room_size**2, dtype=torch.bool)

    def reference_policy(self) -> Tensor:
        """Goes to the key, waits for the door room, goes to the door of the key's colour: [B] actions."""
        in_door_room = self._room.index_select(0, self._time) == DOOR_ROOM
        door_cell = torch.where(self._key_colour > 0, self._door_cells[-1], self._door_cells[0])
        target = torch.where(in_door_room, door_cell, self._key_cell)
        return self._map.action_towards[self._cell, target]

    def _draw(self, num_steps: int) -> tuple[Tensor, ...]:
        shape, num_cells = (num_steps, self.num_envs), self.room_size**2
        generator, device = self._generator, self.device
        key_cell = torch.randint(num_cells - 1, shape, generator=generator, device=device)
        key_cell += key_cell >= self._start_cell  # every cell but the start
        colour = torch.randint(2, shape, generator=generator, device=device).mul_(2).sub_(1).float()
        if self.num_doors == 1:
            colour = torch.ones_like(colour)
        # The apples lie on the cells with the lowest of random ranks; the start comes last.
        ranks = torch.rand((*shape, num_cells), generator=generator, device=device)
        ranks[..., self._start_cell] = 2.0
        chosen = ranks.topk(self.num_apples, largest=False, sorted=False).indices
        apples = torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, chosen, True)
        return key_cell, colour, apples

    def _advance(self, actions: Tensor, *draws: Tensor) -> TimeStep:
        new_key_cell, new_colour, new_apples = draws
        first = self._last
        time = (self._time + 1).masked_fill_(first, 0)
        self._key_cell = torch.where(first, new_key_cell, self._key_cell)
        self._key_colour = torch.where(first, new_colour, self._key_colour)

        # What the move did, in the room in which it was made. A place is a cell of a room; rows that start anew are
        # nowhere, so that nothing happens to them.
        room = self._room.index_select(0, self._time).masked_fill_(first, _NOWHERE)
        cell = self._map.move(self._cell, actions)
        place = torch.add(cell, room, alpha=self.room_size**2)
        takes_key = place == self._key_cell  # the key room comes first: there a cell is its place
        self._has_key = self._has_key.masked_fill(first, False).logical_or_(takes_key)
        eaten = self._apples & self._apple_place.index_select(0, place)  # [B, cells], at most one each
        self._apples = torch.where(first.unsqueeze(1), new_apples, self._apples ^ eaten)
        door_colour = self._door_place.index_select(0, place)  # 0 where there is no door
        opens = (door_colour == self._key_colour).logical_and_(self._has_key)
        reward = (eaten.any(dim=1) * self.apple_reward).add_(opens, alpha=self.door_reward)
        last = (time == self.episode_length).logical_or_(door_colour != 0)

        # What is seen next, perhaps in the next room.
        cell = cell.masked_fill_(self._enters_room.index_select(0, time), self._start_cell)
        room = self._room.index_select(0, time)
        self._cell, self._time, self._last = cell, time, last.clone()
        return TimeStep(self._observe(room), reward, (~last).float(), first, last, self._describe())

    def _observe(self, room: Tensor) -> Tensor:
        key = self._key_colour * (room == KEY_ROOM).logical_and_(~self._has_key)
        maps = (
            self._map.one_hot.index_select(0, self._cell),
            self._map.one_hot.index_select(0, self._key_cell).mul_(key.unsqueeze(1)),
            self._apples & (room == APPLE_ROOM).unsqueeze(1),
            self._room_view.index_select(0, room),
        )
        return torch.cat(maps, dim=1)

    def _describe(self) -> Tensor:
        parts = (
            self._clock.index_select(0, self._time),
            self._has_key.unsqueeze(1),
            self._key_colour.unsqueeze(1),
            self._map.coordinates.index_select(0, self._cell),
            self._map.coordinates.index_select(0, self._key_cell),
            self._apples.sum(dim=1, keepdim=True, dtype=torch.float32).div_(max(self.num_apples, 1)),
        )
        return torch.cat(parts, dim=1)

    def _build_tables(self, room_steps: tuple[int, int, int]) -> None:
        square = self._map = SquareRoom(self.room_size, self.device)
        size, num_cells = square.size, square.num_cells
        self._start_cell = num_cells - size + size // 2
        doors = {size // 2: 1.0} if self.num_doors == 1 else {0: -1.0, size - 1: 1.0}
        self._door_cells = list(doors)
        door_colour = torch.zeros(num_cells)
        door_colour[list(doors)] = torch.tensor(list(doors.values()))
        door_place = torch.zeros(4, num_cells)  # key, apple and door room, and nowhere
        door_place[DOOR_ROOM] = door_colour
        self._door_place = door_place.flatten().to(self.device)
        apple_place = torch.zeros(4, num_cells, num_cells, dtype=torch.bool)
        apple_place[APPLE_ROOM] = torch.eye(num_cells).bool()
        self._apple_place = apple_place.flatten(0, 1).to(self.device)  # [4 * cells, cells]
        self._room_view = torch.cat((door_place[:3], torch.eye(3)), dim=1).to(self.device)  # [3, cells + 3]

        # By time: the room, whether it was just entered, and the clocks; the last step still belongs to the door room.
        lengths = torch.tensor(room_steps)
        room = torch.arange(3).repeat_interleave(lengths)
        room = torch.cat((room, room[-1:]))
        time = torch.arange(self.episode_length + 1)
        entered_at = (lengths.cumsum(0) - lengths)[room]
        time_left = 1.0 - time / self.episode_length
        room_time_left = 1.0 - (time - entered_at) / lengths[room]
        clock = torch.cat((torch.eye(3)[room], time_left[:, None], room_time_left[:, None]), dim=1)
        self._room = room.to(self.device)
        self._enters_room = (time == entered_at).to(self.device)
        self._clock = clock.to(self.device)  # [episode_length + 1, 5]
