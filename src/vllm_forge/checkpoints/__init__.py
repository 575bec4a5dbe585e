"""Checkpoints: tiny ones, the quantization recipe, and an inspector (headers only)."""
