// Rows and columns of a matrix of 16-bit numbers swapped in memory.
#pragma once

#include <cstdint>

namespace rerank_fast {

struct TransposedShape {
  std::int64_t rows, columns;  // of what is read
  int num_threads;
};

// from (rows, columns) to (columns, rows).
void transpose(const TransposedShape& shape, const std::uint16_t* from, std::uint16_t* to);

}  // namespace rerank_fast
