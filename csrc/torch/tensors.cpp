#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "../rank_params.h"
#include "device_context.h"
#include "dispatch.h"

namespace batchnorm_cuda {
namespace {

bool same_memory_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Forward-mode AD and torch.func pass tensors that stand for zeros or for negated values without
// holding them. Looks before it asks the dispatcher, which costs more than the look.
at::Tensor materialized(at::Tensor tensor) {
  if (tensor._is_zerotensor()) return allocate_zeros(tensor.sizes(), tensor.options());
  if (tensor.is_neg()) return tensor.resolve_neg();
  return tensor;
}

}  // namespace

void check_launch(LaunchStatus status, const char* kernel) {
  TORCH_CHECK(status == 0, "batch_norm: launching ", kernel, " failed: ", describe_status(status));
}

at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

at::Tensor allocate_like(const at::Tensor& tensor) { return at::empty_like(tensor); }

at::Tensor allocate_zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::zeros(sizes, options);
}

at::Tensor dense(at::Tensor tensor) {
  tensor = materialized(std::move(tensor));
  if (tensor.is_non_overlapping_and_dense()) return tensor;
  return tensor.contiguous(tensor.suggest_memory_format());
}

at::Tensor dense_like(at::Tensor tensor, const at::Tensor& like) {
  tensor = materialized(std::move(tensor));
  if (same_memory_order(tensor, like)) return tensor;
  return allocate_like(like).copy_(tensor);
}

at::Tensor on_boundary(at::Tensor tensor) {
  if (shift_of(tensor) == 0) return tensor;
  return allocate_like(tensor).copy_(tensor);
}

int shift_of(const at::Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return static_cast<int>(address % kWindowBytes / tensor.element_size());
}

Problem describe(Op op, const at::Tensor& input) {
  Problem problem;
  problem.op = op;
  problem.dtype = to_dtype(input.scalar_type());
  problem.c = input.size(1);
  problem.output_shift = -1;
  if (input.numel() == 0) return problem;
  problem.s = problem.c == 1 ? input.numel() : input.stride(1);
  problem.n = input.numel() / (problem.c * problem.s);
  problem.input_shift = shift_of(input);
  return problem;
}

at::TensorOptions statistics_options(const at::Tensor& input) {
  const at::ScalarType type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return input.options().dtype(type);
}

int64_t moments_values(const at::Tensor& input) {
  const int64_t c = input.size(1);
  return input.scalar_type() == at::kDouble ? MomentsRow<double>{nullptr, c}.values()
                                            : MomentsRow<float>{nullptr, c}.values();
}

int64_t mask_bytes_of(const at::Tensor& input) {
  return mask_bytes(input.numel(), kWindowBytes / input.element_size());
}

at::Tensor sums_of(const at::Tensor& input) {
  return allocate({2, input.size(1)}, statistics_options(input));
}

bool is_packed(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor._is_zerotensor() && !tensor.is_neg();
}

OptionalTensor packed(OptionalTensor tensor) {
  if (!tensor || is_packed(*tensor)) return tensor;
  return materialized(std::move(*tensor)).contiguous();
}

ParamPointer param_pointer(const at::Tensor& tensor) {
  return {tensor.data_ptr(), to_dtype(tensor.scalar_type())};
}

ParamPointer param_pointer(const OptionalTensor& tensor) {
  return tensor ? param_pointer(*tensor) : ParamPointer{};
}

Workspace allocate_workspace(const Plan& plan, const at::Tensor& input) {
  Workspace workspace;
  if (plan.workspace_bytes > 0) {
    workspace.bytes = allocate({plan.workspace_bytes}, input.options().dtype(at::kByte));
  }
  if (plan.strategy == Strategy::kTeam && plan.team.sync_words > 0) {
    workspace.sync = sync_words(input.device(), plan.team.sync_words);
  }
  return workspace;
}

}  // namespace batchnorm_cuda
