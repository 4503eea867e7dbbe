// Computes: the gate of squeeze-excite, sigmoid(W2 act(W1 mean + b1) + b2) of every image, from the
//     sums of c over tiles that irmb_block.h leaves.
// Tiling: an image for each block. A number of the hidden layer, or of the gate, is the sum of four
//     threads' parts.
// Traffic: the sums (N, tiles, M) in fp32 once, both weights from the caches, the gate (N, M) once.
// Numerics: all in fp32, tile by tile, then by ascending channel within a part, then part by part.
// Limits: what fits in shared memory: M + R + 4 max(M, R) numbers in fp32.
#pragma once

#include "cuda/activation.h"
#include "cuda/irmb_tiles.h"

namespace emo_kernels::cuda {

constexpr int kExciteParts = 4;

struct ExciteArgs {
  const float* sums;                                // (N, tiles, M)
  float* gate;                                      // (N, M)
  Vector reduce, reduce_bias, expand, expand_bias;  // (R, M), (R,), (M, R), (M,)
  int64_t N, tiles;
  int M, R;
  float pixels;  // of the output
  Activation act;
};

inline int64_t excite_bytes(int64_t M, int64_t R) {
  return (M + R + kExciteParts * (M > R ? M : R)) * int64_t{sizeof(float)};
}

class Excite {
 public:
  using Args = ExciteArgs;

  EMO_KERNEL Excite(const Args& args, const Place& place, void* shared)
      : args_(args), n_(place.block), thread_(place.group), means_(static_cast<float*>(shared)) {}

  static int64_t shared_bytes(const Args& args) { return excite_bytes(args.M, args.R); }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t, const Each& each) {
    each([](Excite& self) { self.load_means(); });
    each([&](Excite& self) { self.multiply(args.reduce, self.means_, args.R, args.M); });
    each([](Excite& self) { self.activate_hidden(); });
    each([&](Excite& self) { self.multiply(args.expand, self.hidden(), args.M, args.R); });
    each.then([](Excite& self) { self.store(); });
  }

 private:
  EMO_KERNEL float* hidden() const { return means_ + args_.M; }
  EMO_KERNEL float* parts(int row) const { return means_ + args_.M + args_.R + row * kExciteParts; }

  EMO_KERNEL void load_means() {
    for (int m = thread_; m < args_.M; m += kBlockThreads) {
      float sum = 0.0f;
      for (int64_t tile = 0; tile < args_.tiles; ++tile) {
        sum += read(args_.sums + (n_ * args_.tiles + tile) * args_.M + m);
      }
      write(means_ + m, sum / args_.pixels);
    }
  }

  // The parts of weight (rows, columns) times x.
  EMO_KERNEL void multiply(const Vector& weight, const float* x, int rows, int columns) {
    for (int i = thread_; i < rows * kExciteParts; i += kBlockThreads) {
      const int row = i / kExciteParts, part = i % kExciteParts;
      float sum = 0.0f;
      for (int c = part; c < columns; c += kExciteParts) {
        sum = fused(value_at(weight, int64_t{row} * columns + c), read(x + c), sum);
      }
      write(parts(row) + part, sum);
    }
  }

  EMO_KERNEL float all_parts(int row, const Vector& bias) const {
    float sum = value_at(bias, row);
#pragma unroll
    for (int part = 0; part < kExciteParts; ++part) sum += read(parts(row) + part);
    return sum;
  }

  EMO_KERNEL void activate_hidden() {
    for (int r = thread_; r < args_.R; r += kBlockThreads) {
      write(hidden() + r, activate<float>(args_.act, all_parts(r, args_.reduce_bias)));
    }
  }

  EMO_KERNEL void store() {
    for (int m = thread_; m < args_.M; m += kBlockThreads) {
      const float gate = 1.0f / (1.0f + expf(-all_parts(m, args_.expand_bias)));
      write(args_.gate + n_ * args_.M + m, gate);
    }
  }

  const Args& args_;
  const int64_t n_;
  const int thread_;
  float* const means_;
};

}  // namespace emo_kernels::cuda
