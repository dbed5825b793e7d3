"""Two networks at two speeds: the counts by hand, what each arm sends from B to A, every arm, resuming."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dni_rl import data
from dni_rl.critics import CriticFit
from dni_rl.experiments import common, images, timescales
from dni_rl.experiments.timescales import ARMS

SMALL = {
    "dataset": "synthetic",
    "window": 2,
    "hidden_size": 6,
    "message_size": 4,
    "critic_hidden_sizes": (4,),
    "batch_size": 8,
    "learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    "num_steps": 48,
    "log_every_steps": 12,
    "eval_every_steps": 12,
    "eval_windows": 2,
    "checkpoint_every_steps": 24,
}


def small(**settings):
    return timescales.TimescalesConfig(**{**SMALL, **settings})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(result):
    return {**result, "seconds": 0.0, "curve": [{**point, "seconds": 0.0} for point in result["curve"]]}


# Streams


def test_counts_of_two_streams_by_hand():
    ticks = [[[3, 0], [4, 3], [3, 3]], [[1, 2], [7, 4], [9, 6]], [[3, 3], [2, 3], [5, 3]]]  # tick, step, stream
    found = timescales.counts(torch.tensor(ticks))
    assert found.odd.tolist() == [[2, 2], [3, 0], [2, 3]]
    assert found.threes.tolist() == [[2, 2], [0, 0], [1, 3]]
    assert found.all_threes.tolist() == [3, 5]


def test_windows_show_the_digits_that_their_labels_say():
    count = 50
    values = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    digits = data.Images(values, torch.arange(count) % 10)
    streams = timescales.Streams(digits, 3, 4, key=1, device="cpu")
    pixels, labels = streams.window(5)
    assert pixels.shape == (4, 4, 3, 4) and labels.shape == (4, 4, 3)
    shown = ((pixels[..., 0] + 0.5) * 255).round().long()
    assert torch.equal(shown % 10, labels) and len(shown.unique()) > 20
    assert all(torch.equal(a, b) for a, b in zip(streams.window(5), (pixels, labels), strict=True))
    others = timescales.Streams(digits, 3, 4, key=2, device="cpu")
    for _, other in (streams.window(6), others.window(4), others.window(5)):
        assert not torch.equal(labels, other)


# What passes between the networks


class Recorder:
    """Stands for an optimiser: keeps the gradients of every step, and leaves the parameters as they are."""

    def __init__(self, module):
        self.module, self.steps = module, []

    def zero_grad(self):
        self.module.zero_grad()

    def step(self):
        self.steps.append({name: p.grad for name, p in self.module.named_parameters() if p.grad is not None})
        self.module.zero_grad()
        with torch.no_grad():
            for p in self.module.parameters():
                p.add_(0.0)  # an optimiser's step writes to its parameters, which interfaces take as a sign of it

    def total(self):
        names = {name for step in self.steps for name in step}
        return {name: sum(step[name] for step in self.steps if name in step) for name in names}


class Oracle:
    """Stands for a critic: knows the gradient of every message, tick by tick."""

    def __init__(self, gradients):
        self.gradients, self.target = list(gradients), None

    def synthetic_gradient(self, state, context=None):
        return (self.gradients.pop(0),)

    def fit(self, state, target, context=None):
        (self.target,) = target
        zero = torch.zeros(())
        return CriticFit(*[zero] * 6)


def recorded(arm, **settings):
    """An experiment in float64 that does not move, and its recorders."""
    experiment = timescales.Experiment(small(arm=arm, window=3, **settings))
    experiment.a.double()
    experiment.b.double()
    window = experiment.train_streams.window

    def in_float64(number):
        pixels, labels = window(number)
        return pixels.double(), labels

    experiment.train_streams.window = in_float64
    experiment.optimizers |= {"a": Recorder(experiment.a), "b": Recorder(experiment.b)}
    return experiment, experiment.optimizers["a"], experiment.optimizers["b"]


def by_hand():
    """Losses of the whole system, [T] of A and one of B, and the messages, from one graph."""
    experiment, *_ = recorded("backprop")
    pixels, labels = experiment.train_streams.window(0)
    target = timescales.counts(labels)
    losses, messages = [], []
    for k in range(3):
        logits, message, _ = experiment.a(pixels[k], experiment.a.core.initial_state(8))
        losses.append(F.cross_entropy(logits, target.odd[k]))
        messages.append(message)
    logits, _ = experiment.b(torch.stack(messages), experiment.b.core.initial_state(8))
    return experiment, losses, messages, F.cross_entropy(logits, target.all_threes)


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return {name: g for (name, _), g in zip(module.named_parameters(), found, strict=True) if g is not None}


def assert_equal(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=1e-10, atol=1e-13)


def test_the_locked_arm_is_one_graph_updated_once():
    hand, losses, _, loss_b = by_hand()
    experiment, a, b = recorded("backprop")
    experiment.update()
    assert len(a.steps) == len(b.steps) == 1
    assert_equal(a.total(), gradients(sum(losses) + loss_b, hand.a))
    assert_equal(b.total(), gradients(loss_b, hand.b))


def test_without_gradient_from_b_network_a_learns_its_own_task_alone():
    hand, losses, _, loss_b = by_hand()
    experiment, a, b = recorded("none")
    experiment.update()
    assert len(a.steps) == 3 and len(b.steps) == 1
    for step, loss in zip(a.steps, losses, strict=True):
        assert_equal(step, gradients(loss, hand.a))
        assert not any(name.startswith("message") for name in step)
    assert_equal(b.total(), gradients(loss_b, hand.b))


def test_an_oracle_makes_the_decoupled_system_equal_to_the_locked_one():
    hand, losses, messages, loss_b = by_hand()
    true = [8 * g for g in torch.autograd.grad(loss_b, messages, retain_graph=True)]  # of one stream, not of the mean
    experiment, a, b = recorded("dni")
    oracle = Oracle(true)
    experiment.interface = timescales.dni_rl.Interface(oracle)
    experiment.update()
    for step, loss, message, g in zip(a.steps, losses, messages, true, strict=True):
        assert_equal(step, gradients(loss + (message * g).sum() / 8, hand.a))
    assert_equal(a.total(), gradients(sum(losses) + loss_b, hand.a))
    assert_equal(b.total(), gradients(loss_b, hand.b))
    torch.testing.assert_close(oracle.target, torch.cat(true), rtol=1e-10, atol=1e-13)  # what the critic learns


def test_the_critic_is_told_how_many_threes_the_message_is_about():
    experiment, *_ = recorded("cdni")
    seen = []
    experiment.critic.double()
    synthetic_gradient = experiment.critic.synthetic_gradient
    experiment.critic.synthetic_gradient = lambda state, context: (
        seen.append(context) or synthetic_gradient(state, context)
    )
    _, labels = experiment.train_streams.window(0)
    experiment.update()
    assert torch.stack(seen).argmax(-1).tolist() == (labels == 3).sum(1).tolist()
    assert torch.stack(seen).sum(-1).eq(1).all()


def parameters_after(updates, arm, **settings):
    experiment = timescales.Experiment(small(arm=arm, **settings))
    for _ in range(updates):
        experiment.update()
    return nn.utils.parameters_to_vector(experiment.a.parameters())


def test_all_decoupled_arms_start_alike_and_then_part():
    first = {arm: parameters_after(1, arm) for arm in ARMS}
    for arm in ("dni", "cdni"):
        assert torch.equal(first[arm], first["none"])  # the first synthetic gradient is zero
    assert not torch.allclose(first["backprop"], first["none"])
    later = {arm: parameters_after(4, arm) for arm in ("none", "dni", "cdni")}
    assert not torch.allclose(later["dni"], later["none"]) and not torch.allclose(later["cdni"], later["dni"])
    assert torch.equal(parameters_after(4, "dni", warmup_updates=4), later["none"])


@pytest.mark.parametrize("arm", ["dni", "cdni"])
def test_critics_have_the_settings_of_the_run(arm):
    settings = {"critic_hidden_sizes": (5,), "critic_scale": 0.25, "warmup_updates": 3, "critic_learning_rate": 0.125}
    experiment = timescales.Experiment(small(arm=arm, **settings))
    critic = experiment.critic
    assert (critic.scale, critic.warmup_updates) == (0.25, 3) and any(5 in p.shape for p in critic.parameters())
    assert experiment.optimizers["critic"].param_groups[0]["lr"] == 0.125


def test_seeds_learn_from_other_streams_and_are_tested_on_the_same():
    first, other = (timescales.Experiment(small(seed=seed)) for seed in (0, 1))
    assert torch.equal(first.test_streams.window(0)[0], other.test_streams.window(0)[0])
    assert not torch.equal(first.train_streams.window(0)[0], other.train_streams.window(0)[0])


def test_scores_are_means_over_the_last_tenth_of_training():
    experiment = timescales.Experiment(small())
    experiment.curve = [
        {"step": step, "a_error": error, "b_error": 2 * error} for step, error in ((90, 0.5), (95, 0.375), (100, 0.125))
    ]
    result = experiment.result()
    assert (result["a_error"], result["b_error"]) == (0.25, 0.5)


@pytest.mark.parametrize("arm", ["backprop", "dni"])
@pytest.mark.parametrize("carry_state", [False, True])
def test_states_are_empty_at_every_start_or_carried_for_ever(arm, carry_state):
    experiment = timescales.Experiment(small(arm=arm, carry_state=carry_state, learning_rate=1e-12))
    state_a, state_b = experiment.states["a"], experiment.states["b"]
    empty_a, empty_b = state_a, state_b
    for number in range(3):
        pixels, _ = experiment.train_streams.window(number)
        experiment.update()
        messages = []
        for k in range(2):
            _, message, state_a = experiment.a(pixels[k], state_a)
            messages.append(message)
        _, state_b = experiment.b(torch.stack(messages), state_b)
        expected = (*state_a, *state_b) if carry_state else (*empty_a, *empty_b)
        for found, value in zip((*experiment.states["a"], *experiment.states["b"]), expected, strict=True):
            torch.testing.assert_close(found, value)
            assert not found.requires_grad


@pytest.mark.parametrize("carry_state", [False, True])
def test_errors_match_a_second_computation_digit_by_digit(carry_state):
    settings = {"hidden_size": 16, "message_size": 8, "learning_rate": 3e-2, "carry_state": carry_state}
    experiment = timescales.Experiment(small(arm="backprop", eval_windows=3, **settings))
    for _ in range(100):
        experiment.update()
    before = {name: value.clone() for name, value in experiment.a.state_dict().items()}
    found = experiment.evaluate()
    assert experiment.a.training and experiment.b.training
    assert all(torch.equal(value, before[name]) for name, value in experiment.a.state_dict().items())
    test = images.load("synthetic", "test")
    a, b = experiment.a.eval(), experiment.b.eval()
    wrong_a = wrong_b = 0
    for stream in range(8):
        memory_a = memory_b = None
        for number in range(3):
            pixels, labels = experiment.test_streams.window(number)
            for k in range(2):
                if not carry_state:
                    memory_a = None
                    memory_b = memory_b if k else None
                for t in range(2):
                    digit = pixels[k, t, stream]
                    assert (images.pixels(test.images[test.labels == labels[k, t, stream]]) == digit).all(1).any()
                    features = a.encoder(digit.unsqueeze(0))
                    memory_a = a.core(features, memory_a or a.core.initial_state(1))[1]
                _, memory_b = b.core(a.message(memory_a[0]), memory_b or b.core.initial_state(1))
                wrong_a += int(a.readout(memory_a[0]).argmax()) != sum(x % 2 for x in labels[k, :, stream].tolist())
            threes = labels[:, :, stream].flatten().tolist().count(3)
            wrong_b += int(b.readout(memory_b[0]).argmax()) != threes
    assert found == (wrong_a / 48, wrong_b / 24) and 0 < wrong_a < 24 and 0 < wrong_b < 12


# Program


@pytest.mark.parametrize("settings", [*({"arm": arm} for arm in ARMS), {"arm": "dni", "carry_state": True}])
def test_a_resumed_run_equals_one_that_never_stopped(settings, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    result = timescales.run(small(**settings), whole, tensorboard=False)
    timescales.run(small(**settings, num_steps=24), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "a/loss": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = timescales.run(small(**settings), pieces, resume=True, tensorboard=False)
    assert without_seconds(resumed) == without_seconds(result) and rows(pieces) == rows(whole)
    assert [point["step"] for point in resumed["curve"]] == [12, 24, 36, 48]
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, pieces)]
    for network in ("a", "b"):
        assert all(torch.equal(saved[0][network][key], value) for key, value in saved[1][network].items())


def test_the_smoke_preset_runs_every_arm_and_writes_everything(tmp_path, capsys):
    arguments = ["--preset", "smoke", "--run-folder", str(tmp_path)]
    timescales.main(arguments)
    shown = capsys.readouterr()
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {row["arm"]: row for row in summary["cells"]}
    assert list(found) == list(ARMS) and summary["preset"] == "smoke" and summary["dataset"] == "synthetic"
    # No 3 among four digits: 0.66. Where A hears of B's error it learns to write of 3s, otherwise B has to guess at odd ones.
    assert found["backprop"]["b_error"]["mean"] < 0.15 and found["cdni"]["b_error"]["mean"] < 0.15
    assert found["none"]["b_error"]["mean"] > 0.25
    assert all(row["a_error"]["mean"] < 0.25 and row["published_b_error"] is None for row in found.values())
    assert found["backprop"]["a_steps_ratio"] == 1.0
    assert "| cdni | 2 |" in shown.out and "steps ratio of A" in shown.out and "4 of 4 runs done" in shown.err
    folder = tmp_path / "cdni-2-seed0"
    assert {"a/loss", "a/error", "b/loss", "b/error", "critic/cosine"} <= rows(folder)[0].keys()
    assert [row["step"] for row in rows(folder) if "test/b_error" in row] == list(range(80, 641, 80))
    assert json.loads((folder / "config.json").read_text()) == summary["configs"]["cdni-2-seed0"]
    assert list(folder.glob("events.out.tfevents.*"))
    (folder / "metrics.jsonl").unlink()
    timescales.main([*arguments, "--resume"])  # all of it is done
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and not (folder / "metrics.jsonl").exists()


def results_of(curves):
    return {
        name: {
            "a_error": curve[-1]["a_error"],
            "b_error": curve[-1]["b_error"],
            "seconds": 2.0,
            "curve": curve,
        }
        for name, curve in curves.items()
    }


def curve(*errors):
    return [{"step": 100 * (i + 1), "a_error": a, "b_error": b} for i, (a, b) in enumerate(errors)]


def test_the_summary_compares_steps_to_the_locked_systems_error():
    settings = {key: value for key, value in SMALL.items() if key not in ("window", "dataset")}
    matrix = common.members(timescales.TimescalesConfig, ("backprop@4", "dni@4", "none@4"), (0, 1), settings)
    curves = {
        "backprop-4-seed0": curve((0.5, 0.9), (0.25, 0.5), (0.125, 0.25)),
        "backprop-4-seed1": curve((0.5, 0.9), (0.375, 0.5), (0.25, 0.25)),  # the worst final error of A
        "dni-4-seed0": curve((0.25, 0.5), (0.125, 0.125), (0.0, 0.0)),
        "dni-4-seed1": curve((0.5, 0.5), (0.0, 0.25), (0.0, 0.25)),
        "none-4-seed0": curve((0.25, 0.7), (0.125, 0.7), (0.0, 0.7)),
        "none-4-seed1": curve((0.25, 0.7), (0.125, 0.2), (0.0, 0.7)),
    }
    summary = timescales.summarize(matrix, results_of(curves))
    locked, dni, none = summary["cells"]
    assert locked["a_error"]["per_seed"] == {"0": 0.125, "1": 0.25} and locked["a_error"]["mean"] == 0.1875
    assert locked["a_steps_ratio"] == locked["b_steps_ratio"] == 1.0
    assert dni["a_steps_ratio"] == pytest.approx((100 + 150) / (200 + 300))
    assert dni["b_steps_ratio"] == pytest.approx((200 - 100 / 3 + 200) / (300 + 300))
    assert none["a_steps_ratio"] == 0.4 and none["b_steps_ratio"] is None  # one seed never got there
    assert [row["published_b_error"] for row in summary["cells"]] == [0.305, 0.33, 0.65]
    assert [row["published_a_steps_ratio"] for row in summary["cells"]] == [None, 0.5, None]
    assert "| under 0.5 |" in timescales.table(summary)
    alone = timescales.summarize(matrix[1:2], results_of(curves))["cells"]
    assert alone[0]["a_steps_ratio"] is None and alone[0]["b_error"]["mean"] == 0.0


def test_presets_state_the_papers_settings():
    config = timescales.TimescalesConfig()
    assert (config.window, config.hidden_size, config.dataset) == (4, 256, "mnist")
    for name, preset in timescales.PRESETS.items():
        settings = {key: value for key, value in preset.items() if key not in ("cells", "seeds", "jobs", "arms")}
        matrix = common.members(timescales.TimescalesConfig, preset["cells"], preset["seeds"], settings)
        assert {member.cell.arm for member in matrix} == set(ARMS)
        assert name == "smoke" or len(preset["seeds"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "magic@2"], "arm: found 'magic', allowed backprop, none, dni, cdni"),
        (["--dataset", "cifar10"], "dataset: found 'cifar10', allowed mnist, fashion_mnist, synthetic"),
        (["--batch-size", "1"], "batch_size: found 1, allowed 2 or more"),
        (["--eval-windows", "0"], "eval_windows: found 0, allowed 1 or more"),
        (["--learning-rate", "0"], "learning_rate: found 0.0, allowed above 0"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        timescales.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_folder_with_another_run_is_refused(tmp_path):
    timescales.run(small(num_steps=12), tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="continue it with --resume"):
        timescales.run(small(num_steps=12), tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"other settings \(arm dni -> none\)"):
        timescales.run(small(num_steps=12, arm="none"), tmp_path, resume=True, tensorboard=False)


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    images.load.cache_clear()
    with pytest.raises(SystemExit):
        timescales.main(["--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert "nowhere: no such folder" in capsys.readouterr().err
