#include "rows/int8_rows.h"

#include <algorithm>

#include "common/dispatch.h"
#include "common/threads.h"
#include "rows/kernels.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 32;

template <typename Task>
void for_rows(const Int8RowsShape& shape, Task&& task) {
  parallel_for(shape.num_threads, (shape.rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t index) {
    task(index * kRowsPerTask, std::min((index + 1) * kRowsPerTask, shape.rows));
  });
}

}  // namespace

void quantize_rows(const Int8RowsShape& shape, const void* x, const Int8Rows& to) {
  const auto rows = kernels().rows->int8_quantize;
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { rows(shape, x, to, begin, end); });
}

void scale_rows(const Int8RowsShape& shape, const Int8Product& product, void* x) {
  const auto rows = kernels().rows->int8_scale;
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { rows(shape, product, x, begin, end); });
}

void gelu_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to) {
  const auto rows = kernels().rows->int8_gelu;
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { rows(shape, product, to, begin, end); });
}

void norm_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm, const Int8Rows& to) {
  const auto rows = kernels().rows->int8_norm;
  for_rows(shape, [&](std::int64_t begin, std::int64_t end) { rows(shape, product, norm, to, begin, end); });
}

}  // namespace rerank_fast
