"""The README's snippet trains, its commands and files exist, its tables say what the results say, and links lead somewhere."""

import json
import re
import runpy
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import dni_rl
from agents.config import from_dict, parse_train_config, to_dict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))]


def test_the_snippet_trains_both_sides(monkeypatch):
    backward = dni_rl.backward
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    start, loop = snippet.split("for window in range(10):")
    torch.manual_seed(0)
    names: dict = {}
    exec(start, names)
    modules = {name: names[name] for name in ("core", "head", "critic")}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    calls = []
    monkeypatch.setattr(dni_rl, "backward", lambda *given, **named: calls.append(named) or backward(*given, **named))
    exec("for window in range(10):" + loop, names)
    for name, module in modules.items():
        moved = [not torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True)]
        # the first layer of the critic's MLP moves once its last layer has left zero
        assert all(moved), f"{name}: {moved}"
    assert names["report"].critic_loss.isfinite()
    # nothing lies beyond the cut for a sequence that the next window begins anew
    for call, following in pairwise(calls):
        assert torch.equal(call["alive"], following["end"].history.valid[0])
    assert len(calls) == 10 and not all(call["alive"].all() for call in calls)


def test_its_training_commands_parse():
    lines = re.findall(r"scripts/train\.py (--config .*)", README)
    assert lines
    for line in lines:
        arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in line.split()]
        config, resume = parse_train_config(arguments)
        assert resume is None and config.algorithm.bptt_horizon == 8


def commands(program):
    """Arguments of every command of the README's blocks that begins with this."""
    blocks = "".join(README.split("```")[1::2])
    found = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith(program)]
    assert found, program
    return [words[len(program.split()) :] for words in found]


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands("make"):
        assert re.search(rf"^{words[0]}:", makefile, re.M), words


@pytest.mark.parametrize("script", ["train", "evaluate", "compare", "experiments run", "experiments report"])
def test_the_options_of_its_commands_exist(script, monkeypatch, capsys):
    file, *subcommand = script.split()
    monkeypatch.setattr(sys, "argv", [f"{file}.py", *subcommand, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / f"{file}.py"), run_name="__main__")
    known = set(re.findall(r"--[\w.]+(?:-\w+)*", capsys.readouterr().out))
    for words in commands(" ".join([f".venv/bin/python scripts/{file}.py", *subcommand])):
        assert {word for word in words if word.startswith("--")} <= known, words


def test_every_extra_that_it_installs_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"\.\[([\w,]+)\]", README))))
    assert {"agents", "bsuite"} <= named <= set(extras)


def test_every_file_it_names_exists():
    names = set(re.findall(r"(?<![\w/.])((?:configs|scripts|envs|agents|dni_rl|docs)/[\w/.]+)", README))
    assert len(names) > 20
    for name in names:
        path = ROOT / name.rstrip(".")
        assert path.exists() or path.with_suffix(".md").exists(), name  # reports are named without their suffix


def rows_of(text, title):
    """Cells of the table whose header begins so, by the first of each row."""
    lines = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()
    return {cells[0]: cells[1:] for line in lines[2:] for cells in [[c.strip() for c in line.strip("| ").split("|")]]}


def finished(page, method, task):
    content = json.loads((ROOT / f"docs/results/{page}.json").read_text(encoding="utf-8"))
    ends = [row["end"] for row in content["rows"] if (row["method"], row["task"]) == (method, task) and row["finished"]]
    summaries = {row["method"]: row["tasks"] for row in content["summary"]}
    return ends, summaries.get(method, {}).get(task)


def test_its_table_of_the_maze_counts_the_seeds_of_the_results():
    methods = {
        "critic with privileged context, window 8": ("tmaze", "conditioned critic, window 8"),
        "the same, small updates (privileged)": ("tmaze", "conditioned critic, window 8, small updates"),
        "critic with past observations, nothing privileged, window 8": (
            "tmaze",
            "critic with past observations, window 8",
        ),
        "the same, small updates (past)": ("tmaze", "critic with past observations, window 8, small updates"),
        "critic of the core's state alone, window 8": ("tmaze", "critic without context, window 8"),
        "the same, small updates (state)": ("tmaze", "critic without context, window 8, small updates"),
        "plain truncated BPTT, window 8": ("tmaze", "plain truncated BPTT, window 8"),
        "the same, small updates (plain)": ("tmaze", "plain truncated BPTT, window 8, small updates"),
        "BPTT, window 64 (128 at corridor 80)": ("tmaze", "long BPTT"),
        "full BPTT, windows of six episodes": ("tmaze", "full BPTT"),
        "BPTT, windows of 64, 128 and 256, small updates": ("tmaze", "long BPTT, small updates"),
    }
    table = rows_of(README, "method | corridor 20 | corridor 40 | corridor 80 | corridor 160")
    assert set(table) == set(methods)
    for name, cells in table.items():
        for task, cell in zip((20, 40, 80, 160), cells, strict=True):
            ends, _ = finished(*methods[name], f"corridor {task}")
            assert cell == (f"{sum(end >= 0.95 for end in ends)} of {len(ends)}" if ends else "-"), (name, task)


@pytest.mark.parametrize(
    ("header", "pages", "methods"),
    [
        (
            "method | 10 to 20 steps | 20 to 40 | 40 to 80",
            [("variable", "corridor 10 to 20"), ("variable", "corridor 20 to 40"), ("variable", "corridor 40 to 80")],
            {
                "critic with privileged context, window 8": "conditioned critic, window 8",
                "critic with past observations, nothing privileged, window 8": "critic with past observations, window 8",
                "critic of the core's state alone, window 8": "critic without context, window 8",
                "plain truncated BPTT, window 8": "plain truncated BPTT, window 8",
                "BPTT, window 64, at 40 to 80 128, small updates": "long BPTT, small updates",
            },
        ),
        (
            "method | 128 distractors | 512, twice the steps",
            [("distractors", "128 distractors"), ("distractors", "512 distractors")],
            {
                "critic with privileged context, window 8": "conditioned critic, window 8",
                "the same, constant rate (critic)": "conditioned critic, window 8, constant rate",
                "BPTT, windows of 256, small updates": "full BPTT",
                "the first of these two, constant rate": "full BPTT, constant rate",
                "the same, rate held for half of the run (critic)": "conditioned critic, window 8, held rate",
                "the same, rate held for half of the run (small)": "full BPTT, held rate",
                "the same, rate held for half of the run (64)": "long BPTT, small updates, held rate",
                "the same, rate held for half of the run (past)": "critic with past observations, window 8, held rate",
                "BPTT, windows of 256, updates of 2,048 steps, rate held for half of the run": (
                    "full BPTT, updates of 2048 steps, held rate"
                ),
                "the same, its value function told what the critic is told": "full BPTT, value told",
                "BPTT, windows of 256, updates of 4,096 steps, constant rate": "full BPTT, updates of 4096 steps, constant rate",
                "BPTT, windows of 64, small updates": "long BPTT, small updates",
                "critic with past observations, nothing privileged, window 8": "critic with past observations, window 8",
                "plain truncated BPTT, window 8": "plain truncated BPTT, window 8",
            },
        ),
        (
            "method | KeyToDoor, two doors | MultiRoomKeyDoor, up to four rooms | bsuite memory_len 100",
            [
                ("gridworlds", "KeyToDoor, two doors, 55 steps"),
                ("gridworlds", "MultiRoomKeyDoor, 2 to 4 rooms"),
                ("bsuite", "memory_len 100"),
            ],
            {
                "critic with privileged context": "conditioned critic, window {}",
                "critic with past observations, nothing privileged": "critic with past observations, window {}",
                "plain truncated BPTT": "plain truncated BPTT, window {}",
                "the same, constant rate (plain)": "plain truncated BPTT, window {}, constant rate",
                "long BPTT, window 64 or 128": "long BPTT",
                "the same, constant rate (long)": "long BPTT, constant rate",
                "full BPTT, window 128, on KeyToDoor 256": "full BPTT",
            },
        ),
    ],
)
def test_the_tables_of_means_are_those_of_the_pages(header, pages, methods):
    table = rows_of(RESULTS, header)
    table.pop("window", None)
    assert set(table) == set(methods)
    for name, cells in table.items():
        for (page, task), cell in zip(pages, cells, strict=True):
            ends, summary = finished(page, methods[name].format(4 if page == "bsuite" else 8), task)
            if cell in ("not run", "-"):
                assert not ends, (name, task)
            else:
                end = summary["end"]
                few = f"{end['value']:.2f} ({end['n']} seeds)"
                assert cell == (
                    few if end["low"] is None else f"{end['value']:.2f} [{end['low']:.2f}, {end['high']:.2f}]"
                )


def test_what_horizons_foretold_is_that_of_the_pages():
    text = (ROOT / "docs/results/horizon.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\(\w+\.md\) \| (\d+ \| \d+ \| \d+ \| \d+) \|$", text, re.MULTILINE)
    assert len(rows) >= 3
    for page, counts in rows:
        assert f"\n| all | {counts} |" in (ROOT / f"docs/results/{page}.md").read_text(encoding="utf-8"), page


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_every_setting_that_documents_name_exists():
    settings = {f"{section}.{name}" for section, values in to_dict(from_dict({})).items() for name in values}
    for page in (Path("README.md"), Path("docs/results/README.md"), Path("docs/guide.md")):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:`|--)((?:env|model|critic|algorithm|run)\.(?!py)[a-z_]+)", text)
        assert named and set(named) <= settings, set(named) - settings


def test_every_configuration_file_is_valid():
    for path in (ROOT / "configs").glob("*.yaml"):
        parse_train_config(["--config", str(path)])
