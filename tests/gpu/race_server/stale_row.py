"""A fault that only concurrency has: now and then a row of a MoE's output is another request's.

Its text is appended to the model's file in a copy of the installed vLLM, as a positive control. In
a batch of more than one token, at every ``EVERY``-th call of a layer, the first row of the output
becomes the last row of the call before. Alone, a request never shows it: the first row is then of
a prompt's first token, which nothing is sampled from, and a decode has one row.
"""

from __future__ import annotations

from typing import Any

EVERY = 97


def plant(layer: Any) -> None:
    """Wrap ``layer.forward``, which maps hidden states [tokens, size] to the same shape."""
    forward = layer.forward
    calls: dict[int, int] = {}
    last: dict[int, Any] = {}

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        key = id(self)
        calls[key] = calls.get(key, 0) + 1
        before, last[key] = last.get(key), output[-1].clone()
        if before is not None and len(output) > 1 and calls[key] % EVERY == 0:
            output = output.clone()
            output[0] = before
        return output

    layer.forward = faulty
