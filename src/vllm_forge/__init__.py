"""vllm-forge: patched vLLM images whose every claim is checked before it ships."""

from importlib.metadata import version

__version__ = version("vllm-forge")
