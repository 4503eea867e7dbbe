// From a call of the whole block to the kernels that run it, as depthwise_dispatch.h.
#pragma once

#include "cuda/irmb_attention_dispatch.h"
#include "cuda/irmb_sum.h"

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
  if (call.skip && (s.S != 1 || s.HO != s.H || s.WO != s.W)) {
    throw std::invalid_argument("irmb: a skip needs maps of one size, at stride 1");
  }
  return s;
}

template <class T>
BlockArgs<T> block_args(const IRMBCall& call, const BlockShape& s) {
  BlockArgs<T> args{};
  args.shape = s;
  args.residual = static_cast<const T*>(call.residual);
  args.out = static_cast<T*>(call.out);
  args.norm = call.norm, args.act = call.act, args.skip = call.skip;
  args.front = {call.norm_weight, call.norm_bias, call.norm_mean, call.norm_var, call.norm_eps};
  args.bn = {call.bn_weight, call.bn_bias, call.bn_mean, call.bn_var, call.bn_eps};
  args.pixels = matrix_of<T>({call.x, call.dtype}, int64_t{s.H} * s.W, s.C, kChunk);
  args.v = matrix_of<T>(call.v_weight, s.M, s.C, kChunk);
  args.proj = matrix_of<T>(call.proj_weight, s.O, s.M, kChunk);
  args.bias = call.v_bias, args.stencil = call.dw_weight, args.gamma = call.gamma;
  args.in_pairs = in_pairs<T>(s.O, {call.residual, call.out});
  return args;
}

// Calls use(program) with the program for the call's filter and plan, null; nothing fits: false.
template <class T, int K, int S, class Use>
bool with_block(const IRMBCall& call, const BlockShape& s, const Use& use) {
  const BlockPlan plan =
      make_block_plan(s, kBlockStrip<K, S>, sizeof(T), static_cast<int>(call.shared_limit));
  if (plan.shared == 0) return false;
  if (plan.pairs <= 3) {
    use(static_cast<Block<T, K, S, 3>*>(nullptr), plan);
  } else {
    use(static_cast<Block<T, K, S, kMostPairs>*>(nullptr), plan);
  }
  return true;
}

template <class T, class Use>
bool with_block_in(const IRMBCall& call, const BlockShape& s, const Use& use) {
  if (s.D == 1 && s.K == 3 && s.S == 1) return with_block<T, 3, 1>(call, s, use);
  if (s.D == 1 && s.K == 3 && s.S == 2) return with_block<T, 3, 2>(call, s, use);
  if (s.D == 1 && s.K == 5 && s.S == 1) return with_block<T, 5, 1>(call, s, use);
  if (s.D == 1 && s.K == 5 && s.S == 2) return with_block<T, 5, 2>(call, s, use);
  return with_block<T, 0, 0>(call, s, use);
}

template <class T, class Launcher>
int64_t block_in(const IRMBCall& call, Launcher& launcher) {
  const BlockShape s = block_shape(call);
  int64_t scratch = 0;
  const bool fits = with_block_in<T>(call, s, [&](auto* program, const BlockPlan& plan) {
    using Program = std::remove_pointer_t<decltype(program)>;
    BlockArgs<T> args = block_args<T>(call, s);
    args.plan = plan;
    const int64_t size = s.N * s.HO * s.WO * s.O;
    if (plan.splits > 1) {
      args.partials = static_cast<float*>(call.target.scratch);
      scratch = plan.splits * size * int64_t{sizeof(float)};
    }
    const Grid grid = block_grid(s.N * plan.tiles() * plan.splits);
    launcher.template launch<Program>(args, grid, kernel_name<T>("irmb_kernel", s.K, s.S));
    if (plan.splits == 1) return;
    const Grid sum = block_grid(ceil_div(size, kBlockThreads));
    launcher.template launch<BlockSum<T>>(SumOfBlock<T>{args}, sum,
                                          kernel_name<T>("irmb_sum_kernel", s.K, s.S));
  });
  if (!fits) {
    throw std::invalid_argument("irmb: no tile of this block fits into " +
                                std::to_string(call.shared_limit) + " bytes of shared memory");
  }
  return scratch;
}

// Runs the call; returns the bytes of scratch that it uses.
template <class Launcher>
int64_t dispatch(const IRMBCall& call, Launcher& launcher) {
  switch (call.dtype) {
    case DType::kFloat32:
      return block_in<float>(call, launcher);
    case kFloat16:
      return block_in<Half>(call, launcher);
    case DType::kBFloat16:
      return block_in<BFloat16>(call, launcher);
    default:
      throw std::invalid_argument("irmb: maps must be fp32, fp16 or bf16");
  }
}

}  // namespace emo_kernels::cuda
