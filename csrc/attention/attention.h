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

// Whether both cu_seqlens rise from 0 to their tokens, as the two below need them to.
bool sequences_fit(const AttentionShape& shape);

// Writes out and lse.
void attention_forward(const AttentionShape& shape, const AttentionForward& tensors);

// Writes dq, dk and dv. Each is summed by one thread in a fixed order.
void attention_backward(const AttentionShape& shape, const AttentionBackward& tensors);

}  // namespace rerank_fast
