"""A check that any `envs.timestep.Environment` must pass: shapes, the episode protocol, errors, seeds, saved state.

    report = check_environment(lambda num_envs, seed: PassiveTMaze(10, num_envs=num_envs, seed=seed), num_steps=100)
    assert report.terminations and report.time_limits

A failure is an AssertionError that names the step and the promise of `envs/timestep.py` that was broken.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from envs.timestep import Environment, EnvSpec, TimeStep


class MakeEnv(Protocol):
    def __call__(self, *, num_envs: int, seed: int) -> Environment: ...


@dataclass(frozen=True)
class Report:
    """What the checked steps contained.

    Attributes:
        terminations: rows that ended with discount 0.
        time_limits: rows that ended with discount 1.
        steps: every TimeStep of the first run.
    """

    terminations: int
    time_limits: int
    steps: tuple[TimeStep, ...]


def check_environment(
    make_env: MakeEnv,
    *,
    num_steps: int,
    num_envs: int = 3,
    same_step: bool = False,
    varies_with_seed: bool = True,
    make_actions: Callable[[int, EnvSpec], Tensor] | None = None,
) -> Report:
    """Checks one kind of environment against the contract of `envs.timestep`.

    Args:
        make_env: builds a fresh environment; called five times.
        num_steps: steps to take; at least one episode must end within them. All in all up to about ten times as many
            are taken where the environment is resumable, and four times as many where it is not.
        num_envs: B.
        same_step: the environment resets within the step that ends an episode, and so never shows a LAST step.
        varies_with_seed: whether another seed must give another stream.
        make_actions: maps the step's number and the spec to actions [B] for that step, to steer the run into an
            episode's end; None: uniformly random ones.

    Returns:
        What was seen, for further assertions.

    Raises:
        AssertionError: if a promise is broken.
    """
    with _closing(make_env(num_envs=num_envs, seed=1)) as env:
        check_spec(env, num_envs)
        generator = torch.Generator().manual_seed(0)

        def random_actions(_: int, spec: EnvSpec) -> Tensor:
            return torch.randint(spec.num_actions, (num_envs,), generator=generator)

        make_actions = make_actions or random_actions
        actions = [make_actions(t, env.spec).to(env.device) for t in range(num_steps)]
        steps = rollout(env, actions)
        snapshots = copy.deepcopy(steps)
        report = check_protocol(steps, same_step=same_step)
        check_reset_in_the_middle(env, actions)
        assert_same_steps(steps, snapshots, "a TimeStep changed after it was returned")
        check_errors(env)
    check_seeds(make_env, num_envs, actions, steps, varies_with_seed)
    check_saved_state(make_env, num_envs, actions, steps)
    return report


def rollout(env: Environment, actions: Sequence[Tensor], *, reset: bool = True) -> list[TimeStep]:
    """Returns the steps of `actions`, with that of `reset` in front unless told otherwise."""
    return ([env.reset()] if reset else []) + [env.step(action) for action in actions]


def check_spec(env: Environment, num_envs: int) -> None:
    """Checks the attributes of an environment and its spec."""
    assert isinstance(env, Environment), f"{type(env).__name__} lacks attributes or methods of Environment"
    assert env.num_envs == num_envs, f"num_envs is {env.num_envs}, asked for {num_envs}"
    assert isinstance(env.device, torch.device), f"device must be a torch.device, got {env.device!r}"
    assert isinstance(env.resumable, bool), f"resumable must be a bool, got {env.resumable!r}"
    spec = env.spec
    assert isinstance(spec, EnvSpec)
    shape = spec.observation_shape
    assert isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape), f"observation_shape {shape!r}"
    assert spec.observation_dtype in (torch.float32, torch.uint8), f"observation_dtype {spec.observation_dtype}"
    assert type(spec.num_actions) is int and spec.num_actions > 0, f"num_actions {spec.num_actions!r}"
    assert type(spec.context_size) is int and spec.context_size >= 0, f"context_size {spec.context_size!r}"
    assert type(spec.frames_per_step) is int and spec.frames_per_step > 0, f"frames_per_step {spec.frames_per_step!r}"
    assert spec.success_reward is None or math.isfinite(spec.success_reward)


def check_protocol(steps: Sequence[TimeStep], *, same_step: bool = False) -> Report:
    """Checks steps that start with a `reset`: FIRST, MID, LAST in order, with rewards and discounts as promised."""
    start = steps[0]
    assert start.first.all(), "every row of reset() must be first"
    assert not start.last.any(), "no row of reset() may be last"
    assert (start.reward == 0).all(), "the reward of reset() must be 0"
    assert (start.discount == 1).all(), "the discount of reset() must be 1"
    terminations = time_limits = 0
    previous = None
    for t, step in enumerate(steps):
        where = f"step {t}"
        assert ((step.discount == 0) | (step.discount == 1)).all(), f"{where}: discount must be 0 or 1: {step.discount}"
        assert step.reward.isfinite().all(), f"{where}: reward must be finite: {step.reward}"
        if same_step and previous is not None:
            assert not step.last.any(), f"{where}: same-step autoreset never shows a LAST step"
            ends = step.first
        else:
            if previous is not None:
                assert (step.first == previous.last).all(), f"{where}: FIRST must follow LAST, and nothing else"
            assert (step.reward[step.first] == 0).all(), f"{where}: reward must be 0 on a FIRST step: {step.reward}"
            assert (step.discount[step.first] == 1).all(), f"{where}: discount must be 1 on a FIRST step"
            assert not (step.first & step.last).any(), f"{where}: a step cannot be FIRST and LAST"
            assert step.final_observation is None, f"{where}: final_observation is for same-step autoreset only"
            ends = step.last
        assert (step.discount[~ends] == 1).all(), f"{where}: discount must be 1 while the episode goes on"
        cut = ends & (step.discount == 1)
        if previous is not None:
            terminations += int((ends & (step.discount == 0)).sum())
            time_limits += int(cut.sum())
            if same_step and cut.any():
                assert step.final_observation is not None, f"{where}: a time limit needs final_observation"
                goes_on = ~step.first
                assert (step.final_observation[goes_on] == step.observation[goes_on]).all(), (
                    f"{where}: final_observation must repeat the observation of rows that did not end"
                )
        previous = step
    assert terminations + time_limits, f"no episode ended in {len(steps)} steps: raise num_steps or give make_actions"
    return Report(terminations, time_limits, tuple(steps))


def check_shapes(env: Environment, step: TimeStep) -> None:
    """Checks shapes, types and devices of one step."""
    spec, B = env.spec, env.num_envs
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "observation": ((B, *spec.observation_shape), spec.observation_dtype),
        "reward": ((B,), torch.float32),
        "discount": ((B,), torch.float32),
        "first": ((B,), torch.bool),
        "last": ((B,), torch.bool),
    }
    if spec.context_size:
        expected["context"] = ((B, spec.context_size), torch.float32)
    else:
        assert step.context is None, "a spec with context_size 0 promises that context is None"
    if step.final_observation is not None:
        expected["final_observation"] = expected["observation"]
    if step.raw_reward is not None:
        expected["raw_reward"] = expected["reward"]
    for name, (shape, dtype) in expected.items():
        value = getattr(step, name)
        assert isinstance(value, Tensor), f"{name} must be a tensor, got {type(value).__name__}"
        found = (tuple(value.shape), value.dtype, value.device)
        assert found == (shape, dtype, env.device), f"{name} is {found}, expected {(shape, dtype, env.device)}"
        assert not value.requires_grad, f"{name} requires a gradient"
        assert value.isfinite().all(), f"{name} is not finite"


def check_reset_in_the_middle(env: Environment, actions: Sequence[Tensor]) -> None:
    """Checks that `reset` starts B new episodes wherever it is called, and the shapes on the way."""
    for num_steps in (0, 1, 3):
        steps = rollout(env, actions[:num_steps])
        for step in steps:
            check_shapes(env, step)
        assert steps[0].first.all() and not steps[0].last.any(), "reset() in the middle must start every row"
    for action in actions:  # shapes hold on an episode's end, and behind it, too
        step = env.step(action)
        check_shapes(env, step)
        if _ends(step):
            check_shapes(env, env.step(action))
            break


def check_errors(env: Environment) -> None:
    """Checks that a wrong action raises a ValueError which names what was found and what is allowed."""
    env.reset()
    num_actions = env.spec.num_actions
    good = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
    for wrong in (-1, num_actions, num_actions + 7):
        bad = good.clone()
        bad[-1] = wrong
        with pytest.raises(ValueError) as error:
            for _ in range(100):  # on an accelerator the error may come a few steps late
                env.step(bad)
                if env.device.type == "cpu":
                    break
        message = str(error.value)
        assert str(wrong) in message, f"the error must name the action {wrong}: {message!r}"
        bounds = (str(num_actions - 1), str(num_actions))
        assert any(bound in message.replace(str(wrong), "", 1) for bound in bounds), (
            f"the error must name the allowed range, 0 to {num_actions - 1}: {message!r}"
        )
        if env.device.type != "cpu":
            return  # the first error leaves the environment void
    with pytest.raises(ValueError, match="shape"):
        env.step(good[:, None])
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.cat((good, good)))


def check_seeds(
    make_env: MakeEnv, num_envs: int, actions: Sequence[Tensor], steps: Sequence[TimeStep], varies_with_seed: bool
) -> None:
    """Checks that the seed decides the stream: `steps` were made with seed 1."""
    with _closing(make_env(num_envs=num_envs, seed=1)) as env:
        assert_same_steps(rollout(env, actions), steps, "the same seed must give the same stream")
    if varies_with_seed:
        with _closing(make_env(num_envs=num_envs, seed=2)) as env:
            other = rollout(env, actions)
        assert not all(_equal(a, b) for a, b in zip(other, steps, strict=True)), "another seed gave the same stream"


def check_saved_state(make_env: MakeEnv, num_envs: int, actions: Sequence[Tensor], steps: Sequence[TimeStep]) -> None:
    """Checks that a saved state continues bit for bit, in the same and in a fresh environment of another seed."""
    with _closing(make_env(num_envs=num_envs, seed=1)) as env, _closing(make_env(num_envs=num_envs, seed=3)) as fresh:
        if not env.resumable:
            env.reset()
            with pytest.raises(RuntimeError):
                env.state_dict()
            return
        # Right after reset, in the middle, and on both sides of the first end of an episode.
        ends = [t for t, step in enumerate(steps) if t > 0 and _ends(step)]
        cuts = sorted({0, 1, len(actions) // 2, ends[0], min(ends[0] + 1, len(actions))})
        states: dict[int, dict[str, Any]] = {}
        env.reset()
        for t in range(len(actions) + 1):
            if t in cuts:
                states[t] = env.state_dict()
            if t < len(actions):
                env.step(actions[t])
        for other in (env, fresh):
            for t in reversed(cuts):  # the last to be loaded was saved first: stepping on must not have changed it
                other.load_state_dict(states[t])
                continued = rollout(other, actions[t:], reset=False)
                assert_same_steps(continued, steps[t + 1 :], f"a state saved after step {t} did not continue")
        if ends[0] < len(actions) and (rows := steps[ends[0]].last).any():
            env.load_state_dict(states[ends[0]])
            changed = torch.where(rows, (actions[ends[0]] + 1) % env.spec.num_actions, actions[ends[0]])
            ignored = torch.equal(env.step(changed).observation[rows], steps[ends[0] + 1].observation[rows])
            assert ignored, "the action of a row that was LAST must be ignored"


def assert_same_steps(found: Sequence[TimeStep], expected: Sequence[TimeStep], message: str) -> None:
    """Raises AssertionError, naming step and field, unless both runs are equal bit for bit."""
    assert len(found) == len(expected), f"{message}: {len(found)} steps, expected {len(expected)}"
    for t, (a, b) in enumerate(zip(found, expected, strict=True)):
        differing = [
            field.name for field in fields(TimeStep) if not _same(getattr(a, field.name), getattr(b, field.name))
        ]
        assert not differing, f"{message}: {', '.join(differing)} differ {t} steps on"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _equal(a: TimeStep, b: TimeStep) -> bool:
    return all(_same(getattr(a, field.name), getattr(b, field.name)) for field in fields(TimeStep))


def _ends(step: TimeStep) -> bool:
    return bool(step.last.any() or step.first.any())


class _closing:
    """Closes an environment on leaving, twice: the contract allows it."""

    def __init__(self, env: Environment):
        self.env = env

    def __enter__(self) -> Environment:
        return self.env

    def __exit__(self, *_: object) -> None:
        self.env.close()
        self.env.close()
