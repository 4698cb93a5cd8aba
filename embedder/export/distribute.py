"""Where the shards of an export are made: in processes of this machine, or as tasks of a Ray cluster.

An engine receives a `Job`, the numbers of the shards to make, and the positions of their rows in an earlier export. It
yields the record of each shard that it has published, in any order. If a worker dies, another worker makes its shard.
The plan and the folder are the same as with one process.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, MissingDependencyError, Vlm2RecError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.lock import Hold, Share
from vlm2rec.embedder.export.plan import Plan
from vlm2rec.embedder.export.processes import end_with_parent, environment, keep_freed_memory, shared_cores
from vlm2rec.embedder.export.reuse import EarlierRows
from vlm2rec.embedder.export.short import Kept
from vlm2rec.embedder.export.worker import Encoder, ShardMaker, load_same
from vlm2rec.embedder.options import EngineName
from vlm2rec.embedder.progress import Reporter

Work = Mapping[int, np.ndarray]
"""The shards to make: number → position of each row in an earlier export, -1 for rows to encode."""

PROCESSES = multiprocessing.get_context("spawn")
"""How the workers of this machine begin: as new interpreters, since a fork would share threads and a GPU with us."""


@dataclass(frozen=True)
class Distribution:
    """How many workers make the shards of an export, and where.

    Args:
        engine: processes of this machine, or tasks of a Ray cluster.
        num_workers: how many work at the same time.
        worker: the number of this worker, from 0. It makes only its own shards; a scheduler starts the others.
        gpus: this many processes on this machine, each with its own GPU.
    """

    engine: EngineName = "local"
    num_workers: int = 1
    worker: int | None = None
    gpus: int = 0

    def __post_init__(self) -> None:
        """Refuse contradicting choices."""
        if self.worker is not None and not 0 <= self.worker < self.num_workers:
            raise ConfigError(
                f"--worker {self.worker} of --num-workers {self.num_workers}",
                f"a number from 0 to {self.num_workers - 1}",
                "correct --worker or --num-workers",
            )
        if self.worker is not None and (self.engine != "local" or self.gpus):
            raise ConfigError(
                "--worker together with --engine ray or --gpus",
                "one of them: --worker is for one of several processes that a scheduler starts",
                "leave --worker out, or --engine and --gpus",
            )
        if self.gpus and (self.engine != "local" or self.num_workers not in (1, self.gpus)):
            raise ConfigError(
                f"--gpus {self.gpus} together with --num-workers {self.num_workers} and --engine {self.engine}",
                "--gpus alone: it starts one process on this machine for each GPU; Ray finds its GPUs itself",
                "leave --gpus out, or --num-workers and --engine",
            )

    @property
    def share(self) -> Share | None:
        """Which shards this process makes; None for all of them."""
        return None if self.worker is None else Share(self.worker, self.num_workers)

    @property
    def engine_to_use(self) -> Engine | None:
        """What makes the shards; None if this process does."""
        if self.engine == "ray":
            return RayTasks(self.num_workers)
        if self.gpus:
            return Processes(self.gpus, with_gpus=True)
        return Processes(self.num_workers) if self.num_workers > 1 and self.worker is None else None


ALONE = Distribution()
"""One process makes all shards."""


class Maker(Protocol):
    """Makes the tables of shards, one after the other, in one process."""

    def shard(
        self, number: int, reuse_rows: np.ndarray, advance: Callable[[int], None]
    ) -> tuple[pa.Table, Kept | None]:
        """Return the table of a shard; `reuse_rows` holds positions of earlier rows, -1 for rows to make."""

    def close(self) -> None:
        """Free what was opened."""


@dataclass(frozen=True)
class Job:
    """Everything another process needs to make shards of a plan; it can be pickled."""

    out: Location
    plan: Plan
    hold: Hold

    def maker(self) -> Maker:
        """Return what makes the shards; call it in the process that makes them."""
        raise NotImplementedError

    def publish(self, number: int, table: pa.Table, seconds: float, kept: Kept | None = None) -> shards.Shard:
        """Publish a shard, if the folder is still that of this export; return its record.

        Raises:
            ArtifactError: as `Hold.require`, `shards.require_same_plan` and `shards.publish_shard`.
        """
        self.hold.require()
        shards.require_same_plan(self.out, self.plan)
        return shards.publish_shard(self.out, self.plan, number, table, seconds, kept)


@dataclass(frozen=True)
class ItemJob(Job):
    """The job of an export of items."""

    dataset: Dataset
    load_encoder: Callable[[], Encoder]
    settings: Mapping[str, Any]
    earlier: EarlierRows | None
    image_timeout: float

    def maker(self) -> ShardMaker:
        """See `Job`."""
        keep_freed_memory()
        load = functools.partial(load_same, self.load_encoder, self.settings)
        return ShardMaker(self.dataset, self.plan, load, self.earlier, self.image_timeout)


class Engine(Protocol):
    """Makes and publishes shards in other processes."""

    def make(self, job: Job, work: Work, reporter: Reporter) -> Iterator[tuple[int, shards.Shard]]:
        """Yield the number and the record of each shard once it is published."""


def _make(maker: Maker, job: Job, number: int, reuse_rows: np.ndarray) -> shards.Shard:
    started = time.perf_counter()
    table, kept = maker.shard(number, reuse_rows, lambda count: None)
    return job.publish(number, table, time.perf_counter() - started, kept)


# --- processes of this machine ------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int | None = None  # of the shard it is making


class Processes:
    """Processes on this machine; if one dies, the others continue."""

    def __init__(self, count: int, with_gpus: bool = False) -> None:
        self._count, self._with_gpus = count, with_gpus

    def make(self, job: Job, work: Work, reporter: Reporter) -> Iterator[tuple[int, shards.Shard]]:
        """See `Engine`.

        Raises:
            ArtifactError: all workers died, or two of them died while making the same shard.
            Vlm2RecError: what a worker raised.
        """
        if self._with_gpus:
            _require_gpus(self._count)
        waiting, tried = list(work), set[int]()
        workers = self._start(job, min(self._count, len(work)))
        try:
            for worker in workers.values():
                _hand_over(worker, waiting, work)
            while workers:
                for ready in wait(list(workers)):
                    worker = workers[ready]  # type: ignore[index]
                    try:
                        found = worker.pipe.recv()
                    except (EOFError, OSError):
                        self._handle_death(workers, worker, waiting, tried, reporter)
                        idle = [other for other in workers.values() if other.number is None]
                        for other in idle:
                            _hand_over(other, waiting, work)
                        continue
                    if isinstance(found, Vlm2RecError):
                        raise found
                    number, worker.number = worker.number, None
                    assert number is not None
                    yield number, found
                    _hand_over(worker, waiting, work)
                if not any(worker.number is not None for worker in workers.values()):
                    return
            raise ArtifactError(
                "all workers died, perhaps because memory ran out",
                "workers that run until the export ends",
                "run the same command again: it continues where it stopped; a smaller --num-workers needs less memory",
            )
        finally:
            for worker in workers.values():
                worker.process.terminate()  # its current shard is published whole or not at all
            for worker in workers.values():
                worker.process.join()

    def _start(self, job: Job, count: int) -> dict[Connection, _Worker]:
        workers = {}
        with shared_cores(count):
            for index in range(count):
                ours, theirs = PROCESSES.Pipe()
                with (
                    environment("CUDA_VISIBLE_DEVICES", _visible_gpu(index))
                    if self._with_gpus
                    else contextlib.nullcontext()
                ):
                    process = PROCESSES.Process(target=_serve, args=(theirs, job), daemon=True, name=f"worker {index}")
                    process.start()
                theirs.close()  # so that the pipe closes when the worker dies
                workers[ours] = _Worker(process, ours)
        return workers

    def _handle_death(
        self,
        workers: dict[Connection, _Worker],
        worker: _Worker,
        waiting: list[int],
        tried: set[int],
        reporter: Reporter,
    ) -> None:
        """Remove a dead worker, and put its shard back in the queue."""
        del workers[worker.pipe]
        worker.process.join()
        lost = worker.number
        what = "" if lost is None else f" while making {schema.shard_name(lost)}; another worker makes it now"
        reporter.say(f"{worker.process.name} died (exit code {worker.process.exitcode}){what}", warning=True)
        if lost is None:
            return
        if lost in tried:
            raise ArtifactError(
                f"two workers died while making {schema.shard_name(lost)}",
                "workers that run to the end of a shard",
                "run the same command again with --num-workers 1 to see the cause; the other shards are kept",
            )
        tried.add(lost)
        waiting.insert(0, lost)


def _hand_over(worker: _Worker, waiting: list[int], work: Work) -> None:
    if waiting:
        worker.number = waiting.pop(0)
        with contextlib.suppress(OSError):  # it has just died: the next read from its pipe reports that
            worker.pipe.send((worker.number, work[worker.number]))


def _serve(pipe: Connection, job: Job) -> None:
    """Make shards until the main process closes the pipe."""
    end_with_parent()
    try:
        maker = job.maker()
        while True:
            number, reuse_rows = pipe.recv()
            pipe.send(_make(maker, job, number, reuse_rows))
    except (EOFError, KeyboardInterrupt):
        return
    except Vlm2RecError as error:
        pipe.send(error)


def _require_gpus(count: int) -> None:
    import torch

    if (available := torch.cuda.device_count()) < count:
        raise ConfigError(
            f"--gpus {count}, but this machine has {available}",
            f"at most {available}" if available else "a machine with GPUs",
            "lower --gpus; on a CPU, use --num-workers instead",
        )


def _visible_gpu(index: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[index] if given else str(index)


# --- Ray ----------------------------------------------------------------------------------------------------


class RayTasks:
    """One Ray task for each shard; Ray handles retries, GPUs and new nodes.

    Every node must be able to reach the dataset, the backbone and the output folder. The cluster is the one that
    `ray.init` finds (`RAY_ADDRESS`), or a new one on this machine.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def make(self, job: Job, work: Work, reporter: Reporter) -> Iterator[tuple[int, shards.Shard]]:
        """See `Engine`.

        Raises:
            MissingDependencyError: Ray is not installed.
            Vlm2RecError: what a task raised.
        """
        try:
            import ray
        except ImportError:
            raise MissingDependencyError(
                "--engine ray needs Ray, which is not installed", "ray", "pip install 'vlm2rec[ray]'"
            ) from None
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(_make_on_a_node).options(num_cpus=1, num_gpus=gpus, max_retries=-1)
        shared, waiting = ray.put(job), list(work)
        under_way: dict[Any, int] = {}
        try:
            while waiting or under_way:
                while waiting and len(under_way) < self._count:
                    number = waiting.pop(0)
                    under_way[task.remote(shared, number, work[number])] = number
                (ended, *_), _ = ray.wait(list(under_way), num_returns=1)
                number = under_way.pop(ended)
                try:
                    yield number, ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Vlm2RecError) else error from None
        finally:
            for left in under_way:
                ray.cancel(left, force=True)


_makers: dict[str, Maker] = {}


def _make_on_a_node(job: Job, number: int, reuse_rows: np.ndarray) -> shards.Shard:
    """Make a shard in a Ray worker process, which keeps the model for its next shard."""
    key = f"{job.out} {job.plan.identity} {job.hold.writer}"
    if key not in _makers:
        _makers.clear()
        _makers[key] = job.maker()
    return _make(_makers[key], job, number, reuse_rows)
