"""Checkpoints that survive a crash: written whole or not at all, checked by checksum when read, the one before kept.

A checkpoint file is a short header (a magic word and the SHA-256 of what follows) and what `torch.save` wrote. It holds
tensors and plain Python values only, so reading one executes no code, whoever made it.
"""

import hashlib
import io
import logging
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dni_rl.files import replace_file

CHECKPOINT_FILE = "checkpoint.pt"
PREVIOUS_FILE = "checkpoint.previous.pt"

_MAGIC = b"dni_rl checkpoint 1\n"
_HEADER_SIZE = len(_MAGIC) + hashlib.sha256().digest_size
_PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)

_log = logging.getLogger(__name__)


def save_checkpoint(directory: str | Path, state: dict[str, Any], step: int) -> Path:
    """Writes `state` to the folder; what was there becomes the previous checkpoint, unless it is damaged.

    Args:
        directory: made if missing.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        step: agent steps so far; `load_checkpoint` returns it as "step".

    Returns:
        The file written.

    Raises:
        ValueError: if `state` holds anything else, or another "step". The folder is then unchanged.
        OSError: if it cannot be written; what was there before stands.
    """
    if state.get("step", step) != step:
        raise ValueError(
            f"state['step']: found {state['step']}; expected the step of this checkpoint, {step}; leave it out"
        )
    state = {**state, "step": step}
    _check_storable(state, "state")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / CHECKPOINT_FILE
    # A damaged file must not push out the last good one. Between the two renames there is only a previous checkpoint, which
    # `load_checkpoint` then takes.
    former = None if _damage(current) else folder / PREVIOUS_FILE
    replace_file(current, _MAGIC + hashlib.sha256(payload).digest(), payload, former=former)
    return current


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint back.

    Args:
        path: a folder that `save_checkpoint` wrote to: its checkpoint, or with a warning the previous one where that is
            damaged; or one checkpoint file, and then exactly this one.

    Returns:
        The state, with "step"; tensors on the CPU.

    Raises:
        ValueError: if there is no usable checkpoint; the message tells what is wrong with each file.
    """
    path = Path(path)
    files = [path / CHECKPOINT_FILE, path / PREVIOUS_FILE] if path.is_dir() else [path]
    problems: list[str] = []
    for file in files:
        problem = _damage(file)
        if not problem:
            try:
                state = _read(file)
            except (pickle.UnpicklingError, RuntimeError) as error:
                # the checksum holds, so the file is as it was written: perhaps by another version of PyTorch
                problem = f"PyTorch {torch.__version__} cannot read it ({str(error).splitlines()[0]})"
        if not problem:
            if problems:
                _log.warning("%s; continuing from the previous checkpoint, step %d", "; ".join(problems), state["step"])
            return state
        problems.append(f"{file}: {problem}")
    previous = path.parent / PREVIOUS_FILE
    if path.is_dir():
        way_out = "start anew, or from another folder"
    elif previous.exists() and path != previous:
        way_out = "give the folder to fall back on the previous one"
    else:
        way_out = "give the folder of a run, or another checkpoint"
    raise ValueError(f"no usable checkpoint: {'; '.join(problems)}; {way_out}")


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Meanwhile an error means that a sound checkpoint holds something else: ValueError in one line, which those of PyTorch are not."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{path}: found a checkpoint of another program or version ({reason}); allowed one that scripts/train.py has written as it "
            "and the environment are now; start a new run"
        ) from error


def rng_state() -> dict[str, Any]:
    """The state of the global random generators of PyTorch, its GPUs, NumPy and Python, fit for a checkpoint."""
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    words_numpy = torch.from_numpy(np.asarray(keys).astype(np.int64))  # PyTorch supports uint32 only in part
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), words_numpy, int(position), int(has_gauss), float(cached_gaussian)],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss_next],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned, but for GPUs that this machine lacks: nothing draws there."""
    torch.set_rng_state(state["torch"].cpu())
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator.cpu(), index)
    name, keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss_next))


def _check_storable(value: Any, where: str) -> None:
    """Refuses what `torch.load(weights_only=True)` would refuse, while there is still something to save."""
    # Exact types: a NumPy float is a float by inheritance, and unreadable.
    if isinstance(value, Tensor) or type(value) in _PLAIN_TYPES:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{where}: found a key of type {type(key).__name__}; allowed str and int; convert it")
            _check_storable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_storable(item, f"{where}[{index}]")
    else:
        raise ValueError(
            f"{where}: found {type(value).__module__}.{type(value).__qualname__}; allowed tensors, numbers, strings, "
            "booleans, None, and dicts, lists and tuples of them; convert it, arrays with torch.from_numpy"
        )


def _damage(file: Path) -> str:
    """What is wrong with a file, or "" if it is as it was written."""
    try:
        with open(file, "rb") as stream:
            header = stream.read(_HEADER_SIZE)
            if not header.startswith(_MAGIC):
                return "not a checkpoint of this program" if header else "empty"
            digest = hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        return error.strerror or str(error)
    return "" if digest == header[len(_MAGIC) :] else "truncated or altered, the checksum does not match"


def _read(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        stream.seek(_HEADER_SIZE)
        return torch.load(io.BytesIO(stream.read()), map_location="cpu", weights_only=True)
