"""What experiments share: options from config fields, plans and runs of programs, cells, spread, progress, due steps."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

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


def test_what_diverged_is_none_and_said_to_be():
    for values in ([1.0, None], [1.0, math.nan], [math.inf, -math.inf], [1e308, 1e308], []):
        assert common.mean(values) is None
        assert common.spread(values) == dict.fromkeys(("mean", "std", "min", "max"))
    assert common.mean([1.0, 2.0]) == 1.5 and common.spread([-1.7e308, 1.7e308])["std"] is None
    assert [common.shown(value, 1, 100.0) for value in (0.5, None, math.inf)] == ["50.0", "diverged", "diverged"]
    found = common.finite({"a": [1.0, math.nan, {"b": (-math.inf, 2)}], "c": "x", "d": None, "e": True})
    assert found == {"a": [1.0, None, {"b": [None, 2]}], "c": "x", "d": None, "e": True}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "| 5e+30 | 12345.5 |" in common.markdown(("a", "b"), [(5e30, 12345.5)])


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    common.check_device("cpu")
    for name in ("cuda", "gpu", "cuda:0", "meta"):
        with pytest.raises(
            ValueError, match=f"device: found '{name}', which this machine lacks; allowed cpu; use --device"
        ):
            common.check_device(name)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        common.check_device(name)
    with pytest.raises(
        ValueError, match="found 'cuda:2', which this machine lacks; allowed cpu, cuda, cuda:0, cuda:1;"
    ):
        common.check_device("cuda:2")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_refuses_a_device_that_is_not_there_in_one_line(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    arguments = ["--device", "cuda:7", "--run-folder", str(tmp_path / "run"), "--no-tensorboard"]
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"dni_rl.experiments.{program}").main(arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.count("\n") == 1
    assert shown.startswith(f"{program}: device: found 'cuda:7', which this machine lacks; allowed cpu")
    assert not (tmp_path / "run").exists()


def test_learning_rates_are_divided_by_10_at_each_drop():
    optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], 9.0) for _ in range(2)]
    for step, factor in ((0, 1.0), (2, 1.0), (3, 0.1), (5, 0.01), (9, 0.01)):
        common.set_learning_rates(optimizers, (1.0, 0.5), (3, 5), step)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([factor, 0.5 * factor])


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


@pytest.mark.parametrize(
    ("setting", "value", "allowed", "num_programs"),
    [
        ("critic_hidden_sizes", (4, 0), "found 4 0, allowed positive sizes, or nothing for linear", 6),
        ("critic_scale", -1.0, "found -1.0, allowed 0 or more", 4),
        ("warmup_updates", -1, "found -1, allowed 0 or more", 4),
        ("auxiliary_cost", math.nan, "found nan, allowed 0 or more", 2),
        ("gradient_discount", 1.5, "found 1.5, allowed 0 to 1", 3),
        ("max_norm_ratio", 0.0, "found 0.0, allowed above 0, or none for no bound", 2),
    ],
)
def test_settings_of_critics_are_refused_before_any_run_also_by_arms_without_one(setting, value, allowed, num_programs):
    # of backpropagation, where there is such an arm
    first = [plan_of(program).matrix[0].config for program in PROGRAMS]
    having = [config for config in first if hasattr(config, setting)]
    assert len(having) == num_programs
    for config in having:
        with pytest.raises(ValueError, match=f"{setting}: {allowed}"):
            dataclasses.replace(config, **{setting: value})


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_seeds_out_of_range_are_refused_by_name(program, seed):
    with pytest.raises(ValueError, match=rf"seeds: found {seed}, allowed 0 to 2\*\*32 - 1"):
        plan_of(program, "--seeds", "0", seed)


def plan_of(program, *options):
    """What a program would do, of images a matrix."""
    arms = ["--arms"] if program == "images" else []
    return importlib.import_module(f"dni_rl.experiments.{program}").plan([*arms, *options])


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
    for gone in (None, math.nan, math.inf):
        points = [CURVE[0], {**CURVE[1], "error": gone}, *CURVE[2:]]
        assert (
            common.reached(points, "error", 0.5, "step") == 10
            and common.reached(points, "error", 0.3125, "step") == 97.5
        )
        assert common.reached(points[1:2], "error", 0.5, "step") is None


def test_what_is_final_is_the_mean_over_the_last_tenth_of_the_steps():
    assert common.final(CURVE, "error") == 0.3125
    assert common.final(CURVE[:2], "error") == 0.25 and common.final(CURVE[:1], "error") == 0.5
    assert common.final([*CURVE, {**CURVE[-1], "error": math.inf}], "error") is None


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
    """Counts its steps, as many at a time as its size."""

    def update(self):
        self.step += self.config.size
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


def test_a_run_that_is_older_than_a_setting_had_its_default(tmp_path):
    def carry_out(num_steps, **settings):
        return common.carry_out(
            Count, CountConfig(num_steps=num_steps, **settings), tmp_path, resume=True, tensorboard=False
        )

    carry_out(4)
    state = torch.load(tmp_path / common.CHECKPOINT_FILE, weights_only=True)
    del state["config"]["size"]
    common.save_checkpoint(tmp_path / common.CHECKPOINT_FILE, state)
    with pytest.raises(ValueError, match="other settings \\(size 1 -> 2\\)"):
        carry_out(6, size=2)
    assert carry_out(6) == {"steps": 6}


@pytest.mark.parametrize("damage", ["empty", "cut short", "of something else"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    config = CountConfig(size=3, num_steps=6, checkpoint_every_steps=3)
    common.carry_out(Count, config, tmp_path, tensorboard=False)
    file = tmp_path / common.CHECKPOINT_FILE
    if damage == "of something else":
        torch.save([1, 2], file)
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else 100])
    (tmp_path / common.RESULT_FILE).unlink()
    with pytest.raises(ValueError, match="found no checkpoint that can be read; remove it to begin that run anew"):
        common.carry_out(Count, config, tmp_path, resume=True, tensorboard=False)


def test_a_run_is_not_resumed_as_a_shorter_one(tmp_path):
    def carry_out(num_steps, folder, resume=True):
        config = CountConfig(size=3, num_steps=num_steps, checkpoint_every_steps=6)
        return common.carry_out(Count, config, tmp_path / folder, resume=resume, tensorboard=False)

    assert carry_out(10, "a", resume=False) == {"steps": 12}  # the last update takes it beyond
    assert (
        carry_out(10, "a") == carry_out(11, "a") == carry_out(12, "a") == {"steps": 12}
    )  # runs of 11 and 12 end there, too
    for fewer in (9, 5):
        with pytest.raises(
            ValueError, match=rf"num_steps: found {fewer}, but the run in .*/a has come to step 12 of 10; allowed 10 or"
        ):
            carry_out(fewer, "a")
    assert carry_out(14, "a") == {"steps": 15}

    class Interrupted(Count):
        def update(self):
            if self.step == 9:
                raise KeyboardInterrupt
            return super().update()

    with pytest.raises(KeyboardInterrupt):
        config = CountConfig(size=3, num_steps=100, checkpoint_every_steps=6)
        common.carry_out(Interrupted, config, tmp_path / "b", tensorboard=False)
    with pytest.raises(
        ValueError,
        match=r"found 6, but the run in .*/b has come to step 6 of 100; allowed 7 or more, or choose another",
    ):
        carry_out(6, "b")
    assert carry_out(8, "b") == {"steps": 9}  # it has not come so far yet


def test_the_result_of_a_shorter_run_is_not_taken_for_that_of_a_longer_one(tmp_path):
    def carry_out(num_steps):
        return common.carry_out(Count, CountConfig(num_steps=num_steps), tmp_path, resume=True, tensorboard=False)

    carry_out(4)
    shorter = (tmp_path / "result.json").read_text()
    assert carry_out(8) == {"steps": 8}
    (tmp_path / "result.json").write_text(shorter)  # as if it had been cut off behind its last checkpoint
    assert carry_out(8) == {"steps": 8} and json.loads((tmp_path / "result.json").read_text()) == {"steps": 8}


@pytest.mark.parametrize("damaged", ['{"steps": ', "[]", "\xff"])
def test_a_damaged_result_is_made_again_from_the_checkpoint(damaged, tmp_path):
    def carry_out():
        return common.carry_out(Count, CountConfig(), tmp_path, resume=True, tensorboard=False)

    carry_out()
    (tmp_path / "result.json").write_bytes(damaged.encode("latin-1"))
    assert carry_out() == {"steps": 4} == json.loads((tmp_path / "result.json").read_text())


def test_a_run_that_diverges_has_a_result_without_the_numbers_that_it_lacks(tmp_path):
    class Diverging(Count):
        def figures(self):
            return {"loss": math.inf}

        def result(self):
            return {"steps": self.step, "error": math.nan, "curve": [{"step": 4, "error": -math.inf}]}

    for resume in (False, True):
        result = common.carry_out(Diverging, CountConfig(), tmp_path, resume=resume, tensorboard=False)
        assert result == {"steps": 4, "error": None, "curve": [{"step": 4, "error": None}]}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 2, "loss": None}, {"step": 4, "loss": None}]
    (tmp_path / "result.json").write_text('{"steps": 4, "error": NaN}')  # as they once were written
    assert common.carry_out(Diverging, CountConfig(), tmp_path, resume=True)["error"] is None


class Device:
    """Has been given work that nobody has waited for yet; time goes on while somebody does, and while there are evaluations."""

    def __init__(self, monkeypatch):
        self.now, self.given, self.waits = 0.0, 0.0, 0
        monkeypatch.setattr(common.time, "monotonic", lambda: self.now)
        monkeypatch.setattr("torch.accelerator.synchronize", self.wait)

    def wait(self, device):
        assert device == "cuda:1"
        self.now, self.given, self.waits = self.now + self.given, 0.0, self.waits + 1


def test_seconds_are_those_of_the_device_and_of_updates_alone(tmp_path, monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(common, "check_device", lambda _: None)

    class Worker(Count):
        def update(self):
            device.given += 2.0  # which takes no time yet
            return super().update()

        def evaluation(self):
            device.now += 100.0
            self.add_to_curve()
            return {}

        def result(self):
            return self.account()

    config = CountConfig(num_steps=6, device="cuda:1", log_every_steps=3, eval_every_steps=3, checkpoint_every_steps=6)
    result = common.carry_out(Worker, config, tmp_path, tensorboard=False)
    assert result["seconds"] == 12.0 and [point["seconds"] for point in result["curve"]] == [6.0, 12.0]
    assert device.waits == 4  # at the start and the end of each stretch, and never between
    clock = common.Clock("cuda:1", 5.0)
    assert clock.seconds == 5.0 and device.waits == 4
    clock.start()
    device.given = 1.0
    assert clock.seconds == 6.0  # read while it runs
    clock.stop()
    device.now += 9.0
    assert clock.seconds == 6.0


def test_tensorboard_has_every_point_once_though_a_run_was_cut_off_before_its_first_checkpoint(tmp_path, monkeypatch):
    seconds = itertools.count(
        1_800_000_000
    )  # which order the files by name; runs that follow each other are not of the same second
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, steps in ((0, (1, 2, 3)), (0, (1, 2)), (2, (3, 4))):
        with common.Log(tmp_path, first_step, tensorboard=True) as log:
            for step in steps:
                log.write(step, {"loss": float(step)})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4]


def test_two_processes_do_not_write_to_the_same_run(tmp_path):
    class Interrupted(Count):
        def update(self):
            if self.step == 0:  # when there is no checkpoint yet to be seen
                with pytest.raises(
                    ValueError, match="found another process that writes to this run, allowed one; wait"
                ):
                    common.carry_out(Count, CountConfig(size=7), tmp_path, tensorboard=False)
            return super().update()

    assert common.carry_out(Interrupted, CountConfig(), tmp_path, tensorboard=False) == {"steps": 4}
    assert json.loads((tmp_path / "config.json").read_text())["size"] == CountConfig().size != 7
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    common.carry_out(Count, CountConfig(num_steps=6), tmp_path, resume=True, tensorboard=False)


def test_rows_that_cannot_be_continued_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(
        ValueError,
        match=r"metrics.jsonl: found none that can be read, allowed the rows up to step 2, .*; bring it back, ",
    ):
        common.Log(tmp_path, 2, tensorboard=False)
    assert not path.exists()
    for damaged in ('{"step": 1}\n{"ste\n{"step": 3}\n', '{"step": 1}\n[2]\n', '{"step": 1}\n{"loss": 2}\n'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: found text that is not a row of metrics; repair"):
            common.Log(tmp_path, 3, tensorboard=False)
        assert path.read_text() == damaged
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')  # cut off while it wrote
    with common.Log(tmp_path, 2, tensorboard=False) as log:
        log.write(3, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


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


def test_figures_that_cannot_be_drawn_are_refused_before_the_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        importlib.import_module("dni_rl.experiments.alignment").main(["--run-folder", str(tmp_path / "run")])
    assert capsys.readouterr().err == "alignment: matplotlib is not installed; install it, or use --no-figures\n"
    assert not (tmp_path / "run").exists()


def test_curves_are_joined_where_all_have_a_point():
    """A run that was lengthened has one more, where it had ended."""
    curves = [
        [{"step": 1, "x": 1}, {"step": 3, "x": 3}],
        [{"step": 1, "x": 2}, {"step": 2, "x": 9}, {"step": 3, "x": 4}],
    ]
    assert [[p["x"] for p in points] for points in common.by_step(curves)] == [[1, 2], [3, 4]]
    assert common.by_step([]) == []


def test_a_folder_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error, common.one_line_errors("copy"):
        (tmp_path / "file").mkdir()
    assert error.value.code == 2 and capsys.readouterr().err.startswith("copy: [Errno 17]")


@dataclass(frozen=True)
class LongConfig:
    device: str = "cpu"
    ending: str = ""


def long_run(config, folder, **options):
    """Ends as `config` says, once another has begun; goes on for a minute if that says nothing."""
    folder.mkdir()
    (folder / "begun").write_text(f"{os.getpid()}\n")
    if config.ending:
        while not (folder.parent / "none-1-seed1" / "begun").exists():
            time.sleep(0.01)
    if config.ending == "fails":
        raise ValueError("rate: found 3")
    if config.ending == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    (folder / "carried out").touch()


def long_matrix(ending):
    configs = [LongConfig(ending=ending), LongConfig(), LongConfig()]
    return [common.Member(f"none-1-seed{seed}", common.Cell("none", 1), config) for seed, config in enumerate(configs)]


def begun(folder):
    """Process ids of the runs that have begun."""
    lines = [file.read_text() for file in folder.glob("*/begun")]
    return [int(line) for line in lines if line.endswith("\n")]


def check_that_all_end(folder):
    """Waits for the end of processes that need not be children of this one."""
    deadline = time.monotonic() + 30
    for process in begun(folder):
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(process, 0)
                time.sleep(0.05)
            pytest.fail(f"{process} goes on")
    assert not list(folder.glob("*/carried out"))


@pytest.mark.parametrize(
    ("ending", "error", "line"),
    [
        ("fails", ValueError, "rate: found 3"),
        ("is killed", ChildProcessError, "was killed, .* one of none-1-seed0, none-1-seed1; continue with --resume"),
    ],
)
def test_where_one_run_ends_in_an_error_no_other_goes_on(ending, error, line, tmp_path):
    with pytest.raises(error, match=line):
        common.run_members(long_run, long_matrix(ending), tmp_path, jobs=2)
    assert len(begun(tmp_path)) >= 2
    check_that_all_end(tmp_path)


def test_no_run_outlives_the_command(tmp_path):
    program = (
        "import pathlib, sys; import test_common as t; "
        "t.common.run_members(t.long_run, t.long_matrix(''), pathlib.Path(sys.argv[1]), jobs=2)"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    ) as process:
        while len(begun(tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    check_that_all_end(tmp_path)
