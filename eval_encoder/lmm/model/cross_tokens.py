"""CrossGET in the language model: learned tokens that the tower's are to agree with.

Before every layer of a pass that has no cache, the first token of a sample that is no padding
becomes stop_gradient(itself) + S[layer], with S [L, H] starting at zero. Later passes find what it
left in the cache, so generation with and without a cache says the same. That token sees nothing but
itself, so what is learned does not depend on the input, as published. Cost: a copy of the hidden
states per layer.

Shape legend: B samples, T tokens, H width, L layers.
"""

import torch
from torch import nn


class TextCrossTokens:
    """While entered, every layer's hook is in place; `seen`: [B, H] per layer."""

    def __init__(self, model: nn.Module, attention_mask: torch.Tensor | None, prefill: bool):
        """model: with `language_model.layers` and `text_cross_tokens`, a module that gives [L, H],
        or None."""
        self.seen: list[torch.Tensor] = []
        self._model, self._mask = model, attention_mask
        self._active = prefill and model.text_cross_tokens is not None

    def __enter__(self) -> "TextCrossTokens":
        layers = self._model.language_model.layers if self._active else []
        self._tokens = self._model.text_cross_tokens() if self._active else None
        self._handles = [
            layer.register_forward_pre_hook(self._before(number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        return self

    def __exit__(self, *_error) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, number: int):
        def hook(_layer, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            first = self._first(x)
            cross = x[torch.arange(len(x), device=x.device), first].detach()
            cross = cross + self._tokens[number].to(x.dtype)
            self.seen.append(cross)
            where = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            where[torch.arange(len(x), device=x.device), first] = True
            x = torch.where(where[..., None], cross[:, None], x)
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        return hook

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        """Place of the first token that is no padding, int64 [B]."""
        if self._mask is None or self._mask.ndim != 2:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self._mask.long().argmax(dim=1)
