"""Adapters that other programs made: plain PEFT folders, right to the last weight or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from drawn_lora import draw_lora
from peft import LoraConfig, PeftModel, get_peft_model

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.adapters import lora, peft_folder
from vlm2rec.embedder.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, ModelError, Vlm2RecError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of
from vlm2rec.pipelines import convert, evaluate, export_items, finetune, import_adapter
from vlm2rec.pipelines.config import (
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    ImportAdapterConfig,
)

Tiny = Callable[[str], Path]
Refuses = Callable[[Path, str], ModelError]
TEXT_LAYERS = r".*language_model.*\.(q_proj|v_proj)"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call


def stock(backbone: Path) -> Any:
    text_only = json.loads((backbone / "config.json").read_text())["model_type"] in ("qwen2", "qwen3", "llama")
    loader = transformers.AutoModelForCausalLM if text_only else transformers.AutoModelForImageTextToText
    return loader.from_pretrained(backbone, dtype=torch.float32)


def write_peft(backbone: Path, folder: Path, drawn: str = "lora_B", **settings: Any) -> Path:
    """Write an adapter with PEFT alone; the matrices whose names hold `drawn` are random."""
    wrapped = get_peft_model(
        stock(backbone), LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings))
    )
    if drawn:
        draw_lora(wrapped, drawn, 0.1, seed=1)
    wrapped.save_pretrained(str(folder))
    return folder


def merged_by_peft(backbone: Path, adapter: Path) -> dict[str, torch.Tensor]:
    merged: Any = PeftModel.from_pretrained(stock(backbone), str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


def merged_here(backbone: Path, adapter: Path) -> dict[str, torch.Tensor]:
    found = Backbone.load(str(backbone), dtype="float32", device="cpu")
    lora.merge_adapter(found, adapter)
    return dict(found.model.state_dict())


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    path = adapter / WEIGHTS_FILE
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})
    return adapter


def edit(adapter: Path, **changes: Any) -> Path:
    path = adapter / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter


@pytest.fixture
def backbone(tiny: Tiny) -> Path:
    return tiny("qwen2_5_vl")


@pytest.fixture(scope="module")
def written(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_peft(tiny("qwen2_5_vl"), tmp_path_factory.mktemp("written"))


@pytest.fixture
def adapter(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "theirs")


@pytest.fixture(scope="module")
def refuses(tiny: Tiny) -> Iterator[Callable[[Path, str], ModelError]]:
    """`refuses(adapter, message)` asserts that the adapter is refused before a weight of its backbone has changed."""
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}

    def refuse(adapter: Path, message: str) -> ModelError:
        with pytest.raises(ModelError, match=message) as refusal:
            lora.merge_adapter(backbone, adapter)
        assert "vlm2rec finetune" not in str(refusal.value)  # advice for adapters of ours
        return refusal.value

    yield refuse
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


# --- what is taken, as PEFT takes it ----------------------------------------------------------------------------
LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
TAKEN: dict[str, dict[str, Any]] = {
    "q and v only": {},
    "all seven, by an expression": {"target_modules": LANGUAGE, "r": 8, "lora_alpha": 32},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 16},
    "DoRA": {"use_dora": True, "drawn": "lora_"},
    "DoRA as VLM2Vec": {"use_dora": True, "init_lora_weights": "gaussian", "target_modules": LANGUAGE, "r": 16},
    "rank_pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3, "q_proj": 64}, "use_rslora": True},
    "one layer": {"layers_to_transform": [1]},
    "one layer by its pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "without one layer": {"exclude_modules": ["layers.0.self_attn.q_proj"], "target_modules": ["q_proj", "o_proj"]},
    "without some by an expression": {"exclude_modules": r".*\.0\..*", "target_modules": LANGUAGE},
    "half precision": {"dtype": torch.float16},
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_folder_of_peft_gives_the_weights_that_peft_merges(backbone: Path, tmp_path: Path, case: str) -> None:
    settings = dict(TAKEN[case])
    dtype = settings.pop("dtype", torch.float32)
    adapter = write_peft(backbone, tmp_path / "theirs", **settings)
    rewrite(adapter, lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()})
    require_same(merged_here(backbone, adapter), merged_by_peft(backbone, adapter))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "llava", "qwen2", "llama"])
def test_every_family_takes_one(tiny: Tiny, tmp_path: Path, family: str) -> None:
    layers = LANGUAGE if family not in ("qwen2", "llama") else ["q_proj", "v_proj", "down_proj"]
    adapter = write_peft(tiny(family), tmp_path / "theirs", target_modules=layers)
    require_same(merged_here(tiny(family), adapter), merged_by_peft(tiny(family), adapter))


@pytest.mark.parametrize(
    ("family", "before"),
    [
        *(("qwen2_5_vl", start) for start in ("model.layers", "language_model.layers", "layers")),
        *(("qwen2_vl", "model.layers"), ("llava", "language_model.model.layers")),
        *(("internvl", "language_model.model.layers"), ("qwen3_vl", "language_model.layers"), ("qwen2", "layers")),
    ],
)
def test_names_of_another_release_mean_the_same_layers(tiny: Tiny, tmp_path: Path, family: str, before: str) -> None:
    today = "model.layers" if family == "qwen2" else "model.language_model.layers"
    adapter = write_peft(tiny(family), tmp_path / "theirs", rank_pattern={r"layers\.1\.self_attn\.v_proj": 2})
    if family == "llava":  # its vision tower has q_proj and v_proj too
        adapter = write_peft(tiny(family), tmp_path / "theirs", target_modules=TEXT_LAYERS)
        edit(adapter, target_modules=["q_proj", "v_proj"])
    if family == "internvl":
        adapter = write_peft(tiny(family), tmp_path / "theirs", target_modules=TEXT_LAYERS)
        edit(adapter, target_modules=r".*layers\.\d+\.self_attn\.(q|v)_proj")
    expected = merged_by_peft(tiny(family), adapter) if family not in ("llava", "internvl") else None
    expected = expected or merged_here(tiny(family), adapter)
    rewrite(adapter, lambda weights: {name.replace(today, before): tensor for name, tensor in weights.items()})
    assert any(f"model.{before}.0" in key for key in safetensors.torch.load_file(adapter / WEIGHTS_FILE))
    require_same(merged_here(tiny(family), adapter), expected)


def test_in_bfloat16_the_update_is_rounded_once(backbone: Path, adapter: Path) -> None:
    half = Backbone.load(str(backbone), dtype="bfloat16", device="cpu")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    before = half.model.state_dict()[name].float()
    weights = safetensors.torch.load_file(adapter / WEIGHTS_FILE)
    a, b = (weights[f"base_model.model.{name.replace('weight', f'lora_{matrix}.weight')}"] for matrix in "AB")
    lora.merge_adapter(half, adapter)
    assert torch.equal(half.model.state_dict()[name], (before + 2.0 * (b @ a)).bfloat16())


# --- what is refused, by name ------------------------------------------------------------------------------------
def test_an_adapter_of_zeros_is_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no effect: all its lora_B matrices are zero"):
        merged_here(backbone, write_peft(backbone, tmp_path / "zeros", drawn=""))
    dora = write_peft(backbone, tmp_path / "dora", drawn="", use_dora=True)
    with pytest.raises(ModelError, match="does not change the backbone's output"):
        ItemEncoder.load(backbone, dora, dtype="bfloat16", device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save = \['embed_tokens'\]"),
        ({"target_modules": ["q_proj", "gate_proj"]}, r"changes the vision tower \(\d+ weights, among them .*visual"),
        ({"target_modules": ["qkv"]}, "changes the vision tower"),
        ({"target_modules": ["q_proj", "lm_head"]}, "(none of the language model's|no LoRA matrices).*lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "(none of the|no LoRA matrices).*embed_tokens"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's, about tied weights
def test_more_than_lora_in_the_language_model_is_refused_by_name(
    backbone: Path, tmp_path: Path, refuses: Refuses, settings: dict[str, Any], message: str
) -> None:
    adapter = write_peft(backbone, tmp_path / "theirs", **settings)
    assert "merge_and_unload" in str(refuses(adapter, message))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {n.replace("self_attn", "attention"): t for n, t in w.items()}, "none of the language model's"),
        (lambda w: {n.replace("language_model", "text_model"): t for n, t in w.items()}, "keys such as .*text_model"),
        (lambda w: {n.replace("base_model.model.", "encoder."): t for n, t in w.items()}, "none of the language"),
        (lambda w: {n.replace("lora_A.weight", "lora_A.default.weight"): t for n, t in w.items()}, "lora_A.default"),
        (lambda w: {n.replace("language_model.layers.1", "layers.1"): t for n, t in w.items()}, "2 spellings"),
        (lambda w: dict(list(w.items())[1:]), "1 keys missing, 0 unexpected"),
        (lambda w: {n: t for n, t in w.items() if "layers.1.self_attn.q" not in n}, "2 keys missing"),
        (lambda w: w | {next(iter(w)).replace("q_proj", "k_proj"): torch.ones(4, 64)}, "0 keys missing, 1 unexpected"),
        (lambda w: w | {next(iter(w)).replace(".0.", ".7."): torch.ones(4, 64)}, "0 keys missing, 1 unexpected"),
        (lambda w: w | {"base_model.model.lm_head.weight": torch.ones(2, 64)}, "no LoRA matrices .*lm_head"),
        (lambda w: {n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in w.items()}, r"shape \(4, 63\)"),
        (lambda w: {n: torch.cat([t, t]) if "lora_A" in n else t for n, t in w.items()}, r"shape \(8, 64\)"),
        (lambda w: {n: t * torch.nan for n, t in w.items()}, "other than finite numbers"),
        (lambda w: {n: t.to(torch.int8) for n, t in w.items()}, r"other than finite numbers \(torch.int8\)"),
        (lambda w: {}, "has no weights"),
    ],
)
def test_keys_shapes_and_numbers_that_do_not_fit_are_refused(
    adapter: Path, refuses: Refuses, change: Callable[[Any], Any], message: str
) -> None:
    refuses(rewrite(adapter, change), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"r": value}, "r = ") for value in (0, "4", None, 4.0, True)),
        ({"r": 10**9}, r"has shape \(4, 64\)"),
        *(({"lora_alpha": value}, "lora_alpha = ") for value in (0, float("nan"), None, "8")),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] = 0"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern = \['q_proj'\]"),
        ({"use_dora": True}, "4 keys missing"),
        ({"use_dora": "yes"}, "use_dora = 'yes'"),
        ({"target_modules": None}, "0 keys missing, 8 unexpected"),
        ({"target_modules": {"q_proj": 1}}, "target_modules = "),
        ({"target_modules": "["}, "the expression .* cannot be used"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"a_setting_of_next_year": 3}, "a_setting_of_next_year = 3"),
        ({"layers_to_transform": "all"}, "layers_to_transform = 'all'"),
        ({"auto_mapping": {"base_model_class": "Qwen2VLForConditionalGeneration"}}, "model of type qwen2_vl"),
    ],
)
def test_a_config_that_says_something_else_is_refused(
    adapter: Path, refuses: Refuses, changes: dict[str, Any], message: str
) -> None:
    refuses(edit(adapter, **changes), message)


@pytest.mark.parametrize("where", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_expression_that_never_ends_is_given_up(
    adapter: Path, refuses: Refuses, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_folder, "_MATCHING_SECONDS", 0.2)
    endless = r"(?:[a-z_.0-9]|[a-z_]|.)*[A-Z]"
    edit(adapter, **{where: {endless: 3} if where.endswith("pattern") else endless})
    refuses(adapter, r"the expression .* cannot be used")  # and not matched for ever


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * 64])
def test_a_damaged_file_is_named(adapter: Path, refuses: Refuses, file: str, damage: Callable[[bytes], bytes]) -> None:
    (adapter / file).write_bytes(damage((adapter / file).read_bytes()))
    assert refuses(adapter, file).exit_code == 4


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda a: (a / WEIGHTS_FILE).unlink(), f"has no {WEIGHTS_FILE}"),
        (lambda a: (a / CONFIG_FILE).unlink(), f"has no {CONFIG_FILE}"),
        (lambda a: (a / WEIGHTS_FILE).rename(a / "adapter_model.bin"), "a pickle, which is never opened"),
        (lambda a: (a / "non_lora_trainables.bin").write_bytes(b"x"), "would be left out"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(
    adapter: Path, refuses: Refuses, prepare: Callable[[Path], Any], message: str
) -> None:
    prepare(adapter)
    refuses(adapter, message)


def test_another_base_is_refused(tiny: Tiny, adapter: Path) -> None:
    with pytest.raises(ModelError, match="trained on a model of type qwen2_5_vl"):
        ItemEncoder.load(tiny("qwen2_vl"), adapter, device="cpu")
    edit(adapter, auto_mapping=None)  # as adapters with a task type have it
    with pytest.raises(ModelError, match=r"keys such as|keys missing"):
        ItemEncoder.load(tiny("qwen2"), adapter, views="text", device="cpu")


# --- the whole way ----------------------------------------------------------------------------------------------
def exporting(data: Path, backbone: Path, adapter: Path, out: Path, **more: Any) -> ExportConfig:
    return ExportConfig(
        data=data, backbone=str(backbone), adapter=adapter, out=out, device="cpu", dtype="float32", **more
    )


def test_export_and_evaluate_take_it_and_the_manifest_says_that_no_canary_proves_it(
    drawn_dataset: Path, backbone: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = export_items.run(exporting(drawn_dataset, backbone, adapter, tmp_path / "emb", vision_cache="off"))
    assert manifest is not None and manifest["counts"]["ok"] == 40
    assert manifest["settings"]["adapter"] == schema_hash(adapter)
    about = manifest["made_with"]["adapter"]
    assert (about["name"], about["canary"], about["peft"], about["rank"]) == ("theirs", False, "LoRA", 4)
    assert "no canary" in " ".join(capsys.readouterr().err.split())
    merged = tmp_path / "merged"
    shutil.copytree(backbone, merged)
    whole: Any = PeftModel.from_pretrained(stock(backbone), str(adapter)).merge_and_unload()
    whole.save_pretrained(merged)
    export_items.run(replace(exporting(drawn_dataset, merged, adapter, tmp_path / "peft"), adapter=None))
    ours, theirs = (EmbeddingTable.open(tmp_path / name).vectors for name in ("emb", "peft"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert not np.allclose(ours, ItemEncoder.load(backbone, device="cpu").encode_items(["x"], [None]).text[0])
    config = EvaluateConfig(data=drawn_dataset, embeddings=tmp_path / "emb", out=tmp_path / "ev", device="cpu")
    result = evaluate.run(replace(config, backbone=str(backbone), adapter=adapter, dtype="float32"))
    assert result["users_from"] == "sequence"
    with pytest.raises(Vlm2RecError, match="was exported with adapter"):
        evaluate.run(replace(config, backbone=str(backbone), out=tmp_path / "other"))


def schema_hash(adapter: Path) -> str:
    return peft_folder.weights_hash(adapter)


@pytest.mark.parametrize("strategy", ["dual", "prompt1", "question"])
def test_a_strategy_takes_it_for_its_own_prompts(
    drawn_dataset: Path, backbone: Path, adapter: Path, tmp_path: Path, strategy: Any
) -> None:
    config = exporting(drawn_dataset, backbone, adapter, tmp_path / "with", strategy=strategy)
    manifest = export_items.run(config)
    assert manifest is not None and manifest["settings"]["adapter"] == schema_hash(adapter)
    export_items.run(replace(config, adapter=None, out=tmp_path / "without"))
    one, other = (EmbeddingTable.open(tmp_path / name).vectors for name in ("with", "without"))
    assert one.shape == other.shape and not np.allclose(one, other)


def importing(adapter: Path, backbone: Path, out: Path, **more: Any) -> ImportAdapterConfig:
    return ImportAdapterConfig(adapter=adapter, backbone=str(backbone), out=out, device="cpu", dtype="float32", **more)


def test_every_setting_of_an_encoder_can_be_said_of_an_imported_adapter(tiny: Tiny, adapter: Path) -> None:
    names = {field.name for field in fields(ImportAdapterConfig)}
    assert {field.name for field in fields(EncoderSettings)} - names == {"late_fusion"}
    with pytest.raises(ConfigError, match=r"--late-fusion gate with .* another program"):
        fingerprint_of(str(tiny("qwen2_5_vl")), adapter, fusion="internal", prompt_style="notellm2", late_fusion="gate")


def test_an_imported_adapter_is_like_one_of_ours(
    drawn_dataset: Path, backbone: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ours"
    settings = import_adapter.run(importing(adapter, backbone, out, max_title_tokens=20, pooling="mean"))
    assert settings["imported"]["sha256"] == {
        name: lora.checksums(adapter, [name])[name] for name in (CONFIG_FILE, WEIGHTS_FILE)
    }
    assert {path.name for path in out.iterdir()} == {
        *(CONFIG_FILE, WEIGHTS_FILE, lora.CANARY_FILE, lora.CARD_FILE, schema.ADAPTER_FILE)
    }
    assert (lora.kind(out), lora.read_adapter(out)["encoder"]["pooling"]) == ("peft", "mean")
    config = exporting(drawn_dataset, backbone, out, tmp_path / "emb")
    manifest = export_items.run(config)
    assert manifest is not None
    assert (manifest["settings"]["pooling"], manifest["settings"]["max_title_tokens"]) == ("mean", 20)
    assert manifest["made_with"]["adapter"]["canary"] is True
    with pytest.raises(ConfigError, match="trained with 'mean'"):
        export_items.run(replace(config, pooling="last", out=tmp_path / "no"))
    with pytest.raises(ConfigError, match="says itself how to prompt"):
        export_items.run(replace(config, strategy="visual", out=tmp_path / "no"))
    given = {"pooling": "mean", "max_title_tokens": 20}
    of_theirs = fingerprint_of(str(backbone), adapter, dtype="float32", device="cpu", **given)  # type: ignore[arg-type]
    of_ours = fingerprint_of(str(backbone), out, dtype="float32", device="cpu")
    assert of_theirs | {"made_with": 0} == of_ours | {"made_with": 0}
    import_adapter.run(importing(adapter, backbone, out))  # again: it replaces its own folder
    assert lora.read_adapter(out)["encoder"]["pooling"] == "last"


def test_an_imported_adapter_is_guarded_by_its_canary_and_checksums(
    tiny: Tiny, backbone: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ours"
    import_adapter.run(importing(adapter, backbone, out))
    other = shutil.copytree(backbone, tmp_path / "other")
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights = {name: tensor.flip(-1) if "mlp" in name else tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match="other vectors than when it was saved"):
        ItemEncoder.load(other, out, dtype="float32", device="cpu")
    rewrite(out, lambda w: {name: -tensor for name, tensor in w.items()})
    with pytest.raises(Vlm2RecError, match=f"{WEIGHTS_FILE} does not have the bytes"):
        ItemEncoder.load(backbone, out, dtype="float32", device="cpu")


def test_import_refuses_what_it_cannot_import_and_writes_nothing(
    drawn_dataset: Path, backbone: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ours"
    with pytest.raises(ConfigError, match="there is no folder"):
        import_adapter.run(importing(tmp_path / "nothing", backbone, out))
    with pytest.raises(ConfigError, match="is no PEFT folder"):
        import_adapter.run(importing(drawn_dataset, backbone, out))
    with pytest.raises(ConfigError, match="the folder of the adapter itself"):
        import_adapter.run(importing(adapter, backbone, adapter))
    with pytest.raises(ConfigError, match="not empty and not an earlier import"):
        import_adapter.run(importing(adapter, backbone, drawn_dataset))
    with pytest.raises(ModelError, match="all its lora_B matrices are zero"):
        import_adapter.run(importing(write_peft(backbone, tmp_path / "zeros", drawn=""), backbone, out))
    assert not out.exists()
    import_adapter.run(importing(adapter, backbone, out))
    with pytest.raises(ConfigError, match="is an adapter folder of vlm2rec already"):
        import_adapter.run(importing(out, backbone, tmp_path / "again"))
    tuned = FinetuneConfig(data=drawn_dataset, backbone=str(backbone), out=out, device="cpu")
    for resume in (True, False):  # training over it would lose it
        with pytest.raises(ConfigError, match=r"import-adapter wrote|has not written"):
            finetune.run(replace(tuned, resume=resume))


def test_sentence_transformers_takes_it_too(drawn_dataset: Path, backbone: Path, tmp_path: Path) -> None:
    adapter = write_peft(backbone, tmp_path / "theirs", use_dora=True)
    export_items.run(exporting(drawn_dataset, backbone, adapter, tmp_path / "emb", max_title_tokens=20))
    config = ConvertConfig(embeddings=tmp_path / "emb", to="sentence-transformers", out=tmp_path / "st")
    record = convert.run(replace(config, backbone=str(backbone), adapter=adapter))
    assert record["to"] == "sentence-transformers" and (tmp_path / "st" / "modules.json").is_file()
    edit(adapter, lora_alpha=9)
    with pytest.raises(ModelError, match="was exported with adapter_settings"):
        convert.run(replace(config, backbone=str(backbone), adapter=adapter, out=tmp_path / "st2"))
