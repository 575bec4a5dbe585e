"""What each line selects on each GPU; a unit test holds it to records/selection.

Of the artifact with experts in NVFP4. On other lines, other kernels: those tests say so and fail.
"""

from __future__ import annotations

# Marker -> backend of the routed experts.
EXPERTS = {
    "sm_90": "MARLIN",
    "sm_100": "FLASHINFER_TRTLLM",
    "sm_103": "FLASHINFER_TRTLLM",
    "sm_120": "FLASHINFER_CUTLASS",
}
# Marker -> kernel of the FP8 linear layers.
LINEAR = {
    "sm_90": "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
    "sm_100": "DeepGemmFp8BlockScaledMMKernel",
    "sm_103": "DeepGemmFp8BlockScaledMMKernel",
    "sm_120": "DeepGemmFp8BlockScaledMMKernel",
}
ARTIFACT, LINE = "flash-nvfp4-fp8-mtp", "0.26"


def quantizes(backend: str) -> bool:
    """Whether it quantizes activations."""
    return backend != "MARLIN"
