"""Where the gradient of a hidden layer comes from: backpropagation and its replacements behind one interface.

Czarnecki et al., "Understanding Synthetic Gradients and Decoupled Neural Interfaces" (2017), put synthetic gradients and older
replacements of backpropagation side by side: each is a rule for the error signal delta_i at the activation h_i between two layers.
With W the weights of the layer above, a = W h_i + b what it computes before its nonlinearity, and e the loss' gradient at the output,

    backprop    delta_i = W^T dL/da                   Jacobian of the layer above
    sg          delta_i = M_i(h_i, z)                 a critic at every layer; learns from W^T dL/da
    sg_prop     as sg at one interface in the middle, as backprop at the others: below it, what the critic said is propagated
    fa          delta_i = B_i^T dL/da                 fixed random B_i; Lillicrap et al., "Random feedback weights support learning" (2014)
    dfa         delta_i = A_i^T e                     fixed random A_i; Nøkland, "Direct feedback alignment" (2016)
    kickback    delta_i = e * sum over active units k above of W_k      Balduzzi et al., "Kickback cuts backprop's red-tape" (2015)

where dL/da is what the signal above makes of it. A `Signal` sees a `Junction` and answers with delta_i; `signal_pass` is the one
loop over layers that all of them share.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dni_rl.critics import CriticFit, GradientCritic
from dni_rl.feedforward import InterfaceCritic

SIGNALS = ("backprop", "sg", "sg_prop", "fa", "dfa", "kickback")


class Layer(nn.Module):
    """A linear map, batch normalisation and ReLU; the last two only where wanted.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        normalize: whether to normalise over the batch.
        rectify: whether to apply ReLU.
    """

    def __init__(self, inputs: int, outputs: int, *, normalize: bool = False, rectify: bool = True):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs) if normalize else nn.Identity()
        self.rectify = rectify

    def after(self, a: Tensor) -> Tensor:
        """The layer's output [B, H] from that of its linear map [B, H]."""
        a = self.norm(a)
        return a.relu() if self.rectify else a

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, outputs]."""
        return self.after(self.linear(x))


def dense_layers(
    num_inputs: int, hidden_size: int, num_hidden: int, num_outputs: int, *, normalize: bool
) -> list[Layer]:
    """Hidden layers and a linear output layer; He initialisation, which keeps many ReLU layers alive."""
    widths = [num_inputs, *[hidden_size] * num_hidden]
    hidden = [Layer(a, b, normalize=normalize) for a, b in itertools.pairwise(widths)]
    for layer in hidden:
        nn.init.kaiming_normal_(layer.linear.weight, nonlinearity="relu")
        nn.init.zeros_(layer.linear.bias)
    return [*hidden, Layer(hidden_size, num_outputs, rectify=False)]


@dataclass(frozen=True, slots=True)
class Junction:
    """What there is to know at an activation, once the layer above has learned. In units of one example's loss; without gradient.

    Attributes:
        h: [B, H], the activation.
        weight: [P, H], of the linear map above; must not be changed before the pass has ended.
        upper_gradient: [B, P], dL/da at that map's output, as the signal above it has it.
        active: [B, P] bool, where the layer above lets gradients through.
        error: [B, C], the true gradient at the net's output.
        context: [B, Z] or None.
    """

    h: Tensor
    weight: Tensor
    upper_gradient: Tensor
    active: Tensor
    error: Tensor
    context: Tensor | None

    @property
    def pulled_back(self) -> Tensor:
        """[B, H], W^T dL/da: what backpropagation would send, and what critics learn from."""
        return self.upper_gradient @ self.weight


class Signal(nn.Module, ABC):
    """A rule for the gradient at every hidden activation. What it learns or holds are its own parameters and buffers."""

    @abstractmethod
    def forward(self, i: int, junction: Junction) -> Tensor:
        """The gradient [B, H] of one example's loss at activation i, counted from the input; without gradient itself."""

    def fit(self, i: int, junction: Junction) -> CriticFit | None:
        """Learns from what has arrived at activation i; `.loss` fills the signal's gradients. None if there is nothing to learn."""
        return None


class Backprop(Signal):
    """The chain rule."""

    def forward(self, i: int, junction: Junction) -> Tensor:
        """W^T dL/da."""
        return junction.pulled_back


class SyntheticGradients(Signal):
    """A critic at some activations or at all, backpropagation at the others.

    Args:
        critics: one for each activation, of `state_sizes=(H,)`; None where gradients are propagated.
    """

    def __init__(self, critics: Sequence[InterfaceCritic | None]):
        super().__init__()
        self._critics = tuple(critics)
        self.critics = nn.ModuleDict()  # None cannot be one of a ModuleList
        for i, critic in enumerate(critics):
            if isinstance(critic, nn.Module):
                self.critics[str(i)] = critic

    def forward(self, i: int, junction: Junction) -> Tensor:
        """M_i(h_i, z), or W^T dL/da where there is no critic."""
        critic = self._critics[i]
        if critic is None:
            return junction.pulled_back
        return critic.synthetic_gradient((junction.h,), junction.context)[0]

    def fit(self, i: int, junction: Junction) -> CriticFit | None:
        """Regresses the critic on W^T dL/da, itself made of the signal above."""
        critic = self._critics[i]
        return None if critic is None else critic.fit((junction.h,), (junction.pulled_back,), junction.context)


class FeedbackAlignment(Signal):
    """Fixed random weights in place of those above.

    Args:
        layers: of the net; feedback has the shape of their weights [P, H], and the standard deviation H^-1/2.
        generator: draws them.
    """

    def __init__(self, layers: Sequence[Layer], generator: torch.Generator):
        super().__init__()
        for i, layer in enumerate(layers[1:]):
            weight = layer.linear.weight
            random = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            self.register_buffer(f"feedback_{i}", random * weight.shape[1] ** -0.5)

    def forward(self, i: int, junction: Junction) -> Tensor:
        """B_i^T dL/da."""
        return junction.upper_gradient @ self.get_buffer(f"feedback_{i}")


class DirectFeedbackAlignment(Signal):
    """Fixed random weights from the output's error to every activation.

    Args:
        layers: of the net; feedback to H units has the standard deviation H^-1/2.
        generator: draws them.
    """

    def __init__(self, layers: Sequence[Layer], generator: torch.Generator):
        super().__init__()
        num_outputs = len(layers[-1].linear.weight)
        for i, layer in enumerate(layers[1:]):
            weight = layer.linear.weight
            random = torch.randn(num_outputs, weight.shape[1], generator=generator, dtype=weight.dtype)
            self.register_buffer(f"feedback_{i}", random * weight.shape[1] ** -0.5)

    def forward(self, i: int, junction: Junction) -> Tensor:
        """A_i^T e."""
        return junction.error @ self.get_buffer(f"feedback_{i}")


class Kickback(Signal):
    """The output's error times a unit's influence, the sum of its weights to the active units of the next layer.

        delta_j = e * sum_k W_kj [unit k is active]

    Balduzzi et al., "Kickback cuts backprop's red-tape: biologically plausible credit assignment in neural networks" (2015): what
    backpropagation is if the influence on the output is cut after one layer. Defined for one output.

    Args:
        layers: of the net.

    Raises:
        ValueError: if the net has more than one output.
    """

    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        num_outputs = len(layers[-1].linear.weight)
        if num_outputs != 1:
            raise ValueError(
                f"kickback: found {num_outputs} outputs, allowed 1; it multiplies the one error of a net that has one output"
            )

    def forward(self, i: int, junction: Junction) -> Tensor:
        """The error times the influence."""
        return junction.error * (junction.active.to(junction.weight.dtype) @ junction.weight)


def make_signal(
    name: str,
    layers: Sequence[Layer],
    *,
    context_size: int = 0,
    critic_hidden_sizes: Sequence[int] = (),
    seed: int = 0,
) -> Signal:
    """A signal for a net by its name.

    Args:
        name: one of `SIGNALS`.
        layers: `Layer`s from input to output.
        context_size: Z, of critics.
        critic_hidden_sizes: of critics.
        seed: of random feedback.

    Raises:
        ValueError: if the name is unknown, or the signal is not defined for the net.
    """
    if name not in SIGNALS:
        raise ValueError(f"signal: found {name!r}, allowed {', '.join(SIGNALS)}")
    generator = torch.Generator().manual_seed(seed)
    if name == "backprop":
        return Backprop()
    if name == "fa":
        return FeedbackAlignment(layers, generator)
    if name == "dfa":
        return DirectFeedbackAlignment(layers, generator)
    if name == "kickback":
        return Kickback(layers)
    middle = (len(layers) - 1) // 2
    return SyntheticGradients(
        [
            GradientCritic(
                state_sizes=(layer.linear.weight.shape[1],), hidden_sizes=critic_hidden_sizes, context_size=context_size
            )
            if name == "sg" or i == middle
            else None
            for i, layer in enumerate(layers[1:])
        ]
    )


@dataclass(frozen=True, slots=True)
class Pass:
    """What one `signal_pass` found; nothing in it carries gradient.

    Attributes:
        outputs: [B, C] of the net.
        losses: [B].
        deltas: for each hidden activation the signal [B, H], in units of one example's loss.
        junctions: for each hidden activation what the signal was made of.
        gradients: for each parameter of the layers the mean over examples.
    """

    outputs: Tensor
    losses: Tensor
    deltas: tuple[Tensor, ...]
    junctions: tuple[Junction, ...]
    gradients: dict[nn.Parameter, Tensor]

    def add_gradients(self) -> None:
        """Adds the gradients to `.grad`."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def signal_pass(
    layers: Sequence[Layer],
    signal: Signal,
    x: Tensor,
    losses_of: Callable[[Tensor], Tensor],
    context: Tensor | None = None,
) -> Pass:
    """One forward pass, and every layer's gradient given the signal at its output.

    The output layer has the true gradient; every layer below differentiates itself, batch normalisation included, from the delta at
    its own output. No `.grad` changes, and no signal learns; that is up to the caller.

    Args:
        layers: `Layer`s from input to output.
        signal: asked from the highest activation down.
        x: [B, D].
        losses_of: outputs [B, C] to losses [B], not reduced.
        context: [B, Z] for critics.

    Raises:
        ValueError: if losses are reduced.
    """
    tape: list[tuple[Tensor, Tensor, Tensor]] = []
    h = x.detach()
    for layer in layers:
        a = layer.linear(h)
        out = layer.after(a)
        tape.append((h, a, out))
        h = out.detach()
    outputs = h.requires_grad_()
    losses = losses_of(outputs)
    if losses.shape != (len(x),):
        raise ValueError(
            f"losses_of: expected one loss per example ({len(x)},), got {tuple(losses.shape)}; do not reduce"
        )
    (error,) = torch.autograd.grad(losses.sum(), outputs)
    delta = error
    deltas: list[Tensor] = []
    junctions: list[Junction] = []
    gradients: dict[nn.Parameter, Tensor] = {}
    for i in reversed(range(len(layers))):
        layer = layers[i]
        h, a, out = tape[i]
        parameters = list(layer.parameters())
        upper_gradient, *found = torch.autograd.grad(out, [a, *parameters], delta)
        gradients |= {parameter: gradient / len(x) for parameter, gradient in zip(parameters, found, strict=True)}
        if i:
            active = out.detach() > 0 if layer.rectify else torch.ones_like(out, dtype=torch.bool)
            junction = Junction(h, layer.linear.weight.detach(), upper_gradient, active, error, context)
            delta = signal(i - 1, junction).detach()
            deltas.insert(0, delta)
            junctions.insert(0, junction)
    return Pass(outputs.detach(), losses.detach(), tuple(deltas), tuple(junctions), gradients)
