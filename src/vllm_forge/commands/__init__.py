"""Parse, call, print: one module a group of commands.

Imports inside functions are lazy on purpose: a command pays for its own libraries only.
"""

from vllm_forge.commands import bench, build, checkpoint, docs, gpu, kernels, patch, serve, wheels

MODULES = (build, serve, patch, kernels, checkpoint, gpu, wheels, docs, bench)

__all__ = ["MODULES"]
