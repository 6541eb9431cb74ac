#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <utility>

#include "kernel_table.h"

// Null where the table is not linked into this module.
#define BATCHNORM_CUDA_PERHAPS extern "C" __attribute__((weak, visibility("hidden")))
BATCHNORM_CUDA_PERHAPS const void* batchnorm_cuda_kernels_common();
BATCHNORM_CUDA_PERHAPS const void* batchnorm_cuda_kernels_half();
BATCHNORM_CUDA_PERHAPS const void* batchnorm_cuda_kernels_bfloat16();
BATCHNORM_CUDA_PERHAPS const void* batchnorm_cuda_kernels_float();
BATCHNORM_CUDA_PERHAPS const void* batchnorm_cuda_kernels_double();

namespace batchnorm_cuda {
namespace {

using GetTable = const void* (*)();

// Never freed: it may hold an object of Python, which is gone before static objects are.
KernelLoader& kernel_loader() {
  static auto& loader = *new KernelLoader();
  return loader;
}

// Never unloaded: kernels may be running.
const void* load(const std::string& name) {
  if (!kernel_loader()) {
    throw std::runtime_error("batch_norm: the kernels of " + name +
                             " are not linked into this module, and no loader of them is set");
  }
  const std::string path = kernel_loader()(name);
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    throw std::runtime_error(std::string("batch_norm: cannot load kernels: ") + dlerror());
  }
  const std::string symbol = "batchnorm_cuda_kernels_" + name;
  const auto get = reinterpret_cast<GetTable>(dlsym(library, symbol.c_str()));
  if (!get) throw std::runtime_error("batch_norm: " + path + " does not define " + symbol);
  return get();
}

// Of a table: its getter if it is linked in, and its name.
struct Source {
  GetTable linked;
  const char* name;
};
template <typename scalar_t>
constexpr Source kSource{};
template <>
constexpr Source kSource<__half>{batchnorm_cuda_kernels_half, "half"};
template <>
constexpr Source kSource<__nv_bfloat16>{batchnorm_cuda_kernels_bfloat16, "bfloat16"};
template <>
constexpr Source kSource<float>{batchnorm_cuda_kernels_float, "float"};
template <>
constexpr Source kSource<double>{batchnorm_cuda_kernels_double, "double"};

// Threads that come at the same time load the same table.
template <typename Table>
const Table& find(std::atomic<const void*>& known, const Source& source) {
  const void* table = known.load(std::memory_order_acquire);
  if (!table) {
    table = source.linked ? source.linked() : load(source.name);
    known.store(table, std::memory_order_release);
  }
  return *static_cast<const Table*>(table);
}

}  // namespace

void set_kernel_loader(KernelLoader loader) { kernel_loader() = std::move(loader); }

template <typename scalar_t>
const KernelTable<scalar_t>& kernels() {
  static std::atomic<const void*> known{nullptr};
  return find<KernelTable<scalar_t>>(known, kSource<scalar_t>);
}
template const KernelTable<__half>& kernels();
template const KernelTable<__nv_bfloat16>& kernels();
template const KernelTable<float>& kernels();
template const KernelTable<double>& kernels();

const CommonTable& common_kernels() {
  static std::atomic<const void*> known{nullptr};
  return find<CommonTable>(known, {batchnorm_cuda_kernels_common, "common"});
}
template <>
const MergeTable<float>& merges() {
  return common_kernels().in_float;
}
template <>
const MergeTable<double>& merges() {
  return common_kernels().in_double;
}

}  // namespace batchnorm_cuda
