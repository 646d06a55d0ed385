#include "rows/int8_rows.h"

#include "common/dispatch.h"
#include "common/threads.h"
#include "rows/kernels.h"

namespace rerank_fast {
namespace {

constexpr std::int64_t kRowsPerTask = 32;

}  // namespace

void quantize_rows(const Int8RowsShape& shape, const void* x, const Int8Rows& to) {
  const auto rows = kernels().rows->int8_quantize;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, x, to, part.begin, part.end); });
}

void scale_rows(const Int8RowsShape& shape, const Int8Product& product, void* x) {
  const auto rows = kernels().rows->int8_scale;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, product, x, part.begin, part.end); });
}

void gelu_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Rows& to) {
  const auto rows = kernels().rows->int8_gelu;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, product, to, part.begin, part.end); });
}

void norm_rows(const Int8RowsShape& shape, const Int8Product& product, const Int8Norm& norm, const Int8Rows& to) {
  const auto rows = kernels().rows->int8_norm;
  for_rows<kRowsPerTask>(shape, [&](TaskRows part) { rows(shape, product, norm, to, part.begin, part.end); });
}

}  // namespace rerank_fast
