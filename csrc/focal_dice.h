// What csrc/focal_dice.cpp and the kernels of csrc/focal_dice_kernels.h agree on.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace focal_dice {

using torch::headeronly::ScalarType;

enum Mode : int64_t { kSoftmax = 0, kSigmoid = 1, kSoftmaxDiceSigmoidFocal = 2 };
enum Row : int { kIntersection, kPrediction, kTarget, kFocal, kFocalOutside, kVoxels, kRows };

// Voxels that are computed together; a tile is several blocks that fit the first-level cache.
constexpr int kBlock = 32;
constexpr int kMaxTile = 256;
// Voxels that one thread sums up before another may go on. Fixed, so that sums do not depend on the threads.
constexpr int64_t kChunk = 4096;

struct Problem {
  const void* logits;  // (N, C, V), strides (C V, V, 1) or (C V, 1, C)
  const void* target;  // (N, V) or, multi-hot, (N, C, V) of uint8
  void* grad;          // like logits, backward only
  int64_t batch, classes, voxels;
  bool channels_last, multi_hot, bypass_cache;
  int64_t mode;
  double gamma;
  bool has_ignore;
  int64_t ignore;
};

// One sample: the classes that take part and, in backward, the gradients of their sums.
struct Sample {
  int64_t index;
  std::vector<int32_t> channels;   // class of each slot
  std::vector<int32_t> slots;      // slot of each class; channels.size() where it takes no part
  bool identity;                   // whether every class takes part
  std::vector<double> grad;        // (kRows, slots + 1); the extra slot, 0, is for voxels that do not count
  int count() const { return static_cast<int>(channels.size()); }
};

// Writes the slot of every voxel and returns how many labels mean nothing.
using Decode = int64_t (*)(const Problem&, const Sample&, int64_t start, int count, int32_t* slots);

struct Kernels {
  // Adds to `sums` (kRows, slots) and returns how many target values mean nothing.
  int64_t (*forward)(const Problem&, const Sample&, Decode, int64_t begin, int64_t end, double* sums);
  void (*backward)(const Problem&, const Sample&, Decode, int64_t begin, int64_t end);
};

}  // namespace focal_dice
