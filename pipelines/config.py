"""The settings of every command: one frozen dataclass each.

A setting's value comes from its flag, else from `--set key=value`, else from the `--config` file, else from the default
below. `finetune` prefers the defaults of its `--method` (`METHODS` of `embedder/training/recipes.py`) to those below,
and `train-recommender` those of its `--model` (`MODELS` of `downstream/multimodal/recipes.py`).
An unknown key is an error that names the most similar key. This module is cheap to import: pydantic, which checks types
and bounds, is loaded when a command runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from vlm2rec.downstream.multimodal.recipes import MODELS as MULTIMODAL
from vlm2rec.downstream.options import Adapter, Fuse, MatmulPrecision, Positions, Repeats, Softmax, StartMode, TailOver
from vlm2rec.embedder.contract.storage import Location, StorePath, location
from vlm2rec.embedder.options import (
    Alignment,
    Attention,
    Column,
    DeviceName,
    DtypeName,
    EncoderKind,
    EncoderPooling,
    EngineName,
    FloatStorage,
    FusionMode,
    FusionNorm,
    ImagePolicy,
    ImagesBy,
    LateFusion,
    Negatives,
    Pooling,
    PromptMode,
    PromptStyle,
    Quantize,
    QuestionMode,
    Reduction,
    SamplesMode,
    Schedule,
    Sharding,
    Split,
    Storage,
    StrategyChoice,
    ValidCandidates,
    View,
    ViewChoice,
)
from vlm2rec.embedder.training.recipes import LOSSES, METHODS, LossRecipe, Recipe
from vlm2rec.pipelines.convert_formats import FORMATS, Format


class _Anywhere:
    """Tells pydantic how to read a `Place`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._read)

    @staticmethod
    def _read(value: Any) -> Location:
        if not isinstance(value, str | Path | StorePath):
            raise ValueError("a path or an address is needed")
        return location(value)


Config = TypeVar("Config")
Place = Annotated[Location, _Anywhere()]  # a folder on this machine or in an object store
Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Ge(0), Lt(1)]


_BACKBONE = "Hub id or local folder of a vision-language model; with --views text, a causal text model works too."


# the groups of the settings in a help text
FIRST = ""  # the settings that one needs first: they stand on top, without a group
DATA = "Data"
COLUMNS = "Columns of the files"
KEPT = "What is kept"
MODEL = "Model and prompts"
LOSS = "Loss"
METHODS_OWN = "Losses of the other methods"
TRAINING = "Training"
WATCHING = "Watching"
MACHINE = "Machine and memory"
TABLE = "Embeddings folder"
FAILURES = "Failures"
GOING_ON = "Continuing an export"
WORKERS = "Several workers"
START = "Starting from vectors"
RECOMMENDER = "Recommender"
RANKING = "Ranking"
RUNS = "What to run"


def setting(
    text: str, default: Any = MISSING, choices: Collection[str] = (), group: str | None = None, also: str = ""
) -> Any:
    """Declare one setting with its help text; without a default it is required.

    `choices` are the rows of a table that others may extend; the command that reads the table checks the setting.
    `group` begins a group of the help text: the settings below belong to it, until the next one begins. `also` is a
    second name of the setting, for flag and key alike.
    """
    return field(default=default, metadata={"help": text, "choices": tuple(choices), "group": group, "also": also})


def groups_of(cls: Any) -> dict[str, str]:
    """Return the group of every setting of a config class."""
    found, group = {}, FIRST
    for each in fields(cls):
        begun = each.metadata["group"]
        group = group if begun is None else begun
        found[each.name] = group
    return found


def _own(name: str) -> str:
    """Return the help text of a default that multimodal recommenders have of their own."""
    by_value: dict[Any, list[str]] = {}
    for model, recipe in MULTIMODAL.items():
        if name in recipe.defaults:
            by_value.setdefault(recipe.defaults[name], []).append(model)
    return "".join(f"; {', '.join(models)}: {value}" for value, models in by_value.items())


def _rows(table: Mapping[str, Recipe] | Mapping[str, LossRecipe] | Mapping[str, Format]) -> str:
    return "; ".join(f"{name}: {row.help}" for name, row in table.items())


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Settings of `vlm2rec init`."""

    items: Path | None = setting(
        "Items file, as for `prepare`. Default: items.parquet, a name for you to replace.", None
    )
    interactions: Path | None = setting(
        "Interactions file, as for `prepare`. Default: interactions.parquet, a name for you to replace.", None
    )
    images: Path | None = setting(
        "Folder of images, as for `prepare`. If you name --items or --interactions and no images, the stages"
        " read titles only.",
        None,
    )
    backbone: str = setting(_BACKBONE, "Qwen/Qwen3-VL-Embedding-2B")
    out: Path = setting("File to write. An existing file is never overwritten.", Path("vlm2rec.yaml"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of `vlm2rec run`; those of its stages are in the file that `vlm2rec init` writes."""

    config: Path = setting("YAML file of the stages, as `vlm2rec init` writes it.", Path("vlm2rec.yaml"))
    from_stage: str | None = setting(
        "Run this stage and all after it again; earlier stages stay as they are. finetune and export-items keep"
        " what is complete.",
        None,
        also="from",
    )
    only: str | None = setting("Run this stage alone, even if it is done.", None)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `vlm2rec prepare`."""

    items: Path = setting(
        "Items: Parquet, CSV, JSON lines, a folder of such parts, or Amazon metadata (2014 .json.gz, 2023 .jsonl.gz)."
    )
    interactions: Path = setting(
        "Interactions: Parquet, CSV, JSON lines, a folder of such parts, or Amazon reviews of either year."
    )
    out: Path = setting("Dataset folder to write.")
    images: Path | None = setting(
        "Folder of images. --image-column names each item's file; without such a column it is"
        " <item_id>.<jpg|png|webp|gif|bmp>, in this folder or one below it. Without --images, the dataset"
        " serves --views text only.",
        None,
    )
    image_column: str | None = setting(
        "Column of the items with the images' paths, relative to --images. Default: image_path, if there is one.",
        None,
        group=COLUMNS,
    )
    require: tuple[Literal["image", "title"], ...] = setting(
        "What an item needs to be kept: image, title, or both. Default: both; without --images, title.", (), group=KEPT
    )
    cold_items: Literal["keep", "drop"] = setting(
        "Items that have no interaction left after filtering. keep: they get vectors, but no training and no"
        " ranking uses them; drop: they are left out.",
        "keep",
    )
    name: str | None = setting(
        "Dataset name. For Toys, Beauty, Clothing and Sports, the counts are compared with the paper's."
        " Default: the name of --out.",
        None,
        group=FIRST,
    )
    core: Positive = setting(
        "k of the k-core: users and items with fewer than k interactions are dropped until none is left. 1"
        " drops only users with fewer than three, as for a published 5-core file.",
        5,
        group=KEPT,
    )
    min_user: Count = setting(
        "Drop users with fewer interactions than this, once, before the k-core, which counts again after every"
        " drop. SDA prepares its data so; for this drop alone, add --core 1. 0: no minimum.",
        0,
    )
    min_item: Count = setting("The same for items. Both minima are counted before anything is dropped.", 0)
    truncate: Count = setting("Keep only this many of each user's latest interactions, before the k-core. 0: all.", 0)
    max_history: Positive = setting("How many of a user's latest items a model may see.", 10, group=RANKING)
    split: Literal["leave-one-out", "temporal"] = setting(
        "leave-one-out: of each user, the last item is for test and the one before it for validation. temporal:"
        " of each user, the first 80 % are for training, the next 10 % for validation, the last 10 % for test,"
        " as in the VLM2Vec feature study.",
        "leave-one-out",
    )
    candidates: Positive = setting(
        "Candidates drawn per user and seed, from the items that the user has not interacted with.", 100
    )
    candidate_seeds: tuple[int, ...] = setting(
        "Seeds of the candidate sets; one set is stored for each.", (0, 1, 2, 3, 4)
    )
    item_id_column: str = setting("Item id column in both files.", "item_id", group=COLUMNS)
    items_id_column: str | None = setting("Id column of the items. Default: --item-id-column.", None)
    interactions_item_column: str | None = setting("Item column of the interactions. Default: --item-id-column.", None)
    title_column: str = setting("Title column.", "title")
    user_id_column: str = setting("User id column.", "user_id")
    time_column: str = setting("Time column; interactions of equal time keep the file's order.", "timestamp")
    order: Literal["time", "file"] = setting(
        "What orders a user's interactions. time: the time column; file: their order in the file, for data"
        " without times.",
        "time",
    )


@dataclass(frozen=True, kw_only=True)
class MakeBackboneConfig:
    """Settings of `vlm2rec make-backbone`."""

    items: Path = setting("Items with titles and, where there is one, a caption column: Parquet, CSV or JSON lines.")
    images: Path = setting("Folder of images, as for `prepare`.")
    out: Path = setting("Model folder to write.")
    image_column: str | None = setting("Column with the images' paths, as for `prepare`.", None, group=COLUMNS)
    caption_column: str | None = setting(
        "Column with words that describe the item. Default: the first existing one of caption, description, genres,"
        " category, categories, else the title.",
        None,
    )
    item_id_column: str = setting("Item id column.", "item_id")
    title_column: str = setting("Title column.", "title")
    hidden_size: Positive = setting("Width of the language model.", 128, group=MODEL)
    layers: Positive = setting("Layers of the language model.", 4)
    vocabulary: Positive = setting("Size of the byte-level BPE vocabulary.", 4000)
    max_pixels: Positive = setting("Largest image area, in pixels, that the model's processor keeps.", 84 * 84)
    minutes: PositiveFloat = setting(
        "Training stops after this many minutes, or after --max-steps.", 2.5, group=TRAINING
    )
    max_steps: Count = setting("Training stops after this many steps; 0 leaves random weights.", 1000)
    batch_size: Positive = setting("Items in a training step; a step with titles only has four times as many.", 16)
    learning_rate: PositiveFloat = setting("AdamW learning rate.", 1e-3)
    seed: Count = setting("Seed of weights and order.", 0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `vlm2rec finetune`; the defaults are the paper's, if it gives one.

    A method's recipe holds the defaults that differ, and `read_config` applies them.
    """

    data: Place = setting("Dataset folder.")
    backbone: str = setting(_BACKBONE)
    out: Path = setting("Adapter folder to write.")
    images: Place | None = setting(
        "Folder of the dataset's images, if it is no longer where `prepare` found it.", None, group=DATA
    )
    revision: str | None = setting("Revision of a hub backbone.", None, group=MODEL)
    method: str = setting(f"Method, by its training data: {_rows(METHODS)}.", "vlm2rec", METHODS, group=FIRST)
    loss: str = setting(
        f"Loss of --method vlm2rec: {_rows(LOSSES)}. Default with --method slim: sft.", "vlm2rec", LOSSES
    )
    cmsa: Alignment = setting(
        "SDA's alignment loss. paper: its equations; reference: its public code; off: InfoNCE without the soft"
        " target; reference-off: the same, as in its public code.",
        "paper",
        group=METHODS_OWN,
    )
    tau_cmsa: PositiveFloat | None = setting(
        "Temperature of SDA's alignment. Default: 0.02; with --cmsa reference or reference-off it is learned,"
        " and starts at 3.",
        None,
    )
    experts: Positive = setting("Experts of SDA's MoDA, which divide --lora-rank among them; 1 is plain LoRA.", 8)
    drop_ratio: Fraction = setting(
        "Share of an item's attributes, 0 to 1, that LLMEmb drops from each of the item's two texts; at least"
        " one stays. 0 only shuffles them.",
        0.4,
    )
    tau_scft: PositiveFloat = setting("Start of the learned temperature of LLMEmb's contrast.", 0.02)
    related_items: Positive = setting(
        "Related items that NoteLLM-2 keeps for each item: those that users took soon after it.", 10
    )
    tau_pairs: PositiveFloat = setting("Start of the learned temperature of NoteLLM-2's contrast.", 0.05)
    multimodal_weight: NonNegative = setting(
        "NoteLLM-2: weight α of the loss on item vectors; the loss on visual vectors has weight 1.", 9.0
    )
    late_fusion: LateFusion = setting(
        "gate: NoteLLM-2 adds the vision tower's output to its vectors, through a learned gate. Default with"
        " --method notellm2: gate.",
        "off",
    )
    csft_share: Fraction = setting(
        "LLM2Rec: share of the steps, 0 to 1, that learn to write the next title (CSFT); they come first.", 0.8
    )
    mntp_share: Fraction = setting(
        "LLM2Rec: share of the steps, 0 to 1, that predict masked tokens of titles (MNTP); they come second,"
        " and SimCSE has the rest.",
        0.1,
    )
    simcse_scale: PositiveFloat = setting("LLM2Rec: factor of the cosines in SimCSE (1/τ).", 10.0)
    attention: Attention = setting(
        "causal: a token sees the tokens before it; bidirectional: it sees all tokens of its prompt. Default"
        " with --method llm2rec: bidirectional.",
        "causal",
        group=MODEL,
    )
    tau_wpcl: PositiveFloat = setting("Temperature of WPCL, and of InfoNCE with --loss sft.", 0.1, group=LOSS)
    tau_crtr: PositiveFloat = setting("Temperature of CRTR.", 0.1)
    lam: NonNegative = setting("Weight of CRTR (λ).", 0.1)
    reduction: Reduction = setting(
        "How WPCL and CRTR add up over a batch of B users. paper: (sum of WPCL + λ·CRTR)/B, as its equations"
        " say; mean: (mean of WPCL) + λ·CRTR, which weighs CRTR B times as much.",
        "paper",
    )
    alpha: PositiveFloat = setting("Initial sensitivity of the penalty (α).", 1.0)
    beta: PositiveFloat = setting("Initial scale of the penalty (β).", 1.0)
    learnable: bool = setting("Learn α and β; off keeps them fixed.", True)
    stop_gradient: bool = setting("Stop the gradient at the strong modality's margin (Eq. 8).", True)
    penalty: bool = setting("Weigh the negatives by w_pen (Eq. 9); off is WPCL without penalty.", True)
    wpcl: bool = setting("Add WPCL (Eq. 10); off leaves λ·CRTR alone.", True)
    crtr: bool = setting("Add CRTR (Eq. 13).", True)
    matryoshka: tuple[int, ...] = setting(
        "Train vectors so that they can be cut with export-items --dim: 64,128,256 takes the mean of the loss"
        " over the first 64, 128 and 256 dimensions and the whole vector. For --method vlm2rec and slim."
        " Default: whole vectors only.",
        (),
    )
    views: ViewChoice = setting(
        "both, text or image. With text or image (--loss sft only), fused equals that view; the other is not"
        " read. Default with --method llmemb, llm2rec and slim: text.",
        "both",
        group=FIRST,
    )
    fusion: FusionMode = setting(
        "external: a text and an image prompt, whose vectors are summed; internal: one prompt with text and"
        " images. Default with --method notellm2: internal.",
        "external",
        group=MODEL,
    )
    fusion_norm: FusionNorm = setting(
        "With --fusion external. raw: the sum of the two vectors, as in the paper; normalised: the sum after each"
        " is scaled to unit length.",
        "raw",
    )
    prompt_mode: PromptMode = setting(
        "raw: the prompt as in the paper; chat: the prompt inside the model's chat template. Default with"
        " --method sda: chat.",
        "raw",
    )
    max_pixels: Positive = setting(
        "Largest image area, in pixels: larger images are scaled down. More pixels need more time and memory. A"
        " smaller limit of the model's processor takes precedence.",
        224 * 224,
    )
    max_title_tokens: Positive = setting(
        "Titles and other texts are cut to this many tokens. Default with --method sda and slim: 128; llmemb: 256.", 64
    )
    pooling: Pooling = setting(
        "last: the vector is the state of the last token; mean: the mean of all tokens' states. Default with"
        " --method sda, llmemb and llm2rec: mean.",
        "last",
    )
    prompt_style: PromptStyle = setting(
        "Which prompts. vlm2rec: the paper's. qwen3-vl-embedding: those that this model was trained with (chat,"
        " with --instruction as the system message). The others are for single items only: sda, notellm2,"
        " notellm2-basic (without a visual vector), llm2rec (the title alone). Default with --method sda and"
        " llmemb: sda; notellm2 and llm2rec: their own.",
        "vlm2rec",
    )
    instruction: str = setting(
        "The instruction in every prompt of --prompt-style qwen3-vl-embedding. Default: Represent the user's input.", ""
    )
    item_text: str = setting(
        "Columns of the catalogue that make an item's text. One column replaces the title. Several, with commas"
        " between, or `all`, make a list (title is ..., brand is ...). `attributes` is SDA's list of title,"
        " category and brand. Default with --method sda: attributes; llmemb: all; slim: rationale.",
        "title",
        group=DATA,
    )
    lora_rank: Positive = setting(
        "LoRA rank; with --experts, the rank of all experts together. Default with --method sda, llmemb and"
        " llm2rec: 8.",
        16,
        group=MODEL,
    )
    lora_alpha: PositiveFloat = setting("LoRA α. Default with --method llm2rec: 16.", 32.0)
    lora_dropout: Fraction = setting("LoRA dropout. Default with --method sda and llmemb: 0.1.", 0.2)
    learning_rate: PositiveFloat = setting(
        "AdamW learning rate. Default with --method sda, llmemb and llm2rec: 2e-4.", 1e-5, group=FIRST
    )
    loss_learning_rate: PositiveFloat | None = setting(
        "AdamW learning rate of the loss's own parameters (α and β; SDA's temperature). Default: --learning-rate.",
        None,
        group=TRAINING,
    )
    weight_decay: NonNegative = setting("AdamW weight decay; α and β have none.", 0.01)
    max_grad_norm: NonNegative = setting(
        "Gradient clipping: a gradient with a larger norm is scaled down to this norm. 0: no clipping.", 1.0
    )
    warmup: Fraction = setting("Share of the steps, 0 to 1, in which the learning rate rises from 0.", 0.0)
    schedule: Schedule = setting("Learning rate after the warm-up.", "constant")
    batch_size: Positive = setting(
        "Samples in a batch on one device: users, or with --method sda and llmemb items. A step of N processes"
        " has N times as many. Default with --method sda, llmemb and llm2rec: 32; notellm2: 16 pairs of items.",
        8,
        group=FIRST,
    )
    negatives: Negatives = setting(
        "Negatives when several processes train. local: the targets of the process's own batch; global: those"
        " of all processes.",
        "local",
        group=TRAINING,
    )
    negatives_file: Path | None = setting(
        "File of hard negatives, in addition to those of the batch: Parquet, CSV or JSON lines. Its columns:"
        " item_id (the target) or user_id, and negative_id (one per row) or negatives (a list). For --method"
        " vlm2rec and slim.",
        None,
    )
    mine_from: Place | None = setting(
        "Embeddings folder of an earlier export in which finetune looks for hard negatives: items near the target.",
        None,
    )
    margin: Fraction = setting(
        "With --mine-from: share, 0 to 1, of the target's cosine with the user's history. An item whose cosine"
        " is larger may be a positive, so it is not used.",
        0.95,
    )
    hard_negatives: Positive = setting("Largest number of hard negatives per user in a step.", 4)
    chunk_users: Count = setting(
        "Users encoded at a time (GradCache). Lower it if memory runs out; the negatives stay those of the"
        " whole batch. 0: all at once.",
        0,
        group=MACHINE,
    )
    epochs: PositiveFloat = setting("Passes over the training samples; a fraction is allowed.", 3.0, group=FIRST)
    max_steps: Count = setting(
        "Stop after this many steps, if that is before --epochs. 0: no limit. SDA's paper uses 4000.", 0, group=TRAINING
    )
    samples: SamplesMode = setting(
        "Which samples (prefix → next item) of a user to train on. last: the last one; random: one at random;"
        " all: every one. Default with --method llm2rec: random.",
        "last",
        group=DATA,
    )
    users: Count = setting("Train on this many users, drawn at random (few-shot). 0: all.", 0)
    valid_users: Count = setting("Users drawn for the validation after each epoch. 0: all.", 512, group=WATCHING)
    valid_candidates: ValidCandidates = setting(
        "Among which items validation and the collapse check rank the validation item. own: items drawn for"
        " validation alone, so that nothing of the test is read; stored: the first candidate set of the dataset"
        " folder, which the test uses too.",
        "own",
    )
    gradient_checkpointing: bool = setting(
        "Recompute the language model's activations to save memory.", True, group=MACHINE
    )
    quantize: Quantize = setting(
        "nf4: hold the language model's matrices in four bits while training (QLoRA, by bitsandbytes), to save"
        " memory; an export uses the unquantised backbone. For --method vlm2rec and slim.",
        "none",
    )
    sharding: Sharding = setting(
        "fsdp: each of several processes holds a part of every layer of the language model (FSDP2), so that larger"
        " backbones fit. none: each holds all. For --method vlm2rec and slim.",
        "none",
        group=MACHINE,
    )
    dtype: DtypeName = setting(
        "Number format of the computation. auto: bfloat16 where the device multiplies it natively (on a CPU"
        " only for a hidden size of at least 512), else float32.",
        "auto",
    )
    vision_cache: str = setting(
        "Where to keep the vision tower's output, so that later runs need not encode the images again: auto (in"
        " the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto", group=FIRST)
    checkpoint_steps: Positive = setting("Steps between checkpoints.", 100, group=WATCHING)
    log_steps: Positive = setting("Steps between points of the training curves.", 10)
    probe_users: Count = setting(
        "Validation users for the collapse check: whether one modality falls behind while training. 0: no check.", 32
    )
    probe_steps: Count = setting("Steps between two collapse checks. 0: a twentieth of the run, at least 10.", 0)
    gradient_steps: Count = setting(
        "Steps between two comparisons of how strongly the loss pulls at text and at image vectors, on one"
        " batch without dropout. 0: never.",
        0,
    )
    report_to: str = setting(
        "Trackers that receive the training curves: tensorboard, wandb, mlflow, trackio, with commas between; or none.",
        "none",
    )
    log_dir: Path | None = setting("Folder for the trackers' files. Default: the name of --out with -logs added.", None)
    resume: bool = setting(
        "Continue from the last checkpoint in --out; off starts from the beginning.", True, group=TRAINING
    )
    seed: Count = setting("Seed of the adapter, the order of users and dropout.", 0)
    dry_run: bool = setting(
        "Check everything and do a step on this device; print steps, time and memory, also for the usual GPUs, and"
        " write nothing.",
        False,
        group=FIRST,
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `vlm2rec export-items`; `pipelines.export_items.SOURCES` says which belong together."""

    data: Place = setting("Dataset folder.")
    backbone: str | None = setting(_BACKBONE + " Give this or --encoder.", None)
    encoder: Path | None = setting(
        "Folder of a frozen encoder instead of --backbone: a text encoder (sentence-transformers or another),"
        " CLIP, SigLIP, ResNet or EfficientNet.",
        None,
    )
    image_encoder: Path | None = setting(
        "Folder of a ResNet or EfficientNet for the images, beside a text encoder as --encoder. fused is then"
        " text and image concatenated.",
        None,
    )
    out: Place = setting("Embeddings folder to write.")
    images: Place | None = setting(
        "Folder of the dataset's images, if it is no longer where `prepare` found it.", None, group=DATA
    )
    adapter: Path | None = setting(
        "Adapter folder of `finetune`, or a LoRA or DoRA folder in PEFT's format that another program made; without it,"
        " the plain backbone.",
        None,
        group=FIRST,
    )
    revision: str | None = setting("Revision of a hub backbone.", None, group=MODEL)
    encoder_kind: EncoderKind = setting(
        "Kind of --encoder. sentence: titles only; clip: titles and images in one space; image: images only; auto: what"
        " the folder holds.",
        "auto",
    )
    views: ViewChoice | None = setting(
        "both, text or image; with text or image, fused equals that view. Default: the adapter's, else both.",
        None,
        group=FIRST,
    )
    fusion: FusionMode | None = setting(
        "external or internal, as for finetune. Default: the adapter's, else external.", None, group=MODEL
    )
    fusion_norm: FusionNorm | None = setting(
        "raw or normalised, as for finetune. Default: the adapter's, else raw.", None
    )
    prompt_mode: QuestionMode | None = setting(
        "raw or chat, as for finetune. Default and auto: the adapter's, else raw; with --strategy question,"
        " chat if the model has a chat template.",
        None,
    )
    max_pixels: Positive | None = setting(
        "Largest image area, in pixels. Default: the adapter's, else 224² (50176).", None
    )
    max_title_tokens: Positive | None = setting(
        "Titles and other texts are cut to this many tokens. Default: the adapter's, else 64; with a --strategy"
        " of the VLM2Vec study 128, for title and category.",
        None,
    )
    strategy: StrategyChoice | None = setting(
        "Other prompts than VLM2Rec's, for a plain backbone or another program's adapter. visual, textual,"
        " prompt1, prompt2 (both in one prompt) and dual (fused is text and image concatenated) are those of"
        " the VLM2Vec study, with the item's category. question asks --instruction about title and image"
        " together.",
        None,
    )
    instruction: str | None = setting(
        "With --strategy question: what to ask about every item; by default, six attributes in JSON. With"
        " --prompt-style qwen3-vl-embedding: as for finetune; by default, the adapter's.",
        None,
    )
    pooling: EncoderPooling | None = setting(
        "last or mean, as for finetune; for a text encoder also cls. Default and auto: the adapter's, else"
        " last; for a text encoder, what its folder says, else mean.",
        None,
    )
    prompt_style: PromptStyle | None = setting(
        "Which prompts, as for finetune. Default: the adapter's, else vlm2rec.", None
    )
    attention: Attention | None = setting(
        "causal or bidirectional, as for finetune. Default: the adapter's, else causal.", None
    )
    late_fusion: LateFusion | None = setting("off or gate, as for finetune. Default: the adapter's, else off.", None)
    item_text: str | None = setting(
        "Columns of the catalogue that are an item's text, as for finetune. Default: the adapter's, else title.",
        None,
        group=DATA,
    )
    items: str | None = setting(
        "Only these items: ids with commas between, or a file of them (.txt with one per line, .json, .npy, or"
        " .parquet with the column item_id). Default: all items of the dataset.",
        None,
        group=DATA,
    )
    shard_size: Positive = setting("Items in one Parquet file.", 4096, group=TABLE)
    token_budget: Count = setting(
        "Tokens in one packed row; with --encoder or --strategy question, padded tokens in a batch. Lower it if"
        " memory runs out. 0: automatic.",
        0,
        group=MACHINE,
    )
    dim: Positive | None = setting(
        "Keep only this many first dimensions of each vector, and scale it to unit length; best after finetune"
        " --matryoshka. Default: the whole vector.",
        None,
        group=TABLE,
    )
    storage: Storage = setting(
        "Number format of the vectors on disk: float32, float16, int8 (with a scale for each vector) or binary"
        " (one bit per dimension). The manifest says which share of the nearest neighbours --dim, int8 and"
        " binary keep.",
        "float32",
        also="precision",
    )
    on_image_error: ImagePolicy = setting(
        "What to do with an item whose image cannot be read. fail: stop; null: write a row without vectors,"
        " with the reason; text_only: write only a text vector.",
        "null",
        group=FAILURES,
    )
    images_by: ImagesBy = setting(
        "How to recognise changed images when an export continues. mtime: size and time; bytes: content of every file.",
        "mtime",
    )
    extend: bool = setting(
        "If items were appended to the dataset: keep the finished vectors and encode the new items.",
        False,
        group=GOING_ON,
    )
    retry_failed: bool = setting("Encode again the items that failed or have changed since; keep the rest.", False)
    changed_since: Place | None = setting(
        "Finished embeddings folder. Its vectors are reused for items with the same title and image.", None
    )
    image_timeout: PositiveFloat = setting("Seconds after which reading an image is given up.", 60.0, group=FAILURES)
    max_failures: Fraction = setting(
        "Largest share of items, 0 to 1, that may fail. If more fail, the exit code is 6.", 0.01
    )
    dtype: DtypeName = setting(
        "Number format of the computation. auto: bfloat16 where the device multiplies it natively; float32 elsewhere"
        " and with --encoder.",
        "auto",
        group=MACHINE,
    )
    vision_cache: str = setting(
        "Where to keep the vision tower's output, so that later runs need not encode the images again: auto (in"
        " the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto", group=FIRST)
    num_workers: Positive = setting(
        "Number of processes, or Ray tasks, that encode at the same time.", 1, group=WORKERS
    )
    worker: Count | None = setting(
        "Number of this worker, from 0 to --num-workers - 1. It makes only its own shards; a Slurm array or a"
        " Kubernetes job starts the others.",
        None,
    )
    gpus: Count = setting(
        "Start this many processes on this machine, each with its own GPU. 0: as --num-workers says.", 0
    )
    engine: EngineName = setting("local: processes on this machine; ray: tasks of a Ray cluster.", "local")
    dry_run: bool = setting(
        "Encode a few items, print how much time, memory and disk space the whole export would take, and write"
        " nothing.",
        False,
        group=FIRST,
    )


@dataclass(frozen=True, kw_only=True)
class HistoryColumns:
    """How a file of histories is read; the commands that read one share these settings."""

    user_id_column: str = setting("User id column of --histories.", "user_id", group=COLUMNS)
    item_id_column: str = setting("Item id column of a long table.", "item_id")
    time_column: str = setting("Time column of a long table; equal times keep the file's order.", "timestamp")
    history_column: str | None = setting(
        "Column with each user's list of item ids, oldest first, for a file with one row per user. Default:"
        " history, if the file has no item id column.",
        None,
    )
    order: Literal["time", "file"] = setting(
        "What orders a long table. time: the time column; file: the order in the file, for data without times.", "time"
    )


_HISTORIES = (
    "Histories of any users, in Parquet, CSV or JSON lines: a long table (user, item, time), or one row per"
    " user with a list."
)


@dataclass(frozen=True, kw_only=True)
class ExportUsersConfig(HistoryColumns):
    """Settings of `vlm2rec export-users`."""

    histories: Path = setting(_HISTORIES, group=FIRST)
    embeddings: Place = setting(
        "Embeddings folder of the items. The users' vectors can be compared with its vectors, or are means of them."
    )
    out: Place = setting("Folder of users to write.")
    data: Place | None = setting("Dataset folder, whose titles and images --backbone reads.", None)
    images: Place | None = setting("Folder of the dataset's images, if it is no longer where `prepare` found it.", None)
    users_from: Literal["auto", "sequence", "mean"] = setting(
        "Where a user's vector comes from, as for evaluate. sequence: the encoder reads the whole history;"
        " mean: the mean of the history's item vectors; auto: sequence if --backbone is given and there is a"
        " prompt for histories, else mean.",
        "auto",
    )
    backbone: str | None = setting("Backbone of the export, for --users-from sequence.", None)
    adapter: Path | None = setting("Adapter of the export, for --users-from sequence.", None)
    revision: str | None = setting("Revision of a hub backbone.", None)
    max_history: Positive | None = setting(
        "How many of a user's latest items count. Default: as many as in --data, else 10.", None
    )
    shard_size: Positive = setting("Users in one Parquet file.", 4096, group=TABLE)
    storage: FloatStorage = setting("Number format of the vectors on disk.", "float32")
    token_budget: Count = setting(
        "Tokens in one packed row. Lower it if memory runs out. 0: automatic.", 0, group=MACHINE
    )
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where to keep the vision tower's output, so that later runs need not encode the images again: auto (in"
        " the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto")
    num_workers: Positive = setting("Number of processes that work at the same time.", 1)


@dataclass(frozen=True, kw_only=True)
class RecommendConfig(HistoryColumns):
    """Settings of `vlm2rec recommend`."""

    histories: Path | None = setting(
        _HISTORIES + " Their items are left out of the recommendations.", None, group=FIRST
    )
    users: Place | None = setting(
        "Folder of users that export-users made from the same --histories. Without it, a user's vector is the"
        " mean of the history's item vectors.",
        None,
    )
    embeddings: Place | None = setting("Embeddings folder of the items to recommend; the search is exact.", None)
    index: Path | None = setting(
        "Index folder to search instead of --embeddings; approximate, but faster. Together with --embeddings, it"
        " must be built from them.",
        None,
    )
    recommender: Path | None = setting(
        "Folder of a finished train-recommender run (SASRec, GRU4Rec, BERT4Rec), which ranks instead of the vectors.",
        None,
    )
    data: Place | None = setting(
        "With --recommender: dataset folder that the recommender was trained on. Default: the one that the run names.",
        None,
    )
    out: Place = setting("Folder of recommendations to write.")
    k: Positive = setting("Items for each user.", 10)
    column: View = setting("View to compare users and items by.", "fused")
    keep_seen: bool = setting("Recommend items of the history too.", False)
    max_history: Positive | None = setting(
        "How many of a user's latest items make the vector; all items count as seen. Default: 10; with"
        " --recommender, the length that it was trained with.",
        None,
    )
    shard_size: Positive = setting("Users in one Parquet file.", 8192, group=MACHINE)
    device: DeviceName = setting("With --recommender: device to run on.", "auto")
    num_workers: Positive = setting("Number of processes that work at the same time.", 1)


@dataclass(frozen=True, kw_only=True)
class ExportRecommenderConfig:
    """Settings of `vlm2rec export-recommender`."""

    recommender: Path = setting("Folder of a finished train-recommender run (SASRec, GRU4Rec, BERT4Rec).")
    out: Place = setting("Embeddings folder to write.")
    data: Place | None = setting(
        "Dataset folder that the recommender was trained on. Default: the one that the run names.", None
    )
    embeddings: Place | None = setting(
        "Embeddings folder that the recommender was trained from. Default: the one that the run names.", None
    )
    shard_size: Positive = setting("Items in one Parquet file.", 4096)
    storage: FloatStorage = setting("Number format of the vectors on disk.", "float32")


@dataclass(frozen=True, kw_only=True)
class ImportAdapterConfig:
    """Settings of `vlm2rec import-adapter`; those from --views on are recorded, and every later use takes them."""

    adapter: Path = setting(
        "LoRA or DoRA folder in PEFT's format, as PEFT, VLM2Vec, LLaMA-Factory and ms-swift write it."
    )
    backbone: str = setting("Hub id or local folder of the model that the adapter was trained on.")
    out: Path = setting("Adapter folder to write.")
    revision: str | None = setting("Revision of a hub backbone.", None)
    views: ViewChoice = setting("both, text or image, as the adapter was trained.", "both", group=MODEL)
    fusion: FusionMode = setting("As for finetune.", "external")
    fusion_norm: FusionNorm = setting("As for finetune.", "raw")
    prompt_mode: PromptMode = setting("raw or chat, as the adapter was trained.", "raw")
    prompt_style: PromptStyle = setting("Which prompts, as for finetune.", "vlm2rec")
    instruction: str = setting("As for finetune.", "")
    item_text: str = setting("Columns of the catalogue that are an item's text, as for finetune.", "title")
    pooling: Pooling = setting("last or mean, as the adapter was trained.", "last")
    attention: Attention = setting("causal or bidirectional, as the adapter was trained.", "causal")
    max_pixels: Positive = setting("Largest image area, in pixels.", 224 * 224)
    max_title_tokens: Positive = setting("Titles and other texts are cut to this many tokens.", 64)
    dtype: DtypeName = setting("Number format for the canary vectors, as for export-items.", "auto", group=MACHINE)
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto")


@dataclass(frozen=True, kw_only=True)
class ImportVectorsConfig:
    """Settings of `vlm2rec import-vectors`."""

    data: Place = setting("Dataset folder.")
    file: Path = setting(
        "File of vectors. Parquet or JSON lines: ids and lists of numbers; CSV or TSV: ids and one column for"
        " each dimension, or one column of lists; also RecBole's .itememb, or an .npy matrix of shape (items,"
        " d)."
    )
    out: Place = setting("Embeddings folder to write.")
    ids: Path | None = setting(
        "Ids of the rows of an .npy: .npy, .txt (one per line), .json (a list), or Parquet with the id column.", None
    )
    in_item_order: bool = setting(
        "Instead of --ids: row i of the .npy is item i of items.parquet. The counts must agree.", False
    )
    item_id_column: str = setting("Id column (or key) of a file with ids.", "item_id")
    column: str | None = setting(
        "Vector column (or key) of a file with ids. Default: the columns fused, text and image, else the only"
        " one with lists; in a CSV without lists, all columns of numbers together.",
        None,
    )
    view: View = setting("The view that a single column or an .npy holds.", "fused")
    fusion_norm: FusionNorm = setting(
        "How to make fused if the file has text and image only: raw or normalised, as for finetune.", "raw"
    )
    pca: Positive | None = setting("Reduce the vectors to this many principal components. Default: no reduction.", None)
    shard_size: Positive = setting("Items in one Parquet file.", 4096, group=TABLE)
    storage: FloatStorage = setting(
        "Number format of the vectors on disk; `vlm2rec shorten` makes smaller ones.", "float32", also="precision"
    )
    max_failures: Fraction = setting(
        "Largest share of items, 0 to 1, that may lack a vector. If more do, the exit code is 6.", 0.01
    )


@dataclass(frozen=True, kw_only=True)
class ShortenConfig:
    """Settings of `vlm2rec shorten`."""

    embeddings: Place = setting("Finished embeddings folder with full vectors.")
    out: Place = setting("Embeddings folder to write.")
    dim: Positive | None = setting("Dimensions to keep of each vector, as for export-items. Default: all.", None)
    precision: Storage = setting(
        "Number format on disk: float32, float16, int8 or binary, as for export-items.", "float32"
    )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Settings of `vlm2rec verify`."""

    embeddings: Place = setting("Embeddings folder.")


@dataclass(frozen=True, kw_only=True)
class FailuresConfig:
    """Settings of `vlm2rec failures`."""

    embeddings: Place = setting("Embeddings folder.")
    data: Place | None = setting("Dataset folder, for titles and images. Default: that of the export.", None)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `vlm2rec evaluate` (Task 1)."""

    data: Place = setting("Dataset folder.")
    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Folder to write: metrics.json, users.parquet.")
    images: Place | None = setting(
        "Folder of the dataset's images, if it is no longer where `prepare` found it.", None, group=DATA
    )
    users_from: Literal["auto", "sequence", "mean"] = setting(
        "Where a user's vector comes from. sequence: the encoder reads the whole history; mean: the mean of the"
        " history's item vectors; auto: sequence if --backbone is given and there is a prompt for histories,"
        " else mean.",
        "auto",
        group=FIRST,
    )
    backbone: str | None = setting("Backbone for --users-from sequence.", None)
    adapter: Path | None = setting("Adapter for --users-from sequence.", None)
    revision: str | None = setting("Revision of a hub backbone.", None, group=MODEL)
    split: Split = setting("Which held-out item to rank: that for test or that for validation.", "test", group=RANKING)
    seeds: tuple[int, ...] = setting("Seeds of the stored candidate sets to rank among. Default: all.", ())
    tail_over: TailOver = setting(
        "Which interactions count for the long tail (items with fewer than 4). train: those of training; all:"
        " the held-out ones too, as in SDA's code.",
        "train",
    )
    missing: Literal["error", "zero"] = setting(
        "What to do with items without a vector. error: stop; zero: give them cosine 0 and report their number.",
        "error",
    )
    token_budget: Count = setting(
        "Tokens in one packed row. Lower it if memory runs out. 0: automatic.", 0, group=MACHINE
    )
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where to keep the vision tower's output, so that later runs need not encode the images again: auto (in"
        " the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto")


@dataclass(frozen=True, kw_only=True)
class ProbeImagesConfig:
    """Settings of `vlm2rec probe-images`."""

    data: Place = setting("Dataset folder.")
    backbone: str = setting("Hub id or local folder of a vision-language model.")
    column: str = setting(
        "Column of items.parquet that a classifier predicts from the images. Of a list, the first value counts."
    )
    out: Path = setting("Folder to write: probe.json.")
    images: Place | None = setting("Folder of the dataset's images, if it is no longer where `prepare` found it.", None)
    revision: str | None = setting("Revision of a hub backbone.", None)
    items: Positive = setting("Largest number of items to read; from a larger catalogue, this many are sampled.", 5000)
    max_pixels: Positive = setting("Largest image area, in pixels.", 224 * 224)
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where to keep the vision tower's output, so that later runs need not encode the images again: auto (in"
        " the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto")
    seed: Count = setting("Seed of the sample and of the held-out items.", 0)


@dataclass(frozen=True, kw_only=True)
class TrainRecommenderConfig:
    """Settings of `vlm2rec train-recommender` (Task 2)."""

    data: Place | None = setting("Dataset folder; without it, --config names a dataset of RecBole.", None)
    out: Path = setting("Folder to write: metrics.json, users.parquet, checkpoint.")
    model: str | None = setting(
        "SASRec, GRU4Rec or BERT4Rec (RecBole's); or VBPR, FREEDOM, LATTICE or SLMRec, which need --embeddings.", None
    )
    embeddings: Place | None = setting(
        "Embeddings folder of the items. Without it, the recommender learns from item ids alone.", None
    )
    column: Column = setting(
        "SASRec, GRU4Rec, BERT4Rec: the view to start from. concat: text and image concatenated, with twice the"
        " dimensions.",
        "fused",
    )
    features: tuple[View, ...] = setting(
        "VBPR, FREEDOM, LATTICE, SLMRec: the views to use, one or text,image. Default: text,image; VBPR uses"
        " those that the folder has.",
        (),
        group=START,
    )
    normalize: bool = setting(
        "VBPR, FREEDOM, LATTICE, SLMRec: scale the vectors to unit length, as VLM2Vec does. The other models"
        " always scale them.",
        False,
    )
    mode: StartMode = setting(
        "How to use the vectors. adapter: frozen vectors, trained layers (--adapter); table: a trained item"
        " table that starts from the vectors; fuse: as adapter, plus a trained row for every id; init: trained"
        " vectors, trained layers. VBPR, FREEDOM, LATTICE, SLMRec: adapter or init.",
        "adapter",
    )
    fuse: Fuse = setting(
        "With --mode fuse. sum: add the id's row to the adapted vector; gate: the vector decides how much of"
        " the id's row to add.",
        "sum",
    )
    id_dropout: Fraction = setting(
        "With --mode fuse: share of the id rows, 0 to 1, that each training step leaves out.", 0.1
    )
    adapter: Adapter = setting(
        "Layers between the vectors and the recommender. linear: one Linear(d → hidden_size); two-linear: two without"
        " activation; mlp: two with GELU.",
        "linear",
    )
    pca: Positive | None = setting(
        "Reduce the vectors to this many principal components first. Default: no reduction.", None
    )
    align_with: Path | None = setting(
        "Folder of a finished run of this command without --embeddings. Its item table is what the adapted"
        " vectors are aligned with, as in LLMEmb (RAT).",
        None,
    )
    align_weight: PositiveFloat = setting("Weight of that alignment in the loss; SDA's code tries 0.01 to 0.2.", 0.01)
    align_tau: PositiveFloat = setting("Temperature of that alignment.", 2.0)
    missing: Literal["error", "mean", "random"] = setting(
        "What to do with items without a vector. error: stop; mean: give them the mean vector; random: give"
        " them random vectors. Their number is reported.",
        "error",
    )
    config: Path | None = setting("A RecBole YAML; its keys override our defaults.", None, group=FIRST)
    max_epochs: Positive = setting(f"Largest number of epochs{_own('max_epochs')}.", 200)
    eval_step: Positive = setting("Epochs between two validations.", 5, group=TRAINING)
    patience: Positive = setting("Stop after this many epochs without improvement.", 20)
    batch_size: Positive = setting(f"Targets in a batch{_own('batch_size')}.", 256)
    positions: Positions = setting(
        "What is a training row. last: a prefix of a sequence, as in RecBole; all: a whole sequence, of which"
        " SASRec and GRU4Rec learn all positions at once, several times as fast.",
        "last",
    )
    softmax: Softmax = setting(
        "Items in the loss. full: all; sampled: for SASRec and GRU4Rec, some that are drawn for each step, with the"
        " logQ correction. Choose it for catalogues of 10⁵ items and more.",
        "full",
        group=TRAINING,
    )
    samples: Positive = setting(
        "With --softmax sampled: number of items that are drawn for a step.", 4096, group=TRAINING
    )
    matmul_precision: MatmulPrecision = setting(
        "SASRec, GRU4Rec, BERT4Rec: how exact the matrix products of a training have to be. highest: float32; high:"
        " TF32 will do; medium: bfloat16 factors will do. The device takes what is fastest.",
        "highest",
        group=TRAINING,
    )
    learning_rate: PositiveFloat = setting(
        "Learning rate of AdamW; of Adam for VBPR, FREEDOM, LATTICE and SLMRec.", 1e-3
    )
    weight_decay: NonNegative = setting(f"Weight decay{_own('weight_decay')}.", 1e-4)
    hidden_size: Positive = setting(f"Width d of the recommender{_own('hidden_size')}.", 128, group=RECOMMENDER)
    dropout: Fraction = setting("SASRec, GRU4Rec, BERT4Rec: dropout.", 0.3)
    graph_layers: Positive = setting(f"Steps of graph convolution over users and items{_own('graph_layers')}.", 2)
    neighbours: Positive = setting("FREEDOM, LATTICE: nearest items in the item graph, the item itself included.", 10)
    image_weight: Fraction = setting("FREEDOM: weight of the image graph, 0 to 1; the text graph has the rest.", 0.1)
    pruning: Share = setting(
        "FREEDOM: share of the interactions, 0 to 1, that each epoch leaves out of the graph.", 0.8
    )
    regularisation: NonNegative = setting(
        f"Weight of VBPR's and LATTICE's norms, and of FREEDOM's loss on projected vectors{_own('regularisation')}.",
        1e-3,
    )
    temperature: PositiveFloat = setting("SLMRec: temperature of the loss.", 0.2)
    ssl_weight: NonNegative = setting("SLMRec: weight of the self-supervised alignment of views.", 0.1)
    ssl_temperature: PositiveFloat = setting("SLMRec: temperature of the self-supervised alignment of views.", 0.2)
    seeds: tuple[int, ...] = setting("Seeds of the stored candidate sets to report. Default: all.", (), group=RANKING)
    tail_over: TailOver = setting(
        "Which interactions count for the long tail (items with fewer than 4). train: those of training; all:"
        " the held-out ones too, as in SDA's code.",
        "train",
    )
    seed: Count = setting("Seed of weights and order.", 0, group=TRAINING)
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto", group=FIRST)


@dataclass(frozen=True, kw_only=True)
class BuildIndexConfig:
    """Settings of `vlm2rec build-index`."""

    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Index folder to write.")
    column: Column = setting("Which view to index. concat: text and image concatenated.", "fused")
    kind: str = setting(
        "Kind of index: auto (by the number of vectors), flat (exact), hnsw, ivf, or a FAISS factory string.", "auto"
    )
    data: Place | None = setting("Dataset folder for titles in search results. Default: that of the export.", None)
    sample: Positive = setting("Number of items to measure recall@10 with.", 1000)
    engine: EngineName = setting(
        "Where vectors are added. local: in this process; ray: in tasks of a Ray cluster, each of which fills a part."
        " Not for HNSW.",
        "local",
    )
    num_workers: Positive = setting("With --engine ray: number of tasks at the same time.", 1)
    seed: Count = setting("Seed of the sample and of k-means.", 0)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of `vlm2rec search`."""

    index: Path = setting("Index folder.")
    item: str | None = setting("Id of the item whose neighbours to print.", None)
    text: str | None = setting(
        "Words to search for, encoded as an item's title; with --image, as an item with both. This loads the"
        " encoder of the export.",
        None,
    )
    image: Path | None = setting("Image file to search for, encoded as an item's image.", None)
    history: tuple[str, ...] = setting(
        "Ids of items, oldest first: the mean of their vectors; with --backbone, the encoder's vector of the history.",
        (),
    )
    against: View | None = setting(
        "View of the items to compare with. Default: that of the index. Another view is read from the"
        " embeddings folder and searched exactly.",
        None,
    )
    k: Positive = setting("Number of neighbours.", 10)
    embeddings: Place | None = setting(
        "Embeddings folder that the index was built from, for exact vectors and other views. Default: the folder on"
        " this machine that the index names; an address is opened only if it is given here.",
        None,
    )
    html: Path | None = setting("HTML file to write: one page with the items' images inside it.", None)
    backbone: str | None = setting(
        "Folder or hub id of the export's backbone, if it has moved. Default: as in the export.", None, group=MODEL
    )
    adapter: Path | None = setting("Folder of the export's adapter, if it has moved. Default: as in the export.", None)
    revision: str | None = setting("Revision of a hub backbone. Default: that of the export.", None)
    encoder: Path | None = setting(
        "Folder of the export's frozen --encoder, if it has moved. Default: as in the export.", None
    )
    data: Place | None = setting(
        "Dataset folder, for histories and images. Default: that of the export.", None, group=DATA
    )
    images: Place | None = setting("Folder of the dataset's images, if it is no longer where `prepare` found it.", None)
    device: DeviceName = setting("Device to run the encoder on.", "auto", group=MACHINE)


@dataclass(frozen=True, kw_only=True)
class SemanticIdsConfig:
    """Settings of `vlm2rec semantic-ids`."""

    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Folder to write: semantic_ids.parquet, codebook.safetensors.")
    column: View = setting("Which view to turn into codes.", "fused")
    levels: Positive = setting(
        "Levels of the codebook: codes per item. One more code tells items with equal codes apart.", 3
    )
    codebook: Positive = setting("Codewords per level.", 256)
    balanced: bool = setting("Give all codewords of a level equally many items.", False)
    like: Path | None = setting(
        "An earlier folder of this command: its items keep their codes, and its codebook (levels and size)"
        " codes the new items.",
        None,
    )
    sample: Positive = setting(
        "Number of items whose neighbours are compared, to measure how well codes keep them.", 1000
    )
    seed: Count = setting("Seed of the samples and of k-means.", 0)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `vlm2rec convert`."""

    embeddings: Place = setting("Embeddings folder.")
    to: str = setting(f"{_rows(FORMATS)}.", choices=FORMATS)
    out: Path = setting("Folder to write.")
    columns: tuple[str, ...] = setting(
        "Views to write: fused, text, image, concat (text and image concatenated). Default: for mmrec text and"
        " image, or fused if it is the only one; for npy, safetensors and lance all views; for cornac and"
        " recbole, which hold one view, fused.",
        (),
    )
    missing: Literal["auto", "skip", "mean", "error"] = setting(
        "What to do with items without a vector. skip: leave them out; mean: give them the mean vector; error:"
        " stop. auto: mean for mmrec, cornac and recbole, skip for the others. missing.csv lists these items.",
        "auto",
    )
    normalize: bool = setting(
        "Scale the written vectors to unit length, as VLM2Vec does. The embeddings folder is not changed.", False
    )
    data: Place | None = setting("Dataset folder, for mmrec. Default: that of the export.", None)
    name: str | None = setting("Name of the dataset, for mmrec and recbole. Default: the name of --out.", None)
    like: Path | None = setting(
        "For mmrec, instead of --data: folder of a published split (i_id_mapping.csv and one .inter file). Its"
        " items keep their numbers.",
        None,
    )
    repeats: Repeats | None = setting(
        "For mmrec: what to do with test items that the user has in training too. MMRec hides these, so no"
        " model can find them; repeats.csv lists them. keep: they count, as in published figures; drop: they"
        " are left out. Default: keep.",
        None,
    )
    backbone: str | None = setting("For sentence-transformers: the backbone of the export.", None)
    adapter: Path | None = setting("For sentence-transformers: the adapter of the export.", None)
    revision: str | None = setting("For sentence-transformers: the revision of a hub backbone.", None)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `vlm2rec report`."""

    study: Path | None = setting("Folder that `vlm2rec study` or `vlm2rec demo` wrote.", None)
    run: Path | None = setting("The same folder as a flag.", None)
    out: Path | None = setting("HTML file to write. Default: report.html in that folder.", None)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `vlm2rec demo`."""

    out: Path = setting("Folder to write. The same command continues an unfinished demo.", Path("runs/demo"))
    full: bool = setting("Train SFT and GRU4Rec too: all four methods, both recommenders.", False)
    products: Annotated[int, Ge(200)] = setting("Number of products to draw.", 400)
    users: Annotated[int, Ge(50)] = setting("Number of users to simulate.", 600)
    finetune_steps: Positive = setting("Training steps of each fine-tuning run.", 120)
    recommender_epochs: Positive = setting("Largest number of epochs of each recommender.", 12)
    backbone_steps: Positive = setting("Training steps of the small backbone.", 260)
    seed: Count = setting("Seed of the catalogue and of every stage.", 0)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of `vlm2rec study`; its methods and their settings are in a separate YAML."""

    out: Path = setting("Study folder to write. The same command continues an unfinished study.")
    data: Path | None = setting("Dataset folder. Required without --demo and --report-only.", None)
    backbone: str | None = setting(
        "Hub id or local folder of a vision-language model. Required without --demo and --report-only; with"
        " --demo, it replaces the small backbone.",
        None,
    )
    config: Path | None = setting(
        "YAML file of the study: analyses, methods, settings. Default: the study of the paper.", None
    )
    override: Path | None = setting(
        "YAML file whose keys override those of --config, such as fewer steps or seeds for a smaller machine. Default:"
        " none.",
        None,
    )
    methods: tuple[str, ...] = setting("Run only these methods of the YAML file. Default: all.", (), group=RUNS)
    analyses: tuple[str, ...] = setting("Run only these analyses. Default: those of the YAML file.", ())
    seeds: tuple[int, ...] = setting("Seeds of every analysis. Default: those of the YAML file.", ())
    select: Literal["none", "valid"] = setting(
        "How to choose settings. none: those of the YAML file; valid: try equally many settings of every method"
        " that trains (`search` in the YAML file), take the best on validation, and run all seeds with it.",
        "none",
    )
    demo: bool = setting(
        "Draw a catalogue in OUT/laboratory, train a small backbone unless --backbone names one, and run the"
        " study on them.",
        False,
        group=FIRST,
    )
    laboratory: Literal["brands", "looks"] = setting(
        "What --demo draws. brands: the image is the strong view, and the brand often tells the colour; looks:"
        " titles suffice in training, but the look of an item decides at test.",
        "brands",
    )
    quick: bool = setting("Run only a few steps of everything, to see that it works; the numbers mean nothing.", False)
    plan_only: bool = setting("Print the steps to run and an estimate of their time; run nothing.", False)
    report_only: bool = setting("Only draw the report again, from the study's Parquet files.", False)
    jobs: Positive = setting(
        "Steps to run at the same time, each in a process with its share of the cores. Use 1 on a single GPU.", 1
    )
    redo: bool = setting(
        "Run steps again if their settings have changed. Without --redo, changed settings are an error.", False
    )
    device: DeviceName = setting("Device to run on. auto: a GPU if there is one.", "auto")
