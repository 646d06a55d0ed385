// The threads of this process's OpenMP runtime, PyTorch's own: no second pool to compete with.
#pragma once

#include <algorithm>
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

struct TaskRows {
  std::int64_t number, begin, end;  // the task's, and its rows
};

// Runs task(TaskRows) for all of shape.rows on shape.num_threads, kRowsPerTask of them at a time:
// what a task adds up does not depend on the number of threads.
template <std::int64_t kRowsPerTask, typename Shape, typename Task>
void for_rows(const Shape& shape, Task&& task) {
  const std::int64_t rows = shape.rows;
  parallel_for(shape.num_threads, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t number) {
    task(TaskRows{number, number * kRowsPerTask, std::min((number + 1) * kRowsPerTask, rows)});
  });
}

}  // namespace rerank_fast
