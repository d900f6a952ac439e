// Sampling of boxes, separable along the three axes, and its transpose: what roi_gather3d.cpp and roi_align3d.cpp have
// in common. Both say, per ROI and axis, which voxels a sample reads and with what weight.
//
// Forward writes the result front to back, one plane or row at a time, from a scratch buffer that fits the first cache.
// Backward writes the gradient of a source front to back too: every row of voxels gathers what the ROIs owe it, ROI by
// ROI. So nothing is filled with zeros first, no two threads write to one place, and the order of additions is fixed.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __x86_64__
#include <emmintrin.h>
#endif

namespace roi_sampling {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// DTYPES of focuskernels/_lib.py
constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16};
constexpr int64_t kSerialElements = int64_t{1} << 15;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePageBytes = int64_t{4} << 20;  // from here on outputs ask for huge pages and bypass the cache

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Real>
struct Tap {
  int64_t index;
  Real weight;
};

// One axis of a ROI, or its transpose: the taps of place i are taps[begin[i]] to taps[begin[i + 1]], none of weight 0.
template <class Real>
struct Axis {
  std::vector<int64_t> begin{0};
  std::vector<Tap<Real>> taps;
  int64_t first = 0, last = 0;  // the voxels used: first <= index < last
  // A whole axis may be a copy: places from `copied` on read one voxel each, from `first` on, with weight 1.
  bool copies = false;
  int64_t copied = 0;

  void add(int64_t index, double weight) {
    if (weight != 0) taps.push_back({index, static_cast<Real>(weight)});
  }
  void next() { begin.push_back(static_cast<int64_t>(taps.size())); }

  void finish() {
    if (taps.empty()) return;
    first = last = taps[0].index;
    for (const auto& tap : taps) first = std::min(first, tap.index), last = std::max(last, tap.index + 1);
    while (begin[copied + 1] == 0) ++copied;
    copies = last - first == static_cast<int64_t>(taps.size());
    for (int64_t i = 0; copies && i < last - first; ++i) {
      copies = begin[copied + i] == i && begin[copied + i + 1] == i + 1 && taps[i].index == first + i && taps[i].weight == 1;
    }
  }

  // Per voxel of the axis from `first` to `last` the places that read it.
  Axis transposed() const {
    Axis result;
    std::vector<std::vector<Tap<Real>>> readers(last - first);
    for (int64_t i = 0; i + 1 < static_cast<int64_t>(begin.size()); ++i) {
      for (int64_t t = begin[i]; t < begin[i + 1]; ++t) readers[taps[t].index - first].push_back({i, taps[t].weight});
    }
    for (const auto& some : readers) {
      for (const auto& tap : some) result.add(tap.index, tap.weight);
      result.next();
    }
    result.first = first, result.last = last;
    return result;
  }
};

// Those of place i of an axis, or of voxel i of a transposed one.
template <class Real>
struct Range {
  const Tap<Real>*from, *to;
  const Tap<Real>* begin() const { return from; }
  const Tap<Real>* end() const { return to; }
  bool empty() const { return from == to; }
};
template <class Real>
inline Range<Real> taps_of(const Axis<Real>& axis, int64_t i) {
  return {axis.taps.data() + axis.begin[i], axis.taps.data() + axis.begin[i + 1]};
}
template <class Real>
inline Range<Real> readers_of(const Axis<Real>& axis, int64_t voxel) {
  if (voxel < axis.first || voxel >= axis.last) return {nullptr, nullptr};
  return taps_of(axis, voxel - axis.first);
}

template <class Real>
struct Box {
  int64_t sample;  // -1: none, all zeros
  Axis<Real> z, y, x;
};

// A volume (N, C, D, H, W) or a set of ROIs (K, C, d, h, w); strides in elements.
struct View {
  const void* data;
  ScalarType type;
  int64_t size[5], stride[5];

  explicit View(const Tensor& x, int64_t first_channel = 0) : data(x.const_data_ptr()), type(x.scalar_type()) {
    STD_TORCH_CHECK(x.dim() == 5 && x.is_cpu(), "roi_sampling: expected five dimensions on the CPU");
    for (int d = 0; d < 5; ++d) size[d] = x.size(d), stride[d] = x.stride(d);
    data = static_cast<const char*>(data) + first_channel * stride[1] * x.element_size();
  }
};

template <class F>
inline void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, "roi_sampling: unsupported dtype ", torch::headeronly::toString(type));
  }
}

inline void ask_for_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  if (bytes < kHugePageBytes) return;
  // The first touch of fresh memory in small pages costs several times what writing it does.
  constexpr uintptr_t kPage = 4096;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), bytes - kPage, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  Tensor y = x;
  for (int64_t d = 1; d < 4; ++d) y = torch::stable::transpose(y, d, d + 1);
  return y.is_contiguous();
}

// (N, C, D, H, W), dense in the given layout.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType type, bool channels_last) {
  Tensor result = channels_last ? torch::stable::new_empty(like, {size[0], size[2], size[3], size[4], size[1]}, type)
                                : torch::stable::new_empty(like, {size[0], size[1], size[2], size[3], size[4]}, type);
  ask_for_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  for (int64_t d = 3; channels_last && d > 0; --d) result = torch::stable::transpose(result, d, d + 1);
  return result;
}

// Writes `bytes` to memory that is not read again soon.
inline void write_out(char* to, const char* from, int64_t bytes, bool bypass_cache) {
#ifdef __x86_64__
  if (bypass_cache) {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 15);
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
      for (int v = 0; v < 4; ++v) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + 16 * v),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + 16 * v)));
      }
    }
    for (; i + 16 <= bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    std::memcpy(to + i, from + i, bytes - i);
    return;
  }
#endif
  (void)bypass_cache;
  std::memcpy(to, from, bytes);
}

inline void prefetch(const void* data) {
#if defined(__GNUC__)
  __builtin_prefetch(data);
#else
  (void)data;
#endif
}

inline void finish_writing() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

template <class To, class From>
inline void convert(To* to, const From* from, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<Wide<To>>(from[i]));
  }
}

template <class Real, class T>
inline void add_scaled(Real* __restrict to, const T* __restrict from, int64_t stride, int64_t count, Real weight) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] += weight * static_cast<Real>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] += weight * static_cast<Real>(from[i * stride]);
  }
}

template <int64_t bytes, class T>
inline void copy_chunks(T* to, const T* from, int64_t& i, int64_t count, int64_t next) {
  struct Chunk {
    char data[bytes];
  };
  constexpr auto kStep = static_cast<int64_t>(bytes / sizeof(T));
  for (; i + kStep <= count; i += kStep) {
    if constexpr (bytes == kCacheLine) prefetch(from + i + next);
    Chunk chunk;
    std::memcpy(&chunk, from + i, bytes);
    std::memcpy(to + i, &chunk, bytes);
  }
}

// Rows of `count` elements, `stride` apart, to `width` apart. Fetches what lies `next` ahead for the call after this one:
// short rows apart from each other are too short for memcpy and for what processors fetch by themselves.
template <class T>
inline void copy_rows(T* to, int64_t width, const T* from, int64_t stride, int64_t rows, int64_t count, int64_t next) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += width) {
    int64_t i = 0;
    copy_chunks<kCacheLine>(to, from, i, count, next);
    prefetch(from + count - 1 + next);
    copy_chunks<16>(to, from, i, count, next);
    for (; i < count; ++i) to[i] = from[i];
  }
}

// Samples (oz, oy, :) of one channel into out[w]; row is scratch for a row of voxels.
template <class Src, class Out, class Real>
inline void sample_row(const Box<Real>& box, const View& source, const Src* volume, int64_t oz, int64_t oy, Real* row, Out* out,
                       int64_t width) {
  const auto zs = taps_of(box.z, oz), ys = taps_of(box.y, oy);
  if (zs.empty() || ys.empty() || box.x.taps.empty()) {
    std::fill(out, out + width, Out{});
    return;
  }
  const int64_t sx = source.stride[4], first = box.x.first, count = box.x.last - first;
  const auto start = [&](const Tap<Real>& z, const Tap<Real>& y) {
    return volume + z.index * source.stride[2] + y.index * source.stride[3] + first * sx;
  };
  const bool one = zs.to - zs.from == 1 && ys.to - ys.from == 1 && zs.from->weight * ys.from->weight == 1;
  if (one && box.x.copies) {
    const Src* from = start(*zs.from, *ys.from);
    std::fill(out, out + box.x.copied, Out{});
    std::fill(out + box.x.copied + count, out + width, Out{});
    out += box.x.copied;
    if (sx == 1) return convert(out, from, count);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Out>(static_cast<Real>(from[i * sx]));
    return;
  }
  std::fill(row, row + count, Real{});
  for (const auto& z : zs) {
    for (const auto& y : ys) add_scaled(row, start(z, y), sx, count, z.weight * y.weight);
  }
  for (int64_t o = 0; o < width; ++o) {
    Real sum{};
    for (const auto& x : taps_of(box.x, o)) sum += x.weight * row[x.index - first];
    out[o] = static_cast<Out>(sum);
  }
}

// Samples (oz, :, :) of one channel into out[h][w].
template <class Src, class Out, class Real>
inline void sample_plane(const Box<Real>& box, const View& source, const Src* volume, int64_t oz, Real* row, Out* out,
                         int64_t height, int64_t width) {
  if constexpr (std::is_same_v<Src, Out>) {
    const auto zs = taps_of(box.z, oz);
    if (zs.to - zs.from == 1 && zs.from->weight == 1 && box.y.copies && box.x.copies && source.stride[4] == 1) {
      const int64_t rows = box.y.last - box.y.first, count = box.x.last - box.x.first;
      if (rows * count < height * width) std::fill(out, out + height * width, Out{});
      const int64_t next = zs.from->index + 1 < source.size[2] ? source.stride[2] : 0;
      const Src* from = volume + zs.from->index * source.stride[2] + box.y.first * source.stride[3] + box.x.first;
      return copy_rows(out + box.y.copied * width + box.x.copied, width, from, source.stride[3], rows, count, next);
    }
  }
  for (int64_t oy = 0; oy < height; ++oy) sample_row(box, source, volume, oz, oy, row, out + oy * width, width);
}

// Channels of samples (oz, oy, :) into out[w][stride]; sums is scratch for the channels.
template <class Src, class Out, class Real>
inline void sample_voxels(const Box<Real>& box, const View& source, const Src* volume, int64_t channels, int64_t oz, int64_t oy,
                          Real* sums, Out* out, int64_t stride, int64_t width) {
  const auto zs = taps_of(box.z, oz), ys = taps_of(box.y, oy);
  const int64_t sc = source.stride[1];
  for (int64_t o = 0; o < width; ++o, out += stride) {
    const auto xs = taps_of(box.x, o);
    if (zs.empty() || ys.empty() || xs.empty()) {
      std::fill(out, out + channels, Out{});
      continue;
    }
    const auto start = [&](const Tap<Real>& z, const Tap<Real>& y, const Tap<Real>& x) {
      return volume + z.index * source.stride[2] + y.index * source.stride[3] + x.index * source.stride[4];
    };
    const bool one = (zs.to - zs.from) * (ys.to - ys.from) * (xs.to - xs.from) == 1;
    if (one && zs.from->weight * ys.from->weight * xs.from->weight == 1 && sc == 1) {
      convert(out, start(*zs.from, *ys.from, *xs.from), channels);
      continue;
    }
    std::fill(sums, sums + channels, Real{});
    for (const auto& z : zs) {
      for (const auto& y : ys) {
        for (const auto& x : xs) add_scaled(sums, start(z, y, x), sc, channels, z.weight * y.weight * x.weight);
      }
    }
    convert(out, sums, channels);
  }
}

// Where the samples of a ROI go: (sum C, d, h, w), dense in either layout.
template <class Out>
struct Region {
  Out* out;
  int64_t depth, height, width;
};

// The channels of a source that a ROI reads: all, or one.
struct Channels {
  int64_t first, count;
};

template <class Out>
struct Gather {
  using Real = Wide<Out>;
  std::vector<Region<Out>> regions;
  std::vector<View> sources;
  std::vector<std::vector<Box<Real>>> boxes;      // [source][ROI]
  std::vector<std::vector<Channels>> channels;    // [source][ROI]
  int64_t total;                                  // channels of the result
  bool channels_last;

  // A unit of work is what is contiguous in the result: a plane of one channel, or a line of voxels.
  int64_t unit(const Region<Out>& r) const { return r.width * (channels_last ? total : r.height); }

  void run() const {
    std::vector<int64_t> start{0};
    int64_t longest = 1, largest = 1;
    for (const auto& r : regions) {
      start.push_back(start.back() + total * r.depth * r.height * r.width);
      largest = std::max(largest, unit(r));
    }
    if (start.back() == 0) return;
    for (const View& source : sources) longest = std::max({longest, source.size[4], source.size[1]});
    const bool bypass = static_cast<int64_t>(start.back() * sizeof(Out)) >= kHugePageBytes;
    torch::stable::parallel_for(0, start.back(), std::max(largest, kSerialElements), [&](int64_t begin, int64_t end) {
      std::vector<Real> row(longest);
      std::vector<Out> scratch(largest);
      for (size_t k = 0; k < regions.size(); ++k) {
        const Region<Out>& r = regions[k];
        const int64_t size = unit(r);
        const int64_t first = (std::max(begin, start[k]) - start[k] + size - 1) / size;
        const int64_t last = (std::min(end, start[k + 1]) - start[k] + size - 1) / size;
        for (int64_t u = first; u < last; ++u) {
          if (channels_last) {
            line(k, u / r.height, u % r.height, row.data(), scratch.data());
          } else {
            plane(k, u / r.depth, u % r.depth, row.data(), scratch.data());
          }
          write_out(reinterpret_cast<char*>(r.out + u * size), reinterpret_cast<const char*>(scratch.data()), size * sizeof(Out), bypass);
        }
      }
      finish_writing();
    });
  }

  void plane(size_t k, int64_t channel, int64_t oz, Real* row, Out* out) const {
    size_t i = 0;
    while (channel >= channels[i][k].count) channel -= channels[i++][k].count;
    const Region<Out>& r = regions[k];
    const Box<Real>& box = boxes[i][k];
    if (box.sample < 0) return void(std::fill(out, out + unit(r), Out{}));
    with_type(sources[i].type, [&](auto element) {
      using Src = decltype(element);
      const int64_t* stride = sources[i].stride;
      const Src* volume = static_cast<const Src*>(sources[i].data) + box.sample * stride[0] + (channels[i][k].first + channel) * stride[1];
      sample_plane(box, sources[i], volume, oz, row, out, r.height, r.width);
    });
  }

  void line(size_t k, int64_t oz, int64_t oy, Real* sums, Out* out) const {
    const int64_t width = regions[k].width;
    for (size_t i = 0; i < sources.size(); ++i) {
      const Box<Real>& box = boxes[i][k];
      const Channels& some = channels[i][k];
      if (box.sample < 0) {
        for (int64_t o = 0; o < width; ++o) std::fill(out + o * total, out + o * total + some.count, Out{});
      } else {
        with_type(sources[i].type, [&](auto element) {
          using Src = decltype(element);
          const int64_t* stride = sources[i].stride;
          const Src* volume = static_cast<const Src*>(sources[i].data) + box.sample * stride[0] + some.first * stride[1];
          sample_voxels(box, sources[i], volume, some.count, oz, oy, sums, out, total, width);
        });
      }
      out += some.count;
    }
  }
};

// A ROI and its gradient, as backward reads them.
template <class G>
struct Owed {
  const G* grad;      // of the first channel that comes from the source
  int64_t stride[4];  // c, z, y, x
  Channels channels;  // of the source
  const Box<Wide<G>>* box;
};

// Adds what a row of gradients owes to a row of voxels with `step` interleaved channels, of which `count` take part.
template <class G, class Real>
inline void spread_row(const Axis<Real>& axis, const G* grad, int64_t stride_x, int64_t stride_c, int64_t count, int64_t step,
                       Real weight, Real* row) {
  if (step == 1 && axis.copies) {
    return add_scaled(row + axis.first, grad + axis.copied * stride_x, stride_x, axis.last - axis.first, weight);
  }
  for (int64_t o = 0; o + 1 < static_cast<int64_t>(axis.begin.size()); ++o) {
    for (const auto& x : taps_of(axis, o)) {
      const Real w = weight * x.weight;
      Real* voxel = row + x.index * step;
      if (count == 1) {
        *voxel += w * static_cast<Real>(grad[o * stride_x]);
      } else {
        add_scaled(voxel, grad + o * stride_x, stride_c, count, w);
      }
    }
  }
}

// Fills result (N, C, D, H, W), dense in either layout, with base (or zeros) and what the ROIs are owed, in their order.
template <class G, class Src>
void scatter_into(Tensor& result, const Tensor* base, const std::vector<Owed<G>>& rois, bool channels_last) {
  using Real = Wide<G>;
  struct Reader {
    const Owed<G>* roi;
    Axis<Real> z, y;  // transposed
  };
  const int64_t samples = result.size(0), depth = result.size(2), height = result.size(3), width = result.size(4);
  const int64_t planes = channels_last ? 1 : result.size(1), step = channels_last ? result.size(1) : 1;
  const int64_t line = width * step;
  if (result.numel() == 0) return;
  std::vector<std::vector<Reader>> readers(samples);
  for (const Owed<G>& roi : rois) {
    if (roi.box->sample < 0 || roi.box->x.taps.empty()) continue;
    readers[roi.box->sample].push_back({&roi, roi.box->z.transposed(), roi.box->y.transposed()});
  }
  auto* out = static_cast<Src*>(result.mutable_data_ptr());
  const auto* start = base ? static_cast<const Src*>(base->const_data_ptr()) : nullptr;
  const bool bypass = static_cast<int64_t>(result.numel() * sizeof(Src)) >= kHugePageBytes;
  torch::stable::parallel_for(0, samples * planes * depth, kSerialElements / (height * line) + 1, [&](int64_t begin, int64_t end) {
    std::vector<Real> row(line);
    std::vector<Src> narrow(line);
    const std::vector<Src> zeros(start ? 0 : line);
    std::vector<const Reader*> here;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / (planes * depth), c = item / depth % planes, z = item % depth;
      here.clear();
      for (const Reader& reader : readers[n]) {
        const Channels& some = reader.roi->channels;
        const bool reads = channels_last || (c >= some.first && c < some.first + some.count);
        if (reads && !readers_of(reader.z, z).empty()) here.push_back(&reader);
      }
      for (int64_t y = 0; y < height; ++y) {
        const int64_t place = (item * height + y) * line;
        const Src* old = start ? start + place : zeros.data();
        bool touched = false;
        for (const Reader* reader : here) {
          const auto ys = readers_of(reader->y, y);
          if (ys.empty()) continue;
          if (!touched) convert(row.data(), old, line);
          touched = true;
          const Owed<G>& roi = *reader->roi;
          const int64_t skipped = channels_last ? 0 : c - roi.channels.first;
          Real* into = row.data() + (channels_last ? roi.channels.first : 0);
          for (const auto& oz : readers_of(reader->z, z)) {
            for (const auto& oy : ys) {
              const G* from = roi.grad + skipped * roi.stride[0] + oz.index * roi.stride[1] + oy.index * roi.stride[2];
              spread_row(roi.box->x, from, roi.stride[3], roi.stride[0], channels_last ? roi.channels.count : 1, step,
                         oz.weight * oy.weight, into);
            }
          }
        }
        if constexpr (!std::is_same_v<Real, Src>) {
          if (touched) convert(narrow.data(), row.data(), line);
          old = touched ? narrow.data() : old;
        } else {
          old = touched ? row.data() : old;
        }
        write_out(reinterpret_cast<char*>(out + place), reinterpret_cast<const char*>(old), line * sizeof(Src), bypass);
      }
    }
    finish_writing();
  });
}

}  // namespace roi_sampling
