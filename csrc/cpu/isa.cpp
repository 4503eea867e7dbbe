#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

struct Row {
  const char* name;
  Isa isa;
};

// Best last.
constexpr Row kTable[] = {
    {"portable", Isa::kPortable},
#ifdef EMO_HAS_NEON
    {"neon", Isa::kNeon},
#endif
#ifdef EMO_HAS_AVX2
    {"avx2", Isa::kAvx2},
#endif
#ifdef EMO_HAS_AVX512
    {"avx512", Isa::kAvx512},
#endif
#ifdef EMO_HAS_AVX512BF16
    {"avx512bf16", Isa::kAvx512Bf16},
#endif
};

bool machine_has(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("fma");
    case Isa::kAvx512Bf16:
      return machine_has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#endif
    default:
      return true;  // portable and NEON: the baseline of their architecture
  }
}

const Row& best() {
  static const Row* const row = [] {
    const Row* last = &kTable[0];
    for (const Row& candidate : kTable) {
      if (machine_has(candidate.isa)) last = &candidate;
    }
    return last;
  }();
  return *row;
}

const Row& selected_row() {
  const char* const wanted = std::getenv("EMO_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  for (const Row& row : kTable) {
    if (wanted == std::string(row.name) && machine_has(row.isa)) return row;
  }
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  throw std::invalid_argument("EMO_KERNELS_ISA must be one of " + names +
                              " on this machine, got '" + std::string(wanted).substr(0, 64) + "'");
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Row& row : kTable) names.push_back(row.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Row& row : kTable) {
    if (machine_has(row.isa)) names.push_back(row.name);
  }
  return names;
}

std::string selected_isa() { return selected_row().name; }

Isa selected() { return selected_row().isa; }

}  // namespace emo_kernels::cpu
