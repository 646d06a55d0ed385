// Products of bf16 matrices by instructions that multiply pairs and sum them in fp32: AVX512-BF16 and NEON's BFDOT.
#pragma once

#if defined(__AVX512BF16__)
#if defined(__clang__)
#include <immintrin.h>
#else  // GCC warns of its own header's undefined registers
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#else
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "attention/kernels.h"
#include "common/lanes.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

// Two bf16 that are neighbours along the dimension that a product sums over.
using Word = std::uint32_t;
using Words = Lanes<Word>;
typedef std::uint16_t Bf16Lanes __attribute__((vector_size(kRegisterBytes)));

constexpr std::int64_t kMaxSize = 256;  // bf16 of a row

// Rows of bf16 that lie `stride` apart; those from `count` on read as zeros.
struct Bf16Rows {
  const std::uint16_t* data;
  std::int64_t stride, count;

  RERANK_FAST_INLINE const std::uint16_t* operator[](std::int64_t i) const {
    alignas(64) static const std::uint16_t zeros[kMaxSize] = {};
    return i < count ? data + i * stride : zeros;
  }
};

RERANK_FAST_INLINE std::uint16_t* place(const Rows& rows, std::int64_t head, std::int64_t token) {
  return static_cast<std::uint16_t*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

RERANK_FAST_INLINE Bf16Rows rows_of(const Rows& rows, std::int64_t head, std::int64_t first, std::int64_t count) {
  return {place(rows, head, first), rows.token_stride, count};
}

// bf16 of the lanes of low, then of high.
RERANK_FAST_INLINE Words narrow(Lanes<float> low, Lanes<float> high) {
#if defined(__AVX512BF16__)
  return (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  return (Words)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
#endif
}

// sum + the products of kLanes pairs.
RERANK_FAST_INLINE Lanes<float> dot(Lanes<float> sum, Words left, Words right) {
#if defined(__AVX512BF16__)
  return (Lanes<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#else
  return (Lanes<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)left, (bfloat16x8_t)right);
#endif
}

// Two registers' worth of elements, or where there are but `left` of them one, and zeros.
RERANK_FAST_INLINE Words load_elements(const std::uint16_t* from, std::int64_t left) {
  Words words = {};
  if (left >= 2 * kLanes) {
    std::memcpy(&words, from, sizeof words);
  } else {
    std::memcpy(&words, from, sizeof words / 2);
  }
  return words;
}

RERANK_FAST_INLINE void store_elements(Words words, std::uint16_t* to, std::int64_t left) {
  if (left >= 2 * kLanes) {
    std::memcpy(to, &words, sizeof words);
  } else {
    std::memcpy(to, &words, sizeof words / 2);
  }
}

// Of rows of whole kLanes elements.
RERANK_FAST_INLINE float dot_rows(const std::uint16_t* left, const std::uint16_t* right, std::int64_t size) {
  Lanes<float> products = {};
  for (std::int64_t e = 0; e < size; e += 2 * kLanes)
    products = dot(products, load_elements(left + e, size - e), load_elements(right + e, size - e));
  return sum<float>(products);
}

// sum (kRows, 2 * kLanes) += left (kRows, words) x right (words, 2 * kLanes); row r, word w of left is at
// r * row_stride + w * word_stride, and only kVectors * kLanes columns are taken.
template <int kVectors, int kRows>
RERANK_FAST_INLINE void add_product(const Word* left, std::int64_t row_stride, std::int64_t word_stride,
                                    const Word* right, std::int64_t right_stride, std::int64_t words,
                                    Lanes<float> (&sum)[kRows][2]) {
#pragma GCC unroll 4
  for (std::int64_t w = 0; w < words; ++w, left += word_stride, right += right_stride) {
    Words columns[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) columns[n] = load(right + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Words word = every_lane(left[r * row_stride]);
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[r][n] = dot(sum[r][n], word, columns[n]);
    }
  }
}

template <int... kLane>
RERANK_FAST_INLINE Bf16Lanes interleave(Bf16Lanes halves, std::integer_sequence<int, kLane...>) {
  return shuffle<(kLane % 2 * static_cast<int>(kLanes) + kLane / 2)...>(halves, halves);
}

// low[0] high[0] low[1] high[1] ... of the two halves.
RERANK_FAST_INLINE Words interleave(Words halves) {
  return (Words)interleave((Bf16Lanes)halves, std::make_integer_sequence<int, 2 * kLanes>{});
}

// Words of the kLanes elements from `even` and from `odd` on.
RERANK_FAST_INLINE Words pair_elements(const std::uint16_t* even, const std::uint16_t* odd) {
#if defined(__AVX512BF16__)  // two stores and a wider load would wait for each other
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
  return interleave((Words)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#else
  Bf16Lanes both;
  std::memcpy(&both, even, sizeof both / 2);
  std::memcpy(reinterpret_cast<char*>(&both) + sizeof both / 2, odd, sizeof both / 2);
  return interleave((Words)both);
#endif
}

// Rows of whole kLanes elements as words of neighbouring rows: (pairs of rows, size). It is the right side of a product
// that sums over rows.
RERANK_FAST_INLINE void pair_rows(const Bf16Rows& rows, std::int64_t size, Word* to) {
  for (std::int64_t i = 0; i < rows.count; i += 2) {
    const std::uint16_t *even = rows[i], *odd = rows[i + 1];
    for (std::int64_t e = 0; e < size; e += kLanes) store(pair_elements(even + e, odd + e), to + i / 2 * size + e);
  }
}

// Rows of whole 8 elements as words of neighbouring elements, transposed in blocks: (blocks of kBlockRows rows,
// size / 2, kBlockRows). It is either side of a product that sums over elements. Whole blocks are written.
template <int kBlockRows>
RERANK_FAST_INLINE void pair_columns(const Bf16Rows& rows, std::int64_t size, Word* to) {
  for (std::int64_t i = 0; i < rows.count; i += kBlockRows, to += kBlockRows * size / 2)
    for (std::int64_t r = 0; r < kBlockRows; r += 4) {
      const std::uint16_t* const from[4] = {rows[i + r], rows[i + r + 1], rows[i + r + 2], rows[i + r + 3]};
      for (std::int64_t w = 0; w < size / 2; w += 4) {
        FourLanes part[4];  // bits that are moved only
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) std::memcpy(&part[n], from[n] + 2 * w, sizeof part[n]);
        transpose(part);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) std::memcpy(to + (w + n) * kBlockRows + r, &part[n], sizeof part[n]);
      }
    }
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
