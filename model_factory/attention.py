"""Variable-length attention: the one place that chooses a kernel.

A pack holds many sequences back to back; tokens attend within their own sequence only. Back ends:

    varlen  torch.nn.attention.varlen          CUDA, half precision
    flash   flash-attn, when installed         CUDA, half precision
    sdpa    torch's fused kernels, one batch   any device and dtype; the reference
            per length (grouped_attention)
    eager   materialised scores, as above      any device and dtype; slow, for comparisons

Shape legend: S packed tokens, N sequences, H heads, d head_dim.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .grouped_attention import grouped_eager, grouped_sdpa

BACKENDS = ("varlen", "flash", "sdpa", "eager")
HALF_PRECISION = (torch.float16, torch.bfloat16)

# looked up, not imported: flash-attn is optional, and whether its build fits the installed torch
# shows only at its import, which varlen_attention makes
_FLASH_INSTALLED = importlib.util.find_spec("flash_attn") is not None


def available_backends(q: torch.Tensor) -> list[str]:
    """Back ends that can run on the device and dtype of `q`, fastest first."""
    fast = []
    if q.is_cuda and q.dtype in HALF_PRECISION:
        fast = ["varlen"]
        if _FLASH_INSTALLED:
            fast.append("flash")
    return [*fast, "sdpa", "eager"]


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
    describe q where its lengths differ (pooling has one query per sequence). Scores are scaled by
    d ** -0.5. `backend` overrides the choice. Returns [S_q, H, d]. Raises ValueError for a back end
    that cannot run on this device and dtype.
    """
    bounds_q = cu_seqlens if cu_seqlens_q is None else cu_seqlens_q
    longest_q = max_seqlen if max_seqlen_q is None else max_seqlen_q
    choices = available_backends(q)  # fastest first
    chosen = backend or choices[0]
    if chosen not in choices:
        raise ValueError(
            f"attention back end {chosen!r} cannot run on {q.device.type} {q.dtype}; available: "
            f"{', '.join(choices)}"
        )
    if chosen == "eager":
        return grouped_eager(q, k, v, bounds_q=bounds_q, bounds_k=cu_seqlens)
    if chosen == "sdpa":
        return grouped_sdpa(q, k, v, bounds_q=bounds_q, bounds_k=cu_seqlens)
    # both fast kernels take the same arguments in the same order
    if chosen == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        kernel: Callable[..., Any] = varlen_attn
    else:
        try:  # its build may not fit the installed torch, which shows when it is imported
            from flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise ValueError(f"flash-attn is installed but does not import: {error}") from error
        kernel = flash_attn_varlen_func
    return kernel(q, k, v, bounds_q, cu_seqlens, longest_q, max_seqlen)
