// What the CUDA runtime sees, asked for without creating a context on any device.
#include <cuda_runtime_api.h>

#include "emo_kernels.h"

namespace emo_kernels::cuda {

DeviceReport device_report() {
  DeviceReport report;
  report.compiled = true;
  cudaRuntimeGetVersion(&report.runtime_version);
  cudaDriverGetVersion(&report.driver_version);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    report.error = cudaGetErrorString(status);
    cudaGetLastError();
    return report;
  }
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
      report.error = cudaGetErrorString(cudaGetLastError());
      continue;
    }
    report.devices.push_back({properties.name, properties.major, properties.minor,
                              properties.multiProcessorCount,
                              static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return report;
}

}  // namespace emo_kernels::cuda
