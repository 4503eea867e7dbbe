// The depthwise kernels' walk on the host (walk.h), and the scratch their launches need.
#include "cuda/depthwise_dispatch.h"
#include "cuda/walk.h"

namespace emo_kernels::cuda {

static int64_t pixels_in(const Geometry& g) { return g.N * g.H * g.W * g.C; }
static int64_t pixels_out(const Geometry& g) { return g.N * g.HO * g.WO * g.C; }

template <class T>
void operands(Watch& watch, const ForwardArgs<T>& args) {
  const Geometry& g = args.g;
  watch.may_read(args.x, pixels_in(g) * int64_t{sizeof(T)});
  watch.must_write(args.y, pixels_out(g) * int64_t{sizeof(T)});
  watch.may_read(args.weight, int64_t{g.C} * g.K * g.K);
  watch.may_read(args.pivot, g.C);
  watch.must_write(args.partials, args.plan.programs * 2 * g.C * int64_t{sizeof(double)});
}

template <class T>
void operands(Watch& watch, const BackwardArgs<T>& args) {
  const Geometry& g = args.g;
  const int64_t in = pixels_in(g) * int64_t{sizeof(T)}, out = pixels_out(g) * int64_t{sizeof(T)};
  const bool input = args.first_role == kInputGradient, filters = args.partials != nullptr;
  watch.may_read(args.grad, out);
  watch.may_read(args.y, out);
  watch.may_read(args.coefficients, 4 * g.C);
  if (filters) watch.may_read(args.x, in);
  watch.must_write(args.partials, args.plan.programs * g.K * g.K * g.C * int64_t{sizeof(float)});
  if (!input) return;
  watch.may_read(args.weight, int64_t{g.C} * g.K * g.K);
  watch.may_read(args.local_grad, in);
  watch.must_write(args.dx, in);
}

void walk_depthwise_conv2d(const DepthwiseCall& call) { walk(call); }
void walk_depthwise_conv2d_backward(const DepthwiseBackwardCall& call) { walk(call); }

int64_t scratch_bytes(const DepthwiseCall& call) {
  NoLauncher nothing;
  return dispatch(call, nothing);
}

int64_t scratch_bytes(const DepthwiseBackwardCall& call) {
  NoLauncher nothing;
  return dispatch(call, nothing);
}

}  // namespace emo_kernels::cuda
