"""`vlm2rec finetune`: dataset folder and backbone in, adapter folder out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any

import numpy as np
from torch import nn

from vlm2rec.downstream.evaluation.metrics import candidate_scores, rank_metrics, unit_rows
from vlm2rec.embedder import distributed
from vlm2rec.embedder.backbones.devices import pick_device
from vlm2rec.embedder.backbones.lora import (
    CURVES_FILE,
    SETTINGS_FILE,
    Canary,
    add_lora,
    backbone_licence,
    canary_items,
    read_adapter,
    save_adapter,
)
from vlm2rec.embedder.backbones.moda import ModaSettings, add_moda
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.cache_choice import use_vision_cache
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows_together, encode_users_together
from vlm2rec.embedder.options import DtypeName
from vlm2rec.embedder.training.losses import VLM2RecLoss
from vlm2rec.embedder.training.model_card import model_card
from vlm2rec.embedder.training.samples import Samples
from vlm2rec.embedder.training.sda import PROBED, ItemAlignment, ItemModel, ItemSamples
from vlm2rec.embedder.training.train import CHECKPOINTS, Model, Training, TrainingSettings, train
from vlm2rec.embedder.training.vlm2rec import HistoryModel
from vlm2rec.pipelines.config import OF_METHOD, FinetuneConfig
from vlm2rec.pipelines.console import TERMINAL, log, progress, summary
from vlm2rec.pipelines.finetune_probe import describe, make_probe, warning

_RUN_FILE = "run.json"
# these may differ between a run and its continuation: they do not change what is learned
_FREE = (
    *("out", "resume", "device", "checkpoint_steps", "log_steps", "vision_cache"),
    *("probe_users", "probe_steps", "gradient_steps"),
)


def run(config: FinetuneConfig) -> Training | None:
    """Fine-tune and write the adapter folder; returns None when a finished one with these settings is there.

    Processes that `torchrun` or `accelerate launch` started train together; the main one writes and talks.
    """
    _check(config)
    with distributed.joined(pick_device(config.device)):
        if config.method == "sda" and distributed.count() > 1:
            raise ConfigError(
                f"--method sda in {distributed.count()} processes", "one process", "start it without a launcher"
            )
        log.quiet = not distributed.is_main()
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> Training | None:
    dataset = Dataset(config.data)
    if _is_finished(config):
        log.print(f"{config.out} is already complete; give another --out, or --no-resume to train anew.")
        return None
    encoder = ItemEncoder.load(
        config.backbone,
        revision=config.revision,
        views=config.views,
        fusion=config.fusion,
        fusion_norm=config.fusion_norm,
        prompt_mode=config.prompt_mode,
        max_pixels=config.max_pixels,
        max_title_tokens=config.max_title_tokens,
        pooling=config.pooling,
        prompt_style=config.prompt_style,
        dtype=_training_dtype(config),
        device=config.device,
    )
    licence = backbone_licence(config.backbone)
    log.print(f"Backbone {config.backbone} (licence: {licence}) on {encoder.backbone.device}")
    if distributed.count() > 1:
        log.print(
            f"{distributed.count()} processes, {_users_a_step(config)} users a step, {config.negatives} negatives"
        )
    samples = _samples(config, dataset)
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision, TERMINAL)
    items = ItemFeatures(dataset, encoder)
    wrapped = _adapter(config, encoder)
    model = _model(config, encoder, wrapped, items)
    _remember_run(config)
    validate = _validation(config, dataset, encoder, items)
    with progress(f"finetune {_loss_name(config)}", None) as advance:
        training = train(
            model,
            samples,
            config.out,
            _training_settings(config),
            validate,
            _reporter(advance),
            make_probe(config, dataset, encoder),
            lambda noticed: log.print(warning(noticed, config), style="yellow", markup=False, soft_wrap=True),
        )
    unreadable = {name: reason for part in distributed.from_all(items.unreadable) for name, reason in part.items()}
    if distributed.is_main():
        _save(config, dataset, samples, encoder, wrapped, training, licence)
        _summarise(config, samples, unreadable, training)
    return training


def _save(
    config: FinetuneConfig,
    dataset: Dataset,
    samples: Samples | ItemSamples,
    encoder: ItemEncoder,
    wrapped: nn.Module,
    training: Training,
    licence: str,
) -> None:
    titles, images = canary_items()
    canary = Canary(titles, images, encoder.encode_items(titles, images).fused)
    settings = _provenance(config, dataset, samples, encoder, training, licence)
    best = [(name, training.best[name]) for name in ("N@20", "H@20", "N@10", "H@10")]
    save_adapter(wrapped, config.out, settings, canary, training.curves, model_card(settings, best))
    shutil.rmtree(config.out / CHECKPOINTS)


def _samples(config: FinetuneConfig, dataset: Dataset) -> Samples | ItemSamples:
    if config.method == "sda":
        return ItemSamples(len(dataset.item_ids))
    return Samples(dataset.train_sequences(), dataset.max_history, config.samples, config.users, config.seed)


def _adapter(config: FinetuneConfig, encoder: ItemEncoder) -> nn.Module:
    if config.method == "sda" and config.experts > 1:
        settings = ModaSettings(config.experts, config.lora_rank, config.lora_alpha, config.lora_dropout)
        return add_moda(encoder.backbone, settings, config.seed)
    return add_lora(encoder.backbone, config.lora_rank, config.lora_alpha, config.lora_dropout, config.seed)


def _model(config: FinetuneConfig, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures) -> Model:
    if config.method == "sda":
        return ItemModel(encoder, wrapped, items, ItemAlignment(config.cmsa, config.tau_cmsa), config.chunk_users)
    return HistoryModel(encoder, wrapped, items, _loss(config), config.tau_wpcl, config.chunk_users, config.negatives)


def _loss_name(config: FinetuneConfig) -> str:
    """Return what is trained, in a word or two."""
    if config.method == "vlm2rec":
        return config.loss
    aligned = {"paper": "cmsa", "reference": "cmsa as coded", "off": "infonce"}[config.cmsa]
    return f"sda, {aligned}, {'moda' if config.experts > 1 else 'lora'}"


def _check(config: FinetuneConfig) -> None:
    _check_method(config)
    if config.method == "vlm2rec" and config.fusion == "internal" and config.loss == "vlm2rec":
        raise ConfigError(
            "--fusion internal with --loss vlm2rec: one interleaved prompt has no text and image vectors to balance",
            "--fusion external, or --loss sft",
            "change one of the two",
        )
    if config.gradient_steps and (config.fusion == "internal" or config.views != "both"):
        raise ConfigError(
            f"--gradient-steps with --fusion {config.fusion} and --views {config.views}: it compares the gradients of"
            " text and image vectors, and one of them or both are not there",
            "--fusion external and --views both",
            "change them, or leave --gradient-steps out",
        )
    if config.method == "vlm2rec" and config.views != "both" and config.loss == "vlm2rec":
        raise ConfigError(
            f"--views {config.views} with --loss vlm2rec: its penalty (WPCL) and its topology term (CRTR) hold a text"
            " and an image vector of each user and item against each other, and one view has nothing to balance",
            "--loss sft (InfoNCE) with one view, or --views both",
            "change one of the two",
        )
    if config.out.exists() and not config.out.is_dir():
        raise ConfigError(f"--out {config.out} is a file", "a folder to write", "choose another --out")


def _check_method(config: FinetuneConfig) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    for other in OF_METHOD.keys() - {config.method}:
        for name in OF_METHOD[other]:
            if getattr(config, name) != defaults[name]:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} with --method {config.method}, which has no such setting",
                    f"{flag} with --method {other}",
                    f"leave {flag} out",
                )
    if config.method == "vlm2rec" and config.prompt_style == "sda":
        raise ConfigError(
            "--prompt-style sda with --method vlm2rec, which trains on sequences: SDA's prompts ask about single items",
            "--prompt-style vlm2rec, or --method sda",
            "change one of the two",
        )
    if config.method == "sda" and (config.fusion == "internal" or config.views != "both"):
        raise ConfigError(
            f"--method sda with --fusion {config.fusion} and --views {config.views}: it aligns the text and the image"
            " vectors of items, and one of them or both are not there",
            "--fusion external and --views both",
            "leave --fusion and --views out",
        )


def _training_dtype(config: FinetuneConfig) -> DtypeName:
    # on a CPU the backward pass in bf16 gains little and rounds every LoRA step
    on_cpu = pick_device(config.device).type == "cpu"
    return "float32" if config.dtype == "auto" and on_cpu else config.dtype


def _loss(config: FinetuneConfig) -> VLM2RecLoss | None:
    if config.loss == "sft":
        return None
    return VLM2RecLoss(
        config.tau_wpcl,
        config.tau_crtr,
        config.lam,
        config.alpha,
        config.beta,
        config.learnable,
        config.stop_gradient,
        config.penalty,
        config.crtr,
        fusion_norm=config.fusion_norm,
        wpcl=config.wpcl,
    )


def _training_settings(config: FinetuneConfig) -> TrainingSettings:
    return TrainingSettings(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        schedule=config.schedule,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
        checkpoint_steps=config.checkpoint_steps,
        log_steps=config.log_steps,
        gradient_steps=config.gradient_steps,
    )


def _identity(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings that decide what is learned, and the number of processes, in the form they take in JSON."""
    decisive = {schema.stored_name(name): value for name, value in asdict(config).items() if name not in _FREE}
    return {**decisive, "data": str(config.data.resolve()), "processes": distributed.count()}


def _users_a_step(config: FinetuneConfig) -> int:
    return config.batch_size * distributed.count()


def _is_finished(config: FinetuneConfig) -> bool:
    if not config.resume:
        if distributed.is_main():
            shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
            (config.out / SETTINGS_FILE).unlink(missing_ok=True)
        return False
    if (config.out / SETTINGS_FILE).is_file():
        _refuse_change(config, read_adapter(config.out)["config"])
        return True
    if (config.out / CHECKPOINTS / _RUN_FILE).is_file():
        fix = "give another --out, or --no-resume to start anew"
        _refuse_change(config, schema.read_json(config.out / CHECKPOINTS / _RUN_FILE, "the settings of the run", fix))
    return False


def _refuse_change(config: FinetuneConfig, before: dict[str, Any]) -> None:
    # a run begun before a setting existed did what is now its default
    defaults = {schema.stored_name(field.name): field.default for field in fields(config)}
    defaults |= {"processes": 1}
    for name, value in _identity(config).items():
        begun = before.get(name, defaults[name])
        if begun != value:
            raise ConfigError(
                f"{config.out} was begun with {name} = {begun!r}, now it is {value!r}",
                "the same settings, to go on with that run",
                "give another --out, or --no-resume to start anew",
            )


def _remember_run(config: FinetuneConfig) -> None:
    if distributed.is_main():
        folder = config.out / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        schema.write_json(folder / _RUN_FILE, _identity(config) | {"users_a_step": _users_a_step(config)})


def _validation(
    config: FinetuneConfig, dataset: Dataset, encoder: ItemEncoder, items: ItemFeatures
) -> Callable[[], dict[str, float]]:
    """Return a function that ranks the validation items of (a sample of) the users among their stored candidates."""
    histories = dataset.histories("valid")
    seed = dataset.candidate_seeds[0]
    users = np.arange(len(histories))
    if 0 < config.valid_users < len(users):
        users = np.sort(np.random.default_rng([config.seed, 3]).choice(users, config.valid_users, replace=False))
    negatives, positives = dataset.negatives(seed)[users], histories.targets[users]
    rows, place = np.unique(np.concatenate([positives[:, None], negatives], axis=1), return_inverse=True)
    place = place.reshape(len(users), -1)
    sequences = [histories.of(int(user)).tolist() for user in users]

    def validate() -> dict[str, float]:
        user_vectors = encode_users_together(encoder, items, sequences)[schema.FUSED]
        item_vectors = encode_rows_together(encoder, items, [[int(row)] for row in rows])[schema.FUSED]
        scores = candidate_scores(unit_rows(user_vectors), unit_rows(item_vectors), place[:, 0], place[:, 1:])
        return rank_metrics(*scores)

    return validate


def _reporter(advance: Any) -> Callable[[int, int, dict[str, float]], None]:
    done = 0

    def on_step(step: int, steps: int, latest: dict[str, float]) -> None:
        nonlocal done
        names = (
            "loss",
            "own_text_first",
            "tau",
            "wpcl",
            "crtr",
            "margin_text",
            "margin_image",
            "weight",
            "alpha",
            "beta",
        )
        text = " ".join(f"{name} {latest[name]:.3f}" for name in names if name in latest)
        advance(step - done, total=steps, description=f"finetune  {text}")
        done = step

    return on_step


def _provenance(
    config: FinetuneConfig,
    dataset: Dataset,
    samples: Samples | ItemSamples,
    encoder: ItemEncoder,
    training: Training,
    licence: str,
) -> dict[str, Any]:
    """Return what `vlm2rec.json` says about where an adapter came from."""
    libraries = ("vlm2rec", "torch", "transformers", "peft", "accelerate")
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": "moda" if config.method == "sda" and config.experts > 1 else "lora",
        "backbone": config.backbone,
        "licence": licence,
        "backbone_settings": encoder.fingerprint,
        "encoder": encoder.settings.stored(),
        "training": {
            "method": config.method,
            "loss": _loss_name(config),
            "seed": config.seed,
            "steps": training.steps,
            "best_step": training.best["step"],
            "processes": distributed.count(),
            "users_a_step": _users_a_step(config),
            "effective_negatives": training.curves["train"][-1]["effective_negatives"]
            if training.curves["train"]
            else None,
            "collapse": training.curves["warnings"],
        },
        "dataset": {
            "name": dataset.name,
            "sha256": dataset.meta["sha256"],
            "samples": len(samples),
            "users": len(samples.users) if isinstance(samples, Samples) else 0,
        },
        "config": _identity(config),
        "versions": {name: version(name) for name in libraries},
    }


def _told_samples(samples: Samples | ItemSamples) -> dict[str, object]:
    if isinstance(samples, ItemSamples):
        return {"items": f"{len(samples)}"}
    return {"users": f"{len(samples.users)}, {len(samples)} samples a epoch, {samples.skipped} users too short"}


def _told_conflict(rows: list[dict[str, Any]]) -> dict[str, object]:
    """Return the mean cosine of SDA's text and image gradients in each projection that was looked at."""
    found = {
        name: [row[f"cos_text_image_{name}"] for row in rows if f"cos_text_image_{name}" in row] for name in PROBED
    }
    describe = ", ".join(f"{name} {np.mean(values):+.4f}" for name, values in found.items() if values)
    return {"gradient cosine": f"text to image, last layer: {describe} (mean of {len(rows)} steps)"} if describe else {}


def _summarise(
    config: FinetuneConfig, samples: Samples | ItemSamples, unreadable: dict[str, str], training: Training
) -> None:
    first, last = training.curves["valid"][0], training.best
    rows: dict[str, object] = {
        "steps": f"{training.steps} (kept: step {last['step']:.0f})",
        **_told_samples(samples),
        "valid N@20": f"{last['N@20']:.4f}" + (f" (before training {first['N@20']:.4f})" if first["step"] == 0 else ""),
        "adapter": config.out,
        "curves": config.out / CURVES_FILE,
    }
    if probes := training.curves["probe"]:
        rows["collapse probe"] = f"{len(probes)} times, {sum(row['seconds'] for row in probes):.1f} s"
    rows |= _told_conflict(training.curves["gradients"])
    if training.curves["warnings"]:
        rows["collapse"] = describe(training.curves["warnings"])
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        rows["unreadable images"] = f"{len(unreadable)}, shown as white; item {name}: {reason}"
    summary("Fine-tuning done", rows)
