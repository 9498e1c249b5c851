// The inner loops. Compiled once for each instruction set, with INSTRUCTION_SET as the name of its table.
#include "vector_code.h"

#include "products.h"
#include "simd.h"

namespace {

using dancemoe::Matrix;
using dancemoe::Type;

void products_of(const Matrix& w, const float* const* x, size_t count, float* out, size_t out_stride) {
  switch (w.type) {
    case Type::kFloat32: return products<float>(w, x, count, out, out_stride);
    case Type::kBfloat16: return products<uint16_t>(w, x, count, out, out_stride);
    case Type::kInt8: return products<int8_t>(w, x, count, out, out_stride);
  }
}

#if defined(__AVX512BF16__)
constexpr size_t kPackedRows = kRows + 1;
#else
constexpr size_t kPackedRows = SIZE_MAX;
#endif

// Rows of int8 weights as bfloat16 in pairs of halves, as many at once as stay in the cache beside x.
void unpacked_products(const Matrix& m, const uint16_t* const* x, size_t count, float* out, size_t out_stride) {
  constexpr size_t kBytes = 128 << 10;
  const size_t width = dancemoe::padded_pairs(m.width), stride = width + 4 * kLanes;  // no power of two
  const size_t fitting = kBytes / (2 * width + 1) / kColumns * kColumns;
  const size_t block = fitting < kColumns ? kColumns : fitting > kColumnBlock ? kColumnBlock : fitting;
  std::vector<uint16_t> unpacked(block * stride);
  for (size_t j = 0; j < m.rows; j += block) {
    const size_t rows = m.rows - j < block ? m.rows - j : block;
    for (size_t row = 0; row < rows; row++) {
      const int8_t* from = static_cast<const int8_t*>(m.data) + (j + row) * m.stride;
      uint16_t* to = unpacked.data() + row * stride;
      size_t i = 0;
      for (; i + 2 * kLanes <= m.width; i += 2 * kLanes) store_halves(to + i, load(from + i), load(from + i + kLanes));
      if (i == m.width) continue;
      int8_t rest[2 * kLanes] = {};
      std::memcpy(rest, from + i, m.width - i);
      store_halves(to + i, load(rest), load(rest + kLanes));
    }
    products<uint16_t>({unpacked.data(), Type::kBfloat16, stride, rows, width}, x, count, out + j, out_stride);
  }
}

void packed_products_of(const Matrix& w, const uint16_t* const* x, size_t count, float* out, size_t out_stride) {
  if (w.type == Type::kInt8) return unpacked_products(w, x, count, out, out_stride);
  products<uint16_t>(w, x, count, out, out_stride);
}

void pack(const float* from, uint16_t* to, size_t count, Type weights) {
  const size_t whole = count / (2 * kLanes) * (2 * kLanes);
  float rest[2 * kLanes] = {};
  std::memcpy(rest, from + whole, (count - whole) * sizeof(float));
  for (size_t i = 0; i < count; i += 2 * kLanes) {
    const float* own = i < whole ? from + i : rest;
    if (weights == Type::kInt8) {
      store_halves(to + i, load(own), load(own + kLanes));
      continue;
    }
    for (int lane = 0; lane < 2 * kLanes; lane++) {
      uint32_t bits;
      std::memcpy(&bits, own + lane, sizeof bits);
      to[i + lane] = bits >> 16;
    }
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

void round(float* numbers, size_t count) {
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    const uint32_t nearest = bits + 0x7fff + ((bits >> 16) & 1), nan = bits | 0x400000;
    bits = ((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest) & 0xffff0000;
    std::memcpy(numbers + i, &bits, sizeof bits);
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

float squares(const float* x, size_t count) {
  Lanes total = all(0.0f);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total = fused(load(x + i), load(x + i), total);
  if (i < count) total = fused(load_some(x + i, count - i), load_some(x + i, count - i), total);
  return sum(total);
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
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sums[r][n] = load(out + r * out_stride + n * kLanes);
  for (size_t s = 0; s < m.rows; s++) {
    if (ahead && s + kAhead < m.rows)
      for (size_t i = 0; i < N * kLanes; i += kLine) __builtin_prefetch(v + (s + kAhead) * m.stride + i, 0, 3);
    Lanes values[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) values[n] = load(v + s * m.stride + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Lanes weight = all(p[r * p_stride + s]);
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sums[r][n] = fused(weight, values[n], sums[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) store(out + r * out_stride + n * kLanes, sums[r][n]);
}

template <class T, int R>
void mix_rows(const Matrix& m, const float* p, size_t p_stride, bool ahead, float* out, size_t out_stride) {
  const T* v = static_cast<const T*>(m.data);
  // As much of each row at once as there are registers for: memory gives neighbours sooner.
  constexpr int kWide = R == 1 ? 4 * kColumns : R <= 3 ? 2 * kColumns : kColumns;
  size_t j = 0;
  for (; j + kWide * kLanes <= m.width; j += kWide * kLanes) mix_block<T, R, kWide>(v + j, m, p, p_stride, ahead, out + j, out_stride);
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
const VectorCode INSTRUCTION_SET = {NAME_OF(INSTRUCTION_SET), products_of, packed_products_of, kPackedRows, pack, gate, round, add, add_rounded, squares, largest, exponentials, exponential, mix_of, largest_at, widen, narrow};

}  // namespace dancemoe
