// Which instruction set runs: the best this machine has, or the one EMO_KERNELS_ISA names.
#pragma once

#include <string>
#include <vector>

namespace emo_kernels::cpu {

// kAvx512Bf16 adds dot products of bfloat16 to kAvx512: only kernels that use them are compiled for
// it, the others run as for kAvx512.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kAvx512Bf16 = 4 };

// EMO_KERNELS_ISA is read at every call (a getenv), so a process can run them all in turn.
Isa selected();

}  // namespace emo_kernels::cpu
