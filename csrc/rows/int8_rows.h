// Rows of activations to int8 and back, around an int8 matrix product of a library's.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct Int8RowsShape {
  std::int64_t rows, width;
  bool bf16;  // of x; else fp32
  int num_threads;
};

// Each row as (levels + 1) + round(levels * row / max|row|) with the scale max|row| / levels of its own; levels is at
// most 127. A row of zeros has the scale 0, one that holds NaN or an infinity the scale NaN.
struct Int8Rows {
  std::uint8_t* values;  // (rows, width)
  float* scale;          // (rows,)
  int levels;
};

// A product of rows with the scales `row_scale` and of weights with the bias `bias`, both not yet applied.
struct Int8Product {
  const void* x;           // (rows, width)
  const float* row_scale;  // (rows)
  const float* bias;       // (width)
};

struct Int8Norm {
  const float *residual, *weight, *bias;  // (rows, width), (width), (width)
  double eps;
  float* y;  // (rows, width)
};

void quantize_rows(const Int8RowsShape& shape, const void* x, const Int8Rows& to);

// x = x * row_scale + bias in place;
void scale_rows(const Int8RowsShape& shape, const Int8Product& product, void* x);

// GELU of that, as int8;
void gelu_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to);

// y = LayerNorm(residual + that), and y as int8.
void norm_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm, const Int8Rows& to);

}  // namespace rerank_fast
