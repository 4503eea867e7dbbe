#include <stdexcept>

#include "emo_kernels.h"

namespace emo_kernels::cpu {
void irmb(const IrmbCall&) { throw std::invalid_argument("irmb: not built yet"); }
}  // namespace emo_kernels::cpu
