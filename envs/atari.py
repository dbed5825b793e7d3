"""Atari games of the Arcade Learning Environment: B emulators in C++ threads behind one `TimeStep`.

Defaults follow Machado et al., "Revisiting the Arcade Learning Environment" (2018): sticky actions with probability
0.25 make the games stochastic, so there are no random no-ops and no automatic FIRE at the start, and an episode is
a whole game, cut after 108,000 frames, half an hour of play. In two things they differ, as most users do from the paper: the
agent chooses from the game's own actions (from all of the console's with `full_action_space`), and it sees one grey frame, because
remembering is the work of the recurrent core.
"""

import difflib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.adapters import checked_actions, environment_seeds
from envs.arguments import DEFAULT, refuse, require_flag, require_integer, require_number
from envs.timestep import EnvSpec, TimeStep


class Atari:
    """B games of one title, next-step autoreset, stepped by ale_py's vector environment.

    With `episodic_life` a lost life ends the episode (`last`, discount 0) but not the game: it goes on from where it
    is, and the next step is `first`, after a no-op. Steps that ended the game itself, or at which `max_frames` cut it,
    are told apart by `TimeStep.game_over`, so the score of a game is the sum of `raw_reward` up to one of them. (ale_py's
    own option of that name restarts the game on every lost life, so that the agent would never see what comes after; it is not used.)

    Attributes:
        game: snake-case name of the title.
    """

    resumable = False

    def __init__(
        self,
        game: str,
        *,
        num_envs: int,
        seed: int,
        device: str | torch.device = "cpu",
        frame_stack: int = 1,
        frame_skip: int = 4,
        sticky_actions: float = 0.25,
        flicker_probability: float = 0.0,
        clip_rewards: bool = True,
        episodic_life: bool = False,
        full_action_space: bool = False,
        max_frames: int = 108_000,
        noop_max: int = 0,
        use_fire_reset: bool = False,
        num_threads: int = 0,
        context: str | None = None,
    ):
        """Starts the emulators.

        Args:
            game: "ALE/MsPacman-v5", "MsPacman" or "ms_pacman".
            num_envs: B.
            seed: of the run; every emulator gets its own, see `environment_seeds`.
            device: of the TimeSteps.
            frame_stack: frames of an observation, the newest last; missing ones are 0 after a reset.
            frame_skip: emulator frames per step. The last two are maximised over, against sprites that flicker.
            sticky_actions: probability, per emulator frame, of repeating the previous action.
            flicker_probability: probability of each frame to arrive black (Hausknecht & Stone 2015), drawn from a
                generator of its own, so the games stay the same.
            clip_rewards: rewards clipped to [-1, 1]; `raw_reward` keeps the points.
            episodic_life: see the class.
            full_action_space: all 18 actions and not the game's own.
            max_frames: emulator frames after which a game is cut; that is a time limit, and the discount stays 1.
            noop_max: up to this many random no-ops, less one, at the start of a game.
            use_fire_reset: press FIRE once at the start of a game that has it.
            num_threads: of the emulators; 0 takes one per environment, at most one per CPU core.
            context: None. "ram" is refused, as the vector emulator does not show its memory.

        Raises:
            ValueError: if the game is unknown, its ROM is missing, or a setting is out of range or of another type.
            ImportError: if ale_py is not installed.
        """
        try:
            import ale_py
        except ImportError as error:
            raise ImportError("Atari needs ale_py: pip install -e '.[agents]'") from error

        if context is not None:
            refuse(
                "context",
                context,
                "None, as ale_py's vector environment does not show the emulators' RAM, and a second set of emulators would not stay "
                "in step with sticky actions",
                "leave it out",
            )
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        require_integer("frame_stack", frame_stack, 1)
        require_integer("frame_skip", frame_skip, 1)
        require_integer("max_frames", max_frames, frame_skip, way_out=f"an action takes frame_skip of them; {DEFAULT}")
        require_integer("noop_max", noop_max, 0)
        require_integer("num_threads", num_threads, 0)
        for name, probability in {"sticky_actions": sticky_actions, "flicker_probability": flicker_probability}.items():
            require_number(name, probability, 0.0, 1.0)
        for name, flag in {
            "clip_rewards": clip_rewards,
            "episodic_life": episodic_life,
            "full_action_space": full_action_space,
            "use_fire_reset": use_fire_reset,
        }.items():
            require_flag(name, flag)
        seeds = environment_seeds(seed, num_envs)
        self.game = game_name(game)
        _check_rom(self.game)
        self._emulators: Any = ale_py.AtariVectorEnv(
            self.game,
            num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=max_frames,
            repeat_action_probability=sticky_actions,
            full_action_space=full_action_space,
            stack_num=frame_stack,
            frameskip=frame_skip,
            noop_max=noop_max,
            use_fire_reset=use_fire_reset,
            reward_clipping=False,  # clipped here, so that the points are known
            episodic_life=False,
        )
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.spec = EnvSpec(
            observation_shape=(frame_stack, 84, 84),
            observation_dtype=torch.uint8,
            num_actions=len(self._emulators.ale.get_action_set()),
            frames_per_step=frame_skip,
        )
        self._clip_rewards = clip_rewards
        self._episodic_life = episodic_life
        self._flicker_probability = flicker_probability
        # Another stream than the emulators' seeds, which are drawn from the same number.
        self._flicker_generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        self._black = np.zeros((num_envs, frame_stack), bool)  # frames of the observation that have flickered
        self._seeds: np.ndarray | None = np.asarray(seeds)
        self._lives = np.zeros(num_envs, np.int32)
        self._last: np.ndarray | None = None
        self._ended = np.zeros(num_envs, bool)  # the emulator resets itself in the next step

    def reset(self) -> TimeStep:
        """Starts B new games. The first call seeds the emulators, later ones continue their generators."""
        if self._emulators is None:
            raise RuntimeError("the environment is closed")
        observation, info = self._emulators.reset(seed=self._seeds)
        self._seeds = None
        self._lives = info["lives"]
        self._last, self._ended = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        starts = np.ones(self.num_envs, bool)
        return self._time_step(observation, np.zeros(self.num_envs, np.int32), starts, starts, self._last)

    def step(self, actions: Tensor) -> TimeStep:
        """Takes `actions` [B]; see `Environment.step`."""
        if self._emulators is None or self._last is None:
            raise RuntimeError("call reset before step" if self._last is None else "the environment is closed")
        # Checked first: the emulators' thread dies of an action out of range, and the caller would wait for ever.
        actions_array = checked_actions(actions, self.spec.num_actions, ignored=self._last)
        # Rows that start an episode in an old game, after a lost life, take action 0 for the one that is ignored. It is
        # a no-op in every game but backgammon and video checkers, where there is none (and no lives either).
        observation, reward, terminated, truncated, info = self._emulators.step(actions_array)
        first = self._last | self._ended
        # A game can end in the very no-op that starts an episode. That step is `first` and cannot be `last`, so the one
        # after it is `first` again, and carries the discount of the end, as under same-step autoreset.
        ended_unseen = self._ended & ~self._last
        self._ended = terminated | truncated
        if self._episodic_life:
            # At 0 lives some games (Q*bert) run on for a few frames; their end is the game's.
            lost_life = (info["lives"] < self._lives) & (info["lives"] > 0)
            terminated = terminated | lost_life
        self._lives = info["lives"]
        self._last = (terminated | truncated) & ~first
        discount = ~(terminated & self._last | ended_unseen)
        return self._time_step(observation, reward, discount, first, self._last)

    def _time_step(
        self, observation: np.ndarray, points: np.ndarray, discount: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> TimeStep:
        """Wraps the emulators' arrays, which are new ones at every step, without a copy on the CPU."""
        if self._flicker_probability:
            # A black frame stays black for as long as it is in the stack.
            now_black = self._flicker_generator.random(self.num_envs) < self._flicker_probability
            self._black = np.concatenate([self._black[:, 1:], now_black[:, None]], axis=1)  # [B, frame_stack]
            observation[self._black] = 0
        raw_reward = torch.tensor(points, dtype=torch.float32, device=self.device)
        is_first = torch.tensor(first, device=self.device)
        reward = raw_reward.clamp(-1.0, 1.0) if self._clip_rewards else raw_reward
        return TimeStep(
            observation=torch.from_numpy(observation).to(self.device),
            reward=reward.masked_fill(is_first, 0.0),  # of the no-op after a lost life; points stay in raw_reward
            discount=torch.tensor(discount, dtype=torch.float32, device=self.device),
            first=is_first,
            last=torch.tensor(last, device=self.device),
            raw_reward=raw_reward if self._clip_rewards or self._episodic_life else None,
            game_over=torch.tensor(self._ended, device=self.device) if self._episodic_life else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Refused."""
        raise RuntimeError(
            "the state of the Atari emulators cannot be saved: ale_py's vector environment has no access to it"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refused."""
        raise RuntimeError(
            "the state of the Atari emulators cannot be restored: ale_py's vector environment has no access to it"
        )

    def close(self) -> None:
        """Stops the emulators' threads."""
        self._emulators = None


def game_name(game: str) -> str:
    """Snake-case name of a game given as "ALE/MsPacman-v5", "MsPacman" or "ms_pacman".

    Raises:
        ValueError: if there is no such game; names the nearest.
    """

    def plain(name: str) -> str:
        return name.removeprefix("ALE/").removesuffix("-v5").replace("_", "").lower()

    games = _games()
    by_plain_name = {plain(name): (name, id_) for id_, name in games.items()}
    if plain(game) in by_plain_name:
        return by_plain_name[plain(game)][0]
    nearest = difflib.get_close_matches(plain(game), by_plain_name, n=1, cutoff=0.0)
    raise ValueError(f"unknown Atari game {game!r}; the nearest is {by_plain_name[nearest[0]][1]!r}")


def _games() -> dict[str, str]:
    """Names of all playable games by id.

    Taken from the registry: a few titles for two players are listed among the ROMs too, and loading one of those ends
    the whole process.
    """
    import ale_py  # noqa: F401  # registers the ids
    import gymnasium

    return {
        id_: spec.kwargs["game"]
        for id_, spec in gymnasium.registry.items()
        if id_.startswith("ALE/") and id_.endswith("-v5")
    }


def _check_rom(game: str) -> None:
    """Raises ValueError where the ROM is not on disk."""
    from ale_py import roms

    try:
        found = roms.get_rom_path(game) is not None
    except OSError:  # not there, or not the ROM that is expected
        found = False
    if not found:
        raise ValueError(f"the ROM of {game!r} is missing or damaged; reinstall ale_py or correct ALE_ROMS_DIR")
