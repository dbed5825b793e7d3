"""Files that are written as a whole or not at all."""

import json
import os
import stat

import pytest
import torch

from agents.checkpoint import load_checkpoint
from agents.checkpoint import save_checkpoint as save_agent
from agents.metrics import MetricsWriter, read_metrics
from dni_rl.experiments.common import save_checkpoint
from dni_rl.files import replace_file, write_text


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, on_disk):
    write_text(tmp_path / "text", "naïve")
    assert (tmp_path / "text").read_bytes() == "naïve".encode()
    save_checkpoint(tmp_path / "experiment.pt", {"x": torch.ones(2)})
    assert torch.load(tmp_path / "experiment.pt", weights_only=True)["x"].tolist() == [1.0, 1.0]
    save_agent(tmp_path, {"x": 1}, step=1)
    save_agent(tmp_path, {"x": 2}, step=2)
    assert load_checkpoint(tmp_path)["x"] == 2
    with MetricsWriter(tmp_path, total_steps=2, tensorboard=False, progress=False) as writer:
        writer.write(1, {"loss": float("nan")})
        writer.write(2, {"loss": 1.0})
    MetricsWriter(tmp_path, total_steps=2, resume_step=1, tensorboard=False, progress=False).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    names = ["text", "experiment.pt", "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.pt", "metrics.jsonl"]
    assert on_disk == names


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_whoever_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch, failing):
    def die(*_):
        raise OSError("no space left on device")

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": "old"})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, failing, die)
        save_checkpoint(path, {"x": "new"})
    assert torch.load(path, weights_only=True) == {"x": "old"}
    assert failing != "fsync" or os.listdir(tmp_path) == ["checkpoint.pt"]  # a full disk is not filled further
    save_checkpoint(path, {"x": "newer"})
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_was_there_can_be_kept_under_another_name(tmp_path):
    path, former = tmp_path / "file", tmp_path / "former"
    replace_file(path, b"1", former=former)
    assert os.listdir(tmp_path) == ["file"]
    replace_file(path, b"2", memoryview(b"3"), former=former)
    assert (path.read_bytes(), former.read_bytes()) == (b"23", b"1")


def test_links_stay_links_and_pipes_are_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    file, link, pipe = tmp_path / "folder" / "file", tmp_path / "link", tmp_path / "pipe"
    file.write_text("old")
    link.symlink_to(file)
    write_text(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # which waits for no writer
    write_text(pipe, "text")
    assert os.read(reader, 99) == b"text" and stat.S_ISFIFO(os.stat(pipe).st_mode)
    os.close(reader)
