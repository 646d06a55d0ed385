// Attention by products in fp32. A block of queries meets all keys that it may read: its scores lie in the first level
// of the cache, and softmax runs over whole rows of them.
#include "attention/fp32_products.h"
#include "attention/scores.h"
#include "attention/tasks.h"
#include "common/scratch.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

// Queries of a block. Backward's is longer: the keys' gradients are read and written once a block.
constexpr std::int64_t kQueries = kRows, kBackwardQueries = 4 * kRows;

// The keys and values of a sequence in fp32, and room for a block of queries.
struct Memory {
  Scratch<float> keys, keys_t, values, values_t, scores, grads, bends, rows, grad_rows, out_rows, dk, dv;
};

// Scores of their shares of the cap in powers of 2, and how steeply each follows its product.
void cap_row(float* row, float* bend_row, std::int64_t from, std::int64_t end, float cap) {
  for (std::int64_t j = from; j < end; j += kLanes) {
    const Vector share = tanh_of(load(row + j));
    store(share * cap, row + j);
    store(1.0f - share * share, bend_row + j);
  }
}

void multiply_row(const float* by, std::int64_t from, std::int64_t end, float* row) {
  for (std::int64_t j = from; j < end; j += kLanes) store(load(row + j) * load(by + j), row + j);
}

template <bool kBf16>
RERANK_FAST_INLINE void forward_of(const AttentionShape& shape, const AttentionForward& tensors,
                                   std::int64_t index, std::int64_t kv_head) {
  static thread_local Memory memory;
  const Sizes task(shape, index);
  const std::int64_t size = task.size, width = task.width, stride = task.stride;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads, keys_size = task.padded_keys * width;
  float* const keys = memory.keys.room(keys_size);
  float* const keys_t = memory.keys_t.room(keys_size);
  float* const values = memory.values.room(keys_size);
  float* const scores = memory.scores.room(kQueries * stride);
  float* const rows = memory.rows.room(kQueries * width);
  float* const out_rows = memory.out_rows.room(kQueries * width);
  read<kBf16>(tensors.k, kv_head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, keys);
  read<kBf16>(tensors.v, kv_head, task.first_k, task.num_k, size, width, task.num_k, 1.0f, values);
  as_columns(keys, task.padded_keys, width, keys_t);
  const Scores made(shape);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < task.num_q; first += kQueries) {
      const std::int64_t count = smaller(kQueries, task.num_q - first), token = task.first_q + first;
      const KeyRange range = task.readable(shape, first, first + count, kColumns);
      read<kBf16>(tensors.q, head, token, count, size, width, kQueries, made.factor, rows);
      const std::int64_t end = task.by_columns(rows, keys_t, range, scores);
      float rescale[kQueries];
      for (std::int64_t r = 0; r < count; ++r) {
        float* const row = scores + r * stride;
        if (made.capped) made.cap_row(row + range.from, end - range.from);
        task.mask(shape, first + r, range, end, row);
        const std::uint32_t drawn =
            dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
        tensors.lse[head * shape.num_queries + token + r] = softmax_row(
            row, range.from, end, task.reads_nothing(shape, first + r), dropout, drawn, rescale + r);
      }
      row_of_tiles<false>(scores + range.from, stride, 1, values + range.from * width, width, 1, range.to - range.from,
                          0, width, out_rows, width);
      for (std::int64_t r = 0; r < count; ++r)
        write<kBf16>(tensors.out, head, token + r, 1, size, width, rescale[r], out_rows + r * width);
    }
  }
}

template <bool kBf16>
RERANK_FAST_INLINE void backward_of(const AttentionShape& shape, const AttentionBackward& tensors,
                                    std::int64_t index, std::int64_t kv_head) {
  static thread_local Memory memory;
  const Sizes task(shape, index);
  const std::int64_t size = task.size, width = task.width, stride = task.stride;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads, keys_size = task.padded_keys * width;
  const std::int64_t grads_size = (task.num_k + kRows) * width;
  float* const keys = memory.keys.room(keys_size);
  float* const keys_t = memory.keys_t.room(keys_size);
  float* const values = memory.values.room(keys_size);
  float* const values_t = memory.values_t.room(keys_size);
  float* const weights = memory.scores.room(kBackwardQueries * stride);
  float* const slopes = memory.grads.room(kBackwardQueries * stride);
  float* const rows = memory.rows.room(kBackwardQueries * width);
  float* const grad_rows = memory.grad_rows.room(kBackwardQueries * width);
  float* const out_rows = memory.out_rows.room(kBackwardQueries * width);
  float* const dk = memory.dk.room(grads_size);
  float* const dv = memory.dv.room(grads_size);
  read<kBf16>(tensors.k, kv_head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, keys);
  read<kBf16>(tensors.v, kv_head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, values);
  as_columns(keys, task.padded_keys, width, keys_t);
  as_columns(values, task.padded_keys, width, values_t);
  fill(dk, grads_size, 0.0f);
  fill(dv, grads_size, 0.0f);
  const Scores made(shape);
  float* const bend_row = made.capped ? memory.bends.room(stride) : nullptr;
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < task.num_q; first += kBackwardQueries) {
      const std::int64_t count = smaller(kBackwardQueries, task.num_q - first), token = task.first_q + first;
      const std::int64_t padded = whole(count, kRows);
      const KeyRange range = task.readable(shape, first, first + count, kColumns);
      read<kBf16>(tensors.q, head, token, count, size, width, padded, made.factor, rows);
      read<kBf16>(tensors.grad_out, head, token, count, size, width, padded, 1.0f, grad_rows);
      read<kBf16>(tensors.out, head, token, count, size, width, padded, 1.0f, out_rows);
      std::int64_t end = range.from;
      for (std::int64_t r = 0; r < padded; r += kRows) {
        end = task.by_columns(rows + r * width, keys_t, range, weights + r * stride);
        task.by_columns(grad_rows + r * width, values_t, range, slopes + r * stride);
      }
      for (std::int64_t r = 0; r < count; ++r) {
        float *const weight_row = weights + r * stride, *const slope_row = slopes + r * stride;
        if (made.capped) cap_row(weight_row, bend_row, range.from, end, made.cap);
        task.mask(shape, first + r, range, end, weight_row);
        const std::uint32_t drawn =
            dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
        softmax_row_gradient(weight_row, slope_row, range.from, end,
                             along_of(out_rows + r * width, grad_rows + r * width, width),
                             tensors.lse[head * shape.num_queries + token + r], dropout, drawn);
        if (made.capped) multiply_row(bend_row, range.from, end, slope_row);
      }
      for (std::int64_t j = range.from; j < range.to; j += kRows) {
        row_of_tiles<true>(weights + j, 1, stride, grad_rows, width, 1, count, 0, width, dv + j * width, width);
        row_of_tiles<true>(slopes + j, 1, stride, rows, width, 1, count, 0, width, dk + j * width, width);
      }
      for (std::int64_t r = 0; r < padded; r += kRows)
        row_of_tiles<false>(slopes + r * stride + range.from, stride, 1, keys + range.from * width, width, 1,
                            range.to - range.from, 0, width, out_rows + r * width, width);
      write<kBf16>(tensors.dq, head, token, count, size, width, static_cast<float>(shape.scale), out_rows);
    }
  }
  // rows hold q times scale and log2(e), or over the cap: that is taken off.
  const float rest = made.capped ? static_cast<float>(shape.softcap) : 0.6931471805599453f;
  write<kBf16>(tensors.dk, kv_head, task.first_k, task.num_k, size, width, rest, dk);
  write<kBf16>(tensors.dv, kv_head, task.first_k, task.num_k, size, width, 1.0f, dv);
}

}  // namespace

void fp32_forward(const AttentionShape& shape, const AttentionForward& tensors, std::int64_t sequence,
                  std::int64_t kv_head) {
  shape.bf16 ? forward_of<true>(shape, tensors, sequence, kv_head)
             : forward_of<false>(shape, tensors, sequence, kv_head);
}

void fp32_backward(const AttentionShape& shape, const AttentionBackward& tensors, std::int64_t sequence,
                   std::int64_t kv_head) {
  shape.bf16 ? backward_of<true>(shape, tensors, sequence, kv_head)
             : backward_of<false>(shape, tensors, sequence, kv_head);
}

extern const AttentionKernels attention_kernels;
#if RERANK_FAST_BF16_PRODUCTS
const AttentionKernels attention_kernels = {fp32_forward,  fp32_backward,    bf16_forward,
                                            bf16_backward, relative_forward, relative_backward};
#else
const AttentionKernels attention_kernels = {fp32_forward, fp32_backward,    nullptr,
                                            nullptr,      relative_forward, relative_backward};
#endif

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
