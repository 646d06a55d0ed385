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

// x, residual: (rows, width); residual, weight and bias fp32. Writes y (rows, width) fp32, y_narrow the same in bf16
// where shape.bf16, and the mean and reciprocal standard deviation of each row.
void residual_norm_forward(const ResidualNormShape& shape, const void* x, const float* residual, const float* weight,
                           const float* bias, float* y, void* y_narrow, float* mean, float* rstd);

// grad_y and grad_y_narrow may be null (taken as 0). Writes grad_x in x's type, grad_residual, grad_weight, grad_bias.
void residual_norm_backward(const ResidualNormShape& shape, const void* x, const float* residual, const float* weight,
                            const float* mean, const float* rstd, const float* grad_y, const void* grad_y_narrow,
                            void* grad_x, float* grad_residual, float* grad_weight, float* grad_bias);

}  // namespace rerank_fast
