"""Settings of every test, and what several of them need."""

import os
import signal

import pytest
import torch

# What tests compute is small, and threads that wait for each other on a busy machine cost a hundred times what they gain.
torch.set_num_threads(1)


class HostGenerator(torch.Generator):
    """A random stream of the host, whatever the device."""

    def __new__(cls, device: object = None) -> torch.Generator:  # type: ignore[misc]
        return super().__new__(cls)


class UnfusedAdam(torch.optim.Adam):
    """Adam of single operations."""

    def __init__(self, *arguments, fused=False, **settings):
        super().__init__(*arguments, **settings)


@pytest.fixture
def device_without_values(monkeypatch):
    """Makes the device "meta" usable for learning: tensors have shapes there and no values.

    What the host would read is not there, so code that gets through waits for its device nowhere; and most operations refuse to mix
    it with what was made on the host. Replaced is what this device lacks beside values: random streams, autocast, fused optimisers.
    """
    monkeypatch.setattr("torch.Generator", HostGenerator)
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("torch.optim.Adam", UnfusedAdam)


@pytest.fixture
def on_disk(monkeypatch):
    """Names of the files that were on the disk before they took their place, which then was on the disk as well.

    What a power cut leaves otherwise, an empty file under the right name, cannot be had here.
    """
    sync, replace, synced, awaited, found = os.fsync, os.replace, set(), {}, []

    def noted_sync(descriptor):
        sync(descriptor)
        inode = os.fstat(descriptor).st_ino
        synced.add(inode)
        found.extend(awaited.pop(inode, ()))

    def noted_replace(source, target):
        is_there = os.stat(source).st_ino in synced
        replace(source, target)
        if is_there:
            awaited.setdefault(os.stat(os.path.dirname(target)).st_ino, []).append(os.path.basename(target))

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return found


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where a shell that started the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
