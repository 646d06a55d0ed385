// AMX: products of tiles of bf16, and what is packed into tiles. The set is Linux's on x86-64 alone.
#pragma once

#include "attention/bf16_products.h"
#include "attention/sequence.h"

namespace rerank_fast {
inline namespace RERANK_FAST_SET {

// A tile is 16 rows of 64 bytes, kTile values of 4 bytes: of a product's left side 32 bf16 in each row, of its right
// side the words of 16 columns (two rows of bf16 in a row of words), of its result 16 floats. Matrices lie in tiles
// one after the other.
constexpr std::int64_t kSide = 16, kBlockSide = 2 * kSide, kTile = kSide * kSide;
constexpr std::int64_t kBlockTile = 4 * kTile;  // two by two tiles

// For as long as it lives this thread has eight whole tiles; without one it has none to save and restore.
class TileRegisters {
 public:
  RERANK_FAST_INLINE TileRegisters() {
    struct {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const layout;
    static_assert(sizeof layout == 64);
    asm volatile("ldtilecfg %0" ::"m"(layout));
  }
  RERANK_FAST_INLINE ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// AddressSanitizer does not look into assembly: it sees the ends of each row here.
RERANK_FAST_INLINE void touch([[maybe_unused]] const void* tile) {
#if defined(__SANITIZE_ADDRESS__)
  for (std::int64_t byte = 0; byte < 4 * kTile; byte += 32)
    static_cast<void>(*(static_cast<const volatile char*>(tile) + byte));
  static_cast<void>(*(static_cast<const volatile char*>(tile) + 4 * kTile - 1));
#endif
}

// In assembly, since compilers' own functions take no number of a tile from a template, and GCC's do not say that
// they read memory.
template <int kNumber>
RERANK_FAST_INLINE void load_tile(const void* from) {
  touch(from);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(std::int64_t{64}), "i"(kNumber) : "memory");
}
template <int kNumber>
RERANK_FAST_INLINE void store_tile(void* to) {
  touch(to);
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(std::int64_t{64}), "i"(kNumber) : "memory");
}
template <int kNumber>
RERANK_FAST_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kNumber));
}
template <int kSum, int kLeft, int kRight>
RERANK_FAST_INLINE void add_tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

// One or two rows (of a left side) or columns (of a right side) of tiles: where the next of them lies, and the next
// along the dimension that is summed over, in values.
struct Tiles {
  const Word* data;
  std::int64_t count, next, step;
};

// to, two by two tiles as far as there are that many rows and columns, = left x right over `depth` tiles, or += that.
template <bool kAdd>
RERANK_FAST_INLINE void multiply(Tiles left, Tiles right, std::int64_t depth, float* to) {
  const bool second_row = left.count > 1, second_column = right.count > 1;
  if (kAdd) {
    load_tile<0>(to);
    if (second_column) load_tile<1>(to + kTile);
    if (second_row) load_tile<2>(to + 2 * kTile);
    if (second_row && second_column) load_tile<3>(to + 3 * kTile);
  } else {
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
  }
  for (std::int64_t d = 0; d < depth; ++d, left.data += left.step, right.data += right.step) {
    load_tile<4>(left.data);
    load_tile<6>(right.data);
    add_tile_product<0, 4, 6>();
    if (second_column) {
      load_tile<7>(right.data + right.next);
      add_tile_product<1, 4, 7>();
    }
    if (second_row) {
      load_tile<5>(left.data + left.next);
      add_tile_product<2, 5, 6>();
      if (second_column) add_tile_product<3, 5, 7>();
    }
  }
  store_tile<0>(to);
  if (second_column) store_tile<1>(to + kTile);
  if (second_row) store_tile<2>(to + 2 * kTile);
  if (second_row && second_column) store_tile<3>(to + 3 * kTile);
}

// 16 rows of 16 words turned round.
RERANK_FAST_INLINE void transpose(Words (&row)[kSide]) {
  __m512i part[4][4];  // by column of four within 128 bits
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = (__m512i)row[4 * i], b = (__m512i)row[4 * i + 1];
    const __m512i c = (__m512i)row[4 * i + 2], d = (__m512i)row[4 * i + 3];
    const __m512i ab[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
    const __m512i cd[2] = {_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)};
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      part[2 * n][i] = _mm512_unpacklo_epi64(ab[n], cd[n]);
      part[2 * n + 1][i] = _mm512_unpackhi_epi64(ab[n], cd[n]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(part[c][0], part[c][1], 0x88),
                             _mm512_shuffle_i32x4(part[c][2], part[c][3], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(part[c][0], part[c][1], 0xdd),
                            _mm512_shuffle_i32x4(part[c][2], part[c][3], 0xdd)};
    row[c] = (Words)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
    row[c + 4] = (Words)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    row[c + 8] = (Words)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    row[c + 12] = (Words)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
}

// Rows of bf16 of one head, in whole multiples of 16 elements; what is beyond the rows and beyond `size` is packed as
// zeros. Packed, a row is `chunks` of 32 elements.
struct Packing {
  Bf16Rows rows;
  std::int64_t size, chunks, next_head;

  RERANK_FAST_INLINE Packing(const Rows& all, std::int64_t head, std::int64_t first, std::int64_t count,
                             std::int64_t row_size)
      : rows(rows_of(all, head, first, count)),
        size(row_size),
        chunks(whole(row_size, kBlockSide) / kBlockSide),
        next_head(all.head_stride) {}

  // Elements e to e + 31.
  RERANK_FAST_INLINE Words part(std::int64_t i, std::int64_t e) const {
    const std::uint16_t* const from = rows[i] + e;
    __builtin_prefetch(from + next_head);
    return load_elements(from, size - e);
  }
  // The words of rows i and i + 1, elements e to e + 15.
  RERANK_FAST_INLINE Words pair(std::int64_t i, std::int64_t e) const {
    if (e >= size) return Words{};
    if (e % kBlockSide == 0) {
      __builtin_prefetch(rows[i] + e + next_head);
      __builtin_prefetch(rows[i + 1] + e + next_head);
    }
    return pair_elements(rows[i] + e, rows[i + 1] + e);
  }

  // A left side that is multiplied along elements: (blocks of 16 rows, chunks) of tiles; whole blocks of 32 rows.
  RERANK_FAST_INLINE void as_rows(Word* to) const {
    for (std::int64_t i = 0; i < rows.count; i += kSide)
      for (std::int64_t e = 0; e < size; e += kBlockSide, to += kTile)
        for (std::int64_t r = 0; r < kSide; ++r) store(part(i + r, e), to + r * kSide);
  }
  // A right side that is multiplied along elements: (blocks of 16 rows, chunks) of tiles.
  RERANK_FAST_INLINE void as_columns(Word* to) const {
    for (std::int64_t i = 0; i < rows.count; i += kSide)
      for (std::int64_t e = 0; e < size; e += kBlockSide, to += kTile) {
        Words words[kSide];
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) words[r] = part(i + r, e);
        transpose(words);
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) store(words[r], to + r * kSide);
      }
  }
  // Either side of a product along rows: (blocks of 32 rows, chunks, two) of tiles; of a left side, turned.
  template <bool kTurned>
  RERANK_FAST_INLINE void as_pairs(Word* to) const {
    for (std::int64_t i = 0; i < rows.count; i += kBlockSide)
      for (std::int64_t e = 0; e < chunks * kBlockSide; e += kSide, to += kTile) {
        Words words[kSide];
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) words[r] = pair(i + 2 * r, e);
        if (kTurned) transpose(words);
#pragma GCC unroll 16
        for (int r = 0; r < kSide; ++r) store(words[r], to + r * kSide);
      }
  }
};

}  // namespace RERANK_FAST_SET
}  // namespace rerank_fast
