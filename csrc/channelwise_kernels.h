// The passes over one strip; compiled once per instruction set (variants.h).
//
// Both layouts run through the same loops: numbers per channel are repeated in a row whose length, the period, is a
// multiple of the channels and of a register, so that any number of channels takes whole registers. Sums are kept per
// element of the period, and folded into numbers of double precision per channel after every block.

namespace channelwise {
namespace ARCH {

#define INLINE inline __attribute__((always_inline)) ARCH_TARGET
#define KERNEL __attribute__((noinline)) ARCH_TARGET

template <class Real>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(ARCH_BYTES)));
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(ARCH_BYTES)));
};
typedef uint32_t Bits __attribute__((vector_size(ARCH_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(ARCH_BYTES / 2)));

template <class V, class T>
INLINE V load(const T* x) {
  V v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

template <class T, class V>
INLINE void store(T* x, V v) {
  std::memcpy(x, &v, sizeof(v));
}

template <class T, class V>
INLINE void store_around_cache(T* x, V v) {
#ifdef ARCH_X86
  if constexpr (sizeof(V) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(x), reinterpret_cast<__m512i>(v));
  if constexpr (sizeof(V) == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(x), reinterpret_cast<__m256i>(v));
  if constexpr (sizeof(V) == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(x), reinterpret_cast<__m128i>(v));
#else
  store(x, v);
#endif
}

// A format says how stored elements become vectors of numbers, and back.
template <class Real>
struct FloatFormat {
  using Value = Real;
  using Storage = Real;
  using V = typename Vec<Real>::type;
  static INLINE V widen(V v) { return v; }
  static INLINE V narrow(V v) { return v; }
  using Packed = V;
};

struct BFloat16Format {
  using Value = float;
  using Storage = uint16_t;
  using V = Vec<float>::type;
  using Packed = HalfBits;
  static INLINE V widen(HalfBits h) { return reinterpret_cast<V>(__builtin_convertvector(h, Bits) << 16); }
  static INLINE HalfBits narrow(V v) {
    const Bits bits = reinterpret_cast<Bits>(v);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(v != v ? (Bits{} + 0x7fc0) : rounded, HalfBits);
  }
};

struct HalfFormat {
  using Value = float;
  using Storage = uint16_t;
  using V = Vec<float>::type;
  using Packed = HalfBits;
#ifdef ARCH_X86
#if ARCH_BYTES == 64
  static INLINE V widen(HalfBits h) { return _mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(h)); }
  static INLINE HalfBits narrow(V v) { return reinterpret_cast<HalfBits>(_mm512_maskz_cvtps_ph(0xffff, v, 0)); }
#else
  static INLINE V widen(HalfBits h) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h)); }
  static INLINE HalfBits narrow(V v) { return reinterpret_cast<HalfBits>(_mm256_cvtps_ph(v, 0)); }
#endif
#else
  static INLINE V widen(HalfBits h) {
    const Bits bits = __builtin_convertvector(h, Bits), magnitude = (bits & 0x7fff) << 13;
    const V scaled = reinterpret_cast<V>(magnitude) * 0x1p112f;
    const Bits special = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
    return reinterpret_cast<V>(reinterpret_cast<Bits>(scaled) | special | (bits & 0x8000) << 16);
  }
  static INLINE HalfBits narrow(V v) {
    const Bits bits = reinterpret_cast<Bits>(v), magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Adding a half makes the hardware round a subnormal result at the right bit.
    const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<V>(magnitude) + 0.5f) - 0x3f000000u;
    Bits half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
    return __builtin_convertvector(half | (bits >> 16 & 0x8000u), HalfBits);
  }
#endif
};

template <class F>
constexpr int kLanes = ARCH_BYTES / sizeof(typename F::Value);

// `n` of a register's elements, 0 in the others.
template <class F, bool kWhole>
INLINE typename F::V read(const typename F::Storage* x, int n) {
  if constexpr (kWhole) return F::widen(load<typename F::Packed>(x));
  typename F::Storage some[kLanes<F>] = {};
  std::memcpy(some, x, n * sizeof(some[0]));
  return F::widen(load<typename F::Packed>(some));
}

template <class F, bool kWhole>
INLINE void write(typename F::Storage* x, typename F::V v, int n, bool bypass_cache) {
  const typename F::Packed packed = F::narrow(v);
  if constexpr (!kWhole) {
    std::memcpy(x, &packed, n * sizeof(*x));
  } else if (bypass_cache) {
    store_around_cache(x, packed);
  } else {
    store(x, packed);
  }
}

template <class F>
INLINE bool may_bypass(const Problem& p, const typename F::Storage* out) {
  return p.bypass_cache && reinterpret_cast<uintptr_t>(out) % sizeof(typename F::Packed) == 0;
}

constexpr int64_t kLeastPeriod = 64, kGranularity = 16;
constexpr int64_t kBlock = 8192;  // elements between two folds: few enough for single precision

INLINE int64_t period_of(int64_t channels) {
  int64_t period = channels;
  while (period % kGranularity) period += channels;
  return (kLeastPeriod + period - 1) / period * period;
}

// Rows of one period.
template <class Real>
struct Period {
  int64_t channels, length;
  std::vector<Real> storage;

  INLINE Period(int64_t channels, int rows) : channels(channels), length(period_of(channels)), storage(rows * length) {}
  INLINE Real* row(int index) { return storage.data() + index * length; }
  INLINE void fill(int first, const Strip& s, const void* table) {
    for (int r = 0; r < kRows; ++r) {
      const Real* from = static_cast<const Real*>(table) + r * s.stride;
      if (channels == 1) {
        for (int64_t i = 0; i < length; ++i) row(first + r)[i] = *from;
        continue;
      }
      for (int64_t i = 0; i < length; i += channels) std::memcpy(row(first + r) + i, from, channels * sizeof(Real));
    }
  }
  INLINE int64_t block() const { return length * (kBlock > 16 * length ? kBlock / length : 16); }
  // Sum of a row over the elements of channel c.
  INLINE double fold(int index, int64_t c) {
    double total = 0;
    for (int64_t i = c; i < length; i += channels) total += row(index)[i];
    return total;
  }
};

// Calls step(element, place in the period, elements) for every register of elements.
template <class F, class Step>
INLINE void over(int64_t begin, int64_t end, int64_t period, Step& step) {
  constexpr int kStep = kLanes<F>;
  int64_t i = begin;
  for (; i + period <= end; i += period) {
    for (int64_t j = 0; j < period; j += kStep) step.template run<true>(i + j, j, kStep);
  }
  int64_t j = 0;
  for (; i + j + kStep <= end; j += kStep) step.template run<true>(i + j, j, kStep);
  if (i + j < end) step.template run<false>(i + j, j, static_cast<int>(end - i - j));
}

template <class F>
struct MomentsStep {
  using V = typename F::V;
  const typename F::Storage* x;
  const typename F::Value* shift;
  typename F::Value *sums, *squares;

  template <bool kWhole>
  INLINE void run(int64_t i, int64_t j, int n) {
    V d = read<F, kWhole>(x + i, n) - load<V>(shift + j);
    if constexpr (!kWhole) {
      for (int lane = n; lane < kLanes<F>; ++lane) d[lane] = 0;
    }
    store(sums + j, load<V>(sums + j) + d);
    store(squares + j, load<V>(squares + j) + d * d);
  }
};

// Sums of differences from a value amid the block's own, which therefore cancel little; blocks are merged as by Chan.
template <class F>
KERNEL void moments(const Problem& p, const Strip& s, double* out) {
  using Real = typename F::Value;
  Period<Real> period(s.channels, 3);
  const auto* x = static_cast<const typename F::Storage*>(p.x) + s.offset;
  MomentsStep<F> step{x, period.row(0), period.row(1), period.row(2)};
  double *mean = out, *squares = out + s.channels;
  for (int64_t c = 0; c < 2 * s.channels; ++c) out[c] = 0;
  double before = 0;
  for (int64_t begin = 0; begin < s.count; begin += period.block()) {
    const int64_t end = std::min(s.count, begin + period.block());
    const int64_t first = std::min(period.length, end - begin);
    for (int64_t j = 0; j < period.length; ++j) period.row(1)[j] = period.row(2)[j] = 0;
    for (int64_t j = 0; j < first; j += kLanes<F>) {
      const auto v = j + kLanes<F> <= first ? read<F, true>(x + begin + j, 0)
                                            : read<F, false>(x + begin + j, static_cast<int>(first - j));
      store(period.row(1) + j, v);
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      const Real shift = static_cast<Real>(period.fold(1, c) / static_cast<double>(first / s.channels));
      for (int64_t i = c; i < period.length; i += s.channels) period.row(0)[i] = shift;
    }
    for (int64_t j = 0; j < period.length; ++j) period.row(1)[j] = 0;
    over<F>(begin, end, period.length, step);
    const double here = static_cast<double>((end - begin) / s.channels), all = before + here;
    for (int64_t c = 0; c < s.channels; ++c) {
      const double sum = period.fold(1, c), spread = period.fold(2, c) - sum * sum / here;
      const double delta = period.row(0)[c] + sum / here - mean[c];
      mean[c] += delta * (here / all);
      squares[c] += (spread < 0 ? 0 : spread) + delta * delta * (before * here / all);
    }
    before = all;
  }
}

template <class F>
struct Affine {
  using V = typename F::V;
  const typename F::Value *center, *scale, *shift;
  INLINE V operator()(V x, int64_t j) const {
    return (x - load<V>(center + j)) * load<V>(scale + j) + load<V>(shift + j);
  }
};

template <class F, int kActivation, bool kResidual>
struct AffineStep {
  using V = typename F::V;
  const typename F::Storage *x, *residual;
  typename F::Storage* out;
  Affine<F> affine;
  typename F::Value slope;
  bool bypass_cache;

  template <bool kWhole>
  INLINE void run(int64_t i, int64_t j, int n) {
    V y = affine(read<F, kWhole>(x + i, n), j);
    if constexpr (kResidual) y += read<F, kWhole>(residual + i, n);
    if constexpr (kActivation == kRelu) y = y < 0 ? V{} : y;
    if constexpr (kActivation == kLeakyRelu) y = y < 0 ? y * slope : y;
    write<F, kWhole>(out + i, y, n, bypass_cache);
  }
};

template <class F, int kActivation, bool kResidual>
KERNEL void affine_of(const Problem& p, const Strip& s) {
  using Real = typename F::Value;
  using Storage = typename F::Storage;
  Period<Real> period(s.channels, kRows);
  period.fill(0, s, s.table);
  auto* out = static_cast<Storage*>(p.out) + s.offset;
  AffineStep<F, kActivation, kResidual> step{
      static_cast<const Storage*>(p.x) + s.offset,
      kResidual ? static_cast<const Storage*>(p.other) + s.offset : nullptr,
      out,
      {period.row(kCenter), period.row(kScale), period.row(kShift)},
      static_cast<Real>(p.slope),
      may_bypass<F>(p, out)};
  over<F>(0, s.count, period.length, step);
}

template <class F>
void affine(const Problem& p, const Strip& s) {
  const bool residual = p.other != nullptr;
  switch (p.activation) {
    case kNone: return residual ? affine_of<F, kNone, true>(p, s) : affine_of<F, kNone, false>(p, s);
    case kRelu: return residual ? affine_of<F, kRelu, true>(p, s) : affine_of<F, kRelu, false>(p, s);
    default: return residual ? affine_of<F, kLeakyRelu, true>(p, s) : affine_of<F, kLeakyRelu, false>(p, s);
  }
}

// The gradient before the activation whose input or output is y.
template <class F, int kActivation>
INLINE typename F::V before_activation(typename F::V grad, typename F::V y, typename F::Value slope) {
  using V = typename F::V;
  if constexpr (kActivation == kRelu) return y <= 0 ? V{} : grad;
  if constexpr (kActivation == kLeakyRelu) return y <= 0 ? grad * slope : grad;
  return grad;
}

template <class F, int kActivation, bool kOutput>
struct SumsStep {
  using V = typename F::V;
  const typename F::Storage *x, *grad, *output;
  typename F::Storage* kept;
  Affine<F> affine;
  typename F::Value *totals, *moments;
  typename F::Value slope;
  bool bypass_cache;

  template <bool kWhole>
  INLINE void run(int64_t i, int64_t j, int n) {
    const V v = read<F, kWhole>(x + i, n);
    V d = read<F, kWhole>(grad + i, n);
    if constexpr (kActivation != kNone) {
      const V y = kOutput ? read<F, kWhole>(output + i, n) : affine(v, j);
      d = before_activation<F, kActivation>(d, y, slope);
    }
    if (kept) write<F, kWhole>(kept + i, d, n, bypass_cache);
    V moment = d * (v - load<V>(affine.center + j));
    if constexpr (!kWhole) {
      // 0 times an infinite center would be NaN.
      for (int lane = n; lane < kLanes<F>; ++lane) moment[lane] = 0;
    }
    store(totals + j, load<V>(totals + j) + d);
    store(moments + j, load<V>(moments + j) + moment);
  }
};

template <class F, int kActivation, bool kOutput>
KERNEL void sums_of(const Problem& p, const Strip& s, double* out) {
  using Real = typename F::Value;
  using Storage = typename F::Storage;
  Period<Real> period(s.channels, kRows + 2);
  period.fill(0, s, s.table);
  auto* kept = p.out ? static_cast<Storage*>(p.out) + s.offset : nullptr;
  SumsStep<F, kActivation, kOutput> step{
      static_cast<const Storage*>(p.x) + s.offset,
      static_cast<const Storage*>(p.grad) + s.offset,
      kOutput ? static_cast<const Storage*>(p.other) + s.offset : nullptr,
      kept,
      {period.row(kCenter), period.row(kScale), period.row(kShift)},
      period.row(kRows),
      period.row(kRows + 1),
      static_cast<Real>(p.slope),
      may_bypass<F>(p, kept)};
  for (int64_t c = 0; c < 2 * s.channels; ++c) out[c] = 0;
  for (int64_t begin = 0; begin < s.count; begin += period.block()) {
    for (int64_t j = 0; j < 2 * period.length; ++j) period.row(kRows)[j] = 0;
    over<F>(begin, std::min(s.count, begin + period.block()), period.length, step);
    for (int64_t c = 0; c < s.channels; ++c) {
      out[c] += period.fold(kRows, c);
      out[s.channels + c] += period.fold(kRows + 1, c);
    }
  }
}

template <class F>
void sums(const Problem& p, const Strip& s, double* out) {
  const bool output = p.other != nullptr;
  switch (p.activation) {
    case kNone: return sums_of<F, kNone, false>(p, s, out);
    case kRelu: return output ? sums_of<F, kRelu, true>(p, s, out) : sums_of<F, kRelu, false>(p, s, out);
    default: return output ? sums_of<F, kLeakyRelu, true>(p, s, out) : sums_of<F, kLeakyRelu, false>(p, s, out);
  }
}

template <class F, int kActivation>
struct BackwardStep {
  using V = typename F::V;
  const typename F::Storage *x, *grad;
  typename F::Storage* out;
  Affine<F> affine;
  const typename F::Value *weight, *along, *constant;
  typename F::Value slope;
  bool bypass_cache;

  template <bool kWhole>
  INLINE void run(int64_t i, int64_t j, int n) {
    const V v = read<F, kWhole>(x + i, n);
    V d = read<F, kWhole>(grad + i, n);
    if constexpr (kActivation != kNone) d = before_activation<F, kActivation>(d, affine(v, j), slope);
    const V off = (v - load<V>(affine.center + j)) * load<V>(along + j) + load<V>(constant + j);
    write<F, kWhole>(out + i, d * load<V>(weight + j) + off, n, bypass_cache);
  }
};

template <class F, int kActivation>
KERNEL void backward_of(const Problem& p, const Strip& s) {
  using Real = typename F::Value;
  using Storage = typename F::Storage;
  Period<Real> period(s.channels, 2 * kRows);
  period.fill(0, s, s.table);
  period.fill(kRows, s, s.weights);
  auto* out = static_cast<Storage*>(p.out) + s.offset;
  BackwardStep<F, kActivation> step{
      static_cast<const Storage*>(p.x) + s.offset,
      static_cast<const Storage*>(p.grad) + s.offset,
      out,
      {period.row(kCenter), period.row(kScale), period.row(kShift)},
      period.row(kRows),
      period.row(kRows + 1),
      period.row(kRows + 2),
      static_cast<Real>(p.slope),
      may_bypass<F>(p, out)};
  over<F>(0, s.count, period.length, step);
}

template <class F>
void backward(const Problem& p, const Strip& s) {
  switch (p.activation) {
    case kNone: return backward_of<F, kNone>(p, s);
    case kRelu: return backward_of<F, kRelu>(p, s);
    default: return backward_of<F, kLeakyRelu>(p, s);
  }
}

template <class F>
Kernels kernels_of() {
  return {&moments<F>, &affine<F>, &sums<F>, &backward<F>};
}

inline Kernels kernels_for(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return kernels_of<FloatFormat<float>>();
    case ScalarType::Double: return kernels_of<FloatFormat<double>>();
    case ScalarType::Half: return kernels_of<HalfFormat>();
    case ScalarType::BFloat16: return kernels_of<BFloat16Format>();
    default: STD_TORCH_CHECK(false, "channelwise: unsupported dtype ", torch::headeronly::toString(type));
  }
}

#undef INLINE
#undef KERNEL

}  // namespace ARCH
}  // namespace channelwise
