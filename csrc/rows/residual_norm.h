// LayerNorm(residual + dropout(x)) on the CPU in one pass over memory, forward and backward.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct ResidualNormShape {
  std::int64_t rows, width;
  const std::int32_t* dropout_rows;  // (rows): what stands for each of them in the dropout, or null: its place
  bool bf16;  // of x and of the narrow output and their gradients; else fp32 and there is no narrow output
  double eps;
  double dropout_p;  // of x
  std::uint64_t seed;
  int num_threads;
};

struct ResidualNormForward {
  const void* x;           // (rows, width)
  const float* residual;   // (rows, width)
  const float *weight, *bias;  // (width)
  float* y;                // (rows, width)
  void* y_narrow;          // the same in bf16, where shape.bf16
  float *mean, *rstd;      // (rows): of each row, and the reciprocal of its standard deviation
};

struct ResidualNormBackward {
  const void* x;
  const float *residual, *weight, *mean, *rstd;
  const float* grad_y;         // either may be null: taken as 0
  const void* grad_y_narrow;
  void* grad_x;                // in x's type
  float *grad_residual, *grad_weight, *grad_bias;
};

void residual_norm_forward(const ResidualNormShape& shape, const ResidualNormForward& tensors);
void residual_norm_backward(const ResidualNormShape& shape, const ResidualNormBackward& tensors);

}  // namespace rerank_fast
