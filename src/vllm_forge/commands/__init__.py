"""Parse, call, print: one module a group of commands.

Imports inside functions are lazy on purpose: a command pays for its own libraries only.
"""

from vllm_forge.commands import (
    bench,
    build,
    checkpoint,
    develop,
    dispatch,
    gpu,
    patch,
    release,
    serve,
)

MODULES = (build, serve, patch, checkpoint, gpu, dispatch, release, bench, develop)

__all__ = ["MODULES"]
