// Rows of x times rows of weights: the tiles of vector_code.cc, which is the only one to include this.
//
// x is float32, which weights of any type are widened to, or packed bfloat16, which bfloat16 weights meet two by two. Both
// ways an output is one sum in one order, in 16 lanes.
#pragma once

#include <type_traits>
#include <vector>

#include "simd.h"
#include "vector_code.h"

namespace {

using dancemoe::Matrix;
using dancemoe::Type;

// How many rows of x meet how many rows of weights in registers.
#if defined(__AVX512F__)
constexpr int kRows = 6, kColumns = 4;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kRows = 3, kColumns = 2;
#else
constexpr int kRows = 1, kColumns = 2;
#endif

// With more rows than kRows, weights are gone through in pieces of this many inputs, so that a piece stays in the cache
// while all rows meet it. Sums under way wait in memory meanwhile, all lanes of them: the order of additions is the same.
constexpr size_t kPiece = 1024;
constexpr size_t kManyRows = 256;  // so many of float32 do not stay in the second cache: half the piece then
constexpr size_t kRowBlock = 4 * kRows, kColumnBlock = 32;

// What a lane takes of x and of weights at once, and how many inputs a register of that holds.
template <class X>
using Unit = std::conditional_t<std::is_same_v<X, float>, Lanes, Pairs>;
template <class X>
constexpr size_t kInputs = std::is_same_v<X, float> ? kLanes : 2 * kLanes;

// sums[r][j] += x[r][i] * w[j][i], lane by lane, for one register of inputs from i on.
template <class W, class X, int R, int J>
INLINE void accumulate_lanes(const W* w, size_t stride, const X* const* x, size_t i, Lanes (&sums)[R][J]) {
  Unit<X> weights[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) load(w + j * stride + i, &weights[j]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    Unit<X> row;
    load(x[r] + i, &row);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) sums[r][j] = fused(row, weights[j], sums[r][j]);
  }
}

// The same for inputs begin to end. With `ahead`, the weights of the next J rows are fetched meanwhile: hardware does not
// look beyond a page, and rows are about as long as pages.
template <class W, class X, int R, int J>
INLINE void accumulate(const W* w, size_t stride, const X* const* x, size_t begin, size_t end, bool ahead,
                       Lanes (&sums)[R][J]) {
  constexpr size_t kLine = 64 / sizeof(W), kStep = kInputs<X>;
  size_t i = begin;
  if (ahead) {
    for (; i + kLine <= end; i += kLine) {
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) __builtin_prefetch(w + (J + j) * stride + i, 0, 2);
#pragma GCC unroll 4
      for (size_t part = 0; part < kLine; part += kStep) accumulate_lanes<W, X, R, J>(w, stride, x, i + part, sums);
    }
  }
  for (; i + kStep <= end; i += kStep) accumulate_lanes<W, X, R, J>(w, stride, x, i, sums);
  if (i < end) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      W padded[kStep] = {};
      std::memcpy(padded, w + j * stride + i, (end - i) * sizeof(W));
      Unit<X> weights, row;
      load(padded, &weights);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        load(x[r] + i, &row);
        sums[r][j] = fused(row, weights, sums[r][j]);
      }
    }
  }
}

template <int R, int J>
INLINE void finish(const Lanes (&sums_)[R][J], float* out, size_t out_stride) {
#if defined(__AVX512F__)
  if constexpr (J == 4 && R > 1) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 4) {
      constexpr int kLast = R - 1;
      const auto row = [&](int i) { return quarters(sums_[r + i < kLast ? r + i : kLast]); };
      const Lanes total = sums(row(0), row(1), row(2), row(3));
#pragma GCC unroll 4
      for (int i = 0; i < 4 && r + i < R; i++)
        std::memcpy(out + (r + i) * out_stride, reinterpret_cast<const float*>(&total) + 4 * i, J * sizeof(float));
    }
    return;
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Lanes* s = sums_[r];
    const Quad total = sums(s[0], s[1 % J], s[2 % J], s[3 % J]);
    std::memcpy(out + r * out_stride, &total, J * sizeof(float));
  }
}

// One tile of R rows and J outputs. `waiting` holds the sums between pieces, null where there is one piece only.
template <class W, class X, int R, int J>
void tile(const W* w, size_t stride, const X* const* x, size_t begin, size_t end, bool ahead, bool first,
          bool last, Lanes* waiting, float* out, size_t out_stride) {
  Lanes sums[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) sums[r][j] = first ? all(0.0f) : waiting[r * J + j];
  accumulate<W, X, R, J>(w, stride, x, begin, end, ahead, sums);
  if (last) {
    finish<R, J>(sums, out, out_stride);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) waiting[r * J + j] = sums[r][j];
  }
}

// A tile of `rows` <= kRows rows.
template <int J, int R = kRows, class W, class X>
INLINE void tile_of(int rows, const W* w, size_t stride, const X* const* x, size_t begin, size_t end, bool ahead,
                    bool first, bool last, Lanes* waiting, float* out, size_t out_stride) {
  if constexpr (R >= 1) {
    if (rows == R) return tile<W, X, R, J>(w, stride, x, begin, end, ahead, first, last, waiting, out, out_stride);
    tile_of<J, R - 1>(rows, w, stride, x, begin, end, ahead, first, last, waiting, out, out_stride);
  }
}

// How many of `count` rows to take at once: no more than kRows, and about the same number every time.
INLINE size_t even_step(size_t count) {
  const size_t times = (count + kRows - 1) / kRows;
  return (count + times - 1) / times;
}

template <class W, class X>
void products(const Matrix& m, const X* const* x, size_t count, float* out, size_t out_stride) {
  const W* w = static_cast<const W*>(m.data);
  const bool half = sizeof(X) == sizeof(float) && count > kManyRows;
  const size_t piece = count <= kRows ? m.width : half ? kPiece / 2 : kPiece;
  Lanes waiting[kRowBlock * kColumnBlock];
  for (size_t j0 = 0; j0 < m.rows; j0 += kColumnBlock) {
    const size_t j1 = j0 + kColumnBlock < m.rows ? j0 + kColumnBlock : m.rows;
    for (size_t r0 = 0; r0 < count; r0 += kRowBlock) {
      const size_t r1 = r0 + kRowBlock < count ? r0 + kRowBlock : count;
      const size_t step = even_step(r1 - r0);
      for (size_t begin = 0; begin < m.width; begin += piece) {
        const size_t end = begin + piece < m.width ? begin + piece : m.width;
        const bool first = begin == 0, last = end == m.width;
        for (size_t r = r0; r < r1; r += step) {
          const int rows = r1 - r < step ? r1 - r : step;
          const bool ahead = r == 0;
          for (size_t j = j0; j < j1;) {
            Lanes* own = waiting + (r - r0) * kColumnBlock + (j - j0) * step;
            const W* at = w + j * m.stride;
            float* to = out + r * out_stride + j;
            if (j + kColumns <= j1) {
              tile_of<kColumns>(rows, at, m.stride, x + r, begin, end, ahead, first, last, own, to, out_stride);
              j += kColumns;
            } else {
              tile_of<1>(rows, at, m.stride, x + r, begin, end, ahead, first, last, own, to, out_stride);
              j += 1;
            }
          }
        }
      }
    }
  }
}

}  // namespace
