"""Settings of a training run: what they are, what they may be, and how files and the command line override them.

Every setting is a field of a frozen dataclass, with its type, its allowed range, and a sentence on unit and source
beneath it; `--help` shows the same sentences. There is one way in, whether a value comes from Python, from a YAML file,
from the command line or from a checkpoint: the dataclass checks itself when it is built. Files and options only
override defaults, so a file of three lines is a complete configuration; `save_config` writes the resolved one.
"""

import argparse
import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeAlias, Union, get_args, get_origin
from typing import get_type_hints as _get_type_hints

import torch
import yaml

from dni_rl.files import write_text

CONFIG_FILE = "config.yaml"  # the resolved configuration, beside every checkpoint and result


class _Rule(NamedTuple):
    text: str
    holds: Callable[[Any], bool]


Positive: TypeAlias = Annotated[float, _Rule("above 0", lambda x: x > 0)]
NonNegative: TypeAlias = Annotated[float, _Rule("of at least 0", lambda x: x >= 0)]
Fraction: TypeAlias = Annotated[float, _Rule("from 0 to 1", lambda x: 0 <= x <= 1)]
ClipRatio: TypeAlias = Annotated[float, _Rule("above 0, below 1", lambda x: 0 < x < 1)]
PositiveFraction: TypeAlias = Annotated[float, _Rule("above 0, up to 1", lambda x: 0 < x <= 1)]
Decay: TypeAlias = Annotated[float, _Rule("from 0 up to, not including, 1", lambda x: 0 <= x < 1)]
MemorySteps: TypeAlias = Annotated[float, _Rule("above 2", lambda x: x > 2)]
Count: TypeAlias = Annotated[int, _Rule("of at least 0", lambda x: x >= 0)]
SequenceSteps: TypeAlias = Annotated[int, _Rule("of at least 4", lambda x: x >= 4)]
PositiveCount: TypeAlias = Annotated[int, _Rule("of at least 1", lambda x: x >= 1)]
TwoOrMore: TypeAlias = Annotated[int, _Rule("of at least 2", lambda x: x >= 2)]
Seed: TypeAlias = Annotated[int, _Rule("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)]
Device: TypeAlias = Annotated[
    str, _Rule("of the form cpu, cuda or cuda:<index>", lambda x: re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", x))
]
Text: TypeAlias = Annotated[str, _Rule("of at least one character", lambda x: x.strip())]
LONGEST_NAME = 200  # bytes of a folder's name, of which file systems take 255
FolderName: TypeAlias = Annotated[
    str,
    _Rule(
        f"naming one folder, without / or \\ and of {LONGEST_NAME} bytes at most",
        lambda x: x.strip(". ") and not re.search(r"[/\\]", x) and len(x.encode()) <= LONGEST_NAME,
    ),
]


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A group of settings that checks its own types and ranges when built.

    A list becomes a tuple where one is declared.
    """

    section: ClassVar[str]

    def __post_init__(self):
        for name, annotation in _annotations(type(self)).items():
            value = getattr(self, name)
            try:
                # the only write to a frozen instance: it is not yet visible to anyone
                object.__setattr__(self, name, _convert(annotation, value))
            except _MismatchError:
                self._refuse(name, _allowed(annotation), f"leave it out for the default, {_show(_default(self, name))}")

    def _refuse(self, name: str, allowed: str, way_out: str) -> NoReturn:
        found = _show(getattr(self, name))
        raise ValueError(f"{self.section}.{name}: found {found}; allowed {allowed}; {way_out}")

    def _refuse_unread(self, names: Sequence[str], where: str, way_out: str) -> None:
        """Refuses settings that nothing reads `where`; as the defaults, which every configuration has, they may stand."""
        for name in names:
            default = _default(self, name)
            if getattr(self, name) != default:
                shown = _show(default)
                self._refuse(
                    name,
                    f"{shown} {where}, which does not read it",
                    f"set --{self.section}.{name} {shown}, or {way_out}",
                )


@dataclass(frozen=True, kw_only=True)
class EnvConfig(_Section):
    """What the agent acts in."""

    section: ClassVar[str] = "env"

    id: Text = "PassiveTMaze"
    """Name of the environment: a gridworld of this project, an id of ALE, MiniGrid, bsuite, POPGym or gymnasium, or module:Name."""
    num_envs: PositiveCount = 64
    """Environments stepped side by side: the batch size B. Under torchrun those of each process."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment. A file replaces them as a whole; --env.kwargs.NAME VALUE overrides one of them."""

    def __post_init__(self):
        super().__post_init__()
        settings = {"env_id": "env.id", "num_envs": "env.num_envs", "seed": "run.seed", "device": "run.device"}
        for name, setting in settings.items():
            if name in self.kwargs:
                raise ValueError(
                    f"env.kwargs.{name}: found {_show(self.kwargs[name])}; allowed the environment's other arguments; set --{setting} "
                    "in its place"
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """Torso, recurrent core and heads."""

    section: ClassVar[str] = "model"

    torso: Literal["auto", "none", "mlp", "conv", "conv_small"] = "auto"
    """What encodes an observation for the core; auto picks by the shape and type of the observation."""
    torso_sizes: tuple[PositiveCount, ...] = (64,)
    """Widths of the torso's fully connected layers, in units, behind the convolutions where there are any; []: no such layers."""
    core: Literal["lstm", "gru", "elementwise_lstm", "multi_timescale"] = "lstm"
    """The recurrent core. elementwise_lstm: every unit recurs on itself alone, for exact RTRL; multi_timescale: LSTM levels, each
    slower than the one below, that pass messages up and context down."""
    hidden_size: PositiveCount = 32
    """Width H of the core's state, in units; of multi_timescale that of every level."""
    num_layers: PositiveCount = 1
    """Stacked layers of an lstm or gru core."""
    periods: tuple[PositiveCount, ...] = (1, 8)
    """multi_timescale: ticks of each level, the lowest first, in agent steps of each environment's own episode: 1, then rising
    multiples of the period below. Other cores do not read it; it may stand, so that the name of the core alone switches."""
    level_sizes: tuple[PositiveCount, ...] | None = None
    """multi_timescale: width of each level, the lowest first, in units; null: hidden_size for all of them."""
    message: Literal["last", "mean"] = "last"
    """multi_timescale: what a level sees of the one below, its last output or the mean of those since the last tick."""
    chrono_max: MemorySteps | None = None
    """Longest memory expected, in agent steps: the gates start out remembering up to so long (chrono initialisation,
    Tallec & Ollivier 2018), of multi_timescale those of the highest level, of the others up to the next tick of the level above;
    null keeps the core's usual initialisation."""
    input_gain: Positive = 1.0
    """Multiplies the core's initial input weights, of every level those for what comes from below. Chrono initialisation opens
    input gates to about 1 / chrono_max only; a gain of 3 keeps what enters large enough to be learned from."""
    previous_action: bool = True
    """Whether the core also sees the previous action, one-hot."""
    previous_reward: bool = True
    """Whether the core also sees the previous reward."""
    head_sizes: tuple[PositiveCount, ...] = ()
    """Widths of hidden layers in front of the policy head and, separately, the value head; [] is linear heads."""
    privileged_value: bool = False
    """Whether the value function is also told the environment's privileged context, what critic.kind cdni tells the error critic. The
    policy never sees it, so that training needs it and acting does not (asymmetric actor-critic, Pinto et al. 2018)."""

    def __post_init__(self):
        super().__post_init__()
        if self.core not in ("lstm", "gru") and self.num_layers > 1:
            self._refuse("num_layers", f"1 with model.core {self.core}", "use lstm or gru for stacked layers")
        rising = all(above > below and above % below == 0 for below, above in itertools.pairwise(self.periods))
        if self.periods[:1] != (1,) or not rising:
            self._refuse("periods", "1, then rising multiples of the period below", "set for example [1, 8]")
        if self.level_sizes is not None and len(self.level_sizes) != len(self.periods):
            self._refuse(
                "level_sizes",
                f"{len(self.periods)} widths, one for each of model.periods",
                "leave it out for hidden_size",
            )
        if self.core != "multi_timescale":
            self._refuse_unread(
                ("level_sizes", "message"), f"with model.core {self.core}", "--model.core multi_timescale"
            )


NO_CRITIC = ("none", "rtrl")  # kinds of critic that are none


@dataclass(frozen=True, kw_only=True)
class CriticConfig(_Section):
    """The error critic, which predicts the gradient of the losses beyond a window (Jaderberg et al. 2017)."""

    section: ClassVar[str] = "critic"

    kind: Literal["none", "dni", "cdni", "dni_aux", "loss_critic", "sobolev", "bp_lambda", "rtrl"] = "none"
    """none: truncated BPTT; dni: the critic sees the core's state; cdni: and the environment's privileged context; dni_aux: dni,
    and the core predicts the synthetic gradients of the next window; loss_critic: dni by the gradient of a predicted future loss;
    sobolev: and that is trained on gradients as well; bp_lambda: a linear dni critic that learns online by eligibility traces,
    made for windows of one step; rtrl: no critic, but exact real-time recurrent learning, which carries d state / d parameters
    from window to window and from rollout to rollout, and needs model.core elementwise_lstm. The core's own parameters then have
    the gradient since the start of each episode, exact up to what the optimiser has changed since; torso and heads have that of
    the window, which for the heads is all there is."""
    hidden_sizes: tuple[PositiveCount, ...] = ()
    """Widths of the critic's hidden layers beside its linear path, in units; []: linear, or of a predicted loss quadratic."""
    gradient_discount: Fraction = 0.9
    """Multiplies the bootstrapped gradient at every cut, the analogue of a reward discount. The paper has 1; with 0.9
    our prototypes were stable."""
    scale: NonNegative = 1.0
    """Multiplies the synthetic gradient where it enters the core; the paper has 0.1 in recurrent nets."""
    max_norm_ratio: Positive | None = None
    """Bounds the norm of each sequence's synthetic gradient to this multiple of the running RMS norm of the gradient
    inside a window, without unit; null: no bound, as in the paper."""
    dense_targets: bool = True
    """Whether the critic learns from the gradient at every step of a window; false: at its start, as in the paper."""
    targets_per_window: TwoOrMore | None = 8
    """Of dense targets, at how many steps of a window at most, evenly spaced, the first its start; for one alone turn dense_targets off.
    null: at every step. A fit costs in proportion to it, and more than eight of a window taught the critic no more
    (docs/results/targets.md). With target_lambda below 1 it is every step, whatever stands here."""
    yardstick_interval: PositiveCount = 8
    """Fits of the critic from one look at the yardstick of max_norm_ratio to the next, after the first 16; each look costs a second
    backward pass. A2C fits once for a rollout, PPO once for each minibatch of the passes that the critic learns from."""
    fit_interval: PositiveCount = 1
    """Rollouts from one that the critic learns from to the next, of PPO with all its minibatches; in between its predictions are used
    as they are, and cost little. Each fit carries credit back by one window: over ten of them 2 was less sure than 1, and 4 in vain
    (docs/results/cooldown.md)."""
    normalize_targets: bool = True
    """Whether each component of the critic's target is divided by its running RMS; false: as in the paper."""
    epochs: PositiveCount = 1
    """PPO: passes over a rollout from which the critic learns, the first ones; later ones repeat the same states, and their synthetic
    gradients come from the critic as it is."""
    warmup_updates: Count = 0
    """Fits of the critic before its predictions are applied; with PPO one for each minibatch, see yardstick_interval."""
    slow_copy_rate: PositiveFraction | None = None
    """Synthetic gradients come from a slow copy of the critic, which moves by this fraction towards it at every fit; null: from the
    critic itself."""
    target_lambda: Fraction = 1.0
    """1: targets of the full window; below, mixed over the windows that could have been cut inside of it, as in TD(lambda), which takes
    dense_targets."""
    future_steps: Count = 0
    """Steps ahead whose core inputs the critic is also given as context, as far as the episode goes and the rollout is stored; the
    policy never sees them. 0: none."""
    past_steps: tuple[TwoOrMore, ...] = ()
    """The critic is also given fading averages of the episode's past observations (of images, the torso's features of them), one over
    about so many agent steps for each number, of at least 2. Nothing in them is privileged: they let it tell the core to keep what the
    core has not yet learned to keep. With them, every component of the critic's context is divided by its running RMS."""
    trace_lambda: Fraction = 0.9
    """bp_lambda: decay of the traces beside gradient_discount; 0 learns from the next prediction alone, 1 from true gradients alone
    (Pemberton & Costa 2024)."""
    interfaces: bool = False
    """multi_timescale: whether each message upwards is cut, and a critic of its own tells the lower level at once what the upper one
    will send back (Jaderberg et al. 2017, two networks that tick at different speeds). Of the settings of this section these critics
    share hidden_sizes, scale, normalize_targets, warmup_updates and slow_copy_rate; fit_interval and epochs, which say when they learn;
    and those of the one optimiser of all critics, learning_rate, adam_betas, adam_eps, max_grad_norm and weight_decay. No others."""
    auxiliary_cost: NonNegative = 0.03
    """dni_aux: weight of the auxiliary loss, of about 1 while nothing is predicted; the paper gives none, and 0.03 was the best of six on
    the T-maze (docs/results/log.md)."""
    learning_rate: Positive = 1e-2
    """Adam's step size for the critic at the first update. Several times that of the core, whose gradient it must keep up with: on the
    T-maze fifteen times (docs/results/learning_rate.md); with hidden layers, or cores of some hundred units, less."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of Adam's two moments per update; the usual 0.999 lets one late large gradient undo a solved task."""
    adam_eps: Positive = 1e-8
    """Adam's epsilon, in units of the gradient (Kingma & Ba 2015)."""
    max_grad_norm: Positive | None = None
    """Clips the norm of the critic's gradient; null: no clipping."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the critic, relative to the learning rate."""

    @property
    def predicts(self) -> bool:
        """Whether there is a critic of the core's state; otherwise the settings of one may stand, but nothing reads them."""
        return self.kind not in NO_CRITIC

    def __post_init__(self):
        super().__post_init__()
        if self.target_lambda < 1.0 and not self.dense_targets:
            self._refuse(
                "target_lambda",
                "1.0 with critic.dense_targets false, because mixed targets come from the steps inside the window",
                "set --critic.dense_targets true",
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(_Section):
    """The learner: A2C (Mnih et al. 2016) or PPO (Schulman et al. 2017), over rollouts cut into windows of BPTT."""

    section: ClassVar[str] = "algorithm"

    name: Literal["a2c", "ppo"] = "a2c"
    """The policy-gradient algorithm."""
    rollout_length: PositiveCount = 32
    """Agent steps per environment between two learning phases."""
    bptt_horizon: PositiveCount = 8
    """Length K of a window of truncated BPTT, in agent steps; divides the rollout length. With model.core multi_timescale in ticks of
    each level: level i is cut every K * periods[i] steps, and K times the longest period divides the rollout length."""
    discount: Fraction = 0.99
    """Reward discount per agent step, that is after action repeat."""
    gae_lambda: Fraction = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016); 1 gives n-step returns."""
    entropy_cost: NonNegative = 0.01
    """Weight of the entropy bonus (Mnih et al. 2016)."""
    baseline_cost: NonNegative = 0.5
    """Weight of the value loss (Mnih et al. 2016); prototypes on memory tasks did better with 0.1."""
    learning_rate: Positive = 1e-3
    """Adam's step size for the model at the first update (prototypes)."""
    anneal_learning_rate: bool = True
    """Whether both learning rates fall linearly to 0 at the last step of the run, which then cannot be made longer."""
    learning_rate_hold: Decay = 0.0
    """anneal_learning_rate: the share of the run for which the learning rates stay as they are before they fall: a constant rate with a
    cooldown (Haegele et al. 2024)."""
    anneal_entropy: bool = False
    """Whether the entropy cost falls linearly over the run, to zero or to final_entropy_share. A solved task has little else to learn
    from, and a constant cost goes on pulling the policy away from it."""
    final_entropy_share: Fraction = 0.0
    """anneal_entropy: the share of the entropy cost that is left at the last step. Where a memory is so long that it may be lost again, a
    policy that has become deterministic by then does not find back (docs/results/log.md)."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of Adam's two moments per update; the usual 0.999 lets one late large gradient undo a solved task."""
    adam_eps: Positive = 1e-8
    """Adam's epsilon, in units of the gradient (Kingma & Ba 2015). The 1e-5 of many agents hides the small gradients
    that carry a memory."""
    max_grad_norm: Positive | None = 0.5
    """Clips the norm of the model's gradient (Huang et al. 2022); null: no clipping."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of the model, relative to the learning rate."""
    normalize_advantages: bool = False
    """Whether advantages have mean 0 and standard deviation 1 in every minibatch; usual in PPO (Huang et al. 2022)."""
    epochs: PositiveCount = 4
    """PPO: passes over a rollout; 1 with critic.kind bp_lambda or rtrl. A2C makes one, whatever stands here."""
    minibatches: PositiveCount = 4
    """PPO: parts of a rollout per pass, in whole sequences, so it divides env.num_envs; 1 with critic.kind bp_lambda or rtrl. A2C takes
    the rollout as one, whatever stands here."""
    clip_ratio: ClipRatio = 0.2
    """PPO: how far the probability ratio may leave 1 (Schulman et al. 2017)."""
    target_kl: Positive | None = None
    """PPO: ends the passes over a rollout once the mean KL divergence from the old policy exceeds this, in nats; null:
    never."""

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate_hold and not self.anneal_learning_rate:
            self._refuse(
                "learning_rate_hold",
                "0.0 with algorithm.anneal_learning_rate false, where the rates stay for all of the run",
                "set --algorithm.anneal_learning_rate true",
            )
        if self.final_entropy_share and not self.anneal_entropy:
            self._refuse(
                "final_entropy_share",
                "0.0 with algorithm.anneal_entropy false, where all of the cost is left",
                "set --algorithm.anneal_entropy true",
            )
        if self.name != "ppo":
            # epochs, minibatches and clip_ratio may stand, so that this name alone switches the algorithm
            self._refuse_unread(("target_kl",), f"with algorithm.name {self.name}", "--algorithm.name ppo")
        if self.rollout_length % self.bptt_horizon:  # a horizon longer than the rollout included
            divisors = [k for k in range(1, self.rollout_length + 1) if self.rollout_length % k == 0]
            nearest = min(divisors, key=lambda k: abs(k - self.bptt_horizon))
            self._refuse(
                "bptt_horizon",
                f"a divisor of algorithm.rollout_length, {self.rollout_length}",
                f"set --algorithm.bptt_horizon {nearest}, or a rollout length that {self.bptt_horizon} divides",
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Section):
    """How long, where and with which output."""

    section: ClassVar[str] = "run"

    seed: Seed = 0
    """Seed of every random generator of the run."""
    total_steps: PositiveCount = 2_000_000
    """Length of the run in agent steps, summed over environments, under torchrun over those of all processes. With --resume another
    one makes a run longer, unless its rates fall with its length (algorithm.anneal_learning_rate, algorithm.anneal_entropy)."""
    device: Device = "cpu"
    """Where the model lives: cpu, cuda or cuda:<index>. Under torchrun cuda is a GPU for each process, as far as there are as many."""
    threads: PositiveCount = 1
    """CPU threads of PyTorch; small recurrent nets gain nothing from more."""
    output_dir: Text = "runs"
    """Folder that holds one folder per run."""
    name: FolderName | None = None
    """Name of the run's own folder; null: made from the environment, the method and the seed."""
    log_every_steps: PositiveCount = 20_000
    """Agent steps between two lines of metrics."""
    checkpoint_every_steps: PositiveCount = 500_000
    """Agent steps between two checkpoints; the last step always has one."""
    credit_every_steps: PositiveCount | None = None
    """Agent steps between two measurements of the credit horizon, beside those before the first update and after the last; null:
    none. They act in environments of their own and leave the run as it is without them; charts/SPS leaves their time out.
    credit/expected_horizon takes an environment with privileged context."""
    credit_length: SequenceSteps = 256
    """Length in agent steps of the sequences on which the credit horizon is measured. Lags up to half of it are told apart, so it
    should be more than twice the longest memory of the task."""
    credit_num_envs: PositiveCount = 16
    """Number of those sequences, side by side."""
    tensorboard: bool = True
    """Whether metrics also go to TensorBoard; metrics.jsonl is always written."""
    progress: bool = True
    """Whether a progress bar is shown; where stderr is no terminal, a line every ten seconds at most."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a training run."""

    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self):
        algorithm, num_envs = self.algorithm, self.env.num_envs
        if algorithm.name == "ppo" and num_envs % algorithm.minibatches:
            algorithm._refuse(
                "minibatches",
                f"a divisor of env.num_envs, {num_envs}, because minibatches are whole sequences",
                f"set --env.num_envs {math.ceil(num_envs / algorithm.minibatches) * algorithm.minibatches}",
            )
        self._check_core()
        self._check_online()
        if self.critic.kind == "dni_aux" and algorithm.rollout_length == self.window_length:
            algorithm._refuse(
                "bptt_horizon",
                f"a proper divisor of algorithm.rollout_length, {algorithm.rollout_length}, with critic.kind dni_aux, whose targets "
                "lie in the next window",
                "set a shorter window",
            )
        steps_per_rollout = num_envs * algorithm.rollout_length
        if self.run.total_steps < steps_per_rollout:
            self.run._refuse(
                "total_steps",
                f"at least one rollout, {steps_per_rollout} (env.num_envs x algorithm.rollout_length)",
                "train longer, or with fewer environments",
            )

    @property
    def window_length(self) -> int:
        """Agent steps of a learner's window: in those of `bptt_horizon` ticks, all levels of a multi-timescale core are cut together."""
        slowest = self.model.periods[-1] if self.model.core == "multi_timescale" else 1
        return self.algorithm.bptt_horizon * slowest

    def _check_core(self) -> None:
        algorithm, critic, core = self.algorithm, self.critic, self.model.core
        if algorithm.rollout_length % self.window_length:
            algorithm._refuse(
                "rollout_length",
                f"a multiple of {self.window_length}, algorithm.bptt_horizon ticks of the slowest level (model.periods)",
                f"set --algorithm.rollout_length {math.ceil(algorithm.rollout_length / self.window_length) * self.window_length}",
            )
        if critic.interfaces and core != "multi_timescale":
            critic._refuse("interfaces", f"false with model.core {core}", "set --model.core multi_timescale")
        if critic.kind == "rtrl" and core != "elementwise_lstm":
            critic._refuse(
                "kind",
                f"none and the critics with model.core {core}, for which exact RTRL costs too much",
                "set --model.core elementwise_lstm",
            )
        if critic.kind == "bp_lambda" and core == "multi_timescale":
            critic._refuse(
                "kind",
                "none and the other critics with model.core multi_timescale, whose levels are cut at different steps",
                "set --model.core lstm",
            )

    def _check_online(self) -> None:
        """Traces and sensitivities travel with the one pass that a rollout is learned in, and traces need a linear critic."""
        algorithm, critic = self.algorithm, self.critic
        if critic.kind not in ("bp_lambda", "rtrl"):
            return
        for name in ("epochs", "minibatches"):
            if algorithm.name == "ppo" and getattr(algorithm, name) > 1:
                algorithm._refuse(
                    name,
                    f"1 with critic.kind {critic.kind}, which carries derivatives of one pass along the rollout",
                    f"set --algorithm.{name} 1, or --algorithm.name a2c",
                )
        if critic.kind == "rtrl":
            return
        wanted = {
            "hidden_sizes": (),
            "normalize_targets": False,
            "dense_targets": True,
            "max_norm_ratio": None,
            "fit_interval": 1,
            "warmup_updates": 0,
            "slow_copy_rate": None,
            "target_lambda": 1.0,
            "future_steps": 0,
            "past_steps": (),
        }
        wrong = {name: _show(value) for name, value in wanted.items() if getattr(critic, name) != value}
        if wrong:
            first, shown = next(iter(wrong.items()))
            critic._refuse(
                first,
                f"{shown} with critic.kind bp_lambda, whose traces are those of a linear critic and nothing else",
                f"set {' '.join(f'--critic.{name} {value}' for name, value in wrong.items())}; see configs/kinds/bp_lambda.yaml",
            )


def parse_train_config(argv: Sequence[str] | None = None) -> tuple[TrainConfig, Path | None]:
    """Reads a configuration from the command line: defaults, then config files, then options.

        train.py --config configs/x.yaml --algorithm.learning_rate 1e-3
        train.py --resume runs/x --run.log_every_steps 5000

    With --resume the base is the configuration saved in that run's folder instead of the defaults. A mistake ends the
    program with exit code 2 and one line on stderr.

    Args:
        argv: the arguments, without the program's name; None for those of the process.

    Returns:
        The configuration, and the path given with --resume or None.
    """
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    for option in {argument.split("=", 1)[0] for argument in argv}:
        if re.fullmatch(r"--env\.kwargs\.\w+", option):  # arguments of environments cannot be known in advance
            parser.add_argument(option, dest=option[2:], default=argparse.SUPPRESS)
    try:
        options, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(_unknown_argument(unknown[0]))
        resume = Path(options.resume) if options.resume is not None else None
        data: dict[str, Any] = {} if resume is None else _read_sections(_find_config(resume))
        for path in options.config:
            _merge(data, _read_sections(Path(path)))
        _merge(data, _read_options(vars(options)))
        config = from_dict(data)
        require_device(
            config.run.device, "" if resume is None else "resume it on a machine that has one, or start a new run"
        )
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config, resume


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """Builds a configuration from nested mappings, as `to_dict` returns them; what is missing keeps its default.

    Raises:
        ValueError: if a key is unknown, or a value has the wrong type or range.
    """
    _check_keys(data)
    # copied, so that no later change of the caller's data can reach the frozen configuration
    data = copy.deepcopy({name: settings or {} for name, settings in data.items()})
    sections: dict[str, Any] = {name: _SECTIONS[name](**settings) for name, settings in data.items()}
    return TrainConfig(**sections)


def to_dict(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The configuration as nested dicts of plain values (tuples become lists), for YAML files, checkpoints and logs."""
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
        for name, section in dataclasses.asdict(config).items()
    }


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Writes the resolved configuration, every default included, as YAML."""
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_text(Path(path), text)


def load_config(path: str | Path) -> TrainConfig:
    """Reads a YAML file; what it leaves out keeps its default.

    Raises:
        ValueError: if the file is missing, is not YAML, or holds an unknown key or a bad value.
    """
    return from_dict(_read_sections(Path(path)))


def require_device(name: str, way_out: str = "") -> torch.device:
    """The device of this name; `way_out` ends the message where it is not there and another would not do.

    Not checked by `RunConfig` itself, so that a configuration saved on another machine can still be read.

    Raises:
        ValueError: if this machine or this build of PyTorch does not have it.
    """
    device, num_gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        usable = "cpu" + "".join(f", cuda:{index}" for index in range(num_gpus))
        raise ValueError(
            f"run.device: found {name!r}, which this machine lacks; allowed {usable}; {way_out or 'set --run.device cpu'}"
        )
    return device


# Types and ranges


class _MismatchError(Exception):
    """A value that does not fit its annotation; the caller knows the name for the message."""


def _convert(annotation: Any, value: Any) -> Any:
    """The value in the declared type where that loses nothing: a list as a tuple, 1 as 1.0, 2e6 as an integer."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        value = _convert(arguments[0], value)
        if arguments[1].holds(value):
            return value
    elif origin in (Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _convert(arguments[0], value)
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple) and (arguments[-1] is ... or len(arguments) == len(value)):
            each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            return tuple(_convert(a, v) for a, v in zip(each, value, strict=True))
    elif origin is dict:
        if isinstance(value, dict) and _is_plain(value):
            return value
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif annotation is int:
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max
            and value == int(value)
        ):
            return int(value)
    elif isinstance(value, annotation):  # bool, str
        return value
    raise _MismatchError


def _is_plain(value: Any) -> bool:
    """Whether YAML and a checkpoint can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _allowed(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_allowed(arguments[0])} {arguments[1].text}"
    if origin in (Union, types.UnionType):
        return f"{_allowed(arguments[0])}, or null"
    if origin is Literal:
        return ", ".join(arguments[:-1]) + f" or {arguments[-1]}"
    if origin is tuple:
        return f"a list such as [{'8, 8' if arguments[-1] is ... else '0.9, 0.99'}], each {_allowed(arguments[0])}"
    if origin is dict:
        return "a mapping from names to plain values, such as {length: 20}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}[annotation]


def _show(value: Any) -> str:
    """The value as YAML would spell it, on one short line."""
    if isinstance(value, tuple):
        value = list(value)
    text = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )
    return textwrap.shorten(text, 80, placeholder=" ...")


def _annotations(section: type[_Section]) -> dict[str, Any]:
    hints = _get_type_hints(section, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


def _default(section: _Section | type[_Section], name: str) -> Any:
    found = next(f for f in dataclasses.fields(section) if f.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


_SECTIONS: dict[str, type[_Section]] = {
    s.section: s for s in (EnvConfig, ModelConfig, CriticConfig, AlgorithmConfig, RunConfig)
}


# Names


def _check_keys(data: Any, source: str = "") -> None:
    """Refuses every name that is not a setting. `source` is a file's name for the message."""
    prefix = f"{source}: " if source else ""
    if not isinstance(data, Mapping):
        raise ValueError(f"{prefix}found {_show(data)}; allowed a mapping with the sections {', '.join(_SECTIONS)}")
    for name, settings in data.items():
        if name not in _SECTIONS:
            match = difflib.get_close_matches(str(name), _SECTIONS, n=1)
            hint = f"did you mean {match[0]}?" if match else _suggestion("", str(name))
            raise ValueError(f"{prefix}{name}: found an unknown section; {hint}")
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(
                f"{prefix}{name}: found {_show(settings)}; allowed a mapping of settings; --help lists them"
            )
        for key in settings or {}:
            if key not in _annotations(_SECTIONS[name]):
                raise ValueError(f"{prefix}{name}.{key}: found an unknown setting; {_suggestion(name, str(key))}")


def _suggestion(name: str, key: str, prefix: str = "") -> str:
    """What may have been meant: the setting of this name elsewhere, or the nearest in spelling, this section first."""
    here = list(_annotations(_SECTIONS[name])) if name in _SECTIONS else []
    everywhere = [k for section in _SECTIONS.values() for k in _annotations(section)]
    if key not in everywhere:
        matches = difflib.get_close_matches(key, here, n=1) or difflib.get_close_matches(key, everywhere, n=1)
        key = matches[0] if matches else ""
    homes = [name] if key in here else [n for n, section in _SECTIONS.items() if key in _annotations(section)]
    if homes:
        return f"did you mean {' or '.join(f'{prefix}{home}.{key}' for home in homes)}?"
    return f"allowed {', '.join(here)}" if here else f"allowed {', '.join(_SECTIONS)}; --help lists their settings"


def _unknown_argument(argument: str) -> str:
    if not argument.startswith("--"):
        return (
            f"found the argument {argument!r}; allowed options of the form --section.setting VALUE; --help lists them"
        )
    option = argument.split("=", 1)[0]
    name, _, key = option[2:].rpartition(".")
    if key in _SECTIONS:
        return f"{option}: found a section; allowed its settings, {option}.SETTING VALUE; --help lists them"
    others = difflib.get_close_matches(option, ["--config", "--resume", "--help"], n=1)
    hint = f"did you mean {others[0]}?" if others else _suggestion(name, key, prefix="--")
    return f"{option}: found an unknown option; {hint}"


# Files


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are written as in Python, 1e-3 included, and 010 and 1:00:00 are text; a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent, which silently keeps the last of two equal keys."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some YAML would read as a number: the parent's, which is YAML 1.1, or ours."""


# YAML 1.1 also has octal numbers with a leading zero (010 is 8) and those to the base 60 (1:00:00 is 3600).
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DIGITS = "[0-9](?:_?[0-9])*"
_NUMBERS = {
    _INT: r"[-+]?(?:0|[1-9](?:_?[0-9])*|0b[01]+|0o[0-7]+|0x[0-9a-fA-F]+)",
    _FLOAT: rf"[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)",
}
for _tag, _number in _NUMBERS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_tag, re.compile(rf"(?:{_number})\Z"), list("-+.0123456789"))


def load_yaml(text: str, source: str) -> Any:
    """What a YAML text holds, see `_Loader`. ValueError in one line, which begins with `source`, if it is none."""
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader
        json.dumps(data, default=str, skipkeys=True)  # ValueError for an alias of what it stands in
        return data
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{source}{where}: found text that is not valid YAML ({problem})") from None
    except ValueError as error:  # a date such as 2000-99-99, too
        raise ValueError(f"{source}: found text that is not valid YAML ({error})") from None


def _read_sections(path: Path) -> dict[str, Any]:
    """A config file as nested dicts, with its names checked so that an error tells the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(
            f"{path}: found no readable file ({reason}); allowed a YAML file; the repository's are in configs/"
        ) from None
    data = load_yaml(text, str(path)) or {}
    _check_keys(data, str(path))
    return {name: dict(settings or {}) for name, settings in data.items()}


def _find_config(resume: Path) -> Path:
    folder = resume if resume.is_dir() else resume.parent
    if not resume.exists() or not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"--resume: found no {CONFIG_FILE} in {folder}; allowed the folder of an earlier run, or a checkpoint in "
            "it; to start anew leave --resume out"
        )
    return folder / CONFIG_FILE


def _merge(data: dict[str, Any], override: dict[str, Any]) -> None:
    for name, settings in override.items():
        section = data.setdefault(name, {})
        section.update(settings)
        for key in [key for key in settings if key.startswith("kwargs.")]:  # --env.kwargs.NAME overrides one argument
            value, kwargs = section.pop(key), section.get("kwargs", {})
            if isinstance(kwargs, dict):  # otherwise EnvConfig tells
                section["kwargs"] = {**kwargs, key.removeprefix("kwargs."): value}


# Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Instead of printing the usage, which for so many options hides the message."""
        option, _, problem = message.removeprefix("argument ").partition(": ")
        if problem == "expected one argument":
            problem = f"found no value; allowed {option} VALUE, or {option}=VALUE where it starts with a dash"
        raise ValueError(f"{option}: {problem}" if problem else option)


def _parser() -> _Parser:
    parser = _Parser(
        usage="%(prog)s [-h] [--config FILE] [--resume PATH] [--section.setting VALUE ...]",
        description="Settings are read in this order: defaults (or those of --resume), --config files, options.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file of overrides; may be repeated"
    )
    parser.add_argument(
        "--resume", metavar="PATH", help="folder of a run to continue, with its configuration as the base"
    )
    for name, section in _SECTIONS.items():
        group = parser.add_argument_group(name, inspect.getdoc(section))
        for key, annotation in _annotations(section).items():
            default = _show(_default(section, key))
            text = f"{_field_docs()[section.__name__, key]} Allowed: {_allowed(annotation)}. Default: {default}."
            group.add_argument(
                f"--{name}.{key}", metavar=_metavar(annotation), default=argparse.SUPPRESS, help=text.replace("%", "%%")
            )
    return parser


def _metavar(annotation: Any) -> str:
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        annotation = get_args(annotation)[0]
    origin = get_origin(annotation)
    return {Literal: "NAME", tuple: "LIST", dict: "MAPPING"}.get(origin) or annotation.__name__.upper()


@functools.cache
def _field_docs() -> dict[tuple[str, str], str]:
    """By class and field, the string beneath the field, which Python itself does not keep."""
    return {
        (definition.name, statement.target.id): " ".join(following.value.value.split())
        for definition in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        if isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }


def _read_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line as nested dicts of typed values."""
    data: dict[str, dict[str, Any]] = {}
    for option, text in options.items():
        name, _, key = option.partition(".")
        if key:
            data.setdefault(name, {})[key] = text if _is_text(name, key, text) else load_yaml(text, f"--{option}")
    return data


def _is_text(name: str, key: str, text: str) -> bool:
    """Whether an option is to be taken literally: a run may be called 007 or no, which YAML would not read as text."""
    annotation = _annotations(_SECTIONS[name]).get(key)  # None for an argument of the environment
    return annotation is not None and _metavar(annotation) in ("STR", "NAME") and text != "null"
