import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import envs
from envs import ArgumentError, Environment, make
from envs.adapters import DmEnvs, GymnasiumEnvs, GymnasiumVector, environment_seeds
from envs.atari import Atari
from envs.registry import GRIDWORLDS

THEIRS = """
    import dm_env
    import gymnasium
    import numpy as np
    import torch
    from dm_env import specs
    from gymnasium import spaces

    from envs import EnvSpec, TimeStep

    number = 3


    class Gym(gymnasium.Env):
        observation_space = spaces.Box(-1, 1, (2,))
        action_space = spaces.Discrete(2)

        def __init__(self, speed=1.0):
            self.speed = float(speed)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), self.speed, False, False, {}


    class Parts(Gym):
        observation_space = spaces.Dict(place=Gym.observation_space)

        def reset(self, *, seed=None, options=None):
            place, info = super().reset(seed=seed)
            return {"place": place}, info

        def step(self, action):
            place, *rest = super().step(action)
            return {"place": place}, *rest


    def one(speed=1.0, view_size=2):
        return gymnasium.wrappers.FlattenObservation(Parts(speed))


    def any_one(**kwargs):
        return one(**kwargs)


    class Sized(Gym):
        def __init__(self, length, speed=1.0):
            super().__init__(speed)


    def sized(length, *, speed=1.0):
        return Gym(speed)


    def hidden(env):
        return np.array([7.0 * getattr(env, "unwrapped", env).speed])


    def named(env):
        return {"speed": 7.0}


    class Vector(gymnasium.vector.SyncVectorEnv):
        def __init__(self, num_envs, speed=1.0):
            super().__init__([lambda: Gym(speed)] * num_envs)


    def vector(num_envs, seed, device, speed=1.0):
        return Vector(num_envs, speed)


    def vector_of_three(speed=1.0):
        return Vector(3, speed)


    class Dm(dm_env.Environment):
        def __init__(self, seed, speed=1.0):
            self.seed, self.speed = seed, float(speed)

        def reset(self):
            return dm_env.restart(np.zeros(2))

        def step(self, action):
            return dm_env.transition(self.speed, np.zeros(2))

        def observation_spec(self):
            return specs.Array((2,), np.float64)

        def action_spec(self):
            return specs.DiscreteArray(2)


    def one_dm(seed, speed=1.0):
        return Dm(seed, speed)


    def any_dm(seed=0, **kwargs):
        return Dm(seed, **kwargs)


    def unseeded_dm(**kwargs):
        return Dm(0, **kwargs)


    class NeedsSeed(Gym):
        def __init__(self, seed):
            super().__init__()


    def needs_device(device):
        return Gym()


    class Ours:
        resumable = True

        def __init__(self, *, num_envs, seed, device="cpu", speed=1.0):
            self.num_envs, self.seed, self.device, self.speed = num_envs, seed, torch.device(device), float(speed)
            self.spec = EnvSpec((2,), torch.float32, 2)

        def reset(self):
            return self._step(0.0, True)

        def step(self, actions):
            return self._step(self.speed, False)

        def _step(self, reward, first):
            row = torch.ones(self.num_envs)
            first = torch.full((self.num_envs,), first)
            return TimeStep(torch.zeros(self.num_envs, 2), row * reward, row, first, torch.zeros_like(first))

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

        def close(self):
            pass


    def factory(num_envs, seed, device, speed=1.0):
        return Ours(num_envs=num_envs, seed=seed, device=device, speed=speed)


    def ours_alone():
        return Ours(num_envs=1, seed=0)


    def ours_without_device(num_envs, seed):
        return Ours(num_envs=num_envs, seed=seed)


    def all_as_one(num_envs):
        return Gym()


    def nothing():
        return None


    class Incomplete:
        def __init__(self, *, num_envs, seed, device="cpu"):
            pass


    class Other:
        def __init__(self, colour):
            pass


    gymnasium.register("Theirs-v0", entry_point=Gym, max_episode_steps=2)
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A module of somebody else's, importable as `their_envs`."""
    (tmp_path / "their_envs.py").write_text(textwrap.dedent(THEIRS))
    (tmp_path / "broken_envs.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    import gymnasium

    sys.modules.pop("their_envs", None)
    gymnasium.registry.pop("Theirs-v0", None)


@pytest.mark.parametrize("name", GRIDWORLDS)
def test_makes_gridworlds(name):
    env = make(name, num_envs=3, seed=0)
    assert isinstance(env, Environment) and type(env).__name__ == name
    assert env.reset().observation.shape[0] == 3


def test_settings_reach_the_gridworld():
    env = make("PassiveTMaze", num_envs=1, seed=0, corridor_length=5, num_distractors=4)
    assert env.spec.observation_shape == (7,)


def test_makes_atari():
    env = make("ALE/Pong-v5", num_envs=1, seed=0, num_threads=1, frame_stack=2)
    assert isinstance(env, Atari) and isinstance(env, Environment)
    assert env.game == "pong" and env.spec.observation_shape == (2, 84, 84)


def test_makes_minigrid():
    env = make("MiniGrid-MemoryS7-v0", num_envs=2, seed=0, context="grid", view_size=5, max_steps=4)
    assert isinstance(env, GymnasiumEnvs) and isinstance(env, Environment)
    assert env.reset().observation.shape == (2, 20, 5, 5)
    for _ in range(4):
        step = env.step(torch.zeros(2, dtype=torch.int64))
    assert step.last.all()


def test_makes_other_gymnasium_environments():
    env = make("CartPole-v1", num_envs=2, seed=0, max_episode_steps=3, sutton_barto_reward=True)
    assert isinstance(env, GymnasiumEnvs) and isinstance(env, Environment)
    env.reset()
    assert env.step(torch.tensor([0, 1])).reward.tolist() == [0, 0]


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        *[(name, GymnasiumEnvs) for name in ("Gym", "Theirs-v0", "one", "any_one")],
        *[(name, GymnasiumVector) for name in ("Vector", "vector", "vector_of_three")],
        *[(name, DmEnvs) for name in ("Dm", "one_dm", "any_dm")],
    ],
)
def test_makes_what_a_module_holds(name, cls):
    env = make(f"their_envs:{name}", num_envs=3, seed=0, speed=2.5)
    assert isinstance(env, cls) and isinstance(env, Environment)
    assert env.reset().observation.tolist() == [[0, 0]] * 3
    assert env.step(torch.tensor([0, 1, 0])).reward.tolist() == [2.5] * 3


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Ours", "factory"])
def test_environments_of_our_protocol_need_no_adapter(name):
    env = make(f"their_envs:{name}", num_envs=3, seed=8, speed=2.5)
    assert type(env).__name__ == "Ours" and env.seed == 8
    assert env.step(torch.tensor([0, 1, 0])).reward.tolist() == [2.5] * 3


@pytest.mark.usefixtures("theirs")
def test_what_a_function_takes_itself_is_its_own():
    assert make("their_envs:one", num_envs=2, seed=0, view_size=3)  # elsewhere MiniGrid's
    with pytest.raises(ValueError, match=r"view_size, encoding, .* are for MiniGrid"):
        make("their_envs:Gym", num_envs=2, seed=0, view_size=3)
    with pytest.raises(ValueError, match=r"their_envs:any_dm has no argument 'view_size'; .*It takes .*success_reward"):
        make("their_envs:any_dm", num_envs=2, seed=0, view_size=3)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Gym", "one", "Dm", "any_dm"])
def test_context_of_an_environment_of_a_module_is_a_setting(name):
    env = make(f"their_envs:{name}", num_envs=2, seed=0, context="their_envs:hidden", speed=2)
    assert env.spec.context_size == 1
    assert env.reset().context.tolist() == [[14.0], [14.0]]
    assert env.step(torch.tensor([0, 1])).context.tolist() == [[14.0], [14.0]]
    with pytest.raises(ValueError, match="module 'their_envs' has no 'hiden'; the nearest is 'hidden'"):
        make(f"their_envs:{name}", num_envs=2, seed=0, context="their_envs:hiden")
    with pytest.raises(ArgumentError, match=r"^context: found 3; allowed .*'module:function', a function of the env"):
        make(f"their_envs:{name}", num_envs=2, seed=0, context=3)
    with pytest.raises(ArgumentError, match=r"^context: found a function that gives {'speed': 7.0}; allowed one that"):
        make(f"their_envs:{name}", num_envs=2, seed=0, context="their_envs:named")


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Vector", "vector", "vector_of_three", "factory"])
def test_a_context_needs_single_environments(name):
    with pytest.raises(
        ArgumentError,
        match=r"^context: found 'their_envs:hidden'; allowed None with .* all at once, .*; name what makes",
    ):
        make(f"their_envs:{name}", num_envs=3, seed=0, context="their_envs:hidden")


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Gym", "Theirs-v0", "one", "Vector", "vector", "Dm", "any_dm", "Ours"])
def test_success_of_an_environment_of_a_module_is_a_setting(name):
    assert make(f"their_envs:{name}", num_envs=2, seed=0).spec.success_reward is None
    assert make(f"their_envs:{name}", num_envs=2, seed=0, success_reward=1.5).spec.success_reward == 1.5
    with pytest.raises(ArgumentError, match=r"^success_reward: found 'much'; allowed a number, or None"):
        make(f"their_envs:{name}", num_envs=2, seed=0, success_reward="much")


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Dm", "one_dm"])
def test_dm_environments_of_a_module_are_seeded_differently(name):
    env = make(f"their_envs:{name}", num_envs=3, seed=0)
    assert [inner.seed for inner in env.envs] == environment_seeds(0, 3)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("their_envs:Gmy", "has no 'Gmy'; the nearest is 'Gym'"),
        ("their_envs:number", "expected a class or a function, got int"),
        ("their_envs:Incomplete", r"Incomplete, which is not an envs.Environment: it lacks \['spec', "),
        ("their_envs:Other", r"takes \(num_envs, seed, device\) and gives an envs.Environment; it takes \['colour'\]"),
        ("their_envs:nothing", r"or something that takes .*; it takes \[\] and gives NoneType"),
        ("their_envs:ours_alone", r"or something that takes .*; it takes \[\] and gives Ours"),
        ("their_envs:ours_without_device", r"or something that .*; it takes \['num_envs', 'seed'\] and gives Ours"),
        ("their_envs:all_as_one", "Gym, which is not an .* What makes one environment must not take num_envs"),
        ("their_envs:vector_of_three", "vector_of_three gave 3 environments, expected 2; let it take num_envs"),
        (
            "their_envs:Parts",
            "FlattenObservation .* in a function or class of your module, .*: --env.id my_module:make",
        ),
        ("no_such_module:Gym", "there is no module 'no_such_module'; is its folder on PYTHONPATH"),
    ],
)
def test_what_a_module_does_not_hold_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make(name, num_envs=2, seed=0)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Sized", "sized"])
def test_an_argument_without_a_default_is_asked_for(name):
    message = f"^length: found nothing; allowed what their_envs:{name} takes, which has no default; give it a value$"
    with pytest.raises(ArgumentError, match=message):
        make(f"their_envs:{name}", num_envs=2, seed=0, speed=2.5)
    assert make(f"their_envs:{name}", num_envs=2, seed=0, length=3).num_envs == 2


@pytest.mark.usefixtures("theirs")
def test_a_module_that_lacks_an_import_says_so_itself():
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        make("broken_envs:Gym", num_envs=2, seed=0)


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [
        ("PasiveTMaze", "PassiveTMaze"),
        ("CartPole", "CartPole-v1"),
        ("MiniGrid-MemoryS8-v0", "MiniGrid-MemoryS7-v0"),
        ("ALE/Brekout-v5", "ALE/Breakout-v5"),
        ("Breakout-v5", "ALE/Breakout-v5"),
    ],
)
def test_an_unknown_id_names_the_nearest(env_id, nearest):
    with pytest.raises(ValueError, match=rf"unknown .*{env_id}.*'{nearest}'"):
        make(env_id, num_envs=1, seed=0)


def test_an_id_like_no_other_says_what_there_is():
    with pytest.raises(ValueError, match=r"unknown environment '\?'; expected one of \['PassiveTMaze'.*module:Name"):
        make("?", num_envs=1, seed=0)


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("env_id", "argument", "nearest"),
    [
        ("PassiveTMaze", "coridor_length", "corridor_length"),
        ("ALE/Pong-v5", "sticky_action", "sticky_actions"),
        ("CartPole-v1", "max_episode_step", "max_episode_steps"),
        ("MiniGrid-MemoryS7-v0", "viewsize", "view_size"),
        ("MiniGrid-MemoryS7-v0", "max_step", "max_steps"),  # an argument of the base class
        ("their_envs:Gym", "sped", "speed"),
        ("their_envs:Vector", "sped", "speed"),
        ("their_envs:Dm", "sped", "speed"),
        ("their_envs:factory", "sped", "speed"),
        ("their_envs:one", "sped", "speed"),
    ],
)
def test_an_unknown_argument_names_the_nearest_and_the_allowed_ones(env_id, argument, nearest):
    with pytest.raises(
        ValueError, match=rf"{env_id} has no argument '{argument}'; did you mean '{nearest}'\? It takes .*{nearest}"
    ):
        make(env_id, num_envs=1, seed=0, **{argument: 1})


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("env_id", "arguments", "message"),
    [
        (
            "CartPole-v1",
            {"max_episode_steps": "many"},
            "max_episode_steps: found 'many'; allowed what CartPole-v1 takes",
        ),
        ("CartPole-v1", {"render_mode": 3}, "render_mode: found 3; allowed what CartPole-v1 takes"),
        ("ALE/Pong-v5", {"frame_skip": "4x"}, "frame_skip: found '4x'; allowed an integer of at least 1"),
        ("their_envs:Gym", {"speed": "fast"}, "speed: found 'fast'; allowed what their_envs:Gym takes"),
        ("their_envs:one", {"speed": "fast"}, "speed: found 'fast'; allowed what their_envs:one takes"),
        ("their_envs:any_one", {"sped": 1}, "sped: found 1; allowed what their_envs:any_one takes .TypeError: "),
        ("their_envs:Vector", {"speed": "fast"}, "speed: found 'fast'; allowed what their_envs:Vector takes"),
        ("their_envs:Dm", {"speed": "fast"}, "speed: found 'fast'; allowed what their_envs:Dm takes"),
        ("their_envs:Ours", {"speed": "fast"}, "speed: found 'fast'; allowed what their_envs:Ours takes"),
        ("their_envs:factory", {"speed": "fast"}, "speed: found 'fast'; allowed what their_envs:factory takes"),
    ],
)
def test_a_value_that_an_environment_cannot_take_is_named(env_id, arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}.*; leave it out for the default$") as error:
        make(env_id, num_envs=2, seed=0, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("env_id", ["PassiveTMaze", "ALE/Pong-v5", "CartPole-v1"])
def test_at_least_one_environment(env_id):
    for number in (0, "4", 2.0):
        with pytest.raises(
            ArgumentError, match=f"^num_envs: found {number!r}; allowed an integer of at least 1; say how many$"
        ):
            make(env_id, num_envs=number, seed=0)
    with pytest.raises(ArgumentError, match=r"^seed: found None; allowed an integer of at least 0; choose one$"):
        make(env_id, num_envs=1, seed=None)
    env = make(env_id, num_envs=np.int64(2), seed=np.int64(3))
    assert env.num_envs == 2
    env.close()


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(("name", "argument"), [("NeedsSeed", "seed"), ("needs_device", "device")])
def test_what_nobody_gives_to_a_gymnasium_environment_is_named(name, argument):
    with pytest.raises(ArgumentError, match=f"^{argument}: found an argument of their_envs:{name} that has no default"):
        make(f"their_envs:{name}", num_envs=2, seed=0)


@pytest.mark.usefixtures("theirs")
def test_dm_environments_that_cannot_be_seeded_are_told_of():
    with pytest.warns(UserWarning, match="their_envs:unseeded_dm has no argument of the name seed"):
        make("their_envs:unseeded_dm", num_envs=2, seed=0)
    make("their_envs:unseeded_dm", num_envs=1, seed=0)  # nothing to be alike


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("name", ["Gym", "one"])
def test_a_time_limit_for_what_a_module_makes(name):
    env = make(f"their_envs:{name}", num_envs=2, seed=0, max_episode_steps=3)
    env.reset()
    steps = [env.step(torch.zeros(2, dtype=torch.int64)) for _ in range(4)]
    assert [bool(step.last.all()) for step in steps] == [False, False, True, False]
    assert all((step.discount == 1).all() for step in steps)
    with pytest.raises(ArgumentError, match=r"^max_episode_steps: found 0; allowed an integer of at least 1, or None"):
        make(f"their_envs:{name}", num_envs=2, seed=0, max_episode_steps=0)


@pytest.mark.usefixtures("theirs")
def test_other_processes_find_what_a_module_registers():
    env = make("their_envs:Theirs-v0", num_envs=1, seed=0, vectorization="async", speed=2.5)
    try:
        env.reset()
        assert env.step(torch.tensor([0])).reward.tolist() == [2.5]
    finally:
        env.close()


@pytest.mark.parametrize(
    ("env_id", "package", "extra"),
    [
        ("MiniGrid-MemoryS7-v0", "minigrid", "minigrid"),
        ("ALE/Pong-v5", "ale_py", "agents"),
        ("X-v0", "gymnasium", "agents"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, env_id, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(ImportError, match=rf"{package}.*: pip install -e '\.\[{extra}\]'"):
        make(env_id, num_envs=1, seed=0)


def test_importing_the_package_imports_no_environment_library():
    code = (
        "import sys, envs; "
        "print([m for m in ('gymnasium', 'ale_py', 'minigrid', 'dm_env', 'envs.gridworlds') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert found.stdout.strip() == "[]" and not found.stderr


def _root():
    return envs.__path__[0] + "/.."
