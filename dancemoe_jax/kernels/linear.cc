// Rows times one layer's weight out of an array stacked over layers: nothing is sliced out or copied first.
//
// Its meaning is linear.py's `stacked_linear_xla`. With heads, each head of x has a weight of its own.
#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> layer,
                  ffi::Buffer<ffi::PRED> active, ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> y, bool transposed) {
  const VectorCode& code = vector_code();
  const auto shape = w.dimensions();
  const size_t rows = x.dimensions()[0], layers = shape[0], heads = shape.size() == 4 ? shape[1] : 1;
  const size_t height = shape[shape.size() - 2], width = shape[shape.size() - 1];
  const size_t outputs = transposed ? width : height, inputs = transposed ? height : width;
  const int32_t index = layer.typed_data()[0];
  Type activations, stored, result;
  if (!type_of(x.element_type(), &activations) || !type_of(w.element_type(), &stored) ||
      !type_of(y->element_type(), &result) || activations == Type::kInt8 || result == Type::kInt8)
    return invalid("a type that linear does not take");
  if (index < 0 || (size_t)index >= layers) return invalid("no such layer");

  const Matrix stack{w.untyped_data(), stored, width, layers * heads * height, width};
  const Matrix weights = stack.slice(index * heads * height, (index + 1) * heads * height);
  const float* scale = nullptr;
  if (scales.size() > 0)
    scale = static_cast<const float*>(scales.get<ffi::AnyBuffer>(0)->untyped_data()) + index * heads * outputs;

  // Rows that are not active get zeros and cost nothing else.
  std::vector<size_t> chosen;
  for (size_t r = 0; r < rows; r++)
    if (active.typed_data()[r]) chosen.push_back(r);
  const size_t count = chosen.size();
  if (count < rows) std::memset(y->untyped_data(), 0, y->size_bytes());
  if (count == 0) return ffi::Error::Success();

  const Rows from(x.untyped_data(), activations, rows, heads, inputs, chosen);
  std::vector<const float*> by_head(count * heads);
  for (size_t head = 0; head < heads; head++)
    for (size_t r = 0; r < count; r++) by_head[head * count + r] = from[r * heads + head];

  const size_t block = rows_of_a_task(weights), blocks = (outputs + block - 1) / block;
  parallel(pool, heads * blocks, [&](int64_t task) {
    const size_t head = task / blocks, begin = task % blocks * block, end = std::min(outputs, begin + block);
    const Matrix own = weights.slice(head * height, (head + 1) * height);
    const bool direct = result == Type::kFloat32 && count == rows;
    Scratch wide(direct ? 0 : count * (end - begin));
    float* to = direct ? static_cast<float*>(y->untyped_data()) + head * outputs + begin : wide.data();
    const size_t stride = direct ? heads * outputs : end - begin;
    const float* const* own_rows = by_head.data() + head * count;
    if (transposed) {
      const size_t between = count > 1 ? own_rows[1] - own_rows[0] : 0;
      for (size_t r = 0; r < count; r++) std::memset(to + r * stride, 0, (end - begin) * sizeof(float));
      code.mix(own.columns(begin, end), own_rows[0], between, count, to, stride);
    } else {
      code.products(own.slice(begin, end), own_rows, count, to, stride);
    }
    for (size_t r = 0; r < count; r++) {
      if (scale != nullptr)
        for (size_t i = begin; i < end; i++) to[r * stride + i - begin] *= scale[head * outputs + i];
      if (!direct) put(to + r * stride, y->untyped_data(), result, (chosen[r] * heads + head) * outputs + begin, end - begin);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_linear(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed"));

}  // namespace dancemoe
