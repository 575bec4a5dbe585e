"""vllm-forge: patched vLLM images whose every claim is checked before it ships."""

__version__ = "0.1.0"
