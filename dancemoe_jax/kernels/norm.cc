// Root-mean-square norm of rows.
//
// Its meaning is norm.py's `rms_norm_xla`. XLA adds up squares in another order where there are more rows.
#include <cmath>

#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

constexpr size_t kTask = 32 << 10;  // numbers that one task norms

ffi::Error Norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> out, float eps) {
  const VectorCode& code = vector_code();
  const size_t rows = x.dimensions()[0], width = x.dimensions()[1];
  Type type, scale_type;
  if (!type_of(x.element_type(), &type) || !type_of(scale.element_type(), &scale_type) || type == Type::kInt8 ||
      scale_type == Type::kInt8 || out->element_type() != x.element_type())
    return invalid("a type that norms do not take");
  std::vector<float> factors(width);
  for (size_t i = 0; i < width; i++) factors[i] = number(scale, i);

  const size_t block = std::max<size_t>(1, kTask / width);
  parallel(pool, (rows + block - 1) / block, [&](int64_t task) {
    Scratch scratch(width);
    float* row = scratch.data();
    for (size_t r = task * block; r < std::min(rows, (task + 1) * block); r++) {
      if (type == Type::kFloat32)
        std::memcpy(row, static_cast<const float*>(x.untyped_data()) + r * width, width * sizeof(float));
      else
        code.widen(static_cast<const uint16_t*>(x.untyped_data()) + r * width, row, width);
      const float by = 1.0f / std::sqrt(code.squares(row, width) / (float)width + eps);
      for (size_t i = 0; i < width; i++) row[i] *= by;
      if (type == Type::kBfloat16) code.round(row, width);
      for (size_t i = 0; i < width; i++) row[i] *= factors[i];
      put(row, out->untyped_data(), type, r * width, width);
    }
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
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

}  // namespace dancemoe
