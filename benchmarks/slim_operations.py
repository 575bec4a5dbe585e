"""Operations of torch that reach into its CUDA libraries; prints a digest of each result.

python benchmarks/slim_operations.py results.json
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
import torch.nn.functional as fn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

CUDA = torch.device("cuda")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def digest(result: Any) -> str:
    """SHA-256 over the bytes of one tensor or several."""
    torch.cuda.synchronize()
    tensors = result if isinstance(result, (tuple, list)) else [result]
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(ctypes.string_at(flat.data_ptr(), flat.numel()))
    return total.hexdigest()


def operations() -> dict[str, Callable[[], Any]]:
    """Name -> call; each draws its inputs from one seeded generator, so the order is fixed."""
    generator = torch.Generator(CUDA).manual_seed(1)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA).to(dtype)

    def product(rows: int, dtype: torch.dtype) -> torch.Tensor:
        return draw(rows, 768, dtype=dtype) @ draw(768, 384, dtype=dtype)

    def batched(dtype: torch.dtype) -> torch.Tensor:
        return torch.bmm(draw(8, 65, 128, dtype=dtype), draw(8, 128, 33, dtype=dtype))

    def convolution(dtype: torch.dtype) -> torch.Tensor:
        return fn.conv2d(draw(4, 16, 32, 32, dtype=dtype), draw(32, 16, 3, 3, dtype=dtype))

    found: dict[str, Callable[[], Any]] = {}
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        found[f"gemm {name}"] = partial(product, 512, dtype)
        found[f"gemv {name}"] = partial(product, 1, dtype)
        found[f"batched gemm {name}"] = partial(batched, dtype)
        found[f"convolution {name}"] = partial(convolution, dtype)

    def integers(rows: int, columns: int) -> torch.Tensor:
        shape = (rows, columns)
        return torch.randint(-9, 9, shape, generator=generator, device=CUDA, dtype=torch.int8)

    def fp8() -> torch.Tensor:
        left, right = draw(256, 512), draw(384, 512)
        one = torch.ones((), device=CUDA)
        e4m3 = torch.float8_e4m3fn
        return torch._scaled_mm(
            left.to(e4m3), right.to(e4m3).t(), one, one, out_dtype=torch.bfloat16
        )

    def attention(backend: str) -> torch.Tensor:
        query, key, value = (draw(2, 8, 128, 64, dtype=torch.bfloat16) for _ in range(3))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return fn.scaled_dot_product_attention(query, key, value, is_causal=True)

    def semi_structured() -> torch.Tensor:
        mask = torch.tensor([1, 1, 0, 0], device=CUDA, dtype=torch.bool).tile((128, 32))
        weight = draw(128, 128, dtype=torch.bfloat16) * mask
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        return torch.mm(sparse, draw(128, 128, dtype=torch.bfloat16))

    def collectives() -> tuple[torch.Tensor, torch.Tensor]:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        torch.distributed.init_process_group("nccl", rank=0, world_size=1)
        ones, all_ = torch.ones(1000, device=CUDA), torch.empty(1000, device=CUDA)
        torch.distributed.all_reduce(ones)
        torch.distributed.all_gather_into_tensor(all_, ones)
        torch.distributed.destroy_process_group()
        return ones, all_

    def recurrent() -> torch.Tensor:
        torch.manual_seed(2)
        output: torch.Tensor = torch.nn.LSTM(32, 32).to(CUDA)(draw(5, 2, 32))[0]
        return output

    def definite() -> torch.Tensor:
        square = draw(64, 64)
        return square @ square.T + 64 * torch.eye(64, device=CUDA)

    def ctc() -> torch.Tensor:
        targets = torch.ones(4, 10, dtype=torch.int32)
        sizes = torch.full((4,), 50, dtype=torch.int32), torch.full((4,), 10, dtype=torch.int32)
        return fn.ctc_loss(draw(50, 4, 20).log_softmax(2), targets, *sizes)

    eye = torch.eye(64, device=CUDA)
    found |= {f"attention {name}": partial(attention, name) for name in BACKENDS}
    found |= {
        "gemm int8": lambda: torch._int_mm(integers(64, 128), integers(128, 64)),
        "gemm fp8": fp8,
        "fft": lambda: torch.view_as_real(torch.fft.fft(draw(16, 1000))),
        "real fft, 2-d": lambda: torch.view_as_real(torch.fft.rfft2(draw(4, 64, 96))),
        "solve": lambda: torch.linalg.solve(definite(), draw(64, 3)),
        "cholesky": lambda: torch.linalg.cholesky(definite()),
        "singular values": lambda: torch.linalg.svdvals(draw(64, 64)),
        "qr": lambda: torch.linalg.qr(draw(64, 64)),
        "eigenvalues": lambda: torch.linalg.eigvalsh(definite()),
        "determinant": lambda: torch.linalg.det(definite() / 64),
        "sparse csr": lambda: torch.sparse.mm(eye.to_sparse_csr(), draw(64, 32)),
        "sparse coo": lambda: torch.sparse.mm(eye.to_sparse(), draw(64, 32)),
        "sparse 2:4": semi_structured,
        "sort": lambda: draw(1 << 20).sort(),
        "top-k": lambda: draw(64, 4096).topk(8),
        "cumulative sum": lambda: draw(4096).cumsum(0),
        "softmax": lambda: draw(64, 4096).softmax(-1),
        "random": lambda: torch.rand(1000, generator=generator, device=CUDA),
        "embedding": lambda: fn.embedding(torch.arange(9, device=CUDA), draw(10, 8)),
        "layer norm": lambda: fn.layer_norm(draw(32, 256), (256,)),
        "batch norm": lambda: fn.batch_norm(draw(8, 16, 9, 9), None, None, training=True),
        "lstm": recurrent,
        "ctc": ctc,
        "nccl": collectives,
        "inductor": lambda: torch.compile(lambda x: torch.sin(x) * 2 + x.sum())(draw(1000)),
    }
    return found


def main() -> None:
    """Run all; an operation that raises ends the run."""
    Path(sys.argv[1]).write_text(
        json.dumps({name: digest(call()) for name, call in operations().items()})
    )


if __name__ == "__main__":
    main()
