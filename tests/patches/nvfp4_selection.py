"""Asks the pinned vLLM which NVFP4 MoE backend it takes, with the devices' answers given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

SWIGLU_LIMIT = 10.0


class _MoEConfig(SimpleNamespace):
    """Unset values read as None, false in every question that selection asks."""

    def __getattr__(self, name: str) -> None:
        return None


def select_backend(
    monkeypatch: pytest.MonkeyPatch, *, supported: set[str], requested: str = "auto"
) -> str:
    """The backend for a model with a SwiGLU limit when exactly `supported` fit the device."""
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    def kernels_of(backend: Any) -> list[Any]:
        def is_supported_config(*_: object) -> tuple[bool, str | None]:
            return backend.name in supported, None

        return [SimpleNamespace(is_supported_config=is_supported_config)]

    monkeypatch.setattr(nvfp4, "backend_to_kernel_cls", kernels_of)
    config = _MoEConfig(
        swiglu_limit=SWIGLU_LIMIT, moe_backend=requested, moe_parallel_config=_MoEConfig()
    )
    backend, _ = nvfp4.select_nvfp4_moe_backend(config, None, None)
    return str(backend.name)
