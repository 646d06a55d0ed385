// What attention runs of an instruction set.
#pragma once

#include "attention/attention.h"

namespace rerank_fast {

// One sequence, and the heads that share one head of keys and values.
struct AttentionKernels {
  using Forward = void (*)(const AttentionShape&, const AttentionForward&, std::int64_t sequence,
                           std::int64_t kv_head);
  using Backward = void (*)(const AttentionShape&, const AttentionBackward&, std::int64_t sequence,
                            std::int64_t kv_head);
  // Products in fp32, of tensors of either type: all that is asked for.
  Forward forward;
  Backward backward;
  // Products of bf16 pairs, summed in fp32. Probabilities, and the gradients of scores, are rounded to bf16 before they
  // are multiplied again, as the tensor cores' kernels round them. Null where the set has no such products.
  Forward bf16_forward;
  Backward bf16_backward;
  // One part of the sequences, and a head; products in fp32, of tensors of either type.
  void (*relative_forward)(const AttentionShape&, const RelativeTerms&, const AttentionForward&, std::int64_t part,
                           std::int64_t head);
  void (*relative_backward)(const AttentionShape&, const RelativeTerms&, const AttentionBackward&,
                            const RelativeGradients&, std::int64_t part, std::int64_t head);
};

// For tensors of bf16, heads of whole multiples of this, up to 256, and scores that are not capped.
constexpr std::int64_t kBf16HeadStep = 16;

}  // namespace rerank_fast
