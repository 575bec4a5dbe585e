"""What runs on the GPU host beside the tests.

Imports the standard library, errors, and what a line's vLLM brings (pytest apart): an image and a
kit hold this room without the project's other dependencies.
"""
