// Focal and dice sums of a chunk of voxels, and their gradient; compiled once per instruction set (variants.h).
//
// Channels first, plane after plane is copied into a tile in the first-level cache: the planes of a volume often lie a
// power of two apart, so that their lines would evict each other if they were read side by side. A tile is a row of
// blocks of [slot][32 voxels]. The true class is taken out of the block at once (its logit becomes -inf), so that 1 - p_t
// is a sum of positive terms, and the one exponential per element needs no look at the target.

namespace focal_dice {
namespace ARCH {

#define INLINE inline __attribute__((always_inline)) ARCH_TARGET
#define KERNEL __attribute__((noinline)) ARCH_TARGET

template <class Real>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(ARCH_BYTES)));
  typedef int32_t bits __attribute__((vector_size(ARCH_BYTES)));
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(ARCH_BYTES)));
  typedef int64_t bits __attribute__((vector_size(ARCH_BYTES)));
};
using VF = Vec<float>::type;
using VD = Vec<double>::type;
using VI = Vec<float>::bits;

template <class Real>
constexpr int kLanes = ARCH_BYTES / sizeof(Real);
template <class Real>
constexpr int kVectors = kBlock / kLanes<Real>;

template <class Real>
INLINE typename Vec<Real>::type load(const Real* x) {
  typename Vec<Real>::type v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

template <class Real, class V>
INLINE void store(Real* x, V v) {
  std::memcpy(x, &v, sizeof(v));
}

template <class V, class Real>
INLINE V all(Real x) {
  return x - V{};
}

#ifdef ARCH_X86
// What the instructions of 256 bits take, whatever a register's size.
typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));
#endif

template <class Real>
INLINE Real sum(typename Vec<Real>::type v) {
  Real total = 0;
  for (int lane = 0; lane < kLanes<Real>; ++lane) total += v[lane];
  return total;
}

// The larger; x where it is NaN.
template <class Real, class V>
INLINE V larger(V x, V least) {
#ifdef ARCH_X86
  if constexpr (std::is_same_v<V, Eight>) return _mm256_max_ps(least, x);
  if constexpr (std::is_same_v<V, Sixteen>) return _mm512_maskz_max_ps(0xffff, least, x);
#endif
  return least > x ? least : x;
}

// What exp_of needs. In a loop over classes there are more constants than registers (but for AVX-512), and the compiler
// would rather keep them than the sums; behind a pointer that it cannot see through they are operands in memory.
struct ExpConstants {
  static constexpr int kLanes = ARCH_BYTES / sizeof(float), kCount = 10;
  float values[kCount][kLanes] __attribute__((aligned(64)));
};

INLINE ExpConstants exp_constants() {
  // Adding the third leaves the rounded exponent, biased, in the low bits. Then the minimax polynomial of 2^x.
  constexpr float kValues[ExpConstants::kCount] = {-88.02f,       1.44269504f, 12582912.0f + 127.0f, 0.00015353362f, 0.0013398875f,
                                                   0.009618437f, 0.055503324f, 0.24022648f, 0.6931472f, 1.0f};
  ExpConstants constants;
  for (int i = 0; i < ExpConstants::kCount; ++i) {
    for (int lane = 0; lane < ExpConstants::kLanes; ++lane) constants.values[i][lane] = kValues[i];
  }
  return constants;
}

// e^x for x <= 0; exactly 1 at 0, 0 below -88, NaN for NaN.
INLINE VF exp_of(VF x, const ExpConstants& constants) {
  const auto k = [&](int i) __attribute__((always_inline)) ARCH_TARGET { return load(constants.values[i]); };
  x = larger<float>(x, k(0));
  const VF shifted = x * k(1) + k(2);
  const VF f = x * k(1) - (shifted - k(2));
  VF p = k(3) * f + k(4);
  p = p * f + k(5);
  p = p * f + k(6);
  p = p * f + k(7);
  p = p * f + k(8);
  p = p * f + k(9);
  return p * reinterpret_cast<VF>(reinterpret_cast<VI>(shifted) << 23);
}

INLINE VF exp_of(VF x) { return exp_of(x, exp_constants()); }

INLINE VD exp_of(VD x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

INLINE VD exp_of(VD x, const ExpConstants&) { return exp_of(x); }

// log x for positive, normal x.
INLINE VF log_of(VF x) {
  const VI bits = reinterpret_cast<VI>(x);
  const VI exponent = (bits - 0x3f3504f3) >> 23;
  const VF f = reinterpret_cast<VF>(bits - (exponent << 23)) - 1.0f;
  const VF e = __builtin_convertvector(exponent, VF);
  VF p = all<VF>(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VF square = f * f;
  p = p * f * square - 2.12194440e-4f * e - 0.5f * square;
  return f + p + 0.693359375f * e;
}

INLINE VD log_of(VD x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

struct Gamma {
  int kind;  // 0, 1, 2, or 3 for any other exponent
  double value;
};

INLINE Gamma gamma_of(double value) { return {value == 0 ? 0 : value == 1 ? 1 : value == 2 ? 2 : 3, value}; }

// u^gamma and u^(gamma - 1); where the latter is infinite, its product with a small factor is what counts: 0.
template <class Real, class V>
INLINE void power(V u, Gamma gamma, V& whole, V& less) {
  const V one = all<V>(Real(1)), zero = V{};
  if (gamma.kind == 0) {
    whole = one;
    less = zero;  // meets the factor gamma
  } else if (gamma.kind == 1) {
    whole = u;
    less = one;
  } else if (gamma.kind == 2) {
    whole = u * u;
    less = u;
  } else {
    const Real tiny = std::numeric_limits<Real>::min();
    const auto some = u > tiny;
    const V safe = some ? u : one;
    whole = some ? exp_of(Real(gamma.value) * log_of(safe)) : zero;
    less = whole / safe;
  }
}

template <class Real>
struct FloatFormat {
  using Value = Real;
  using Storage = Real;
  static constexpr bool kPlain = true;
  template <class V>
  static INLINE V load_vector(const Real* x) {
    V v;
    std::memcpy(&v, x, sizeof(v));
    return v;
  }
  static INLINE Real load_one(Real x) { return x; }
  static INLINE Real store_one(Real x) { return x; }
};

// 16-bit numbers, and the 32-bit ones that they become, of a register of floats.
template <class V>
struct Halves {
  typedef uint16_t narrow __attribute__((vector_size(sizeof(V) / 2)));
  typedef int32_t wide __attribute__((vector_size(sizeof(V))));
};

struct BFloat16Format {
  using Value = float;
  using Storage = uint16_t;
  static constexpr bool kPlain = false;
  static INLINE float load_one(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
  template <class V>
  static INLINE V load_vector(const uint16_t* x) {
    typename Halves<V>::narrow half;
    std::memcpy(&half, x, sizeof(half));
    return reinterpret_cast<V>(__builtin_convertvector(half, typename Halves<V>::wide) << 16);
  }
  static INLINE uint16_t store_one(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
  }
};

struct HalfFormat {
  using Value = float;
  using Storage = uint16_t;
  static constexpr bool kPlain = false;
  // By integers, so that it vectorises without a conversion instruction and keeps subnormal numbers.
  static INLINE float load_one(uint16_t x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | static_cast<uint32_t>(x & 0x8000) << 16);
  }
  template <class V>
  static INLINE V load_vector(const uint16_t* x) {
#ifdef ARCH_X86
    if constexpr (std::is_same_v<V, Sixteen>) return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    if constexpr (std::is_same_v<V, Eight>) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
    Halves<VF>::narrow half;
    std::memcpy(&half, x, sizeof(half));
    const VI bits = __builtin_convertvector(half, VI);
    const VI magnitude = (bits & 0x7fff) << 13;
    const VF scaled = reinterpret_cast<VF>(magnitude) * 0x1p112f;
    const VI special = (magnitude >= 0x0f800000) & 0x7f800000;
    return reinterpret_cast<VF>(reinterpret_cast<VI>(scaled) | special | (bits & 0x8000) << 16);
#endif
  }
  static INLINE uint16_t store_one(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Adding a half makes the hardware round a subnormal result at the right bit.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
};

// A row of a block, to an address that is a multiple of a register's size.
template <class Storage>
INLINE void store_streaming(Storage* to, const Storage* row) {
#ifdef ARCH_X86
  for (unsigned i = 0; i < kBlock * sizeof(Storage); i += ARCH_BYTES) {
    auto* line = reinterpret_cast<char*>(to) + i;
    const auto* from = reinterpret_cast<const char*>(row) + i;
    if constexpr (ARCH_BYTES == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(line), _mm512_loadu_si512(from));
    } else {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(line), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
  }
#else
  std::memcpy(to, row, kBlock * sizeof(Storage));
#endif
}

#ifdef ARCH_X86
INLINE void transpose(Eight (&rows)[8]) {
  typedef int32_t Order __attribute__((vector_size(32)));
  constexpr Order kLow = {0, 8, 1, 9, 4, 12, 5, 13}, kHigh = {2, 10, 3, 11, 6, 14, 7, 15};
  constexpr Order kLowPairs = {0, 1, 8, 9, 4, 5, 12, 13}, kHighPairs = {2, 3, 10, 11, 6, 7, 14, 15};
  constexpr Order kLowHalves = {0, 1, 2, 3, 8, 9, 10, 11}, kHighHalves = {4, 5, 6, 7, 12, 13, 14, 15};
  Eight singles[8], pairs[8];
  for (int i = 0; i < 8; i += 2) {
    singles[i] = __builtin_shuffle(rows[i], rows[i + 1], kLow);
    singles[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], kHigh);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      pairs[i + 2 * j] = __builtin_shuffle(singles[i + j], singles[i + j + 2], kLowPairs);
      pairs[i + 2 * j + 1] = __builtin_shuffle(singles[i + j], singles[i + j + 2], kHighPairs);
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = __builtin_shuffle(pairs[i], pairs[i + 4], kLowHalves);
    rows[i + 4] = __builtin_shuffle(pairs[i], pairs[i + 4], kHighHalves);
  }
}
#endif

// See Decode.
template <class Label>
KERNEL int64_t decode(const Problem& p, const Sample& s, int64_t start, int count, int32_t* slots) {
  using Wide = std::conditional_t<sizeof(Label) < sizeof(int32_t), int32_t, Label>;
  const Label* label = static_cast<const Label*>(p.target) + s.index * p.voxels + start;
  // A value that the dtype does not have is never met.
  const bool ignores = p.has_ignore && p.ignore == static_cast<Label>(p.ignore);
  const Wide ignore = static_cast<Wide>(p.ignore);
  const int32_t none = s.count(), classes = static_cast<int32_t>(p.classes);
  int32_t wrong = 0;
  for (int i = 0; i < count; ++i) {
    const Wide value = label[i];
    const bool in_range = (value >= 0) & (value < classes), ignored = ignores & (value == ignore);
    // Without a branch for the usual case, so that it vectorises.
    slots[i] = in_range & !ignored ? static_cast<int32_t>(value) : classes;
    wrong += (in_range | ignored) ? 0 : 1;
  }
  if (s.identity) return wrong;
  for (int i = 0; i < count; ++i) slots[i] = slots[i] < classes ? s.slots[slots[i]] : none;
  return wrong;
}

inline Decode decode_for(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return &decode<uint8_t>;
    case ScalarType::Char: return &decode<int8_t>;
    case ScalarType::Short: return &decode<int16_t>;
    case ScalarType::Int: return &decode<int32_t>;
    case ScalarType::Long: return &decode<int64_t>;
    default: STD_TORCH_CHECK(false, "focal_dice: unsupported target dtype ", torch::headeronly::toString(type));
  }
}

// Scratch memory of one thread.
template <class Real>
struct Tile {
  int slots, voxels;  // capacity
  std::vector<Real> storage;
  Real* values;       // [block][slots + 1][32]; the extra slot takes what belongs nowhere
  Real* aside;        // [slots + 1][32]
  Real* sums;         // [4][slots + 1][4] of the true class, then [2][slots][lanes]
  // Per voxel: the largest logit; the true class's; the sum of the other exponentials and the inverse of the whole sum;
  // p and the focal term of the true class. Worked on a tile at a time, so that latencies overlap.
  Real top[kMaxTile] __attribute__((aligned(64)));
  Real chosen[kMaxTile] __attribute__((aligned(64)));
  Real others[kMaxTile] __attribute__((aligned(64)));
  Real inverse[kMaxTile] __attribute__((aligned(64)));
  Real true_p[kMaxTile] __attribute__((aligned(64)));
  Real true_focal[kMaxTile] __attribute__((aligned(64)));
  Real mean[kMaxTile] __attribute__((aligned(64)));
  Real true_grad[kMaxTile] __attribute__((aligned(64)));
  int32_t labels[kMaxTile] __attribute__((aligned(64)));
  int uniform[kMaxTile / kBlock];

  explicit Tile(int count) : slots(count) {
    const int fitting = 24576 / static_cast<int>(sizeof(Real)) / (count + 1) / kBlock * kBlock;
    voxels = fitting < kBlock ? kBlock : fitting > kMaxTile ? kMaxTile : fitting;
    const int64_t rows = int64_t{voxels / kBlock + 1} * (count + 1);
    storage.resize(rows * kBlock + 16 * (count + 1) + 2 * count * kLanes<Real> + 16);
    values = reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
    aside = values + int64_t{voxels / kBlock} * (count + 1) * kBlock;
    sums = values + rows * kBlock;
  }
  Real* block(int b) { return values + int64_t{b} * (slots + 1) * kBlock; }
};

template <class Format>
INLINE const typename Format::Storage* logits_of(const Problem& p, const Sample& s) {
  return static_cast<const typename Format::Storage*>(p.logits) + s.index * p.classes * p.voxels;
}

template <class Format, class Real>
INLINE void load_one_by_one(const typename Format::Storage* x, int64_t classes, const Sample& s, int length, Real* block) {
  for (int a = 0; a < s.count(); ++a) {
    Real* row = block + a * kBlock;
    for (int i = 0; i < length; ++i) row[i] = Format::load_one(x[i * classes + s.channels[a]]);
    for (int i = length; i < kBlock; ++i) row[i] = -std::numeric_limits<Real>::infinity();
  }
}

// A block of channels-last voxels; reads up to a register beyond them.
template <class Format, class Real>
INLINE void load_transposed(const typename Format::Storage* x, int64_t classes, const Sample& s, Real* block) {
#ifdef ARCH_X86
  if constexpr (std::is_same_v<Real, float>) {
    for (int i = 0; i < kBlock; i += 8) {
      for (int64_t c = 0; c < classes; c += 8) {
        Eight rows[8];
        for (int v = 0; v < 8; ++v) rows[v] = Format::template load_vector<Eight>(x + (i + v) * classes + c);
        transpose(rows);
        const int count = classes - c < 8 ? static_cast<int>(classes - c) : 8;
        for (int v = 0; v < count; ++v) store(block + s.slots[c + v] * kBlock + i, rows[v]);
      }
    }
    return;
  }
#endif
  load_one_by_one<Format>(x, classes, s, kBlock, block);
}

// Whole blocks from `b` on; `x` is their first voxel of class 0.
template <class Format, int kBlocks, class Real>
INLINE void load_blocks(const Problem& p, const Sample& s, const typename Format::Storage* x, Tile<Real>& tile, int b) {
  using V = typename Vec<Real>::type;
  constexpr int kAhead = 2;  // planes
  constexpr int kLine = 64 / sizeof(*x), kCount = kVectors<Real>;
  const int slots = tile.slots;
  V top[kBlocks][kCount];
  for (int j = 0; j < kBlocks; ++j) {
    for (int v = 0; v < kCount; ++v) top[j][v] = all<V>(-std::numeric_limits<Real>::infinity());
  }
  Real* row = tile.block(b);
  const int stride = (slots + 1) * kBlock;
  for (int a = 0; a < slots; ++a, row += kBlock) {
    if (a + kAhead < slots) {
      const auto* next = x + s.channels[a + kAhead] * p.voxels;
      for (int i = 0; i < kBlocks * kBlock; i += kLine) __builtin_prefetch(next + i);
    }
    const auto* plane = x + s.channels[a] * p.voxels;
    for (int j = 0; j < kBlocks; ++j) {
      for (int v = 0; v < kCount; ++v) {
        const V value = Format::template load_vector<V>(plane + j * kBlock + v * kLanes<Real>);
        store(row + j * stride + v * kLanes<Real>, value);
        top[j][v] = larger<Real>(top[j][v], value);
      }
    }
  }
  for (int j = 0; j < kBlocks; ++j) {
    for (int v = 0; v < kCount; ++v) store(tile.top + (b + j) * kBlock + v * kLanes<Real>, top[j][v]);
  }
}

// Copies a tile, finds the largest logit of every voxel, and fills the last block up with -inf.
template <class Format, class Real>
INLINE void load_tile(const Problem& p, const Sample& s, int64_t start, int count, Tile<Real>& tile) {
  using V = typename Vec<Real>::type;
  constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
  const auto* x = logits_of<Format>(p, s);
  const int slots = tile.slots, blocks = (count + kBlock - 1) / kBlock, whole = count / kBlock;
  for (int i = 0; i < blocks * kBlock; ++i) tile.top[i] = kNothing;
  if (p.channels_last) {
    for (int b = 0; b < blocks; ++b) {
      const int length = b < whole ? kBlock : count - b * kBlock;
      Real* block = tile.block(b);
      const int64_t first = (start + b * kBlock) * p.classes;
      const bool whole_registers = first + kBlock * p.classes + kLanes<Real> <= p.voxels * p.classes;
      if (std::is_same_v<Real, float> && length == kBlock && whole_registers) {
        load_transposed<Format>(x + first, p.classes, s, block);
      } else {
        load_one_by_one<Format>(x + first, p.classes, s, length, block);
      }
      for (int a = 0; a < slots; ++a) {
        const Real* row = block + a * kBlock;
        for (int i = 0; i < kBlock; i += kLanes<Real>) {
          const V v = load(row + i), top = load(tile.top + b * kBlock + i);
          store(tile.top + b * kBlock + i, larger<Real>(top, v));
        }
      }
    }
    return;
  }
  // As many blocks as have eight registers of maxima, or one.
  constexpr int kTogether = kVectors<Real> < 8 ? 8 / kVectors<Real> : 1;
  int b = 0;
  for (; b + kTogether <= whole; b += kTogether) load_blocks<Format, kTogether>(p, s, x + start + b * kBlock, tile, b);
  for (; b < whole; ++b) load_blocks<Format, 1>(p, s, x + start + b * kBlock, tile, b);
  if (whole == blocks) return;
  for (int a = 0; a < slots; ++a) {
    const auto* plane = x + s.channels[a] * p.voxels + start;
    Real* row = tile.block(whole) + a * kBlock;
    for (int i = 0; i < kBlock; ++i) {
      row[i] = whole * kBlock + i < count ? Format::load_one(plane[whole * kBlock + i]) : kNothing;
      Real& top = tile.top[whole * kBlock + i];
      top = row[i] > top ? row[i] : top;
    }
  }
}

template <class Format, class Real>
INLINE void store_block(typename Format::Storage* out, const Real* row, Format) {
#ifdef ARCH_X86
  if constexpr (std::is_same_v<Format, HalfFormat>) {
    for (int i = 0; i < kBlock; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(row + i), 0));
    }
    return;
  }
#endif
  for (int i = 0; i < kBlock; ++i) out[i] = Format::store_one(row[i]);
}

template <class Storage>
INLINE void write_row(const Problem& p, Storage* to, const Storage* row, int length) {
  if (length < kBlock) {
    std::memcpy(to, row, length * sizeof(Storage));
  } else if (p.bypass_cache) {
    store_streaming(to, row);
  } else {
    std::memcpy(to, row, kBlock * sizeof(Storage));
  }
}

template <class Format, class Real>
INLINE void store_row(const Problem& p, typename Format::Storage* to, const Real* row, int length) {
  if constexpr (Format::kPlain) {
    write_row(p, to, row, length);
  } else {
    typename Format::Storage out[kBlock] __attribute__((aligned(64)));
    store_block(out, row, Format{});
    write_row(p, to, out, length);
  }
}

#ifdef ARCH_X86
INLINE void store_transposed(const float* block, int classes, float* to) {
  for (int i = 0; i < kBlock; i += 8) {
    for (int c = 0; c < classes; c += 8) {
      const int count = classes - c < 8 ? classes - c : 8;
      Eight rows[8];
      for (int v = 0; v < 8; ++v) rows[v] = _mm256_loadu_ps(block + (v < count ? c + v : c) * kBlock + i);
      transpose(rows);
      for (int v = 0; v < 8; ++v) {
        float* voxel = to + (i + v) * classes + c;
        if (count == 8) {
          _mm256_storeu_ps(voxel, rows[v]);
        } else {
          for (int j = 0; j < count; ++j) voxel[j] = rows[v][j];
        }
      }
    }
  }
}
#endif

template <class Format, class Real>
INLINE void store_tile(const Problem& p, const Sample& s, int64_t start, int count, Tile<Real>& tile) {
  using Storage = typename Format::Storage;
  auto* grad = static_cast<Storage*>(p.grad) + s.index * p.classes * p.voxels;
  const int slots = tile.slots, blocks = (count + kBlock - 1) / kBlock;
  for (int i = 0; i < kBlock; ++i) tile.aside[i] = 0;
  if (p.channels_last) {
    for (int b = 0; b < blocks; ++b) {
      const int length = count - b * kBlock < kBlock ? count - b * kBlock : kBlock;
      const Real* block = tile.block(b);
#ifdef ARCH_X86
      if constexpr (std::is_same_v<Format, FloatFormat<float>>) {
        if (s.identity && length == kBlock) {
          store_transposed(block, slots, grad + (start + b * kBlock) * p.classes);
          continue;
        }
      }
#endif
      for (int i = 0; i < length; ++i) {
        Storage* to = grad + (start + b * kBlock + i) * p.classes;
        if (s.identity) {
          for (int a = 0; a < slots; ++a) to[a] = Format::store_one(block[a * kBlock + i]);
        } else {
          for (int64_t c = 0; c < p.classes; ++c) {
            to[c] = s.slots[c] < slots ? Format::store_one(block[s.slots[c] * kBlock + i]) : Storage(0);
          }
        }
      }
    }
    return;
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const bool used = s.slots[c] < slots;
    const Real* row = used ? tile.values + s.slots[c] * kBlock : tile.aside;
    const int stride = used ? (slots + 1) * kBlock : 0;
    Storage* plane = grad + c * p.voxels + start;
    for (int i = 0; i < count; i += kBlock, row += stride) store_row<Format>(p, plane + i, row, count - i);
  }
}

// The slot of all voxels of a block, or -1.
INLINE int uniform_slot(const int32_t* labels) {
  VI differ = VI{};
  for (int i = 0; i < kBlock; i += kLanes<float>) {
    VI v;
    std::memcpy(&v, labels + i, sizeof(v));
    differ |= v ^ labels[0];
  }
  int32_t any = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) any |= differ[lane];
  return any ? -1 : labels[0];
}

// Moves the logit of every voxel's true class from the block to `chosen`.
template <class Real>
INLINE void take_true(Real* block, Real* top, Real* chosen, const int32_t* labels, int uniform, int slots) {
  constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
  if (uniform >= 0) {
    std::memcpy(chosen, block + uniform * kBlock, kBlock * sizeof(Real));
    for (int i = 0; i < kBlock; ++i) block[uniform * kBlock + i] = kNothing;
    return;
  }
  int32_t places[kBlock];  // first, since that vectorises
  for (int i = 0; i < kBlock; ++i) places[i] = labels[i] * kBlock + i;
  for (int i = 0; i < kBlock; ++i) {
    chosen[i] = block[places[i]];
    block[places[i]] = kNothing;
  }
  for (int i = 0; i < kBlock; ++i) {
    if (labels[i] < slots) continue;
    for (int a = 0; a < slots; ++a) block[a * kBlock + i] = kNothing;
    top[i] = chosen[i] = 0;
  }
}

// Of a voxel's true class t, in a softmax: p_t, 1 - p_t and log p_t.
template <class Real, class V>
INLINE void softmax_true(V x, V top, V others, V& inverse, V& p, V& rest, V& log_p) {
  const V distance = x - top, e = exp_of(distance);
  const V total = others + e;
  inverse = Real(1) / total;
  // What rounding took from the total: without it log p_t would be 0 as soon as 1 - p_t is below half an ulp of 1.
  const V lost = e > others ? others - (total - e) : e - (total - others);
  p = e * inverse;
  rest = others * inverse;
  log_p = distance - (log_of(total) + lost * inverse);
}

// sigmoid(z), 1 - sigmoid(z) and -log sigmoid(z).
template <class Real, class V>
INLINE void sigmoid_of(V z, V& p, V& rest, V& loss) {
  const auto negative = z < Real(0);
  const V magnitude = negative ? -z : z;
  const V a = exp_of(-magnitude), total = Real(1) + a;
  const V large = Real(1) / total, small = a * large;
  p = negative ? small : large;
  rest = negative ? large : small;
  loss = log_of(total) + (a - (total - Real(1))) * large + (negative ? magnitude : V{});
}

// d focal / d z of independent channels, at z = x inside and z = -x outside.
template <class Real, class V>
INLINE V sigmoid_slope(V p, V rest, V loss, Gamma gamma) {
  V whole, less;
  power<Real>(rest, gamma, whole, less);
  return -whole * (Real(gamma.value) * p * loss + rest);
}

template <class Real>
INLINE void scatter_add(Real* sums, int slots, const int32_t* labels, int uniform, const Real* p, const Real* focal) {
  using V = typename Vec<Real>::type;
  if (uniform >= 0) {
    V p_sum = V{}, focal_sum = V{};
    for (int i = 0; i < kBlock; i += kLanes<Real>) {
      p_sum += load(p + i);
      focal_sum += load(focal + i);
    }
    Real* entry = sums + uniform * 4;
    entry[0] += sum<Real>(p_sum);
    entry[1] += kBlock;
    entry[2] += sum<Real>(focal_sum);
    return;
  }
  // Four tables in turn: neighbours of one class need not wait for each other.
  typedef Real Entry __attribute__((vector_size(4 * sizeof(Real))));
  for (int i = 0; i < kBlock; i += 4) {
    Real* table = sums;
    for (int j = i; j < i + 4; ++j, table += (slots + 1) * 4) {
      Real* entry = table + labels[j] * 4;
      Entry e;
      std::memcpy(&e, entry, sizeof(e));
      e += Entry{p[j], 1, focal[j], 0};
      std::memcpy(entry, &e, sizeof(e));
    }
  }
}

// A block of the next tile, to be fetched into the second-level cache, row by row, while this one is computed.
template <class Storage>
struct Ahead {
  const Storage* logits;
  const int32_t* channels;
  int64_t row;  // elements from one to the next
  template <int kCount>
  INLINE void fetch(int slot, int first) const {
    const Storage* from = logits + channels[slot] * row + first;
    for (int i = 0; i < kCount; i += 64 / sizeof(Storage)) __builtin_prefetch(from + i, 0, 2);
  }
};

template <class Format>
INLINE Ahead<typename Format::Storage> ahead_of(const Problem& p, const Sample& s, int64_t first) {
  const auto* x = logits_of<Format>(p, s);
  if (p.channels_last) return {x + first * p.classes, s.channels.data(), kBlock};
  return {x + first, s.channels.data(), p.voxels};
}

// Replaces the logits of a block by e^(x - top) and sums them up, in backward also weighted by `weights` of the classes.
template <class Real, bool kWeighted, class Storage>
INLINE void exponentials(Real* block, const Real* top, Real* others, const Real* weights, Real* weighted, int slots,
                         const ExpConstants& constants, const Ahead<Storage>& ahead) {
  using V = typename Vec<Real>::type;
  constexpr int kStep = kLanes<Real>, kGroup = 2;
  for (int i = 0; i < kBlock; i += kGroup * kStep) {
    V tops[kGroup], sums[kGroup], means[kGroup];
    for (int v = 0; v < kGroup; ++v) tops[v] = load(top + i + v * kStep), sums[v] = means[v] = V{};
    const ExpConstants* k = &constants;
    Real* row = block + i;
    for (int a = 0; a < slots; ++a, row += kBlock) {
      if constexpr (ARCH_BYTES < 64) __asm__("" : "+r"(k));
      ahead.template fetch<kGroup * kStep>(a, i);
      for (int v = 0; v < kGroup; ++v) {
        const V e = exp_of(load(row + v * kStep) - tops[v], *k);
        store(row + v * kStep, e);
        sums[v] += e;
        if (kWeighted) means[v] += e * weights[a];
      }
    }
    for (int v = 0; v < kGroup; ++v) {
      store(others + i + v * kStep, sums[v]);
      if (kWeighted) store(weighted + i + v * kStep, means[v]);
    }
  }
}

// Adds the probabilities of a block to each class's sum.
template <class Real>
INLINE void add_predictions(const Real* block, const Real* inverse, Real* prediction, int slots) {
  using V = typename Vec<Real>::type;
  constexpr int kStep = kLanes<Real>, kCount = kVectors<Real>;
  V scale[kCount];
  for (int v = 0; v < kCount; ++v) scale[v] = load(inverse + v * kStep);
  for (int a = 0; a < slots; ++a) {
    V total = load(block + a * kBlock) * scale[0], more = load(block + a * kBlock + kStep) * scale[1];
    for (int v = 2; v < kCount; v += 2) {
      total += load(block + a * kBlock + v * kStep) * scale[v];
      more += load(block + a * kBlock + (v + 1) * kStep) * scale[v + 1];
    }
    store(prediction + a * kStep, load(prediction + a * kStep) + (total + more));
  }
}

template <class Format>
KERNEL int64_t forward_labels(const Problem& p, const Sample& s, Decode decode, int64_t begin, int64_t end, double* out) {
  using Real = typename Format::Value;
  using V = typename Vec<Real>::type;
  constexpr int kStep = kLanes<Real>;
  const Gamma gamma = gamma_of(p.gamma);
  const ExpConstants constants = exp_constants();
  const int slots = s.count();
  Tile<Real> tile(slots);
  Real* const true_sums = tile.sums;
  Real* const prediction = tile.sums + 16 * (slots + 1);
  Real* const outside = prediction + slots * kStep;
  const int64_t size = 16 * (slots + 1) + 2 * slots * kStep;
  int64_t wrong = 0;
  for (int64_t start = begin; start < end; start += tile.voxels) {
    const int count = static_cast<int>(end - start < tile.voxels ? end - start : tile.voxels);
    const int blocks = (count + kBlock - 1) / kBlock;
    for (int64_t i = 0; i < size; ++i) tile.sums[i] = 0;
    wrong += decode(p, s, start, count, tile.labels);
    for (int i = count; i < blocks * kBlock; ++i) tile.labels[i] = slots;
    load_tile<Format>(p, s, start, count, tile);
    for (int b = 0; b < blocks; ++b) {
      Real* block = tile.block(b);
      Real* top = tile.top + b * kBlock;
      Real* chosen = tile.chosen + b * kBlock;
      const int32_t* labels = tile.labels + b * kBlock;
      const int uniform = tile.uniform[b] = uniform_slot(labels);
      if (uniform == slots) {
        for (int i = 0; i < kBlock; ++i) top[i] = chosen[i] = tile.others[b * kBlock + i] = 0;
        continue;
      }
      take_true(block, top, chosen, labels, uniform, slots);
      if (p.mode != kSoftmax) {
        for (int a = 0; a < slots; ++a) {
          V p_sum = V{}, focal_sum = V{};
          for (int i = 0; i < kBlock; i += kStep) {
            V q, rest, loss, whole, less;
            sigmoid_of<Real>(-load(block + a * kBlock + i), q, rest, loss);
            power<Real>(rest, gamma, whole, less);
            p_sum += rest;
            focal_sum += whole * loss;
          }
          store(outside + a * kStep, load(outside + a * kStep) + focal_sum);
          if (p.mode == kSigmoid) store(prediction + a * kStep, load(prediction + a * kStep) + p_sum);
        }
      }
      if (p.mode != kSigmoid) {
        exponentials<Real, false>(block, top, tile.others + b * kBlock, nullptr, nullptr, slots, constants,
                                  ahead_of<Format>(p, s, start + count + b * kBlock));
      }
    }
    for (int i = 0; i < blocks * kBlock; i += kStep) {
      V q, rest, loss, whole, less;
      if (p.mode != kSoftmax) {
        sigmoid_of<Real>(load(tile.chosen + i), q, rest, loss);
        power<Real>(rest, gamma, whole, less);
        store(tile.true_p + i, q);
        store(tile.true_focal + i, whole * loss);
      }
      if (p.mode != kSigmoid) {
        V inverse;
        softmax_true<Real>(load(tile.chosen + i), load(tile.top + i), load(tile.others + i), inverse, q, rest, loss);
        store(tile.inverse + i, inverse);
        store(tile.true_p + i, q);
        if (p.mode == kSoftmax) {
          power<Real>(rest, gamma, whole, less);
          store(tile.true_focal + i, whole * -loss);
        }
      }
    }
    for (int b = 0; b < blocks; ++b) {
      if (tile.uniform[b] == slots) continue;
      if (p.mode != kSigmoid) add_predictions(tile.block(b), tile.inverse + b * kBlock, prediction, slots);
      scatter_add(true_sums, slots, tile.labels + b * kBlock, tile.uniform[b], tile.true_p + b * kBlock,
                  tile.true_focal + b * kBlock);
    }
    for (int a = 0; a < slots; ++a) {
      double found[3] = {};
      for (int k = 0; k < 4; ++k) {
        for (int j = 0; j < 3; ++j) found[j] += true_sums[(k * (slots + 1) + a) * 4 + j];
      }
      double others = 0, focal_outside = 0;
      for (int lane = 0; lane < kStep; ++lane) {
        others += prediction[a * kStep + lane];
        focal_outside += outside[a * kStep + lane];
      }
      out[kIntersection * slots + a] += found[0];
      out[kPrediction * slots + a] += found[0] + others;
      out[kTarget * slots + a] += found[1];
      out[kFocal * slots + a] += found[2];
      out[kFocalOutside * slots + a] += focal_outside;
    }
  }
  return wrong;
}

// One number of the table per voxel, that of its class.
template <class Real>
INLINE typename Vec<Real>::type of_class(const Real* table, const int32_t* labels) {
  using V = typename Vec<Real>::type;
#ifdef ARCH_X86
  if constexpr (std::is_same_v<V, Sixteen>) {
    return _mm512_mask_i32gather_ps(V{}, 0xffff, _mm512_loadu_si512(labels), table, sizeof(Real));
  }
#endif
  V v;
  for (int lane = 0; lane < kLanes<Real>; ++lane) v[lane] = table[labels[lane]];
  return v;
}

// Gradients of a block's logits where they are not the true class's, independent channels.
template <class Real>
INLINE void outside_gradients(const Real* block, Real* out, const Real* g_prediction, const Real* g_outside, int slots,
                              Real dice, Gamma gamma) {
  using V = typename Vec<Real>::type;
  for (int a = 0; a < slots; ++a) {
    for (int i = a * kBlock; i < (a + 1) * kBlock; i += kLanes<Real>) {
      V q, rest, loss;
      sigmoid_of<Real>(-load(block + i), q, rest, loss);
      const V slope = sigmoid_slope<Real>(q, rest, loss, gamma);
      store(out + i, dice * g_prediction[a] * (q * rest) - g_outside[a] * slope);
    }
  }
}

// Gradients of the true classes' logits of some voxels, independent channels.
template <class Real>
INLINE void sigmoid_gradients(Tile<Real>& tile, int i, const Real* g_inside, const Real* g_prediction, const Real* g_focal,
                              Real dice, Gamma gamma) {
  using V = typename Vec<Real>::type;
  const int32_t* labels = tile.labels + i;
  V q, rest, loss;
  sigmoid_of<Real>(load(tile.chosen + i), q, rest, loss);
  const V slope = sigmoid_slope<Real>(q, rest, loss, gamma);
  const V g = of_class(g_prediction, labels) + of_class(g_inside, labels);
  store(tile.true_grad + i, dice * g * (q * rest) + of_class(g_focal, labels) * slope);
}

// The same of a softmax; leaves in `mean` what the other classes subtract from their g.
template <class Real>
INLINE void softmax_gradients(Tile<Real>& tile, int i, const Real* g_inside, const Real* g_prediction, const Real* g_focal,
                              Real weight, Gamma gamma) {
  using V = typename Vec<Real>::type;
  const int32_t* labels = tile.labels + i;
  V inverse, q, rest, log_p, whole, less;
  softmax_true<Real>(load(tile.chosen + i), load(tile.top + i), load(tile.others + i), inverse, q, rest, log_p);
  power<Real>(rest, gamma, whole, less);
  const V slope = Real(gamma.value) * q * log_p * less - whole;
  const V own = q * of_class(g_inside, labels) + weight * of_class(g_focal, labels) * slope;
  const V around = load(tile.mean + i) * inverse, g = of_class(g_prediction, labels);
  // p_t (g - h) + own with h = around + p_t g + own, rearranged so that nothing cancels as p_t tends to 1.
  store(tile.true_grad + i, rest * (q * g + own) - q * around);
  store(tile.mean + i, around + q * g + own);
  store(tile.inverse + i, inverse);
}

template <class Format>
KERNEL void backward_labels(const Problem& p, const Sample& s, Decode decode, int64_t begin, int64_t end) {
  using Real = typename Format::Value;
  using V = typename Vec<Real>::type;
  constexpr int kStep = kLanes<Real>, kCount = kVectors<Real>;
  const Gamma gamma = gamma_of(p.gamma);
  const int slots = s.count();
  const ExpConstants constants = exp_constants();
  Tile<Real> tile(slots);
  std::vector<Real> gradient(s.grad.begin(), s.grad.end());
  const Real* g_inside = gradient.data() + kIntersection * (slots + 1);
  const Real* g_prediction = gradient.data() + kPrediction * (slots + 1);
  const Real* g_focal = gradient.data() + kFocal * (slots + 1);
  const Real* g_outside = gradient.data() + kFocalOutside * (slots + 1);
  for (int64_t start = begin; start < end; start += tile.voxels) {
    const int count = static_cast<int>(end - start < tile.voxels ? end - start : tile.voxels);
    const int blocks = (count + kBlock - 1) / kBlock;
    decode(p, s, start, count, tile.labels);
    for (int i = count; i < blocks * kBlock; ++i) tile.labels[i] = slots;
    load_tile<Format>(p, s, start, count, tile);
    for (int b = 0; b < blocks; ++b) {
      Real* block = tile.block(b);
      Real* top = tile.top + b * kBlock;
      Real* chosen = tile.chosen + b * kBlock;
      const int32_t* labels = tile.labels + b * kBlock;
      const int uniform = tile.uniform[b] = uniform_slot(labels);
      if (uniform == slots) {
        for (int i = 0; i < slots * kBlock; ++i) block[i] = 0;
        for (int i = b * kBlock; i < (b + 1) * kBlock; ++i) tile.top[i] = tile.chosen[i] = tile.others[i] = tile.mean[i] = 0;
        continue;
      }
      take_true(block, top, chosen, labels, uniform, slots);
      if (p.mode == kSigmoid) outside_gradients(block, block, g_prediction, g_outside, slots, Real(1), gamma);
      if (p.mode == kSoftmax) {
        exponentials<Real, true>(block, top, tile.others + b * kBlock, g_prediction, tile.mean + b * kBlock, slots, constants,
                                 ahead_of<Format>(p, s, start + count + b * kBlock));
      }
    }
    for (int i = 0; i < blocks * kBlock; i += kStep) {
      if (p.mode == kSoftmax) softmax_gradients(tile, i, g_inside, g_prediction, g_focal, Real(1), gamma);
      if (p.mode == kSigmoid) sigmoid_gradients(tile, i, g_inside, g_prediction, g_focal, Real(1), gamma);
    }
    for (int b = 0; b < blocks; ++b) {
      if (tile.uniform[b] == slots) continue;
      Real* block = tile.block(b);
      const int first = b * kBlock;
      if (p.mode == kSoftmaxDiceSigmoidFocal) {
        outside_gradients(block, tile.aside, g_prediction, g_outside, slots, Real(0), gamma);
        exponentials<Real, true>(block, tile.top + first, tile.others + first, g_prediction, tile.mean + first, slots, constants,
                                 ahead_of<Format>(p, s, start + count + first));
        Real sigmoid[kBlock];
        for (int i = first; i < first + kBlock; i += kStep) {
          sigmoid_gradients(tile, i, g_inside, g_prediction, g_focal, Real(0), gamma);
          store(sigmoid + i - first, load(tile.true_grad + i));
          softmax_gradients(tile, i, g_inside, g_prediction, g_focal, Real(0), gamma);
          store(tile.true_grad + i, load(tile.true_grad + i) + load(sigmoid + i - first));
        }
      }
      if (p.mode != kSigmoid) {
        V inverse[kCount], mean[kCount];
        for (int v = 0; v < kCount; ++v) {
          inverse[v] = load(tile.inverse + first + v * kStep);
          mean[v] = load(tile.mean + first + v * kStep);
        }
        for (int a = 0; a < slots; ++a) {
          const Real g = g_prediction[a];
          for (int v = 0; v < kCount; ++v) {
            Real* place = block + a * kBlock + v * kStep;
            store(place, load(place) * inverse[v] * (g - mean[v]));
          }
        }
      }
      if (p.mode == kSoftmaxDiceSigmoidFocal) {
        for (int i = 0; i < slots * kBlock; ++i) block[i] += tile.aside[i];
      }
      const int32_t* labels = tile.labels + first;
      if (tile.uniform[b] >= 0) {
        std::memcpy(block + tile.uniform[b] * kBlock, tile.true_grad + first, kBlock * sizeof(Real));
      } else {
        for (int i = 0; i < kBlock; ++i) block[labels[i] * kBlock + i] = tile.true_grad[first + i];
      }
    }
    store_tile<Format>(p, s, start, count, tile);
  }
}

// Target values of 8 bits as numbers, and whether they count.
template <class Real>
INLINE void decode_channel(const Problem& p, const uint8_t* y, int length, Real* positive, Real* counted) {
  for (int i = 0; i < kBlock; ++i) {
    const bool counts = i < length && y[i] <= 1 && !(p.has_ignore && y[i] == p.ignore);
    counted[i] = counts;
    positive[i] = counts && y[i] == 1;
  }
}

template <class Format>
KERNEL int64_t forward_channels(const Problem& p, const Sample& s, Decode, int64_t begin, int64_t end, double* out) {
  using Real = typename Format::Value;
  using V = typename Vec<Real>::type;
  const Gamma gamma = gamma_of(p.gamma);
  const int slots = s.count();
  Tile<Real> tile(slots);
  int64_t wrong = 0;
  for (int64_t start = begin; start < end; start += tile.voxels) {
    const int count = static_cast<int>(end - start < tile.voxels ? end - start : tile.voxels);
    load_tile<Format>(p, s, start, count, tile);
    for (int a = 0; a < slots; ++a) {
      const auto* y = static_cast<const uint8_t*>(p.target) + (s.index * p.classes + s.channels[a]) * p.voxels + start;
      V sums[kRows] = {};
      for (int b = 0; b * kBlock < count; ++b) {
        Real positive[kBlock], counted[kBlock];
        const int length = count - b * kBlock < kBlock ? count - b * kBlock : kBlock;
        decode_channel(p, y + b * kBlock, length, positive, counted);
        for (int i = 0; i < length; ++i) {
          wrong += y[b * kBlock + i] > 1 && !(p.has_ignore && y[b * kBlock + i] == p.ignore);
        }
        for (int i = 0; i < kBlock; i += kLanes<Real>) {
          const V x = load(tile.block(b) + a * kBlock + i);
          const auto is_positive = load(positive + i) > Real(0), counts = load(counted + i) > Real(0);
          V q, rest, loss, whole, less;
          sigmoid_of<Real>(is_positive ? x : -x, q, rest, loss);
          power<Real>(rest, gamma, whole, less);
          const V prediction = counts ? (is_positive ? q : rest) : V{}, focal = counts ? whole * loss : V{};
          sums[kIntersection] += is_positive ? prediction : V{};
          sums[kPrediction] += prediction;
          sums[kTarget] += load(positive + i);
          sums[kFocal] += is_positive ? focal : V{};
          sums[kFocalOutside] += is_positive ? V{} : focal;
          sums[kVoxels] += load(counted + i);
        }
      }
      for (int row = 0; row < kRows; ++row) {
        for (int lane = 0; lane < kLanes<Real>; ++lane) out[row * slots + a] += sums[row][lane];
      }
    }
  }
  return wrong;
}

template <class Format>
KERNEL void backward_channels(const Problem& p, const Sample& s, Decode, int64_t begin, int64_t end) {
  using Real = typename Format::Value;
  using V = typename Vec<Real>::type;
  const Gamma gamma = gamma_of(p.gamma);
  const int slots = s.count();
  Tile<Real> tile(slots);
  for (int64_t start = begin; start < end; start += tile.voxels) {
    const int count = static_cast<int>(end - start < tile.voxels ? end - start : tile.voxels);
    load_tile<Format>(p, s, start, count, tile);
    for (int a = 0; a < slots; ++a) {
      const auto* y = static_cast<const uint8_t*>(p.target) + (s.index * p.classes + s.channels[a]) * p.voxels + start;
      const Real inside = s.grad[kIntersection * (slots + 1) + a], prediction = s.grad[kPrediction * (slots + 1) + a];
      const Real focal = s.grad[kFocal * (slots + 1) + a], outside = s.grad[kFocalOutside * (slots + 1) + a];
      for (int b = 0; b * kBlock < count; ++b) {
        Real positive[kBlock], counted[kBlock];
        decode_channel(p, y + b * kBlock, count - b * kBlock, positive, counted);
        for (int i = 0; i < kBlock; i += kLanes<Real>) {
          Real* place = tile.block(b) + a * kBlock + i;
          const V x = load(place);
          const auto is_positive = load(positive + i) > Real(0), counts = load(counted + i) > Real(0);
          V q, rest, loss;
          sigmoid_of<Real>(is_positive ? x : -x, q, rest, loss);
          const V slope = sigmoid_slope<Real>(q, rest, loss, gamma);
          const V dice = q * rest * (is_positive ? all<V>(prediction + inside) : all<V>(prediction));
          store(place, counts ? dice + (is_positive ? focal * slope : -outside * slope) : V{});
        }
      }
    }
    store_tile<Format>(p, s, start, count, tile);
  }
}

template <class Format>
Kernels kernels_of(bool multi_hot) {
  if (multi_hot) return {&forward_channels<Format>, &backward_channels<Format>};
  return {&forward_labels<Format>, &backward_labels<Format>};
}

inline Kernels kernels_for(ScalarType type, bool multi_hot) {
  switch (type) {
    case ScalarType::Float: return kernels_of<FloatFormat<float>>(multi_hot);
    case ScalarType::Double: return kernels_of<FloatFormat<double>>(multi_hot);
    case ScalarType::Half: return kernels_of<HalfFormat>(multi_hot);
    case ScalarType::BFloat16: return kernels_of<BFloat16Format>(multi_hot);
    default: STD_TORCH_CHECK(false, "focal_dice: unsupported dtype ", torch::headeronly::toString(type));
  }
}

#undef INLINE
#undef KERNEL

}  // namespace ARCH
}  // namespace focal_dice
