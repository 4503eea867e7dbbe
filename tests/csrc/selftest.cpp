// Every kernel of csrc/cpu under every instruction set of this machine, without Python: in fp32
// against the portable one by the tolerance rule (twice its error and a unit roundoff), both
// measured against fp64. Prints what ran; exit status 1 on a mismatch.
//
// With EMO_KERNELS_ISA set it prints the one selected, or why it is refused (exit status 2).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "emo_kernels.h"

namespace {

using namespace emo_kernels;
using namespace emo_kernels::cpu;

using Results = std::vector<std::vector<double>>;

constexpr int64_t N = 2, C = 21, H = 9, W = 8, M = 70, O = 21, D = 7, kPixels = N * H * W;

// The operands and results of one call: random floats, the same in every type.
template <class T>
class Data {
 public:
  const T* random(int64_t count, double low = -1.0, double high = 1.0) {
    std::vector<T>& values = keep_.emplace_back(count);
    for (T& value : values) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      const double unit = static_cast<double>(state_ >> 40) / (1 << 24);
      value = static_cast<T>(static_cast<float>(low + (high - low) * unit));
    }
    return values.data();
  }
  Param param(int64_t count, double low = -1.0, double high = 1.0) {
    return {random(count, low, high), count};
  }
  T* result(int64_t count) {
    results_.emplace_back(count, T(NAN));
    return results_.back().data();
  }
  double* sums(int64_t count) {
    sums_.emplace_back(count, 0.0);
    return sums_.back().data();
  }
  Results taken() const {
    Results all;
    for (const auto& values : results_) all.emplace_back(values.begin(), values.end());
    all.insert(all.end(), sums_.begin(), sums_.end());
    return all;
  }
  static constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

 private:
  uint64_t state_ = 20230913;
  std::deque<std::vector<T>> keep_, results_;
  std::deque<std::vector<double>> sums_;
};

template <class T>
IrmbCall block(Data<T>& data, int64_t K, int64_t stride) {
  IrmbCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.C = C, c.H = H, c.W = W, c.M = M, c.O = O, c.K = K, c.stride = stride;
  c.padding = K / 2;
  c.skip = stride == 1;
  c.x = data.random(kPixels * C);
  c.norm_weight = data.param(C, 0.5, 1.5), c.norm_bias = data.param(C);
  c.v_weight = data.param(M * C, -0.3, 0.3), c.v_bias = data.param(M);
  c.dw_weight = data.param(M * K * K, -0.5, 0.5);
  c.bn_weight = data.param(M, 0.5, 1.5), c.bn_bias = data.param(M);
  c.bn_mean = data.param(M), c.bn_var = data.param(M, 0.5, 1.5);
  c.proj_weight = data.param(O * M, -0.2, 0.2);
  c.out = data.result(N * ((H - 1) / stride + 1) * ((W - 1) / stride + 1) * O);
  return c;
}

template <class T>
void convolutional(Data<T>& data, int threads) {
  IrmbCall c = block(data, 3, 1);
  c.norm = Norm::kAffine, c.act = Activation::kSilu;
  c.norm_mean = data.param(C), c.norm_var = data.param(C, 0.5, 1.5);
  c.gamma = data.param(O), c.threads = threads;
  irmb(c);
}

template <class T>
void strided(Data<T>& data, int threads) {
  IrmbCall c = block(data, 5, 2);
  c.norm = Norm::kLayer, c.act = Activation::kGelu, c.threads = threads;
  c.R = 5;
  c.se_reduce_weight = data.param(5 * M, -0.3, 0.3), c.se_reduce_bias = data.param(5);
  c.se_expand_weight = data.param(M * 5, -0.5, 0.5), c.se_expand_bias = data.param(M);
  irmb(c);
}

template <class T, bool kFirst>
void attending(Data<T>& data, int threads) {
  IrmbCall c = block(data, 3, 1);
  c.norm = Norm::kLayer, c.act = Activation::kGelu, c.threads = threads;
  c.head_dim = D, c.window_size = 5, c.attention_first = kFirst;
  c.M = kFirst ? M : 69;  // a multiple of the heads
  for (Param* p : {&c.v_bias, &c.bn_weight, &c.bn_bias, &c.bn_mean, &c.bn_var}) p->count = c.M;
  c.v_weight.count = c.M * C, c.dw_weight.count = c.M * 9, c.proj_weight.count = O * c.M;
  c.windows = kFirst ? Windows::kGrid : Windows::kBoth;
  c.qk_weight = data.param(2 * C * C, -0.4, 0.4), c.qk_bias = data.param(2 * C);
  irmb(c);
}

template <class T>
void expansion(Data<T>& data, int threads) {
  ExpandCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.pixels = H * W, c.C = C, c.M = M, c.threads = threads;
  c.norm = Norm::kLayer, c.act = Activation::kGelu;
  c.x = data.random(kPixels * C), c.weight = data.random(M * C), c.bias = data.random(M);
  c.norm_weight = data.random(C, 0.5, 1.5), c.norm_bias = data.random(C);
  c.out = data.result(kPixels * M);
  expand(c);
}

template <class T>
void expansion_backward(Data<T>& data, int threads) {
  ExpandBackwardCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.pixels = H * W, c.C = C, c.M = M, c.threads = threads;
  c.norm = Norm::kLayer, c.act = Activation::kSilu;
  c.grad = data.random(kPixels * M), c.x = data.random(kPixels * C);
  c.weight = data.random(M * C, -0.3, 0.3), c.bias = data.random(M);
  c.norm_weight = data.random(C, 0.5, 1.5), c.norm_bias = data.random(C);
  c.residual = data.random(kPixels * C);
  c.dx = data.result(kPixels * C), c.dweight = data.result(M * C);
  c.dbias = data.sums(M), c.sums = data.sums(2 * C);
  expand_backward(c);
}

template <class T>
void depthwise(Data<T>& data, int threads) {
  DepthwiseCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.C = M, c.H = H, c.W = W, c.K = 5, c.stride = 2, c.padding = 2, c.threads = threads;
  c.x = data.random(kPixels * M), c.weight = data.random(M * 25), c.pivot = data.random(M);
  c.y = data.result(N * 5 * 4 * M), c.sums = data.sums(2 * M);
  depthwise_conv2d(c);
}

template <class T>
void depthwise_backward(Data<T>& data, int threads) {
  DepthwiseBackwardCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.C = M, c.H = H, c.W = W, c.K = 3, c.padding = 1, c.threads = threads;
  c.grad = data.random(kPixels * M), c.x = data.random(kPixels * M);
  c.weight = data.random(M * 9), c.y = data.random(kPixels * M);
  c.coefficients = data.random(4 * M), c.local_grad = data.random(kPixels * M);
  c.dx = data.result(kPixels * M), c.dweight = data.result(M * 9);
  depthwise_conv2d_backward(c);
}

template <class T>
void projection(Data<T>& data, int threads) {
  ShrinkCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.pixels = H * W, c.M = M, c.O = O, c.threads = threads;
  c.y = data.random(kPixels * M), c.weight = data.random(O * M, -0.3, 0.3);
  c.scale = data.random(M), c.shift = data.random(M), c.local = data.random(kPixels * M);
  c.residual = data.random(kPixels * O), c.gate = data.random(N * M, 0.0);
  c.drop_scale = data.random(N), c.pivot = data.random(O);
  c.out = data.result(kPixels * O), c.sums = data.sums(2 * O);
  shrink(c);
}

template <class T>
void projection_backward(Data<T>& data, int threads) {
  ShrinkBackwardCall c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.pixels = H * W, c.M = M, c.O = O, c.threads = threads;
  c.grad = data.random(kPixels * O), c.y = data.random(kPixels * M);
  c.weight = data.random(O * M, -0.3, 0.3), c.scale = data.random(M), c.shift = data.random(M);
  c.local = data.random(kPixels * M), c.drop_scale = data.random(N);
  c.mean = data.random(M), c.invstd = data.random(M, 0.5, 1.5);
  c.dy = data.result(kPixels * M), c.dweight = data.result(O * M);
  c.dlocal = data.result(kPixels * M), c.sums = data.sums(2 * M), c.ddrop = data.sums(N);
  shrink_backward(c);
}

template <class T, class Call>
Call windows(Data<T>& data, int threads) {
  Call c;
  c.dtype = Data<T>::dtype;
  c.N = N, c.C = C, c.H = H, c.W = W, c.M = C, c.head_dim = D, c.window_size = 5;
  c.windows = Windows::kBoth, c.norm = Norm::kLayer, c.threads = threads;
  c.x = data.random(kPixels * C), c.qk_weight = data.random(2 * C * C, -0.4, 0.4);
  c.qk_bias = data.random(2 * C);
  c.norm_weight = data.random(C, 0.5, 1.5), c.norm_bias = data.random(C);
  return c;
}

template <class T>
void attention(Data<T>& data, int threads) {
  AttentionCall c = windows<T, AttentionCall>(data, threads);
  c.out = data.result(kPixels * C);
  window_attention(c);
}

template <class T>
void attention_backward(Data<T>& data, int threads) {
  AttentionBackwardCall c = windows<T, AttentionBackwardCall>(data, threads);
  c.grad = data.random(kPixels * C), c.residual = data.random(kPixels * C);
  c.dx = data.result(kPixels * C), c.dqk_weight = data.result(2 * C * C);
  c.dqk_bias = data.sums(C), c.sums = data.sums(2 * C);
  window_attention_backward(c);
}

template <class T, PixelsOp kOp>
void over_pixels(Data<T>& data, int threads) {
  PixelsCall c;
  c.dtype = Data<T>::dtype;
  c.op = kOp, c.N = N, c.pixels = H * W, c.C = M, c.threads = threads;
  c.x = data.random(kPixels * M), c.grad = data.random(kPixels * M);
  c.pivot = data.random(M), c.rows = data.random(4 * M);
  if (kOp == PixelsOp::kSqueeze) {
    c.means = data.result(N * M);
  } else {
    c.means = const_cast<T*>(data.random(N * M));
  }
  if (kOp == PixelsOp::kBatchNormBackward) c.residual = data.random(kPixels * M);
  const bool writes = kOp == PixelsOp::kBatchNormBackward || kOp == PixelsOp::kSqueezeBackward;
  if (writes) c.out = data.result(kPixels * M);
  if (kOp == PixelsOp::kSums || kOp == PixelsOp::kSqueezeBackward) c.sums = data.sums(2 * M);
  pixels(c);
}

struct Operator {
  const char* name;
  void (*single)(Data<float>&, int);
  void (*twice)(Data<double>&, int);
};

const Operator kOperators[] = {
    {"irmb, convolutional", convolutional<float>, convolutional<double>},
    {"irmb, strided, squeeze-excite", strided<float>, strided<double>},
    {"irmb, attention first", attending<float, true>, attending<double, true>},
    {"irmb, attention over values", attending<float, false>, attending<double, false>},
    {"expand", expansion<float>, expansion<double>},
    {"expand_backward", expansion_backward<float>, expansion_backward<double>},
    {"depthwise_conv2d", depthwise<float>, depthwise<double>},
    {"depthwise_conv2d_backward", depthwise_backward<float>, depthwise_backward<double>},
    {"shrink", projection<float>, projection<double>},
    {"shrink_backward", projection_backward<float>, projection_backward<double>},
    {"window_attention", attention<float>, attention<double>},
    {"window_attention_backward", attention_backward<float>, attention_backward<double>},
    {"pixels: sums", over_pixels<float, PixelsOp::kSums>, over_pixels<double, PixelsOp::kSums>},
    {"pixels: batch norm", over_pixels<float, PixelsOp::kBatchNormBackward>,
     over_pixels<double, PixelsOp::kBatchNormBackward>},
    {"pixels: squeeze", over_pixels<float, PixelsOp::kSqueeze>,
     over_pixels<double, PixelsOp::kSqueeze>},
    {"pixels: squeeze backward", over_pixels<float, PixelsOp::kSqueezeBackward>,
     over_pixels<double, PixelsOp::kSqueezeBackward>},
};

template <class T>
Results run(void (*call)(Data<T>&, int), const std::string& isa, int threads) {
  setenv("EMO_KERNELS_ISA", isa.c_str(), 1);
  Data<T> data;
  call(data, threads);
  return data.taken();
}

// |got - want| / |want|; infinite where something is NaN.
double error(const std::vector<double>& got, const std::vector<double>& want) {
  double off = 0.0, all = 0.0;
  for (size_t i = 0; i < want.size(); ++i) {
    off += (got[i] - want[i]) * (got[i] - want[i]);
    all += want[i] * want[i];
  }
  const double relative = std::sqrt(off / all);
  return std::isnan(relative) ? INFINITY : relative;
}

bool check(const Operator& op, const std::vector<std::string>& isas) {
  constexpr double kUnit = 1.0 / (1 << 24);
  const Results want = run(op.twice, "portable", 1), plain = run(op.single, "portable", 1);
  bool right = true;
  for (const std::string& isa : isas) {
    for (int threads = 1; threads <= 2; ++threads) {
      const Results got = run(op.single, isa, threads);
      double worst = 0.0, allowed = 0.0;
      bool good = true;
      for (size_t i = 0; i < want.size(); ++i) {
        const double found = error(got[i], want[i]), yardstick = error(plain[i], want[i]);
        good &= found <= 2 * yardstick + kUnit && yardstick <= 100 * kUnit;
        if (found >= worst) worst = found, allowed = 2 * yardstick + kUnit;
      }
      std::printf("%-4s %-8s %d thread(s) %-30s error %.2e, allowed %.2e\n", good ? "ok" : "BAD",
                  isa.c_str(), threads, op.name, worst, allowed);
      right &= good;
    }
  }
  return right;
}

}  // namespace

int main() {
  try {
    if (std::getenv("EMO_KERNELS_ISA") != nullptr) {
      std::printf("%s\n", selected_isa().c_str());
      return 0;
    }
    bool right = true;
    for (const Operator& op : kOperators) right &= check(op, available_isas());
    return right ? 0 : 1;
  } catch (const std::invalid_argument& refusal) {
    std::printf("%s\n", refusal.what());
    return 2;
  }
}
