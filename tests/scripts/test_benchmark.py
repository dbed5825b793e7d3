"""The benchmark's arithmetic, and tiny forms of what it measures. How fast anything is, is no test."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

import dni_rl
from agents.train import Trainer
from benchmarks.gpu import CPU_FORM, Form, gpu, host_reads
from benchmarks.measuring import Ratio, _peak, in_turns, peak_bytes, tensor_bytes
from benchmarks.methods import DUE_EVERY, PLAIN, UNFUSED, comparable, methods
from benchmarks.overhead import StoredRollout, overhead, overhead_table, sequence_peak
from benchmarks.speed import REFERENCE, table, tmaze_contenders
from benchmarks.workers import train_speed
from scripts.benchmark import main

CPU = torch.device("cpu")
MATRIX = methods(4, num_envs=2, online_envs=2, rollout_length=64, device="cpu", threads=1)


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def _rows(text):
    """Rows of a Markdown table, by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {_cells(line)[0]: _cells(line)[1:] for line in lines[2:]}


def _block(time, address, size):
    return {"time": time, "Addr": address, "Bytes": size}


# Arithmetic


def test_the_speed_table_takes_ratios_within_rounds():
    speeds = {
        REFERENCE: [100.0, 200.0, 400.0],
        "PPO, 4 epochs, window 16": [500.0, 800.0, 1200.0],
        "PPO, 4 epochs, window 16, synthetic gradients": [400.0, 800.0, 600.0],
    }
    text, rows = table("minigrid", speeds)
    # 5, 4 and 3 times the reference in the same round, whose medians alone would also say 4; the last 4, 4 and 1.5
    assert [row["ratio_to_recurrent_ppo"] for row in rows] == [
        None,
        {"median": 4.0, "least": 3.0, "greatest": 5.0},
        {"median": 4.0, "least": 1.5, "greatest": 4.0},
    ]
    # of 0.8, 1 and 0.5
    assert [row["ratio_to_no_critic"] for row in rows] == [None, None, {"median": 0.8, "least": 0.5, "greatest": 1.0}]
    assert _rows(text)["PPO, 4 epochs, window 16"] == ["800 (500 to 1,200)", "4.00 (3.00 to 5.00)", "", ""]


def test_the_maze_is_timed_in_the_rollouts_that_it_is_learned_with_too():
    contenders = tmaze_contenders()
    plain = [name for name in contenders if "synthetic" not in name]
    assert plain == ["A2C, window 8, rollouts of 128", "A2C, window 8, rollouts of 8"] and len(contenders) == 8
    assert [contenders[name]() for name in plain] == [128 * 64, 8 * 64]


def test_a_ratio_is_the_median_of_those_within_rounds_and_not_the_ratio_of_medians():
    ratio = Ratio.of([1.0, 20.0, 300.0], [2.0, 10.0, 1000.0])  # 0.5, 2 and 0.3; that of the medians is 2
    assert (ratio.median, ratio.least, ratio.greatest) == (0.5, 0.3, 2.0)
    assert str(ratio) == "0.50 (0.30 to 2.00)"
    with pytest.raises(ValueError):
        Ratio.of([1.0], [1.0, 2.0])


def test_contenders_take_turns_and_the_warm_up_does_not_count():
    order = []

    def contender(name):
        order.append(name)
        return len(order)

    found = in_turns({"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=2, label="test")
    assert order == ["a", "b"] * 3
    assert found == {"a": [3, 5], "b": [4, 6]}


def test_the_peak_counts_blocks_alive_at_once_of_those_allocated_meanwhile():
    events = [
        _block(4, 1, -100),  # not in the order of time
        _block(1, 1, 100),
        _block(2, 9, -1000),  # was there before
        _block(3, 2, 50),
        _block(5, 3, 60),
    ]
    assert _peak(events) == 150
    assert _peak([]) == 0


def test_peak_memory_of_known_tensors():
    def work():
        first = torch.empty(3 * 2**20, dtype=torch.uint8)
        del first
        return [torch.empty(2**20, dtype=torch.uint8) for _ in range(2)]

    before = torch.empty(2**22, dtype=torch.uint8)
    found = peak_bytes(work, CPU)
    assert found == pytest.approx(3 * 2**20, abs=1024)
    assert before.numel() == 2**22


def test_shared_storage_is_counted_once():
    a = torch.zeros(100)
    assert tensor_bytes({"a": a, "views": [a[:10], a.detach()], "other": (torch.zeros(3, dtype=torch.int64), 5)}) == 424


# What is compared


def test_baselines_differ_in_the_method_alone_and_every_kind_of_configuration_is_there():
    for method in MATRIX.values():
        baseline = MATRIX[method.baseline]
        assert comparable(method, baseline)
        plain = replace(method.config, critic=baseline.config.critic)
        same_window = replace(
            plain, algorithm=replace(plain.algorithm, bptt_horizon=baseline.config.algorithm.bptt_horizon)
        )
        assert same_window == baseline.config
        assert baseline.config.critic.kind == "none"
    kinds = {method.config.critic.kind for method in MATRIX.values()}
    assert kinds == {"none", "dni", "cdni", "dni_aux", "loss_critic", "sobolev", "bp_lambda", "rtrl"}
    assert not comparable(MATRIX["bp_lambda"], replace(MATRIX[PLAIN], config=MATRIX["rtrl"].config))


@pytest.mark.parametrize(
    ("name", "interval", "looks"),
    [
        ("dni", 8, DUE_EVERY // 8),
        ("dni, one target, every second update", 16, DUE_EVERY // 2 // 16),
        ("dni, one target, every fourth update", 16, DUE_EVERY // 4 // 16),
    ],
)
def test_every_turn_of_the_overhead_benchmark_looks_at_the_yardstick_as_often_as_training(
    monkeypatch, name, interval, looks
):
    stored, observed = StoredRollout(MATRIX[name].config), []
    monkeypatch.setattr(
        dni_rl.GradientCritic, "observe_window", lambda self, gradient, stands_for=1: observed.append(stands_for)
    )
    turn = [interval] * looks
    stored.seconds_per_update()
    assert observed == turn
    stored.seconds_per_update()
    assert observed == [*turn, *turn]
    stored.peak_bytes()  # the most that an update takes, so it is one with the yardstick
    assert observed == [*turn, *turn, interval]


def test_memory_of_windows_does_not_depend_on_the_length_of_the_sequence_and_that_of_full_bptt_does():
    peaks = {
        kind: [sequence_peak(kind, length, 16, 2, CPU) for length in (64, 256)] for kind in ("none", "dni", "full")
    }
    for kind in ("none", "dni"):
        assert peaks[kind][1] == pytest.approx(peaks[kind][0], rel=0.02), kind
    assert peaks["full"][1] > 2 * peaks["full"][0]
    # those two have other kernels, of which the fused one of "none" keeps more than a small critic takes
    assert peaks["full"][0] > max(peaks["none"][0], peaks["dni"][0])


@pytest.mark.parametrize("name", list(MATRIX))
def test_an_update_reads_no_value_on_the_host_but_what_the_cpu_checks_of_actions(name, monkeypatch):
    """On a device each read would be a wait. What is CPU only is the fused kernel, the first windows' look at what reads their start, and
    two reads per step that check actions."""
    monkeypatch.setattr("dni_rl.cores.gated._fused_is_possible", lambda *_: False)
    monkeypatch.setattr("dni_rl.critics.ErrorCritic.start_is_due", lambda *_: False)
    config = MATRIX[name].config
    trainer = Trainer(config)
    trainer.update()
    rollout = trainer.actor.rollout
    assert host_reads(lambda: trainer.learner.update(rollout), CPU) == 0
    assert host_reads(trainer.update, CPU) == 2 * config.algorithm.rollout_length


def test_host_reads_are_found():
    x = torch.ones(3)
    assert host_reads(lambda: (x.sum().item(), bool(x.any()), x + 1), CPU) == 2


# The commands


@pytest.fixture
def short(monkeypatch):
    """Rollouts of two windows, for all methods."""
    monkeypatch.setattr("benchmarks.methods.PERIODS", (1, 2))
    monkeypatch.setattr("benchmarks.gpu.SPEED_HORIZON", 16)


def test_overhead_measures_every_method(capsys, short):
    sizes = {"num_envs": 1, "online_envs": 1, "rollout_length": 16}
    results = overhead([4], 1, CPU, lengths=(64, 128), **sizes)
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) == {*MATRIX, UNFUSED}
    for row in rows.values():
        assert row["time_ratio"]["median"] == pytest.approx(row["seconds"][0] / rows[row["baseline"]]["seconds"][0])
        assert row["memory_ratio"] == pytest.approx(row["peak_bytes"] / rows[row["baseline"]]["peak_bytes"])
        assert 1000 < row["peak_bytes"] < 10**7
    assert "time_ratio_to_plain_lstm" not in rows["bp_lambda"]  # rollouts of another size
    assert rows["rtrl"]["time_ratio_to_plain_lstm"]["median"] == pytest.approx(
        rows["rtrl"]["seconds"][0] / rows[PLAIN]["seconds"][0]
    )
    assert results["sequences"]["full"]["128"] > results["sequences"]["full"]["64"]
    printed = _rows(capsys.readouterr().out)
    assert printed["rtrl"][1] == "none, elementwise_lstm"
    assert {"machine", "settings"} <= set(results)
    assert results["machine"]["torch"] == torch.__version__


def test_overhead_of_one_method_is_measured_beside_its_baselines(capsys, short):
    sizes = {"num_envs": 1, "online_envs": 1, "rollout_length": 16}
    results = overhead([4], 1, CPU, only=["rtrl"], **sizes)
    assert [row["method"] for row in results["rows"]] == [PLAIN, "none, elementwise_lstm", "rtrl"]
    assert "sequences" not in results
    capsys.readouterr()
    assert main(["overhead", "--device", "cpu", "--sizes", "4", "--methods", "nothing"]) == 2
    message = capsys.readouterr().err
    assert "--methods: found 'nothing'" in message and "'rtrl'" in message


def test_a_trace_that_would_not_fit_is_a_row_and_no_failure():
    with pytest.raises(ValueError) as error:
        StoredRollout(
            methods(300, num_envs=1, online_envs=3, rollout_length=64, device="cpu", threads=1)["bp_lambda"].config
        )
    text = overhead_table([{"method": "bp_lambda", "refused": str(error.value)}])
    assert _rows(text)["bp_lambda"][0].startswith("refused: batch_size: a trace for 3 sequences")


def test_gpu_runs_its_small_form_without_a_device(capsys, short):
    form = Form(
        hidden_size=4,
        num_envs=1,
        online_envs=1,
        speed_envs=(2,),
        seconds=0.0,
        learning_steps=8192,
        learning_seconds=0.2,
    )
    results = gpu(form, 1, CPU)
    rows = {row["run"]: row for row in results["rows"]}
    assert set(rows) == set(MATRIX)
    for name, row in rows.items():
        learner = [turn["learning"] for turn in row["turns"]]
        base = [turn["learning"] for turn in rows[row["baseline"]]["turns"]]
        assert row["learner_to_baseline"]["median"] == pytest.approx(base[0] / learner[0])
        assert row["steps_per_second"] > 0 and row["learner_to_lstm_alone"]["median"] > 0
        assert ("learned" in row) == (MATRIX[name].kind is not None)
    assert 0.0 <= rows["none"]["learned"]["success"] <= 1.0
    assert [(row["run"], row["num_envs"], row["goal"]) for row in results["speed"]] == [
        ("none, window 16", 2, 1_000_000),
        ("dni, window 16", 2, 1_000_000),
    ]
    assert results["seconds"] < form.limit_seconds
    printed = _rows(capsys.readouterr().out)
    assert set(printed) == {*MATRIX, "none, window 16", "dni, window 16"}


def test_the_command_writes_json_and_refuses_a_device_that_is_not_there(tmp_path, capsys, monkeypatch, on_disk):
    called = {}

    def battery(form, rounds, device, threads):
        called.update(form=form, rounds=rounds, device=device, threads=threads)
        return {"rows": []}

    monkeypatch.setattr("scripts.benchmark.gpu", battery)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--rounds", "7", "--output", str(tmp_path / "new" / "gpu.json")]) == 0
    assert called == {"form": CPU_FORM, "rounds": 7, "device": CPU, "threads": 1}
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == {"rows": []}
    assert on_disk == ["gpu.json"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["overhead", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: --device: found 'cuda'")
    assert error.endswith("set --device cpu\n") and len(error.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("scripts.benchmark.gpu", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        main(["gpu", "--output", "/proc/x/gpu.json"])
    assert "--output: found /proc/x, which cannot be made or written" in capsys.readouterr().err


def test_a_device_is_asked_for_its_own_counters_and_waits(monkeypatch):
    """The branch that needs a device, with its calls replaced: what they are asked, in which order, and what is made of it."""
    calls = []

    def fake(name, result=None):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *arguments: calls.append(name) or result)

    fake("synchronize")
    fake("reset_peak_memory_stats")
    fake("memory_allocated", 100)
    fake("max_memory_allocated", 350)
    assert peak_bytes(lambda: calls.append("work"), torch.device("cuda")) == 250
    wanted = [
        "synchronize",
        "reset_peak_memory_stats",
        "memory_allocated",
        "work",
        "synchronize",
        "max_memory_allocated",
    ]
    assert calls == wanted

    modes = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)

    def work():
        assert modes == ["warn"]
        for message in ["called a synchronizing CUDA operation (Triggered internally)"] * 3 + ["something else"]:
            warnings.warn(message, stacklevel=1)

    assert host_reads(work, torch.device("cuda")) == 3
    assert modes == ["warn", "default"]


def test_a_device_with_little_memory_gets_fewer_environments(monkeypatch, capsys):
    tried = []

    def compare(matrix, form, rounds, device):
        tried.append((form.num_envs, matrix[PLAIN].config.env.num_envs))
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return [{"run": name, "baseline": name} for name in matrix]

    monkeypatch.setattr("benchmarks.gpu._compare", compare)
    monkeypatch.setattr("benchmarks.gpu._gridworld_speed", lambda *_: [])
    monkeypatch.setattr("benchmarks.gpu.learn_shortly", lambda *_: {"steps": 1, "seconds": 1.0, "success": 1.0})
    monkeypatch.setattr("benchmarks.gpu.gpu_table", lambda _: "")
    results = gpu(replace(CPU_FORM, num_envs=8), 1, CPU)
    assert tried == [(8, 8), (4, 4), (2, 2)]
    assert results["settings"]["num_envs"] == 2
    assert "out of memory; once more with 2 environments" in capsys.readouterr().err


def test_workers_are_measured_together_and_apart(tmp_path, capsys):
    output = tmp_path / "workers.json"
    options = ["--config", "configs/tmaze.yaml", "--env.num_envs", "8", "--run.log_every_steps", "64"]
    assert main(["workers", *options, "--steps", "128", "--rounds", "1", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert [(row["run"], row["processes"]) for row in results["rows"]] == [
        ("one process", 1),
        ("together", 2),
        ("apart", 2),
    ]
    assert all(row["steps_per_second"] > 0 and len(row["measurements"]) == 1 for row in results["rows"])
    assert results["settings"]["options"] == options
    assert "| together | 2 |" in capsys.readouterr().out

    assert main(["workers", "--steps", "128", "--rounds", "1", "--env.num_envs", "0"]) == 2
    assert capsys.readouterr().err.startswith("benchmark.py: train.py: env.num_envs: found 0")
    with pytest.raises(RuntimeError, match=r"^train.py: critic.kind: found 'bp_lambda' in 2 processes"):
        train_speed(["--config", "configs/kinds/bp_lambda.yaml"], 2, together=True, steps=10_000)
    with pytest.raises(SystemExit):
        main(["gpu", "--env.num_envs", "8"])
