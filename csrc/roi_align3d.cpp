// ROI-align of [N, C, D, H, W] into [K, C, d, h, w], and the gradient of the input (docs/roi.md).
//
// Bytes: forward reads every voxel in a box and writes the result; backward reads the gradient of the result and writes
// that of the input once. Averages of samples are averages of voxels with other weights, summed up per axis beforehand,
// so that the number of samples costs nothing per channel. Only the boxes are kept for backward.

#include <cmath>
#include <map>
#include <vector>

#include "roi_sampling.h"

namespace {

using namespace roi_sampling;

struct Options {
  std::vector<double> scale;
  int64_t sampling_ratio;
  bool aligned;
};

// As reference.samples and its taps, operation by operation, in the arithmetic of the boxes.
template <class Real, class T>
Axis<Real> axis_of(T low, T high, T scale, int64_t out, const Options& options, int64_t size) {
  Axis<Real> axis;
  const T offset = options.aligned ? T(0.5) : T(0);
  const T start = low * scale - offset;
  T extent = high * scale - offset - start;
  if (!options.aligned && !(extent > 1)) extent = 1;
  const T bin = extent / static_cast<T>(out);
  const bool finite = std::isfinite(start) && std::isfinite(bin);
  const T adaptive = finite ? std::max(std::ceil(bin), T(0)) : T(0);
  // Counted in floating point: of a box that is far too large there are more than integers can say.
  const T wanted = options.sampling_ratio > 0 ? static_cast<T>(options.sampling_ratio) : adaptive;
  const T count = finite && extent >= 0 ? wanted : T(0);
  std::map<int64_t, double> weights;
  for (int64_t o = 0; o < out; ++o) {
    const T from = start + static_cast<T>(o) * bin;
    const T first = bin > 0 && count > 0 ? std::min(std::max(std::floor((-1 - from) / (bin / count)) - 1, T(0)), count - 1) : T(0);
    weights.clear();
    for (T number = first; number < count; number += 1) {
      T x = from + (number + T(0.5)) * bin / count;
      if (x > static_cast<T>(size)) break;
      if (!(x >= -1)) {
        if (number + 1 == number) break;
        continue;
      }
      x = std::min(std::max(x, T(0)), static_cast<T>(size - 1));
      const T lower = std::floor(x);
      const auto index = static_cast<int64_t>(lower);
      weights[index] += static_cast<double>(1 - (x - lower)) * (1 / static_cast<double>(count));
      weights[std::min(index + 1, size - 1)] += static_cast<double>(x - lower) * (1 / static_cast<double>(count));
      if (number + 1 == number) break;
    }
    for (const auto& [index, weight] : weights) axis.add(index, weight);
    axis.next();
  }
  axis.finish();
  return axis;
}

template <class Real, class T>
std::vector<Box<Real>> boxes_of(const Tensor& rois, const int64_t* out, const Options& options, const int64_t* size) {
  const auto* row = static_cast<const T*>(rois.const_data_ptr());
  std::vector<Box<Real>> boxes;
  for (int64_t k = 0; k < rois.size(0); ++k, row += 7) {
    const auto axis = [&](int a) {
      return axis_of<Real>(row[1 + a], row[4 + a], static_cast<T>(options.scale[a]), out[a], options, size[2 + a]);
    };
    const bool known = row[0] >= 0 && row[0] < static_cast<T>(size[0]);
    boxes.push_back(known ? Box<Real>{static_cast<int64_t>(row[0]), axis(0), axis(1), axis(2)} : Box<Real>{-1, {}, {}, {}});
  }
  return boxes;
}

template <class Real>
std::vector<Box<Real>> boxes_in(const Tensor& rois, const int64_t* out, const Options& options, const int64_t* size) {
  STD_TORCH_CHECK(rois.is_cpu() && rois.dim() == 2 && rois.size(1) == 7 && options.scale.size() == 3, "roi_align_3d: expected rois (K, 7)");
  const Tensor dense = torch::stable::contiguous(rois);
  if (dense.scalar_type() == ScalarType::Double) return boxes_of<Real, double>(dense, out, options, size);
  STD_TORCH_CHECK(dense.scalar_type() == ScalarType::Float, "roi_align_3d: expected rois in float32 or float64");
  return boxes_of<Real, float>(dense, out, options, size);
}

Tensor forward(const Tensor& input, const Tensor& rois, std::vector<int64_t> out, std::vector<double> scale,
               int64_t sampling_ratio, bool aligned) {
  STD_TORCH_CHECK(out.size() == 3, "roi_align_3d: expected three output sizes");
  const Options options{std::move(scale), sampling_ratio, aligned};
  const View view(input);
  const int64_t channels = view.size[1], volume = out[0] * out[1] * out[2];
  const bool channels_last = is_channels_last(input);
  Tensor result = empty(input, {rois.size(0), channels, out[0], out[1], out[2]}, view.type, channels_last);
  with_type(view.type, [&](auto element) {
    using Out = decltype(element);
    const auto boxes = boxes_in<Wide<Out>>(rois, out.data(), options, view.size);
    const std::vector<Channels> all(boxes.size(), Channels{0, channels});
    Gather<Out> gather{{}, {view}, {boxes}, {all}, channels, channels_last};
    auto* data = static_cast<Out*>(result.mutable_data_ptr());
    for (size_t k = 0; k < boxes.size(); ++k) gather.regions.push_back({data + k * channels * volume, out[0], out[1], out[2]});
    gather.run();
  });
  return result;
}

Tensor backward(const Tensor& grad, const Tensor& rois, std::vector<double> scale, int64_t sampling_ratio, bool aligned,
                std::vector<int64_t> shape, int64_t dtype, bool channels_last) {
  const Options options{std::move(scale), sampling_ratio, aligned};
  const View view(grad);
  STD_TORCH_CHECK(shape.size() == 5 && dtype >= 0 && dtype < 4 && view.size[0] == rois.size(0) && view.size[1] == shape[1],
                  "roi_align_3d: the gradient does not fit");
  Tensor result = empty(grad, shape, kTypes[dtype], channels_last);
  with_type(view.type, [&](auto g) {
    using G = decltype(g);
    const auto boxes = boxes_in<Wide<G>>(rois, view.size + 2, options, shape.data());
    std::vector<Owed<G>> owed;
    for (size_t k = 0; k < boxes.size(); ++k) {
      const G* data = static_cast<const G*>(view.data) + k * view.stride[0];
      owed.push_back({data, {view.stride[1], view.stride[2], view.stride[3], view.stride[4]}, {0, shape[1]}, &boxes[k]});
    }
    with_type(kTypes[dtype], [&](auto s) { scatter_into<G, decltype(s)>(result, nullptr, owed, channels_last); });
  });
  return result;
}

}  // namespace

#define OPTIONS "float[] scale, int sampling_ratio, bool aligned"

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("roi_align_3d_forward(Tensor input, Tensor rois, int[] output_size, " OPTIONS ") -> Tensor");
  m.def("roi_align_3d_backward(Tensor grad, Tensor rois, " OPTIONS ", int[] shape, int dtype, bool channels_last) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("roi_align_3d_forward", TORCH_BOX(&forward));
  m.impl("roi_align_3d_backward", TORCH_BOX(&backward));
}
