"""Fine-tuning: a model with an adapter and a loss, and transformers' Trainer around it.

`train` trains any `Model` with its own loss; the rows of `recipes` list methods and losses.
"""

from __future__ import annotations

import json
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import safetensors.torch
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vlm2rec.embedder import distributed
from vlm2rec.embedder.adapters.lora import restore, trainable
from vlm2rec.embedder.backbones import modality, sharding
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode
from vlm2rec.embedder.options import Schedule
from vlm2rec.embedder.progress import SILENT, Reporter
from vlm2rec.embedder.training import checkpoints
from vlm2rec.embedder.training.checkpoints import CHECKPOINTS
from vlm2rec.embedder.training.monitor import Collapse, Probe, by_step, collapses, starved
from vlm2rec.embedder.training.tracking import Trackers, Tracking

# keys for the number of users that a row was measured on: first of a probe's row, then of a row about gradients.
# Earlier versions wrote `batch_users`: they compared gradients on the batch of the step, with dropout.
_PROBE = "probe_users"
_GRADIENTS = {schema.FIXED_BATCH, "batch_users"}
# what a row of the log is about, by a key that it has
_KINDS = (("N@20", "valid"), (_PROBE, "probe"), *((key, "gradients") for key in sorted(_GRADIENTS)), ("loss", "train"))
_Input = TypeVar("_Input")
_TRAIN_BUDGET = 1 << 20  # padded tokens: a training batch is encoded in one piece, as its graph needs the memory anyway


class TrainingSamples(Protocol):
    """The samples from which `train` draws batches."""

    @property
    def users(self) -> Sized:
        """The users whose histories are learned from; empty if the samples are items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def summary(self) -> dict[str, str]:
        """Return the row of a run's summary that names the training data."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""


class Model(nn.Module, ABC):
    """An encoder with an adapter, and a loss over batches of samples.

    Args:
        encoder: its backbone has adapted layers.
        wrapped: the module that holds the adapter, registered so that the trainer sees its parameters.
        items: titles and image features.
        loss: the loss that `forward` calls; its parameters, if any, are trained together with the adapter.
        chunk_users: encode this many users, or items, at a time (GradCache); 0 encodes the batch in one piece.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        wrapped: nn.Module,
        items: ItemFeatures,
        loss: nn.Module,
        chunk_users: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.items, self.chunk_users = encoder, items, chunk_users
        self.wrapped = wrapped
        self.loss = loss

    @abstractmethod
    def forward(self, **batch: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the loss of a batch, values to log, and with `with_gradients` the alignment of its gradients.

        The arguments are those that `collate` returns, and `with_gradients`.
        """

    @abstractmethod
    def collate(self, batch: list[Any]) -> dict[str, Any]:
        """Return the arguments of `forward` for a batch; with several processes, for this process's share of it."""

    def at_step(self, step: int, steps: int) -> None:
        """Choose what is learned at a step, counted from 0, of so many; most methods learn the same at each."""

    def may_keep(self, step: int, steps: int) -> bool:
        """Tell whether the weights after this many steps, of so many, may be kept; of most methods all may."""
        return True

    @abstractmethod
    def named(self, batch: dict[str, Any]) -> str:
        """Return a description of the samples of a batch, for a message."""

    def train(self, mode: bool = True) -> Self:
        """Switch dropout of the language model's adapted layers; the vision tower stays in evaluation mode."""
        super().train(mode)
        self.encoder.backbone.model.eval()
        self.encoder.backbone.language_model.train(mode)
        return self

    @property
    def adapted(self) -> list[nn.Parameter]:
        """The adapter's trained parameters."""
        return [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]

    def encode(self, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Encode sequences of item rows; returns `fused`, `text`, `image`, each (n, d) float32, NaN where absent.

        With `chunk_users`, a chunk first keeps only its vectors. Once the loss over the whole batch has given their
        gradients, the backward pass encodes the chunk again, with the same dropout.
        """
        if not sequences and not self.encoder.backbone.sharded:
            return self._encode_nothing()
        return self.in_chunks(lambda chunk: encode(self.encoder, self.items, chunk, _TRAIN_BUDGET), sequences)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode texts in place of titles, each as a single item; returns as `encode`, `text` equal to `fused`."""

        def encode_chunk(chunk: Sequence[str]) -> dict[str, Tensor]:
            prepared = [[self.encoder.backbone.prepare_title(text)[0]] for text in chunk]
            return self.encoder.encode_sequences(prepared, [[] for _ in chunk], _TRAIN_BUDGET)

        return self.in_chunks(encode_chunk, texts)

    def in_chunks(
        self, encode_chunk: Callable[[Sequence[_Input]], dict[str, Tensor]], inputs: Sequence[_Input]
    ) -> dict[str, Tensor]:
        """Return what `encode_chunk` makes of all inputs, with `chunk_users` so many at a time, by name, (n, ...)."""
        if not self.chunk_users or not torch.is_grad_enabled():
            return encode_chunk(inputs)
        chunks = _chunks(inputs, self.chunk_users)
        if self.encoder.backbone.sharded:  # it runs equally often in all processes
            most = distributed.most(max(1, len(chunks)), self.encoder.backbone.device)
            chunks += [inputs[:0]] * (most - len(chunks))
        parts: list[dict[str, Tensor]] = [checkpoint(encode_chunk, chunk, use_reentrant=False) for chunk in chunks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _encode_nothing(self) -> dict[str, Tensor]:
        """Return zero rows that depend on all trained weights: each process waits for the gradients of all others."""
        zero = 0.0 * torch.stack([p.float().sum() for p in self.adapted]).sum()
        return {view: zero.expand(0, self.encoder.dim) for view in schema.VIEWS}


def _chunks(inputs: Sequence[_Input], size: int) -> list[Sequence[_Input]]:
    return [inputs[start : start + size] for start in range(0, len(inputs), size)]


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast to train; `FinetuneConfig` explains each setting. `batch_size` is that of one process."""

    learning_rate: float
    weight_decay: float
    warmup: float
    schedule: Schedule
    batch_size: int
    epochs: float
    max_steps: int
    seed: int
    gradient_checkpointing: bool
    checkpoint_steps: int
    log_steps: int
    gradient_steps: int = 0
    loss_learning_rate: float | None = None  # of the loss's own parameters; None: `learning_rate`
    max_grad_norm: float = 1.0  # 0 does not clip


@dataclass(frozen=True)
class Training:
    """The result of a run: its curves, its steps, and the validation of the weights that were kept.

    `curves` has the rows `valid`, `probe` (as in `monitor`), `gradients` (as `gradient_alignment` returns), `warnings`
    (as `Collapse`) and `train`, each with a `step`: how many steps the weights had been trained for. `train` rows are
    means over the steps since the previous row.
    """

    curves: dict[str, list[dict[str, Any]]]
    steps: int
    best: dict[str, float]
    gradient_batch: str = ""  # the samples on which gradients were compared


Validate = Callable[[], dict[str, float]]
OnCollapse = Callable[[list[Collapse]], None]  # called with the collapses that a probe reports for the first time
OnStep = Callable[[int, int, dict[str, float]], None]  # step, number of steps, latest log


def train(
    model: Model,
    samples: TrainingSamples,
    out: Path,
    settings: TrainingSettings,
    validate: Validate,
    on_step: OnStep = lambda step, steps, log: None,
    probe: Probe | None = None,
    on_collapse: OnCollapse = lambda noticed: None,
    reporter: Reporter = SILENT,
    tracking: Tracking | None = None,
) -> Training:
    """Train, validate after each epoch, and leave the model with the weights of the best validation (N@20).

    The untrained weights are never kept, and of a method with phases none from before the last (`Model.may_keep`).

    Checkpoints are in `out/checkpoints`, and the next call continues from the newest whole one, whatever moment the
    call before was killed at: it learns, validates and logs the same. The caller removes them once the adapter is
    saved, or earlier to start again. Neither `probe` nor `settings.gradient_steps` changes a bit of what is learned.

    Gradients are always compared on the same batch, which the seed draws, without dropout. So their curves show what
    the training changes, and not which samples a step happened to have.

    Processes that train together (`distributed.joined`) all call this, with `out` on a shared disk. The batch of a
    step is that of a single process with `batch_size` times their number. Each takes an equal share of it, also of an
    epoch's shorter last batch, so that no sample is left out or used twice.

    Args:
        model: what to train.
        samples: the samples; `model.collate` takes a list of them.
        out: folder for checkpoints.
        settings: how long and how fast.
        validate: ranks the validation items with the current weights. Every process calls it, like `probe`, and it has
            to return the same in each.
        on_step: called after every step.
        probe: measured before the first step, every `probe.interval(...)` steps and after the last one.
        on_collapse: called with the views that collapse, at the probe that shows it.
        reporter: receives which checkpoints are damaged.
        tracking: trackers that receive every point of the curves.

    Raises:
        ModelError: the loss is not finite (the message names the step and the samples), or a checkpoint does not fit.
        ArtifactError: a checkpoint cannot be written, or is of an earlier version.
    """
    folder = out / CHECKPOINTS
    newest = checkpoints.newest_whole(folder, reporter) if distributed.is_main() else None
    name = distributed.from_main(None if newest is None else newest.name)
    checkpoint = None if name is None else folder / name
    backbone = model.encoder.backbone
    if settings.gradient_checkpointing:
        _checkpointing(backbone.language_model, "enable", _RECOMPUTED)
    steps_an_epoch, total = steps_of(samples, settings)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        max_steps=total,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=round(settings.warmup * total),
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        eval_strategy="no",  # `_Watch` validates by ranking, not by a loss
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        disable_tqdm=True,
        use_cpu=backbone.device.type == "cpu",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    # without a launcher the trainer would split each batch over all GPUs by threads, which fails for lists
    arguments._n_gpu = min(1, arguments.n_gpu)
    if backbone.sharded:
        vars(model)["_is_accelerate_prepared"] = True  # accelerate refuses to put DDP around parts of weights
    elif distributed.count() > 1:
        # every process has loaded the same backbone: only the trained weights have to be sent
        frozen = [n for n, p in (*model.named_parameters(), *model.named_buffers()) if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    watch = _Watch(model, samples, steps_an_epoch, validate, on_step, probe, on_collapse)
    gradients = _Gradients(model, samples, settings) if settings.gradient_steps else None
    trackers = ExitStack()
    if tracking is not None and distributed.is_main():
        watch.track(lambda step: trackers.enter_context(tracking.started(step, reporter)))
    trainer = _Trainer(
        model=model,
        args=arguments,
        data_collator=model.collate,
        train_dataset=samples,
        optimizers=(_optimizer(model, settings), None),
        callbacks=[watch],
        watch=watch,
        gradients=gradients,
    )
    trainer.remove_callback(PrinterCallback)
    if distributed.rank():  # the trainer gave all the same seed: users at the same position would share their dropout
        _draw_own(settings.seed, distributed.rank())
    with trackers:
        if checkpoint is None or not trainer.take_end(checkpoint, total):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if settings.gradient_checkpointing:
        _checkpointing(backbone.language_model, "disable")
    return replace(watch.finish(trainer.state), gradient_batch=gradients.described if gradients else "")


def steps_of(samples: TrainingSamples, settings: TrainingSettings) -> tuple[int, int]:
    """Return the steps of an epoch, and those of the whole training."""
    an_epoch = math.ceil(len(samples) / (settings.batch_size * distributed.count()))
    return an_epoch, settings.max_steps or math.ceil(settings.epochs * an_epoch)


@contextmanager
def rehearsal(model: Model, settings: TrainingSettings, steps: int) -> Iterator[Callable[[Sequence[Any], bool], None]]:
    """Yield a function that does with samples what a first step does, except that no weight changes.

    Its second argument tells whether gradients are computed, too; with them, the loss has to be finite.

    Args:
        model: what would be trained.
        settings: as for `train`.
        steps: of the whole training.
    """
    backbone = model.encoder.backbone
    model.loss.to(backbone.device)
    if settings.gradient_checkpointing:
        _checkpointing(backbone.language_model, "enable", _RECOMPUTED)
    model.train()
    model.at_step(0, steps)

    def step(samples: Sequence[Any], learn: bool) -> None:
        batch = send_to_device(model.collate(list(samples)), backbone.device)
        with torch.set_grad_enabled(learn):
            loss, _, _ = model(**batch)
            if learn and len(samples) > 1:  # one user has no negatives, and perhaps no loss
                _require_finite(loss, 0, model.named(batch))
            if learn:
                loss.backward()
        model.zero_grad(set_to_none=True)

    try:
        yield step
    finally:
        if settings.gradient_checkpointing:
            _checkpointing(backbone.language_model, "disable")
        model.eval()


# only the language model: the frozen vision tower runs without gradients and must not be run twice
_RECOMPUTED = {"use_reentrant": False, "context_fn": modality.remembered}


def _require_finite(loss: Tensor, step: int, named: str) -> None:
    """Raise `ModelError` if a loss is NaN or infinity; `step` counts from 0."""
    if not torch.isfinite(loss):
        raise ModelError(
            f"the loss is {loss.item()} at step {step + 1}, with {named}",
            "a finite loss",
            "lower --learning-rate, raise the temperatures, or use --dtype float32",
        )


def _checkpointing(language_model: Any, action: Literal["enable", "disable"], *arguments: dict[str, Any]) -> None:
    # transformers 5.2x renamed gradient checkpointing to activation checkpointing and warns about the old name
    method = getattr(language_model, f"activation_checkpointing_{action}", None)
    (method or getattr(language_model, f"gradient_checkpointing_{action}"))(*arguments)


def _optimizer(model: Model, settings: TrainingSettings) -> torch.optim.AdamW:
    # no decay for a loss's parameters: for weights and temperatures, 0 is not a neutral value
    own = [p for p in model.loss.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": model.adapted, "weight_decay": settings.weight_decay}]
    if own:
        rate = settings.learning_rate if settings.loss_learning_rate is None else settings.loss_learning_rate
        groups.append({"params": own, "weight_decay": 0.0, "lr": rate})
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


class _Trainer(Trainer):
    """transformers' Trainer with our loss, our log, and our checkpoints (`checkpoints`)."""

    def __init__(self, watch: _Watch, gradients: _Gradients | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._learner: Model = arguments["model"]
        self._watch = watch
        self._gradients = gradients
        self._parts: list[dict[str, Tensor]] = []

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of all processes, in an order that depends only on the seed; `collate` takes a share.

        Accelerate's own sharding repeats samples if an epoch does not divide evenly.
        """
        size = self.args.train_batch_size * distributed.count()
        loader = DataLoader(self.train_dataset, size, shuffle=True, collate_fn=self.data_collator)
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.seed,
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave a model that processes share where it is: its head stays on the CPU, as nothing uses it."""
        if not self._sharded(model):
            super()._move_model_to_device(model, device)

    @staticmethod
    def _sharded(model: Any) -> bool:
        return bool(model.encoder.backbone.sharded)

    def training_step(self, model: nn.Module, *arguments: Any, **more: Any) -> Tensor:
        """Learn from a batch. Where the layers are sharded, only their gradients are averaged by themselves."""
        loss: Tensor = super().training_step(model, *arguments, **more)
        if self._sharded(self._learner):
            for parameter in self._learner.loss.parameters():
                if parameter.grad is not None:
                    parameter.grad = distributed.mean(parameter.grad)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], **_: Any) -> Tensor:
        step = self.state.global_step
        if self._gradients and self._gradients.is_due(step):
            self.state.log_history.append({"step": step, **self._gradients.compare(self._prepare_inputs)})
        self._learner.at_step(step, self.state.max_steps)
        loss, log, _ = model(**inputs)
        _require_finite(loss, step, self._learner.named(inputs))
        self._parts.append(log)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._parts and "loss" in logs:
            means = {name: torch.stack([part[name] for part in self._parts]).mean() for name in self._parts[0]}
            logs |= {name: float(value) for name, value in means.items()}
            self._parts.clear()
        super().log(logs, start_time)

    def take_end(self, checkpoint: Path, total: int) -> bool:
        """Take over the checkpoint of a run that was killed after its last step; return False if it is another one."""
        state = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE))
        if state.global_step < total:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        self._watch.on_train_begin(self.args, state, self.control)
        return True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, in place of transformers', which pickles and keeps no checksums."""
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        checkpoints.begin(folder)
        own = [checkpoints.process_file(distributed.rank())]
        checkpoints.write_tensors(folder / own[0], *self._of_this_process())
        weights, optimizer = trainable(self.model), self._of_the_optimizer()  # each process may hold a part of them
        if distributed.is_main():
            own += [checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.STATE]
            checkpoints.write_tensors(folder / checkpoints.WEIGHTS, weights)
            checkpoints.write_tensors(folder / checkpoints.OPTIMIZER, *optimizer)
            if self._watch.best:
                own.append(checkpoints.BEST)
                checkpoints.write_tensors(folder / checkpoints.BEST, self._watch.best)
            with checkpoints.disk(folder):
                self.state.save_to_json(str(folder / checkpoints.STATE))
        checkpoints.finish(folder, own)

    def _of_the_optimizer(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        stored = self.optimizer.state_dict()
        tensors = {
            f"{number}.{name}": sharding.whole(value)
            for number, values in stored["state"].items()
            for name, value in values.items()
        }
        settings = {"groups": stored["param_groups"], "schedule": self.lr_scheduler.state_dict()}
        return tensors, {"settings": json.dumps(settings)}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors, settings = _read(Path(checkpoint) / checkpoints.OPTIMIZER)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            number, _, name = key.partition(".")
            parameter = parameters[int(number)]
            same = value.shape == parameter.shape
            state.setdefault(int(number), {})[name] = sharding.cut_like(value, parameter) if same else value
        groups = [group | {"betas": tuple(group["betas"])} for group in settings["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(settings["schedule"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: there is none."""

    def _of_this_process(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the random states of this process and what it has not logged yet."""
        version, python, python_gauss = random.getstate()
        kind, numbers, *position = np.random.get_state(legacy=True)
        tensors = {
            "python": torch.tensor(python, dtype=torch.int64),
            "numpy": torch.from_numpy(np.asarray(numbers, np.int64)),
            "cpu": torch.get_rng_state(),
            "loss": self._tr_loss,
        }
        if self.args.device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(self.args.device)
        names = list(self._parts[0]) if self._parts else []
        tensors |= {f"part.{name}": torch.stack([part[name] for part in self._parts]) for name in names}
        settings = {
            "python": [version, python_gauss],
            "numpy": [kind, *position],
            "parts": names,
            "logged": self._globalstep_last_logged,
        }
        return tensors, {"settings": json.dumps(settings)}

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put back what `_of_this_process` returned; transformers calls this before the first step."""
        if checkpoint is None:
            return
        own = Path(checkpoint) / checkpoints.process_file(distributed.rank())
        is_new = not own.is_file()  # fewer processes trained before; the values to log are the same in each
        tensors, settings = _read(own.with_name(checkpoints.process_file(0)) if is_new else own)
        version, gauss = settings["python"]
        random.setstate((version, tuple(tensors["python"].tolist()), gauss))
        kind, *position = settings["numpy"]
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *position))
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["cuda"], self.args.device)
        if is_new:
            _draw_own(self.args.seed, distributed.rank(), self.state.global_step)
        self._tr_loss = tensors["loss"].to(self.args.device)
        self._globalstep_last_logged = settings["logged"]
        parts = {name: tensors[f"part.{name}"].to(self.args.device) for name in settings["parts"]}
        count = len(next(iter(parts.values()))) if parts else 0
        self._parts = [{name: values[row] for name, values in parts.items()} for row in range(count)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore(self.model, safetensors.torch.load_file(folder / checkpoints.WEIGHTS), resume_from_checkpoint)
        if (folder / checkpoints.BEST).is_file():
            self._watch.best = safetensors.torch.load_file(folder / checkpoints.BEST)


def _draw_own(*entropy: int) -> None:
    """Begin torch's random numbers, those of dropout, with some that belong to this process."""
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file of a checkpoint, and its settings."""
    with safetensors.safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
    return safetensors.torch.load_file(file), settings


class _Gradients:
    """Compares the gradients of a loss and of each modality on one batch, the same at every step, without dropout.

    No random number of the training is drawn, no `.grad` is touched, and the images have a cache of their own.
    """

    def __init__(self, model: Model, samples: TrainingSamples, settings: TrainingSettings) -> None:
        self._model, self._every = model, settings.gradient_steps
        samples.set_epoch(0)  # a run that goes on later has the same batch
        self._count = min(settings.batch_size * distributed.count(), len(samples))
        drawn = np.random.default_rng([settings.seed, 5]).choice(len(samples), self._count, replace=False)
        self._batch = model.collate([samples[int(place)] for place in drawn])
        self._items = model.items.apart()
        self.described = "; ".join(distributed.from_all(model.named(self._batch)))

    def is_due(self, step: int) -> bool:
        """Tell whether gradients are compared before this step."""
        return step % self._every == 0

    def compare(self, prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, float]:
        """Return a row of the curves; `prepare` puts a batch on the device."""
        with self._without_dropout():
            _, _, alignment = self._model(**prepare(self._batch), with_gradients=True)
        return {schema.FIXED_BATCH: self._count, **alignment}

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        backbone, items = self._model.encoder.backbone, self._model.items
        device = backbone.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._model.eval()
            for layer in backbone.language_model.modules():
                if getattr(layer, "gradient_checkpointing", False):
                    layer.training = True  # only a layer in training is checkpointed; the modules inside it are not
            self._model.items = self._items
            try:
                yield
            finally:
                self._model.items = items
                self._model.train()


class _Watch(TrainerCallback):
    """Validates at the end of each epoch, keeps the best weights, and reports every step."""

    best: dict[str, Tensor] | None = None  # of the best validation so far

    def __init__(
        self,
        model: Model,
        samples: TrainingSamples,
        steps_an_epoch: int,
        validate: Validate,
        on_step: OnStep,
        probe: Probe | None,
        on_collapse: OnCollapse,
    ) -> None:
        self._model, self._samples, self._steps_an_epoch = model, samples, steps_an_epoch
        self._validate, self._on_step = validate, on_step
        self._probe, self._on_collapse = probe, on_collapse
        self._latest: dict[str, float] = {}
        self._begin_tracking: Callable[[int], Trackers] | None = None
        self._trackers: Trackers | None = None
        self._sent = 0  # rows of the log that the trackers have

    def track(self, begin: Callable[[int], Trackers]) -> None:
        """Send every row of the log to the trackers that `begin` returns for the step of the start."""
        self._begin_tracking = begin

    def _send(self, state: TrainerState) -> None:
        for row in state.log_history[self._sent :] if self._trackers else ():
            kind = next((kind for key, kind in _KINDS if key in row), None)
            if kind and self._trackers:
                self._trackers.log(kind, row)
        self._sent = len(state.log_history)

    def validate(self, state: TrainerState) -> None:
        """Rank the validation items and, if this is the best so far, keep the weights."""
        with self._aside():
            metrics = self._validate()
        state.log_history.append({"step": state.global_step, **metrics})
        if self._may_keep(state, state.global_step) and self._best_row(state) is state.log_history[-1]:
            self.best = trainable(self._model)

    def _may_keep(self, state: TrainerState, step: int) -> bool:
        return step > 0 and self._model.may_keep(step, state.max_steps)

    def _best_row(self, state: TrainerState) -> dict[str, float]:
        """Return the best validation of weights that may be kept; of equal ones the first."""
        rows = [row for row in _valid_rows(state) if self._may_keep(state, row["step"])]
        return max(rows, key=lambda row: (row["N@20"], -row["step"]))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Measure without side effects: random numbers drawn here must not change the dropout of the next step."""
        device = self._model.encoder.backbone.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            self._model.eval()  # the trainer goes back to training mode before every step
            yield

    def _probes(self, state: TrainerState) -> list[dict[str, float]]:
        """Return the rows of this probe so far; rows of another number of users belong to another probe."""
        return [row for row in state.log_history if self._probe and row.get(_PROBE) == self._probe.users]

    def probe(self, state: TrainerState) -> None:
        """Measure the probe, and report a view that collapses."""
        assert self._probe is not None
        started = time.perf_counter()
        with self._aside():
            row = self._probe.measure()
        row |= {"step": state.global_step, _PROBE: self._probe.users, "seconds": time.perf_counter() - started}
        state.log_history.append(row)
        if noticed := [found for found in collapses(self._probes(state)) if found.step == state.global_step]:
            self._on_collapse(noticed)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Validate the untrained model, so that the curve shows what training added.

        A run that was killed between a checkpoint at the end of an epoch and the validation makes up for it here.
        """
        # what was measured at the step of a checkpoint may have come after it
        self._sent = sum(row["step"] < state.global_step for row in state.log_history)
        if self._begin_tracking:
            self._trackers = self._begin_tracking(state.global_step)
        validated = {row["step"] for row in _valid_rows(state)}
        if self._ends_epoch(state) and state.global_step not in validated:  # before the first step too
            self.validate(state)
        if self._probe and not self._probes(state):
            self.probe(state)
        self._send(state)

    def _ends_epoch(self, state: TrainerState) -> bool:
        return state.global_step % self._steps_an_epoch == 0 or state.global_step >= state.max_steps

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let `random` samples choose this epoch's positions."""
        self._samples.set_epoch(int(state.epoch or 0))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Validate; also at the end of an epoch that `max_steps` cut short."""
        self.validate(state)
        self._send(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Remember the latest point of the curves, and report a view that is left behind."""
        self._latest |= logs or {}
        if noticed := [found for found in starved(_training_rows(state)) if found.step == state.global_step]:
            self._on_collapse(noticed)
        self._send(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report the step; the last step is always a point of the curves, whatever `log_steps` is."""
        control.should_log |= state.global_step == state.max_steps
        self._on_step(state.global_step, state.max_steps, self._latest)
        last = state.global_step == state.max_steps
        if self._probe and (last or state.global_step % self._probe.interval(state.max_steps) == 0):
            self.probe(state)
            self._send(state)

    def finish(self, state: TrainerState) -> Training:
        """Put the best weights back and return the curves."""
        assert self.best is not None, "every run validates after its last step"
        restore(self._model, self.best, "of the best validation")
        self._model.eval()
        probes = self._probes(state)
        curves = {
            "train": _training_rows(state),
            "valid": _valid_rows(state),
            "probe": probes,
            "gradients": [row for row in state.log_history if _GRADIENTS.intersection(row)],
            "warnings": [asdict(found) for found in by_step(collapses(probes), starved(_training_rows(state)))],
        }
        return Training(curves, state.global_step, self._best_row(state))


def _valid_rows(state: TrainerState) -> list[dict[str, Any]]:
    return [row for row in state.log_history if "N@20" in row]


def _training_rows(state: TrainerState) -> list[dict[str, float]]:
    return [row for row in state.log_history if "loss" in row]
