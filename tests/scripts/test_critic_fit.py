"""The command line of the experiment on critics; the experiment itself takes hours."""

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
