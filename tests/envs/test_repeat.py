import pytest
import torch

from envs.gridworlds import RepeatFirst, RepeatPrevious


def play(env, policy=None) -> list:
    """The first episode of one row, with the right answers unless told otherwise."""
    steps = [env.reset()]
    while not steps[-1].last.any():
        steps.append(env.step(env.reference_policy() if policy is None else policy(env)))
    return steps


def asks(step) -> bool:
    return bool(step.observation[0, 1])


def symbol(step, num_symbols: int = 4) -> int | None:
    shown = step.observation[0, 2 : 2 + num_symbols]
    return int(shown.argmax()) if shown.any() else None


@pytest.mark.parametrize("seed", range(5))
def test_repeat_first_by_hand(seed):
    env = RepeatFirst(6, num_envs=1, seed=seed, min_delay=2, num_answers=3)
    steps = play(env)
    times = [t for t, step in enumerate(steps) if asks(step)]
    waits = [b - a for a, b in zip([0, *times], times, strict=False)]
    assert len(times) == 3 and all(2 <= wait <= 6 for wait in waits)
    assert len(steps) == times[-1] + 2 <= env.episode_length + 1  # the last answer ends it
    assert steps[-1].discount == 0
    assert [step.reward.item() for step in steps] == pytest.approx([(t - 1 in times) / 3 for t in range(len(steps))])
    assert [bool(step.observation[0, 0]) for step in steps] == [True] + [False] * (len(steps) - 1)
    assert all(symbol(step) is not None for step in steps)
    assert all(step.context[0, symbol(steps[0])] == 1 and step.context[0, :4].sum() == 1 for step in steps)


@pytest.mark.parametrize("seed", range(5))
def test_repeat_previous_by_hand(seed):
    env = RepeatPrevious(2, num_envs=1, seed=seed, num_answers=4)
    shown, actions = [], []

    def by_hand(env):  # from the observations alone
        step = steps[-1]
        if symbol(step) is not None:
            shown.append(symbol(step))
        assert asks(step) == (symbol(step) is not None and len(shown) > 2)
        actions.append(shown[-3] if asks(step) else 0)
        return torch.tensor([actions[-1]])

    steps = [env.reset()]
    while not steps[-1].last.any():
        steps.append(env.step(by_hand(env)))
    assert len(shown) == 2 + 4
    assert sum(step.reward.item() for step in steps) == pytest.approx(1.0)
    assert [step.reward.item() > 0 for step in steps[1:]] == [asks(step) for step in steps[:-1]]
    gaps = torch.tensor([t for t, step in enumerate(steps) if symbol(step) is not None]).diff()
    assert gaps.min() >= 1 and gaps.max() <= 3
    assert steps[-1].discount == 0


@pytest.mark.parametrize("cls", [RepeatFirst, RepeatPrevious])
def test_a_wrong_answer_earns_nothing_and_ends_nothing(cls):
    steps = play(cls(2, num_envs=1, seed=0), lambda env: (env.reference_policy() + 1) % 4)
    right = play(cls(2, num_envs=1, seed=0))
    assert len(steps) == len(right)
    assert all(torch.equal(a.observation, b.observation) for a, b in zip(steps, right, strict=True))
    assert sum(step.reward.item() for step in steps) == 0


@pytest.mark.parametrize(("cls", "dials"), [(RepeatFirst, {}), (RepeatPrevious, {"max_gap": 1})])
def test_with_an_event_at_every_step_nothing_is_asked_behind_the_end(cls, dials):
    steps = play(cls(1, num_envs=1, seed=0, num_answers=3, **dials))
    assert [asks(step) for step in steps] == [False, True, True, True, False]


@pytest.mark.parametrize(("num_answers", "enough"), [(1, 1), (9, 9), (10, 9), (20, 18), (21, 19)])
def test_nine_in_ten_right_answers_are_a_success(num_answers, enough):
    threshold = RepeatPrevious(2, num_envs=1, seed=0, num_answers=num_answers).spec.success_reward
    reward = torch.tensor(1.0) / num_answers
    assert sum([reward] * enough) >= threshold > sum([reward] * (enough - 1))


@pytest.mark.parametrize("cls", [RepeatFirst, RepeatPrevious])
def test_symbols_waits_and_distractors_are_uniform_and_independent(cls):
    env = cls(3, num_envs=400, seed=0, num_answers=20, **({"min_delay": 1} if cls is RepeatFirst else {}))
    steps = [env.reset(), *(env.step(torch.zeros(400, dtype=torch.int64)) for _ in range(20))]
    observations = torch.stack([step.observation for step in steps])  # [T, B, 10]
    symbols, distractors = observations[..., 2:6], observations[..., 6:]
    share = symbols.mean((0, 1)) / symbols.mean((0, 1)).sum()
    assert (share - 0.25).abs().max() < 0.02
    assert (symbols[1:] * symbols[:1]).sum(-1)[symbols[1:].any(-1)].mean() == pytest.approx(0.25, abs=0.02)
    assert (distractors.abs() == 1).all() and distractors.mean().abs() < 0.02
    assert (distractors[1:] * distractors[:-1]).mean().abs() < 0.02
    wait = torch.stack([step.context[:, -2] for step in steps[:1]]) * 3  # at an event: the whole wait before the next
    assert (wait.long().flatten().bincount(minlength=4) / 400 - torch.tensor([0, 1, 1, 1]) / 3).abs().max() < 0.08


def test_context_of_repeat_previous_in_numbers():
    env = RepeatPrevious(1, num_envs=1, seed=0, num_symbols=2, max_gap=1, num_answers=2, num_distractors=0)
    start, second, third = (env.reset(), *(env.step(env.reference_policy()) for _ in range(2)))
    one_hot = {0: [1, 0], 1: [0, 1]}
    a, b, c = (one_hot[symbol(step, 2)] for step in (start, second, third))
    #                                 newest, the one before, asks, wait left, events left
    assert start.context[0].tolist() == pytest.approx([*a, 0, 0, 0, 1, 2 / 3])
    assert second.context[0].tolist() == pytest.approx([*b, *a, 1, 1, 1 / 3])
    assert third.context[0].tolist() == pytest.approx([*c, *b, 1, 1, 0])
