// From a call of the whole block to the kernels that run it, as depthwise_dispatch.h.
#pragma once

#include "cuda/irmb_attention_dispatch.h"
#include "cuda/irmb_excite.h"
#include "cuda/irmb_image.h"
#include "cuda/irmb_sum.h"
#include "cuda/plan_cache.h"

namespace emo_kernels::cuda {

inline BlockShape block_shape(const IRMBCall& call) {
  const Geometry g = geometry(call, "irmb");
  if (call.M < 1 || call.O < 1 || call.M >= 1 << 24 || call.O >= 1 << 24) {
    throw std::invalid_argument("irmb: channels must be from 1 to 2^24");
  }
  BlockShape s;
  s.N = g.N, s.C = g.C, s.H = g.H, s.W = g.W, s.HO = g.HO, s.WO = g.WO;
  s.M = static_cast<int>(call.M), s.O = static_cast<int>(call.O);
  s.K = g.K, s.S = g.S, s.P = g.P, s.D = g.D;
  check_map_size(call.H, call.W);
  if (!call.expands && s.M != s.C) {
    throw std::invalid_argument("irmb: without an expansion M must be C");
  }
  if (call.skip && (s.S != 1 || s.HO != s.H || s.WO != s.W)) {
    throw std::invalid_argument("irmb: a skip needs maps of one size, at stride 1");
  }
  return s;
}

// Of the block behind its attention, if it has one, which gives `attended`.
template <class T>
BlockArgs<T> block_args(const IRMBCall& call, const BlockShape& s, const T* attended) {
  BlockArgs<T> args{};
  args.shape = s;
  args.residual = call.skip ? static_cast<const T*>(call.x) : nullptr;
  args.out = static_cast<T*>(call.out);
  args.norm = attended == nullptr ? call.norm : Norm::kNone;
  args.act = call.expands ? call.act : Activation::kNone, args.skip = call.skip;
  args.front = {call.norm_weight, call.norm_bias, call.norm_mean, call.norm_var, call.norm_eps};
  args.bn = {call.bn_weight, call.bn_bias, call.bn_mean, call.bn_var, call.bn_eps};
  const void* const pixels = attended == nullptr ? call.x : attended;
  args.pixels = matrix_of<T>({pixels, call.dtype}, int64_t{s.H} * s.W, s.C, kChunk);
  args.v = matrix_of<T>(call.v_weight, s.M, s.C, kChunk);
  args.proj = matrix_of<T>(call.proj_weight, s.O, s.M, kChunk);
  args.bias = call.v_bias, args.stencil = call.dw_weight, args.gamma = call.gamma;
  args.in_pairs = in_pairs<T>(s.O, {args.residual, call.out});
  return args;
}

// Calls use(K, S) with those that kernels are compiled for, as types; 0: any.
template <class Use>
auto with_filter(const BlockShape& s, const Use& use) {
  using std::integral_constant;
  constexpr integral_constant<int, 0> kAny;
  constexpr integral_constant<int, 1> kOne;
  constexpr integral_constant<int, 2> kTwo;
  constexpr integral_constant<int, 3> kThree;
  constexpr integral_constant<int, 5> kFive;
  if (s.D == 1 && s.K == 3 && s.S == 1) return use(kThree, kOne);
  if (s.D == 1 && s.K == 3 && s.S == 2) return use(kThree, kTwo);
  if (s.D == 1 && s.K == 5 && s.S == 1) return use(kFive, kOne);
  if (s.D == 1 && s.K == 5 && s.S == 2) return use(kFive, kTwo);
  return use(kAny, kAny);
}

// What a call's kernels are launched with; bytes of shared memory that are 0: it does not fit.
struct IRMBPlan {
  AttentionPlan attention;
  BlockPlan block;
  int64_t excite = 0;
  ImagePlan image;  // of the attention and the rest in one kernel
  double time_apart = 0.0;
  bool inside = false;  // whether that is used
};

// The kernel of the whole attention block is for such.
inline bool has_image_kernel(const IRMBCall& call, const BlockShape& s) {
  return call.head_dim != 0 && (s.K == 3 || s.K == 5) && s.S == 1 && s.D == 1 && call.R == 0 &&
         call.expands;
}

inline void plan_attention(IRMBPlan& plan, const IRMBCall& call, const BlockShape& s, int bytes) {
  const AttentionShape a = attention_shape(call);
  const auto limit = static_cast<int>(call.shared_limit);
  plan.attention = make_attention_plan(a, bytes, limit);
  const bool apart = plan.attention.shared != 0 && plan.block.shared != 0;
  if (apart) plan.time_apart = time_apart(plan.attention, a, plan.block, s, bytes, limit);
  if (has_image_kernel(call, s)) {
    const int strip = s.K == 3 ? kBlockStrip<3, 1> : kBlockStrip<5, 1>;
    plan.image = make_image_plan(s, a, strip, bytes, limit);
  }
  const bool fits = plan.image.block.shared != 0;
  const bool faster = !apart || plan.image.time <= plan.time_apart;
  plan.inside = fits && (call.attend == Attend::kBest ? faster : call.attend == Attend::kInside);
  if (call.attend == Attend::kInside && !fits) {
    throw std::invalid_argument("irmb: the attention does not fit into its block's kernel");
  }
}

inline IRMBPlan fastest_plan(const IRMBCall& call, const BlockShape& s) {
  const int bytes = call.dtype == DType::kFloat32 ? 4 : 2;
  const auto limit = static_cast<int>(call.shared_limit);
  IRMBPlan plan;
  const int pairs = call.R != 0 || !call.expands ? kFewPairs : kMostPairs;
  plan.block = with_filter(s, [&](auto k, auto step) {
    return make_block_plan(s, kBlockStrip<k(), step()>, bytes, limit, pairs);
  });
  if (call.head_dim != 0) plan_attention(plan, call, s, bytes);
  const int64_t excite = excite_bytes(call.M, call.R);
  if (call.R != 0 && excite <= limit) plan.excite = excite;
  return plan;
}

inline IRMBPlan make_irmb_plan(const IRMBCall& call) {
  const BlockShape s = block_shape(call);
  const std::array<int64_t, 18> key{call.dtype == DType::kFloat32,
                                    s.N,
                                    s.C,
                                    s.H,
                                    s.W,
                                    s.M,
                                    s.O,
                                    s.K,
                                    s.S,
                                    s.P,
                                    s.D,
                                    call.R,
                                    call.expands,
                                    call.head_dim,
                                    call.window_size,
                                    static_cast<int64_t>(call.windows),
                                    static_cast<int64_t>(call.attend),
                                    call.shared_limit};
  return remembered(key, [&] { return fastest_plan(call, s); });
}

inline void check_fits(const IRMBCall& call, const IRMBPlan& plan) {
  if (plan.inside) return;
  const char* const missing = call.head_dim != 0 && plan.attention.shared == 0
                                  ? "windows of this attention do not fit into "
                              : plan.block.shared == 0 ? "no tile of this block fits into "
                              : call.R != 0 && plan.excite == 0
                                  ? "the squeeze-excite of this block does not fit into "
                                  : nullptr;
  if (missing == nullptr) return;
  throw std::invalid_argument("irmb: " + (missing + std::to_string(call.shared_limit)) +
                              " bytes of shared memory");
}

// Parts of a call's scratch, one behind the other.
class Scratch {
 public:
  explicit Scratch(const IRMBCall& call) : begin_(static_cast<char*>(call.target.scratch)) {}

  template <class T>
  T* take(int64_t elements) {
    T* const part = reinterpret_cast<T*>(begin_ + bytes_);
    bytes_ += (elements * int64_t{sizeof(T)} + 255) / 256 * 256;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

// The gate of the block's squeeze-excite.
template <class T, class Launcher>
const float* launch_excite(BlockArgs<T> args, const IRMBCall& call, Scratch& scratch,
                           Launcher& launcher) {
  const BlockShape& s = args.shape;
  const int64_t tiles = args.plan.tiles();
  args.sums = scratch.take<float>(s.N * tiles * s.M);
  float* const gate = scratch.take<float>(s.N * s.M);
  with_filter(s, [&](auto k, auto step) {
    const Grid grid = block_grid(s.N * tiles * args.plan.splits);
    launcher.template launch<Block<T, k(), step(), 0>>(
        args, grid, kernel_name<T>("irmb_squeeze_kernel", s.K, s.S));
  });
  const ExciteArgs excite{args.sums,
                          gate,
                          call.se_reduce_weight,
                          call.se_reduce_bias,
                          call.se_expand_weight,
                          call.se_expand_bias,
                          s.N,
                          tiles,
                          s.M,
                          static_cast<int>(call.R),
                          static_cast<float>(int64_t{s.HO} * s.WO),
                          call.act};
  launcher.template launch<Excite>(excite, block_grid(s.N), "irmb_excite_kernel");
  return gate;
}

// Where a launch of that plan leaves partial sums, if it does.
template <class T>
void take_partials(BlockArgs<T>& args, Scratch& scratch) {
  const BlockShape& s = args.shape;
  if (args.plan.splits == 1) return;
  args.partials = scratch.take<float>(args.plan.splits * s.N * s.HO * s.WO * s.O);
}

template <class T, class Launcher>
void launch_sum(const BlockArgs<T>& args, Launcher& launcher) {
  const BlockShape& s = args.shape;
  if (args.plan.splits == 1) return;
  const Grid grid = block_grid(ceil_div(s.N * s.HO * s.WO * s.O, kBlockThreads));
  launcher.template launch<BlockSum<T>>(SumOfBlock<T>{args}, grid,
                                        kernel_name<T>("irmb_sum_kernel", s.K, s.S));
}

template <class T, class Launcher>
void launch_block(BlockArgs<T> args, Scratch& scratch, Launcher& launcher) {
  const BlockShape& s = args.shape;
  take_partials(args, scratch);
  const Grid grid = block_grid(s.N * args.plan.tiles() * args.plan.splits);
  with_filter(s, [&](auto k, auto step) {
    const std::string name = kernel_name<T>("irmb_kernel", s.K, s.S);
    if (args.plan.pairs <= kFewPairs) {
      launcher.template launch<Block<T, k(), step(), kFewPairs>>(args, grid, name);
    } else {
      launcher.template launch<Block<T, k(), step(), kMostPairs>>(args, grid, name);
    }
  });
  launch_sum(args, launcher);
}

template <class T, int K, class Launcher>
void launch_image_of(const ImageArgs<T>& args, Launcher& launcher) {
  const BlockPlan& plan = args.block.plan;
  Grid grid = block_grid(args.block.shape.N * plan.splits);
  grid.x = plan.warps * kLanes;
  const std::string name = kernel_name<T>("irmb_image_kernel", K, 1);
  if (plan.warps == kBlockWarps) {
    launcher.template launch<Image<T, K, kBlockWarps>>(args, grid, name);
  } else {
    launcher.template launch<Image<T, K, 2 * kBlockWarps>>(args, grid, name);
  }
}

template <class T, class Launcher>
void launch_image(ImageArgs<T> args, Scratch& scratch, Launcher& launcher) {
  take_partials(args.block, scratch);
  if (args.block.shape.K == 3) {
    launch_image_of<T, 3>(args, launcher);
  } else {
    launch_image_of<T, 5>(args, launcher);
  }
  launch_sum(args.block, launcher);
}

template <class T, class Launcher>
int64_t irmb_in(const IRMBCall& call, Launcher& launcher) {
  const BlockShape s = block_shape(call);
  const IRMBPlan plan = make_irmb_plan(call);
  check_fits(call, plan);
  Scratch scratch(call);
  AttentionArgs<T> attention{};
  if (call.head_dim != 0) attention = attention_args<T>(call, attention_shape(call));
  if (plan.inside) {
    ImageArgs<T> args{attention, block_args<T>(call, s, nullptr)};
    args.attention.plan = plan.image.attention, args.block.plan = plan.image.block;
    launch_image(args, scratch, launcher);
    return scratch.bytes();
  }
  if (call.head_dim != 0) {
    attention.out = scratch.take<T>(s.N * s.H * s.W * s.C);
    launch_attention(attention, plan.attention, launcher);
  }
  BlockArgs<T> args = block_args<T>(call, s, attention.out);
  args.plan = plan.block;
  if (call.R != 0) args.gate = launch_excite(args, call, scratch, launcher);
  launch_block(args, scratch, launcher);
  return scratch.bytes();
}

// Runs the call; returns the bytes of scratch that it uses.
template <class Launcher>
int64_t dispatch(const IRMBCall& call, Launcher& launcher) {
  switch (call.dtype) {
    case DType::kFloat32:
      return irmb_in<float>(call, launcher);
    case kFloat16:
      return irmb_in<Half>(call, launcher);
    case DType::kBFloat16:
      return irmb_in<BFloat16>(call, launcher);
    default:
      throw std::invalid_argument("irmb: maps must be fp32, fp16 or bf16");
  }
}

}  // namespace emo_kernels::cuda
