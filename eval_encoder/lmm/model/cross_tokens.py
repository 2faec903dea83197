"""CrossGET's learned tokens in the language model, with which those of the tower are aligned.

Before every layer of a pass that has no cache, the first token of a sample that is no padding
becomes stop_gradient(itself) + S[layer], with S [L, H] starting at zero. Later passes find what it
left in the cache, so generation gives the same with and without one. That token sees nothing but
itself, so what is learned does not depend on the input, as published. Cost: a copy of the hidden
states per layer.

Shape legend: B samples, T tokens, H width, L layers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # it imports this module
    from .lmm import LmmModel


class TextCrossTokens:
    """A context in which every layer has its hook; `seen`: cross tokens [B, H] of each layer."""

    def __init__(
        self, model: "LmmModel", attention_mask: torch.Tensor | None, prefill: bool
    ) -> None:
        """model: with `language_model.layers` and `text_cross_tokens`, a module that gives [L, H],
        or None."""
        self.seen: list[torch.Tensor] = []
        self._model = model
        self._mask = attention_mask
        self._active = prefill

    def __enter__(self) -> "TextCrossTokens":
        self._handles = []
        cross_tokens = self._model.text_cross_tokens
        if self._active and cross_tokens is not None:
            tokens = cross_tokens()
            for token, layer in zip(tokens, self._model.language_model.layers, strict=True):
                hook = layer.register_forward_pre_hook(self._before(token), with_kwargs=True)
                self._handles.append(hook)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, token: torch.Tensor) -> Callable:
        def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = args[0] if args else kwargs["hidden_states"]
            samples = torch.arange(len(x), device=x.device)
            first = self._first(x)
            # detached, so that no gradient of the cross token goes to the layers below
            stopped = x[samples, first].detach()
            cross = stopped + token.to(x.dtype)
            self.seen.append(cross)
            is_cross = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            is_cross[samples, first] = True
            # not written in place: autograd needs x as it was
            x = torch.where(is_cross[..., None], cross[:, None], x)
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        return hook

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        """Index of the first token that is no padding, int64 [B]."""
        # without a mask of [B, T] there is no padding
        if self._mask is None or self._mask.ndim != 2:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self._mask.long().argmax(dim=1)
