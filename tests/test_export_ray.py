"""An export as tasks of a real Ray cluster: nodes may go, and the folder is that of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.cluster_utils
import ray.data
import yaml
from chairs import ShadeEncoder, edit_items, parts, retitle, rows_of, write_dataset
from children import python_path
from embedding_folder import write_embeddings

from vlm2rec.downstream.index.index import ItemIndex, build_index
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, DataError, ModelError
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, ItemEncoder
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.processes import environment
from vlm2rec.embedder.export.reuse import Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import run
from vlm2rec.pipelines.config import RunConfig
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

SETTINGS = ShadeEncoder().fingerprint
DISTRIBUTION = Distribution(engine="ray", num_workers=2)


class Slow(ShadeEncoder):
    """Takes its time, and says on which node it was."""

    def __init__(self, seen: Path) -> None:
        super().__init__()
        self.seen = seen

    def encode_items(self, titles: Any, images: Any) -> EncodedItems:
        (self.seen / ray.get_runtime_context().get_node_id()).touch()
        time.sleep(1.0)
        return super().encode_items(titles, images)


class Refusing(ShadeEncoder):
    """Cannot encode anything."""

    def encode_items(self, titles: Any, images: Any) -> EncodedItems:
        raise ModelError("this model refuses", "one that does not", "take another")


class Reversing(ShadeEncoder):
    """Puts the dataset's items in another order when it has encoded some."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def encode_items(self, titles: Any, images: Any) -> EncodedItems:
        edit_items(self.folder, lambda table: {name: sorted(values)[::-1] for name, values in table.items()})
        return super().encode_items(titles, images)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; the driver's own has no room for tasks."""
    with environment("PYTHONPATH", python_path()):  # the workers of Ray need this folder to unpickle the encoders above
        made = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestRay:
    """One cluster for all."""

    def test_tasks_make_the_folder_of_one_process(self, cluster: Any, tmp_path: Path) -> None:
        data = Dataset(write_dataset(tmp_path / "data"))
        export(data, tmp_path / "whole", SETTINGS, ShadeEncoder, shard_size=3)
        export(data, tmp_path / "out", SETTINGS, ShadeEncoder, shard_size=3, distribution=DISTRIBUTION)
        assert parts(tmp_path / "out") == parts(tmp_path / "whole") and verify(tmp_path / "out") == []

    def test_what_a_task_complains_of_is_what_the_command_complains_of(self, cluster: Any, tmp_path: Path) -> None:
        data = Dataset(write_dataset(tmp_path / "data"))
        with pytest.raises(ModelError, match="this model refuses"):
            export(data, tmp_path / "out", SETTINGS, Refusing, shard_size=3, distribution=DISTRIBUTION)

    def test_a_dataset_that_is_replaced_under_the_tasks_is_refused(self, cluster: Any, tmp_path: Path) -> None:
        data = Dataset(write_dataset(tmp_path / "data"))
        load = partial(Reversing, data.path)
        with pytest.raises(DataError, match="was changed while its items were encoded: row 0 has item '019'"):
            export(data, tmp_path / "out", SETTINGS, load, shard_size=3, distribution=DISTRIBUTION)
        assert not (tmp_path / "out" / schema.MANIFEST_FILE).exists()

    def test_tasks_make_anew_what_has_changed(self, cluster: Any, tmp_path: Path) -> None:
        folder = write_dataset(tmp_path / "data")
        export(Dataset(folder), tmp_path / "out", SETTINGS, ShadeEncoder, shard_size=3)
        data, reuse = retitle(folder, 2, 4, 19), Reuse(retry_failed=True)
        export(data, tmp_path / "out", SETTINGS, ShadeEncoder, shard_size=3, reuse=reuse, distribution=DISTRIBUTION)
        export(data, tmp_path / "whole", SETTINGS, ShadeEncoder, shard_size=3)
        assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole") and verify(tmp_path / "out") == []

    @pytest.mark.slow  # that a worker may die is tried without Ray in `test_export_engines`
    def test_a_node_that_is_lost_in_mid_export_costs_nothing_but_time(self, cluster: Any, tmp_path: Path) -> None:
        data, seen = Dataset(write_dataset(tmp_path / "data", 24)), tmp_path / "seen"
        seen.mkdir()
        export(data, tmp_path / "whole", SETTINGS, ShadeEncoder, shard_size=2)
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()

        def lose() -> None:
            while second.node_id not in {path.name for path in seen.iterdir()}:
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)

        loss = threading.Thread(target=lose)
        loss.start()
        export(data, tmp_path / "out", SETTINGS, partial(Slow, seen), shard_size=2, distribution=DISTRIBUTION)
        loss.join(60)
        assert not loss.is_alive() and len(list(seen.iterdir())) == 2
        assert parts(tmp_path / "out") == parts(tmp_path / "whole") and verify(tmp_path / "out") == []

    @pytest.mark.parametrize("kind", ["flat", "ivf"])
    def test_an_index_is_built_in_parts(self, cluster: Any, kind: str, tmp_path: Path) -> None:
        vectors = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
        vectors[40] = np.nan
        write_embeddings(tmp_path / "e", [f"i{row}" for row in range(300)], vectors, shard_size=70)
        one = build_index(tmp_path / "e", tmp_path / "one", kind=kind)
        several = build_index(tmp_path / "e", tmp_path / "several", kind=kind, ray_tasks=2)
        same = ("factory", "rows", "left_out_reasons", "recall@10", "effort")
        assert [one[name] for name in same] == [several[name] for name in same] and several["rows"] == 299
        found = [ItemIndex.open(tmp_path / name).search(vectors[:9], 5) for name in ("one", "several")]
        for mine, other in zip(*found, strict=True):
            np.testing.assert_array_equal(mine, other)

    def test_a_damaged_shard_stops_the_build(self, cluster: Any, tmp_path: Path) -> None:
        write_embeddings(tmp_path / "e", list("abcdef"), np.eye(6, 8, dtype=np.float32), shard_size=2)
        (tmp_path / "e" / schema.shard_name(1)).unlink()
        with pytest.raises(ArtifactError, match="is missing or has another size"):
            build_index(tmp_path / "e", tmp_path / "index", kind="flat", ray_tasks=2)
        assert not (tmp_path / "index").exists()

    @pytest.mark.slow
    def test_the_whole_line_is_one_job_with_one_file(
        self, cluster: Any, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw_catalogue(tmp_path, products=30, users=24, seed=0)
        ray_tasks = {"engine": "ray", "num_workers": 2}
        catalogue = {name: str(tmp_path / f"{name}.parquet") for name in ("items", "interactions")}
        catalogue |= {"images": str(tmp_path / "images")}
        out = {name: str(tmp_path / name) for name in ("data", "embeddings", "index")}
        encoder = {"data": out["data"], "backbone": str(tiny("qwen2_5_vl")), "vision_cache": "off", "device": "cpu"}
        stages = {
            "prepare": catalogue | {"out": out["data"], "core": 2, "candidates": 10, "candidate_seeds": [0]},
            "export-items": encoder | {"out": out["embeddings"], "shard_size": 10} | ray_tasks,
            "build-index": {"embeddings": out["embeddings"], "out": out["index"], "kind": "ivf", "sample": 10}
            | ray_tasks,
        }
        (tmp_path / "line.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
        monkeypatch.chdir(tmp_path)
        for expected in ("done", "was done"):  # a job that is submitted again finds everything done
            found = run.run(RunConfig(config=Path("line.yaml")))
            assert [each["state"] for each in found["stages"]] == [expected] * 3
        assert verify(tmp_path / "embeddings") == []
        assert len(ItemIndex.open(tmp_path / "index")) == Dataset(tmp_path / "data").catalogue_size

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
    def test_an_encoder_works_inside_map_batches(
        self, cluster: Any, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A thread of Ray asks for metrics until the process ends, and fails. Its traceback is made with `ast`, which
        # in Python 3.11 breaks an `ast.parse` of a later test that it interrupts.
        monkeypatch.setenv("RAY_DATA_USAGE_DISABLED", "1")
        encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")

        def encode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            titles = list(batch["title"])
            return {"title": batch["title"], "text": encoder.encode_items(titles, [None] * len(titles)).text}

        titles = ["red chair", "small lamp", "red chair"]
        rows = ray.data.from_items([{"title": title} for title in titles]).map_batches(encode, batch_size=1).take_all()
        expected = encoder.encode_items(titles, [None] * 3).text
        for row in rows:
            assert np.array_equal(row["text"], expected[titles.index(row["title"])])
