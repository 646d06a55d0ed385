// The threads of this process's OpenMP runtime, PyTorch's own: no second pool to compete with.
#pragma once

#include <cstdint>

namespace rerank_fast {

// Runs task(context, index) for every index in [0, count) on at most num_threads threads, the caller among them, and
// returns when all are done. Which thread takes which index is not fixed. Without an OpenMP runtime in the process the
// caller does all of it.
void parallel_for(int num_threads, std::int64_t count, void (*task)(void* context, std::int64_t index),
                  void* context);

template <typename Function>
void parallel_for(int num_threads, std::int64_t count, Function&& function) {
  parallel_for(
      num_threads, count, [](void* context, std::int64_t index) { (*static_cast<Function*>(context))(index); },
      &function);
}

}  // namespace rerank_fast
