// Attention over sequences of different lengths that lie one after the other, on the CPU: forward and backward.
// Raw pointers and sizes only: no PyTorch, no Python.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct AttentionShape {
  std::int64_t num_sequences;
  std::int64_t num_queries, num_keys;  // tokens of all sequences
  std::int64_t num_heads;
  std::int64_t num_kv_heads;  // divides num_heads: each is shared by num_heads / num_kv_heads heads
  std::int64_t head_size;     // at most 256
  const std::int32_t* cu_seqlens_q;  // (num_sequences + 1), from 0 to num_queries
  const std::int32_t* cu_seqlens_k;
  const std::int32_t* dropout_rows;  // (queries): what stands for each of them in the dropout, or null: its place
  bool bf16;  // of every tensor but lse; else fp32
  double scale;
  double softcap;  // a score s becomes softcap * tanh(s / softcap); 0: it stays
  // Query i of Lq may read the keys from i + Lk - Lq - window_left to i + Lk - Lq + window_right; below 0 is unlimited.
  std::int64_t window_left, window_right;
  double dropout_p;  // of the attention probabilities
  std::uint64_t seed;
  int num_threads;
};

// (tokens, heads, head_size), the last dimension contiguous; strides in elements.
struct Rows {
  void* data;
  std::int64_t token_stride, head_stride;
};

struct AttentionForward {
  Rows q, k, v, out;
  float* lse;  // (num_heads, queries): the logarithm to base 2 of each query's sum of exponentials
};

struct AttentionBackward {
  Rows q, k, v, out;
  const float* lse;
  Rows grad_out, dq, dk, dv;
};

// Terms of the scores by the distance of a query and a key: its slot is slots[clamp(distance, -reach, reach) + reach].
// Tables that are not there have no data.
struct RelativeTerms {
  const std::int32_t* slots;  // (2 * reach + 1), each from 0 to num_slots - 1
  std::int64_t reach, num_slots;
  const std::int32_t* query_positions;  // (queries): their places in their sequences, or null: as windows count them
  Rows keys, queries;  // (num_slots, heads, head_size), of the tensors' type
  const float* bias;   // (num_slots, heads)
  // The sequences are divided into so many parts, one after the other. A thread takes a head of one part; backward
  // leaves the tables' gradients of each, which do not depend on the number of threads.
  std::int64_t num_parts;
};

// (num_parts, heads, num_slots, head_size) fp32, the bias's without head_size; null where there is no such table.
struct RelativeGradients {
  float *keys, *queries, *bias;
};

// Whether both cu_seqlens rise from 0 to their tokens, as the two below need them to.
bool sequences_fit(const AttentionShape& shape);

// Writes out and lse.
void attention_forward(const AttentionShape& shape, const AttentionForward& tensors);

// Writes dq, dk and dv. Each is summed by one thread in a fixed order.
void attention_backward(const AttentionShape& shape, const AttentionBackward& tensors);

// Whether all slots lie in the tables, as the two below need them to.
bool slots_fit(const RelativeTerms& terms);

// With relative terms, no window, and as many heads of keys as of queries: what the two above write, and the terms'
// gradients.
void relative_forward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionForward& tensors);
void relative_backward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionBackward& tensors,
                       const RelativeGradients& gradients);

}  // namespace rerank_fast
