"""The command line of the experiment on critics; the experiment itself takes hours."""

import json
import sys

import pytest

from scripts import critic_fit


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seeds", "0", "-1"], "--seeds: found [0, -1]; allowed integers from 0 to 2**32 - 1"),
        (["--report", "/proc/x/critics"], "--report: found /proc/x, which cannot be made or written"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(monkeypatch, capsys, option, message):
    monkeypatch.setattr(sys, "argv", ["critic_fit.py", *option])
    monkeypatch.setattr(critic_fit, "experiment", lambda seed: pytest.fail("trained"))
    with pytest.raises(SystemExit) as ended:
        critic_fit.main()
    assert ended.value.code == 2 and f"critic_fit.py: {message}" in capsys.readouterr().err


def test_the_report_is_written_as_whole_files(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(sys, "argv", ["critic_fit.py", "--seeds", "3", "4", "--report", str(tmp_path / "fit")])
    monkeypatch.setattr(critic_fit, "experiment", lambda seed: [{"seed": seed}])
    monkeypatch.setattr(critic_fit, "markdown", lambda rows, seeds: f"{len(rows)} of {seeds}\n")
    critic_fit.main()
    assert (tmp_path / "fit.md").read_text() == "2 of [3, 4]\n"
    assert json.loads((tmp_path / "fit.json").read_text()) == [{"seed": 3}, {"seed": 4}]
    assert on_disk == ["fit.md", "fit.json"]
