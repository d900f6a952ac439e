// ROIs of several sources side by side, [K, sum C, d, h, w], and the gradients of the sources (docs/roi.md).
//
// Bytes: forward reads every voxel in a box and writes the result, once each; backward reads the gradient of the result,
// once per voxel that a sample interpolates, and writes the gradients of the sources once. No temporaries; only centres
// are kept for backward.

#include <cmath>
#include <vector>

#include "roi_sampling.h"

namespace {

using namespace roi_sampling;

// As reference.Boxes.
struct Boxes {
  std::vector<double> centers;  // (K, 4)
  std::vector<int64_t> roi, out;
  std::vector<double> scales;
  std::vector<int64_t> channels;
  bool border;

  size_t rois() const { return centers.size() / 4; }
  size_t groups() const { return out.size() / 3; }
  size_t group(size_t k) const { return groups() == 1 ? 0 : k; }

  Channels channels_of(size_t source, size_t k, int64_t all) const {
    const int64_t channel = channels.empty() ? -1 : channels[source * rois() + k];
    STD_TORCH_CHECK(channel < all, "roi_gather_3d: no channel ", channel);
    return channel < 0 ? Channels{0, all} : Channels{channel, 1};
  }
};

template <class T>
void append(std::vector<double>& to, const Tensor& centers) {
  const auto* x = static_cast<const T*>(centers.const_data_ptr());
  for (int64_t i = 0; i < centers.size(0); ++i) {
    for (int64_t j = 0; j < 4; ++j) to.push_back(static_cast<double>(x[i * centers.stride(0) + j * centers.stride(1)]));
  }
}

std::vector<double> numbers_of(const Tensor& centers) {
  STD_TORCH_CHECK(centers.is_cpu() && centers.dim() == 2 && centers.size(1) == 4, "roi_gather_3d: expected centers (K, 4)");
  std::vector<double> result;
  switch (centers.scalar_type()) {
    case ScalarType::Byte: append<uint8_t>(result, centers); break;
    case ScalarType::Char: append<int8_t>(result, centers); break;
    case ScalarType::Short: append<int16_t>(result, centers); break;
    case ScalarType::Int: append<int32_t>(result, centers); break;
    case ScalarType::Long: append<int64_t>(result, centers); break;
    case ScalarType::Half: append<Half>(result, centers); break;
    case ScalarType::BFloat16: append<BFloat16>(result, centers); break;
    case ScalarType::Float: append<float>(result, centers); break;
    case ScalarType::Double: append<double>(result, centers); break;
    default: STD_TORCH_CHECK(false, "roi_gather_3d: unsupported dtype of centers");
  }
  return result;
}

Boxes boxes_from(const Tensor& centers, std::vector<int64_t> roi, std::vector<int64_t> out, std::vector<double> scales,
                 std::vector<int64_t> channels, bool border, size_t sources) {
  const Boxes boxes{numbers_of(centers), std::move(roi), std::move(out), std::move(scales), std::move(channels), border};
  STD_TORCH_CHECK(boxes.out.size() % 3 == 0 && boxes.roi.size() == boxes.out.size() && boxes.scales.size() == 3 * sources &&
                      (boxes.groups() == 1 || boxes.groups() == boxes.rois()) &&
                      (boxes.channels.empty() || boxes.channels.size() == sources * boxes.rois()),
                  "roi_gather_3d: lists of different lengths");
  return boxes;
}

// As reference.coordinates and its taps, operation by operation.
template <class Real>
Axis<Real> axis_of(double center, int64_t roi, int64_t out, double scale, int64_t size, bool border) {
  Axis<Real> axis;
  const double margin = static_cast<double>(roi) + 2 + 2 / scale, limit = static_cast<double>(size) / scale + margin;
  if (center < -margin) center = -margin;
  if (center > limit) center = limit;
  const double bin = static_cast<double>(roi) / static_cast<double>(out);
  for (int64_t o = 0; o < out; ++o) {
    const double step = (static_cast<double>(o) + 0.5) * bin - 0.5;
    double x = (center - static_cast<double>(roi / 2) + step + 0.5) * scale - 0.5;
    if (std::isnan(x)) {
      axis.add(0, x);
    } else {
      if (border) x = std::min(std::max(x, 0.0), static_cast<double>(size - 1));
      const double lower = std::floor(x), fraction = x - lower;
      const auto index = static_cast<int64_t>(lower);
      if (index >= 0 && index < size) axis.add(index, 1 - fraction);
      if (index >= -1 && index < size - 1) axis.add(index + 1, fraction);
    }
    axis.next();
  }
  axis.finish();
  return axis;
}

template <class Real>
std::vector<Box<Real>> boxes_in(const Boxes& boxes, size_t source, const int64_t* size) {
  std::vector<Box<Real>> result;
  for (size_t k = 0; k < boxes.rois(); ++k) {
    const double* center = &boxes.centers[4 * k];
    const size_t sizes = 3 * boxes.group(k);
    const auto axis = [&](int a) {
      return axis_of<Real>(center[1 + a], boxes.roi[sizes + a], boxes.out[sizes + a], boxes.scales[3 * source + a], size[2 + a],
                           boxes.border);
    };
    const bool known = center[0] >= 0 && center[0] < static_cast<double>(size[0]);
    result.push_back(known ? Box<Real>{static_cast<int64_t>(center[0]), axis(0), axis(1), axis(2)} : Box<Real>{-1, {}, {}, {}});
  }
  return result;
}

ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<Tensor> forward(std::vector<Tensor> sources, const Tensor& centers, std::vector<int64_t> roi,
                            std::vector<int64_t> out, std::vector<double> scales, std::vector<int64_t> channels, bool border) {
  STD_TORCH_CHECK(!sources.empty(), "roi_gather_3d: no sources");
  const Boxes boxes = boxes_from(centers, std::move(roi), std::move(out), std::move(scales), std::move(channels), border, sources.size());
  ScalarType type = sources[0].scalar_type();
  std::vector<std::vector<Channels>> read(sources.size());
  int64_t total = 0;
  for (size_t i = 0; i < sources.size(); ++i) {
    type = promoted(type, sources[i].scalar_type());
    for (size_t k = 0; k < boxes.rois(); ++k) read[i].push_back(boxes.channels_of(i, k, sources[i].size(1)));
    total += boxes.channels.empty() || read[i].empty() ? sources[i].size(1) : read[i][0].count;
  }
  const bool channels_last = is_channels_last(sources[0]);
  const auto rois = static_cast<int64_t>(boxes.groups() == 1 ? boxes.rois() : 1);
  std::vector<Tensor> results;
  for (size_t g = 0; g < boxes.groups(); ++g) {
    const int64_t* size = &boxes.out[3 * g];
    results.push_back(empty(sources[0], {rois, total, size[0], size[1], size[2]}, type, channels_last));
  }
  with_type(type, [&](auto element) {
    using Out = decltype(element);
    Gather<Out> gather{{}, {}, {}, read, total, channels_last};
    for (size_t i = 0; i < sources.size(); ++i) {
      gather.sources.emplace_back(sources[i]);
      gather.boxes.push_back(boxes_in<Wide<Out>>(boxes, i, gather.sources[i].size));
    }
    for (size_t k = 0; k < boxes.rois(); ++k) {
      const size_t g = boxes.group(k);
      const int64_t* size = &boxes.out[3 * g];
      const int64_t offset = (boxes.groups() == 1 ? k : 0) * total * size[0] * size[1] * size[2];
      gather.regions.push_back({static_cast<Out*>(results[g].mutable_data_ptr()) + offset, size[0], size[1], size[2]});
    }
    gather.run();
  });
  return results;
}

std::vector<Tensor> backward(std::vector<Tensor> grads, std::vector<Tensor> bases, const Tensor& centers,
                             std::vector<int64_t> roi, std::vector<int64_t> out, std::vector<double> scales,
                             std::vector<int64_t> channels, std::vector<int64_t> shapes, std::vector<int64_t> first_channels,
                             std::vector<int64_t> dtypes, std::vector<int64_t> channels_last, bool border) {
  const size_t count = dtypes.size();
  const Boxes boxes = boxes_from(centers, std::move(roi), std::move(out), std::move(scales), std::move(channels), border, count);
  STD_TORCH_CHECK(shapes.size() == 5 * count && first_channels.size() == count && channels_last.size() == count &&
                      (bases.empty() || bases.size() == count) && grads.size() == boxes.groups() && !grads.empty(),
                  "roi_gather_3d: lists of different lengths");
  const ScalarType type = grads[0].scalar_type();
  for (size_t g = 0; g < grads.size(); ++g) {
    bool fits = grads[g].scalar_type() == type && grads[g].dim() == 5 &&
                grads[g].size(0) == static_cast<int64_t>(grads.size() == 1 ? boxes.rois() : 1);
    for (int d = 0; d < 3; ++d) fits = fits && grads[g].size(2 + d) == boxes.out[3 * g + d];
    STD_TORCH_CHECK(fits, "roi_gather_3d: a gradient does not fit");
  }
  std::vector<Tensor> results;
  for (size_t i = 0; i < count; ++i) {
    const std::vector<int64_t> shape(shapes.begin() + 5 * i, shapes.begin() + 5 * i + 5);
    STD_TORCH_CHECK(dtypes[i] >= 0 && dtypes[i] < 4, "roi_gather_3d: no dtype ", dtypes[i]);
    results.push_back(empty(centers, shape, kTypes[dtypes[i]], channels_last[i] != 0));
    const Tensor* base = bases.empty() ? nullptr : &bases[i];
    if (base && base->numel()) {
      bool fits = base->scalar_type() == kTypes[dtypes[i]];
      for (int64_t d = 0; d < 5; ++d) {
        fits = fits && base->size(d) == shape[d] && (shape[d] == 1 || base->stride(d) == results[i].stride(d));
      }
      STD_TORCH_CHECK(fits, "roi_gather_3d: a base is not like its gradient");
    }
    with_type(type, [&](auto g) {
      using G = decltype(g);
      const auto each = boxes_in<Wide<G>>(boxes, i, shape.data());
      std::vector<Owed<G>> rois;
      for (size_t k = 0; k < boxes.rois(); ++k) {
        const View grad(grads[boxes.group(k)], first_channels[i]);
        const Channels some = boxes.channels_of(i, k, shape[1]);
        STD_TORCH_CHECK(first_channels[i] + some.count <= grad.size[1], "roi_gather_3d: a gradient has too few channels");
        const G* data = static_cast<const G*>(grad.data) + (boxes.groups() == 1 ? k : 0) * grad.stride[0];
        rois.push_back({data, {grad.stride[1], grad.stride[2], grad.stride[3], grad.stride[4]}, some, &each[k]});
      }
      with_type(kTypes[dtypes[i]], [&](auto s) { scatter_into<G, decltype(s)>(results[i], base, rois, channels_last[i] != 0); });
    });
  }
  return results;
}

}  // namespace

#define BOXES "Tensor centers, int[] roi_size, int[] output_size, float[] scales, int[] channels"

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("roi_gather_3d_forward(Tensor[] sources, " BOXES ", bool border) -> Tensor[]");
  m.def("roi_gather_3d_backward(Tensor[] grads, Tensor[] bases, " BOXES
        ", int[] shapes, int[] first_channels, int[] dtypes, int[] channels_last, bool border) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("roi_gather_3d_forward", TORCH_BOX(&forward));
  m.impl("roi_gather_3d_backward", TORCH_BOX(&backward));
}
