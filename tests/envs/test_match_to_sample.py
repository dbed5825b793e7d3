import pytest
import torch

from envs.gridworlds import MatchToSample
from envs.gridworlds.match_to_sample import CHOICE_ROOM, SAMPLE_ROOM, WAITING_ROOM

DOWN = 3


def play(env) -> list:
    """Steps until the last row has finished its first episode."""
    steps, over = [env.reset()], torch.zeros(env.num_envs, dtype=torch.bool)
    while not over.all():
        steps.append(env.step(env.reference_policy()))
        over = over | steps[-1].last
    return steps


def wait(env, num_steps: int) -> list:
    return [env.reset(), *(env.step(torch.full((env.num_envs,), DOWN)) for _ in range(num_steps))]


def maps(env, step, what: str) -> torch.Tensor:
    """[B, maps, cells] of the observation whose names start with `what`."""
    columns = [i for i, name in enumerate(env.observation_names) if name.startswith(what)]
    return step.observation[:, columns].view(env.num_envs, -1, env.room_size**2)


def column(env, step, name: str) -> torch.Tensor:
    return step.context[:, env.context_names.index(name)]


def test_the_rooms_follow_the_clock():
    env = MatchToSample(4, num_envs=1, seed=0, min_delay=4, sample_steps=3, choice_steps=4)
    steps = wait(env, 11)
    rooms = [int(step.context[0, :3].argmax()) for step in steps]
    assert rooms == [SAMPLE_ROOM] * 3 + [WAITING_ROOM] * 4 + [CHOICE_ROOM] * 5
    assert [bool(step.last) for step in steps] == [False] * 11 + [True]
    assert steps[-1].discount == 0
    room_columns = [env.observation_names.index(name) for name in env.context_names[:3]]
    assert all((step.observation[:, room_columns] == step.context[:, :3]).all() for step in steps)
    time_left = torch.stack([column(env, step, "time_left") for step in steps]).flatten()
    torch.testing.assert_close(time_left, torch.linspace(1, 0, 12))
    room_time_left = [column(env, step, "room_time_left").item() for step in steps]
    assert room_time_left == pytest.approx([1, 2 / 3, 1 / 3, 1, 3 / 4, 1 / 2, 1 / 4, 1, 3 / 4, 1 / 2, 1 / 4, 0])


def test_delays_are_uniform():
    env = MatchToSample(6, num_envs=3000, seed=0, min_delay=3, sample_steps=2)
    waiting = sum(step.context[:, 1] for step in wait(env, 8)).long()
    counts = waiting.bincount(minlength=7)
    assert counts[:3].sum() == 0 and (counts[3:] / 3000 - 0.25).abs().max() < 0.03


def test_what_each_room_shows():
    env = MatchToSample(3, num_envs=300, seed=0, min_delay=3, sample_steps=2, num_colours=5, num_choices=3)
    steps = wait(env, 6)
    colour = torch.stack([column(env, steps[0], f"colour_is_{i}") for i in range(5)], dim=1)
    for step in steps[:2]:  # the sample, on any cell but the agent's
        seen = maps(env, step, "colour")
        assert torch.equal(seen.sum(2), colour)
        assert not seen[:, :, 7].any() and seen.sum((0, 1))[torch.arange(9) != 7].min() > 15
    decoys = [maps(env, step, "colour") for step in steps[2:5]]
    assert all((decoy.sum((1, 2)) == 1).all() for decoy in decoys)
    assert not torch.equal(decoys[0], decoys[1])
    for decoy in decoys:  # it says nothing of the sample
        assert (decoy.sum(2) * colour).sum(1).mean() == pytest.approx(0.2, abs=0.07)
        assert (decoy.sum((0, 1)) > 10).all() and (decoy.sum((0, 2)) > 30).all()
    for step in steps[5:]:  # the choices, in the top row
        seen = maps(env, step, "colour")
        assert not seen[:, :, 3:].any() and (seen.sum(1) <= 1).all() and (seen.sum((1, 2)) == 3).all()
        assert ((seen.sum(2) * colour).sum(1) == 1).all()
        target = (column(env, step, "target_column") + 1).long()
        assert (
            (seen[:, :, :3].gather(2, target.view(-1, 1, 1).expand(-1, 5, 1)).squeeze(2) * colour).sum(1) == 1
        ).all()


def test_a_hidden_sample_shows_its_colour_only_from_its_cell():
    env = MatchToSample(2, num_envs=200, seed=0, hidden_sample=True)
    seen_before = torch.zeros(200)
    for step in play(env)[: env.sample_steps]:
        on_it = (maps(env, step, "agent")[:, 0] * _sample_map(env, step)).sum(1)
        assert torch.equal(maps(env, step, "colour").sum((1, 2)), on_it)
        assert torch.equal(maps(env, step, "hidden").sum((1, 2)), 1 - on_it)
        seen_before = torch.maximum(seen_before, on_it)
        assert torch.equal(column(env, step, "colour_seen"), seen_before)
    assert seen_before.all()
    assert not column(env, env.reset(), "colour_seen").any()


def test_the_sample_is_not_seen_from_other_rooms():
    env = MatchToSample(20, num_envs=200, seed=0, min_delay=20, hidden_sample=True)
    steps = wait(env, env.sample_steps)
    assert (steps[-1].context[:, 1] == 1).all()
    for _ in range(20):  # over every cell of the sample
        assert not column(env, env.step(env.reference_policy()), "colour_seen").any()


def _sample_map(env, step) -> torch.Tensor:
    row, column_ = ((column(env, step, f"sample_{x}") + 1).long() for x in ("row", "column"))
    return torch.nn.functional.one_hot(row * 3 + column_, 9)


def test_only_the_right_choice_pays_and_any_choice_ends_the_episode():
    env = MatchToSample(2, num_envs=300, seed=0, min_delay=2, num_choices=3, num_colours=3, sample_steps=1)
    wait(env, 3)
    steps = [env.step(torch.full((300,), 1)) for _ in range(2)]  # up twice: the object in the middle column
    assert not steps[0].last.any() and not steps[0].reward.any()
    assert steps[1].last.all() and (steps[1].discount == 0).all()
    right = column(env, steps[1], "target_column") == 0
    assert torch.equal(steps[1].reward, right.float()) and 60 < right.sum() < 140


def test_free_columns_of_the_choice_room_end_nothing():
    env = MatchToSample(1, num_envs=300, seed=0, num_choices=2, sample_steps=1, choice_steps=6)
    wait(env, 2)
    free = ~maps(env, env.step(torch.full((300,), 1)), "colour")[:, :, 1].any(1)
    assert torch.equal(env.step(torch.full((300,), 1)).last, ~free)
    assert 50 < free.sum() < 150
