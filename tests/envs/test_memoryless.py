"""What an agent without memory can reach in each gridworld: chance, shown without training one.

The mazes are small enough to optimise over all stochastic policies of the observation. In the streams actions change
nothing, so the best answer to each observation can be counted. In the rooms two runs that differ only in what had to be
remembered look the same from the moment on at which it is out of sight, and what the agent did before has no trace.

An agent that also sees its previous action has a memory outside of itself wherever actions are free while time passes: it repeats the
answer until it is asked for. `model.previous_action` switches that input off; the last tests say where it has to be.
"""

import pytest
import torch
from torch import Tensor

from envs.gridworlds import (
    ActiveTMaze,
    KeyToDoor,
    MatchToSample,
    MemoryCorridor,
    MultiRoomKeyDoor,
    PassiveTMaze,
    RepeatFirst,
    RepeatPrevious,
)
from envs.registry import GRIDWORLDS

MAZES = {
    "passive": (PassiveTMaze, {"corridor_length": 3, "min_corridor_length": 2}),
    "active": (ActiveTMaze, {"corridor_length": 2}),
    "corridor": (MemoryCorridor, {"length": 4, "num_distractors": 0}),
    "corridor, cue to be fetched": (MemoryCorridor, {"length": 4, "start_distance": 3, "num_distractors": 0}),
}
STREAMS = {
    "first": (RepeatFirst, {"delay": 3, "num_answers": 4}),
    "first, POPGym": (RepeatFirst, {"delay": 1, "num_answers": 8}),
    "previous": (RepeatPrevious, {"delay": 2, "num_answers": 8}),
    "previous, POPGym": (RepeatPrevious, {"delay": 2, "num_answers": 8, "max_gap": 1}),
}
ROOMS = (KeyToDoor, MatchToSample, MultiRoomKeyDoor)


def test_every_gridworld_is_covered():
    covered = {cls.__name__ for cls, _ in (*MAZES.values(), *STREAMS.values())}
    assert covered | {cls.__name__ for cls in ROOMS} == set(GRIDWORLDS)


# Mazes


def best_return(maze: str, *, sees_cue: bool) -> float:
    """Best discounted success rate, over starts, of a policy of the observation, which may be given the cue.

    Writes the maze out as a Markov chain by trying each action in each state, and climbs the exact value of a softmax
    policy with one row of logits per kind of observation, from a few starting points.
    """
    cls, dials = MAZES[maze]
    dials = {**dials, "penalty": 0.0}
    small = cls(num_envs=2000, seed=0, **dials)
    small.reset()
    starts = small.state_dict()["_state"].unique()
    S, A = len(small._reference_actions), small.spec.num_actions
    env = cls(num_envs=S * A, seed=0, **dials)
    env.reset()
    entries = {"_state": torch.arange(S).repeat_interleave(A), "_time": env._time * 0, "_last": env._last & False}
    env.load_state_dict({**env.state_dict(), **entries})
    step = env.step(torch.arange(A).repeat(S))
    successor = env.state_dict()["_state"].view(S, A)
    seen = torch.cat((step.observation, step.context[:, :1]), dim=1) if sees_cue else step.observation
    kinds, kind_of_entry = seen.unique(dim=0, return_inverse=True)
    kind = torch.zeros(S, dtype=torch.int64)
    kind[successor.flatten()] = kind_of_entry  # a state that nothing leads to is no start either, or is covered below
    assert torch.isin(starts, successor).all()
    chain = torch.zeros(S, A, S, dtype=torch.float64).scatter_(2, successor[..., None], 1.0)
    chain *= 0.999 * step.discount.view(S, A, 1)
    reward = step.reward.view(S, A).double()

    best = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(kinds), A, generator=generator, dtype=torch.float64).requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.2)
        for _ in range(100):
            policy = logits.softmax(-1)[kind]  # [S, A]
            moves = torch.eye(S, dtype=torch.float64) - torch.einsum("sa,sat->st", policy, chain)
            value = torch.linalg.solve(moves, (policy * reward).sum(1))[starts].mean()
            optimiser.zero_grad()
            (-value).backward()
            optimiser.step()
        best = max(best, value.item())
    return best


@pytest.mark.parametrize("maze", MAZES)
def test_no_policy_of_the_observation_beats_chance_in_a_maze(maze):
    assert best_return(maze, sees_cue=False) <= 0.5


@pytest.mark.parametrize("maze", ["passive", "corridor"])
def test_the_same_search_finds_the_way_with_the_cue_in_sight(maze):
    assert best_return(maze, sees_cue=True) > 0.9


# Streams


def lookup_accuracy(observations: Tensor, answers: Tensor) -> float:
    """Share of right answers of the best table from observations [N, D] to answers [N]."""
    _, kind = observations.unique(dim=0, return_inverse=True)
    counts = torch.zeros(int(kind.max()) + 1, int(answers.max()) + 1).index_put_(
        (kind, answers), torch.ones(len(kind)), accumulate=True
    )
    return (counts.max(dim=1).values.sum() / len(kind)).item()


def questions(stream: str, **more) -> tuple[Tensor, Tensor, Tensor]:
    """Plays whole episodes: observations [T, B, 2 + num_symbols], right answers [T, B], whether it counts [T, B]."""
    cls, dials = STREAMS[stream]
    env = cls(num_envs=4000, seed=0, num_symbols=3, num_distractors=0, **{**dials, **more})
    step, observations, answers = env.reset(), [], []
    alive, over = [], torch.zeros(env.num_envs, dtype=torch.bool)
    for _ in range(env.episode_length + 1):
        observations.append(step.observation)
        answers.append(env.reference_policy())
        alive.append(~over)
        over = over | step.last
        step = env.step(answers[-1])
    assert over.all()
    asks = (torch.stack(observations)[..., 1] == 1) & torch.stack(alive)
    assert (asks.sum(0) == env.num_answers).all()
    return torch.stack(observations), torch.stack(answers), asks


@pytest.mark.parametrize("stream", STREAMS)
def test_the_best_answer_to_an_observation_is_a_guess(stream):
    observations, answers, asks = questions(stream)
    assert lookup_accuracy(observations[asks], answers[asks]) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("stream", "dials", "exact"),
    [
        ("previous", {}, False),
        ("previous, POPGym", {}, True),  # without gaps a fixed delay is all it takes
        ("first", {"num_answers": 1}, False),
        ("first", {"num_answers": 1, "min_delay": 3}, True),
    ],
)
def test_no_fixed_delay_finds_the_answer(stream, dials, exact):
    observations, answers, asks = questions(stream, **dials)
    accuracy = []
    for delay in range(1, 9):
        then = torch.cat((torch.zeros_like(observations[:delay]), observations))[: len(observations)]  # before: nothing
        accuracy.append(lookup_accuracy(torch.cat((observations, then), dim=2)[asks], answers[asks]))
    assert (max(accuracy) == 1.0) if exact else (max(accuracy) < 0.75)


# Rooms


def play(env, state: dict, num_steps: int) -> tuple[Tensor, Tensor]:
    """Continues from `state` by fixed random actions: observations [T, B, D], success of the running episode [B]."""
    env.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    observations, reward, over = [], torch.zeros(env.num_envs), state["_last"]
    for _ in range(num_steps):
        step = env.step(torch.randint(4, (env.num_envs,), generator=generator))
        reward += step.reward * ~over
        over = over | step.last
        observations.append(step.observation * ~over[:, None])
    return torch.stack(observations), reward


@pytest.mark.parametrize("hidden_sample", [False, True])
def test_rooms_behind_the_sample_tell_nothing_of_it(hidden_sample):
    env = MatchToSample(
        3, num_envs=500, seed=0, hidden_sample=hidden_sample, num_choices=3, num_colours=3, choice_steps=20
    )
    env.reset()
    for _ in range(env.sample_steps - 1):
        step = env.step(torch.zeros(500, dtype=torch.int64))
    assert (step.context[:, 0] == 1).all()
    state = env.state_dict()
    runs = [play(env, {**state, "_colour": torch.full_like(state["_colour"], colour)}, 20) for colour in range(3)]
    for observations, _ in runs[1:]:
        assert torch.equal(observations, runs[0][0])
    rewards = torch.stack([reward for _, reward in runs])
    assert (rewards.sum(0) <= 1).all() and (rewards.sum(0) == 1).float().mean() > 0.5  # one colour in three pays


def test_rooms_forget_what_was_done_in_the_one_before():
    runs = []
    for seed in (0, 1):
        env = MatchToSample(4, num_envs=200, seed=0, hidden_sample=True)
        env.reset()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(env.sample_steps):
            step = env.step(torch.randint(4, (200,), generator=generator))
        assert (step.context[:, 1] == 1).all()
        runs.append((step.observation, *play(env, env.state_dict(), 10)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_sample_is_any_of_the_choices():
    env = MatchToSample(num_envs=20000, seed=0, num_colours=4, num_choices=2)
    env.reset()
    state = env.state_dict()
    choices, colour = state["_choices"], state["_colour"]
    offered = torch.stack([(choices == i).any(1) for i in range(4)], dim=1)  # [B, C]
    assert (offered.sum(1) == 2).all() and offered.gather(1, colour[:, None]).all()
    pairs, pair = choices.unique(dim=0, return_inverse=True)
    assert len(pairs) == 4 * 3 * 3  # ordered pairs of colours, in two of three columns
    for i, row in enumerate(pairs):
        shares = torch.bincount(colour[pair == i], minlength=5)[:4] / (pair == i).sum()
        assert (shares[row[row < 4]] - 0.5).abs().max() < 0.1


def test_rooms_behind_the_key_tell_nothing_of_its_colour():
    env = KeyToDoor(4, num_envs=500, seed=0, room_size=3, num_doors=2, num_apples=3, apple_reward=0.0, door_steps=20)
    step = env.reset()
    while (step.context[:, 0] == 1).all():
        state = env.state_dict()
        step = env.step(env.reference_policy())
    runs = [play(env, {**state, "_key_colour": torch.full_like(state["_key_colour"], c)}, 24) for c in (-1.0, 1.0)]
    assert torch.equal(runs[0][0], runs[1][0])
    total = runs[0][1] + runs[1][1]
    assert (total <= 1).all() and (total == 1).float().mean() > 0.4


def test_rooms_behind_the_first_tell_nothing_of_its_key():
    env = MultiRoomKeyDoor(3, num_envs=500, seed=0, min_rooms=3, time_limit=400)
    env.reset()
    while (env.state_dict()["_room"] == 0).any():
        step = env.step(env.reference_policy())
        assert not step.last.any()
    state = env.state_dict()
    colours = (torch.full_like(state["_key_colour"], c) for c in (-1.0, 1.0))
    runs = [play(env, {**state, "_key_colour": colour}, 150) for colour in colours]
    assert torch.equal(runs[0][0], runs[1][0])
    total = runs[0][1] + runs[1][1]
    assert (total <= 1).all() and (total == 1).float().mean() > 0.4


def test_rooms_are_always_entered_in_the_same_cell():
    runs = []
    for seed in (0, 1):
        env = MultiRoomKeyDoor(3, num_envs=200, seed=0)
        env.reset()
        generator, entries = torch.Generator().manual_seed(seed), 0
        for _ in range(60):
            before = env.state_dict()["_room"]
            step = env.step(torch.randint(4, (200,), generator=generator))
            enters = env.state_dict()["_room"] != before
            assert (step.observation[enters, 3] == 1).all()  # the middle of the left column
            entries += int(enters.sum())
        runs.append(entries)
    assert min(runs) > 200


# The previous action


def success_of(env, policy, num_steps: int) -> float:
    """Share of successes of a policy of (observation, previous action or -1 in an episode's first step)."""
    step, action = env.reset(), torch.zeros(env.num_envs, dtype=torch.int64)
    total, done = torch.zeros(env.num_envs), []
    for _ in range(num_steps):
        action = policy(step.observation, torch.where(step.first, -1, action))
        step = env.step(action)
        total += step.reward
        done.append(total[step.last] >= env.spec.success_reward)
        total *= ~step.last
    return torch.cat(done).float().mean().item()


def test_repeating_the_first_answer_needs_no_memory_but_the_previous_action():
    env = RepeatFirst(10, num_envs=200, seed=0)

    def repeat(observation, previous):
        return torch.where(previous < 0, observation[:, 2 : 2 + env.num_symbols].argmax(1), previous)

    assert success_of(env, repeat, 200) == 1.0
    assert success_of(env, lambda observation, _: repeat(observation, torch.full((200,), -1)), 200) < 0.05


def test_carrying_a_colour_through_the_rooms_needs_no_memory_but_the_previous_action():
    env = MatchToSample(num_envs=200, seed=0)
    size = env.room_size**2

    def carry(observation, previous):
        place, colours = (
            observation[:, :size].argmax(1),
            observation[:, size : 5 * size].view(-1, 4, env.room_size, env.room_size),
        )
        room = observation[:, 5 * size : 5 * size + 3].argmax(1)
        sample = colours.amax((2, 3)).argmax(1)
        # in the choice room: the column of the object of that colour, entered from the middle
        column = colours[torch.arange(200), previous.clamp_min(0), 0].argmax(1)
        walk = torch.where(column == 1, 1, torch.where(column == 0, 2, 0))
        at_entrance = place == size - 2
        return torch.where(room == 0, sample, torch.where(room == 1, previous, torch.where(at_entrance, walk, 1)))

    assert success_of(env, carry, 200) == 1.0
    assert success_of(env, lambda observation, _: carry(observation, torch.zeros(200, dtype=torch.int64)), 200) < 0.7
