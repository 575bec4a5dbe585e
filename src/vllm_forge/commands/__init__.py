"""What each command does: a few calls, and what is printed; one module per room.

Imports inside functions are lazy on purpose: a command pays for its own libraries only.
"""

from vllm_forge.commands import (
    census,
    docs,
    doctor,
    gpu,
    images,
    inspect,
    matrix,
    oracle,
    patches,
    plan,
    quantize,
    serve,
    sources,
    why,
)

MODULES = (
    images,
    sources,
    patches,
    matrix,
    plan,
    serve,
    doctor,
    why,
    quantize,
    inspect,
    oracle,
    census,
    gpu,
    docs,
)

__all__ = ["MODULES"]
