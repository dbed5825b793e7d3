"""The image experiment: every arm runs, resumes and refuses what makes no sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dni_rl import CriticFit, data
from dni_rl.experiments import images

GREEDY = {"model": "greedy_cnn", "num_layers": 4}
CNN = {"model": "cnn", "num_layers": 3}
SMALL = {"num_steps": 8, "log_every_steps": 2, "eval_every_steps": 4, "checkpoint_every_steps": 4, "num_layers": 3}
RUNS = {
    "backprop": {"arm": "backprop"},
    "none": {"arm": "none"},
    "dni": {"arm": "dni", "critic_hidden_sizes": (16,)},
    "cdni": {"arm": "cdni"},
    "asynchronous": {"arm": "cdni", "update_probability": 0.5},
    "unlocked": {"arm": "cdni", "unlocked": True},
    "augmented": {"arm": "none", "augment": True},
    "cnn dni": {**CNN, "arm": "dni"},
    "cnn asynchronous": {**CNN, "arm": "cdni", "num_layers": 4, "update_probability": 0.5},
    "greedy": {**GREEDY, "arm": "cdni"},
    "greedy as published": {**GREEDY, "arm": "dni", "critic_start": "random_bias", "target_unit": "batch_mean"},
}


def without_seconds(result):
    return {**result, "seconds": 0.0, "curve": [{**point, "seconds": 0.0} for point in result["curve"]]}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_one_that_never_stopped(name, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    settings = {**SMALL, **RUNS[name]}
    result = images.run(images.make_config("smoke", **settings), whole, tensorboard=False)
    images.run(images.make_config("smoke", **{**settings, "num_steps": 4}), pieces, tensorboard=False)
    with open(pieces / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/loss": 9.0}\n{"st')  # what a run that is cut off leaves
    resumed = images.run(images.make_config("smoke", **settings), pieces, resume=True, tensorboard=False)
    assert without_seconds(resumed) == without_seconds(result) and rows(pieces) == rows(whole)
    assert result["error"] == result["curve"][-1]["error"] and [p["step"] for p in result["curve"]] == [4, 8]
    done = images.run(images.make_config("smoke", **settings), pieces, resume=True, tensorboard=False)
    assert done == resumed  # and is not run again
    saved = [torch.load(folder / "checkpoint.pt", weights_only=True)["net"] for folder in (whole, pieces)]
    tensors = [key for key, value in saved[0].items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in tensors)


@pytest.mark.parametrize("context_size", [0, 10])
def test_a_dense_critic_with_hidden_layers_starts_at_zero_and_does_not_mind_the_scale_of_what_it_reads(context_size):
    critic = images.DenseLayerCritic(6, (8, 8), context_size)
    state, target = torch.rand(32, 6), torch.randn(32, 6)
    context = torch.eye(10)[torch.arange(32) % 10] if context_size else None
    assert not critic.synthetic_gradient((state,), context)[0].any()
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        critic.fit((state,), (target,), context).loss.backward()
        optimizer.step()
    (predicted,) = critic.synthetic_gradient((state,), context)
    assert predicted.abs().mean() > 0.01
    if context is None:  # batch normalisation follows the first layer
        torch.testing.assert_close(critic.synthetic_gradient((50.0 * state,))[0], predicted, atol=1e-3, rtol=1e-3)
    else:
        other = critic.synthetic_gradient((state,), context.roll(1, dims=0))[0]
        assert (other - predicted).abs().mean() > 0.01


def test_the_smoke_preset_learns_and_writes_everything(tmp_path, capsys):
    images.main(["--preset", "smoke", "--arm", "cdni", "--run-folder", str(tmp_path / "run")])
    assert "cdni on synthetic, 4 layers, 400 steps: test error" in capsys.readouterr().out
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "test/error" in row] == [200, 400]
    assert found[-1]["test/error"] < 0.45  # the last layer alone ends at 0.57; chance is 0.9
    assert {"train/loss", "critic_1/cosine", "critic_3/explained_variance"} <= found[0].keys()
    assert json.loads((tmp_path / "run/config.json").read_text())["arm"] == "cdni"
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_without_gradients_from_above_only_the_last_layer_moves():
    experiment = images.Experiment(images.make_config("smoke", arm="none", num_layers=3), 64)
    before = [p.detach().clone() for p in experiment.net.parameters()]
    x, labels = images.Batches(images.load("synthetic", "train"), 32, 0, "cpu")[0]
    experiment.update(0, x, labels)
    moved = [not torch.equal(p, q) for p, q in zip(experiment.net.parameters(), before, strict=True)]
    assert moved == [False] * (len(before) - 2) + [True] * 2


def test_learning_rates_drop_by_ten():
    config = images.make_config("smoke", learning_rate=1.0, learning_rate_drop_steps=(3, 5))
    experiment = images.Experiment(config, 64)
    batch = images.Batches(images.load("synthetic", "train"), 32, 0, "cpu")[0]
    found = []
    for step in (0, 2, 3, 4, 5):
        experiment.update(step, *batch)
        found.append({group["lr"] for o in experiment.optimizers for group in o.param_groups})
    assert [rates.pop() for rates in found] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    assert found == [set()] * 5


def test_critics_and_input_models_may_have_learning_rates_of_their_own():
    rates = {"learning_rate": 1.0, "critic_learning_rate": 0.5, "input_learning_rate": 2.0}
    config = images.make_config("smoke", unlocked=True, learning_rate_drop_steps=(1,), **rates)
    experiment = images.Experiment(config, 64)
    own = {id(p): 0.5 for critic in experiment.net.critics for p in critic.parameters()}
    own |= {id(p): 2.0 for model in experiment.net.input_models for p in model.parameters()}
    batch = images.Batches(images.load("synthetic", "train"), 32, 0, "cpu")[0]
    for step, factor in ((0, 1.0), (1, 0.1)):
        experiment.update(step, *batch)
        found = [group for optimizer in experiment.optimizers for group in optimizer.param_groups]
        assert [g["lr"] for g in found] == pytest.approx([own.get(id(g["params"][0]), 1.0) * factor for g in found])
        assert len({g["lr"] for g in found}) == 3
    rates = {"learning_rate": 1.0, "critic_learning_rate": 0.5, "learning_rate_drop_steps": ()}
    experiment = images.Experiment(images.make_config("smoke", unlocked=True, **rates), 64)
    assert {o.param_groups[0]["lr"] for o in experiment.optimizers[-len(experiment.net.input_models) :]} == {1.0}


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    labels = torch.arange(10)
    batches = images.Batches(data.Images(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), labels), 5, 0, "cpu")
    first = torch.cat([batches[0][1], batches[1][1]])
    second = torch.cat([batches[2][1], batches[3][1]])
    assert first.sort().values.tolist() == second.sort().values.tolist() == labels.tolist()
    assert not torch.equal(first, second)
    assert torch.equal(batches[1][1], first[5:])  # the order depends on the step alone
    other = images.Batches(data.Images(batches.images, labels), 5, 1, "cpu")
    assert not torch.equal(other[0][1], first[:5])  # and on the seed


def test_augmented_images_are_shifted_and_mirrored_views():
    picture = torch.arange(1, 2 * 5 * 6 + 1, dtype=torch.uint8).view(1, 2, 5, 6)
    generator = torch.Generator().manual_seed(0)
    found = images.augmented(picture.expand(400, -1, -1, -1), generator, margin=1)
    padded = torch.nn.functional.pad(picture[0], (1, 1, 1, 1))
    views = {}
    for y in range(3):
        for x in range(3):
            view = padded[:, y : y + 5, x : x + 6]
            views[y, x, False], views[y, x, True] = view, view.flip(-1)
    seen = {key for one in found for key, view in views.items() if torch.equal(one, view)}
    assert seen == set(views) and all(any(torch.equal(one, view) for view in views.values()) for one in found)


def test_a_batch_is_augmented_by_seed_and_step_alone():
    train = images.load("synthetic", "train")
    batches = images.Batches(train, 32, 0, "cpu", augment=True)
    first, labels = batches[3]
    again, plain = batches[3][0], images.Batches(train, 32, 0, "cpu")[3]
    assert torch.equal(first, again) and torch.equal(labels, plain[1]) and not torch.equal(first, plain[0])
    assert not torch.equal(first, images.Batches(train, 32, 1, "cpu", augment=True)[3][0])


def test_a_run_is_tested_on_the_test_split_with_running_statistics(monkeypatch):
    train = images.load("synthetic", "train")
    every_other = torch.arange(len(train.labels)) % 2
    splits = {"train": train, "test": data.Images(train.images, (train.labels + every_other) % 10)}
    monkeypatch.setattr(images, "load", lambda _, split: splits[split])
    training = images.Training(images.make_config("smoke", num_layers=3))
    for _ in range(20):
        training.update()
    net = training.experiment.net

    def error(split):
        with torch.no_grad():
            return (net(images.pixels(splits[split].images)).argmax(-1) != splits[split].labels).float().mean().item()

    net.eval()
    of_train, of_test = error("train"), error("test")
    before = {name: p.clone() for name, p in net.layers.state_dict().items()}
    net.train()
    found = training.evaluation()["test/error"]
    assert found == pytest.approx(of_test, abs=1e-6) and net.training
    assert all(torch.equal(p, before[name]) for name, p in net.layers.state_dict().items())
    assert abs(of_train - of_test) > 0.01  # another, on the wrong split
    assert abs(error("test") - of_test) > 0.01  # and with the statistics of batches


def test_settings_are_chosen_by_training_images_that_are_held_out(tmp_path, monkeypatch):
    read = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda dataset, split: (read.append(split), load(dataset, split))[1])
    config = images.make_config("smoke", **SMALL, validation_size=64)
    training = images.Training(config)
    whole = load("synthetic", "train")
    assert torch.equal(training.evaluated.labels, whole.labels[-64:])
    assert torch.equal(training.batches.images, whole.images[:-64]) and len(training.batches.labels) == 1024 - 64
    images.run(config, tmp_path, tensorboard=False)
    assert "test" not in read
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/error" in row for row in rows) and not any("test/error" in row for row in rows)
    matrix = images.members("laptop", ("cdni",), (0,), {"validation_size": 10})
    summary = images.summarize(matrix, {m.name: {"error": 0.1, "seconds": 1.0} for m in matrix})
    assert summary["rows"][0]["published"] is None and "validation error by seed" in images.table(summary)


def convolutional(arm="dni", **settings):
    config = images.make_config("smoke", **{**GREEDY, **settings}, arm=arm)
    return images.Experiment(config, 3 * 32 * 32), config


def batch(config, step=0):
    return images.Batches(images.load(config.dataset, "train"), config.batch_size, 0, "cpu")[step]


def test_the_greedy_net_is_the_published_one():
    config = images.make_config("paper", **GREEDY, arm="cdni")
    layers, shapes = images.conv_layers(config.num_layers, config.hidden_size, (3, 32, 32))
    assert shapes == [(128, 10, 10), (128, 3, 3), (128, 1, 1)]
    convolutions = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.padding) for c in convolutions] == [
        (3, 128, (5, 5), (2, 2)), (128, 128, (5, 5), (2, 2)), (128, 128, (5, 5), (2, 2)),
    ]  # fmt: skip
    pools = [type(m).__name__ for layer in layers for m in layer.modules() if "Pool" in type(m).__name__]
    assert pools == ["MaxPool2d", "AvgPool2d", "AvgPool2d"] and layers[-1][1].in_features == 128
    x = torch.randn(2, 3 * 32 * 32)
    h = layers[0](x)
    assert h.shape == (2, 128, 10, 10)
    first = torch.nn.functional.max_pool2d(layers[0][2](layers[0][1](x.view(2, 3, 32, 32))).relu(), 3)
    torch.testing.assert_close(h, first, rtol=1e-3, atol=1e-4)
    assert (config.batch_size, config.learning_rate, config.augment) == (256, 3e-5, True)


def test_dense_nets_have_the_papers_units_unless_told_otherwise():
    units = {dataset: images.make_config("paper", dataset=dataset).hidden_size for dataset in ("mnist", "cifar10")}
    assert units == {"mnist": 256, "cifar10": 1_000}
    assert images.make_config("paper", dataset="cifar10", hidden_size=8).hidden_size == 8


def test_layers_have_as_many_updates_where_they_learn_now_and_then_unless_told_otherwise():
    whole, part = (images.make_config("laptop", update_probability=p) for p in (1.0, 0.2))
    assert part.num_steps == 5 * whole.num_steps
    assert part.learning_rate_drop_steps == tuple(5 * step for step in whole.learning_rate_drop_steps)
    assert images.make_config("laptop", update_probability=0.2, num_steps=10).num_steps == 10
    assert images.make_config("paper", update_probability=0.2).num_steps == 500_000


@pytest.mark.parametrize(("dataset", "pixels", "filters"), [("mnist", 28 * 28, 64), ("cifar10", 3 * 32 * 32, 128)])
def test_the_cnn_and_its_critics_are_the_papers(dataset, pixels, filters):
    for num_layers in (3, 4):
        config = images.make_config("paper", model="cnn", dataset=dataset, num_layers=num_layers, arm="cdni")
        net = images.Experiment(config, pixels).net
        assert len(net.layers) == num_layers and len(net.critics) == num_layers - 1
        assert [c.state_shapes for c in net.critics] == [
            ((filters, side, side),) for side in (9 + (pixels > 784), 3, 1)
        ][: num_layers - 1]
        weights = [[p for p in layer.parameters() if p.dim() > 1] for layer in net.layers]
        assert [len(w) for w in weights] == [1] * num_layers  # BN apart: the layers with weights
        assert [tuple(w[0].shape[2:]) for w in weights] == [(5, 5)] * (num_layers - 1) + [()]
        for critic in net.critics:
            convolutions = [m for m in critic.net.modules() if isinstance(m, torch.nn.Conv2d)]
            assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [
                (filters, filters, (5, 5))
            ] * 3
            assert len([m for m in critic.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]) == 2


class Oracle(torch.nn.Module):
    """Answers with a gradient that it was told, and learns nothing."""

    def __init__(self, gradient):
        super().__init__()
        self.gradient = gradient

    def synthetic_gradient(self, state, context=None):
        return (self.gradient,)

    def fit(self, state, target, context=None):
        torch.testing.assert_close(target[0], self.gradient)
        return CriticFit(*[torch.zeros(())] * 6)


@pytest.mark.parametrize("num_layers", [3, 4])
def test_with_the_true_gradients_a_decoupled_cnn_learns_as_by_backpropagation(num_layers):
    settings = {"model": "cnn", "num_layers": num_layers}
    locked, config = convolutional("backprop", **settings)
    decoupled, _ = convolutional("none", **settings)
    locked.net.double(), decoupled.net.double()
    x, labels = batch(config)
    x = x.double()
    hidden = [x]
    for layer in locked.net.layers:
        hidden.append(layer(hidden[-1]))
    losses = torch.nn.functional.cross_entropy(hidden[-1], labels, reduction="sum")
    truth = torch.autograd.grad(losses, hidden[1:-1])
    decoupled.net.critics = torch.nn.ModuleList(Oracle(gradient) for gradient in truth)
    decoupled.net._has_critic = [True] * len(truth)
    locked.update(0, x, labels), decoupled.update(0, x, labels)
    found, wanted = ([p.grad for p in net.layers.parameters()] for net in (decoupled.net, locked.net))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert all(gradient.norm() > 1e-3 for gradient in wanted if gradient.dim() > 1)


def test_the_critics_of_a_cnn_may_be_linear():
    experiment, config = convolutional("cdni", **CNN, critic_hidden_sizes=())
    critic = experiment.net.critics[0]
    state, labels = torch.randn(4, 4, 10, 10), torch.eye(10)[:4]
    assert (critic.synthetic_gradient((state,), labels)[0] == 0).all()
    for step in range(3):
        experiment.update(step, *batch(config, step))
    zero, shown = torch.zeros(10, 10), torch.eye(10)

    def said(maps, context):
        return critic.synthetic_gradient((maps.expand(len(context), -1, -1, -1),), context)[0]

    origin = said(torch.zeros(1, 4, 10, 10), zero)
    torch.testing.assert_close(  # additive in maps and label
        said(state[:1], shown) - origin,
        (said(state[:1], zero) - origin) + (said(torch.zeros(1, 4, 10, 10), shown) - origin),
    )
    by_label = (said(state[:1], shown) - said(state[:1], zero)) / critic.target_rms.view(4, 10, 10)
    torch.testing.assert_close(by_label, by_label[:, :, :1, :1].expand_as(by_label))  # the label is a constant map
    assert (by_label[0] - by_label[1]).abs().max() > 1e-4


def test_layers_of_a_cnn_learn_now_and_then():
    experiment, config = convolutional("cdni", **CNN, update_probability=0.5)
    experiment.update(0, *batch(config))  # the first synthetic gradients are zero
    moved = []
    for step in range(1, 9):
        before = [next(layer.parameters()).detach().clone() for layer in experiment.net.layers]
        experiment.update(step, *batch(config, step))
        now = [next(layer.parameters()) for layer in experiment.net.layers]
        moved.append([not torch.equal(p, q) for p, q in zip(now, before, strict=True)])
    for of_layer in zip(*moved, strict=True):
        assert 0 < sum(of_layer) < 8
    assert len({tuple(m) for m in moved}) > 2  # each by itself


def test_who_learns_depends_on_the_seed():
    first, same, other = (
        images.Experiment(images.make_config("smoke", update_probability=0.5, seed=seed), 64).net.get_extra_state()
        for seed in (0, 0, 1)
    )
    assert torch.equal(first["generator"], same["generator"])
    assert not torch.equal(first["generator"], other["generator"])


@pytest.mark.parametrize("arm", ["dni", "cdni"])
def test_greedy_critics_start_at_zero_or_where_the_published_ones_did(arm):
    for start, unit in (("zero", "rms"), ("zero", "batch_mean"), ("random_bias", "rms"), ("random_bias", "batch_mean")):
        experiment, config = convolutional(arm, critic_start=start, target_unit=unit)
        critic = experiment.net.critics[0]
        state = torch.randn(16, 4, 10, 10)
        context = torch.eye(10)[torch.arange(16) % 10] if arm == "cdni" else None
        (said,) = critic.synthetic_gradient((state,), context)
        if start == "zero":
            assert (said == 0).all()
            continue
        bias = critic.net.last.bias.detach()
        # With the unit of the batch, what reaches a parameter after the mean over the batch is the bias itself.
        scale = config.batch_size if unit == "batch_mean" else 1.0
        torch.testing.assert_close(said, scale * bias[:, None, None].expand_as(state))
        assert 0 < bias.abs().max() <= (4 * 25) ** -0.5


def test_with_the_unit_of_the_batch_a_critic_regresses_on_gradients_of_the_mean():
    experiment, config = convolutional(critic_start="random_bias", target_unit="batch_mean")
    critic = experiment.net.critics[1]
    states, targets = torch.randn(16, 4, 3, 3), torch.randn(16, 4, 3, 3)
    raw = critic.net(states)  # what the published critic predicts
    published = (raw - targets / config.batch_size).square().mean()
    fit = critic.fit((states,), (targets,))
    torch.testing.assert_close(fit.loss, published)
    assert (critic.target_rms == config.batch_size).all()


def test_greedy_critics_learn_and_use_the_label():
    experiment, config = convolutional("cdni", learning_rate=3e-3)
    for step in range(30):
        metrics = experiment.update(step, *batch(config, step))
    assert metrics["critic_1/explained_variance"] > 0.1
    critic = experiment.net.critics[0]
    state = torch.randn(1, 4, 10, 10).expand(2, -1, -1, -1)
    said = critic.synthetic_gradient((state,), torch.eye(10)[:2])[0]
    assert not torch.allclose(said[0], said[1])


def test_a_matrix_has_a_table_with_the_published_errors(tmp_path, capsys):
    arguments = ["--model", "greedy_cnn", "--arms", "--num-steps", "4", "--run-folder", str(tmp_path / "greedy")]
    images.main([*arguments, "--no-tensorboard"])
    shown = capsys.readouterr().out
    assert "greedy_cnn on synthetic_rgb" in shown and "dni-published" in shown
    summary = json.loads((tmp_path / "greedy/summary.json").read_text())
    assert [row["arm"] for row in summary["rows"]] == ["backprop", "dni", "cdni", "dni-published"]
    assert summary["configs"]["dni-published-seed0"]["critic_start"] == "random_bias"
    assert all(row["published"] is None for row in summary["rows"])  # another data set
    for row in summary["rows"]:
        result = json.loads((tmp_path / f"greedy/{row['arm']}-seed0/result.json").read_text())
        assert row["per_seed"] == {"0": result["error"]} and row["mean"] == result["error"]
    images.main([*arguments, "--resume", "--no-tensorboard"])
    assert capsys.readouterr().out == shown
    for model, dataset, arm, published in (
        ("greedy_cnn", "cifar10", "dni-published", 0.377), ("greedy_cnn", "cifar10", "backprop", 0.153),
        ("dense", "mnist", "cdni", 0.019), ("dense", "cifar10", "dni", 0.45),
        ("cnn", "mnist", "none", 0.028), ("cnn", "cifar10", "cdni", 0.164), ("cnn", "fashion_mnist", "cdni", None),
    ):  # fmt: skip
        matrix = images.members("paper", (arm,), (0, 1), {"model": model, "dataset": dataset})
        results = {m.name: {"error": 0.1 * m.config.seed, "seconds": 1.0} for m in matrix}
        row = images.summarize(matrix, results)["rows"][0]
        assert row["published"] == published and row["mean"] == pytest.approx(0.05)
        assert (matrix[0].config.critic_hidden_sizes == (1024, 1024)) == ((model, arm) == ("dense", "dni"))


def test_the_table_of_a_cnn_has_its_published_errors_by_layers(tmp_path, capsys):
    arguments = ["--model", "cnn", "--num-layers", "3", "--num-steps", "4", "--no-tensorboard", "--arms"]
    images.main([*arguments, "--run-folder", str(tmp_path / "cnn")])
    assert "cnn on synthetic_rgb" in capsys.readouterr().out
    summary = json.loads((tmp_path / "cnn/summary.json").read_text())
    assert [(row["arm"], row["num_layers"]) for row in summary["rows"]] == [(arm, 3) for arm in images.ARMS]
    assert summary["configs"]["dni-seed0"]["critic_hidden_sizes"] == [4, 4]
    for num_layers, published in ((3, [0.8, 0.9, 0.9, 1.0]), (4, [0.6, 2.8, 0.7, 0.8])):
        matrix = images.members("laptop", images.ARMS, (0,), {"model": "cnn", "num_layers": num_layers})
        table = images.summarize(matrix, {m.name: {"error": 0.1, "seconds": 1.0} for m in matrix})
        assert [100 * row["published"] for row in table["rows"]] == pytest.approx(published)


def test_presets_state_the_papers_settings():
    paper = images.make_config("paper", arm="dni")
    assert (paper.learning_rate, paper.num_steps, paper.batch_size) == (3e-5, 500_000, 256)
    assert paper.learning_rate_drop_steps == (300_000, 400_000) and paper.critic_hidden_sizes == (1024, 1024)
    assert images.make_config("paper", arm="cdni").critic_hidden_sizes == ()
    laptop = {arm: images.make_config("laptop", arm=arm) for arm in ("backprop", "dni")}
    assert laptop["dni"].learning_rate < laptop["backprop"].learning_rate < laptop["dni"].critic_learning_rate
    for settings, filters in (({"dataset": "mnist"}, 64), ({"dataset": "cifar10"}, 128), ({"hidden_size": 8}, 8)):
        for arm in ("dni", "cdni"):
            cnn = images.make_config("paper", model="cnn", arm=arm, **settings)
            assert (cnn.hidden_size, cnn.critic_hidden_sizes) == (filters, (filters, filters))
            assert (cnn.learning_rate, cnn.num_steps, cnn.batch_size) == (3e-5, 500_000, 256)
            assert cnn.learning_rate_drop_steps == (300_000, 400_000)
    assert images.make_config("laptop", model="cnn", arm="dni").dataset == "mnist"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "magic"], "arm: found 'magic', allowed backprop, none, dni, cdni"),
        (["--arm", "backprop", "--unlocked"], "'backprop' is locked"),
        (["--num-layers", "1"], "num_layers: found 1"),
        (["--update-probability", "0"], "update_probability: found 0.0"),
        (["--validation-size", "-1"], "validation_size: found -1"),
        (["--validation-size", "1024"], "validation_size: found 1024, allowed less than the 1024 training images"),
        (["--critic-learning-rate", "0"], "critic_learning_rate: found 0.0, allowed above 0, or none"),
        (["--input-learning-rate", "0"], "input_learning_rate: found 0.0, allowed above 0, or none"),
        (["--model", "huge"], "model: found 'huge', allowed dense, cnn, greedy_cnn"),
        (["--model", "huge", "--arms"], "model: found 'huge', allowed dense, cnn, greedy_cnn"),
        (["--model", "cnn", "--num-layers", "5"], "num_layers: found 5, allowed 3 or 4 with model cnn"),
        (["--model", "cnn", "--unlocked"], "unlocked: found True with model cnn, allowed False"),
        (["--model", "cnn", "--dataset", "synthetic"], "dataset: found 'synthetic', too small for model cnn"),
        (["--model", "cnn", "--critic-hidden-sizes", "8", "0"], "critic_hidden_sizes: found 8 0, allowed"),
        (["--critic-hidden-sizes", "0"], "critic_hidden_sizes: found 0, allowed positive sizes, or nothing for linear"),
        (["--critic-start", "random_bias"], "critic_start, target_unit: found random_bias, rms, allowed zero, rms"),
        (["--model", "greedy_cnn", "--unlocked"], "model: greedy_cnn has 4 layers"),
        (["--model", "greedy_cnn", "--dataset", "synthetic"], "dataset: found 'synthetic', too small"),
        (["--seed", "-1"], "seeds: found -1, allowed 0 to 2**32 - 1"),
        (["--seeds", "0"], "seeds, jobs: they belong to a matrix of runs; add --arms"),
        (["--arms", "dni", "--seed", "1"], "arm, seed: they belong to one run"),
        (["--arms", "backprop-published"], "arms: found 'backprop-published', allowed backprop, none"),
        (["--arms", "dni", "dni-"], "arms: found 'dni-', allowed backprop, none"),
        (["--arms", "dni-published"], "use --model cnn or --model greedy_cnn"),
        (["--arms", "dni", "dni"], "arms: found dni dni, allowed one or more, each once"),
    ],
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        images.main([*arguments, "--run-folder", str(tmp_path), "--no-tensorboard"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and message in shown and shown.count("\n") == 1


def test_a_folder_with_another_run_is_refused(tmp_path):
    config = images.make_config("smoke", **SMALL)
    images.run(config, tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="continue it with --resume"):
        images.run(config, tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"other settings \(arm cdni -> none\)"):
        images.run(images.make_config("smoke", **SMALL, arm="none"), tmp_path, resume=True, tensorboard=False)
    evaluated_otherwise = images.make_config("smoke", **{**SMALL, "eval_every_steps": config.eval_every_steps + 1})
    assert images.run(evaluated_otherwise, tmp_path, resume=True, tensorboard=False)["steps"] == config.num_steps


def test_a_plan_is_a_matrix_or_one_run_in_the_folder_itself():
    (member,) = images.plan(["--arm", "none", "--seed", "3"]).matrix
    assert (member.name, member.config.arm, member.config.seed) == ("", "none", 3)
    asked = images.plan(["--preset", "laptop", "--model", "cnn", "--arms", "--seeds", "3"])
    assert [member.name for member in asked.matrix] == [f"{arm}-seed3" for arm in images.ARMS]
    assert (asked.jobs, images.plan(["--model", "cnn", "--arms", "dni"]).jobs) == (2, 1)


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    images.load.cache_clear()
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        images.main(["--dataset", "mnist", "--run-folder", str(tmp_path / "run")])
    assert "nowhere: no such folder" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_program_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dni_rl.experiments.images", "--help"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert "--update-probability" in done.stdout and done.stderr == ""
