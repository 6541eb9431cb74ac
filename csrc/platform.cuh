// The one header of csrc that knows there is a host build (tests/simt): memory access, shared
// memory and launch, in the form in which both nvcc and the CPU model of CUDA can execute them.
//
// Kernels never dereference a pointer to global or shared memory. They call load_global,
// store_global, load_shared and store_shared, so that the host build can check bounds and
// initialisation, log races and count memory sectors, and nvcc sees a plain access.
// The host build's <cuda_runtime.h> supplies everything else under CUDA's own names.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef BATCHNORM_CUDA_HOST_MODEL
#include "simt.h"
#endif

namespace batchnorm_cuda {

#ifdef BATCHNORM_CUDA_HOST_MODEL
using Site = simt::Site;  // {file, line} of the call, filled in by a default argument
#else
// Source position of an access; carries nothing on the GPU and is optimised away.
struct Site {
  __host__ __device__ static constexpr Site current() { return {}; }
};
#endif

// Reads sizeof(T) bytes (1, 2, 4, 8 or 16, naturally aligned) of global memory.
template <typename T>
__device__ __forceinline__ T load_global(const T* address, Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_global_access(address, sizeof(T), simt::Access::kRead, site);
#endif
  return *address;
}

template <typename T>
__device__ __forceinline__ void store_global(T* address, const T& value,
                                             Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_global_access(address, sizeof(T), simt::Access::kWrite, site);
#endif
  *address = value;
}

template <typename T>
__device__ __forceinline__ T load_shared(const T* address, Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_shared_access(address, sizeof(T), simt::Access::kRead, site);
#endif
  return *address;
}

template <typename T>
__device__ __forceinline__ void store_shared(T* address, const T& value,
                                             Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_shared_access(address, sizeof(T), simt::Access::kWrite, site);
#endif
  *address = value;
}

// The block's one statically sized shared-memory object of type T, uninitialised. Every thread of
// the block gets the same object; two calls with the same T in one kernel name the same memory.
template <typename T>
__device__ __forceinline__ T& static_shared() {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  static const char key = 0;
  return *static_cast<T*>(simt::static_shared(&key, sizeof(T), alignof(T)));
#else
  __shared__ alignas(alignof(T)) unsigned char storage[sizeof(T)];
  return *reinterpret_cast<T*>(storage);
#endif
}

// The block's dynamically sized shared memory (LaunchShape::shared_bytes), 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  return static_cast<unsigned char*>(simt::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char dynamic_shared_storage[];
  return dynamic_shared_storage;
#endif
}

}  // namespace batchnorm_cuda
