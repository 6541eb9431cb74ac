// The one header of csrc that knows there is a host build (tests/simt): memory access, shared
// memory and launch, in the form in which both nvcc and the CPU model of CUDA can execute them.
//
// Kernels never dereference a pointer to global or shared memory. They call load_global,
// store_global, load_shared and store_shared, so that the host build can check bounds and
// initialisation, log races and count memory sectors, and nvcc sees a plain access.
// The host build's <cuda_runtime.h> supplies everything else under CUDA's own names.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef BATCHNORM_CUDA_HOST_MODEL
#include <cooperative_groups.h>

#include <cstring>

#include "simt.h"
#define BATCHNORM_CUDA_HAS_CLUSTERS 1
#else
#include <cuda_pipeline_primitives.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define BATCHNORM_CUDA_HAS_CLUSTERS 1
#endif
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

// Marks a place that the lanes of a warp reach together, although not each may then access global
// memory from this `site`. The host build counts sectors by it; it is nothing on a GPU.
__device__ __forceinline__ void mark_step([[maybe_unused]] Site site) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_step(site);
#endif
}

// Hide from the compiler that a value stays what it was: results computed from it are then not kept
// in registers for later, but computed again. They cost no instruction.
__device__ __forceinline__ void forget_derived(uint4& bits) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  (void)bits;
#else
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
#endif
}
__device__ __forceinline__ void forget_derived(int32_t& value) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  (void)value;
#else
  asm volatile("" : "+r"(value));
#endif
}
__device__ __forceinline__ void forget_derived(int64_t& value) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  (void)value;
#else
  asm volatile("" : "+l"(value));
#endif
}

__device__ __forceinline__ int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// 1/count to within 1 ulp, for a positive count: one instruction, where the exact division is a
// call whose registers have to be made room for, and __fdividef looks for subnormal numbers.
__device__ __forceinline__ float reciprocal(float count) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  return 1.0f / count;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(count));
  return result;
#endif
}
// Two Newton steps take the 22 good bits of the float reciprocal to 88, past double's 53.
__device__ __forceinline__ double reciprocal(double count) {
  double estimate = static_cast<double>(reciprocal(static_cast<float>(count)));
  estimate = fma(estimate, fma(-count, estimate, 1.0), estimate);
  return fma(estimate, fma(-count, estimate, 1.0), estimate);
}

// Starts a copy of 16 bytes from global to shared memory that does not pass through registers
// (cp.async from 8.0 on). Only this thread may read it, after wait_for_copies().
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global,
                                           Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_global_access(global, sizeof(uint4), simt::Access::kRead, site);
  simt::on_shared_access(shared, sizeof(uint4), simt::Access::kWrite, site);
  *shared = *global;
#else
  __pipeline_memcpy_async(shared, global, sizeof(uint4));
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#ifndef BATCHNORM_CUDA_HOST_MODEL
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// The atomic accesses and the cluster's operations below are of the PTX ISA: <cuda/atomic> and
// <cooperative_groups.h> make the same instructions, and take a second of every compilation.

// Publishes `value`: what this thread wrote before, and what it saw written by way of a barrier,
// is visible to a thread of the device that reads the value by load_acquire.
__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value,
                                              Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_atomic_access(address, sizeof(value), simt::Access::kWrite, simt::Order::kRelease, site);
  *address = value;
#else
  static_cast<void>(site);
  asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
#endif
}

__device__ __forceinline__ uint64_t load_acquire(uint64_t* address, Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_atomic_access(address, sizeof(*address), simt::Access::kRead, simt::Order::kAcquire,
                         site);
  return *address;
#else
  static_cast<void>(site);
  uint64_t value;
  asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
#endif
}

// Adds and returns the old value; both publishes and observes.
__device__ __forceinline__ uint64_t fetch_add(uint64_t* address, uint64_t value,
                                              Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_atomic_access(address, sizeof(value), simt::Access::kUpdate,
                         simt::Order::kAcquireRelease, site);
  const uint64_t old = *address;
  *address = old + value;
  return old;
#else
  static_cast<void>(site);
  uint64_t old;
  asm volatile("atom.add.acq_rel.gpu.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(address), "l"(value)
               : "memory");
  return old;
#endif
}

// Adds and returns the old value; orders no other access.
__device__ __forceinline__ int64_t fetch_add_relaxed(int64_t* address, int64_t value,
                                                     Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_atomic_access(address, sizeof(value), simt::Access::kUpdate, simt::Order::kRelaxed,
                         site);
  const int64_t old = *address;
  *address = old + value;
  return old;
#else
  static_cast<void>(site);
  int64_t old;
  asm volatile("atom.add.relaxed.gpu.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(address), "l"(value)
               : "memory");
  return old;
#endif
}

// Sets bits of a word; orders no other access.
__device__ __forceinline__ void or_relaxed(uint32_t* address, uint32_t bits,
                                           Site site = Site::current()) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  simt::on_atomic_access(address, sizeof(uint32_t), simt::Access::kUpdate, simt::Order::kRelaxed,
                         site);
  *address |= bits;
#else
  (void)site;
  atomicOr(address, bits);
#endif
}

// The same shared-memory object in block `rank` of the cluster.
template <typename T>
__device__ __forceinline__ T* cluster_shared(T* address, int rank) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  return cooperative_groups::this_cluster().map_shared_rank(address, rank);
#elif defined(BATCHNORM_CUDA_HAS_CLUSTERS)
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(address), "r"(rank));
  return there;
#else
  return address;  // the plan never chooses clusters here
#endif
}

// Barrier over the threads of all blocks of the cluster; orders their shared-memory accesses.
__device__ __forceinline__ void cluster_barrier() {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  cooperative_groups::this_cluster().sync();
#elif defined(BATCHNORM_CUDA_HAS_CLUSTERS)
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
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
