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
from vlm2rec.downstream.options import Adapter, Fuse, Positions, Repeats, StartMode, TailOver
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
METHODS_OWN = "Loss of the other methods"
TRAINING = "Training"
WATCHING = "Watching"
MACHINE = "Machine and memory"
TABLE = "Embeddings folder"
FAILURES = "Failures"
GOING_ON = "Going on with an export"
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

    items: Path | None = setting("Items, as for prepare. Default: items.parquet, to be filled in.", None)
    interactions: Path | None = setting(
        "Interactions, as for prepare. Default: interactions.parquet, to be filled in.", None
    )
    images: Path | None = setting(
        "Folder of images, as for prepare. With --items or --interactions, but without it, the line is for titles.",
        None,
    )
    backbone: str = setting(_BACKBONE, "Qwen/Qwen3-VL-Embedding-2B")
    out: Path = setting("File to write; one that is there already stays.", Path("vlm2rec.yaml"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of `vlm2rec run`; those of its stages are in the file that `vlm2rec init` writes."""

    config: Path = setting("YAML file of the stages, as `vlm2rec init` writes it.", Path("vlm2rec.yaml"))
    from_stage: str | None = setting(
        "Begin with this stage, and do it and those after it again; those before it are left as they are. finetune and"
        " export-items keep what is complete.",
        None,
        also="from",
    )
    only: str | None = setting("Do this stage alone, again if it is done.", None)


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
        "Folder of images; a column of paths names the files, else <item_id>.<jpg|png|webp|gif|bmp> in it or in one of"
        " its folders. Without it, the dataset is for --views text.",
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
        "Items without an interaction after filtering. keep: they get vectors, and are neither trained on nor ranked.",
        "keep",
    )
    name: str | None = setting(
        "Dataset name; Toys, Beauty, Clothing and Sports are compared with the paper.", None, group=FIRST
    )
    core: Positive = setting(
        "k of the iterative k-core of the interactions; 1 keeps all users with three interactions, and so takes a"
        " published 5-core file as it is.",
        5,
        group=KEPT,
    )
    min_user: Count = setting(
        "Drop users with fewer interactions, before the k-core, together with --min-item: counted once and not again"
        " after the drop, as SDA prepares its data. Alone with --core 1. 0: no minimum.",
        0,
    )
    min_item: Count = setting("The same for items; both are counted in the same log.", 0)
    truncate: Count = setting("Keep only each user's latest interactions, this many, before the k-core. 0: all.", 0)
    max_history: Positive = setting("How many of a user's latest items a model may see.", 10, group=RANKING)
    split: Literal["leave-one-out", "temporal"] = setting(
        "leave-one-out: each user's last item is tested, the last but one validates. temporal: 80/10/10 of each user's"
        " interactions in time, several items each, as the VLM2Vec feature study has it.",
        "leave-one-out",
    )
    candidates: Positive = setting(
        "Candidates drawn per user and seed, from the items without an interaction of the user.", 100
    )
    candidate_seeds: tuple[int, ...] = setting("Seeds of the stored candidate sets.", (0, 1, 2, 3, 4))
    item_id_column: str = setting("Item id column in both files.", "item_id", group=COLUMNS)
    items_id_column: str | None = setting("Id column of the items. Default: --item-id-column.", None)
    interactions_item_column: str | None = setting("Item column of the interactions. Default: --item-id-column.", None)
    title_column: str = setting("Title column.", "title")
    user_id_column: str = setting("User id column.", "user_id")
    time_column: str = setting("Time column; interactions of equal time keep the file's order.", "timestamp")
    order: Literal["time", "file"] = setting(
        "What orders a user's interactions: their times, or, without a time column, their order in the file.", "time"
    )


@dataclass(frozen=True, kw_only=True)
class MakeBackboneConfig:
    """Settings of `vlm2rec make-backbone`."""

    items: Path = setting("Items with titles and, if they have one, a caption column: Parquet, CSV or JSON lines.")
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
    loss: str = setting(f"Loss of --method vlm2rec: {_rows(LOSSES)}. SLIM: sft.", "vlm2rec", LOSSES)
    cmsa: Alignment = setting(
        "SDA's alignment loss. paper: its equations; reference: its public code; off: InfoNCE without the soft target;"
        " reference-off: InfoNCE as in its public code.",
        "paper",
        group=METHODS_OWN,
    )
    tau_cmsa: PositiveFloat | None = setting(
        "Temperature of SDA's alignment. Default: 0.02; with --cmsa reference and reference-off, 3 is the start of a"
        " learned one.",
        None,
    )
    experts: Positive = setting("Experts of SDA's MoDA, which divide --lora-rank among them; 1 is plain LoRA.", 8)
    drop_ratio: Fraction = setting(
        "Share of an item's attributes that LLMEmb drops from each of its two texts; one stays. 0 only shuffles them.",
        0.4,
    )
    tau_scft: PositiveFloat = setting("Start of the learned temperature of LLMEmb's contrast.", 0.02)
    related_items: Positive = setting(
        "Related items that NoteLLM-2 keeps of an item: those that users had soon after it.", 10
    )
    tau_pairs: PositiveFloat = setting("Start of the learned temperature of NoteLLM-2's contrast.", 0.05)
    multimodal_weight: NonNegative = setting(
        "Weight α of the item vectors' loss in NoteLLM-2, beside 1 for the visual vectors'.", 9.0
    )
    late_fusion: LateFusion = setting(
        "gate: NoteLLM-2 adds what the vision tower saw to its vectors, by a gate that it learns. NoteLLM-2: gate.",
        "off",
    )
    csft_share: Fraction = setting(
        "Share of the steps in which LLM2Rec learns to write the next title (CSFT), at the start.", 0.8
    )
    mntp_share: Fraction = setting(
        "Share of the steps, after those, in which it predicts masked tokens of titles (MNTP); the rest is SimCSE.", 0.1
    )
    simcse_scale: PositiveFloat = setting("What SimCSE multiplies cosines with in LLM2Rec, 1/τ.", 10.0)
    attention: Attention = setting(
        "causal: a token sees those before it; bidirectional: all tokens of its prompt. LLM2Rec: bidirectional.",
        "causal",
        group=MODEL,
    )
    tau_wpcl: PositiveFloat = setting("Temperature of WPCL, and of InfoNCE with --loss sft.", 0.1, group=LOSS)
    tau_crtr: PositiveFloat = setting("Temperature of CRTR.", 0.1)
    lam: NonNegative = setting("Weight of CRTR (λ).", 0.1)
    reduction: Reduction = setting(
        "Balance of the two losses in a batch of B users. paper: (sum of WPCL + λ·CRTR)/B, as its equations; mean: mean"
        " of WPCL + λ·CRTR, B times as much CRTR.",
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
        "Train the first 64, 128 and 256 numbers of a vector (64,128,256) as well as all of them, for short vectors"
        " (export-items --dim): the mean of the loss over these lengths. VLM2Rec and SLIM. Default: whole vectors"
        " alone.",
        (),
    )
    views: ViewChoice = setting(
        "both, text or image. With text or image (--loss sft only), fused equals that view; the other is not read."
        " LLMEmb, LLM2Rec and SLIM: text.",
        "both",
        group=FIRST,
    )
    fusion: FusionMode = setting(
        "external: two prompts whose vectors are summed; internal: one interleaved prompt. NoteLLM-2: internal.",
        "external",
        group=MODEL,
    )
    fusion_norm: FusionNorm = setting("raw: the sum, as in the paper; normalised: the sum of unit vectors.", "raw")
    prompt_mode: PromptMode = setting(
        "raw: the prompt as in the paper; chat: inside the model's chat template. SDA: chat.", "raw"
    )
    max_pixels: Positive = setting(
        "Largest image area in pixels; a smaller limit of the processor takes precedence.", 224 * 224
    )
    max_title_tokens: Positive = setting(
        "Titles and other texts are cut to this many tokens. SDA and SLIM: 128; LLMEmb: 256.", 64
    )
    pooling: Pooling = setting(
        "A vector is the state of the last token (last) or the mean of all (mean). SDA, LLMEmb and LLM2Rec: mean.",
        "last",
    )
    prompt_style: PromptStyle = setting(
        "Whose prompts: vlm2rec's; qwen3-vl-embedding's, in whose format that model was trained (chat, --instruction as"
        " the system's turn); or those for single items alone: sda's, notellm2's, notellm2-basic, which has no"
        " visual vector, or llm2rec, the title alone. SDA and LLMEmb: sda; the others their own.",
        "vlm2rec",
    )
    instruction: str = setting(
        "What --prompt-style qwen3-vl-embedding asks in every prompt. Default: Represent the user's input.", ""
    )
    item_text: str = setting(
        "Columns of the catalogue that are an item's text. One takes the title's place; several with commas between, or"
        " all, make a list (title is ..., brand is ...); attributes: SDA's list of title, category and brand. SDA:"
        " attributes; LLMEmb: all; SLIM: rationale.",
        "title",
        group=DATA,
    )
    lora_rank: Positive = setting(
        "LoRA rank; with experts, the rank of all together. SDA, LLMEmb and LLM2Rec: 8.", 16, group=MODEL
    )
    lora_alpha: PositiveFloat = setting("LoRA α. LLM2Rec: 16.", 32.0)
    lora_dropout: Fraction = setting("LoRA dropout. SDA and LLMEmb: 0.1.", 0.2)
    learning_rate: PositiveFloat = setting("AdamW learning rate. SDA, LLMEmb and LLM2Rec: 2e-4.", 1e-5, group=FIRST)
    loss_learning_rate: PositiveFloat | None = setting(
        "AdamW learning rate of what the loss learns itself (α and β; SDA's temperature). Default: --learning-rate.",
        None,
        group=TRAINING,
    )
    weight_decay: NonNegative = setting("AdamW weight decay; α and β have none.", 0.01)
    max_grad_norm: NonNegative = setting("Longest gradient of a step; a longer one is shortened to it. 0: never.", 1.0)
    warmup: Fraction = setting("Share of the steps with a rising learning rate.", 0.0)
    schedule: Schedule = setting("Learning rate after the warm-up.", "constant")
    batch_size: Positive = setting(
        "Users in a batch on one device; a step of N processes has N times as many. SDA, LLMEmb and LLM2Rec: 32;"
        " NoteLLM-2: 16 pairs of items.",
        8,
        group=FIRST,
    )
    negatives: Negatives = setting(
        "Negatives of several processes. local: the targets of a process's own batch; global: those of all batches.",
        "local",
        group=TRAINING,
    )
    negatives_file: Path | None = setting(
        "Hard negatives beside those of the batch: Parquet, CSV or JSON lines of item_id (the target) or user_id, and"
        " negative_id (one a row) or negatives (a list). VLM2Rec and SLIM.",
        None,
    )
    mine_from: Place | None = setting(
        "Embeddings folder of an earlier export, from which hard negatives are mined: items near the target.", None
    )
    margin: Fraction = setting(
        "With --mine-from: an item is left out, as it may be a positive, if the user's history is nearer to it than"
        " this share of its cosine with the target.",
        0.95,
    )
    hard_negatives: Positive = setting("Hard negatives of a user in a step, at most.", 4)
    chunk_users: Count = setting(
        "Users encoded at a time (GradCache), which limits memory; the negatives stay those of the batch. 0: all.",
        0,
        group=MACHINE,
    )
    epochs: PositiveFloat = setting("Epochs.", 3.0, group=FIRST)
    max_steps: Count = setting(
        "Stop after this many steps; 0 trains all epochs. SDA's paper uses at most 4000.", 0, group=TRAINING
    )
    samples: SamplesMode = setting(
        "Samples (prefix → next item) of a user. last: the last one; random: a random one; all: every one."
        " LLM2Rec: random.",
        "last",
        group=DATA,
    )
    users: Count = setting("Train on this many users, drawn at random (few-shot); 0 takes all.", 0)
    valid_users: Count = setting("Users drawn for the validation after each epoch; 0 takes all.", 512, group=WATCHING)
    valid_candidates: ValidCandidates = setting(
        "What validation and probe rank the second to last item among. own: items drawn for validation alone, so that"
        " nothing of the test is read; stored: the first set of the dataset folder, which the test has too.",
        "own",
    )
    gradient_checkpointing: bool = setting(
        "Recompute the language model's activations to save memory.", True, group=MACHINE
    )
    quantize: Quantize = setting(
        "nf4: the language model's matrices in four bits while training (QLoRA, by bitsandbytes), which saves memory;"
        " an export uses the unquantised backbone. VLM2Rec and SLIM.",
        "none",
    )
    dtype: DtypeName = setting(
        "auto: bfloat16 where the device multiplies it natively, on a CPU for models of at least 512 numbers a token;"
        " else float32.",
        "auto",
    )
    vision_cache: str = setting(
        "Where to keep the vision tower's tokens: auto (in the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto", group=FIRST)
    checkpoint_steps: Positive = setting("Steps between checkpoints.", 100, group=WATCHING)
    log_steps: Positive = setting("Steps between points of the training curves.", 10)
    probe_users: Count = setting("Validation users on whom training is checked for collapse; 0: no check.", 32)
    probe_steps: Count = setting("Steps between two such checks; 0: a twentieth of the run, at least 10.", 0)
    gradient_steps: Count = setting(
        "Steps between comparisons of the gradients of loss, text and image, on one batch without dropout. 0: never.",
        0,
    )
    report_to: str = setting(
        "Trackers that receive the curves: tensorboard, wandb, mlflow, trackio, with commas between; none: no tracker.",
        "none",
    )
    log_dir: Path | None = setting("Folder for the trackers' files. Default: --out with -logs behind its name.", None)
    resume: bool = setting(
        "Continue from the last checkpoint in --out; off starts from the beginning.", True, group=TRAINING
    )
    seed: Count = setting("Seed of the adapter, the order of users and dropout.", 0)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `vlm2rec export-items`; `pipelines.export_items.SOURCES` says which belong together."""

    data: Place = setting("Dataset folder.")
    backbone: str | None = setting(_BACKBONE + " Give this or --encoder.", None)
    encoder: Path | None = setting(
        "Folder of a frozen encoder instead of --backbone: sentence-transformers or other text encoder, CLIP, SigLIP,"
        " ResNet, EfficientNet.",
        None,
    )
    image_encoder: Path | None = setting(
        "Folder of a ResNet or EfficientNet for the images, beside a text encoder as --encoder: fused is then text and"
        " image end to end.",
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
    fusion: FusionMode | None = setting("Default: the adapter's, else external.", None, group=MODEL)
    fusion_norm: FusionNorm | None = setting("Default: the adapter's, else raw.", None)
    prompt_mode: QuestionMode | None = setting(
        "raw or chat. Default and auto: the adapter's, else raw; with --strategy question, chat if the model has a"
        " chat template.",
        None,
    )
    max_pixels: Positive | None = setting("Default: the adapter's, else 224² (50176).", None)
    max_title_tokens: Positive | None = setting(
        "Default: the adapter's, else 64; with the strategies of the VLM2Vec study 128, for title and category.", None
    )
    strategy: StrategyChoice | None = setting(
        "Other prompts than the paper's, without an --adapter of `finetune`. Those of the VLM2Vec study, with the"
        " item's category: visual, textual, prompt1, prompt2 (one prompt with both), or dual (fused is text and image"
        " end to end). Or question: --instruction, about title and image together.",
        None,
    )
    instruction: str | None = setting(
        "The question of --strategy question about every item; by default it asks for six attributes in JSON. With"
        " --prompt-style qwen3-vl-embedding as for finetune. Default: the adapter's.",
        None,
    )
    pooling: EncoderPooling | None = setting(
        "last or mean, as for finetune; for a text encoder also cls. Default and auto: the adapter's, else last; for a"
        " text encoder what its folder says, else mean.",
        None,
    )
    prompt_style: PromptStyle | None = setting("As for finetune. Default: the adapter's, else vlm2rec.", None)
    attention: Attention | None = setting("causal or bidirectional. Default: the adapter's, else causal.", None)
    late_fusion: LateFusion | None = setting("off or gate. Default: the adapter's, else off.", None)
    item_text: str | None = setting(
        "Columns of the catalogue that are an item's text, as for finetune. Default: the adapter's, else title.",
        None,
        group=DATA,
    )
    items: str | None = setting(
        "Only these items: ids with commas between, or a file of them (.txt with one a line, .json, .npy, or .parquet"
        " with the column item_id). Default: all items of the dataset.",
        None,
        group=DATA,
    )
    shard_size: Positive = setting("Items in one Parquet file.", 4096, group=TABLE)
    token_budget: Count = setting(
        "Tokens in one packed row; with --encoder or --strategy question, padded tokens in a batch. 0: automatic.",
        0,
        group=MACHINE,
    )
    dim: Positive | None = setting(
        "Keep only the first numbers of each vector, this many, and make it one long again; best after finetune"
        " --matryoshka. Default: the whole vector.",
        None,
        group=TABLE,
    )
    storage: Storage = setting(
        "Number format of the vectors on disk: float32, float16, int8 (with a scale for each vector) or binary (one bit"
        " a number). The manifest says how many neighbours --dim, int8 and binary keep.",
        "float32",
        also="precision",
    )
    on_image_error: ImagePolicy = setting(
        "fail: stop; null: a row without vectors, with the reason; text_only: only a text vector.",
        "null",
        group=FAILURES,
    )
    images_by: ImagesBy = setting(
        "How to recognise changed images when an export continues. mtime: size and time; bytes: content of every file.",
        "mtime",
    )
    extend: bool = setting(
        "Items were appended to the dataset: keep the finished vectors and encode the new items.", False, group=GOING_ON
    )
    retry_failed: bool = setting("Encode again the items that failed or have changed since; keep the rest.", False)
    changed_since: Place | None = setting(
        "Finished embeddings folder whose vectors are reused for items with the same title and image.", None
    )
    image_timeout: PositiveFloat = setting("Seconds after which reading an image is given up.", 60.0, group=FAILURES)
    max_failures: Fraction = setting("Exit code 6 if a larger share of the items fails.", 0.01)
    dtype: DtypeName = setting(
        "auto: bfloat16 where the device multiplies it natively; float32 elsewhere and with --encoder.",
        "auto",
        group=MACHINE,
    )
    vision_cache: str = setting(
        "Where to keep the vision tower's tokens: auto (in the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto", group=FIRST)
    num_workers: Positive = setting("Processes, or Ray tasks, that make shards at the same time.", 1, group=WORKERS)
    worker: Count | None = setting(
        "Number of this worker, from 0 to --num-workers - 1. It makes only its own shards; a Slurm array or a"
        " Kubernetes job starts the others.",
        None,
    )
    gpus: Count = setting("This many processes on this machine, each with its own GPU.", 0)
    engine: EngineName = setting("local: processes on this machine; ray: tasks of a Ray cluster.", "local")
    dry_run: bool = setting(
        "Encode a few items, print what time and space the whole export would take, and write nothing.",
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
        "Column of lists of item ids, oldest first, of a file with one row a user. Default: history, if the file has no"
        " item id column.",
        None,
    )
    order: Literal["time", "file"] = setting(
        "What orders a long table: the times, or, without a time column, the order in the file.", "time"
    )


_HISTORIES = (
    "Histories of any users: Parquet, CSV or JSON lines, a long table (user, item, time) or one row a user with a list."
)


@dataclass(frozen=True, kw_only=True)
class ExportUsersConfig(HistoryColumns):
    """Settings of `vlm2rec export-users`."""

    histories: Path = setting(_HISTORIES, group=FIRST)
    embeddings: Place = setting(
        "Embeddings folder of the items: the users' vectors are comparable with it, or are means of its vectors."
    )
    out: Place = setting("Folder of users to write.")
    data: Place | None = setting("Dataset folder, whose titles and images --backbone reads.", None)
    images: Place | None = setting("Folder of the dataset's images, if it is no longer where `prepare` found it.", None)
    users_from: Literal["auto", "sequence", "mean"] = setting(
        "As for evaluate. sequence: the encoder's vector of the history; mean: the mean of the history's item vectors;"
        " auto: sequence if --backbone is given and there is a prompt for histories, else mean.",
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
    token_budget: Count = setting("Tokens in one packed row; 0: automatic.", 0, group=MACHINE)
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where to keep the vision tower's tokens: auto (in the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto")
    num_workers: Positive = setting("Processes that make shards at the same time.", 1)


@dataclass(frozen=True, kw_only=True)
class RecommendConfig(HistoryColumns):
    """Settings of `vlm2rec recommend`."""

    histories: Path | None = setting(
        _HISTORIES + " Their items are left out of the recommendations.", None, group=FIRST
    )
    users: Place | None = setting(
        "Folder of users that export-users made of the same --histories. Without it, a user is the mean of the"
        " history's item vectors.",
        None,
    )
    embeddings: Place | None = setting("Embeddings folder of the items to recommend; the search is exact.", None)
    index: Path | None = setting("Index folder to search instead; with --embeddings, that of its vectors.", None)
    recommender: Path | None = setting(
        "Folder of a finished run of train-recommender (SASRec, GRU4Rec, BERT4Rec) that ranks instead.", None
    )
    data: Place | None = setting(
        "With --recommender: dataset folder that it was trained on. Default: the one that the run names.", None
    )
    out: Place = setting("Folder of recommendations to write.")
    k: Positive = setting("Items for each user.", 10)
    column: View = setting("View to compare users and items by.", "fused")
    keep_seen: bool = setting("Recommend items of the history, too.", False)
    max_history: Positive | None = setting(
        "How many of a user's latest items make the vector; all count as seen. Default: 10. With --recommender, the"
        " length it was trained with.",
        None,
    )
    shard_size: Positive = setting("Users in one Parquet file.", 8192, group=MACHINE)
    device: DeviceName = setting("With --recommender: where to run.", "auto")
    num_workers: Positive = setting("Processes that make shards at the same time.", 1)


@dataclass(frozen=True, kw_only=True)
class ExportRecommenderConfig:
    """Settings of `vlm2rec export-recommender`."""

    recommender: Path = setting("Folder of a finished run of train-recommender (SASRec, GRU4Rec, BERT4Rec).")
    out: Place = setting("Embeddings folder to write.")
    data: Place | None = setting("Dataset folder that it was trained on. Default: the one that the run names.", None)
    embeddings: Place | None = setting(
        "Embeddings folder that it was trained from. Default: the one that the run names.", None
    )
    shard_size: Positive = setting("Items in one Parquet file.", 4096)
    storage: FloatStorage = setting("Number format of the vectors on disk.", "float32")


@dataclass(frozen=True, kw_only=True)
class ImportAdapterConfig:
    """Settings of `vlm2rec import-adapter`; those from --views on are recorded, and every later use takes them."""

    adapter: Path = setting("LoRA or DoRA folder in PEFT's format, of PEFT, VLM2Vec, LLaMA-Factory or ms-swift.")
    backbone: str = setting("Hub id or local folder of the model that it was trained on.")
    out: Path = setting("Adapter folder to write.")
    revision: str | None = setting("Revision of a hub backbone.", None)
    views: ViewChoice = setting("both, text or image.", "both", group=MODEL)
    fusion: FusionMode = setting("As for finetune.", "external")
    fusion_norm: FusionNorm = setting("As for finetune.", "raw")
    prompt_mode: PromptMode = setting("raw or chat, as the adapter was trained.", "raw")
    prompt_style: PromptStyle = setting("Whose prompts, as for finetune.", "vlm2rec")
    instruction: str = setting("As for finetune.", "")
    item_text: str = setting("Columns of the catalogue that are an item's text, as for finetune.", "title")
    pooling: Pooling = setting("last or mean, as the adapter was trained.", "last")
    attention: Attention = setting("causal or bidirectional, as the adapter was trained.", "causal")
    max_pixels: Positive = setting("Largest image area in pixels.", 224 * 224)
    max_title_tokens: Positive = setting("Longer titles are cut.", 64)
    dtype: DtypeName = setting("Number format for the canary vectors, as for export-items.", "auto", group=MACHINE)
    device: DeviceName = setting("Where to run.", "auto")


@dataclass(frozen=True, kw_only=True)
class ImportVectorsConfig:
    """Settings of `vlm2rec import-vectors`."""

    data: Place = setting("Dataset folder.")
    file: Path = setting(
        "Vectors: Parquet or JSON lines with ids and lists of numbers, CSV or TSV with ids and one column for each"
        " dimension (or one column of lists), RecBole's .itememb, or an .npy matrix of shape (items, d)."
    )
    out: Place = setting("Embeddings folder to write.")
    ids: Path | None = setting(
        "Ids of the rows of an .npy: .npy, .txt (one per line), .json (a list), or Parquet with the id column.", None
    )
    in_item_order: bool = setting(
        "Row i of the .npy is item i of items.parquet; instead of --ids, and only if the counts agree.", False
    )
    item_id_column: str = setting("Id column (or key) of a file with ids.", "item_id")
    column: str | None = setting(
        "Vector column (or key) of a file with ids. Default: those named fused, text and image, else the only one; in a"
        " CSV without lists, all columns of numbers together are the vector.",
        None,
    )
    view: View = setting("The view that a single column or an .npy holds.", "fused")
    fusion_norm: FusionNorm = setting("How to make fused if the file has text and image only; as for finetune.", "raw")
    pca: Positive | None = setting("Reduce to this many principal components.", None)
    shard_size: Positive = setting("Items in one Parquet file.", 4096, group=TABLE)
    storage: FloatStorage = setting(
        "Number format of the vectors on disk; `vlm2rec shorten` makes smaller ones.", "float32", also="precision"
    )
    max_failures: Fraction = setting("Exit code 6 if a larger share of the items has no vector.", 0.01)


@dataclass(frozen=True, kw_only=True)
class ShortenConfig:
    """Settings of `vlm2rec shorten`."""

    embeddings: Place = setting("Finished embeddings folder with full vectors.")
    out: Place = setting("Embeddings folder to write.")
    dim: Positive | None = setting("Numbers to keep of each vector, as for export-items. Default: all.", None)
    precision: Storage = setting("float32, float16, int8 or binary, as for export-items.", "float32")


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
        "User vectors. sequence: the encoder's vector of the history; mean: the mean of the history's item vectors;"
        " auto: sequence if --backbone is given and there is a prompt for histories, else mean.",
        "auto",
        group=FIRST,
    )
    backbone: str | None = setting("Backbone for --users-from sequence.", None)
    adapter: Path | None = setting("Adapter for --users-from sequence.", None)
    revision: str | None = setting("Revision of a hub backbone.", None, group=MODEL)
    split: Split = setting("Which held-out item to rank.", "test", group=RANKING)
    seeds: tuple[int, ...] = setting("Candidate seeds; empty: all stored ones.", ())
    tail_over: TailOver = setting(
        "Items of the long tail have fewer than 4 interactions. train: in the training sequences; all: held-out ones"
        " count too, as in SDA's code.",
        "train",
    )
    missing: Literal["error", "zero"] = setting(
        "Items without a vector. error: stop; zero: give them cosine 0 and report their number.", "error"
    )
    token_budget: Count = setting("Tokens in one packed row; 0: automatic.", 0, group=MACHINE)
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where to keep the vision tower's tokens: auto (in the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto")


@dataclass(frozen=True, kw_only=True)
class ProbeImagesConfig:
    """Settings of `vlm2rec probe-images`."""

    data: Place = setting("Dataset folder.")
    backbone: str = setting("Hub id or local folder of a vision-language model.")
    column: str = setting("Column of items.parquet to read from the images; of a list, its first value counts.")
    out: Path = setting("Folder to write: probe.json.")
    images: Place | None = setting("Folder of the dataset's images, if it is no longer where `prepare` found it.", None)
    revision: str | None = setting("Revision of a hub backbone.", None)
    items: Positive = setting("Most items to read; more are sampled.", 5000)
    max_pixels: Positive = setting("Largest image area, in pixels.", 224 * 224)
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where to keep the vision tower's tokens: auto (in the dataset folder, if there is space), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto")
    seed: Count = setting("Seed of the sample and of the held-out items.", 0)


@dataclass(frozen=True, kw_only=True)
class TrainRecommenderConfig:
    """Settings of `vlm2rec train-recommender` (Task 2)."""

    data: Place | None = setting("Dataset folder; without it, --config names a dataset of RecBole.", None)
    out: Path = setting("Folder to write: metrics.json, users.parquet, checkpoint.")
    model: str | None = setting(
        "SASRec, GRU4Rec, BERT4Rec (RecBole's), or VBPR, FREEDOM, LATTICE, SLMRec, which need --embeddings.", None
    )
    embeddings: Place | None = setting("Embeddings folder; without it, the plain ID model.", None)
    column: Column = setting(
        "SASRec, GRU4Rec, BERT4Rec: the view to start from; concat: text and image end to end, of twice the length.",
        "fused",
    )
    features: tuple[View, ...] = setting(
        "VBPR, FREEDOM, LATTICE, SLMRec: text,image, or one view. Default: text,image; VBPR takes what there is.",
        (),
        group=START,
    )
    normalize: bool = setting(
        "VBPR, FREEDOM, LATTICE, SLMRec: vectors of length 1, as VLM2Vec makes them. The others scale theirs anyway.",
        False,
    )
    mode: StartMode = setting(
        "adapter: frozen vectors with trained layers (--adapter); table: a trained item table that starts from them;"
        " fuse: frozen vectors with trained layers, and a trained row for every id; init: trained vectors with trained"
        " layers. VBPR and those after it: adapter or init.",
        "adapter",
    )
    fuse: Fuse = setting(
        "With --mode fuse. sum: id row and adapted vector are added; gate: the vector gates the id.", "sum"
    )
    id_dropout: Fraction = setting("With --mode fuse: share of the id rows that training leaves out.", 0.1)
    adapter: Adapter = setting(
        "linear: one Linear(d → hidden_size); two-linear: two without activation; mlp: two with GELU.", "linear"
    )
    pca: Positive | None = setting("Reduce the vectors to this many principal components first.", None)
    align_with: Path | None = setting(
        "Folder of a finished run of this command from item ids: add LLMEmb's alignment of the adapted vectors with its"
        " item table to the loss (RAT).",
        None,
    )
    align_weight: PositiveFloat = setting("Weight of --align-with; SDA's code tries 0.01 to 0.2.", 0.01)
    align_tau: PositiveFloat = setting("Temperature of --align-with.", 2.0)
    missing: Literal["error", "mean", "random"] = setting(
        "Items without a vector. error: stop; mean, random: fill them and report their number.", "error"
    )
    config: Path | None = setting("A RecBole YAML; its keys override our defaults.", None, group=FIRST)
    max_epochs: Positive = setting(f"Largest number of epochs{_own('max_epochs')}.", 200)
    eval_step: Positive = setting("Epochs between two validations.", 5, group=TRAINING)
    patience: Positive = setting("Stop after this many epochs without improvement.", 20)
    batch_size: Positive = setting(f"Targets in a batch{_own('batch_size')}.", 256)
    positions: Positions = setting(
        "last: a training row for every prefix, as RecBole has; all: SASRec and GRU4Rec learn all positions of a"
        " sequence at once, several times as fast.",
        "last",
    )
    learning_rate: PositiveFloat = setting("Learning rate of AdamW; of Adam for VBPR and those after it.", 1e-3)
    weight_decay: NonNegative = setting(f"Weight decay{_own('weight_decay')}.", 1e-4)
    hidden_size: Positive = setting(f"Width d of the recommender{_own('hidden_size')}.", 128, group=RECOMMENDER)
    dropout: Fraction = setting("SASRec, GRU4Rec, BERT4Rec: dropout.", 0.3)
    graph_layers: Positive = setting(f"Steps of graph convolution over users and items{_own('graph_layers')}.", 2)
    neighbours: Positive = setting("FREEDOM, LATTICE: nearest items in the item graph, the item itself included.", 10)
    image_weight: Fraction = setting("FREEDOM: weight of the image graph; the text graph has the rest.", 0.1)
    pruning: Share = setting("FREEDOM: share of the interactions that each epoch leaves out of the graph.", 0.8)
    regularisation: NonNegative = setting(
        f"Weight of VBPR's and LATTICE's norms, and of FREEDOM's loss on projected vectors{_own('regularisation')}.",
        1e-3,
    )
    temperature: PositiveFloat = setting("SLMRec: temperature of the loss.", 0.2)
    ssl_weight: NonNegative = setting("SLMRec: weight of its task of alignment.", 0.1)
    ssl_temperature: PositiveFloat = setting("SLMRec: temperature of its task of alignment.", 0.2)
    seeds: tuple[int, ...] = setting("Candidate seeds to report; empty: all stored ones.", (), group=RANKING)
    tail_over: TailOver = setting(
        "Items of the long tail have fewer than 4 interactions. train: in the training sequences; all: held-out ones"
        " count too, as in SDA's code.",
        "train",
    )
    seed: Count = setting("Seed of weights and order.", 0, group=TRAINING)
    device: DeviceName = setting("Where to run.", "auto", group=FIRST)


@dataclass(frozen=True, kw_only=True)
class BuildIndexConfig:
    """Settings of `vlm2rec build-index`."""

    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Index folder to write.")
    column: Column = setting("Which view to index; concat: text and image end to end.", "fused")
    kind: str = setting("auto, flat, hnsw, ivf, or a FAISS factory string.", "auto")
    data: Place | None = setting("Dataset folder for titles in search results. Default: that of the export.", None)
    sample: Positive = setting("Number of queries to measure recall@10.", 1000)
    seed: Count = setting("Seed of the sample and of k-means.", 0)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of `vlm2rec search`."""

    index: Path = setting("Index folder.")
    item: str | None = setting("Id of the item whose neighbours to print.", None)
    text: str | None = setting(
        "Words to search for, encoded as an item's title; with --image, as an item of both. This loads the encoder of"
        " the export.",
        None,
    )
    image: Path | None = setting("Picture to search for, encoded as an item's image.", None)
    history: tuple[str, ...] = setting(
        "Ids of items, oldest first: the mean of their vectors; with --backbone, the encoder's vector of the history.",
        (),
    )
    against: View | None = setting(
        "View of the items to compare with. Default: the index's; others are read from the embeddings folder, exactly.",
        None,
    )
    k: Positive = setting("Number of neighbours.", 10)
    embeddings: Place | None = setting(
        "Embeddings folder that the index was built from, for exact vectors and other views. Default: the folder on"
        " this machine that the index names; an address is opened only if it is given here.",
        None,
    )
    html: Path | None = setting("HTML file to write: a page of the items' pictures, which needs no other file.", None)
    backbone: str | None = setting(
        "Where the backbone of the export is now. Default: where it was then.", None, group=MODEL
    )
    adapter: Path | None = setting("Where its adapter is now. Default: where it was then.", None)
    revision: str | None = setting("Revision of a hub backbone. Default: that of the export.", None)
    encoder: Path | None = setting("Where a frozen --encoder is now. Default: where it was then.", None)
    data: Place | None = setting(
        "Dataset folder, for histories and pictures. Default: that of the export.", None, group=DATA
    )
    images: Place | None = setting("Folder of the dataset's images, if it is no longer where `prepare` found it.", None)
    device: DeviceName = setting("Where to run the encoder.", "auto", group=MACHINE)


@dataclass(frozen=True, kw_only=True)
class SemanticIdsConfig:
    """Settings of `vlm2rec semantic-ids`."""

    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Folder to write: semantic_ids.parquet, codebook.safetensors.")
    column: View = setting("Which view to code.", "fused")
    levels: Positive = setting("Levels of the codebook; a last code, that tells equal items apart, comes on top.", 3)
    codebook: Positive = setting("Codewords of a level.", 256)
    balanced: bool = setting("Give every codeword of a level as many items.", False)
    like: Path | None = setting(
        "An earlier folder: its codebook, with its levels and size, codes new items, and its items keep their codes.",
        None,
    )
    sample: Positive = setting("Number of items whose neighbours are compared.", 1000)
    seed: Count = setting("Seed of the samples and of k-means.", 0)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `vlm2rec convert`."""

    embeddings: Place = setting("Embeddings folder.")
    to: str = setting(f"{_rows(FORMATS)}.", choices=FORMATS)
    out: Path = setting("Folder to write.")
    columns: tuple[str, ...] = setting(
        "Views to write, of fused, text, image, concat (text and image end to end). Default: for mmrec text and image,"
        " or fused if it is the only one; for npy, safetensors and lance all views; for cornac and recbole, which hold"
        " one, fused.",
        (),
    )
    missing: Literal["auto", "skip", "mean", "error"] = setting(
        "Items that lack such a vector. skip: leave them out; mean: give them the mean vector; error: stop. missing.csv"
        " lists those left out or filled. auto: mean for mmrec, cornac and recbole, skip for the others.",
        "auto",
    )
    normalize: bool = setting("Write vectors of length 1, as VLM2Vec makes them; the embeddings folder stays.", False)
    data: Place | None = setting("Dataset folder, for mmrec. Default: that of the export.", None)
    name: str | None = setting("Name of the dataset, for mmrec and recbole. Default: the name of --out.", None)
    like: Path | None = setting(
        "For mmrec: folder of a published split (i_id_mapping.csv and one .inter file), whose items and numbers are"
        " kept, instead of a dataset folder.",
        None,
    )
    repeats: Repeats | None = setting(
        "For mmrec: targets that their user has in training too, which MMRec masks, so that no model can find them."
        " repeats.csv lists them. keep: they stay, as in published figures; drop: they are left out. Default: keep.",
        None,
    )
    backbone: str | None = setting("For sentence-transformers: the backbone of the export.", None)
    adapter: Path | None = setting("For sentence-transformers: the adapter of the export.", None)
    revision: str | None = setting("For sentence-transformers: the revision of a hub backbone.", None)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `vlm2rec report`."""

    study: Path | None = setting("Folder that `vlm2rec study` or `vlm2rec demo` wrote.", None)
    run: Path | None = setting("That folder, given as a flag.", None)
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
        "Hub id or local folder of a vision-language model. Required like --data; with --demo, instead of a small one.",
        None,
    )
    config: Path | None = setting(
        "YAML of the study: analyses, methods, settings. Default: the study of the paper.", None
    )
    methods: tuple[str, ...] = setting("Run only these methods of the YAML; empty: all.", (), group=RUNS)
    analyses: tuple[str, ...] = setting("Run only these analyses; empty: those of the YAML.", ())
    seeds: tuple[int, ...] = setting("Seeds of every analysis; empty: those of the YAML.", ())
    select: Literal["none", "valid"] = setting(
        "valid: try equally many settings of every method that trains (`search` of the YAML), choose the best on"
        " validation, and run all seeds with it; none: the settings of the YAML.",
        "none",
    )
    demo: bool = setting(
        "Draw a catalogue in OUT/laboratory and, without --backbone, train a small backbone for it; use them.",
        False,
        group=FIRST,
    )
    laboratory: Literal["brands", "looks"] = setting(
        "What --demo draws. brands: pictures are the strong view, and the brand often tells the colour; looks: titles"
        " as shops print them suffice in training, and looks decide at test.",
        "brands",
    )
    quick: bool = setting("Run only a few steps of everything, to see that it works; the numbers mean nothing.", False)
    plan_only: bool = setting("Print the steps to run and an estimate of their time; run nothing.", False)
    report_only: bool = setting("Only draw the report again, from the Parquet files of a study.", False)
    jobs: Positive = setting(
        "Steps to run at a time, each in a process with its share of the cores; use 1 on a single GPU.", 1
    )
    redo: bool = setting("Run steps again if their settings have changed; without it, that is an error.", False)
    device: DeviceName = setting("Where to run.", "auto")
