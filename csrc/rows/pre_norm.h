// What stands between the products of a layer that norms before each sublayer, on the CPU: each in one pass over
// memory, forward and backward.
#pragma once

#include <cstdint>

namespace rerank_fast {

// Rows of a backward's task, which leaves a row of sums over them: fixed, so that they do not depend on the number of
// threads.
constexpr std::int64_t kPreNormRowsPerTask = 64;

struct AddNormShape {
  std::int64_t rows, width;
  bool bf16;      // of x, normed and their gradients; else fp32
  bool centered;  // LayerNorm; else RMSNorm
  double eps, x_eps;
  int num_threads;
};

struct AddNormForward {
  const float* residual;       // (rows, width)
  const void* x;               // (rows, width), or null
  const float* x_weight;       // (width) of an RMSNorm of x; null where it is added as it is
  const float *weight, *bias;  // (width); the bias may be null
  float* total;                // (rows, width) residual + x; null without x
  void* normed;                // (rows, width)
  float *mean, *rstd;          // (rows); mean is null where nothing is centered
  float* x_rstd;               // (rows); null without x_weight
};

struct AddNormBackward {
  const float *total, *weight, *mean, *rstd;
  const void* x;  // null, as the two that follow, where it was added as it is
  const float *x_weight, *x_rstd;
  const void* grad_normed;
  const float* grad_total;  // or null: taken as 0
  void* grad_x;             // or null
  float* grad_residual;
  float* sums;  // (tasks, 1 to 3 * width) of the gradients of weight, centered of bias, and with x of x_weight
};

// The first heads of a token are queries, the others keys; each is normed by its root mean square, where there are
// weights, and then rotated: its halves are pairs of coordinates.
struct RotaryShape {
  std::int64_t rows, heads, num_queries, head_size;
  std::int64_t stride, other_stride;  // between tokens: of what is read, and of what is written or was read forward
  bool bf16;
  double eps;
  int num_threads;
};

struct Rotary {
  const void* x;             // (rows, heads, head_size)
  void* out;                 // may be x
  const float *cosines, *sines;  // (rows, head_size)
  const float* weights;      // (2 * head_size) of queries, then of keys; or null
};

struct RotaryBackward {
  void* grad;     // of the result, then of x: by shape.stride
  const void* x;  // by shape.other_stride; null without weights
  const float *cosines, *sines, *weights;
  float* sums;  // (tasks, 2 * head_size) of weights' gradients; null without
};

enum class Gate { kGelu, kGeluTanh, kSilu };

struct GatedShape {
  std::int64_t rows, width;
  bool bf16;
  Gate gate;
  int num_threads;
};

void add_norm(const AddNormShape& shape, const AddNormForward& tensors);
void add_norm_backward(const AddNormShape& shape, const AddNormBackward& tensors);
void rotary(const RotaryShape& shape, const Rotary& tensors);
void rotary_backward(const RotaryShape& shape, const RotaryBackward& tensors);
// gate_up (rows, 2 * width), the gates first, to (rows, width).
void gated(const GatedShape& shape, const void* gate_up, void* out);
void gated_backward(const GatedShape& shape, const void* gate_up, const void* grad, void* grad_gate_up);

}  // namespace rerank_fast
