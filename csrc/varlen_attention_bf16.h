// varlen_attention by the processor's products of bf16 pairs, summed in fp32. Probabilities, and the gradients of scores,
// are rounded to bf16 before they are multiplied again, as the tensor cores' kernels round them.
#pragma once

#include "varlen_attention.h"

namespace rerank_fast {

// Whether this processor, this build and these tensors allow it; else varlen_attention computes in fp32.
bool has_bf16_attention(const AttentionShape& shape);

// One sequence, and the heads that share one head of keys and values.
void bf16_forward_task(const AttentionShape& shape, std::int64_t sequence, std::int64_t kv_head, const Rows& q,
                       const Rows& k, const Rows& v, const Rows& out, float* lse);
void bf16_backward_task(const AttentionShape& shape, std::int64_t sequence, std::int64_t kv_head, const Rows& q,
                        const Rows& k, const Rows& v, const Rows& out, const float* lse, const Rows& grad_out,
                        const Rows& dq, const Rows& dk, const Rows& dv);

}  // namespace rerank_fast
