// First maximum of every heat map [N, K, D, H, W].
//
// Bytes: every element read once (N K D H W sizeof(T)), 8 + sizeof(T) written per map. No FLOPs worth counting, one
// pass, nothing saved for backward but the position. torch.max keeps the running index beside the running value in
// every lane; here only values run, and the index is looked up afterwards in the one block that holds the maximum.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A work item. Its length depends on nothing but the input, and so does the result.
constexpr int64_t kChunk = int64_t{1} << 16;
constexpr int64_t kBlock = int64_t{1} << 11;
constexpr int64_t kSerialElements = int64_t{1} << 15;

// A format says how stored elements become keys whose order is that of the numbers.
template <class Number>
struct Float {
  using Storage = Number;
  using Key = Number;
  template <class V>
  static inline V keys(V x) {
    return x;
  }
};

// 16-bit floats are compared as integers: no conversion, a full register of lanes, -0 equal to 0, NaN above all.
template <int16_t kInfinity>
struct Float16 {
  using Storage = int16_t;
  using Key = int16_t;
  template <class V>
  static inline V keys(V bits) {
    const V sign = bits >> 15;
    const V magnitude = bits & static_cast<int16_t>(0x7fff);
    const V signed_magnitude = (magnitude ^ sign) - sign;
    const V nan = magnitude > kInfinity;
    return (nan & static_cast<int16_t>(0x7fff)) | (~nan & signed_magnitude);
  }
};
using Half = Float16<0x7c00>;
using BFloat16 = Float16<0x7f80>;

// 16 bytes, which every x86-64 and aarch64 has: one core already outruns its memory with them, so that neither wider
// registers nor a choice at run time would gain anything.
template <class F>
struct Vector {
  static constexpr int64_t kBytes = 16;
  static constexpr int64_t kLanes = kBytes / sizeof(typename F::Storage);
  typedef typename F::Storage type __attribute__((vector_size(kBytes)));

  static inline type load(const typename F::Storage* x) {
    type v;
    std::memcpy(&v, x, kBytes);
    return F::keys(v);
  }
};

template <class F>
inline typename F::Key key_of(typename F::Storage x) {
  return F::keys(typename Vector<F>::type{x})[0];
}

template <class Key>
inline bool is_nan(Key x) {
  return x != x;  // never for integer keys, where NaN is simply the largest
}

template <class Key>
inline bool beats(Key challenger, Key holder) {
  return challenger > holder || (is_nan(challenger) && !is_nan(holder));
}

template <class F>
inline typename F::Key block_maximum(const typename F::Storage* x, int64_t length) {
  using Key = typename F::Key;
  using V = Vector<F>;
  constexpr int kVectors = 4;  // independent chains hide the latency of the maximum
  constexpr int64_t kStep = kVectors * V::kLanes;
  Key best = key_of<F>(x[0]);
  int64_t i = 0;
  if (length >= kStep) {
    typename V::type top[kVectors];
    for (int v = 0; v < kVectors; ++v) top[v] = V::load(x);
    auto nan = top[0] != top[0];
    for (; i + kStep <= length; i += kStep) {
      for (int v = 0; v < kVectors; ++v) {
        const auto key = V::load(x + i + v * V::kLanes);
        top[v] = key > top[v] ? key : top[v];
        nan |= key != key;
      }
    }
    for (int64_t lane = 0; lane < V::kLanes; ++lane) {
      if (nan[lane]) return std::numeric_limits<Key>::quiet_NaN();
      for (int v = 0; v < kVectors; ++v) best = std::max(best, static_cast<Key>(top[v][lane]));
    }
  }
  for (; i < length; ++i) {
    const Key key = key_of<F>(x[i]);
    if (beats(key, best)) best = key;
  }
  return best;
}

template <class F>
inline int64_t first_maximum(const typename F::Storage* x, int64_t length) {
  using Key = typename F::Key;
  Key best = key_of<F>(x[0]);
  int64_t block = 0;
  for (int64_t begin = 0; begin < length && !is_nan(best); begin += kBlock) {
    const Key key = block_maximum<F>(x + begin, std::min(kBlock, length - begin));
    if (beats(key, best)) {
      best = key;
      block = begin;
    }
  }
  for (int64_t i = block;; ++i) {
    const Key key = key_of<F>(x[i]);
    if (key == best || (is_nan(key) && is_nan(best))) return i;
  }
}

template <class F>
void run(const void* heatmaps, int64_t maps, int64_t voxels, int64_t* position, void* value) {
  using Storage = typename F::Storage;
  const auto* x = static_cast<const Storage*>(heatmaps);
  const int64_t chunks = (voxels + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::min(voxels, kChunk));
  std::vector<int64_t> found(maps * chunks);
  torch::stable::parallel_for(0, maps * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item % chunks * kChunk;
      const Storage* map = x + item / chunks * voxels;
      found[item] = start + first_maximum<F>(map + start, std::min(kChunk, voxels - start));
    }
  });
  for (int64_t m = 0; m < maps; ++m) {
    const Storage* map = x + m * voxels;
    int64_t best = found[m * chunks];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const int64_t next = found[m * chunks + chunk];
      if (beats(key_of<F>(map[next]), key_of<F>(map[best]))) best = next;
    }
    position[m] = best;
    static_cast<Storage*>(value)[m] = map[best];
  }
}

std::tuple<Tensor, Tensor> heatmap_argmax_3d(const Tensor& heatmaps) {
  STD_TORCH_CHECK(heatmaps.dim() == 5 && heatmaps.is_cpu(), "heatmap_argmax_3d: expected (N, K, D, H, W) on the CPU");
  const int64_t batch = heatmaps.size(0), channels = heatmaps.size(1);
  const int64_t voxels = heatmaps.size(2) * heatmaps.size(3) * heatmaps.size(4);
  STD_TORCH_CHECK(voxels > 0, "heatmap_argmax_3d: the heat maps have no voxels");
  const Tensor dense = torch::stable::contiguous(heatmaps);
  Tensor position = torch::stable::new_empty(dense, {batch, channels}, ScalarType::Long);
  Tensor value = torch::stable::new_empty(dense, {batch, channels});
  const auto launch = [&](auto format) {
    run<decltype(format)>(dense.const_data_ptr(), batch * channels, voxels,
                          static_cast<int64_t*>(position.mutable_data_ptr()), value.mutable_data_ptr());
  };
  switch (dense.scalar_type()) {
    case ScalarType::Float: launch(Float<float>{}); break;
    case ScalarType::Double: launch(Float<double>{}); break;
    case ScalarType::Half: launch(Half{}); break;
    case ScalarType::BFloat16: launch(BFloat16{}); break;
    default: STD_TORCH_CHECK(false, "heatmap_argmax_3d: unsupported dtype ", torch::headeronly::toString(dense.scalar_type()));
  }
  return {position, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(focuskernels_C, m) {
  m.def("heatmap_argmax_3d(Tensor heatmaps) -> (Tensor position, Tensor value)");
}

STABLE_TORCH_LIBRARY_IMPL(focuskernels_C, CPU, m) {
  m.impl("heatmap_argmax_3d", TORCH_BOX(&heatmap_argmax_3d));
}
