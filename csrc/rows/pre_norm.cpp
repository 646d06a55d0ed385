#include "rows/pre_norm.h"

#include "common/dispatch.h"
#include "common/threads.h"
#include "rows/kernels.h"

namespace rerank_fast {

void add_norm(const AddNormShape& shape, const AddNormForward& tensors) {
  const auto rows = kernels().rows->add_norm;
  for_rows<kPreNormRowsPerTask>(shape, [&](TaskRows own) { rows(shape, tensors, own.begin, own.end); });
}

void add_norm_backward(const AddNormShape& shape, const AddNormBackward& tensors) {
  const auto rows = kernels().rows->add_norm_backward;
  const std::int64_t vectors = 1 + (shape.centered ? 1 : 0) + (tensors.x == nullptr ? 0 : 1);
  const std::int64_t sums = vectors * shape.width;
  for_rows<kPreNormRowsPerTask>(
      shape, [&](TaskRows own) { rows(shape, tensors, tensors.sums + own.number * sums, own.begin, own.end); });
}

void rotary(const RotaryShape& shape, const Rotary& tensors) {
  const auto rows = kernels().rows->rotary;
  for_rows<kPreNormRowsPerTask>(shape, [&](TaskRows own) { rows(shape, tensors, own.begin, own.end); });
}

void rotary_backward(const RotaryShape& shape, const RotaryBackward& tensors) {
  const auto rows = kernels().rows->rotary_backward;
  for_rows<kPreNormRowsPerTask>(shape, [&](TaskRows own) {
    float* const sums = tensors.weights == nullptr ? nullptr : tensors.sums + own.number * 2 * shape.head_size;
    rows(shape, tensors, sums, own.begin, own.end);
  });
}

void gated(const GatedShape& shape, const void* gate_up, void* out) {
  const auto rows = kernels().rows->gated;
  for_rows<kPreNormRowsPerTask>(shape, [&](TaskRows own) { rows(shape, gate_up, out, own.begin, own.end); });
}

void gated_backward(const GatedShape& shape, const void* gate_up, const void* grad, void* grad_gate_up) {
  const auto rows = kernels().rows->gated_backward;
  for_rows<kPreNormRowsPerTask>(
      shape, [&](TaskRows own) { rows(shape, gate_up, grad, grad_gate_up, own.begin, own.end); });
}

}  // namespace rerank_fast
