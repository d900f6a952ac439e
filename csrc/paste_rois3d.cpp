// ROIs' logits written into label maps [N, D, H, W]; where ROIs compete for a voxel the larger logit has it.
//
// Bytes: the labels read and written once, every logit inside the volume read once, and again where boxes overlap. A voxel
// is written by the ROI that wins it, which looks at its competitors itself: no buffer of best values, no order of writes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Roi {
  const void* data;
  ScalarType type;
  int64_t stride[3];
  int64_t sample, low[3], high[3], start[3];  // low to high lies in the volume
  uint8_t label;

  bool holds(int64_t n, const int64_t* voxel) const {
    bool inside = n == sample;
    for (int a = 0; a < 3; ++a) inside = inside && voxel[a] >= low[a] && voxel[a] < high[a];
    return inside;
  }

  double logit(const int64_t* voxel) const {
    int64_t offset = 0;
    for (int a = 0; a < 3; ++a) offset += (voxel[a] - start[a]) * stride[a];
    switch (type) {
      case ScalarType::Double: return static_cast<const double*>(data)[offset];
      case ScalarType::Half: return static_cast<const torch::headeronly::Half*>(data)[offset];
      case ScalarType::BFloat16: return static_cast<const torch::headeronly::BFloat16*>(data)[offset];
      default: return static_cast<const float*>(data)[offset];
    }
  }
};

// The ROI's part of the volume; false if there is none.
bool place(Roi& roi, const double* center, const Tensor& logits, const Tensor& labels) {
  const auto samples = static_cast<double>(labels.size(0));
  if (!(center[0] >= 0 && center[0] < samples)) return false;
  roi.sample = static_cast<int64_t>(center[0]);
  for (int a = 0; a < 3; ++a) {
    const int64_t size = labels.size(1 + a), side = logits.size(a);
    if (std::isnan(center[1 + a])) return false;
    // Far outside is outside; the limit keeps the conversion to integers exact.
    const double limited = std::min(std::max(center[1 + a], static_cast<double>(-side)), static_cast<double>(size + side));
    roi.start[a] = static_cast<int64_t>(limited) - side / 2;
    roi.low[a] = std::max<int64_t>(roi.start[a], 0);
    roi.high[a] = std::min(roi.start[a] + side, size);
    if (roi.low[a] >= roi.high[a]) return false;
  }
  return true;
}

bool overlap(const Roi& a, const Roi& b) {
  bool both = a.sample == b.sample;
  for (int d = 0; d < 3; ++d) both = both && a.low[d] < b.high[d] && b.low[d] < a.high[d];
  return both;
}

Tensor paste(const Tensor& labels, std::vector<Tensor> logits, const Tensor& centers, const Tensor& classes, double threshold) {
  STD_TORCH_CHECK(labels.is_cpu() && labels.dim() == 4 && labels.scalar_type() == ScalarType::Byte, "paste_rois_3d: expected uint8 labels (N, D, H, W)");
  const auto count = static_cast<int64_t>(logits.size());
  STD_TORCH_CHECK(centers.scalar_type() == ScalarType::Double && centers.is_contiguous() && centers.numel() == 4 * count &&
                      classes.scalar_type() == ScalarType::Long && classes.is_contiguous() && classes.numel() == count,
                  "paste_rois_3d: expected centers (K, 4) in float64 and classes (K,) in int64");
  Tensor result = torch::stable::new_empty(labels, {labels.size(0), labels.size(1), labels.size(2), labels.size(3)});
  torch::stable::copy_(result, labels);
  std::vector<Roi> rois;
  for (int64_t k = 0; k < count; ++k) {
    const Tensor& x = logits[k];
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && (type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16),
                    "paste_rois_3d: unsupported logits");
    const auto label = static_cast<uint8_t>(static_cast<const int64_t*>(classes.const_data_ptr())[k]);
    Roi roi{x.const_data_ptr(), type, {x.stride(0), x.stride(1), x.stride(2)}, 0, {}, {}, {}, label};
    if (place(roi, static_cast<const double*>(centers.const_data_ptr()) + 4 * k, x, labels)) rois.push_back(roi);
  }
  auto* out = static_cast<uint8_t*>(result.mutable_data_ptr());
  const int64_t depth = labels.size(1), height = labels.size(2), width = labels.size(3);
  for (size_t k = 0; k < rois.size(); ++k) {
    const Roi& roi = rois[k];
    std::vector<size_t> others;
    for (size_t j = 0; j < rois.size(); ++j) {
      if (j != k && overlap(roi, rois[j])) others.push_back(j);
    }
    const int64_t plane = (roi.high[1] - roi.low[1]) * (roi.high[2] - roi.low[2]);
    torch::stable::parallel_for(roi.low[0], roi.high[0], 32768 / plane + 1, [&](int64_t begin, int64_t end) {
      int64_t voxel[3];
      for (voxel[0] = begin; voxel[0] < end; ++voxel[0]) {
        for (voxel[1] = roi.low[1]; voxel[1] < roi.high[1]; ++voxel[1]) {
          uint8_t* row = out + ((roi.sample * depth + voxel[0]) * height + voxel[1]) * width;
          for (voxel[2] = roi.low[2]; voxel[2] < roi.high[2]; ++voxel[2]) {
            const double value = roi.logit(voxel);
            bool wins = value > threshold;  // never a NaN
            for (size_t i = 0; wins && i < others.size(); ++i) {
              const Roi& other = rois[others[i]];
              if (!other.holds(roi.sample, voxel)) continue;
              const double theirs = other.logit(voxel);
              wins = !(theirs > value || (theirs == value && others[i] < k));
            }
            if (wins) row[voxel[2]] = roi.label;
          }
        }
      }
    });
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("paste_rois_3d(Tensor labels, Tensor[] logits, Tensor centers, Tensor classes, float threshold) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("paste_rois_3d", TORCH_BOX(&paste));
}
