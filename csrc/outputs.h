// Memory for large outputs.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

constexpr int64_t kHugePageBytes = int64_t{4} << 20;  // from here on outputs ask for huge pages

// An uninitialised tensor like x, strides included.
inline torch::stable::Tensor output_like(const torch::stable::Tensor& x) {
  torch::stable::Tensor out = torch::stable::empty_like(x);  // keeps the strides of dense tensors
#ifdef __linux__
  const auto bytes = static_cast<int64_t>(out.numel() * out.element_size());
  if (bytes >= kHugePageBytes) {
    // The first touch of fresh memory in small pages costs several times what writing it does.
    constexpr uintptr_t kPage = 4096;
    const auto first = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), bytes - kPage, MADV_HUGEPAGE);
  }
#endif
  return out;
}
