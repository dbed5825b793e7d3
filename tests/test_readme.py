"""What the README says to run, runs, what its snippets train moves, and what documents point at is there."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import dni_rl
from agents.config import from_dict, parse_train_config, to_dict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_every_file_it_names_exists():
    for name in set(re.findall(r"`((?:configs|scripts|envs|agents|dni_rl|docs)/[\w/.]+)`", README)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_every_setting_that_documents_name_exists():
    settings = {f"{section}.{name}" for section, values in to_dict(from_dict({})).items() for name in values}
    for page in (Path("README.md"), Path("docs/guide.md")):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"(?:`|--)((?:env|model|critic|algorithm|run)\.(?!py)[a-z_]+)", text)
        assert named and set(named) <= settings, set(named) - settings


def test_every_configuration_file_is_valid():
    for path in (ROOT / "configs").glob("*.yaml"):
        parse_train_config(["--config", str(path)])
