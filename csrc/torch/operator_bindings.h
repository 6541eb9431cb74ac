// The operators for Python: arguments become the fields of a record, fields of the results a tuple.
// Their lists are those of batchnorm_cuda/_ops/operators.py; tests/operators/test_calls.py
// compares.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <utility>

#include "ops.h"
#include "recorded.h"

namespace batchnorm_cuda {

template <auto field>
struct Field;
template <typename Record, typename T, T Record::* field>
struct Field<field> {
  using type = T;
};

// A field under the name that Python has for it. GIVEN ones are always there, though the record may
// lack them; ADDED ones have the record's own value as their default.
template <auto field, typename as = typename Field<field>::type, bool added = false>
struct Named {
  const char* name;
};
#define BATCHNORM_CUDA_FIELD(record, name) \
  Named<&record::name> { #name }
#define BATCHNORM_CUDA_ADDED(record, name) \
  Named<&record::name, typename Field<&record::name>::type, true> { #name }
#define BATCHNORM_CUDA_GIVEN(record, name) \
  Named<&record::name, at::Tensor> { #name }

inline at::Tensor given(at::Tensor& tensor) { return std::move(tensor); }
inline at::Tensor given(OptionalTensor& tensor) { return std::move(*tensor); }

template <auto field, typename as, typename Results>
as result(Results& results, const Named<field, as>&) {
  if constexpr (std::is_same_v<as, at::Tensor>) {
    return given(results.*field);
  } else {
    return std::move(results.*field);
  }
}

// A tuple of the results, or the one there is.
template <typename Results, typename... Fields>
auto results_of(Results& results, const Fields&... fields) {
  if constexpr (sizeof...(fields) == 1) {
    return result(results, fields...);
  } else {
    return std::make_tuple(result(results, fields)...);
  }
}

template <typename Record, auto field, typename as, bool added>
auto argument_of(const Named<field, as, added>& named) {
  if constexpr (added) {
    return pybind11::arg(named.name) = Record{}.*field;
  } else {
    return pybind11::arg(named.name);
  }
}

template <typename Record, typename Results, auto... in, typename... In, bool... added,
          typename... Out>
void bind_operator(pybind11::module_& m, const char* name, Results (*entry)(Record),
                   const std::tuple<Named<in, In, added>...>& arguments, const std::tuple<Out...>&,
                   const char* doc) {
  // Copies: whoever gives up the last but one reference to a tensor of Python's takes Python's lock
  // for it, which pybind11's own are destroyed with, but no record.
  auto run = [entry](const In&... values) {
    Record call;
    ((call.*in = values), ...);
    Results computed = entry(std::move(call));
    return results_of(computed, Out{}...);
  };
  std::apply(
      [&](const auto&... argument) {
        // Without Python's lock, and with warnings and errors that are Python's.
        m.def(name, torch::wrap_pybind_function_no_gil(std::move(run)),
              argument_of<Record>(argument)..., doc);
      },
      arguments);
}

inline Normalized recorded_output(ForwardCall call) {
  Normalized results;
  results.output = recorded(std::move(call));
  return results;
}

inline void bind_forward(pybind11::module_& m) {
#define FIELD(name) BATCHNORM_CUDA_FIELD(ForwardCall, name)
#define ADDED(name) BATCHNORM_CUDA_ADDED(ForwardCall, name)
#define RESULT(name) BATCHNORM_CUDA_FIELD(Normalized, name)
  const std::tuple parameters{FIELD(input),        FIELD(weight),      FIELD(bias),
                              FIELD(running_mean), FIELD(running_var), FIELD(num_batches_tracked)};
  const std::tuple training{FIELD(training)};
  const std::tuple settings{FIELD(momentum), FIELD(eps)};
  const std::tuple fused{FIELD(residual), FIELD(relu), FIELD(need_mask)};
  const std::tuple which{ADDED(activation), ADDED(parameter)};
  const std::tuple gathered{BATCHNORM_CUDA_GIVEN(ForwardCall, gathered)};
  const std::tuple added{ADDED(residual), ADDED(relu), ADDED(activation), ADDED(parameter)};
  const std::tuple results{RESULT(output), RESULT(mean), RESULT(invstd)};
  const std::tuple output{RESULT(output)};
  const std::tuple mask{RESULT(mask)};
  const std::tuple count{BATCHNORM_CUDA_GIVEN(Normalized, count)};
#undef FIELD
#undef RESULT
  const auto cat = [](const auto&... parts) { return std::tuple_cat(parts...); };
  bind_operator(
      m, "forward", &forward, cat(parameters, training, settings), results,
      "(output, save_mean, save_invstd); training updates the running statistics and counts the "
      "batch");
  bind_operator(m, "fused_forward", &forward, cat(parameters, fused, training, settings, which),
                cat(results, mask),
                "(output, save_mean, save_invstd, mask) of relu(bn(input) + residual)");
  bind_operator(m, "recorded", &recorded_output, cat(parameters, training, settings, added), output,
                "The output, with a gradient");
  bind_operator(
      m, "sync_forward", &forward, cat(parameters, gathered, settings), cat(results, count),
      "(output, mean, invstd, count); updates the running statistics and counts the batch");
  bind_operator(m, "sync_fused_forward", &forward,
                cat(parameters, gathered, fused, settings, which), cat(results, count, mask),
                "(output, mean, invstd, count, mask): sync_forward of relu(bn(input) + residual)");
}

inline Gradients form_grad_input(BackwardCall call) {
  call.need_input = true;
  return backward(call);
}

inline void bind_backward(pybind11::module_& m) {
#define FIELD(name) BATCHNORM_CUDA_FIELD(BackwardCall, name)
#define GIVEN(name) BATCHNORM_CUDA_GIVEN(BackwardCall, name)
#define ADDED(name) BATCHNORM_CUDA_ADDED(BackwardCall, name)
#define RESULT(name) BATCHNORM_CUDA_FIELD(Gradients, name)
#define OWN(name) BATCHNORM_CUDA_FIELD(OwnGradients, name)
  const std::tuple read{FIELD(grad_output), FIELD(input), FIELD(weight)};
  const std::tuple bias{FIELD(bias)};
  const std::tuple saved{FIELD(save_mean), FIELD(save_invstd)};
  const std::tuple training{FIELD(training)};
  const std::tuple of_ranks{Named<&BackwardCall::save_mean>{"mean"},
                            Named<&BackwardCall::save_invstd>{"invstd"}};
  const std::tuple totals{GIVEN(sums), GIVEN(count)};
  const std::tuple mask{GIVEN(mask)};
  const std::tuple which{ADDED(activation), ADDED(parameter)};
  const std::tuple need_input{FIELD(need_input)};
  const std::tuple need_residual{FIELD(need_residual)};
  const std::tuple need_parameters{FIELD(need_weight), FIELD(need_bias)};
  const std::tuple gradients{RESULT(grad_input), RESULT(grad_weight), RESULT(grad_bias)};
  const std::tuple residual{RESULT(grad_residual)};
  const std::tuple own{OWN(sums), OWN(grad_weight), OWN(grad_bias)};
  const std::tuple of_input{BATCHNORM_CUDA_GIVEN(Gradients, grad_input)};
  const std::tuple of_input_and_residual{RESULT(grad_input), RESULT(grad_residual)};
#undef FIELD
#undef GIVEN
#undef ADDED
#undef RESULT
#undef OWN
  const auto cat = [](const auto&... parts) { return std::tuple_cat(parts...); };
  bind_operator(m, "backward", &backward,
                cat(read, bias, saved, training, need_input, need_parameters), gradients,
                "(grad_input, grad_weight, grad_bias), None where not needed");
  bind_operator(
      m, "fused_backward", &backward,
      cat(read, bias, saved, mask, training, need_input, need_parameters, need_residual, which),
      cat(gradients, residual),
      "(grad_input, grad_weight, grad_bias, grad_residual), None where not needed");
  bind_operator(m, "sync_backward_reduce", &reduce_gradients,
                cat(read, bias, of_ranks, need_parameters), own,
                "(sums, grad_weight, grad_bias) of this rank, gradients None where not needed");
  bind_operator(m, "sync_fused_backward_reduce", &reduce_gradients,
                cat(read, bias, of_ranks, mask, need_parameters, which), own,
                "(sums, grad_weight, grad_bias) of this rank");
  bind_operator(m, "sync_backward_elementwise", &form_grad_input, cat(read, of_ranks, totals),
                of_input, "grad_input of this rank's part");
  bind_operator(m, "sync_fused_backward_elementwise", &backward,
                cat(read, of_ranks, totals, mask, need_input, need_residual, which),
                of_input_and_residual,
                "(grad_input, grad_residual) of this rank's part, None where not needed");
}

inline void bind_operators(pybind11::module_& m) {
  bind_forward(m);
  bind_backward(m);
#define FIELD(name) BATCHNORM_CUDA_FIELD(DoubleBackwardCall, name)
#define RESULT(name) BATCHNORM_CUDA_FIELD(DoubleGradients, name)
  bind_operator(m, "double_backward", &double_backward,
                std::tuple{FIELD(grad_grad_input), FIELD(grad_grad_weight), FIELD(grad_grad_bias),
                           FIELD(grad_output), FIELD(input), FIELD(weight), FIELD(save_mean),
                           FIELD(save_invstd), FIELD(training), FIELD(need_grad_output),
                           FIELD(need_input), FIELD(need_weight)},
                std::tuple{RESULT(grad_grad_output), RESULT(grad_input), RESULT(grad_weight)},
                "(grad_grad_output, grad_input, grad_weight), None where not needed");
#undef FIELD
#undef RESULT
  const pybind11::call_guard<pybind11::gil_scoped_release> release;
  m.def("sync_statistics", &statistics, release, pybind11::arg("input"),
        "This rank's row: count, mean [C] and M2 [C]");
  m.def("sync_sum", &sum_ranks, release, pybind11::arg("gathered"),
        "Sums over the first dimension, to the same bits in any order");
}

}  // namespace batchnorm_cuda
