"""Images row by row: what a window sends back, every arm, resuming."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dni_rl
from dni_rl import data
from dni_rl.experiments import common, images, sequential_mnist
from dni_rl.experiments.sequential_mnist import ARMS

SMALL = {
    "dataset": "synthetic",
    "window": 3,  # of 8 rows: the last window has 2
    "hidden_size": 5,
    "critic_hidden_sizes": (4,),
    "batch_size": 4,
    "learning_rate": 1e-2,
    "critic_learning_rate": 1e-2,
    "warmup_updates": 2,
    "num_steps": 8,
    "log_every_steps": 2,
    "eval_every_steps": 2,
    "checkpoint_every_steps": 4,
}


def small(**settings):
    if settings.get("arm") == "bp_lambda":
        settings |= {"critic_hidden_sizes": ()}
    return sequential_mnist.SequentialMnistConfig(**{**SMALL, **settings})


def rows_of_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(result):
    return {**result, "seconds": 0.0, "curve": [{**point, "seconds": 0.0} for point in result["curve"]]}


# Gradients


def recorded(**settings):
    """An experiment in float64 whose net does not move, but keeps its gradients in `.grad`."""
    experiment = sequential_mnist.Experiment(small(max_gradient_norm=None, **settings))
    experiment.net.double()
    if experiment.critic is not None:
        experiment.critic.double()
    experiment.optimizer = torch.optim.SGD(experiment.net.parameters(), 0.0)
    pixels, labels = experiment.batches[0]
    experiment.batches = {0: (pixels.double(), labels)}
    return experiment


def whole(experiment):
    """Mean loss of the batch and the [8] states (h, c) before every row, of one graph; the state as leaves."""
    pixels, labels = experiment.batches[0]
    state, states = experiment.core.initial_state(4), []
    for row in pixels.view(4, 8, 8).unbind(1):
        # views: what reaches c_t by way of h_t, the output of the same row, is no part of the gradient of c_t as a state
        state = dni_rl.cut(state) if not states else tuple(s.view_as(s) for s in state)
        states.append(state)
        output, state = experiment.core(row, state)
    return F.cross_entropy(experiment.net["readout"](output), labels), states


def gradients(experiment):
    return {name: p.grad for name, p in experiment.net.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def full_gradients(experiment):
    loss, _ = whole(experiment)
    names = dict(experiment.net.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def test_rows_are_read_from_top_to_bottom():
    sequence = sequential_mnist.as_rows(torch.arange(12.0).view(2, 6), 3)
    assert sequence.tolist() == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]


def test_a_window_as_long_as_the_image_is_full_backpropagation():
    experiment = recorded(arm="none", window=8)
    experiment.update()
    assert_equal(gradients(experiment), full_gradients(experiment))


def test_a_short_window_is_truncated_to_its_last_rows():
    experiment = recorded(arm="none", window=3)
    experiment.update()
    pixels, labels = experiment.batches[0]
    inputs = pixels.view(4, 8, 8).transpose(0, 1)
    with torch.no_grad():
        _, state = experiment.core.unroll(inputs[:6], experiment.core.initial_state(4))
    outputs, _ = experiment.core.unroll(inputs[6:], tuple(s.detach() for s in state))
    loss = F.cross_entropy(experiment.net["readout"](outputs[-1]), labels)
    names = dict(experiment.net.named_parameters())
    expected = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    assert_equal(gradients(experiment), expected)
    full = full_gradients(experiment)["core.rnn.weight_hh_l0"]
    assert not torch.allclose(expected["core.rnn.weight_hh_l0"], full, rtol=1e-2)


@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("arm", ["dni", "cdni", "sobolev", "bp_lambda"])
def test_an_oracle_makes_every_arm_and_window_full_backpropagation(arm, window, monkeypatch):
    experiment = recorded(arm=arm, window=window)
    loss, states = whole(experiment)
    h, c = (
        torch.autograd.grad(loss, [s[i] for s in states], retain_graph=True, allow_unused=True, materialize_grads=True)
        for i in (0, 1)
    )
    ends = iter(range(window, 8 + window, window))
    seen = []

    def synthetic_gradient(state, context=None, alive=None):
        t = min(next(ends), 8)
        if t == 8:
            assert alive is not None and not alive.any()  # nothing lies beyond the last row
            return tuple(torch.zeros_like(s) for s in state)
        assert alive is None
        torch.testing.assert_close(state[1], states[t][1])  # the net has not moved in between
        seen.append(context)
        return 4 * h[t], 4 * c[t]  # of one image, not of the mean

    monkeypatch.setattr(experiment.critic, "synthetic_gradient", synthetic_gradient)
    experiment.update()
    assert_equal(gradients(experiment), full_gradients(experiment))
    assert next(ends, None) is None
    for context in seen:
        if arm == "cdni":
            assert context.argmax(-1).equal(experiment.batches[0][1]) and context.sum(-1).eq(1).all()
        else:
            assert context is None


def test_traces_start_anew_with_every_batch_and_run_through_its_windows(monkeypatch):
    experiment = sequential_mnist.Experiment(small(arm="bp_lambda", window=4))
    given = []
    backward = dni_rl.bp_lambda_backward

    def spy(losses, *, trace, **rest):
        given.append(trace)
        return backward(losses, trace=trace, **rest)

    monkeypatch.setattr(dni_rl, "bp_lambda_backward", spy)
    experiment.update()
    experiment.update()
    assert [bool(trace.any()) for trace in given] == [False, True, False, True]


def net_after(updates, arm, **settings):
    experiment = sequential_mnist.Experiment(small(arm=arm, **settings))
    for _ in range(updates):
        experiment.update()
    return nn.utils.parameters_to_vector(experiment.net.parameters())


def test_arms_start_as_truncated_backpropagation_and_then_part():
    plain = {updates: net_after(updates, "none") for updates in (1, 6)}
    assert torch.equal(net_after(1, "dni", warmup_updates=3), plain[1])
    assert torch.equal(net_after(6, "dni", warmup_updates=1000), plain[6])
    later = {arm: net_after(6, arm) for arm in ARMS}
    for i, arm in enumerate(ARMS):
        assert not any(torch.allclose(later[arm], later[other]) for other in ARMS[:i])


@pytest.mark.parametrize("arm", ARMS[1:])
def test_critics_have_the_settings_of_the_run(arm):
    settings = {"critic_scale": 0.25, "gradient_discount": 0.5, "critic_learning_rate": 0.125}
    experiment = sequential_mnist.Experiment(small(arm=arm, **settings))
    critic, is_linear = experiment.critic, arm == "bp_lambda"
    assert (critic.scale, critic.gradient_discount) == (0.25, 0.5)
    assert is_linear or any(4 in parameter.shape for parameter in critic.parameters())
    assert experiment.critic_optimizer.param_groups[0]["lr"] == 0.125


def test_lambda_is_that_of_the_run():
    assert not torch.allclose(net_after(6, "bp_lambda", lambda_=0.0), net_after(6, "bp_lambda", lambda_=1.0))


def test_seeds_read_images_in_other_orders():
    first, same, other = (sequential_mnist.Experiment(small(seed=seed)).batches[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_score_is_the_mean_over_the_last_tenth_of_training():
    experiment = sequential_mnist.Experiment(small())
    experiment.curve = [{"step": step, "error": error} for step, error in ((90, 0.75), (95, 0.5), (100, 0.25))]
    assert experiment.result()["error"] == 0.375


def test_the_nets_gradient_is_clipped():
    experiment = sequential_mnist.Experiment(small(arm="none", max_gradient_norm=1e-3))
    experiment.optimizer = torch.optim.SGD(experiment.net.parameters(), 1.0)
    before = nn.utils.parameters_to_vector(experiment.net.parameters()).detach().clone()
    experiment.update()
    moved = nn.utils.parameters_to_vector(experiment.net.parameters()) - before
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_the_test_error_matches_a_second_computation_image_by_image():
    experiment = sequential_mnist.Experiment(small(arm="none", window=8, batch_size=32, learning_rate=3e-2))
    for _ in range(60):
        experiment.update()
    test = images.load("synthetic", "test")
    p = dict(experiment.net.named_parameters())
    wrong = 0
    with torch.no_grad():
        for picture, label in zip(test.images, test.labels.tolist(), strict=True):
            h = c = torch.zeros(5)
            for row in picture[0].float() / 255 - 0.5:
                gates = p["core.rnn.weight_ih_l0"] @ row + p["core.rnn.weight_hh_l0"] @ h
                i, f, g, o = (gates + p["core.rnn.bias_ih_l0"] + p["core.rnn.bias_hh_l0"]).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            wrong += int((p["readout.weight"] @ h + p["readout.bias"]).argmax()) != label
    assert experiment.evaluate() == wrong / len(test.labels) and wrong < 0.8 * len(test.labels)


# Program


@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_equals_one_that_never_stopped(arm, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    result = sequential_mnist.run(small(arm=arm), whole, tensorboard=False)
    sequential_mnist.run(small(arm=arm, num_steps=4), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/loss": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = sequential_mnist.run(small(arm=arm), pieces, resume=True, tensorboard=False)
    assert without_seconds(resumed) == without_seconds(result) and rows_of_log(pieces) == rows_of_log(whole)
    assert [point["step"] for point in resumed["curve"]] == [2, 4, 6, 8]
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["net"] for folder in (whole, pieces)]
    assert all(torch.equal(saved[0][key], value) for key, value in saved[1].items())


def test_the_smoke_preset_runs_every_arm_and_writes_everything(tmp_path, capsys):
    arguments = ["--preset", "smoke", "--run-folder", str(tmp_path)]
    sequential_mnist.main(arguments)
    shown = capsys.readouterr()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["arm"], row["window"]) for row in summary["cells"]] == [
        ("none", 2), ("none", 8), ("dni", 2), ("cdni", 2), ("sobolev", 2), ("bp_lambda", 4),
    ]  # fmt: skip
    assert all(row["mean"] < 0.75 for row in summary["cells"])  # chance is 0.9
    assert summary["full"] == "none@8" and summary["cells"][1]["gap_closed"] is None
    assert "| sobolev | 2 |" in shown.out and "to none@8." in shown.out and "6 of 6 runs done" in shown.err
    folder = tmp_path / "dni-2-seed0"
    assert {"train/loss", "train/error", "critic/cosine"} <= rows_of_log(folder)[1].keys()
    assert [row["step"] for row in rows_of_log(folder) if "test/error" in row] == list(range(10, 81, 10))
    assert json.loads((folder / "config.json").read_text()) == summary["configs"]["dni-2-seed0"]
    assert list(folder.glob("events.out.tfevents.*"))
    (folder / "metrics.jsonl").unlink()
    sequential_mnist.main([*arguments, "--resume"])  # all of it is done
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and not (folder / "metrics.jsonl").exists()


def test_the_summary_tells_how_much_of_the_gap_each_arm_closes():
    settings = {key: value for key, value in SMALL.items() if key != "window"}
    cells = ("none@4", "none@28", "dni@4", "cdni@28", "dni@7")
    matrix = common.members(sequential_mnist.SequentialMnistConfig, cells, (0, 1), settings)
    errors = {
        "none-4": (0.5, 0.75),
        "none-28": (0.125, 0.125),
        "dni-4": (0.25, 0.5),
        "cdni-28": (0.1, 0.1),
        "dni-7": (0, 0),
    }
    results = {f"{name}-seed{i}": {"error": e, "seconds": 2.0} for name, es in errors.items() for i, e in enumerate(es)}
    summary = sequential_mnist.summarize(matrix, results)
    assert summary["full"] == "none@28"
    assert [row["mean"] for row in summary["cells"]] == pytest.approx([0.625, 0.125, 0.375, 0.1, 0.0])
    assert [row["gap_closed"] for row in summary["cells"]] == [0.0, None, 0.5, None, None]
    assert summary["cells"][2]["per_seed"] == {"0": 0.25, "1": 0.5}
    assert "| dni | 4 | 0.2500 0.5000 | 0.3750 | 0.1768 | 0.5 | 2 |" in sequential_mnist.table(summary)


def test_presets_have_every_arm_and_their_windows_fit():
    config = sequential_mnist.SequentialMnistConfig()
    assert (config.hidden_size, config.dataset) == (30, "mnist")
    for name, preset in sequential_mnist.PRESETS.items():
        settings = {key: value for key, value in preset.items() if key not in ("cells", "seeds", "jobs", "arms")}
        matrix = common.members(
            sequential_mnist.SequentialMnistConfig, preset["cells"], preset["seeds"], settings, preset["arms"]
        )
        assert max(member.cell.window for member in matrix) == (8 if name == "smoke" else 28)  # full BPTT is among them
        arms = {member.cell.arm for member in matrix}
        assert arms == (set(ARMS) - {"bp_lambda"} if name == "laptop" else set(ARMS))
        assert name == "smoke" or len(preset["seeds"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "magic@2"], "arm: found 'magic', allowed none, dni, cdni, sobolev, bp_lambda"),
        (["--cells", "none@9"], "window: found 9, allowed 1 to 8, the rows of an image"),
        (["--cells", "bp_lambda@4", "--critic-hidden-sizes", "8"], "bp_lambda has a linear critic"),
        (["--cells", "bp_lambda@4", "--lambda", "2"], "lambda: found 2.0, allowed 0 to 1"),
        (["--cells", "bp_lambda@4", "--hidden-size", "400"], "batch_size: a trace for 32 sequences"),
        (["--dataset", "cifar10"], "dataset: found 'cifar10', allowed mnist, fashion_mnist, synthetic"),
        (["--max-gradient-norm", "0"], "max_gradient_norm: found 0.0, allowed above 0"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sequential_mnist.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_folder_with_another_run_is_refused(tmp_path):
    sequential_mnist.run(small(num_steps=2), tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="continue it with --resume"):
        sequential_mnist.run(small(num_steps=2), tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"other settings \(arm dni -> none\)"):
        sequential_mnist.run(small(num_steps=2, arm="none"), tmp_path, resume=True, tensorboard=False)


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    images.load.cache_clear()
    with pytest.raises(SystemExit):
        sequential_mnist.main(["--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert "nowhere: no such folder" in capsys.readouterr().err
