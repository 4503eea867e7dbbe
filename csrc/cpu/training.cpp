// Entry points of the kernels but the whole block's: choose the instruction set, make room, run the
// team.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/choose.h"
#include "cpu/launch.h"
#include "cpu/threads.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

// kernel_for(call): the kernel of the call's type.
#define EMO_KERNEL_FOR(Call, name, pairs) \
  const Kernel<Call>& kernel_for(const Call& call) { EMO_CHOOSE(call.dtype, name, pairs) }

EMO_KERNEL_FOR(ConvNormActCall, conv_norm_act_kernel, )
EMO_KERNEL_FOR(ConvNormActBackwardCall, conv_norm_act_backward_kernel, )
EMO_KERNEL_FOR(NormPoolLinearCall, norm_pool_linear_kernel, )
EMO_KERNEL_FOR(PixelsCall, pixels_kernel, )
EMO_KERNEL_FOR(DepthwiseCall, depthwise_conv2d_kernel, )
EMO_KERNEL_FOR(DepthwiseBackwardCall, depthwise_conv2d_backward_kernel, )
EMO_KERNEL_FOR(ExpandCall, expand_kernel, EMO_PAIRS(expand_kernel))
EMO_KERNEL_FOR(ExpandBackwardCall, expand_backward_kernel, EMO_PAIRS(expand_backward_kernel))
EMO_KERNEL_FOR(ExpandDepthwiseCall, expand_depthwise_kernel, EMO_PAIRS(expand_depthwise_kernel))
EMO_KERNEL_FOR(ExpandDepthwiseBackwardCall, expand_depthwise_backward_kernel,
               EMO_PAIRS(expand_depthwise_backward_kernel))
EMO_KERNEL_FOR(ShrinkCall, shrink_kernel, EMO_PAIRS(shrink_kernel))
EMO_KERNEL_FOR(ShrinkBackwardCall, shrink_backward_kernel, EMO_PAIRS(shrink_backward_kernel))
EMO_KERNEL_FOR(AttentionCall, window_attention_kernel, )
EMO_KERNEL_FOR(AttentionBackwardCall, window_attention_backward_kernel, )

template <class Call>
struct Team {
  const Call* call;
  const Kernel<Call>* kernel;
  Share share;
};

template <class Call>
void run_thread(void* context, int thread, int threads) {
  const auto& team = *static_cast<const Team<Call>*>(context);
  Share share = team.share;
  share.thread = thread;
  share.threads = threads;
  team.kernel->run(*team.call, share);
}

int64_t cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Call>
void launch(const Call& call) {
  if (call.N == 0) return;
  const Kernel<Call>& kernel = kernel_for(call);
  const ScratchBytes bytes = kernel.scratch(call);
  // A page between the threads' buffers: no two share a line, and ends may be read past.
  const int64_t shared = cache_lines(bytes.shared) + 4096, own = cache_lines(bytes.own) + 4096;
  char* const data = static_cast<char*>(thread_scratch(shared + call.threads * own));
  Team<Call> team{&call, &kernel, {data, data + shared, own, 0, 1}};
  run_team(call.threads, run_thread<Call>, &team);
}

void check(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

template <class Call>
void check_convolution(const Call& c, const char* what) {
  check(c.K >= 1 && c.K <= kMostTaps && c.stride >= 1 && c.dilation >= 1 && c.padding >= 0 &&
            c.H + 2 * c.padding >= c.dilation * (c.K - 1) + 1 &&
            c.W + 2 * c.padding >= c.dilation * (c.K - 1) + 1 && c.C >= 1 && c.threads >= 1,
        what);
}

}  // namespace

void conv_norm_act(const ConvNormActCall& c) {
  check_convolution(c, "conv_norm_act: sizes");
  check(c.O >= 1 && c.act >= Activation::kNone && c.act <= Activation::kSilu,
        "conv_norm_act: sizes");
  check(c.x && c.out && c.weight.data && !c.norm_mean.data == !c.norm_var.data,
        "conv_norm_act: a null pointer");
  check(!c.sums || c.act == Activation::kNone, "conv_norm_act: sums behind an activation");
  launch(c);
}

void conv_norm_act_backward(const ConvNormActBackwardCall& c) {
  check_convolution(c, "conv_norm_act_backward: sizes");
  check(c.O >= 1 && c.act >= Activation::kNone && c.act <= Activation::kSilu,
        "conv_norm_act_backward: sizes");
  check(c.grad && c.y && c.norm && c.coefficients && (c.x || !c.dweight) && (c.weight || !c.dx),
        "conv_norm_act_backward: a null pointer");
  launch(c);
}

void norm_pool_linear(const NormPoolLinearCall& c) {
  check(c.C >= 1 && c.H >= 1 && c.W >= 1 && c.O >= 1 && c.threads >= 1, "norm_pool_linear: sizes");
  check(c.x && c.out && c.weight, "norm_pool_linear: a null pointer");
  launch(c);
}

void pixels(const PixelsCall& call) {
  check(call.C >= 1 && call.pixels >= 1 && call.threads >= 1, "pixels: sizes");
  launch(call);
}

void depthwise_conv2d(const DepthwiseCall& call) {
  check_convolution(call, "depthwise_conv2d: sizes");
  check(call.x && call.weight && call.y, "depthwise_conv2d: a null pointer");
  launch(call);
}

void depthwise_conv2d_backward(const DepthwiseBackwardCall& call) {
  check_convolution(call, "depthwise_conv2d_backward: sizes");
  check(call.grad && call.weight && (call.x || !call.dweight) && (call.y || !call.coefficients),
        "depthwise_conv2d_backward: a null pointer");
  launch(call);
}

void expand(const ExpandCall& call) {
  check(call.x && call.weight && call.out, "expand: a null pointer");
  check(call.C >= 1 && call.M >= 1 && call.pixels >= 1 && call.threads >= 1, "expand: sizes");
  launch(call);
}

void expand_backward(const ExpandBackwardCall& call) {
  check(call.x && call.weight && call.grad, "expand_backward: a null pointer");
  check(call.C >= 1 && call.M >= 1 && call.pixels >= 1 && call.threads >= 1,
        "expand_backward: sizes");
  launch(call);
}

void expand_depthwise(const ExpandDepthwiseCall& call) {
  const ExpandCall& e = call.expand;
  const DepthwiseCall& d = call.depthwise;
  check_convolution(d, "expand_depthwise: sizes");
  check(e.C >= 1 && e.M == d.C && d.N == call.N, "expand_depthwise: sizes");
  check(e.x && e.weight && d.weight && d.y, "expand_depthwise: a null pointer");
  launch(call);
}

void expand_depthwise_backward(const ExpandDepthwiseBackwardCall& call) {
  const ExpandBackwardCall& e = call.expand;
  const DepthwiseBackwardCall& d = call.depthwise;
  check_convolution(d, "expand_depthwise_backward: sizes");
  check(e.C >= 1 && e.M == d.C && e.pixels == d.H * d.W && e.N == call.N && d.N == call.N,
        "expand_depthwise_backward: sizes");
  check(e.x && e.weight && d.grad && d.weight && !d.y == !d.coefficients && !e.slope == !d.x,
        "expand_depthwise_backward: a null pointer");
  launch(call);
}

void shrink(const ShrinkCall& call) {
  check(call.y && call.weight && call.out, "shrink: a null pointer");
  check(call.M >= 1 && call.O >= 1 && call.pixels >= 1 && call.threads >= 1, "shrink: sizes");
  launch(call);
}

void shrink_backward(const ShrinkBackwardCall& call) {
  check(call.y && call.weight && call.grad, "shrink_backward: a null pointer");
  check(call.M >= 1 && call.O >= 1 && call.pixels >= 1 && call.threads >= 1,
        "shrink_backward: sizes");
  launch(call);
}

void window_attention(const AttentionCall& call) {
  check(call.x && call.out, "window_attention: a null pointer");
  check(call.head_dim >= 1 && call.C % call.head_dim == 0 && call.threads >= 1,
        "window_attention: sizes");
  check(call.qk == nullptr || call.qk_weight, "window_attention: q and k are x");
  launch(call);
}

void window_attention_backward(const AttentionBackwardCall& call) {
  check(call.x && call.grad, "window_attention_backward: a null pointer");
  check(call.head_dim >= 1 && call.C % call.head_dim == 0 && call.threads >= 1,
        "window_attention_backward: sizes");
  check(call.qk == nullptr || call.qk_weight, "window_attention_backward: q and k are x");
  launch(call);
}

}  // namespace emo_kernels::cpu
