// Times a launch with CUDA events, each time with a cold L2 cache.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "device_memory.h"

namespace bn_standalone {

struct Times {
  float median, least, most;  // milliseconds
};

// Before each launch a buffer of three times the cache is written. It also keeps the GPU busy until
// the launches behind it are enqueued, so that no launch latency of the host is measured.
template <typename Launch>
Times time_launches(int repeat, int64_t l2_bytes, Launch&& launch) {
  constexpr int kWarmUp = 2;
  const size_t flush_bytes = static_cast<size_t>(std::max<int64_t>(3 * l2_bytes, 64 << 20));
  DeviceBuffer<unsigned char> flush(flush_bytes);
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<float> measured;
  for (int i = 0; i < repeat + kWarmUp; ++i) {
    check(cudaMemsetAsync(flush.data(), i, flush_bytes, nullptr), "cudaMemsetAsync");
    check(cudaEventRecord(start), "cudaEventRecord");
    launch();
    check(cudaEventRecord(stop), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "running the kernels");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
    if (i >= kWarmUp) measured.push_back(milliseconds);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(measured.begin(), measured.end());
  return {measured[measured.size() / 2], measured.front(), measured.back()};
}

}  // namespace bn_standalone
