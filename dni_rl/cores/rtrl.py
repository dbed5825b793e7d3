"""An LSTM with element-wise recurrence, for which real-time recurrent learning is exact at a price one can pay.

RTRL carries the derivative of the state with respect to the parameters forward in time instead of gradients backward,
so that nothing is truncated and nothing is predicted. It is the honest third arm beside truncated BPTT and error
critics. For a core with recurrent matrices that derivative has state times parameters entries; here every unit recurs
on itself alone, and it has only twice as many entries as there are parameters, for each sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_rl.cores.base import (
    Core,
    State,
    StateHistory,
    UnrolledState,
    check_chrono_max,
    chrono_bias_,
    unroll_stepwise,
)
from dni_rl.precision import HALF_PRECISION, out_of_autocast


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Derivative of an `ElementwiseLSTM`'s state with respect to its parameters, for every sequence; without gradient.

    As the state it belongs to, it goes into a checkpoint: without it, what is learned after loading differs until all episodes have
    started anew. `torch.save` takes it as it is, and `torch.load` wherever `dni_rl` has been imported.

    Attributes:
        h: [B, 4, H, D + 2], d h_u / d (parameters of unit u), for the gates i, f, g, o; the last dimension holds the
            row of `weight_ih`, then the entry of `weight_hh`, then that of `bias`. Other units' parameters have
            derivative 0.
        c: the same for c.
    """

    h: Tensor
    c: Tensor


torch.serialization.add_safe_globals([Sensitivity])  # what torch.load reads by default


class _DatedState(UnrolledState):
    """A state that keeps the parameters that led to it: an optimiser's step in between leaves no trace that could be refused."""

    parameters: tuple[Tensor, Tensor, Tensor]


class ElementwiseLSTM(Core):
    """LSTM whose gates see, of the state, their own unit alone.

        i, f, o = sigmoid(.),  g = tanh(.)       of  a_q = W_q x_t + v_q * h_{t-1} + b_q,   q in {i, f, g, o}
        c_t = f * c_{t-1} + i * g,    h_t = o * tanh(c_t)

    with vectors v_q. After the eLSTM of Irie, Gopalakrishnan & Schmidhuber, "Exploring the promise and limits of
    real-time recurrent learning" (2023), which recurs on c_{t-1} and mixes units in its output gate; here the
    usual LSTM with diagonal recurrent matrices. One layer: through a stack, RTRL is not exact at this price. A core
    like any other for truncated BPTT and error critics; for exact gradients across windows, add the three marked
    lines:

        sensitivity = core.initial_sensitivity(batch_size)                                  # once
        ...
        state = dni_rl.cut(state)
        outputs, next_state = core.unroll(inputs, core.attach(state, sensitivity), first)   # instead of `state`
        losses = my_losses(outputs, batch)
        dni_rl.backward(losses, start=state, end=next_state)
        sensitivity = core.advance(sensitivity, inputs, next_state)

    The parameters of the core then receive the gradient of full BPTT since the start of each episode: exactly, if
    they did not change meanwhile; an optimiser's steps make older derivatives stale, as always in online RTRL. What
    lies in front of the core, a torso, receives the gradient of the window alone.

    State: (h, c), each [B, hidden_size].

    Args:
        input_size: D.
        hidden_size: H.
        chrono_max: if given, b_f ~ log U(1, chrono_max - 1) and b_i = -b_f, for dependencies of up to so many steps
            (Tallec & Ollivier 2018, sec. 2.2); above 2.

    Raises:
        ValueError: if a size is not positive or chrono_max not above 2.
    """

    def __init__(self, input_size: int, hidden_size: int, *, chrono_max: float | None = None):
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"input_size, hidden_size: expected positive integers, got {input_size}, {hidden_size}")
        if chrono_max is not None:
            check_chrono_max(chrono_max)
        self.input_size, self.output_size = input_size, hidden_size
        self.state_sizes = (hidden_size, hidden_size)
        H = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * H, input_size).uniform_(-1.0, 1.0) / input_size**0.5)
        # nn.LSTM sums H terms with weights of U(-1, 1) / sqrt(H): one term with U(-1, 1) has the same variance.
        self.weight_hh = nn.Parameter(torch.empty(4 * H).uniform_(-1.0, 1.0))
        self.bias = nn.Parameter(torch.zeros(4 * H))
        if chrono_max is not None:
            chrono_bias_(self.bias, 4, chrono_max)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step; see `Core.forward`."""
        self.check_step(x)
        if len(state[0]) != len(x):  # it would be broadcast
            raise ValueError(
                f"state: expected {len(x)} sequences as in x, got {len(state[0])}; use initial_state({len(x)})"
            )
        return self._step(F.linear(x, self.weight_ih, self.bias), state)

    def unroll(self, inputs: Tensor, state: State, first: Tensor | None = None) -> tuple[Tensor, State]:
        """Same as stepping, with the inputs projected for all steps at once; see `Core.unroll`."""
        self.check_unroll(inputs, state, first)
        self.check_window(inputs)
        projected = F.linear(inputs, self.weight_ih, self.bias)
        outputs, end = unroll_stepwise(self._step, projected, state, first)  # type: ignore[arg-type]
        assert isinstance(end, UnrolledState)
        dated = _DatedState.of(end, end.history)
        dated.parameters = (
            self.weight_ih.detach().clone(),
            self.weight_hh.detach().clone(),
            self.bias.detach().clone(),
        )
        return outputs, dated

    def _step(self, projected: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        a_i, a_f, a_g, a_o = (projected + self.weight_hh * h.repeat(1, 4)).chunk(4, dim=-1)
        c = a_f.sigmoid() * c + a_i.sigmoid() * a_g.tanh()
        h = a_o.sigmoid() * c.tanh()
        return h, (h, c)

    def initial_sensitivity(self, batch_size: int) -> Sensitivity:
        """Zeros: an initial state depends on no parameter. 8 H (D + 2) numbers for each sequence."""
        zeros = self.weight_ih.new_zeros(2, batch_size, 4, self.output_size, self.input_size + 2)
        return Sensitivity(*zeros)

    def attach(self, state: State, sensitivity: Sensitivity) -> State:
        """Makes the parameters known to `state`: same values, and its gradient flows on into them as well.

            d loss / d parameters  +=  sum over sequences of
                d loss / d h * dh / d parameters + d loss / d c * dc / d parameters

        Args:
            state: (h, c), from `dni_rl.cut`, which receives its gradient as before.
            sensitivity: of this state.

        Returns:
            (h, c) to unroll from. First derivatives only.

        Raises:
            ValueError: if the sensitivity has another batch size or belongs to a core of other sizes.
        """
        self._check(sensitivity, len(state[0]))
        h, c = _Attach.apply(
            state[0], state[1], self.weight_ih, self.weight_hh, self.bias, sensitivity.h, sensitivity.c
        )
        return h, c

    @torch.no_grad()
    def advance(self, sensitivity: Sensitivity, inputs: Tensor, end: State) -> Sensitivity:
        """Carries the sensitivity from the start to the end of a window.

            S_t = J_t S_{t-1} + U_t,    J_t = d(h_t, c_t) / d(h_{t-1}, c_{t-1}),    U_t = d(h_t, c_t) / d parameters, immediate
            S_T = J_T ... J_1 S_0 + sum_t (J_T ... J_{t+1}) U_t

        J_t is a 2 by 2 block for each unit, 0 where an episode starts; U_t is an outer product of four factors with
        (x_t, h_{t-1}, 1). The second line needs one product of matrices for the whole window instead of T passes over
        S.

        Args:
            sensitivity: of the state before the window; unchanged.
            inputs: [T, B, D], those that were unrolled.
            end: the state that `unroll` returned, with its history and the parameters of that time.

        Returns:
            The sensitivity of `end`.

        Raises:
            ValueError: if shapes disagree or `end` is not from this core's `unroll`.
        """
        if not isinstance(end, _DatedState) or end.history.valid.shape != inputs.shape[:2]:
            raise ValueError("end: expected the state that `unroll` returned for these inputs, with its history")
        self._check(sensitivity, inputs.shape[1])
        inputs = inputs.detach()
        with out_of_autocast(inputs.device):
            like = end.parameters[0] if inputs.dtype in HALF_PRECISION else inputs
            return self._advance(sensitivity, inputs.to(like.dtype), end.history, *end.parameters)

    def _advance(
        self,
        sensitivity: Sensitivity,
        inputs: Tensor,
        history: StateHistory,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
    ) -> Sensitivity:
        T, B, _ = inputs.shape
        H = self.output_size
        valid = history.valid.unsqueeze(-1)  # [T, B, 1]
        # What lies before an episode's start does not reach the end, and may be anything: 0 times what is not finite is no zero.
        starts = (~valid).flip(0).cumsum(0).flip(0)  # in each step and later
        reaches = starts == ~valid  # none later
        inputs, h, c = (torch.where(reaches, x, 0.0) for x in (inputs, *history.states))
        v = weight_hh.view(4, H)
        gates = F.linear(inputs, weight_ih, bias).view(T, B, 4, H) + v * h.unsqueeze(2)
        i, f, o = (gates[:, :, q].sigmoid() for q in (0, 1, 3))
        g = gates[:, :, 2].tanh()
        tanh_c = (f * c + i * g).tanh()
        h_from_c = o * (1 - tanh_c.square())
        to_c = torch.stack([g * i * (1 - i), c * f * (1 - f), i * (1 - g.square())], dim=2)  # [T, B, 3, H]
        to_h = tanh_c * o * (1 - o)  # of the output gate
        c_h = (to_c * v[:3]).sum(2)
        jacobian = ((h_from_c * c_h + to_h * v[3], h_from_c * f), (c_h, f))  # rows h, c; columns h, c
        (hh, hc), (ch, cc) = ([entry * valid for entry in row] for row in jacobian)

        # (J_T ... J_{t+1}) U_t, without the factor (x_t, h_{t-1}, 1) that all of a step share: [2, T, B, 4, H]
        immediate = gates.new_empty(2, T, B, 4, H)
        one, zero = torch.ones_like(h[0]), torch.zeros_like(h[0])
        carried = [(one, zero), (zero, one)]  # J_T ... J_{t+1}, rows h, c
        for t in reversed(range(T)):
            for row, (from_h, from_c) in enumerate(carried):
                # a gate of c moves h as well, through c
                immediate[row, t, :, :3] = (from_h * h_from_c[t] + from_c).unsqueeze(1) * to_c[t]
                immediate[row, t, :, 3] = from_h * to_h[t]
            carried = [(p * hh[t] + q * ch[t], p * hc[t] + q * cc[t]) for p, q in carried]
        added = torch.cat(
            [
                torch.einsum("rtbqh,tbd->rbqhd", immediate, inputs),
                (immediate * h.unsqueeze(2)).sum(1).unsqueeze(-1),
                immediate.sum(1).unsqueeze(-1),
            ],
            dim=-1,
        )  # [2, B, 4, H, D + 2]
        goes_on = (starts[0] == 0).view(-1, 1, 1, 1)
        earlier = [torch.where(goes_on, s, 0.0) for s in (sensitivity.h, sensitivity.c)]
        for row, factors in enumerate(carried):
            for factor, before in zip(factors, earlier, strict=True):
                added[row].addcmul_(factor.unsqueeze(1).unsqueeze(-1), before)
        return Sensitivity(*added)

    def _check(self, sensitivity: Sensitivity, B: int) -> None:
        expected = (B, 4, self.output_size, self.input_size + 2)
        if not isinstance(sensitivity, Sensitivity):
            raise ValueError(
                f"sensitivity: found {type(sensitivity).__name__}, allowed what `advance` returned; begin with `initial_sensitivity`"
            )
        if not sensitivity.h.shape == sensitivity.c.shape == expected:
            raise ValueError(f"sensitivity: expected [B, 4, H, D + 2] = {expected}, got {tuple(sensitivity.h.shape)}")


class _Attach(torch.autograd.Function):
    """Identity in the state; its derivative with respect to the parameters is given."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, dh: Tensor, dc: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dh, dc)
        return h.view_as(h), c.view_as(c)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor | None, ...]:
        dh, dc = (
            # where nothing comes back, as from a state that an episode's start clears, the derivative may be anything
            torch.where((g != 0).unsqueeze(1).unsqueeze(-1), d, 0.0)
            for g, d in zip((grad_h, grad_c), ctx.saved_tensors, strict=True)
        )
        total = torch.einsum("bh,bqhf->qhf", grad_h, dh) + torch.einsum("bh,bqhf->qhf", grad_c, dc)
        total = total.flatten(0, 1)  # [4 H, D + 2]
        return grad_h, grad_c, total[:, :-2], total[:, -2], total[:, -1], None, None
