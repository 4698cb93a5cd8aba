"""`vlm2rec finetune --method llm2rec`: three phases of one run, attention that sees both ways, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from item_training import Tiny, curves, cut_off, require_same, settings_of

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.backbones.packing import Layout
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.llm2rec import (
    CSFT,
    MNTP,
    SIMCSE,
    Phases,
    TitleModel,
    TitleSamples,
    mask_tokens,
    next_title,
)
from vlm2rec.embedder.training.samples import Samples
from vlm2rec.pipelines import evaluate, export_items, finetune
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig, FinetuneConfig

TEXTS = ["Halden steel mug 210", "A lamp", "Dunmore glass desk lamp 370", "mug", "Halden steel mug 21"]


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    return settings_of(
        "llm2rec", tiny("qwen2"), data, out, **({"csft_share": 0.4, "mntp_share": 0.3, "max_steps": 10} | more)
    )


def title_model(tiny: Tiny, data: Path, family: str = "qwen2", chunk: int = 0) -> TitleModel:
    encoder = ItemEncoder.load(
        str(tiny(family)),
        prompt_style="llm2rec",
        views="text",
        pooling="mean",
        attention="bidirectional",
        dtype="float32",
        device="cpu",
    )
    wrapped = lora.add_lora(encoder.backbone, 4, 8.0, 0.0, seed=0)
    return TitleModel(encoder, wrapped, ItemFeatures(Dataset(data), encoder), Phases(), chunk)


def batch_of(model: TitleModel, data: Path, size: int = 6) -> dict[str, Any]:
    dataset = Dataset(data)
    samples = TitleSamples(Samples(dataset.train_sequences(), 10), len(dataset.item_ids))
    return model.collate([samples[place] for place in range(size)])


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    finetune.run(settings(tiny, drawn_dataset, out, probe_users=4))
    return out


# --- attention that sees both ways ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "mistral", "qwen2_5_vl", "qwen3_vl", "internvl", "llava"]
)
def test_a_later_token_changes_an_earlier_state_exactly_if_attention_is_bidirectional(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), dtype="float32", device="cpu")
    one, other = backbone.tokenize(("red wooden chair",)).ids, backbone.tokenize(("red wooden lamp",)).ids
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert same > 0
    with torch.no_grad():
        causal = backbone.encode_states([one, other], bidirectional=False)
        both = backbone.encode_states([one, other], bidirectional=True)
    torch.testing.assert_close(causal[0][:same], causal[1][:same])
    changed = (both[0][:same] - both[1][:same]).abs().amax(dim=1)
    assert bool((changed > 1e-4).all()), "every earlier state has to know the later token"
    backbone.attention = "bidirectional"
    with torch.no_grad():
        vectors = backbone.encode([backbone.tokenize(("red wooden chair",)), backbone.tokenize(("A lamp",))])
    torch.testing.assert_close(vectors[0], both[0][-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_bidirectional_states_are_those_of_the_stock_model_with_an_open_mask(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), dtype="float32", device="cpu")
    prompts = [backbone.tokenize((text,)).ids for text in TEXTS]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny(family), attn_implementation="eager").eval()
    with torch.no_grad():
        found = backbone.encode_states(prompts, bidirectional=True)
        for ids, states in zip(prompts, found, strict=True):
            mask = torch.zeros(1, 1, len(ids), len(ids))
            expected = stock.model(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


def test_a_bidirectional_vector_does_not_depend_on_what_is_encoded_beside_it(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(
        str(tiny("qwen2")), views="text", attention="bidirectional", pooling="mean", dtype="float32", device="cpu"
    )
    together = encoder.encode_items(TEXTS, [None] * len(TEXTS)).fused
    alone = np.concatenate([encoder.encode_items([text], [None]).fused for text in TEXTS])
    assert np.array_equal(together, alone), "to the last bit, as with causal attention"
    causal = ItemEncoder.load(str(tiny("qwen2")), views="text", pooling="mean", dtype="float32", device="cpu")
    assert not np.allclose(causal.encode_items(TEXTS, [None] * len(TEXTS)).fused, together, atol=1e-3)


def test_masks_in_half_precision_are_open_too() -> None:
    assert Layout((3,), bidirectional=True).mask(3).all()
    assert torch.equal(Layout((3,)).mask(3), torch.ones(3, 3, dtype=torch.bool).tril())


# --- the three losses -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen2_5_vl"])
def test_csft_is_the_stock_models_loss_of_the_next_title(tiny: Tiny, drawn_dataset: Path, family: str) -> None:
    model = title_model(tiny, drawn_dataset, family)
    batch = batch_of(model, drawn_dataset, 3)
    model.phase = CSFT
    with torch.no_grad():
        found, log, _ = model(**batch)
    assert log["phase"] == CSFT
    loader = transformers.AutoModelForCausalLM if family != "qwen2_5_vl" else transformers.AutoModelForImageTextToText
    stock = loader.from_pretrained(tiny(family)).eval().double()
    total, count = 0.0, 0
    for history, target in zip(batch["histories"], batch["targets"], strict=True):
        ids, own = next_title(model.encoder, model.items.titles(history), model.items.titles([target])[0])
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor([[*ids, *own]])).logits[0, len(ids) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(own), reduction="sum"))
        count += len(own)
        assert own[-1] == model.encoder.backbone.tokenizer.eos_token_id and ids[-1] != own[-1]
    assert found.item() == pytest.approx(total / count, rel=1e-4)


def test_mntp_predicts_masked_tokens_from_the_state_before_them(tiny: Tiny, drawn_dataset: Path) -> None:
    model = title_model(tiny, drawn_dataset)
    batch = batch_of(model, drawn_dataset, 4)
    model.phase = MNTP
    with torch.no_grad():
        found, _, _ = model(**batch)
    stock = (
        transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen2"), attn_implementation="eager").eval().double()
    )
    backbone, total, count = model.encoder.backbone, 0.0, 0
    for row, seed in zip(batch["rows"].tolist(), batch["seeds"], strict=True):
        ids = model.encoder.tokenize_title(model.items.titles([row])[0])
        shown, places = mask_tokens(ids, backbone.mask_id, len(backbone.tokenizer), np.random.default_rng(seed))
        mask = torch.zeros(1, 1, len(ids), len(ids), dtype=torch.float64)
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor([shown]), attention_mask=mask).logits[0]
        for place in places:
            total -= float(logits[place - 1].log_softmax(0)[ids[place]])
            count += 1
    assert found.item() == pytest.approx(total / count, rel=1e-4)


def test_simcse_is_info_nce_between_two_passes(tiny: Tiny) -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 4, 3))
    rows = [5, 6, 5, 8]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second)]
    total = 0.0
    for i in range(4):
        kept = [j for j in range(4) if j == i or rows[j] != rows[i]]
        weights = {j: np.exp(10 * float(unit[0][i] @ unit[1][j])) for j in kept}
        total -= np.log(weights[i] / sum(weights.values()))
    found = Phases(scale=10.0)(torch.from_numpy(first), torch.from_numpy(second), torch.tensor(rows))
    assert found.item() == pytest.approx(total / 4, rel=1e-6)


def test_masks_are_drawn_as_told() -> None:
    ids = list(range(100, 140))
    counts = {"masked": 0, "random": 0, "same": 0}
    for seed in range(400):
        shown, places = mask_tokens(ids, 7, 50, np.random.default_rng(seed))
        assert places == sorted({*places}) and 0 not in places and places
        assert all(shown[i] == ids[i] for i in range(40) if i not in places)
        for place in places:
            kind = "same" if shown[place] == ids[place] else "masked" if shown[place] == 7 else "random"
            counts[kind] += 1
    total = sum(counts.values())
    assert total / (400 * 39) == pytest.approx(0.2, abs=0.02)
    assert counts["masked"] / total == pytest.approx(0.8, abs=0.02)
    assert counts["same"] / total == pytest.approx(0.1, abs=0.02)
    assert mask_tokens([3], 7, 50, np.random.default_rng(0)) == ([3], [])
    assert len(mask_tokens([3, 4], 7, 50, np.random.default_rng(1))[1]) == 1


def test_the_phases_share_the_steps() -> None:
    phases = Phases(0.8, 0.1)
    assert [phases.at(step, 10) for step in range(10)] == [CSFT] * 8 + [MNTP, SIMCSE]
    assert {Phases(0.0, 0.0).at(step, 5) for step in range(5)} == {SIMCSE}
    assert [Phases(0.5, 0.5).at(step, 4) for step in range(4)] == [CSFT, CSFT, MNTP, MNTP]
    with pytest.raises(ConfigError, match=r"shares 0\.8 and 0\.5"):
        Phases(0.8, 0.5)


@pytest.mark.parametrize("phase", [CSFT, MNTP, SIMCSE])
def test_chunks_have_the_gradients_of_the_whole_batch(tiny: Tiny, drawn_dataset: Path, phase: int) -> None:
    gradients = []
    for size in (0, 3):
        model = title_model(tiny, drawn_dataset, chunk=size)
        model.phase = phase
        loss, _, _ = model(**batch_of(model, drawn_dataset, 7))
        gradients.append(torch.autograd.grad(loss, model.adapted))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


# --- training -------------------------------------------------------------------------------------------------
def test_samples_hold_a_user_and_an_item_of_a_shuffled_catalogue(drawn_dataset: Path) -> None:
    dataset = Dataset(drawn_dataset)
    histories = Samples(dataset.train_sequences(), 10, "random")
    samples = TitleSamples(histories, 4)
    drawn = [samples[place] for place in range(len(samples))]
    assert [each.item for each in drawn[:8]] == [each.item for each in drawn[:4]] * 2
    assert {each.item for each in drawn[:4]} == {0, 1, 2, 3}
    assert [each.seed for each in drawn] == [samples[place].seed for place in range(len(samples))]
    samples.set_epoch(1)
    assert [samples[place].seed for place in range(len(samples))] != [each.seed for each in drawn]
    assert any(samples[p].sample.target != drawn[p].sample.target for p in range(len(samples))), "as `random` does"
    assert "users" in samples.summary() and len(samples.users) == len(histories.users)


def test_the_adapter_says_what_it_was_trained_with(trained: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert (saved["encoder"]["attention"], saved["encoder"]["pooling"]) == ("bidirectional", "mean")
    assert saved["training"]["loss"] == "llm2rec, csft 40%, mntp 30%, simcse 30%"
    assert saved["dataset"]["users"] > 0
    rows = curves(trained)["train"]
    assert [row["phase"] for row in rows] == [1] * 4 + [2] * 3 + [3] * 3
    assert rows[-1]["effective_negatives"] == 7.0 and rows[0]["effective_negatives"] == 0.0
    assert "all tokens of the prompt" in (trained / "README.md").read_text()


@pytest.mark.parametrize(("shares", "kept"), [((0.4, 0.3), 8), ((0.4, 0.6), 6), ((1.0, 0.0), 2)])
def test_weights_from_before_the_last_phase_are_never_kept(
    tiny: Tiny,
    drawn_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shares: tuple[float, float],
    kept: int,
) -> None:
    monkeypatch.setattr(finetune, "_validation", lambda *_: falling)
    ranked = iter(range(100, 0, -1))

    def falling() -> dict[str, float]:
        """Every validation is worse than the one before."""
        return dict.fromkeys(("N@20", "H@20", "N@10", "H@10"), next(ranked) / 100)

    samples = len(Samples(Dataset(drawn_dataset).train_sequences(), 10))
    more: dict[str, Any] = {"csft_share": shares[0], "mntp_share": shares[1], "batch_size": -(-samples // 2)}
    cut, whole = (
        settings(tiny, drawn_dataset, tmp_path / name, **more, valid_users=0, checkpoint_steps=3)
        for name in ("cut", "whole")
    )
    result = finetune.run(whole)
    assert result is not None
    assert [row["step"] for row in result.curves["valid"]] == [0, 2, 4, 6, 8, 10]
    assert result.best["step"] == kept
    assert json.loads((whole.out / "vlm2rec.json").read_text())["training"]["best_step"] == kept
    ranked = iter(range(100, 0, -1))
    cut_off(cut, 7)
    finetune.run(cut)
    require_same(cut, whole, 10, [lora.WEIGHTS_FILE])


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_each_phase_lowers_its_loss(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, shares: tuple[float, float]
) -> None:
    more: dict[str, Any] = {"csft_share": shares[0], "mntp_share": shares[1], "max_steps": 24, "epochs": 100.0}
    more |= {"learning_rate": 5e-3, "gradient_checkpointing": False}
    result = finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))
    assert result is not None
    rows = [row["loss"] for row in result.curves["train"]]
    assert np.mean(rows[-6:]) < np.mean(rows[:6])


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_like_an_uninterrupted_one(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    cut, whole = (settings(tiny, drawn_dataset, tmp_path / name, checkpoint_steps=2) for name in ("cut", "whole"))
    for stop in (3, 5, 9):  # in each phase
        cut_off(cut, stop)
    finetune.run(cut)
    finetune.run(whole)
    require_same(cut, whole, 10, [lora.WEIGHTS_FILE], ("loss", "phase"))
    assert finetune.run(cut) is None, "it is complete"


def test_the_export_is_bidirectional_and_evaluates_by_the_mean(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    backbone = str(tiny("qwen2"))
    given: dict[str, Any] = {"data": drawn_dataset, "backbone": backbone, "adapter": trained, "device": "cpu"}
    manifest = export_items.run(ExportConfig(**given, out=tmp_path / "e", dtype="float32"))
    assert manifest is not None and manifest["settings"]["attention"] == "bidirectional"
    assert manifest["counts"][schema.STATUS_OK] == 40
    encoder = ItemEncoder.load(backbone, trained, dtype="float32", device="cpu")
    table = EmbeddingTable.open(tmp_path / "e", "fused")
    titles = Dataset(drawn_dataset).titles
    assert np.array_equal(table.vectors, encoder.encode_items(titles, [None] * len(titles)).fused)
    assert np.isfinite(encoder.encode_items([""], [None]).fused).all(), "an item without a title has a vector"
    with pytest.raises(ConfigError, match="--attention is 'causal', but the adapter"):
        ItemEncoder.load(backbone, trained, attention="causal", device="cpu")
    result = evaluate.run(
        EvaluateConfig(
            data=drawn_dataset, embeddings=tmp_path / "e", out=tmp_path / "m", backbone=backbone, adapter=trained
        )
    )
    assert result["users_from"] == "mean"


# --- refusals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"views": "both"}, "--method llm2rec with --prompt-style llm2rec, --views both"),
        ({"prompt_style": "sda"}, "--method llm2rec with --prompt-style sda"),
        ({"prompt_mode": "chat"}, "--prompt-mode chat"),
        ({"csft_share": 0.8}, "--csft-share 0.8 and --mntp-share 0.3, together more than 1"),
        ({"attention": "causal"}, "--mntp-share 0.3 with --attention causal"),
        ({"lora_dropout": 0.0}, "--lora-dropout 0 and steps for SimCSE"),
        ({"tau_crtr": 0.5}, "--tau-crtr with --method llm2rec, which has no such setting"),
        ({"method": "sda", "samples": "all"}, "--samples with --method sda"),
        ({"method": "vlm2rec", "loss": "sft", "prompt_style": "llm2rec", "views": "text", "csft_share": 0.8,
          "mntp_share": 0.1}, "--prompt-style llm2rec with --method vlm2rec"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_in_words(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, more: dict[str, Any], match: str
) -> None:
    shares = {} if "method" not in more else {"csft_share": 0.8, "mntp_share": 0.1}
    with pytest.raises(ConfigError, match=match):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **(shares | more)))


def test_a_backbone_without_its_head_is_refused(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny("llama") / name).read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head")}
    assert len(kept) < len(weights), "its head is its own"
    safetensors.torch.save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="published without its language-model head"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", backbone=str(folder)))
