"""Understanding synthetic gradients: data, gaps, implied losses, representations, and the program."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import dni_rl
from dni_rl import data
from dni_rl.experiments import common, images, understanding
from dni_rl.experiments.theory.artificial import (
    Artificial,
    SigmoidGradientCritic,
    cases,
    implied_loss,
    least_log_loss,
    losses_of,
    points,
    predicted_gap,
    surface,
)
from dni_rl.experiments.theory.config import DISSIMILARITY_FILE, PARTS, UnderstandingConfig
from dni_rl.experiments.theory.deep import Deep, dissimilarity, probe_error
from dni_rl.experiments.theory.figures import dissimilarity_figure, draw
from dni_rl.experiments.theory.identities import identities
from dni_rl.experiments.theory.summary import summarize, table

SMALL = {
    "linear": {"arm": "noisy2", "num_layers": 2, "hidden_size": 3, "num_points": 40},
    "surface": {"arm": "noisy2", "num_layers": 2, "hidden_size": 3, "num_points": 40},
    "rdm": {"arm": "sg", "dataset": "synthetic", "num_layers": 3, "hidden_size": 12, "batch_size": 32, "num_shown": 20},
    "signals": {"arm": "sg_prop", "dataset": "synthetic", "num_layers": 3, "hidden_size": 12, "batch_size": 32},
}
STEPS = {"num_steps": 12, "log_every_steps": 2, "eval_every_steps": 4, "checkpoint_every_steps": 6}


def small(part, **settings):
    return UnderstandingConfig(**{"part": part, **SMALL[part], **STEPS, **settings})


def without_seconds(result):
    result = {**result, "seconds": 0.0}
    if "predicted_gap" in result:  # made of the data alone; LAPACK's last digits depend on where in memory they lie
        result["predicted_gap"] = pytest.approx(result["predicted_gap"], abs=1e-12)
    if "curve" in result:
        result["curve"] = [{**point, "seconds": 0.0} for point in result["curve"]]
    return result


# Artificial data


def test_artificial_data_are_what_their_names_say():
    for size in (2, 100):
        x, y = points(f"linear{size}", 500, 0)
        assert x.shape == (500, size) and y.shape == (500, 1) and set(y.unique().tolist()) == {0.0, 1.0}
        noisy_x, noisy_y = points(f"noisy{size}", 500, 0)
        assert torch.equal(x, noisy_x) and 0.07 < (y != noisy_y).double().mean() < 0.13
        # Separable: a perceptron ends.
        signed = torch.cat([x, torch.ones_like(y)], 1) * (2 * y - 1)
        w = torch.zeros(size + 1, dtype=x.dtype)
        for _ in range(20_000):
            wrong = signed @ w <= 0
            if not wrong.any():
                break
            w += signed[wrong][0]
        assert not (signed @ w <= 0).any()
        x, y = points(f"xor{size}", 500, 0)
        assert torch.equal(y.squeeze(1) > 0, (x[:, 0] > 0) ^ (x[:, 1] < 0))
        x, y = points(f"random{size}", 2_000, 0)
        assert abs(y.mean() - 0.5) < 0.05 and abs(torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1]) < 0.06
    assert torch.equal(points("xor2", 50, 1)[0], points("xor2", 50, 1)[0])
    assert not torch.equal(points("xor2", 50, 1)[0], points("xor2", 50, 2)[0])


def trained(name, steps, **settings):
    config = small("linear", **{"arm": name, "num_points": 300, "num_layers": 4, "hidden_size": 4, **settings})
    run = Artificial(config)
    for _ in range(steps):
        run.update()
    return run


def test_models_of_a_kind_start_alike_and_only_the_lower_half_sees_the_critic():
    run = trained("noisy2", 0)
    by_case = {str(student.case): student for student in run.students}
    assert len(by_case) == 10
    assert [len(by_case["deep_mse_linear"].lower), len(by_case["deep_mse_linear"].upper)] == [2, 3]  # of five layers
    assert [len(by_case["linear_mse_linear"].lower), len(by_case["linear_mse_linear"].upper)] == [1, 0]
    for model in ("linear", "deep"):
        first, *others = (s for name, s in by_case.items() if name.startswith(model))
        for other in others:
            for p, q in zip(first.modules.parameters(), other.modules.parameters(), strict=True):
                assert torch.equal(p, q) and p.dtype == torch.float64
    run.update()  # critics start at zero: the lower halves have no gradient yet, the upper ones have backpropagation's
    true, decoupled = by_case["deep_mse_backprop"], by_case["deep_mse_linear"]
    for p, q in zip(true.upper.parameters(), decoupled.upper.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    start = trained("noisy2", 0).students[[str(s.case) for s in run.students].index("deep_mse_linear")]
    for p, q in zip(start.lower.parameters(), decoupled.lower.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.fixture(scope="module")
def converged():
    """A data set that is not separable, learned to the end."""
    rates = {"learning_rate": 3e-3, "critic_learning_rate": 3e-2, "linear_learning_rate": 3e-2}
    run = trained("noisy100", 0, num_points=500, learning_rate_drop_steps=(300, 400), **rates)
    run.students = [s for s in run.students if s.case.model == "linear" or s.case.loss == "mse"]
    for _ in range(450):
        run.update()
    return run, run.result()


def test_gaps_close_as_the_theory_says(converged):
    _, result = converged
    gaps = result["gaps"]
    assert abs(gaps["linear_mse_linear"]) < 1e-5  # a critic linear in (h, y) is exact
    assert abs(gaps["linear_log_sigmoid"]) < 1e-5  # and so is this one
    assert abs(gaps["deep_mse_linear"]) < 4e-5  # the paper's figure
    # One that is linear where the gradient is not comes to rest elsewhere, and where is known.
    assert result["predicted_gap"] > 1e-3
    assert gaps["linear_log_linear"] == pytest.approx(result["predicted_gap"], rel=0.02)


def test_backprop_reaches_least_squares_and_logistic_regression(converged):
    run, result = converged
    features = torch.cat([run.x, torch.ones_like(run.y)], 1)
    least = (features @ torch.linalg.lstsq(features, run.y).solution - run.y).square().mean().item()
    assert result["losses"]["linear_mse_backprop"] == pytest.approx(least, abs=1e-9)
    weights = torch.zeros(101, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, run.y)
        value.backward()
        return value

    optimizer.step(loss)
    assert result["losses"]["linear_log_backprop"] == pytest.approx(loss().item(), abs=1e-9)


def test_the_least_log_loss_is_found():
    x, y = points("noisy2", 200, 3)
    scores = x[:, :1]
    found = least_log_loss(scores, y)
    grid = [
        losses_of("log", a * scores + b, y).mean().item()
        for a in torch.linspace(-4, 4, 161) for b in torch.linspace(-1, 1, 41)
    ]  # fmt: skip
    assert found <= min(grid) and found == pytest.approx(min(grid), abs=1e-3)
    assert least_log_loss(*points("linear2", 200, 3)) < 1e-4
    assert predicted_gap(x, y) > 0


def test_the_sigmoid_form_can_be_exact_and_starts_at_zero():
    torch.manual_seed(0)
    critic = SigmoidGradientCritic(3).double()
    h, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7, 1)).double()
    assert (critic.synthetic_gradient((h,), y)[0] == 0).all()
    upper = torch.nn.Linear(3, 1).double()
    leaf = h.clone().requires_grad_()
    (true,) = torch.autograd.grad(losses_of("log", upper(leaf), y).sum(), leaf)
    critic.net.logit.load_state_dict(upper.state_dict())
    critic.net.spread.weight.data.copy_(upper.weight.detach().T)
    torch.testing.assert_close(critic.synthetic_gradient((h,), y)[0], true)


# Implied losses


def test_the_implied_loss_of_a_linear_critic_is_a_quadratic():
    critic = dni_rl.GradientCritic(state_sizes=(1,), context_size=1, normalize_targets=False).double()
    a, b, c = 0.7, -1.3, 0.4
    critic.net[0].weight.data.copy_(torch.tensor([[a, b]]))
    critic.net[0].bias.data.fill_(c)
    h = torch.linspace(-1, 2, 13, dtype=torch.float64)
    y = torch.tensor([1.0], dtype=torch.float64)
    wanted = a * h.square() / 2 + (b + c) * h
    torch.testing.assert_close(implied_loss(critic, h.unsqueeze(1), y), wanted - wanted[0])


def test_the_implied_loss_of_an_exact_critic_is_the_true_one():
    torch.manual_seed(0)
    critic = SigmoidGradientCritic(3).double()
    upper = torch.nn.Linear(3, 1).double()
    critic.net.logit.load_state_dict(upper.state_dict())
    critic.net.spread.weight.data.copy_(upper.weight.detach().T)
    path = torch.linspace(-2, 2, 400, dtype=torch.float64).unsqueeze(1) * torch.randn(3, dtype=torch.float64)
    for label in (0.0, 1.0):
        y = torch.tensor([label], dtype=torch.float64)
        true = losses_of("log", upper(path), y.expand(400, 1)).detach()
        found = implied_loss(critic, path, y)
        torch.testing.assert_close(found, true - true[0], atol=1e-5, rtol=1e-5)


def test_surfaces_agree_where_a_critic_can_be_exact_and_not_where_it_cannot(converged):
    run, _ = converged
    error = {}
    for student in run.students:
        if student.case.model == "linear" and student.critic is not None:
            found = surface(student, run.x, run.y)
            assert len(found["along"]) == 41 and [len(c["true"]) for c in found["classes"]] == [41, 41]
            error[student.case.loss, student.case.form] = max(c["error"] for c in found["classes"])
            h = student.lower(run.x)
            reach = found["along"][-1] - found["along"][0]
            assert reach == pytest.approx((h.max() - h.min()).item())
    assert error["mse", "linear"] < 0.01 and error["log", "sigmoid"] < 0.01
    assert error["log", "linear"] > 0.05


# Representations


def test_dissimilarity_is_one_minus_correlation():
    features = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found = dissimilarity(features)
    torch.testing.assert_close(found, 1.0 - torch.corrcoef(features.double()), atol=1e-9, rtol=1e-9)
    constant = dissimilarity(torch.cat([features, torch.ones(1, 9)]))
    assert constant.isfinite().all() and (constant[-1, :-1] == 1).all()


def test_probes_read_what_is_linear_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(600, 5, generator=generator), torch.randint(3, (600,), generator=generator)
    train, test = slice(0, 400), slice(400, 600)

    def error(features):
        return probe_error((features[train], labels[train]), (features[test], labels[test]), 3)

    assert 0.55 < error(features) < 0.8  # chance is 2 / 3
    told = features.clone()
    told[:, 1:4] += 5.0 * torch.nn.functional.one_hot(labels, 3)
    told[:, 4] = 7.0  # a dead unit
    assert error(told) < 0.02
    assert error(1_000.0 * told + 3.0) == error(told)  # units do not matter


@pytest.mark.parametrize("arm", ["backprop", "sg"])
def test_a_deep_net_learns_and_its_layers_are_described(arm, tmp_path):
    config = small("rdm", arm=arm, learning_rate=1e-2, critic_learning_rate=1e-2, num_layers=2)
    run = Deep(config, tmp_path)
    before = run.evaluate()
    for _ in range(60):
        run.update()
    result = run.result()
    assert result["error"] < before - 0.15
    matrices = np.load(tmp_path / DISSIMILARITY_FILE)
    assert matrices.shape == (2, 20, 20) and np.allclose(matrices[:, range(20), range(20)], 0, atol=1e-2)
    assert len(result["layers"]) == 2 and result["layers"][-1]["distance_to_last"] == 0
    assert result["layers"][0]["distance_to_last"] > 0
    for layer, matrix in zip(result["layers"], matrices.astype(np.float64), strict=True):
        same = np.kron(np.eye(10), np.ones((2, 2))) > 0  # images are in the order of their labels
        assert layer["between"] == pytest.approx(matrix[~same].mean(), abs=1e-3)
        assert layer["within"] == pytest.approx(matrix[same & ~np.eye(20, dtype=bool)].mean(), abs=1e-3)
        away = np.linalg.norm((matrix - matrices[-1].astype(np.float64))[same])
        assert layer["distance_to_last"] == pytest.approx(away, abs=1e-2)
        assert layer["within"] < layer["between"] and 0 < layer["probe_error"] < 0.8


@pytest.mark.parametrize("part", ["rdm", "signals"])
def test_a_deep_net_is_tested_on_the_test_split_with_running_statistics(part, tmp_path, monkeypatch):
    pictures = images.load("synthetic", "train").images[:64]
    splits = {split: data.Images(pictures, torch.full((64,), i)) for i, split in enumerate(("train", "test"))}
    monkeypatch.setattr(images, "load", lambda _, split: splits[split])
    run = Deep(small(part), tmp_path)
    # takes everything for the class of the test split
    run.layers[-1].linear.bias.data[-1 if part == "signals" else 1] = 1e3
    before = {name: p.clone() for name, p in run.net.state_dict().items()}
    assert run.evaluate() == 0.0 and run.evaluation()["test/error"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in run.net.state_dict().items())


def test_probes_are_fitted_to_the_train_split_and_tested_on_the_other(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 10
    patterns = torch.randint(256, (10, 1, 8, 8), generator=generator).to(torch.uint8)
    splits = {"train": data.Images(patterns[labels], labels), "test": data.Images(patterns[labels], (labels + 1) % 10)}
    monkeypatch.setattr(images, "load", lambda _, split: splits[split])
    layers = Deep(small("rdm", num_layers=2, hidden_size=40), tmp_path).result()["layers"]
    assert [layer["probe_error"] for layer in layers] == [1.0, 1.0]  # what they learned is wrong there


def test_evaluation_and_alignment_leave_the_net_as_it_is(tmp_path):
    run = Deep(small("signals"), tmp_path)
    run.update()
    before = json.dumps([p.tolist() for p in run.net.state_dict().values()])
    cosines = run.alignment()
    assert cosines == run.alignment() and len(cosines) == 3 and cosines[-1] == pytest.approx(1.0)
    run.evaluate()
    assert before == json.dumps([p.tolist() for p in run.net.state_dict().values()]) and run.net.training


def test_the_true_gradient_is_aligned_with_itself_and_random_feedback_is_not(tmp_path):
    assert Deep(small("signals", arm="backprop"), tmp_path).alignment() == pytest.approx([1.0] * 3)
    assert max(map(abs, Deep(small("signals", arm="fa"), tmp_path).alignment())) < 0.8


def test_images_without_a_true_gradient_do_not_dilute_the_cosine(tmp_path):
    run = Deep(small("signals", arm="backprop"), tmp_path)
    with torch.no_grad():
        run.layers[-1].linear.weight.mul_(1e6)  # saturated: those that are right have no gradient
    assert run.alignment() == pytest.approx([1.0] * 3)


def test_identities_hold():
    found = identities()
    assert len(found) == 5 and all(0 <= value < 1e-12 for value in found.values())


# The program


@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_equals_one_that_never_stopped(part, tmp_path):
    whole = understanding.run(small(part), tmp_path / "whole", tensorboard=False, progress=False)
    first = small(part, num_steps=6)
    understanding.run(first, tmp_path / "pieces", tensorboard=False, progress=False)
    again = understanding.run(small(part), tmp_path / "pieces", resume=True, tensorboard=False, progress=False)
    if part == "signals":  # the first piece ended with an evaluation of its own
        assert [point["step"] for point in again["curve"]] == [4, 6, 8, 12]
        again = {**again, "curve": [point for point in again["curve"] if point["step"] != 6]}
    elif part in ("linear", "rdm"):
        again = {**again, "curve": [point for point in again["curve"] if point["step"] != 6]}
    assert without_seconds(again) == without_seconds(whole)
    saved = [torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("whole", "pieces")]
    parts = [name for name in saved[0] if name not in ("seconds", "curve")]
    assert len(parts) > 2 and all(str(saved[0][name]) == str(saved[1][name]) for name in parts)


@pytest.mark.parametrize("part", PARTS)
def test_a_run_that_diverges_is_a_row_that_says_so(part, tmp_path, capsys):
    rates = ["--learning-rate", "1e30", "--critic-learning-rate", "1e30", "--linear-learning-rate", "1e200"]
    understanding.main(["--parts", part, *rates, "--run-folder", str(tmp_path), "--no-tensorboard"])
    assert "diverged" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert part == "linear" or list(tmp_path.glob("*.png"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("understanding")
    understanding.main(["--run-folder", str(folder)])
    return folder


def test_the_smoke_preset_writes_everything(smoke):
    summary = json.loads((smoke / "summary.json").read_text())
    parts = summary["parts"]
    assert list(parts) == list(PARTS) and summary["preset"] == "smoke"
    for name in ("surface-noisy2", "dissimilarity", "layers", "signals"):
        assert (smoke / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert list((smoke / "rdm-sg-seed0").glob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (smoke / "rdm-sg-seed0/metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "critic_4/cosine"} <= rows[0].keys() and any("test/error" in row for row in rows)
    result = json.loads((smoke / "linear-noisy2-seed0/result.json").read_text())
    assert parts["linear"]["rows"][0]["gaps"]["deep_mse_linear"]["mean"] == result["gaps"]["deep_mse_linear"]
    largest = parts["linear"]["largest"]
    assert largest["mse, linear"]["published"] == 4e-5 and largest["log, linear"]["published"] == 0.0855
    gaps = [abs(row["gaps"][f"{m}_mse_linear"]["mean"]) for row in parts["linear"]["rows"] for m in ("linear", "deep")]
    assert largest["mse, linear"]["gap"] == max(gaps)
    assert [row["arm"] for row in parts["rdm"]["rows"]] == ["backprop", "sg_prop", "sg", "dfa"]
    assert [len(row["layers"]) for row in parts["rdm"]["rows"]] == [4] * 4
    assert [row["arm"] for row in parts["signals"]["rows"]] == list(understanding.signals.SIGNALS)
    table = (smoke / "table.md").read_text()
    assert sum(set(line) == set("| -") for line in table.splitlines()) == 6 and "kickback, one hidden layer" in table


def test_nothing_is_done_twice(smoke, capsys):
    before = (smoke / "signals-fa-seed0/metrics.jsonl").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        understanding.main(["--run-folder", str(smoke)])
    assert "continue it with --resume" in capsys.readouterr().err
    understanding.main(["--run-folder", str(smoke), "--resume", "--no-figures"])
    assert capsys.readouterr().out == (smoke / "table.md").read_text()
    assert (smoke / "signals-fa-seed0/metrics.jsonl").stat().st_mtime_ns == before


def test_runs_are_made_of_parts_arms_and_seeds():
    matrix = understanding.members(("linear", "rdm"), "laptop", {"num_steps": 5})
    assert len(matrix) == 3 * (8 + 4) and matrix[0].name == "linear-linear2-seed0"
    assert {m.config.num_steps for m in matrix} == {5} and matrix[-1].config.seed == 2
    matrix = understanding.members(("rdm", "signals"), "smoke", {}, arms=("fa", "kickback"), seeds=(4,))
    assert [m.name for m in matrix] == ["rdm-fa-seed4", "signals-fa-seed4", "signals-kickback-seed4"]
    for preset in understanding.PRESETS:
        for member in understanding.members(PARTS, preset, {}):
            assert member.config.device == "cpu"
    paper = understanding.members(("rdm",), "paper", {})[0].config
    assert (paper.num_layers, paper.dataset, paper.critic_hidden_sizes) == (20, "mnist", ())


def test_representations_are_drawn_of_the_first_seed(tmp_path, monkeypatch):
    matrix = understanding.members(("linear", "rdm"), "smoke", {}, arms=("linear2", "fa", "sg"), seeds=(1, 0))
    for member in matrix:
        (tmp_path / member.name).mkdir()
        np.save(tmp_path / member.name / DISSIMILARITY_FILE, np.full((3, 2, 2), member.config.seed))
    chart = dissimilarity_figure({"fa": np.zeros((3, 2, 2))})
    drawn = []
    monkeypatch.setattr("dni_rl.experiments.theory.figures.layers_figure", lambda rows: chart)
    monkeypatch.setattr(
        "dni_rl.experiments.theory.figures.dissimilarity_figure", lambda found: drawn.append(found) or chart
    )
    configs = {member.name: dataclasses.asdict(member.config) for member in matrix}
    draw({"parts": {"rdm": {"rows": []}}, "configs": configs}, tmp_path)
    assert [{arm: found.mean() for arm, found in matrices.items()} for matrices in drawn] == [{"fa": 1.0, "sg": 1.0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "magic"], "parts: found 'magic', allowed linear, surface, rdm, signals"),
        (["--parts"], "parts: found none, allowed one or more"),
        (["--seeds", "1", "1"], "seeds: found 1 1, allowed one or more, each once"),
        (["--parts", "rdm", "--arms", "kickback"], "arms: found 'kickback', allowed backprop"),
        (["--arms"], "arms: found none, allowed one or more, each once"),
        (["--parts", "rdm", "--num-layers", "1"], "num_layers: found 1, allowed 2 or more"),
        (["--parts", "linear", "--learning-rate", "0"], "learning_rate: found 0.0, allowed above 0"),
        (["--parts", "rdm", "--num-shown", "3"], "num_shown: found 3, allowed 20 or more"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        understanding.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    images.load.cache_clear()
    with pytest.raises(SystemExit):
        understanding.main(["--parts", "signals", "--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_gaps_are_spread_over_seeds():
    matrix = understanding.members(("linear",), "smoke", {}, arms=("xor2",), seeds=(0, 1))
    names = [str(case) for case in cases("linear") if case.form != "backprop"]
    results = {
        m.name: {"gaps": dict.fromkeys(names, (-1) ** m.config.seed * (1 + m.config.seed)), "predicted_gap": math.pi}
        for m in matrix
    }
    found = summarize(matrix, results)["parts"]["linear"]
    assert found["rows"][0]["gaps"]["deep_log_sigmoid"] == common.spread([1, -2])
    assert found["largest"]["log, sigmoid"] == {"gap": 2, "published": None}
    assert found["rows"][0]["predicted_gap"]["mean"] == math.pi
    results[matrix[0].name]["gaps"]["deep_mse_linear"] = math.nan
    found = summarize(matrix, results)
    assert found["parts"]["linear"]["largest"]["mse, linear"] == {"gap": None, "published": 4e-5}
    assert "| mse, linear | diverged | 4.0e-05 |" in table(found)
