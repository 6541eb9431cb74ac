// From tensors to what plans and kernels take: memory order, alignment, pointers, workspaces.
#pragma once

#include <ATen/core/Tensor.h>

#include "../launch.h"
#include "../plan/plan.h"
#include "ops.h"

namespace batchnorm_cuda {

// Throws where the status is an error.
void check_launch(LaunchStatus status, const char* kernel);

// New tensors: uninitialised, uninitialised with the memory order and options of another, and
// zeros. The functions of torch that make them are declared among most of ATen, which costs the
// compiler three times what at::Tensor does: tensors.cpp alone includes that.
at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor allocate_like(const at::Tensor& tensor);
at::Tensor allocate_zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// The tensor itself where its memory has no gaps or overlaps, else a copy in the suggested format.
// Any such tensor is [N, C, S] in memory with S the channel stride: dimensions of smaller stride
// fill S elements, the others repeat the C*S block.
at::Tensor dense(at::Tensor tensor);

// The tensor, or a copy, in the memory order of `like`.
at::Tensor dense_like(at::Tensor tensor, const at::Tensor& like);

// The tensor, or a copy, on a 16-byte boundary, as what lies beside a mask must be (fused.cuh).
at::Tensor on_boundary(at::Tensor tensor);

// Elements by which the tensor lies past a 16-byte boundary.
int shift_of(const at::Tensor& tensor);

// The geometry of a dense input, with its shift; the other tensors take no part yet. Of an empty
// one only the channels count.
Problem describe(Op op, const at::Tensor& input);

// The statistics' dtype, on the input's device.
at::TensorOptions statistics_options(const at::Tensor& input);

// Values in a rank's row of moments (rank_params.h).
int64_t moments_values(const at::Tensor& input);

// Bytes of the mask of a ReLU over a tensor like the input.
int64_t mask_bytes_of(const at::Tensor& input);

// The two sums [2, C] of a backward pass, uninitialised.
at::Tensor sums_of(const at::Tensor& input);

// Read-only parameters of any stride, packed: [C] values are cheap to copy.
bool is_packed(const at::Tensor& tensor);
OptionalTensor packed(OptionalTensor tensor);

ParamPointer param_pointer(const at::Tensor& tensor);
ParamPointer param_pointer(const OptionalTensor& tensor);

// Device memory that one call works in; both are undefined where the plan asks for none.
struct Workspace {
  at::Tensor bytes;  // partial results or a team's slots, uninitialised
  at::Tensor sync;   // see device_context.h
  template <typename T>
  T* data() const {
    return bytes.defined() ? static_cast<T*>(bytes.data_ptr()) : nullptr;
  }
  uint64_t* words() const {
    return sync.defined() ? static_cast<uint64_t*>(sync.data_ptr()) : nullptr;
  }
};

Workspace allocate_workspace(const Plan& plan, const at::Tensor& input);

}  // namespace batchnorm_cuda
