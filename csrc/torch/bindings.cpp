// The Python module batchnorm_cuda._C (and its host-build twin).
#include <torch/csrc/utils/pybind.h>

#include "../kernel_table.h"
#include "../plan/plan_cache.h"
#include "../plan/plan_dict.h"
#include "build_bindings.h"
#include "device_context.h"
#include "ops.h"

namespace py = pybind11;
namespace bn = batchnorm_cuda;

namespace {

py::object to_python(const bn::Value& value);

py::dict to_python(const bn::NamedValues& values) {
  py::dict result;
  for (const bn::NamedValue& each : values) result[each.name.c_str()] = to_python(each.value);
  return result;
}

py::object to_python(const bn::Value& value) {
  if (const auto* flag = std::get_if<bool>(&value)) return py::bool_(*flag);
  if (const auto* whole = std::get_if<int64_t>(&value)) return py::int_(*whole);
  if (const auto* number = std::get_if<double>(&value)) return py::float_(*number);
  if (const auto* text = std::get_if<std::string>(&value)) return py::str(*text);
  return to_python(std::get<bn::NamedValues>(value));
}

bn::NamedValues from_python(const py::dict& dict) {
  bn::NamedValues result;
  for (const auto& [key, value] : dict) {
    const auto name = py::cast<std::string>(key);
    if (py::isinstance<py::bool_>(value)) {
      result.push_back({name, value.ptr() == Py_True});
    } else if (py::isinstance<py::float_>(value)) {
      result.push_back({name, PyFloat_AS_DOUBLE(value.ptr())});
    } else if (py::isinstance<py::str>(value)) {
      result.push_back({name, py::cast<std::string>(value)});
    } else if (PyIndex_Check(value.ptr())) {
      result.push_back({name, py::cast<int64_t>(value)});
    } else {
      throw py::type_error("make_plan: expected " + name +
                           " to be a bool, int, float or str, got " +
                           py::repr(value).cast<std::string>());
    }
  }
  return result;
}

void bind_sync(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("sync_statistics", &bn::sync_statistics, release, py::arg("input"),
        "This rank's row: count, mean [C] and M2 [C]");
  m.def("sync_forward", &bn::sync_forward, release, py::arg("input"), py::arg("weight"),
        py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("num_batches_tracked"), py::arg("gathered"), py::arg("momentum"), py::arg("eps"),
        "(output, mean, invstd, count); updates the running statistics and counts the batch");
  m.def("sync_backward_reduce", &bn::sync_backward_reduce, release, py::arg("grad_output"),
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("invstd"),
        py::arg("need_weight"), py::arg("need_bias"),
        "(sums, grad_weight, grad_bias) of this rank, gradients None where not needed");
  m.def("sync_sum", &bn::sync_sum, release, py::arg("gathered"),
        "Sums over the first dimension, to the same bits in any order");
  m.def("sync_backward_elementwise", &bn::sync_backward_elementwise, release,
        py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("mean"),
        py::arg("invstd"), py::arg("sums"), py::arg("count"), "grad_input of this rank's part");
}

void bind_fused(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("fused_forward", &bn::fused_forward, release, py::arg("input"), py::arg("weight"),
        py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("num_batches_tracked"), py::arg("residual"), py::arg("relu"), py::arg("need_mask"),
        py::arg("training"), py::arg("momentum"), py::arg("eps"),
        "(output, save_mean, save_invstd, mask) of relu(bn(input) + residual)");
  m.def("fused_backward", &bn::fused_backward, release, py::arg("grad_output"), py::arg("input"),
        py::arg("weight"), py::arg("bias"), py::arg("save_mean"), py::arg("save_invstd"),
        py::arg("mask"), py::arg("training"), py::arg("need_input"), py::arg("need_weight"),
        py::arg("need_bias"), py::arg("need_residual"),
        "(grad_input, grad_weight, grad_bias, grad_residual), None where not needed");
  m.def("sync_fused_forward", &bn::sync_fused_forward, release, py::arg("input"), py::arg("weight"),
        py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("num_batches_tracked"), py::arg("gathered"), py::arg("residual"), py::arg("relu"),
        py::arg("need_mask"), py::arg("momentum"), py::arg("eps"),
        "(output, mean, invstd, count, mask): sync_forward of relu(bn(input) + residual)");
  m.def("sync_fused_backward_reduce", &bn::sync_fused_backward_reduce, release,
        py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("mean"), py::arg("invstd"), py::arg("mask"), py::arg("need_weight"),
        py::arg("need_bias"), "(sums, grad_weight, grad_bias) of this rank");
  m.def("sync_fused_backward_elementwise", &bn::sync_fused_backward_elementwise, release,
        py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("mean"),
        py::arg("invstd"), py::arg("sums"), py::arg("count"), py::arg("mask"),
        py::arg("need_input"), py::arg("need_residual"),
        "(grad_input, grad_residual) of this rank's part, None where not needed");
}

void bind_plan(py::module_& m) {
  m.def(
      "make_plan",
      [](const std::string& op, int64_t n, int64_t c, int64_t s, const std::string& dtype,
         const py::dict& device, const py::dict& options) {
        return to_python(
            bn::plan_as_values(op, n, c, s, dtype, from_python(device), from_python(options)));
      },
      py::arg("op"), py::arg("n"), py::arg("c"), py::arg("s"), py::arg("dtype"),
      py::arg("device") = py::dict(), py::arg("options") = py::dict(),
      "The plan for [n, c, s] on a described device, as a dictionary");
  m.def(
      "plan_candidates",
      [](const std::string& op, int64_t n, int64_t c, int64_t s, const std::string& dtype,
         const py::dict& device, const py::dict& options, const py::dict& costs) {
        std::vector<py::dict> result;
        for (const bn::NamedValues& each :
             bn::candidates_as_values(op, n, c, s, dtype, from_python(device), from_python(options),
                                      from_python(costs))) {
          result.push_back(to_python(each));
        }
        return result;
      },
      py::arg("op"), py::arg("n"), py::arg("c"), py::arg("s"), py::arg("dtype"),
      py::arg("device") = py::dict(), py::arg("options") = py::dict(),
      py::arg("costs") = py::dict(),
      "All plans that may be chosen: options that force each, plan, cost, bytes, chosen or not");
  m.def(
      "cost_model", [] { return to_python(bn::cost_model_as_values()); },
      "The constants of the planner's cost model");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Batch normalisation kernels; see batchnorm_cuda.batch_norm for the public function.";
  m.def("forward", &bn::forward, py::call_guard<py::gil_scoped_release>(), py::arg("input"),
        py::arg("weight"), py::arg("bias"), py::arg("running_mean"), py::arg("running_var"),
        py::arg("num_batches_tracked"), py::arg("training"), py::arg("momentum"), py::arg("eps"),
        "(output, save_mean, save_invstd); training updates the running statistics and counts the "
        "batch");
  m.def("backward", &bn::backward, py::call_guard<py::gil_scoped_release>(), py::arg("grad_output"),
        py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("save_mean"),
        py::arg("save_invstd"), py::arg("training"), py::arg("need_input"), py::arg("need_weight"),
        py::arg("need_bias"), "(grad_input, grad_weight, grad_bias), None where not needed");
  m.def("double_backward", &bn::double_backward, py::call_guard<py::gil_scoped_release>(),
        py::arg("grad_grad_input"), py::arg("grad_grad_weight"), py::arg("grad_grad_bias"),
        py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("save_mean"),
        py::arg("save_invstd"), py::arg("training"), py::arg("need_grad_output"),
        py::arg("need_input"), py::arg("need_weight"),
        "(grad_grad_output, grad_input, grad_weight), None where not needed");
  bind_sync(m);
  bind_fused(m);
  bind_plan(m);
  m.def(
      "device_info",
      [](int index) {
        const c10::Device device(bn::supported_device_type(), static_cast<c10::DeviceIndex>(index));
        const bn::DeviceInfo* info = nullptr;
        {
          // Who asks first may wait for a compilation, whose end needs the lock of Python.
          const py::gil_scoped_release release;
          info = &bn::device_info(device);
        }
        return to_python(bn::to_values(*info));
      },
      py::arg("index") = 0, "Properties of a device as the planner sees them");
  m.def(
      "set_plan_options",
      [](const py::dict& options) {
        bn::set_plan_options(bn::options_from_values(from_python(options)));
      },
      py::arg("options"), "Forces planner choices in this process; {} takes them back");
  m.def(
      "set_kernel_loader",
      [](const py::function& loader) {
        bn::set_kernel_loader([loader](const std::string& table) {
          const py::gil_scoped_acquire acquire;
          return loader(table).cast<std::string>();
        });
      },
      py::arg("loader"),
      "Names a function that gives the path of the kernels \"common\", \"half\", \"bfloat16\", "
      "\"float\" or \"double\" when they are first needed");
  bn::bind_build(m);
}
