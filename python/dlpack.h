// The part of the DLPack 1.x C interface (dmlc/dlpack, dlpack.h) through which torch shows a
// tensor's memory and takes a new one, without torch's headers.
#pragma once

#include <cstdint>

namespace emo_kernels::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

constexpr int32_t kCpu = 1;
constexpr char kCapsule[] = "dlpack_exchange_api";

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*export_tensor)(void* py_object, ManagedTensor** out);
  int (*import_tensor)(ManagedTensor* tensor, void** out_py_object);  // takes it over
  int (*look_at)(void* py_object, Tensor* out);  // null in a producer that cannot
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace emo_kernels::dlpack
