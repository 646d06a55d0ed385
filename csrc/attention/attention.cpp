#include "attention/attention.h"

#include "attention/kernels.h"
#include "common/dispatch.h"
#include "common/threads.h"

namespace rerank_fast {
namespace {

bool rise(const std::int32_t* cu_seqlens, std::int64_t num_sequences, std::int64_t tokens) {
  bool rises = cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == tokens;
  for (std::int64_t n = 0; n < num_sequences; ++n) rises &= cu_seqlens[n] <= cu_seqlens[n + 1];
  return rises;
}

bool in_bf16_pairs(const AttentionShape& shape) {
  return shape.bf16 && shape.head_size % kBf16HeadStep == 0 && kernels().attention->bf16_forward != nullptr;
}

// A sequence's heads lie side by side: a thread takes all of them, unless there are too few sequences for all threads.
template <typename Task, typename Tensors>
void run(const AttentionShape& shape, Task task, const Tensors& tensors) {
  const std::int64_t parts = shape.num_sequences < 8 * shape.num_threads ? shape.num_kv_heads : 1;
  parallel_for(shape.num_threads, shape.num_sequences * parts, [&](std::int64_t index) {
    const std::int64_t part = index % parts;
    for (std::int64_t head = part * shape.num_kv_heads / parts; head < (part + 1) * shape.num_kv_heads / parts; ++head)
      task(shape, tensors, index / parts, head);
  });
}

}  // namespace

bool sequences_fit(const AttentionShape& shape) {
  return rise(shape.cu_seqlens_q, shape.num_sequences, shape.num_queries) &&
         rise(shape.cu_seqlens_k, shape.num_sequences, shape.num_keys);
}

void attention_forward(const AttentionShape& shape, const AttentionForward& tensors) {
  const AttentionKernels& set = *kernels().attention;
  run(shape, in_bf16_pairs(shape) ? set.bf16_forward : set.forward, tensors);
}

void attention_backward(const AttentionShape& shape, const AttentionBackward& tensors) {
  const AttentionKernels& set = *kernels().attention;
  run(shape, in_bf16_pairs(shape) ? set.bf16_backward : set.backward, tensors);
}

bool slots_fit(const RelativeTerms& terms) {
  bool fit = true;
  for (std::int64_t d = 0; d < 2 * terms.reach + 1; ++d) fit &= terms.slots[d] >= 0 && terms.slots[d] < terms.num_slots;
  return fit;
}

void relative_forward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionForward& tensors) {
  const auto task = kernels().attention->relative_forward;
  parallel_for(shape.num_threads, terms.num_parts * shape.num_heads, [&](std::int64_t index) {
    task(shape, terms, tensors, index / shape.num_heads, index % shape.num_heads);
  });
}

void relative_backward(const AttentionShape& shape, const RelativeTerms& terms, const AttentionBackward& tensors,
                       const RelativeGradients& gradients) {
  const auto task = kernels().attention->relative_backward;
  parallel_for(shape.num_threads, terms.num_parts * shape.num_heads, [&](std::int64_t index) {
    task(shape, terms, tensors, gradients, index / shape.num_heads, index % shape.num_heads);
  });
}

}  // namespace rerank_fast
