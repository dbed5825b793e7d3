import torch

from envs.gridworlds import MultiRoomKeyDoor
from envs.gridworlds.multi_room import FIRST_ROOM, LAST_ROOM, MIDDLE_ROOM
from envs.gridworlds.rooms import DOWN, LEFT, RIGHT, UP


def play(env, *, fetch_key: bool = True, right_door: bool = True) -> list:
    """One episode of one row by its context alone, so that it can also go wrong."""
    steps = [env.reset()]
    while not steps[-1].last.any():
        values = dict(zip(env.context_names, steps[-1].context[0].tolist(), strict=True))
        place = (values["row"], values["column"])
        goal = (values["way_on_row"], 1.0)
        if values["in_last_room"] and not right_door:
            goal = (-goal[0], 1.0)
        if values["in_first_room"] and fetch_key and not values["has_key"]:
            goal = (values["key_row"], values["key_column"])
        if place == goal:
            action = RIGHT
        elif place[1] != goal[1]:
            action = RIGHT if goal[1] > place[1] else LEFT
        else:
            action = UP if goal[0] < place[0] else DOWN
        steps.append(env.step(torch.tensor([action])))
    return steps


def columns(env, step, what: str) -> torch.Tensor:
    return step.observation[0, [i for i, name in enumerate(env.observation_names) if name.startswith(what)]]


def test_only_the_door_of_the_key_that_was_taken_pays():
    for seed in range(20):
        env = MultiRoomKeyDoor(4, num_envs=1, seed=seed)
        for dials, reward in (({}, 1.0), ({"right_door": False}, 0.0)):
            steps = play(env, **dials)
            assert sum(step.reward.item() for step in steps) == reward and steps[-1].discount == 0
    rewards = [
        sum(step.reward.item() for step in play(MultiRoomKeyDoor(2, num_envs=1, seed=seed), fetch_key=False))
        for seed in range(40)
    ]
    assert 0 < sum(rewards) < 30  # the key may lie on the way


def test_without_the_key_no_door_opens():
    for seed in range(20):
        env = MultiRoomKeyDoor(3, num_envs=1, seed=seed)
        steps = play(env, fetch_key=False)
        has_key = steps[-1].context[0, env.context_names.index("has_key")]
        assert steps[-1].reward == has_key


def test_what_each_room_shows():
    num_middle_keys_of_the_colour, num_middle_rooms, lengths = 0, 0, set()
    for seed in range(40):
        env = MultiRoomKeyDoor(4, num_envs=1, seed=seed, min_rooms=2)
        steps = play(env)
        key_colour = steps[0].context[0, env.context_names.index("key_colour")]
        kinds, num_rooms, previous = [], 1, None
        for step in steps:
            kind = int(step.context[0, :3].argmax())
            assert columns(env, step, "in_").tolist() + columns(env, step, "between").tolist() == [
                *(float(kind == i) for i in (FIRST_ROOM, LAST_ROOM)),
                float(kind == MIDDLE_ROOM),
            ]
            assert columns(env, step, "agent").sum() == 1
            keys, exits, doors = (columns(env, step, what) for what in ("key", "exit", "door"))
            has_key = step.context[0, env.context_names.index("has_key")]
            if kind == FIRST_ROOM:
                assert keys.sum() == key_colour * (1 - has_key)
            assert keys.abs().sum() == (0 if kind == LAST_ROOM or (kind == FIRST_ROOM and has_key) else 1)
            assert exits.sum() == (kind != LAST_ROOM)
            assert doors.tolist() in ([[1, 0, -1], [-1, 0, 1]] if kind == LAST_ROOM else [[0, 0, 0]])
            rooms_left = step.context[0, env.context_names.index("rooms_left")].item() * 4
            if previous is not None and rooms_left != previous:
                assert rooms_left == previous - 1
                num_rooms += 1
                if kind == MIDDLE_ROOM:
                    num_middle_rooms += 1
                    num_middle_keys_of_the_colour += int(keys.sum() == key_colour)
            previous = rooms_left
            kinds.append(kind)
        assert kinds == sorted(kinds, key=[FIRST_ROOM, MIDDLE_ROOM, LAST_ROOM].index) and previous == 0
        lengths.add(num_rooms)
    assert lengths == {2, 3, 4}
    assert 0.25 < num_middle_keys_of_the_colour / num_middle_rooms < 0.75


def test_keys_between_cannot_be_taken():
    env = MultiRoomKeyDoor(4, num_envs=500, seed=0, min_rooms=4, time_limit=200)
    step, generator, crossed = env.reset(), torch.Generator().manual_seed(0), 0
    has_key, in_first = env.context_names.index("has_key"), env.context_names.index("in_first_room")
    for _ in range(100):
        before, step = step, env.step(torch.randint(4, (500,), generator=generator))
        goes_on = ~step.first & (before.context[:, in_first] == 0)
        assert torch.equal(step.context[goes_on, has_key], before.context[goes_on, has_key])
        on_it = (step.context[:, 6:8] == step.context[:, 8:10]).all(1) & (step.context[:, 1] == 1)
        crossed += int((on_it & goes_on & (before.context[:, has_key] == 0)).sum())
    assert crossed > 100


def test_what_is_drawn_is_drawn_anew_for_every_room_and_episode():
    env = MultiRoomKeyDoor(3, num_envs=1000, seed=0)
    step, same, entries, restarts = env.reset(), 0, 0, 0
    for _ in range(30):
        before = env.state_dict()
        step = env.step(env.reference_policy())
        after = env.state_dict()
        enters = after["_room"] == before["_room"] + 1
        entries += int(enters.sum())
        same += torch.stack([(after[x] == before[x])[enters].sum() for x in ("_exit_row", "_key_cell", "_colour")])
        assert not step.context[step.first, env.context_names.index("has_key")].any()
        restarts += int(step.first.sum())
    assert restarts > 500 and entries > 2000
    assert (same / entries - torch.tensor([1 / 3, 1 / 8, 1 / 2])).abs().max() < 0.03


def test_the_number_of_rooms_is_uniform():
    env = MultiRoomKeyDoor(5, num_envs=3000, seed=0, min_rooms=2)
    rooms = (env.reset().context[:, env.context_names.index("rooms_left")] * 5).round().long() + 1
    counts = rooms.bincount(minlength=6)
    assert counts[:2].sum() == 0 and (counts[2:] / 3000 - 0.25).abs().max() < 0.03
