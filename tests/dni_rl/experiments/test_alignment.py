"""Gradients of a linear net by lag: the truth, where critics come to rest, what each arm learns, the program."""

import json
import statistics

import pytest
import torch
from torch import nn

from dni_rl.experiments import alignment
from dni_rl.experiments.alignment import AlignmentConfig, Experiment

SMALL = {
    "sequence_length": 6,
    "hidden_size": 5,
    "input_size": 4,
    "num_points": 3,
    "batch_size": 3,
    "spectral_radius": 0.9,
    "critic_learning_rate": 1e-2,
    "num_steps": 8,
    "log_every_steps": 2,
    "eval_every_steps": 2,
    "checkpoint_every_steps": 4,
}
ARMS = (("dni", 1), ("dni", 2), ("dni", 5), ("bp_0", 1), ("bp_0.6", 1), ("bp_0.6", 2), ("bp_1", 1))


def small(**settings):
    return AlignmentConfig(**{**SMALL, **settings})


def every_point_once(**settings):
    """An experiment whose batch is each point once, and whose critic stands still unless a test moves it."""
    experiment = Experiment(small(**settings))
    points = torch.arange(experiment.config.num_points)
    experiment.batch = lambda: experiment.points.sequences(points)
    experiment.critic_optimizer = torch.optim.SGD(experiment.critic.parameters(), 0.0)
    return experiment


def set_critic(experiment, weight, bias):
    with torch.no_grad():
        experiment.critic.net[0].weight.copy_(weight)
        experiment.critic.net[0].bias.copy_(bias)


def critic_gradient(experiment):
    experiment.update()
    return torch.cat([p.grad.flatten() for p in experiment.critic.parameters()])


def net_gradient(experiment):
    experiment.optimizer = torch.optim.SGD(experiment.net.parameters(), 0.0)
    experiment.update()
    return torch.cat([p.grad.flatten() for p in experiment.net.parameters()])


def by_autograd(experiment):
    """Summed loss of every point once, and states h_1 .. h_T of its graph."""
    inputs, targets = experiment.batch()
    core, readout, told = experiment.core, experiment.readout, experiment.points.told
    h, states, loss = torch.zeros(len(inputs[0]), 5, dtype=torch.float64), [], 0.0
    for x, target, weight in zip(inputs, targets, told, strict=True):
        h = h @ core.recurrent.T + x @ core.weight.T + core.bias
        if not h.requires_grad:
            h.requires_grad_()
        states.append(h.view_as(h))  # a view: the gradient of later losses alone
        loss = loss + 0.5 * weight * (readout(h) - target).square().sum()
        h = states[-1]
    return loss, states


# The truth


@pytest.mark.parametrize("target", ["last", "every"])
def test_true_gradients_are_those_of_autograd(target):
    experiment = every_point_once(target=target)
    loss, states = by_autograd(experiment)
    expected = torch.stack(torch.autograd.grad(loss, states[:-1]))
    visited, targets = experiment.visited()
    torch.testing.assert_close(visited, torch.stack(states))
    core, readout, told = experiment.core, experiment.readout, experiment.points.told
    found = alignment.true_gradients(core, readout, visited, targets, told)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_with_one_loss_the_gradient_at_lag_k_is_the_errors_through_a_to_the_k():
    experiment = every_point_once()
    states, targets = experiment.visited()
    readout, A = experiment.readout, experiment.core.recurrent
    found = alignment.true_gradients(experiment.core, readout, states, targets, experiment.points.told)
    for lag in range(1, 6):
        expected = (readout(states[-1]) - targets[-1]) @ readout.weight @ torch.linalg.matrix_power(A, lag)
        torch.testing.assert_close(found[5 - lag], expected, rtol=1e-12, atol=1e-14)


def test_points_are_distinct_patterns_on_the_circle_seen_once():
    points = alignment.Points.of(small(num_points=15))  # all patterns of 4 bits that are not 0
    assert sorted((points.bits @ torch.tensor([1.0, 2.0, 4.0, 8.0]).double()).tolist()) == list(range(1, 16))
    points = alignment.Points.of(small(num_points=4, target="every"))
    inputs, targets = points.sequences(torch.tensor([1, 1, 3]))
    assert inputs[0].equal(points.bits[[1, 1, 3]]) and not inputs[1:].any() and points.told.sum() == 6
    assert not targets[0].any()
    torch.testing.assert_close(targets[-1], torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).double())
    torch.testing.assert_close(targets[1], targets[-1] / 5)
    assert alignment.Points.of(small()).told.tolist() == [0, 0, 0, 0, 0, 1]


def test_seeds_and_steps_have_other_noise():
    first, same, other = (Experiment(small(task="learned", input_noise=0.1, seed=seed)) for seed in (0, 0, 1))
    other.points = first.points
    inputs, _ = first.batch()
    assert torch.equal(inputs, same.batch()[0]) and not torch.equal(inputs, other.batch()[0])
    same.step = 1
    assert not torch.equal(inputs, same.batch()[0])


def test_the_net_has_the_spectral_radius_it_is_given():
    core = alignment.LinearCore(3, 20, 0.8)
    assert torch.linalg.eigvals(core.recurrent).abs().max().item() == pytest.approx(0.8)
    assert torch.linalg.eigvals(alignment.LinearCore(3, 200).recurrent).abs().max().item() == pytest.approx(
        0.58, abs=0.1
    )


def test_cosines_are_ordered_by_lag_and_averaged_over_sequences():
    true = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [3.0, 0.0]]])
    predicted = torch.tensor([[[2.0, 0.0], [0.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.1], [0.3, 0.4]]])
    assert alignment.cosines(predicted, true) == pytest.approx([0.8, 0.0, 0.0])
    assert alignment.reach([0.9, 0.51, 0.5, 0.9]) == 2 and alignment.reach([0.1, 0.9]) == 0
    assert alignment.reach([0.9, 0.8]) == 2


# Where critics come to rest


@pytest.mark.parametrize("target", ["last", "every"])
@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize(("arm", "window"), ARMS)
def test_the_librarys_update_is_zero_at_the_closed_form_and_nowhere_near(arm, window, num_points, target):
    experiment = every_point_once(arm=arm, window=window, num_points=num_points, target=target)
    weight, bias = experiment.at_rest()
    at_start = critic_gradient(experiment).norm()
    set_critic(experiment, weight, bias)
    assert critic_gradient(experiment).norm() < 1e-11 * at_start
    set_critic(experiment, weight, 1.01 * bias)
    assert critic_gradient(experiment).norm() > 1e-5 * at_start


def test_where_a_linear_critic_can_be_exact_every_lambda_rests_at_the_truth():
    for arm in ("dni", "bp_0", "bp_0.3", "bp_1"):
        experiment = Experiment(
            small(arm=arm, num_points=1)
        )  # five states, independent of each other in six dimensions
        states, targets = experiment.visited()
        true = alignment.true_gradients(experiment.core, experiment.readout, states, targets, experiment.points.told)
        weight, bias = experiment.at_rest()
        torch.testing.assert_close(states[:-1] @ weight.T + bias, true, rtol=1e-8, atol=1e-10)
        assert experiment.cosines_at_rest() == pytest.approx([1.0] * 5)


def test_where_it_cannot_lambda_1_rests_at_the_least_squares_fit_and_bootstrapping_is_biased():
    experiment = every_point_once(num_points=6)
    states, targets = experiment.visited()
    true = alignment.true_gradients(experiment.core, experiment.readout, states, targets, experiment.points.told)
    features = torch.cat([states[:-1], torch.ones(5, 6, 1).double()], -1).flatten(0, 1)
    fit = torch.linalg.lstsq(features, true.flatten(0, 1)).solution
    weight, bias = experiment.at_rest()
    torch.testing.assert_close(torch.cat([weight, bias.unsqueeze(1)], 1), fit.T, rtol=1e-7, atol=1e-9)

    def error(arm):
        w, b = every_point_once(arm=arm, num_points=6).at_rest()
        return (states[:-1] @ w.T + b - true).norm().item()

    assert error("bp_1") < 0.999 * error("bp_0.6") < 0.999**2 * error("bp_0")


@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize(("arm", "window"), [("dni", 1), ("dni", 2), ("bp_0.6", 1), ("bp_1", 1)])
def test_learning_from_zero_converges_to_the_closed_form(arm, window, num_points):
    experiment = every_point_once(arm=arm, window=window, num_points=num_points, hidden_size=2, sequence_length=4)
    size = 6  # weight [2, 2] and bias [2]

    def gradient(theta):
        set_critic(experiment, theta[:4].view(2, 2), theta[4:])
        return critic_gradient(experiment)

    # The update is affine in the critic. So a few calls of the library tell what millions of them come to.
    constant = gradient(torch.zeros(size).double())
    slope = torch.stack([gradient(e) - constant for e in torch.eye(size).double()], dim=1)
    theta = torch.randn(size, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(gradient(theta), constant + slope @ theta)
    step = torch.zeros(size + 1, size + 1).double()
    step[:size, :size], step[:size, size], step[size, size] = torch.eye(size) - 0.1 * slope, -0.1 * constant, 1.0
    after = torch.linalg.matrix_power(step, 2**24)[:size, size]  # from zero
    weight, bias = experiment.at_rest()
    torch.testing.assert_close(after, torch.cat([weight.flatten(), bias]), rtol=1e-6, atol=1e-8)
    assert after.norm() > 0.01


def test_learning_converges_to_the_closed_form_by_itself():
    experiment = every_point_once(arm="dni", num_points=1, hidden_size=2, sequence_length=3)
    experiment.critic_optimizer = torch.optim.SGD(experiment.critic.parameters(), 0.3)
    for _ in range(400):
        experiment.update()
    head = experiment.critic.net[0]
    found, expected = torch.cat([head.weight.T, head.bias[None]]), experiment.at_rest()
    torch.testing.assert_close(found.detach(), torch.cat([expected[0].T, expected[1][None]]), rtol=0.02, atol=1e-3)


# Arms


def test_lambda_0_is_bootstrapping_with_window_1():
    curves = []
    for arm in ("dni", "bp_0"):
        experiment = Experiment(small(arm=arm, task="learned", input_noise=0.1))
        for _ in range(5):
            experiment.update()
        curves.append(nn.utils.parameters_to_vector([*experiment.net.parameters(), *experiment.critic.parameters()]))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-10, atol=1e-13)
    assert experiment.critic.net[0].weight.norm() > 0.01


def test_lambda_1_learns_from_true_gradients_at_every_state():
    experiment = every_point_once(arm="bp_1", target="every")
    states, targets = experiment.visited()
    true = alignment.true_gradients(experiment.core, experiment.readout, states, targets, experiment.points.told)
    torch.manual_seed(1)
    set_critic(experiment, torch.randn(5, 5), torch.randn(5))
    (predicted,) = experiment.critic((states[:-1],))
    # the mean over sequences and components, summed over states
    loss = (predicted - true).square().mean((1, 2)).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(experiment.critic.parameters()))])
    torch.testing.assert_close(critic_gradient(experiment), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("arm", "window"), [("none", 6), *ARMS])
def test_with_the_true_gradients_every_arm_is_full_backpropagation(arm, window, monkeypatch):
    experiment = Experiment(small(arm=arm, window=window, task="learned", target="every", max_gradient_norm=None))
    points = torch.arange(3)
    experiment.batch = lambda: experiment.points.sequences(points)
    loss, _ = by_autograd(experiment)
    full = torch.cat([g.flatten() for g in torch.autograd.grad(loss / 3, list(experiment.net.parameters()))])
    if experiment.critic is not None:
        states, targets = experiment.visited()
        true = alignment.true_gradients(experiment.core, experiment.readout, states, targets, experiment.points.told)
        cuts = iter([*range(window, 6, window), 6])

        def synthetic_gradient(state, context=None, alive=None):
            t = next(cuts)
            torch.testing.assert_close(state[0], states[t - 1].detach())
            assert (alive is None) == (t < 6) and (alive is None or not alive.any())
            return (true[t - 1] if t < 6 else torch.zeros_like(state[0]),)

        monkeypatch.setattr(experiment.critic, "synthetic_gradient", synthetic_gradient)
    torch.testing.assert_close(net_gradient(experiment), full, rtol=1e-10, atol=1e-13)


def test_without_a_critic_a_short_window_is_truncated():
    short = net_gradient(Experiment(small(arm="none", window=2, task="learned", max_gradient_norm=None)))
    whole = net_gradient(Experiment(small(arm="none", window=6, task="learned", max_gradient_norm=None)))
    assert not torch.allclose(short[:25], whole[:25], rtol=1e-2)  # A's
    torch.testing.assert_close(short[-12:], whole[-12:])  # the readout's: of the last state either way


def test_a_fixed_net_stays_and_a_learned_one_moves_within_its_bound():
    for task, moves in (("fixed", False), ("learned", True)):
        experiment = Experiment(small(task=task, arm="bp_1", max_gradient_norm=1e-3))
        before = nn.utils.parameters_to_vector(experiment.net.parameters()).clone()
        experiment.update()
        assert torch.equal(before, nn.utils.parameters_to_vector(experiment.net.parameters())) != moves
        if moves:
            assert torch.cat([p.grad.flatten() for p in experiment.net.parameters()]).norm() < 1.001e-3


def test_an_oracle_in_the_critics_place_has_cosine_1_at_every_lag():
    experiment = Experiment(small(arm="bp_1", num_points=1))
    assert experiment.evaluate()["cosines"] == [0.0] * 5  # zero at the start
    set_critic(experiment, *experiment.at_rest())
    found = experiment.evaluate()
    assert found["cosines"] == pytest.approx([1.0] * 5) and found["relative_error"] < 1e-8
    set_critic(experiment, *(-x for x in experiment.at_rest()))
    assert experiment.evaluate()["mean_cosine"] == pytest.approx(-1.0)


# The effect


def learned_cosines(arm, num_steps=60):
    """By lag, after so many updates; two seeds averaged."""
    found = []
    for seed in (0, 1):
        alone = {"seed": seed, "num_points": 1, "batch_size": 1, "num_steps": num_steps}
        experiment = Experiment(small(arm=arm, hidden_size=12, sequence_length=9, **alone))
        for _ in range(num_steps):
            experiment.update()
        found.append(experiment.evaluate()["cosines"])
    return [statistics.fmean(of_lag) for of_lag in zip(*found, strict=True)]


def test_after_equal_updates_lambda_1_aligns_at_every_lag_and_bootstrapping_near_the_loss_alone():
    traces, bootstrapped = learned_cosines("bp_1"), learned_cosines("dni")
    assert min(traces) > 0.9 and alignment.reach(traces) == 8
    assert 0.6 < bootstrapped[0] < traces[0] and alignment.reach(bootstrapped) <= 2
    assert statistics.fmean(bootstrapped[1:]) < 0.4


# Program


def without_seconds(result):
    return {**result, "seconds": 0.0, "curve": [{**point, "seconds": 0.0} for point in result["curve"]]}


def rows_of_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "arm", "window"),
    [("fixed", "dni", 2), ("fixed", "bp_0.5", 1), ("learned", "none", 2), ("learned", "bp_1", 1)],
)
def test_a_resumed_run_equals_one_that_never_stopped(task, arm, window, tmp_path):
    config = {"task": task, "arm": arm, "window": window, "input_noise": 0.1}
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    result = alignment.run(small(**config), whole, tensorboard=False)
    alignment.run(small(**config, num_steps=4), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/loss": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = alignment.run(small(**config), pieces, resume=True, tensorboard=False)
    assert without_seconds(resumed) == without_seconds(result) and rows_of_log(pieces) == rows_of_log(whole)
    assert [point["step"] for point in resumed["curve"]] == [2, 4, 6, 8]
    assert (result["cosines"] is None) == (arm == "none") and (result["at_rest"] is None) == (task == "learned")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment")
    alignment.main(["--run-folder", str(folder)])
    return folder


def test_the_smoke_preset_runs_both_tasks_and_writes_everything(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    assert summary["preset"] == "smoke" and list(summary["tasks"]) == list(alignment.TASKS)
    fixed, learned = (summary["tasks"][task]["cells"] for task in alignment.TASKS)
    assert [f"{row['arm']}@{row['window']}" for row in fixed] == ["dni@1", "dni@3", "bp_0@1", "bp_1@1"]
    assert fixed[0]["cosines"] == pytest.approx(fixed[2]["cosines"], abs=1e-9)  # one method, two implementations
    assert fixed[3]["cosine"]["mean"] > fixed[2]["cosine"]["mean"]
    assert fixed[3]["at_rest"] == pytest.approx([1.0] * 5) and learned[3]["at_rest"] is None
    assert learned[0]["cosines"] is None and learned[1]["loss"]["mean"] < learned[0]["loss"]["mean"]
    for task in alignment.TASKS:
        assert (smoke / f"{task}.png").read_bytes()[:4] == b"\x89PNG"
    folder = smoke / "fixed-bp_1-1-seed0"
    assert list(folder.glob("events.out.tfevents.*"))
    rows = rows_of_log(folder)
    assert {"train/loss", "critic/cosine"} <= rows[0].keys() and {"cosine/lag_5", "test/mean_cosine"} <= rows[1].keys()
    result = json.loads((folder / "result.json").read_text())
    assert result["cosines"] == fixed[3]["cosines"] and fixed[3]["curve"][-1]["step"] == 30
    assert json.loads((folder / "config.json").read_text()) == summary["configs"]["fixed-bp_1-1-seed0"]
    shown = (smoke / "table.md").read_text()
    assert sum(set(line) == set("| -") for line in shown.splitlines()) == 2 and "Task learned" in shown
    assert f"| bp_1 | 1 | {fixed[3]['cosines'][0]:.2f} |" in shown and "| none | 2 | - |" in shown


def test_nothing_is_done_twice(smoke, capsys):
    before = (smoke / "fixed-bp_1-1-seed0/metrics.jsonl").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        alignment.main(["--run-folder", str(smoke)])
    assert "continue it with --resume" in capsys.readouterr().err
    alignment.main(["--run-folder", str(smoke), "--resume", "--no-figures"])
    assert capsys.readouterr().out == (smoke / "table.md").read_text()
    assert (smoke / "fixed-bp_1-1-seed0/metrics.jsonl").stat().st_mtime_ns == before


def test_cosines_are_means_over_the_last_tenth_of_the_updates():
    experiment = Experiment(small())
    experiment.step = 100
    for step, cosine in ((90, 0.0), (95, 0.5), (100, 1.0)):
        found = {"loss": 1.0 - cosine, "cosines": [cosine] * 5, "misalignment": 1.0 - cosine, "relative_error": 0.5}
        experiment.curve.append({"step": step, **found})
    result = experiment.result()
    assert result["cosines"] == [0.75] * 5 and result["loss"] == 0.25 and result["aligned_after"] == 99.0


def test_the_summary_averages_seeds_and_says_when_every_one_was_aligned():
    matrix = alignment.members(("fixed",), "smoke", {}, cells=("bp_1@1",), seeds=(0, 1))
    point = {"step": 30, "loss": 1.0, "mean_cosine": 0.5}
    found = {"loss": 1.0, "seconds": 2.0, "at_rest": [1.0] * 5, "curve": [point]}
    results = {
        "fixed-bp_1-1-seed0": {**found, "cosines": [1.0, 0.8, 0.6, 0.4, 0.2], "aligned_after": 10.0},
        "fixed-bp_1-1-seed1": {**found, "cosines": [0.8, 0.6, 0.6, 0.4, 0.6], "aligned_after": 20.0},
    }
    (row,) = alignment.summarize(matrix, results)["tasks"]["fixed"]["cells"]
    assert row["cosines"] == pytest.approx([0.9, 0.7, 0.6, 0.4, 0.4]) and row["reach"] == 3
    assert row["per_seed"] == {"0": pytest.approx(0.6), "1": pytest.approx(0.6)} and row["aligned_after"] == 15.0
    results["fixed-bp_1-1-seed1"]["aligned_after"] = None
    summary = alignment.summarize(matrix, results)
    assert summary["tasks"]["fixed"]["cells"][0]["aligned_after"] is None
    assert (
        "| bp_1 | 1 | 0.90 | 0.70 | 0.60 | 0.40 | 0.40 | 0.60 | 0.00 | 1.00 | 3 | - | 1.0000 | 2 |"
        in alignment.table(summary)
    )


def test_a_run_that_diverges_is_a_row_that_says_so(tmp_path, capsys):
    arguments = ["--tasks", "learned", "--cells", "dni@2", "none@2", "--learning-rate", "1e200", "--no-tensorboard"]
    alignment.main([*arguments, "--run-folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| dni | 2 | - | - | - | - | - | - | - | - | 0 | - | diverged |" in shown
    assert "| none | 2 | - | - | - | - | - | - | - | - | - | - | diverged |" in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    row, _ = summary["tasks"]["learned"]["cells"]
    assert row["cosines"] == [None] * 5 and row["per_seed"] == {"0": None} and row["loss"]["mean"] is None
    assert (tmp_path / "learned.png").exists()


def test_presets_compare_bootstrapping_with_lambda_and_paper_keeps_the_papers_settings():
    config = AlignmentConfig()
    assert (config.hidden_size, config.sequence_length, config.input_size, config.critic_learning_rate) == (
        30,
        10,
        10,
        1e-4,
    )
    for name, preset in alignment.PRESETS.items():
        matrix = alignment.members(alignment.TASKS, name, {})
        assert name == "smoke" or len(preset["seeds"]) >= 3
        cells = {task: {str(m.cell) for m in matrix if m.config.task == task} for task in alignment.TASKS}
        assert {"dni@1", "bp_0@1", "bp_1@1"} <= cells["fixed"]
        assert name == "smoke" or {"dni@5", "bp_0.5@1", "bp_0.9@1"} <= cells["fixed"]
        length = matrix[0].config.sequence_length
        assert f"none@{length}" in cells["learned"]  # full BPTT
        if name == "paper":
            assert {(m.config.hidden_size, m.config.spectral_radius) for m in matrix} == {(30, None)}


def test_a_net_that_overflows_is_diverged(tmp_path, capsys):
    options = ["--tasks", "fixed", "--cells", "dni@1", "--spectral-radius", "1e300", "--no-tensorboard", "--no-figures"]
    alignment.main(["--preset", "smoke", *options, "--run-folder", str(tmp_path)])
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "bp_2@1"], "arm: found 'bp_2', allowed none, dni, or bp_LAMBDA with 0 to 1, such as bp_0.9"),
        (["--cells", "bp_x@1"], "arm: found 'bp_x'"),
        (["--cells", "magic@1"], "arm: found 'magic'"),
        (["--cells", "none@1"], "arm: none has no critic"),
        (["--cells", "dni@6"], "window: found 6, allowed 1 to 5; a critic needs a cut before the last step"),
        (["--tasks", "hard"], "tasks: found hard, allowed fixed, learned"),
        (["--num-points", "1024"], "num_points, input_size: found 1024 of 10 bits"),
        (["--target", "first"], "target: found 'first', allowed last, every"),
        (["--spectral-radius", "0"], "spectral_radius: found 0.0, allowed above 0"),
        (["--input-noise", "-1"], "input_noise: found -1.0, allowed 0 or more"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        alignment.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1
