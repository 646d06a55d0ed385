#include "rows/transposed.h"

#include <cstring>

#include "common/lanes.h"
#include "common/threads.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kSide = 8;          // of the blocks that are turned in registers
constexpr std::int64_t kRowsPerTask = 64;  // two cache lines of each row that is written

typedef std::uint16_t Eight __attribute__((vector_size(16)));

// Rows that lie four apart interleaved, one half of each after the other: three such rounds turn a block.
RERANK_FAST_INLINE void interleave(const Eight (&from)[kSide], Eight (&to)[kSide]) {
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = shuffle<0, 8, 1, 9, 2, 10, 3, 11>(from[i], from[i + 4]);
    to[2 * i + 1] = shuffle<4, 12, 5, 13, 6, 14, 7, 15>(from[i], from[i + 4]);
  }
}

RERANK_FAST_INLINE void turn_block(const std::uint16_t* from, std::int64_t from_stride, std::uint16_t* to,
                                   std::int64_t to_stride) {
  Eight rows[kSide], turned[kSide];
  for (std::int64_t i = 0; i < kSide; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof rows[i]);
  interleave(rows, turned);
  interleave(turned, rows);
  interleave(rows, turned);
  for (std::int64_t i = 0; i < kSide; ++i) std::memcpy(to + i * to_stride, &turned[i], sizeof turned[i]);
}

}  // namespace

void transpose(const TransposedShape& shape, const std::uint16_t* from, std::uint16_t* to) {
  const std::int64_t rows = shape.rows, columns = shape.columns, whole = columns / kSide * kSide;
  for_rows<kRowsPerTask>(shape, [=](TaskRows part) {
    const std::int64_t last = part.begin + (part.end - part.begin) / kSide * kSide;
    for (std::int64_t column = 0; column < whole; column += kSide)
      for (std::int64_t row = part.begin; row < last; row += kSide)
        turn_block(from + row * columns + column, columns, to + column * rows + row, rows);
    for (std::int64_t row = part.begin; row < part.end; ++row)
      for (std::int64_t column = row < last ? whole : 0; column < columns; ++column)
        to[column * rows + row] = from[row * columns + column];
  });
}

}  // namespace rerank_fast
