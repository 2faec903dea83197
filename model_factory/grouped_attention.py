"""Packed attention out of batched kernels: sequences of equal length run together as one batch.

`grouped_sdpa` is the CPU kernel and the reference of all others; `grouped_eager` materialises the
scores. Cost: one kernel per distinct length and, unless equal lengths already lie side by side, one
reordering of the rows. How a pack is grouped is worked out once per pack and looked up by the
layers after the first.

`grouped_sdpa` is an operator of its own: a compiled graph sees one opaque call whose shapes do not
depend on the boundaries, so changing packs need no new graph. On a CPU it calls the fused kernels
of torch (the ones behind scaled_dot_product_attention) forward and backward; on other devices it
calls scaled_dot_product_attention and recomputes it in the backward pass, and every layer waits
for the boundaries: half precision on a GPU has better kernels, see attention.py.

Shape legend: S packed tokens, N sequences, H heads, d head_dim, L length of one sequence.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Side:
    """How the rows of queries, or those of keys and values, are grouped by length.

    shapes   (sequences, length) of each group
    order    index of the row at each position of the grouped order; None where groups already lie
             together
    inverse  the way back
    """

    shapes: list[tuple[int, int]]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def batches(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows [S, ...] as [sequences, H, L, ...] per group, for the batched kernels: views where
        `order` is None, else of one reordered copy."""
        if self.order is not None:
            rows = rows.index_select(0, self.order)
        rows_per_group = [count * length for count, length in self.shapes]
        pieces = rows.split(rows_per_group)
        return [
            piece.unflatten(0, shape).transpose(1, 2)
            for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def rows(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Inverse of `batches`, contiguous."""
        pieces = [batch.transpose(1, 2).flatten(0, 1) for batch in batches]
        # torch.cat would copy a single piece too
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.inverse is not None:
            rows = rows.index_select(0, self.inverse)
        return rows.contiguous()


def _side(lengths: tuple[int, ...], groups: list[list[int]], device: str) -> _Side:
    """Grouping of rows by groups of sequences of one length each."""
    shapes = [(len(members), lengths[members[0]]) for members in groups]
    items = [item for members in groups for item in members]
    # the groups follow each other in the pack as it is: views suffice
    if items == sorted(items):
        return _Side(shapes)
    starts = np.cumsum((0, *lengths[:-1]))
    ends = starts + lengths
    rows_of = [np.arange(starts[item], ends[item]) for item in items]
    order = np.concatenate(rows_of)
    return _Side(
        shapes,
        order=torch.from_numpy(order).to(device),
        inverse=torch.from_numpy(order.argsort()).to(device),
    )


# every layer of a step looks up the same few packs, forward and backward; older ones may go
@functools.lru_cache(maxsize=64)
def _group(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], device: str
) -> tuple[_Side, _Side]:
    # by both lengths: a batch of one kernel needs equal queries and equal keys
    groups: dict[tuple[int, int], list[int]] = {}
    for item, key in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(key, []).append(item)
    members = list(groups.values())
    # cached tensors must serve a backward pass too, which inference tensors cannot
    with torch.inference_mode(False):
        queries = _side(lengths_q, groups=members, device=device)
        keys = _side(lengths_k, groups=members, device=device)
    return queries, keys


def _groups_of(bounds_q: torch.Tensor, bounds_k: torch.Tensor) -> tuple[_Side, _Side]:
    """Grouping of queries and of keys; waits for the device where boundaries are not on the
    host."""
    lengths_q = tuple(np.diff(bounds_q.cpu().numpy()).tolist())
    # self-attention passes one tensor as both, and one copy to the host is enough for it
    lengths_k = lengths_q
    if bounds_k is not bounds_q:
        lengths_k = tuple(np.diff(bounds_k.cpu().numpy()).tolist())
    return _group(lengths_q, lengths_k, device=str(bounds_k.device))


def _batched(
    queries: _Side, keys: _Side, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values [sequences, H, L, d] of each group."""
    return zip(
        queries.batches(q),
        keys.batches(k),
        keys.batches(v),
        strict=True,
    )


def grouped_eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
) -> torch.Tensor:
    """Attention with materialised scores, softmax in fp32: memory and time of sum(L ** 2) * H."""
    queries, keys = _groups_of(bounds_q, bounds_k)
    scale = q.shape[-1] ** -0.5
    outputs = []
    for q_g, k_g, v_g in _batched(queries, keys, q, k, v):
        scores = q_g @ k_g.transpose(-1, -2) * scale
        probabilities = scores.softmax(-1, dtype=torch.float32)
        outputs.append(probabilities.to(q.dtype) @ v_g)
    return queries.rows(outputs)


# the exported modelling folder holds a second copy of this module: each copy owns a namespace
_NAMESPACE = re.sub(r"[^0-9A-Za-z_]", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::grouped_sdpa", mutates_args=())
def _grouped_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows out [S_q, H, d] and log-sum-exp of the scores [S_q, H] (empty off the CPU)."""
    queries, keys = _groups_of(bounds_q, bounds_k)
    outputs = []
    sums = []
    for q_g, k_g, v_g in _batched(queries, keys, q, k, v):
        if q.device.type == "cpu":
            out, lse = _flash_forward(q_g, k_g, v_g)
            sums.append(lse)
        else:
            out = F.scaled_dot_product_attention(q_g, k_g, v_g)
        outputs.append(out)
    # an operator returns a tensor in every case; other devices recompute and need no sums
    lse = queries.rows(sums) if sums else q.new_empty(0, dtype=torch.float32)
    return queries.rows(outputs), lse


@_grouped_sdpa.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    # strides as `_Side.rows` gives them: q may be a view of a joined projection
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    on_cpu = q.device.type == "cpu"
    lse_shape = q.shape[:2] if on_cpu else (0,)
    return out, q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::grouped_sdpa_backward", mutates_args=())
def _grouped_sdpa_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their shapes."""
    queries, keys = _groups_of(bounds_q, bounds_k)
    on_cpu = q.device.type == "cpu"
    unsaved = [None] * len(queries.shapes)
    groups = zip(
        queries.batches(grad),
        queries.batches(q),
        keys.batches(k),
        keys.batches(v),
        queries.batches(out) if on_cpu else unsaved,
        queries.batches(lse) if on_cpu else unsaved,
        strict=True,
    )
    gradients = []
    for grad_g, q_g, k_g, v_g, out_g, lse_g in groups:
        if on_cpu:
            # no dropout, not causal
            gradients.append(_flash_backward(grad_g, q_g, k_g, v_g, out_g, lse_g, 0.0, False))
        else:
            # an operator runs below autograd, so this group gets a graph of its own
            inputs = [x.detach().requires_grad_() for x in (q_g, k_g, v_g)]
            with torch.enable_grad():
                again = F.scaled_dot_product_attention(*inputs)
            gradients.append(torch.autograd.grad(again, inputs, grad_g))
    grads_q, grads_k, grads_v = zip(*gradients, strict=True)
    return queries.rows(grads_q), keys.rows(grads_k), keys.rows(grads_v)


@_grouped_sdpa_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    # an output without a gradient then gives None, not zeros, and `_backward` skips the kernels
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: torch.Tensor | None, _grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    grads = _grouped_sdpa_backward(grad.contiguous(), *ctx.saved_tensors)
    return *grads, None, None  # boundaries have none


_grouped_sdpa.register_autograd(_backward, setup_context=_save)


def grouped_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor,
    bounds_k: torch.Tensor,
) -> torch.Tensor:
    """Attention by batched fused kernels; any device and dtype they support, differentiable once.

    q: [S_q, H, d], k and v: [S, H, d], boundaries int32 [N + 1] each. Returns [S_q, H, d].
    """
    return _grouped_sdpa(q, k, v, bounds_q, bounds_k)[0]
