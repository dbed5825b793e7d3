import dataclasses
import math
import re

import pytest
import torch

from agents.config import (
    AlgorithmConfig,
    CriticConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    load_config,
    parse_train_config,
    require_device,
    save_config,
    to_dict,
)

SECTIONS = [EnvConfig, ModelConfig, CriticConfig, AlgorithmConfig, RunConfig]


@pytest.fixture
def refusal(capsys):
    """Parses arguments that must be refused, and returns the one line on stderr without the program's name."""

    def parse(*argv):
        with pytest.raises(SystemExit) as stop:
            parse_train_config([str(argument) for argument in argv])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.rstrip("\n").split(": ", 1)[1]

    return parse


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="x.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def test_no_arguments_give_the_defaults():
    assert parse_train_config([]) == (TrainConfig(), None)


def test_options_override_files_which_override_defaults(write):
    first = write("algorithm:\n  learning_rate: 1e-2\n  discount: 0.9\nrun:\n", "first.yaml")
    second = write("algorithm: {discount: 0.8}", "second.yaml")
    config, resume = parse_train_config(
        ["--algorithm.rollout_length", "16", "--config", str(first), "--config", str(second), "--run.seed=3"]
    )
    assert resume is None
    assert config.algorithm.learning_rate == 0.01
    assert config.algorithm.discount == 0.8
    assert config.algorithm.rollout_length == 16
    assert config.run.seed == 3
    assert config.algorithm.gae_lambda == AlgorithmConfig().gae_lambda


def test_values_are_read_in_their_declared_type():
    arguments = (
        "--run.total_steps 2e6 --model.torso_sizes [] --critic.hidden_sizes [8,16] --critic.adam_betas [0,0.9] "
        "--algorithm.max_grad_norm null --run.progress false --run.name 007 --env.id no --critic.scale 1 "
        "--algorithm.name ppo --algorithm.target_kl=1e-2"
    )
    config, _ = parse_train_config(arguments.split())
    assert (config.run.total_steps, type(config.run.total_steps)) == (2_000_000, int)
    assert config.model.torso_sizes == ()
    assert config.critic.hidden_sizes == (8, 16)
    assert config.critic.adam_betas == (0.0, 0.9)
    assert config.algorithm.max_grad_norm is None
    assert config.run.progress is False
    assert config.run.name == "007"
    assert config.env.id == "no"
    assert type(config.critic.scale) is float
    assert config.algorithm.target_kl == 0.01


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("7", 7), ("-0", 0), ("2_000_000", 2_000_000), ("0x1F", 31), ("0o17", 15), ("0b11", 3)),
        *(("1e-3", 0.001), ("2E6", 2e6), (".5", 0.5), ("1.", 1.0), ("-1.5e+3", -1500.0), ("-.inf", -math.inf)),
        *(("010", "010"), ("0777", "0777"), ("1:00:00", "1:00:00"), ("1:30.5", "1:30.5"), ("1_", "1_"), ("_1", "_1")),
    ],
)
def test_numbers_are_written_as_in_python(text, value):
    config, _ = parse_train_config([f"--env.kwargs.x={text}"])
    assert config.env.kwargs == {"x": value}
    assert type(config.env.kwargs["x"]) is type(value)


@pytest.mark.parametrize("text", ["1e-3", "010", "1:00:00", "0o17", ".5e3", "no"])
def test_text_that_looks_like_a_number_is_saved_as_text(tmp_path, text):
    config = TrainConfig(run=RunConfig(name=text), env=EnvConfig(kwargs={"x": text}))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_arguments_of_the_environment_are_overridden_one_by_one(write):
    path = write("env: {kwargs: {length: 20, distractors: 4}}")
    config, _ = parse_train_config(
        ["--config", str(path), "--env.kwargs.length", "40", "--env.kwargs.lengths=[1, 2]", "--env.kwargs.loud", "true"]
    )
    assert config.env.kwargs == {"length": 40, "distractors": 4, "lengths": [1, 2], "loud": True}


def test_resume_starts_from_the_saved_configuration(tmp_path):
    save_config(TrainConfig(run=RunConfig(seed=5), model=ModelConfig(core="gru")), tmp_path / "config.yaml")
    (tmp_path / "checkpoint.pt").touch()
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        config, resume = parse_train_config(["--resume", str(path), "--run.total_steps", "4000000"])
        assert resume == path
        assert (config.run.seed, config.model.core, config.run.total_steps) == (5, "gru", 4_000_000)


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_train_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section in SECTIONS:
        for f in dataclasses.fields(section):
            entry = re.search(rf"--{section.section}\.{f.name} [A-Z]+ (.+?) Allowed: (.+?)\. Default: (.+?)\.", text)
            assert entry, f.name
            assert len(entry[1]) > 10


def test_help_tells_what_is_counted_in_rollouts_and_what_in_fits(capsys):
    with pytest.raises(SystemExit):
        parse_train_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, start in {
        "fit_interval": "Rollouts from one",
        "yardstick_interval": "Fits of the critic from one",
        "warmup_updates": "Fits of the critic before",
    }.items():
        entry = re.search(rf"--critic\.{name} INT (.+?) Allowed:", text)[1]
        assert entry.startswith(start)
        assert "PPO" in entry and "minibatch" in entry


def test_save_and_load_give_the_same_configuration(tmp_path):
    config = TrainConfig(
        env=EnvConfig(kwargs={"length": 3, "names": ["a", "ö"]}),
        critic=CriticConfig(kind="cdni", hidden_sizes=()),
        run=RunConfig(name="no"),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_to_dict_holds_plain_values_and_from_dict_is_its_inverse():
    config = TrainConfig(critic=CriticConfig(adam_betas=(0.5, 0.6)), env=EnvConfig(kwargs={"a": {"b": 1}}))
    data = to_dict(config)
    assert data["critic"]["adam_betas"] == [0.5, 0.6]
    assert from_dict(data) == config


def test_a_configuration_does_not_change_with_the_data_it_was_made_from():
    data = {"env": {"kwargs": {"lengths": [1]}}}
    config = from_dict(data)
    data["env"]["kwargs"]["lengths"].append(2)
    to_dict(config)["env"]["kwargs"]["lengths"].append(3)
    assert config.env.kwargs == {"lengths": [1]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--algorithm.learning_rte 1",
            "--algorithm.learning_rte: found an unknown option; did you mean --algorithm.learning_rate?",
        ),
        (
            "--learning_rate=1",
            "--learning_rate: found an unknown option; did you mean --critic.learning_rate or "
            "--algorithm.learning_rate?",
        ),
        ("--model.seed 1", "--model.seed: found an unknown option; did you mean --run.seed?"),
        ("--confg x", "--confg: found an unknown option; did you mean --config?"),
        (
            "--zzz 1",
            "--zzz: found an unknown option; allowed env, model, critic, algorithm, run; --help lists their settings",
        ),
        ("--run 1", "--run: found a section; allowed its settings, --run.SETTING VALUE; --help lists them"),
        (
            "train",
            "found the argument 'train'; allowed options of the form --section.setting VALUE; --help lists them",
        ),
        (
            "--run.seed",
            "--run.seed: found no value; allowed --run.seed VALUE, or --run.seed=VALUE where it starts with a dash",
        ),
        (
            "--algorithm.learning_rate fast",
            "algorithm.learning_rate: found 'fast'; allowed a number above 0; leave it out for the default, 0.001",
        ),
        (
            "--algorithm.learning_rate 0",
            "algorithm.learning_rate: found 0; allowed a number above 0; leave it out for the default, 0.001",
        ),
        (
            "--algorithm.discount .nan",
            "algorithm.discount: found nan; allowed a number from 0 to 1; leave it out for the default, 0.99",
        ),
        (
            "--env.num_envs 1.5",
            "env.num_envs: found 1.5; allowed an integer of at least 1; leave it out for the default, 64",
        ),
        (
            "--run.seed true",
            "run.seed: found true; allowed an integer from 0 to 2**32 - 1; leave it out for the default, 0",
        ),
        (
            "--run.tensorboard 3",
            "run.tensorboard: found 3; allowed true or false; leave it out for the default, true",
        ),
        (
            "--algorithm.name sac",
            "algorithm.name: found 'sac'; allowed a2c or ppo; leave it out for the default, 'a2c'",
        ),
        (
            "--critic.adam_betas [0.9]",
            "critic.adam_betas: found [0.9]; allowed a list such as [0.9, 0.99], each a number from 0 up to, "
            "not including, 1; "
            "leave it out for the default, [0.9, 0.99]",
        ),
        (
            "--critic.max_norm_ratio -1",
            "critic.max_norm_ratio: found -1; allowed a number above 0, or null; leave it out for the default, null",
        ),
        (
            "--algorithm.anneal_learning_rate false --algorithm.learning_rate_hold 0.5",
            "algorithm.learning_rate_hold: found 0.5; allowed 0.0 with algorithm.anneal_learning_rate false, where the rates stay for all "
            "of the run; set --algorithm.anneal_learning_rate true",
        ),
        (
            "--algorithm.final_entropy_share 0.5",
            "algorithm.final_entropy_share: found 0.5; allowed 0.0 with algorithm.anneal_entropy false, where all of the cost is left; "
            "set --algorithm.anneal_entropy true",
        ),
        (
            "--model.torso_sizes 64",
            "model.torso_sizes: found 64; allowed a list such as [8, 8], each an integer of at least 1; "
            "leave it out for the default, [64]",
        ),
        (
            "--env.kwargs 3",
            "env.kwargs: found 3; allowed a mapping from names to plain values, such as {length: 20}; "
            "leave it out for the default, {}",
        ),
        (
            "--env.kwargs [1] --env.kwargs.length 3",
            "env.kwargs: found [1]; allowed a mapping from names to plain values",
        ),
        (
            "--env.kwargs.num_envs 3",
            "env.kwargs.num_envs: found 3; allowed the environment's other arguments; set --env.num_envs in its place",
        ),
        (
            "--env.kwargs.seed null",
            "env.kwargs.seed: found null; allowed the environment's other arguments; set --run.seed",
        ),
        (
            "--env.kwargs.device cpu",
            "env.kwargs.device: found 'cpu'; allowed the environment's other arguments; set --run.device",
        ),
        (
            "--env.kwargs.env_id x",
            "env.kwargs.env_id: found 'x'; allowed the environment's other arguments; set --env.id",
        ),
        (
            "--run.name a/b",
            "run.name: found 'a/b'; allowed text naming one folder, without / or \\ and of 200 bytes at most, or null; "
            "leave it out for the default, null",
        ),
        (
            "--run.device tpu",
            "run.device: found 'tpu'; allowed text of the form cpu, cuda or cuda:<index>; "
            "leave it out for the default, 'cpu'",
        ),
        (
            "--algorithm.bptt_horizon 64",
            "algorithm.bptt_horizon: found 64; allowed a divisor of algorithm.rollout_length, 32; "
            "set --algorithm.bptt_horizon 32, or a rollout length that 64 divides",
        ),
        (
            "--algorithm.bptt_horizon 7",
            "algorithm.bptt_horizon: found 7; allowed a divisor of algorithm.rollout_length, 32; "
            "set --algorithm.bptt_horizon 8, or a rollout length that 7 divides",
        ),
        (
            "--algorithm.name ppo --env.num_envs 63",
            "algorithm.minibatches: found 4; allowed a divisor of env.num_envs, 63, because minibatches are "
            "whole sequences; "
            "set --env.num_envs 64",
        ),
        (
            "--run.total_steps 100",
            "run.total_steps: found 100; allowed at least one rollout, 2048 (env.num_envs x algorithm.rollout_length); "
            "train longer, or with fewer environments",
        ),
        (
            "--model.core elementwise_lstm --model.num_layers 2",
            "model.num_layers: found 2; allowed 1 with model.core elementwise_lstm; use lstm or gru for stacked layers",
        ),
        (
            "--model.periods [2,4]",
            "model.periods: found [2, 4]; allowed 1, then rising multiples of the period below; set for example [1, 8]",
        ),
        ("--model.periods [1,4,6]", "model.periods: found [1, 4, 6]; allowed 1, then rising multiples"),
        ("--model.periods []", "model.periods: found []; allowed 1, then rising multiples"),
        (
            "--model.level_sizes [8]",
            "model.level_sizes: found [8]; allowed 2 widths, one for each of model.periods; leave it out for hidden_size",
        ),
        (
            "--model.core multi_timescale",
            "algorithm.rollout_length: found 32; allowed a multiple of 64, algorithm.bptt_horizon ticks of the slowest level "
            "(model.periods); set --algorithm.rollout_length 64",
        ),
        (
            "--critic.kind dni_aux --model.core multi_timescale --algorithm.rollout_length 64",
            "algorithm.bptt_horizon: found 8; allowed a proper divisor of algorithm.rollout_length, 64, with critic.kind dni_aux",
        ),
        (
            "--critic.interfaces true",
            "critic.interfaces: found true; allowed false with model.core lstm; set --model.core multi_timescale",
        ),
        (
            "--critic.targets_per_window 1",
            "critic.targets_per_window: found 1; allowed an integer of at least 2, or null; leave it out for the default, 8",
        ),
        (
            "--critic.slow_copy_rate 0",
            "critic.slow_copy_rate: found 0; allowed a number above 0, up to 1, or null; leave it out for the default, null",
        ),
        (
            "--critic.target_lambda 0.5 --critic.dense_targets false",
            "critic.target_lambda: found 0.5; allowed 1.0 with critic.dense_targets false, because mixed targets come from the steps "
            "inside the window; set --critic.dense_targets true",
        ),
        (
            "--critic.kind rtrl",
            "critic.kind: found 'rtrl'; allowed none and the critics with model.core lstm, for which exact RTRL costs too much; "
            "set --model.core elementwise_lstm",
        ),
        (
            "--critic.kind rtrl --model.core elementwise_lstm --algorithm.name ppo",
            "algorithm.epochs: found 4; allowed 1 with critic.kind rtrl, which carries derivatives of one pass along the rollout; "
            "set --algorithm.epochs 1, or --algorithm.name a2c",
        ),
        (
            "--critic.kind bp_lambda --algorithm.name ppo --algorithm.epochs 1",
            "algorithm.minibatches: found 4; allowed 1 with critic.kind bp_lambda",
        ),
        (
            "--critic.kind bp_lambda --critic.hidden_sizes [128]",
            "critic.hidden_sizes: found [128]; allowed [] with critic.kind bp_lambda, whose traces are those of a linear critic and "
            "nothing else; set --critic.hidden_sizes [] --critic.normalize_targets false; see configs/kinds/bp_lambda.yaml",
        ),
        (
            "--critic.kind bp_lambda --critic.hidden_sizes [] --critic.normalize_targets false --critic.max_norm_ratio 1",
            "critic.max_norm_ratio: found 1.0; allowed null with critic.kind bp_lambda",
        ),
        (
            "--critic.kind bp_lambda --model.core multi_timescale --algorithm.rollout_length 64",
            "critic.kind: found 'bp_lambda'; allowed none and the other critics with model.core multi_timescale, whose levels are cut "
            "at different steps; set --model.core lstm",
        ),
        (
            "--run.seed 010",
            "run.seed: found '010'; allowed an integer from 0 to 2**32 - 1; leave it out for the default, 0",
        ),
        (
            "--run.total_steps 1:00:00",
            "run.total_steps: found '1:00:00'; allowed an integer of at least 1; leave it out",
        ),
        ("--algorithm.discount 0:0.5", "algorithm.discount: found '0:0.5'; allowed a number from 0 to 1; leave it out"),
        (
            "--algorithm.name ppo --algorithm.clip_ratio 1",
            "algorithm.clip_ratio: found 1; allowed a number above 0, below 1; leave it out for the default, 0.2",
        ),
        (
            "--algorithm.target_kl 0.1",
            "algorithm.target_kl: found 0.1; allowed null with algorithm.name a2c, which does not read it; "
            "set --algorithm.target_kl null, or --algorithm.name ppo",
        ),
        (
            "--model.level_sizes [8,8]",
            "model.level_sizes: found [8, 8]; allowed null with model.core lstm, which does not read it; "
            "set --model.level_sizes null, or --model.core multi_timescale",
        ),
        (
            "--model.core gru --model.message mean",
            "model.message: found 'mean'; allowed 'last' with model.core gru, which",
        ),
        (
            "--critic.kind bp_lambda --critic.normalize_targets false --critic.dense_targets false",
            "critic.dense_targets: found false; allowed true with critic.kind bp_lambda",
        ),
        *(
            (f"--run.device {name}", f"run.device: found '{name}'; allowed text of the form cpu, cuda or cuda:<index>;")
            for name in ("cuda:00", "cuda:٣", "cuda:256")  # which PyTorch cannot read, or takes for cuda:0
        ),
        ("--run.total_steps 1" + "0" * 400, "run.total_steps: found ...; allowed an integer"),
        ("--critic.learning_rate 1" + "0" * 400, "critic.learning_rate: found ...; allowed a number"),
        ("--run.seed [", "--run.seed, line 1: found text that is not valid YAML"),
        (
            "--config missing.yaml",
            "missing.yaml: found no readable file (No such file or directory); allowed a YAML file",
        ),
        ("--resume missing", "--resume: found no config.yaml in .; allowed the folder of an earlier run"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(refusal, arguments, message):
    found = refusal(*arguments.split())
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {treads: 1}", ": run.treads: found an unknown setting; did you mean run.threads?"),
        ("algorithm: {lr: 1}", ": algorithm.lr: found an unknown setting; allowed name, rollout_length, "),
        ("critic: {seed: 1}", ": critic.seed: found an unknown setting; did you mean run.seed?"),
        ("runn: {seed: 1}", ": runn: found an unknown section; did you mean run?"),
        ("7: 1", ": 7: found an unknown section; allowed env, model, critic, algorithm, run; --help lists"),
        ("env: {7: 1}", ": env.7: found an unknown setting; allowed id, num_envs, kwargs"),
        ("run: 3", ": run: found 3; allowed a mapping of settings; --help lists them"),
        ("text", ": found 'text'; allowed a mapping with the sections env, model, critic, algorithm, run"),
        ("run: {seed: 1}\nrun: {seed: 2}", ", line 1: found text that is not valid YAML (the key 'run' appears twice)"),
        ("run: [", ", line 1: found text that is not valid YAML ("),
        ("env: &here {kwargs: *here}", ": found text that is not valid YAML (Circular reference detected)"),
        ("run: {seed: 2000-99-99}", ": found text that is not valid YAML (month must be in 1..12)"),
    ],
)
def test_a_mistake_in_a_file_is_one_clear_line_that_names_the_file(refusal, write, text, message):
    path = write(text)
    assert refusal("--config", path).startswith(f"{path}{message}")


def test_settings_that_one_option_switches_off_may_stand():
    critic = "--critic.past_steps [4] --critic.dense_targets false --critic.kind none"
    rest = "--algorithm.epochs 2 --algorithm.minibatches 2 --model.periods [1,4]"
    config, _ = parse_train_config(f"{critic} {rest}".split())
    assert (config.critic.past_steps, config.algorithm.epochs, config.model.periods) == ((4,), 2, (1, 4))


def test_a_file_that_is_not_text_is_refused(tmp_path, refusal):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "found no readable file (it is not UTF-8 text)" in refusal("--config", tmp_path / "x.yaml")


def test_values_that_a_file_could_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"^env\.kwargs: found \{'x': tensor\(1\)\}; allowed a mapping"):
        EnvConfig(kwargs={"x": torch.tensor(1)})


def test_a_missing_device_is_refused_when_a_run_starts_but_its_configuration_can_be_read(refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert require_device("cuda:0") == torch.device("cuda:0")
    assert refusal("--run.device", "cuda:1") == (
        "run.device: found 'cuda:1', which this machine lacks; allowed cpu, cuda:0; set --run.device cpu"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refusal("--run.device", "cuda") == (
        "run.device: found 'cuda', which this machine lacks; allowed cpu; set --run.device cpu"
    )
    assert from_dict({"run": {"device": "cuda"}}).run.device == "cuda"


def test_a_run_of_a_missing_device_is_not_sent_to_another(tmp_path, capsys):
    save_config(from_dict({"run": {"device": "cuda:99"}}), tmp_path / "config.yaml")
    with pytest.raises(SystemExit):
        parse_train_config(["--resume", str(tmp_path)])
    assert "resume it on a machine that has one, or start a new run" in capsys.readouterr().err
