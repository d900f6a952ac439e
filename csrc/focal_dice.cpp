// Sums of the focal and dice loss per sample and class, and the gradient of the logits (docs/focal_dice.md).
//
// Bytes, S of logits and L of target: forward reads S + L, backward reads S + L and writes S. About 20 FLOPs per logit
// and pass, one exponential among them. Nothing of the size of the logits is kept for backward.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "focal_dice.h"
#include "outputs.h"

#define KERNELS_FILE "focal_dice_kernels.h"
#include "variants.h"

namespace {

using namespace focal_dice;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Problem problem_of(const Tensor& logits, const Tensor& target, int64_t mode, double gamma, std::optional<int64_t> ignore) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_cpu(), "focal_dice: expected logits (N, C, V) on the CPU");
  Problem p{};
  p.batch = logits.size(0), p.classes = logits.size(1), p.voxels = logits.size(2);
  p.multi_hot = target.dim() == 3;
  STD_TORCH_CHECK(target.is_cpu() && target.is_contiguous() && target.size(0) == p.batch &&
                      target.size(target.dim() - 1) == p.voxels && (p.multi_hot ? target.size(1) == p.classes : target.dim() == 2),
                  "focal_dice: expected a contiguous target (N, V) or (N, C, V) on the CPU");
  STD_TORCH_CHECK(mode == kSoftmax || mode == kSigmoid || mode == kSoftmaxDiceSigmoidFocal, "focal_dice: no mode ", mode);
  STD_TORCH_CHECK(!p.multi_hot || (mode == kSigmoid && target.scalar_type() == ScalarType::Byte),
                  "focal_dice: a multi-hot target must be uint8, for independent channels");
  p.channels_last = !logits.is_contiguous();
  STD_TORCH_CHECK(!p.channels_last || torch::stable::transpose(logits, 1, 2).is_contiguous(),
                  "focal_dice: logits must be dense, channels first or last");
  p.logits = logits.const_data_ptr();
  p.target = target.const_data_ptr();
  p.mode = mode, p.gamma = gamma;
  p.has_ignore = ignore.has_value(), p.ignore = ignore.value_or(0);
  return p;
}

std::vector<Sample> samples_of(const Problem& p, const std::optional<Tensor>& class_mask) {
  std::vector<Sample> samples(p.batch);
  const std::optional<Tensor> dense = class_mask ? std::optional(torch::stable::contiguous(*class_mask)) : std::nullopt;
  const auto* mask = dense ? static_cast<const bool*>(dense->const_data_ptr()) : nullptr;
  for (int64_t n = 0; n < p.batch; ++n) {
    Sample& s = samples[n];
    s.index = n;
    for (int64_t c = 0; c < p.classes; ++c) {
      if (!mask || mask[n * p.classes + c]) s.channels.push_back(static_cast<int32_t>(c));
    }
    s.slots.assign(p.classes, s.count());
    for (int a = 0; a < s.count(); ++a) s.slots[s.channels[a]] = a;
    s.identity = s.count() == p.classes;
  }
  return samples;
}

std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, int64_t mode, double gamma,
                                   std::optional<int64_t> ignore, std::optional<Tensor> class_mask) {
  const Problem p = problem_of(logits, target, mode, gamma, ignore);
  const Kernels kernels = OF_VARIANT(kernels_for(logits.scalar_type(), p.multi_hot));
  const Decode decode = p.multi_hot ? nullptr : OF_VARIANT(decode_for(target.scalar_type()));
  const std::vector<Sample> samples = samples_of(p, class_mask);
  const bool wide = logits.scalar_type() == ScalarType::Double;
  Tensor sums = torch::stable::new_zeros(logits, {p.batch, kRows, p.classes}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor wrong = torch::stable::new_zeros(logits, {p.batch}, ScalarType::Long);
  const int64_t chunks = (p.voxels + kChunk - 1) / kChunk, entries = kRows * p.classes;
  std::vector<double> partial(p.batch * chunks * entries);
  std::vector<int64_t> partial_wrong(p.batch * chunks);
  torch::stable::parallel_for(0, p.batch * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item % chunks * kChunk, end = std::min(begin + kChunk, p.voxels);
      const Sample& s = samples[item / chunks];
      partial_wrong[item] = kernels.forward(p, s, decode, begin, end, partial.data() + item * entries);
    }
  });
  auto* wrong_out = static_cast<int64_t*>(wrong.mutable_data_ptr());
  for (int64_t n = 0; n < p.batch; ++n) {
    const Sample& s = samples[n];
    std::vector<double> total(entries);
    for (int64_t item = n * chunks; item < (n + 1) * chunks; ++item) {
      for (int64_t i = 0; i < entries; ++i) total[i] += partial[item * entries + i];
      wrong_out[n] += partial_wrong[item];
    }
    const int slots = s.count();
    if (!p.multi_hot) {
      double voxels = 0;
      for (int a = 0; a < slots; ++a) voxels += total[kTarget * slots + a];
      for (int a = 0; a < slots; ++a) total[kVoxels * slots + a] = mode == kSoftmax ? total[kTarget * slots + a] : voxels;
    }
    for (int row = 0; row < kRows; ++row) {
      for (int a = 0; a < slots; ++a) {
        const int64_t place = (n * kRows + row) * p.classes + s.channels[a];
        const double value = total[row * slots + a];
        if (wide) {
          static_cast<double*>(sums.mutable_data_ptr())[place] = value;
        } else {
          static_cast<float*>(sums.mutable_data_ptr())[place] = static_cast<float>(value);
        }
      }
    }
  }
  return {sums, wrong};
}

void run_backward(Problem p, const Tensor& logits, const Tensor& target, const Tensor& grad_sums, Tensor& grad,
                  const std::optional<Tensor>& class_mask, bool fresh) {
  const Kernels kernels = OF_VARIANT(kernels_for(logits.scalar_type(), p.multi_hot));
  const Decode decode = p.multi_hot ? nullptr : OF_VARIANT(decode_for(target.scalar_type()));
  std::vector<Sample> samples = samples_of(p, class_mask);
  const bool wide = grad_sums.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(grad_sums.is_contiguous() && grad_sums.numel() == p.batch * kRows * p.classes &&
                      (wide || grad_sums.scalar_type() == ScalarType::Float),
                  "focal_dice: expected the gradient of the sums, contiguous (N, 6, C), float32 or float64");
  for (Sample& s : samples) {
    s.grad.assign(kRows * (s.count() + 1), 0);
    for (int row = 0; row < kRows; ++row) {
      for (int a = 0; a < s.count(); ++a) {
        const int64_t place = (s.index * kRows + row) * p.classes + s.channels[a];
        s.grad[row * (s.count() + 1) + a] = wide ? static_cast<const double*>(grad_sums.const_data_ptr())[place]
                                                 : static_cast<const float*>(grad_sums.const_data_ptr())[place];
      }
    }
  }
  p.grad = grad.mutable_data_ptr();
  const int64_t element = logits.element_size();
  p.bypass_cache = fresh && logits.numel() * element >= 4 * kHugePageBytes && !p.channels_last &&
                   reinterpret_cast<uintptr_t>(p.grad) % 64 == 0 && p.voxels * element % 64 == 0;
  const int64_t chunks = (p.voxels + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, p.batch * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item % chunks * kChunk, end = std::min(begin + kChunk, p.voxels);
      kernels.backward(p, samples[item / chunks], decode, begin, end);
    }
#ifdef __x86_64__
    __builtin_ia32_sfence();
#endif
  });
}

Tensor backward(const Tensor& logits, const Tensor& target, const Tensor& grad_sums, int64_t mode, double gamma,
                std::optional<int64_t> ignore, std::optional<Tensor> class_mask) {
  const Problem p = problem_of(logits, target, mode, gamma, ignore);
  Tensor grad = output_like(logits);
  run_backward(p, logits, target, grad_sums, grad, class_mask, true);
  return grad;
}

void backward_(Tensor logits, const Tensor& target, const Tensor& grad_sums, int64_t mode, double gamma,
               std::optional<int64_t> ignore, std::optional<Tensor> class_mask) {
  // Every tile is read before it is written, by the thread that writes it.
  run_backward(problem_of(logits, target, mode, gamma, ignore), logits, target, grad_sums, logits, class_mask, false);
}

}  // namespace

#define OPTIONS "int mode, float gamma, int? ignore_index, Tensor? class_mask"

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("focal_dice_forward(Tensor logits, Tensor target, " OPTIONS ") -> (Tensor sums, Tensor wrong)");
  m.def("focal_dice_backward(Tensor logits, Tensor target, Tensor grad_sums, " OPTIONS ") -> Tensor");
  m.def("focal_dice_backward_(Tensor(a!) logits, Tensor target, Tensor grad_sums, " OPTIONS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("focal_dice_forward", TORCH_BOX(&forward));
  m.impl("focal_dice_backward", TORCH_BOX(&backward));
  m.impl("focal_dice_backward_", TORCH_BOX(&backward_));
}
