// XLA's buffers as the inner loops take them.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "vector_code.h"
#include "xla/ffi/api/ffi.h"

namespace dancemoe {

namespace ffi = xla::ffi;

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "dancemoe: " + message);
}

// How a buffer's elements are stored; uint16 are the bits of bfloat16. False for any other type.
inline bool type_of(ffi::DataType stored, Type* type) {
  switch (stored) {
    case ffi::F32: *type = Type::kFloat32; return true;
    case ffi::BF16:
    case ffi::U16: *type = Type::kBfloat16; return true;
    case ffi::S8: *type = Type::kInt8; return true;
    default: return false;
  }
}

// Memory that is not cleared first.
class Scratch {
 public:
  explicit Scratch(size_t count) : floats_(new float[count + 16]) {}
  float* data() { return floats_.get(); }

 private:
  std::unique_ptr<float[]> floats_;
};

// From one row of activations to the next: padded, and some cache lines more. Rows a power of two apart would all want the
// same few lines of the cache; these are a sixth of the first cache's reach apart, as six of them are used at once.
inline size_t row_stride(size_t width) { return padded(width) + 176; }
inline size_t packed_stride(size_t width) { return padded_pairs(width) + 352; }

// Numbers of a buffer of float32 or bfloat16, as float32.
inline void take(const void* from, Type type, size_t start, size_t count, float* to) {
  if (type == Type::kFloat32)
    std::memcpy(to, static_cast<const float*>(from) + start, count * sizeof(float));
  else
    vector_code().widen(static_cast<const uint16_t*>(from) + start, to, count);
}

// Float32 results into a buffer, in its type.
inline void put(const float* from, void* to, Type type, size_t start, size_t count) {
  if (type == Type::kFloat32)
    std::memcpy(static_cast<float*>(to) + start, from, count * sizeof(float));
  else
    vector_code().narrow(from, static_cast<uint16_t*>(to) + start, count);
}

// The rows that count.
inline std::vector<size_t> chosen_rows(const ffi::Buffer<ffi::PRED>& active) {
  std::vector<size_t> chosen;
  for (size_t row = 0; row < active.element_count(); row++)
    if (active.typed_data()[row]) chosen.push_back(row);
  return chosen;
}

// Rows of activations as float32, padded with zeros to a multiple of kPad, always the same distance apart. A few that are
// stored so already are not copied.
class Rows {
 public:
  // The chosen ones of rows of `heads` times `width`; each head is a row then.
  Rows(const void* data, Type type, size_t heads, size_t width, const std::vector<size_t>& chosen)
      : starts_(chosen.size() * heads) {
    const size_t stride = row_stride(width);
    const auto from = [&](size_t r) { return (chosen[r / heads] * heads + r % heads) * width; };
    const bool neighbours = !chosen.empty() && chosen.back() - chosen.front() + 1 == chosen.size();
    if (type == Type::kFloat32 && padded(width) == width && neighbours && starts_.size() <= kFewRows) {
      for (size_t r = 0; r < starts_.size(); r++) starts_[r] = static_cast<const float*>(data) + from(r);
      return;
    }
    copy_.reset(new float[starts_.size() * stride]);
    for (size_t r = 0; r < starts_.size(); r++) {
      float* row = copy_.get() + r * stride;
      take(data, type, from(r), width, row);
      std::memset(row + width, 0, (padded(width) - width) * sizeof(float));
      starts_[r] = row;
    }
  }
  const float* operator[](size_t row) const { return starts_[row]; }

 private:
  static constexpr size_t kFewRows = 4;
  std::vector<const float*> starts_;
  std::unique_ptr<float[]> copy_;
};

// Rows of 16 bits packed for weights of one type; none where products would not take them.
class PackedRows {
 public:
  PackedRows(size_t count, size_t width, Type activations, Type weights) : width_(width), weights_(weights) {
    const bool taken = weights == Type::kBfloat16 || (weights == Type::kInt8 && count >= vector_code().packed_rows);
    if (activations != Type::kBfloat16 || !taken) return;
    stride_ = packed_stride(width);
    numbers_.reset(new uint16_t[count * stride_]);
  }
  // Packs a row of float32 that bfloat16 holds exactly.
  void pack(size_t row, const float* from) {
    if (numbers_ != nullptr) vector_code().pack(from, numbers_.get() + row * stride_, width_, weights_);
  }
  // Null where there are none.
  const uint16_t* operator[](size_t row) const { return numbers_ == nullptr ? nullptr : numbers_.get() + row * stride_; }

 private:
  size_t width_, stride_ = 0;
  Type weights_;
  std::unique_ptr<uint16_t[]> numbers_;
};

// VectorCode's products, with the packed rows where there are some and they are faster.
inline void products(const Matrix& w, const float* const* x, const uint16_t* const* packed, size_t count, float* out, size_t out_stride) {
  const VectorCode& code = vector_code();
  if (packed[0] != nullptr && (w.type == Type::kBfloat16 || count >= code.packed_rows))
    code.packed_products(w, packed, count, out, out_stride);
  else
    code.products(w, x, count, out, out_stride);
}

// One number of a small array (a bias).
inline float number(const ffi::AnyBuffer& buffer, size_t index) {
  if (buffer.element_type() == ffi::F32) return static_cast<const float*>(buffer.untyped_data())[index];
  float result;
  const uint32_t bits = (uint32_t) static_cast<const uint16_t*>(buffer.untyped_data())[index] << 16;
  std::memcpy(&result, &bits, sizeof bits);
  return result;
}

// Rows of weights that one task goes through, which meet `count` rows of activations: about 128 kB of them, which is long
// enough to be read at full speed and short enough to stay in a core's cache meanwhile. Many rows do not stay there
// themselves, so more weights meet them each time.
inline size_t rows_of_a_task(const Matrix& weights, size_t count) {
  const size_t bytes = (count < 32 ? 128 : 512) << 10;
  const size_t fitting = bytes / (weights.width * size_of(weights.type) + 1);
  return std::min<size_t>(std::max<size_t>(fitting / 8 * 8, 8), 256);
}

// Activations that one task prepares, or adds up.
constexpr size_t kNumbersOfATask = 64 << 10;

// Bytes that could be read in the time that such a product takes.
inline size_t read_by(const Matrix& weights, size_t count) {
  return weights.rows * weights.width * size_of(weights.type) * (1 + count / 8);
}

}  // namespace dancemoe
