"""Runs the suite of tests/gpu in an image, and packs it for hosts offline."""
