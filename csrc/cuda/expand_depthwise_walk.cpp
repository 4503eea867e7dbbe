// The walk of expand_depthwise.h on the host (walk.h), and the scratch its launch needs.
#include "cuda/expand_depthwise_dispatch.h"
#include "cuda/walk.h"

namespace emo_kernels::cuda {

template <class T>
void operands(Watch& watch, const ExpandDepthwiseArgs<T>& args) {
  const Geometry& g = args.g;
  watch.may_read(args.x, g.N * g.H * g.W * args.C * int64_t{sizeof(T)});
  watch.must_write(args.y, g.N * g.HO * g.WO * g.C * int64_t{sizeof(T)});
  watch.may_read(args.norm_weight, args.C);
  watch.may_read(args.norm_bias, args.C);
  watch.may_read(args.weight, int64_t{g.C} * args.C);
  watch.may_read(args.bias, g.C);
  watch.may_read(args.filters, int64_t{g.C} * g.K * g.K);
  watch.may_read(args.pivot, g.C);
  watch.must_write(args.partials, args.plan.programs * 2 * g.C * int64_t{sizeof(double)});
}

void walk_expand_depthwise(const ExpandDepthwiseCall& call) { walk(call); }

int64_t scratch_bytes(const ExpandDepthwiseCall& call) {
  NoLauncher nothing;
  return dispatch(call, nothing);
}

int64_t shared_bytes(const ExpandDepthwiseCall& call) { return make_plan(task_of(call)).bytes; }

}  // namespace emo_kernels::cuda
