import os
import random
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch

from agents.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state

STATE = {
    "model": OrderedDict(weight=torch.arange(6.0).reshape(2, 3)),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99), "foreach": None}]},
    "config": {"run": {"name": "a", "seed": 1, "scale": 0.5, "progress": True}},
    "half": torch.ones(2, dtype=torch.bfloat16),
}


def test_a_checkpoint_is_read_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "run", STATE, step=7)
    for source in (tmp_path / "new" / "run", path):
        state = load_checkpoint(source)
        assert state.pop("step") == 7
        assert state.keys() == STATE.keys()
        torch.testing.assert_close(state["model"]["weight"], STATE["model"]["weight"], rtol=0, atol=0)
        assert state["optimizer"] == STATE["optimizer"]
        assert state["config"] == STATE["config"]
        assert state["half"].dtype == torch.bfloat16
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_an_optimizer_continues_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    def train(module, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    def make():
        module = torch.nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters())

    torch.manual_seed(0)
    module, optimizer = make()
    train(module, optimizer, 3)
    save_checkpoint(
        tmp_path, {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}, step=3
    )
    train(module, optimizer, 3)

    other, other_optimizer = make()
    state = load_checkpoint(tmp_path)
    other.load_state_dict(state["module"])
    other_optimizer.load_state_dict(state["optimizer"])
    set_rng_state(state["rng"])
    train(other, other_optimizer, 3)
    assert torch.equal(module.weight, other.weight)


def test_random_generators_continue_from_a_checkpoint(tmp_path):
    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    draw()  # leaves a cached Gaussian behind in NumPy and in Python, which must survive as well
    save_checkpoint(tmp_path, {"rng": rng_state()}, step=0)
    expected = draw()
    draw()
    set_rng_state(load_checkpoint(tmp_path)["rng"])
    assert draw() == expected


def test_the_one_before_is_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"x": step}, step=step)
    assert load_checkpoint(tmp_path) == {"x": 3, "step": 3}
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt") == {"x": 2, "step": 2}
    assert len(os.listdir(tmp_path)) == 2


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _truncate_header(path):
    path.write_bytes(path.read_bytes()[:30])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path):
    path.write_bytes(b"")


def _replace_by_a_foreign_file(path):
    torch.save({"x": 1}, path)


def _unlink(path):
    path.unlink()


DAMAGES = [
    (_truncate, "truncated or altered, the checksum does not match"),
    (_truncate_header, "truncated or altered, the checksum does not match"),
    (_flip_a_bit, "truncated or altered, the checksum does not match"),
    (_empty, "empty"),
    (_replace_by_a_foreign_file, "not a checkpoint of this program"),
    (_unlink, "No such file or directory"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_a_damaged_checkpoint_falls_back_on_the_previous_one_with_a_warning(tmp_path, caplog, damage, problem):
    save_checkpoint(tmp_path, {"x": "old"}, step=1)
    path = save_checkpoint(tmp_path, {"x": "new"}, step=2)
    damage(path)
    assert load_checkpoint(tmp_path) == {"x": "old", "step": 1}
    assert caplog.messages == [f"{path}: {problem}; continuing from the previous checkpoint, step 1"]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_without_a_usable_checkpoint_the_error_tells_what_is_wrong(tmp_path, damage, problem):
    path = save_checkpoint(tmp_path, {"x": 1}, step=1)
    damage(path)
    previous = tmp_path / "checkpoint.previous.pt"
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path)
    assert str(error.value) == (
        f"no usable checkpoint: {path}: {problem}; {previous}: No such file or directory; "
        "start anew, or from another folder"
    )
    for is_there, way_out in (
        (False, "give the folder of a run, or another checkpoint"),
        (True, "give the folder to fall back on the previous one"),
    ):
        if is_there:
            previous.touch()
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert str(error.value) == f"no usable checkpoint: {path}: {problem}; {way_out}"


@pytest.mark.parametrize("missing", ["run", "run/checkpoint.pt", "run/checkpoint.previous.pt"])
def test_of_a_folder_that_is_not_there_no_previous_checkpoint_is_offered(tmp_path, missing):
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / missing)
    assert str(error.value) == (
        f"no usable checkpoint: {tmp_path / missing}: No such file or directory; give the folder of a run, or another checkpoint"
    )


def test_the_previous_checkpoint_does_not_fall_back_on_itself(tmp_path):
    previous = tmp_path / "checkpoint.previous.pt"
    previous.touch()
    with pytest.raises(ValueError, match="give the folder of a run, or another checkpoint"):
        load_checkpoint(previous)


def test_a_damaged_checkpoint_does_not_push_out_the_last_good_one(tmp_path):
    save_checkpoint(tmp_path, {"x": "good"}, step=1)
    _truncate(save_checkpoint(tmp_path, {"x": "damaged"}, step=2))
    save_checkpoint(tmp_path, {"x": "new"}, step=3)
    assert load_checkpoint(tmp_path)["x"] == "new"
    assert load_checkpoint(tmp_path / "checkpoint.previous.pt")["x"] == "good"


@pytest.mark.parametrize("dies_in", ["fsync", "replace"])
def test_a_save_that_dies_midway_leaves_a_usable_checkpoint(tmp_path, monkeypatch, caplog, dies_in):
    def die(*_):
        raise OSError("no space left on device")

    save_checkpoint(tmp_path, {"x": "old"}, step=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, dies_in, die)
        save_checkpoint(tmp_path, {"x": "new"}, step=2)
    assert dies_in != "fsync" or os.listdir(tmp_path) == ["checkpoint.pt"]  # a full disk is not filled further
    assert load_checkpoint(tmp_path)["x"] == "old"
    save_checkpoint(tmp_path, {"x": "newer"}, step=3)  # what the dead one left behind is in nobody's way
    assert load_checkpoint(tmp_path)["x"] == "newer"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert not caplog.messages


def test_dying_between_the_two_renames_leaves_the_previous_checkpoint(tmp_path, monkeypatch, caplog):
    replace, calls = os.replace, []

    def die_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("killed")
        replace(source, target)

    save_checkpoint(tmp_path, {"x": "old"}, step=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(os, "replace", die_at_the_second)
        save_checkpoint(tmp_path, {"x": "new"}, step=2)
    assert load_checkpoint(tmp_path)["x"] == "old"
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.zeros(2), "numpy.ndarray"),
        (np.float64(1.0), "numpy.float64"),
        ({1, 2}, "builtins.set"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path, value, found):
    with pytest.raises(ValueError, match=rf"^state\['a'\]\[1\]: found {re.escape(found)}; allowed tensors, numbers"):
        save_checkpoint(tmp_path / "run", {"a": [0, value]}, step=1)
    assert not (tmp_path / "run").exists()


def test_keys_other_than_strings_and_integers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^state\['a'\]: found a key of type float; allowed str and int"):
        save_checkpoint(tmp_path, {"a": {0.5: 1}}, step=1)


def test_a_second_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^state\['step'\]: found 3; expected the step of this checkpoint, 4"):
        save_checkpoint(tmp_path, {"step": 3}, step=4)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.checkpoint._check_storable", lambda *_: None)
    path = save_checkpoint(tmp_path, {"x": torch.nn.Linear(1, 1)}, step=1)
    with pytest.raises(
        ValueError, match=rf"^no usable checkpoint: {re.escape(str(path))}: PyTorch .* cannot read it \(.*\); give"
    ):
        load_checkpoint(path)
