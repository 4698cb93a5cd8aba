"""The recipes for vector stores, run as the docs print them: every id stays, neighbours are those of exact search."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_folder import write_embeddings

from vlm2rec.downstream.index.index import ItemIndex, build_index

PAGE = Path(__file__).parents[1] / "docs" / "stores.md"
ODD = ("42", "042", "4.2e1", "NA", "ünï", 'q"uote', "it's", "tab\tid", "back\\slash", "a b", "x" * 200)


@pytest.fixture
def embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 items in three parts, some with odd ids, some without a vector, of any length."""
    ids = [*ODD, *(f"i{number}" for number in range(300 - len(ODD)))]
    random = np.random.default_rng(0)
    vectors = random.normal(size=(300, 24)) * random.uniform(0.1, 10, size=(300, 1))
    vectors[[20, 150, 299]] = np.nan
    monkeypatch.chdir(tmp_path)
    write_embeddings(tmp_path / "embeddings", ids, vectors.astype(np.float32), shard_size=100)
    return tmp_path / "embeddings"


def run_recipe(store: str, **given: Any) -> dict[str, Any]:
    """Run the block of the store's section and return what it has defined."""
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    (page,) = (text for text in section if text.startswith(store))
    (recipe,) = re.findall(r"```python\n(.*?)```", page, re.S)
    found = dict(given)
    exec(recipe, found)
    return found


def hold_against_search(nearest: list[tuple[str, float]], embeddings: Path) -> None:
    build_index(embeddings, embeddings.with_name("index"), kind="flat")
    ours = ItemIndex.open(embeddings.with_name("index")).neighbours("42", 10)
    assert [item for item, _ in nearest] == [each.item_id for each in ours]
    np.testing.assert_allclose([cosine for _, cosine in nearest], [each.cosine for each in ours], atol=1e-5)


def test_qdrant(embeddings: Path) -> None:
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    found = run_recipe("Qdrant")
    hold_against_search(found["nearest"], embeddings)
    client = found["client"]
    assert client.count("items").count == 297
    points = client.scroll("items", limit=300)[0]
    assert set(ODD) <= {point.payload["item_id"] for point in points} and len(points) == 297
    client.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """A schema of its own in the Postgres that VLM2REC_TEST_POSTGRES names, as a connection string."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    server = os.environ.get("VLM2REC_TEST_POSTGRES")
    if not server:
        pytest.skip("VLM2REC_TEST_POSTGRES names no Postgres with pgvector")
    name = f"vlm2rec_{uuid.uuid4().hex}"
    with psycopg.connect(server) as db:
        db.execute("create extension if not exists vector")
        db.execute(f"create schema {name}")
    yield f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{name},public"
    with psycopg.connect(server) as db:
        db.execute(f"drop schema {name} cascade")


def test_pgvector(embeddings: Path, database: str) -> None:
    found = run_recipe("Postgres", DATABASE=database)
    hold_against_search(found["nearest"], embeddings)
    with found["psycopg"].connect(database) as db:
        ids = {item for (item,) in db.execute("select item_id from items").fetchall()}
    assert len(ids) == 297 and set(ODD) <= ids


def test_milvus(embeddings: Path) -> None:
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    pytest.importorskip("pymilvus", reason="pymilvus is not installed")
    found = run_recipe("Milvus")
    hold_against_search(found["nearest"], embeddings)
    rows = found["client"].query("items", filter="item_id != ''", output_fields=["item_id"], limit=1000)
    assert len(rows) == 297 and set(ODD) <= {row["item_id"] for row in rows}
    found["client"].close()
