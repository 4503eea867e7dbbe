#include <cstdint>
#include <stdexcept>

#include "cpu/choose.h"
#include "cpu/irmb_plan.h"
#include "cpu/threads.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

const IrmbKernel& kernel_for(DType dtype) { EMO_CHOOSE(dtype, irmb_kernel, EMO_PAIRS(irmb_kernel)) }

struct Team {
  const IrmbPlan* plan;
  const IrmbKernel* kernel;
  char* shared;
  char* own;  // the first thread's buffer; the others follow
  int64_t own_bytes, offset_bytes;
};

void run_thread(void* context, int thread, int threads) {
  const Team& team = *static_cast<const Team*>(context);
  char* const own = team.own + thread * team.own_bytes;
  team.kernel->run(*team.plan, team.shared, own + team.offset_bytes,
                   reinterpret_cast<int64_t*>(own), thread, threads, team_barrier);
}

int64_t cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void irmb(const IrmbCall& call) {
  check_irmb(call);
  if (call.N == 0) return;
  const IrmbKernel& kernel = kernel_for(call.dtype);
  const IrmbPlan plan = plan_irmb(call, kernel);
  const int64_t shared_bytes = cache_lines(plan.shared_elements * plan.element);
  Team team{&plan, &kernel, nullptr, nullptr, 0, cache_lines(plan.thread_offsets * 8)};
  team.own_bytes = team.offset_bytes + cache_lines(plan.thread_elements * plan.element);
  team.shared = static_cast<char*>(thread_scratch(shared_bytes + plan.threads * team.own_bytes));
  team.own = team.shared + shared_bytes;
  run_team(plan.threads, run_thread, &team);
}

}  // namespace emo_kernels::cpu
