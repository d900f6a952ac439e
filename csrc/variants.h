// The variants of a kernel file for several instruction sets, and which of them this machine runs. A source defines
// KERNELS_FILE and includes this; the file is compiled in the namespaces portable, avx2 and avx512 with
//   ARCH          namespace
//   ARCH_TARGET   attribute of every function
//   ARCH_BYTES    size of a register
//   ARCH_X86      whether <immintrin.h> may be used, up to that size

#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstdlib>
#include <cstring>

// Vectors are passed between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

#define ARCH portable
#define ARCH_TARGET
#define ARCH_BYTES 16
#include KERNELS_FILE
#undef ARCH
#undef ARCH_TARGET
#undef ARCH_BYTES

#ifdef __x86_64__
#define ARCH_X86
#define ARCH avx2
#define ARCH_TARGET __attribute__((target("avx2,fma,f16c")))
#define ARCH_BYTES 32
#include KERNELS_FILE
#undef ARCH
#undef ARCH_TARGET
#undef ARCH_BYTES

#define ARCH avx512
#define ARCH_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define ARCH_BYTES 64
#include KERNELS_FILE
#undef ARCH
#undef ARCH_TARGET
#undef ARCH_BYTES
#undef ARCH_X86
#endif

enum class Variant { kPortable, kAvx2, kAvx512 };

// What the processor has, or less where ATEN_CPU_CAPABILITY, PyTorch's own variable, says `default` or `avx2`.
inline Variant variant() {
  static const Variant found = [] {
#ifdef __x86_64__
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const auto at_most = [&](const char* name) { return wanted && !std::strcmp(wanted, name); };
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && !at_most("avx2") && !at_most("default")) return Variant::kAvx512;
    if (avx2 && !at_most("default")) return Variant::kAvx2;
#endif
    return Variant::kPortable;
  }();
  return found;
}

// FUNCTION of the namespace for this machine.
#ifdef __x86_64__
#define OF_VARIANT(FUNCTION)                       \
  (variant() == Variant::kAvx512 ? avx512::FUNCTION \
   : variant() == Variant::kAvx2 ? avx2::FUNCTION   \
                                 : portable::FUNCTION)
#else
#define OF_VARIANT(FUNCTION) portable::FUNCTION
#endif
