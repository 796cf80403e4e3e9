"""Counts the memory and floating point operations of torch operations as they are dispatched."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FORMULAS = flop_registry | {  # torch's formulas lack the CPU's attention
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val=None, **kw: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_val=None, **kw: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}


class Meter(TorchDispatchMode):
    """Allocated bytes, their peaks, and floating point operations, of tensors created within the context.

    Tensors created before (weights, batches) and temporary memory inside kernels are not counted. `peaks[role, where]` is
    (bytes without gradients, bytes with the role's), with role and location set by the caller.
    """

    _known: dict[tuple, tuple[Any, int]] = {}  # an operation on shapes -> what makes its result, and its operations

    def __init__(self):
        super().__init__()
        self.live, self.flops = 0, 0
        self.role, self.placement = "", None  # role in turn, running network unit
        self.gradients: dict[str, int] = defaultdict(int)
        self.peaks: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
        self._kinds: dict[int, str | None] = {}  # storage -> the role whose gradient it is, None for the rest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = signature(func, args, kwargs)
        if key is not None and key in self._known:
            made, flops = self._known[key]
            out = made()
        else:
            out, flops = func(*args, **kwargs), 0
            formula = FORMULAS.get(func._overloadpacket)
            if formula is not None:
                flops = formula(*args, **kwargs, out_val=out)
            if key is not None and (made := maker(out)) is not None:
                self._known[key] = made, flops
        self.flops += flops
        if any(
            [
                self._count_storage(t)
                for t in (out if isinstance(out, (tuple, list)) else (out,))
                if isinstance(t, Tensor)
            ]
        ):
            self._note()
        return out

    def _count_storage(self, tensor: Tensor, free: bool = False) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return False
        size = 0 if free else storage.nbytes()
        self._kinds[key] = None
        self.live += size
        weakref.finalize(storage, self._gone, key, size).atexit = False
        return True

    def _gone(self, key: int, size: int) -> None:
        role = self._kinds.pop(key)
        if role is None:
            self.live -= size
        else:
            self.gradients[role] -= size

    def _note(self) -> None:
        peak = self.peaks[self.role, self.placement]
        peak[0] = max(peak[0], self.live)
        peak[1] = max(peak[1], self.live + self.gradients[self.role])

    def ignore(self, tensors: Any) -> None:
        """Exclude tensors that existed before, or stand for others that are counted."""
        for tensor in tensors:
            self._count_storage(tensor, free=True)

    def gradient(self, tensor: Tensor, role: str) -> None:
        """`tensor` is a gradient of `role` from now on."""
        storage = tensor.untyped_storage()
        if self._kinds.get(storage._cdata, role) is None:
            self._kinds[storage._cdata] = role
            self.live -= storage.nbytes()
            self.gradients[role] += storage.nbytes()

    @contextmanager
    def span(self):
        """Peaks within the context beyond the bytes alive at its start: yields (peaks by location, [operations])."""
        outer, start, flops = self.peaks, self.live, self.flops
        self.peaks, done = defaultdict(lambda: [0, 0]), [0]
        inner, found = self.peaks, {}
        try:
            yield found, done
        finally:
            self.peaks = outer
            done[0] = self.flops - flops
            found |= {placement: peak[0] - start for (_, placement), peak in inner.items()}
            for key, (without, own) in inner.items():
                outer[key] = [max(outer[key][0], without), max(outer[key][1], own)]

    def again(self, found: dict[Any, int], flops: int) -> None:
        """Add the counts of a recorded span again."""
        self.flops += flops
        own = self.gradients[self.role]
        for placement, extra in found.items():
            peak = self.peaks[self.role, placement]
            peak[:] = max(peak[0], self.live + extra), max(peak[1], self.live + extra + own)


@cache
def makes_new(func: Any) -> bool:
    """Whether an operation changes nothing and its results share no memory with its arguments."""
    schema = func._schema
    return not schema.is_mutable and all(r.alias_info is None for r in schema.returns)


def signature(func: Any, args: tuple, kwargs: dict) -> tuple | None:
    """A key that determines the shapes of an operation's results on meta tensors; None if there is none."""
    if not makes_new(func):
        return None
    found, any_meta = [func], False
    for value in (*args, *kwargs.items()):
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, Tensor):
                if not v.is_meta and v.ndim:
                    return None
                any_meta |= v.is_meta
                found.append((v.shape, v.stride(), v.dtype, v.is_meta))
            else:
                found.append(tuple(v) if isinstance(v, list) else v)
        found.append(len(value) if isinstance(value, (tuple, list)) else None)
    return tuple(found) if any_meta else None


def maker(out: Any) -> Any:
    """A function that creates results like `out`, all on the meta device; None if some are not."""
    if isinstance(out, Tensor) and out.is_meta:
        return partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device="meta")
    if isinstance(out, tuple) and all(v is None or isinstance(v, Tensor) and v.is_meta for v in out):
        makers = [None if v is None else maker(v) for v in out]
        return lambda: tuple(m and m() for m in makers)
    return None


# Of https://docs.pytorch.org/docs/stable/amp.html, by name: what CUDA's autocast computes in the lower precision, and in float32.
LOWER = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "mm",
    "mv",
    "addmm",
    "addbmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
    "prelu",
}
WIDER = {
    "layer_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "softplus",
    "pow",
    "__pow__",
    "__rpow__",
    "exp",
    "expm1",
    "log",
    "log1p",
    "rsqrt",
    "reciprocal",
    "sum",
    "prod",
    "cumsum",
    "norm",
    "mse_loss",
    "l1_loss",
    "cross_entropy",
}


class Accelerator(TorchFunctionMode):
    """Within this context meta tensors behave as on a GPU: its autocast and its fused attention, which meta lacks.

    Args:
        dtype: of autocast; None: float32 throughout.
        cache: whether autocast caches cast weights until the end of the step, as torch does by default.
    """

    def __init__(self, dtype: torch.dtype | None = None, cache: bool = True):
        super().__init__()
        self.dtype, self.cache = dtype, cache
        self.cast: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in LOWER or name in WIDER:
            if any(isinstance(a, Tensor) and a.is_meta for a in (*args, *kwargs.values())):
                if self.dtype is not None and torch.is_autocast_enabled("cpu"):
                    to = self._lower if name in LOWER else self._wider
                    args, kwargs = tree_map_only(Tensor, to, args), tree_map_only(Tensor, to, kwargs)
                if name == "scaled_dot_product_attention":
                    return attention(*args, **kwargs)
        if func in (torch.autograd.grad, torch.autograd.backward):
            return self._differentiate(func, *args, **kwargs)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            like = func(*args, **kwargs | {"device": "cpu"})
            return torch.empty(like.shape, dtype=like.dtype, device="meta")  # the alternative fails within jvp
        return func(*args, **kwargs)

    def _differentiate(self, func, *args, **kwargs):
        """`func` within this mode, for operations that are recomputed."""
        check, torch.autograd.has_torch_function = torch.autograd.has_torch_function, lambda tensors: False
        try:
            with self:
                gradients = func(*args, **kwargs)
        finally:
            torch.autograd.has_torch_function = check
        if isinstance(args[0], Tensor) and args[0].is_meta:
            return gradients
        # a loss that takes a weight's gradient computes with numbers
        return tree_map_only(Tensor, lambda v: torch.randn(v.shape).to(v.dtype) if v.is_meta else v, gradients)

    def _lower(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (self.dtype, torch.float64):
            return tensor
        kept = self.cache and tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()
        if not kept:
            return tensor.to(self.dtype)
        if id(tensor) not in self.cast:
            self.cast[id(tensor)] = tensor.to(self.dtype)
        return self.cast[id(tensor)]

    @staticmethod
    def _wider(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` as a GPU's fused kernel, which stores no N x N matrix."""
    cuda = torch.backends.cuda
    plain = not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()) or enable_gqa
    if plain or query.ndim != 4:
        return torch._C._nn.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
    )[0]
