// Host-side runtime API of the host model: errors, device properties, occupancy, memory, events and
// the launch. Launches run to their end inside the call; streams are accepted and ignored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "simt.h"
#include "simt/vector_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotPermitted = 800,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();     // and clears it
cudaError_t cudaPeekAtLastError();  // and keeps it

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  size_t sharedMemPerBlock;
  size_t sharedMemPerBlockOptin;
  size_t sharedMemPerMultiprocessor;
  size_t reservedSharedMemPerBlock;
  int regsPerBlock;
  int regsPerMultiprocessor;
  int warpSize;
  int maxThreadsPerBlock;
  int maxThreadsPerMultiProcessor;
  int maxBlocksPerMultiProcessor;
  int maxThreadsDim[3];
  int maxGridSize[3];
  int major;
  int minor;
  int multiProcessorCount;
  int l2CacheSize;
  int cooperativeLaunch;
  int clusterLaunch;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);

// Memory is the host's; a fresh allocation is filled with 0xFF bytes.
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
cudaError_t cudaMalloc(void** pointer, size_t bytes);
template <typename T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemset(void* pointer, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  size_t constSizeBytes;
  size_t localSizeBytes;
  int maxThreadsPerBlock;
  int numRegs;
  int ptxVersion;
  int binaryVersion;
  int maxDynamicSharedSizeBytes;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
  struct {
    unsigned int x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned int numAttrs = 0;
};

namespace simt::detail {

// A range of global memory that a launch may touch, as declared by a kernel argument.
struct BufferUse {
  const char* name;
  const void* pointer;
  size_t bytes;
  bool readable;    // holds values on entry
  bool must_write;  // every byte is written by the kernel
  bool persistent;  // may be read and written at will; what is not written keeps its value
};

struct LaunchRequest {
  const cudaLaunchConfig_t* config;
  const void* kernel;
  const char* signature;               // names the kernel if its symbol cannot be found
  void (*invoke)(const void* values);  // calls the kernel once, for the running thread
  const void* values;
  void (*collect)(LaunchRequest* request);  // fills in what follows
  std::vector<BufferUse> buffers;
  bool declares_buffers;
};

cudaError_t launch(LaunchRequest* request);

struct BufferCollector {
  std::vector<BufferUse>* buffers;
  void operator()(const char* name, const void* pointer, size_t bytes, bool readable,
                  bool must_write, bool persistent = false) const {
    buffers->push_back({name, pointer, bytes, readable, must_write, persistent});
  }
};

template <typename T, typename = void>
struct HasVisitBuffers : std::false_type {};
template <typename T>
struct HasVisitBuffers<T, std::void_t<decltype(std::declval<const T&>().visit_buffers(
                              std::declval<BufferCollector&>()))>> : std::true_type {};

template <typename T>
void collect_buffers(const T& argument, LaunchRequest* request) {
  if constexpr (HasVisitBuffers<T>::value) {
    request->declares_buffers = true;
    BufferCollector collector{&request->buffers};
    argument.visit_buffers(collector);
  }
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t function_attributes(const void* kernel, cudaFuncAttributes* attributes);
cudaError_t max_blocks_per_sm(const void* kernel, int threads, size_t shared_bytes, int* blocks);
cudaError_t max_clusters(const void* kernel, const cudaLaunchConfig_t& config, int* clusters);
cudaError_t max_cluster_size(const void* kernel, const cudaLaunchConfig_t& config, int* size);

}  // namespace simt::detail

// As in CUDA, with faults of the kernel thrown as simt::Fault.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  struct Values {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> arguments;
  } values{kernel, {std::forward<Args>(args)...}};
  simt::detail::LaunchRequest request{};
  request.config = config;
  request.kernel = reinterpret_cast<const void*>(kernel);
  request.signature = __PRETTY_FUNCTION__;
  request.values = &values;
  request.invoke = [](const void* opaque) {
    const auto& bound = *static_cast<const Values*>(opaque);
    std::apply(bound.kernel, bound.arguments);
  };
  request.collect = [](simt::detail::LaunchRequest* own) {
    std::apply([&](const auto&... each) { (simt::detail::collect_buffers(each, own), ...); },
               static_cast<const Values*>(own->values)->arguments);
  };
  return simt::detail::launch(&request);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return simt::detail::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute,
                                              value);
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return simt::detail::function_attributes(reinterpret_cast<const void*>(kernel), attributes);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads,
                                                          size_t shared_bytes) {
  return simt::detail::max_blocks_per_sm(reinterpret_cast<const void*>(kernel), threads,
                                         shared_bytes, blocks);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel,
                                           const cudaLaunchConfig_t* config) {
  return simt::detail::max_clusters(reinterpret_cast<const void*>(kernel), *config, clusters);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, Kernel* kernel,
                                                 const cudaLaunchConfig_t* config) {
  return simt::detail::max_cluster_size(reinterpret_cast<const void*>(kernel), *config, size);
}
