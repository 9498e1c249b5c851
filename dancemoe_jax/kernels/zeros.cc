// Zeros on large pages, which have to be asked for before memory is first touched.
#include "buffers.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dancemoe {
namespace {

constexpr size_t kHuge = 2 << 20;  // bytes of a large page

ffi::Error Zeros(ffi::ThreadPool pool, ffi::Result<ffi::AnyBuffer> out) {
  char* begin = static_cast<char*>(out->untyped_data());
  const size_t bytes = out->size_bytes();
#if defined(MADV_HUGEPAGE)
  // Whole large pages only. Where the system refuses, small ones do as well.
  char* first = begin + (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
  if (first + kHuge <= begin + bytes) madvise(first, (begin + bytes - first) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
  parallel(pool, (bytes + kHuge - 1) / kHuge, [&](int64_t task) {
    std::memset(begin + task * kHuge, 0, std::min(kHuge, bytes - task * kHuge));
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_zeros(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_zeros, Zeros, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Ret<ffi::AnyBuffer>());

}  // namespace dancemoe
