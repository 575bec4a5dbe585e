"""Runs of a line's vLLM in the environment of its images: proofs, kernel selection, dry loads.

The room is above images/ because it mounts the files of an image: its system and its layers.
"""
