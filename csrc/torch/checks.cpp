#include "checks.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <string>

#include "../activation.h"
#include "../plan/plan_names.h"
#include "device_context.h"
#include "dispatch.h"
#include "tensors.h"
#include "text.h"

namespace batchnorm_cuda {
namespace {

at::ScalarType accumulate_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// As Python prints them.
constexpr Named<at::ScalarType> kDtypeNames[] = {{"torch.float16", at::kHalf},
                                                 {"torch.bfloat16", at::kBFloat16},
                                                 {"torch.float32", at::kFloat},
                                                 {"torch.float64", at::kDouble},
                                                 {"torch.int64", at::kLong},
                                                 {"torch.int32", at::kInt},
                                                 {"torch.int16", at::kShort},
                                                 {"torch.int8", at::kChar},
                                                 {"torch.uint8", at::kByte},
                                                 {"torch.bool", at::kBool},
                                                 {"torch.complex64", at::kComplexFloat},
                                                 {"torch.complex128", at::kComplexDouble}};
constexpr Named<at::Layout> kLayoutNames[] = {
    {"torch.sparse_coo", at::kSparse},    {"torch.sparse_csr", at::kSparseCsr},
    {"torch.sparse_csc", at::kSparseCsc}, {"torch.sparse_bsr", at::kSparseBsr},
    {"torch.sparse_bsc", at::kSparseBsc}, {"torch._mkldnn", at::kMkldnn}};

const char* dtype_name(at::ScalarType type) {
  return name_of(kDtypeNames, type, c10::toString(type));
}

const char* layout_name(at::Layout layout) {
  return name_of(kLayoutNames, layout, "another layout");
}

void check_strided(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined() && tensor.layout() == at::kStrided, "batch_norm: expected ",
                   name, " to be a strided tensor, got ",
                   tensor.defined() ? layout_name(tensor.layout()) : "an undefined tensor");
  // A null pointer means "not given" to the kernels.
  TORCH_CHECK_TYPE(!tensor.key_set().has(c10::DispatchKey::Python) || tensor.numel() == 0 ||
                       tensor.const_data_ptr() != nullptr,
                   "batch_norm: expected ", name,
                   " to have memory of its own beside an input that has, got a tensor subclass "
                   "that wraps another");
}

void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), "batch_norm: expected ", name, " to be on ",
              text(input.device()), ", the device of input, got ", text(tensor.device()));
}

void check_supported_device(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.device().type() == supported_device_type(), "batch_norm: expected ", name,
              " to be on ", text(supported_device_type()), ", got ", text(tensor.device()));
}

void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, "batch_norm: expected ", name,
                   " to have dtype ", dtype_name(expected), ", got ",
                   dtype_name(tensor.scalar_type()));
}

void check_input(const at::Tensor& input) {
  check_strided(input, "input");
  check_supported_device(input, "input");
  TORCH_CHECK_TYPE(is_supported(input.scalar_type()),
                   "batch_norm: expected input to have dtype torch.float16, torch.bfloat16, "
                   "torch.float32 or torch.float64, got ",
                   dtype_name(input.scalar_type()));
  TORCH_CHECK_VALUE(input.dim() >= 2,
                    "batch_norm: expected input to have at least 2 dimensions, got shape ",
                    text(input.sizes()));
}

void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, "batch_norm: expected ", name, " to have shape ",
                    text(expected), ", got ", text(tensor.sizes()));
}

// A gradient of the output or of the input, or a residual: like input.
void check_like_input(const at::Tensor& tensor, const char* name, const at::Tensor& input) {
  check_strided(tensor, name);
  check_same_device(tensor, name, input);
  TORCH_CHECK_TYPE(tensor.scalar_type() == input.scalar_type(), "batch_norm: expected ", name,
                   " to have dtype ", dtype_name(input.scalar_type()), ", the dtype of input, got ",
                   dtype_name(tensor.scalar_type()));
  check_shape(tensor, name, input.sizes());
}

// A per-channel vector in the input's dtype or in float32.
void check_param(const OptionalTensor& param, const char* name, const at::Tensor& input) {
  if (!param) return;
  check_strided(*param, name);
  check_same_device(*param, name, input);
  const at::ScalarType type = param->scalar_type();
  if (input.scalar_type() == at::kFloat) {
    TORCH_CHECK_TYPE(type == at::kFloat, "batch_norm: expected ", name,
                     " to have dtype torch.float32, got ", dtype_name(type));
  } else {
    TORCH_CHECK_TYPE(type == input.scalar_type() || type == at::kFloat, "batch_norm: expected ",
                     name, " to have dtype ", dtype_name(input.scalar_type()),
                     " or torch.float32, got ", dtype_name(type));
  }
  check_shape(*param, name, {input.size(1)});
}

void check_running(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                   bool training) {
  TORCH_CHECK_VALUE(mean || !var,
                    "batch_norm: expected running_mean to be given with running_var, got None");
  TORCH_CHECK_VALUE(var || !mean,
                    "batch_norm: expected running_var to be given with running_mean, got None");
  TORCH_CHECK_VALUE(training || mean,
                    "batch_norm: expected running_mean and running_var to be given when "
                    "training=False, got None");
  check_param(mean, "running_mean", input);
  check_param(var, "running_var", input);
  for (const auto& [tensor, name] : {std::pair{&mean, "running_mean"}, {&var, "running_var"}}) {
    TORCH_CHECK(!*tensor || !(*tensor)->requires_grad(), "batch_norm: expected ", name,
                " not to require grad, got a tensor with requires_grad=True");
  }
}

// A tensor of statistics or sums.
void check_accumulated(const at::Tensor& tensor, const char* name, const at::Tensor& input) {
  check_strided(tensor, name);
  check_same_device(tensor, name, input);
  check_dtype(tensor, name, accumulate_type(input));
}

void check_saved(const at::Tensor& tensor, const char* name, const at::Tensor& input) {
  check_accumulated(tensor, name, input);
  check_shape(tensor, name, {input.size(1)});
}

void check_counter(const OptionalTensor& counter, const at::Tensor& input) {
  if (!counter) return;
  check_strided(*counter, "num_batches_tracked");
  check_same_device(*counter, "num_batches_tracked", input);
  check_dtype(*counter, "num_batches_tracked", at::kLong);
  TORCH_CHECK_VALUE(counter->numel() == 1,
                    "batch_norm: expected num_batches_tracked to have one element, got shape ",
                    text(counter->sizes()));
}

void check_gathered(const at::Tensor& gathered, const at::Tensor& input) {
  check_accumulated(gathered, "gathered", input);
  const int64_t values = moments_values(input);
  TORCH_CHECK_VALUE(gathered.dim() == 2 && gathered.size(0) > 0 && gathered.size(1) == values,
                    "batch_norm: expected gathered to hold one row of ", std::to_string(values),
                    " values a rank, got shape ", text(gathered.sizes()));
}

// The mask of a ReLU that a fused forward pass of the input wrote.
void check_mask(const at::Tensor& mask, const at::Tensor& input) {
  check_strided(mask, "mask");
  check_same_device(mask, "mask", input);
  check_dtype(mask, "mask", at::kByte);
  check_shape(mask, "mask", {mask_bytes_of(input)});
}

// Of all ranks.
void check_totals(const at::Tensor& sums, const OptionalTensor& count, const at::Tensor& input) {
  check_accumulated(sums, "sums", input);
  check_shape(sums, "sums", {2, input.size(1)});
  TORCH_CHECK_VALUE(count, "batch_norm: expected count to be given with sums, got None");
  check_strided(*count, "count");
  check_same_device(*count, "count", input);
  check_dtype(*count, "count", at::kLong);
  check_shape(*count, "count", {1});
}

void check_activation(const std::string& name) {
  TORCH_CHECK_VALUE(is_activation(name),
                    "batch_norm: expected activation to be one that there is, got \"", name, "\"");
}

// The gradient of a parameter has its dtype.
void check_there(const OptionalTensor& param, const char* name, bool needed) {
  TORCH_CHECK_VALUE(param || !needed, "batch_norm: expected ", name,
                    " to be given where its gradient is wanted, got None");
}

}  // namespace

void check(const ForwardCall& call) {
  const at::Tensor& input = call.input;
  check_input(input);
  check_param(call.weight, "weight", input);
  check_param(call.bias, "bias", input);
  check_running(input, call.running_mean, call.running_var, call.training);
  TORCH_CHECK_VALUE(std::isfinite(call.eps) && call.eps >= 0,
                    "batch_norm: expected eps to be finite and not negative, got ", text(call.eps));
  check_counter(call.num_batches_tracked, input);
  TORCH_CHECK_VALUE(
      call.momentum || !call.training || !call.running_mean || call.num_batches_tracked,
      "batch_norm: expected momentum to be a number where num_batches_tracked is not "
      "given, got None");
  if (call.gathered) check_gathered(*call.gathered, input);
  if (call.residual) check_like_input(*call.residual, "residual", input);
  check_activation(call.activation);
}

void check(const BackwardCall& call) {
  const at::Tensor& input = call.input;
  check_input(input);
  check_like_input(call.grad_output, "grad_output", input);
  check_param(call.weight, "weight", input);
  check_param(call.bias, "bias", input);
  check_saved(call.save_mean, "save_mean", input);
  check_saved(call.save_invstd, "save_invstd", input);
  check_there(call.weight, "weight", call.need_weight);
  check_there(call.bias, "bias", call.need_bias);
  if (call.sums) check_totals(*call.sums, call.count, input);
  if (call.mask) check_mask(*call.mask, input);
  check_activation(call.activation);
}

void check(const DoubleBackwardCall& call) {
  const at::Tensor& input = call.input;
  check_input(input);
  if (call.grad_grad_input) check_like_input(*call.grad_grad_input, "grad_grad_input", input);
  check_param(call.grad_grad_weight, "grad_grad_weight", input);
  check_param(call.grad_grad_bias, "grad_grad_bias", input);
  if (call.grad_output) check_like_input(*call.grad_output, "grad_output", input);
  check_param(call.weight, "weight", input);
  check_saved(call.save_mean, "save_mean", input);
  check_saved(call.save_invstd, "save_invstd", input);
  TORCH_CHECK_VALUE(call.grad_output || !(call.need_input || call.need_weight),
                    "batch_norm: expected grad_output to be given where the gradient of input or "
                    "weight is wanted, got None");
  check_there(call.weight, "weight", call.need_weight);
}

void check_statistics(const at::Tensor& input) { check_input(input); }

void check_sum_ranks(const at::Tensor& gathered) {
  check_strided(gathered, "gathered");
  check_supported_device(gathered, "gathered");
  TORCH_CHECK_TYPE(
      gathered.scalar_type() == at::kFloat || gathered.scalar_type() == at::kDouble,
      "batch_norm: expected gathered to have dtype torch.float32 or torch.float64, got ",
      dtype_name(gathered.scalar_type()));
  TORCH_CHECK_VALUE(gathered.dim() >= 2 && gathered.size(0) > 0,
                    "batch_norm: expected gathered to have the ranks as its first dimension, got "
                    "shape ",
                    text(gathered.sizes()));
}

}  // namespace batchnorm_cuda
