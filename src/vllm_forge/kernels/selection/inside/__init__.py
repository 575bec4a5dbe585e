"""The part that runs inside a line's environment, by its own Python, without network or GPU.

Imports the standard library, torch and vLLM, and nothing else of vllm_forge. It is mounted as a
package named ``inside`` and started by ``from inside.main import main``.
"""
