"""`vlm2rec finetune`: dataset folder and backbone in, adapter folder out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from vlm2rec.downstream.evaluation.metrics import candidate_scores, rank_metrics
from vlm2rec.downstream.table import unit_rows
from vlm2rec.embedder import distributed
from vlm2rec.embedder.adapters.lora import (
    FILES,
    Canary,
    backbone_licence,
    canary_items,
    cosine,
    kind_of,
    merge_in_place,
    own_files,
    read_adapter,
    restore,
    save_adapter,
    trainable,
)
from vlm2rec.embedder.backbones import model_files, quantized, sharding
from vlm2rec.embedder.backbones.devices import pick_device, pick_dtype
from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.encoders.cache_choice import use_vision_cache
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows_together, encode_users_together
from vlm2rec.embedder.encoders.item_text import columns_read, without_text
from vlm2rec.embedder.encoders.settings import EncoderSettings, text_config
from vlm2rec.embedder.export.processes import keep_freed_memory
from vlm2rec.embedder.options import DtypeName, with_former_defaults
from vlm2rec.embedder.training import checkpoints
from vlm2rec.embedder.training.checkpoints import CHECKPOINTS, GO_ON, RUN_FILE
from vlm2rec.embedder.training.model_card import model_card
from vlm2rec.embedder.training.recipes import HARD_NEGATIVES, METHODS, check_settings
from vlm2rec.embedder.training.tracking import Tracking, parse_trackers
from vlm2rec.embedder.training.train import Training, TrainingSamples, TrainingSettings, train
from vlm2rec.pipelines import finetune_dry_run, finetune_negatives
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.console import TERMINAL, log, progress, summary
from vlm2rec.pipelines.finetune_probe import describe, make_probe, validation_candidates, warning

_WIDE = 512
_TRAINED_IN = "trained_in"  # key of run.json: the number format
_MERGED_COSINE = 0.99
_PER_PROCESS = ("processes", "batch_size", "negatives")  # keys of run.json that may change together
_PUBLISHING = "publishing"  # key of run.json: from here on, the files of an adapter in this folder are ours
# these settings may differ when a run continues: they do not change what is learned
_FREE = (
    *("out", "resume", "device", "checkpoint_steps", "log_steps", "vision_cache", "images", "report_to", "log_dir"),
    *("probe_users", "probe_steps", "gradient_steps", "sharding", "dry_run"),
)


def run(config: FinetuneConfig) -> Training | dict[str, Any] | None:
    """Fine-tune and write the adapter folder; returns None if a finished one with these settings exists.

    Processes that `torchrun` or `accelerate launch` started train together; only the main one writes and prints. With
    `dry_run` nothing is written: what a training would take is measured, printed and returned.
    """
    _check(config)
    with distributed.joined(pick_device(config.device)):
        if distributed.count() > 1 and not METHODS[config.method].distributed:
            found = f"--method {config.method} in {distributed.count()} processes"
            raise ConfigError(found, "one process", "start it without a launcher")
        if distributed.count() > 1 and config.dry_run:
            found = f"--dry-run in {distributed.count()} processes"
            raise ConfigError(found, "one process, which holds what each would", "start it without a launcher")
        log.quiet = not distributed.is_main()
        if config.sharding != "none" and not _is_sharded(config):
            log.print("--sharding fsdp: one process alone holds the whole model; torchrun starts several")
        dataset = Dataset(config.data, config.images)
        if _is_finished(config):
            log.print(f"{config.out} is already complete; give another --out, or --no-resume to train again.")
            return None
        if config.views != schema.TEXT:
            dataset.require_images()
        if blank := without_text(dataset, asdict(config)):
            log.print(f"{blank:,} items have nothing in {config.item_text}: their titles are used", style="yellow")
        keep_freed_memory()
        if config.dry_run:
            with finetune_dry_run.require_writable(config.out / CHECKPOINTS):
                return _dry_run(config, dataset.warm())
        with checkpoints.alone(config.out / CHECKPOINTS) if distributed.is_main() else nullcontext():
            return _finetune(config, dataset.warm())


def _dry_run(config: FinetuneConfig, dataset: Dataset) -> dict[str, Any]:
    """Do what comes before the first step, and a step; print what the training would take, and return it."""
    recipe = METHODS[config.method]
    samples = _samples(config, dataset)
    encoder, licence = _load(config)
    items = finetune_dry_run.SeenItems(dataset, encoder)
    model = recipe.model(config, encoder, recipe.adapter(config, encoder.backbone), items)
    _validation(config, dataset, encoder, items)
    make_probe(config, dataset, encoder)
    begun = None if not config.resume else checkpoints.newest_named(config.out / CHECKPOINTS)
    found = finetune_dry_run.measured(model, samples, items, _training_settings(config), config.out, begun)
    summary(
        "Dry run: nothing was written", finetune_dry_run.described(found) | samples.summary() | {"licence": licence}
    )
    return found


def _samples(config: FinetuneConfig, dataset: Dataset) -> TrainingSamples:
    samples = METHODS[config.method].samples(config, dataset)
    finetune_negatives.add_hard_negatives(config, dataset, samples)
    return samples


def _load(config: FinetuneConfig) -> tuple[ItemEncoder, str]:
    """Load the backbone; return it as an encoder, and its licence."""
    encoder = ItemEncoder.load(
        config.backbone,
        revision=config.revision,
        quantize=config.quantize,
        **_placement(config),
        **_encoder_settings(config),
    )
    licence = backbone_licence(config.backbone)
    log.print(f"Backbone {config.backbone} (licence: {licence}) on {pick_device(config.device)}")
    return encoder, licence


def _finetune(config: FinetuneConfig, dataset: Dataset) -> Training:
    recipe = METHODS[config.method]
    samples = _samples(config, dataset)  # before the backbone: what is wrong with them is known at once
    encoder, licence = _load(config)
    if distributed.count() > 1:
        log.print(
            f"{distributed.count()} processes, {_users_a_step(config)} users a step, {config.negatives} negatives"
            + (", layers sharded" if _is_sharded(config) else "")
        )
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision, TERMINAL)
    items = ItemFeatures(dataset, encoder)
    wrapped = recipe.adapter(config, encoder.backbone)
    if _is_sharded(config):
        encoder.shard(pick_device(config.device))
    model = recipe.model(config, encoder, wrapped, items)
    _begin(config)
    with progress(f"finetune {recipe.title(config)}", None) as advance:
        validate = _validation(config, dataset, encoder, items, lambda text: advance(0, description=text))
        training = train(
            model,
            samples,
            config.out,
            _training_settings(config),
            validate,
            _reporter(advance, recipe.shown),
            make_probe(config, dataset, encoder),
            lambda noticed: log.print(warning(noticed, config), style="yellow", markup=False, soft_wrap=True),
            TERMINAL,
            _tracking(config),
        )
    unreadable = {name: reason for part in distributed.from_all(items.unreadable) for name, reason in part.items()}
    learned = trainable(wrapped) if _is_sharded(config) else None
    if distributed.is_main():
        if learned is not None:
            encoder, wrapped = _loaded_again(config, encoder, learned)
        _save(config, dataset, samples, encoder, wrapped, training, licence)
        _summarise(config, samples, unreadable, training)
    return training


def _tracking(config: FinetuneConfig) -> Tracking | None:
    """Return where the curves are sent to; None if nowhere."""
    names = parse_trackers(config.report_to)
    return Tracking(names, _log_dir(config), config.out.name, _identity(config)) if names else None


def _log_dir(config: FinetuneConfig) -> Path:
    return config.log_dir or config.out.with_name(f"{config.out.name}-logs")


def _save(
    config: FinetuneConfig,
    dataset: Dataset,
    samples: TrainingSamples,
    encoder: ItemEncoder,
    wrapped: nn.Module,
    training: Training,
    licence: str,
) -> None:
    titles, images = canary_items()
    fused = encoder.encode_items(titles, images).fused
    if config.quantize != "none":
        encoder, wrapped = _loaded_again(config, encoder, trainable(wrapped))
        in_four_bits, fused = fused, encoder.encode_items(titles, images).fused
        log.print(
            "With the unquantised backbone, which an export uses, the adapter gives vectors whose cosine with"
            f" those of training is at least {float(cosine(in_four_bits, fused).min()):.3f} (on generated items)"
        )
    if merge_in_place(wrapped):
        encoder.backbone.forget_prefixes()
        beside, fused = fused, encoder.encode_items(titles, images).fused
        if (worst := float(cosine(beside, fused).min())) < _MERGED_COSINE:
            log.print(
                "Merged into the weights, as in an export, the adapter gives other vectors than in training"
                f" (cosine {worst:.3f} on generated items); --dtype float32 rounds less",
                style="yellow",
            )
    canary = Canary(titles, images, fused, str(encoder.backbone.model.dtype).removeprefix("torch."))
    settings = _provenance(config, dataset, samples, encoder, wrapped, training, licence)
    best = [(name, training.best[name]) for name in ("N@20", "H@20", "N@10", "H@10")]
    card = model_card(settings, best)
    _require_ours(config)
    with publish.plain_disk_errors(config.out, ArtifactError, GO_ON):
        _remember_run(config, publishing=True)
        save_adapter(wrapped, config.out, settings, canary, training.curves, card, encoder.late_fusion)
    checkpoints.discard(config.out / CHECKPOINTS)


def _is_sharded(config: FinetuneConfig) -> bool:
    return config.sharding != "none" and distributed.count() > 1


def _placement(config: FinetuneConfig) -> dict[str, Any]:
    """Return number format and device to load the backbone with; one to be sharded goes to its device in parts."""
    dtype = _training_dtype(config)
    if not _is_sharded(config):
        return {"dtype": dtype, "device": config.device}
    return {"dtype": str(pick_dtype(dtype, pick_device(config.device))).removeprefix("torch."), "device": "cpu"}


def _loaded_again(
    config: FinetuneConfig, encoder: ItemEncoder, learned: dict[str, Tensor]
) -> tuple[ItemEncoder, nn.Module]:
    """Return encoder and adapter on the plain backbone, which is neither quantised nor sharded, as an export has it.

    The one that was trained is emptied, as both may not fit.
    """
    sharding.empty(encoder.backbone.model)
    whole = ItemEncoder.load(
        config.backbone,
        revision=config.revision,
        dtype=_training_dtype(config),
        device=config.device,
        **_encoder_settings(config),
    )
    again = METHODS[config.method].adapter(config, whole.backbone)
    restore(again, learned, "in memory")
    again.eval()
    return whole, again


def _encoder_settings(config: FinetuneConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(EncoderSettings)}


def _check(config: FinetuneConfig) -> None:
    check_settings(config)
    if not parse_trackers(config.report_to) and config.log_dir is not None:
        raise ConfigError("--log-dir without --report-to", "a tracker whose files go there", "name one, or leave it")
    EncoderSettings(**_encoder_settings(config))  # refuses those that contradict each other before anything is read
    _require_ours(config)
    _check_sharding(config)
    if config.quantize != "none":
        quantized.require(pick_device(config.device))
    finetune_negatives.identity(config)  # a file that is not there is refused before anything is read
    if config.gradient_steps and (config.fusion == "internal" or config.views != "both"):
        raise ConfigError(
            f"--gradient-steps with --fusion {config.fusion} and --views {config.views}: it compares the gradients of"
            " text and image vectors, and these settings do not make both",
            "--fusion external and --views both",
            "change them, or leave --gradient-steps out",
        )


def _check_sharding(config: FinetuneConfig) -> None:
    """Raise `ConfigError` for settings that need whole weights in each process, with `--sharding`."""
    if config.sharding == "none":
        return
    able = [name for name, recipe in METHODS.items() if recipe.distributed]
    if config.method not in able:
        raise ConfigError(
            f"--sharding {config.sharding} with --method {config.method}, which one process trains",
            f"--method {' or '.join(able)}",
            "leave --sharding out",
        )
    if config.quantize != "none":
        raise ConfigError(
            f"--sharding {config.sharding} with --quantize {config.quantize}, whose packed matrices cannot be cut",
            "one of the two",
            "leave --quantize or --sharding out",
        )
    if config.gradient_steps:
        raise ConfigError(
            f"--sharding {config.sharding} with --gradient-steps {config.gradient_steps}: it compares gradients of"
            " whole weights, and no process has them",
            "one of the two",
            "leave --gradient-steps or --sharding out",
        )


def _require_ours(config: FinetuneConfig) -> None:
    """Raise `ConfigError` if `--out` holds files, where training would write or remove some, that are not its own."""
    publish.require_folder(config.out)
    run = _run_of(config)
    adapter = own_files(config.out)
    if config.resume and schema.ADAPTER_FILE in adapter:
        return  # complete: nothing will be written
    strange = [f"{CHECKPOINTS}/{name}" for name in checkpoints.foreign(config.out / CHECKPOINTS)]
    if run is None and (config.out / CHECKPOINTS / RUN_FILE).exists():
        strange.append(f"{CHECKPOINTS}/{RUN_FILE}")
    if not (run or {}).get(_PUBLISHING):
        strange += [name for name in FILES if name not in adapter and (config.out / name).exists()]
    if strange:
        raise ConfigError(
            f"--out {config.out} holds files that finetune has not written, and would replace or remove:"
            f" {', '.join(strange[:3])}{' …' * (len(strange) > 3)}",
            "a new or empty folder, or one of an earlier finetune",
            "move them away, or choose another --out",
        )
    publish.require_ours(
        config.out,
        "a folder of an earlier finetune",
        ours=run is not None or bool(adapter),
        ignored=lambda name: name == CHECKPOINTS or publish.is_temporary(name, ""),
    )


def _run_of(config: FinetuneConfig) -> dict[str, Any] | None:
    """Return the settings that the unfinished run in `--out` was begun with, None without one; {} if damaged."""
    folder = config.out / CHECKPOINTS
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        run = schema.read_json(folder / RUN_FILE, "", "")
    except ArtifactError:
        return {} if checkpoints.newest_named(folder) else None
    return run if "users_a_step" in run else None


def _training_dtype(config: FinetuneConfig) -> DtypeName:
    """Return the number format of a training; a run that goes on keeps its own.

    On a CPU `auto` leaves models narrower than `_WIDE` in float32: their products are too small to gain from bfloat16.
    """
    if config.dtype != "auto":
        return config.dtype
    on_cpu = pick_device(config.device).type == "cpu"
    if config.resume and (begun := _run_of(config)) is not None:
        known = begun.get(_TRAINED_IN)  # of earlier versions, which trained in float32 on a CPU, no run has it
        return known if known in ("float32", "bfloat16") else "float32" if on_cpu else "auto"
    width = text_config(model_files.locate(config.backbone, config.revision).folder).hidden_size
    return "float32" if on_cpu and width < _WIDE else "auto"


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
        loss_learning_rate=config.loss_learning_rate,
        max_grad_norm=config.max_grad_norm,
    )


def _identity(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings that decide what is learned, and the number of processes, in their JSON form."""
    decisive = {schema.stored_name(name): _plain(value) for name, value in asdict(config).items() if name not in _FREE}
    files = model_files.locate(config.backbone, config.revision)
    return {
        **decisive,
        **finetune_negatives.identity(config),
        "data": str(config.data.resolve()),
        "processes": distributed.count(),
        "backbone_hash": model_files.backbone_hash(files),
        "processor_hash": model_files.processor_hash(files),
    }


def _plain(value: Any) -> Any:
    """Return a setting in its JSON form, as far as it can be compared."""
    return list(value) if isinstance(value, tuple) else value


def _users_a_step(config: FinetuneConfig) -> int:
    return config.batch_size * distributed.count()


def _is_finished(config: FinetuneConfig) -> bool:
    if not config.resume:
        return False
    folder = config.out / CHECKPOINTS
    if (config.out / schema.ADAPTER_FILE).is_file():
        adapter = read_adapter(config.out)
        if adapter.get("kind") == "peft":
            found = f"--out {config.out} is an adapter that import-adapter wrote"
            raise ConfigError(found, "a folder of an earlier finetune, or a new one", "choose another --out")
        _refuse_change(config, adapter["config"])
        writes = distributed.is_main() and not config.dry_run
        if writes and _run_of(config):  # killed after its last file, before it had removed these
            checkpoints.discard(folder)
        return True
    if (folder / RUN_FILE).is_file():
        fix = "give another --out, or --no-resume to start again"
        begun = schema.read_json(folder / RUN_FILE, "the settings of the run", fix)
        _refuse_change(config, with_former_defaults(begun))
    return False


def _refuse_change(config: FinetuneConfig, before: dict[str, Any]) -> None:
    # a run from before a setting existed did what is now the setting's default
    defaults = {schema.stored_name(field.name): _plain(field.default) for field in fields(config)}
    defaults |= {"processes": 1}
    # the same files are the same backbone, wherever they lie; a run of an earlier version recorded the name alone
    names, hashes = ("backbone", "revision"), ("backbone_hash", "processor_hash")
    not_compared: tuple[str, ...] = names if all(name in before for name in hashes) else hashes
    now = _identity(config)
    if (begun_in := before.get("processes", 1)) != now["processes"]:
        _require_same_batches(config, {**defaults, **before}, begun_in)
        not_compared = (*not_compared, *_PER_PROCESS)
    begun = {name: before[name] if name in before else defaults[name] for name in now if name not in not_compared}
    changed = [f"{name} = {begun[name]!r}, now it is {now[name]!r}" for name in begun if begun[name] != now[name]]
    if changed:
        newest = checkpoints.newest_named(config.out / CHECKPOINTS)
        if (config.out / schema.ADAPTER_FILE).is_file():
            lost = ", which replaces its adapter"
        else:
            lost = f", without what {newest.name} has learned" if newest else "; it has no checkpoint yet to be lost"
        raise ConfigError(
            f"{config.out} was begun with {'; '.join(changed)}",
            "the same settings, to continue that run",
            f"give another --out, or --no-resume to start again{lost}",
        )


def _require_same_batches(config: FinetuneConfig, before: dict[str, Any], begun_in: int) -> None:
    """Raise `ConfigError` unless another number of processes has the same users and negatives in every step."""
    count = distributed.count()
    users, size = begun_in * before["batch_size"], config.batch_size
    fix = f"start {_processes(begun_in)} again, give another --out, or --no-resume to start again"
    if users != _users_a_step(config):
        fits = f"--batch-size {users // count}" if users % count == 0 else f"a number of processes that divides {users}"
        raise ConfigError(
            f"{config.out} was begun with {_processes(begun_in)} and --batch-size {before['batch_size']}, {users} users"
            f" a step; now it is {_processes(count)} and --batch-size {size}, {_users_a_step(config)} users",
            f"{users} users a step",
            f"give {fits}; or {fix}",
        )
    negatives = [
        users // number if own == "local" else users
        for number, own in ((begun_in, before["negatives"]), (count, config.negatives))
    ]
    if negatives[0] != negatives[1]:
        remedy = "give --negatives global; or " if negatives[0] == users else ""
        raise ConfigError(
            f"{config.out} was begun with {_processes(begun_in)} and --negatives {before['negatives']}, which hold a"
            f" user against the targets of {negatives[0]} users; now it is {_processes(count)} and"
            f" --negatives {config.negatives}, {negatives[1]} users",
            f"the targets of {negatives[0]} users",
            remedy + fix,
        )


def _processes(number: int) -> str:
    return f"{number} process{'es' * (number != 1)}"


def _begin(config: FinetuneConfig) -> None:
    """Record the settings of the run, and with `--no-resume` remove the files of an earlier one."""
    if not distributed.is_main():
        return
    own = () if config.resume else own_files(config.out)
    with publish.plain_disk_errors(config.out, ArtifactError, GO_ON):
        if not config.resume:
            checkpoints.clear(config.out / CHECKPOINTS)
        _remember_run(config, publishing=bool(own) or (_run_of(config) or {}).get(_PUBLISHING, False))
        for name in sorted(own, key=lambda name: name != schema.ADAPTER_FILE):
            (config.out / name).unlink(missing_ok=True)
        if own:
            _remember_run(config, publishing=False)


def _remember_run(config: FinetuneConfig, publishing: bool) -> None:
    folder = config.out / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    trained_in = str(pick_dtype(_training_dtype(config), pick_device(config.device))).removeprefix("torch.")
    run = _identity(config) | {"users_a_step": _users_a_step(config), _PUBLISHING: publishing}
    run[_TRAINED_IN] = trained_in
    schema.write_json(folder / RUN_FILE, run)


def _validation(
    config: FinetuneConfig,
    dataset: Dataset,
    encoder: ItemEncoder,
    items: ItemFeatures,
    tell: Callable[[str], None] = lambda text: None,
) -> Callable[[], dict[str, float]]:
    """Return a function that ranks the validation items of (a sample of) the users among candidates.

    It says through `tell` how far it is.
    """
    histories = dataset.histories("valid")
    users = np.arange(len(histories))
    if 0 < config.valid_users < len(users):
        users = np.sort(np.random.default_rng([config.seed, 3]).choice(users, config.valid_users, replace=False))
    negatives = validation_candidates(config.valid_candidates, dataset, histories, users)
    positives = histories.targets[users]
    if negatives.shape[1] < dataset.candidate_count:
        log.print(
            f"Validation ranks among {negatives.shape[1]} candidates instead of {dataset.candidate_count}: a"
            " user has interacted with all other items."
        )
    rows, index = np.unique(np.concatenate([positives[:, None], negatives], axis=1), return_inverse=True)
    index = index.reshape(len(users), -1)
    sequences = [histories.of(int(user)).tolist() for user in users]

    def validate() -> dict[str, float]:
        def told(of: str) -> Callable[[float], None]:
            return lambda share: tell(f"validation, {share:.0%} of {of}")

        users_told, items_told = told(f"{len(sequences):,} users"), told(f"{len(rows):,} items")
        users_told(0)
        user_vectors = encode_users_together(encoder, items, sequences, users_told)[schema.FUSED]
        item_vectors = encode_rows_together(encoder, items, [[int(row)] for row in rows], items_told)[schema.FUSED]
        scores = candidate_scores(unit_rows(user_vectors), unit_rows(item_vectors), index[:, 0], index[:, 1:])
        return rank_metrics(*scores)

    return validate


def _reporter(advance: Any, shown: Sequence[str]) -> Callable[[int, int, dict[str, float]], None]:
    done = 0

    def on_step(step: int, steps: int, latest: dict[str, float]) -> None:
        nonlocal done
        text = " ".join(f"{name} {latest[name]:.3f}" for name in ("loss", *shown) if name in latest)
        advance(step - done, total=steps, description=f"finetune  {text}")
        done = step

    return on_step


def _provenance(
    config: FinetuneConfig,
    dataset: Dataset,
    samples: TrainingSamples,
    encoder: ItemEncoder,
    wrapped: nn.Module,
    training: Training,
    licence: str,
) -> dict[str, Any]:
    """Return the provenance of an adapter for `vlm2rec.json`."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": kind_of(wrapped),
        "backbone": config.backbone,
        "licence": licence,
        "backbone_settings": encoder.fingerprint,
        "encoder": encoder.settings.stored(),
        "training": {
            "method": config.method,
            "loss": METHODS[config.method].title(config),
            "loss_settings": {
                schema.stored_name(name): _plain(value)
                for name in METHODS[config.method].own
                if name not in ("loss", "quantize", *HARD_NEGATIVES) and (value := getattr(config, name)) != ()
            }
            | finetune_negatives.described(config)
            | ({"quantize": config.quantize} if config.quantize != "none" else {}),
            "seed": config.seed,
            "steps": training.steps,
            "best_step": training.best["step"],
            "processes": distributed.count(),
            "users_a_step": _users_a_step(config),
            **({"sharding": config.sharding} if _is_sharded(config) else {}),
            "effective_negatives": training.curves["train"][-1].get("effective_negatives")
            if training.curves["train"]
            else None,
            "collapse": training.curves["warnings"],
            "gradient_batch": training.gradient_batch,
        },
        "dataset": {
            "name": dataset.name,
            "sha256": dataset.meta["sha256"],
            **columns_read(dataset, encoder.fingerprint),
            "samples": len(samples),
            "users": len(samples.users),
        },
        "config": _identity(config),
        "versions": provenance.library_versions(
            provenance.OURS,
            *("torch", "transformers", "peft", "accelerate"),
            *([quantized.LIBRARY] if config.quantize != "none" else []),
        ),
    }


def _conflict_row(rows: list[dict[str, Any]], probed: Sequence[str]) -> dict[str, object]:
    """Return the mean cosine of the text and image gradients in each measured projection, as a row of the summary."""
    found = {
        name: [row[f"cos_text_image_{name}"] for row in rows if f"cos_text_image_{name}" in row] for name in probed
    }
    describe = ", ".join(f"{name} {np.mean(values):+.4f}" for name, values in found.items() if values)
    return {"gradient cosine": f"text to image, last layer: {describe} (mean of {len(rows)} steps)"} if describe else {}


def _summarise(
    config: FinetuneConfig, samples: TrainingSamples, unreadable: dict[str, str], training: Training
) -> None:
    first, last = training.curves["valid"][0], training.best
    rows: dict[str, object] = {
        "steps": f"{training.steps} (kept: step {last['step']:.0f})",
        **samples.summary(),
        "valid N@20": f"{last['N@20']:.4f}" + (f" (before training {first['N@20']:.4f})" if first["step"] == 0 else ""),
        "adapter": config.out,
        "curves": config.out / schema.CURVES_FILE,
    }
    if probes := training.curves["probe"]:
        rows["collapse probe"] = f"{len(probes)} times, {sum(row['seconds'] for row in probes):.1f} s"
    rows |= _conflict_row(training.curves["gradients"], METHODS[config.method].probed)
    if training.curves["warnings"]:
        rows["collapse"] = describe(training.curves["warnings"])
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        rows["unreadable images"] = f"{len(unreadable)}, replaced by white ones; item {name}: {reason}"
    if names := parse_trackers(config.report_to):
        rows["tracked by"] = f"{', '.join(names)}; files in {_log_dir(config)}"
    summary("Fine-tuning done", rows)
