// Working memory that its thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "common/set.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

// Under AddressSanitizer an allocation is as large as was asked for, so that what lies beyond is found.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExactScratch = true;
#else
constexpr bool kExactScratch = false;
#endif

// Values on a cache-line bound, in an allocation that only grows; what it held is then lost.
template <typename T>
class Scratch {
 public:
  T* room(std::int64_t count) {
    if (count > capacity_ || (kExactScratch && count < capacity_)) {
      release();
      const std::int64_t wanted = kExactScratch ? count : count + count / 2;
      data_ = static_cast<T*>(::operator new(static_cast<std::size_t>(wanted) * sizeof(T), std::align_val_t{64}));
      capacity_ = wanted;
    }
    return data_;
  }
  T* data() const { return data_; }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    capacity_ = 0;
  }
  T* data_ = nullptr;
  std::int64_t capacity_ = 0;
};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
