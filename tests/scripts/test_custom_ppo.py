import ast
import itertools
import re
from pathlib import Path

import pytest
import torch

import dni_rl
from scripts import custom_ppo
from scripts.custom_ppo import NUM_ENVS, ROLLOUT, WINDOW, at_ends, main, side_by_side, train

UPDATE = NUM_ENVS * ROLLOUT
T_MAZE = "dni_rl/PassiveTMaze-v0"


def test_it_knows_nothing_of_agents():
    tree = ast.parse(Path(custom_ppo.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(n, "module", None) for n in imports}
    assert not any(name and name.split(".")[0] == "agents" for name in names)


@pytest.mark.parametrize(("env_id", "critic"), [*itertools.product((T_MAZE,), ("none", "dni")), ("CartPole-v1", "dni")])
def test_it_runs(capsys, env_id, critic):
    assert main(["--env-id", env_id, "--critic", critic, "--steps", str(12 * UPDATE)]) == 0
    assert capsys.readouterr().out.startswith(f"{env_id}, critic {critic}, seed 0: mean return ")


def test_bad_options_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--steps", str(UPDATE - 1)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"custom_ppo.py: --steps: found {UPDATE - 1}; allowed an integer of at least {UPDATE}; leave it out for the default, 600000\n"
    )


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        (
            "FrozenLake-v1",
            r"--env-id: found FrozenLake-v1 with Discrete\(16\) and Discrete\(4\); allowed Box and Discrete",
        ),
        ("Pendulum-v1", "--env-id: found Pendulum-v1 with Box"),
        ("nope-v0", "Environment `nope` doesn't exist"),
    ],
)
def test_environments_that_it_cannot_take_end_in_one_line(capsys, env_id, message):
    with pytest.raises(SystemExit) as stop:
        main(["--env-id", env_id])
    assert stop.value.code == 2
    found = capsys.readouterr().err
    assert re.match(f"custom_ppo.py: {message}", found) and found.count("\n") == 1


def test_windows_are_laid_side_by_side_with_the_rows_behind_them():
    time, env = torch.arange(ROLLOUT + 1), torch.tensor([5, 1, 3])
    x = torch.stack([time, time], dim=-1)[:, None, :] + 1000 * torch.arange(NUM_ENVS)[None, :, None]  # [T + 1, B, 2]
    windows, ends = side_by_side(x, env), at_ends(x, env)
    assert windows.shape == (WINDOW, ROLLOUT // WINDOW * 3, 2) and ends.shape == (ROLLOUT // WINDOW * 3, 2)
    for w, m in itertools.product(range(ROLLOUT // WINDOW), range(3)):
        column = w * 3 + m
        assert windows[:, column, 0].tolist() == [1000 * int(env[m]) + w * WINDOW + k for k in range(WINDOW)]
        assert ends[column, 0] == 1000 * int(env[m]) + (w + 1) * WINDOW


def test_each_window_is_learned_from_the_state_in_which_it_was_acted(monkeypatch):
    """In the first minibatch, before anything was learned, the policy is that which acted, and the values are those of acting."""
    states, ratios, unrolled = [], [], []
    backward, clamp, unroll = dni_rl.backward, torch.Tensor.clamp, custom_ppo.Agent.unroll

    def record_states(losses, *, start, end, critic, alive, fit):
        states.append((end, start))
        return backward(losses, start=start, end=end, critic=critic, alive=alive, fit=fit)

    def record_ratio(x, *bounds, **options):
        if bounds == (1.0 - custom_ppo.CLIP, 1.0 + custom_ppo.CLIP):
            ratios.append(x.detach())
        return clamp(x, *bounds, **options)

    def record_outputs(agent, *inputs):
        logits, values, state = unroll(agent, *inputs)
        unrolled.append((logits.detach(), values.detach()))
        return logits, values, state

    monkeypatch.setattr(dni_rl, "backward", record_states)
    monkeypatch.setattr(torch.Tensor, "clamp", record_ratio)
    monkeypatch.setattr(custom_ppo.Agent, "unroll", record_outputs)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the first minibatch has the first environments
    train(T_MAZE, "dni", UPDATE, seed=0)
    end, start = states[0]
    M = NUM_ENVS // custom_ppo.MINIBATCHES
    for acted, learned in zip(zip(*unrolled[:ROLLOUT], strict=True), unrolled[ROLLOUT + 1], strict=True):
        torch.testing.assert_close(learned, side_by_side(torch.cat(acted), torch.arange(M)))
    torch.testing.assert_close(ratios[0], torch.ones(WINDOW, ROLLOUT // WINDOW * M))
    assert not torch.allclose(ratios[1], ratios[0]), "from the second one on something was learned"
    for s, e in zip(start, end, strict=True):  # a window ends where the next one starts
        torch.testing.assert_close(e.detach()[:-M], s.detach()[M:])
    assert len(states) == len(ratios) == custom_ppo.EPOCHS * custom_ppo.MINIBATCHES


def test_the_critic_learns_in_the_first_pass_alone_and_moves_the_agent(monkeypatch):
    fits, backward = [], dni_rl.backward
    monkeypatch.setattr(dni_rl, "backward", lambda *a, **k: fits.append(k["fit"]) or backward(*a, **k))
    (plain, _, _), (agent, critic, _) = (train(T_MAZE, kind, 3 * UPDATE, seed=0) for kind in ("none", "dni"))
    one_pass = [True] * custom_ppo.MINIBATCHES + [False] * (custom_ppo.EPOCHS - 1) * custom_ppo.MINIBATCHES
    assert fits == one_pass * 6
    assert int(critic.num_updates) == 3 * custom_ppo.MINIBATCHES
    assert not torch.equal(agent.core.rnn.weight_hh_l0, plain.core.rnn.weight_hh_l0)
