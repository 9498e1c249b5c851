// The inner loops. Compiled once for each instruction set, with INSTRUCTION_SET as the name of its table.
#include "vector_code.h"

#include "simd.h"

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
constexpr size_t kRowBlock = 4 * kRows, kColumnBlock = 32;

// sums[r][j] += x[r][i] * w[j][i], lane by lane, for 16 inputs from i on.
template <class W, int R, int J>
INLINE void accumulate_lanes(const W* w, size_t stride, const float* const* x, size_t i, Lanes (&sums)[R][J]) {
  Lanes weights[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; j++) weights[j] = load(w + j * stride + i);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Lanes row = load(x[r] + i);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) sums[r][j] = fused(row, weights[j], sums[r][j]);
  }
}

// The same for inputs begin to end. With `ahead`, the weights of the next J rows are fetched meanwhile: hardware does not
// look beyond a page, and rows are about as long as pages.
template <class W, int R, int J>
INLINE void accumulate(const W* w, size_t stride, const float* const* x, size_t begin, size_t end, bool ahead,
                       Lanes (&sums)[R][J]) {
  constexpr size_t kLine = 64 / sizeof(W);
  size_t i = begin;
  if (ahead) {
    for (; i + kLine <= end; i += kLine) {
#pragma GCC unroll 8
      for (int j = 0; j < J; j++) __builtin_prefetch(w + (J + j) * stride + i, 0, 2);
#pragma GCC unroll 4
      for (size_t part = 0; part < kLine; part += kLanes) accumulate_lanes<W, R, J>(w, stride, x, i + part, sums);
    }
  }
  for (; i + kLanes <= end; i += kLanes) accumulate_lanes<W, R, J>(w, stride, x, i, sums);
  if (i < end) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const Lanes weights = load_some(w + j * stride + i, end - i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r][j] = fused(load(x[r] + i), weights, sums[r][j]);
    }
  }
}

template <int R, int J>
INLINE void finish(const Lanes (&sums_)[R][J], float* out, size_t out_stride) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Lanes* s = sums_[r];
    const Quad total = sums(s[0], s[1 % J], s[2 % J], s[3 % J]);
    std::memcpy(out + r * out_stride, &total, J * sizeof(float));
  }
}

// One tile of R rows and J outputs. `waiting` holds the sums between pieces, null where there is one piece only.
template <class W, int R, int J>
void tile(const W* w, size_t stride, const float* const* x, size_t begin, size_t end, bool ahead, bool first,
          bool last, Lanes* waiting, float* out, size_t out_stride) {
  Lanes sums[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) sums[r][j] = first ? all(0.0f) : waiting[r * J + j];
  accumulate<W, R, J>(w, stride, x, begin, end, ahead, sums);
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
template <class W, int J, int R = kRows>
INLINE void tile_of(int rows, const W* w, size_t stride, const float* const* x, size_t begin, size_t end, bool ahead,
                    bool first, bool last, Lanes* waiting, float* out, size_t out_stride) {
  if constexpr (R >= 1) {
    if (rows == R) return tile<W, R, J>(w, stride, x, begin, end, ahead, first, last, waiting, out, out_stride);
    tile_of<W, J, R - 1>(rows, w, stride, x, begin, end, ahead, first, last, waiting, out, out_stride);
  }
}

// How many of `count` rows to take at once: no more than kRows, and about the same number every time.
INLINE size_t even_step(size_t count) {
  const size_t times = (count + kRows - 1) / kRows;
  return (count + times - 1) / times;
}

template <class W>
void products(const Matrix& m, const float* const* x, size_t count, float* out, size_t out_stride) {
  const W* w = static_cast<const W*>(m.data);
  const size_t piece = count <= kRows ? m.width : kPiece;
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
              tile_of<W, kColumns>(rows, at, m.stride, x + r, begin, end, ahead, first, last, own, to, out_stride);
              j += kColumns;
            } else {
              tile_of<W, 1>(rows, at, m.stride, x + r, begin, end, ahead, first, last, own, to, out_stride);
              j += 1;
            }
          }
        }
      }
    }
  }
}

void products_of(const Matrix& w, const float* const* x, size_t count, float* out, size_t out_stride) {
  switch (w.type) {
    case Type::kFloat32: return products<float>(w, x, count, out, out_stride);
    case Type::kBfloat16: return products<uint16_t>(w, x, count, out, out_stride);
    case Type::kInt8: return products<int8_t>(w, x, count, out, out_stride);
  }
}

INLINE Lanes gated(Lanes gate, Lanes up, float limit) {
  const Lanes one = all(1.0f);
  if (limit == 0.0f) return gate / (one + exp(all(0.0f) - gate)) * up;
  gate = min(gate, all(limit));
  up = max(min(up, all(limit)), all(-limit));
  return gate / (one + exp(all(-1.702f) * gate)) * (up + one);
}

void gate(float* gate, const float* up, size_t count, float limit) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(gate + i, gated(load(gate + i), load(up + i), limit));
  if (i < count) {
    float rest[kLanes];
    store(rest, gated(load_some(gate + i, count - i), load_some(up + i, count - i), limit));
    std::memcpy(gate + i, rest, (count - i) * sizeof(float));
  }
}

void add(float* out, const float* x, size_t count, float factor) {
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, fused(all(factor), load(x + i), load(out + i)));
  if (i < count) {
    float rest[kLanes];
    store(rest, fused(all(factor), load_some(x + i, count - i), load_some(out + i, count - i)));
    std::memcpy(out + i, rest, (count - i) * sizeof(float));
  }
}

void add_rounded(float* out, const float* x, size_t count, float factor, float grid) {
  // A number this large has `grid` as the distance to its neighbours, so that adding to it rounds.
  const Lanes large = all(0x1.8p23f * grid), times = all(factor);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(out + i) + (fused(times, load(x + i), large) - large));
  if (i < count) {
    float rest[kLanes];
    store(rest, load_some(out + i, count - i) + (fused(times, load_some(x + i, count - i), large) - large));
    std::memcpy(out + i, rest, (count - i) * sizeof(float));
  }
}

float largest(const float* x, size_t count) {
  float result = 0;
  for (size_t i = 0; i < count; i++) {
    const float magnitude = x[i] < 0 ? -x[i] : x[i];
    result = magnitude > result ? magnitude : result;
  }
  return result;
}

float exponentials(float* numbers, size_t begin, size_t end, size_t count, float* maximum) {
  constexpr float kLowest = -3.4028234664e38f;
  for (size_t i = 0; i < begin; i++) numbers[i] = kLowest;
  for (size_t i = end; i < count; i++) numbers[i] = kLowest;
  Lanes top = load(numbers);
  for (size_t i = kLanes; i < count; i += kLanes) top = max(top, load(numbers + i));
  *maximum = largest(top);
  Lanes total = all(0.0f);
  for (size_t i = 0; i < count; i += kLanes) {
    const Lanes e = exp(load(numbers + i) - all(*maximum));
    store(numbers + i, e);
    total = total + e;
  }
  return sum(total);
}

float exponential(float x) {
  float lanes[kLanes];
  store(lanes, exp(all(x)));
  return lanes[0];
}

// out[r][0 .. N * 16] of R rows: the rows of v are added one after another, and fetched some rows ahead.
template <class T, int R, int N>
INLINE void mix_block(const T* v, const Matrix& m, const float* p, size_t p_stride, bool ahead, float* out, size_t out_stride) {
  constexpr size_t kAhead = 16, kLine = 64 / sizeof(T);
  Lanes sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sums[r][n] = load(out + r * out_stride + n * kLanes);
  for (size_t s = 0; s < m.rows; s++) {
    if (ahead)
      for (size_t i = 0; i < N * kLanes; i += kLine) __builtin_prefetch(v + (s + kAhead) * m.stride + i, 0, 3);
    Lanes values[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) values[n] = load(v + s * m.stride + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Lanes weight = all(p[r * p_stride + s]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sums[r][n] = fused(weight, values[n], sums[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(out + r * out_stride + n * kLanes, sums[r][n]);
}

template <class T, int R>
void mix_rows(const Matrix& m, const float* p, size_t p_stride, bool ahead, float* out, size_t out_stride) {
  const T* v = static_cast<const T*>(m.data);
  size_t j = 0;
  for (; j + kColumns * kLanes <= m.width; j += kColumns * kLanes)
    mix_block<T, R, kColumns>(v + j, m, p, p_stride, ahead, out + j, out_stride);
  for (; j + kLanes <= m.width; j += kLanes) mix_block<T, R, 1>(v + j, m, p, p_stride, ahead, out + j, out_stride);
  if (j == m.width) return;
  for (int r = 0; r < R; r++) {
    Lanes total = load_some(out + r * out_stride + j, m.width - j);
    for (size_t s = 0; s < m.rows; s++)
      total = fused(all(p[r * p_stride + s]), load_some(v + s * m.stride + j, m.width - j), total);
    float rest[kLanes];
    store(rest, total);
    std::memcpy(out + r * out_stride + j, rest, (m.width - j) * sizeof(float));
  }
}

template <class T, int R = kRows>
INLINE void mix_rows_of(int rows, const Matrix& m, const float* p, size_t p_stride, bool ahead, float* out, size_t out_stride) {
  if constexpr (R >= 1) {
    if (rows == R) return mix_rows<T, R>(m, p, p_stride, ahead, out, out_stride);
    mix_rows_of<T, R - 1>(rows, m, p, p_stride, ahead, out, out_stride);
  }
}

template <class T>
void mix(const Matrix& v, const float* p, size_t p_stride, size_t count, float* out, size_t out_stride) {
  const size_t step = even_step(count);
  for (size_t r = 0; r < count; r += step) {
    const int rows = count - r < step ? count - r : step;
    mix_rows_of<T>(rows, v, p + r * p_stride, p_stride, r == 0, out + r * out_stride, out_stride);
  }
}

void mix_of(const Matrix& v, const float* p, size_t p_stride, size_t count, float* out, size_t out_stride) {
  switch (v.type) {
    case Type::kFloat32: return mix<float>(v, p, p_stride, count, out, out_stride);
    case Type::kBfloat16: return mix<uint16_t>(v, p, p_stride, count, out, out_stride);
    case Type::kInt8: return mix<int8_t>(v, p, p_stride, count, out, out_stride);
  }
}

// Piece by piece: only a piece that holds something larger than all before it is looked at again.
size_t largest_at(const float* numbers, size_t count) {
  constexpr size_t kSearched = 512;
  size_t from = 0;
  float best = -__builtin_inff();
  for (size_t begin = 0; begin < count; begin += kSearched) {
    const size_t end = begin + kSearched < count ? begin + kSearched : count;
    Lanes top = all(best);
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) top = max(load(numbers + i), top);
    float found = largest(top);
    for (; i < end; i++) found = numbers[i] > found ? numbers[i] : found;
    if (found > best) best = found, from = begin;
  }
  while (from < count && !(numbers[from] == best)) from++;
  return from < count ? from : 0;
}

void widen(const uint16_t* from, float* to, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const uint32_t bits = (uint32_t)from[i] << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

void narrow(const float* from, uint16_t* to, size_t count) {
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = nan ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

}  // namespace

#define STRING_OF(name) #name
#define NAME_OF(name) STRING_OF(name)

namespace dancemoe {

extern const VectorCode INSTRUCTION_SET;
const VectorCode INSTRUCTION_SET = {NAME_OF(INSTRUCTION_SET), products_of, gate, add, add_rounded, largest, exponentials, exponential, mix_of, largest_at, widen, narrow};

}  // namespace dancemoe
