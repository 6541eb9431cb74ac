// The Python module batchnorm_cuda._C (and its host-build twin).
#include <torch/csrc/utils/pybind.h>

#include "../kernel_table.h"
#include "../plan/plan_cache.h"
#include "../plan/plan_dict.h"
#include "build_bindings.h"
#include "device_context.h"
#include "operator_bindings.h"

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

// The gradients, by the package that this module belongs to.
bn::Gradients backward_in_python(const bn::BackwardCall& call) {
  const py::gil_scoped_acquire acquire;
  const py::object backward = py::module_::import("batchnorm_cuda.autograd").attr("seen_backward");
  const py::tuple found =
      backward(call.grad_output, call.input, call.weight, call.bias, call.save_mean,
               call.save_invstd, call.training, call.need_input, call.need_weight, call.need_bias,
               call.mask, call.need_residual, call.activation, call.parameter);
  const auto given = [&](size_t i) { return found[i].cast<bn::OptionalTensor>(); };
  return {given(0), given(1), given(2), given(3)};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Batch normalisation kernels; see batchnorm_cuda.batch_norm for the public function.";
  bn::bind_operators(m);
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
  bn::set_seen_backward(backward_in_python);
  bn::bind_build(m);
}
