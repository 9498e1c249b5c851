// Which of the tables of inner loops this processor runs.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "vector_code.h"

namespace dancemoe {

extern const VectorCode plain;
#if defined(__x86_64__)
extern const VectorCode avx2;
extern const VectorCode avx512;
extern const VectorCode avx512bf16 __attribute__((weak));  // compilers of 2019 do not know it
#endif

#if defined(__x86_64__)
// The compiler's own question for it is younger than the instruction.
static bool has_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

static const VectorCode& best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &avx512bf16 != nullptr && has_bf16() ? avx512bf16 : avx512;
  if (fma) return avx2;
#endif
  return plain;
}

static const VectorCode* chosen = nullptr;

const VectorCode& vector_code() { return *(chosen ? chosen : chosen = &best()); }

}  // namespace dancemoe

// For tests: the instruction set in use, and another one of those that this processor has.
EXPORTED const char* dancemoe_instruction_set() { return dancemoe::vector_code().name; }

EXPORTED bool dancemoe_use_instruction_set(int level) {
  using namespace dancemoe;
  const VectorCode* tables[] = {
      &plain,
#if defined(__x86_64__)
      &avx2,
      &avx512,
      &avx512bf16,
#endif
  };
  const int count = sizeof tables / sizeof *tables;
  int highest = 0;
  for (int i = 0; i < count; i++)
    if (tables[i] == &best()) highest = i;
  if (level < 0 || level > highest) return false;
  chosen = tables[level];
  return true;
}
