// The likeliest token of each row of logits that counts.
//
// Its meaning is argmax.py's `likeliest_xla`. XLA goes through a row one number after another.
#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

ffi::Error Argmax(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::PRED> active,
                  ffi::Result<ffi::Buffer<ffi::S32>> out) {
  const size_t rows = logits.dimensions()[0], width = logits.dimensions()[1];
  std::vector<size_t> chosen;
  for (size_t row = 0; row < rows; row++) {
    out->typed_data()[row] = 0;
    if (active.typed_data()[row]) chosen.push_back(row);
  }
  parallel(pool, chosen.size(), [&](int64_t task) {
    const size_t row = chosen[task];
    out->typed_data()[row] = vector_code().largest_at(logits.typed_data() + row * width, width);
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_argmax(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_argmax, Argmax,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

}  // namespace dancemoe
