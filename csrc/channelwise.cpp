// The passes of norm_act, se_residual and norm_se_residual over maps [N, C, D, H, W] (docs/se_residual.md).
//
// Bytes, in maps: moments 1 read; affine 1 read (2 with a residual), 1 written; sums 2 read (3 with the output), 1 written
// if the gradient is kept; backward 2 read, 1 written. 3 to 8 FLOPs per element: all are bound by memory. Saved for
// backward: x, or nothing where a caller has it, and a few numbers per sample and channel.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "channelwise.h"
#include "outputs.h"

#define KERNELS_FILE "channelwise_kernels.h"
#include "variants.h"

namespace {

using namespace channelwise;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements that one thread works on before another may go on. Fixed, so that sums do not depend on the threads.
constexpr int64_t kStrip = int64_t{1} << 16;

// Whether the memory order is (N, D, H, W, C).
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (const int axis : {1, 4, 3, 2, 0}) {
    if (x.size(axis) != 1 && x.stride(axis) != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

struct Geometry {
  int64_t batch, channels, voxels;
  bool channels_last;
  int64_t length, strips;  // a strip has `length` voxels; per sample or, channels first, per channel

  explicit Geometry(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 5 && x.is_cpu(), "channelwise: expected a map (N, C, D, H, W) on the CPU");
    batch = x.size(0), channels = x.size(1), voxels = x.size(2) * x.size(3) * x.size(4);
    channels_last = !x.is_contiguous();
    STD_TORCH_CHECK(!channels_last || is_channels_last(x), "channelwise: maps must be dense, channels first or last");
    length = channels_last ? std::max<int64_t>(1, kStrip / std::max<int64_t>(1, channels)) : kStrip;
    strips = (voxels + length - 1) / length;
  }
  int64_t strip_channels() const { return channels_last ? channels : 1; }
  int64_t rows() const { return channels_last ? batch : batch * channels; }
  int64_t items() const { return rows() * strips; }
  // What may be touched together with one item's start-up cost.
  int64_t grain() const { return std::max<int64_t>(1, kStrip / 2 / std::max<int64_t>(1, std::min(length, voxels) * strip_channels())); }

  Strip strip(int64_t item, const void* table, const void* weights, int64_t element) const {
    const int64_t row = item / strips, begin = item % strips * length, width = strip_channels();
    const int64_t n = channels_last ? row : row / channels, c = channels_last ? 0 : row % channels;
    const auto at = [&](const void* rows) {
      return rows ? static_cast<const char*>(rows) + (n * kRows * channels + c) * element : nullptr;
    };
    const int64_t count = (std::min(begin + length, voxels) - begin) * width;
    return {row * voxels * width + begin * width, count, width, at(table), at(weights), channels};
  }
};

void check_same(const Tensor& x, const Tensor& other, const char* name) {
  bool same = other.is_cpu() && other.dim() == 5 && other.scalar_type() == x.scalar_type();
  for (int axis = 0; same && axis < 5; ++axis) same = other.size(axis) == x.size(axis);
  STD_TORCH_CHECK(same && (x.is_contiguous() ? other.is_contiguous() : is_channels_last(other)),
                  "channelwise: ", name, " must have the shape, dtype and layout of x");
}

bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

const void* table_of(const Tensor& table, const Tensor& x) {
  STD_TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.dim() == 3 && table.size(0) == x.size(0) &&
                      table.size(1) == kRows && table.size(2) == x.size(1) &&
                      table.scalar_type() == (is_wide(x) ? ScalarType::Double : ScalarType::Float),
                  "channelwise: expected a contiguous table (N, 3, C), float32 or, for float64 maps, float64");
  return table.const_data_ptr();
}

Problem problem_of(const Tensor& x, int64_t activation, double slope) {
  STD_TORCH_CHECK(activation >= kNone && activation <= kLeakyRelu, "channelwise: no activation ", activation);
  Problem p{};
  p.x = x.const_data_ptr();
  p.activation = activation, p.slope = slope;
  // A larger output would be gone from the cache before it is read.
  p.bypass_cache = static_cast<int64_t>(x.numel() * x.element_size()) >= 4 * kHugePageBytes;
  return p;
}

template <class Work>
void over_strips(const Geometry& g, const Work& work) {
  torch::stable::parallel_for(0, g.items(), g.grain(), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) work(item);
#ifdef __x86_64__
    __builtin_ia32_sfence();
#endif
  });
}

// (N, 2, C) of what was found in strips, each [2][strip channels], put together by combine(total, found, voxels before,
// voxels here), first strip first.
template <class Combine>
Tensor combined(const Tensor& x, const Geometry& g, const std::vector<double>& partial, const Combine& combine) {
  Tensor out = torch::stable::new_empty(x, {g.batch, 2, g.channels}, is_wide(x) ? ScalarType::Double : ScalarType::Float);
  const int64_t width = g.strip_channels();
  for (int64_t row = 0; row < g.rows(); ++row) {
    for (int64_t c = 0; c < width; ++c) {
      double total[2] = {};
      for (int64_t i = 0; i < g.strips; ++i) {
        const double* found = partial.data() + (row * g.strips + i) * 2 * width + c;
        const double pair[2] = {found[0], found[width]};
        combine(total, pair, static_cast<double>(i * g.length),
                static_cast<double>(std::min(g.length, g.voxels - i * g.length)));
      }
      const int64_t n = g.channels_last ? row : row / g.channels, channel = g.channels_last ? c : row % g.channels;
      for (int k = 0; k < 2; ++k) {
        const int64_t place = (n * 2 + k) * g.channels + channel;
        if (is_wide(x)) {
          static_cast<double*>(out.mutable_data_ptr())[place] = total[k];
        } else {
          static_cast<float*>(out.mutable_data_ptr())[place] = static_cast<float>(total[k]);
        }
      }
    }
  }
  return out;
}

Tensor moments(const Tensor& x) {
  const Geometry g(x);
  const Kernels kernels = OF_VARIANT(kernels_for(x.scalar_type()));
  const Problem p = problem_of(x, kNone, 0);
  std::vector<double> partial(g.items() * 2 * g.strip_channels());
  over_strips(g, [&](int64_t item) {
    kernels.moments(p, g.strip(item, nullptr, nullptr, 0), partial.data() + item * 2 * g.strip_channels());
  });
  return combined(x, g, partial, [](double* total, const double* found, double before, double here) {
    const double delta = found[0] - total[0], all = before + here;
    total[0] += delta * (here / all);
    total[1] += found[1] + delta * delta * (before * here / all);
  });
}

Tensor affine(const Tensor& x, const Tensor& table, std::optional<Tensor> residual, int64_t activation, double slope) {
  const Geometry g(x);
  const Kernels kernels = OF_VARIANT(kernels_for(x.scalar_type()));
  if (residual) check_same(x, *residual, "the residual");
  const void* rows = table_of(table, x);
  Tensor out = output_like(x);
  Problem p = problem_of(x, activation, slope);
  p.other = residual ? residual->const_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  over_strips(g, [&](int64_t item) { kernels.affine(p, g.strip(item, rows, nullptr, table.element_size())); });
  return out;
}

std::tuple<Tensor, Tensor> affine_sums(const Tensor& grad, const Tensor& x, const Tensor& table,
                                       std::optional<Tensor> output, int64_t activation, double slope, bool keep) {
  const Geometry g(x);
  const Kernels kernels = OF_VARIANT(kernels_for(x.scalar_type()));
  check_same(x, grad, "the gradient");
  if (output) check_same(x, *output, "the output");
  const void* rows = table_of(table, x);
  Tensor kept = keep ? output_like(x) : torch::stable::new_empty(grad, {0});
  Problem p = problem_of(x, activation, slope);
  p.grad = grad.const_data_ptr();
  p.other = output ? output->const_data_ptr() : nullptr;
  p.out = keep ? kept.mutable_data_ptr() : nullptr;
  std::vector<double> partial(g.items() * 2 * g.strip_channels());
  over_strips(g, [&](int64_t item) {
    kernels.sums(p, g.strip(item, rows, nullptr, table.element_size()), partial.data() + item * 2 * g.strip_channels());
  });
  const auto add = [](double* total, const double* found, double, double) {
    total[0] += found[0];
    total[1] += found[1];
  };
  return {combined(x, g, partial, add), kept};
}

Tensor affine_backward(const Tensor& grad, const Tensor& x, const Tensor& table, const Tensor& weights,
                       int64_t activation, double slope) {
  const Geometry g(x);
  const Kernels kernels = OF_VARIANT(kernels_for(x.scalar_type()));
  check_same(x, grad, "the gradient");
  const void* rows = table_of(table, x);
  const void* weight_rows = table_of(weights, x);
  Tensor out = output_like(x);
  Problem p = problem_of(x, activation, slope);
  p.grad = grad.const_data_ptr();
  p.out = out.mutable_data_ptr();
  over_strips(g, [&](int64_t item) { kernels.backward(p, g.strip(item, rows, weight_rows, table.element_size())); });
  return out;
}

}  // namespace

#define ACTIVATION "int activation, float slope"

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("channel_moments(Tensor x) -> Tensor");
  m.def("channel_affine(Tensor x, Tensor table, Tensor? residual, " ACTIVATION ") -> Tensor");
  m.def("channel_affine_sums(Tensor grad, Tensor x, Tensor table, Tensor? out, " ACTIVATION ", bool keep)"
        " -> (Tensor sums, Tensor before_activation)");
  m.def("channel_affine_backward(Tensor grad, Tensor x, Tensor table, Tensor weights, " ACTIVATION ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&moments));
  m.impl("channel_affine", TORCH_BOX(&affine));
  m.impl("channel_affine_sums", TORCH_BOX(&affine_sums));
  m.impl("channel_affine_backward", TORCH_BOX(&affine_backward));
}
