"""The command without bsuite itself, whose part is in tests/envs/test_third_party.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import bsuite_score


@pytest.fixture
def score(monkeypatch, tmp_path, capsys):
    """Runs the command with agents that need no training; returns exit code, stdout, stderr and what was trained."""
    trained = {}
    monkeypatch.setattr(bsuite_score, "bsuite_scores", lambda folder: {"memory_len": (0.5, ["memory_len/1"])})

    def run(*arguments, save=lambda folder: folder / "x.csv", results=tmp_path):
        def train_and_record(config, bsuite_id):
            trained[bsuite_id] = config
            return SimpleNamespace(episodes=10, rows=[{"steps": 20}], save=save)

        monkeypatch.setattr(bsuite_score, "train_and_record", train_and_record)
        try:
            code = bsuite_score.main([*arguments, "--results", str(results)])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err, trained

    return run


def test_ids_may_stand_before_between_and_behind_the_options(score):
    options = [
        "--critic.kind",
        "none",
        "memory_len/2",
        "--run.seed=3",
        "--config",
        "configs/tmaze.yaml",
        "memory_len/3",
    ]
    code, out, err, trained = score("memory_len/1", *options)
    assert (code, err) == (0, "")
    assert list(trained) == ["memory_len/1", "memory_len/2", "memory_len/3"]
    for bsuite_id, config in trained.items():
        assert (config.env.id, config.critic.kind, config.run.seed) == (f"bsuite/{bsuite_id}", "none", 3)
    assert "| memory_len | 0.500 | memory_len/1 |" in out


@pytest.mark.parametrize("ids", [[], ["memory_len/1"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "runs/x"], "--resume: found 'runs/x'; allowed new agents only"),
        (["--resume=runs/x"], "--resume: found 'runs/x'; allowed new agents only"),
        (["--critic.knd", "none"], "--critic.knd: found an unknown option; did you mean --critic.kind?"),
        (["--critic.kind", "dnl"], "critic.kind: found 'dnl'; allowed none, "),
        (["--run.seed", "--config"], "--run.seed: found no value; allowed --run.seed VALUE"),
        (["--reslts", "x"], "unrecognized arguments: --reslts"),
    ],
)
def test_bad_options_end_in_one_line_before_anything_is_trained(score, ids, options, message):
    code, out, err, trained = score(*ids, *options)
    assert (code, out, trained) == (2, "", {})
    assert err.split(": ", 1)[1].startswith(message)
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(score):
    for folder, reason in ((Path(__file__), "File exists"), (Path("/proc/x"), "No such file or directory")):
        code, out, err, trained = score("memory_len/1", results=folder)
        assert (code, out, trained) == (2, "", {})
        assert err == (
            f"bsuite_score.py: --results: found {folder}, which cannot be made or written ({reason}); allowed a folder that can; "
            "--help lists the options\n"
        )


def test_a_record_that_cannot_be_saved_is_one_line_and_the_others_are_trained(score):
    def save(folder):
        raise OSError(28, "No space left on device")

    code, out, err, trained = score("memory_len/1", "memory_len/2", save=save)
    assert (code, list(trained)) == (1, ["memory_len/1", "memory_len/2"])
    assert err.splitlines() == ["bsuite_score.py: [Errno 28] No space left on device"] * 2
    assert "| memory_len |" in out


def test_ctrl_c_shows_the_scores_of_what_is_there(score):
    def save(folder):
        raise KeyboardInterrupt

    code, out, err, trained = score("memory_len/1", "memory_len/2", save=save)
    assert (code, list(trained)) == (130, ["memory_len/1"])
    assert err == "bsuite_score.py: interrupted; memory_len/1 has no record, and is begun anew next time\n"
    assert "| memory_len | 0.500 |" in out
