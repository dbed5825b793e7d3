"""The experiment on frozen agents, in small, and its command line."""

import json
import math
import sys

import pytest
import torch

import dni_rl
from scripts import critic_fit


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seeds", "0", "-1"], "--seeds: found [0, -1]; allowed integers from 0 to 2**32 - 1"),
        (["--report", "/proc/x/critics"], "--report: found /proc/x, which cannot be made or written"),
        (["--report", "."], "--report: found '.'; allowed a name for the page, without .md; add one to the folder"),
        (
            ["--report", "docs/results/log"],
            "--report: docs/results/log.md: found a page that this program did not make; ",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(monkeypatch, capsys, option, message):
    monkeypatch.setattr(sys, "argv", ["critic_fit.py", *option])
    monkeypatch.setattr(critic_fit, "experiment", lambda seed: pytest.fail("trained"))
    with pytest.raises(SystemExit) as ended:
        critic_fit.main()
    assert ended.value.code == 2 and f"critic_fit.py: {message}" in capsys.readouterr().err


def test_critics_are_taught_what_the_agent_would_teach_them(monkeypatch):
    """Every critic meets the same rollouts, and learns nothing from steps between two episodes, as in training."""
    for name, value in {"TRAINED_STEPS": 1024, "ROLLOUTS": 1, "REPORTED_UPDATES": (3, 6), "CORRIDOR": 4}.items():
        monkeypatch.setattr(critic_fit, name, value)
    monkeypatch.setattr(critic_fit, "POSITIONS", (1, 2))
    seen, backward = [], dni_rl.backward

    def watched(losses, *, alive, **others):
        seen.append(alive)
        assert not losses[~alive[:-1]].any()
        return backward(losses, alive=alive, **others)

    monkeypatch.setattr(dni_rl, "backward", watched)
    rows = critic_fit.experiment(3)
    assert len(rows) == 4 * 2 * 2
    seen = seen[-4 * 6 :]  # before these, the agent's own training
    for row in rows:
        assert -1.0 <= row["cosine"] <= 1.0 and math.isfinite(row["ratio"]), row
    for alive in seen:
        assert alive.shape == (critic_fit.WINDOW + 1, 2 * 64)
    assert any((~alive[:-1]).any() for alive in seen)
    assert all(torch.equal(a, b) for a, b in zip(seen[:6], seen[6:12], strict=True))


def test_what_was_written_by_hand_stays(monkeypatch, tmp_path):
    def experiment(seed):
        found = {"seed": seed, "cosine": 0.5, "ratio": 1.0}
        places = [(update, p) for update in critic_fit.REPORTED_UPDATES for p in critic_fit.POSITIONS]
        return [{"critic": "linear", "update": update, "position": p, **found} for update, p in places]

    report, page = tmp_path / "critics.v2", tmp_path / "critics.v2.md"  # a dot in the name is part of it
    monkeypatch.setattr(critic_fit, "experiment", experiment)
    monkeypatch.setattr(sys, "argv", ["critic_fit.py", "--report", str(report), "--seeds", "0"])
    critic_fit.main()
    made = page.read_text()
    assert made.startswith("# ") and len(json.loads((tmp_path / "critics.v2.json").read_text())) == 12
    page.write_text(f"{made}\n**Reading.** It works.\n\nMore.\n")
    for _ in range(2):
        critic_fit.main()
        assert page.read_text() == f"{made}\n**Reading.** It works.\n\nMore.\n"
