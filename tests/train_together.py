"""What `test_distributed` starts with torchrun: one process of several that train together.

    torchrun --nproc-per-node 2 tests/train_together.py PLAN FOLDER

PLAN is JSON: settings of `finetune` by name. FOLDER gets what each process found, as `found-<rank>.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from vlm2rec.embedder import distributed
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.read_config import read_config


def trained(settings: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what this process believes of it."""
    training = finetune.run(read_config(FinetuneConfig, flags=settings))
    assert training is not None
    return {"curves": training.curves, "best": training.best}


class Counting(DistributedDataParallel):
    """DDP that notes how many numbers each of its all-reduces has."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_comm_hook(None, self._reduce)

    def _reduce(self, group, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations that are strings
        self.sizes.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)


def synchronised(settings: dict[str, Any]) -> list[int]:
    """Return how many numbers each all-reduce of a training's gradients had."""
    torch.nn.parallel.DistributedDataParallel = Counting  # type: ignore[misc]
    trained(settings)
    torch.nn.parallel.DistributedDataParallel = DistributedDataParallel  # type: ignore[misc]
    return Counting.sizes


def gathered_gradient(sizes: list[int]) -> float:
    """Return by how much the gradient through `gather` differs from that of one process; rank r has sizes[r] rows."""
    rng = torch.Generator().manual_seed(5)
    rows = torch.randn(sum(sizes), 3, generator=rng, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=rng, dtype=torch.float64, requires_grad=True)

    def loss(vectors: torch.Tensor) -> torch.Tensor:
        return (vectors @ vectors.T).logsumexp(dim=1).mean()

    (expected,) = torch.autograd.grad(loss(rows @ weight), weight)
    own = rows.split(sizes)[distributed.rank()] @ weight
    (found,) = torch.autograd.grad(loss(torch.cat(distributed.gather(own))), weight)
    return float((distributed.mean(found) - expected).abs().max())


def main(plan: Path, folder: Path) -> None:
    """Do what the plan says."""
    with distributed.joined(torch.device("cpu")):
        runs = json.loads(plan.read_text())
        found = {
            "shares": {n: distributed.from_all(list(distributed.share(range(n)))) for n in range(6)},
            "in_order": {
                n: distributed.gather_shares(torch.tensor(distributed.share(range(n)), dtype=torch.int64)).tolist()
                for n in range(6)
            },
            "gradient": max(gathered_gradient(sizes) for sizes in ([2, 2], [3, 1], [4, 0], [0, 4])),
            "from_main": distributed.from_main(distributed.rank()),
            "synchronised": synchronised(runs.pop("synchronised")),
            **{name: trained(settings) for name, settings in runs.items()},
        }
        (folder / f"found-{distributed.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
