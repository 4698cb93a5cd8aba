"""Where the shards of an export are made: in processes of this machine, or as tasks of a Ray cluster.

An engine is handed a `Job`, the numbers of the shards to make and where earlier rows of each lie, and yields the record
of every shard that it has published, in any order. A worker that dies costs the shard it had in hand, which another
makes; the plan and the folder are those of one process.
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

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, MissingDependencyError, Vlm2RecError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.lock import Share
from vlm2rec.embedder.export.plan import Plan
from vlm2rec.embedder.export.processes import end_with_parent, environment, keep_freed_memory, shared_cores
from vlm2rec.embedder.export.reuse import EarlierRows
from vlm2rec.embedder.export.worker import Encoder, ShardMaker, load_same
from vlm2rec.embedder.options import EngineName
from vlm2rec.embedder.progress import Reporter

Work = Mapping[int, np.ndarray]
"""Shards to make, and where an earlier export has each of their rows: -1 for those to encode."""


@dataclass(frozen=True)
class Distribution:
    """How many make the shards of an export, and where.

    Args:
        engine: processes of this machine, or tasks of a Ray cluster.
        num_workers: how many work at a time.
        worker: be this one of them, from 0, and make no shard of the others; they are started by somebody else.
        gpus: as many processes of this machine, each with a GPU of its own.
    """

    engine: EngineName = "local"
    num_workers: int = 1
    worker: int | None = None
    gpus: int = 0

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.worker is not None and not 0 <= self.worker < self.num_workers:
            raise ConfigError(
                f"--worker {self.worker} of --num-workers {self.num_workers}",
                f"a number from 0 to {self.num_workers - 1}",
                "correct one of them",
            )
        if self.worker is not None and (self.engine != "local" or self.gpus):
            raise ConfigError(
                "--worker beside --engine ray or --gpus",
                "one of them: --worker is one process, started by a scheduler, that makes its share",
                "leave one out",
            )
        if self.gpus and (self.engine != "local" or self.num_workers not in (1, self.gpus)):
            raise ConfigError(
                f"--gpus {self.gpus} beside --num-workers {self.num_workers} and --engine {self.engine}",
                "--gpus alone: one process of this machine for each; Ray finds its GPUs itself",
                "leave one out",
            )

    @property
    def share(self) -> Share | None:
        """Which shards this process makes, None for all of them."""
        return None if self.worker is None else Share(self.worker, self.num_workers)

    @property
    def engine_to_use(self) -> Engine | None:
        """What makes the shards, None where this process does."""
        if self.engine == "ray":
            return RayTasks(self.num_workers)
        if self.gpus:
            return Processes(self.gpus, with_gpus=True)
        return Processes(self.num_workers) if self.num_workers > 1 and self.worker is None else None


ALONE = Distribution()
"""One process makes all shards."""


@dataclass(frozen=True)
class Job:
    """All that another process needs to make shards of an export; can be pickled."""

    dataset: Dataset
    out: Location
    plan: Plan
    load_encoder: Callable[[], Encoder]
    settings: Mapping[str, Any]
    earlier: EarlierRows | None
    image_timeout: float

    def maker(self) -> ShardMaker:
        """Return what makes the shards, in the process that is to make them."""
        keep_freed_memory()
        load = functools.partial(load_same, self.load_encoder, self.settings)
        return ShardMaker(self.dataset, self.plan, load, self.earlier, self.image_timeout)


class Engine(Protocol):
    """Makes and publishes shards somewhere else."""

    def make(self, job: Job, work: Work, reporter: Reporter) -> Iterator[tuple[int, shards.Shard]]:
        """Yield the number and the record of each shard when it is published."""


def _make(maker: ShardMaker, out: Location, number: int, reuse_rows: np.ndarray) -> shards.Shard:
    started = time.perf_counter()
    table = maker.shard(number, reuse_rows, lambda count: None)
    return shards.publish_shard(out, maker.plan, number, table, time.perf_counter() - started)


# --- processes of this machine ------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int | None = None  # of the shard in hand


class Processes:
    """Processes of this machine; the others go on when one of them dies."""

    def __init__(self, count: int, with_gpus: bool = False) -> None:
        self._count, self._with_gpus = count, with_gpus

    def make(self, job: Job, work: Work, reporter: Reporter) -> Iterator[tuple[int, shards.Shard]]:
        """See `Engine`.

        Raises:
            ArtifactError: all workers died, or two of them over the same shard.
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
                        self._bury(workers, worker, waiting, tried, reporter)
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
                "all workers died, perhaps for want of memory",
                "workers that live until the export ends",
                "run the same command again: it goes on where it stopped; with a smaller --num-workers it takes less",
            )
        finally:
            for worker in workers.values():
                worker.process.terminate()  # what it has in hand is published whole or not at all
            for worker in workers.values():
                worker.process.join()

    def _start(self, job: Job, count: int) -> dict[Connection, _Worker]:
        context = multiprocessing.get_context("spawn")
        workers = {}
        with shared_cores(count):
            for place in range(count):
                mine, its = context.Pipe()
                with (
                    environment("CUDA_VISIBLE_DEVICES", _visible_gpu(place))
                    if self._with_gpus
                    else contextlib.nullcontext()
                ):
                    process = context.Process(target=_serve, args=(its, job), daemon=True, name=f"worker {place}")
                    process.start()
                its.close()  # so that the death of the worker closes the pipe
                workers[mine] = _Worker(process, mine)
        return workers

    def _bury(
        self,
        workers: dict[Connection, _Worker],
        worker: _Worker,
        waiting: list[int],
        tried: set[int],
        reporter: Reporter,
    ) -> None:
        """Take note of a dead worker: its shard is another's."""
        del workers[worker.pipe]
        worker.process.join()
        lost = worker.number
        what = "" if lost is None else f", with {schema.shard_name(lost)} in hand, which another makes"
        reporter.say(f"{worker.process.name} died (exit code {worker.process.exitcode}){what}", warning=True)
        if lost is None:
            return
        if lost in tried:
            raise ArtifactError(
                f"two workers died over {schema.shard_name(lost)}",
                "workers that survive the items of a shard",
                "run the same command again with --num-workers 1 to see what it is; the other shards are kept",
            )
        tried.add(lost)
        waiting.insert(0, lost)


def _hand_over(worker: _Worker, waiting: list[int], work: Work) -> None:
    if waiting:
        worker.number = waiting.pop(0)
        with contextlib.suppress(OSError):  # it has just died: the next look at its pipe shows it
            worker.pipe.send((worker.number, work[worker.number]))


def _serve(pipe: Connection, job: Job) -> None:
    """Make shards until nobody asks for any."""
    end_with_parent()
    try:
        maker = job.maker()
        while True:
            number, reuse_rows = pipe.recv()
            pipe.send(_make(maker, job.out, number, reuse_rows))
    except (EOFError, KeyboardInterrupt):
        return
    except Vlm2RecError as error:
        pipe.send(error)


def _require_gpus(count: int) -> None:
    import torch

    if (there := torch.cuda.device_count()) < count:
        raise ConfigError(
            f"--gpus {count}, and this machine has {there}",
            f"at most {there}" if there else "a machine with GPUs",
            "choose fewer; on a CPU, --num-workers starts processes without",
        )


def _visible_gpu(place: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[place] if given else str(place)


# --- Ray ----------------------------------------------------------------------------------------------------


class RayTasks:
    """A task of a Ray cluster for each shard; retries, GPUs and new nodes are Ray's.

    The dataset, the backbone and the output folder have to be where every node finds them. The cluster is the one that
    `ray.init` finds (`RAY_ADDRESS`), or one of this machine.
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
                "--engine ray, and Ray is not installed", "ray", "pip install 'vlm2rec[ray]'"
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


_makers: dict[str, ShardMaker] = {}


def _make_on_a_node(job: Job, number: int, reuse_rows: np.ndarray) -> shards.Shard:
    """Make a shard in a process of Ray's, which keeps the model for the next one."""
    key = f"{job.out} {job.plan.fingerprint}"
    if key not in _makers:
        _makers.clear()
        _makers[key] = job.maker()
    return _make(_makers[key], job.out, number, reuse_rows)
