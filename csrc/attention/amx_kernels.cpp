// Attention by AMX's products of tiles of bf16. Scores lie with a key in each row and a query in each lane: what
// belongs to a query is then a register's worth of 16 of them, and no maximum or sum goes across lanes.
#include "attention/amx_queries.h"
#include "attention/amx_tiles.h"
#include "attention/scores.h"
#include "attention/sequence.h"
#include "common/math.h"
#include "common/scratch.h"

namespace rerank_fast {

// The set below this one: what does not gain from tiles runs its kernels.
namespace avx512_bf16 {
void fp32_forward(const AttentionShape&, const AttentionForward&, std::int64_t sequence, std::int64_t kv_head);
void fp32_backward(const AttentionShape&, const AttentionBackward&, std::int64_t sequence, std::int64_t kv_head);
void relative_forward(const AttentionShape&, const RelativeTerms&, const AttentionForward&, std::int64_t part,
                      std::int64_t head);
void relative_backward(const AttentionShape&, const RelativeTerms&, const AttentionBackward&, const RelativeGradients&,
                       std::int64_t part, std::int64_t head);
void bf16_forward(const AttentionShape&, const AttentionForward&, std::int64_t sequence, std::int64_t kv_head);
void bf16_backward(const AttentionShape&, const AttentionBackward&, std::int64_t sequence, std::int64_t kv_head);
}  // namespace avx512_bf16

inline namespace RERANK_FAST_SET {
namespace {

constexpr std::int64_t kFewQueries = 8;  // a tile of so few is mostly empty

// Scores of up to 32 queries and all keys: (blocks of 32 keys, two by two tiles). Weights, for the product along
// keys: (blocks of 32 keys, two tiles).
struct ForwardMemory {
  Scratch<Word> keys, values, queries, weights;
  Scratch<float> scores, sums;
};

// The softmax of 16 queries, a column of tiles of scores: the weights, undivided.
struct Softmax {
  const AttentionShape& shape;
  const Sequence& sequence;
  const Scores& made;
  const Dropout& dropout;
  KeyRange range;  // whole blocks
  std::int64_t head, first, count;
  float* scores;
  Word* weights;

  static RERANK_FAST_INLINE std::int64_t row(std::int64_t key) {
    return key / kBlockSide * kBlockTile + key % kBlockSide / kSide * 2 * kTile + key % kSide * kSide;
  }

  // The factor of the sums of values; and lse.
  RERANK_FAST_INLINE Vector run(float* lse) const {
    const float factor = made.capped ? 1.0f : made.factor;
    const Reach reach(shape, sequence, first);
    const std::int64_t end = whole(range.to, 2);
    Vector top = every_lane(-kInfinity);
    for (std::int64_t j = range.from; j < end; j += kSide) {
      const std::int64_t rows = smaller(kSide, end - j);
      const bool hidden = hides_some(shape, sequence, first, smaller(count, kSide), j, j + rows);
      float* const raw = scores + row(j);
      if (made.capped) made.cap_row(raw, rows * kSide, made.factor);
      for (std::int64_t r = 0; r < rows; ++r) {
        Vector score = load(raw + r * kSide);
        if (hidden) {
          score = reach.hides(j + r) ? every_lane(-kInfinity) : score;
          store(score, raw + r * kSide);
        }
        top = score > top ? score : top;
      }
    }
    top *= factor;
    // A query that may read nothing gives 0; one with no score above minus infinity gives NaN.
    const Numbers empty = reach.nothing();
    const Vector off = empty ? Vector{} : top;
    const Words drawn = dropout_rows(dropout, head, sequence.first_q + first, count);
    Vector sums = {};
    for (std::int64_t j = range.from; j < end; j += kSide) {
      const std::int64_t rows = smaller(kSide, end - j);
      const float* const raw = scores + row(j);
      Word* const to = weights + j / kBlockSide * 2 * kTile + j % kBlockSide / 2 * kSide;
      for (std::int64_t r = 0; r < rows; r += 2) {
        Vector weight[2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          weight[n] = exp2_below<true>(load(raw + (r + n) * kSide) * factor - off);
          sums += weight[n];
          if (dropout.threshold != 0) weight[n] = keep(kept(dropout, drawn, j + r + n), weight[n], dropout.rescale);
        }
        store(interleave(narrow(weight[0], weight[1])), to + r / 2 * kSide);
      }
    }
    for (std::int64_t j = end; j < whole(end, kBlockSide); j += 2)
      store(Words{}, weights + j / kBlockSide * 2 * kTile + j % kBlockSide / 2 * kSide);
    const Vector log_sum = empty ? every_lane(kInfinity) : top + log2_of(sums);
    _mm512_mask_storeu_ps(lse, static_cast<__mmask16>((1u << smaller(count, kSide)) - 1u), (__m512)log_sum);
    return empty ? Vector{} : 1.0f / sums;
  }
};

void forward(const AttentionShape& shape, const AttentionForward& tensors, const Sequence& sequence,
             std::int64_t kv_head) {
  const std::int64_t size = shape.head_size, chunks = whole(size, kBlockSide) / kBlockSide;
  const std::int64_t blocks = whole(sequence.num_k, kBlockSide) / kBlockSide, block_words = 2 * chunks * kTile;
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  static thread_local ForwardMemory memory;
  Word* const keys = memory.keys.room(blocks * block_words);
  Word* const values = memory.values.room(blocks * block_words);
  Word* const queries = memory.queries.room(block_words);
  Word* const weights = memory.weights.room(blocks * 2 * kTile);
  float* const scores = memory.scores.room(blocks * kBlockTile);
  float* const sums = memory.sums.room(kBlockTile);
  const Scores made(shape);
  const Dropout dropout(shape.dropout_p, shape.seed, shape.dropout_rows);
  const TileRegisters registers;
  Packing(tensors.k, kv_head, sequence.first_k, sequence.num_k, size).as_rows(keys);
  Packing(tensors.v, kv_head, sequence.first_k, sequence.num_k, size).as_pairs<true>(values);
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (std::int64_t first = 0; first < sequence.num_q; first += kBlockSide) {
      const std::int64_t count = smaller(kBlockSide, sequence.num_q - first), token = sequence.first_q + first;
      const std::int64_t columns = whole(count, kSide) / kSide;
      const KeyRange range = sequence.readable(shape, first, first + count, kBlockSide);
      Packing(tensors.q, head, token, count, size).as_columns(queries);
      for (std::int64_t j = range.from; j < range.to; j += kBlockSide) {
        const std::int64_t rows = range.to - j > kSide ? 2 : 1;
        multiply<false>({keys + j / kBlockSide * block_words, rows, chunks * kTile, kTile},
                        {queries, columns, chunks * kTile, kTile}, chunks, scores + j / kBlockSide * kBlockTile);
      }
      Vector rescale[2] = {};
      for (std::int64_t n = 0; n < columns; ++n) {
        const Softmax softmax{shape, sequence, made, dropout, range, head, first + n * kSide, count - n * kSide,
                              scores + n * kTile, weights + n * kTile};
        rescale[n] = softmax.run(tensors.lse + head * shape.num_queries + token + n * kSide);
      }
      const std::int64_t block = range.from / kBlockSide, depth = whole(range.to, kBlockSide) / kBlockSide - block;
      for (std::int64_t e = 0; e < size; e += kBlockSide) {
        multiply<false>({values + block * block_words + e / kSide * kTile, 2, kTile, block_words},
                        {weights + block * 2 * kTile, columns, kTile, 2 * kTile}, depth, sums);
        for (std::int64_t n = 0; n < columns; ++n)
          write_columns(sums + n * kTile, rescale[n], tensors.out, head, token + n * kSide, count - n * kSide, size,
                        e);
      }
    }
  }
}

// The scores and the gradients of the weights of one block of 32 keys from `key` on and up to 32 queries, two by two
// tiles each.
struct Block {
  alignas(64) float scores[kBlockTile], grads[kBlockTile];
};

// From them, the scores capped, the weights, dropped out, and the gradients of the products: for products along queries
// (two tiles of keys), and the latter along keys too (two tiles of queries).
RERANK_FAST_INLINE void differentiate(const Block& block, const Queries& queries, const Scores& made,
                                      const Dropout& dropout, std::int64_t columns, const Reach* reach,
                                      std::int64_t key, std::int64_t count, Word* weights, Word* slopes,
                                      Word* slope_pairs) {
  const float factor = made.capped ? 1.0f : made.factor;
  for (std::int64_t j = 0; j < count; j += 2) {
    Vector weight[2][2] = {}, slope[2][2] = {};
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      if (c >= columns) continue;
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const std::int64_t at = j / kSide * 2 * kTile + c * kTile + (j % kSide + n) * kSide;
        Vector score = load(block.scores + at) * factor - queries.log_sum[c];
        if (reach != nullptr) score = reach[c].hides(key + j + n) ? every_lane(-kInfinity) : score;
        const Vector all = exp2_below<true>(score);
        const Vector upstream = load(block.grads + at);
        if (dropout.threshold == 0) {
          weight[n][c] = all;
          slope[n][c] = all * (upstream - queries.along[c]);
        } else {
          const __mmask16 which = kept(dropout, queries.drawn[c], key + j + n);
          weight[n][c] = keep(which, all, dropout.rescale);
          slope[n][c] = all * keep_less(which, upstream, dropout.rescale, queries.along[c]);
        }
        if (made.capped) slope[n][c] *= made.bend(load(block.scores + at));
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      store(narrow(weight[n][0], weight[n][1]), weights + (j + n) * kSide);
      store(narrow(slope[n][0], slope[n][1]), slopes + (j + n) * kSide);
      store(interleave(narrow(slope[0][n], slope[1][n])), slope_pairs + n * kTile + j / 2 * kSide);
    }
  }
  for (std::int64_t j = whole(count, 2); j < kBlockSide; j += 2)
    for (std::int64_t n = 0; n < 2; ++n) store(Words{}, slope_pairs + n * kTile + j / 2 * kSide);
}

// Blocks are of 32 queries or keys.
struct BackwardMemory {
  Scratch<Word> keys, keys_turned, values, queries, query_pairs, grads, grad_pairs;  // as Packing has them
  Scratch<Word> weights, slopes, slope_pairs;  // of one block of keys: (blocks of queries, two tiles)
  Scratch<float> dq, dk, dv;                   // (blocks, chunks, two by two tiles)
  Scratch<Queries> known;                      // (blocks of queries)
};

// One sequence and one head of keys and values.
struct Backward {
  const AttentionShape& shape;
  const AttentionBackward& tensors;
  const Sequence& sequence;
  const std::int64_t kv_head;
  BackwardMemory& memory;
  const std::int64_t size = shape.head_size, chunks = whole(size, kBlockSide) / kBlockSide;
  const std::int64_t key_blocks = whole(sequence.num_k, kBlockSide) / kBlockSide;
  const std::int64_t query_blocks = whole(sequence.num_q, kBlockSide) / kBlockSide;
  const std::int64_t block_words = 2 * chunks * kTile, block_sums = chunks * kBlockTile;
  const float scale = static_cast<float>(shape.scale);
  const Scores made{shape};
  const Dropout dropout{shape.dropout_p, shape.seed, shape.dropout_rows};
  Word* const keys = memory.keys.room(key_blocks * block_words);
  Word* const keys_turned = memory.keys_turned.room(key_blocks * block_words);
  Word* const values = memory.values.room(key_blocks * block_words);
  Word* const queries = memory.queries.room(query_blocks * block_words);
  Word* const query_pairs = memory.query_pairs.room(query_blocks * block_words);
  Word* const grads = memory.grads.room(query_blocks * block_words);
  Word* const grad_pairs = memory.grad_pairs.room(query_blocks * block_words);
  Word* const weights = memory.weights.room(query_blocks * 2 * kTile);
  Word* const slopes = memory.slopes.room(query_blocks * 2 * kTile);
  Word* const slope_pairs = memory.slope_pairs.room(query_blocks * 2 * kTile);
  float* const dq = memory.dq.room(query_blocks * block_sums);
  float* const dk = memory.dk.room(key_blocks * block_sums);
  float* const dv = memory.dv.room(key_blocks * block_sums);
  Queries* const known = memory.known.room(query_blocks);

  RERANK_FAST_INLINE std::int64_t columns(std::int64_t b) const {
    return sequence.num_q - b * kBlockSide > kSide ? 2 : 1;
  }

  RERANK_FAST_INLINE void pack_keys() const {
    const Packing from_k(tensors.k, kv_head, sequence.first_k, sequence.num_k, size);
    from_k.as_rows(keys);
    from_k.as_pairs<true>(keys_turned);
    Packing(tensors.v, kv_head, sequence.first_k, sequence.num_k, size).as_rows(values);
  }

  RERANK_FAST_INLINE void pack_queries(std::int64_t head) const {
    const Packing from_q(tensors.q, head, sequence.first_q, sequence.num_q, size);
    const Packing from_grad(tensors.grad_out, head, sequence.first_q, sequence.num_q, size);
    from_q.as_columns(queries);
    from_q.as_pairs<false>(query_pairs);
    from_grad.as_columns(grads);
    from_grad.as_pairs<false>(grad_pairs);
    for (std::int64_t b = 0; b < query_blocks; ++b)
      known[b] = known_of(shape, tensors, dropout, head, sequence.first_q + b * kBlockSide,
                          smaller(kBlockSide, sequence.num_q - b * kBlockSide));
  }

  // What a block of keys and a block of queries begin with.
  RERANK_FAST_INLINE void score(std::int64_t block, std::int64_t rows, std::int64_t b, Block* to) const {
    const std::int64_t from_k = block * block_words, from_q = b * block_words, next = chunks * kTile;
    multiply<false>({keys + from_k, rows, next, kTile}, {queries + from_q, columns(b), next, kTile}, chunks,
                    to->scores);
    multiply<false>({values + from_k, rows, next, kTile}, {grads + from_q, columns(b), next, kTile}, chunks,
                    to->grads);
  }

  // Adds what a block of keys and all queries that read it give each other.
  RERANK_FAST_INLINE void add(std::int64_t block) const {
    const std::int64_t key = block * kBlockSide, count = smaller(kBlockSide, sequence.num_k - key);
    const std::int64_t rows = whole(count, kSide) / kSide;
    const KeyRange readers = sequence.readers(shape, key, key + count);
    const std::int64_t from = readers.from / kBlockSide, to = whole(readers.to, kBlockSide) / kBlockSide;
    Block blocks[2];
    if (from < to) score(block, rows, from, &blocks[from % 2]);
    for (std::int64_t b = from; b < to; ++b) {
      if (b + 1 < to) score(block, rows, b + 1, &blocks[(b + 1) % 2]);  // takes its time meanwhile
      const std::int64_t first = b * kBlockSide, num = smaller(kBlockSide, sequence.num_q - first);
      const Reach reach[2] = {{shape, sequence, first}, {shape, sequence, first + kSide}};
      const bool hidden = hides_some(shape, sequence, first, num, key, key + whole(count, 2));
      if (made.capped) made.cap_row(blocks[b % 2].scores, kBlockTile, made.factor);
      differentiate(blocks[b % 2], known[b], made, dropout, columns(b), hidden ? reach : nullptr, key, count,
                    weights + b * 2 * kTile, slopes + b * 2 * kTile, slope_pairs + b * 2 * kTile);
    }
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t at = chunk * 2 * kTile, first = from * 2 * kTile;
      const std::int64_t sums = chunk * kBlockTile, key_sums = block * block_sums + sums;
      for (std::int64_t b = from; b < to; ++b)
        multiply<true>({keys_turned + block * block_words + at, 2, kTile, 0},
                       {slope_pairs + b * 2 * kTile, columns(b), kTile, 0}, 1, dq + b * block_sums + sums);
      multiply<true>({weights + first, rows, kTile, 2 * kTile},
                     {grad_pairs + from * block_words + at, 2, kTile, block_words}, to - from, dv + key_sums);
      multiply<true>({slopes + first, rows, kTile, 2 * kTile},
                     {query_pairs + from * block_words + at, 2, kTile, block_words}, to - from, dk + key_sums);
    }
  }

  RERANK_FAST_INLINE void write_queries(std::int64_t head) const {
    for (std::int64_t i = 0; i < sequence.num_q; i += kSide)
      for (std::int64_t e = 0; e < size; e += kBlockSide) {
        const float* const sums = dq + i / kBlockSide * block_sums + e / kBlockSide * kBlockTile;
        write_columns(sums + i / kSide % 2 * kTile, every_lane(scale), tensors.dq, head, sequence.first_q + i,
                      sequence.num_q - i, size, e);
      }
  }

  RERANK_FAST_INLINE void write_keys(const float* sums, float times, const Rows& to) const {
    for (std::int64_t i = 0; i < sequence.num_k; ++i)
      for (std::int64_t e = 0; e < size; e += kBlockSide) {
        const float* const from = sums + i / kBlockSide * block_sums + e / kBlockSide * kBlockTile +
                                  i % kBlockSide / kSide * 2 * kTile + i % kSide * kSide;
        std::uint16_t* const row = place(to, kv_head, sequence.first_k + i) + e;
        __builtin_prefetch(row + to.head_stride, 1);
        store_elements(narrow(load(from) * times, load(from + kTile) * times), row, size - e);
      }
  }

  void run() const {
    const std::int64_t group = shape.num_heads / shape.num_kv_heads;
    const TileRegisters registers;
    pack_keys();
    fill(dk, key_blocks * block_sums, 0.0f);
    fill(dv, key_blocks * block_sums, 0.0f);
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      pack_queries(head);
      fill(dq, query_blocks * block_sums, 0.0f);
      for (std::int64_t block = 0; block < key_blocks; ++block) add(block);
      write_queries(head);
    }
    write_keys(dk, scale, tensors.dk);
    write_keys(dv, 1.0f, tensors.dv);
  }
};

void bf16_forward(const AttentionShape& shape, const AttentionForward& tensors, std::int64_t index,
                  std::int64_t kv_head) {
  const Sequence sequence(shape, index);
  if (sequence.num_q <= kFewQueries || !(static_cast<float>(shape.scale) > 0))
    return avx512_bf16::bf16_forward(shape, tensors, index, kv_head);
  forward(shape, tensors, sequence, kv_head);
}

void bf16_backward(const AttentionShape& shape, const AttentionBackward& tensors, std::int64_t index,
                   std::int64_t kv_head) {
  const Sequence sequence(shape, index);
  if (sequence.num_q <= kFewQueries) return avx512_bf16::bf16_backward(shape, tensors, index, kv_head);
  static thread_local BackwardMemory memory;
  Backward{shape, tensors, sequence, kv_head, memory}.run();
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    avx512_bf16::fp32_forward, avx512_bf16::fp32_backward,    bf16_forward,
    bf16_backward,             avx512_bf16::relative_forward, avx512_bf16::relative_backward};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
