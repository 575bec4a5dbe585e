// What the race tests run on the GPU besides the kernel under test. Plain CUDA with a C interface,
// for ctypes; every launch goes to the stream it is given, so that graphs capture it.
//
// check_launch compares a result with the first one and the lock workspace with zero, counts, and
// then poisons the result with NaN bits: a launch that writes nothing is seen by the next check.
//
// micro_* is the kernel's cross-block sum without the rest of it, with one fault each. A wait is
// bounded: a lock that is never freed becomes a count instead of a GPU that hangs.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

__global__ void check(uint4* result, const uint4* first, long vectors, const int* locks, int count,
                      unsigned long long* found) {
  bool differs = false, dirty = false;
  for (long i = threadIdx.x; i < vectors; i += blockDim.x) {
    const uint4 a = result[i], b = first[i];
    differs |= a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w;
    result[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
  for (int i = threadIdx.x; i < count; i += blockDim.x) dirty |= locks[i] != 0;
  differs = __syncthreads_or(differs);
  dirty = __syncthreads_or(dirty);
  if (threadIdx.x == 0) {
    found[0] += 1;
    found[1] += differs;
    found[2] += dirty;
  }
}

enum Fault { CLEAN, NO_WAIT, EARLY_RELEASE, NO_RESET, LOCK_ALIAS, SLOT_OVERLAP, STALE_READ, FAULTS };

constexpr long PATIENCE = 1 << 20;

__device__ void acquire(int* lock, int turn, int* hung) {
  if (threadIdx.x == 0) {
    int state;
    long tries = 0;
    do {
      asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(state) : "l"(lock) : "memory");
      if (++tries > PATIENCE) {
        atomicAdd(hung, 1);
        break;
      }
    } while (state != turn);
  }
  __syncthreads();
}

__device__ void release(int* lock, bool last, bool reset) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (last) {
    if (reset) *lock = 0;
    return;
  }
  asm volatile("fence.acq_rel.gpu;\n red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(lock)
               : "memory");
}

// A tile is summed by `parts` blocks in turn; the last block of a tile takes the first turn.
template <int FAULT>
__global__ void micro(const float* a, const float* w, float* out, float* slots, int* locks, int k,
                      int parts, int delay, int* hung) {
  const int tile = blockIdx.x / parts, part = blockIdx.x % parts, turn = parts - 1 - part;
  const int from = static_cast<int>(static_cast<long>(k) * part / parts);
  const int to = static_cast<int>(static_cast<long>(k) * (part + 1) / parts);
  float sum = 0;
  for (int i = from; i < to; i++)
    sum = fmaf(a[i], w[(static_cast<long>(tile) * k + i) * blockDim.x + threadIdx.x], sum);
  int* lock = locks + (FAULT == LOCK_ALIAS ? tile / 2 : tile);
  float* slot = slots + static_cast<long>(FAULT == SLOT_OVERLAP ? tile / 2 : tile) * blockDim.x +
                threadIdx.x;
  const bool first = turn == 0, last = turn == parts - 1;
  float before = 0;
  if (FAULT == STALE_READ && !first) asm volatile("ld.global.f32 %0, [%1];" : "=f"(before) : "l"(slot));
  if (FAULT == NO_WAIT)
    __syncthreads();
  else
    acquire(lock, turn, hung);
  if (FAULT == EARLY_RELEASE) {
    release(lock, last, true);
    // Not the last: if all are late by as much, each still comes after the one before it.
    for (long long start = clock64(); !last && clock64() - start < delay;) {
    }
  }
  if (!first) sum += FAULT == STALE_READ ? before : *slot;
  if (!last) *slot = sum;
  if (FAULT != EARLY_RELEASE) release(lock, last, FAULT != NO_RESET);
  if (last) out[static_cast<long>(tile) * blockDim.x + threadIdx.x] = sum;
}

template <int FAULT>
int launch(int fault, const float* a, const float* w, float* out, float* slots, int* locks, int k,
           int tiles, int parts, int n, int delay, int* hung, cudaStream_t stream) {
  if constexpr (FAULT == FAULTS) {
    return cudaErrorInvalidValue;
  } else {
    if (fault != FAULT)
      return launch<FAULT + 1>(fault, a, w, out, slots, locks, k, tiles, parts, n, delay, hung,
                               stream);
    micro<FAULT><<<tiles * parts, n, 0, stream>>>(a, w, out, slots, locks, k, parts, delay, hung);
    return cudaGetLastError();
  }
}

}  // namespace

// found: launches, launches whose result differs, launches that left a lock.
extern "C" int check_launch(void* result, const void* first, long bytes, const int* locks,
                            int count, unsigned long long* found, cudaStream_t stream) {
  if (bytes % sizeof(uint4)) return cudaErrorInvalidValue;
  check<<<1, 1024, 0, stream>>>(static_cast<uint4*>(result), static_cast<const uint4*>(first),
                                bytes / sizeof(uint4), locks, count, found);
  return cudaGetLastError();
}

extern "C" int micro_launch(int fault, const float* a, const float* w, float* out, float* slots,
                            int* locks, int k, int tiles, int parts, int n, int delay, int* hung,
                            cudaStream_t stream) {
  return launch<0>(fault, a, w, out, slots, locks, k, tiles, parts, n, delay, hung, stream);
}
