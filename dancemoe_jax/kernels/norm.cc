// Root-mean-square norm of rows, and rotary positions of heads with or without such a norm before.
//
// Their meaning is norm.py's `rms_norm_xla` and `rotated_xla`. XLA adds up squares in another order where there are more rows,
// and goes through rows that do not count as well.
#include <cmath>

#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

constexpr size_t kTask = 32 << 10;  // numbers that one task norms

// A norm's factor of each number.
struct Scale {
  std::vector<float> factors;
  float eps;

  void apply(float* row, size_t width, bool rounded) const {
    const VectorCode& code = vector_code();
    const float by = 1.0f / std::sqrt(code.squares(row, width) / (float)width + eps);
    for (size_t i = 0; i < width; i++) row[i] *= by;
    if (rounded) code.round(row, width);
    for (size_t i = 0; i < width; i++) row[i] *= factors[i];
  }
};

// False for a type that norms do not take.
bool read(const ffi::AnyBuffer& from, float eps, Scale* scale) {
  Type type;
  if (!type_of(from.element_type(), &type) || type == Type::kInt8) return false;
  scale->factors.resize(from.element_count()), scale->eps = eps;
  take(from.untyped_data(), type, 0, scale->factors.size(), scale->factors.data());
  return true;
}

// each(first of its rows, their number) for each row that counts, shared out over tasks; rows that do not get zeros.
template <class Each>
void of_active(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::Buffer<ffi::PRED>& active, ffi::AnyBuffer& out, Each each) {
  const std::vector<size_t> chosen = chosen_rows(active);
  if (chosen.size() < active.element_count()) std::memset(out.untyped_data(), 0, out.size_bytes());
  if (chosen.empty()) return;
  const size_t numbers = x.element_count() / active.element_count(), block = std::max<size_t>(1, kTask / numbers);
  parallel(pool, (chosen.size() + block - 1) / block, [&](int64_t task) {
    Scratch scratch(numbers);
    for (size_t i = task * block; i < std::min(chosen.size(), (task + 1) * block); i++) each(chosen[i], numbers, scratch.data());
  });
}

ffi::Error Norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::Buffer<ffi::PRED> active,
                ffi::Result<ffi::AnyBuffer> out, float eps) {
  const size_t width = x.dimensions()[1];
  Type type;
  Scale norm;
  if (!type_of(x.element_type(), &type) || type == Type::kInt8 || !read(scale, eps, &norm) || out->element_type() != x.element_type())
    return invalid("a type that norms do not take");
  of_active(pool, x, active, *out, [&](size_t row, size_t numbers, float* own) {
    take(x.untyped_data(), type, row * numbers, numbers, own);
    for (size_t i = 0; i < numbers; i += width) norm.apply(own + i, width, type == Type::kBfloat16);
    put(own, out->untyped_data(), type, row * numbers, numbers);
  });
  return ffi::Error::Success();
}

// The pairs (a, b) of one head turned by their angles.
template <bool interleaved>
void rotate(float* head, const float* cosines, const float* sines, size_t pairs) {
  for (size_t i = 0; i < pairs; i++) {
    float *first = head + (interleaved ? 2 * i : i), *second = first + (interleaved ? 1 : pairs);
    const float a = *first, b = *second;
    *first = a * cosines[i] - b * sines[i], *second = b * cosines[i] + a * sines[i];
  }
}

ffi::Error Rotated(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer cosines, ffi::AnyBuffer sines, ffi::Buffer<ffi::PRED> active,
                   ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> out, float eps,
                   bool interleaved) {
  const size_t width = x.dimensions()[2], pairs = width / 2;
  Type type, angles;
  Scale norm;
  const bool normed = scales.size() > 0;
  if (!type_of(x.element_type(), &type) || type == Type::kInt8 || out->element_type() != x.element_type() ||
      !type_of(cosines.element_type(), &angles) || angles == Type::kInt8 || sines.element_type() != cosines.element_type() ||
      (normed && !read(scales.get<ffi::AnyBuffer>(0).value(), eps, &norm)))
    return invalid("a type that rotations do not take");
  const bool rounded = type == Type::kBfloat16;
  of_active(pool, x, active, *out, [&](size_t row, size_t numbers, float* own) {
    take(x.untyped_data(), type, row * numbers, numbers, own);
    for (size_t i = 0; normed && i < numbers; i += norm.factors.size()) norm.apply(own + i, norm.factors.size(), rounded);
    if (normed && rounded) vector_code().round(own, numbers);
    Scratch both(width);
    float *cos = both.data(), *sin = cos + pairs;
    take(cosines.untyped_data(), angles, row * pairs, pairs, cos);
    take(sines.untyped_data(), angles, row * pairs, pairs, sin);
    for (size_t i = 0; i < numbers; i += width) (interleaved ? rotate<true> : rotate<false>)(own + i, cos, sin, pairs);
    put(own, out->untyped_data(), type, row * numbers, numbers);
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_norm(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

EXPORTED XLA_FFI_Error* dancemoe_rotated(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_rotated, Rotated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("interleaved"));

}  // namespace dancemoe
