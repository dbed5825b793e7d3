"""Feed-forward interfaces: cuts between the layers of any graph, so that a part learns without waiting for what lies above it.

An `Interface` is a module that stands where an activation h passes from one part of a model to the next. It sends h on as a leaf
of a new graph, and answers at once with the synthetic gradient M(h, context), which the part below backpropagates there and then.
When the true gradient, or that of the next interface, later arrives at the leaf, the critic M learns from it: Jaderberg et al.,
"Decoupled Neural Interfaces using Synthetic Gradients" (2017), sec. 2 and 3.1. A `DecoupledPass` is one forward and backward pass
with interfaces, whatever the shape of the graph:

interface_1, interface_2 = dni_rl.Interface(critic_1), dni_rl.Interface(critic_2)
with dni_rl.DecoupledPass(weight=1 / B, context=one_hot_labels) as decoupled:
    h = interface_1(layer_1(x))                             # layer_1 has its gradient here
    h = interface_2(layer_2(h))
    loss = cross_entropy(layer_3(h), labels)                # the mean over the batch: weight 1 / B
    loss.backward()                                         # layer_3
decoupled.fits[interface_1]                                 # leaving the block has filled the .grad of both critics

`DecoupledSequential` goes further: layers that update themselves, in random order, now and then, or on predicted inputs.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from dni_rl.cores.base import State
from dni_rl.critics import CriticFit, GradientCritic, check_unbounded, take_step
from dni_rl.precision import out_of_autocast
from dni_rl.targets import check_weight, per_sequence, scaled_weight


class InterfaceCritic(Protocol):
    """What an interface needs of its critic; those that regress on gradients, such as `dni_rl.GradientCritic`, have it."""

    def synthetic_gradient(self, state: State, context: Tensor | None = None) -> State:
        """The gradient to apply at each row of `state`, a tuple of one [B, ...] tensor, in units of one example's loss."""

    def fit(self, state: State, target: State, context: Tensor | None = None) -> CriticFit:
        """Regresses predictions on the gradients that arrived; `.loss` fills the critic's gradients."""


class Interface(nn.Module):
    """A cut in a model's graph. In the forward pass,

        decoupled   y = leaf(h);   dL/dh := weight * M(h, z), backpropagated into the part below at once;   M learns from dL/dy / weight
        locked      y = h;         dL/dh := dL/dy, which is backpropagation;                                M learns from dL/dy / weight

    With `critic=None` decoupled means that the part below gets no gradient at all (the paper's "no backprop" baseline).

    The critic is not a submodule: a model's `parameters()`, `state_dict()` and `to()` know nothing of the critics of its
    interfaces; `interface_critics(model)` collects them for an optimiser and a checkpoint of their own. Gradients sent by
    several interfaces, and along paths without one, add up below; gradients from several consumers of y add up in the target.

    Not for between a recurrent core and its losses in a window of `dni_rl.backward`: the synthetic gradient would reach the core in the
    forward pass, before that call looks at what comes back to the window's start, and its critic would learn of none.

    In eval mode and under `no_grad` an interface is the identity and learns nothing; in eval mode gradients pass it unchanged.

    Args:
        critic: predicts dL/dh, of `state_sizes=(features,)`; with `context_size` it is conditioned, cDNI. None for none.
        mode: "decoupled" or "locked"; may be changed at any time between passes.

    Raises:
        ValueError: if the mode is unknown, the critic cannot learn from gradients alone, or it has a `max_norm_ratio`: its
            yardstick, the gradient of the losses inside a window, does not exist between layers.
    """

    def __init__(self, critic: InterfaceCritic | None, mode: Literal["decoupled", "locked"] = "decoupled"):
        super().__init__()
        if mode not in ("decoupled", "locked"):
            raise ValueError(f"mode: found {mode!r}, allowed 'decoupled', 'locked'")
        _check_critic(critic)
        self.mode = mode
        self._critic = (critic,)  # the tuple keeps it from becoming a submodule

    @property
    def critic(self) -> InterfaceCritic | None:
        """The critic this interface answers with."""
        return self._critic[0]

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Sends h on, and in decoupled mode backpropagates the synthetic gradient into what computed it.

        Args:
            h: [B, ...], one row per example, floating point.
            context: [B, Z] for the critic; by default that of the pass, if the critic takes any.

        Returns:
            [B, ...], equal to h.

        Raises:
            ValueError: if h is not a batch of floating-point numbers, of vectors for a `GradientCritic`, or the critic refuses its shape
                or the context's.
            RuntimeError: if there is a critic, gradients are needed and no `DecoupledPass` is open, or inside of a backward pass
                (activation checkpointing).
        """
        if not self.training or not torch.is_grad_enabled():
            return h
        if not h.is_floating_point() or h.dim() < 2:
            raise ValueError(f"h: expected a floating-point tensor [B, ...], got {h.dtype} {tuple(h.shape)}")
        if isinstance(self.critic, GradientCritic) and h.dim() != 2:
            raise ValueError(
                f"h: expected [B, F] for a GradientCritic, got {tuple(h.shape)}; flatten it before the interface"
            )
        if self.critic is None:
            return h if self.mode == "locked" else h.detach()
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "Interface: called inside of a backward pass, as activation checkpointing does; the part below would get its gradient "
                "twice. Checkpoint the parts between interfaces instead"
            )
        current = _current_pass.get()
        if current is None:
            raise RuntimeError(
                "Interface: no pass is open; write `with dni_rl.DecoupledPass(...):` around forward and backward, or call model.eval()"
            )
        return current._cross(self, self.critic, h, context)

    def extra_repr(self) -> str:
        """The mode, for `print(model)`."""
        return f"mode={self.mode!r}" + ("" if self.critic is not None else ", critic=None")


def interface_critics(model: nn.Module) -> nn.ModuleList:
    """Collects the critics of all interfaces in a model, each once, in the order of `model.modules()`.

    For what the model's own methods leave out on purpose: an optimiser, `state_dict`, `to(device)`, `zero_grad` of the critics.
    """
    critics: list[Any] = [m.critic for m in model.modules() if isinstance(m, Interface)]
    return nn.ModuleList(dict.fromkeys(critic for critic in critics if isinstance(critic, nn.Module)))


@dataclass(slots=True)
class _Crossing:
    """One call of one interface: what was sent on, and what has come back."""

    state: Tensor
    context: Tensor | None
    weight: float | Tensor
    version: int  # of the state, which shares its memory with the model's activation
    sent: "_Sent | None" = None
    gradient: Tensor | None = None

    def arrive(self, gradient: Tensor | None) -> None:
        if self.sent is not None:
            self.sent.look()  # before a step that the caller may take with gradients that were set to zero
        if gradient is not None:  # autograd's undefined gradient is zero
            gradient = gradient.detach()
            self.gradient = gradient if self.gradient is None else self.gradient + gradient


class DecoupledPass:
    """One forward and backward pass through a model with interfaces: a context manager around both, and used once.

        sent below an interface     weight * stop_gradient(M(h, z))
        critic target               G = (what arrived at the leaf) / weight
        critic loss                 mean over rows ((M(h, z) - stop_gradient(G)) / rms)^2

    Inside, interfaces only add to `.grad` of the parts below them. On leaving without an exception, every critic is fitted to all
    that arrived at its interfaces, and the gradient of its regression is added to its own `.grad`; neither side reaches the other.
    The caller zeroes, clips and steps each. After an exception nothing is left behind but what `.grad` had already received.

    The units of critics are those of one example's loss. How examples are averaged cannot be seen from inside, so it is
    said once, by `weight`: 1 if the caller differentiates the sum over the batch, 1 / B for the mean, 1 / (N B) for the mean over N
    accumulated batches of B. With a gradient scaler the caller differentiates `scaler.scale(loss)`, and passes the scaler, too.

    A part below an interface has its gradient before the forward pass ends, so `zero_grad` belongs before the block, after it,
    or after the part's own optimiser step; a gradient that vanished in the middle is an error when the block ends.

    Args:
        weight: multiplies one example's loss in what the caller differentiates; by default 1 / len(h) at each interface, the mean
            over the batch. Above 0; of a tensor on an accelerator this is not checked, since it would have to wait.
        context: [B, Z] given to every interface whose critic has a `context_size`, unless it is called with its own. Where none of the
            critics has one it is an error.
        scaler: of mixed precision with float16. What is sent below and the critics' `.grad` are then multiplied by its scale, and all
            optimisers are stepped through it; targets and predictions are not, whatever the scale was before. Update it after the
            block, not inside.

    Attributes:
        fits: after the block, for each interface that was crossed, how well its critic met the gradients that arrived.

    Raises:
        ValueError: if the weight is not one positive number; on leaving, if there is a context and no critic that takes one.
        RuntimeError: on leaving, if no gradient arrived at an interface, a gradient sent was zeroed before it was used, or an
            activation was modified in place; on entering for the second time.
    """

    def __init__(
        self,
        *,
        weight: float | Tensor | None = None,
        context: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        check_weight(weight)
        self.fits: dict[Interface, CriticFit] = {}
        self._weight = weight
        self._context = context
        self._scaler = scaler
        self._crossings: dict[Interface, list[_Crossing]] = {}
        self._sent: dict[nn.Parameter, _Sent] = {}
        self._step_hook: RemovableHandle | None = None
        self._token: Token[DecoupledPass | None] | None = None
        self._used = False

    def __enter__(self) -> "DecoupledPass":
        if self._used:
            raise RuntimeError("DecoupledPass: entered for the second time; make a new one for every pass")
        self._used = True
        self._token = _current_pass.set(self)
        self._step_hook = register_optimizer_step_post_hook(self._note_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None and self._step_hook is not None
        _current_pass.reset(self._token)
        self._step_hook.remove()
        crossings, sent = self._crossings, self._sent.values()
        self._crossings, self._sent = {}, {}
        for s in sent:
            s.close()
        if kind is not None:
            return
        if any(s.vanished() for s in sent) and not _skipped_a_step(self._scaler):
            raise RuntimeError(
                "DecoupledPass: a gradient that an interface had sent below was zeroed inside the block without being used; call "
                "zero_grad before the block, after it, or after the optimiser's step"
            )
        if any(c.state._version != c.version for cs in crossings.values() for c in cs):
            raise _modified_in_place("DecoupledPass")
        if any(c.gradient is None for cs in crossings.values() for c in cs):
            raise RuntimeError(
                "DecoupledPass: no gradient arrived at an interface; call loss.backward() inside the block, and use "
                "what every interface returns"
            )
        if self._context is not None:
            _check_context_is_taken([interface.critic for interface in crossings])
        for interface, crossed in crossings.items():
            self.fits[interface] = _fit(interface, crossed, self._scaler)

    def _cross(self, interface: Interface, critic: InterfaceCritic, h: Tensor, context: Tensor | None) -> Tensor:
        if context is None and _takes_context(critic):
            context = self._context
        weight = scaled_weight(1.0 / max(len(h), 1) if self._weight is None else self._weight, h, self._scaler)
        crossing = _Crossing(h.detach(), None if context is None else context.detach(), weight, h._version)
        if interface.mode == "locked" and h.requires_grad:
            sent_on = h.view_as(h)  # a node of its own: h may have consumers that go around the interface
        else:
            sent_on = crossing.state.view_as(h).requires_grad_()
            if h.requires_grad:
                (synthetic,) = critic.synthetic_gradient((crossing.state,), crossing.context)
                # retained, since other paths may lead from the part below to a later loss; it lives no longer than h does
                # the weight first: half precision may lose the gradient before its scale is in it
                with out_of_autocast(h.device):
                    torch.autograd.backward([h], [(synthetic * weight).to(h.dtype)], retain_graph=True)
                parameter = _nearest_parameter(h)
                if parameter is not None:
                    crossing.sent = self._sent[parameter] = self._sent.get(parameter) or _Sent(parameter)
                    crossing.sent.expect_use()
        sent_on.register_hook(crossing.arrive)
        self._crossings.setdefault(interface, []).append(crossing)
        return sent_on

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._sent and parameter.grad is not None:
                    self._sent[parameter].stepped = True


_current_pass: ContextVar[DecoupledPass | None] = ContextVar("dni_rl_current_pass", default=None)


def _fit(interface: Interface, crossed: Sequence[_Crossing], scaler: torch.amp.GradScaler | None) -> CriticFit:
    assert interface.critic is not None
    states = torch.cat([c.state for c in crossed])
    targets = torch.cat([per_sequence((c.gradient,), c.weight)[0] for c in crossed if c.gradient is not None])
    contexts = [c.context for c in crossed if c.context is not None]
    fit = interface.critic.fit((states,), (targets,), torch.cat(contexts) if contexts else None)
    if fit.loss.requires_grad:  # not if the critic is frozen
        with out_of_autocast(states.device):
            (fit.loss if scaler is None else scaler.scale(fit.loss)).backward()
    return fit


def _nearest_parameter(h: Tensor) -> nn.Parameter | None:
    """Of those below h that have a gradient; None if there is none."""
    seen: set[Any] = set()
    nodes = [h.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parameter = getattr(node, "variable", None)  # of nodes that accumulate into a leaf
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad and parameter.grad is not None:
            return parameter
        nodes += [following for following, _ in reversed(node.next_functions)]
    return None


class _Sent:
    """A parameter that synthetic gradients have reached, to notice when they are wiped before they were used.

    What is below an interface may get gradients on other ways, too, around it or through a tied weight, and `.grad` is then there again.
    So it is looked at whenever something is about to be added, and remembered afterwards.
    """

    def __init__(self, parameter: nn.Parameter):
        self._parameter = parameter
        self._lost: list[bool | Tensor] = []
        self._remember(parameter)
        self.expect_use()
        self._handles = [
            parameter.register_hook(self.look),
            parameter.register_post_accumulate_grad_hook(self._remember),
        ]

    def expect_use(self) -> None:
        """A synthetic gradient is in `.grad`, and no optimiser has used it yet."""
        self.stepped = False  # told from outside, since fused optimisers do not raise the version
        self._version = self._parameter._version

    def look(self, _: Tensor | None = None) -> None:
        """Notes whether what is remembered has vanished; does not wait for the device."""
        self._lost.append(self._is_lost())

    def vanished(self) -> bool:
        """Whether it had whenever it was looked at, or has now. Waits for the device, but only if `.grad` was changed by hand."""
        self.look()
        return any(map(bool, self._lost))

    def close(self) -> None:
        """Leaves the parameter as it was found."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._gradient, self._gradient_version = parameter.grad, parameter.grad._version
            self._is_nonzero = parameter.grad.detach().any()

    def _is_lost(self) -> bool | Tensor:
        if self.stepped or self._parameter._version != self._version:  # its optimiser has used the gradient
            return False
        gradient = self._parameter.grad
        if gradient is None:
            return True
        if gradient is self._gradient and gradient._version == self._gradient_version:
            return False
        return self._is_nonzero & ~gradient.detach().any()


def _skipped_a_step(scaler: torch.amp.GradScaler | None) -> bool:
    """Whether it found an overflow since its last update, and left out a step that would have used a gradient. Waits for the device."""
    states = () if scaler is None or not scaler.is_enabled() else scaler._per_optimizer_states.values()
    return any(bool(found) for state in states for found in state["found_inf_per_device"].values())


def _modified_in_place(where: str) -> RuntimeError:
    return RuntimeError(
        f"{where}: an activation was modified in place after it had crossed an interface, so the critic would learn from "
        "the wrong one; use the form that makes a new tensor, for example ReLU without inplace=True"
    )


def _takes_context(critic: InterfaceCritic | nn.Module) -> bool:
    return getattr(critic, "context_size", 0) > 0


def _check_context_is_taken(critics: Sequence[InterfaceCritic | nn.Module | None]) -> None:
    """Raises ValueError if there are critics and none takes the context that was given: they would learn without it, in silence."""
    if any(c is not None for c in critics) and not any(c is not None and _takes_context(c) for c in critics):
        raise ValueError(
            "context: found one, allowed None where every critic has context_size=0; build critics with context_size=Z, or leave it out"
        )


def _check_critic(critic: InterfaceCritic | nn.Module | None) -> None:
    if critic is not None and not (hasattr(critic, "synthetic_gradient") and hasattr(critic, "fit")):
        raise ValueError(
            f"critic: found {type(critic).__name__}, which has no synthetic_gradient or no fit(state, target, context); between "
            "layers only gradients arrive, no losses, so take a critic that regresses on gradients, such as dni_rl.GradientCritic"
        )
    sizes = getattr(critic, "state_sizes", (1,))
    if len(sizes) != 1:
        raise ValueError(
            f"critic: found state_sizes {tuple(sizes)}, allowed one tensor; between layers an activation crosses, without a memory"
        )
    check_unbounded(critic)
    for name, wanted in (("target_lambda", 1.0), ("targets_per_window", None)):
        found = getattr(critic, name, wanted)
        if found != wanted:
            raise ValueError(
                f"critic: found {name}={found}, allowed {wanted}; between layers there is no window of steps"
            )


@dataclass(frozen=True, slots=True)
class SequentialReport:
    """What one `DecoupledSequential.update` did.

    Attributes:
        outputs: [B, ...] of the last layer, without gradient, before the update.
        losses: [B], without gradient.
        updated: for each layer, whether it learned this time: it was drawn, a gradient arrived at its parameters, and its optimiser
            took a step.
        fits: for each interface, from the lowest, how well its critic met the gradient that arrived; None where none did.
        input_losses: for each interface, the error of the synthetic input, where there was one that learned.
    """

    outputs: Tensor
    losses: Tensor
    updated: tuple[bool, ...]
    fits: tuple[CriticFit | None, ...]
    input_losses: tuple[Tensor | None, ...]


@dataclass(slots=True)
class _Activation:
    """What a layer keeps from its forward pass until it learns."""

    leaf: Tensor | None  # its input, cut from the layer below; None for the lowest
    output: Tensor
    version: int  # of the output, which the layer above may overwrite
    answer: Tensor | None = field(
        default=None
    )  # the gradient of its output in units of one example's loss, if there is any


class DecoupledSequential(nn.Module):
    """Layers one after the other, each with an optimiser of its own and an error critic above it. An update is, by mode,

        locked      forward, backpropagation, every layer steps; critics learn from the true gradients but are not used
        decoupled   forward; each layer that is drawn steps by the synthetic gradient of its output, and tells the critic
                    below what gradient arrived at its input
        unlocked    the same, and layer i computes on the synthetic input I_i(x) instead of the output of layer i - 1; I_i learns
                    to meet that output

    Jaderberg et al. (2017), sec. 3.1: the layers learn in random order, each with probability `update_probability` (their asynchronous
    updates), or without even waiting for the layer below (their complete unlock). Critics answer in the forward pass, before
    anything has learned, so with probability 1 the order makes no difference and a decoupled update is that of a chain of
    `Interface`s. A critic learns from every message that it gets, that is whenever the layer above it learns. An unlocked critic pairs
    what the layer below has really put out with the gradient that the layer above, on its synthetic input, has sent back.

    Every layer zeroes and steps its own gradients inside `update`; the mean over the batch is taken there, once. `forward` is
    the plain composition of the layers, for evaluation, in every mode.

    `state_dict` holds layers, critics, input models, all optimisers and the generator that draws who learns: after loading it, training
    continues as if it had never stopped.

    Args:
        layers: from input to output.
        critics: one between any two layers; None where the layer below is to get no gradient.
        optimizers: one for each layer, over its parameters; None for a layer that does not learn.
        critic_optimizers: one for each critic; None where there is no critic, or where it does not learn.
        mode: "locked", "decoupled" or "unlocked".
        update_probability: in (0, 1], of each layer at each update; 1 if locked.
        input_models: unlocked: one between any two layers, mapping the net's input to the input of the upper one.
        input_optimizers: one for each input model.
        seed: of the generator that draws order and probabilities.

    Raises:
        ValueError: if numbers of modules disagree, or mode and settings do, an optimiser is given twice, or one has no parameter of its
            module although that can learn.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        critics: Sequence[nn.Module | None],
        optimizers: Sequence[torch.optim.Optimizer | None],
        critic_optimizers: Sequence[torch.optim.Optimizer | None],
        *,
        mode: Literal["locked", "decoupled", "unlocked"] = "decoupled",
        update_probability: float = 1.0,
        input_models: Sequence[nn.Module] = (),
        input_optimizers: Sequence[torch.optim.Optimizer] = (),
        seed: int = 0,
    ):
        super().__init__()
        if mode not in ("locked", "decoupled", "unlocked"):
            raise ValueError(f"mode: found {mode!r}, allowed 'locked', 'decoupled', 'unlocked'")
        if not 0.0 < update_probability <= 1.0 or (mode == "locked" and update_probability != 1.0):
            raise ValueError(
                f"update_probability: found {update_probability}, allowed above 0 to 1, and 1 in mode 'locked'"
            )
        interfaces = len(layers) - 1
        expected = {
            "critics": (len(critics), interfaces),
            "optimizers": (len(optimizers), interfaces + 1),
            "critic_optimizers": (len(critic_optimizers), interfaces),
            "input_models": (len(input_models), interfaces if mode == "unlocked" else 0),
            "input_optimizers": (len(input_optimizers), len(input_models)),
        }
        for name, (found, wanted) in expected.items():
            if found != wanted:
                raise ValueError(f"{name}: expected {wanted} with {len(layers)} layers in mode {mode!r}, got {found}")
        for critic in critics:
            _check_critic(critic)
        self.layers = nn.ModuleList(layers)
        self.critics = nn.ModuleList([nn.Identity() if critic is None else critic for critic in critics])
        self.input_models = nn.ModuleList(input_models)
        self.mode = mode
        self.update_probability = update_probability
        self._has_critic = [critic is not None for critic in critics]
        self._optimizers = list(optimizers)
        self._critic_optimizers = list(critic_optimizers)
        self._input_optimizers = list(input_optimizers)
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._check_optimizers()

    def forward(self, x: Tensor) -> Tensor:
        """The composition of all layers, [B, ...] to [B, ...]; critics and input models play no part."""
        for layer in self.layers:
            x = layer(x)
        return x

    def update(
        self, x: Tensor, losses_of: Callable[[Tensor], Tensor], context: Tensor | None = None
    ) -> SequentialReport:
        """One forward pass; whoever is drawn learns from it.

        Args:
            x: [B, ...], the input of the net.
            losses_of: maps the last layer's output [B, ...] to losses [B], one per example, not reduced.
            context: [B, Z] for the critics that have a `context_size`, for example one-hot labels. Where there are critics and none has
                one it is an error.

        Returns:
            What happened. Nothing in it carries gradient.

        Raises:
            ValueError: if the batch is empty, losses are reduced, a critic refuses its shapes, or there is a context that no critic takes.
            RuntimeError: if gradients are switched off, or a layer modified its input in place.
        """
        if context is not None:
            _check_context_is_taken([c for c, there in zip(self.critics, self._has_critic, strict=True) if there])
        if not torch.is_grad_enabled():
            raise RuntimeError("update: gradients are switched off here; call it outside of torch.no_grad()")
        if not len(x):
            raise ValueError("x: found a batch of no examples; allowed at least one; leave out what is empty")
        activations = self._forward_pass(x, context)
        losses = losses_of(activations[-1].output)
        if losses.shape != (len(x),):
            raise ValueError(
                f"losses_of: expected one loss per example ({len(x)},), got {tuple(losses.shape)}; do not reduce"
            )
        weight = 1.0 / len(x)
        L = len(self.layers)
        fits: list[CriticFit | None] = [None] * (L - 1)
        input_losses: list[Tensor | None] = [None] * (L - 1)
        outputs = [activation.output.detach() for activation in activations]
        if self.mode == "locked":
            drawn = [True] * L
            updated = self._learn_locked(losses, weight)
        else:
            # On the host: who learns must not wait for a device.
            drawn = (torch.rand(L, generator=self._generator, device="cpu") < self.update_probability).tolist()
            updated = [False] * L
            for i in torch.randperm(L, generator=self._generator, device="cpu").tolist():
                if drawn[i]:
                    updated[i] = self._learn(i, activations[i], losses if i == L - 1 else None, weight)
        for i in range(L - 1):
            arrived = activations[i + 1].leaf
            if arrived is not None and arrived.grad is not None:  # nothing arrives from a layer that was not drawn
                fits[i] = self._fit_critic(i, outputs[i], per_sequence((arrived.grad,), weight)[0], context)
            if drawn[i + 1] and self.input_models:
                input_losses[i] = self._fit_input_model(i, x, outputs[i])
        return SequentialReport(outputs[-1], losses.detach(), tuple(updated), tuple(fits), tuple(input_losses))

    def _forward_pass(self, x: Tensor, context: Tensor | None) -> list[_Activation]:
        activations: list[_Activation] = []
        h = x
        for i, layer in enumerate(self.layers):
            leaf: Tensor | None = None
            if i and self.mode == "locked":
                if h.requires_grad:
                    h.retain_grad()
                else:
                    h = h.detach().requires_grad_()  # all below is frozen; the critic learns all the same
                leaf = h
            elif i:
                with torch.no_grad():
                    h = self.input_models[i - 1](x) if self.input_models else h
                leaf = h = h.detach().requires_grad_()
            try:
                h = layer(h)
            except RuntimeError as error:
                if leaf is not None and "leaf Variable that requires grad" in str(error):
                    raise _modified_in_place("update") from error
                raise
            activation = _Activation(leaf, h, h._version)
            if i < len(self.layers) - 1 and self.mode != "locked" and self._has_critic[i]:
                (activation.answer,) = self.critics[i].synthetic_gradient(  # type: ignore[operator]
                    (h.detach(),), self._context_for(i, context)
                )
            activations.append(activation)
        if any(
            there and a.output._version != a.version for a, there in zip(activations, self._has_critic, strict=False)
        ):
            raise _modified_in_place("update")
        return activations

    def _learn_locked(self, losses: Tensor, weight: float) -> list[bool]:
        """All layers by backpropagation; whether each of them has learned."""
        for optimizer in self._optimizers:
            if optimizer is not None:
                optimizer.zero_grad()
        if losses.requires_grad:
            with out_of_autocast(losses.device):
                torch.autograd.backward([losses], [torch.full_like(losses, weight)])
        return [_step_if_reached(optimizer) for optimizer in self._optimizers]

    def _learn(self, i: int, activation: _Activation, losses: Tensor | None, weight: float) -> bool:
        """Layer i, by itself: what it needs is its own activation and the answer that came with it. Whether it has learned."""
        optimizer = self._optimizers[i]
        if optimizer is not None:
            optimizer.zero_grad()
        output, answer = activation.output, activation.answer
        if losses is not None:
            output, answer = losses, torch.ones_like(losses)
        if answer is None or not output.requires_grad:
            return False
        with out_of_autocast(output.device):
            torch.autograd.backward([output], [(answer * weight).to(output.dtype)])
        return _step_if_reached(optimizer)

    def _fit_critic(self, i: int, state: Tensor, target: Tensor, context: Tensor | None) -> CriticFit | None:
        if not self._has_critic[i]:
            return None
        fit: CriticFit = self.critics[i].fit((state,), (target,), self._context_for(i, context))  # type: ignore[operator]
        take_step(self._critic_optimizers[i], fit.loss)
        return fit

    def _fit_input_model(self, i: int, x: Tensor, target: Tensor) -> Tensor:
        """|| I(x) - stop_gradient(h) ||^2, mean over rows and components."""
        loss = (self.input_models[i](x) - target).square().mean()
        take_step(self._input_optimizers[i], loss)
        return loss.detach()

    def _context_for(self, i: int, context: Tensor | None) -> Tensor | None:
        return context if _takes_context(self.critics[i]) else None

    def get_extra_state(self) -> dict[str, Any]:
        """Part of `state_dict`: optimisers and generator."""
        return {
            "generator": self._generator.get_state(),
            **{
                name: [None if o is None else o.state_dict() for o in optimizers]
                for name, optimizers in self._all_optimizers().items()
            },
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Part of `load_state_dict`."""
        self._generator.set_state(state["generator"].cpu())
        for name, optimizers in self._all_optimizers().items():
            for optimizer, saved in zip(optimizers, state[name], strict=True):
                if optimizer is not None:
                    # An optimiser would share its moments with those of `state`.
                    optimizer.load_state_dict(copy.deepcopy(saved))

    def _check_optimizers(self) -> None:
        """Raises ValueError where one would step more than once in an update, or never teach what it is given for."""
        seen: dict[torch.optim.Optimizer, tuple[str, nn.Module]] = {}
        holders: dict[Tensor, str] = {}
        modules = (self.layers, self.critics, self.input_models)
        for (kind, optimizers), taught in zip(self._all_optimizers().items(), modules, strict=True):
            for i, (optimizer, module) in enumerate(zip(optimizers, taught, strict=True)):
                if optimizer is None:
                    continue
                name = f"{kind}[{i}]"
                first, owner = seen.setdefault(optimizer, (name, module))
                # a critic or input model that stands in several places steps after a regression of its own in each
                if first != name and (owner is not module or kind == "optimizers"):
                    raise ValueError(
                        f"{name}: found the same object as {first}, allowed each once, since each takes a step of its own; "
                        "make one for each module"
                    )
                held = {p for group in optimizer.param_groups for p in group["params"]}
                trainable = {p for p in module.parameters() if p.requires_grad}
                twice = (
                    [holders[p] for p in held if holders.setdefault(p, name) != name] if kind == "optimizers" else []
                )
                if twice:
                    raise ValueError(
                        f"{name}: found a parameter that {twice[0]} holds as well, allowed each in one, since each takes a step "
                        "of its own; leave it out here, or give None for all but one place of a layer"
                    )
                if trainable and held.isdisjoint(trainable):
                    raise ValueError(
                        f"{name}: found none of the {len(trainable)} trainable parameters of its module, allowed an optimiser over them; "
                        "give optimisers in the order of their modules, or None for what does not learn"
                    )

    def _all_optimizers(self) -> Mapping[str, Sequence[torch.optim.Optimizer | None]]:
        return {
            "optimizers": self._optimizers,
            "critic_optimizers": self._critic_optimizers,
            "input_optimizers": self._input_optimizers,
        }


def _step_if_reached(optimizer: torch.optim.Optimizer | None) -> bool:
    """Takes the optimiser's step, and says whether a gradient had arrived at any of its parameters."""
    if optimizer is None:
        return False
    reached = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    optimizer.step()
    return reached
