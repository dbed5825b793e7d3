"""Copy and repeat copy: the tasks symbol by symbol, the curriculum, every arm, resuming."""

import json
import math

import pytest
import torch
from torch import nn

import dni_rl
from dni_rl.experiments import common, copy
from dni_rl.experiments.copy import IGNORED, Batch, Curriculum, Streams
from dni_rl.experiments.recurrent import ARMS

SMALL = {
    "hidden_size": 6,
    "batch_size": 4,
    "num_symbols": 2,
    "critic_hidden_sizes": (4,),
    "learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    "gradient_discount": 0.9,
    "critic_scale": 1.0,
    "warmup_updates": 2,
    "average_episodes": 8,
    "solved_bits": 2.0,  # every level is solved at once, so that levels change
    "window": 2,
    "period": 2,
    "num_steps": 48,
    "log_every_steps": 12,
    "checkpoint_every_steps": 24,
}


def small(**settings):
    if settings.get("arm") == "bp_lambda":
        settings |= {"critic_hidden_sizes": ()}
    return copy.CopyConfig(**{**SMALL, **settings})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(result):
    return {**result, "seconds": 0.0, "solved": [{**level, "seconds": 0.0} for level in result["solved"]]}


# Task


def test_an_episode_of_repeat_copy_by_hand():
    streams = Streams("repeat_copy", 1, 3, seed=0)
    streams.level = 2
    streams._start_episodes(torch.tensor([True]))  # N = 2, R = 2
    streams.symbols[0] = torch.tensor([2, 0])
    batch = streams.take(10)
    inputs = [
        [0, 0, 1, 0, 0],  # symbol 2
        [1, 0, 0, 0, 0],  # symbol 0
        [0, 0, 0, 1, 0],  # stop mark
        [0, 0, 0, 0, 2],  # twice
        *[[0, 0, 0, 0, 0]] * 5,
    ]
    assert batch.inputs[:9, 0].tolist() == inputs
    assert batch.targets[:, 0].tolist() == [IGNORED] * 4 + [2, 0, 2, 0, 3] + [IGNORED]
    assert batch.inputs[9, 0, :3].sum() == 1  # the next episode starts at once
    assert 2 + copy.episode_length("repeat_copy", 2) == 9


def test_an_episode_of_copy_by_hand():
    streams = Streams("copy", 1, 2, seed=0)
    streams.level = 2
    streams._start_episodes(torch.tensor([True]))  # N = 3
    streams.symbols[0] = torch.tensor([1, 1, 0])
    batch = streams.take(9)
    read, blank = [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 0, 0]]
    assert batch.inputs[:, 0].tolist() == [*read, [0, 0, 1, 0], [0, 0, 0, 1], *blank * 4]
    assert batch.targets[:, 0].tolist() == [IGNORED] * 5 + [1, 1, 0, 2]


@pytest.mark.parametrize("task", copy.TASKS)
def test_every_target_follows_from_what_was_read(task):
    V = 3
    streams = Streams(task, 5, V, seed=1)
    parts = []
    for level in (0, 3, 4):
        streams.level = level
        parts.append(streams.take(40))
    batch = Batch(*(torch.cat(part) for part in zip(*parts, strict=True)))
    seen = set()
    for b in range(5):
        expected, symbols = [], None  # unknown until the first episode begins
        for t in range(len(batch.targets)):
            x, target = batch.inputs[t, b], int(batch.targets[t, b])
            if symbols is None:
                symbols = [] if target == V else None
                continue
            if expected:
                assert not x.any() and target == expected.pop(0)
                symbols = symbols if expected else []
                continue
            assert target == IGNORED
            if x[:V].any():
                symbols.append(int(x[:V].argmax()))
            elif x[V]:
                N, R = copy.symbols_and_repeats(task, int(batch.levels[t, b]))
                assert len(symbols) == N
            else:
                assert x[V + 1] == R
                expected = symbols * R + [V]
                seen.add((N, R))
    assert seen == {copy.symbols_and_repeats(task, level) for level in (0, 3, 4)}


def test_windows_are_parts_of_one_stream():
    whole = Streams("repeat_copy", 3, 2, seed=5).take(11)
    streams = Streams("repeat_copy", 3, 2, seed=5)
    pieces = [streams.take(T) for T in (4, 1, 6)]
    for name in Batch._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(piece, name) for piece in pieces]))


def test_sequences_start_at_different_steps_of_an_episode():
    assert len(set(Streams("copy", 32, 2, seed=0).position.tolist())) == 5  # N + N R + 3 steps of level 0


def test_levels_lengthen_n_and_r_in_turn_and_reach_every_published_length():
    assert [copy.symbols_and_repeats("repeat_copy", level) for level in range(5)] == [
        (1, 1), (2, 1), (2, 2), (3, 2), (3, 3),
    ]  # fmt: skip
    assert [copy.symbols_and_repeats("copy", level) for level in range(3)] == [(1, 1), (2, 1), (3, 1)]
    for task, arms in copy.PUBLISHED.items():
        lengths = {copy.episode_length(task, level) for level in range(20)}
        assert {length for arm in arms.values() for length in arm.values()} <= lengths


# Curriculum


def observe(curriculum, bits, targets, levels):
    targets, levels = torch.tensor(targets).unsqueeze(1), torch.tensor(levels).unsqueeze(1)
    return curriculum.observe(torch.tensor(bits).unsqueeze(1), Batch(targets, targets, levels), stop_symbol=2)


def test_the_level_rises_when_the_average_over_episodes_is_below_the_bound():
    curriculum = Curriculum(solved_bits=0.5, average_episodes=2)
    assert not observe(curriculum, [0.0, 0.9, 0.0], [IGNORED, 1, 2], [0, 0, 0])  # one episode of two
    assert observe(curriculum, [0.0, 0.9, 0.0], [IGNORED, 1, 2], [0, 0, 0])
    assert curriculum.level == 1 and curriculum.last_average == pytest.approx(0.45)
    # What is left of level 0 does not count, good or bad.
    assert not observe(curriculum, [9.0, 9.0, 0.5], [1, 2, 1], [0, 0, 1])
    assert not observe(curriculum, [0.5, 0.5], [2, 1], [1, 1])
    assert not observe(curriculum, [0.5], [2], [1])  # 0.5 is not below 0.5
    assert curriculum.level == 1 and curriculum.last_average == 0.5
    assert observe(curriculum, [0.0, 0.0], [2, 2], [1, 1])  # a new average, without the old errors
    assert curriculum.level == 2


# Learning


def test_all_arms_of_one_core_start_as_truncated_bptt():
    nets = {}
    for arm in ARMS:
        experiment = copy.Experiment(small(arm=arm, hidden_size=6, batch_size=4))
        experiment.update()
        nets[arm] = {k: v for k, v in experiment.learner.net.state_dict().items() if not k.startswith("auxiliary")}
    for arm in ("dni", "dni_recent", "dni_aux", "sobolev", "bp_lambda"):
        for name, value in nets["none"].items():
            torch.testing.assert_close(nets[arm][name], value)
    for name, value in nets["timescales"].items():
        torch.testing.assert_close(nets["timescales_dni"][name], value)


def test_errors_are_in_bits():
    experiment = copy.Experiment(small(arm="none", learning_rate=1e-12, average_episodes=8))
    for parameter in experiment.learner.net["readout"].parameters():
        nn.init.zeros_(parameter)  # two symbols and the stop symbol are equally likely
    seen = [float(experiment.update()["train/bits"]) for _ in range(12)]
    assert {round(bits, 3) for bits in seen} <= {0.0, 1.585} and max(seen) > 0  # log2(3), where anything is predicted
    assert experiment.curriculum.last_average == pytest.approx(math.log2(3))


def test_seeds_read_other_episodes():
    first, same, other = (copy.Experiment(small(seed=seed)).streams.take(20) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, same.inputs) and not torch.equal(first.inputs, other.inputs)


def core_after_updates(arm, **settings):
    experiment = copy.Experiment(small(arm=arm, **settings))
    for _ in range(8):
        experiment.update()
    return nn.utils.parameters_to_vector(experiment.learner.core.parameters())


@pytest.mark.parametrize(
    ("arm", "without"),
    [
        ("dni", "none"),
        ("dni_recent", "dni"),
        ("dni_aux", "dni"),
        ("sobolev", "none"),
        ("bp_lambda", "none"),
        ("timescales", "none"),
        ("timescales_dni", "timescales"),
    ],
)
def test_every_arm_changes_what_the_core_learns(arm, without):
    found, plain = core_after_updates(arm), core_after_updates(without)
    assert found.shape != plain.shape or not torch.allclose(found, plain)


def test_lambda_is_that_of_the_run():
    assert not torch.allclose(
        core_after_updates("bp_lambda", lambda_=0.0), core_after_updates("bp_lambda", lambda_=1.0)
    )


def test_the_critic_stands_in_at_the_cuts_inside_a_window_of_two_levels(monkeypatch):
    found = core_after_updates("timescales_dni")
    unroll_in_ticks = dni_rl.MultiTimescaleCore.unroll_in_ticks
    monkeypatch.setattr(
        dni_rl.MultiTimescaleCore,
        "unroll_in_ticks",
        lambda self, *args, ticks, critic: unroll_in_ticks(self, *args, ticks=ticks, critic=None),
    )
    assert not torch.allclose(found, core_after_updates("timescales_dni"))


def test_the_critic_of_recent_inputs_reads_the_last_ones_across_windows(monkeypatch):
    experiment = copy.Experiment(small(arm="dni_recent", recent_steps=5))
    inputs, contexts, backward = [], [], dni_rl.backward
    monkeypatch.setattr(dni_rl, "backward", lambda *a, **k: contexts.append(k["context"]) or backward(*a, **k))
    for _ in range(4):
        inputs.append(experiment.batch.inputs)
        experiment.update()
    read = torch.cat(inputs)
    T = len(inputs[0])
    latest = contexts[-1][-1].unflatten(-1, (5, read.shape[-1] + 1))  # [B, n, D + 1]
    torch.testing.assert_close(latest[..., :-1], read[-5:].flip(0).transpose(0, 1))
    assert contexts[-1].shape[0] == T + 1 and latest[..., -1].all() and not contexts[0][0].any()


def test_the_auxiliary_task_aims_at_the_synthetic_gradients_of_the_next_window():
    learner = copy.Experiment(small(arm="dni_aux", warmup_updates=0)).learner
    for p in learner.critic.parameters():
        nn.init.normal_(p)
    T, inputs = 2, torch.randn(4, 4, 4)
    _, end = learner.core.unroll(inputs[:T], learner.state)
    targets = learner._later_synthetic_gradients(end, inputs[T:])
    state = learner.state
    for t in range(2 * T):
        _, state = learner.core(inputs[t], state)
        if t >= T:
            for target, expected in zip(targets, learner.critic.synthetic_gradient(state), strict=True):
                torch.testing.assert_close(target[t - T], expected)


@pytest.mark.parametrize("arm", ["none", "dni", "timescales"])
def test_the_state_is_carried_from_window_to_window(arm):
    experiment = copy.Experiment(small(arm=arm, learning_rate=1e-12))
    inputs, learner = [], experiment.learner
    state = learner.state
    for _ in range(3):
        inputs.append(experiment.batch.inputs)
        experiment.update()
    _, end = learner.core.unroll(torch.cat(inputs), state)
    for carried, expected in zip(learner.state, end, strict=True):
        torch.testing.assert_close(carried, expected)


def test_a_window_of_two_levels_spans_as_many_ticks_of_the_slow_one():
    assert small(arm="timescales", window=3, period=4).steps_per_update == 12
    assert small(arm="dni", window=3, period=4).steps_per_update == 3


# Program


@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_equals_one_that_never_stopped(arm, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    result = copy.run(small(arm=arm), whole, tensorboard=False)
    copy.run(small(arm=arm, num_steps=24), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "train/bits": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = copy.run(small(arm=arm), pieces, resume=True, tensorboard=False)
    assert without_seconds(resumed) == without_seconds(result) and rows(pieces) == rows(whole)
    assert resumed["seconds"] > 0 and resumed["solved_length"] >= 5  # levels did change
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]["net"] for folder in (whole, pieces)]
    assert all(torch.equal(saved[0][key], value) for key, value in saved[1].items())


def test_the_smoke_preset_runs_every_arm_and_writes_everything(tmp_path, capsys):
    arguments = ["--preset", "smoke", "--run-folder", str(tmp_path)]
    copy.main(arguments)
    shown = capsys.readouterr()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["arm"] for row in summary["cells"]] == list(ARMS) and summary["preset"] == "smoke"
    assert summary["cells"][0]["per_seed"]["0"] == 4 and summary["cells"][0]["published"] == 10  # copies one symbol
    assert "| dni | 4 |" in shown.out and "8 of 8 runs done" in shown.err
    folder = tmp_path / "dni-4-seed0"
    assert {"train/bits", "train/average_bits", "critic/cosine"} <= rows(folder)[-1].keys()
    assert json.loads((folder / "config.json").read_text()) == summary["configs"]["dni-4-seed0"]
    assert list(folder.glob("events.out.tfevents.*"))
    (folder / "metrics.jsonl").unlink()
    copy.main([*arguments, "--resume"])  # all of it is done
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and not (folder / "metrics.jsonl").exists()


def test_a_run_in_a_process_of_its_own_equals_one_in_this(tmp_path):
    settings = {key: value for key, value in SMALL.items() if key != "window"}
    matrix = common.members(copy.CopyConfig, ("dni@3",), (0,), settings)
    results = [
        common.run_members(copy.run, matrix, tmp_path / str(jobs), jobs=jobs, tensorboard=False) for jobs in (1, 2)
    ]
    for name, result in results[0].items():
        assert without_seconds(result) == without_seconds(results[1][name])


def test_the_summary_sets_cells_beside_the_baseline_and_the_published_figures():
    settings = {key: value for key, value in SMALL.items() if key != "window"}
    matrix = common.members(copy.CopyConfig, ("none@4", "dni@4"), (0, 1), settings)
    lengths = {"none-4-seed0": 5, "none-4-seed1": 7, "dni-4-seed0": 10, "dni-4-seed1": 11}
    results = {name: {"solved_length": length, "seconds": 2.0} for name, length in lengths.items()}
    none, dni = copy.summarize(matrix, results)["cells"]
    assert none["per_seed"] == {"0": 5, "1": 7} and (none["mean"], none["min"], none["max"]) == (6.0, 5, 7)
    assert none["std"] == pytest.approx(2**0.5) and none["published"] == 10 and none["ratio"] == 1.0
    assert dni["ratio"] == 1.75 and dni["published"] == 18 and dni["published_ratio"] == 1.8


def test_presets_state_the_papers_settings():
    paper = {key: value for key, value in copy.PRESETS["paper"].items() if key not in ("cells", "seeds", "arms")}
    config = copy.CopyConfig(**paper)
    assert (config.hidden_size, config.batch_size, config.learning_rate) == (256, 256, 7e-5)
    assert config.solved_bits == 0.15
    for name, preset in copy.PRESETS.items():
        settings = {key: value for key, value in preset.items() if key not in ("cells", "seeds", "jobs", "arms")}
        common.members(copy.CopyConfig, preset["cells"], preset["seeds"], settings, preset.get("arms"))
        assert name == "smoke" or len(preset["seeds"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "magic@2"], "arm: found 'magic', allowed none, dni"),
        (["--cells", "dni"], "cells: found 'dni', allowed ARM@WINDOW"),
        (["--cells", "dni@2", "dni@2"], "cells: found dni@2 dni@2, allowed one or more, each once"),
        (["--cells", "dni@2", "dni@02"], "cells: found dni@2 dni@2, allowed one or more, each once"),
        (["--task", "sort"], "task: found 'sort', allowed copy, repeat_copy"),
        (["--num-symbols", "1"], "num_symbols: found 1, allowed 2 or more"),
        (["--jobs", "0"], "jobs: found 0"),
        (["--cells", "bp_lambda@2", "--lambda", "2"], "lambda: found 2.0, allowed 0 to 1"),
        (["--cells", "bp_lambda@2", "--critic-hidden-sizes", "8"], "bp_lambda has a linear critic"),
        (["--cells", "bp_lambda@2", "--hidden-size", "512"], "batch_size: a trace for 16 sequences"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        copy.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_folder_with_another_run_is_refused(tmp_path):
    copy.run(small(num_steps=12), tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="continue it with --resume"):
        copy.run(small(num_steps=12), tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"other settings \(arm dni -> none\)"):
        copy.run(small(num_steps=12, arm="none"), tmp_path, resume=True, tensorboard=False)
