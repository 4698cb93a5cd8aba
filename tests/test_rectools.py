"""RecTools' models read our vectors through an item net of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from embedding_folder import write_embeddings

from vlm2rec.embedder.contract.errors import DataError

pytest.importorskip("rectools", reason="RecTools 0.19 pins a NumPy that Python 3.11 has not here; see docs/convert.md")
pytestmark = pytest.mark.filterwarnings("ignore")  # of pytorch-lightning

from rectools import Columns  # noqa: E402
from rectools.dataset import Dataset  # noqa: E402
from rectools.dataset.dataset import DatasetSchema  # noqa: E402
from rectools.models import BERT4RecModel, SASRecModel  # noqa: E402
from rectools.models.nn.item_net import IdEmbeddingsItemNet  # noqa: E402

from vlm2rec.downstream.rectools import EmbeddingItemNet  # noqa: E402

ITEMS = [f"i{number}" for number in range(30)]


def interactions(names: list[str]) -> Dataset:
    random = np.random.default_rng(0)
    rows = [(user, names[item], place) for user in range(40) for place, item in enumerate(random.permutation(30)[:8])]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Datetime])
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="D")
    return Dataset.construct(frame.assign(**{Columns.Weight: 1.0}))


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(1).normal(size=(30, 12)).astype(np.float32)
    vectors[4] = np.nan
    write_embeddings(tmp_path / "embeddings", ITEMS, vectors, vectors, vectors, counts={"ok": 29, "failed": 1})
    return tmp_path / "embeddings"


@pytest.mark.parametrize("kind", [SASRecModel, BERT4RecModel])
@pytest.mark.parametrize("blocks", [(EmbeddingItemNet,), (IdEmbeddingsItemNet, EmbeddingItemNet)])
def test_rectools_trains_and_ranks_from_the_vectors(kind: type, blocks: tuple[type, ...], embeddings: Path) -> None:
    model = kind(
        n_factors=8,
        n_blocks=1,
        n_heads=2,
        session_max_len=6,
        epochs=1,
        item_net_block_types=blocks,
        item_net_constructor_kwargs={"embeddings": str(embeddings)},
        verbose=0,
        deterministic=True,
    )
    dataset = interactions(ITEMS)
    model.fit(dataset)
    net = model.torch_model.item_model.item_net_blocks[-1]
    ids = list(model.data_preparator.item_id_map.external_ids)
    assert [ids[row] for row in (~net.present).nonzero()[:, 0]] == [*ids[: len(ids) - 30], "i4"]
    lengths = net.vectors[net.present].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    assert torch.equal(net(torch.tensor([0])), torch.zeros(1, 8))
    found = model.recommend(users=list(range(5)), dataset=dataset, k=3, filter_viewed=True)
    assert len(found) == 15 and set(found[Columns.Item]) <= set(ITEMS)
    described = DatasetSchema.model_validate(model.data_preparator.train_dataset.get_schema())
    again = EmbeddingItemNet.from_dataset_schema(described, 8, 0.1, embeddings)  # as RecTools loads a model
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(torch.arange(len(ids))), net(torch.arange(len(ids))))


def test_other_item_ids_are_refused_with_examples_of_both(embeddings: Path) -> None:
    dataset = interactions([f"x{number}" for number in range(30)])
    with pytest.raises(DataError, match=r"none of RecTools' 30 items has a vector.*'i0', 'i1', 'i2'.*'x"):
        EmbeddingItemNet.from_dataset(dataset, 8, 0.1, embeddings)
