"""Runs the suite of tests/gpu in an image or an environment, and packs it for hosts offline."""
