"""Processes that train one model together: how they start, find each other, exchange tagged messages, and end.

A program either is started by `torchrun`, or starts its processes itself with `launch`, which needs no more than this
machine's loopback. Inside each, `connect` gives the `Processes`, over which neighbours (ranks that differ by 1) send
each other tensors without ever waiting for one another: a thread for each direction of each pair moves them, so a
sender goes on at once, and whatever arrives, from whomever, waits in one mailbox. Layers
(`dni_rl.distributed.train_pipeline`) and levels (`dni_rl.distributed.train_levels`) are built on this.

torchrun --nproc-per-node 4 my_program.py          # or, in a program: launch(member, 4)

def member():
    with connect() as processes:
        ...

Whatever goes wrong in one process ends all: its neighbours notice that it has gone, and tell why.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dni_rl.distributed.rendezvous import meet

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_HEADER_SIZE = 64
_CLOSE = -1  # the kind of the last message of a connection
_FAILURE = "dni_rl/failure"  # where in the store the first process that fails says why


class ProcessError(RuntimeError):
    """Something ended processes that train together; the message is one line."""


class LostProcessError(ProcessError):
    """A neighbour has gone, or is silent; the cause lies there."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a neighbour has sent.

    Attributes:
        sender: its rank.
        kind: a number of 0 or more that sender and receiver agree on.
        tag: which batch or step it belongs to.
        tensors: on this process's device, without gradient; None where the sender put None.
    """

    sender: int
    kind: int
    tag: int
    tensors: tuple[Tensor | None, ...]


class Processes:
    """This process among those that train together; from `connect`.

    Attributes:
        rank: 0 up to world_size - 1.
        world_size: how many there are.
        device: where this process computes and receives tensors.
        timeout_sec: how long to wait for a message before all is given up.
    """

    def __init__(
        self, rank: int, world_size: int, device: torch.device, timeout_sec: float, store: dist.Store, direct: bool
    ):
        self.rank, self.world_size, self.device, self.timeout_sec = rank, world_size, device, timeout_sec
        self._store = store
        self._direct = direct  # whether tensors go from GPU to GPU; gloo carries them through the host's memory
        self._mailbox: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._outboxes: dict[int, queue.SimpleQueue[Any]] = {}
        self._threads: list[threading.Thread] = []
        for lower in range(world_size - 1):
            for source, target in ((lower, lower + 1), (lower + 1, lower)):
                # Every process has to take part in making every group. A group for each direction: within one, NCCL would
                # make a message wait for one that goes the other way.
                group = dist.new_group([lower, lower + 1], timeout=timedelta(seconds=timeout_sec))
                if rank == source:
                    self._outboxes[target] = queue.SimpleQueue()
                    self._start(self._deliver, target, group)
                elif rank == target:
                    self._start(self._collect, source, group)

    def send(self, to: int, kind: int, tag: int, *tensors: Tensor | None) -> None:
        """Sends tensors to a neighbour, and returns at once; they must not be modified in place afterwards.

        Args:
            to: rank of a neighbour.
            kind: 0 or more.
            tag: of the batch or step.
            tensors: of any shape, on this process's device; None goes through as None.

        Raises:
            ValueError: if the rank is no neighbour's, or the tensors are of a type that is not sent, or too many.
        """
        if to not in self._outboxes:
            raise ValueError(
                f"to: found {to}, allowed the neighbours of {self.rank}: {', '.join(map(str, self._outboxes))}"
            )
        header = _header(kind, tag, tensors)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        self._outboxes[to].put((header, tuple(t.detach() for t in tensors if t is not None and t.numel()), ready))

    def receive(self, *, wait: bool = True) -> Message | None:
        """The next message, in the order of arrival; messages of one sender arrive in the order in which they were sent.

        Args:
            wait: for one to arrive; otherwise None if there is none.

        Raises:
            LostProcessError: if a neighbour has gone, or none said anything for `timeout_sec`.
        """
        try:
            message = self._mailbox.get(wait, self.timeout_sec)
        except queue.Empty:
            if not wait:
                return None
            raise LostProcessError(
                f"process {self.rank}: heard nothing from its neighbours for {self.timeout_sec:g} s; one of them hangs, or works longer "
                "on a batch: then raise timeout_sec"
            ) from None
        if isinstance(message, Exception):
            raise message
        return message

    def gather(self, value: Any) -> list[Any] | None:
        """Collects a picklable value of every process, for rank 0; None elsewhere. Waits for all."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        try:
            dist.gather_object(value, gathered)
            dist.barrier()
        except RuntimeError as error:
            raise self._lost("a process") from error
        return gathered

    def barrier(self) -> None:
        """Waits until every process is here."""
        try:
            dist.barrier()
        except RuntimeError as error:
            raise self._lost("a process") from error

    def _start(self, function: Callable[[int, Any], None], peer: int, group: Any) -> None:
        # A daemon: after an error the process ends without waiting for a message that never comes.
        thread = threading.Thread(target=self._guarded, args=(function, peer, group), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _guarded(self, function: Callable[[int, Any], None], peer: int, group: Any) -> None:
        try:
            with self._own_stream():
                function(peer, group)
        except RuntimeError:
            self._mailbox.put(self._lost(f"process {peer}"))

    def _own_stream(self) -> AbstractContextManager[Any]:
        if self.device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self.device)  # per thread
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def _deliver(self, peer: int, group: Any) -> None:
        """The thread that sends to one neighbour."""
        while (item := self._outboxes[peer].get()) is not None:
            header, tensors, ready = item
            if ready is not None:
                torch.cuda.current_stream().wait_event(ready)
            dist.send(header, peer, group=group)
            for t in tensors:
                dist.send((t if self._direct else t.cpu()).contiguous(), peer, group=group)
            if ready is not None:
                torch.cuda.current_stream().synchronize()  # this thread alone waits; then the memory may be used again
        dist.send(_header(_CLOSE, 0, ()), peer, group=group)

    def _collect(self, peer: int, group: Any) -> None:
        """The thread that receives from one neighbour."""
        main_stream = torch.cuda.default_stream(self.device) if self.device.type == "cuda" else None
        while True:
            header = torch.empty(_HEADER_SIZE, dtype=torch.int64, device="cpu")
            dist.recv(header, peer, group=group)
            kind, tag, shapes = _read_header(header)
            if kind == _CLOSE:
                return
            tensors: list[Tensor | None] = []
            for shape_and_dtype in shapes:
                if shape_and_dtype is None:
                    tensors.append(None)
                    continue
                shape, dtype = shape_and_dtype
                tensor = torch.empty(shape, dtype=dtype, device=self.device if self._direct else "cpu")
                if tensor.numel():
                    dist.recv(tensor, peer, group=group)
                tensor = tensor.to(self.device)
                if main_stream is not None:
                    tensor.record_stream(main_stream)
                tensors.append(tensor)
            if main_stream is not None:
                torch.cuda.current_stream().synchronize()
            self._mailbox.put(Message(peer, kind, tag, tuple(tensors)))

    def _lost(self, whom: str) -> LostProcessError:
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            if self._store.check([_FAILURE]):
                return LostProcessError(f"process {self.rank}: stopped because of {self._store.get(_FAILURE).decode()}")
        return LostProcessError(
            f"process {self.rank}: lost the connection to {whom}, or waited {self.timeout_sec:g} s; see what that one said"
        )

    def _close(self) -> None:
        for outbox in self._outboxes.values():
            outbox.put(None)
        deadline = time.monotonic() + self.timeout_sec
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise LostProcessError(f"process {self.rank}: a neighbour did not end within {self.timeout_sec:g} s")
        self.barrier()


@contextmanager
def connect(device: str = "cpu", *, timeout_sec: float = 300.0) -> Iterator[Processes]:
    """Joins the processes that `torchrun` or `launch` has started; a context manager around all they do together.

    On the CPU messages travel by gloo. With device "cuda" and a GPU for each process of this machine they travel by
    NCCL, from GPU to GPU; with fewer GPUs processes share them, and gloo carries messages through the host's memory,
    since NCCL refuses two processes on one GPU.

    On leaving, every process waits until all are done. After an exception none waits: the others learn of it and end
    as well. Then end the process, by letting the exception pass or by `fail`; its exit status is 1 in any case.

    Args:
        device: "cpu" or "cuda".
        timeout_sec: how long to wait for another process before all is given up.

    Yields:
        The processes.

    Raises:
        ValueError: if the process was started by neither, or the device is neither "cpu" nor an available "cuda".
        LostProcessError: if another process ends early.
    """
    allowed = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in allowed:
        raise ValueError(f"device: found {device!r}, allowed {allowed} here")
    if not timeout_sec > 0:
        raise ValueError(f"timeout_sec: found {timeout_sec}, allowed above 0")
    try:
        meeting = meet(torch.device(device), timedelta(seconds=timeout_sec))
        rank, store = meeting.rank, meeting.store
        processes = Processes(rank, meeting.world_size, meeting.device, timeout_sec, store, meeting.direct)
    except RuntimeError as error:
        raise LostProcessError(f"process {os.environ['RANK']}: could not meet the others: {_line(error)}") from error
    try:
        yield processes
        processes._close()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):
            line = _line(error) if isinstance(error, ProcessError) else f"process {rank}: {_line(error)}"
            store.compare_set(_FAILURE, "", line)
        # Threads still wait for messages inside of gloo, which aborts with noise of its own where Python ends in the usual way.
        atexit.register(_end_at_once)
        raise
    dist.destroy_process_group()


def launch(
    function: Callable[..., Any],
    num_processes: int,
    *arguments: Any,
    timeout_sec: float = 3600.0,
    threads_per_process: int = 1,
) -> Any:
    """Starts processes on this machine, as `torchrun` does, that each call `function(*arguments)` and may `connect`; waits for their end.

    They see each other through the loopback interface alone. If one fails, or time is up, all are ended.

    Args:
        function: importable by its name, as are the types of its arguments and its result (`multiprocessing`, method
            spawn).
        num_processes: at least 1.
        arguments: passed to every one.
        timeout_sec: for all of it.
        threads_per_process: PyTorch's threads on the CPU.

    Returns:
        What the function returned in rank 0.

    Raises:
        ProcessError: if a process failed; the line is that of the one that failed first.
        ValueError: if the number of processes is not positive.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes: found {num_processes}, allowed 1 or more")
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    # The store lives here, as in torchrun's agent: no port that another program could take meanwhile, and it outlives those that fail.
    store = dist.TCPStore(
        "127.0.0.1", port, None, True, timedelta(seconds=60), False, master_listen_fd=listener.detach()
    )
    context = multiprocessing.get_context("spawn")
    members: dict[multiprocessing.connection.Connection, tuple[int, Any]] = {}
    try:
        for rank in range(num_processes):
            ours, theirs = context.Pipe(duplex=False)
            member = context.Process(
                target=_member,
                args=(function, arguments, rank, num_processes, port, threads_per_process, theirs),
                daemon=True,
            )
            member.start()
            theirs.close()
            members[ours] = (rank, member)
        return _result(members, time.monotonic() + timeout_sec, timeout_sec)
    finally:
        for _, member in members.values():
            if member.is_alive():
                member.kill()
            member.join()
        for ours in members:
            ours.close()
        del store


def fail(line: str) -> None:
    """Ends this process at once with one line on the standard error and exit status 1, whatever its threads wait for."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _end_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _end_with_parent() -> None:
    """A killed parent ends none of those that it has started."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _member(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    connection: multiprocessing.connection.Connection,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is there already, none of us serves it
    )
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = function(*arguments)
        connection.send_bytes(pickle.dumps((None, result if rank == 0 else None)))
    except BaseException as error:
        line = _line(error) if isinstance(error, ProcessError) else f"process {rank}: {_line(error)}"
        connection.send_bytes(pickle.dumps(("lost" if isinstance(error, LostProcessError) else "failed", line)))
        sys.stdout.flush()
        os._exit(1)


def _result(
    members: dict[multiprocessing.connection.Connection, tuple[int, Any]], deadline: float, timeout_sec: float
) -> Any:
    """Waits for all; after a failure a little longer for the others, since the first to be noticed need not be the first to fail."""
    pending, failures, result = dict(members), list[tuple[str, str]](), None
    while pending:
        ready = multiprocessing.connection.wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            if failures:
                break
            ranks = ", ".join(str(rank) for rank, _ in pending.values())
            raise ProcessError(f"launch: processes {ranks} did not end within {timeout_sec:g} s and were killed")
        for connection in ready:
            assert isinstance(connection, multiprocessing.connection.Connection)
            rank, member = pending.pop(connection)
            try:
                failure, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                member.join(1.0)
                failure, value = "failed", f"process {rank}: ended with exit code {member.exitcode}"
            if failure is not None:
                failures.append((failure, value))
                deadline = min(deadline, time.monotonic() + 3.0)
            elif rank == 0:
                result = value
    if failures:
        raise ProcessError(next((line for kind, line in failures if kind == "failed"), failures[0][1]))
    return result


def _line(error: BaseException) -> str:
    """One line; for an error that was not foreseen with its type and place."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (ProcessError, ValueError)) and first:
        return first
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first}{place}" if first else f"{type(error).__name__}{place}"


def _header(kind: int, tag: int, tensors: Sequence[Tensor | None]) -> Tensor:
    """[64] int64: kind, tag, number of tensors, and for each its type, its number of dimensions and its shape."""
    numbers = [kind, tag, len(tensors)]
    for t in tensors:
        if t is not None and t.dtype not in _DTYPES:
            raise ValueError(
                f"tensors: found {t.dtype}, allowed {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
            )
        numbers += [-1] if t is None else [_DTYPES.index(t.dtype), t.dim(), *t.shape]
    if len(numbers) > _HEADER_SIZE:
        raise ValueError(
            f"tensors: found {len(tensors)} whose shapes take {len(numbers)} numbers, allowed {_HEADER_SIZE}"
        )
    return torch.tensor(numbers + [0] * (_HEADER_SIZE - len(numbers)), device="cpu")


def _read_header(header: Tensor) -> tuple[int, int, list[tuple[list[int], torch.dtype] | None]]:
    kind, tag, count, *numbers = header.tolist()
    shapes: list[tuple[list[int], torch.dtype] | None] = []
    for _ in range(count):
        dtype = numbers.pop(0)
        if dtype < 0:
            shapes.append(None)
            continue
        dims = numbers.pop(0)
        shapes.append((numbers[:dims], _DTYPES[dtype]))
        del numbers[:dims]
    return kind, tag, shapes
