"""The methods and losses of `finetune`: each method is a row of `METHODS`, each loss a row of `LOSSES`.

A recipe's functions read the settings of a run and pass plain values on. `vlm2rec` learns from users' histories, with
any of `LOSSES`; `sda` aligns the text and the image vectors of items. The command line reads these tables for its help,
its checks and a method's defaults, so models and losses are imported only where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from vlm2rec.embedder.contract.errors import ConfigError, did_you_mean
from vlm2rec.embedder.options import HISTORY_STYLES, SDA_PROBED

if TYPE_CHECKING:
    from torch import nn

    from vlm2rec.embedder.backbones.backbone import Backbone
    from vlm2rec.embedder.contract.dataset import Dataset
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
    from vlm2rec.embedder.encoders.item_features import ItemFeatures
    from vlm2rec.embedder.training.llm2rec import TitleModel, TitleSamples
    from vlm2rec.embedder.training.llmemb import AttributeModel, AttributeSamples
    from vlm2rec.embedder.training.notellm2 import PairModel, PairSamples
    from vlm2rec.embedder.training.samples import Samples
    from vlm2rec.embedder.training.sda import ItemModel, ItemSamples
    from vlm2rec.embedder.training.train import Model, TrainingSamples
    from vlm2rec.embedder.training.vlm2rec import HistoryModel

_Row = TypeVar("_Row")

Settings = Any
"""The settings of `finetune`, read by attribute: their class, `FinetuneConfig`, belongs to the pipelines."""

Advice = Callable[[Settings, bool], Sequence[str]]
"""Returns which settings to change when a view collapses. True: every noticed collapse is of one view
that stays behind the other (rules `behind` and `starved`)."""


def _nothing_to_check(settings: Settings) -> None:
    """Accept all settings."""


def _no_advice(settings: Settings, behind: bool) -> Sequence[str]:
    return ()


def _lora(settings: Settings, backbone: Backbone) -> nn.Module:
    from vlm2rec.embedder.adapters.lora import add_lora

    return add_lora(backbone, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.seed)


# --- losses of histories --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LossRecipe:
    """A loss for training on histories.

    Args:
        help: what it is, for `--help`.
        make: returns the loss, which is called as `loss(users, items, targets)` (`HistoryModel`).
        check: raises `ConfigError` if settings contradict the loss.
        advice: returns what to try against collapse.
        hard_negatives: whether it takes hard negatives as a fourth argument.
    """

    help: str
    make: Callable[[Settings], nn.Module]
    check: Callable[[Settings], None] = _nothing_to_check
    advice: Advice = _no_advice
    hard_negatives: bool = False


def _info_nce(settings: Settings) -> nn.Module:
    from vlm2rec.embedder.training.losses import InfoNCEObjective

    return InfoNCEObjective(settings.tau_wpcl)


def _info_nce_advice(settings: Settings, behind: bool) -> Sequence[str]:
    if behind:
        return ("--loss vlm2rec, which weighs the negatives more the further one modality falls behind",)
    return (f"a higher --tau-wpcl (now {settings.tau_wpcl:g})",)


def _vlm2rec_loss(settings: Settings) -> nn.Module:
    from vlm2rec.embedder.training.losses import VLM2RecObjective

    return VLM2RecObjective(
        settings.tau_wpcl,
        settings.tau_crtr,
        settings.lam,
        settings.alpha,
        settings.beta,
        settings.learnable,
        settings.stop_gradient,
        settings.penalty,
        settings.crtr,
        fusion_norm=settings.fusion_norm,
        wpcl=settings.wpcl,
        reduction=settings.reduction,
    )


def _check_vlm2rec_loss(settings: Settings) -> None:
    if settings.fusion == "internal":
        raise ConfigError(
            "--fusion internal with --loss vlm2rec: one interleaved prompt has no text and image vectors to balance",
            "--fusion external, or --loss sft",
            "change --fusion or --loss",
        )
    if settings.views != "both":
        raise ConfigError(
            f"--views {settings.views} with --loss vlm2rec: this loss compares the text and the image vectors of"
            " users and items (WPCL, CRTR), and one view has nothing to compare",
            "--loss sft (InfoNCE) with one view, or --views both",
            "change --views or --loss",
        )


def _vlm2rec_loss_advice(settings: Settings, behind: bool) -> Sequence[str]:
    if behind:
        return (f"a larger --beta (it starts at {settings.beta:g})", f"a larger --lam (now {settings.lam:g})")
    return (f"a smaller --lam (now {settings.lam:g})", f"a higher --tau-wpcl (now {settings.tau_wpcl:g})")


LOSSES: dict[str, LossRecipe] = {
    "vlm2rec": LossRecipe("WPCL + CRTR", _vlm2rec_loss, _check_vlm2rec_loss, _vlm2rec_loss_advice, True),
    "sft": LossRecipe("InfoNCE", _info_nce, advice=_info_nce_advice, hard_negatives=True),
}
"""The losses of histories, by `--loss`."""


# --- methods --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """A method to train an adapter.

    Args:
        help: what it learns from, for `--help`.
        samples: returns the training samples.
        model: combines an encoder, its adapter and items with a loss.
        title: returns a short name of what is trained.
        own: settings that only the methods that name them use; other methods refuse them. A setting that no method
            names belongs to all methods.
        defaults: this method's defaults that differ from those of `FinetuneConfig`.
        adapter: puts a new adapter into a backbone, in place, and returns what `save_adapter` takes.
        check: raises `ConfigError` if settings contradict each other.
        advice: returns what to try against collapse.
        shown: values of the training curves that are shown during training, besides the loss.
        probed: projections in which it also compares the gradients of text and image (`gradients.conflict`).
        distributed: whether several processes may train it together.
    """

    help: str
    samples: Callable[[Settings, Dataset], TrainingSamples]
    model: Callable[[Settings, ItemEncoder, nn.Module, ItemFeatures], Model]
    title: Callable[[Settings], str]
    own: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    adapter: Callable[[Settings, Backbone], nn.Module] = _lora
    check: Callable[[Settings], None] = _nothing_to_check
    advice: Advice = _no_advice
    shown: tuple[str, ...] = ()
    probed: tuple[str, ...] = ()
    distributed: bool = False


def _history_samples(settings: Settings, dataset: Dataset) -> Samples:
    from vlm2rec.embedder.training.samples import Samples

    return Samples(dataset.train_sequences(), dataset.max_history, settings.samples, settings.users, settings.seed)


def _history_model(settings: Settings, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures) -> HistoryModel:
    from vlm2rec.embedder.training.vlm2rec import HistoryModel

    loss = loss_of(settings.loss).make(settings)
    if settings.matryoshka:
        loss = _matryoshka(settings, loss, encoder.dim)
    return HistoryModel(encoder, wrapped, items, loss, settings.tau_wpcl, settings.chunk_users, settings.negatives)


def _matryoshka(settings: Settings, loss: nn.Module, dim: int) -> nn.Module:
    """Return the loss over prefixes of the vectors, of length `dim`, as well."""
    from vlm2rec.embedder.training.losses import Matryoshka

    if (longest := settings.matryoshka[-1]) >= dim:
        raise ConfigError(
            f"--matryoshka {_listed(settings.matryoshka)}, but the backbone's vectors have {dim} dimensions",
            f"numbers of dimensions below {dim}; whole vectors are trained in any case",
            f"leave {longest} out",
        )
    return Matryoshka(loss, settings.matryoshka)


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _check_matryoshka(settings: Settings) -> None:
    lengths = settings.matryoshka
    if list(lengths) != sorted({*lengths}) or any(length < 1 for length in lengths):
        raise ConfigError(
            f"--matryoshka {_listed(lengths)}",
            "numbers above 0, each once, in rising order, such as 64,128,256",
            "correct --matryoshka",
        )
    if lengths and settings.loss == "vlm2rec" and settings.fusion_norm == "normalised":
        raise ConfigError(
            f"--matryoshka {_listed(lengths)} with --fusion-norm normalised and --loss vlm2rec: vectors cut"
            " before they are scaled and summed differ from vectors cut afterwards, and an export cuts"
            " afterwards",
            "--fusion-norm raw, or --loss sft",
            "change --fusion-norm or --loss, or leave --matryoshka out",
        )


HARD_NEGATIVES = ("negatives_file", "mine_from", "margin", "hard_negatives")
"""The settings of hard negatives, which only a training that has some records."""


def _check_hard_negatives(settings: Settings) -> None:
    if settings.negatives_file is not None and settings.mine_from is not None:
        raise ConfigError(
            "--negatives-file with --mine-from",
            "hard negatives from one of the two",
            "leave --negatives-file or --mine-from out",
        )
    given = [name for name in ("negatives_file", "mine_from") if getattr(settings, name) is not None]
    if given and not loss_of(settings.loss).hard_negatives:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} with --loss {settings.loss}, which takes no hard negatives",
            f"--loss {' or '.join(name for name, row in LOSSES.items() if row.hard_negatives)}",
            "leave the hard negatives out, or change --loss",
        )
    defaults = {field.name: field.default for field in fields(settings)}
    needed = {"margin": ["mine_from"], "hard_negatives": ["negatives_file", "mine_from"]}
    for name, sources in needed.items():
        if getattr(settings, name) != defaults[name] and all(getattr(settings, source) is None for source in sources):
            flag, *theirs = ("--" + each.replace("_", "-") for each in (name, *sources))
            raise ConfigError(
                f"{flag} {getattr(settings, name)} without {' or '.join(theirs)}, so it has no effect",
                f"{flag} together with {' or '.join(theirs)}",
                f"leave {flag} out, or give hard negatives",
            )


def _loss_title(settings: Settings) -> str:
    return str(settings.loss)


def _check_histories(settings: Settings) -> None:
    if settings.prompt_style not in HISTORY_STYLES:
        raise ConfigError(
            f"--prompt-style {settings.prompt_style} with --method {settings.method}, which trains on sequences: these"
            " prompts are for single items",
            f"--prompt-style {' or '.join(HISTORY_STYLES)}, or --method sda",
            "change --prompt-style or --method",
        )
    loss_of(settings.loss).check(settings)
    _check_matryoshka(settings)
    _check_hard_negatives(settings)


def _history_advice(settings: Settings, behind: bool) -> Sequence[str]:
    return loss_of(settings.loss).advice(settings, behind)


def _item_samples(settings: Settings, dataset: Dataset) -> ItemSamples:
    from vlm2rec.embedder.training.sda import ItemSamples

    return ItemSamples(len(dataset.item_ids))


def _experts(settings: Settings, backbone: Backbone) -> nn.Module:
    from vlm2rec.embedder.adapters.moda import ModaSettings, add_moda

    if settings.experts == 1:
        return _lora(settings, backbone)
    moda = ModaSettings(settings.experts, settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    return add_moda(backbone, moda, settings.seed)


def _item_model(settings: Settings, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures) -> ItemModel:
    from vlm2rec.embedder.training.sda import ItemAlignment, ItemModel

    return ItemModel(encoder, wrapped, items, ItemAlignment(settings.cmsa, settings.tau_cmsa), settings.chunk_users)


def _alignment_title(settings: Settings) -> str:
    names = {"paper": "cmsa", "reference": "cmsa as coded", "off": "infonce", "reference-off": "infonce as coded"}
    aligned = names[settings.cmsa]
    return f"sda, {aligned}, {'moda' if settings.experts > 1 else 'lora'}"


def _check_items(settings: Settings) -> None:
    if settings.fusion == "internal" or settings.views != "both":
        raise ConfigError(
            f"--method sda with --fusion {settings.fusion} and --views {settings.views}: it aligns text and"
            " image vectors of items, and these settings do not make both",
            "--fusion external and --views both",
            "leave --fusion and --views out",
        )


def _alignment_advice(settings: Settings, behind: bool) -> Sequence[str]:
    return ("a lower --tau-cmsa", "--cmsa off (InfoNCE)")


def _attribute_samples(settings: Settings, dataset: Dataset) -> AttributeSamples:
    from vlm2rec.embedder.encoders.item_text import attributes_of
    from vlm2rec.embedder.training.llmemb import AttributeSamples

    return AttributeSamples(attributes_of(dataset, settings.item_text), settings.drop_ratio, settings.seed)


def _attribute_model(
    settings: Settings, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures
) -> AttributeModel:
    from vlm2rec.embedder.training.llmemb import AttributeModel, TextContrast

    return AttributeModel(encoder, wrapped, items, TextContrast(settings.tau_scft), settings.chunk_users)


def _check_attributes(settings: Settings) -> None:
    if settings.views != "text":
        raise ConfigError(
            f"--method llmemb with --views {settings.views}: it contrasts two texts of an item",
            "--views text",
            "leave --views out",
        )
    if settings.prompt_style != "sda":
        raise ConfigError(
            f"--method llmemb with --prompt-style {settings.prompt_style}, whose prompts are not for attributes",
            "--prompt-style sda, the prompt with attributes that SDA took over from LLMEmb",
            "leave --prompt-style out",
        )
    if settings.item_text != "all" and "," not in settings.item_text:
        raise ConfigError(
            f"--method llmemb with --item-text {settings.item_text}, which does not name several columns: with a"
            " single attribute, nothing can be dropped",
            "several columns, such as title,category,brand, or all",
            "name more columns, or leave --item-text out",
        )
    if settings.drop_ratio == 0 and settings.lora_dropout == 0:
        raise ConfigError(
            "--drop-ratio 0 with --lora-dropout 0: the two texts of an item would differ only in the order of"
            " their attributes",
            "one of the two above 0",
            "raise --drop-ratio or --lora-dropout",
        )


def _attribute_advice(settings: Settings, behind: bool) -> Sequence[str]:
    return (f"a higher --tau-scft (now {settings.tau_scft:g})",)


def _pair_samples(settings: Settings, dataset: Dataset) -> PairSamples:
    from vlm2rec.embedder.training.notellm2 import PairSamples

    return PairSamples(dataset.train_sequences(), dataset.max_history, settings.related_items, settings.seed)


def _pair_model(settings: Settings, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures) -> PairModel:
    from vlm2rec.embedder.adapters.late_fusion import LateFusion
    from vlm2rec.embedder.training.notellm2 import PairContrast, PairModel

    if settings.late_fusion == "gate":
        encoder.late_fusion = LateFusion(encoder.dim, settings.seed).to(encoder.backbone.device)
    loss = PairContrast(settings.tau_pairs, settings.multimodal_weight)
    return PairModel(encoder, wrapped, items, loss, settings.chunk_users)


def _check_pairs(settings: Settings) -> None:
    if settings.prompt_style not in ("notellm2", "notellm2-basic"):
        raise ConfigError(
            f"--method notellm2 with --prompt-style {settings.prompt_style}, which is not for its vectors",
            "--prompt-style notellm2, or notellm2-basic without a visual vector",
            "leave --prompt-style out",
        )


def _pair_title(settings: Settings) -> str:
    prompt = "" if settings.prompt_style == "notellm2" else ", basic prompt"
    return f"notellm2{prompt}, {'late fusion' if settings.late_fusion == 'gate' else 'no late fusion'}"


def _pair_advice(settings: Settings, behind: bool) -> Sequence[str]:
    return (f"a higher --tau-pairs (now {settings.tau_pairs:g})",)


def _title_samples(settings: Settings, dataset: Dataset) -> TitleSamples:
    from vlm2rec.embedder.training.llm2rec import TitleSamples

    return TitleSamples(_history_samples(settings, dataset), len(dataset.item_ids), settings.seed)


def _title_model(settings: Settings, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures) -> TitleModel:
    from vlm2rec.embedder.training.llm2rec import Phases, TitleModel

    encoder.backbone.require_head()
    phases = Phases(settings.csft_share, settings.mntp_share, settings.simcse_scale)
    return TitleModel(encoder, wrapped, items, phases, settings.chunk_users)


def _phase_title(settings: Settings) -> str:
    shares = {
        "csft": settings.csft_share,
        "mntp": settings.mntp_share,
        "simcse": 1 - settings.csft_share - settings.mntp_share,
    }
    return f"llm2rec, {', '.join(f'{name} {share:.0%}' for name, share in shares.items() if share > 1e-9)}"


def _check_titles(settings: Settings) -> None:
    if settings.prompt_style != "llm2rec" or settings.views != "text" or settings.prompt_mode != "raw":
        raise ConfigError(
            f"--method llm2rec with --prompt-style {settings.prompt_style}, --views {settings.views} and"
            f" --prompt-mode {settings.prompt_mode}: it learns from plain titles, without a prompt",
            "--prompt-style llm2rec, --views text and --prompt-mode raw",
            "leave --prompt-style, --views and --prompt-mode out",
        )
    if settings.csft_share + settings.mntp_share > 1:
        raise ConfigError(
            f"--csft-share {settings.csft_share:g} and --mntp-share {settings.mntp_share:g}, together more than"
            " 1: more than all steps",
            "shares of at most 1 in all; the rest is SimCSE's",
            "lower --csft-share or --mntp-share",
        )
    if settings.mntp_share and settings.attention == "causal":
        raise ConfigError(
            f"--mntp-share {settings.mntp_share:g} with --attention causal: predicting masked tokens teaches the"
            " model to read later tokens, which it cannot with causal attention",
            "--attention bidirectional, or --mntp-share 0",
            "change --attention or --mntp-share",
        )
    if settings.csft_share + settings.mntp_share < 1 and settings.lora_dropout == 0:
        raise ConfigError(
            "--lora-dropout 0 and steps for SimCSE, which compares two vectors of an item that differ by dropout alone",
            "a dropout above 0, or --csft-share and --mntp-share that add up to 1",
            "raise --lora-dropout, or change --csft-share or --mntp-share",
        )


def _title_advice(settings: Settings, behind: bool) -> Sequence[str]:
    return (f"a lower --simcse-scale (now {settings.simcse_scale:g})",)


def _check_rationales(settings: Settings) -> None:
    if settings.loss != "sft" or settings.views != "text" or settings.item_text == "title":
        raise ConfigError(
            f"--method slim with --loss {settings.loss}, --views {settings.views} and --item-text"
            f" {settings.item_text}: it trains InfoNCE on histories that name items by their rationales",
            "--loss sft, --views text, and the column with the rationales as --item-text",
            "leave --loss, --views and --item-text out; to train on titles instead of rationales: --method"
            " vlm2rec --loss sft --views text",
        )
    _check_histories(settings)


METHODS: dict[str, Recipe] = {
    "vlm2rec": Recipe(
        help="users' histories (VLM2Rec, SFT), by --loss",
        samples=_history_samples,
        model=_history_model,
        title=_loss_title,
        own=(
            *("loss", "tau_wpcl", "tau_crtr", "lam", "alpha", "beta", "learnable", "stop_gradient", "penalty", "wpcl"),
            *("crtr", "reduction", "negatives", "samples", "users", "matryoshka"),
            *HARD_NEGATIVES,
            "quantize",
        ),
        check=_check_histories,
        advice=_history_advice,
        shown=("wpcl", "crtr", "margin_text", "margin_image", "weight", "alpha", "beta"),
        distributed=True,
    ),
    "sda": Recipe(
        help="text and image of each item (SDA), by --cmsa",
        samples=_item_samples,
        model=_item_model,
        title=_alignment_title,
        own=("cmsa", "tau_cmsa", "experts"),
        defaults={
            **{"pooling": "mean", "prompt_style": "sda", "prompt_mode": "chat", "item_text": "attributes"},
            **{"max_title_tokens": 128, "lora_rank": 8, "lora_dropout": 0.1, "learning_rate": 2e-4, "batch_size": 32},
        },
        adapter=_experts,
        check=_check_items,
        advice=_alignment_advice,
        shown=("own_text_first", "tau"),
        probed=SDA_PROBED,
    ),
    "llmemb": Recipe(
        help="two texts of the same item, each with attributes dropped (LLMEmb)",
        samples=_attribute_samples,
        model=_attribute_model,
        title=lambda settings: f"llmemb, scft, {settings.drop_ratio:g} dropped",
        own=("drop_ratio", "tau_scft"),
        defaults={
            "views": "text",
            "item_text": "all",
            "pooling": "mean",
            "prompt_style": "sda",
            "max_title_tokens": 256,
            "lora_rank": 8,
            "lora_dropout": 0.1,
            "learning_rate": 2e-4,
            "batch_size": 32,
        },
        check=_check_attributes,
        advice=_attribute_advice,
        shown=("own_text_first", "tau"),
    ),
    "notellm2": Recipe(
        help="pairs of items that users took soon after one another (NoteLLM-2)",
        samples=_pair_samples,
        model=_pair_model,
        title=_pair_title,
        own=("related_items", "tau_pairs", "multimodal_weight", "late_fusion"),
        defaults={"fusion": "internal", "prompt_style": "notellm2", "late_fusion": "gate", "batch_size": 16},
        check=_check_pairs,
        advice=_pair_advice,
        shown=("loss_image", "loss_fused", "tau"),
    ),
    "llm2rec": Recipe(
        help="titles, in three phases: next title, masked tokens, SimCSE (LLM2Rec)",
        samples=_title_samples,
        model=_title_model,
        title=_phase_title,
        own=("csft_share", "mntp_share", "simcse_scale", "samples", "users"),
        defaults={
            "views": "text",
            "prompt_style": "llm2rec",
            "attention": "bidirectional",
            "pooling": "mean",
            "samples": "random",
            "lora_rank": 8,
            "lora_alpha": 16.0,
            "learning_rate": 2e-4,
            "batch_size": 32,
        },
        check=_check_titles,
        advice=_title_advice,
        shown=("phase",),
    ),
    "slim": Recipe(
        help="users' histories, with a column of rationales as the items' text (SLIM+)",
        samples=_history_samples,
        model=_history_model,
        title=lambda settings: f"slim, sft on {settings.item_text}",
        own=("loss", "tau_wpcl", "negatives", "samples", "users", "matryoshka", *HARD_NEGATIVES, "quantize"),
        defaults={"loss": "sft", "views": "text", "item_text": "rationale", "max_title_tokens": 128},
        check=_check_rationales,
        advice=_history_advice,
        shown=("margin_text",),
        distributed=True,
    ),
}
"""The training methods, by `--method`."""


def recipe_of(method: str) -> Recipe:
    """Return the recipe of a method; raise `ConfigError` if there is none of this name."""
    return _known("--method", method, METHODS)


def loss_of(name: str) -> LossRecipe:
    """Return the recipe of a loss; raise `ConfigError` if there is none of this name."""
    return _known("--loss", name, LOSSES)


def _known(flag: str, name: str, rows: Mapping[str, _Row]) -> _Row:
    if name not in rows:
        raise ConfigError(
            f"{flag} {name!r} is not known{did_you_mean(name, rows)}", f"one of {', '.join(rows)}", f"change {flag}"
        )
    return rows[name]


def unread(method: str) -> set[str]:
    """Return the settings that other methods have and this one does not read."""
    return {name for recipe in METHODS.values() for name in recipe.own}.difference(recipe_of(method).own)


def check_settings(settings: Settings) -> None:
    """Raise `ConfigError` if a setting belongs to another method than the chosen one, or contradicts it."""
    recipe = recipe_of(settings.method)
    defaults = {field.name: field.default for field in fields(settings)}
    for other, theirs in METHODS.items():
        for name in theirs.own:
            if name not in recipe.own and getattr(settings, name) != defaults[name]:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} with --method {settings.method}, which has no such setting",
                    f"{flag} with --method {other}",
                    f"leave {flag} out",
                )
    recipe.check(settings)
