"""LSTM and GRU cores, and wrappers that make cores of other people's recurrent modules."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dni_rl.cores.base import (
    Core,
    State,
    StateHistory,
    UnrolledState,
    are_counts,
    check_chrono_max,
    chrono_bias_,
    clear_state,
    evenly_spaced_steps,
)

_GATE = 60.0  # what a `_Timetable` sends to gates

_FIRST_DERIVATIVES_ONLY = (
    "LSTM.unroll: create_graph=True found, but it has first derivatives only; use "
    "dni_rl.cores.unroll_stepwise(core, inputs, state, first)"
)


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
        h, c = h.to(x_proj.dtype), c.to(x_proj.dtype)  # a state of half precision, as autocast leaves behind
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
        # autograd refuses to go back through what changed in place; of the state there are copies here, of x only its projection
        ctx.save_for_backward(gates, h_prev, c_prev, tanh_c, weight_hh, resets)
        ctx.recorder = recorder
        recorder.inside = h_prev, c_prev
        return outputs, h.clone(), c

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: that is silent, and wrong, where only the saved tensors would need a second derivative.
        if torch.is_grad_enabled():
            raise RuntimeError(_FIRST_DERIVATIVES_ONLY)
        gates, h_prev, c_prev, tanh_c, weight_hh, resets = ctx.saved_tensors
        d_gates, d_h, d_c = _backward_recursion(
            gates, c_prev, tanh_c, weight_hh, resets, d_outputs, d_h, d_c, ctx.recorder
        )
        d_weight = d_gates.flatten(0, 1).t() @ h_prev.flatten(0, 1) if ctx.needs_input_grad[3] else None
        return d_gates, d_h, d_c, d_weight, None, None


def _backward_recursion(
    gates: Tensor,
    c_prev: Tensor,
    tanh_c: Tensor,
    weight_hh: Tensor,
    resets: Tensor | None,
    d_outputs: Tensor,
    d_h: Tensor,
    d_c: Tensor,
    recorder: "_LayerRecorder",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations [T, B, 4 H] and of the first h and c [B, H]; those in between go to `recorder`."""
    T, B, H = tanh_c.shape
    i, f, g, o = gates.view(T, B, 4, H).unbind(2)
    through_c = torch.empty_like(gates).view(T, B, 4, H)  # d pre-activation / d c, and for the output gate / d h
    through_c[:, :, 0] = g * i * (1 - i)
    through_c[:, :, 1] = c_prev * f * (1 - f)
    through_c[:, :, 2] = i * (1 - g.square())
    through_c[:, :, 3] = tanh_c * o * (1 - o)
    c_from_h = o * (1 - tanh_c.square())
    d_gates = torch.empty_like(gates)
    dh_all, dc_all = torch.empty_like(c_prev), torch.empty_like(c_prev)
    mixes = recorder.history is not None and recorder.history.mixes
    for t in reversed(range(T)):
        dh = d_h + d_outputs[t]
        dc = torch.addcmul(d_c, dh, c_from_h[t])
        d_gate = d_gates[t].view(B, 4, H)
        torch.mul(dc.unsqueeze(1), through_c[t, :, :3], out=d_gate[:, :3])
        torch.mul(dh, through_c[t, :, 3], out=d_gate[:, 3])
        d_h = torch.mm(d_gates[t], weight_hh, out=dh_all[t])
        d_c = torch.mul(dc, f[t], out=dc_all[t])
        if mixes:
            d_h, d_c = recorder.hand_on(t, d_h, d_c)
        if resets is not None:
            d_h = d_h.masked_fill(resets[t], 0.0)
            d_c = d_c.masked_fill(resets[t], 0.0)
    recorder.record(dh_all, dc_all)
    return d_gates, d_h, d_c


class _FusedLSTMLayer(torch.autograd.Function):
    """The same layer by the library's fused kernel, in one call; see `_Timetable` for resets.

    The kernel hands out neither c_t nor dS/dc_t. When a history is to be recorded, its backward pass gives way to the written-out one
    of `_LSTMLayer`, for which `_Recall` computes the inside of the window again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        first: Tensor | None,
        timetable: "_Timetable | None",
        recorder: "_LayerRecorder",
    ) -> tuple[Tensor, Tensor, Tensor]:
        learns = ctx.needs_input_grad[:7]
        leaves = [
            None if a is None else a.detach().requires_grad_(needed)
            for a, needed in zip((x, h, c, weight_ih, weight_hh, bias_ih, bias_hh), learns, strict=True)
        ]
        with torch.set_grad_enabled(any(learns)):
            outputs, last_h, last_c = _fused_lstm(leaves, first, timetable)
        # saved, and not kept as attributes: these would hold the kernel's graph, all of its activations, until the last of the window's
        # tensors is gone, where what is saved is freed by the backward pass
        ctx.save_for_backward(*leaves, outputs, last_h, last_c)
        ctx.recorder = recorder
        recorder.inside = _Recall(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, first, outputs)
        return outputs.detach(), last_h.detach(), last_c.detach()

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_FIRST_DERIVATIVES_ONLY)
        recorder, learns = ctx.recorder, ctx.needs_input_grad[:7]
        if recorder.history is None or not recorder.history.watches:
            *leaves, outputs, last_h, last_c = ctx.saved_tensors
            wanted = [leaf for leaf, needed in zip(leaves, learns, strict=True) if needed]
            results = outputs, last_h, last_c
            found = iter(torch.autograd.grad(results, wanted, (d_outputs, d_h, d_c), retain_graph=True))
            return *(next(found) if needed else None for needed in learns), None, None, None
        recall = recorder.inside
        gates, h_prev, c_prev, tanh_c = recall()
        recall.check("inputs", "parameters", "first")  # used once more below, whenever the inside was computed
        x, _, _, weight_ih, weight_hh, *_ = ctx.saved_tensors
        d_gates, d_h, d_c = _backward_recursion(
            gates, c_prev, tanh_c, weight_hh, recall.resets, d_outputs, d_h, d_c, recorder
        )
        if not recorder.history.mixes:  # after which a second pass follows
            recall.forget_gates()
        rows = d_gates.flatten(0, 1)
        d_bias = rows.sum(0) if learns[5] or learns[6] else None
        gradients = (
            d_gates @ weight_ih if learns[0] else None,
            d_h,
            d_c,
            rows.t() @ x.flatten(0, 1) if learns[3] else None,
            rows.t() @ h_prev.flatten(0, 1) if learns[4] else None,
            d_bias,
            d_bias,
        )
        return *(g if needed else None for g, needed in zip(gradients, learns, strict=True)), None, None, None


class _Timetable:
    """Where the steps of a window go when every reset inside of it becomes a step of its own.

    A kernel that knows no resets still forgets where its gates are told to. Each reset at a step t > 0 has a *blank* step inserted in
    front, i = f = o = 0, after which h = c = 0; and sequences with fewer resets are filled up at the end with *hold* steps,
    i = o = 0, f = 1, which keep c. Two columns of input weights, of +-60, set the gates: sigmoid(-60) is 1e-26, which vanishes beside
    anything in float32, forward and backward, and is not yet one of the denormal numbers that processors are slow with. See `is_obeyed`.

    Args:
        first: [T, B] bool; step 0 is not looked at.
    """

    def __init__(self, first: Tensor):
        T, B = first.shape
        count = partial(torch.arange, device=first.device)  # whatever the default device
        inserted = first.clone()
        inserted[0] = False
        position = count(T).unsqueeze(1) + inserted.cumsum(0)  # [T, B] where step t goes
        self.length = int(position[-1].max()) + 1
        self.rows = (position * B + count(B)).flatten()  # [T * B]
        step = first.new_ones(self.length * B)
        step[self.rows] = False
        extra = step.view(self.length, B)
        at_end = count(self.length).unsqueeze(1) > position[-1]
        self.flags = torch.stack([extra & ~at_end, extra & at_end], dim=-1).to(torch.float32)  # [length, B, 2]

    def insert(self, x: Tensor) -> Tensor:
        """[T, B, D] -> [length, B, D + 2]."""
        T, B, D = x.shape
        spread = x.new_zeros(self.length * B, D).index_copy(0, self.rows, x.reshape(T * B, D))
        return torch.cat([spread.view(self.length, B, D), self.flags], dim=-1)

    def remove(self, outputs: Tensor) -> Tensor:
        """[length, B, H] -> [T, B, H]."""
        length, B, H = outputs.shape
        return outputs.reshape(length * B, H).index_select(0, self.rows).view(-1, B, H)

    @staticmethod
    def widen(weight_ih: Tensor) -> Tensor:
        """[4 H, D] -> [4 H, D + 2]: input weights that obey the flags."""
        H = len(weight_ih) // 4
        off, zero = weight_ih.new_full((H, 1), -_GATE), weight_ih.new_zeros(H, 1)
        blank = torch.cat([off, off, zero, off])
        hold = torch.cat([off, -off, zero, off])
        return torch.cat([weight_ih, blank, hold], dim=1)

    @staticmethod
    @torch.no_grad()
    def is_obeyed(inputs: Tensor, state: State, recurrent: Sequence[Sequence[Tensor | None]]) -> bool:
        """Whether the flags settle the gates, whatever else arrives there, and f = 0 forgets: 0 times NaN is NaN.

        Args:
            inputs: [T, B, D].
            state: tuple of [B, H], before step 0.
            recurrent: of each layer what is added to the flags' part: weights [4 H, H], of an h in -1 .. 1, and biases [4 H].
        """
        for layer in recurrent:
            rest = sum(float(w.abs().view(len(w), -1).sum(1).max()) for w in layer if w is not None)
            if not rest <= _GATE - 20.0:  # sigmoid(-20) is lost in rounding
                return False
        return all(bool(a.isfinite().all()) for a in (inputs, *state))


def _fused_lstm(
    arguments: Sequence[Tensor | None], first: Tensor | None, timetable: _Timetable | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [T, B, H], h and c [B, H]; the state of a sequence is cleared where `first` says so."""
    x, h, c, weight_ih = arguments[:4]
    assert x is not None and h is not None and c is not None and weight_ih is not None
    weights = [w for w in arguments[4:] if w is not None]
    if first is not None:
        h, c = (s.masked_fill(first[0].unsqueeze(-1), 0.0) for s in (h, c))
    if timetable is not None:
        x, weight_ih = timetable.insert(x), timetable.widen(weight_ih)
    state = (h.unsqueeze(0), c.unsqueeze(0))
    outputs, _, c = torch.lstm(x, state, [weight_ih, *weights], len(weights) == 3, 1, 0.0, True, False, False)
    if timetable is not None:
        outputs = timetable.remove(outputs)
    return outputs, outputs[-1].clone(), c.squeeze(0)


def _fused_is_possible(inputs: Tensor, state: State, weights: Sequence[Tensor]) -> bool:
    """Whether `_FusedLSTMLayer` can be used: on the CPU only, as elsewhere a timetable would have to wait for the device."""
    return (
        all(a.device.type == "cpu" and a.dtype == torch.float32 for a in (inputs, *state, *weights))
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and inputs.numel() > 0
    )


class _Recall:
    """The inside of a window of `_FusedLSTMLayer`, computed when it is asked for."""

    def __init__(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        first: Tensor | None,
        outputs: Tensor,
    ):
        self.x, self.h, self.c, self.outputs = x.detach(), h.detach(), c.detach(), outputs.detach()
        self.weights = [None if w is None else w.detach() for w in (weight_ih, weight_hh, bias_ih, bias_hh)]
        self.resets = None if first is None else first.detach().unsqueeze(-1)
        self.versions = self._versions()
        self._inside: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._states: tuple[Tensor, Tensor] | None = None

    def _versions(self) -> dict[str, list[int]]:
        """How often the tensors that it reads were written to in place; they share their memory with the caller's."""
        groups = {
            "inputs": (self.x,),
            "state": (self.h, self.c),
            "first": (self.resets,),
            "parameters": self.weights,
            "outputs": (self.outputs,),
        }
        return {
            name: [a._version for a in tensors if a is not None and not a.is_inference()]
            for name, tensors in groups.items()
        }

    def check(self, *names: str) -> None:
        """RuntimeError if one of these was changed in place since the forward pass."""
        versions = self._versions()
        changed = [name for name in names if versions[name] != self.versions[name]]
        if changed:
            raise RuntimeError(
                f"LSTM.unroll: its {' and '.join(changed)} changed in place before the window's history was read; read it, or call "
                "backward, before the optimiser's step and before any of them is written to, or unroll from a clone"
            )

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Activated gates [T, B, 4 H], h and c before every step after its reset, and tanh(c) after it, each [T, B, H]."""
        if self._inside is not None:
            return self._inside
        self.check(*self.versions)
        weight_ih, weight_hh, bias_ih, bias_hh = self.weights
        assert weight_ih is not None and weight_hh is not None
        H = weight_hh.shape[1]
        h_prev = torch.cat([self.h.unsqueeze(0), self.outputs[:-1]])
        if self.resets is not None:
            h_prev.masked_fill_(self.resets, 0.0)
        bias = None if bias_ih is None or bias_hh is None else bias_ih + bias_hh
        gates = F.linear(self.x, weight_ih, bias) + F.linear(h_prev, weight_hh)
        gates[..., : 2 * H].sigmoid_()
        gates[..., 2 * H : 3 * H].tanh_()
        gates[..., 3 * H :].sigmoid_()
        i, f, g, _ = gates.chunk(4, dim=-1)
        written = i * g
        c_prev, c_all = torch.empty_like(written), torch.empty_like(written)
        c, zero = self.c, written.new_zeros(())
        for t in range(len(written)):
            c = c_prev[t].copy_(c) if self.resets is None else torch.where(self.resets[t], zero, c, out=c_prev[t])
            c = torch.addcmul(written[t], f[t], c, out=c_all[t])
        self._inside = gates, h_prev, c_prev, c_all.tanh_()
        return self._inside

    def states(self) -> tuple[Tensor, Tensor]:
        """h and c before every step, [T, B, H] each."""
        return self()[1:3] if self._states is None else self._states

    def forget_gates(self) -> None:
        """Keeps of the inside what `states` gives, two sevenths of it."""
        self._inside, self._states = None, self.states()


def _states_before(insides: "Sequence[tuple[Tensor, Tensor] | _Recall]") -> State:
    """h and c of every layer before every step, [T, B, H] each."""
    return tuple(s for inside in insides for s in (inside.states() if isinstance(inside, _Recall) else inside))


class _LayerRecorder:
    """Connects a layer's forward and backward pass with the history of the whole window."""

    inside: "tuple[Tensor, Tensor] | _Recall"  # h and c before every step, or what computes them

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


def _check_only_parameters_count(module: nn.LSTM | nn.GRU) -> None:
    """Raises ValueError if calling the module does more than PyTorch's does: a core reads its parameters, and never calls it."""
    kind = nn.LSTM if isinstance(module, nn.LSTM) else nn.GRU
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    found = [name[1:] for name in hooks if getattr(module, name)]
    if "forward" in vars(module) or type(module).forward is not kind.forward:
        found.append("a forward of its own")
    if found:
        raise ValueError(
            f"module: found {type(module).__name__} with {' and '.join(found)}, allowed nn.{kind.__name__} as it is, whose parameters a "
            "core reads without calling it; use parametrizations for its weights, or dni_rl.CellCore with a step of your own"
        )


class _Gated(Core):
    """What LSTM and GRU cores share: a torch module holds the parameters, so that keys and initialisation are the usual ones."""

    _gates: int
    _states_per_layer: int

    def __init__(self, module: nn.LSTM | nn.GRU, chrono_max: float | None):
        super().__init__()
        _check_only_parameters_count(module)
        kind = type(module).__name__
        if module.bidirectional:
            raise ValueError(
                f"bidirectional: a bidirectional nn.{kind} reads the future and has no state to cut at; use bidirectional=False"
            )
        if module.batch_first:
            raise ValueError("batch_first: found True, allowed False; a core reads windows [T, B, D], with time first")
        if module.proj_size:
            raise ValueError(f"proj_size: found {module.proj_size}, allowed 0; put a Linear behind the core instead")
        if module.dropout and module.num_layers > 1:
            raise ValueError(f"dropout: found {module.dropout}, allowed 0; put a Dropout before or behind the core")
        self.rnn = module
        self.input_size = module.input_size
        self.output_size = module.hidden_size
        self.num_layers = module.num_layers
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self._names = [tuple(f"{kind}_l{layer}" for kind in kinds) for layer in range(module.num_layers)]
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
        check_chrono_max(chrono_max)
        if not self.rnn.bias:
            raise ValueError("chrono_max: the module was built with bias=False; chrono initialisation sets biases")
        with torch.no_grad():
            for layer in range(self.num_layers):
                bias_ih, bias_hh = self._parameters_of(layer)[2:]
                assert bias_ih is not None and bias_hh is not None
                chrono_bias_(bias_ih, self._gates, chrono_max)
                bias_hh.zero_()

    def _parameters_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        rnn, (w_ih, w_hh, b_ih, b_hh) = self.rnn, self._names[layer]
        if rnn._forward_pre_hooks or rnn._forward_hooks or rnn._backward_pre_hooks or rnn._backward_hooks:
            _check_only_parameters_count(rnn)  # they came after the core was made
        if not rnn.bias:
            return getattr(rnn, w_ih), getattr(rnn, w_hh), None, None
        return getattr(rnn, w_ih), getattr(rnn, w_hh), getattr(rnn, b_ih), getattr(rnn, b_hh)

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

    Attributes:
        targets_per_window: at how many steps of a window, evenly spaced, state gradients will be asked for: None for every step, as
            a critic with dense targets does, 0 for none. A matter of speed alone: 0 takes the fused kernel for short windows too, a
            number takes it from each of these steps to the next where that is far, and then records no others.
    """

    targets_per_window: int | None = None
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
        self.check_step(x)
        next_state: list[Tensor] = []
        for layer in range(self.num_layers):
            h, c = torch.lstm_cell(x, state[2 * layer : 2 * layer + 2], *self._parameters_of(layer))
            next_state += [h, c]
            x = h
        return x, tuple(next_state)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """Same as stepping, in fewer and larger operations; see `Core.unroll`. First derivatives only."""
        self.check_unroll(inputs, state, first)
        self.check_window(inputs)
        with parametrize.cached() if parametrize.is_parametrized(self.rnn) else nullcontext():
            return self._unroll_by_length(inputs, state, first)

    def _unroll_by_length(self, inputs: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, UnrolledState]:
        fused = _fused_is_possible(inputs, state, list(self.rnn.parameters()))
        steps = evenly_spaced_steps(len(inputs), self.targets_per_window) if self.targets_per_window != 0 else ()
        if fused and steps and len(inputs) >= 8 * len(steps):
            return self._unroll_in_stretches(inputs, state, first, steps)
        # In short windows, to compute their inside a second time costs more than the kernel saves.
        return self._unroll(inputs, state, first, fused=fused and (not steps or len(inputs) >= 32))

    def _unroll_in_stretches(
        self, inputs: Tensor, state: State, first: Tensor | None, steps: tuple[int, ...]
    ) -> tuple[Tensor, UnrolledState]:
        """From one of these steps to the next by the kernel: there alone a state is a tensor whose gradient can be had."""
        outputs: list[Tensor] = []
        visited: list[State] = []
        for start, stop in itertools.pairwise((*steps, len(inputs))):
            starts = None if first is None else first[start:stop]
            state = tuple(s.view_as(s) for s in state) if starts is None else clear_state(state, starts[0])
            visited.append(state)
            output, state = self._unroll(inputs[start:stop], state, starts, fused=True)
            state.history.watches = False
            outputs.append(output)
        valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if first is None else ~first
        history = StateHistory(
            tuple(torch.stack([s.detach() for s in component]) for component in zip(*visited, strict=True)),
            valid,
            steps,
        )
        for row, at_step in enumerate(visited):
            for index, s in enumerate(at_step):
                if s.requires_grad:
                    s.register_hook(partial(history.record_step, index, row))
        return torch.cat(outputs), UnrolledState.of(state, history)

    def _unroll(
        self, inputs: Tensor, state: State, first: Tensor | None, *, fused: bool
    ) -> tuple[Tensor, UnrolledState]:
        x, next_state = inputs, []
        recorders = [_LayerRecorder() for _ in range(self.num_layers)]
        timetable = _Timetable(first) if fused and first is not None and bool(first[1:].any()) else None
        if timetable is not None:
            recurrent = [self._parameters_of(layer)[1:] for layer in range(self.num_layers)]
            fused = timetable.length <= len(inputs) * 9 // 8 and timetable.is_obeyed(inputs, state, recurrent)
        for layer, recorder in enumerate(recorders):
            w_ih, w_hh, b_ih, b_hh = self._parameters_of(layer)
            h, c = state[2 * layer : 2 * layer + 2]
            if fused:
                x, h, c = _FusedLSTMLayer.apply(x, h, c, w_ih, w_hh, b_ih, b_hh, first, timetable, recorder)
            else:
                bias = None if b_ih is None or b_hh is None else b_ih + b_hh
                x_proj = F.linear(x, w_ih, bias).to(w_hh.dtype)  # [T, B, 4 H]; autocast may have lowered it
                x, h, c = _LSTMLayer.apply(x_proj, h, c, w_hh, first, recorder)
            next_state += [h, c]
        valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=x.device) if first is None else ~first
        history = StateHistory(partial(_states_before, [r.inside for r in recorders]), valid)
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
        self.check_step(x)
        next_state = []
        for layer in range(self.num_layers):
            x = torch.gru_cell(x, state[layer], *self._parameters_of(layer))
            next_state.append(x)
        return x, tuple(next_state)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """See `Core.unroll`. Parametrized weights are computed once for the window, as `nn.GRU` does."""
        with parametrize.cached() if parametrize.is_parametrized(self.rnn) else nullcontext():
            return super().unroll(inputs, state, first)


class CellCore(Core):
    """A core of any module that maps (x [B, D], state) to (output [B, H], next state), or of nn.LSTMCell, nn.GRUCell and nn.RNNCell.

    Args:
        cell: the module, registered as `cell`.
        state_sizes: width of each state tensor, or its shape without the batch, such as (C, Y, X), where it is a feature map.
        input_size: D; of feature maps, which it is not compared with, any number.
        output_size: H; flatten what is a feature map.
        step: calls the cell: (cell, x, state) -> (output, next_state). By default `cell(x, state)`, or as one of PyTorch's cells wants.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        state_sizes: Sequence[int | Sequence[int]],
        input_size: int,
        output_size: int,
        step: Callable[[nn.Module, Tensor, State], tuple[Tensor, State]] | None = None,
    ):
        super().__init__()
        self.cell = cell
        self._state_shapes = tuple(tuple(size) if isinstance(size, (tuple, list)) else (size,) for size in state_sizes)
        self.state_sizes = tuple(math.prod(shape) for shape in self._state_shapes)
        self.input_size, self.output_size = input_size, output_size
        self._step = step or _STEPS.get(type(cell).forward, _step_module)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Core.state_shapes`."""
        return self._state_shapes

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        found = self._step(self.cell, x, state)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            number = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
            raise ValueError(
                f"cell: found a {type(found).__name__}{number} returned, allowed the pair (output, next_state); return (output, (state,))"
            )
        output, next_state = found
        if not isinstance(next_state, (tuple, list)):  # a tensor would be taken apart along the batch
            raise ValueError(
                f"cell: found a next state of type {type(next_state).__name__}, allowed a tuple of tensors; return (output, (state,))"
            )
        if _shapes(next_state) != _shapes(state):
            raise ValueError(
                f"cell: found a next state {_shapes(next_state)}, allowed {_shapes(state)} as the state before it; return one tensor "
                "for each of state_sizes, or change those"
            )
        if _shapes([output]) != [(len(x), self.output_size)]:
            raise ValueError(
                f"cell: found an output {_shapes([output])[0]}, allowed {(len(x), self.output_size)}, [B, H]; set output_size to its width"
            )
        return output, tuple(next_state)


def _shapes(state: Sequence[Tensor]) -> list[tuple[int, ...] | str]:
    """For comparison and display; of what is no tensor the name of its type."""
    return [tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__ for s in state]


def _step_module(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    return cell(x, state)


def _step_lstm_cell(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    h, c = cell(x, (state[0], state[1]))
    return h, (h, c)


def _step_hidden_cell(cell: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    h = cell(x, state[0])
    return h, (h,)


# by the function, so that a subclass with a forward of its own is called as any other module
_STEPS: dict[Any, Callable[[nn.Module, Tensor, State], tuple[Tensor, State]]] = {
    nn.LSTMCell.forward: _step_lstm_cell,
    nn.GRUCell.forward: _step_hidden_cell,
    nn.RNNCell.forward: _step_hidden_cell,
}


def _listed(sizes: object) -> Sequence[Any]:
    """What is no list has no sizes."""
    return sizes if isinstance(sizes, Sequence) else ()


def wrap(
    module: nn.Module,
    *,
    state_sizes: Sequence[int | Sequence[int]] | None = None,
    input_size: int | None = None,
    output_size: int | None = None,
) -> Core:
    """Makes a core of a recurrent module in one line; parameters are shared, not copied.

        core = dni_rl.wrap(nn.LSTM(64, 128, num_layers=2))

    Args:
        module: nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell, a `Core` (returned as it is), or any module that maps (x [B, D],
            state) to (output [B, H], next state), with the three sizes below. Of nn.LSTM and nn.GRU the core reads the parameters,
            parametrized or not, and never calls the module; cells are called. A subclass of a cell of PyTorch's is called as that cell is,
            or, if its sizes are given, as a module of your own.
        state_sizes: width of each tensor of the state, for a module of your own; of a feature map its shape without the batch, (C, Y, X).
        input_size: D, for a module of your own.
        output_size: H, for a module of your own.

    Raises:
        ValueError: if the module is bidirectional or `batch_first`, projects its state or drops out between layers, if an nn.LSTM or nn.GRU
            has a forward of its own or hooks, which would not run (hooks that come later are refused by the first step), or if sizes are
            missing, or not those that the module has by itself.
    """
    given = {"state_sizes": state_sizes, "input_size": input_size, "output_size": output_size}
    given = {name: size for name, size in given.items() if size is not None}
    core: Core | None = None
    match module:
        case Core():
            core = module
        case nn.LSTM():
            core = LSTM.of(module)
        case nn.GRU():
            core = GRU.of(module)
    if core is not None:
        for name, size in given.items():
            own = getattr(core, name)
            if (tuple(size) if isinstance(size, Sequence) else size) not in (own, core.state_shapes):
                raise ValueError(
                    f"{name}: found {size}, allowed {own}, which the {type(module).__name__} has by itself; leave it out"
                )
        return core
    if isinstance(module, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)) and not given:
        size, of_lstm = module.hidden_size, isinstance(module, nn.LSTMCell)
        return CellCore(
            module,
            state_sizes=(size, size) if of_lstm else (size,),
            input_size=module.input_size,
            output_size=size,
            step=_step_lstm_cell if of_lstm else _step_hidden_cell,
        )
    if state_sizes is None or input_size is None or output_size is None:
        raise ValueError(
            f"module: {type(module).__name__} is none of nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell; for a module of your own "
            "that maps (x, state) to (output, next_state), pass state_sizes=, input_size= and output_size="
        )
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"module: found {type(module).__name__}, allowed a torch.nn.Module, whose parameters are found; make it one"
        )
    shapes = [size if isinstance(size, (tuple, list)) else (size,) for size in _listed(state_sizes)]
    if not shapes or not all(shape and are_counts(*shape) for shape in shapes):
        raise ValueError(f"state_sizes: expected positive integers, or tuples of them, got {state_sizes}")
    return CellCore(module, state_sizes=state_sizes, input_size=input_size, output_size=output_size)
