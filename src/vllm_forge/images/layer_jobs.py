"""A line's wheel layers, written by worker processes while the next wheels download."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from vllm_forge.host import end_with_parent
from vllm_forge.images.content import WheelGroup, group_entries
from vllm_forge.images.slim import write_slim_layer
from vllm_forge.images.store import require_stored, stored, write_layer
from vllm_forge.sources import Wheelhouse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_forge.matrix import ImageCell

T = TypeVar("T")
WORKERS = 2
NICE = 10


def write_layers(
    cell: ImageCell,
    groups: Sequence[WheelGroup],
    meanwhile: Callable[[], T],
    *,
    slim: bool = True,
) -> T:
    """Download the wheels of ``groups`` and write what is not there yet.

    Args:
        cell: whose SKU and line they are for.
        groups: lowest layer first.
        meanwhile: called when all wheels are fetched, while layers are being written; its result
            is returned.
        slim: also the SKU's layers of libraries; a proof does without.
    """
    epoch, wheelhouse = cell.base.source_date_epoch, Wheelhouse()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, spawn, start_worker, (os.getpid(),)) as pool:
        whole: dict[Future[None], WheelGroup] = {}
        for group in groups:
            wheelhouse.fetch(group.wheels)
            if stored(group.key) is None:
                job = pool.submit(write_group, group, cell.line.python, epoch)
            else:
                job = Future()
                job.set_result(None)
            whole[job] = group
        result = meanwhile()
        last = []
        while whole:
            done, _ = wait(whole, return_when=FIRST_COMPLETED)
            for job in done:
                group = whole.pop(job)
                job.result()
                key = group.slim_key
                if slim and key is not None and stored(key) is None:
                    capability = cell.sku.compute_capability
                    last.append(pool.submit(write_slim, group.key, key, capability, epoch))
        for job in last:
            job.result()
    return result


def start_worker(parent: int) -> None:
    """A worker is polite (the rootfs is made meanwhile) and does not outlive the build."""
    end_with_parent(parent)
    os.nice(NICE)


def write_group(group: WheelGroup, python: str, epoch: int) -> None:
    """Worker process: verify a layer's wheels and write the layer."""
    wheelhouse = Wheelhouse()
    paths = [wheelhouse.verify(wheel) for wheel in group.wheels]
    entries = group_entries(group.name, paths, python)
    write_layer(group.key, entries, epoch, code_apart=group.slim_key is not None)


def write_slim(key: str, slim_key: str, capability: str, epoch: int) -> None:
    """Worker process: write a SKU's layer of a group's libraries."""
    major, minor = (int(part) for part in capability.split("."))
    write_slim_layer(slim_key, require_stored(key), (major, minor), epoch)
