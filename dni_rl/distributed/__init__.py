"""Learning in several processes at once: without backward locking, see `processes`, `pipeline` and `levels`; side by side on parts of
a batch, see `data_parallel`."""

from dni_rl.distributed.data_parallel import average_gradients, synchronize
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
    "average_gradients",
    "connect",
    "fail",
    "launch",
    "synchronize",
    "train_levels",
    "train_pipeline",
]
