"""MiniGrid's egocentric view: encodings for a policy, the privileged state for a critic, and a faster way to compute the view.

MiniGrid is the field's standard for memory in gridworlds, and four fifths of the time of its step go into the view, which it builds cell by
cell, three copies of the grid long. `FastView` computes the same numbers from tables.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.arguments import is_integer, require

if TYPE_CHECKING:
    import gymnasium

MINIGRID_PREFIXES = ("MiniGrid-", "BabyAI-")  # of the ids that the package registers
MINIGRID_SIZES = (11, 6, 3)  # objects, colours and door states of MiniGrid's encoding of a cell
MINIGRID_SCALE = 10.0  # the largest number in it
# Wrappers of minigrid that make other images; full observability also puts the agent in its cell, whose direction is no door's state.
_OTHER_IMAGES = (
    "RGBImgObsWrapper",
    "RGBImgPartialObsWrapper",
    "OneHotPartialObsWrapper",
    "FullyObsWrapper",
    "SymbolicObsWrapper",
)


def minigrid_view(view: np.ndarray) -> np.ndarray:
    """One-hot planes of MiniGrid's symbolic view.

    MiniGrid encodes a cell as three small integers (object, colour, door state). They are categories, not brightness,
    and a torso that divides bytes by 255, as `EnvSpec.observation_scale` has it unless told otherwise, would all but erase
    them. One-hot planes of 0 and 255 come out of such a torso as exactly 0 and 1. MiniGrid indexes cells by column and then
    row; the planes are [row, column] as other images.

    Args:
        view: [B, X, Y, 3] uint8.

    Returns:
        [B, 20, Y, X] uint8.

    Raises:
        ValueError: if a number is none of MiniGrid's encoding.
    """
    if not (view.reshape(-1, 3).max(0) < MINIGRID_SIZES).all():
        raise ValueError(
            f"found up to {view.reshape(-1, 3).max(0).tolist()} for object, colour and state of a cell; expected less than "
            f"{list(MINIGRID_SIZES)}, as in MiniGrid's view; --env.kwargs.encoding symbolic takes them as they are"
        )
    view = view.transpose(0, 3, 2, 1)  # [B, 3, Y, X]
    planes = [
        view[:, channel, None] == np.arange(size, dtype=np.uint8)[:, None, None]  # [B, size, Y, X]
        for channel, size in enumerate(MINIGRID_SIZES)
    ]
    return np.concatenate(planes, axis=1).view(np.uint8) * np.uint8(255)


def minigrid_symbols(view: np.ndarray) -> np.ndarray:
    """MiniGrid's symbolic view [B, X, Y, 3] as it is, channels first: [B, 3, Y, X] uint8, to be divided by `MINIGRID_SCALE`."""
    return np.ascontiguousarray(view.transpose(0, 3, 2, 1))


def minigrid_context(env: "gymnasium.Env") -> np.ndarray:
    """Privileged state of a MiniGrid environment: the whole grid, the agent's place and direction and what it carries.

    Args:
        env: a MiniGrid environment, wrapped or not.

    Returns:
        [3 * W * H + 8] float32: object, colour and state of every cell scaled to [-1, 1], the agent's column and row in
        [-1, 1], its direction as one-hot of 4, object and colour of the carried thing in [-1, 1] (-1 for nothing).
    """
    base: Any = env.unwrapped
    largest = np.asarray(MINIGRID_SIZES, np.float32) - 1
    cells = 2 * base.grid.encode() / largest - 1  # [W, H, 3]
    place = 2 * np.asarray(base.agent_pos) / (np.asarray([base.width, base.height]) - 1) - 1
    direction = np.arange(4) == base.agent_dir
    carried = (0, 0) if base.carrying is None else base.carrying.encode()[:2]
    carrying = 2 * np.asarray(carried) / largest[:2] - 1
    return np.concatenate([cells.ravel(), place, direction, carrying], dtype=np.float32)


def is_minigrid(env: "gymnasium.Env") -> bool:
    """Whether the observations are MiniGrid's dictionaries."""
    spaces = getattr(env.observation_space, "spaces", None)
    return isinstance(spaces, dict) and {"image", "direction", "mission"} <= spaces.keys()


def check_symbolic(env: "gymnasium.Env") -> None:
    """Raises ValueError if a wrapper has put something else in the place of MiniGrid's symbolic view."""
    from gymnasium import Wrapper

    wrapper = env
    while isinstance(wrapper, Wrapper):
        if type(wrapper).__name__ in _OTHER_IMAGES:
            raise ValueError(
                f"the image of {type(env.unwrapped).__name__} is what {type(wrapper).__name__} makes of it, and no symbolic view; "
                "leave that wrapper out, or put minigrid.wrappers.ImgObsWrapper around it, which makes it an image as any other"
            )
        wrapper = wrapper.env


def has_missions(env: "gymnasium.Env") -> bool:
    """Whether the mission differs between episodes, as it says of itself or a few of them show."""
    if getattr(env.observation_space["mission"], "ordered_placeholders", None):  # type: ignore[index]  # of a Dict
        return True
    return len({env.reset(seed=seed)[0]["mission"] for seed in range(8)}) > 1


def image_view(env: "gymnasium.Env", view_size: int | None, fast: bool) -> "gymnasium.Env":
    """The environment with the symbolic image [X, Y, 3] as its observation.

    Args:
        env: a MiniGrid environment.
        view_size: cells to a side, odd and at least 3; None for the environment's own.
        fast: whether `FastView` computes the image, where it can; otherwise MiniGrid does.

    Raises:
        ArgumentError: if the view has another size.
    """
    from minigrid.wrappers import ImgObsWrapper, ViewSizeWrapper

    if view_size is not None:
        is_odd = is_integer(view_size, 3) and view_size % 2 == 1
        require("view_size", view_size, is_odd, "an odd integer of at least 3")
    if fast and FastView.fits(env):
        FastView(env, view_size).install()
    elif view_size is not None:
        env = ViewSizeWrapper(env, agent_view_size=view_size)
    return ImgObsWrapper(env)


class FastView:
    """What `MiniGridEnv.gen_obs` returns, the same bit for bit, in about a fifth of the time.

    MiniGrid cuts the view out of the grid, turns it by up to four copies, spreads visibility from cell to cell and encodes
    the cells. Here the cells are gathered in the order in which they are seen, by a table for each direction, and visibility
    spreads by rows, whose outcome for a pattern of visible and of opaque cells is looked up.

    Args:
        env: a MiniGrid environment that `fits`.
        view_size: cells to a side, odd; None for the environment's own.
    """

    def __init__(self, env: "gymnasium.Env", view_size: int | None = None):
        from minigrid.core.constants import COLOR_NAMES
        from minigrid.core.world_object import Wall

        base: Any = env.unwrapped
        n: int = view_size or base.agent_view_size
        self.base, self.size = base, n
        self._wall_type = Wall
        self._wall = Wall()  # what lies outside of the grid
        self._walls = {color: _packed(Wall(color).encode()) for color in COLOR_NAMES}
        # As its view is turned `direction + 1` times to the left, the agent stands at the middle of the last row.
        numbers = np.arange(n * n).reshape(n, n)  # [row, column] of the cut-out
        self._seen: list[Callable[[list], tuple]] = [
            itemgetter(*np.rot90(numbers, direction + 1).ravel().tolist()) for direction in range(4)
        ]
        half = n // 2
        self._corners = (
            (0, -half),
            (-half, 0),
            (1 - n, -half),
            (-half, 1 - n),
        )  # of the cut-out, relative to the agent
        self._agent = (n - 1) * n + half
        self._full_row = (1 << n) - 1
        self._spread: dict[tuple[int, int], tuple[bytes, int]] = {}

    @staticmethod
    def fits(env: "gymnasium.Env") -> bool:
        """Whether the view of this environment is MiniGrid's own, not one that a subclass has changed."""
        from minigrid.core.grid import Grid
        from minigrid.minigrid_env import MiniGridEnv

        base: Any = env.unwrapped
        own = ("gen_obs", "gen_obs_grid", "get_view_exts")
        return (
            isinstance(base, MiniGridEnv)
            and all(getattr(type(base), name) is getattr(MiniGridEnv, name) for name in own)
            and type(getattr(base, "grid", None) or Grid(3, 3)) is Grid
        )

    def install(self) -> None:
        """Makes the environment use it, also as a view of another size than the environment was built with."""
        from gymnasium import spaces

        base = self.base
        if self.size != base.agent_view_size:
            base.agent_view_size = self.size
            image = spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)
            base.observation_space = spaces.Dict({**base.observation_space.spaces, "image": image})
        base.gen_obs = self

    def __call__(self) -> dict[str, Any]:
        """Image [X, Y, 3] uint8, direction and mission."""
        base = self.base
        return {"image": self._image(), "direction": base.agent_dir, "mission": base.mission}

    def _image(self) -> np.ndarray:
        base, n = self.base, self.size
        codes: list[int] = []
        opaque, walls, wall_type = 0, self._walls, self._wall_type
        for place, cell in enumerate(self._seen[base.agent_dir](self._cut_out())):
            if cell is None:
                codes.append(_EMPTY)
            elif type(cell) is wall_type:  # most of what there is
                codes.append(walls[cell.color])
                opaque |= 1 << place
            else:
                codes.append(_packed(cell.encode()))
                if not cell.see_behind():
                    opaque |= 1 << place
        # It sees what it carries, whatever it stands on.
        codes[self._agent] = _EMPTY if base.carrying is None else _packed(base.carrying.encode())
        image = np.array(codes, "<u4").reshape(n, n)
        if not base.see_through_walls:
            image *= self._visible(opaque)
        return np.ascontiguousarray(image.T).view(np.uint8).reshape(n, n, 4)[:, :, :3]  # MiniGrid's order: column, row

    def _cut_out(self) -> list:
        """The n * n cells around the agent, row by row as they lie in the grid."""
        base, n, wall = self.base, self.size, self._wall
        cells, width, height = base.grid.grid, base.grid.width, base.grid.height
        dx, dy = self._corners[base.agent_dir]
        left, top = int(base.agent_pos[0]) + dx, int(base.agent_pos[1]) + dy
        start, end = max(left, 0), min(left + n, width)
        before, after = [wall] * (start - left), [wall] * (left + n - end)
        cut: list = []
        for y in range(top, top + n):
            if 0 <= y < height:
                cut += before
                cut += cells[y * width + start : y * width + end]
                cut += after
            else:
                cut += [wall] * n
        return cut

    def _visible(self, opaque: int) -> np.ndarray:
        """[row, column] uint8, 1 where the agent sees, from the opaque cells as bits, row by row."""
        n = self.size
        rows = [b""] * n
        reached = 1 << (n // 2)
        for row in range(n - 1, -1, -1):
            key = reached, opaque >> (row * n) & self._full_row
            rows[row], reached = self._spread.get(key) or self._spread_row(*key)
        return np.frombuffer(b"".join(rows), np.uint8).reshape(n, n)

    def _spread_row(self, reached: int, opaque: int) -> tuple[bytes, int]:
        """Which cells of a row are seen, and those that are reached in the row ahead, from those reached in it.

        Sight passes through a visible cell that is not opaque to its neighbours in the row and to the three cells ahead, in a
        sweep to the right and one to the left.
        """
        seen, ahead = reached, 0
        for step, columns in ((1, range(self.size - 1)), (-1, range(self.size - 1, 0, -1))):
            for column in columns:
                if seen >> column & 1 and not opaque >> column & 1:
                    beside = 1 << (column + step)
                    seen |= beside
                    ahead |= beside | 1 << column
        found = bytes(seen >> column & 1 for column in range(self.size)), ahead
        self._spread[reached, opaque] = found
        return found


_EMPTY = 1  # MiniGrid's code of a cell with nothing in it: (1, 0, 0)


def _packed(code: tuple[int, int, int]) -> int:
    """Object, colour and state as the bytes of one number."""
    return code[0] | code[1] << 8 | code[2] << 16
