"""The settings of every command: one frozen dataclass each, and how they are read.

A value comes from the first of: its flag, `--set key=value`, the `--config` file, the default below. `finetune` takes
the defaults of its `--method` before those (`METHODS` of `embedder/training/recipes.py`).
Unknown keys are refused with the nearest known name. Importing this module costs nothing: pydantic,
which checks types and bounds, is loaded when a command runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le

from vlm2rec.downstream.options import Adapter, StartMode
from vlm2rec.embedder.contract.storage import Location, StorePath, location
from vlm2rec.embedder.options import (
    Alignment,
    DeviceName,
    DtypeName,
    EncoderKind,
    EncoderPooling,
    EngineName,
    FusionMode,
    FusionNorm,
    ImagePolicy,
    ImagesBy,
    Negatives,
    Pooling,
    PromptMode,
    PromptStyle,
    QuestionMode,
    SamplesMode,
    Schedule,
    Split,
    Storage,
    StrategyChoice,
    View,
    ViewChoice,
)
from vlm2rec.embedder.training.recipes import LOSSES, METHODS, LossRecipe, Recipe
from vlm2rec.pipelines.convert_formats import FORMATS, Format


class _Anywhere:
    """Tells pydantic how a `Place` is read."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._read)

    @staticmethod
    def _read(value: Any) -> Location:
        if not isinstance(value, str | Path | StorePath):
            raise ValueError("a path or an address is expected")
        return location(value)


Config = TypeVar("Config")
Place = Annotated[Location, _Anywhere()]  # a folder of this machine, or of an object store
Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]


_BACKBONE = "Hub id or local folder of a vision-language model; with --views text also of a causal text model."


def setting(text: str, default: Any = MISSING) -> Any:
    """Declare one setting with its help text; without a default it is required."""
    return field(default=default, metadata={"help": text})


def _rows(table: Mapping[str, Recipe] | Mapping[str, LossRecipe] | Mapping[str, Format]) -> str:
    return "; ".join(f"{name}: {row.help}" for name, row in table.items())


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `vlm2rec prepare`."""

    items: Path = setting("Items: Parquet, CSV, JSON lines, or Amazon metadata (2014 .json.gz, 2023 .jsonl.gz).")
    interactions: Path = setting("Interactions: Parquet, CSV, JSON lines, or Amazon reviews of either year.")
    images: Path = setting("Folder of images, named by the image_path column or <item_id>.<jpg|png|webp|gif|bmp>.")
    out: Path = setting("Dataset folder to write.")
    name: str | None = setting("Dataset name; Toys, Beauty, Clothing, Sports are shown beside the paper.", None)
    core: Positive = setting("k of the iterative k-core; 1 keeps everybody with three interactions.", 5)
    max_history: Positive = setting("Items of a history that a model may see.", 10)
    candidates: Positive = setting("Never-touched items drawn per user and seed.", 100)
    candidate_seeds: tuple[int, ...] = setting("Seeds of the stored candidate sets.", (0, 1, 2, 3, 4))
    item_id_column: str = setting("Item id column, in both files.", "item_id")
    title_column: str = setting("Title column.", "title")
    user_id_column: str = setting("User id column.", "user_id")
    time_column: str = setting("Time column; ties keep the file's order.", "timestamp")


@dataclass(frozen=True, kw_only=True)
class MakeBackboneConfig:
    """Settings of `vlm2rec make-backbone`."""

    items: Path = setting("Items with titles and, if they have one, a caption column: Parquet, CSV or JSON lines.")
    images: Path = setting("Folder of images, as for `prepare`.")
    out: Path = setting("Model folder to write.")
    caption_column: str | None = setting(
        "Column with words that describe the item; default: the first of caption, description, genres, category,"
        " categories, else the title.",
        None,
    )
    item_id_column: str = setting("Item id column.", "item_id")
    title_column: str = setting("Title column.", "title")
    hidden_size: Positive = setting("Width of the language model.", 128)
    layers: Positive = setting("Layers of the language model.", 4)
    vocabulary: Positive = setting("Size of the byte-level BPE vocabulary.", 4000)
    max_pixels: Positive = setting("Largest image area the model's processor lets through.", 84 * 84)
    minutes: PositiveFloat = setting("Training stops after this many minutes, if max_steps does not end it.", 2.5)
    max_steps: Count = setting("Training stops after this many steps; 0 leaves random weights.", 1000)
    batch_size: Positive = setting("Items in a training step; four times as many where only titles are asked.", 16)
    learning_rate: PositiveFloat = setting("AdamW learning rate.", 1e-3)
    seed: Count = setting("Seed of weights and order.", 0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `vlm2rec finetune`; the defaults are the paper's where it gives one.

    Those of a method that differ stand in its recipe, and `read_config` applies them.
    """

    data: Place = setting("Dataset folder.")
    backbone: str = setting(_BACKBONE)
    out: Path = setting("Adapter folder to write.")
    revision: str | None = setting("Revision of a hub backbone.", None)
    method: str = setting(f"What is learned from: {_rows(METHODS)}.", "vlm2rec")
    loss: str = setting(f"Loss of histories: {_rows(LOSSES)}.", "vlm2rec")
    cmsa: Alignment = setting(
        "SDA's alignment: paper: as its equations; reference: as its public code; off: InfoNCE, without soft target.",
        "paper",
    )
    tau_cmsa: PositiveFloat | None = setting(
        "Temperature of SDA's alignment. Default: 0.02; with --cmsa reference 3, from where it is learned.", None
    )
    experts: Positive = setting("Experts of SDA's MoDA, which share --lora-rank; 1 is plain LoRA.", 8)
    tau_wpcl: PositiveFloat = setting("Temperature of WPCL, and of InfoNCE with --loss sft.", 0.1)
    tau_crtr: PositiveFloat = setting("Temperature of CRTR.", 0.1)
    lam: NonNegative = setting("Weight of CRTR (λ).", 0.1)
    alpha: PositiveFloat = setting("Initial sensitivity of the penalty (α).", 1.0)
    beta: PositiveFloat = setting("Initial scale of the penalty (β).", 1.0)
    learnable: bool = setting("Learn α and β; off keeps them fixed.", True)
    stop_gradient: bool = setting("Stop the gradient at the strong modality's margin (Eq. 8).", True)
    penalty: bool = setting("Weigh the negatives by w_pen (Eq. 9); off is WPCL without penalty.", True)
    wpcl: bool = setting("Add WPCL (Eq. 10); off leaves λ·CRTR alone.", True)
    crtr: bool = setting("Add CRTR (Eq. 13).", True)
    views: ViewChoice = setting(
        "both; or text or image alone, with --loss sft: fused is then that view, and the other modality is not read.",
        "both",
    )
    fusion: FusionMode = setting("external: two prompts, summed; internal: one interleaved prompt.", "external")
    fusion_norm: FusionNorm = setting("raw: sum as the paper; normalised: unit vectors first.", "raw")
    prompt_mode: PromptMode = setting("raw: the prompt as printed; chat: in the chat template.", "raw")
    max_pixels: Positive = setting("Largest image area; a smaller limit of the processor wins.", 224 * 224)
    max_title_tokens: Positive = setting("Titles are cut to this many tokens.", 64)
    pooling: Pooling = setting("A vector is the state of the last token, or the mean of all. SDA: mean.", "last")
    prompt_style: PromptStyle = setting(
        "Whose prompts: vlm2rec, or sda, which knows single items only. SDA: sda.", "vlm2rec"
    )
    lora_rank: Positive = setting("LoRA rank, of all experts together. SDA: 8.", 16)
    lora_alpha: PositiveFloat = setting("LoRA α.", 32.0)
    lora_dropout: Fraction = setting("LoRA dropout. SDA: 0.1.", 0.2)
    learning_rate: PositiveFloat = setting("AdamW learning rate.", 1e-5)
    weight_decay: NonNegative = setting("AdamW weight decay; never on α and β.", 0.01)
    warmup: Fraction = setting("Share of the steps that warm up.", 0.0)
    schedule: Schedule = setting("Learning rate after the warm-up.", "constant")
    batch_size: Positive = setting(
        "Users in a batch, on one device; N processes take N times as many a step. SDA: items, 32.", 8
    )
    negatives: Negatives = setting(
        "With several processes: local: the targets of a process's own batch; global: those of all of them.", "local"
    )
    chunk_users: Count = setting(
        "Users encoded at a time (GradCache): memory is that of a chunk, negatives are those of the batch; 0: all.", 0
    )
    epochs: PositiveFloat = setting("Epochs.", 3.0)
    max_steps: Count = setting("Stop after this many steps; 0 trains all epochs. SDA's paper has 4000 at most.", 0)
    samples: SamplesMode = setting(
        "last: one (prefix → next) per user; random: a random one; all: every prefix.", "last"
    )
    users: Count = setting("Train on this many users, drawn at random (few-shot); 0 takes all.", 0)
    valid_users: Count = setting("Users drawn for the validation after each epoch; 0 takes all.", 512)
    gradient_checkpointing: bool = setting("Recompute the language model's activations to save memory.", True)
    dtype: DtypeName = setting("auto: bfloat16 on a GPU that has it, float32 elsewhere.", "auto")
    vision_cache: str = setting(
        "Where the vision tower's tokens are kept: auto (in the dataset folder, if there is room), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto")
    checkpoint_steps: Positive = setting("Steps between checkpoints.", 100)
    log_steps: Positive = setting("Steps between points of the training curves.", 10)
    probe_users: Count = setting("Validation users on whom collapse is watched during training; 0 watches none.", 32)
    probe_steps: Count = setting("Steps between two looks at them; 0 is a twentieth of the run, at least 10.", 0)
    gradient_steps: Count = setting(
        "Compare the gradients of loss, text and image every so many steps; such a step takes twice as long. 0: never.",
        0,
    )
    resume: bool = setting("Go on from the last checkpoint in --out; off starts anew.", True)
    seed: Count = setting("Seed of the adapter, the order of users and dropout.", 0)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `vlm2rec export-items`; which belong together says `pipelines.export_items.SOURCES`."""

    data: Place = setting("Dataset folder.")
    backbone: str | None = setting(_BACKBONE + " This, or --encoder.", None)
    encoder: Path | None = setting(
        "Folder of a frozen encoder in place of --backbone: sentence-transformers or other text encoder, CLIP, SigLIP.",
        None,
    )
    out: Place = setting("Embeddings folder to write.")
    adapter: Path | None = setting("Adapter folder of `finetune`; without it the vanilla backbone.", None)
    revision: str | None = setting("Revision of a hub backbone.", None)
    encoder_kind: EncoderKind = setting(
        "What --encoder is: sentence: titles alone; clip: titles and images in one space; auto: what the folder holds.",
        "auto",
    )
    views: ViewChoice | None = setting(
        "both; or text or image alone: fused is then that view. Default: the adapter's, else both.", None
    )
    fusion: FusionMode | None = setting("Default: the adapter's, else external.", None)
    fusion_norm: FusionNorm | None = setting("Default: the adapter's, else raw.", None)
    prompt_mode: QuestionMode | None = setting(
        "raw or chat. Default, and auto: the adapter's, else raw; with --strategy question chat, if the model has a"
        " chat template.",
        None,
    )
    max_pixels: Positive | None = setting("Default: the adapter's, else 224² (50176).", None)
    max_title_tokens: Positive | None = setting(
        "Default: the adapter's, else 64; with the study's strategies 128, for title and category together.", None
    )
    strategy: StrategyChoice | None = setting(
        "Other prompts than the paper's, without --adapter. Of the VLM2Vec study, with the item's category: visual,"
        " textual, prompt1, prompt2 (one prompt around both), or dual (fused is text and image end to end). Or"
        " question: --instruction about title and image together.",
        None,
    )
    instruction: str | None = setting(
        "What --strategy question asks of every item; default: six attributes in JSON.", None
    )
    pooling: EncoderPooling | None = setting(
        "last or mean, as for finetune; of a text encoder also cls. Default, and auto: the adapter's, else last; of a"
        " text encoder as its folder says, else mean.",
        None,
    )
    prompt_style: PromptStyle | None = setting(
        "vlm2rec or sda, as for finetune. Default: the adapter's, else vlm2rec.", None
    )
    shard_size: Positive = setting("Items in one Parquet file.", 4096)
    token_budget: Count = setting(
        "Tokens in one packed row; with --encoder and --strategy question padded ones in a batch; 0 takes what suits.",
        0,
    )
    storage: Storage = setting("Number format of the vectors on disk.", "float32")
    on_image_error: ImagePolicy = setting("fail: stop; null: a failure row; text_only: text vector alone.", "null")
    images_by: ImagesBy = setting(
        "What tells a changed image when an export goes on: size and time, or content (reads every file).", "mtime"
    )
    extend: bool = setting("Items were appended to the dataset: keep what is there, make the new ones.", False)
    retry_failed: bool = setting("Make anew what failed, and what has changed since; keep the rest.", False)
    changed_since: Place | None = setting(
        "Finished embeddings folder: its vectors are taken over for items whose title and image are the same.", None
    )
    image_timeout: PositiveFloat = setting("Seconds after which an image that cannot be read is given up.", 60.0)
    max_failures: Fraction = setting("Exit code 6 when a larger share of the items failed.", 0.01)
    dtype: DtypeName = setting(
        "auto: bfloat16 where the processor multiplies it natively, float32 elsewhere and with --encoder.", "auto"
    )
    vision_cache: str = setting(
        "Where the vision tower's tokens are kept: auto (in the dataset folder, if there is room), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto")
    num_workers: Positive = setting("Processes that make shards at the same time, or Ray tasks.", 1)
    worker: Count | None = setting(
        "Be this one of --num-workers, from 0, and make its shards alone: for Slurm arrays and Kubernetes jobs.", None
    )
    gpus: Count = setting("As many processes on this machine, each with a GPU of its own.", 0)
    engine: EngineName = setting("Processes of this machine, or tasks of a Ray cluster.", "local")
    dry_run: bool = setting("Encode a few items, print what the whole would take, and write nothing.", False)


@dataclass(frozen=True, kw_only=True)
class ImportVectorsConfig:
    """Settings of `vlm2rec import-vectors`."""

    data: Place = setting("Dataset folder.")
    file: Path = setting(
        "Vectors: Parquet with ids and lists of numbers, CSV or TSV with ids and one column for each dimension (or one"
        " of lists), or an .npy matrix of shape (items, d)."
    )
    out: Place = setting("Embeddings folder to write.")
    ids: Path | None = setting(
        "Ids of an .npy's rows: .npy, .txt (one a line), .json (a list), or Parquet with the id column.", None
    )
    in_item_order: bool = setting(
        "Row i of the .npy is item i of items.parquet; in place of --ids, and only where the counts agree.", False
    )
    item_id_column: str = setting("Id column of a Parquet or CSV file.", "item_id")
    column: str | None = setting(
        "Vector column of a Parquet or CSV file; default: those called fused, text or image, else the only one there;"
        " of a CSV without lists, all columns of numbers as one vector.",
        None,
    )
    view: View = setting("What a single column or an .npy holds.", "fused")
    fusion_norm: FusionNorm = setting("How fused is made where the file has text and image alone; as finetune.", "raw")
    pca: Positive | None = setting("Reduce to this many principal components.", None)
    shard_size: Positive = setting("Items in one Parquet file.", 4096)
    storage: Storage = setting("Number format of the vectors on disk.", "float32")
    max_failures: Fraction = setting("Exit code 6 when a larger share of the items has no vector.", 0.01)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Settings of `vlm2rec verify`."""

    embeddings: Place = setting("Embeddings folder.")


@dataclass(frozen=True, kw_only=True)
class FailuresConfig:
    """Settings of `vlm2rec failures`."""

    embeddings: Place = setting("Embeddings folder.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `vlm2rec evaluate` (Task 1)."""

    data: Place = setting("Dataset folder.")
    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Folder to write: metrics.json, users.parquet.")
    users_from: Literal["auto", "sequence", "mean"] = setting(
        "User vectors: the sequence encoder, or the mean of the history's item vectors; auto: the encoder if"
        " --backbone is given and its prompts can ask about a history.",
        "auto",
    )
    backbone: str | None = setting("Backbone, for the sequence encoder.", None)
    adapter: Path | None = setting("Adapter, for the sequence encoder.", None)
    revision: str | None = setting("Revision of a hub backbone.", None)
    split: Split = setting("Which held-out item to rank.", "test")
    seeds: tuple[int, ...] = setting("Candidate seeds; empty takes all stored ones.", ())
    missing: Literal["error", "zero"] = setting(
        "Items without a vector: refuse, or give them cosine 0 and count.", "error"
    )
    token_budget: Count = setting("Tokens in one packed row; 0 takes what suits the device.", 0)
    dtype: DtypeName = setting("As for export-items.", "auto")
    vision_cache: str = setting(
        "Where the vision tower's tokens are kept: auto (in the dataset folder, if there is room), off, or a folder.",
        "auto",
    )
    device: DeviceName = setting("Where to run.", "auto")


@dataclass(frozen=True, kw_only=True)
class TrainRecommenderConfig:
    """Settings of `vlm2rec train-recommender` (Task 2)."""

    data: Place | None = setting("Dataset folder; or leave it out and name RecBole's own dataset in --config.", None)
    out: Path = setting("Folder to write: metrics.json, users.parquet, checkpoint.")
    model: str | None = setting("SASRec, GRU4Rec or BERT4Rec.", None)
    embeddings: Place | None = setting("Embeddings folder; without it the plain ID model.", None)
    column: View = setting("Which view to start from.", "fused")
    mode: StartMode = setting(
        "adapter: frozen vectors behind a trained Linear; table: start the item table from them and train it.",
        "adapter",
    )
    adapter: Adapter = setting(
        "linear: one Linear(d → hidden_size); two-linear: two without activation; mlp: two with GELU between.", "linear"
    )
    pca: Positive | None = setting("Reduce the vectors to this many principal components first.", None)
    missing: Literal["error", "mean", "random"] = setting("Items without a vector: refuse, or fill and count.", "error")
    config: Path | None = setting("A RecBole YAML; its keys win over our defaults.", None)
    max_epochs: Positive = setting("Most epochs.", 200)
    eval_step: Positive = setting("Validate every so many epochs.", 5)
    patience: Positive = setting("Stop after this many epochs without gain.", 20)
    batch_size: Positive = setting("Training rows in a batch.", 256)
    learning_rate: PositiveFloat = setting("AdamW learning rate.", 1e-3)
    weight_decay: NonNegative = setting("AdamW weight decay.", 1e-4)
    hidden_size: Positive = setting("Width d of the recommender.", 128)
    dropout: Fraction = setting("Dropout.", 0.3)
    seeds: tuple[int, ...] = setting("Candidate seeds to report; empty takes all stored ones.", ())
    seed: Count = setting("Seed of weights and order.", 0)
    device: DeviceName = setting("Where to run.", "auto")


@dataclass(frozen=True, kw_only=True)
class BuildIndexConfig:
    """Settings of `vlm2rec build-index`."""

    embeddings: Place = setting("Embeddings folder.")
    out: Path = setting("Index folder to write.")
    column: View = setting("Which view to index.", "fused")
    kind: str = setting("auto, flat, hnsw, ivf, or a FAISS factory string.", "auto")
    data: Place | None = setting("Dataset folder, for titles in search results; default: the one of the export.", None)
    sample: Positive = setting("Queries for the measured recall@10.", 1000)
    seed: Count = setting("Seed of the sample and of k-means.", 0)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of `vlm2rec search`."""

    index: Path = setting("Index folder.")
    item: str = setting("Item id whose neighbours to print.")
    k: Positive = setting("How many neighbours.", 10)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `vlm2rec convert`."""

    embeddings: Place = setting("Embeddings folder.")
    to: str = setting(f"{_rows(FORMATS)}.")
    out: Path = setting("Folder to write.")
    columns: tuple[str, ...] = setting(
        "Views that go out, of fused, text, image. Default: for mmrec text and image, or fused where it is alone; for"
        " npy, safetensors and lance all there are; for cornac and recbole, which hold one, fused.",
        (),
    )
    missing: Literal["auto", "skip", "mean", "error"] = setting(
        "Items that lack such a vector: leave them out, give them the mean vector, or refuse; listed in missing.csv"
        " in any case. auto: mean for mmrec, cornac and recbole, skip for the others.",
        "auto",
    )
    data: Place | None = setting("Dataset folder, for mmrec; default: the one of the export.", None)
    name: str | None = setting("Name of the dataset, for mmrec and recbole; default: the name of --out.", None)
    backbone: str | None = setting("For sentence-transformers: the backbone of the export.", None)
    adapter: Path | None = setting("For sentence-transformers: the adapter of the export.", None)
    revision: str | None = setting("For sentence-transformers: revision of a hub backbone.", None)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `vlm2rec report`."""

    study: Path | None = setting("Folder that `vlm2rec study` or `vlm2rec demo` wrote.", None)
    run: Path | None = setting("The same, as a flag.", None)
    out: Path | None = setting("HTML file to write; default: report.html in that folder.", None)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `vlm2rec demo`."""

    out: Path = setting("Folder to write; the same command goes on with an unfinished demo.", Path("runs/demo"))
    products: Annotated[int, Ge(200)] = setting("Products drawn.", 400)
    users: Annotated[int, Ge(50)] = setting("Users simulated.", 600)
    finetune_steps: Positive = setting("Steps of each fine-tuning run.", 120)
    recommender_epochs: Positive = setting("Most epochs of each recommender.", 12)
    backbone_steps: Positive = setting("Training steps of the small backbone.", 400)
    seed: Count = setting("Seed of the catalogue and of every stage.", 0)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of `vlm2rec study`; its methods and their settings stand in a YAML of their own."""

    out: Path = setting("Study folder; the same command goes on with an unfinished study.")
    data: Path | None = setting("Dataset folder; needed unless --report-only or --demo.", None)
    backbone: str | None = setting("Hub id or local folder of a vision-language model; needed as --data is.", None)
    config: Path | None = setting("YAML of the study: analyses, methods, settings. Default: the paper's.", None)
    methods: tuple[str, ...] = setting("Run these methods of the YAML only.", ())
    analyses: tuple[str, ...] = setting("Run these analyses of the YAML only.", ())
    seeds: tuple[int, ...] = setting("Seeds of every analysis; default: those of the YAML.", ())
    demo: bool = setting("Draw a catalogue and train a small backbone in OUT/laboratory, and study them.", False)
    quick: bool = setting("A few steps of everything, to see that it works; the numbers mean nothing.", False)
    plan_only: bool = setting("Print what would run and how long it may take; run nothing.", False)
    report_only: bool = setting("Draw the report anew from the Parquet files of a study.", False)
    jobs: Positive = setting("Steps at a time, each in a process with its share of the cores; 1 on a single GPU.", 1)
    redo: bool = setting("Do again what was done with other settings; off refuses it.", False)
    device: DeviceName = setting("Where to run.", "auto")
