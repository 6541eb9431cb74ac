// The described device: its properties, launch limits and occupancy.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "engine.h"

namespace simt {
namespace detail {
namespace {

DeviceDescription described;
std::atomic<int64_t> description{1};

struct FunctionSettings {
  int max_dynamic_shared = -1;  // -1: what every kernel may use without asking
  bool non_portable_cluster = false;
};

std::mutex settings_mutex;
std::unordered_map<const void*, FunctionSettings> all_settings;

FunctionSettings settings_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  FunctionSettings settings = all_settings[kernel];
  if (settings.max_dynamic_shared < 0) settings.max_dynamic_shared = described.shared_per_block;
  return settings;
}

size_t volume(const dim3& dims) { return static_cast<size_t>(dims.x) * dims.y * dims.z; }

bool block_fits(const dim3& block) {
  return volume(block) >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         volume(block) <= static_cast<size_t>(described.max_threads_per_block);
}

bool grid_fits(const dim3& grid) {
  return volume(grid) >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
}

struct Attributes {
  dim3 cluster;
  bool has_cluster = false;
  bool cooperative = false;
};

Attributes attributes_of(const cudaLaunchConfig_t& config) {
  Attributes attributes;
  for (unsigned int i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      attributes.cooperative = attribute.val.cooperative != 0;
    }
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& dims = attribute.val.clusterDim;
      attributes.cluster = dim3(dims.x, dims.y, dims.z);
      attributes.has_cluster = true;
    }
  }
  return attributes;
}

// What simt::refuse_launches asked for.
std::atomic<int> cooperative_refusal{0}, cluster_refusal{0}, refusals{0};

cudaError_t refusal(const Attributes& attributes) {
  int error = 0;
  if (attributes.has_cluster) error = cluster_refusal;
  if (attributes.cooperative) error = cooperative_refusal;
  if (error != 0) ++refusals;
  return static_cast<cudaError_t>(error);
}

cudaError_t check_cluster(const void* kernel, const dim3& grid, const dim3& cluster) {
  if (!described.cluster_launch) return cudaErrorNotSupported;
  const size_t size = volume(cluster);
  if (size == 0) return cudaErrorInvalidConfiguration;
  const int limit = settings_of(kernel).non_portable_cluster
                        ? described.max_cluster_size
                        : std::min(8, described.max_cluster_size);
  if (size > static_cast<size_t>(limit)) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

// Clusters of `size` blocks of which an SM holds so many. A device of several GPCs may hold fewer
// than its SMs would make.
int resident_clusters(int size, int blocks) {
  const int by_sms = blocks * described.sm_count / size;
  const int alone = size > 4   ? described.clusters_of_8
                    : size > 2 ? described.clusters_of_4
                               : described.clusters_of_2;
  return alone == 0 ? by_sms : std::min(by_sms, blocks * alone);
}

int blocks_per_sm(int threads, size_t shared_bytes) {
  const int warps = (threads + 31) / 32;
  // Registers are given out by warp, in units of 256.
  const int warp_registers = (described.registers_per_thread * 32 + 255) / 256 * 256;
  const size_t shared = shared_bytes + static_cast<size_t>(described.shared_reserved_per_block);
  return std::min({described.max_blocks_per_sm, described.max_threads_per_sm / (warps * 32),
                   described.registers_per_sm / (warp_registers * warps),
                   static_cast<int>(static_cast<size_t>(described.shared_per_sm) / shared)});
}

}  // namespace

size_t resident_blocks(const LaunchRequest& request) {
  const cudaLaunchConfig_t& config = *request.config;
  const int blocks =
      blocks_per_sm(static_cast<int>(volume(config.blockDim)), config.dynamicSmemBytes);
  return static_cast<size_t>(std::max(blocks, 1)) * static_cast<size_t>(described.sm_count);
}

bool is_dependent(const cudaLaunchConfig_t& config) {
  for (unsigned int i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
        attribute.val.programmaticStreamSerializationAllowed != 0) {
      return true;
    }
  }
  return false;
}

cudaError_t check_launch(const LaunchRequest& request, dim3* cluster, bool* cooperative) {
  const cudaLaunchConfig_t& config = *request.config;
  const Attributes attributes = attributes_of(config);
  *cluster = attributes.cluster;
  *cooperative = attributes.cooperative;
  if (!block_fits(config.blockDim) || !grid_fits(config.gridDim)) {
    return cudaErrorInvalidConfiguration;
  }
  const int max_shared = settings_of(request.kernel).max_dynamic_shared;
  if (config.dynamicSmemBytes > static_cast<size_t>(max_shared)) return cudaErrorInvalidValue;
  const int threads = static_cast<int>(volume(config.blockDim));
  if (described.registers_per_thread * ((threads + 31) / 32 * 32) > described.registers_per_sm) {
    return cudaErrorLaunchOutOfResources;
  }
  if (attributes.has_cluster) {
    const cudaError_t error = check_cluster(request.kernel, config.gridDim, attributes.cluster);
    if (error != cudaSuccess) return error;
    int clusters = 0;
    max_clusters(request.kernel, config, &clusters);
    if (clusters == 0) return cudaErrorInvalidClusterSize;
  }
  if (!attributes.cooperative) return refusal(attributes);
  if (!described.cooperative_launch) return cudaErrorNotSupported;
  const size_t resident = static_cast<size_t>(blocks_per_sm(threads, config.dynamicSmemBytes)) *
                          static_cast<size_t>(described.sm_count);
  if (volume(config.gridDim) > resident) return cudaErrorCooperativeLaunchTooLarge;
  return refusal(attributes);
}

cudaError_t set_function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  FunctionSettings& settings = all_settings[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > described.shared_per_block_optin) {
      return remember(cudaErrorInvalidValue);
    }
    settings.max_dynamic_shared = value;
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    settings.non_portable_cluster = value != 0;
  }
  return cudaSuccess;
}

cudaError_t function_attributes(const void* kernel, cudaFuncAttributes* attributes) {
  *attributes = cudaFuncAttributes();
  attributes->maxThreadsPerBlock = described.max_threads_per_block;
  attributes->numRegs = described.registers_per_thread;
  attributes->binaryVersion = described.compute_major * 10 + described.compute_minor;
  attributes->ptxVersion =
      described.ptx_version > 0 ? described.ptx_version : attributes->binaryVersion;
  attributes->maxDynamicSharedSizeBytes = settings_of(kernel).max_dynamic_shared;
  return cudaSuccess;
}

cudaError_t max_blocks_per_sm(const void* kernel, int threads, size_t shared_bytes, int* blocks) {
  if (threads < 1) return remember(cudaErrorInvalidValue);
  const bool fits = threads <= described.max_threads_per_block &&
                    shared_bytes <= static_cast<size_t>(settings_of(kernel).max_dynamic_shared);
  *blocks = fits ? blocks_per_sm(threads, shared_bytes) : 0;
  return cudaSuccess;
}

cudaError_t max_clusters(const void* kernel, const cudaLaunchConfig_t& config, int* clusters) {
  const Attributes attributes = attributes_of(config);
  const cudaError_t error = check_cluster(kernel, config.gridDim, attributes.cluster);
  if (error != cudaSuccess) return remember(error);
  int blocks = 0;
  max_blocks_per_sm(kernel, static_cast<int>(volume(config.blockDim)), config.dynamicSmemBytes,
                    &blocks);
  *clusters = resident_clusters(static_cast<int>(volume(attributes.cluster)), blocks);
  return cudaSuccess;
}

cudaError_t max_cluster_size(const void* kernel, const cudaLaunchConfig_t& config, int* size) {
  if (!described.cluster_launch) return remember(cudaErrorNotSupported);
  int blocks = 0;
  max_blocks_per_sm(kernel, static_cast<int>(volume(config.blockDim)), config.dynamicSmemBytes,
                    &blocks);
  const int limit = settings_of(kernel).non_portable_cluster
                        ? described.max_cluster_size
                        : std::min(8, described.max_cluster_size);
  *size = 1;
  while (*size * 2 <= std::min(limit, blocks * described.sm_count)) *size *= 2;
  return cudaSuccess;
}

}  // namespace detail

void set_device(const DeviceDescription& device) {
  detail::described = device;
  ++detail::description;
}
int64_t description_number() { return detail::description; }
const DeviceDescription& device() { return detail::described; }

int refuse_launches(int cooperative_error, int cluster_error) {
  detail::cooperative_refusal = cooperative_error;
  detail::cluster_refusal = cluster_error;
  return detail::refusals.exchange(0);
}

}  // namespace simt

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::DeviceDescription& device = simt::device();
  const std::pair<cudaDeviceAttr, int> attributes[] = {
      {cudaDevAttrMaxThreadsPerBlock, device.max_threads_per_block},
      {cudaDevAttrMaxSharedMemoryPerBlock, device.shared_per_block},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, device.registers_per_sm},
      {cudaDevAttrMultiProcessorCount, device.sm_count},
      {cudaDevAttrL2CacheSize, device.l2_bytes},
      {cudaDevAttrMaxThreadsPerMultiProcessor, device.max_threads_per_sm},
      {cudaDevAttrComputeCapabilityMajor, device.compute_major},
      {cudaDevAttrComputeCapabilityMinor, device.compute_minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_per_sm},
      {cudaDevAttrMaxRegistersPerMultiprocessor, device.registers_per_sm},
      {cudaDevAttrCooperativeLaunch, device.cooperative_launch},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_per_block_optin},
      {cudaDevAttrMaxBlocksPerMultiprocessor, device.max_blocks_per_sm},
      {cudaDevAttrReservedSharedMemoryPerBlock, device.shared_reserved_per_block},
      {cudaDevAttrClusterLaunch, device.cluster_launch},
  };
  for (const auto& [known, number] : attributes) {
    if (known != attribute) continue;
    *value = number;
    return cudaSuccess;
  }
  return simt::detail::remember(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const simt::DeviceDescription& device = simt::device();
  *properties = cudaDeviceProp();
  std::strncpy(properties->name, device.name, sizeof(properties->name) - 1);
  properties->totalGlobalMem = size_t{1} << 34;
  properties->sharedMemPerBlock = static_cast<size_t>(device.shared_per_block);
  properties->sharedMemPerBlockOptin = static_cast<size_t>(device.shared_per_block_optin);
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(device.shared_per_sm);
  properties->reservedSharedMemPerBlock = static_cast<size_t>(device.shared_reserved_per_block);
  properties->regsPerBlock = device.registers_per_sm;
  properties->regsPerMultiprocessor = device.registers_per_sm;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = device.max_threads_per_block;
  properties->maxThreadsPerMultiProcessor = device.max_threads_per_sm;
  properties->maxBlocksPerMultiProcessor = device.max_blocks_per_sm;
  const int threads_dim[3] = {1024, 1024, 64};
  const int grid_size[3] = {0x7fffffff, 65535, 65535};
  std::copy(threads_dim, threads_dim + 3, properties->maxThreadsDim);
  std::copy(grid_size, grid_size + 3, properties->maxGridSize);
  properties->major = device.compute_major;
  properties->minor = device.compute_minor;
  properties->multiProcessorCount = device.sm_count;
  properties->l2CacheSize = device.l2_bytes;
  properties->cooperativeLaunch = device.cooperative_launch;
  properties->clusterLaunch = device.cluster_launch;
  return cudaSuccess;
}
