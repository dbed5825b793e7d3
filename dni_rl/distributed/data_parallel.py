"""Data-parallel training: every process learns from sequences of its own, and all take the step of one that learned from all of them.

    import dni_rl.distributed                                       # `import dni_rl` alone does not bring it

    torch.distributed.init_process_group()                          # started by torchrun
    dni_rl.distributed.synchronize(model, critic)                   # once, before the first update
    for inputs, first, alive, batch in my_part_of_the_data:
        start = dni_rl.cut(state)
        outputs, state = core.unroll(inputs, start, first)
        losses = my_losses(outputs, batch)                          # [T, B]
        dni_rl.backward(losses, start=start, end=state, critic=critic, alive=alive)
        dni_rl.distributed.average_gradients(model, critic)         # then clip and step both sides, as in one process
        optimizer.step(), critic_optimizer.step()
        optimizer.zero_grad(), critic_optimizer.zero_grad()

Gradients of both sides, the running RMS of a critic's targets, the moments of a loss critic and the yardstick of the bound are then
those of one process with the joined batch.

`DistributedDataParallel` averages the gradients of what runs inside the wrapped module's `forward`, and `core.unroll` is not
forward. To wrap the model, unroll inside of it, and call the wrapper:

    class Model(nn.Module):
        def forward(self, inputs, state, first, batch):
            outputs, next_state = self.core.unroll(inputs, state, first)
            return self.losses(outputs, batch), next_state

    parallel = DistributedDataParallel(model)
    losses, end = parallel(inputs, start, first, batch)             # `dni_rl.backward` as before
    dni_rl.distributed.average_gradients(critic)                    # the critic is never wrapped: it learns in no forward pass

An auxiliary task is a part of the model, and may be wrapped with it; pass it, or the wrapper, to `synchronize`.

With a gradient scaler, average before `scaler.step`: an overflow in one process is then skipped by all of them.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dni_rl.auxiliary import AuxiliaryTask
from dni_rl.critics import ErrorCritic


class _Mean:
    """The mean of a tensor over the processes of a group. A copied module goes on to share with them."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group

    def __call__(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values / dist.get_world_size(self.group)

    def __deepcopy__(self, memo: dict) -> "_Mean":
        return self  # a process group cannot be copied


@torch.no_grad()
def synchronize(*modules: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Makes all processes start alike, and critics inside of `modules` take their running statistics over all processes.

    Parameters, buffers and the critics' counters become those of the group's first process. Call it once, with models and critics,
    after files have been loaded and before the first update. From then on every process must call `dni_rl.backward` equally
    often, with the same `fit`, since each call waits for the others.

    A critic weighs every valid row of all processes alike, as one process would. What `dni_rl.backward` reports is about the rows of
    its own process, and the mean of `critic_loss` over processes is that of all rows.

    Args:
        modules: models, critics, auxiliary tasks; the same ones in the same order everywhere.
        group: of processes; None for all.

    Raises:
        RuntimeError: if this process belongs to no group.
        ValueError: if a module is wrapped in DistributedDataParallel and has a critic inside.
    """
    _require_group(group)
    first = 0 if group is None else dist.get_global_rank(group, 0)
    for module in modules:
        inside = [type(part).__name__ for part in _sharing(module) if isinstance(part, ErrorCritic)]
        if isinstance(module, nn.parallel.DistributedDataParallel) and inside:
            raise ValueError(
                f"modules: found {inside[0]} inside of DistributedDataParallel, which waits for gradients of forward passes that a critic "
                "never makes; keep the critic out of the wrapped module and call average_gradients(critic)"
            )
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), first, group=group)
        for part in _sharing(module):
            part.share_statistics(_Mean(group))
            if isinstance(part, ErrorCritic):
                # Otherwise one process might look at the yardstick of the bound, and wait, when the others do not.
                counts = [part.get_extra_state()]
                dist.broadcast_object_list(counts, first, group=group)
                part.set_extra_state(counts[0])


@torch.no_grad()
def average_gradients(*modules: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replaces `.grad` of all parameters by its mean over the processes.

    `dni_rl.backward` weighs losses by 1 / (T B) of its own batch, whose mean over processes with equally large batches is the mean
    over the joined one. With batches of different sizes say `weight=num_processes / (T * B_of_all)`; critics need nothing.

    A parameter without gradient here counts as zero where another process has one, and keeps none where nobody has.

    Args:
        modules: the same ones in the same order in all processes; what DistributedDataParallel wraps is averaged by it.
        group: of processes; None for all.

    Raises:
        RuntimeError: if this process belongs to no group.
        ValueError: if a module is wrapped in DistributedDataParallel, or a gradient is sparse.
    """
    _require_group(group)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        raise ValueError(
            "modules: found DistributedDataParallel, which averages its gradients itself; leave it out and pass the critic alone"
        )
    buckets: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad):
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ValueError(
                f"modules: found a gradient of layout {parameter.grad.layout}, allowed torch.strided; use sparse=False"
            )
        buckets.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for parameters in buckets.values():
        _average(parameters, group)


def _average(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Averages gradients of one device and type in one message; who has which of them travels along."""
    missing = [p.grad is None for p in parameters]
    sizes = [p.numel() for p in parameters]
    message = torch.cat(
        [
            *(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters),
            torch.tensor([not m for m in missing], dtype=parameters[0].dtype).to(
                parameters[0].device, non_blocking=True
            ),
        ]
    )
    means = _Mean(group)(message)
    # Waits for the device, but only where a parameter had no gradient.
    present = means[sum(sizes) :].tolist() if any(missing) else [1.0] * len(parameters)
    for parameter, mean, found in zip(parameters, means.split([*sizes, len(sizes)]), present, strict=False):
        if parameter.grad is not None:
            parameter.grad.copy_(mean.view_as(parameter))
        elif found > 0:
            parameter.grad = mean.view_as(parameter).clone()


def _sharing(module: nn.Module) -> Iterable[ErrorCritic | AuxiliaryTask]:
    return (part for part in module.modules() if isinstance(part, ErrorCritic | AuxiliaryTask))


def _require_group(group: dist.ProcessGroup | None) -> None:
    if not (dist.is_available() and dist.is_initialized()) or group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(
            "torch.distributed: this process belongs to no group; start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
