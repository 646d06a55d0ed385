// Rows of activations to int8 and back, around an int8 matrix product of a library's.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct Int8RowsShape {
  std::int64_t rows, width;
  bool bf16;  // of x; else fp32
  int num_threads;
};

// Each row of x (rows, width) to (levels + 1) + round(levels * x / max|x|) with the scale max|x| / levels of its own;
// levels is at most 127. A row of zeros has the scale 0.
void quantize_rows(const Int8RowsShape& shape, const void* x, int levels, std::uint8_t* quantized, float* scale);

// x = x * row_scale + bias in place; bias may be null.
void scale_rows(const Int8RowsShape& shape, void* x, const float* row_scale, const float* bias);

}  // namespace rerank_fast
