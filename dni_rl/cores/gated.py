"""LSTM and GRU cores, and wrappers that make cores of other people's recurrent modules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_rl.cores.base import Core, State, StateHistory, UnrolledState


class _LSTMLayer(torch.autograd.Function):
    """One LSTM layer over a window, with episode resets, and a backward pass that notes the state gradients on its way.

    nn.LSTM cannot reset in the middle of a sequence and does not tell dS/dc_j; a loop under autograd can do both at several times
    the cost. Here the backward recursion is written out (Hochreiter & Schmidhuber 1997, with forget gates):

        i, f, o = sigmoid(.),  g = tanh(.)      gates from x_proj_t + W_hh h_{t-1}
        c_t = f c_{t-1} + i g,    h_t = o tanh(c_t)

    and everything that does not depend on the recursion is computed for all steps at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_proj: Tensor,
        h: Tensor,
        c: Tensor,
        weight_hh: Tensor,
        first: Tensor | None,
        recorder: "_LayerRecorder",
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, B, _ = x_proj.shape
        H = h.shape[-1]
        gates = torch.empty_like(x_proj)  # [T, B, 4 H], activated
        h_prev = x_proj.new_empty(T, B, H)
        c_prev = x_proj.new_empty(T, B, H)
        tanh_c = x_proj.new_empty(T, B, H)
        outputs = x_proj.new_empty(T, B, H)
        transposed = weight_hh.t()
        resets = None if first is None else first.unsqueeze(-1)  # [T, B, 1]
        zero = x_proj.new_zeros(())
        for t in range(T):
            if resets is None:
                h_prev[t].copy_(h)
                c_prev[t].copy_(c)
            else:
                torch.where(resets[t], zero, h, out=h_prev[t])
                torch.where(resets[t], zero, c, out=c_prev[t])
            gate = gates[t]
            torch.addmm(x_proj[t], h_prev[t], transposed, out=gate)
            gate[:, : 2 * H].sigmoid_()
            gate[:, 2 * H : 3 * H].tanh_()
            gate[:, 3 * H :].sigmoid_()
            i, f, g, o = gate.chunk(4, dim=-1)
            c = torch.mul(f, c_prev[t]).addcmul_(i, g)
            torch.tanh(c, out=tanh_c[t])
            h = torch.mul(o, tanh_c[t], out=outputs[t])
        ctx.save_for_backward(gates, h_prev, c_prev, tanh_c, weight_hh)
        ctx.resets, ctx.recorder = resets, recorder
        recorder.h_prev, recorder.c_prev = h_prev, c_prev
        return outputs, h.clone(), c

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: that is silent, and wrong, where only the saved tensors would need a second derivative.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "LSTM.unroll: create_graph=True found, but it has first derivatives only; use "
                "dni_rl.cores.unroll_stepwise(core, inputs, state, first)"
            )
        gates, h_prev, c_prev, tanh_c, weight_hh = ctx.saved_tensors
        T, B, H = tanh_c.shape
        i, f, g, o = gates.view(T, B, 4, H).unbind(2)
        through_c = torch.empty_like(gates).view(T, B, 4, H)  # d pre-activation / d c, and for the output gate / d h
        through_c[:, :, 0] = g * i * (1 - i)
        through_c[:, :, 1] = c_prev * f * (1 - f)
        through_c[:, :, 2] = i * (1 - g.square())
        through_c[:, :, 3] = tanh_c * o * (1 - o)
        c_from_h = o * (1 - tanh_c.square())
        d_gates = torch.empty_like(gates)
        dh_all, dc_all = torch.empty_like(h_prev), torch.empty_like(c_prev)
        mixes = ctx.recorder.history is not None and ctx.recorder.history.mixes
        for t in reversed(range(T)):
            dh = d_h + d_outputs[t]
            dc = torch.addcmul(d_c, dh, c_from_h[t])
            d_gate = d_gates[t].view(B, 4, H)
            torch.mul(dc.unsqueeze(1), through_c[t, :, :3], out=d_gate[:, :3])
            torch.mul(dh, through_c[t, :, 3], out=d_gate[:, 3])
            d_h = torch.mm(d_gates[t], weight_hh, out=dh_all[t])
            d_c = torch.mul(dc, f[t], out=dc_all[t])
            if mixes:
                d_h, d_c = ctx.recorder.hand_on(t, d_h, d_c)
            if ctx.resets is not None:
                d_h = d_h.masked_fill(ctx.resets[t], 0.0)
                d_c = d_c.masked_fill(ctx.resets[t], 0.0)
        ctx.recorder.record(dh_all, dc_all)
        d_weight = d_gates.flatten(0, 1).t() @ h_prev.flatten(0, 1) if ctx.needs_input_grad[3] else None
        return d_gates, d_h, d_c, d_weight, None, None


class _LayerRecorder:
    """Connects a layer's forward and backward pass with the history of the whole window."""

    h_prev: Tensor
    c_prev: Tensor

    def __init__(self) -> None:
        self.history: StateHistory | None = None
        self.index = 0

    def hand_on(self, step: int, d_h: Tensor, d_c: Tensor) -> tuple[Tensor, Tensor]:
        assert self.history is not None
        mixed = self.history.hand_on(self.index, step, d_h), self.history.hand_on(self.index + 1, step, d_c)
        assert mixed[0] is not None and mixed[1] is not None
        return mixed[0], mixed[1]

    def record(self, dh: Tensor, dc: Tensor) -> None:
        if self.history is not None:
            self.history.record(self.index, dh)
            self.history.record(self.index + 1, dc)


class _Gated(Core):
    """What LSTM and GRU cores share: a torch module holds the parameters, so that keys and initialisation are the usual ones."""

    _gates: int
    _states_per_layer: int

    def __init__(self, module: nn.LSTM | nn.GRU, chrono_max: float | None):
        super().__init__()
        kind = type(module).__name__
        if module.bidirectional:
            raise ValueError(
                f"bidirectional: a bidirectional nn.{kind} reads the future and has no state to cut at; use bidirectional=False"
            )
        if module.proj_size:
            raise ValueError(f"proj_size: found {module.proj_size}, allowed 0; put a Linear behind the core instead")
        if module.dropout and module.num_layers > 1:
            raise ValueError(f"dropout: found {module.dropout}, allowed 0; put a Dropout before or behind the core")
        self.rnn = module
        self.input_size = module.input_size
        self.output_size = module.hidden_size
        self.num_layers = module.num_layers
        self.state_sizes = (module.hidden_size,) * (self._states_per_layer * module.num_layers)
        if chrono_max is not None:
            self.chrono_init_(chrono_max)

    def chrono_init_(self, chrono_max: float) -> None:
        """Biases the gates towards remembering for 1 to `chrono_max` steps.

            b_f ~ log U(1, chrono_max - 1),  b_i = -b_f

        Tallec & Ollivier, "Can recurrent neural networks warp time?" (2018), sec. 2.2; for a GRU the update gate, which keeps the
        state, gets b_f.

        Args:
            chrono_max: the longest dependency expected, in steps of the core; above 2.
        """
        if not chrono_max > 2:
            raise ValueError(
                f"chrono_max: found {chrono_max}, allowed above 2; it is the longest expected memory in steps"
            )
        if not self.rnn.bias:
            raise ValueError("chrono_max: the module was built with bias=False; chrono initialisation sets biases")
        H = self.rnn.hidden_size
        with torch.no_grad():
            for layer in range(self.num_layers):
                bias_ih, bias_hh = self._parameters_of(layer)[2:]
                assert bias_ih is not None and bias_hh is not None
                keep = torch.log(torch.empty(H).uniform_(1.0, chrono_max - 1.0)).to(bias_ih)
                bias_ih.zero_()
                bias_hh.zero_()
                bias_ih[H : 2 * H] = keep
                if self._gates == 4:
                    bias_ih[:H] = -keep

    def _parameters_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        names = [f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}"]
        w_ih, w_hh, b_ih, b_hh = (getattr(self.rnn, name, None) for name in names)
        assert w_ih is not None and w_hh is not None
        return w_ih, w_hh, b_ih, b_hh

    def extra_repr(self) -> str:
        return f"state_sizes={self.state_sizes}"


class LSTM(_Gated):
    """LSTM core, one or more layers.

    State: (h, c) of the first layer, then of the second, and so on, each [B, hidden_size].

    Args:
        input_size: D.
        hidden_size: H.
        num_layers: stacked layers.
        chrono_max: if given, chrono initialisation for dependencies of up to so many steps (`chrono_init_`).
    """

    _gates = 4
    _states_per_layer = 2

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, chrono_max: float | None = None):
        super().__init__(nn.LSTM(input_size, hidden_size, num_layers), chrono_max)

    @classmethod
    def of(cls, module: nn.LSTM) -> "LSTM":
        """A core over the parameters of an existing module, shared, not copied."""
        core = cls.__new__(cls)
        _Gated.__init__(core, module, None)
        return core

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        next_state: list[Tensor] = []
        for layer in range(self.num_layers):
            h, c = torch.lstm_cell(x, state[2 * layer : 2 * layer + 2], *self._parameters_of(layer))
            next_state += [h, c]
            x = h
        return x, tuple(next_state)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """Same as stepping, in fewer and larger operations; see `Core.unroll`. First derivatives only."""
        self.check_unroll(inputs, state, first)
        x, next_state, recorders = inputs, [], []
        for layer in range(self.num_layers):
            w_ih, w_hh, b_ih, b_hh = self._parameters_of(layer)
            bias = None if b_ih is None or b_hh is None else b_ih + b_hh
            recorder = _LayerRecorder()
            h, c = state[2 * layer : 2 * layer + 2]
            x_proj = F.linear(x, w_ih, bias).to(w_hh.dtype)  # [T, B, 4 H]; autocast may have lowered it
            x, h, c = _LSTMLayer.apply(x_proj, h, c, w_hh, first, recorder)
            next_state += [h, c]
            recorders.append(recorder)
        valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=x.device) if first is None else ~first
        history = StateHistory(tuple(s for r in recorders for s in (r.h_prev, r.c_prev)), valid)
        for layer, recorder in enumerate(recorders):
            recorder.history, recorder.index = history, 2 * layer
        return x, UnrolledState.of(next_state, history)


class GRU(_Gated):
    """GRU core, one or more layers. State: h of each layer, [B, hidden_size]. Arguments as for `LSTM`."""

    _gates = 3
    _states_per_layer = 1

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, chrono_max: float | None = None):
        super().__init__(nn.GRU(input_size, hidden_size, num_layers), chrono_max)

    @classmethod
    def of(cls, module: nn.GRU) -> "GRU":
        """A core over the parameters of an existing module, shared, not copied."""
        core = cls.__new__(cls)
        _Gated.__init__(core, module, None)
        return core

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        next_state = []
        for layer in range(self.num_layers):
            x = torch.gru_cell(x, state[layer], *self._parameters_of(layer))
            next_state.append(x)
        return x, tuple(next_state)


class CellCore(Core):
    """A core of any module that maps (x [B, D], state) to (output, next state), or of nn.LSTMCell and nn.GRUCell.

    Args:
        cell: the module, registered as `cell`.
        state_sizes: width of each state tensor.
        input_size: D.
        output_size: H.
        step: calls the cell: (cell, x, state) -> (output, next_state). By default `cell(x, state)`.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        state_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        step: Callable[[nn.Module, Tensor, State], tuple[Tensor, State]] | None = None,
    ):
        super().__init__()
        self.cell = cell
        self.state_sizes = tuple(state_sizes)
        self.input_size, self.output_size = input_size, output_size
        self._step = step or _step_module

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        output, next_state = self._step(self.cell, x, state)
        return output, tuple(next_state)


def _step_module(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    return cell(x, state)


def _step_lstm_cell(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    h, c = cell(x, (state[0], state[1]))
    return h, (h, c)


def _step_gru_cell(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    h = cell(x, state[0])
    return h, (h,)


def wrap(
    module: nn.Module,
    *,
    state_sizes: Sequence[int] | None = None,
    input_size: int | None = None,
    output_size: int | None = None,
) -> Core:
    """Makes a core of a recurrent module in one line; parameters are shared, not copied.

        core = dni_rl.wrap(nn.LSTM(64, 128, num_layers=2))

    `batch_first` of a wrapped nn.LSTM or nn.GRU is ignored: cores are time-major.

    Args:
        module: nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, a `Core` (returned as it is), or any module that maps (x [B, D],
            state) to (output [B, H], next state), with the three sizes below.
        state_sizes: width of each tensor of the state, for a module of your own.
        input_size: D, for a module of your own.
        output_size: H, for a module of your own.

    Raises:
        ValueError: if the module is bidirectional, projects its state or drops out between layers, or if sizes are missing.
    """
    match module:
        case Core():
            return module
        case nn.LSTM():
            return LSTM.of(module)
        case nn.GRU():
            return GRU.of(module)
        case nn.LSTMCell():
            size = module.hidden_size
            return CellCore(
                module, state_sizes=(size, size), input_size=module.input_size, output_size=size, step=_step_lstm_cell
            )
        case nn.GRUCell():
            size = module.hidden_size
            return CellCore(
                module, state_sizes=(size,), input_size=module.input_size, output_size=size, step=_step_gru_cell
            )
    if state_sizes is None or input_size is None or output_size is None:
        raise ValueError(
            f"module: {type(module).__name__} is none of nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell; for a module of your own that maps "
            "(x, state) to (output, next_state), pass state_sizes=, input_size= and output_size="
        )
    if not state_sizes or not all(isinstance(size, int) and size > 0 for size in state_sizes):
        raise ValueError(f"state_sizes: expected positive integers, got {tuple(state_sizes)}")
    return CellCore(module, state_sizes=state_sizes, input_size=input_size, output_size=output_size)
