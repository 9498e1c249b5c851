// The inner loops, as a table of functions: one table for each instruction set, chosen when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

// What Python looks up in the library; everything else is hidden.
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace dancemoe {

// How weights, keys and values are stored.
enum class Type { kFloat32, kBfloat16, kInt8 };

inline size_t size_of(Type type) { return type == Type::kFloat32 ? 4 : type == Type::kBfloat16 ? 2 : 1; }

// `rows` vectors of `width` elements, `stride` elements apart.
struct Matrix {
  const void* data;
  Type type;
  size_t stride;
  size_t rows;
  size_t width;

  // Rows `begin` to `end`.
  Matrix slice(size_t begin, size_t end) const {
    return {static_cast<const char*>(data) + begin * stride * size_of(type), type, stride, end - begin, width};
  }
  // Columns `begin` to `end`.
  Matrix columns(size_t begin, size_t end) const {
    return {static_cast<const char*>(data) + begin * size_of(type), type, stride, rows, end - begin};
  }
};

// Vectors of x are float32, padded with zeros to a multiple of this many.
constexpr size_t kPad = 16;
inline size_t padded(size_t width) { return (width + kPad - 1) / kPad * kPad; }

// Each output is one sum in one order, which depends on the width alone: not on how many rows or outputs there are, nor on
// which of them a call computes.
struct VectorCode {
  const char* name;

  // out[r * out_stride + j] = <x[r], w row j>, for r < count.
  void (*products)(const Matrix& w, const float* const* x, size_t count, float* out, size_t out_stride);

  // gate[i] = silu(gate[i]) * up[i], or with a limit gpt-oss's clamped form; `count` need not be a multiple of anything.
  void (*gate)(float* gate, const float* up, size_t count, float limit);

  // out[i] += factor * x[i].
  void (*add)(float* out, const float* x, size_t count, float factor);

  // The same with factor * x[i] rounded to a multiple of `grid` first, a power of two.
  void (*add_rounded)(float* out, const float* x, size_t count, float factor, float grid);

  // The largest magnitude in x.
  float (*largest)(const float* x, size_t count);

  // Numbers in [begin, end) become e^(x - their maximum), the others up to `count` (a multiple of 16) zero. Returns the
  // sum, and the maximum through `maximum`.
  float (*exponentials)(float* numbers, size_t begin, size_t end, size_t count, float* maximum);

  // e^x of one number, as `exponentials` computes it: the C library's differs between machines.
  float (*exponential)(float x);

  // out[r * out_stride + j] += p[r * p_stride + s] * v row s [j], for s in order, for r < count.
  void (*mix)(const Matrix& v, const float* p, size_t p_stride, size_t count, float* out, size_t out_stride);

  // Index of the largest number, of several such the first one; numbers that are none count as smallest.
  size_t (*largest_at)(const float* numbers, size_t count);

  // Conversion of activations.
  void (*widen)(const uint16_t* from, float* to, size_t count);
  void (*narrow)(const float* from, uint16_t* to, size_t count);  // to the nearest, ties to even
};

const VectorCode& vector_code();

}  // namespace dancemoe
