// What a launch accepts, what the described device reports, and that seeds change only the order.
#include <cstring>
#include <set>

#include "harness.h"

namespace simt_test {
namespace {

__global__ void empty_kernel() {}

// Puts the default device back.
struct DeviceGuard {
  ~DeviceGuard() { simt::set_device(simt::DeviceDescription()); }
};

cudaError_t launched(const Shape& shape) {
  const cudaError_t error = try_launch(shape, empty_kernel);
  EXPECT(cudaGetLastError() == error && cudaGetLastError() == cudaSuccess);
  return error;
}

SIMT_CASE(block_and_grid_limits) {
  EXPECT(launched({1, 1024}) == cudaSuccess);
  EXPECT(launched({1, 1025}) == cudaErrorInvalidConfiguration);
  EXPECT(launched({1, dim3(32, 33)}) == cudaErrorInvalidConfiguration);
  EXPECT(launched({1, dim3(1, 1, 65)}) == cudaErrorInvalidConfiguration);
  EXPECT(launched({0, 32}) == cudaErrorInvalidConfiguration);
  EXPECT(launched({1, 0}) == cudaErrorInvalidConfiguration);
  EXPECT(launched({dim3(1, 65535), 1}) == cudaSuccess);
  EXPECT(launched({dim3(1, 65536), 1}) == cudaErrorInvalidConfiguration);
}

__global__ void opt_in_kernel() {
  store_shared(dynamic_shared() + 100 * 1024 - 1, static_cast<unsigned char>(1));
}

SIMT_CASE(dynamic_shared_opt_in) {
  EXPECT(launched({1, 32, 48 * 1024}) == cudaSuccess);
  EXPECT(launched({1, 32, 48 * 1024 + 1}) == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(opt_in_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              100 * 1024 + 1) == cudaErrorInvalidValue);
  EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
  EXPECT(cudaFuncSetAttribute(opt_in_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              100 * 1024) == cudaSuccess);
  launch({1, 1, 100 * 1024}, opt_in_kernel);
  cudaFuncAttributes attributes;
  EXPECT(cudaFuncGetAttributes(&attributes, opt_in_kernel) == cudaSuccess);
  EXPECT(attributes.maxDynamicSharedSizeBytes == 100 * 1024);
}

Shape cooperative(unsigned int blocks, unsigned int threads, size_t shared_bytes = 0) {
  Shape shape{blocks, threads, shared_bytes};
  shape.cooperative = true;
  return shape;
}

SIMT_CASE(cooperative_grid_must_be_resident) {
  const DeviceGuard guard;
  int blocks = 0;
  EXPECT(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, empty_kernel, 512, 0) ==
         cudaSuccess);
  EXPECT(blocks == 4);
  EXPECT(launched(cooperative(16, 512)) == cudaSuccess);
  EXPECT(launched(cooperative(17, 512)) == cudaErrorCooperativeLaunchTooLarge);
  EXPECT(launched(cooperative(8, 32, 48 * 1024)) == cudaSuccess);
  EXPECT(launched(cooperative(9, 32, 48 * 1024)) == cudaErrorCooperativeLaunchTooLarge);
  simt::DeviceDescription device;
  device.registers_per_thread = 128;
  simt::set_device(device);
  EXPECT(launched(cooperative(4, 512)) == cudaSuccess);
  EXPECT(launched(cooperative(5, 512)) == cudaErrorCooperativeLaunchTooLarge);
  EXPECT(launched({1, 1024}) == cudaErrorLaunchOutOfResources);
  device.cooperative_launch = false;
  simt::set_device(device);
  EXPECT(launched(cooperative(1, 32)) == cudaErrorNotSupported);
}

SIMT_CASE(cluster_limits) {
  const DeviceGuard guard;
  Shape shape{16, 64};
  shape.cluster = 8;
  EXPECT(launched(shape) == cudaSuccess);
  shape.cluster = 16;
  EXPECT(launched(shape) == cudaErrorInvalidClusterSize);
  EXPECT(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
         cudaSuccess);
  EXPECT(launched(shape) == cudaSuccess);
  shape.cluster = 3;
  EXPECT(launched(shape) == cudaErrorInvalidConfiguration);
  cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
  simt::DeviceDescription device;
  device.cluster_launch = false;
  simt::set_device(device);
  shape.cluster = 2;
  EXPECT(launched(shape) == cudaErrorNotSupported);
}

int active_clusters(unsigned int size, size_t shared_bytes) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {size, 1, 1};
  cudaLaunchConfig_t config;
  config.gridDim = dim3(size);
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = -1;
  EXPECT(cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config) == cudaSuccess);
  return clusters;
}

// Of 132 SMs in GPCs of 16 and 18, a few are left over.
SIMT_CASE(clusters_of_a_device_in_parts) {
  const DeviceGuard guard;
  simt::DeviceDescription device;
  device.sm_count = 132;
  device.registers_per_thread = 128;  // two blocks an SM
  simt::set_device(device);
  EXPECT(active_clusters(8, 0) == 33 && active_clusters(2, 0) == 132);
  device.clusters_of_4 = 32;
  device.clusters_of_8 = 16;
  simt::set_device(device);
  EXPECT(active_clusters(8, 0) == 32 && active_clusters(4, 0) == 64);
  EXPECT(active_clusters(2, 0) == 132);
  device.registers_per_thread = 255;
  simt::set_device(device);
  EXPECT(active_clusters(8, 0) == 16);
}

SIMT_CASE(refused_launches) {
  struct Guard {
    ~Guard() { simt::refuse_launches(0, 0); }
  } guard;
  Shape cluster{8, 64};
  cluster.cluster = 2;
  EXPECT(simt::refuse_launches(cudaErrorCooperativeLaunchTooLarge, 0) == 0);
  EXPECT(launched(cooperative(4, 64)) == cudaErrorCooperativeLaunchTooLarge);
  EXPECT(launched(cluster) == cudaSuccess && launched({8, 64}) == cudaSuccess);
  EXPECT(simt::refuse_launches(0, cudaErrorLaunchOutOfResources) == 1);
  EXPECT(launched(cluster) == cudaErrorLaunchOutOfResources);
  EXPECT(launched(cooperative(4, 64)) == cudaSuccess && launched({8, 64}) == cudaSuccess);
  EXPECT(simt::refuse_launches(0, 0) == 1 && launched(cluster) == cudaSuccess);
}

SIMT_CASE(described_device_is_reported) {
  const DeviceGuard guard;
  simt::DeviceDescription device;
  device.name = "large";
  device.sm_count = 132;
  device.l2_bytes = 50 << 20;
  device.compute_major = 8;
  simt::set_device(device);
  cudaDeviceProp properties;
  EXPECT(cudaGetDeviceProperties(&properties, 0) == cudaSuccess);
  EXPECT(std::strcmp(properties.name, "large") == 0 && properties.multiProcessorCount == 132);
  int value = 0;
  EXPECT(cudaDeviceGetAttribute(&value, cudaDevAttrL2CacheSize, 0) == cudaSuccess);
  EXPECT(value == 50 << 20);
  cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0);
  EXPECT(value == 8);
}

__global__ void log_order_kernel(unsigned int* order, unsigned int* count) {
  order[(*count)++] = blockIdx.x * blockDim.x + threadIdx.x;
}

std::vector<unsigned int> order_of_seed(uint64_t seed) {
  simt::set_seed(seed);
  std::vector<unsigned int> order(256);
  unsigned int count = 0;
  launch({8, 32}, log_order_kernel, order.data(), &count);
  EXPECT(count == 256);
  return order;
}

SIMT_CASE(seeds_change_the_order) {
  const std::vector<unsigned int> first = order_of_seed(11);
  EXPECT(order_of_seed(11) == first && order_of_seed(12) != first);
  EXPECT(std::set<unsigned int>(first.begin(), first.end()).size() == 256);
  setenv("BATCHNORM_CUDA_EMULATE_SEED", "12", 1);
  const std::vector<unsigned int> overridden = order_of_seed(11);
  unsetenv("BATCHNORM_CUDA_EMULATE_SEED");
  EXPECT(overridden == order_of_seed(12));
}

__global__ void deep_kernel(Buffer<int> out, int depth) {
  volatile char frame[256];
  frame[0] = 1;
  if (depth > 0) deep_kernel(out, depth - 1);
  if (depth == 0) __syncthreads();
  if (frame[0] == 1 && depth == 0) store_global(out.data + threadIdx.x, 1);
}

SIMT_CASE(threads_have_room_on_their_stacks) {
  Memory<int> out(1024);
  launch({1, 1024}, deep_kernel, out.as(Use::kOutput), 100);
  EXPECT(out[1023] == 1);
}

SIMT_CASE(memory_and_events) {
  int* memory = nullptr;
  EXPECT(cudaMalloc(&memory, 64) == cudaSuccess && memory[0] == -1);
  EXPECT(cudaMemsetAsync(memory, 0, 64) == cudaSuccess && memory[15] == 0);
  const int value = 5;
  EXPECT(cudaMemcpyAsync(memory, &value, 4, cudaMemcpyHostToDevice) == cudaSuccess);
  EXPECT(memory[0] == 5 && cudaFree(memory) == cudaSuccess);
  cudaEvent_t start;
  cudaEvent_t end;
  EXPECT(cudaEventCreate(&start) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess);
  cudaEventRecord(start);
  cudaEventRecord(end);
  float milliseconds = -1;
  EXPECT(cudaEventElapsedTime(&milliseconds, start, end) == cudaSuccess && milliseconds >= 0);
  cudaEventDestroy(start);
  cudaEventDestroy(end);
}

}  // namespace
}  // namespace simt_test
