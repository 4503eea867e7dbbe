// The whole-block kernels' walk on the host (walk.h), and the memory their launches need.
#include "cuda/irmb_dispatch.h"
#include "cuda/walk.h"

namespace emo_kernels::cuda {

static int64_t output_size(const BlockShape& s) { return s.N * s.HO * s.WO * s.O; }

// What the end of a block reads and writes.
template <class T>
static void finishing_operands(Watch& watch, const BlockArgs<T>& args) {
  const int64_t bytes = output_size(args.shape) * int64_t{sizeof(T)};
  watch.may_read(args.gamma, args.shape.O);
  watch.may_read(args.residual, bytes);
  watch.must_write(args.out, bytes);
}

static void may_read(Watch& watch, const ChannelNorm& norm, int channels) {
  for (const Vector& vector : {norm.weight, norm.bias, norm.mean, norm.var}) {
    watch.may_read(vector, channels);
  }
}

// Arguments of the first of the two launches, where there are two.
template <class T>
void operands(Watch& watch, const BlockArgs<T>& args) {
  const BlockShape& s = args.shape;
  watch.may_read(args.pixels.values, s.N * s.H * s.W * s.C);
  may_read(watch, args.front, s.C);
  may_read(watch, args.bn, s.M);
  watch.may_read(args.v.values, int64_t{s.M} * s.C);
  watch.may_read(args.bias, s.M);
  watch.may_read(args.stencil, int64_t{s.M} * s.K * s.K);
  watch.may_read(args.proj.values, int64_t{s.O} * s.M);
  if (args.gate != nullptr) watch.may_read(args.gate, s.N * s.M * int64_t{sizeof(float)});
  const int64_t tiles = s.N * args.plan.tiles();
  if (args.sums != nullptr) {
    return watch.must_write(args.sums, tiles * s.M * int64_t{sizeof(float)});
  }
  if (args.partials == nullptr) return finishing_operands(watch, args);
  watch.must_write(args.partials, args.plan.splits * output_size(s) * int64_t{sizeof(float)});
}

template <class T>
void operands(Watch& watch, const ImageArgs<T>& args) {
  const AttentionShape& s = args.attention.shape;
  operands(watch, args.block);
  may_read(watch, args.attention.front, s.C);
  watch.may_read(args.attention.weight.values, int64_t{2} * s.C * s.C);
  watch.may_read(args.attention.bias, int64_t{2} * s.C);
}

template <class T>
void operands(Watch& watch, const SumOfBlock<T>& sum) {
  const int64_t size = output_size(sum.block.shape);
  watch.may_read(sum.block.partials, sum.block.plan.splits * size * int64_t{sizeof(float)});
  finishing_operands(watch, sum.block);
}

template <class T>
void operands(Watch& watch, const AttentionArgs<T>& args) {
  const AttentionShape& s = args.shape;
  const int64_t size = s.N * s.H * s.W * s.C;
  watch.may_read(args.pixels.values, size);
  may_read(watch, args.front, s.C);
  watch.may_read(args.weight.values, int64_t{2} * s.C * s.C);
  watch.may_read(args.bias, int64_t{2} * s.C);
  watch.must_write(args.out, size * int64_t{sizeof(T)});
}

static void operands(Watch& watch, const ExciteArgs& args) {
  const auto bytes = [&](int64_t count) { return count * int64_t{sizeof(float)}; };
  watch.may_read(args.sums, bytes(args.N * args.tiles * args.M));
  watch.may_read(args.reduce, int64_t{args.R} * args.M);
  watch.may_read(args.reduce_bias, args.R);
  watch.may_read(args.expand, int64_t{args.M} * args.R);
  watch.may_read(args.expand_bias, args.M);
  watch.must_write(args.gate, bytes(args.N * args.M));
}

void walk_irmb(const IRMBCall& call) { walk(call); }

int64_t scratch_bytes(const IRMBCall& call) {
  NoLauncher nothing;
  return dispatch(call, nothing);
}

// Names what would be launched.
struct Namer {
  std::vector<std::string>& names;

  template <class Program, class Args>
  void launch(const Args&, const Grid&, const std::string& name) {
    names.push_back(name);
  }
};

IRMBReport report(const IRMBCall& call) {
  const IRMBPlan plan = make_irmb_plan(call);
  IRMBReport found;
  found.block = plan.block.shared, found.attention = plan.attention.shared;
  found.excite = plan.excite, found.image = plan.image.block.shared;
  found.inside = plan.inside;
  found.time_inside = plan.image.time, found.time_apart = plan.time_apart;
  const bool fits = plan.block.shared != 0 && (call.head_dim == 0 || plan.attention.shared != 0) &&
                    (call.R == 0 || plan.excite != 0);
  if (!fits && !plan.inside) return found;
  Namer namer{found.kernels};
  dispatch(call, namer);
  return found;
}

}  // namespace emo_kernels::cuda
