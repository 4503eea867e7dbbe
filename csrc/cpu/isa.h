// Which instruction set runs: the best this machine has, or the one EMO_KERNELS_ISA names.
#pragma once

#include <string>
#include <vector>

namespace emo_kernels::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };

// EMO_KERNELS_ISA is read at every call (a getenv), so a process can run them all in turn.
Isa selected();

}  // namespace emo_kernels::cpu
