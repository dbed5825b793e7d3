"""Identities between the signals, in figures."""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import dni_rl
from dni_rl.experiments import signals
from dni_rl.experiments.theory.artificial import losses_of


class Oracle:
    """A critic that answers with gradients it was given; for checks.

    Args:
        gradient: [B, H], of one example's loss.
    """

    def __init__(self, gradient: Tensor):
        self.gradient = gradient

    def synthetic_gradient(self, state: dni_rl.State, context: Tensor | None = None) -> dni_rl.State:
        """The given gradient."""
        return (self.gradient,)

    def fit(self, state: dni_rl.State, target: dni_rl.State, context: Tensor | None = None) -> dni_rl.CriticFit:
        """An oracle has nothing to learn."""
        raise RuntimeError("fit: an oracle learns nothing")


def identities() -> dict[str, float]:
    """How far each signal is from backpropagation where it must be the same: largest difference of gradients over the largest gradient.

    In float64, on random nets: an oracle critic in the middle, oracles at every layer, feedback alignment with the weights themselves,
    direct feedback alignment in a linear net with the products of all weights above, kickback with one hidden layer.
    """
    torch.manual_seed(0)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    losses: Callable[[Tensor], Tensor] = functools.partial(losses_of, "log", y=(y > 0).to(y.dtype))
    deep = [layer.double() for layer in signals.dense_layers(5, 6, 3, 1, normalize=True)]
    shallow = [layer.double() for layer in signals.dense_layers(5, 6, 1, 1, normalize=False)]
    linear = [signals.Layer(a, b, rectify=False).double() for a, b in itertools.pairwise((5, 6, 6, 1))]
    true = signals.signal_pass(deep, signals.Backprop(), x, losses).deltas
    feedback, direct = signals.make_signal("fa", deep), signals.make_signal("dfa", linear)
    for buffer, above in zip(feedback.buffers(), deep[1:], strict=True):
        buffer.copy_(above.linear.weight.detach())
    product = torch.eye(1, dtype=torch.float64)
    for buffer, above in zip(reversed(list(direct.buffers())), reversed(linear[1:]), strict=True):
        product = product @ above.linear.weight.detach()
        buffer.copy_(product)
    checks: dict[str, tuple[list[signals.Layer], signals.Signal]] = {
        "sg_prop, oracle in the middle": (deep, signals.SyntheticGradients([None, Oracle(true[1]), None])),
        "sg, oracles everywhere": (deep, signals.SyntheticGradients([Oracle(delta) for delta in true])),
        "fa, feedback = weights": (deep, feedback),
        "dfa, linear net, feedback = products of weights": (linear, direct),
        "kickback, one hidden layer": (shallow, signals.make_signal("kickback", shallow)),
    }
    found = {}
    for name, (layers, signal) in checks.items():
        wanted, given = (signals.signal_pass(layers, one, x, losses).gradients for one in (signals.Backprop(), signal))
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        found[name] = max((given[p] - wanted[p]).abs().max().item() for p in wanted) / largest
    return found
