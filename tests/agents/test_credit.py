"""The credit horizon of an agent: what is measured, when it is logged, and that a run does not notice."""

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from agents import credit as credit_module
from agents import train as train_module
from agents.build import spread_seeds
from agents.checkpoint import load_checkpoint, rng_state
from agents.credit import (
    _acted,
    _as_windows,
    _losses,
    _to_be_remembered,
    check_credit,
    credit_figure,
    measure_credit,
)
from agents.learner import make_windows, with_inputs
from agents.metrics import BOARD, read_metrics
from agents.rollout import Rollout
from agents.train import Trainer, run_directory, train
from envs.timestep import EnvSpec
from tests.agents.scripted_env import ScriptedEnv
from tests.agents.small_runs import A2C, ARMS, PPO, assert_equal, interrupt_after, make_config, rows_of

ON = {"credit_every_steps": 100, "credit_length": 16, "credit_num_envs": 3}
LONG = {"credit_length": 1000, "credit_num_envs": 90}
every_arm = pytest.mark.parametrize("arm", ARMS)


class DrawingEnv(ScriptedEnv):
    """Adds noise from all the global generators to its observations, as an environment of a user's may."""

    def _timestep(self, rows):
        noise = torch.rand(()) + np.random.rand() + random.random()
        for row in rows:
            row["observation"] = row["observation"] + noise.float()
        return super()._timestep(rows)


def trained(folder, updates=6, **settings):
    trainer = Trainer(make_config(folder, **{"credit_length": 32, "credit_num_envs": 3} | settings))
    for _ in range(updates):
        trainer.update()
    return trainer


def without_credit(rows):
    rows = [{k: v for k, v in row.items() if not k.startswith("credit/")} for row in rows]
    return [row for row in rows if len(row) > 1]


def state_of(directory):
    state = load_checkpoint(directory)
    for name in ("name", *ON):
        del state["config"]["run"][name]
    return state


# A run does not notice


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": PPO},
        {"critic": {"kind": "none"}},
        {"env": {"id": "tests.agents.test_credit:DrawingEnv", "kwargs": {}}, "critic": {"kind": "dni"}},
        ARMS["levels"],
    ],
    ids=["ppo", "none", "global generators", "levels"],
)
def test_a_run_that_is_measured_equals_one_that_is_not(tmp_path, settings):
    runs, generators = [], []
    for name, credit in (("plain", {}), ("measured", ON)):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        runs.append(train(make_config(tmp_path, name, **settings, **credit)))
        generators.append(rng_state())
    plain, measured = runs
    assert without_credit(rows_of(measured)) == rows_of(plain)
    assert any("credit/horizon" in row for row in read_metrics(measured))
    assert_equal(state_of(measured), state_of(plain))
    assert_equal(*generators)


@every_arm
def test_a_measurement_changes_nothing_and_repeats_itself(tmp_path, arm):
    trainer = trained(tmp_path, **ARMS[arm])
    config, learner = trainer.config, trainer.learner
    gradients = [None if p.grad is None else p.grad.clone() for p in learner.model.parameters()]
    before = trainer.state_dict()
    before["learner"] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in before["learner"].items()}
    parameters = [p.detach().clone() for p in learner.learned.parameters()]
    first, second = (measure_credit(config, learner) for _ in range(2))
    for name in ("true_norm", "delivered_norm", "cosine", "num_pairs"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    other = measure_credit(config, learner, seed=config.run.seed + 1)
    assert not torch.equal(first.true_norm, other.true_norm)
    assert_equal(trainer.state_dict(), before)
    assert_equal([p.detach() for p in learner.learned.parameters()], parameters)
    assert_equal([p.grad for p in learner.model.parameters()], gradients)


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_run_resumed_is_measured_as_one_that_never_stopped(tmp_path, monkeypatch, stop):
    whole = train(make_config(tmp_path, "whole", **ON))
    config = make_config(tmp_path, "parts", **ON)
    with monkeypatch.context() as patch:
        if stop:
            interrupt_after(patch, stop)
        else:  # while the agent is measured before its first update
            patch.setattr(train_module, "measure_credit", _interrupting(measure_credit))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    directory = run_directory(config)
    assert load_checkpoint(directory)["step"] == 32 * stop
    torch.manual_seed(77)
    train(config, directory)
    assert rows_of(directory) == rows_of(whole)
    assert_equal(state_of(directory), state_of(whole))


def _interrupting(function):
    import signal

    def interrupting(*arguments):
        signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    return interrupting


def _sequences(trainer, seed):
    """What `measure_credit` measures on."""
    rollout, averages = _acted(trainer.config, trainer.learner, seed)
    return _as_windows(rollout, trainer.learner, averages)


def test_the_sequences_share_no_random_stream_with_the_run(tmp_path, monkeypatch):
    trainer = trained(tmp_path, updates=0, algorithm={"rollout_length": 32, "bptt_horizon": 4}, credit_num_envs=4)
    trainer.actor.collect()
    rollout = trainer.actor.collect()
    windows = _sequences(trainer, trainer.config.run.seed)
    assert windows.observation.shape == rollout.observation[:-1].shape
    of_run = rollout.observation[:-1, :, 3:]  # distractors, which do not depend on what was done
    assert not torch.equal(windows.observation[..., 3:], of_run)
    assert not torch.equal(windows.action, rollout.action)
    assert not windows.first[0].all()  # they begin in the middle of episodes
    monkeypatch.setattr(credit_module, "spread_seeds", lambda seed, _: spread_seeds(seed, 2))
    from_seed_of_run = _sequences(trainer, trainer.config.run.seed)
    assert torch.equal(from_seed_of_run.observation[..., 3:], of_run)  # so that the above says something


# What is measured


@pytest.mark.parametrize(
    "algorithm",
    [{"name": "a2c"}, {"name": "ppo", "epochs": 1, "minibatches": 1, "normalize_advantages": True}],
    ids=["a2c", "ppo"],
)
def test_the_losses_are_those_that_the_learner_minimises(tmp_path, algorithm):
    whole = {"rollout_length": 16, "bptt_horizon": 16, "max_grad_norm": None} | algorithm
    learner = (trainer := trained(tmp_path, 3, critic={"kind": "none"}, algorithm=whole)).learner
    rollout = trainer.actor.collect()
    windows = make_windows(rollout, 16, learner.algorithm.discount, learner.algorithm.gae_lambda)
    inputs = learner.model.core_inputs(windows.observation, windows.action_tm1, windows.reward, windows.first)
    outputs, _ = learner.model.core.unroll(inputs, windows.state, windows.first)
    losses = _losses(learner, windows)(outputs)
    expected = torch.autograd.grad(losses.mean(), list(learner.model.parameters()))
    learner.update(rollout)
    for p, gradient in zip(learner.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


@every_arm
def test_what_each_arm_delivers(tmp_path, arm):
    trainer = trained(tmp_path, **ARMS[arm])
    horizon = measure_credit(trainer.config, trainer.learner)
    bare = measure_credit(trainer.config, trainer.learner, with_critics=False)
    # the cue is seen at step 0 of an episode of at most 7 losses
    exists = horizon.true_norm > 0
    assert exists.tolist() == [lag <= int(exists.sum()) for lag in range(1, 17)] and 4 <= exists.sum() <= 8
    torch.testing.assert_close(bare.true_norm, horizon.true_norm, rtol=1e-4, atol=1e-9)
    K = trainer.config.algorithm.bptt_horizon
    inside, beyond = slice(None, K - 1), exists & (torch.arange(1, 17) >= K)
    if arm == "levels":  # the upper level has a longer window
        beyond &= torch.arange(1, 17) >= 2 * K
        assert bare.delivered_norm[K - 1] > 0
    assert not bare.delivered_norm[beyond].any()
    if arm != "levels":
        assert (bare.delivered_norm[inside] > 0).all()
    if arm == "none":
        torch.testing.assert_close(horizon.delivered_norm, bare.delivered_norm, rtol=0, atol=0)
    elif arm == "rtrl":
        torch.testing.assert_close(horizon.delivered_norm, horizon.true_norm, rtol=1e-12, atol=0)
        assert horizon.effective_horizon == exists.sum()
    else:
        assert (horizon.delivered_norm[beyond] > 0).all()


def test_the_window_is_that_of_the_run(tmp_path):
    reaches = []
    for K in (2, 4, 8):
        trainer = trained(tmp_path, critic={"kind": "none"}, algorithm=A2C | {"bptt_horizon": K})
        horizon = measure_credit(trainer.config, trainer.learner)
        reaches.append(int((horizon.delivered_norm > 0).sum()))
    assert reaches[:2] == [1, 3] and reaches[2] > 3  # at most K - 1: the state at the cut itself receives nothing


def test_atari_is_measured_from_new_games_on(tmp_path):
    env = {"id": "ALE/Breakout-v5", "num_envs": 2, "kwargs": {"num_threads": 1}}
    config = make_config(tmp_path, env=env, critic={"kind": "dni"}, total_steps=32, **ON | {"credit_num_envs": 2})
    rows = [row for row in read_metrics(train(config)) if "credit/horizon" in row]
    assert [row["step"] for row in rows] == [0, 32]
    assert all(row["credit/true_lag_90"] >= 1 for row in rows)


def test_sequences_that_would_not_fit_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(credit_module, "MAX_OBSERVATION_BYTES", 2**19)
    config = make_config(tmp_path, env={"id": "tests.agents.scripted_env:ScriptedEnv", "kwargs": {}}, **ON | LONG)
    with pytest.raises(ValueError) as error:
        train(config)
    assert str(error.value) == (
        "run.credit_num_envs: found 90 with run.credit_length 1000, whose observations take 1.0 MiB; allowed 0.5 MiB; set "
        "--run.credit_num_envs 43, or a shorter length"
    )
    assert not run_directory(config).exists()  # otherwise its name would be taken
    check_credit(make_config(tmp_path, **LONG | {"credit_num_envs": 43}), EnvSpec((3,), torch.float32, num_actions=3))


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^run\.credit_length: found 3; allowed an integer of at least 4"):
        make_config(tmp_path, credit_length=3)
    with pytest.raises(ValueError, match=r"^run\.credit_every_steps: found 0; allowed"):
        make_config(tmp_path, credit_every_steps=0)


@pytest.mark.parametrize("kind", ["dni", "cdni"])
@pytest.mark.parametrize(
    "inputs", [{"future_steps": 3}, {"past_steps": [3, 20]}, {"future_steps": 3, "past_steps": [5]}]
)
def test_critics_know_at_every_cut_what_the_learner_would_tell_them(tmp_path, monkeypatch, kind, inputs):
    """Future inputs end where a rollout of the learner ends; averages of past ones go on from rollout to rollout."""
    trainer = trained(tmp_path, critic={"kind": kind, **inputs})
    learner, T, L = trainer.learner, 32, 8
    whole = _sequences(trainer, 0)
    given = []
    monkeypatch.setattr(credit_module, "_with_inputs", lambda rollout, _, averages: given.append(averages) or rollout)
    monkeypatch.setattr(credit_module, "make_windows", lambda rollout, *rest: rollout)
    rollout = _sequences(trainer, 0)
    (averages,) = given
    assert (averages is not None and averages.any()) == ("past_steps" in inputs)
    for start in range(0, T, L):
        rows = slice(start, start + L + 1)
        names = ("observation", "action_tm1", "reward", "discount", "first", "last", "context", "value", "final_value")
        parts = {name: getattr(rollout, name)[rows] for name in names}
        parts |= {name: getattr(rollout, name)[start : start + L] for name in ("action", "logits")}
        states = tuple(s.expand(L // 4, -1, -1) for s in rollout.states)  # not looked at
        part, averages = with_inputs(Rollout(**parts, states=states), learner.model, learner.critic_config, averages)
        windows = make_windows(part, 4, 0.99, 0.95)
        for number, end in enumerate(windows.context[-1].split(3)):  # by window, then environment
            torch.testing.assert_close(whole.context[start + 4 * (number + 1)], end)


def test_what_is_to_be_remembered_is_what_stays_the_same_in_an_episode_and_differs_between_them(tmp_path):
    trainer = trained(tmp_path, credit_num_envs=8)
    rollout, _ = _acted(trainer.config, trainer.learner, 0)
    probe = _to_be_remembered(rollout)
    assert rollout.context.shape[-1] == 7  # position, distance, the time that is left, ...
    assert torch.equal(probe, rollout.context[:-1, :, :1]) and probe.abs().eq(1.0).all()  # and the cue
    assert _to_be_remembered(replace(rollout, context=None)) is None
    assert _to_be_remembered(replace(rollout, context=rollout.context[..., 1:])) is None
    alone = trained(tmp_path, credit_num_envs=1)
    assert measure_credit(alone.config, alone.learner).expected_cosine is None
    for kind in ("none", "dni", "cdni"):  # whether or not the critic is told
        agent = trained(tmp_path, critic={"kind": kind})
        assert measure_credit(agent.config, agent.learner).expected_horizon >= 2


# When, and where to


def test_it_is_logged_at_the_start_on_schedule_and_at_the_end(tmp_path):
    long = {"kwargs": {"corridor_length": 9}}
    rows = read_metrics(train(make_config(tmp_path, env=long, **ON | {"credit_every_steps": 192})))
    assert [row["step"] for row in rows if "credit/horizon" in row] == [0, 192, 384, 576, 640]
    assert len({row["step"] for row in rows}) == len(rows)  # what falls on the same step is one row
    names = {name for row in rows for name in row if name.startswith("credit/")}
    assert names == {
        *("credit/horizon", "credit/expected_horizon", "credit/lag_90", "credit/true_lag_90", "credit/delivered_share")
    }
    assert rows[0]["credit/lag_90"] <= 3 < rows[0]["credit/true_lag_90"]  # the first synthetic gradient is zero
    assert not any("credit/horizon" in row for row in read_metrics(train(make_config(tmp_path, "off"))))


def test_a_resumed_run_may_change_the_schedule(tmp_path):
    constant = {"anneal_learning_rate": False}
    directory = train(make_config(tmp_path, algorithm=constant, total_steps=320))
    train(make_config(tmp_path, algorithm=constant, total_steps=640, **ON | {"credit_length": 20}), directory)
    steps = [row["step"] for row in read_metrics(directory) if "credit/horizon" in row]
    assert steps == [416, 512, 608, 640]


def test_the_speed_of_training_leaves_the_time_of_measuring_out(tmp_path, monkeypatch):
    clock = [0.0]

    def slow(*arguments):
        clock[0] += 1000.0
        return measure_credit(*arguments)

    def tick():
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(train_module.time, "perf_counter", tick)
    monkeypatch.setattr(train_module, "measure_credit", slow)
    row = read_metrics(train(make_config(tmp_path, **ON)))[-1]
    assert row["charts/SPS"] > 640 / 100


def _events(directory):
    return EventAccumulator(str(directory), size_guidance={"histograms": 0, "tensors": 0}).Reload()


def test_curves_and_histograms_go_to_tensorboard(tmp_path):
    events = _events(directory := train(make_config(tmp_path, tensorboard=True, **ON | {"credit_every_steps": 320})))
    assert [event.step for event in events.Images("credit/curves")] == [0, 320, 640]
    image = events.Images("credit/curves")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 2 * image.height
    rows = [row for row in read_metrics(directory) if "credit/horizon" in row]
    for name, lag_90 in (("credit/delivered_by_lag", "credit/lag_90"), ("credit/true_by_lag", "credit/true_lag_90")):
        histograms = events.Histograms(name)
        assert [event.step for event in histograms] == [0, 320, 640]
        for event, row in zip(histograms, rows, strict=True):
            counts = np.array(event.histogram_value.bucket)
            edges = np.array(event.histogram_value.bucket_limit)
            assert counts.sum() == pytest.approx(1.0)
            assert edges[np.argmax(counts.cumsum() >= 0.9)] == row[lag_90] + 0.5
    assert [event.value for event in events.Scalars("credit/horizon")] == [row["credit/horizon"] for row in rows]


def test_the_board_shows_what_runs_write_and_nothing_else(tmp_path):
    """One layout for all runs; names on it are regular expressions that match from the start, as in TensorBoard."""
    settings = [
        {"critic": {"kind": "dni_aux"}, "algorithm": PPO, **ON},
        ARMS["levels"],
    ]
    written, layouts = set(), []
    for number, each in enumerate(settings):
        events = _events(train(make_config(tmp_path, f"run{number}", tensorboard=True, **each)))
        written |= {name for name in events.Tags()["scalars"]}
        (event,) = events.Tensors("custom_scalars__config__")
        layouts.append(layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]))
    assert layouts[0] == layouts[1]
    assert [category.title for category in layouts[0].category] == ["charts", "losses", "sg", "credit"] == list(BOARD)
    patterns = [tag for category in layouts[0].category for chart in category.chart for tag in chart.multiline.tag]
    for pattern in patterns:
        assert any(re.match(pattern, name) for name in written), pattern
    for name in written - {"charts/episodes"}:
        assert any(re.match(pattern, name) for pattern in patterns), name


def test_the_figure_has_two_lines_for_each_run(tmp_path):
    trainer = trained(tmp_path)
    horizon = measure_credit(trainer.config, trainer.learner)
    norms, cosines = credit_figure([("one", horizon), ("one", horizon)]).axes
    assert len(norms.lines) == 4  # true and delivered
    assert len(cosines.lines) == 5  # of single sequences and of averages; the line at 0.5
    dashed = np.asarray(cosines.lines[1].get_ydata())
    shown = np.asarray(cosines.lines[2].get_ydata())
    exists = int((horizon.true_norm > 0).sum())
    np.testing.assert_array_equal(shown[:exists], horizon.cosine[:exists].numpy())
    np.testing.assert_array_equal(dashed[:exists], horizon.expected_cosine[:exists].numpy())
    assert np.isnan(shown[exists:]).all() and len(shown) == 16
    empty = measure_credit(trained(tmp_path, critic={"kind": "none"}).config, trainer.learner)
    empty.true_norm.zero_(), empty.delivered_norm.zero_()
    assert all(math.isfinite(x) for x in credit_figure([("nothing", empty)]).axes[0].get_ylim())
