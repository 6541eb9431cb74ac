#include "recorded.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "ops.h"
#include "tensors.h"

namespace batchnorm_cuda {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

SeenBackward& seen_backward() {
  static SeenBackward backward;
  return backward;
}

// Whether the kernels may take it as it is: a tensor of its device's own, and no wrapper of one.
bool is_plain(const at::Tensor& tensor) {
  const c10::DispatchKeySet keys = tensor.key_set() - c10::autocast_dispatch_keyset;
  const c10::DispatchKey key = keys.highestFunctionalityKey();
  return !keys.has(c10::DispatchKey::Functionalize) &&
         (key == c10::DispatchKey::AutogradFunctionality ||
          key == c10::DispatchKey::ADInplaceOrView || key == c10::DispatchKey::Dense) &&
         !tensor._fw_grad(0).defined();
}

// Whether somebody has to see the backward of this call: autograd, a mode, a transform, a subclass.
bool is_seen(const BackwardCall& call) {
  constexpr auto kTransforms = c10::DispatchKey::FuncTorchDynamicLayerFrontMode;
  return at::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(kTransforms) || !is_plain(call.grad_output) ||
         !is_plain(call.input);
}

OptionalTensor optional(at::Tensor tensor) {
  return tensor.defined() ? OptionalTensor(std::move(tensor)) : std::nullopt;
}

constexpr int64_t kAbsent = -1;

// A tensor like the bias, of its dtype, or none.
OptionalTensor lender_of(int64_t dtype, const BackwardCall& call) {
  if (dtype == kAbsent) return std::nullopt;
  const auto type = static_cast<at::ScalarType>(dtype);
  if (call.weight && call.weight->scalar_type() == type) return call.weight;
  return allocate({call.input.size(1)}, call.input.options().dtype(type));
}

// The name is that of the node in graphs and profiles.
struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  // The tensors stand by themselves for autograd to see them.
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& /*residual*/, ForwardCall& call) {
    const bool has_residual = call.residual.has_value(), training = call.training;
    std::string activation = call.relu ? call.activation : "";
    const double parameter = call.parameter;
    Normalized results = batchnorm_cuda::forward(std::move(call));
    context->set_materialize_grads(false);
    context->save_for_backward({input, weight.value_or(at::Tensor()), results.mean, results.invstd,
                                results.mask.value_or(at::Tensor())});
    // Only the dtype of bias takes part in the backward, so it is not saved: an in-place update of
    // bias between forward and backward is no error.
    const auto bias_dtype = bias ? static_cast<int64_t>(bias->scalar_type()) : kAbsent;
    context->saved_data["call"] =
        std::make_tuple(bias_dtype, has_residual, training, std::move(activation), parameter);
    return std::move(results.output);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return variable_list(5);
    variable_list saved = context->get_saved_variables();
    auto settings = context->saved_data["call"].toTuple();
    const auto& elements = settings->elements();
    BackwardCall call;
    call.grad_output = grad_output;
    call.input = std::move(saved[0]);
    call.weight = optional(std::move(saved[1]));
    call.save_mean = std::move(saved[2]);
    call.save_invstd = std::move(saved[3]);
    call.mask = optional(std::move(saved[4]));
    call.bias = lender_of(elements[0].toInt(), call);
    const bool has_residual = elements[1].toBool();
    call.training = elements[2].toBool();
    if (call.mask) call.activation = elements[3].toStringRef();
    call.parameter = elements[4].toDouble();
    size_t edge = 0;
    call.need_input = context->needs_input_grad(edge++);
    call.need_weight = call.weight && context->needs_input_grad(edge++);
    call.need_bias = call.bias && context->needs_input_grad(edge++);
    call.need_residual = has_residual && context->needs_input_grad(edge++);
    Gradients results;
    if (is_seen(call)) {
      results = seen_backward()(call);
    } else if (call.mask) {
      results = batchnorm_cuda::backward(std::move(call));
    } else {
      const bool passed = call.need_residual;
      call.need_residual = false;
      if (call.need_input || call.need_weight || call.need_bias) {
        results = batchnorm_cuda::backward(std::move(call));
      }
      if (passed) results.grad_residual = grad_output;
    }
    return {results.grad_input.value_or(at::Tensor()), results.grad_weight.value_or(at::Tensor()),
            results.grad_bias.value_or(at::Tensor()), results.grad_residual.value_or(at::Tensor()),
            at::Tensor()};
  }
};

bool requires_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

}  // namespace

void set_seen_backward(SeenBackward backward) { seen_backward() = std::move(backward); }

at::Tensor recorded(ForwardCall call) {
  RECORD_FUNCTION("BatchNormFunction", {});
  const at::Tensor input = call.input;
  const OptionalTensor weight = call.weight, bias = call.bias, residual = call.residual;
  if (!at::GradMode::is_enabled() || !(input.requires_grad() || requires_grad(weight) ||
                                       requires_grad(bias) || requires_grad(residual))) {
    return batchnorm_cuda::forward(std::move(call)).output;
  }
  call.need_mask = call.relu;
  return BatchNormFunction::apply(input, weight, bias, residual, call);
}

}  // namespace batchnorm_cuda
