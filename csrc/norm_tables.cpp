// What stands between the passes of a norm (docs/se_residual.md): from moments to the table of channelwise.cpp's affine,
// and from its sums to the rows of its backward and the gradients of weight and bias. A few numbers per sample and
// channel; as one op each, since a dozen small ones cost more than the passes over a small map.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Norm : int64_t { kBatch, kInstance, kGroup };

// What shares a mean and a variance: `count` sets of `members` pairs (n, c).
struct Sets {
  int64_t norm, batch, channels, voxels, count, members;

  Sets(const Tensor& like, int64_t norm, int64_t groups, int64_t voxels)
      : norm(norm), batch(like.size(0)), channels(like.size(2)), voxels(voxels) {
    STD_TORCH_CHECK(norm >= kBatch && norm <= kGroup && groups > 0 && channels % groups == 0, "norm_tables: no norm ", norm,
                    " of ", groups, " groups of ", channels, " channels");
    count = norm == kBatch ? channels : batch * (norm == kInstance ? channels : groups);
    members = norm == kBatch ? batch : norm == kInstance ? 1 : channels / groups;
  }
  int64_t sample(int64_t set, int64_t member) const { return norm == kBatch ? member : set * members / channels; }
  int64_t channel(int64_t set, int64_t member) const { return norm == kBatch ? set : set * members % channels + member; }
  double numbers() const { return static_cast<double>(std::max<int64_t>(1, members * voxels)); }
};

void check(const Tensor& x, const Tensor& like, std::initializer_list<int64_t> size) {
  bool fits = x.is_cpu() && x.is_contiguous() && x.scalar_type() == like.scalar_type() && x.dim() == static_cast<int64_t>(size.size());
  int64_t axis = 0;
  for (const int64_t length : size) fits = fits && x.size(axis++) == length;
  STD_TORCH_CHECK(fits, "norm_tables: a tensor does not fit");
}

template <class Work>
void with_real(const Tensor& like, const Work& work) {
  if (like.scalar_type() == ScalarType::Double) return work(double{});
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Float, "norm_tables: expected float32 or float64");
  work(float{});
}

template <class Real>
const Real* data_of(const std::optional<Tensor>& x) {
  return x ? static_cast<const Real*>(x->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> table(const Tensor& moments, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                         int64_t norm, int64_t groups, int64_t voxels, double eps) {
  const int64_t batch = moments.size(0), channels = moments.size(2);
  const Sets sets(moments, norm, groups, voxels);
  check(moments, moments, {batch, 2, channels});
  if (weight) check(*weight, moments, {channels});
  if (bias) check(*bias, moments, {channels});
  Tensor out = torch::stable::new_empty(moments, {batch, 3, channels});
  Tensor rstd = torch::stable::new_empty(moments, {batch, channels}), variance = torch::stable::new_empty(moments, {batch, channels});
  with_real(moments, [&](auto real) {
    using Real = decltype(real);
    const auto* found = static_cast<const Real*>(moments.const_data_ptr());
    const Real *scales = data_of<Real>(weight), *shifts = data_of<Real>(bias);
    auto* rows = static_cast<Real*>(out.mutable_data_ptr());
    for (int64_t s = 0; s < sets.count; ++s) {
      const auto moment = [&](int64_t m, int row) {
        return static_cast<double>(found[(sets.sample(s, m) * 2 + row) * channels + sets.channel(s, m)]);
      };
      double mean = 0, squares = 0;
      for (int64_t m = 0; m < sets.members; ++m) mean += moment(m, 0) / static_cast<double>(sets.members);
      for (int64_t m = 0; m < sets.members; ++m) {
        const double distance = moment(m, 0) - mean;
        squares += moment(m, 1) + static_cast<double>(voxels) * distance * distance;
      }
      const double var = squares / sets.numbers(), scale = 1 / std::sqrt(var + eps);
      for (int64_t m = 0; m < sets.members; ++m) {
        const int64_t n = sets.sample(s, m), c = sets.channel(s, m);
        Real* row = rows + n * 3 * channels + c;
        row[0] = static_cast<Real>(mean);
        row[channels] = static_cast<Real>(scale * (scales ? static_cast<double>(scales[c]) : 1.0));
        row[2 * channels] = shifts ? shifts[c] : Real(0);
        static_cast<Real*>(rstd.mutable_data_ptr())[n * channels + c] = static_cast<Real>(scale);
        static_cast<Real*>(variance.mutable_data_ptr())[n * channels + c] = static_cast<Real>(var);
      }
    }
  });
  return {out, rstd, variance};
}

std::tuple<Tensor, Tensor, Tensor> gradient(const Tensor& sums, const Tensor& table, const Tensor& rstd, int64_t norm,
                                            int64_t groups, int64_t voxels) {
  const int64_t batch = sums.size(0), channels = sums.size(2);
  const Sets sets(sums, norm, groups, voxels);
  check(sums, sums, {batch, 2, channels});
  check(table, sums, {batch, 3, channels});
  check(rstd, sums, {batch, channels});
  Tensor rows = torch::stable::new_empty(sums, {batch, 3, channels});
  Tensor weight = torch::stable::new_empty(sums, {channels}), bias = torch::stable::new_empty(sums, {channels});
  with_real(sums, [&](auto real) {
    using Real = decltype(real);
    const auto* found = static_cast<const Real*>(sums.const_data_ptr());
    const auto* scales = static_cast<const Real*>(table.const_data_ptr());
    const auto* inverse = static_cast<const Real*>(rstd.const_data_ptr());
    for (int64_t s = 0; s < sets.count; ++s) {
      double total[2] = {};
      for (int64_t m = 0; m < sets.members; ++m) {
        const int64_t n = sets.sample(s, m), c = sets.channel(s, m);
        const double scale = scales[(n * 3 + 1) * channels + c];
        for (int k = 0; k < 2; ++k) total[k] += scale * found[(n * 2 + k) * channels + c];
      }
      for (int64_t m = 0; m < sets.members; ++m) {
        const int64_t n = sets.sample(s, m), c = sets.channel(s, m);
        const double r = inverse[n * channels + c];
        Real* row = static_cast<Real*>(rows.mutable_data_ptr()) + n * 3 * channels + c;
        row[0] = scales[(n * 3 + 1) * channels + c];
        row[channels] = static_cast<Real>(-total[1] / sets.numbers() * r * r);
        row[2 * channels] = static_cast<Real>(-total[0] / sets.numbers());
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      double of_weight = 0, of_bias = 0;
      for (int64_t n = 0; n < batch; ++n) {
        of_weight += static_cast<double>(found[(n * 2 + 1) * channels + c]) * inverse[n * channels + c];
        of_bias += found[n * 2 * channels + c];
      }
      static_cast<Real*>(weight.mutable_data_ptr())[c] = static_cast<Real>(of_weight);
      static_cast<Real*>(bias.mutable_data_ptr())[c] = static_cast<Real>(of_bias);
    }
  });
  return {rows, weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("norm_table(Tensor moments, Tensor? weight, Tensor? bias, int norm, int groups, int voxels, float eps)"
        " -> (Tensor table, Tensor rstd, Tensor variance)");
  m.def("norm_gradient(Tensor sums, Tensor table, Tensor rstd, int norm, int groups, int voxels)"
        " -> (Tensor rows, Tensor weight, Tensor bias)");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("norm_table", TORCH_BOX(&table));
  m.impl("norm_gradient", TORCH_BOX(&gradient));
}
