// A block's program on the GPU, and its launch: on the call's device and stream, checked.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda/depthwise_dispatch.h"

namespace emo_kernels::cuda {

// Every thread runs its own program; steps are divided by barriers.
template <class Program>
struct EachThread {
  Program& program;

  template <class Step>
  __device__ __forceinline__ void operator()(const Step& step) const {
    step(program);
    __syncthreads();
  }
  template <class Step>
  __device__ __forceinline__ void then(const Step& step) const {
    step(program);
  }
  // A step that warps take together (mma.h), without a barrier.
  template <class Step>
  __device__ __forceinline__ void warps(const Step& step) const {
    step(program);
  }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
};

template <class Program>
__device__ __forceinline__ void run_block(const typename Program::Args& args) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Place place{blockIdx.x, static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y),
                    static_cast<int>(threadIdx.z)};
  Program program(args, place, shared);
  Program::run(args, place.block, EachThread<Program>{program});
}

template <class Partial>
__global__ void __launch_bounds__(SumPartials<Partial>::kColumns* SumPartials<Partial>::kSlots)
    sum_partials_kernel(const SumArgs<Partial> args) {
  run_block<SumPartials<Partial>>(args);
}

template <class Partial>
auto kernel_of(SumPartials<Partial>*) {
  return &sum_partials_kernel<Partial>;
}

inline void check(cudaError_t status, const std::string& kernel, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(kernel + ": " + what + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Makes a device current, and again the one that was.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* name) {
    check(cudaGetDevice(&previous_), name, "cudaGetDevice");
    if (previous_ == device) return;
    check(cudaSetDevice(device), name, "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Launches on a stream. kernel_of(Program*) is the kernel that runs a program.
struct StreamLauncher {
  cudaStream_t stream;

  template <class Program>
  void launch(const typename Program::Args& args, const Grid& grid, const std::string& name) {
    constexpr int kWithoutAsking = 48 * 1024;
    const auto kernel = kernel_of(static_cast<Program*>(nullptr));
    const auto shared = static_cast<int>(Program::shared_bytes(args));
    if (shared > kWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name,
            "asking for shared memory");
    }
    const dim3 block(grid.x, grid.y, grid.z);
    kernel<<<static_cast<unsigned>(grid.blocks), block, shared, stream>>>(args);
    check(cudaGetLastError(), name, "its launch");
  }
};

template <class Call>
void run_on_stream(const Call& call, const char* name) {
  const DeviceGuard guard(call.target.device, name);
  StreamLauncher launcher{static_cast<cudaStream_t>(call.target.stream)};
  dispatch(call, launcher);
}

}  // namespace emo_kernels::cuda
