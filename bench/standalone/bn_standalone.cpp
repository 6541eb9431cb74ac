// Runs one batch-norm operation with the kernels and the plan of csrc/, without Python and PyTorch:
// checks it against a reference on the CPU, prints the plan, and times it.
//
// Built for the GPU by nvcc, or against the host model of CUDA in tests/simt, where nothing is
// timed. options.cpp lists the command line and the exit status.
#include <cstdio>
#include <exception>

#include "device_query.h"
#include "experiment.h"
#include "options.h"
#include "plan_text.h"
#include "timing.h"

#ifdef BATCHNORM_CUDA_HOST_MODEL
#include "simt.h"
#endif

namespace {

using namespace bn_standalone;
using batchnorm_cuda::DeviceInfo;
using batchnorm_cuda::Dtype;
using batchnorm_cuda::Strategy;

enum Status : int { kPassed = 0, kWrong = 1, kNoGpu = 2, kUsage = 3 };

template <typename scalar_t>
void print_time(Experiment<scalar_t>& experiment, const Options& options,
                const DeviceInfo& device) {
#ifdef BATCHNORM_CUDA_HOST_MODEL
  (void)experiment, (void)options, (void)device;
  std::printf("time: host model: no timing\n");
#else
  const Times times = time_launches(options.repeat, device.l2_bytes, [&] { experiment.launch(); });
  const auto bytes = static_cast<double>(experiment.plan().compulsory_bytes);
  std::printf("time: median %.4f ms of %d (%.4f to %.4f), %.1f GB/s of compulsory bytes\n",
              times.median, options.repeat, times.least, times.most, bytes / times.median * 1e-6);
#endif
}

template <typename scalar_t>
Status run(const Options& options, const DeviceInfo& device) {
  Experiment<scalar_t> experiment(options, device);
  print_plan(experiment.plan());
  if (options.plan.strategy == Strategy::kTeam && experiment.plan().strategy != Strategy::kTeam) {
    std::fprintf(stderr, "bn_standalone: no team for this problem: %s\n",
                 experiment.plan().reason.c_str());
    return kUsage;
  }
  experiment.launch();
  if (!experiment.compare()) return kWrong;
  print_time(experiment, options, device);
  return kPassed;
}

Status run(const Options& options, const DeviceInfo& device) {
  switch (options.problem.dtype) {
    case Dtype::kHalf:
      return run<__half>(options, device);
    case Dtype::kBFloat16:
      return run<__nv_bfloat16>(options, device);
    case Dtype::kFloat:
      return run<float>(options, device);
    default:
      return run<double>(options, device);
  }
}

#ifdef BATCHNORM_CUDA_HOST_MODEL
// The modelled device has the limits that the plan is made for.
void model(const DeviceInfo& device) {
  simt::DeviceDescription d;
  d.name = device.name.c_str();
  d.compute_major = device.compute_major;
  d.compute_minor = device.compute_minor;
  d.sm_count = device.sm_count;
  d.max_threads_per_sm = device.max_threads_per_sm;
  d.registers_per_sm = device.registers_per_sm;
  d.shared_per_sm = static_cast<int>(device.shared_bytes_per_sm);
  d.shared_per_block = static_cast<int>(device.shared_bytes_per_block);
  d.shared_per_block_optin = static_cast<int>(device.shared_bytes_per_block_optin);
  d.l2_bytes = static_cast<int>(device.l2_bytes);
  d.cooperative_launch = device.cooperative;
  d.max_cluster_size = device.max_cluster;
  d.cluster_launch = device.max_cluster > 0;
  d.clusters_of_2 = device.clusters_of_2;
  d.clusters_of_4 = device.clusters_of_4;
  d.clusters_of_8 = device.clusters_of_8;
  simt::set_device(d);
}
#else
void model(const DeviceInfo&) {}
#endif

Status main_with(const Options& options) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    std::fprintf(stderr, "bn_standalone: no GPU to run on (%s)\n",
                 status == cudaSuccess ? "the driver lists none" : cudaGetErrorString(status));
    return kNoGpu;
  }
  DeviceInfo device;
  check(static_cast<cudaError_t>(batchnorm_cuda::query_device(0, &device)), "querying device 0");
  if (!options.device_json.empty()) {
    read_device_json(options.device_json, &device);
    model(device);
  }
  const auto& p = options.problem;
  std::printf("case: %s, %s, [%lld, %lld, %lld], seed %llu, on %s\n", options.op_name.c_str(),
              options.dtype_name.c_str(), static_cast<long long>(p.n), static_cast<long long>(p.c),
              static_cast<long long>(p.s), static_cast<unsigned long long>(options.seed),
              device.name.c_str());
  return run(options, device);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return main_with(parse_options(argc, argv));
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "bn_standalone: %s\n%s", error.what(), usage());
    return kUsage;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bn_standalone: %s\n", error.what());
    return kWrong;
  }
}
