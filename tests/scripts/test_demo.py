"""The demo's command line; its training is that of `make train`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def demo(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_help_trains_nothing(tmp_path):
    done = demo("--help", cwd=tmp_path)
    assert done.returncode == 0 and "two agents" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--run.output_dir", "--critic.kind", "--resume"])
def test_options_that_it_sets_itself_are_refused(option, tmp_path):
    done = demo(option, "x", cwd=tmp_path)
    assert done.returncode == 2 and f"{option}: set by this script" in done.stderr and not list(tmp_path.iterdir())


def test_it_trains_both_and_shows_a_table(tmp_path):
    # no episode ends between the two rows of metrics
    options = ["--run.total_steps", "2560", "--run.log_every_steps", "2048", "--run.progress", "false"]
    done = demo(*options, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # so few steps do not reach the bar
    assert "decoupled (critic with context)" in done.stdout and "never" in done.stdout and "nan" not in done.stdout
    assert {folder.name for folder in (tmp_path / "runs" / "demo").iterdir()} == {"cdni", "none"}
