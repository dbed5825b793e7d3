"""Deep nets trained with any of `dni_rl.experiments.signals`: what their layers represent, and where the signals point."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rl.experiments import common, images, signals
from dni_rl.experiments.theory.artificial import losses_of
from dni_rl.experiments.theory.config import DISSIMILARITY_FILE, UnderstandingConfig

RIDGE = 1e-3  # penalty of `probe_error`, in units of a standardised feature's variance


def dissimilarity(features: Tensor) -> Tensor:
    """1 - the correlation of every two rows of features [N, H]: [N, N], between 0 and 2.

    Kriegeskorte et al., "Representational similarity analysis" (2008). Rows that are constant have correlation 0 with all.
    """
    centred = features.double() - features.double().mean(1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (1.0 - unit @ unit.T).clamp(0.0, 2.0)


def probe_error(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int) -> float:
    """Test error of a linear classifier of features, by least squares on one-hot labels.

    Args:
        train: features [N, H] and labels [N].
        test: the same.
        num_classes: C.
    """
    mean, std = train[0].double().mean(0), train[0].double().std(0)
    scale = torch.where(std > 0, std, 1.0)  # a unit that is always dead stays zero
    features, test_features = ((part[0].double() - mean) / scale for part in (train, test))
    target = F.one_hot(train[1], num_classes).double()
    gram = features.T @ features / len(features)
    gram += RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram, features.T @ (target - target.mean(0)) / len(features))
    predicted = (test_features @ weights + target.mean(0)).argmax(1)
    return (predicted != test[1]).double().mean().item()


def _mean_cosine(found: Tensor, true: Tensor) -> float:
    """Of rows [N, H], those whose `true` is zero left out; NaN where all are."""
    counts = true.norm(dim=1) > 0
    return F.cosine_similarity(found[counts], true[counts], dim=1, eps=1e-30).mean().item()


class Deep(common.Experiment):
    """A net of dense layers that learns from one signal: parts rdm and signals.

    Part rdm tells ten classes apart, with batch normalisation. Part signals tells odd from even labels, with one output and without
    normalisation, so that every signal is defined.

    Args:
        config: of the run.
        folder: where rdm puts its matrices.
    """

    config: UnderstandingConfig

    def __init__(self, config: UnderstandingConfig, folder: Path):
        super().__init__(config)
        self.folder = folder
        self.train, self.test = images.load(config.dataset, "train"), images.load(config.dataset, "test")
        self.batches = images.Batches(self.train, config.batch_size, config.seed, config.device)
        self.is_rdm = config.part == "rdm"
        num_outputs = images.NUM_CLASSES if self.is_rdm else 1
        torch.manual_seed(config.seed)  # the net depends on it alone, not on the arm
        num_inputs = self.train.images[0].numel()
        self.layers = signals.dense_layers(
            num_inputs, config.hidden_size, config.num_layers, num_outputs, normalize=self.is_rdm
        )
        self.signal = signals.make_signal(
            config.arm,
            self.layers,
            context_size=images.NUM_CLASSES if self.is_rdm else 1,
            critic_hidden_sizes=config.critic_hidden_sizes,
            seed=config.seed,
        )
        self.net = nn.Sequential(*self.layers).to(config.device)
        self.signal.to(config.device)
        self.optimizers = [torch.optim.Adam(self.net.parameters(), config.learning_rate)]
        if list(self.signal.parameters()):
            self.optimizers.append(torch.optim.Adam(self.signal.parameters(), config.critic_learning_rate))
        self.learning_rates = (config.learning_rate, config.critic_learning_rate)[: len(self.optimizers)]

    def _targets(self, labels: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The losses, and the context of critics, for labels [B]."""
        if self.is_rdm:
            context = F.one_hot(labels, images.NUM_CLASSES).float()
            return lambda outputs: F.cross_entropy(outputs, labels, reduction="none"), context
        y = (labels % 2).float().unsqueeze(1)
        return lambda outputs: losses_of("log", outputs, y), y

    def _wrong(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.is_rdm:
            return outputs.argmax(-1) != labels
        return (outputs.squeeze(-1) > 0) != (labels % 2 == 1)

    def update(self) -> dict[str, Tensor]:
        """Learns from the next batch; returns metrics, still on the device."""
        common.set_learning_rates(self.optimizers, self.learning_rates, self.config.learning_rate_drop_steps, self.step)
        x, labels = self.batches[self.step]
        losses, context = self._targets(labels)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        found = signals.signal_pass(self.layers, self.signal, x, losses, context)
        found.add_gradients()
        metrics = {
            "train/loss": found.losses.mean(),
            "train/error": self._wrong(found.outputs, labels).float().mean(),
        }
        for i, junction in enumerate(found.junctions):
            fit = self.signal.fit(i, junction)
            if fit is not None:
                fit.loss.backward()
                metrics[f"critic_{i + 1}/cosine"] = fit.cosine
                metrics[f"critic_{i + 1}/explained_variance"] = fit.explained_variance
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return metrics

    @torch.no_grad()
    def evaluate(self) -> float:
        """Share of test images told wrongly, batch normalisation in eval mode."""
        self.net.eval()
        try:
            wrong = 0
            for pictures, labels in zip(self.test.images.split(1000), self.test.labels.split(1000), strict=True):
                outputs = self.net(images.pixels(pictures.to(self.config.device)))
                wrong += int(self._wrong(outputs, labels.to(self.config.device)).sum())
        finally:
            self.net.train()
        return wrong / len(self.test.labels)

    def alignment(self) -> list[float]:
        """For each hidden layer, the mean cosine between the signal and the true gradient there, over as many test images as a batch has;
        those whose true gradient is zero, where the outputs are saturated, have none and are left out."""
        count = self.config.batch_size
        x = images.pixels(self.test.images[:count].to(self.config.device))
        losses, context = self._targets(self.test.labels[:count].to(self.config.device))
        found, true = (
            signals.signal_pass(self.layers, signal, x, losses, context).deltas
            for signal in (self.signal, signals.Backprop())
        )
        return [_mean_cosine(a, b) for a, b in zip(found, true, strict=True)]

    def evaluation(self) -> dict[str, float]:
        """Evaluates, and appends to the curve."""
        error = self.evaluate()
        if self.is_rdm:
            self.add_to_curve(error=error)
            return {"test/error": error}
        cosines = self.alignment()  # without normalisation a pass leaves nothing behind
        self.add_to_curve(error=error, cosines=cosines)
        return {"test/error": error} | {f"cosine/layer_{i}": cosine for i, cosine in enumerate(cosines, start=1)}

    def note(self) -> str:
        """The last test."""
        return f"test error {self.curve[-1]['error']:.1%}" if self.curve else ""

    def result(self) -> dict[str, Any]:
        """The final error with its curve; rdm: what each layer represents as well."""
        found = {"error": self.evaluate(), **self.account()}
        return found | ({"layers": self._representations()} if self.is_rdm else {"cosines": self.alignment()})

    @torch.no_grad()
    def _representations(self) -> list[dict[str, float]]:
        """For each hidden layer dissimilarities within and between classes, their distance to the last layer's, and the probe's error.

        The distance is that of Czarnecki et al. (2017): the L2 norm of the difference of the two layers' dissimilarities of
        images of one class.
        """
        device = self.config.device
        each = self.config.num_shown // images.NUM_CLASSES
        rows = torch.cat(
            [(self.test.labels == label).nonzero().flatten()[:each] for label in range(images.NUM_CLASSES)]
        )
        shown_labels = self.test.labels[rows]
        same = shown_labels.unsqueeze(1) == shown_labels
        off_diagonal = ~torch.eye(len(rows), dtype=torch.bool)
        count = self.config.num_probed
        labels = self.train.labels[:count].to(device), self.test.labels.to(device)
        h_train, h_test, h_shown = (
            images.pixels(pictures.to(device))
            for pictures in (self.train.images[:count], self.test.images, self.test.images[rows])
        )
        matrices, errors = [], []
        self.net.eval()
        try:
            for layer in self.layers[:-1]:
                h_train, h_test, h_shown = layer(h_train), layer(h_test), layer(h_shown)
                matrices.append(dissimilarity(h_shown).cpu())
                errors.append(probe_error((h_train, labels[0]), (h_test, labels[1]), images.NUM_CLASSES))
        finally:
            self.net.train()
        np.save(self.folder / DISSIMILARITY_FILE, torch.stack(matrices).numpy().astype(np.float16))
        return [
            {
                "within": matrix[same & off_diagonal].mean().item(),
                "between": matrix[~same].mean().item(),
                "distance_to_last": (matrix - matrices[-1])[same].norm().item(),
                "probe_error": error,
            }
            for matrix, error in zip(matrices, errors, strict=True)
        ]

    def parts(self) -> dict[str, Any]:
        """Net, signal and optimisers."""
        optimizers = {f"optimizer_{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        return {"net": self.net, "signal": self.signal, **optimizers}
