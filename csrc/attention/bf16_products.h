// Products of bf16 matrices by AVX512-BF16, which multiplies pairs and sums them in fp32.
#pragma once

#if defined(__clang__)
#include <immintrin.h>
#else  // GCC warns of its own header's undefined registers
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>

#include "common/lanes.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

// Two bf16 that are neighbours along the dimension that a product sums over.
using Word = std::uint32_t;

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

// bf16 of the lanes of low, then of high.
RERANK_FAST_INLINE __m512i narrow(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// sum + the products of 16 pairs each.
RERANK_FAST_INLINE __m512 dot(__m512 sum, __m512i left, __m512i right) {
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
}

// sum (kRows, 2 * kLanes) += left (kRows, words) x right (words, 2 * kLanes); row r, word w of left is at
// r * row_stride + w * word_stride, and only kVectors * kLanes columns are taken.
template <int kVectors, int kRows>
RERANK_FAST_INLINE void add_product(const Word* left, std::int64_t row_stride, std::int64_t word_stride,
                                         const Word* right, std::int64_t right_stride, std::int64_t words,
                                         __m512 (&sum)[kRows][2]) {
#pragma GCC unroll 4
  for (std::int64_t w = 0; w < words; ++w, left += word_stride, right += right_stride) {
    __m512i columns[kVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) columns[n] = _mm512_loadu_si512(right + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i word = _mm512_set1_epi32(static_cast<int>(left[r * row_stride]));
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) sum[r][n] = dot(sum[r][n], word, columns[n]);
    }
  }
}

// low[0] high[0] low[1] high[1] ... of the two halves.
RERANK_FAST_INLINE __m512i interleave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Rows of whole kLanes elements as words of neighbouring rows: (pairs of rows, size). It is the right side of a product
// that sums over rows.
RERANK_FAST_INLINE void pair_rows(const Bf16Rows& rows, std::int64_t size, Word* to) {
  const auto half = [](const std::uint16_t* from) { return reinterpret_cast<const __m256i*>(from); };
  for (std::int64_t i = 0; i < rows.count; i += 2) {
    const std::uint16_t *even = rows[i], *odd = rows[i + 1];
    for (std::int64_t e = 0; e < size; e += kLanes) {
      const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(half(even + e)));
      const __m512i both = _mm512_inserti64x4(low, _mm256_loadu_si256(half(odd + e)), 1);
      _mm512_storeu_si512(to + i / 2 * size + e, interleave(both));
    }
  }
}

// Rows of whole kLanes elements as words of neighbouring elements, transposed in blocks: (blocks of kBlockRows rows,
// size / 2, kBlockRows). It is either side of a product that sums over elements. Whole blocks are written.
template <int kBlockRows>
RERANK_FAST_INLINE void pair_columns(const Bf16Rows& rows, std::int64_t size, Word* to) {
  static_assert(kBlockRows % kLanes == 0 || kBlockRows == kLanes / 2);
  for (std::int64_t i = 0; i < rows.count || i % kBlockRows != 0; i += kLanes) {
    const std::uint16_t* from[kLanes];
    for (std::int64_t r = 0; r < kLanes; ++r) from[r] = rows[i + r];
    for (std::int64_t w = 0; w < size / 2; w += 4) {
      const auto quad = [&](std::int64_t row) { return reinterpret_cast<const __m128i*>(from[row] + 2 * w); };
      __m512i part[4];  // lane l of part p: four words of row 4 l + p
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        part[p] = _mm512_castsi128_si512(_mm_loadu_si128(quad(p)));
        part[p] = _mm512_inserti32x4(part[p], _mm_loadu_si128(quad(p + 4)), 1);
        part[p] = _mm512_inserti32x4(part[p], _mm_loadu_si128(quad(p + 8)), 2);
        part[p] = _mm512_inserti32x4(part[p], _mm_loadu_si128(quad(p + 12)), 3);
      }
      const __m512i low[2] = {_mm512_unpacklo_epi32(part[0], part[1]), _mm512_unpacklo_epi32(part[2], part[3])};
      const __m512i high[2] = {_mm512_unpackhi_epi32(part[0], part[1]), _mm512_unpackhi_epi32(part[2], part[3])};
      const __m512i columns[4] = {_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                                  _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
      Word* const block = to + i / kBlockRows * kBlockRows * size / 2 + i % kBlockRows + w * kBlockRows;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        if constexpr (kBlockRows % kLanes == 0) {
          _mm512_storeu_si512(block + p * kBlockRows, columns[p]);
        } else {
          const auto half = [&](std::int64_t which) {
            return reinterpret_cast<__m256i*>(block + (which * size / 2 + p) * kBlockRows);
          };
          _mm256_storeu_si256(half(0), _mm512_castsi512_si256(columns[p]));
          _mm256_storeu_si256(half(1), _mm512_extracti64x4_epi64(columns[p], 1));
        }
      }
    }
  }
}

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
