// From run-time dtypes to compile-time types, once for all entry points.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "../launch.h"

namespace batchnorm_cuda {

template <typename scalar_t>
struct TypeTag {
  using type = scalar_t;
};

inline bool is_supported(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble;
}

inline Dtype to_dtype(at::ScalarType type) {
  TORCH_INTERNAL_ASSERT(is_supported(type), "unchecked dtype ", c10::toString(type));
  return type == at::kHalf       ? Dtype::kHalf
         : type == at::kBFloat16 ? Dtype::kBFloat16
         : type == at::kFloat    ? Dtype::kFloat
                                 : Dtype::kDouble;
}

// Calls f(TypeTag<scalar_t>{}) with the kernels' name of the activation dtype.
template <typename F>
inline void dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kHalf:
      return f(TypeTag<__half>{});
    case Dtype::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    case Dtype::kFloat:
      return f(TypeTag<float>{});
    case Dtype::kDouble:
      return f(TypeTag<double>{});
  }
}

}  // namespace batchnorm_cuda
