"""The recurrent actor-critic network: torso -> core -> policy and value heads.

The torso sees one observation at a time and is applied to a whole rollout at once; only the core steps through time.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dni_rl.cores import Core, State, clear_state


class ScaledImages(nn.Module):
    """uint8 images [N, C, Y, X] to float32 in [0, 255 / scale], in the layout that the next layer is fast with."""

    def __init__(self, scale: float, memory_format: torch.memory_format = torch.channels_last):
        super().__init__()
        self.scale, self.memory_format = scale, memory_format

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, Y, X] uint8 -> float32."""
        return images.to(torch.float32, memory_format=self.memory_format).mul_(1.0 / self.scale)


def _orthogonal(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Linear | nn.Conv2d:
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(input_size: int, sizes: Sequence[int]) -> nn.Sequential:
    """Fully connected layers with ReLU, [..., input_size] -> [..., sizes[-1]]; nothing at all for sizes ()."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [_orthogonal(nn.Linear(input_size, size), math.sqrt(2.0)), nn.ReLU()]
        input_size = size
    return nn.Sequential(*layers)


class Torso(nn.Module):
    """Encodes observations, [..., *observation_shape] -> [..., output_size]; leading dimensions are kept.

    Args:
        net: maps [N, *observation_shape] to [N, output_size].
        observation_shape: shape of one observation.
        output_size: width of the features.
        flat: whether `net` takes vectors with any leading dimensions; spares reshaping in the time loop.
    """

    def __init__(self, net: nn.Sequential, observation_shape: Sequence[int], output_size: int, *, flat: bool = False):
        super().__init__()
        self.net = net
        self.observation_shape = tuple(observation_shape)
        self.output_size = output_size
        self.flat = flat

    def forward(self, observation: Tensor) -> Tensor:
        """[..., *observation_shape] -> [..., output_size]."""
        if self.flat:
            return self.net(observation)
        leading = observation.shape[: observation.dim() - len(self.observation_shape)]
        return self.net(observation.reshape(-1, *self.observation_shape)).view(*leading, self.output_size)


def mlp_torso(input_shape: Sequence[int], sizes: Sequence[int], scale: float | None = None) -> Torso:
    """Fully connected torso.

    Args:
        input_shape: shape of one observation.
        sizes: widths of the layers; () only flattens.
        scale: divides uint8 observations by this; None for float observations.
    """
    width = math.prod(input_shape)
    net = mlp(width, sizes)
    output_size = sizes[-1] if sizes else width
    if len(input_shape) == 1 and scale is None:
        return Torso(net, input_shape, output_size, flat=True)
    front: list[nn.Module] = [] if scale is None else [ScaledImages(scale, torch.contiguous_format)]
    return Torso(nn.Sequential(*front, nn.Flatten(), *net), input_shape, output_size)


# (filters, kernel, stride) of each layer
CONVOLUTIONS = {
    # Mnih et al., "Human-level control through deep reinforcement learning" (2015)
    "conv": ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
    # Mnih et al., "Asynchronous methods for deep reinforcement learning" (2016): about a quarter of the work
    "conv_small": ((16, 8, 4), (32, 4, 2)),
}


def conv_torso(
    input_shape: Sequence[int], layers: Sequence[tuple[int, int, int]], sizes: Sequence[int], scale: float = 255.0
) -> Torso:
    """Convolutions and then fully connected layers, with ReLU, [N, C, Y, X] -> [N, sizes[-1]].

    Args:
        input_shape: (C, Y, X) of a uint8 image, at least 36 x 36 pixels.
        layers: (filters, kernel, stride) of each convolution, as in `CONVOLUTIONS`.
        sizes: widths of the fully connected layers; () only flattens what the convolutions find.
        scale: divides the images.
    """
    modules: list[nn.Module] = [ScaledImages(scale)]
    channels = input_shape[0]
    for filters, kernel, stride in layers:
        modules += [_orthogonal(nn.Conv2d(channels, filters, kernel, stride), math.sqrt(2.0)), nn.ReLU()]
        channels = filters
    convolutions = nn.Sequential(*modules, nn.Flatten())
    with torch.no_grad():
        width = convolutions(torch.zeros(1, *input_shape, dtype=torch.uint8)).shape[-1]
    # channels last: the same numbers, on a CPU in half the time
    torso = Torso(convolutions.extend(mlp(width, sizes)), input_shape, sizes[-1] if sizes else width)
    return torso.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class ActorCritic(nn.Module):
    """Policy and value over a recurrent core.

        x_t = [torso(observation_t), onehot(action_{t-1}), reward_{t-1}],   (y_t, s_{t+1}) = core(x_t, s_t)
        logits_t = policy_head(y_t),   value_t = value_head(y_t)

    With `privileged_size` the value is that of history and hidden state together, value_head([y_t, z_t]), which stays unbiased where a
    value of the hidden state alone would not (Pinto et al., "Asymmetric actor critic for image-based robot learning", 2018; Baisero &
    Amato, "Unbiased asymmetric reinforcement learning under partial observability", 2022). The policy never sees z_t.

    Args:
        torso: maps observations [..., *observation_shape] to features [..., F].
        core: a core with `input_size` = F (+ num_actions) (+ 1).
        num_actions: A.
        previous_action: feed the last action to the core, as a one-hot vector; zeros where an episode starts.
        previous_reward: feed the last reward to the core, clipped to [-1, 1]; zero where an episode starts.
        head_sizes: widths of a hidden layer stack in front of each head; () for none.
        privileged_size: Z, width of the privileged context that the value function is told; 0 for none.
    """

    one_hot: Tensor

    def __init__(
        self,
        torso: Torso,
        core: Core,
        num_actions: int,
        *,
        previous_action: bool = True,
        previous_reward: bool = True,
        head_sizes: Sequence[int] = (),
        privileged_size: int = 0,
    ):
        super().__init__()
        self.torso = torso
        self.core = core
        self.num_actions = num_actions
        self.previous_action = previous_action
        self.previous_reward = previous_reward
        self.privileged_size = privileged_size
        self.register_buffer("one_hot", torch.eye(num_actions), persistent=False)
        width = head_sizes[-1] if head_sizes else core.output_size
        # A nearly uniform first policy: Andrychowicz et al., "What matters for on-policy deep actor-critic methods?" (2021), sec. 3.2.
        self.policy_head = mlp(core.output_size, head_sizes).append(_orthogonal(nn.Linear(width, num_actions), 0.01))
        told = core.output_size + privileged_size
        self.value_head = mlp(told, head_sizes).append(_orthogonal(nn.Linear(width if head_sizes else told, 1), 1.0))

    def core_inputs(self, observation: Tensor, action_tm1: Tensor, reward: Tensor, first: Tensor) -> Tensor:
        """Everything the core reads, for any leading shape [N] or [T, B]: [..., D].

        Args:
            observation: [..., *observation_shape].
            action_tm1: [...] int64, action that led here.
            reward: [...], reward that came with this observation.
            first: [...] bool; action and reward of another episode are hidden.
        """
        features = self.torso(observation)
        extras = []
        if self.previous_action:
            extras.append(F.embedding(action_tm1, self.one_hot))
        if self.previous_reward:
            extras.append(reward.clamp(-1.0, 1.0).unsqueeze(-1))
        if not extras:
            return features
        inputs = torch.cat([features, *extras], dim=-1)
        inputs[..., features.shape[-1] :].masked_fill_(first.unsqueeze(-1), 0.0)
        return inputs

    def observed(self, observation: Tensor) -> Tensor:
        """What a critic is told of observations, [..., observed_size]: vectors as they are, of others the torso's features."""
        return observation if self.torso.flat else self.torso(observation)

    @property
    def observed_size(self) -> int:
        """Width of `observed`."""
        return self.torso.observation_shape[0] if self.torso.flat else self.torso.output_size

    def heads(self, outputs: Tensor, privileged: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [..., A] and values [...] of core outputs [..., H]; see `value_of`."""
        return self.policy_head(outputs), self.value_of(outputs, privileged)

    def act(
        self, observation: Tensor, action_tm1: Tensor, reward: Tensor, first: Tensor, state: State
    ) -> tuple[Tensor, Tensor, State]:
        """One step of B environments: logits [B, A], the core's output [B, H], of which `value_of` gives the value, and the next state.
        Clears the state where an episode starts.
        """
        outputs, next_state = self.core(
            self.core_inputs(observation, action_tm1, reward, first), clear_state(state, first)
        )
        return self.policy_head(outputs), outputs, next_state

    def value_of(self, outputs: Tensor, privileged: Tensor | None = None) -> Tensor:
        """Values [...] of core outputs [..., H] and, where the value function is told it, privileged context [..., Z].

        Raises:
            ValueError: if there is a context and the value function takes none, or the reverse, or it is of another size.
        """
        size = 0 if privileged is None else privileged.shape[-1]
        if size != self.privileged_size:
            raise ValueError(
                f"privileged: found a context of {size} numbers; allowed {self.privileged_size}, as the value function was built with; "
                "give what model.privileged_value asks for, the environment's context"
            )
        if privileged is not None:
            outputs = torch.cat([outputs, privileged], dim=-1)
        return self.value_head(outputs).squeeze(-1)

    def unroll(
        self,
        observation: Tensor,
        action_tm1: Tensor,
        reward: Tensor,
        first: Tensor,
        state: State,
        privileged: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """Steps over [T, B]: logits [T, B, A], values [T, B], and the state after the last step."""
        outputs, next_state = self.core.unroll(self.core_inputs(observation, action_tm1, reward, first), state, first)
        return *self.heads(outputs, privileged), next_state
