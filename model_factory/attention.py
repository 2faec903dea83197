"""Variable-length attention: the one place that chooses a kernel.

A pack holds many sequences back to back; tokens attend within their own sequence only. Back ends:

    varlen  torch.nn.attention.varlen      CUDA, half precision
    flash   flash-attn, when installed     CUDA, half precision
    sdpa    scaled_dot_product_attention   any device and dtype; sequences of equal length run as
            one batch,
                                           so the cost is one kernel per distinct length. It is the
                                           reference.

Shape legend: S packed tokens, N sequences, H heads, d head_dim.
"""

import torch
import torch.nn.functional as F

BACKENDS = ("varlen", "flash", "sdpa")


def _flash_function():
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def available_backends(q: torch.Tensor) -> list[str]:
    """Back ends that can run on the device and dtype of `q`, best first."""
    backends = []
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        backends.append("varlen")
        if _flash_function() is not None:
            backends.append("flash")
    return backends + ["sdpa"]


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Bidirectional attention inside each packed sequence.

    q, k, v: [S, H, d]; cu_seqlens: int32 [N+1] boundaries of k and v; max_seqlen: longest sequence,
    a host integer so that no kernel launch waits for the device. `cu_seqlens_q` and `max_seqlen_q`
    describe q when its lengths differ (pooling asks with one query per sequence). Scores are scaled
    by d ** -0.5. `backend` overrides the choice. Returns [S_q, H, d]. Raises ValueError for a back
    end that cannot run here.
    """
    bounds_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    longest_q = max_seqlen if max_seqlen_q is None else max_seqlen_q
    choices = available_backends(q)
    chosen = backend or choices[0]
    if chosen not in choices:
        raise ValueError(
            f"attention back end {chosen!r} cannot run on {q.device.type} {q.dtype}; available: "
            f"{', '.join(choices)}"
        )
    if chosen == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, bounds_q, cu_seqlens, longest_q, max_seqlen)
    if chosen == "flash":
        return _flash_function()(q, k, v, bounds_q, cu_seqlens, longest_q, max_seqlen)
    return _grouped_sdpa(q, k, v, bounds_q, cu_seqlens)


def _grouped_sdpa(q, k, v, bounds_q, bounds_k):
    lengths_q = bounds_q.diff().tolist()
    lengths_k = bounds_k.diff().tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    for item, key in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(key, []).append(item)
    if len(groups) == 1:  # the common case needs no gather: the pack is already a batch
        return _batched_sdpa(q, k, v, len(lengths_q)).flatten(0, 1)
    outputs, order = [], []
    for (length_q, length_k), items in groups.items():
        rows_q = _rows(bounds_q, items, length_q)
        rows_k = _rows(bounds_k, items, length_k)
        outputs.append(_batched_sdpa(q[rows_q], k[rows_k], v[rows_k], len(items)).flatten(0, 1))
        order.append(rows_q)
    return torch.cat(outputs)[torch.cat(order).argsort()]


def _rows(bounds, items, length):
    starts = bounds[:-1].long()[torch.tensor(items, device=bounds.device)]
    return (starts[:, None] + torch.arange(length, device=bounds.device)).flatten()


def _batched_sdpa(q, k, v, count):
    """[count*L, H, d] packed rows -> [count, L, H, d]."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
