"""What tests of cores and `backward` share: every exported core, and references as slow as their definitions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import dni_rl
from dni_rl.cores import Core, State

D, H = 3, 4
DOUBLE = torch.float64


class LeakyCell(nn.Module):
    """A user's module: two state tensors of different widths, and an output of a third that is none of them."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow, self.readout = nn.Linear(D + 6, 4), nn.Linear(4, 2), nn.Linear(6, 5)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        fast, slow = state
        fast = torch.tanh(self.fast(torch.cat([x, fast, slow], -1)))
        slow = 0.8 * slow + self.slow(fast)
        return self.readout(torch.cat([fast, slow], -1)), (fast, slow)


class LinearRNN(nn.Module):
    """s_{t+1} = A s_t + W x_t, which is its output too: gradients of the future are powers of A."""

    def __init__(self, size: int = H):
        super().__init__()
        self.A = nn.Parameter(0.7 * torch.randn(size, size) / size**0.5)
        self.W = nn.Parameter(torch.randn(size, D))


def linear_step(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    assert isinstance(cell, LinearRNN)
    s = state[0] @ cell.A.T + x @ cell.W.T
    return s, (s,)


def linear_core(size: int = H) -> Core:
    return dni_rl.CellCore(LinearRNN(size), state_sizes=(size,), input_size=D, output_size=size, step=linear_step)


def watched(core: Core) -> Core:
    """With the memory of a critic, which is the same one every time: no file of the core holds it."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        critic = dni_rl.RecurrentGradientCritic(state_sizes=core.state_sizes, memory_size=2)
    return critic.double().watch(core)


CORES: dict[str, Callable[[], Core]] = {
    "LSTM": lambda: dni_rl.LSTM(D, H),
    "LSTM, 2 layers": lambda: dni_rl.LSTM(D, H, 2),
    "LSTM, chrono": lambda: dni_rl.LSTM(D, H, chrono_max=20.0),
    "GRU": lambda: dni_rl.GRU(D, H),
    "GRU, 2 layers, chrono": lambda: dni_rl.GRU(D, H, 2, chrono_max=20.0),
    "nn.LSTM, 2 layers": lambda: dni_rl.wrap(nn.LSTM(D, H, 2)),
    "nn.LSTM, no bias": lambda: dni_rl.wrap(nn.LSTM(D, H, bias=False)),
    "nn.GRU, 2 layers": lambda: dni_rl.wrap(nn.GRU(D, H, 2)),
    "nn.LSTMCell": lambda: dni_rl.wrap(nn.LSTMCell(D, H)),
    "nn.GRUCell": lambda: dni_rl.wrap(nn.GRUCell(D, H, bias=False)),
    "a user's module": lambda: dni_rl.wrap(LeakyCell(), state_sizes=(4, 2), input_size=D, output_size=5),
    "linear, own step": linear_core,
    "element-wise LSTM": lambda: dni_rl.ElementwiseLSTM(D, H),
    "2 timescales": lambda: dni_rl.MultiTimescaleCore(D, (H, 2), (1, 2)),
    "3 timescales, mean": lambda: dni_rl.MultiTimescaleCore(D, (H, 2, 3), (1, 2, 4), message="mean"),
    "LSTM with a critic's memory": lambda: watched(dni_rl.LSTM(D, H)),
}


def make_core(name: str, dtype: torch.dtype = DOUBLE) -> Core:
    torch.manual_seed(0)
    return CORES[name]().to(dtype)


def random_state(core: Core, batch_size: int, dtype: torch.dtype = DOUBLE) -> State:
    return tuple(torch.randn(batch_size, size, dtype=dtype) for size in core.state_sizes)


def resets(T: int, *starts: tuple[int, int]) -> Tensor:
    """[T, 3] bool, True at the given (step, sequence) pairs."""
    first = torch.zeros(T, 3, dtype=torch.bool)
    for t, sequence in starts:
        first[t, sequence] = True
    return first


def naive_unroll(core: Core, inputs: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, State]:
    """The loop as style and papers write it: a product with 0 where an episode starts, then a step."""
    outputs = []
    for t, x in enumerate(inputs):
        if first is not None:
            keep = (~first[t]).to(x.dtype).unsqueeze(-1)
            state = tuple(s * keep for s in state)
        output, state = core(x, state)
        outputs.append(output)
    return torch.stack(outputs), state


def states_before(core: Core, inputs: Tensor, state: State, first: Tensor | None) -> list[State]:
    """s_0 .. s_T, detached, each before its step's reset."""
    with torch.no_grad():
        return [naive_unroll(core, inputs[:t], state, first)[1] if t else state for t in range(len(inputs) + 1)]


def gradient_of_the_rest(
    objective: Callable[[int, State], Tensor], visited: Sequence[State], steps: Sequence[int]
) -> list[State]:
    """G_j = d objective(j, s_j) / d s_j, where `objective` is what remains of the window when it restarts from s_j."""
    result = []
    for j in steps:
        state = tuple(s.detach().clone().requires_grad_() for s in visited[j])
        result.append(torch.autograd.grad(objective(j, state), state, allow_unused=True, materialize_grads=True))
    return result
