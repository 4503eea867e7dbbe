// Takes the place of the CUDA kernels in a build without nvcc.
#include <stdexcept>

#include "emo_kernels_cuda.h"

namespace emo_kernels::cuda {

DeviceReport device_report() { return DeviceReport{}; }

namespace {

[[noreturn]] void refuse(const char* name) {
  throw std::runtime_error(std::string(name) + ": this build has no CUDA kernels");
}

}  // namespace

void launch_depthwise_conv2d(const DepthwiseCall&) { refuse("depthwise_conv2d"); }
void launch_depthwise_conv2d_backward(const DepthwiseBackwardCall&) {
  refuse("depthwise_conv2d_backward");
}
void launch_irmb(const IRMBCall&) { refuse("irmb"); }

void launch_expand_depthwise(const ExpandDepthwiseCall&) { refuse("expand_depthwise"); }

}  // namespace emo_kernels::cuda
