"""Where the numbers of a run go: a JSON-lines file for tables and figures, TensorBoard to look at, a progress bar or lines.

The x-axis is agent steps everywhere. Metrics arrive as tensors, straight from the learner, and are read here and
nowhere else.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from dni_rl.files import hold_run, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
# What the progress bar shows, by the name of the metric. tqdm itself shows the speed, in agent steps per second.
PROGRESS_METRICS = {"charts/episodic_return": "return", "charts/success_rate": "success"}
LINE_EVERY_SEC = 10.0  # at most, where there is no terminal for a bar
# TensorBoard's board of custom scalars: names of metrics, as regular expressions, by tab and chart. It is the same in every run, so
# that runs of different methods share their charts; a run shows what it has.
BOARD: dict[str, dict[str, tuple[str, ...]]] = {
    "charts": {
        "success rate": ("charts/success_rate",),
        "episodic return": ("charts/episodic_return",),
        "episodic length": ("charts/episodic_length",),
        "agent steps per second": ("charts/SPS",),
        "learning rate": ("charts/learning_rate",),
        "entropy cost": ("charts/entropy_cost",),
    },
    "losses": {
        "policy": ("losses/policy_loss",),
        "value": ("losses/value_loss",),
        "value: explained variance of the returns": ("losses/explained_variance",),
        "entropy": ("losses/entropy",),
        "gradient norm": ("losses/gradient_norm",),
        "auxiliary task": ("losses/auxiliary_loss",),
        "PPO: KL divergence from the policy that acted": ("losses/approx_kl",),
        "PPO: fraction clipped": ("losses/clip_fraction",),
    },
    "sg": {
        "cosine between prediction and target": ("sg/cosine",),
        "explained variance": ("sg/explained_variance",),
        "error critic's loss": ("sg/loss",),
        "norm of prediction over norm of target": ("sg/norm_ratio",),
        "norms of synthetic gradient and target": ("sg/synthetic_norm", "sg/target_norm"),
        "error critic's gradient norm": ("sg/gradient_norm",),
        "interfaces between levels: cosine": (r"sg/interface_\d+/cosine",),
        "interfaces between levels: explained variance": (r"sg/interface_\d+/explained_variance",),
        "interfaces between levels: loss": (r"sg/interface_\d+/loss",),
    },
    "credit": {
        "effective horizon, and window": ("credit/horizon", "credit/expected_horizon", "bptt/horizon"),
        "90 % of the norm delivered lies within": ("credit/lag_90",),
        "90 % of the true norm lies within": ("credit/true_lag_90",),
        "norm delivered over true norm": ("credit/delivered_share",),
    },
}


class MetricsWriter:
    """Writes metrics of a run to `metrics.jsonl`, TensorBoard and stderr: a progress bar, or now and then a line.

    Args:
        directory: the run's folder, made if missing.
        total_steps: agent steps of the whole run, for the progress bar.
        resume_step: agent steps of the checkpoint that the run continues from; what an interrupted run wrote after
            that is dropped, since it will be written again. None for a new run.
        tensorboard: whether to write TensorBoard events as well.
        progress: whether to show a progress bar, or lines where stderr is not a terminal.
        hyperparameters: nested dict of settings, shown in TensorBoard as text.
        lock: of the folder, where it is held already (`dni_rl.files.hold_run`); closed with the writer.

    Raises:
        ValueError: if another process writes there, a new run would mix with the metrics of an earlier one, or those to continue are
            missing or damaged.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        total_steps: int,
        resume_step: int | None = None,
        tensorboard: bool = True,
        progress: bool = True,
        hyperparameters: Mapping[str, Any] | None = None,
        lock: IO[bytes] | None = None,
    ):
        if tensorboard:  # first, because it may be missing, and a folder is taken once it has metrics
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        is_there = path.exists()
        # there may be none at step 0: a run may be cut off between its first checkpoint and its metrics
        if resume_step and not is_there:
            raise ValueError(
                f"{path}: not found, allowed the metrics of the run's first {resume_step} steps, which are continued; bring the file "
                "back, or make an empty one to go on without them"
            )
        if is_there and resume_step is None:
            raise ValueError(
                f"{path}: found metrics of an earlier run, allowed none; continue it with --resume, choose another --run.name, or remove "
                "its folder"
            )
        rows = [row for row in read_metrics(path) if row["step"] <= (resume_step or 0)] if is_there else []
        self._lock = lock or hold_run(folder)  # before anything is changed
        if is_there:
            _write_rows(path, rows)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`
        self._events = None
        if tensorboard:
            # TensorBoard hides what earlier event files hold from this step on
            purge_step = None if resume_step is None else resume_step + 1
            self._events = SummaryWriter(str(folder), purge_step=purge_step)
            if hyperparameters is not None and resume_step is None:
                text = yaml.safe_dump(dict(hyperparameters), sort_keys=False)
                self._events.add_text("hyperparameters", f"```\n{text}```", global_step=0)
            if resume_step is None:
                self._events.add_custom_scalars(_layout())
        self._step = resume_step or 0  # of the last row
        self._shown: dict[str, str] = {}
        self._progress = tqdm(
            total=total_steps,
            initial=self._step,
            unit=" steps",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (progress and sys.stderr.isatty()),
        )
        self._says = _Lines(folder, total_steps) if progress and not sys.stderr.isatty() else None
        if self._says is not None:
            self._says(self._step, {})

    def write(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Writes one row.

        Args:
            step: agent steps so far; at least that of the row before.
            metrics: scalars by name, as "group/name"; tensors have one element, on any device.

        Raises:
            ValueError: if a tensor is not a scalar, or `step` decreases.
            RuntimeError: if the writer is closed.
        """
        if self._file.closed:
            raise RuntimeError("write after close; make a new MetricsWriter with resume_step to continue")
        if step < self._step:
            raise ValueError(f"step: found {step} after {self._step}; expected agent steps, which never decrease")
        values = _read_scalars(metrics)
        # JSON has no NaN and no infinity; `read_metrics` turns null back into NaN
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()  # a row every few seconds: whoever watches the file sees it at once
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, global_step=step)
        for name, label in PROGRESS_METRICS.items():
            if math.isfinite(values.get(name, math.nan)):  # otherwise no episode ended: the last value stays
                self._shown[label] = f"{values[name]:.3g}"
        self._progress.set_postfix(self._shown, refresh=False)
        self._progress.update(step - self._step)
        self._step = step
        if self._says is not None:
            self._says(step, self._shown)

    @property
    def has_tensorboard(self) -> bool:
        """Whether figures and histograms go anywhere."""
        return self._events is not None

    def write_figure(self, step: int, name: str, figure: "Figure") -> None:
        """Shows a figure as an image in TensorBoard; without TensorBoard nothing happens.

        Args:
            step: agent steps so far.
            name: "group/name".
            figure: of Matplotlib; not changed.
        """
        if self._events is not None:
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            pixels = np.asarray(canvas.buffer_rgba())[..., :3]
            self._events.add_image(name, pixels, global_step=step, dataformats="HWC")

    def write_histogram(self, step: int, name: str, weights: Tensor) -> None:
        """Shows how weights are spread over 1, 2, ..., N as a histogram in TensorBoard; without TensorBoard nothing happens.

        Args:
            step: agent steps so far.
            name: "group/name".
            weights: [N], none negative; only their ratios are shown. Where all are 0, or one is not finite, there is no histogram.
        """
        if self._events is None:
            return
        share = weights.detach().double().cpu()
        share = share / share.sum()
        if share.isfinite().all():
            values = torch.arange(1.0, len(share) + 1, dtype=torch.float64)
            self._events.add_histogram_raw(
                name,
                min=0.5,
                max=len(share) + 0.5,
                num=1,
                sum=float((values * share).sum()),
                sum_squares=float((values.square() * share).sum()),
                bucket_limits=(values + 0.5).tolist(),
                bucket_counts=share.tolist(),
                global_step=step,
            )

    def flush(self) -> None:
        """Hands everything written so far to the operating system; call it with every checkpoint."""
        self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files. Calling it twice is fine."""
        if not self._file.closed:
            self._file.close()
            if self._events is not None:
                self._events.close()
            self._progress.close()
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, for tables and figures; NaN stands for every number that was not finite.

    Args:
        path: the file, or the run's folder. A last line cut off by a crash is left out.

    Raises:
        ValueError: if the file is missing or any other line is damaged.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: found no metrics; expected the folder of a run, or its {METRICS_FILE}")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith("\n"):
                break  # only the last line can lack its end
            row = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            row["step"] = int(row["step"])
            rows.append(row)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: found text that is not a row of metrics; repair or remove it"
            ) from None
    return rows


class _Lines:
    """Progress where there is no terminal: a line at the start, at the end, and between them every LINE_EVERY_SEC at most."""

    def __init__(self, folder: Path, total_steps: int):
        self._folder, self._total_steps, self._last = folder, total_steps, -math.inf

    def __call__(self, step: int, shown: Mapping[str, str]) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_SEC or step >= self._total_steps:
            self._last = now
            values = [f"{label} {value}" for label, value in shown.items()]
            where = f"{self._folder}: step {step:,} of {self._total_steps:,}"
            print(", ".join([where, *values]), file=sys.stderr, flush=True)


def _layout() -> dict[str, dict[str, list[Any]]]:
    """`BOARD` in TensorBoard's terms; it matches from the start of a name, and would go on after the end of a shorter one."""
    return {
        tab: {title: ["Multiline", [f"{name}$" for name in names]] for title, names in charts.items()}
        for tab, charts in BOARD.items()
    }


def _write_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Puts these rows in the place of those there."""
    kept = ({name: None if math.isnan(value) else value for name, value in row.items()} for row in rows)
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in kept))


def _read_scalars(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """All values as floats, in their order, with one synchronisation per device instead of one per metric."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"{name}: found a tensor of shape {tuple(value.shape)}; expected one number; reduce it first"
                )
            by_device.setdefault(value.device, []).append(name)
    read: dict[str, float] = {}
    for names in by_device.values():
        # float64 holds every count of steps exactly
        stacked = torch.stack([torch.as_tensor(metrics[name]).detach().reshape(()).to(torch.float64) for name in names])
        read.update(zip(names, stacked.tolist(), strict=True))  # the synchronisation with the host
    return {name: read[name] if name in read else float(metrics[name]) for name in metrics}
