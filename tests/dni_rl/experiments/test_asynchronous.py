"""The asynchronous experiment: its runs, in one process and in several, started by itself and by torchrun."""

import json
import os
import subprocess
import sys

import pytest

from dni_rl import data
from dni_rl.experiments import asynchronous, images

pytestmark = pytest.mark.timeout(60)
SMALL = ["--num-steps", "12", "--no-unlocked"]


def results(folder):
    return json.loads((folder / asynchronous.RESULTS_FILE).read_text())["runs"]


def test_the_smoke_preset_learns_in_processes_and_resumes(tmp_path, capsys):
    asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path)])
    table = capsys.readouterr().out
    found = results(tmp_path)
    assert list(found) == [
        "backprop, 1 process",
        "cdni, 1 process, p = 0.5",
        "cdni, 1 process, unlocked",
        "backprop, 3 processes",
        "cdni, 3 processes, staleness up to 0",
        "cdni, 3 processes, staleness up to 2",
    ]
    assert all(name in table for name in found) and table == (tmp_path / asynchronous.TABLE_FILE).read_text()
    # The same numbers in one process and in three, up to what summing in another order makes of them.
    one, three = found["backprop, 1 process"], found["backprop, 3 processes"]
    assert three["train_loss_at_the_end"] == pytest.approx(one["train_loss_at_the_end"], rel=1e-3)
    for bound in (0, 2):
        late = found[f"cdni, 3 processes, staleness up to {bound}"]
        assert late["test_error"] < 0.6  # chance is 0.9
        assert max(late["highest_staleness"]) <= bound and late["updates_per_sec"] > 0
        assert [sum(counts.values()) for counts in late["staleness_counts"]] == [100, 100]
    with pytest.raises(SystemExit):
        asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path)])
    assert "continue with --resume" in capsys.readouterr().err
    asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path), "--resume"])
    assert capsys.readouterr().out == table  # nothing was done again
    with pytest.raises(SystemExit):
        asynchronous.main(["--preset", "smoke", "--run-folder", str(tmp_path), "--resume", "--seed", "1"])
    assert "other settings (seed)" in capsys.readouterr().err


def torchrun(processes, *arguments):
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.run(
        [
            sys.executable,
            *command,
            "--nproc-per-node",
            str(processes),
            "-m",
            "dni_rl.experiments.asynchronous",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_torchrun_starts_the_runs_with_processes(tmp_path):
    done = torchrun(3, *SMALL, "--run-folder", str(tmp_path), "--staleness-bounds", "1")
    assert done.returncode == 0, done.stderr
    assert list(results(tmp_path)) == ["backprop, 3 processes", "cdni, 3 processes, staleness up to 1"]
    assert "staleness up to 1" in done.stdout


def test_torchrun_with_a_wrong_number_of_processes_ends_with_one_line(tmp_path):
    done = torchrun(2, *SMALL, "--run-folder", str(tmp_path))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("asynchronous:")]
    assert lines and all("net: found 3 layers and 2 processes" in line for line in lines)


def test_presets_state_the_papers_settings():
    paper = asynchronous.make_config("paper", arm="dni")
    assert (paper.num_layers, paper.hidden_size, paper.batch_size, paper.num_steps) == (4, 256, 256, 500_000)
    assert paper.critic_hidden_sizes == (1024, 1024) and {0.2, 0.05} <= set(paper.update_probabilities)
    assert asynchronous.make_config("laptop").staleness_bounds == (0, 1, 2, 4, 8)
    assert paper.net("backprop") == images.make_config("paper", arm="backprop", critic_hidden_sizes=(1024, 1024))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "none"], "arm: found 'none', allowed dni, cdni"),
        (["--staleness-bounds", "-1"], "staleness_bounds: found (-1,)"),
        (["--update-probabilities", "0"], "update_probabilities: found (0.0,)"),
        (["--num-layers", "1"], "num_layers: found 1"),
        (["--threads", "0"], "threads: found (0,)"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        asynchronous.main([*arguments, "--run-folder", str(tmp_path)])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        asynchronous.main(["--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert capsys.readouterr().err.count("\n") == 1
