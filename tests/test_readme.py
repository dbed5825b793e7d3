"""What the README says to run, runs, and what its snippets train moves."""

import re
from pathlib import Path

import torch

from agents.config import parse_train_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippet_trains_both_sides():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    start, loop = snippet.split("for window in range(10):")
    torch.manual_seed(0)
    names: dict = {}
    exec(start, names)
    modules = {name: names[name] for name in ("core", "head", "critic")}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    exec("for window in range(10):" + loop, names)
    for name, module in modules.items():
        moved = [not torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True)]
        # the first layer of the critic's MLP moves once its last layer has left zero
        assert all(moved), f"{name}: {moved}"
    assert names["report"].critic_loss.isfinite()


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


def test_every_configuration_file_is_valid():
    for path in (ROOT / "configs").glob("*.yaml"):
        parse_train_config(["--config", str(path)])
