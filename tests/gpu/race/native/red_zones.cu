// An allocator for torch (CUDAPluggableAllocator) that puts a red zone on either side of each block
// and fills the block with 0xFF, NaN in every floating-point type: what an op writes outside its
// buffers is found, and what it reads before writing is seen in its result. It is the only way to
// guard a buffer that an op allocates itself.
//
// Zones are exact to the byte. They are looked at when a block is freed, and on zones_check; the
// device is synchronized then, so stress needs another allocator.

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

// What is known of a block. Offsets are bytes from its start, NONE where there is no such byte. Not
// in the unnamed namespace: zones_check would then not be exported, its parameter being unnamed.
struct Block {
  long size;
  long first_outside, last_outside;  // of what was written outside
  long last_inside;                  // the last byte that is not the poison any more
};

namespace {

constexpr size_t ALIGN = 512;
constexpr long NONE = LONG_MAX;
constexpr unsigned char ZONE = 0xA5, BODY = 0xFF;

struct Live {
  long size;
  unsigned char* raw;
};

std::mutex guard;
std::map<unsigned char*, Live> live;
std::vector<Block> freed;
long* found = nullptr;

size_t zone() {
  static const size_t bytes = [] {
    const char* named = getenv("RED_ZONE_BYTES");
    const size_t wanted = named ? strtoul(named, nullptr, 10) : size_t{1} << 20;
    return (wanted + ALIGN - 1) / ALIGN * ALIGN;
  }();
  return bytes;
}

size_t rounded(long size) { return (static_cast<size_t>(size) + ALIGN - 1) / ALIGN * ALIGN; }

__global__ void scan(const unsigned char* from, long bytes, long base, unsigned char expected,
                     long long* range) {
  const long stride = static_cast<long>(gridDim.x) * blockDim.x;
  long long first = LONG_MAX, last = LONG_MIN;
  for (long i = static_cast<long>(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) {
    if (from[i] == expected) continue;
    if (first == LONG_MAX) first = base + i;
    last = base + i;
  }
  if (first == LONG_MAX) return;
  atomicMin(range, first);
  atomicMax(range + 1, last);
}

void look(const unsigned char* from, long bytes, long base, unsigned char expected) {
  if (bytes > 0)
    scan<<<256, 256>>>(from, bytes, base, expected, reinterpret_cast<long long*>(found));
}

void range_of(long* first, long* last) {
  long host[2];
  cudaMemcpy(host, found, sizeof(host), cudaMemcpyDeviceToHost);
  *first = host[0];
  *last = host[0] == LONG_MAX ? NONE : host[1];
}

void clear() {
  const long host[2] = {LONG_MAX, LONG_MIN};
  cudaMemcpy(found, host, sizeof(host), cudaMemcpyHostToDevice);
}

Block inspect(unsigned char* block, const Live& entry) {
  Block result{entry.size, NONE, NONE, NONE};
  if (!found) cudaMalloc(&found, 2 * sizeof(long));
  const long edge = static_cast<long>(zone());
  clear();
  look(entry.raw, edge, -edge, ZONE);
  look(block + entry.size, static_cast<long>(rounded(entry.size)) - entry.size + edge, entry.size,
       ZONE);
  long before = 0;
  range_of(&result.first_outside, &result.last_outside);
  clear();
  look(block, entry.size, 0, BODY);
  range_of(&before, &result.last_inside);
  return result;
}

}  // namespace

extern "C" void* zones_malloc(ssize_t size, int device, cudaStream_t stream) {
  if (size == 0) return nullptr;
  std::lock_guard<std::mutex> held(guard);
  cudaSetDevice(device);
  const size_t edge = zone(), body = rounded(size);
  unsigned char* raw = nullptr;
  if (cudaMalloc(&raw, body + 2 * edge) != cudaSuccess) return nullptr;
  cudaMemset(raw, ZONE, body + 2 * edge);
  cudaMemset(raw + edge, BODY, size);
  cudaDeviceSynchronize();
  live[raw + edge] = {static_cast<long>(size), raw};
  return raw + edge;
}

extern "C" void zones_free(void* pointer, ssize_t, int device, cudaStream_t) {
  if (!pointer) return;
  std::lock_guard<std::mutex> held(guard);
  cudaSetDevice(device);
  cudaDeviceSynchronize();
  const auto entry = live.find(static_cast<unsigned char*>(pointer));
  if (entry == live.end()) return;
  freed.push_back(inspect(entry->first, entry->second));
  cudaFree(entry->second.raw);
  live.erase(entry);
}

// Look at all live blocks; how many of them, or of those freed since the last call, were written
// around. Copies up to `room` records of freed blocks, then forgets them.
extern "C" long zones_check(Block* records, long room, long* count) {
  std::lock_guard<std::mutex> held(guard);
  cudaDeviceSynchronize();
  long bad = 0, copied = 0;
  for (const Block& block : freed) {
    bad += block.first_outside != NONE;
    if (copied < room) records[copied++] = block;
  }
  freed.clear();
  for (const auto& [block, entry] : live) {
    const Block state = inspect(block, entry);
    if (state.first_outside == NONE) continue;
    bad += 1;
    if (copied < room) records[copied++] = state;
  }
  *count = copied;
  return bad;
}

extern "C" int zones_error() { return cudaGetLastError(); }
