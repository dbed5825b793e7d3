import pytest
import torch

from envs.gridworlds.rooms import DOWN, LEFT, RIGHT, UP, SquareRoom


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_way_from_every_cell_to_every_other_is_the_shortest(size):
    room = SquareRoom(size, torch.device("cpu"))
    start, goal = (cells.flatten() for cells in torch.meshgrid(*[torch.arange(room.num_cells)] * 2, indexing="ij"))
    distance = (room.row[start] - room.row[goal]).abs() + (room.column[start] - room.column[goal]).abs()
    cell, steps = start.clone(), torch.zeros_like(start)
    for _ in range(2 * size):
        there = cell == goal
        cell = torch.where(there, cell, room.move(cell, room.action_towards[cell, goal]))
        steps += ~there
    assert torch.equal(cell, goal) and torch.equal(steps, distance)


def test_walls_stop_moves_and_coordinates_run_from_minus_one_to_one():
    room = SquareRoom(3, torch.device("cpu"))
    corners = torch.tensor([0, 0, 8, 8, 4])
    actions = torch.tensor([UP, LEFT, RIGHT, DOWN, UP])
    assert room.move(corners, actions).tolist() == [0, 0, 8, 8, 1]
    assert room.coordinates[[0, 4, 8]].tolist() == [[-1, -1], [0, 0], [1, 1]]
