// What linear_argmax needs of a chunk: the class with the largest logit of [C, V], and that logit.
//
// Bytes: C V sizeof(T) read, V (1 + sizeof(T)) written. torch.max over the first axis keeps 8-byte indices and is bound
// by instructions; here running values and narrow indices stay in the first-level cache while the classes pass by.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // voxels
constexpr int64_t kSerialVoxels = int64_t{1} << 12;

// Index has the width of Real, so that one comparison serves both selections.
template <class Real, class Index>
void block_argmax(const Real* x, int64_t classes, int64_t voxels, int64_t count, uint8_t* label, Real* best) {
  Index index[kBlock] = {};
  std::copy(x, x + count, best);
  for (int64_t c = 1; c < classes; ++c) {
    const Real* row = x + c * voxels;
    for (int64_t v = 0; v < count; ++v) {
      // as torch.max: the first of equals, and NaN above all
      const bool larger = (row[v] > best[v]) | ((row[v] != row[v]) & (best[v] == best[v]));
      best[v] = larger ? row[v] : best[v];
      index[v] = larger ? static_cast<Index>(c) : index[v];
    }
  }
  std::copy(index, index + count, label);
}

template <class Real, class Index>
void run(const Tensor& logits, Tensor& labels, Tensor& largest) {
  const int64_t classes = logits.size(0), voxels = logits.size(1), blocks = (voxels + kBlock - 1) / kBlock;
  const auto* x = static_cast<const Real*>(logits.const_data_ptr());
  auto* label = static_cast<uint8_t*>(labels.mutable_data_ptr());
  auto* best = static_cast<Real*>(largest.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, kSerialVoxels / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * kBlock;
      block_argmax<Real, Index>(x + start, classes, voxels, std::min(kBlock, voxels - start), label + start, best + start);
    }
  });
}

std::tuple<Tensor, Tensor> class_argmax(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_cpu() && logits.is_contiguous(), "class_argmax: expected contiguous (C, V) on the CPU");
  STD_TORCH_CHECK(logits.size(0) >= 1 && logits.size(0) <= 256, "class_argmax: expected 1 to 256 classes, got ", logits.size(0));
  Tensor labels = torch::stable::new_empty(logits, {logits.size(1)}, ScalarType::Byte);
  Tensor largest = torch::stable::new_empty(logits, {logits.size(1)});
  switch (logits.scalar_type()) {
    case ScalarType::Float: run<float, int32_t>(logits, labels, largest); break;
    case ScalarType::Double: run<double, int64_t>(logits, labels, largest); break;
    default: STD_TORCH_CHECK(false, "class_argmax: unsupported dtype ", torch::headeronly::toString(logits.scalar_type()));
  }
  return {labels, largest};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("class_argmax(Tensor logits) -> (Tensor labels, Tensor largest)");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("class_argmax", TORCH_BOX(&class_argmax));
}
