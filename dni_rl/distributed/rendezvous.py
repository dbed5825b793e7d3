"""How processes that `torchrun` or `launch` has started find each other: one place for all who join them."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where this process stands among those that have met.

    Attributes:
        rank: 0 up to world_size - 1.
        world_size: how many there are.
        device: where this process computes.
        direct: whether tensors of that device travel by NCCL, from GPU to GPU; otherwise gloo carries all.
        store: what all of them share in this attempt.
    """

    rank: int
    world_size: int
    device: torch.device
    direct: bool
    store: dist.Store


def meet(device: torch.device, timeout: timedelta) -> Meeting:
    """Makes the group of all processes, the default of `torch.distributed`. Waits for all of them.

    Messages travel by gloo, of GPUs by NCCL where each process of the machine has one to itself, since NCCL refuses two processes on one
    GPU. Processes of one machine talk through its loopback.

    Args:
        device: wanted by this process; see `device_of_process`.
        timeout: of this call, and of whatever the group does later.

    Raises:
        ValueError: if a variable of the environment is missing, since neither has started this process.
        RuntimeError: if the others are not there in time.
    """
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(
            f"connect: {', '.join(missing)} not set in the environment; start the program with torchrun, or use "
            "dni_rl.distributed.launch"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if _are_all_here():
        # Otherwise gloo listens where the host's name points to, which may be the network.
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        if loopback is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    own, backend = device_of_process(device), "gloo"
    if own != device:  # one GPU among those of this machine
        torch.cuda.set_device(own)
        if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
            backend = "cpu:gloo,cuda:nccl"  # what is on the host stays there
    # Its functions have the group of all processes as a default, which they would keep alive, and the threads of gloo with it, if it
    # were imported later, as optimisers do. Threads that outlive the interpreter abort the program.
    import_module("torch.distributed.nn.functional")
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    # torchrun's store outlives an attempt, and with it the addresses of those who have died.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Meeting(rank, world_size, own, backend != "gloo", store)


def device_of_process(wanted: torch.device) -> torch.device:
    """Where this process computes: of "cuda" without an index, the GPUs of the machine by turns; otherwise what is wanted."""
    if wanted.type != "cuda" or wanted.index is not None or not torch.cuda.device_count():
        return wanted
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _are_all_here() -> bool:
    """Whether all processes run on this machine.

    The number that the launcher has started here says so, wherever the store is: its address may be the name of this machine, and one
    of several machines may call itself localhost. Who sets the variables by hand may leave that number out; then a store on the
    loopback tells, which nobody else could reach.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if here is None:
        return os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1")
    return here == os.environ["WORLD_SIZE"]
