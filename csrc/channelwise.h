// What csrc/channelwise.cpp and the kernels of csrc/channelwise_kernels.h agree on.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace channelwise {

using torch::headeronly::ScalarType;

enum Activation : int64_t { kNone, kRelu, kLeakyRelu };
enum TableRow : int { kCenter, kScale, kShift, kRows };

struct Problem {
  const void* x;
  const void* grad;   // sums and backward
  const void* other;  // affine: residual; sums: output; or null
  void* out;          // affine: y; sums: the gradient kept, or null; backward: dx
  int64_t activation;
  double slope;
  bool bypass_cache;
};

// A run of elements in memory; channel of element i: i % channels. Channels first, that is 1 channel.
struct Strip {
  int64_t offset, count;  // elements; count is a multiple of channels
  int64_t channels;
  const void* table;      // rows of `channels` numbers, `stride` apart; float, or double for double maps
  const void* weights;    // backward: the same
  int64_t stride;
};

struct Kernels {
  // Writes mean and sum of squared differences, [2][channels].
  void (*moments)(const Problem&, const Strip&, double* out);
  void (*affine)(const Problem&, const Strip&);
  // Writes the sums of d and d (x - center), [2][channels].
  void (*sums)(const Problem&, const Strip&, double* out);
  void (*backward)(const Problem&, const Strip&);
};

}  // namespace channelwise
