// What the operations on rows run of an instruction set: the rows [begin, end).
#pragma once

#include "rows/int8_rows.h"
#include "rows/pre_norm.h"
#include "rows/residual_norm.h"
#include "rows/score_head.h"

namespace rerank_fast {

// A task's part of the sums over rows, to which it adds, and room for one row.
struct ResidualNormSums {
  float *grad_weight, *grad_bias, *row;  // (width)
};

struct RowKernels {
  void (*residual_norm_forward)(const ResidualNormShape& shape,
                                const ResidualNormForward& tensors, std::int64_t begin,
                                std::int64_t end);
  void (*residual_norm_backward)(const ResidualNormShape& shape,
                                 const ResidualNormBackward& tensors,
                                 const ResidualNormSums& sums, std::int64_t begin,
                                 std::int64_t end);
  void (*score_head_gather)(const ScoreHeadShape& shape, const ScoreHeadGather& tensors,
                            std::int64_t begin, std::int64_t end);
  void (*score_head_dot)(const ScoreHeadShape& shape, const ScoreHeadDot& tensors,
                         std::int64_t begin, std::int64_t end);
  void (*score_head_dot_backward)(const ScoreHeadShape& shape,
                                  const ScoreHeadDotBackward& tensors, std::int64_t begin,
                                  std::int64_t end);
  void (*int8_quantize)(const Int8RowsShape& shape, const void* x, const Int8Rows& to,
                        std::int64_t begin, std::int64_t end);
  void (*int8_scale)(const Int8RowsShape& shape, const Int8Product& product, void* x,
                     std::int64_t begin, std::int64_t end);
  void (*int8_gelu)(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to,
                    std::int64_t begin, std::int64_t end);
  void (*int8_norm)(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm,
                    const Int8Rows& to, std::int64_t begin, std::int64_t end);
  void (*add_norm)(const AddNormShape& shape, const AddNormForward& tensors, std::int64_t begin,
                   std::int64_t end);
  // sums: a task's own row.
  void (*add_norm_backward)(const AddNormShape& shape, const AddNormBackward& tensors, float* sums,
                            std::int64_t begin, std::int64_t end);
  void (*rotary)(const RotaryShape& shape, const Rotary& tensors, std::int64_t begin,
                 std::int64_t end);
  void (*rotary_backward)(const RotaryShape& shape, const RotaryBackward& tensors, float* sums,
                          std::int64_t begin, std::int64_t end);
  void (*gated)(const GatedShape& shape, const void* gate_up, void* out, std::int64_t begin,
                std::int64_t end);
  void (*gated_backward)(const GatedShape& shape, const void* gate_up, const void* grad,
                         void* grad_gate_up, std::int64_t begin, std::int64_t end);
};

}  // namespace rerank_fast
