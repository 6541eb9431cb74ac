// Stand-in for the part of <cooperative_groups.h> that synchronises blocks, clusters and grids.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  void sync(simt::Site site = simt::Site::current()) const { __syncthreads(site); }
  unsigned int thread_rank() const {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  }
  unsigned int size() const { return blockDim.x * blockDim.y * blockDim.z; }
};

class cluster_group {
 public:
  static void sync(simt::Site site = simt::Site::current()) {
    simt::detail::cluster_arrive(site);
    simt::detail::cluster_wait(site);
  }
  static void barrier_arrive(simt::Site site = simt::Site::current()) {
    simt::detail::cluster_arrive(site);
  }
  static void barrier_wait(simt::Site site = simt::Site::current()) {
    simt::detail::cluster_wait(site);
  }
  static unsigned int block_rank() { return simt::detail::cluster_rank(); }
  static unsigned int num_blocks() { return simt::detail::cluster_size(); }
  static dim3 block_index() { return simt::detail::cluster_block_index(); }
  static dim3 dim_blocks() { return simt::detail::cluster_dims(); }
  template <typename T>
  static T* map_shared_rank(T* address, int rank, simt::Site site = simt::Site::current()) {
    return static_cast<T*>(
        simt::detail::map_shared_rank(address, static_cast<unsigned int>(rank), site));
  }
};

class grid_group {
 public:
  void sync(simt::Site site = simt::Site::current()) const { simt::detail::grid_barrier(site); }
};

inline thread_block this_thread_block() { return {}; }
inline cluster_group this_cluster() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
