"""Prompts laid end to end in one row, each attending only to itself: no padding, and no effect on each other.

Three savings over a padded batch, all exact:

- *packed*: the row holds the tokens of the prompts and nothing else; attention runs over each prompt by itself.
- *shared prefix*: the instruction at the start of every prompt is encoded once, and its keys and values are what every
  prompt attends to. Only while no weight changes.
- *last layer*: its MLP and the final norm see last tokens only; nothing reads the others. Not with mean pooling.

`IndependentRows` makes a vector the same to the last bit whatever else is encoded with it.

The model's own code runs. `prepare` registers an attention function for the language model, one for a vision tower
with windows, and a last layer that finishes early. These act only if a `Layout` is passed to the model. `prepare` also
replaces the patch convolution of a vision tower by a linear layer.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm2rec.embedder.backbones.devices import has_tiles, matmul_precision, onednn_multiplies_float32, onto
from vlm2rec.embedder.backbones.pooling import at_least_float32

LANGUAGE_ATTENTION = "vlm2rec_packed"
# transformers looks for the word "flash" in the name of an attention function: such a function gets the bounds of all
# windows in one call, any other is called once for every window of every image
VISION_ATTENTION = "vlm2rec_flash_windows"
LAYOUT = "packed_layout"  # keyword under which the model passes the layout down to its layers

logger = logging.getLogger(__name__)

_packing: ContextVar[bool] = ContextVar("packing", default=False)


@dataclass(frozen=True)
class Layout:
    """Positions of prompts in a packed row: one after the other, `lengths[i]` tokens each, after a shared prefix."""

    lengths: tuple[int, ...]
    prefix: int = 0  # tokens of the shared prefix, which are in the cache and not in the row
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bidirectional: bool = False  # a token sees those after it, too; without a prefix, whose states would depend on them
    every_state: bool = False  # return the final states of all tokens, not only of each prompt's last one
    blocks: Tensor | None = None  # (T,) on the CPU: each token's image, -1 for none; an image sees itself whole
    blocks_in_windows: bool = False  # only where attention has a window
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Return (count, length) of each run of adjacent prompts of equal length, which are attended in one call."""
        return [(len(list(same)), length) for length, same in groupby(self.lengths)]

    @property
    def last(self) -> Tensor:
        """Return the position of each prompt's last token in the row, (n,)."""
        return self._once("last", lambda: torch.tensor(self.lengths).cumsum(0) - 1)

    def bounds(self, before: int) -> Tensor:
        """Return the bounds of the prompts if `before` tokens precede each, (n + 1,) int32."""
        return self._once(
            ("bounds", before),
            lambda: torch.tensor([0, *(before + length for length in self.lengths)]).cumsum(0).to(torch.int32),
        )

    def sums(self, states: Tensor) -> Tensor:
        """Return the sum of each prompt's states, (T, d) to (n, d), in float32 at least.

        Each prompt is summed by itself, so that the order of a sum does not depend on the other prompts.
        """
        return torch.stack([own.sum(dim=0) for own in at_least_float32(states).split(self.lengths)])

    @property
    def keys(self) -> Tensor:
        """Return which keys each prompt sees, prompt after prompt: those of the prefix and its own."""

        def make() -> Tensor:
            prefix, start, found = torch.arange(self.prefix), self.prefix, []
            for length in self.lengths:
                found += [prefix, torch.arange(start, start + length)]
                start += length
            return torch.cat(found)

        return self._once("keys", make)

    def mask(self, length: int) -> Tensor:
        """Return which keys the tokens of a prompt of that length see, (length, prefix + length) bool."""
        return self._once(length, lambda: self._seen(length))

    def _seen(self, length: int) -> Tensor:
        seen = torch.ones(length, self.prefix + length, dtype=torch.bool)
        return seen.tril(diagonal=length if self.bidirectional else self.prefix)

    def needs_masks(self, window: int | None) -> bool:
        """Tell whether a prompt sees other keys than all those before: within an image, or in a window of keys."""
        return self._sees_blocks(window) or (window is not None and self.prefix + max(self.lengths) > window)

    def _sees_blocks(self, window: int | None) -> bool:
        return self.blocks is not None and not (self.blocks_in_windows and window is None)

    def mask_of(self, start: int, length: int, window: int | None) -> Tensor:
        """Return which keys the tokens of the prompt at `start` of the row see, (length, prefix + length) bool.

        Those before and, in an image, its later ones; of these the last `window` ones.
        """

        def make() -> Tensor:
            seen = self._seen(length)
            if self._sees_blocks(window):
                assert self.blocks is not None
                own = F.pad(self.blocks[start : start + length], (self.prefix, 0), value=-1)
                seen |= (own[None] == own[self.prefix :, None]) & (own >= 0)
            if window is not None:
                places = torch.arange(self.prefix + length)
                seen &= places[None] > places[self.prefix :, None] - window
            return seen

        return self._once(("own", start, window), make)

    def _once(self, key: Any, make: Any) -> Tensor:
        # every layer needs the same tensor
        if key not in self._made:
            self._made[key] = onto(self.device, make())
        return self._made[key]


@dataclass(frozen=True)
class Prefix:
    """Each layer's keys and values of the tokens that start every prompt of one kind."""

    states: tuple[tuple[Tensor, Tensor], ...]  # per layer, keys and values (1, heads, tokens, width)
    pooled: Tensor  # (1, d) the pooled states of the prefix; only mean pooling uses them

    def cache(self) -> DynamicCache:
        """Return the prefix as a new cache, because a model appends to the cache it is given."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.states):
            cache.update(keys, values, number)
        return cache


def prepare(model: Any, language_model: Any) -> None:
    """Prepare a model for packed rows; without a layout it works as before.

    Args:
        model: a model of transformers with or without a vision tower.
        language_model: its decoder, with `layers`.
    """
    language_model.config._attn_implementation = LANGUAGE_ATTENTION
    vision = getattr(model.config, "vision_config", None)
    tower = getattr(model.model, "visual", None)
    if vision is not None and tower is not None:
        tower.config._attn_implementation = VISION_ATTENTION
        patches = getattr(getattr(tower, "patch_embed", None), "proj", None)
        if isinstance(patches, nn.Conv3d) and patches.kernel_size == patches.stride:
            patches.forward = types.MethodType(_project, patches)  # type: ignore[method-assign]
    last = language_model.layers[-1]
    fed_later = len(getattr(vision, "deepstack_visual_indexes", None) or ())  # there Qwen3-VL adds to the whole row
    pre_norm = {name for name, _ in last.named_children()} == _PRE_NORM
    if pre_norm and fed_later < len(language_model.layers):
        last.forward = types.MethodType(functools.partial(_finish_early, usual=last.forward), last)


@contextmanager
def packed(layout: Layout) -> Iterator[dict[str, Any]]:
    """Yield the keyword arguments that make a model's forward treat its row as packed."""
    token = _packing.set(True)
    try:
        yield {LAYOUT: layout}
    finally:
        _packing.reset(token)


# --- attention ----------------------------------------------------------------------------------------------


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend each prompt of a packed row to the prefix and to itself; (1, heads, T, width) to (1, T, heads, width)."""
    layout: Layout | None = rest.pop(LAYOUT, None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    if layout.needs_masks(rest.get("sliding_window")):
        return _attend_masked(query, key, value, layout, **rest), None
    if not rest.get("dropout") and _kernel_works(query.device, query.dtype, query.shape[-1]):
        return _attend_by_kernel(query, key, value, layout, rest.get("scaling")), None
    return _attend_by_runs(query, key, value, layout, **rest), None


def _attend_by_runs(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **rest: Any) -> Tensor:
    """Attend with torch's general attention; adjacent prompts of equal length share one call."""
    prefix = layout.prefix
    causal = {
        "is_causal": not prefix and not layout.bidirectional,
        "dropout_p": rest.get("dropout", 0.0),
        "scale": rest.get("scaling"),
    }
    start = 0
    parts = []
    for count, length in layout.runs:
        own = [
            _side_by_side(states, begin, count, length)
            for states, begin in ((query, start), (key, prefix + start), (value, prefix + start))
        ]
        if prefix:
            own[1:] = [
                torch.cat([states[:, :, :prefix].expand(count, -1, -1, -1), mine], dim=2)
                for states, mine in zip((key, value), own[1:], strict=True)
            ]
        if _is_faster_openly(own[0], own[1], causal["dropout_p"]):
            part = _attend_openly(own[0], own[1], own[2], layout.mask(length), rest.get("scaling"))
        else:
            mask = layout.mask(length) if prefix else None
            keys, values = (_heads(states, query) for states in own[1:])
            part = F.scaled_dot_product_attention(own[0], keys, values, attn_mask=mask, **causal)
        parts.append(part.transpose(1, 2).flatten(0, 1))  # (count * length, heads, width)
        start += count * length
    return _joined(parts)[None]


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **rest: Any) -> Tensor:
    """Attend prompt by prompt, each with its own mask."""
    parts = []
    start, prefix = 0, layout.prefix
    for length in layout.lengths:
        own = slice(prefix + start, prefix + start + length)
        keys, values = (torch.cat([states[:, :, :prefix], states[:, :, own]], dim=2) for states in (key, value))
        asked = query[:, :, start : start + length]
        mask = layout.mask_of(start, length, rest.get("sliding_window"))
        settings = {"dropout_p": rest.get("dropout", 0.0), "scale": rest.get("scaling")}
        if _is_faster_openly(asked, keys, settings["dropout_p"]):
            part = _attend_openly(asked, keys, values, mask, rest.get("scaling"))
        else:
            keys, values = _heads(keys, query), _heads(values, query)
            part = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, **settings)
        parts.append(part.transpose(1, 2).flatten(0, 1))  # (length, heads, width)
        start += length
    return _joined(parts)[None]


_SCORES_AT_ONCE = 2**19  # of attention in three steps: few enough to stay in a processor's cache
_LONGEST_OPENLY = 512  # keys; the scores of more leave the cache


def _is_faster_openly(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Tell whether attention in three steps takes less time than torch's own, which is made for long sequences.

    On a CPU it does in bfloat16, except in a forward pass on one with tiles (AMX), which torch's own makes use of. In
    float32 it does where oneDNN multiplies (`devices.speed_up_float32`).
    """
    if query.device.type != "cpu" or dropout or key.shape[2] > _LONGEST_OPENLY:
        return False
    if query.dtype == torch.float32:
        return onednn_multiplies_float32()
    return torch.is_grad_enabled() or not has_tiles()


def _attend_openly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attend in three steps, with the softmax in float32; (n, heads, length, width).

    Args:
        query: (n, heads, length, width).
        key: (n, heads or fewer, keys, width), as `value` is; several heads of the query may share one.
        value: see there.
        mask: which keys are seen, (length, keys) bool; None for all.
        scale: of the scores; by default 1 / √width.
    """
    hidden = None if mask is None else query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    found: Tensor = _ThreeSteps.apply(query, key, value, hidden, query.shape[-1] ** -0.5 if scale is None else scale)
    return found


class _ThreeSteps(torch.autograd.Function):
    """Scores, softmax, weighted sum, some prompts at a time. The weights are computed anew for gradients.

    So training keeps no more than with torch's own attention: (n, heads, length, keys) weights are many. Heads that
    share a key lie below one another, as further queries: no key is repeated.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
        """Return what each query attends to; `hidden` (length, keys) is added to the scores."""
        context.save_for_backward(query, key, value, hidden)
        context.scale = scale
        parts = _in_parts(query, key, value)
        return _joined([(_weights(q, k, hidden, scale).to(v.dtype) @ v).reshape(q.shape) for q, k, v in parts])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, hidden = context.saved_tensors
        parts = []
        for q, k, v, of_sum in _in_parts(query, key, value, gradient):
            weights = _weights(q, k, hidden, context.scale)
            of_sum = _below(of_sum, k)
            of_weights = (of_sum @ v.transpose(-1, -2)).to(weights.dtype)
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
            of_scores = of_scores.mul_(context.scale).to(q.dtype)
            parts.append(
                (
                    (of_scores @ k).reshape(q.shape),
                    of_scores.transpose(-1, -2) @ _below(q, k),
                    weights.to(v.dtype).transpose(-1, -2) @ of_sum,
                )
            )
        return *(_joined(list(part)) for part in zip(*parts, strict=True)), None, None


def _in_parts(query: Tensor, key: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    at_once = max(1, _SCORES_AT_ONCE // (query.shape[1] * query.shape[2] * key.shape[2]))
    return zip(*(states.split(at_once) for states in (query, key, *more)), strict=True)


def _below(query: Tensor, key: Tensor) -> Tensor:
    """Put heads that share a key below one another, (n, heads, length, width) to (n, keys' heads, more, width)."""
    return query.reshape(len(query), key.shape[1], -1, query.shape[-1])


def _weights(query: Tensor, key: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Return the weights of attention in float32, (n, keys' heads, queries below one another, keys)."""
    scores = _below(query * scale, key) @ key.transpose(-1, -2)
    if hidden is not None:
        scores = (scores.unflatten(2, (-1, len(hidden))) + hidden).flatten(2, 3)
    return scores.softmax(-1, dtype=torch.float32)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # `torch.cat` would copy even a single part


def _side_by_side(states: Tensor, start: int, count: int, length: int) -> Tensor:
    """Return adjacent prompts of equal length from (1, heads, T, width) as (count, heads, length, width)."""
    return states[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


def _heads(states: Tensor, query: Tensor) -> Tensor:
    """Repeat keys or values, (n, fewer heads, length, width), where several query heads share one."""
    groups = query.shape[1] // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _attend_windows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """Attend within windows of a vision tower, adjacent ones of equal size in one call; shapes as in `_attend`."""
    bounds: Tensor = rest["cu_seq_lens_q"]
    if _kernel_works(query.device, query.dtype, query.shape[-1]):
        longest = rest["max_length_q"]
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return _kernel(q, k, v, (bounds, bounds), (longest, longest), rest["scaling"], causal=False)[None], None
    start = 0
    parts = []
    for count, length in Layout(tuple(bounds.diff().tolist())).runs:
        windows = [_side_by_side(states, start, count, length) for states in (query, key, value)]
        if _is_faster_openly(windows[0], windows[1], 0.0):
            part = _attend_openly(windows[0], windows[1], windows[2], None, rest["scaling"])
        else:
            part = F.scaled_dot_product_attention(windows[0], windows[1], windows[2], scale=rest["scaling"])
        parts.append(part.transpose(1, 2).flatten(0, 1))
        start += count * length
    return _joined(parts)[None], None


def _attend_by_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """Attend with torch's kernel for rows of different lengths, all in one call: on a GPU, in half precision."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, width)
    if layout.prefix:
        k, v = k[layout.keys], v[layout.keys]
    longest = max(layout.lengths)
    bounds = layout.bounds(0), layout.bounds(layout.prefix)
    return _kernel(q, k, v, bounds, (longest, layout.prefix + longest), scale, causal=not layout.bidirectional)[None]


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Call `varlen_attn`, whose arguments have changed between releases of torch; (T, heads, width)."""
    from torch.nn.attention import varlen

    known = inspect.signature(varlen.varlen_attn).parameters
    settings: dict[str, Any] = {"scale": scale}
    if "window_size" in known:  # a token sees nothing to its right
        settings["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        settings["is_causal"] = causal
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and "enable_gqa" in known:
        settings["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    found: Any = varlen.varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), *bounds, *longest, **settings)
    return torch.as_tensor(found)


@functools.cache
def _kernel_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell whether this torch has the kernel for this GPU, and its result agrees with the general attention."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    layout = Layout((5, 5, 17, 2), 3, device)
    random = torch.Generator(device).manual_seed(0)
    query = torch.randn(1, 4, 29, width, dtype=dtype, device=device, generator=random)
    key, value = torch.randn(2, 1, 2, 32, width, dtype=dtype, device=device, generator=random)
    try:
        with torch.no_grad():
            expected = _attend_by_runs(query, key, value, layout, scaling=width**-0.5)
            found = _attend_by_kernel(query, key, value, layout, width**-0.5)
        with torch.enable_grad():
            trainable = query.clone().requires_grad_()
            _attend_by_kernel(trainable, key, value, layout, width**-0.5).float().sum().backward()
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        logger.warning("torch's kernel for packed rows is not used: %s", error)
        return False
    off = float((found.float() - expected.float()).abs().max())
    if off > 0.02:
        logger.warning("torch's kernel for packed rows is not used: its result is off by %.3f", off)
    return off <= 0.02


def _mask(*arguments: Any, **settings: Any) -> Tensor | None:
    """Return no mask for a packed row, whose layout says which tokens see each other; else the usual mask."""
    return None if _packing.get() else sdpa_mask(*arguments, **settings)


AttentionInterface.register(LANGUAGE_ATTENTION, _attend)
AttentionInterface.register(VISION_ATTENTION, _attend_windows)
AttentionMaskInterface.register(LANGUAGE_ATTENTION, _mask)


# --- patches ------------------------------------------------------------------------------------------------


def _project(convolution: nn.Conv3d, patches: Tensor) -> Tensor:
    """Compute a convolution whose kernel covers each patch once, (n, channels, *kernel) to (n, d, 1, 1, 1).

    Such a convolution is a linear layer, and as that it is several times as fast on a CPU.
    """
    found = F.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return found[..., None, None, None]


# --- the last layer -----------------------------------------------------------------------------------------

_PRE_NORM = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def _finish_early(layer: Any, hidden_states: Tensor, *, usual: Any, **arguments: Any) -> Tensor:
    """Run a pre-norm decoder layer, and return only the last token of each prompt, (1, n, d)."""
    layout: Layout | None = arguments.get(LAYOUT)
    if layout is None or layout.every_state:
        return usual(hidden_states, **arguments)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    state = hidden_states[:, layout.last] + attended[:, layout.last]
    return state + layer.mlp(layer.post_attention_layernorm(state))


# --- the same bits --------------------------------------------------------------------------------------------


class IndependentRows(TorchFunctionMode):
    """Makes a linear layer's result for a row independent of the number of other rows, on the CPU in float32.

    Libraries choose the order of a sum by the number of rows of the product, so the last bits may differ. Other
    devices and dtypes pass unchanged. It is for use without gradients.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is not F.linear or args[0].device.type != "cpu" or args[0].dtype != torch.float32 or args[0].dim() < 2:
            return func(*args, **kwargs)
        return _linear(*args, **kwargs)


ROWS_IN_BLOCK = 512  # rows of every product, where their number has to be fixed; 3 % slower than 2,048
_COUNTS = (32, 48, 64, 100, 128, 192, 256, 384, ROWS_IN_BLOCK, 513, 777, 1061, 1500, 2048, 3001, 4096)


@functools.cache
def rows_of_product(inner: int, outer: int, threads: int, precision: str) -> tuple[int, int]:
    """Return the least and the most rows a product may have so that every count between gives a row the same bits.

    The shape decides the order of a sum, not the numbers, so random numbers show it. If no such range reaches down to
    `ROWS_IN_BLOCK`, both numbers are `ROWS_IN_BLOCK`: every product then has exactly that many rows.

    Args:
        inner: numbers in a row.
        outer: rows of the weight.
        threads: torch's threads, which divide the rows among them.
        precision: that of torch's products now, for a result of its own.
    """
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(_COUNTS[-1], inner, generator=random)
    weight = torch.randn(outer, inner, generator=random)
    known = torch.cat([torch.mm(block, weight.T) for block in rows.split(ROWS_IN_BLOCK)])
    least = None
    for count in reversed(_COUNTS):
        if not torch.equal(torch.mm(rows[:count], weight.T), known[:count]):
            break
        least = count
    return (ROWS_IN_BLOCK, ROWS_IN_BLOCK) if least is None or least > ROWS_IN_BLOCK else (least, _COUNTS[-1])


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the output of a linear layer for rows (..., in), (..., out)."""
    flat = rows.flatten(0, -2)  # (n, in)
    # the precision decides whose code multiplies
    least, most = rows_of_product(weight.shape[1], weight.shape[0], torch.get_num_threads(), matmul_precision())
    found = flat.new_empty(len(flat), len(weight))
    for start in range(0, len(flat), most):
        part, part_out = flat[start : start + most], found[start : start + most]
        if len(part) >= least:
            _product(part, weight, bias, part_out)
        else:
            padded = F.pad(part, (0, 0, 0, least - len(part)))
            part_out.copy_(_product(padded, weight, bias, flat.new_empty(least, len(weight)))[: len(part)])
    return found.unflatten(0, rows.shape[:-1])


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    product = torch.mm(rows, weight.T, out=out)
    return product if bias is None else product.add_(bias)  # `addmm` is slower: it copies the bias into each row


def common_start(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest common start of all rows."""
    same = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        same.append(tokens[0])
    return tuple(same)
