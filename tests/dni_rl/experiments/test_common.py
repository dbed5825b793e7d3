"""What experiments share: options from config fields, cells, spread, progress, due steps."""

import argparse
import io
import sys
from dataclasses import dataclass

import pytest

from dni_rl.experiments import common


@dataclass(frozen=True)
class Config:
    rate: float = 1.0
    bound: float | None = 2.0
    sizes: tuple[int, ...] = ()
    lambda_: float = 0.5
    wanted: bool = False
    hidden: str = ""


def test_every_field_is_an_option_and_what_is_not_given_stays_out():
    parser = argparse.ArgumentParser()
    common.add_settings(parser, Config, leave_out=("hidden",))

    def parse(*arguments):
        return common.as_settings(vars(parser.parse_args(arguments)))

    assert parse() == {}
    assert parse("--rate", "3", "--bound", "none", "--sizes", "1", "2", "--lambda", ".1", "--wanted") == {
        "rate": 3.0, "bound": None, "sizes": (1, 2), "lambda_": 0.1, "wanted": True,
    }  # fmt: skip
    assert parse("--bound", "4", "--sizes", "--no-wanted") == {"bound": 4.0, "sizes": (), "wanted": False}
    with pytest.raises(SystemExit):
        parse("--hidden", "x")


def test_cells_are_arm_and_window():
    assert common.parse_cell("dni_aux@12") == common.Cell("dni_aux", 12)
    assert common.grid(("a", "b"), (1, 2)) == ("a@1", "a@2", "b@1", "b@2")
    for text in ("dni", "@3", "dni@", "dni@0", "dni@-1", "dni@x"):
        with pytest.raises(ValueError, match="ARM@WINDOW"):
            common.parse_cell(text)


def test_spread_of_seeds():
    assert common.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "min": 1.0, "max": 3.0}
    assert common.spread([1.0])["std"] is None
    assert common.spread([1.0, None])["mean"] is None and common.spread([])["mean"] is None


def test_what_is_due_when_updates_take_several_steps():
    assert [step for step in range(3, 25, 3) if common.due(step - 3, step, 10, 100)] == [12, 21]
    assert common.due(99, 102, 1_000, 100)  # the end


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    for stream, wanted, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = common.Progress("run", 100, 20, wanted=wanted)
        progress.show(60, "a long note")
        progress.show(100, "end")
        progress.close()
        lines = stream.getvalue().split("\r")
        if shown:
            assert len(lines) == 3 and lines[1].startswith("run  60%") and lines[2].startswith("run 100%")
            assert len(lines[2].rstrip("\n")) == len(lines[1]) and lines[2].endswith(
                "\n"
            )  # nothing of the first is left
        else:
            assert lines == [""]


def test_members_take_settings_of_all_then_of_the_arm_then_of_the_user():
    def make_config(**settings):
        return settings

    found = common.members(
        make_config, ("a@2", "b@3"), (4, 5), {"x": 1, "y": 1, "z": 1}, {"b": {"y": 2, "z": 2}}, {"z": 3}
    )
    assert [member.name for member in found] == ["a-2-seed4", "b-3-seed4", "a-2-seed5", "b-3-seed5"]
    assert found[0].config == {"arm": "a", "window": 2, "seed": 4, "x": 1, "y": 1, "z": 3}
    assert found[3].config == {"arm": "b", "window": 3, "seed": 5, "x": 1, "y": 2, "z": 3}


CURVE = [
    {"step": 10, "seconds": 2.0, "error": 0.5},
    {"step": 20, "seconds": 6.0, "error": 0.25},
    {"step": 95, "seconds": 7.0, "error": 0.5},
    {"step": 100, "seconds": 8.0, "error": 0.125},
]


def test_a_level_is_reached_between_the_points_of_a_curve():
    assert common.reached(CURVE, "error", 0.75, "step") == 10
    assert common.reached(CURVE, "error", 0.375, "step") == 15 and common.reached(CURVE, "error", 0.375, "seconds") == 4
    assert common.reached(CURVE, "error", 0.25, "step") == 20
    assert common.reached(CURVE, "error", 0.125, "seconds") == 8
    assert common.reached(CURVE, "error", 0.1, "step") is None and common.reached([], "error", 0.1, "step") is None


def test_what_is_final_is_the_mean_over_the_last_tenth_of_the_steps():
    assert common.final(CURVE, "error") == 0.3125
    assert common.final(CURVE[:2], "error") == 0.25 and common.final(CURVE[:1], "error") == 0.5
