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

// x (rows, hidden) = the rows of `from` at index (or in order, where index is null), dropped out; stride in elements.
// In place it is the gradient of that: x may be `from` where index is null.
void score_head_gather(const ScoreHeadShape& shape, const void* from, std::int64_t stride, const std::int64_t* index,
                       void* x);

// scores (rows) = dropout(activation(product)) . out_weight + out_bias; product (rows, width), its bias added. out_bias
// may be null.
void score_head_dot(const ScoreHeadShape& shape, const void* product, const float* out_weight, const float* out_bias,
                    float* scores);

// Writes the gradients of product (rows, width, in its type), dense_bias (width) and out_weight (width).
void score_head_dot_backward(const ScoreHeadShape& shape, const void* product, const float* out_weight,
                             const float* grad_scores, void* grad_product, float* grad_dense_bias,
                             float* grad_out_weight);

}  // namespace rerank_fast
