// The kernels on rows that an instruction set's table names.
#pragma once

#include "common/set.h"
#include "rows/kernels.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

void residual_norm_forward_rows(const ResidualNormShape& shape,
                                const ResidualNormForward& tensors, std::int64_t begin,
                                std::int64_t end);
void residual_norm_backward_rows(const ResidualNormShape& shape,
                                 const ResidualNormBackward& tensors,
                                 const ResidualNormSums& sums, std::int64_t begin,
                                 std::int64_t end);
void score_head_gather_rows(const ScoreHeadShape& shape, const ScoreHeadGather& tensors,
                            std::int64_t begin, std::int64_t end);
void score_head_dot_rows(const ScoreHeadShape& shape, const ScoreHeadDot& tensors,
                         std::int64_t begin, std::int64_t end);
void score_head_dot_backward_rows(const ScoreHeadShape& shape,
                                  const ScoreHeadDotBackward& tensors, std::int64_t begin,
                                  std::int64_t end);
void int8_quantize_rows(const Int8RowsShape& shape, const void* x, const Int8Rows& to,
                        std::int64_t begin, std::int64_t end);
void int8_scale_rows(const Int8RowsShape& shape, const Int8Product& product, void* x,
                     std::int64_t begin, std::int64_t end);
void int8_gelu_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to,
                    std::int64_t begin, std::int64_t end);
void int8_norm_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm,
                    const Int8Rows& to, std::int64_t begin, std::int64_t end);
void add_norm_rows(const AddNormShape& shape, const AddNormForward& tensors, std::int64_t begin,
                   std::int64_t end);
void add_norm_backward_rows(const AddNormShape& shape, const AddNormBackward& tensors, float* sums,
                            std::int64_t begin, std::int64_t end);
void rotary_rows(const RotaryShape& shape, const Rotary& tensors, std::int64_t begin,
                 std::int64_t end);
void rotary_backward_rows(const RotaryShape& shape, const RotaryBackward& tensors, float* sums,
                          std::int64_t begin, std::int64_t end);
void gated_rows(const GatedShape& shape, const void* gate_up, void* out, std::int64_t begin,
                std::int64_t end);
void gated_backward_rows(const GatedShape& shape, const void* gate_up, const void* grad,
                         void* grad_gate_up, std::int64_t begin, std::int64_t end);

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
