// Attention whose scores have terms by the distance of query and key. The tables of a head are laid out by distance
// once for all sequences of a part: what a block of queries takes from them is then a product of rows that lie one
// after the other, moved by one place from row to row.
#include "attention/fp32_products.h"
#include "attention/tasks.h"
#include "common/scratch.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {
namespace {

// Queries of a block, and rows that are moved together: both whole rows of tiles, and whole squares of 4 x 4.
constexpr std::int64_t kQueries = 16 * kRows, kGroup = 2 * kRows;
constexpr std::int64_t kSlack = 2 * kColumns;  // what rounding to tiles adds to a range of distances
static_assert(kGroup % 4 == 0 && kQueries % kGroup == 0, "rows are turned round in squares of 4 x 4");

RERANK_FAST_INLINE std::int64_t clamped(std::int64_t value, std::int64_t lowest, std::int64_t highest) {
  return larger(lowest, smaller(value, highest));
}

// The place of query i. Beyond reach of all keys it is not told from the first place that is.
RERANK_FAST_INLINE std::int64_t position(const Sequence& task, const RelativeTerms& terms, std::int64_t i) {
  const std::int64_t place =
      terms.query_positions == nullptr ? i + task.num_k - task.num_q : terms.query_positions[task.first_q + i];
  return clamped(place, -terms.reach, task.num_k - 1 + terms.reach);
}

struct Block {
  std::int64_t first, count, place;  // of queries one place after the other; the first one's place
};

RERANK_FAST_INLINE Block block_from(const Sequence& task, const RelativeTerms& terms, std::int64_t first) {
  Block block{first, 1, position(task, terms, first)};
  while (block.count < kQueries && first + block.count < task.num_q &&
         position(task, terms, first + block.count) == block.place + block.count)
    ++block.count;
  return block;
}

struct PartMemory {
  Scratch<float> keys_by_distance, keys_by_distance_t, queries_by_distance, queries_by_distance_t, bias, d_keys,
      d_queries, d_bias;
  Scratch<float> keys, keys_t, values, values_t, scores, grads, rows, grad_rows, out_rows, dk, dv, band;
};

// The sequences of a part, and one head's tables by distance. What meets keys counts distances down, so that the next
// key has the next row: row u is of distance farthest - u. What meets queries counts them up: row u is of nearest + u.
template <bool kBf16>
struct Part {
  const AttentionShape& shape;
  const RelativeTerms& terms;
  PartMemory& memory;
  std::int64_t head, first, last;  // sequences
  std::int64_t nearest = 0, farthest = 0, count = 0, padded = 0, size, width;
  float *keys = nullptr, *keys_t = nullptr, *queries = nullptr, *queries_t = nullptr, *bias = nullptr;

  RERANK_FAST_INLINE Part(const AttentionShape& shape_, const RelativeTerms& terms_, PartMemory& memory_,
                          std::int64_t part, std::int64_t head_)
      : shape(shape_),
        terms(terms_),
        memory(memory_),
        head(head_),
        first(part * shape.num_sequences / terms.num_parts),
        last((part + 1) * shape.num_sequences / terms.num_parts),
        size(shape.head_size),
        width(whole(size, kLanes)) {
    bool any = false;
    for (std::int64_t n = first; n < last; ++n) {
      const Sequence task(shape, n);
      if (task.num_k == 0) continue;
      for (std::int64_t i = 0; i < task.num_q; ++i) {
        const std::int64_t place = position(task, terms, i), near = place - (task.num_k - 1);
        nearest = any ? smaller(nearest, near) : near;
        farthest = any ? larger(farthest, place) : place;
        any = true;
        // In order, all but the first and the last are between them.
        if (terms.query_positions == nullptr && i == 0 && task.num_q > 1) i = task.num_q - 2;
      }
    }
    count = any ? farthest - nearest + 1 : 0;
    padded = whole(count, kColumns);
    if (count == 0) return;
    if (terms.keys.data != nullptr) {
      keys = memory.keys_by_distance.room(padded * width);
      keys_t = memory.keys_by_distance_t.room(padded * width);
      lay_out(terms.keys, 1.0f, -1, keys, keys_t);
    }
    if (terms.queries.data != nullptr) {
      queries = memory.queries_by_distance.room(padded * width);
      queries_t = memory.queries_by_distance_t.room(padded * width);
      lay_out(terms.queries, static_cast<float>(shape.scale * kLog2E), 1, queries, queries_t);
    }
    if (terms.bias != nullptr) {
      bias = memory.bias.room(padded + kLanes);
      fill(bias, padded + kLanes, 0.0f);
      for (std::int64_t u = 0; u < count; ++u)
        bias[u] = static_cast<float>(kLog2E) * terms.bias[slot(u, -1) * shape.num_heads + head];
    }
  }

  // Of row u, of a table that counts distances up or down.
  RERANK_FAST_INLINE std::int64_t slot(std::int64_t u, int direction) const {
    const std::int64_t distance = direction < 0 ? farthest - u : nearest + u;
    return terms.slots[clamped(distance, -terms.reach, terms.reach) + terms.reach];
  }

  RERANK_FAST_INLINE void lay_out(const Rows& table, float factor, int direction, float* rows, float* columns) const {
    for (std::int64_t u = 0; u < count; ++u)
      read<kBf16>(table, head, slot(u, direction), 1, size, width, 1, factor, rows + u * width);
    fill(rows + count * width, (padded - count) * width, 0.0f);
    as_columns(rows, padded, width, columns);
  }

  // band (kRows, band_stride) = rows (kRows, width) x the tiles of a table, for its rows [begin, end) and what whole
  // tiles and registers add to them; column 0 of band is the table's row `base`, a whole tile's.
  RERANK_FAST_INLINE void meet(const float* rows, const float* tiles, std::int64_t begin, std::int64_t end,
                               std::int64_t base, float* band, std::int64_t band_stride) const {
    const std::int64_t from = begin / kColumns * kColumns;
    row_of_tiles<false>(rows, width, 1, tiles + base * width, kColumns, width, size, from - base,
                        whole(end, kLanes) - base, band, band_stride);
  }

  RERANK_FAST_INLINE std::int64_t band_stride(const Sizes& task) const {
    return larger(task.padded_keys, kQueries) + kGroup + kBeyond + kSlack;
  }

  // scores (count, stride) of a block += their terms. rows are its queries, times the scale and log2(e), and
  // task_keys the sequence's keys, followed by kGroup rows of 0.
  RERANK_FAST_INLINE void add_to_scores(const Sizes& task, const Block& block, const float* rows,
                                        const float* task_keys, float* scores) const {
    const std::int64_t stride = task.stride, row_of_first = farthest - block.place;  // of the block's first query
    const std::int64_t band_columns = band_stride(task);
    float* const band = memory.band.room(kGroup * band_columns);
    for (std::int64_t r = 0; keys != nullptr && r < block.count; r += kRows) {
      const std::int64_t end_r = smaller(r + kRows, block.count), begin = row_of_first - (end_r - 1);
      const std::int64_t base = begin / kColumns * kColumns;
      meet(rows + r * width, keys_t, begin, row_of_first - r + task.num_k, base, band, band_columns);
      for (std::int64_t i = r; i < end_r; ++i) {
        const float* const moved = band + (i - r) * band_columns + row_of_first - i - base;
        add_row(moved, task.num_k, scores + i * stride);
      }
    }
    for (std::int64_t i = 0; bias != nullptr && i < block.count; ++i)
      add_row(bias + row_of_first - i, task.num_k, scores + i * stride);
    for (std::int64_t j = 0; queries != nullptr && j < task.num_k; j += kGroup) {
      const std::int64_t base = first_of_group(task, block, j) / kColumns * kColumns;
      for (std::int64_t n = j; n < smaller(j + kGroup, task.num_k); n += kRows)
        meet(task_keys + n * width, queries_t, first_of(task, block, n, kRows), end_of(block, n), base,
             band + (n - j) * band_columns, band_columns);
      for (std::int64_t n = j; n < smaller(j + kGroup, task.num_k); n += 4) {
        const float* const moved = band + (n - j) * band_columns + block.place - n - nearest - base;
        for (std::int64_t i = 0; i < block.count; i += 4) {
          FourLanes square[4];
#pragma GCC unroll 4
          for (int m = 0; m < 4; ++m) {
            // Beyond the last key there is no row of the band: what is read there is not used.
            const float* const from = moved + (n + m < task.num_k ? m * (band_columns - 1) : 0) + i;
            std::memcpy(&square[m], from, sizeof square[m]);
          }
          transpose(square);
#pragma GCC unroll 4
          for (int m = 0; m < 4; ++m) {
            float* const to = scores + (i + m) * stride + n;
            FourLanes score;
            std::memcpy(&score, to, sizeof score);
            score += square[m];
            std::memcpy(to, &score, sizeof score);
          }
        }
      }
    }
  }

  // The rows of queries that a block meets with keys [j, end_j) of the sequence: from the farthest key's on.
  RERANK_FAST_INLINE std::int64_t first_of(const Sizes& task, const Block& block, std::int64_t j,
                                           std::int64_t number) const {
    return block.place - (smaller(j + number, task.num_k) - 1) - nearest;
  }
  RERANK_FAST_INLINE std::int64_t first_of_group(const Sizes& task, const Block& block, std::int64_t j) const {
    return first_of(task, block, j, kGroup);
  }
  RERANK_FAST_INLINE std::int64_t end_of(const Block& block, std::int64_t j) const {
    return block.place + block.count - j - nearest;
  }

  // Registers beyond count are garbage in the result: masked later.
  static RERANK_FAST_INLINE void add_row(const float* from, std::int64_t count, float* to) {
    for (std::int64_t j = 0; j < count; j += kLanes) store(load(to + j) + load(from + j), to + j);
  }
};

// What is beyond the keys among the scores of a query: minus infinity.
RERANK_FAST_INLINE void mask_row(const Sizes& task, float* row) {
  for (std::int64_t j = task.num_k; j < whole(task.num_k, kLanes); ++j) row[j] = -kInfinity;
}

// along_of from a query's scores and its weights' gradients. An out that was rounded to bf16 would be off by more than
// what is left of the gradients of scores, and of tables, where all keys weigh nearly the same.
RERANK_FAST_INLINE float along_row(const float* scores, const float* slopes, std::int64_t end, float log_sum,
                                   const Dropout& dropout, std::uint32_t drawn) {
  Vector products = {};
  for (std::int64_t j = 0; j < end; j += kLanes) {
    Vector weight = exp2_below(load(scores + j) - log_sum);
    if (dropout.threshold != 0) weight *= dropout_factors(dropout, drawn, j);
    products += weight * load(slopes + j);
  }
  return sum<float>(products);
}

template <bool kBf16>
RERANK_FAST_INLINE void forward_of(const AttentionShape& shape, const RelativeTerms& terms,
                                   const AttentionForward& tensors, std::int64_t index, std::int64_t head) {
  static thread_local PartMemory memory;
  const Part<kBf16> part(shape, terms, memory, index, head);
  const std::int64_t size = part.size, width = part.width;
  const auto factor = static_cast<float>(shape.scale * kLog2E);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  float* const rows = memory.rows.room(kQueries * width);
  float* const out_rows = memory.out_rows.room(kQueries * width);
  for (std::int64_t n = part.first; n < part.last; ++n) {
    const Sizes task(shape, n);
    const std::int64_t stride = task.stride, keys_size = task.padded_keys * width;
    float* const keys = memory.keys.room(keys_size + kGroup * width);
    float* const keys_t = memory.keys_t.room(keys_size);
    float* const values = memory.values.room(keys_size);
    float* const scores = memory.scores.room(kQueries * stride);
    read<kBf16>(tensors.k, head, task.first_k, task.num_k, size, width, task.padded_keys + kGroup, 1.0f, keys);
    read<kBf16>(tensors.v, head, task.first_k, task.num_k, size, width, task.num_k, 1.0f, values);
    as_columns(keys, task.padded_keys, width, keys_t);
    const KeyRange range{0, task.num_k};
    for (Block block{0, 0, 0}; block.first + block.count < task.num_q;) {
      block = block_from(task, terms, block.first + block.count);
      const std::int64_t token = task.first_q + block.first, padded = whole(block.count, kRows);
      read<kBf16>(tensors.q, head, token, block.count, size, width, padded, factor, rows);
      for (std::int64_t r = 0; r < padded; r += kRows)
        task.by_columns(rows + r * width, keys_t, range, scores + r * stride);
      if (task.num_k > 0) part.add_to_scores(task, block, rows, keys, scores);
      float rescale[kQueries];
      const std::int64_t end = whole(task.num_k, kLanes);
      for (std::int64_t r = 0; r < block.count; ++r) {
        mask_row(task, scores + r * stride);
        const std::uint32_t drawn =
            dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
        tensors.lse[head * shape.num_queries + token + r] =
            softmax_row(scores + r * stride, 0, end, task.num_k == 0, dropout, drawn, rescale + r);
      }
      for (std::int64_t r = 0; r < padded; r += kRows)
        row_of_tiles<false>(scores + r * stride, stride, 1, values, width, 1, task.num_k, 0, width,
                            out_rows + r * width, width);
      for (std::int64_t r = 0; r < block.count; ++r)
        write<kBf16>(tensors.out, head, token + r, 1, size, width, rescale[r], out_rows + r * width);
    }
  }
}

// What a part's tables by distance get, and the sequence's queries and keys through them.
template <bool kBf16>
struct PartGradients {
  const Part<kBf16>& part;
  float *keys = nullptr, *queries = nullptr, *bias = nullptr;

  RERANK_FAST_INLINE explicit PartGradients(const Part<kBf16>& part_) : part(part_) {
    const std::int64_t rows = (part.count + kRows) * part.width;
    if (part.keys != nullptr) fill(keys = part.memory.d_keys.room(rows), rows, 0.0f);
    if (part.queries != nullptr) fill(queries = part.memory.d_queries.room(rows), rows, 0.0f);
    if (part.bias != nullptr) {
      bias = part.memory.d_bias.room(part.padded + kLanes);
      fill(bias, part.padded + kLanes, 0.0f);
    }
  }

  // slopes (count, stride) are the gradients of a block's scores, 0 beyond count as far as squares go, and beyond the
  // keys. rows are its queries times factors, to d_rows (count, width) and dk (num_k, width) is added.
  RERANK_FAST_INLINE void add(const Sizes& task, const Block& block, const float* rows, const float* task_keys,
                              const float* slopes, float* d_rows, float* dk) const {
    const std::int64_t stride = task.stride, row_of_first = part.farthest - block.place, width = part.width;
    const std::int64_t band_columns = part.band_stride(task);
    float* const band = part.memory.band.room(kGroup * band_columns);
    for (std::int64_t r = 0; keys != nullptr && r < block.count; r += kGroup) {
      const std::int64_t end_r = smaller(r + kGroup, block.count), begin = row_of_first - (end_r - 1);
      const std::int64_t columns = row_of_first - r + task.num_k - begin;
      fill(band, kGroup * band_columns, 0.0f);
      for (std::int64_t i = r; i < end_r; ++i)
        std::memcpy(band + (i - r) * band_columns + end_r - 1 - i, slopes + i * stride,
                    static_cast<std::size_t>(task.num_k) * sizeof(float));
      for (std::int64_t i = r; i < end_r; i += kRows)
        row_of_tiles<true>(band + (i - r) * band_columns, band_columns, 1, part.keys + begin * width, width, 1, columns,
                           0, width, d_rows + i * width, width);
      for (std::int64_t u = 0; u < columns; u += kRows)
        row_of_tiles<true>(band + u, 1, band_columns, rows + r * width, width, 1, end_r - r, 0, width,
                           keys + (begin + u) * width, width);
    }
    for (std::int64_t i = 0; bias != nullptr && i < block.count; ++i)
      part.add_row(slopes + i * stride, task.num_k, bias + row_of_first - i);
    for (std::int64_t j = 0; queries != nullptr && j < task.num_k; j += kGroup) {
      const std::int64_t begin = part.first_of_group(task, block, j), columns = part.end_of(block, j) - begin;
      const std::int64_t end_j = smaller(j + kGroup, task.num_k);
      fill(band, kGroup * band_columns, 0.0f);
      for (std::int64_t n = j; n < end_j; n += 4) {
        float* const moved = band + (n - j) * band_columns + block.place - n - part.nearest - begin;
        for (std::int64_t i = 0; i < block.count; i += 4) {
          FourLanes square[4];
#pragma GCC unroll 4
          for (int m = 0; m < 4; ++m) std::memcpy(&square[m], slopes + (i + m) * stride + n, sizeof square[m]);
          transpose(square);
          for (int m = 0; m < 4 && n + m < end_j; ++m)
            std::memcpy(moved + m * (band_columns - 1) + i, &square[m], sizeof square[m]);
        }
      }
      for (std::int64_t n = j; n < end_j; n += kRows)
        row_of_tiles<true>(band + (n - j) * band_columns, band_columns, 1, part.queries + begin * width, width, 1,
                           columns, 0, width, dk + n * width, width);
      for (std::int64_t u = 0; u < columns; u += kRows)
        row_of_tiles<true>(band + u, 1, band_columns, task_keys + j * width, width, 1, end_j - j, 0, width,
                           queries + (begin + u) * width, width);
    }
  }

  // The gradients by slot: (num_slots, size) of the part's and the head's.
  RERANK_FAST_INLINE void write_to(const RelativeGradients& to, std::int64_t index) const {
    const std::int64_t number = index * part.shape.num_heads + part.head, slots = part.terms.num_slots;
    // rows hold q times scale and log2(e): the latter is taken off.
    if (to.keys != nullptr) by_slot(keys, -1, 0.6931471805599453f, to.keys + number * slots * part.size);
    if (to.queries != nullptr)
      by_slot(queries, 1, static_cast<float>(part.shape.scale), to.queries + number * slots * part.size);
    if (to.bias == nullptr) return;
    float* const sums = to.bias + number * slots;
    fill(sums, slots, 0.0f);
    for (std::int64_t u = 0; u < part.count; ++u) sums[part.slot(u, -1)] += bias[u];
  }

  RERANK_FAST_INLINE void by_slot(const float* rows, int direction, float factor, float* to) const {
    fill(to, part.terms.num_slots * part.size, 0.0f);
    for (std::int64_t u = 0; u < part.count; ++u) {
      float* const sums = to + part.slot(u, direction) * part.size;
      for (std::int64_t e = 0; e < part.size; ++e) sums[e] += factor * rows[u * part.width + e];
    }
  }
};

template <bool kBf16>
RERANK_FAST_INLINE void backward_of(const AttentionShape& shape, const RelativeTerms& terms,
                                    const AttentionBackward& tensors, const RelativeGradients& gradients,
                                    std::int64_t index, std::int64_t head) {
  static thread_local PartMemory memory;
  const Part<kBf16> part(shape, terms, memory, index, head);
  const PartGradients<kBf16> tables(part);
  const std::int64_t size = part.size, width = part.width;
  const auto factor = static_cast<float>(shape.scale * kLog2E);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  float* const rows = memory.rows.room(kQueries * width);
  float* const grad_rows = memory.grad_rows.room(kQueries * width);
  float* const out_rows = memory.out_rows.room(kQueries * width);
  for (std::int64_t n = part.first; n < part.last; ++n) {
    const Sizes task(shape, n);
    const std::int64_t stride = task.stride, keys_size = task.padded_keys * width;
    const std::int64_t grads_size = (task.num_k + kRows) * width, end = whole(task.num_k, kLanes);
    float* const keys = memory.keys.room(keys_size + kGroup * width);
    float* const keys_t = memory.keys_t.room(keys_size);
    float* const values = memory.values.room(keys_size);
    float* const values_t = memory.values_t.room(keys_size);
    float* const weights = memory.scores.room(kQueries * stride);
    float* const slopes = memory.grads.room(kQueries * stride);
    float* const dk = memory.dk.room(grads_size);
    float* const dv = memory.dv.room(grads_size);
    read<kBf16>(tensors.k, head, task.first_k, task.num_k, size, width, task.padded_keys + kGroup, 1.0f, keys);
    read<kBf16>(tensors.v, head, task.first_k, task.num_k, size, width, task.padded_keys, 1.0f, values);
    as_columns(keys, task.padded_keys, width, keys_t);
    as_columns(values, task.padded_keys, width, values_t);
    fill(dk, grads_size, 0.0f);
    fill(dv, grads_size, 0.0f);
    const KeyRange range{0, task.num_k};
    for (Block block{0, 0, 0}; block.first + block.count < task.num_q;) {
      block = block_from(task, terms, block.first + block.count);
      const std::int64_t token = task.first_q + block.first, count = block.count, padded = whole(count, kRows);
      read<kBf16>(tensors.q, head, token, count, size, width, padded, factor, rows);
      read<kBf16>(tensors.grad_out, head, token, count, size, width, padded, 1.0f, grad_rows);
      read<kBf16>(tensors.out, head, token, count, size, width, padded, 1.0f, out_rows);
      for (std::int64_t r = 0; r < padded; r += kRows) {
        task.by_columns(rows + r * width, keys_t, range, weights + r * stride);
        task.by_columns(grad_rows + r * width, values_t, range, slopes + r * stride);
      }
      if (task.num_k > 0) part.add_to_scores(task, block, rows, keys, weights);
      for (std::int64_t r = 0; r < count; ++r) {
        mask_row(task, weights + r * stride);
        const std::uint32_t drawn =
            dropout.row(static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(token + r));
        float *const weight_row = weights + r * stride, *const slope_row = slopes + r * stride;
        const float log_sum = tensors.lse[head * shape.num_queries + token + r];
        const float along = kBf16 ? along_row(weight_row, slope_row, end, log_sum, dropout, drawn)
                                  : along_of(out_rows + r * width, grad_rows + r * width, width);
        softmax_row_gradient(weight_row, slope_row, 0, end, along, log_sum, dropout, drawn);
        fill(slope_row + task.num_k, end - task.num_k, 0.0f);  // not 0 times NaN
      }
      for (std::int64_t r = count; r < larger(padded, whole(count, 4)); ++r) fill(slopes + r * stride, stride, 0.0f);
      for (std::int64_t j = 0; j < task.num_k; j += kRows) {
        row_of_tiles<true>(weights + j, 1, stride, grad_rows, width, 1, count, 0, width, dv + j * width, width);
        row_of_tiles<true>(slopes + j, 1, stride, rows, width, 1, count, 0, width, dk + j * width, width);
      }
      for (std::int64_t r = 0; r < padded; r += kRows)
        row_of_tiles<false>(slopes + r * stride, stride, 1, keys, width, 1, task.num_k, 0, width, out_rows + r * width,
                            width);
      if (task.num_k > 0) tables.add(task, block, rows, keys, slopes, out_rows, dk);
      write<kBf16>(tensors.dq, head, token, count, size, width, static_cast<float>(shape.scale), out_rows);
    }
    // rows hold q times scale and log2(e), and so does the table of queries: the latter is taken off.
    write<kBf16>(tensors.dk, head, task.first_k, task.num_k, size, width, 0.6931471805599453f, dk);
    write<kBf16>(tensors.dv, head, task.first_k, task.num_k, size, width, 1.0f, dv);
  }
  tables.write_to(gradients, index);
}

}  // namespace

void relative_forward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionForward& tensors,
                      std::int64_t part, std::int64_t head) {
  shape.bf16 ? forward_of<true>(shape, terms, tensors, part, head)
             : forward_of<false>(shape, terms, tensors, part, head);
}

void relative_backward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionBackward& tensors,
                       const RelativeGradients& gradients, std::int64_t part, std::int64_t head) {
  shape.bf16 ? backward_of<true>(shape, terms, tensors, gradients, part, head)
             : backward_of<false>(shape, terms, tensors, gradients, part, head);
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
