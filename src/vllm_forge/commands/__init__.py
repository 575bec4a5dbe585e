"""What each command does: a few calls, and what is printed; one module per room.

Imports inside functions are lazy on purpose: a command pays for its own libraries only.
"""

from vllm_forge.commands import images, matrix, patches, sources

MODULES = (images, sources, patches, matrix)

__all__ = ["MODULES"]
