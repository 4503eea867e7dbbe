// Gradients of parameters in the dtype of the parameter.
#pragma once

#include <cstdint>

#include "emo_kernels.h"

namespace emo_kernels::cpu {

struct ConvertCall {
  DType from_dtype = DType::kFloat64, dtype = DType::kFloat32;
  const void* from = nullptr;  // null: zeros
  void* to = nullptr;
  int64_t count = 0;
};

void convert(const ConvertCall& call);

}  // namespace emo_kernels::cpu
