"""A square room seen from above: its moves, its ways and its coordinates, as tables."""

import torch
from torch import Tensor

RIGHT, UP, LEFT, DOWN = range(4)
_STEPS = torch.tensor([[0, 1], [-1, 0], [0, -1], [1, 0]])  # row and column of right, up, left, down


class SquareRoom:
    """`size` x `size` cells, numbered row by row from the top left; an agent goes right, up, left or down, or into a wall and stays.

    Attributes:
        size: cells a side.
        num_cells: size**2.
        row, column: [cells] int64, of each cell.
        action_towards: [cells, cells] int64, an action that brings the first cell nearer to the second: sideways first, then upright.
            DOWN where both are the same.
        coordinates: [cells, 2] row and column, from -1 to 1.
        one_hot: [cells, cells].
    """

    def __init__(self, size: int, device: torch.device):
        cell = torch.arange(size * size)
        row, column = cell // size, cell % size
        next_row = (row[:, None] + _STEPS[:, 0]).clamp(0, size - 1)
        next_column = (column[:, None] + _STEPS[:, 1]).clamp(0, size - 1)
        sideways = torch.where(column[None] > column[:, None], RIGHT, LEFT)
        upright = torch.where(row[None] < row[:, None], UP, DOWN)
        self.size, self.num_cells = size, size * size
        self.row, self.column = row.to(device), column.to(device)
        self.action_towards = torch.where(column[None] == column[:, None], upright, sideways).to(device)
        self.coordinates = (torch.stack((row, column), dim=1) * 2.0 / (size - 1) - 1.0).to(device)
        self.one_hot = torch.eye(size * size, device=device)
        self._next_cell = (next_row * size + next_column).flatten().to(device)  # [cells * 4]

    def move(self, cell: Tensor, actions: Tensor) -> Tensor:
        """The cells [B] behind a move, from cells [B] by actions [B]."""
        return self._next_cell.index_select(0, torch.add(actions, cell, alpha=4))  # 4 actions
