import re
import sys
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
import torch

import dni_rl
from agents.build import (
    build_core,
    build_critic,
    build_environment,
    build_interfaces,
    build_model,
    build_torso,
    spread_seeds,
)
from agents.config import CriticConfig, EnvConfig, ModelConfig, _field_docs
from agents.model import ScaledImages
from agents.parallel import Workers
from envs.timestep import EnvSpec

VECTOR = EnvSpec((5,), torch.float32, num_actions=4, context_size=7)
ATARI = EnvSpec((1, 84, 84), torch.uint8, num_actions=4)
SMALL = EnvSpec((3, 7, 7), torch.uint8, num_actions=4)
SYMBOLS = replace(SMALL, observation_scale=10.0)
CPU = torch.device("cpu")


def test_streams_of_a_run_differ_from_each_other_and_from_those_of_other_runs():
    seeds = [seed for run in range(100) for seed in spread_seeds(run, 4)]
    assert len(set(seeds)) == len(seeds)
    assert spread_seeds(3, 4) == spread_seeds(3, 4)


def test_streams_of_runs_that_there_are_stay_the_same():
    assert spread_seeds(3, 4) == [1576890651, 2902887791, 607385081, 2997055210]
    assert spread_seeds(3, 2) == spread_seeds(3, 4)[:2]
    assert Workers(2, 3).spread_seeds(3, 4) == [3451799802, 283124244, 1221903086, 3224542176]


def test_auto_takes_convolutions_for_large_images_only():
    kinds = {
        spec.observation_shape: any(isinstance(m, torch.nn.Conv2d) for m in build_torso(ModelConfig(), spec).modules())
        for spec in (VECTOR, SMALL, ATARI)
    }
    assert kinds == {(5,): False, (3, 7, 7): False, (1, 84, 84): True}


def test_images_are_divided_by_what_the_environment_says_whatever_their_size():
    scales = [
        [m.scale for m in build_torso(ModelConfig(torso=torso), spec).modules() if isinstance(m, ScaledImages)]
        for torso, spec in (
            *(("mlp", spec) for spec in (VECTOR, SYMBOLS, SMALL, ATARI)),
            *(("conv", spec) for spec in (ATARI, replace(ATARI, observation_scale=10.0))),
        )
    ]
    assert scales == [[], [10.0], [255.0], [255.0], [255.0], [10.0]]


@pytest.mark.parametrize(("encoding", "largest"), [(None, 1.0), ("one_hot", 1.0), ("symbolic", 0.6)])
def test_the_network_sees_minigrid_in_the_unit_interval(encoding, largest):
    pytest.importorskip("minigrid")
    kwargs = {} if encoding is None else {"encoding": encoding}
    env = build_environment(EnvConfig(id="MiniGrid-MemoryS7-v0", num_envs=8, kwargs=kwargs), 0, CPU)
    seen = build_torso(ModelConfig(torso="none"), env.spec)(env.reset().observation)
    assert seen.min() == 0
    assert seen.max() == torch.tensor(largest)  # of the symbols, the largest in sight is that of a ball, 6


@pytest.mark.parametrize("sizes", [(), (9,), (9, 8)])
@pytest.mark.parametrize("torso", ["conv", "conv_small"])
def test_fully_connected_layers_of_all_sizes_follow_the_convolutions(torso, sizes):
    torch.manual_seed(0)
    built = build_torso(ModelConfig(torso=torso, torso_sizes=sizes), ATARI)
    layers = [m for m in built.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == list(sizes)
    images = torch.randint(256, (2, 3, 1, 84, 84), dtype=torch.uint8)
    features = built(images)
    assert features.shape == (2, 3, built.output_size)
    assert built.output_size == (sizes[-1] if sizes else {"conv": 64 * 7 * 7, "conv_small": 32 * 9 * 9}[torso])
    assert build_model(ModelConfig(torso=torso, torso_sizes=sizes), ATARI).core.input_size == built.output_size + 4 + 1
    # the layers in front are drawn first, so that more of them change nothing in those
    torch.manual_seed(0)
    shorter = build_torso(ModelConfig(torso=torso, torso_sizes=sizes[:1]), ATARI)
    for p, expected in zip(shorter.parameters(), built.parameters(), strict=False):
        assert torch.equal(p, expected)


def test_no_torso_hands_the_observation_on():
    torso = build_torso(ModelConfig(torso="none"), VECTOR)
    x = torch.randn(2, 5)
    assert torso(x) is x


@pytest.mark.parametrize("spec", [VECTOR, SMALL])
def test_convolutions_need_large_images(spec):
    with pytest.raises(ValueError, match=r"model.torso: found 'conv' for observations .* use 'mlp'"):
        build_torso(ModelConfig(torso="conv"), spec)


@pytest.mark.parametrize(("core", "kind"), [("lstm", dni_rl.LSTM), ("gru", dni_rl.GRU)])
def test_the_model_is_the_one_of_the_configuration(core, kind):
    config = ModelConfig(core=core, num_layers=2, hidden_size=6, torso_sizes=(9, 8), head_sizes=(7,))
    model = build_model(config, VECTOR)
    assert isinstance(model.core, kind)
    assert (model.core.input_size, model.core.output_size, model.core.num_layers) == (8 + 4 + 1, 6, 2)
    assert [m.out_features for m in model.policy_head if isinstance(m, torch.nn.Linear)] == [7, 4]
    assert [m.out_features for m in model.value_head if isinstance(m, torch.nn.Linear)] == [7, 1]


def test_the_elementwise_core_is_the_one_of_the_configuration():
    cores = [
        build_core(ModelConfig(core="elementwise_lstm", hidden_size=7, chrono_max=50.0, input_gain=gain), 4)
        for gain in (1.0, 2.0)
        if torch.manual_seed(0)
    ]
    assert all(isinstance(core, dni_rl.ElementwiseLSTM) and core.state_sizes == (7, 7) for core in cores)
    torch.testing.assert_close(2.0 * cores[0].weight_ih, cores[1].weight_ih)
    assert torch.equal(cores[0].weight_hh, cores[1].weight_hh)
    assert cores[0].bias[7:14].mean() > 1


def test_the_multi_timescale_core_is_the_one_of_the_configuration():
    config = ModelConfig(core="multi_timescale", hidden_size=7, periods=(1, 4, 8), message="mean")
    core = build_core(config, 5)
    assert isinstance(core, dni_rl.MultiTimescaleCore)
    assert (core.periods, core.hidden_sizes, core.message) == ((1, 4, 8), (7, 7, 7), "mean")
    assert build_core(replace(config, level_sizes=(3, 4, 5)), 5).hidden_sizes == (3, 4, 5)


def test_lower_levels_remember_up_to_the_next_tick_above_and_the_highest_one_up_to_chrono_max():
    config = ModelConfig(core="multi_timescale", hidden_size=512, periods=(1, 10, 50), chrono_max=1000.0)
    core = build_core(config, 5)
    for level, ticks in zip(core.levels, (10, 50 / 10, 1000 / 50), strict=True):
        keep = level.bias_ih[512:1024].exp() + 1
        assert 0.95 * ticks < keep.max() <= ticks + 1e-3


def test_chrono_initialisation_reaches_the_core():
    biases = [build_model(ModelConfig(chrono_max=c), VECTOR).core.rnn.bias_ih_l0 for c in (None, 1000.0)]
    forget = slice(32, 64)
    assert biases[0][forget].mean() < 1 < 4 < biases[1][forget].mean()


# Away from both the defaults of a configuration and those of the classes.
OF_CRITICS = {
    "gradient_discount": 0.5,
    "scale": 0.1,
    "max_norm_ratio": 2.0,
    "normalize_targets": False,
    "warmup_updates": 3,
    "slow_copy_rate": 0.25,
    "yardstick_interval": 5,
}


def _widths(critic):
    return [layer.out_features for layer in critic.net.modules() if isinstance(layer, torch.nn.Linear)]


@pytest.mark.parametrize(
    ("targets", "at_steps"),
    [
        ({"dense_targets": True, "targets_per_window": 4, "target_lambda": 1.0}, 4),
        ({"dense_targets": True, "targets_per_window": 4, "target_lambda": 0.5}, None),
        ({"dense_targets": False, "targets_per_window": 4, "target_lambda": 1.0}, None),
    ],
    ids=["thinned out", "mixed", "at the start"],
)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, dni_rl.GradientCritic) for kind in ("dni", "cdni", "dni_aux", "bp_lambda")),
        ("loss_critic", dni_rl.LossCritic),
        ("sobolev", dni_rl.SobolevCritic),
    ],
)
def test_the_critic_is_the_one_of_the_configuration(kind, expected, targets, at_steps):
    model = build_model(ModelConfig(hidden_size=6), VECTOR)
    settings = CriticConfig(kind=kind, hidden_sizes=(9, 8), **OF_CRITICS, **targets)
    critic = build_critic(settings, model, VECTOR)
    assert type(critic) is expected
    assert critic.state_sizes == model.core.state_sizes
    context_size = 7 if kind == "cdni" else 0
    assert (critic.context_size, critic.normalize_context) == (context_size, False)
    assert _widths(critic)[1:3] == [9, 8]  # behind the linear path
    wanted = {**OF_CRITICS, **targets, "targets_per_window": at_steps}
    assert {name: getattr(critic, name) for name in wanted} == wanted
    assert 9 not in _widths(build_critic(replace(settings, hidden_sizes=()), model, VECTOR))
    ahead = build_critic(replace(settings, future_steps=3), model, VECTOR)
    added = 3 * (model.core.input_size + 1)
    assert (ahead.context_size, ahead.normalize_context) == (context_size + added, False)
    past = build_critic(replace(settings, past_steps=(10, 100)), model, VECTOR)
    added = 2 * (model.observed_size + 1)
    assert (past.context_size, past.normalize_context) == (context_size + added, True)


@pytest.mark.parametrize("kind", ["none", "rtrl"])
def test_without_a_critic_there_is_none(kind):
    assert build_critic(CriticConfig(kind=kind), build_model(ModelConfig(), VECTOR), VECTOR) is None


def test_critics_of_interfaces_are_those_of_the_configuration():
    model = build_model(ModelConfig(core="multi_timescale", periods=(1, 2, 4), level_sizes=(3, 4, 5)), VECTOR)
    settings = CriticConfig(kind="cdni", interfaces=True, hidden_sizes=(9, 8), **OF_CRITICS)
    critics = build_interfaces(settings, model)
    assert [critic.state_sizes for critic in critics] == [(3,), (4,)]  # of the messages upwards
    # what belongs to cuts in time is left out
    cuts = {"gradient_discount": 1.0, "max_norm_ratio": None, "target_lambda": 1.0, "context_size": 0}
    shared = {name: OF_CRITICS[name] for name in ("normalize_targets", "scale", "warmup_updates", "slow_copy_rate")}
    for critic in critics:
        assert type(critic) is dni_rl.GradientCritic and _widths(critic)[1:3] == [9, 8]
        assert {name: getattr(critic, name) for name in cuts | shared} == cuts | shared
    assert build_interfaces(replace(settings, interfaces=False), model) == []
    assert build_interfaces(settings, build_model(ModelConfig(), VECTOR)) == []


def test_the_settings_that_critics_of_interfaces_share_are_those_that_help_lists():
    settings, read = CriticConfig(interfaces=True), set()

    class Spy:
        def __getattr__(self, name):
            read.add(name)
            return getattr(settings, name)

    build_interfaces(Spy(), build_model(ModelConfig(core="multi_timescale"), VECTOR))
    listed = set(re.findall(r"\w+", _field_docs()["CriticConfig", "interfaces"])) & {
        f.name for f in fields(CriticConfig)
    }
    learning = {
        "fit_interval",
        "epochs",
        "learning_rate",
        "adam_betas",
        "adam_eps",
        "max_grad_norm",
        "weight_decay",
    }  # the learner's
    assert listed == read - {"interfaces"} | learning


def test_a_conditioned_critic_needs_a_context_and_no_other_kind_does():
    model = build_model(
        ModelConfig(torso="conv_small", torso_sizes=(4,), hidden_size=4, core="elementwise_lstm"), ATARI
    )
    with pytest.raises(ValueError) as error:
        build_critic(CriticConfig(kind="cdni"), model, ATARI)
    assert str(error.value) == (
        "critic.kind: found 'cdni', but this environment offers no privileged context; allowed every other kind; set "
        "--env.kwargs.context, for one gymnasium or dm_env environment of your own to module:function, or --critic.kind dni with "
        "--critic.past_steps"
    )
    for kind in set(get_args(get_type_hints(CriticConfig)["kind"])) - {"cdni"}:
        build_critic(CriticConfig(kind=kind), model, ATARI)
    build_critic(CriticConfig(kind="dni", past_steps=(10, 100)), model, ATARI)


def test_a_privileged_value_needs_a_context():
    assert build_model(ModelConfig(privileged_value=True), VECTOR).privileged_size == VECTOR.context_size > 0
    with pytest.raises(ValueError) as error:
        build_model(ModelConfig(privileged_value=True), ATARI)
    assert str(error.value) == (
        "model.privileged_value: found true, but this environment offers no privileged context; allowed false; set "
        "--env.kwargs.context, for one gymnasium or dm_env environment of your own to module:function"
    )


def _refusal(**settings):
    with pytest.raises((ValueError, ImportError)) as error:
        build_environment(EnvConfig(num_envs=2, **settings), 0, CPU)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_built_is_refused_in_one_line(monkeypatch):
    assert "PassiveTMaze" in _refusal(id="PasiveTMaze")
    assert "did you mean 'corridor_length'" in _refusal(id="PassiveTMaze", kwargs={"coridor_length": 3})
    assert "only Discrete is supported" in _refusal(id="Pendulum-v1")
    assert "there is no module 'no_such_module'" in _refusal(id="no_such_module:Maze")
    monkeypatch.setitem(sys.modules, "minigrid", None)
    assert ".[minigrid]" in _refusal(id="MiniGrid-MemoryS7-v0")
    monkeypatch.setitem(sys.modules, "ale_py", None)
    assert ".[agents]" in _refusal(id="ALE/Breakout-v5")


@pytest.mark.parametrize(
    ("env_id", "name", "value", "found"),
    [
        ("ALE/Breakout-v5", "frame_skip", "4x", "'4x'; allowed an integer of at least 1"),
        ("ALE/Breakout-v5", "sticky_actions", None, "None; allowed a number from 0 to 1"),
        ("MiniGrid-MemoryS7-v0", "view_size", "3x", "'3x'; allowed an odd integer of at least 3"),
        ("MiniGrid-MemoryS7-v0", "size", "big", "'big'; allowed what MiniGrid-MemoryS7-v0 takes (TypeError: "),
        ("CartPole-v1", "max_episode_steps", "many", "'many'; allowed what CartPole-v1 takes (TypeError: "),
        ("CartPole-v1", "render_mode", 3, "3; allowed what CartPole-v1 takes (AttributeError: "),
    ],
)
def test_a_bad_argument_of_the_environment_is_named_in_one_line(env_id, name, value, found):
    if env_id.startswith("MiniGrid"):
        pytest.importorskip("minigrid")
    message = _refusal(id=env_id, kwargs={name: value})
    assert message.startswith(f"env.kwargs.{name}: found {found}")
    assert message.endswith("; leave it out for the default")


def test_a_package_that_an_environment_of_gymnasium_misses_is_named_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    assert "box2d" in _refusal(id="LunarLander-v3").lower()
