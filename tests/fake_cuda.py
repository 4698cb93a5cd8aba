"""A CUDA device that is not there: the code for GPUs runs on a machine without one, with real numbers.

Inside `fake_cuda()` torch says that it has a GPU. A tensor that is moved there keeps its values on the CPU, and says
that it is on `cuda:0`. As on a GPU,

- an operation on tensors of both devices fails, unless the one on the CPU is a single number or it is a copy. Advanced
  indexing with a CPU tensor works on a GPU, by a hidden copy that the host waits for; here it fails in this
  repository's code, and is counted in that of others.
- such a tensor has no `numpy()`.

The card counts the bytes of its tensors and their peak, the places where the host waits for the device, and its copies
to the device. It has torch's kernel for packed rows (`varlen_attn`), whose result is computed prompt by prompt.

With `values=False` floating-point tensors have shapes and no values, which takes neither memory nor time: the bytes of
a large model are those of its real code. Integers and booleans keep their values, so code that reads them works. A
floating-point number that is read is 1.0.

A list as an index (`rows[[0, 2]] = 1`) is refused: its tensor is made where nothing sees it. What is not as on a GPU:
memory that kernels use for a moment, fragmentation of the allocator, and CUDA's own random
numbers (the CPU's are used).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen  # registers the kernel
from torch.utils import _device
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
_ROOT = Path(__file__).parents[1]
_ATEN = torch.ops.aten


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


@dataclass
class Card:
    """What a fake card has counted."""

    values: bool = True
    total: int = 80 * 2**30
    held: int = 0  # bytes of its living tensors
    peak: int = 0
    waits: Counter[str] = field(default_factory=Counter)  # the host waits for what the device has computed, by place
    copies: Counter[str] = field(default_factory=Counter)  # copies to the device that the host waits for, by place
    kernels: Counter[str] = field(default_factory=Counter)  # calls of attention kernels
    operations: int = 0
    _storages: dict[int, weakref.finalize[..., Any]] = field(default_factory=dict, repr=False)

    def forget(self) -> None:
        """Count from zero; what is held stays held."""
        self.peak, self.operations = self.held, 0
        for counter in (self.waits, self.copies, self.kernels):
            counter.clear()

    def add(self, value: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        self._storages[key] = weakref.finalize(storage, self._drop, key, size)
        self._storages[key].atexit = False

    def _drop(self, key: int, size: int) -> None:
        self.held -= size
        self._storages.pop(key, None)


class CudaTensor(Tensor):
    """A tensor of the fake card. To torch's C++ it is a meta tensor, to Python one on `cuda:0`."""

    value: Tensor  # on the CPU, or on `meta` if there are only shapes
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __hash__ = Tensor.__hash__

    @staticmethod
    def __new__(cls, value: Tensor) -> CudaTensor:
        """Put a value on the card."""
        meta = torch.device("meta")
        if value.layout is not torch.strided:  # its parts are counted already; torch's C++ sees a dense one
            made = Tensor._make_wrapper_subclass(cls, value.size(), dtype=value.dtype, device=meta)
            made.value = value
            return made
        made = Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=meta,
        )
        made.value = value
        _card().add(value)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, outside the context too."""
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        """Show the values."""
        return f"CudaTensor({self.value})"

    @property
    def device(self) -> torch.device:
        """The card."""
        return CUDA

    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        """Return the card's number."""
        return 0

    @property
    def data(self) -> Tensor:
        """The tensor without its graph."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, CudaTensor):
            raise MixedDevicesError("data of a tensor on cuda:0 is set to a tensor on the CPU")
        torch._C.TensorBase.data.__set__(self, other)
        self.value = other.value

    def tolist(self) -> Any:
        """Return the values as lists, as `item` does for one."""
        _wait()
        return _known(self.value).tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        return self.numpy()

    def pin_memory(self, *_: Any) -> Tensor:
        """Refuse."""
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def is_pinned(self, *_: Any) -> bool:
        """Return False."""
        return False


_cards: list[Card] = []
_contexts: list[str] = []  # kinds of device of the `with torch.device(...)` that running calls came through


def _card() -> Card:
    return _cards[-1] if _cards else Card()


_HERE, _OWN = __file__, f"{_ROOT}/"


def _owned(file: str) -> bool:
    """Tell whether a file is this repository's own; an environment may lie inside the checkout."""
    return file.startswith(_OWN) and "/site-packages/" not in file


def _place() -> str:
    """Return the innermost line of this repository that is running, as file:line, and that of a package inside it."""
    frame, first = sys._getframe(2), ""
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        if file == _HERE or code.co_name == "__torch_function__":  # a mode that every call passes through is no caller
            pass
        elif _owned(file):
            return f"{file.removeprefix(_OWN).removeprefix('pkg/')}:{frame.f_lineno}" + (first and f" ({first})")
        elif not first and "/site-packages/" in file and "/site-packages/torch/" not in file:
            first = f"{Path(file).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return first or "elsewhere"


def _ours() -> bool:
    """Tell whether the innermost code that is running, apart from torch's and this file's, is this repository's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        passing = file == _HERE or frame.f_code.co_name == "__torch_function__"
        if not passing and "/site-packages/torch/" not in file and not file.startswith("<"):
            return _owned(file)
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wait() -> None:
    _card().waits[_place()] += 1


def _known(value: Tensor) -> Tensor:
    """Return a value to read; a number that has a shape alone is 1."""
    return torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    found = []
    for branch in tree:
        if isinstance(branch, Tensor):
            found.append(branch)
        elif isinstance(branch, list | tuple | dict):
            found += _tensors(branch)
    return found


def _mapped(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    """Return nested lists, tuples and dicts with the tensors of a kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, list | tuple):
        branches = [_mapped(kind, change, branch) for branch in tree]
        return branches if isinstance(tree, list) else tuple(branches)
    return {key: _mapped(kind, change, branch) for key, branch in tree.items()} if isinstance(tree, dict) else tree


# --- one operation ------------------------------------------------------------------------------------------------

# the host has to know how large the result is
_SIZED_BY_VALUES = {
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.bincount.default,
    _ATEN._unique2.default,
    _ATEN.unique_consecutive.default,
    _ATEN.unique_dim.default,
    _ATEN.equal.default,
}

_INDEXING = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
    _ATEN._unsafe_index.Tensor,
}


def _is_card(device: Any, moved: bool) -> bool:
    """Tell whether a `device` argument means the card: `cuda`, or `meta` unless torch's own is meant."""
    if device is None:
        return False
    kind = torch.device(device).type
    # C++ code asks for tensors like those of the card by their C++ device
    return kind == "cuda" or (kind == "meta" and (moved or "meta" not in _contexts[-1:]))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func.namespace == "torch_attn":
        return _KERNELS[func._schema.name.split("::")[1]](*args, **kwargs)
    tensors = _tensors((args, kwargs))
    ours = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
    device = kwargs.get("device")
    onto = _is_card(device, bool(ours))
    if not ours and not onto:
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "pin_memory": False})
        made.is_in_pinned_memory = True
        return made
    card = _card()
    card.operations += 1
    foreign = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if func is _ATEN.copy_.default:
        _count_copy(card, args[0], args[1], len(args) > 2 and bool(args[2]))
    elif func is _ATEN._to_copy.default:
        to_card = onto or (device is None and bool(ours))
        _count_copy(card, args[0] if ours and to_card else None, args[0], bool(kwargs.get("non_blocking")), to_card)
    elif ours and func in _INDEXING and isinstance(args[0], CudaTensor) and not _ours():
        for tensor in foreign:
            card.copies[_place()] += tensor.dim() > 0
    elif ours and any(tensor.dim() for tensor in foreign):
        shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise MixedDevicesError(f"{func}: tensors of two devices: {shapes}")
    _count_wait(func, args, kwargs)
    return _compute(func, args, kwargs, ours, onto)


def _compute(func: Any, args: Any, kwargs: dict[str, Any], ours: list[Any], onto: bool) -> Any:
    """Run an operation on the values, and put its results on the card."""
    card, device = _card(), kwargs.get("device")
    if func is _ATEN._local_scalar_dense.default:
        return _known(args[0].value).item()
    if func is _ATEN.equal.default and any(tensor.value.is_meta for tensor in ours):
        return True
    own_args, own = _mapped(CudaTensor, lambda tensor: tensor.value, (args, kwargs))
    leaves = _tensors((own_args, own))
    stays = not onto and device is not None  # a copy to the CPU
    if device is not None:
        own = {**own, "device": torch.device("cpu")}
    own.pop("pin_memory", None)
    if not card.values:
        if stays and leaves and leaves[0].is_meta:
            return torch.ones(leaves[0].shape, dtype=own.get("dtype") or leaves[0].dtype)
        if func is _ATEN.copy_.default and leaves[1].is_meta and not isinstance(args[0], CudaTensor):
            return args[0].fill_(1)
        own_args, own = _shapes_alone(func, own_args, own, leaves)
    found = func(*own_args, **own)
    if stays:
        return found
    if _changed(func) is not None:
        mutated = _mutated(func, args, kwargs)
        if isinstance(mutated, CudaTensor) and mutated.value.shape != mutated.shape:
            with no_dispatch():  # `squeeze_` and others like it: the tensor that torch's C++ sees follows
                func(*args, **kwargs)
        return mutated
    if not card.values:
        found = _mapped(Tensor, _shape_if_float, found)
    return _mapped(Tensor, CudaTensor, found)


def _shapes_alone(func: Any, args: Any, kwargs: Any, leaves: list[Tensor]) -> tuple[Any, Any]:
    """Return the arguments as meta tensors if one of them has no values; floating-point results get none."""
    dtype = kwargs.get("dtype")
    makes_floats = not leaves and (dtype or torch.get_default_dtype()).is_floating_point
    if makes_floats and func in _INTEGER_FACTORIES:
        makes_floats = dtype is not None and dtype.is_floating_point
    if makes_floats:
        return args, {
            **kwargs,
            "device": torch.device("meta"),
            **({"generator": None} if "generator" in kwargs else {}),
        }
    if not any(leaf.is_meta for leaf in leaves):
        return args, kwargs
    if func in _INDEXING:  # the meta device has no masks as indices
        indices: list[Any] = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool and not index.is_meta:
                indices += index.nonzero(as_tuple=True)
            else:
                indices.append(index)
        args = (args[0], indices, *args[2:])
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    return _mapped(Tensor, lambda tensor: tensor.to("meta") if tensor.dim() else tensor, (args, kwargs))


_INTEGER_FACTORIES = {
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.full.default,
    _ATEN.randint.default,
    _ATEN.randint.low,
    _ATEN.scalar_tensor.default,
}


def _shape_if_float(value: Tensor) -> Tensor:
    return value.to("meta") if value.is_floating_point() and not value.is_meta else value


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operation in place returns: the argument that it writes to, or nothing."""
    changed = _changed(func)
    assert changed is not None
    position, name = changed
    return None if not func._schema.returns else kwargs[name] if name in kwargs else args[position]


@functools.cache
def _changed(func: Any) -> tuple[int, str] | None:
    """Return position and name of the argument that an operation writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return position, argument.name
    return None


def _count_copy(card: Card, target: Any, source: Any, non_blocking: bool, to_card: bool | None = None) -> None:
    onto = isinstance(target, CudaTensor) if to_card is None else to_card
    if onto == isinstance(source, CudaTensor) or not source.numel():
        return
    if not onto:
        card.waits[_place()] += 1
    elif not (non_blocking and getattr(source, "is_in_pinned_memory", False)):
        card.copies[_place()] += 1


def _count_wait(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    by_values = func in _SIZED_BY_VALUES or func is _ATEN._local_scalar_dense.default
    if func in _INDEXING:
        by_values = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func is _ATEN.repeat_interleave.Tensor:
        by_values = kwargs.get("output_size") is None
    if by_values:
        _wait()


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# --- attention ----------------------------------------------------------------------------------------------------


class _Fused(torch.autograd.Function):
    """Attention that keeps its arguments and its result, and no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, settings: dict[str, Any]) -> Tensor:
        ctx.settings, ctx.mask = settings, mask
        with torch.no_grad():
            found = CudaTensor(_attention(q.value, k.value, v.value, mask, settings))
        ctx.save_for_backward(q, k, v, found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _ = ctx.saved_tensors
        values = [tensor.value.detach().requires_grad_() for tensor in (q, k, v)]
        with _plainly(), torch.enable_grad():
            found = _attention(*values, ctx.mask, ctx.settings)
            made = torch.autograd.grad(found, values, gradients[0].value)
        return (*map(CudaTensor, made), None, None)


@contextmanager
def _plainly() -> Iterator[None]:
    """Leave the card aside, for the values."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, settings: dict[str, Any]) -> Tensor:
    with _plainly():
        if q.is_meta:
            return (q.sum() + k.sum() + v.sum()).expand(*q.shape[:-1], v.shape[-1]).contiguous()
        own = mask.value if isinstance(mask, CudaTensor) else mask
        return _real_attention(q, k, v, attn_mask=own, **settings)


_real_attention = F.scaled_dot_product_attention


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **rest: Any
) -> Tensor:
    if not any(isinstance(tensor, CudaTensor) for tensor in (query, key, value, attn_mask)):
        return _real_attention(query, key, value, attn_mask, dropout_p, **rest)
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if tensor is not None and not isinstance(tensor, CudaTensor):
            raise MixedDevicesError(f"scaled_dot_product_attention: {name} is on {tensor.device}")
    _card().kernels["scaled_dot_product_attention"] += 1
    settings = {"is_causal": rest.get("is_causal", False), "scale": rest.get("scale")}
    settings |= {"enable_gqa": rest.get("enable_gqa", False)}
    return _Fused.apply(query, key, value, attn_mask, settings)


def _values_of(*tensors: Any) -> list[Any]:
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, CudaTensor):
            raise MixedDevicesError(f"varlen_attn: a tensor {tuple(tensor.shape)} is on {tensor.device}")
    return [None if tensor is None else tensor.value for tensor in tensors]


def _prompts(q_bounds: Tensor, k_bounds: Tensor, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each prompt's rows of queries and of keys, and which keys its queries see."""
    starts = zip(q_bounds.tolist(), k_bounds.tolist(), strict=True)
    ends = zip(q_bounds.tolist()[1:], k_bounds.tolist()[1:], strict=True)
    for (q_start, k_start), (q_end, k_end) in zip(starts, ends, strict=False):
        mask = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.bool)
        behind = (k_end - k_start) - (q_end - q_start)
        yield slice(q_start, q_end), slice(k_start, k_end), mask.tril(diagonal=behind) if causal else mask


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return attention weights in float32, (heads, queries, keys), of (queries, heads, width) and as many key heads."""
    scores = torch.einsum("qhw,khw->hqk", q.float(), k.float()) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def _is_causal(window: Any, causal: bool) -> bool:
    """Tell whether a token sees no later ones; `window` is how many tokens it sees to its left and right, -1 all."""
    if window is not None and tuple(window) not in ((-1, -1), (-1, 0)):
        raise NotImplementedError(f"window_size {window}")
    return causal or (window is not None and tuple(window) == (-1, 0))


def _require_bounds(rows: Tensor, bounds: Tensor, longest: int) -> None:
    if bounds.dtype != torch.int32:
        raise RuntimeError(f"varlen_attn: bounds are {bounds.dtype}, not int32")
    if int(bounds[-1]) != len(rows) or int(bounds.diff().max()) > longest:
        raise RuntimeError(f"varlen_attn: bounds {bounds.tolist()} for {len(rows)} rows, at most {longest} at a time")


def _varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Any = None,
    enable_gqa: bool = False,
    *_: Any,
    **__: Any,
) -> Any:
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"varlen_attn: {query.dtype}, not half precision")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise RuntimeError(f"varlen_attn: {query.shape[1]} query heads, {key.shape[1]} key heads, and no enable_gqa")
    q, k, v, q_bounds, k_bounds = _values_of(query, key, value, cu_seq_q, cu_seq_k)
    _require_bounds(q, q_bounds, max_q)
    _require_bounds(k, k_bounds, max_k)
    _card().kernels["varlen_attn"] += 1
    if q.is_meta:
        found = torch.empty_like(q)
    else:
        causal, groups = _is_causal(window_size, is_causal), q.shape[1] // k.shape[1]
        found = torch.empty_like(q)
        for asked, seen, mask in _prompts(q_bounds, k_bounds, causal):
            keys, values = (t[seen].repeat_interleave(groups, dim=1) for t in (k, v))
            weights = _weights(q[asked], keys, mask, scale or q.shape[-1] ** -0.5)
            found[asked] = torch.einsum("hqk,khw->qhw", weights, values.float()).to(q.dtype)
    scores = torch.empty(q.shape[1], q.shape[0], device=found.device)
    return CudaTensor(found), CudaTensor(scores), CudaTensor(torch.zeros(2, dtype=torch.uint64))


def _varlen_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Any,
    scale: float | None = None,
    window_size: Any = None,
) -> Any:
    grad, q, k, v, q_bounds, k_bounds = _values_of(grad_out, query, key, value, cu_seq_q, cu_seq_k)
    _card().kernels["varlen_attn backward"] += 1
    if q.is_meta:
        return tuple(CudaTensor(torch.empty_like(states)) for states in (q, k, v))
    causal, groups, scale = _is_causal(window_size, is_causal), q.shape[1] // k.shape[1], scale or q.shape[-1] ** -0.5
    made = [torch.zeros_like(states, dtype=torch.float32) for states in (q, k, v)]
    for asked, seen, mask in _prompts(q_bounds, k_bounds, causal):
        keys, values = (t[seen].repeat_interleave(groups, dim=1).float() for t in (k, v))
        weights, after = _weights(q[asked], keys, mask, scale), grad[asked].float()
        each = torch.einsum("qhw,khw->hqk", after, values)
        scores = weights * (each - (each * weights).sum(-1, keepdim=True)) * scale
        made[0][asked] = torch.einsum("hqk,khw->qhw", scores, keys)
        of_keys = torch.einsum("hqk,qhw->khw", scores, q[asked].float())
        of_values = torch.einsum("hqk,qhw->khw", weights, after)
        for total, part in zip(made[1:], (of_keys, of_values), strict=True):
            total[seen] = part.unflatten(1, (-1, groups)).sum(2)
    return tuple(CudaTensor(gradient.to(states.dtype)) for gradient, states in zip(made, (q, k, v), strict=True))


_KERNELS: dict[str, Callable[..., Any]] = {"_varlen_attn": _varlen, "_varlen_attn_backward": _varlen_backward}
assert varlen is not None


# --- the context --------------------------------------------------------------------------------------------------

_tensor, _as_tensor, _to, _cpu = torch.tensor, torch.as_tensor, Tensor.to, Tensor.cpu


def _moved(tensor: Tensor, dtype: torch.dtype | None, non_blocking: bool, copy: bool, form: Any = None) -> Tensor:
    """Move a tensor to the card; one that is there already stays the same."""
    if isinstance(tensor, CudaTensor) and not copy and dtype in (None, tensor.dtype):
        return tensor
    more = {} if form is None else {"memory_format": form}
    return _ATEN._to_copy.default(tensor, dtype=dtype, device=CUDA, non_blocking=non_blocking, **more)


def _to_anywhere(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], CudaTensor):  # like another tensor
        return _moved(self, kwargs.get("dtype", args[0].dtype), bool(kwargs.get("non_blocking")), False)
    places = [argument for argument in (*args[:1], kwargs.get("device")) if isinstance(argument, torch.device | str)]
    if isinstance((args[:1] or (None,))[0], int) and not isinstance(args[0], bool):
        places = [torch.device("cuda", args[0])]
    if not places or torch.device(places[0]).type != "cuda":
        return _to(self, *args, **kwargs)
    rest = list(args[1:] if args and args[0] is not None and kwargs.get("device") is None else args)
    dtype = kwargs.get("dtype") or next((argument for argument in rest if isinstance(argument, torch.dtype)), None)
    flags = [argument for argument in rest if isinstance(argument, bool)]
    non_blocking = bool(kwargs.get("non_blocking", flags[0] if flags else False))
    copy = bool(kwargs.get("copy", flags[1] if len(flags) > 1 else False))
    return _moved(self, dtype, non_blocking, copy, kwargs.get("memory_format"))


def _read(values: Any) -> Any:
    """Return nested lists with the numbers of the card in them read, one by one, as torch does."""
    if isinstance(values, list | tuple) and any(isinstance(value, CudaTensor | list | tuple) for value in values):
        return [_read(value) for value in values]
    return values.tolist() if isinstance(values, CudaTensor) else values


def _made(make: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if isinstance(args[0], list | tuple):
        args = (_read(args[0]), *args[1:])
    device = kwargs.pop("device", None)
    if device is None or torch.device(device).type != "cuda":
        return make(*args, **kwargs) if device is None else make(*args, device=device, **kwargs)
    requires = kwargs.pop("requires_grad", False)
    if isinstance(args[0], CudaTensor):
        return _moved(args[0], kwargs.get("dtype"), False, make is _tensor)
    made = _moved(make(*args, device="cpu", **kwargs), None, False, False)
    return made.requires_grad_() if requires else made


def _in_context(self: _device.DeviceContext, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What `with torch.device(...)` does with a call."""
    given = kwargs or {}
    if func in _device._device_constructors() and given.get("device") is None:
        given = {**given, "device": self.device}
    _contexts.append(self.device.type)
    try:
        return _made(func, *args, **given) if func in (_tensor, _as_tensor) else func(*args, **given)
    finally:
        _contexts.pop()


def _pinned(self: Tensor, *_: Any) -> Tensor:
    copied = self.detach().clone()
    copied.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return copied


class _Generator(torch.Generator):
    """A generator of random numbers that are drawn on the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


def _of_cuda(card: Card) -> dict[str, Any]:
    nothing = lambda *_, **__: None  # noqa: E731
    name = "fake CUDA device"
    properties = SimpleNamespace(name=name, total_memory=card.total, major=9, minor=0, multi_processor_count=132)
    return {
        "_lazy_init": nothing,
        "init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "reset_peak_memory_stats": lambda *_: setattr(card, "peak", card.held),
        "max_memory_allocated": lambda *_: card.peak,
        "memory_allocated": lambda *_: card.held,
        "mem_get_info": lambda *_: (card.total - card.held, card.total),
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": nothing,
        "manual_seed_all": nothing,
    }


@contextmanager
def fake_cuda(values: bool = True, total: int = 80 * 2**30) -> Iterator[Card]:
    """Run code as on a machine with one GPU; yields what the card counts.

    Args:
        values: whether floating-point tensors have values; without them large models cost nothing.
        total: the card's memory, in bytes, of which `torch.cuda.mem_get_info` tells.
    """
    card = Card(values, total)
    _device._device_constructors()  # remembered by torch: they must not be those of this context
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for name, made in _of_cuda(card).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, made))
        methods = {"to": _to_anywhere, "pin_memory": _pinned}
        methods["cuda"] = lambda self, *_, **more: _moved(self, None, bool(more.get("non_blocking")), False)
        methods["is_pinned"] = lambda self, *_: getattr(self, "is_in_pinned_memory", False)
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(Tensor, name, method))
        for name, make in (("tensor", _tensor), ("as_tensor", _as_tensor)):
            stack.enter_context(mock.patch.object(torch, name, functools.partial(_made, make)))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(_device.DeviceContext, "__torch_function__", _in_context))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _fused_attention))
        # a moved parameter stays the same object, as on a GPU, where its data is replaced: tied weights stay tied
        torch.__future__.set_swap_module_params_on_conversion(True)
        _cards.append(card)
        try:
            with _Operations():
                yield card
        finally:
            _cards.remove(card)
            torch.__future__.set_swap_module_params_on_conversion(swapping)
