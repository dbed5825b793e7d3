import ast
from pathlib import Path

import pytest
import torch

import envs
from scripts import custom_agent
from scripts.custom_agent import NUM_ENVS, WINDOW, main, train

SOURCE = Path(custom_agent.__file__).read_text(encoding="utf-8")
UPDATE = NUM_ENVS * WINDOW


def test_it_knows_nothing_of_agents_and_marks_the_three_lines():
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", None) for node in imports
    }
    assert not any(name and name.split(".")[0] == "agents" for name in names)
    assert [SOURCE.count(f"# changed line {n} of 3") for n in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize("critic", ["none", "dni"])
def test_it_runs(capsys, critic):
    assert main(["--critic", critic, "--steps", str(12 * UPDATE)]) == 0
    assert capsys.readouterr().out.startswith(f"critic {critic}, seed 0: ")


def test_where_no_episode_has_ended_there_is_no_success_to_claim(capsys):
    assert main(["--steps", str(UPDATE)]) == 0
    assert "seed 0: nan % success" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--steps", str(UPDATE - 1)],
            f"--steps: found {UPDATE - 1}; allowed an integer of at least {UPDATE}; leave it out",
        ),
        (["--seed", "-1"], "--seed: found -1; allowed an integer of at least 0; leave it out for the default, 0"),
    ],
)
def test_bad_options_end_in_one_line(capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        main(option)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"custom_agent.py: {message}")
    assert err.count("\n") == 1


def test_runs_of_neighbouring_seeds_share_no_stream(monkeypatch):
    """Of environments, model and actions."""
    make, seeds = envs.make, []
    manual_seed = torch.manual_seed
    monkeypatch.setattr(envs, "make", lambda *a, **k: seeds.append(k["seed"]) or make(*a, **k))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    for seed in range(3):
        train("none", UPDATE, seed)
    assert len(seeds) == len(set(seeds)) == 9


def _weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_both_sides_move_and_the_critic_moves_the_agent_from_the_second_update_on():
    runs = {(kind, n): train(kind, n * UPDATE, seed=0) for kind in ("none", "dni") for n in (1, 4)}
    agents = {key: _weights(agent) for key, (agent, _, _) in runs.items()}
    for kind in ("none", "dni"):
        assert runs[kind, 1][1] is None or kind == "dni"
        assert all(not torch.equal(agents[kind, 1][name], agents[kind, 4][name]) for name in agents[kind, 1])
    one, four = (_weights(runs["dni", n][1]) for n in (1, 4))
    assert all(not torch.equal(one[name], four[name]) for name in one)
    # The first synthetic gradient is zero; later ones reach the core.
    assert all(torch.equal(agents["none", 1][name], agents["dni", 1][name]) for name in agents["none", 1])
    assert not torch.equal(agents["none", 4]["core.rnn.weight_hh_l0"], agents["dni", 4]["core.rnn.weight_hh_l0"])
