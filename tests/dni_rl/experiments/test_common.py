"""What experiments share: options from config fields, plans and runs of programs, cells, spread, progress, due steps."""

import argparse
import importlib
import io
import json
import pickle
import sys
from dataclasses import dataclass

import pytest

from dni_rl.experiments import common

PROGRAMS = ("alignment", "copy", "images", "ptb", "sequential_mnist", "timescales", "understanding")


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


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_plan_without_a_trace_and_their_runs_can_be_passed_to_processes(name, tmp_path, monkeypatch):
    program = importlib.import_module(f"dni_rl.experiments.{name}")
    monkeypatch.chdir(tmp_path)
    arms = ["--arms"] if name == "images" else []
    smoke, other = program.plan(arms), program.plan([*arms, "--seeds", "7", "8", "--preset", "paper"])
    assert {member.config.seed for member in smoke.matrix} == {0} and smoke.option.jobs is None
    assert {member.config.seed for member in other.matrix} == {7, 8} and other.option.preset == "paper"
    assert not list(tmp_path.iterdir())
    run = pickle.loads(pickle.dumps(program.run))
    assert getattr(run, "args", None) == getattr(program.run, "args", None)
    with pytest.raises(ValueError, match="found none, allowed one or more, each once"):
        program.plan([*arms, "--seeds"])


def test_the_user_comes_before_the_preset_in_a_plan_of_cells():
    @dataclass(frozen=True)
    class Run:
        arm: str
        window: int
        seed: int
        rate: float = 1.0
        size: int = 1

    presets = {"a": {"cells": ("x@1", "y@2"), "seeds": (0,), "jobs": 3, "rate": 2.0, "arms": {"y": {"size": 4}}}}
    presets["a"]["arms"]["y@3"] = {"rate": 7.0}
    presets["b"] = {"cells": ("x@1",), "seeds": (1,)}

    def plan(*arguments):
        more = {"most_bits": {"type": float}}
        return common.cells_plan(
            "name", "What it is.\nMore.", Run, presets, ["--preset", *arguments], more_options=more
        )

    asked = plan("a")
    assert [member.config for member in asked.matrix] == [Run("x", 1, 0, 2.0), Run("y", 2, 0, 2.0, 4)]
    assert (asked.jobs, asked.more, plan("b").jobs) == (3, {"most_bits": None}, 1)
    asked = plan("a", "--cells", "y@3", "--seeds", "5", "--size", "6", "--most-bits", "0.5", "--jobs", "2")
    assert [member.config for member in asked.matrix] == [Run("y", 3, 5, 7.0, 6)]
    assert [member.config for member in plan("a", "--cells", "y@3").matrix] == [Run("y", 3, 0, 7.0, 4)]
    assert (asked.option.jobs, asked.more) == (2, {"most_bits": 0.5})
    with pytest.raises(ValueError, match="cells: found y@3 y@3, allowed one or more, each once"):
        plan("a", "--cells", "y@3", "y@3")


class Count(common.Experiment):
    """Counts its steps."""

    def update(self):
        self.step += 1
        return {}

    def figures(self):
        return {"double": 2 * self.step}

    def note(self):
        return ""

    def result(self):
        return {"steps": self.step}

    def parts(self):
        return {"nothing": None}


@dataclass(frozen=True)
class CountConfig:
    seed: int = 0
    size: int = 1
    num_steps: int = 4
    device: str = "cpu"
    log_every_steps: int = 2
    checkpoint_every_steps: int = 2
    eval_every_steps: int = 1


def test_a_run_is_resumed_with_more_steps_but_not_with_other_settings(tmp_path):
    def carry_out(free=common.FREE_FIELDS, resume=True, **settings):
        config = CountConfig(**settings)
        return common.carry_out(Count, config, tmp_path, free=free, resume=resume, tensorboard=False)

    assert carry_out(resume=False) == {"steps": 4}
    with pytest.raises(ValueError, match="continue it with --resume"):
        carry_out(resume=False)
    assert carry_out(num_steps=6, log_every_steps=1) == {"steps": 6}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "double": 2 * step} for step in (2, 4, 5, 6)]
    with pytest.raises(ValueError, match="other settings \\(eval_every_steps 1 -> 2, size 1 -> 2\\)"):
        carry_out(size=2, eval_every_steps=2)
    free = (*common.FREE_FIELDS, "eval_every_steps")
    assert carry_out(free, num_steps=8, eval_every_steps=2) == {"steps": 8}


def test_a_program_writes_its_summary_and_where_it_draws_a_table(tmp_path, capsys):
    def plan(arguments):
        option, given = common.parse(common.matrix_parser("name", None, ("smoke",)), arguments, CountConfig)
        option.figures = True
        return common.Plan(option, [common.Member("one", common.Cell("x", 1), CountConfig(**given))], 1, {"unit": "m"})

    def run(config, folder, **_):
        if config.size == 0:
            raise KeyboardInterrupt
        return {"size": config.size}

    def summarize(matrix, results, unit):
        return {"sizes": {member.config.size: results[member.name]["size"] for member in matrix}, "unit": unit}

    def main(folder, *arguments, draw=None):
        common.main(
            "name",
            plan,
            run,
            summarize,
            lambda found: f"in {found['unit']}",
            ["--run-folder", str(folder), *arguments],
            draw=draw,
        )
        return capsys.readouterr().out

    assert main(tmp_path / "a", "--size", "3") == "in m\n"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["summary.json"]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["preset"] == "smoke" and summary["sizes"] == {"3": 3} and summary["configs"]["one"]["size"] == 3
    drawn = []
    main(tmp_path / "b", "--size", "3", draw=lambda *found: drawn.append(found))
    assert drawn == [(summary, tmp_path / "b")] and (tmp_path / "b" / "table.md").read_text() == "in m\n"
    for arguments, code, error in (
        (("--jobs", "0"), 2, "name: jobs: found 0, allowed 1 or more\n"),
        (("--size", "0"), 130, "\nname: stopped; continue with --resume\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(tmp_path / "c", *arguments)
        assert stopped.value.code == code and capsys.readouterr().err == error
