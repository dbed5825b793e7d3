"""Memory gridworlds whose whole batch is a handful of tensors: small tasks in which one early observation decides late.

Each is an `envs.timestep.Environment` with privileged `context`, saves its state exactly and knows a `reference_policy`
that solves it. `envs.exports` offers them to gymnasium and dm_env.

    PassiveTMaze      the cue is shown at once, the decision comes N steps later: long memory, short credit assignment
    ActiveTMaze       the cue must be fetched first: long memory and long credit assignment
    KeyToDoor         a key taken in the first room pays in the third one: long credit assignment, memory with two doors
    RepeatFirst       the first of many symbols is asked for again and again: long memory, short credit assignment
    RepeatPrevious    every symbol is asked for a few symbols later: memory of many things in order
    MatchToSample     a colour is seen, a wait follows, the colour is chosen: long memory; if hidden, long credit, too
    MemoryCorridor    a cue, a corridor seen 3 x 3 cells at a time, a choice: long memory; if to be fetched, long credit
    MultiRoomKeyDoor  a key of the first of many rooms opens one of two doors in the last: long memory and long credit
"""

from envs.gridworlds.batched import BatchedGridworld
from envs.gridworlds.key_to_door import KeyToDoor
from envs.gridworlds.match_to_sample import MatchToSample
from envs.gridworlds.memory_corridor import MemoryCorridor
from envs.gridworlds.multi_room import MultiRoomKeyDoor
from envs.gridworlds.repeat import RepeatFirst, RepeatPrevious
from envs.gridworlds.t_maze import ActiveTMaze, PassiveTMaze

__all__ = [
    "ActiveTMaze",
    "BatchedGridworld",
    "KeyToDoor",
    "MatchToSample",
    "MemoryCorridor",
    "MultiRoomKeyDoor",
    "PassiveTMaze",
    "RepeatFirst",
    "RepeatPrevious",
]
