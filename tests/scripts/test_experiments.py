"""The papers' experiments in one command: what runs, what is skipped, and what stands on the pages."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from papers import estimates, findings, tables
from papers.entries import ENTRIES, PRESETS, Entry
from papers.estimates import Estimate
from papers.findings import MAX_POINTS, planned
from papers.pages import LIST_END, LIST_START, MADE_BY, _pages
from papers.running import run_entry
from scripts import experiments

pytestmark = pytest.mark.timeout(120)
OF_NAME = {entry.name: entry for entry in ENTRIES}
BROKEN = Entry("broken", "ptb", "--dataset ptb")  # smoke, but of a text that is not there


def run(runs, *arguments, preset="smoke"):
    return experiments.main(["run", "--preset", preset, "--runs", str(runs), *arguments])


def report(runs, pages, preset="laptop"):
    return experiments.main(["report", "--preset", preset, "--runs", str(runs), "--output", str(pages)])


def fabricate(runs, name, results, preset="laptop"):
    """Leaves what finished runs leave; results by name of the member, or a function of it that returns None for no run."""
    for member in planned(OF_NAME[name], preset):
        result = results(member) if callable(results) else results.get(member.name)
        if result is None:
            continue
        folder = runs / preset / name / member.name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(member.config)))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": member.config.num_steps}) + "\n")
        steps = member.config.num_steps
        (folder / "result.json").write_text(json.dumps({"steps": steps, "seconds": 60.0, **result}))


def errors(by_arm):
    """Results of images: by arm, the test error of every seed."""

    def of(member):
        by_seed = by_arm.get(member.cell.arm, ())
        if member.config.seed >= len(by_seed):
            return None
        error = by_seed[member.config.seed]
        curve = [{"step": step, "seconds": step / 10, "error": error + 10 / step} for step in range(10, 2000, 10)]
        return {"error": error, "curve": curve}

    return of


def cells(page, start):
    """The cells of the lines of a page's tables that start so."""
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines() if line.startswith(start)
    ]


# Running


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Two entries, with one between them that fails; and what was printed."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNI_RL_DATA", str(runs / "nowhere"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(experiments, "ENTRIES", (OF_NAME["images_p0.2"], BROKEN, OF_NAME["ptb"]))
        with pytest.MonkeyPatch.context() as capture:
            printed: list[str] = []
            capture.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
            code = run(runs)
    return runs, code, printed


def test_an_entry_that_fails_is_one_line_and_does_not_stop_the_others(smoke):
    runs, code, printed = smoke
    assert code == 1 and len(printed) == 4
    assert printed[0].startswith("1 of 3: images_p0.2: done in 0:")
    assert printed[1].startswith("2 of 3: broken: failed after 0:") and "ptb: DNI_RL_DATA" in printed[1]
    assert printed[2].startswith("3 of 3: ptb: done in 0:")
    assert printed[3].startswith("1 of 3 failed: broken")
    for name in ("images_p0.2", "ptb"):
        (call,) = json.loads((runs / "smoke" / name / "machine.json").read_text())
        summary = json.loads((runs / "smoke" / name / "summary.json").read_text())
        assert call["runs"] == sorted(summary["configs"]) and call["cores"] == os.cpu_count()
    assert not (runs / "smoke" / "broken" / "machine.json").exists()


def test_what_is_done_is_skipped(smoke, monkeypatch, capsys):
    runs, *_ = smoke
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = sorted((runs / "smoke" / "ptb").glob("*/result.json"))
    before = [result.stat().st_mtime_ns for result in results]
    assert run(runs, "--only", "ptb") == 0
    assert capsys.readouterr().out.startswith("1 of 1: ptb: done in ")
    assert len(results) == 4 and before == [result.stat().st_mtime_ns for result in results]
    assert len(json.loads((runs / "smoke" / "ptb" / "machine.json").read_text())) == 1  # this call made nothing


def test_pages_have_what_the_runs_wrote(smoke, tmp_path):
    runs, *_ = smoke
    assert report(runs, tmp_path, preset="smoke") == 0
    summary = json.loads((runs / "smoke" / "ptb" / "summary.json").read_text())
    page = (tmp_path / "ptb.md").read_text()
    table = [line for line in cells(page, "| `") if line[0] in ("`none`", "`dni`", "`dni_aux`")]
    assert [line[:2] for line in table] == [[f"`{row['arm']}`", str(row["window"])] for row in summary["cells"]]
    assert [line[3] for line in table] == [f"{row['mean']:.3f}" for row in summary["cells"]]
    assert "python -m dni_rl.experiments.ptb --preset smoke --run-folder runs/experiments/smoke/ptb --resume" in page
    assert "All 4 of 4 runs, seeds: 0." in page and "Made on " in page and str(runs) not in page
    shares = [line for line in cells(page, "| ") if line[2:3] == ["none@6"]]
    assert [line[:2] for line in shares] == [["none", "3"], ["dni", "3"], ["dni_aux", "3"]]
    assert [line[3] for line in shares] == [f"{row['threshold_bits']:.3f}".rstrip("0") for row in summary["ratios"]]
    images = (tmp_path / "images.md").read_text()
    assert "--arms dni cdni --update-probability 0.2" in images
    assert "| published |" not in images  # that is of layers that learn at every step
    assert not (tmp_path / "broken.md").exists()
    pictures = sorted(file.name for file in tmp_path.glob("*.png"))
    assert pictures == ["images_smoke.png", "ptb_smoke.png", "ptb_smoke_windows.png"]
    assert all(1_000 < (tmp_path / name).stat().st_size < 300_000 and f"({name})" in page + images for name in pictures)
    assert json.loads((tmp_path / "ptb.json").read_text())["presets"]["smoke"]["ptb"]["finished"] == 4


@pytest.mark.usefixtures("interruptible")
def test_a_stop_reaches_the_program_which_saves_and_goes_on_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = "--cells none@4 --checkpoint-every-steps 40 --no-tensorboard --num-steps"
    monkeypatch.setattr(experiments, "ENTRIES", (Entry("long", "copy", f"{options} 100000000"),))
    folder = tmp_path / "smoke" / "long"

    def stop():
        while not (folder / "none-4-seed0" / "checkpoint.pt").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    assert run(tmp_path) == 130
    thread.join()
    assert "long: stopped; the same command goes on" in capsys.readouterr().err
    assert (folder / "output.log").read_text().strip().endswith("copy: stopped; continue with --resume")
    reached = json.loads((folder / "none-4-seed0" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    entry = Entry("long", "copy", f"{options} {reached + 400}")
    assert run_entry(entry, "smoke", tmp_path) is None
    steps = [json.loads(line)["step"] for line in (folder / "none-4-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 40 and steps[-1] == reached + 400 and steps == sorted(steps)  # it did not start anew


def test_a_stop_reaches_the_program_also_where_it_was_started_in_the_background(tmp_path):
    script = Path(experiments.__file__)
    options = ["run", "--preset", "laptop", "--only", "alignment", "--jobs", "1", "--runs"]
    command = [sys.executable, script, *options, tmp_path]
    folder = tmp_path / "laptop" / "alignment"
    ignored = "trap '' INT; exec \"$@\""  # as shells do for what they start in the background
    process = subprocess.Popen(["sh", "-c", ignored, "sh", *command], stderr=subprocess.DEVNULL, cwd=script.parents[1])
    try:
        while not (folder / "fixed-dni-1-seed0").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    assert (folder / "output.log").read_text().strip().endswith("alignment: stopped; continue with --resume")


def test_the_reason_of_a_program_that_is_killed_is_not_what_it_said_last(tmp_path, monkeypatch):
    says_and_is_killed = tmp_path / "program"
    says_and_is_killed.write_text("#!/bin/sh\necho 1 of 3 runs done: none-4-seed0\nkill -KILL $$\n")
    says_and_is_killed.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(says_and_is_killed))
    assert run_entry(OF_NAME["copy"], "smoke", tmp_path) == "ended by signal 9, Killed"


def test_unknown_names_are_one_line(tmp_path, capsys):
    for arguments, message in (
        (["--only", "coppy"], "--only: found coppy; allowed with --preset smoke: images, images_p0.2, images_unlocked"),
        (["--only", "copy_aux"], "--only: found copy_aux; allowed with --preset smoke: images"),
        (["--jobs", "0"], "--jobs: found 0; allowed an integer of at least 1"),
        (["--runs", "/proc/x"], "--runs: found /proc/x, which cannot be made or written (No such file or directory); "),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiments.main(["report", "--preset", "smoke"])
    assert "--preset: found smoke" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.is_matrix], ids=lambda entry: entry.name)
def test_every_entry_has_runs_in_every_preset_with_three_seeds_beyond_smoke(entry):
    for preset in entry.presets:
        matrix = planned(entry, preset)
        assert len({member.name for member in matrix}) == len(matrix)
        num_seeds = len({member.config.seed for member in matrix})
        assert num_seeds == 1 if preset == "smoke" else num_seeds >= 3


def test_an_entry_belongs_to_presets_and_has_options_of_them(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(experiments, "run_all", lambda entries, preset, *_: started.append((preset, entries)) or 0)
    for preset in PRESETS:
        assert run(tmp_path, preset=preset) == 0
    assert [preset for preset, _ in started] == list(PRESETS)
    assert all([entry for entry in ENTRIES if preset in entry.presets] == entries for preset, entries in started)
    names = {preset: {entry.name for entry in entries} for preset, entries in started}
    assert {entry.program for entry in ENTRIES} == {OF_NAME[name].program for name in names["smoke"]}
    entry = OF_NAME["images_cifar10"]
    assert "--num-steps" in entry.command("laptop") and "--num-steps" not in entry.command("paper")
    assert {member.config.dataset for member in planned(entry, "paper")} == {"cifar10"}


def test_what_the_issue_lists_is_run():
    """By arm and window, or arm, layers and data set, in any entry."""
    ran: dict[str, dict[str, set[str]]] = {preset: {} for preset in PRESETS}
    for entry in ENTRIES:
        for preset in entry.presets if entry.is_matrix else ():
            ran[preset].setdefault(entry.program, set()).update(str(m.cell) for m in planned(entry, preset))
    windows = (2, 3, 4, 5)
    for preset in ("laptop", "paper"):
        assert {f"{arm}@{w}" for arm in ("none", "dni", "dni_aux", "sobolev") for w in windows} <= ran[preset]["copy"]
        assert {"bp_lambda@4", "timescales@4", "timescales_dni@4"} <= ran[preset]["copy"]
        assert {"none@5", "none@20", "dni@5", "dni_aux@5"} <= ran[preset]["ptb"]
        assert {entry.name for entry in ENTRIES if preset in entry.presets} >= {
            "images", "images_p0.2", "images_p0.05", "images_unlocked", "images_fashion", "images_cifar10",
        }  # fmt: skip
    assert {f"cdni@{layers}" for layers in (3, 4, 5, 6)} <= ran["paper"]["images"]


def test_options_that_a_program_refuses_are_an_error(capsys):
    with pytest.raises(ValueError, match="wrong: its program refuses the options: --cells nobody@3"):
        planned(Entry("wrong", "ptb", "--cells nobody@3"), "smoke")


# Statistics


def test_intervals_are_those_of_the_t_distribution():
    estimate = estimates.mean([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # Student's t, two degrees of freedom, 97.5 %
    assert (estimate.value, estimate.std) == (2.0, 1.0)
    assert (estimate.low, estimate.high) == pytest.approx((2.0 - half, 2.0 + half), rel=1e-6)
    assert estimates.mean([5.0]) == Estimate(5.0)
    assert estimates.mean([5.0, None]) == estimates.mean([5.0, float("nan")]) == estimates.mean([]) == Estimate(None)


def test_differences_are_taken_seed_by_seed():
    found = estimates.difference({"0": 1.5, "1": 2.5, "3": 9.0}, {"0": 1.0, "1": 2.0, "2": 0.0})
    assert found == Estimate(0.5, 0.5, 0.5, 0.0)  # the spread over seeds is in both, and falls out


def test_ratios_of_geometric_means_have_welchs_interval():
    of, baseline = [10.0, 20.0, 30.0, 35.0], [8.0, 10.0, 12.0]
    found, logs = estimates.ratio(of, baseline), [np.log(of), np.log(baseline)]
    by_scipy = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(stats.gmean(of) / stats.gmean(baseline))
    assert (found.low, found.high) == pytest.approx((math.exp(by_scipy.low), math.exp(by_scipy.high)))
    one_sided = estimates.ratio([10.0, 20.0, 30.0], [10.0, 10.0, 10.0])  # the spread of one of them is enough
    assert one_sided.value == pytest.approx(6_000 ** (1 / 3) / 10) and one_sided.low < one_sided.value < one_sided.high


def test_the_interval_of_a_ratio_holds_at_three_seeds():
    generator = np.random.default_rng(0)
    kept = 0
    for _ in range(500):
        of, baseline = np.exp(generator.normal((1.0, 0.0), (0.3, 0.2), (3, 2))).T
        found = estimates.ratio(of.tolist(), baseline.tolist())
        kept += found.low <= math.e <= found.high
    assert kept / 500 > 0.93  # a percentile bootstrap: 0.77


def test_a_ratio_without_what_an_interval_needs_has_none():
    for of, baseline, shown in (
        ([10], [5], "2.0 (one seed)"),
        ([16, 16], [8, 8], "2.0 (no spread)"),
        ([9, 9, 9], [4, 0, 5], "3.0 (a seed has 0; of the means)"),
        ([0, 0], [1, 3], "0.0 (a seed has 0; of the means)"),
    ):
        found = estimates.ratio(of, baseline)
        assert (found.low, found.high) == (None, None) and found.shown(1) == shown
        for bars in ({"at_most": 99.0}, {"at_least": 0.0}):
            assert tables.Comparison("", found, **bars).verdict() == "on average"
    assert estimates.ratio([10], [0]) == estimates.ratio([], [1]) == Estimate(None)
    with pytest.raises(ValueError, match="found -1, allowed scores of 0 or more"):
        estimates.ratio([-1, 2], [1, 1])


@pytest.mark.parametrize(
    ("estimate", "bars", "verdict"),
    [
        (Estimate(0.2, 0.1, 0.29), {"at_most": 0.3}, "yes"),
        (Estimate(0.2, 0.1, 0.31), {"at_most": 0.3}, "on average"),
        (Estimate(0.2), {"at_most": 0.3}, "on average"),
        (Estimate(0.31, 0.1, 0.4), {"at_most": 0.3}, "no"),
        (Estimate(1.8, 1.7, 1.9), {"at_least": 1.7}, "yes"),
        (Estimate(1.8, 1.6, 1.9), {"at_least": 1.7}, "on average"),
        (Estimate(1.6, 1.5, 1.8), {"at_least": 1.7}, "no"),
        (Estimate(0.2, 0.2, 0.2, 0.0), {"at_most": 0.3}, "on average"),  # as many seeds may agree by chance
        (Estimate(0.2, 0.2 - 1e-16, 0.2 + 1e-16), {"at_most": 0.3}, "on average"),
        (Estimate(None), {"at_least": 1.7}, None),
        (Estimate(1.0, 1.0, 1.0), {}, None),
    ],
)
def test_a_bar_is_kept_by_the_whole_interval_or_on_average(estimate, bars, verdict):
    assert tables.Comparison("", estimate, **bars).verdict() == verdict


# Pages


def test_the_page_of_images_compares_arms_and_entries_seed_by_seed(tmp_path):
    backprop, cdni = (0.017, 0.018, 0.019), (0.018, 0.019, 0.020)
    fabricate(tmp_path, "images", errors({"backprop": backprop, "none": (0.1,) * 3, "dni": (0.03,) * 3, "cdni": cdni}))
    fabricate(tmp_path, "images_p0.2", errors({"dni": (0.032,) * 3, "cdni": (0.028, 0.029, 0.030)}))
    assert report(tmp_path, tmp_path / "pages") == 0
    page = (tmp_path / "pages" / "images.md").read_text()
    first, *_, in_p02 = cells(page, "| `cdni`")
    assert first[1:] == ["4", "1.80 1.90 2.00", "1.90", "0.10", "[1.65, 2.15]", "1.90", "60"]
    assert in_p02[1:] == ["4", "2.80 2.90 3.00", "2.90", "0.10", "[2.65, 3.15]", "60"]
    compared = {line[0]: line[1:] for line in cells(page, "| images")}
    assert compared == {
        "images: `none` less `backprop`, 4 layers, points": ["8.20 [7.95, 8.45]", "10.80", "-", "-"],
        "images: `dni` less `backprop`, 4 layers, points": ["1.20 [0.95, 1.45]", "0.40", "at most 1.5", "yes"],
        "images: `cdni` less `backprop`, 4 layers, points": ["0.10 [0.10, 0.10]", "0.10", "at most 0.3", "on average"],
        "images_p0.2 less images: `dni`, 4 layers, points": ["0.20 [0.20, 0.20]", "-", "at most 0.5", "on average"],
        "images_p0.2 less images: `cdni`, 4 layers, points": ["1.00 [1.00, 1.00]", "-", "at most 0.5", "no"],
    }
    content = (tmp_path / "pages" / "images.json").read_text()
    assert len(content) < 1_000_000 and "images_unlocked" not in content
    curve = json.loads(content)["presets"]["laptop"]["images"]["curves"]["cdni-seed1"]
    assert len(curve["step"]) == len(curve["error"]) == MAX_POINTS
    assert (curve["step"][0], curve["step"][-1], curve["error"][-1]) == (
        10,
        1990,
        pytest.approx(0.019 + 10 / 1990, rel=1e-5),
    )


def test_the_page_of_copy_has_ratios_at_every_window(tmp_path):
    def solved(member):
        length = (17 if member.cell.arm == "dni" else 8) + member.config.seed
        return {"solved_length": length, "solved": [{"length": 4, "step": 5}, {"length": length, "step": 50}]}

    fabricate(tmp_path, "copy", solved)
    assert report(tmp_path, tmp_path / "pages") == 0
    page = (tmp_path / "pages" / "copy.md").read_text()
    compared = cells(page, "| copy: `dni`")
    assert [line[0] for line in compared] == [
        f"copy: `dni` over `none`, window {window} (seeds: 3, 3)" for window in (2, 3, 4, 5)
    ]
    assert [line[2] for line in compared] == ["2.29", "1.75", "1.80", "2.25"]  # published
    assert all(line[1] == "2.01 [1.59, 2.53]" and line[3:] == ["at least 1.7", "on average"] for line in compared)
    assert cells(page, "| `dni` | 2 ")[0][2:] == [
        "17 18 19",
        "18.0",
        "1.0",
        "[15.5, 20.5]",
        "16",
        "2.000",
        "2.286",
        "60",
    ]
    curve = json.loads((tmp_path / "pages" / "copy.json").read_text())["presets"]["laptop"]["copy"]["curves"]
    assert curve["none-2-seed1"]["length"] == [0, 0, 4, 4, 9, 9]
    assert curve["none-2-seed1"]["step"] == [0, 5, 5, 50, 50, 100_000]
    assert (tmp_path / "pages" / "copy_laptop_windows.png").stat().st_size > 1_000


def test_seeds_in_entries_of_their_own_are_compared_together(tmp_path):
    lengths = {"none": (8, 8, 8, 8, 8, 8), "dni": (16, 16, 16, 32, 32, 32)}  # by seed: 0, 1, 2, and 4, 5, 6

    def solved(member):
        number = (0, 1, 2, 4, 5, 6).index(member.config.seed)
        return {"solved_length": lengths[member.cell.arm][number], "solved": []}

    for name in ("copy", "copy_fresh"):
        fabricate(tmp_path, name, solved)
    assert report(tmp_path, tmp_path / "pages") == 0
    compared = cells((tmp_path / "pages" / "copy.md").read_text(), "| copy: `dni`")
    assert [line[0] for line in compared] == [
        f"copy: `dni` over `none`, window {window} (seeds: 6, 6)" for window in (2, 3, 4, 5)
    ]
    assert all(line[1].startswith("2.83 [") for line in compared)  # the geometric mean of 2 and 4


def test_runs_that_are_missing_too_short_or_of_other_settings_are_told_and_not_counted(tmp_path):
    fabricate(
        tmp_path, "images", errors({"backprop": (0.02, 0.03, 0.04), "cdni": (0.01, 0.02, 0.03), "dni": (0.02, 0.02)})
    )
    folder = tmp_path / "laptop" / "images"
    longer = json.loads((folder / "cdni-seed2" / "result.json").read_text())  # it has come further, its result has not
    (folder / "cdni-seed2" / "result.json").write_text(json.dumps(longer | {"steps": 3000}))
    config = json.loads((folder / "backprop-seed0" / "config.json").read_text())
    config |= {"learning_rate": 1.0, "device": "cuda", "eval_every_steps": 7}
    (folder / "backprop-seed0" / "config.json").write_text(json.dumps(config))
    before = json.loads((folder / "dni-seed0" / "config.json").read_text())
    del before["augment"]  # a setting that came later
    (folder / "dni-seed0" / "config.json").write_text(json.dumps(before | {"device": "cuda"}))
    assert report(tmp_path, tmp_path / "pages") == 0
    page = (tmp_path / "pages" / "images.md").read_text()
    assert "**Not complete:** 6 of 12 runs, seeds: 0, 1, 2." in page
    assert "when this page was made: none-seed0, none-seed1, none-seed2, dni-seed2, cdni-seed2." in page
    assert "Left out: backprop-seed0 (learning_rate: found a run with 1.0; allowed 0.001;" in page
    by_seed = {line[0]: line[2] for line in cells(page, "| `")}
    assert by_seed == {"`backprop`": "3.00 4.00", "`dni`": "2.00 2.00", "`cdni`": "1.00 2.00"}
    assert "images: `cdni` less `backprop`, 4 layers, points | -1.00 (one seed)" in page  # seed 1 is all they share


def test_figures_of_a_program_are_taken_over_and_large_ones_made_smaller(tmp_path):
    fabricate(tmp_path, "images", errors({"backprop": (0.02,)}))
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "laptop" / "images" / "noise.png")
    Image.fromarray(noise[:20, :20]).save(tmp_path / "laptop" / "images" / "small.png")
    assert report(tmp_path, tmp_path / "pages") == 0
    assert "![images laptop noise](images_laptop_noise.png)" in (tmp_path / "pages" / "images.md").read_text()
    assert 10_000 < (tmp_path / "pages" / "images_laptop_noise.png").stat().st_size < 250_000
    small, copied = (
        p / n
        for p, n in ((tmp_path / "laptop" / "images", "small.png"), (tmp_path / "pages", "images_laptop_small.png"))
    )
    assert small.read_bytes() == copied.read_bytes()


def test_parts_with_errors_by_seed_have_intervals():
    row = {"arm": "sg", "per_seed": [0.01, 0.02, 0.03]}
    (table,) = tables._part_tables({"rdm": {"rows": [row]}, "linear": {"rows": [{"data": "xor2"}]}})
    assert table.splitlines()[-1] == "| `sg` | 1.00 2.00 3.00 | 2.00 | 1.00 | [-0.48, 4.48] |"


def test_what_was_written_by_hand_stays(tmp_path, capsys):
    fabricate(tmp_path, "images", errors({"backprop": (0.02,)}))
    fabricate(tmp_path, "copy", lambda member: {"solved_length": 9, "solved": []})
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "images.md").write_text(f"# Old\n\n{MADE_BY}\n\nnumbers\n\n**Reading.** My thoughts.\n\n- and more\n")
    mine = "# All of it is mine\n\n**Reading.** This as well.\n"
    (pages / "copy.md").write_text(mine)
    start, end = LIST_START, LIST_END
    (pages / "README.md").write_text(
        f"# Results\n\n- [a](a.md)\n{start}\n- [ptb](ptb.md): older.\n{end}\n- [z](z.md)\n"
    )
    for _ in range(2):  # also on a page that has been made before
        assert report(tmp_path, pages) == 0
        page = (pages / "images.md").read_text()
        assert page.endswith("\n\n**Reading.** My thoughts.\n\n- and more\n") and page.count("**Reading.**") == 1
        assert "numbers" not in page and "| 2.00 |" in page
        assert (pages / "copy.md").read_text() == mine and not (pages / "copy.json").exists()
        assert f"{pages / 'copy.md'}: found a page that this program did not make; " in capsys.readouterr().err
    listed = (pages / "README.md").read_text()
    image_line = "- [images](images.md): Images with every layer decoupled; `laptop`, 1 of 27 runs."
    assert (
        listed == f"# Results\n\n- [a](a.md)\n{start}\n\n{image_line}\n- [ptb](ptb.md): older.\n\n{end}\n- [z](z.md)\n"
    )


def test_what_was_not_run_at_all_is_said_and_counted(tmp_path, capsys):
    fabricate(tmp_path, "images", errors({"backprop": (0.02,)}))
    assert report(tmp_path, tmp_path / "pages") == 0
    assert "`laptop`, 1 of 27 runs" in capsys.readouterr().out
    page = (tmp_path / "pages" / "images.md").read_text()
    assert "**Not run:** images_p0.2 (6 runs), images_p0.05 (3 runs), images_unlocked (6 runs)." in page


def test_a_damaged_json_is_refused_and_the_page_left_as_it_is(tmp_path, capsys):
    pages = tmp_path / "pages"
    fabricate(tmp_path / "here", "images", errors({"backprop": (0.02,) * 3}))
    report(tmp_path / "here", pages)
    whole, page = (pages / "images.json").read_text(), (pages / "images.md").read_text()
    (pages / "images.json").write_text(whole[: len(whole) // 2])
    fabricate(tmp_path / "there", "images", errors({"cdni": (0.04,)}))
    report(tmp_path / "there", pages)
    assert f"{pages / 'images.json'}: found a damaged file" in capsys.readouterr().err
    assert (pages / "images.md").read_text() == page


def test_settings_that_decide_the_result_are_compared():
    for entry, same in (("ptb", False), ("images", True)):
        config, free = planned(OF_NAME[entry], "laptop")[0].config, findings._free(OF_NAME[entry])
        found = json.loads(json.dumps(dataclasses.asdict(config)))
        assert (findings._difference(found | {"eval_every_steps": 20}, config, free) == "") is same
        assert not findings._difference(found | {"log_every_steps": 20}, config, free)


def test_a_run_that_is_older_than_a_setting_had_its_default():
    config = planned(OF_NAME["images_unlocked"], "laptop")[0].config
    found = json.loads(json.dumps(dataclasses.asdict(config)))
    del found["augment"]
    assert not findings._difference(found, config, ())
    del found["input_learning_rate"]  # which this entry's command sets
    assert findings._difference(found, config, ()) == "input_learning_rate: found a run with None; allowed 0.003"


def test_a_seed_that_diverges_on_its_way_ends_the_mean_of_the_curves_and_not_the_report(tmp_path):
    def read(member):
        last = None if member.name == "dni-5-seed1" else 1.5
        curve = [{"step": 10, "seconds": 5.0, "tokens": 100, "bits": 2.0}, {"step": 20, "seconds": 9.0, "tokens": 200}]
        return {
            "test_bits": 1.5,
            "test_perplexity": 2.8,
            "best_valid_bits": 1.5,
            "curve": [curve[0], {**curve[1], "bits": last}],
        }

    fabricate(tmp_path, "ptb", read)
    assert report(tmp_path, tmp_path / "pages") == 0
    assert (tmp_path / "pages" / "ptb_laptop.png").stat().st_size > 1_000


def test_seconds_of_two_machines_have_no_ratio():
    curve = {"step": [1, 2], "tokens": [1, 2], "seconds": [1.0, 2.0], "bits": [2.0, 1.5]}
    section = {"settings": {}, "summary": {"dataset": "ptb", "level": "characters"}}
    machine = {"gpu": None, "processor": "A", "cores": 2}

    def shown(other):
        of = {
            arm: {
                **section,
                "machines": [made],
                "curves": {f"{arm}-{w}-seed0": {**curve, "arm": arm, "window": w, "seed": 0}},
            }
            for arm, w, made in (("none", 20, machine), ("dni", 5, {**machine, **other}))
        }
        return "\n".join(tables.ptb_ratios(of))

    def ratios(other):
        (line,) = [line for line in shown(other).splitlines() if line.startswith("| dni")]
        cells = [cell.strip() for cell in line.split("|")]
        return float(cells[5]), cells[7]

    assert ratios({}) == (1.0, ratios({})[1]) and float(ratios({})[1]) == 1.0  # as many tokens, and as many seconds
    assert ratios({"processor": "B"}) == (1.0, "-")


def test_runs_of_another_machine_stay_on_the_page(tmp_path):
    pages = tmp_path / "pages"
    fabricate(tmp_path / "here", "images", errors({"backprop": (0.02,) * 3}))
    fabricate(tmp_path / "there", "images_p0.2", errors({"cdni": (0.05,)}), preset="paper")
    fabricate(tmp_path / "there", "images", errors({"cdni": (0.04,)}))
    report(tmp_path / "here", pages)
    report(tmp_path / "there", pages, preset="paper")
    page = (pages / "images.md").read_text()
    assert page.index("## Preset `laptop`") < page.index("2.00 2.00 2.00") < page.index("## Preset `paper`")
    assert page.index("## Preset `paper`") < page.index("--preset paper --arms dni cdni") < page.index("| 5.00 |")
    (pages / "images.md").write_text("**Reading.** My thoughts.\n")
    assert report(tmp_path / "elsewhere", pages) == 0  # where no runs are at hand, it is made of its JSON
    assert (pages / "images.md").read_text() == f"{page}\n**Reading.** My thoughts.\n"


def test_fewer_runs_do_not_replace_more_of_the_same_settings(tmp_path, capsys):
    pages = tmp_path / "pages"
    fabricate(tmp_path / "here", "images", errors({"backprop": (0.02,) * 3}))
    fabricate(tmp_path / "there", "images", errors({"cdni": (0.04, 0.04)}))
    noise = np.zeros((20, 20, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "there" / "laptop" / "images" / "noise.png")
    report(tmp_path / "here", pages)
    capsys.readouterr()
    report(tmp_path / "there", pages)
    page, shown = (pages / "images.md").read_text(), capsys.readouterr()
    assert "2.00 2.00 2.00" in page and "4.00" not in page and not list(pages.glob("*noise.png"))
    said = f"images: found 2 finished runs of preset laptop, and 3 in {pages / 'images.json'}, which are kept; finish"
    assert said in shown.err and shown.err.count("\n") == 1
    assert "laptop`, 3 of 27 runs" in shown.out
    fabricate(tmp_path / "more", "images", errors({"cdni": (0.05,) * 3, "dni": (0.05,)}))
    report(tmp_path / "more", pages)
    page = (pages / "images.md").read_text()
    assert "2.00 2.00 2.00" not in page and "5.00 5.00 5.00" in page and not capsys.readouterr().err


def test_runs_of_settings_that_the_entry_has_no_longer_are_replaced_by_fewer(tmp_path, capsys):
    pages = tmp_path / "pages"
    fabricate(tmp_path / "here", "images", errors({"backprop": (0.02,) * 3}))
    fabricate(tmp_path / "there", "images", errors({"cdni": (0.04,)}))
    report(tmp_path / "here", pages)
    content = json.loads((pages / "images.json").read_text())
    content["presets"]["laptop"]["images"]["settings"]["learning_rate"] = 0.5
    (pages / "images.json").write_text(json.dumps(content))
    report(tmp_path / "there", pages)
    page = (pages / "images.md").read_text()
    assert "2.00 2.00 2.00" not in page and "| 4.00 |" in page and not capsys.readouterr().err


def test_no_figure_stays_of_runs_that_the_page_has_no_longer(tmp_path):
    def solved(member):
        return {"solved_length": 8, "solved": []}

    pages, windows = tmp_path / "pages", tmp_path / "pages" / "copy_laptop_windows.png"
    fabricate(tmp_path / "here", "copy", solved)
    report(tmp_path / "here", pages)
    assert windows.exists() and windows.name in (pages / "copy.md").read_text()
    content = json.loads((pages / "copy.json").read_text())
    content["presets"]["laptop"]["copy"]["settings"]["learning_rate"] = 0.5
    (pages / "copy.json").write_text(json.dumps(content))
    fabricate(tmp_path / "there", "copy", lambda member: solved(member) if member.cell.window == 2 else None)
    report(tmp_path / "there", pages)
    assert not windows.exists() and windows.name not in (pages / "copy.md").read_text()


def test_a_diverged_seed_is_in_its_row_and_in_no_mean(tmp_path):
    def result(member):
        good = {"test_bits": 1.5, "test_perplexity": 2.8, "best_valid_bits": 1.6, "tokens": 1}
        curve = [{"step": s, "seconds": s / 10, "tokens": 32 * s, "bits": 1.5 + 10 / s} for s in (50, 100)]
        if member.name == "dni-5-seed1":
            good = {name: float("nan") for name in good}
            curve = [{**point, "bits": float("inf")} for point in curve]
        return {**good, "curve": curve}

    fabricate(tmp_path, "ptb", result)
    assert report(tmp_path, tmp_path / "pages") == 0
    page = (tmp_path / "pages" / "ptb.md").read_text()
    row, *_ = cells(page, "| `dni` ")
    assert row[2:5] == ["1.500 diverged 1.500", "-", "-"]
    (share,) = [line for line in cells(page, "| dni ") if line[2] == "none@20"]
    assert share[3:] == ["-"] * 5
    content = (tmp_path / "pages" / "ptb.json").read_text()
    assert "NaN" not in content and "Infinity" not in content


def test_arms_in_entries_of_their_own_are_compared_with_the_baseline_of_their_page(tmp_path):
    fabricate(tmp_path, "copy", lambda member: {"solved_length": 8 + member.config.seed, "solved": []})
    fabricate(tmp_path, "copy_aux", lambda member: {"solved_length": 16 + 2 * member.config.seed, "solved": []})
    bits = {"none-20": 1.5, "none-5": 1.6, "dni-5": 1.5, "dni_aux-5": 1.4}

    def read(member):
        best = bits[f"{member.cell.arm}-{member.cell.window}"] + member.config.seed / 100
        curve = [{"step": 10, "seconds": 5.0, "tokens": 100, "bits": 2.0}, {"step": 20, "seconds": 9.0, "tokens": 200}]
        curve[1]["bits"] = best
        return {"test_bits": best, "test_perplexity": 2**best, "best_valid_bits": best, "curve": curve}

    fabricate(tmp_path, "ptb", read)
    fabricate(tmp_path, "ptb_aux", read)
    assert report(tmp_path, tmp_path / "pages") == 0
    page = (tmp_path / "pages" / "copy.md").read_text()
    compared = cells(page, "| copy: `dni_aux` over `none`")
    assert len(compared) == 4 and all(line[1].startswith("2.00 [") for line in compared)
    page = (tmp_path / "pages" / "ptb.md").read_text()
    (line,) = cells(page, "| `dni_aux` at window 5 less `none` at 20, bits")
    assert line[1] == "-0.1000 [-0.1000, -0.1000]"
    common_bits, published = [line for line in cells(page, "| dni_aux | 5 | none@20")]
    assert common_bits[3] == "1.52" and float(common_bits[4]) < 1.0 and common_bits[5] == "-"
    assert published[3:] == ["1.35", "-", "0.58", "-", "0.5"]  # which the fabricated baseline never reached


def test_nothing_to_report_is_one_line(tmp_path, capsys):
    assert report(tmp_path, tmp_path / "pages") == 1
    assert "--runs: found no finished runs of preset laptop" in capsys.readouterr().err
    assert not (tmp_path / "pages").exists()


def test_a_folder_that_pages_cannot_be_written_to_is_one_line(tmp_path, capsys):
    fabricate(tmp_path, "images", errors({"backprop": (0.02,)}))
    (tmp_path / "file").write_text("")
    assert report(tmp_path, tmp_path / "file") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("experiments.py: [Errno 17] File exists: ") and shown.count("\n") == 1


def test_a_program_without_a_view_has_its_own_table(monkeypatch):
    found = {"program": "understanding", "summary": {"parts": {}}}
    monkeypatch.setattr("dni_rl.experiments.understanding.table", lambda summary: f"its own, {len(summary['parts'])}")
    assert list(tables.tables(found)) == ["its own, 0"]
    monkeypatch.delitem(tables.VIEWS, "understanding")
    assert list(tables.tables(found)) == ["its own, 0"]


def test_asynchronous_rows_are_taken_from_its_one_file(tmp_path, capsys):
    entry = OF_NAME["asynchronous"]
    config = entry.module.make_config("smoke")
    names = [str(run) for run in entry.module.runs(config)]
    row = {"test_error": 0.0154, "updates_per_sec": 96.06, "cpu_ms_per_update": [9.1], "seconds": 1.0}
    folder = tmp_path / "smoke" / "asynchronous"
    folder.mkdir(parents=True)
    results = {"config": dataclasses.asdict(config), "machine": {}, "runs": {names[0]: row}}
    (folder / "results.json").write_text(json.dumps(results))
    assert report(tmp_path, tmp_path / "pages", preset="smoke") == 0
    page = (tmp_path / "pages" / "asynchronous.md").read_text()
    assert "| backprop, 1 process | 1.54 | 1.54 | 96.1 | 9.1 |" in page
    assert "| `backprop, 1 process` | 1.54 | 1.54 | - | - |" in page  # with an interval, were there several seeds
    assert f"**Not complete:** 1 of {len(names)} runs" in page and names[-1] in page
    results["config"]["num_steps"] = 7
    (folder / "results.json").write_text(json.dumps(results))
    assert report(tmp_path, tmp_path / "other", preset="smoke") == 1
    assert "asynchronous: left out: num_steps: found a run with 7; allowed 100" in capsys.readouterr().err


def test_no_page_takes_the_name_of_one_that_is_made_otherwise():
    pages = (Path(__file__).parents[2] / "docs" / "results").glob("*.md")
    others = {page.stem for page in pages if MADE_BY not in page.read_text()} - {"asynchronous"}
    assert "tmaze" in others and not others & set(_pages())
