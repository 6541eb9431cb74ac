// Python's hold on the host model: the submodule _host_model of the host build. It describes the
// device that planner and engine take for real, and counts the memory traffic of launches.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda_runtime.h"
#include "simt.h"
#include "simt_traffic.h"
#include "torch/build_bindings.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace batchnorm_cuda {
namespace {

template <typename T>
void take(const py::dict& from, const char* key, T& value) {
  if (from.contains(key)) value = from[key].cast<T>();
}

// Keys are those of device_info(), registers_per_thread and ptx_version; what is absent keeps its
// default.
void set_device(const py::dict& device) {
  static std::string name;  // DeviceDescription holds a pointer to it
  simt::DeviceDescription d;
  name = d.name;
  take(device, "name", name);
  d.name = name.c_str();
  take(device, "compute_major", d.compute_major);
  take(device, "compute_minor", d.compute_minor);
  take(device, "sm_count", d.sm_count);
  take(device, "max_threads_per_sm", d.max_threads_per_sm);
  take(device, "registers_per_sm", d.registers_per_sm);
  take(device, "registers_per_thread", d.registers_per_thread);
  take(device, "ptx_version", d.ptx_version);
  take(device, "shared_bytes_per_sm", d.shared_per_sm);
  take(device, "shared_bytes_per_block", d.shared_per_block);
  take(device, "shared_bytes_per_block_optin", d.shared_per_block_optin);
  take(device, "l2_bytes", d.l2_bytes);
  take(device, "cooperative", d.cooperative_launch);
  take(device, "max_cluster", d.max_cluster_size);
  take(device, "clusters_of_2", d.clusters_of_2);
  take(device, "clusters_of_4", d.clusters_of_4);
  take(device, "clusters_of_8", d.clusters_of_8);
  d.cluster_launch = d.compute_major >= 9 && d.max_cluster_size > 0;
  simt::set_device(d);
}

py::dict stop_traffic() {
  const simt::TrafficReport report = simt::stop_traffic();
  py::list launches, buffers, sites;
  for (const std::string& kernel : report.launches) launches.append(kernel);
  for (const simt::BufferTraffic& b : report.buffers) {
    buffers.append(py::dict("name"_a = b.name, "bytes"_a = b.bytes, "dram_read"_a = b.dram_read,
                            "dram_written"_a = b.dram_written));
  }
  for (const simt::SiteTraffic& s : report.sites) {
    sites.append(py::dict("kernel"_a = s.kernel, "site"_a = s.site, "buffer"_a = s.buffer,
                          "write"_a = s.write, "accesses"_a = s.accesses, "sectors"_a = s.sectors,
                          "fewest"_a = s.fewest));
  }
  return py::dict("launches"_a = launches, "buffers"_a = buffers, "sites"_a = sites);
}

}  // namespace

void bind_build(py::module_& m) {
  py::module_ model = m.def_submodule("_host_model", "The CPU model of CUDA that runs the kernels");
  model.def("set_device", &set_device, py::arg("device"),
            "Describes the modelled device by the keys of device_info(); {} is the default one");
  model.def("refuse_launches", &simt::refuse_launches, py::arg("cooperative") = 0,
            py::arg("cluster") = 0,
            "From now on such launches fail with these CUDA errors; how many did before");
  model.def(
      "last_error", [] { return static_cast<int>(cudaPeekAtLastError()); },
      "The CUDA error that this thread's next check would find");
  model.def("skip_launches", &simt::skip_launches, py::arg("skip"),
            "Checks launches without running them, to time the host code alone");
  model.def("start_traffic", &simt::start_traffic, "Counts memory traffic from now on");
  model.def("stop_traffic", &stop_traffic,
            "Ends counting: launches, DRAM bytes of each buffer, sectors of each source line");
}

}  // namespace batchnorm_cuda
