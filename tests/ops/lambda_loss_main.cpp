// Runs the CPU LambdaLoss without Python: built by test_lambda_loss_targets.py for processors other than this one.
// Reads the file argv[1], int64 lists, documents, scheme, k, then offsets (int64), scores and labels (float); writes
// the loss and the gradient (float) to argv[2]. Fails where a second call allocates memory.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <new>
#include <vector>

#include "lambda_loss.h"

namespace {
long allocations = 0;
}

void* operator new(std::size_t size) {
  ++allocations;
  return std::malloc(size);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  ++allocations;
  const auto step = static_cast<std::size_t>(alignment);
  return std::aligned_alloc(step, (size + step - 1) / step * step);
}
void operator delete(void* pointer) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::align_val_t) noexcept { std::free(pointer); }
void operator delete(void* pointer, std::size_t, std::align_val_t) noexcept { std::free(pointer); }

int main(int, char** arguments) {
  std::ifstream in(arguments[1], std::ios::binary);
  std::int64_t header[4];
  in.read(reinterpret_cast<char*>(header), sizeof header);
  const std::int64_t lists = header[0], documents = header[1];
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(lists + 1));
  std::vector<float> scores(static_cast<std::size_t>(documents)), labels(scores.size()), result(scores.size() + 1);
  in.read(reinterpret_cast<char*>(offsets.data()), static_cast<std::streamsize>(offsets.size() * 8));
  in.read(reinterpret_cast<char*>(scores.data()), static_cast<std::streamsize>(scores.size() * 4));
  in.read(reinterpret_cast<char*>(labels.data()), static_cast<std::streamsize>(labels.size() * 4));
  const rerank_fast::LambdaLossOptions options{static_cast<rerank_fast::Scheme>(header[2]),
                                               header[3],
                                               1.0,
                                               10.0,
                                               1e-10,
                                               1.0,
                                               rerank_fast::Reduction::kPairs,
                                               1};
  for (int call = 0; call < 2; ++call) {
    allocations = 0;
    rerank_fast::lambda_loss(scores.data(), labels.data(), offsets.data(), lists, options, result.data(),
                             result.data() + 1);
  }
  if (allocations != 0) return 1;
  std::ofstream out(arguments[2], std::ios::binary);
  out.write(reinterpret_cast<const char*>(result.data()), static_cast<std::streamsize>(result.size() * 4));
}
