import dataclasses
import logging
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch

from agents import train as train_module
from agents.checkpoint import PREVIOUS_FILE, load_checkpoint, save_checkpoint
from agents.config import from_dict, load_config, to_dict
from agents.metrics import MetricsWriter, read_metrics
from agents.train import NonFiniteError, Trainer, run_directory, train
from tests.agents.small_runs import A2C, ARMS, PPO, assert_equal, interrupt_after, make_config, rows_of

MOMENTS = ("value_loss", "value_error", "value_target", "value_target_squared")
SCRIPTED = "tests.agents.scripted_env:ScriptedEnv"


@pytest.fixture
def configure(tmp_path):
    """Makes the configuration of a tiny run in the test's own folder."""
    return partial(make_config, tmp_path)


# Resume


@pytest.mark.parametrize(
    ("algorithm", "kind", "privileged"),
    [(A2C, "cdni", False), (PPO, "dni", False), (A2C, "none", False), (PPO, "cdni", True)],
)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_interrupted_and_resumed_equals_one_that_never_stopped(
    configure, monkeypatch, algorithm, kind, privileged, stop
):
    settings = {"algorithm": algorithm, "critic": {"kind": kind}, "model": {"privileged_value": privileged}}
    whole = train(configure("whole", **settings))
    torch.manual_seed(99)  # nothing may depend on what the process did before
    config = configure("parts", **settings)
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    directory = run_directory(config)
    assert load_checkpoint(directory)["step"] == 32 * stop
    torch.manual_seed(77)
    assert train(config, directory) == directory

    rows = rows_of(whole)
    assert len(rows) == 7
    assert rows_of(directory) == rows
    states = [load_checkpoint(run) for run in (whole, directory)]
    for state in states:
        del state["config"]["run"]["name"]
    assert_equal(*states)


def test_the_speed_of_a_resumed_run_is_that_of_all_its_steps(configure, monkeypatch):
    clock = [0.0]
    seconds_of_an_update = 1.0
    update = Trainer.update

    def timed(self):
        clock[0] += seconds_of_an_update
        return update(self)

    monkeypatch.setattr(train_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Trainer, "update", timed)
    algorithm = {"anneal_learning_rate": False}
    config = configure(algorithm=algorithm, total_steps=320)
    directory = train(config)
    steps_of_an_update = Trainer(config).steps_per_update
    seconds_of_an_update = 3.0
    train(configure(algorithm=algorithm, total_steps=640), directory)
    assert read_metrics(directory)[-1]["charts/SPS"] == pytest.approx(steps_of_an_update / 2.0)


def test_the_speed_goes_on_from_a_checkpoint_without_one(configure):
    trainer = Trainer(configure())
    state = trainer.state_dict() | {"step": 64}
    del state["stopwatch"]
    trainer.load_state_dict(state)
    trainer.stopwatch.go()
    trainer.update()
    assert trainer.stopwatch.steps == trainer.steps_per_update == trainer.step - 64


def test_a_resumed_run_drops_what_a_crash_had_written_after_its_checkpoint(configure, monkeypatch):
    whole = train(configure("whole"))
    config = configure("parts")
    update = Trainer.update

    def crash(self):
        if self.step == 32 * 8:
            raise OSError("a crash")
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", crash)
        with pytest.raises(OSError, match="a crash"):
            train(config)
    directory = run_directory(config)
    assert load_checkpoint(directory)["step"] == 32 * 5
    assert read_metrics(directory)[-1]["step"] == 32 * 6
    train(config, directory)
    assert rows_of(directory) == rows_of(whole)


def test_global_random_generators_continue_as_well(configure):
    """Nothing of ours draws from them; an environment of the user's may."""
    trainer = Trainer(configure())
    trainer.update()
    torch.rand(3)
    state = trainer.state_dict() | {"step": trainer.step}
    expected = torch.rand(3)
    Trainer(configure()).load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)


def test_the_seed_is_that_of_all_global_random_generators(configure):
    drawn = []
    for seed in (0, 0, 1):
        np.random.rand(3), random.random(), torch.rand(3)  # nothing may depend on what the process did before
        Trainer(configure(seed=seed))
        drawn.append((np.random.rand(), random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


CONSTANT = {"anneal_learning_rate": False}


def test_a_finished_run_can_be_made_longer(configure):
    directory = train(configure(total_steps=320, algorithm=CONSTANT))
    train(configure(total_steps=640, algorithm=CONSTANT), directory)
    assert load_checkpoint(directory)["step"] == 640
    assert load_config(directory / "config.yaml").run.total_steps == 640


@pytest.mark.parametrize("total_steps", [352, 640])
@pytest.mark.parametrize(
    ("algorithm", "found", "ways_out"),
    [
        ({}, "anneal_learning_rate", "--algorithm.anneal_learning_rate false"),
        (CONSTANT | {"anneal_entropy": True}, "anneal_entropy", "--algorithm.anneal_entropy false"),
        (
            {"anneal_entropy": True},
            "anneal_learning_rate",
            "--algorithm.anneal_learning_rate false and --algorithm.anneal_entropy false",
        ),
    ],
)
def test_a_run_whose_rates_fall_keeps_its_length(configure, monkeypatch, total_steps, algorithm, found, ways_out):
    config = configure(total_steps=480, algorithm=algorithm)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 10)
        train(config)
    directory = run_directory(config)
    with pytest.raises(ValueError) as error:
        train(configure(total_steps=total_steps, algorithm=algorithm), directory)
    assert str(error.value) == (
        f"run.total_steps: found {total_steps}; allowed 480, as in the run to resume, by whose length its rates fall (algorithm.{found}); "
        f"leave it out, or start a new run, which can be made longer with {ways_out}"
    )
    assert load_config(directory / "config.yaml") == config


def test_a_run_cannot_be_made_shorter_than_it_is(configure):
    config = configure(total_steps=320, algorithm=CONSTANT)
    directory = train(config)
    with pytest.raises(ValueError) as error:
        train(configure(total_steps=288, algorithm=CONSTANT), directory)
    assert str(error.value) == (
        "run.total_steps: found 288; allowed at least 320, the step of the checkpoint to resume; leave it out, or train longer"
    )
    assert load_config(directory / "config.yaml") == config


def test_a_run_goes_on_in_its_folder(configure, tmp_path):
    directory = train(configure())
    for setting, value in {"name": "other", "output_dir": str(tmp_path / "other")}.items():
        with pytest.raises(ValueError) as error:
            train(configure(**{setting: value}), directory)
        assert str(error.value) == (
            f"run.{setting}: found {value!r}; allowed that of {directory}, where the run to resume goes on; leave it out, or start a "
            "new run"
        )


def test_a_run_goes_on_where_it_was_moved_to(configure, tmp_path):
    moved = train(configure()).rename(tmp_path / "moved")
    assert train(configure(), moved) == moved
    assert train(configure("moved"), moved) == moved


def test_a_run_that_stops_before_the_first_checkpoint_of_its_schedule_can_be_resumed(configure, monkeypatch):
    whole = train(configure("whole"))
    config = configure("parts")

    def crash(self):
        raise OSError("a crash")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a crash"):
        patch.setattr(Trainer, "update", crash)
        train(config)
    directory = run_directory(config)
    assert load_checkpoint(directory)["step"] == 0
    train(config, directory)
    assert rows_of(directory) == rows_of(whole)


def test_a_crash_of_a_run_that_goes_on_from_an_older_checkpoint_does_not_bring_back_the_newer_one(
    configure, monkeypatch
):
    config = configure()
    directory = train(config)
    rows = rows_of(directory)
    update = Trainer.update

    def crash(self):
        if self.step == 32 * 17:
            raise OSError("a crash")
        return update(self)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a crash"):
        patch.setattr(Trainer, "update", crash)
        train(config, directory / PREVIOUS_FILE)
    assert load_checkpoint(directory)["step"] == 32 * 15
    train(config, directory)
    assert rows_of(directory) == rows


def test_an_error_inside_of_the_environment_is_no_bad_setting(configure, monkeypatch):
    def broken(self):
        raise ValueError("shapes (3,) (4,)")

    monkeypatch.setattr(Trainer, "update", broken)
    with pytest.raises(RuntimeError, match=r"^step 0: shapes \(3,\) \(4,\)$") as error:
        train(configure())
    assert isinstance(error.value.__cause__, ValueError)


def test_a_run_that_another_process_still_writes_is_not_read(configure, monkeypatch):
    config = configure()
    directory = train(config)
    monkeypatch.setattr(train_module, "load_checkpoint", lambda folder: pytest.fail("read"))
    with (
        MetricsWriter(directory, total_steps=10, resume_step=640, tensorboard=False),
        pytest.raises(ValueError, match="found another process that writes to this run"),
    ):
        train(config, directory)


def test_another_experiment_cannot_continue_a_run(configure):
    directory = train(configure())
    with pytest.raises(ValueError) as error:
        train(configure(algorithm=A2C | {"learning_rate": 0.5}), directory)
    assert str(error.value) == (
        "algorithm.learning_rate: found 0.5; allowed 0.001, as in the run to resume; start a new run instead"
    )


@pytest.mark.parametrize(
    "state", [{"x": 1}, {"config": {"run": {"sed": 1}}}, {"config": 3}, None], ids=["keys", "config", "type", "model"]
)
def test_a_foreign_checkpoint_is_refused_in_one_line(configure, state):
    config = configure()
    directory = train(config)
    if state is None:
        state = load_checkpoint(directory)
        state["learner"]["model"]["value_head.0.weight"] = torch.zeros(1, 99)
    save_checkpoint(directory, state, state.get("step", 3))
    with pytest.raises(ValueError) as error:
        train(config, directory)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{directory}: found a checkpoint of another program or version")


@pytest.mark.parametrize(
    "env", [{"id": "ALE/Breakout-v5", "num_envs": 2, "kwargs": {"num_threads": 1}}, {"id": SCRIPTED}]
)
def test_where_the_environment_cannot_be_saved_a_resumed_run_says_that_new_episodes_start(configure, caplog, env):
    algorithm = A2C | CONSTANT | {"rollout_length": 4}
    settings = {"env": {"kwargs": {}} | env, "critic": {"kind": "dni"}, "algorithm": algorithm}
    env_id = settings["env"]["id"]
    directory = train(configure(**settings, total_steps=16))
    step = load_checkpoint(directory)["step"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        train(configure(**settings, total_steps=32), directory)
    assert caplog.messages == [
        f"{env_id}: the state of this environment cannot be saved; new episodes start at step {step}"
    ]
    assert load_checkpoint(directory)["step"] == 32


def test_where_the_environment_cannot_be_saved_the_new_episodes_are_not_those_of_the_beginning(configure):
    config = configure(env={"id": SCRIPTED, "kwargs": {}}, critic={"kind": "dni"})

    def observations(step):
        """What a run sees first; resumed at `step` unless that is None."""
        trainer = Trainer(config)
        if step is not None:
            trainer.load_state_dict(Trainer(config).state_dict() | {"step": step})
            assert trainer.actor.environment is trainer.environment
        return trainer.actor.collect().observation

    start, *resumed = (observations(step) for step in (None, 32, 64))
    assert not any(torch.equal(start, other) for other in resumed)
    assert not torch.equal(*resumed)
    assert torch.equal(observations(64), resumed[1])  # the same resume gives the same episodes
    assert torch.equal(observations(0), start)  # nothing was seen of these


@pytest.mark.parametrize(("saved", "found"), [("cuda", "cpu"), ("cuda:1", "cpu"), ("cpu", "cuda")])
def test_a_run_cannot_go_on_on_another_kind_of_device(configure, saved, found):
    config = configure()
    directory = train(config)
    state = load_checkpoint(directory)
    state["config"]["run"]["device"] = saved
    if saved != "cpu":
        state["actor"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # as large as those of a GPU are
    save_checkpoint(directory, state, state["step"])
    with pytest.raises(ValueError) as error:
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, device=found)), directory)
    kind = saved.split(":")[0]
    assert str(error.value) == (
        f"run.device: found {found!r}; allowed {kind}, as in the run to resume, because the states of its random generators fit no "
        f"other kind of device; set --run.device {saved}, or start a new run"
    )


def test_a_run_may_go_on_on_another_gpu(configure):
    configs = (configure(device=device) for device in ("cuda", "cuda:1"))
    train_module._check_resumable(*configs)


# Interruption


def test_ctrl_c_outside_of_an_update_saves_as_well(configure, monkeypatch):
    write = MetricsWriter.write

    def interrupted(self, step, metrics):
        signal.raise_signal(signal.SIGINT)
        write(self, step, metrics)

    monkeypatch.setattr(MetricsWriter, "write", interrupted)
    config = configure()
    with pytest.raises(KeyboardInterrupt) as error:
        train(config)
    assert load_checkpoint(run_directory(config))["step"] == 96
    assert str(error.value) == f"a checkpoint of step 96 was saved; continue with --resume {run_directory(config)}"


def test_a_hang_up_saves_unless_it_is_ignored(configure, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2, signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                train(configure("a"))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        interrupt_after(monkeypatch, 2, signal.SIGHUP)
        train(configure("b"))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_last_row_is_not_of_a_few_steps(configure):
    steps = [[row["step"] for row in rows_of(train(configure(str(n), total_steps=32 * n)))] for n in (7, 8, 9, 10)]
    assert steps == [[96, 224], [96, 192, 256], [96, 192, 288], [96, 192, 320]]


def test_signal_handlers_are_put_back(configure, monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(configure("a"))
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(configure("b"))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Numbers that are not finite


@pytest.mark.parametrize(
    ("field", "kind", "culprit"),
    [
        ("reward", "none", "rollout.reward"),
        ("reward", "cdni", "rollout.reward"),
        ("observation", "dni", "rollout.observation"),
        ("context", "cdni", "rollout.context"),
        ("discount", "none", "rollout.discount"),
    ],
)
def test_nan_stops_the_run_and_leaves_the_last_good_checkpoint_alone(configure, field, kind, culprit):
    kwargs = {"nan_field": field, "nan_step": 8 * 6 + 3}  # in the seventh rollout
    config = configure(env={"id": SCRIPTED, "kwargs": kwargs}, critic={"kind": kind})
    with pytest.raises(NonFiniteError) as error:
        train(config)
    assert str(error.value).startswith(f"{culprit}: NaN or infinity at step {32 * 7}; stopped, ")
    state = load_checkpoint(run_directory(config))
    assert state["step"] == 32 * 5
    assert all(p.isfinite().all() for p in state["learner"]["model"].values())


def test_parameters_are_checked_before_they_are_saved(configure, monkeypatch):
    update = Trainer.update

    def spoil(self):
        metrics = update(self)
        if self.step == 32 * 10:
            self.learner.model.value_head[-1].bias.data.fill_(torch.inf)
        return metrics

    monkeypatch.setattr(Trainer, "update", spoil)
    config = configure()
    with pytest.raises(NonFiniteError, match=r"^model.value_head.0.bias: "):
        train(config)
    assert load_checkpoint(run_directory(config))["step"] == 32 * 5


@pytest.mark.parametrize(
    ("arm", "culprit"),
    [
        ("none", "model.value_head.0.bias"),
        ("dni", "critic._target_square"),
        ("dni", "critic_optimizer.state.0.exp_avg_sq"),
        ("dni", "optimizer.state.0.exp_avg"),
        ("dni_aux", "auxiliary.target_rms"),
        ("levels", "interfaces.0._target_square"),
        ("past inputs", "averages"),
        ("bp_lambda", "trace"),
        ("rtrl", "sensitivity.c"),
    ],
)
def test_everything_that_was_learned_is_looked_at(configure, arm, culprit):
    trainer = Trainer(configure(**ARMS[arm]))
    metrics = trainer.update()
    assert trainer.first_non_finite(metrics, thorough=True) is None
    spoiled = dict(train_module._tensors(trainer.learner.state_dict()))[culprit]
    with torch.no_grad():
        spoiled.view(-1)[-1] = torch.inf
    assert trainer.first_non_finite(metrics) is None
    assert trainer.first_non_finite(metrics, thorough=True) == culprit


@pytest.mark.parametrize(
    ("field", "kind", "way_out"),
    [
        ("reward", "cdni", f"the environment returned it, so look for the cause in {SCRIPTED}"),
        (None, "none", "lower algorithm.learning_rate"),
        (
            None,
            "dni",
            "lower algorithm.learning_rate, or bound the synthetic gradient with a (smaller) critic.max_norm_ratio",
        ),
    ],
)
def test_the_way_out_of_nan_is_where_it_came_from(configure, monkeypatch, field, kind, way_out):
    kwargs = {"nan_field": field, "nan_step": 3}
    config = configure(env={"id": SCRIPTED, "kwargs": kwargs}, critic={"kind": kind})
    update = Trainer.update
    if field is None:
        monkeypatch.setattr(Trainer, "update", lambda self: update(self) | {"losses/entropy": torch.tensor(torch.nan)})
    with pytest.raises(NonFiniteError) as error:
        train(config)
    stands = f"stopped, the last good checkpoint in {run_directory(config)} stands"
    culprit = "losses/entropy" if field is None else f"rollout.{field}"
    assert str(error.value) == f"{culprit}: NaN or infinity at step 32; {stands}; {way_out}"
    assert load_checkpoint(run_directory(config))["step"] == 0


def test_a_measure_that_is_undefined_for_a_moment_does_not_stop_a_run(configure):
    trainer = Trainer(configure())
    metrics = trainer.update()
    for thorough in (False, True):
        assert trainer.first_non_finite(metrics | {"sg/cosine": torch.tensor(torch.nan)}, thorough=thorough) is None
    assert trainer.first_non_finite(metrics | {"sg/loss": torch.tensor(torch.inf)}) == "sg/loss"


def test_means_of_measures_leave_out_what_is_undefined(configure):
    trainer = Trainer(configure())
    trainer.means.pop()
    for value in (1.0, torch.nan, 3.0):
        trainer.means.add({name: torch.tensor(value) for name in ("sg/cosine", "sg/loss")})
    means = trainer.means.pop()
    assert means["sg/cosine"] == 2.0 and means["sg/loss"].isnan()
    trainer.means.add({"sg/cosine": torch.tensor(torch.nan)})
    assert trainer.means.pop()["sg/cosine"].isnan()


def test_ratios_of_several_updates_are_those_of_their_means(configure, monkeypatch):
    """One window with next to no target must not stand for all."""
    made, update = [], Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self: made.append(update(self)) or made[-1])
    rows = read_metrics(train(configure(total_steps=192)))
    for row, part in zip(rows, (made[:3], made[3:]), strict=True):
        mean = {
            name: sum(float(each[f"sg/{name}"]) for each in part) / 3
            for name in ("error", "target_variance", "predicted_norm")
        }
        assert row["sg/explained_variance"] == pytest.approx(1 - mean["error"] / mean["target_variance"], rel=1e-5)
        assert row["sg/norm_ratio"] == pytest.approx(mean["predicted_norm"] / row["sg/target_norm"], rel=1e-5)
        assert not {"sg/error", "sg/target_variance", "sg/predicted_norm"} & set(row)


def test_the_explained_variance_of_returns_is_that_of_the_moments_between_two_lines(configure, monkeypatch):
    seen, update = [], Trainer.update

    def record(self):
        metrics = update(self)
        seen.append({name: float(metrics[f"losses/{name}"]) for name in MOMENTS} | {"step": self.step})
        return metrics

    monkeypatch.setattr(Trainer, "update", record)
    last = 0
    for row in read_metrics(train(configure())):
        between = [each for each in seen if last < each["step"] <= row["step"]]
        last = row["step"]
        loss, bias, target, square = (np.mean([each[name] for each in between]) for name in MOMENTS)
        explained = 1.0 - (2.0 * loss - bias**2) / (square - target**2)
        assert row["losses/explained_variance"] == pytest.approx(explained, rel=1e-3)
        assert not {f"losses/{name}" for name in MOMENTS[1:]} & set(row)


# What is written


def test_metrics_have_the_names_that_users_know(configure):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = train(configure(algorithm=PPO, tensorboard=True))
    expected = {
        *("charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/success_rate"),
        *("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl"),
        *("losses/explained_variance", "charts/learning_rate", "charts/entropy_cost"),
        *("bptt/horizon", "sg/loss", "sg/explained_variance", "sg/cosine", "sg/norm_ratio"),
    }
    events = EventAccumulator(str(directory))
    events.Reload()
    assert expected <= set(events.Tags()["scalars"])
    steps = [row["step"] for row in read_metrics(directory)]
    assert steps == [96, 192, 288, 384, 480, 576, 640]  # agent steps
    for name in expected:
        assert [event.step for event in events.Scalars(name)] == steps
    for row in read_metrics(directory):
        assert row["bptt/horizon"] == 4
        assert row["charts/SPS"] > 0


def test_the_window_is_logged_in_steps(configure):
    """Of two levels, whose windows are counted in ticks."""
    (row, *_) = read_metrics(train(configure(**ARMS["levels"])))
    assert row["bptt/horizon"] == 2 * 2


def test_without_a_critic_there_are_no_metrics_of_one(configure):
    (row, *_) = read_metrics(train(configure(critic={"kind": "none"})))
    assert not any(name.startswith("sg/") for name in row)
    assert "losses/approx_kl" not in row


def test_the_folder_is_named_after_environment_method_window_and_seed(configure, tmp_path):
    config = configure(name=None, seed=3, env={"id": "ALE/Breakout-v5"}, critic={"kind": "none"})
    assert run_directory(config) == tmp_path / "ALE-Breakout-v5_none_k4_seed3"


def test_a_new_run_does_not_mix_with_an_old_one(configure):
    train(configure())
    with pytest.raises(ValueError, match="found metrics of an earlier run, allowed none; continue it with --resume"):
        train(configure())


# Method and baseline


def test_method_and_baseline_differ_in_the_kind_of_critic_alone(configure):
    configs = [configure(critic={"kind": kind}) for kind in ("none", "dni", "cdni")]
    sections = [to_dict(config) for config in configs]
    for section in sections:
        del section["critic"]["kind"]
    assert sections[0] == sections[1] == sections[2]

    trainers = [Trainer(config) for config in configs]
    for update in range(3):
        rollouts = []
        for trainer in trainers:
            trainer.update()
            rollouts.append(trainer.actor.rollout)
        if update == 0:  # the same start, the same episodes and actions, and a first synthetic gradient of zero
            for rollout in rollouts[1:]:
                assert torch.equal(rollout.logits, rollouts[0].logits)
                assert torch.equal(rollout.observation, rollouts[0].observation)
            for trainer in trainers[1:]:  # but for rounding: without a critic, windows go through a fused kernel
                torch.testing.assert_close(
                    trainer.learner.model.state_dict(), trainers[0].learner.model.state_dict(), rtol=1e-4, atol=1e-6
                )
    weights = [trainer.learner.model.core.rnn.weight_hh_l0 for trainer in trainers]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_equal_seeds_give_equal_runs_and_others_do_not(configure):
    rows = [rows_of(train(configure(f"run{i}", seed=seed))) for i, seed in enumerate((0, 0, 1))]
    assert rows[0] == rows[1] != rows[2]


# Learning


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        ({"name": "a2c"}, 80_000),
        ({"name": "ppo", "epochs": 2, "minibatches": 2, "normalize_advantages": True}, 40_000),
    ],
    ids=["a2c", "ppo"],
)
def test_learns_to_remember_the_cue_of_a_short_maze(configure, algorithm, steps):
    """At chance, half of the turns are right; the window of 4 is shorter than an episode."""
    config = configure(
        env={"num_envs": 32, "kwargs": {"corridor_length": 3}},
        model={"torso": "none", "hidden_size": 16},
        critic={"hidden_sizes": [128]},
        algorithm={"rollout_length": 8, "bptt_horizon": 4, "learning_rate": 0.01, "baseline_cost": 0.1}
        | {"anneal_learning_rate": False}
        | algorithm,
        total_steps=steps,
    )
    trainer = Trainer(config)
    success = 0.0
    while trainer.step < steps and not success > 0.9:
        for _ in range(15):
            trainer.update()
        success = trainer.actor.statistics.pop()["charts/success_rate"].item()
    assert success > 0.9


def test_a_loaded_learner_has_the_entropy_cost_that_it_was_saved_with(configure):
    """Which is annealed, and part of the losses whose credit `scripts/horizon.py` measures."""
    config = configure(algorithm={**A2C, "anneal_entropy": True})
    trainer, loaded = Trainer(config), Trainer(config)
    for _ in range(5):
        trainer.update()
    loaded.load_state_dict(trainer.state_dict() | {"step": trainer.step})
    assert (
        loaded.learner.entropy_cost
        == trainer.learner.entropy_cost
        == pytest.approx(0.8 * config.algorithm.entropy_cost)
    )


def test_the_running_means_are_over_all_updates_since_the_last_row(configure):
    means = train_module._RunningMeans()
    for value in (1.0, 3.0):
        means.add({"x": torch.tensor(value)})
    assert means.pop() == {"x": 2.0}
    means.add({"x": torch.tensor(5.0)})
    assert means.pop() == {"x": 5.0}


def test_a_running_mean_is_over_the_updates_that_had_the_scalar():
    means = train_module._RunningMeans()
    for metrics in ({"x": torch.tensor(1.0), "y": torch.tensor(4.0)}, {"x": torch.tensor(3.0)}):
        means.add(metrics)
    restored = train_module._RunningMeans()
    restored.load_state_dict(means.state_dict())
    assert means.pop() == restored.pop() == {"x": 2.0, "y": 4.0}


def test_a_configuration_saved_with_a_run_rebuilds_it(configure):
    config = configure()
    directory = train(config)
    assert load_config(directory / "config.yaml") == config
    assert from_dict(load_checkpoint(directory)["config"]) == dataclasses.replace(config)
