#include "rows/tasks.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {
    residual_norm_forward_rows, residual_norm_backward_rows, score_head_gather_rows,
    score_head_dot_rows, score_head_dot_backward_rows, int8_quantize_rows, int8_scale_rows,
    int8_gelu_rows, int8_norm_rows, add_norm_rows, add_norm_backward_rows, rotary_rows,
    rotary_backward_rows, gated_rows, gated_backward_rows};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
