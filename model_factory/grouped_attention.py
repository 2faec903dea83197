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
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Groups:
    """Sequences sorted by length: per group (sequences, query length, key length), and the row
    orders that bring them side by side with the way back (None where they already are).
    """

    shapes: tuple[tuple[int, int, int], ...]
    order_q: torch.Tensor | None
    order_k: torch.Tensor | None
    back_q: torch.Tensor | None
    back_k: torch.Tensor | None


def _row_order(lengths: tuple[int, ...], items: list[int], device: str):
    """Row numbers of `items` in that order, and its inverse; None, None when nothing moves."""
    if items == sorted(items):
        return None, None
    starts = np.cumsum((0, *lengths[:-1]))
    order = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in items])
    return tuple(torch.from_numpy(rows).to(device) for rows in (order, order.argsort()))


@functools.lru_cache(maxsize=64)
def _group(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], device: str) -> _Groups:
    groups: dict[tuple[int, int], list[int]] = {}
    for item, key in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(key, []).append(item)
    items = [item for members in groups.values() for item in members]
    with torch.inference_mode(False):  # what is remembered must also serve a backward pass
        order_q, back_q = _row_order(lengths_q, items, device)
        order_k, back_k = _row_order(lengths_k, items, device)
    shapes = tuple((len(members), *key) for key, members in groups.items())
    return _Groups(shapes, order_q, order_k, back_q, back_k)


def _groups_of(bounds_q: torch.Tensor, bounds_k: torch.Tensor) -> _Groups:
    """Groups of a pack; waits for the device where the boundaries are not on the host."""
    lengths_q = tuple(np.diff(bounds_q.cpu().numpy()).tolist())
    lengths_k = (
        lengths_q if bounds_k is bounds_q else tuple(np.diff(bounds_k.cpu().numpy()).tolist())
    )
    return _group(lengths_q, lengths_k, str(bounds_k.device))


def _reorder(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return x if order is None else x.index_select(0, order)


def _batches(x: torch.Tensor, order: torch.Tensor | None, counts: list[tuple[int, int]]):
    """Rows [S, ...] -> per group a view [sequences, H, L, ...] for the batched kernels."""
    pieces = _reorder(x, order).split([count * length for count, length in counts])
    return [
        piece.unflatten(0, shape).transpose(1, 2)
        for piece, shape in zip(pieces, counts, strict=True)
    ]


def _rows(batches: list[torch.Tensor], back: torch.Tensor | None) -> torch.Tensor:
    """Inverse of `_batches`."""
    rows = [batch.transpose(1, 2).flatten(0, 1) for batch in batches]
    return _reorder(rows[0] if len(rows) == 1 else torch.cat(rows), back)


def _split(groups: _Groups, rows_q: tuple, rows_k: tuple):
    """Yield per group the batched views of the query-sided and the key-sided tensors."""
    counts_q = [(count, length_q) for count, length_q, _ in groups.shapes]
    counts_k = [(count, length_k) for count, _, length_k in groups.shapes]
    sides = [_batches(x, groups.order_q, counts_q) for x in rows_q]
    sides += [_batches(x, groups.order_k, counts_k) for x in rows_k]
    return zip(*sides, strict=True)


def grouped_eager(q, k, v, bounds_q, bounds_k) -> torch.Tensor:
    """Attention with materialised scores, softmax in fp32: memory and time of sum(L ** 2) * H."""
    groups = _groups_of(bounds_q, bounds_k)
    batches = []
    for q_g, k_g, v_g in _split(groups, (q,), (k, v)):
        scores = q_g @ k_g.transpose(-1, -2) * q.shape[-1] ** -0.5
        batches.append(scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v_g)
    return _rows(batches, groups.back_q)


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
    groups = _groups_of(bounds_q, bounds_k)
    outputs, sums = [], []
    for q_g, k_g, v_g in _split(groups, (q,), (k, v)):
        if q.device.type == "cpu":
            out, lse = _flash_forward(q_g, k_g, v_g)
            sums.append(lse)
        else:
            out = F.scaled_dot_product_attention(q_g, k_g, v_g)
        outputs.append(out)
    lse = _rows(sums, groups.back_q) if sums else q.new_empty(0, dtype=torch.float32)
    return _rows(outputs, groups.back_q).contiguous(), lse.contiguous()


@_grouped_sdpa.register_fake
def _(q, k, v, bounds_q, bounds_k):
    lse_shape = q.shape[:2] if q.device.type == "cpu" else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        lse_shape, dtype=torch.float32
    )


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
    groups = _groups_of(bounds_q, bounds_k)
    rows_q = (grad, q, out, lse) if q.device.type == "cpu" else (grad, q)
    parts = []
    for grad_g, q_g, *saved, k_g, v_g in _split(groups, rows_q, (k, v)):
        if saved:
            out_g, lse_g = saved
            parts.append(_flash_backward(grad_g, q_g, k_g, v_g, out_g, lse_g, 0.0, False))
        else:
            inputs = [x.detach().requires_grad_() for x in (q_g, k_g, v_g)]
            with torch.enable_grad():
                again = F.scaled_dot_product_attention(*inputs)
            parts.append(torch.autograd.grad(again, inputs, grad_g))
    backs = (groups.back_q, groups.back_k, groups.back_k)
    grads = [_rows(list(g), back) for g, back in zip(zip(*parts, strict=True), backs, strict=True)]
    return tuple(g.contiguous() for g in grads)


@_grouped_sdpa_backward.register_fake
def _(grad, q, k, v, bounds_q, bounds_k, out, lse):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    if grad is None:
        return None, None, None, None, None
    return *_grouped_sdpa_backward(grad.contiguous(), *ctx.saved_tensors), None, None


_grouped_sdpa.register_autograd(_backward, setup_context=_save)


def grouped_sdpa(q, k, v, bounds_q, bounds_k) -> torch.Tensor:
    """Attention by batched fused kernels; any device and dtype they support, differentiable once.

    q: [S_q, H, d], k and v: [S, H, d], boundaries int32 [N + 1] each. Returns [S_q, H, d].
    """
    return _grouped_sdpa(q, k, v, bounds_q, bounds_k)[0]
