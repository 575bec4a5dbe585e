"""Kernel selection: what a line's own vLLM selects for a declared device."""
