// Runs the Marlin MoE kernel's own arithmetic on a CPU: marlin_source.py writes the .inc files from
// the release's text, in which constexpr became const so that one build serves every instance of
// the template. What is here stands in for CUDA and for what the text takes from elsewhere.

#include <algorithm>
#include <cstdint>

using std::max;
using std::min;

struct int4 {
  int x, y, z, w;
};
struct int2 {
  int x, y;
};
struct dim {
  unsigned x;  // as in CUDA: the text mixes it with int
};
static dim threadIdx, blockIdx, gridDim;

#include "constants.inc"

namespace {

void __syncthreads() {}
int __reduce_add_sync(unsigned, int count) { return count; }
void cp_async_fence() {}
template <int n>
void cp_async_wait() {}
template <typename To, typename From>
void cp_async4_pred(To*, const From*, bool) {}
template <typename To, typename From>
void cp_async1_ca_pred(To*, const From*, bool) {}

namespace vllm {
enum { kFE2M1f = 1, kFE4M3fn };
}

struct Cdtype {
  static float float2num(float value) { return value; }
  static float num2num2(float value) { return value; }
};

}  // namespace

#include "host.inc"

// All of one launch. Mirrored field by field in marlin_source.py.
struct Case {
  int thread_k, thread_n, threads;
  int block, weight_bits, group_size, activation_bytes, scale_bytes, zero_points, stages;
  int size_n, size_k, tokens, grid;
};

struct Part {
  int block, tile, row, rows, count, index, lock, acquired, c_tmp_end, writers;
};

extern "C" int host_cache_size(const Case* c) {
  thread_config_t config{c->thread_k, c->thread_n, c->threads};
  return get_kernel_cache_size(config, c->block == 8, div_ceil(c->block, 16), 1, c->size_n,
                               c->size_k, c->weight_bits, c->group_size,
#ifdef ACT_ORDER
                               false, true,
#endif
                               c->zero_points, false, c->activation_bytes == 1, c->stages);
}

extern "C" int host_config(int large, int index, int* k, int* n, int* threads) {
  const int count = large ? sizeof(large_batch_thread_configs) / sizeof(thread_config_t)
                          : sizeof(small_batch_thread_configs) / sizeof(thread_config_t);
  if (index >= count) return 0;
  const auto& config =
      large ? large_batch_thread_configs[index] : small_batch_thread_configs[index];
  *k = config.thread_k, *n = config.thread_n, *threads = config.num_threads;
  return 1;
}

struct Ids {
  long count;
  long size(int) const { return count; }
};

extern "C" long host_c_tmp_size(long size_n, long ids, int sms, long moe_block_size) {
  Ids sorted_token_ids{ids};
#include "c_tmp.inc"
  return max_c_tmp_size;
}

extern "C" int host_least_workspace(long size_n, long ids, int sms, long moe_block_size) {
  Ids sorted_token_ids{ids};
#include "workspace.inc"
  return min_workspace_size;
}

// Remembers how far it is written, and by how many threads.
struct Buffer {
  int end = 0;
  int4 dummy{};
  int4& operator[](int index) {
    end = max(end, index + 1);
    return dummy;
  }
};

static int4 sh[1 << 16];

// One thread block. Returns how many parts it has; *shared gets the bytes of its layout.
extern "C" int device_block(const Case* c, int block, Part* parts, int room, int* shared) {
  threadIdx.x = 0, blockIdx.x = block, gridDim.x = c->grid;
  const int threads = c->threads, thread_m_blocks = div_ceil(c->block, 16);
  const int thread_n_blocks = c->thread_n / 16, thread_k_blocks = c->thread_k / 16;
  const bool m_block_size_8 = c->block == 8, has_act_order = false, is_zp_float = false;
  const int stages = c->stages, group_blocks = c->group_size == -1 ? -1 : c->group_size / 16;
  const int moe_block_size = m_block_size_8 ? 8 : 16 * thread_m_blocks;
  const bool is_a_8bit = c->activation_bytes == 1, is_8bit_scale = c->scale_bytes == 1;
  const bool has_zp = c->zero_points, has_bias = false, mul_topk_weights = false;
  const bool use_atomic_add = false, use_fp32_reduce = true;
  const int pack_factor = 32 / c->weight_bits, num_tokens_past_padded = c->tokens;
  const int prob_n = c->size_n, prob_k = c->size_k, prob_m = 1, top_k = 1;
  const int scales_expert_stride = 0, zp_expert_stride = 0, b_bias_expert_stride = 0;
  const int b_type = 0, s_type = 0;
  struct {
    int bits;
    int size_bits() const { return bits; }
  } b_size{c->weight_bits};
  float global_scale_f32 = 1;
  using c_scalar_t2 = float;
  // One expert, and no element of it is looked at.
  static int32_t one_expert[1 << 20], ids[64];
  static int locks[1 << 20], group_index[1];
  static float floats[64];
  const int32_t *sorted_token_ids_ptr = ids, *expert_ids_ptr = one_expert;
  const float *topk_weights_ptr = floats, *a_scales_ptr = floats, *global_scale_ptr = floats;
  const int4 *scales_ptr = sh, *zp_ptr = sh, *b_bias_ptr = sh;
  const int* g_idx = group_index;
  int4 C[1 << 12];
  float frag_c[4 * 4 * 2 * 4] = {};
  Buffer C_tmp;

#include "partition.inc"
#include "strides.inc"
#include "shared.inc"
  *shared = (sh_a - sh + stages * moe_block_size * a_sh_stride) * sizeof(int4);

#include "reduce.inc"
  int count = 0, acquired = -1;
  int* const first_lock = locks;
  auto barrier_acquire = [&](int* lock, int) { acquired = lock - first_lock; };
  auto barrier_release = [&](int*, bool) {};
  while (slice_iters) {
    if (count == room) return -1;
    acquired = -1, C_tmp.end = 0;
    bool last = slice_idx == slice_count - 1;
    int writers = 0;
    block_num_valid_tokens = moe_block_size;
    for (threadIdx.x = 0; threadIdx.x < (unsigned)threads; threadIdx.x++) {
      int before = C_tmp.end;
      C_tmp.end = 0;
#include "turn.inc"
      writers += C_tmp.end > 0;
      C_tmp.end = max(C_tmp.end, before);
    }
    threadIdx.x = 0;
    parts[count++] = {block,       par_id * n_tiles + slice_col, slice_row, slice_iters, slice_count,
                      slice_idx,   locks_off,                    acquired,  4 * C_tmp.end, writers};
    slice_iters = 0;
#include "advance.inc"
  }
  return count;
}
