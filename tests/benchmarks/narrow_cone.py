"""What λ and the reduction do to a narrow view: a toy in which the image vectors begin in a narrow cone.

Items have attributes that titles tell and looks that pictures show; a user keeps to one kind of each. A frozen network
with one shared LoRA reads both modalities. Its picture inputs share a large common part, as those of real
vision-language models do: their cosines begin near .92, and their differences are small. Each arm trains the LoRA
with one loss; printed are, per arm, means over the seeds of

    v2f     N@20 of users' image vectors against fused item vectors, 100 negatives of users who were
            not trained on
    f2f     the same for fused users
    A_neg   mean squared distance of an image user vector to other items' image vectors (Eq. 4): the width of the cone
    w       the weight of Eq. 9 at the end

Run: python tests/benchmarks/narrow_cone.py [--seeds 3] [--steps 2000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlm2rec.downstream.evaluation.geometry import geometry
from vlm2rec.downstream.evaluation.metrics import candidate_scores, rank_metrics
from vlm2rec.downstream.table import unit_rows
from vlm2rec.embedder.training.losses import InfoNCEObjective, Views, VLM2RecObjective

BATCH = 8
WIDTH = 64
RANK = 8
NEGATIVES = 100
COSINE = 0.92  # of two pictures, before training


class World(NamedTuple):
    """A catalogue and its users."""

    text: Tensor  # (items, WIDTH): what a title says
    image: Tensor  # (items, WIDTH): what a picture shows
    history: Tensor  # (users, length): item rows
    target: Tensor  # (users,): the next item


def draw_world(seed: int, items: int = 1500, users: int = 4000, length: int = 6, kinds: int = 12) -> World:
    """Return items with a told and a shown attribute each, and users who prefer one kind of both."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    told, shown = (torch.randint(kinds, (items,), generator=generator) for _ in range(2))
    text = normal(kinds, WIDTH)[told] + 0.5 * normal(items, WIDTH)
    looks = normal(kinds, WIDTH)[shown] + 0.5 * normal(items, WIDTH)
    # two pictures differ by their looks only: |common|² / (|common|² + |looks|²) is their cosine
    common = normal(WIDTH)
    common *= looks.norm(dim=1).mean() * (COSINE / (1 - COSINE)) ** 0.5 / common.norm()
    image = (common + looks) / (common + looks).norm(dim=1, keepdim=True) * text.norm(dim=1).mean()

    likes = torch.stack([torch.randint(kinds, (users,), generator=generator) for _ in range(2)], dim=1)
    # an item is chosen as much for what its title tells as for its looks
    taste = 3.0 * (told[None] == likes[:, :1]).float() + 3.0 * (shown[None] == likes[:, 1:]).float()
    chosen = torch.multinomial(taste.exp(), length + 1, generator=generator)
    return World(text, image, chosen[:, :-1], chosen[:, -1])


class Adapted(nn.Module):
    """A frozen residual network with a LoRA that both modalities share; returns vectors by view, (n, WIDTH) each."""

    def __init__(self, seed: int, layers: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        scale = WIDTH**-0.5
        for layer in range(layers):
            self.register_buffer(f"frozen_{layer}", scale * torch.randn(WIDTH, WIDTH, generator=generator))
        self.down = nn.ParameterList(scale * torch.randn(RANK, WIDTH, generator=generator) for _ in range(layers))
        self.up = nn.ParameterList(torch.zeros(WIDTH, RANK) for _ in range(layers))

    def read(self, rows: Tensor) -> Tensor:
        """Return the vectors of inputs of either modality, (n, WIDTH) both."""
        for layer, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            frozen = self.get_buffer(f"frozen_{layer}")
            rows = rows + torch.tanh(rows @ frozen.T + 2.0 * (rows @ down.T) @ up.T)
        return rows

    def views(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return the vectors of text, of image, and their sum (Eq. 2)."""
        read = {"text": self.read(text), "image": self.read(image)}
        return {**read, "fused": read["text"] + read["image"]}


def users_of(model: Adapted, world: World, users: Tensor) -> dict[str, Tensor]:
    """Return the views of users: a user's input is the mean of the history's."""
    rows = world.history[users]
    return model.views(world.text[rows].mean(1), world.image[rows].mean(1))


def items_of(model: Adapted, world: World, items: Tensor) -> dict[str, Tensor]:
    """Return the views of items."""
    return model.views(world.text[items], world.image[items])


def trained(world: World, loss: nn.Module | None, seed: int, steps: int, rate: float) -> tuple[Adapted, float]:
    """Return the network, trained on the first half of the users, and the last weight w; no loss trains nothing."""
    model, weight = Adapted(seed), float("nan")
    if loss is None:
        return model, weight
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        users = torch.randint(len(world.target) // 2, (BATCH,), generator=generator)
        targets = world.target[users]
        total, log = loss(users_of(model, world, users), items_of(model, world, targets), targets)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        weight = float(log["weight"].detach()) if "weight" in log else 1.0
    return model, weight


def measured(model: Adapted, world: World, seed: int) -> dict[str, float]:
    """Return v2f, f2f, t2f and the width of the image cone, on the users who were not trained on."""
    random = np.random.default_rng(seed)
    users = torch.arange(len(world.target) // 2, len(world.target))
    with torch.no_grad():
        user_views: Views = users_of(model, world, users)
        item_views: Views = items_of(model, world, torch.arange(len(world.text)))
    taken = torch.cat([world.history[users], world.target[users, None]], dim=1).numpy()
    negatives = np.stack(
        [random.choice(np.setdiff1d(np.arange(len(world.text)), own), NEGATIVES, False) for own in taken]
    )
    positives = world.target[users].numpy()
    found: dict[str, float] = {}
    for name, view in (("f2f", "fused"), ("t2f", "text"), ("v2f", "image")):
        sides = unit_rows(user_views[view].numpy()), unit_rows(item_views["fused"].numpy())
        found[name] = rank_metrics(*candidate_scores(*sides, positives, negatives))["N@20"]
    image = item_views["image"].numpy()
    sample = slice(0, 500)
    numbers = geometry(user_views["image"].numpy()[sample], image[positives[sample]], image[negatives[sample]])
    return {**found, "A_neg": numbers["A_neg"], "S": numbers["S"]}


def vlm2rec(lam: float, reduction: str, **more: object) -> Callable[[], nn.Module]:
    """Return a maker of the loss of VLM2Rec."""
    return lambda: VLM2RecObjective(lam=lam, reduction=reduction, **more)  # type: ignore[arg-type]


ARMS: dict[str, Callable[[], nn.Module] | None] = {
    "vanilla": None,
    "SFT": InfoNCEObjective,
    "WPCL alone": vlm2rec(0.1, "paper", crtr=False),
    **{f"paper, λ {lam:g}": vlm2rec(lam, "paper") for lam in (0.1, 0.5, 1.0)},
    **{f"mean,  λ {lam:g}": vlm2rec(lam, "mean") for lam in (0.1, 0.5)},
}


def main() -> None:
    """Train every arm on every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    worlds = [draw_world(seed) for seed in range(arguments.seeds)]
    columns = ("f2f", "t2f", "v2f", "A_neg", "S")
    print(f"{'arm':<14}{'λ/B · CRTR':>12}" + "".join(f"{name:>14}" for name in columns) + f"{'w':>8}")
    for name, make in ARMS.items():
        rows, weights, share = [], [], "-"
        for seed, world in enumerate(worlds):
            loss = make() if make else None
            if isinstance(loss, VLM2RecObjective) and loss.use_crtr:
                share = f"{loss.lam / BATCH if loss.reduction == 'paper' else loss.lam:.4f}"
            model, weight = trained(world, loss, seed, arguments.steps, arguments.learning_rate)
            rows.append(measured(model, world, seed))
            weights.append(weight)
        cells = [np.array([row[column] for row in rows]) for column in columns]
        shown = "".join(f"{cell.mean():>8.3f} ±{cell.std():.3f}" for cell in cells)
        print(f"{name:<14}{share:>12}{shown}{np.mean(weights):>8.2f}", flush=True)
    print(f"{arguments.seeds} seeds, {arguments.steps} steps of {BATCH} users, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
