"""Learning in several processes at once, without backward locking; see `processes`, `pipeline` and `levels`."""

from dni_rl.distributed.levels import Level, LevelReport, Step, train_levels
from dni_rl.distributed.pipeline import Batch, Stage, StageReport, train_pipeline
from dni_rl.distributed.processes import LostProcessError, Message, ProcessError, Processes, connect, fail, launch

__all__ = [
    "Batch",
    "Level",
    "LevelReport",
    "LostProcessError",
    "Message",
    "ProcessError",
    "Processes",
    "Stage",
    "StageReport",
    "Step",
    "connect",
    "fail",
    "launch",
    "train_levels",
    "train_pipeline",
]
