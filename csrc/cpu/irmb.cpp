#include <cstdint>
#include <stdexcept>

#include "cpu/irmb_plan.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

const IrmbKernel& bf16_kernel() {
  switch (selected()) {
#ifdef EMO_HAS_AVX512BF16
    case Isa::kAvx512Bf16:
      return irmb_kernel_avx512bf16_bf16();
#endif
#ifdef EMO_HAS_AVX512
    case Isa::kAvx512:
      return irmb_kernel_avx512_bf16();
#endif
#ifdef EMO_HAS_AVX2
    case Isa::kAvx2:
      return irmb_kernel_avx2_bf16();
#endif
#ifdef EMO_HAS_NEON
    case Isa::kNeon:
      return irmb_kernel_neon_bf16();
#endif
    default:
      return irmb_kernel_portable_bf16();
  }
}

const IrmbKernel& kernel_for(DType dtype) {
  const Isa isa = selected();
  if (dtype == DType::kFloat64) return irmb_kernel_portable_f64();
  if (dtype == DType::kBFloat16) return bf16_kernel();
  switch (isa) {
#ifdef EMO_HAS_AVX512
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return irmb_kernel_avx512_f32();
#endif
#ifdef EMO_HAS_AVX2
    case Isa::kAvx2:
      return irmb_kernel_avx2_f32();
#endif
#ifdef EMO_HAS_NEON
    case Isa::kNeon:
      return irmb_kernel_neon_f32();
#endif
    default:
      return irmb_kernel_portable_f32();
  }
}

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
