import pytest
import torch

from envs.gridworlds import MemoryCorridor
from envs.gridworlds.memory_corridor import FORWARD, TURN_LEFT, TURN_RIGHT

# Inputs of the view: wall and object, two ahead, one ahead, beside; left, middle, right (no middle beside).
WALL, OBJECT = slice(0, 8), slice(8, 16)


def column(env, step, name: str) -> torch.Tensor:
    return step.context[:, env.context_names.index(name)]


def walk(env, *actions: int) -> list:
    return [env.reset(), *(env.step(torch.full((env.num_envs,), action)) for action in actions)]


def test_the_view_by_hand():
    env = MemoryCorridor(6, num_envs=64, seed=0, min_length=6, num_distractors=0)
    F, L, R = FORWARD, TURN_LEFT, TURN_RIGHT
    steps = walk(env, F, F, F, F, F, F, L, R, R, F)
    cue, side = column(env, steps[0], "cue"), column(env, steps[0], "side")
    assert {(-1, -1), (-1, 1), (1, -1), (1, 1)} == set(zip(cue.tolist(), side.tolist(), strict=True))
    corridor = [1, 0, 1, 1, 0, 1, 1, 1]

    def check(step, wall, **objects):
        assert (step.observation[:, WALL] == torch.tensor(wall)).all()
        expected = torch.zeros(64, 8)
        for place, kind in objects.items():
            expected[:, int(place[1:])] = kind
        assert torch.equal(step.observation[:, OBJECT], expected)

    check(steps[0], [1, 0, 1, 1, 0, 1, 0, 1], _6=cue)  # beside the agent, to its left
    for step in steps[1:4]:
        check(step, corridor)
    north, south = cue * side, -cue * side
    check(steps[4], [0, 0, 0, 1, 0, 1, 1, 1], _0=north, _2=south)
    check(steps[5], [1, 1, 1, 0, 0, 0, 1, 1], _3=north, _5=south)
    check(steps[6], [1, 1, 1, 1, 1, 1, 0, 0], _6=north, _7=south)
    check(steps[7], [1, 1, 1, 1, 0, 1, 0, 1], _4=north)  # looking north: the corridor to the left
    check(steps[8], [1, 1, 1, 1, 1, 1, 0, 0], _6=north, _7=south)
    check(steps[9], [1, 1, 1, 1, 0, 1, 1, 0], _4=south)
    assert steps[10].last.all() and (steps[10].discount == 0).all()
    assert torch.equal(steps[10].observation, steps[9].observation)
    assert torch.equal(steps[10].reward, (side < 0).float())


def test_moves_into_walls_and_the_cue_stay():
    env = MemoryCorridor(4, num_envs=32, seed=0, min_length=4, num_distractors=0)
    steps = walk(env, TURN_LEFT, FORWARD, TURN_LEFT, FORWARD, TURN_LEFT, FORWARD, TURN_LEFT, FORWARD)
    position = [column(env, step, "position").unique().item() * 4 for step in steps]
    assert position == [0] * 8 + [1]
    looks = [int(step.context[0, 4:8].argmax()) for step in steps]
    assert looks == [0, 3, 3, 2, 2, 1, 1, 0, 0]  # east, north, west, south, east
    assert not any(step.last.any() for step in steps)


def test_the_fine_by_hand_is_the_same_whatever_the_cue():
    dials = {"min_length": 4, "start_distance": 1, "penalty": 0.01, "time_limit": 20}
    env = MemoryCorridor(4, num_envs=64, seed=0, **dials)
    L, R, F = TURN_LEFT, TURN_RIGHT, FORWARD
    actions = [L, R, L, L, F, R, R, F, F, F, F, R, L, L, F]
    fined = [1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]  # turning away, west to the cue or into the wall, away again
    steps = walk(env, *actions)
    assert column(env, steps[0], "position").unique().numel() == 2
    for step, fine in zip(steps[1:-1], fined, strict=True):
        assert torch.allclose(step.reward, torch.tensor(-0.01 * fine))
    side = column(env, steps[0], "side")
    assert torch.equal(steps[-1].reward, (side > 0).float())


def test_the_cue_must_be_fetched_from_where_it_is_out_of_sight():
    env = MemoryCorridor(5, num_envs=512, seed=0, start_distance=3)
    step = env.reset()
    start = (column(env, step, "position") * 5).round()
    assert (start.long().bincount(minlength=4) > 90).all() and start.max() == 3
    assert torch.equal(column(env, step, "cue_seen"), (start == 0).float())
    fetched, steps_taken, over = column(env, step, "cue_seen") > 0, torch.zeros(512), torch.zeros(512, dtype=torch.bool)
    length = start + (column(env, step, "distance") * 5).round()
    for t in range(1, 12):
        sight = env._look(torch.full((512,), 5), *_place(env, step), *[torch.ones(512, dtype=torch.int64)] * 2)[2]
        assert (fetched | ~sight | over).all()
        step = env.step(env.reference_policy())
        fetched = fetched | (column(env, step, "cue_seen") > 0)
        steps_taken[step.last] = t
        over = over | step.last
        if over.all():
            break
    assert fetched.all()
    assert torch.equal(steps_taken, length + start + 2)  # the steps needed that the time limit is made of


def _place(env, step):
    return (column(env, step, "position") * 5).round().long(), step.context[:, 4:8].argmax(1)


def test_behind_the_third_cell_nothing_tells_the_cue_and_all_come_the_same_way():
    """Every state and action, once as it is and once with the other cue and the same objects at the junction."""
    env = MemoryCorridor(5, num_envs=32 * 3 * 6 * 3, seed=0, start_distance=3, num_distractors=0)
    env.reset()
    S = len(env._reference_actions)
    assert env.num_envs == 3 * S
    state, actions = torch.arange(S).repeat_interleave(3), torch.arange(3).repeat(S)
    steps, contexts = [], []
    for flip in (0, 6):  # bits 1 and 2 of a state: side and cue
        env.load_state_dict(
            {**env.state_dict(), "_state": state ^ flip, "_last": env._last & False, "_time": env._time * 0}
        )
        contexts.append(env._hidden[state ^ flip])
        steps.append(env.step(actions))
    one, other = steps
    assert torch.equal(contexts[0][:, :2], -contexts[1][:, :2]) and torch.equal(
        contexts[0][:, 2:-2], contexts[1][:, 2:-2]
    )
    before, after = (contexts[0][:, 2] * 5).round(), (column(env, one, "position") * 5).round()
    exists = before <= before + (contexts[0][:, 3] * 5).round()
    assert torch.equal(one.context[:, 2:8], other.context[:, 2:8])  # moves do not depend on the cue
    differs = (one.observation != other.observation).any(1)
    assert not differs[after >= 3].any() and differs[after < 3].any()
    enters = exists & (before == 2) & (after == 3)
    assert enters.any() and (column(env, one, "looks_east")[enters] == 1).all()
    ends = one.discount == 0
    assert torch.equal(ends, other.discount == 0)
    assert torch.equal((one.reward + other.reward)[ends], torch.ones(int(ends.sum())))  # one of the two cues pays


@pytest.mark.parametrize("penalty", [None, 0.0, 0.02])
def test_the_worst_success_beats_the_best_failure(penalty):
    """The worst starts nearest to the junction, runs against its wall and takes the right object in the last step."""
    env = MemoryCorridor(5, num_envs=256, seed=0, min_length=3, start_distance=3, penalty=penalty)
    step, total = env.reset(), torch.zeros(256)
    distance = (column(env, step, "distance") * 5).round()
    side = column(env, step, "side")
    fines = (env.time_limit - 2 - distance) * (1 / env.time_limit if penalty is None else penalty)
    assert distance.min() == 0
    for left in range(env.time_limit, 0, -1):
        assert not step.last.any()
        turns = torch.where(side > 0, TURN_LEFT, TURN_RIGHT)
        step = env.step(turns if left == 2 else torch.full((256,), FORWARD))
        total += step.reward
    assert (step.discount == 0).all()
    torch.testing.assert_close(total, 1 - fines)
    assert (total >= env.spec.success_reward).all()
    assert env.spec.success_reward > 0  # the best failure takes the wrong object at once, for which nobody is fined


def test_lengths_are_uniform():
    env = MemoryCorridor(8, num_envs=2000, seed=0, min_length=5)
    lengths = (column(env, env.reset(), "distance") * 8).round().long()
    counts = lengths.bincount(minlength=9)
    assert counts[:5].sum() == 0 and (counts[5:] / 2000 - 0.25).abs().max() < 0.04
