// The kernels of attention that an instruction set's table may name.
#pragma once

#include "attention/sequence.h"

// Whether the set multiplies pairs of bf16 and sums them in fp32.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define RERANK_FAST_BF16_PRODUCTS 1
#else
#define RERANK_FAST_BF16_PRODUCTS 0
#endif

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

void fp32_forward(const AttentionShape& shape, const AttentionForward& tensors, std::int64_t sequence,
                  std::int64_t kv_head);
void fp32_backward(const AttentionShape& shape, const AttentionBackward& tensors, std::int64_t sequence,
                   std::int64_t kv_head);
void relative_forward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionForward& tensors,
                      std::int64_t part, std::int64_t head);
void relative_backward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionBackward& tensors,
                       const RelativeGradients& gradients, std::int64_t part, std::int64_t head);
#if RERANK_FAST_BF16_PRODUCTS
void bf16_forward(const AttentionShape& shape, const AttentionForward& tensors, std::int64_t sequence,
                  std::int64_t kv_head);
void bf16_backward(const AttentionShape& shape, const AttentionBackward& tensors, std::int64_t sequence,
                   std::int64_t kv_head);
#endif

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
