"""The study's YAML: what it may say, and the steps that come of it. Nothing runs here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.training.losses import VLM2RecLoss, penalty_weight
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.experiments import ledger
from vlm2rec.pipelines.experiments.methods import (
    SOURCES,
    AnalysisPlan,
    Grid,
    Method,
    Run,
    SearchPlan,
    Study,
    Target,
    read_study,
    runs,
)
from vlm2rec.pipelines.reporting.paper import read_paper

HOME = Target("home", Path("/data/home"))
THERE = Target("there", Path("/data/there"), "cross-0-")


def study(tmp_path: Path, users: int | None = None, **keys: Any) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(keys))
    return read_study(StudyConfig(out=tmp_path / "out", config=file), users=users)


def laid_out(found: Study, domains: tuple[Target, ...] = ()) -> dict[tuple[str, int | None], Run]:
    laid = runs(found, Path("out"), HOME, domains, "BB", "cpu")
    assert len({run.folder for run in laid}) == len(laid)
    return {(run.method.name, run.seed): run for run in laid}


def names(run: Run) -> list[str]:
    return [step.name for step in run.steps]


def test_a_second_file_overrides_keys_of_the_first_and_leaves_the_others(tmp_path: Path) -> None:
    first = {
        "finetune": {"max_steps": 400, "learning_rate": 0.001},
        "plan": {"main": {"seeds": [1, 2, 3], "tasks": [2], "models": ["GRU4Rec"]}},
        "methods": [{"name": "A", "source": "finetune", "finetune": {"rank": 4}}],
        "analyses": ["main"],
        "reference": "A",
        "grids": [],
    }
    second = {"finetune": {"max_steps": 20}, "plan": {"main": {"seeds": [1], "tasks": [2], "models": ["SASRec"]}}}
    files = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    for file, keys in zip(files, (first, second), strict=True):
        file.write_text(yaml.safe_dump(keys))
    config = StudyConfig(out=tmp_path / "out", config=files[0], override=files[1])
    found = read_study(config)
    assert found.finetune == {"max_steps": 20, "learning_rate": 0.001}
    assert (found.plan["main"].seeds, found.plan["main"].models) == ((1,), ("SASRec",))
    assert [(method.name, method.finetune) for method in found.methods] == [("A", {"rank": 4})]
    files[1].write_text("fintune: {max_steps: 20}")
    with pytest.raises(ConfigError, match=r"unknown key 'fintune' in \S*second.yaml \(did you mean 'finetune'"):
        read_study(config)


def test_the_default_study_holds_the_papers_rows_ablations_and_grids() -> None:
    found = read_study(StudyConfig(out=Path("out")))
    rows = {method.paper for method in found.methods}
    assert {"ID", "VLM vanilla (int.)", "VLM vanilla (ext.)", "VLM SFT (int.)", "VLM SFT (ext.)", "VLM2Rec"} <= rows
    assert {"LLM vanilla", "LLM SFT", "VLM prompt"} <= rows
    assert {"w/o WPCL", "w/o stop-gradient", "w/o w_pen", "w/o CRTR"} <= rows
    grid = {(method.varies, method.finetune[method.varies]) for method in found.methods if method.varies}
    assert grid == {
        *{("users", value) for value in (128, 256, 512, 1024)},
        *{("tau_wpcl", value) for value in (0.05, 0.5, 1.0)},  # 0.1 is the method itself
        *{("tau_crtr", value) for value in (0.001, 0.01, 1.0)},
        *{("lam", value) for value in (0.5, 1.0)},
    }


def test_every_step_of_the_default_study_is_a_setting_of_its_command() -> None:
    laid = laid_out(read_study(StudyConfig(out=Path("out"))), (THERE,))
    assert {seed for name, seed in laid if name == "VLM2Rec"} == {0, 1, 2, 3, 4}
    assert names(laid["VLM2Rec", 0]) == [
        *("adapter", "embeddings", "evaluate", "recommender-SASRec", "recommender-GRU4Rec"),
        *("cross-0-embeddings", "cross-0-evaluate", "cross-0-recommender-SASRec"),
    ]
    for run in laid.values():
        for step in run.steps:
            assert step.folder.parent in (run.folder, run.folder.parent / "seed-any")


def test_the_demo_study_is_the_same_with_fewer_runs_at_the_sides() -> None:
    demo = read_study(StudyConfig(out=Path("out"), demo=True), users=600)
    plain = read_study(StudyConfig(out=Path("out")), users=600)
    assert [m.name for m in demo.methods] == [m.name for m in plain.methods]
    assert demo.plan["main"] == plain.plan["main"]
    assert demo.plan["sensitivity"].seeds == (0,) and demo.plan["sensitivity"].tasks == (1,)
    assert demo.finetune["learning_rate"] == 1e-3


def test_an_ablation_changes_one_setting_and_nothing_else() -> None:
    laid = laid_out(read_study(StudyConfig(out=Path("out"))))
    full = dataclasses.asdict(laid["VLM2Rec", 0].steps[0].config)
    changed = {
        "VLM2Rec w/o WPCL": {"wpcl": False},
        "VLM2Rec w/o stop-gradient": {"stop_gradient": False},
        "VLM2Rec w/o w_pen": {"penalty": False},
        "VLM2Rec w/o CRTR": {"crtr": False},
        "VLM2Rec (tau_crtr=0.01)": {"tau_crtr": 0.01},
        "VLM2Rec (K=128)": {"users": 128},
    }
    for name, difference in changed.items():
        other = dataclasses.asdict(laid[name, 0].steps[0].config)
        found = {key: value for key, value in other.items() if value != full[key] and key not in ("out",)}
        assert {key: value for key, value in found.items() if key != "gradient_steps"} == difference


def test_what_no_random_number_enters_is_made_once_and_read_by_every_seed() -> None:
    laid = laid_out(read_study(StudyConfig(out=Path("out"))))
    vanilla = laid["VLM vanilla (external)", None]
    assert names(vanilla) == ["embeddings", "evaluate"]
    for seed in range(5):
        steps = laid["VLM vanilla (external)", seed].steps
        assert [step.name for step in steps] == ["recommender-SASRec", "recommender-GRU4Rec"]
        assert {step.config.embeddings for step in steps} == {vanilla.steps[0].folder}
        assert {step.config.seed for step in steps} == {seed}


def test_runs_go_seed_by_seed() -> None:
    laid = runs(read_study(StudyConfig(out=Path("out"))), Path("out"), HOME, (), "BB", "cpu")
    seeds = [-1 if run.seed is None else run.seed for run in laid]
    assert seeds == sorted(seeds)


def test_an_analysis_asks_only_for_its_own_seeds_tasks_and_models(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        analyses=["main", "ablation"],
        plan={
            "main": {"seeds": [3], "tasks": [1], "models": []},
            "ablation": {"seeds": [3, 4], "tasks": [2], "models": ["GRU4Rec"]},
        },
        methods=[
            {"name": "VLM2Rec", "source": "finetune", "analyses": ["main", "ablation"]},
            {"name": "SFT", "source": "finetune", "finetune": {"loss": "sft"}},
            {"name": "w/o", "source": "finetune", "analyses": ["ablation"], "finetune": {"crtr": False}},
        ],
        grids=[],
    )
    laid = laid_out(found)
    assert names(laid["VLM2Rec", 3]) == ["adapter", "embeddings", "evaluate", "recommender-GRU4Rec"]
    assert names(laid["VLM2Rec", 4]) == ["adapter", "embeddings", "recommender-GRU4Rec"]
    assert names(laid["SFT", 3]) == ["adapter", "embeddings", "evaluate"]
    assert ("SFT", 4) not in laid
    assert names(laid["w/o", 3]) == ["adapter", "embeddings", "recommender-GRU4Rec"]


def test_vectors_of_yours_enter_with_pca_and_a_two_layer_adapter(tmp_path: Path) -> None:
    yours = {"name": "yours", "source": "vectors", "file": "v.parquet", "pca": 32, "adapter": "mlp"}
    laid = laid_out(study(tmp_path, more_methods=[yours]))
    assert len(laid) > 100  # beside the default methods
    embed, rank = laid["yours", None].steps
    assert (embed.command, embed.config.file, embed.config.pca) == ("import-vectors", Path("v.parquet"), 32)
    assert rank.config.backbone is None  # Task 1 takes the mean of the history
    assert {step.config.adapter for step in laid["yours", 0].steps} == {"mlp"}


@pytest.mark.parametrize(
    ("source", "options", "command"),
    [
        ("sentence-transformers", {"folder": "m"}, "export-items"),
        ("clip", {"folder": "m"}, "export-items"),
        ("prompt", {}, "export-items"),
        ("backbone", {"export": {"views": "text"}}, "export-items"),
    ],
)
def test_each_source_has_its_command(tmp_path: Path, source: str, options: dict[str, Any], command: str) -> None:
    found = study(tmp_path, more_methods=[{"name": "new", "source": source, **options}])
    assert laid_out(found)["new", None].steps[0].command == command


COMMON = {
    "shard_size": 4096,
    "storage": "float32",
    "images_by": "mtime",
    "extend": False,
    "retry_failed": False,
    "changed_since": None,
    "image_timeout": 60.0,
    "max_failures": 0.01,
    "contents of data": "mark",
}


@pytest.mark.parametrize(
    ("method", "command", "recorded"),
    [
        (
            {"source": "sentence-transformers", "folder": "m"},
            "encode-frozen",
            {"kind": "sentence", "pooling": "auto", "fusion_norm": "raw", "dtype": "float32", "on_image_error": "null"},
        ),
        (
            {"source": "clip", "folder": "m", "fusion_norm": "normalised"},
            "encode-frozen",
            {"kind": "clip", "pooling": "auto", "fusion_norm": "normalised", "dtype": "float32"},
        ),
        (
            {"source": "prompt", "instruction": "What?"},
            "encode-prompted",
            {
                **{"backbone": "BB", "revision": None, "instruction": "What?", "prompt_mode": "auto", "dtype": "auto"},
                **{"max_pixels": 50176, "max_title_tokens": 64},
            },
        ),
    ],
)
def test_finished_steps_of_commands_that_are_no_more_are_recognised(
    tmp_path: Path, method: dict[str, Any], command: str, recorded: dict[str, Any]
) -> None:
    found = study(tmp_path, more_methods=[{"name": "new", **method}])
    run = dataclasses.replace(laid_out(found)["new", None], folder=tmp_path)
    step = run.steps[0]
    now = ledger.identity(step, Path("out"), "mark")
    recorded = {**COMMON, **recorded, "data": now["data"]}
    if command == "encode-frozen":
        recorded["encoder"] = now["encoder"]
    record = {"command": command, "settings": recorded}
    (tmp_path / ledger.STEPS_FILE).write_text(json.dumps({step.name: record}))
    assert ledger.change(run, step, now) is None
    record["settings"] = recorded | {"shard_size": 8}
    (tmp_path / ledger.STEPS_FILE).write_text(json.dumps({step.name: record}))
    changed = ledger.change(run, step, now)
    assert changed is not None and (changed.setting, changed.before, changed.now) == ("shard_size", 8, 4096)


def test_a_training_from_before_the_reductions_counts_as_one_by_means(tmp_path: Path) -> None:
    found = study(tmp_path)
    for name, changed in (("VLM2Rec", ("reduction", "mean", "paper")), ("SFT (external)", None)):
        run = dataclasses.replace(laid_out(found)[name, 0], folder=tmp_path)
        step = run.steps[0]
        now = ledger.identity(step, Path("out"), "mark")
        recorded = {key: value for key, value in now.items() if key != "reduction"}
        record = {step.name: {"command": "finetune", "settings": recorded}}
        (tmp_path / ledger.STEPS_FILE).write_text(json.dumps(record))
        change = ledger.change(run, step, now)
        assert (change and (change.setting, change.before, change.now)) == changed


def test_the_strategies_are_rows_beside_the_others_whose_users_are_the_mean_of_their_items() -> None:
    file = Path(__file__).parent / "benchmarks" / "study_strategies.yaml"
    laid = laid_out(read_study(StudyConfig(out=Path("out"), config=file)))
    wanted = {"visual": "visual", "textual": "textual", "prompt 1": "prompt1", "prompt 2": "prompt2", "dual": "dual"}
    for name, strategy in wanted.items():
        embed, rank = laid[f"VLM2Vec {name}", None].steps
        assert (embed.command, embed.config.strategy, embed.config.backbone) == ("export-items", strategy, "BB")
        assert (rank.command, rank.config.backbone, rank.config.embeddings) == ("evaluate", None, embed.folder)
        assert names(laid[f"VLM2Vec {name}", 0]) == ["recommender-SASRec", "recommender-GRU4Rec"]
    assert ("VLM2Rec", 0) in laid
    assert laid["VLM vanilla (external)", None].steps[1].config.backbone == "BB"


def test_a_method_of_the_backbone_takes_an_adapter_that_is_there_already(tmp_path: Path) -> None:
    methods = [
        {"name": "theirs", "source": "backbone", "export": {"adapter": "A", "prompt_mode": "chat"}},
        {"name": "by strategy", "source": "backbone", "strategy": "dual", "export": {"adapter": "A"}},
    ]
    laid = laid_out(study(tmp_path, more_methods=methods))
    embed, rank = laid["theirs", None].steps
    assert (embed.config.adapter, rank.config.adapter, rank.config.backbone) == (Path("A"), Path("A"), "BB")
    embed, rank = laid["by strategy", None].steps
    assert (embed.config.adapter, rank.config.adapter, rank.config.backbone) == (Path("A"), None, None)


def test_backbones_are_a_grid_of_the_reference(tmp_path: Path) -> None:
    found = study(tmp_path, backbones=["/models/small", "/models/large"])
    laid = laid_out(found)
    assert laid["VLM2Rec on large", 0].steps[0].config.backbone == "/models/large"
    assert laid["VLM2Rec on large", 0].steps[0].config.gradient_steps == 0
    assert found.method("VLM2Rec on small").analyses == ("families",)
    assert "families" in found.method("VLM2Rec").analyses


def test_few_shot_leaves_out_what_the_dataset_has_no_users_for(tmp_path: Path) -> None:
    found = study(tmp_path, users=300)
    assert [m.finetune["users"] for m in found.methods if m.varies == "users"] == [128, 256]
    assert found.notes == tuple(f"few-shot K = {k} is left out: there are only 300 users" for k in (512, 1024))


def test_a_file_is_laid_over_the_default(tmp_path: Path) -> None:
    found = study(tmp_path, finetune={"epochs": 1.0}, plan={"main": {"seeds": [7]}})
    assert found.finetune == {"epochs": 1.0}
    assert found.plan["main"].seeds == (7,)
    assert found.plan["ablation"].seeds == (0, 1, 2, 3, 4)
    assert len(found.methods) == len(read_study(StudyConfig(out=tmp_path)).methods)


def test_flags_choose_seeds_analyses_and_methods(tmp_path: Path) -> None:
    found = read_study(StudyConfig(out=tmp_path, seeds=(5, 6), analyses=("main",)))
    assert {asked.seeds for asked in found.plan.values()} == {(5, 6)}
    assert found.analyses == ("main",)
    assert [m.name for m in found.picked(("vlm2rec", "SFT (external)"))] == ["SFT (external)", "VLM2Rec"]
    assert {seed for _, seed in laid_out(found)} == {None, 5, 6}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"methodz": []}, r"unknown key 'methodz'.*did you mean 'methods'"),
        ({"methods": [{"name": "VLM2Rec", "source": "finetun"}], "grids": []}, r"source 'finetun'.*'finetune'"),
        ({"more_methods": [{"source": "id"}]}, "a mapping with name and source"),
        ({"more_methods": [{"name": "vlm2rec!", "source": "id"}]}, "share the folder 'vlm2rec'"),
        ({"methodz": []}, r"most similar are methods, [a-z_]+, [a-z_]+, and docs/study.md lists all"),
        (
            {"plan": {"main": {"seed": [0]}}},
            r"'seed'.*did you mean 'seeds'.*one of seeds, tasks, models",
        ),
        ({"plan": {"main": {"models": ["SASREC"]}}}, "plan.main"),
        ({"analyses": ["ablatoin"]}, r"'ablatoin'.*did you mean 'ablation'"),
        ({"grids": [{"analysis": "sensitivity", "of": "VLM2Rec", "varies": "tau", "values": [1]}]}, "varies 'tau'"),
        ({"grids": [{"analysis": "sensitivity", "of": "X", "varies": "lam", "values": [1]}]}, "called 'X'"),
        ({"reference": "mine"}, "no method is called 'mine'"),
        ({"finetune": {"learning_rat": 1}}, r"unknown setting 'learning_rat'.*'learning_rate'"),
        (
            {"finetune": {"learning_rat": 1}},
            r"are learning_rate, \w+, \w+, and `vlm2rec finetune --help` lists",
        ),
        ({"recommender": {"max_epochs": "many"}}, "max_epochs"),
        ({"more_methods": [{"name": "v", "source": "vectors"}]}, "--file is missing"),
        ({"more_methods": [{"name": "v", "source": "backbone", "strategy": "visul"}]}, "strategy"),
        ({"more_methods": [{"name": "v", "vectors_of": "VLM2Rek"}]}, "no method is called 'VLM2Rek'"),
        ({"more_methods": [{"name": "v", "vectors_of": "ID"}]}, "vectors_of 'ID'.*makes vectors itself"),
        ({"more_methods": [{"name": "v", "vectors_of": "VLM2Rec by means"}]}, "in the same analyses"),
        ({"more_methods": [{"name": "v", "vectors_of": "VLM2Rec", "export": {"dim": 8}}]}, "vectors_of and export"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_anything_runs(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        laid_out(study(tmp_path, **keys))


def test_methods_that_read_the_same_vectors_make_them_once(tmp_path: Path) -> None:
    fused = {"mode": "fuse"}
    more = [
        {"name": "vanilla with ids", "vectors_of": "VLM vanilla (external)", "recommender": fused},
        {"name": "VLM2Rec with ids", "vectors_of": "VLM2Rec", "recommender": fused, "models": ["SASRec"]},
    ]
    plan = {"main": {"seeds": [0, 1], "models": ["SASRec", "GRU4Rec"]}}
    found = study(tmp_path, analyses=["main"], plan=plan, more_methods=more)
    laid = laid_out(found)
    assert ("vanilla with ids", None) not in laid
    steps = {name: laid[name, 1].steps for name in ("vanilla with ids", "VLM2Rec with ids", "VLM2Rec")}
    assert [step.name for step in steps["vanilla with ids"]] == ["recommender-SASRec", "recommender-GRU4Rec"]
    assert {step.config.embeddings for step in steps["vanilla with ids"]} == {
        Path("out/vlm-vanilla-external/seed-any/embeddings")
    }
    (only,) = steps["VLM2Rec with ids"]
    made = next(step for step in steps["VLM2Rec"] if step.name == "embeddings")
    assert (only.config.embeddings, only.after, only.config.mode) == (made.folder, (made.folder,), "fuse")


def test_a_picked_method_of_no_chosen_analysis_is_refused(tmp_path: Path) -> None:
    study = read_study(StudyConfig(out=tmp_path, analyses=("main",)))
    study.check_taking_part(study.picked(("VLM2Rec", "ID")))
    with pytest.raises(ConfigError, match=r"'VLM2Rec by means'.* \(main\).*: arms.*--analyses"):
        study.check_taking_part(study.picked(("VLM2Rec", "VLM2Rec by means")))


def test_a_method_that_does_not_exist_cannot_be_picked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'VLM2Rec'"):
        read_study(StudyConfig(out=tmp_path)).picked(("VLM2rek",))


def test_vectors_that_know_only_one_catalogue_cannot_go_elsewhere(tmp_path: Path) -> None:
    yours = {"name": "yours", "source": "vectors", "file": "v.npy", "analyses": ["main", "cross-domain"]}
    with pytest.raises(ConfigError, match="items it has not seen"):
        laid_out(study(tmp_path, more_methods=[yours]), (THERE,))


def test_every_source_is_documented_by_a_method_or_a_test() -> None:
    ours = {"id", "backbone", "finetune", "vectors", "prompt"}
    assert set(SOURCES) == ours | {"sentence-transformers", "clip", "image-encoder"}


def test_image_encoders_stand_alone_or_beside_a_text_encoder(tmp_path: Path) -> None:
    alone = {"name": "resnet", "source": "image-encoder", "folder": "resnet", "analyses": ["main"]}
    pair = {"name": "both", "source": "sentence-transformers", "folder": "bert", "image_encoder": "resnet"}
    laid = laid_out(study(tmp_path, more_methods=[alone, pair | {"analyses": ["main"]}]))
    steps = [(run.method.name, step) for run in laid.values() for step in run.steps]
    found = {name: step.config for name, step in steps if step.command == "export-items"}
    assert (found["resnet"].encoder, found["resnet"].encoder_kind) == (Path("resnet"), "image")
    assert (found["both"].encoder, found["both"].image_encoder) == (Path("bert"), Path("resnet"))


def test_a_row_of_sda_is_a_method_of_finetune_and_takes_what_is_common_without_what_it_does_not_have() -> None:
    found = read_study(StudyConfig(out=Path("out")))
    found = dataclasses.replace(found, finetune={"learning_rate": 0.01, "lam": 0.5, "users": 100})
    laid = laid_out(found)
    sda, vlm2rec = (laid[name, 0].steps[0].config for name in ("SDA", "VLM2Rec"))
    assert (sda.method, sda.prompt_style, sda.pooling, sda.lora_rank) == ("sda", "sda", "mean", 8)
    assert (sda.learning_rate, sda.lam, sda.users) == (0.01, 0.1, 0)
    assert (vlm2rec.method, vlm2rec.learning_rate, vlm2rec.lam, vlm2rec.users) == ("vlm2rec", 0.01, 0.5, 100)
    assert names(laid["SDA", 0]) == names(laid["VLM2Rec", 0])[:5]


def test_a_grid_over_sda_knows_its_own_defaults(tmp_path: Path) -> None:
    grids = [{"analysis": "sensitivity", "of": "SDA", "varies": "lora_rank", "values": [8, 16]}]
    found = study(tmp_path, grids=grids)
    assert [method.name for method in found.methods if method.of == "SDA"] == ["SDA (lora_rank=16)"]


def test_the_docs_name_the_rows_of_the_papers_tables_that_are_absent() -> None:
    """Rows of Tables 2 and 4 that no method of study.yaml stands beside."""
    study = read_study(StudyConfig(out=Path("out")))
    ours = {method.paper for method in study.methods} | {"SASRec", "GRU4Rec"}  # the ids' rows are named by their model
    paper = read_paper()
    printed = {*paper["task1"], *paper["task2"]["SASRec"], *paper["task2"]["GRU4Rec"]}
    absent = printed - ours
    assert absent == {"BERT", "CLIP"}
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    said = " ".join(text[text.index("**Absent**") :].split())[:400]
    for name in absent:
        assert name in said, name
    few_shot = {row for row in paper["few-shot"]["Beauty"] if not row.startswith("K=")}
    ours_few = {method.paper for method in study.methods if "few-shot" in method.analyses}
    assert few_shot - ours_few - absent == {"LLM SFT", "LLMEmb", "LLM2Rec", "NoteLLM-2"}
    assert "in Table 7 LLM SFT, LLMEmb, LLM2Rec and NoteLLM-2" in said
    across = {method.paper for method in study.methods if "cross-domain" in method.analyses}
    assert {*paper["cross-domain"]["Clothing → Beauty"]} - absent - across == {"LLMEmb", "NoteLLM-2"}
    assert "in Table 6 LLMEmb and NoteLLM-2" in said
    assert {*paper["ablation"]["Beauty"]} <= ours


# --- arms -------------------------------------------------------------------------------------------------------
def test_the_arms_are_run_only_on_request_and_in_task_1(tmp_path: Path) -> None:
    assert "arms" not in read_study(StudyConfig(out=Path("out"))).analyses
    laid = laid_out(read_study(StudyConfig(out=Path("out"), analyses=("arms",), seeds=(0,))))
    assert {name for name, _ in laid} == {
        *("VLM vanilla (external)", "SFT (external)", "Text only SFT", "Image only SFT", "SFT with constant w"),
        *("VLM2Rec", "VLM2Rec w/o CRTR", "VLM2Rec by means", "VLM2Rec with shuffled images"),
    }
    for run in laid.values():
        assert [name for name in names(run) if name != "adapter"] in (["embeddings", "evaluate"], [])


def test_an_arm_with_shuffled_images_reads_them_in_every_step_and_cannot_go_elsewhere(tmp_path: Path) -> None:
    found = study(tmp_path, analyses=["arms"])
    shuffled = laid_out(found)["VLM2Rec with shuffled images", 0]
    assert {step.config.data for step in shuffled.steps} == {Path("out/shuffled-images")}
    method = {"name": "VLM2Rec", "source": "finetune", "analyses": ["cross-domain"], "shuffle_images": True}
    with pytest.raises(ConfigError, match="with their own images"):
        laid_out(study(tmp_path, methods=[method]), (THERE,))


def test_a_constant_w_does_not_depend_on_the_margins(tmp_path: Path) -> None:
    values = study(tmp_path, analyses=["arms"]).method("SFT with constant w").finetune
    loss = VLM2RecLoss(alpha=values["alpha"], learnable=values["learnable"], crtr=values["crtr"])
    weight = penalty_weight(torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(3), loss.alpha, loss.beta)
    assert torch.allclose(weight, torch.full((3,), 1 + math.log(2.0)), atol=1e-6)


def test_multimodal_recommenders_have_their_own_settings_and_no_row_from_ids(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "analyses": ["main"],
        "reference": "Text",
        "plan": {"main": {"seeds": [0], "tasks": [2], "models": ["SASRec", "FREEDOM"]}},
        "methods": [
            {"name": "ID", "source": "id"},
            {"name": "Text", "source": "backbone", "recommender": {"features": ["text"]}},
        ],
        "grids": [],
    }
    laid = laid_out(study(tmp_path, **given, recommender={"pca": 8, "pruning": 0.9, "max_epochs": 3}))
    assert names(laid["ID", 0]) == ["recommender-SASRec"]
    sequential, multimodal = (step.config for step in laid["Text", 0].steps)
    assert (sequential.model, sequential.pca, sequential.features, sequential.hidden_size) == ("SASRec", 8, (), 128)
    assert (multimodal.model, multimodal.pruning, multimodal.features) == ("FREEDOM", 0.9, ("text",))
    assert (multimodal.pca, multimodal.hidden_size, multimodal.max_epochs, sequential.max_epochs) == (None, 64, 3, 3)
    assert laid["ID", 0].steps[0].config.pca is None, "a row from ids has no vectors"
    with pytest.raises(ConfigError, match=r"recommender: ssl_weight .*FREEDOM, GRU4Rec, SASRec"):
        study(tmp_path, **given, recommender={"ssl_weight": 0.5})


def test_the_last_line_of_a_run_is_found_in_a_long_log_and_without_one(tmp_path: Path) -> None:
    run = Run(read_study(StudyConfig(out=tmp_path)).method("VLM2Rec"), 0, tmp_path, ())
    assert ledger.last_line(run) == ""
    (tmp_path / ledger.LOG_FILE).write_bytes(b"\xc3" * 5000 + "\nfinetune: 3 of 4 \u00e9 \n\n".encode())
    assert ledger.last_line(run) == "finetune: 3 of 4 \u00e9"


def test_the_docs_list_every_key_of_the_file() -> None:
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", page.split("All keys of the file", 1)[1], re.MULTILINE))
    ours = {"the file": Study, "an analysis of `plan`": AnalysisPlan, "a method": Method, "a grid": Grid}
    for where, cls in {**ours, "`search`": SearchPlan}.items():
        known = {each.name for each in dataclasses.fields(cls)} - {"notes", "options"}
        more = {"more_methods", "grids", "backbones"} if cls is Study else set()
        assert set(re.findall(r"`(\w+)`", rows[where])) == known | more, where
