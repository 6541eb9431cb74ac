// Cases of the host model's own tests: registered by name, run one by one by the driver.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/platform.cuh"

namespace simt_test {

using batchnorm_cuda::dynamic_shared;
using batchnorm_cuda::load_global;
using batchnorm_cuda::load_shared;
using batchnorm_cuda::static_shared;
using batchnorm_cuda::store_global;
using batchnorm_cuda::store_shared;

struct Case {
  const char* name;
  void (*run)();
};
std::vector<Case>& cases();

struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

#define SIMT_CASE(name)                                             \
  void name();                                                      \
  const ::simt_test::Registration name##_registration(#name, name); \
  void name()

#define EXPECT(condition) ::simt_test::expect(condition, #condition, __FILE__, __LINE__)
void expect(bool condition, const char* text, const char* file, int line);

// Set by kernels on the line of the planted fault, so that the test can ask for it in the message.
extern int marked_line;
#define MARK (::simt_test::marked_line = __LINE__)

// Runs a launch that must end in a Fault whose message has all of these parts, and the marked line
// where the kernel marks one. Then checks that the engine can launch again.
void expect_fault(const std::function<void()>& launch, std::initializer_list<std::string> parts);

struct Shape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  unsigned int cluster = 0;  // blocks along x, 0: no cluster launch
};

template <typename... Params, typename... Args>
cudaError_t try_launch(const Shape& shape, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchAttribute attributes[2];
  unsigned int count = 0;
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.cluster != 0) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
  }
  cudaLaunchConfig_t config;
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
void launch(const Shape& shape, void (*kernel)(Params...), Args&&... args) {
  const cudaError_t error = try_launch(shape, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// One declared buffer of a kernel argument and its memory.
enum class Use { kInput, kOutput, kInPlace, kScratch, kPersistent };

template <typename T>
struct Buffer {
  T* data;
  size_t size;
  Use use;
  template <typename F>
  void visit_buffers(F&& f) const {
    f("buffer", data, size * sizeof(T), use == Use::kInput || use == Use::kInPlace,
      use == Use::kOutput || use == Use::kInPlace, use == Use::kPersistent);
  }
};

// Memory of a Buffer, 256-byte aligned.
template <typename T>
class Memory {
 public:
  explicit Memory(size_t size, T value = T()) : size_(size) {
    cudaMalloc(&data_, size * sizeof(T));
    for (size_t i = 0; i < size; ++i) data_[i] = value;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  Buffer<T> as(Use use) const { return {data_, size_, use}; }
  T& operator[](size_t i) { return data_[i]; }
  T* data() { return data_; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

inline unsigned int thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
inline unsigned int block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

}  // namespace simt_test
