"""Training in several processes: which of them this one is, and what they do together.

    torchrun --standalone --nproc-per-node 2 scripts/train.py --config configs/tmaze.yaml

Every process acts in environments of its own. Gradients of model and error critics are averaged, and the critics' statistics shared
(`dni_rl.distributed`), so that all take the steps of one process that had learned from the rollouts of all. What is decided on the
way (to stop, to end the passes over a rollout, that a number is not finite) is decided together: otherwise one process would wait
for another that has left. The first process alone writes.

`ALONE` is a process without others. With it, everything here is what it would be without this module, bit for bit.
"""

import io
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agents.build import spread_seeds
from dni_rl.distributed import average_gradients, synchronize
from dni_rl.distributed.rendezvous import device_of_process, meet

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=10)  # for a process that hangs; one that has died is noticed at once
_SPEAKER = "agents/speaker"  # where in the store the first process that fails leaves its rank


class LostWorkerError(RuntimeError):
    """Another process of the run has gone; the cause lies there."""


class Workers:
    """The processes of a run, as one of them sees them. Every method that says so waits for all: all must call it, in the same order.

    Attributes:
        rank: 0 up to count - 1.
        count: how many processes there are.
        launch: what torchrun calls this run, or None if torchrun did not start it.
        restarted: whether torchrun has started all processes anew, after one had failed.
        speaks: after an error, whether it is this process that tells of it.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, launch: str | None = None, restarted: bool = False):
        self.rank, self.count = rank, count
        self.launch, self.restarted = launch, restarted
        self.speaks = True

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, wanted: torch.device) -> torch.device:
        """Where this process computes: of "cuda" without an index, the GPUs of the machine by turns."""
        return wanted if self.count == 1 else device_of_process(wanted)

    def spread_seeds(self, seed: int, count: int, *, step: int = 0) -> list[int]:
        """As `agents.build.spread_seeds`, and independent of those of the other processes. The first has those of a single one.

        Args:
            seed: of the run.
            count: how many.
            step: at which the run was resumed, for what must not begin again as it did; 0 for all else.
        """
        key = () if self.is_first else (self.rank,)
        return spread_seeds(seed, count, key=(self.rank, step) if step else key)

    def synchronize(self, *modules: nn.Module) -> None:
        """Makes all processes start alike and share statistics; see `dni_rl.distributed.synchronize`. Waits for all."""
        if self.count > 1:
            synchronize(*modules)

    def average_gradients(self, *modules: nn.Module) -> None:
        """Replaces `.grad` by its mean over processes; see `dni_rl.distributed.average_gradients`. Waits for all."""
        if self.count > 1:
            average_gradients(*modules)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over processes. Waits for all."""
        if self.count == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def mean(self, value: Tensor, valid: Tensor) -> Tensor:
        """The mean over the valid entries of all processes of something of which `value` is that of this one. Waits for all."""
        if self.count == 1:
            return value
        weight = valid.sum().to(value.dtype)
        total, weights = self.total(torch.stack([value * weight, weight]))
        return total / weights

    def means(self, metrics: Mapping[str, Any], weight: str | None = None) -> dict[str, Any]:
        """Means of scalars over processes. Waits for all.

        Args:
            metrics: numbers or tensors of one element, of the same names everywhere.
            weight: the one of them that says how much those of this process count, itself to be summed; None for all alike.

        Returns:
            As `metrics`, NaN where nobody had anything that counts.
        """
        if self.count == 1:
            return dict(metrics)
        values = torch.stack([torch.as_tensor(value).detach().double() for value in metrics.values()]).cpu()
        # NaN says that there was nothing to measure, as a cosine of no target
        counts = (~values.isnan()).double() if weight is None else values[list(metrics).index(weight)].expand_as(values)
        sums = self.total(torch.stack([torch.where(counts > 0, values * counts, 0.0), counts]))
        results: dict[str, Any] = dict(zip(metrics, sums[0] / sums[1], strict=True))
        return results if weight is None else results | {weight: sums[1, 0]}

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set anywhere. Waits for all, but for no GPU."""
        if self.count == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.float32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [value > 0 for value in found.tolist()]

    def all(self, value: T) -> list[T]:
        """A picklable value of every process, by rank. Waits for all."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def others(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """For the first process, what the others gave, by rank and with tensors on the CPU; [] for them. Waits for all."""
        if self.count == 1:
            return []
        buffer = io.BytesIO()
        if not self.is_first:
            torch.save(state, buffer)
        found: list[Any] | None = [None] * self.count if self.is_first else None
        dist.gather_object(buffer.getvalue(), found)
        # Another process's GPU is none of ours.
        return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=True) for one in (found or [])[1:]]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all. Waits for it."""
        if self.count == 1:
            return make()
        value = [make() if self.is_first else None]
        dist.broadcast_object_list(value, 0)
        return value[0]  # type: ignore[return-value]


ALONE = Workers()


class SilentWriter:
    """In place of a `MetricsWriter` in all processes but the first."""

    has_tensorboard = False

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def write_figure(self, step: int, name: str, figure: Any) -> None:
        """Nothing."""

    def write_histogram(self, step: int, name: str, weights: Tensor) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def __enter__(self) -> "SilentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one; known before they meet."""
    return not _is_started_by_torchrun() or int(os.environ["RANK"]) == 0


@contextmanager
def connect(device: str = "cpu") -> Iterator[Workers]:
    """Joins the processes that torchrun has started; a context manager around all they do together. Without torchrun, or in one process
    of it, there is nothing to join.

    Messages travel by gloo; gradients on GPUs by NCCL where each process of the machine has a GPU to itself. Processes of one machine
    talk through its loopback.

    On leaving, every process waits until all are done. After an error none waits, and the others end with `LostWorkerError`; the
    first one to fail is the one that `speaks`.

    Args:
        device: `run.device`.

    Yields:
        The processes.

    Raises:
        ValueError: if a variable of torchrun is missing.
        LostWorkerError: if another process ends early.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    restarted = launch is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not _is_started_by_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Workers(launch=launch, restarted=restarted)
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    workers = Workers(rank, count, launch=launch, restarted=restarted)
    store: dist.Store | None = None
    try:
        store = meet(torch.device(device), _TIMEOUT).store
        yield workers
        workers.any()
    except BaseException as error:
        if store is not None:
            with suppress(RuntimeError):  # the store may be gone as well
                workers.speaks = store.compare_set(_SPEAKER, "", str(rank)) == str(rank).encode()
        if isinstance(error, RuntimeError) and _is_from_torch_distributed(error):
            raise LostWorkerError(
                f"process {rank}: lost the connection to another one, or waited {_TIMEOUT.seconds} s for it; see what that one said"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _is_from_torch_distributed(error: BaseException) -> bool:
    """Whether it was raised inside of PyTorch's communication, as backends know no exceptions of their own."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(os.path.dirname(dist.__file__))
