// The score head on the CPU, around the machine's matrix products: gather, and what follows the dense product.
#pragma once

#include <cstdint>

namespace rerank_fast {

enum class Activation : int { kNone, kTanh, kGelu, kRelu };

struct ScoreHeadShape {
  std::int64_t rows;
  std::int64_t hidden, width;  // of the dense product's input and of its result
  bool bf16;                   // of rows and products; else fp32
  Activation activation;
  double dropout_p, dropout_in_p;  // after the activation, and of the gathered rows
  std::uint64_t seed;
  int num_threads;
};

struct ScoreHeadGather {
  const void* from;           // rows of `hidden`, stride elements apart
  std::int64_t stride;
  const std::int64_t* index;  // (rows) of them; null reads them in order
  void* x;                    // (rows, hidden)
};

struct ScoreHeadDot {
  const void* product;      // (rows, width): the dense layer's, its bias added
  const float* out_weight;  // (width)
  const float* out_bias;    // one value, or null
  float* scores;            // (rows)
};

struct ScoreHeadDotBackward {
  const void* product;
  const float *out_weight, *grad_scores;
  void* grad_product;                       // (rows, width), in its type
  float *grad_dense_bias, *grad_out_weight;  // (width)
};

// x = the rows of `from` at index, dropped out. Where index is null, x may be `from`: in place it is the gradient of
// that.
void score_head_gather(const ScoreHeadShape& shape, const ScoreHeadGather& tensors);

// scores = dropout(activation(product)) . out_weight + out_bias.
void score_head_dot(const ScoreHeadShape& shape, const ScoreHeadDot& tensors);
void score_head_dot_backward(const ScoreHeadShape& shape, const ScoreHeadDotBackward& tensors);

}  // namespace rerank_fast
