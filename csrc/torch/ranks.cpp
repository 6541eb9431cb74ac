#include <c10/core/DeviceGuard.h>

#include "../plan/plan_cache.h"
#include "../plan/rank_merge.h"
#include "checks.h"
#include "device_context.h"
#include "dispatch.h"
#include "ops.h"
#include "stages.h"

namespace batchnorm_cuda {

const Plan& plan_parts(const Problem& problem, const at::Tensor& input) {
  PlanOptions options = plan_options();
  options.strategy = Strategy::kTwoPass;
  return cached_plan(problem, device_info(input.device()), options);
}

namespace {

template <typename scalar_t>
void run_moments(const Forward& f, const at::Tensor& row) {
  using acc_t = acc_type<scalar_t>;
  const cudaStream_t stream = current_stream(f.input.device());
  const Plan& plan = plan_parts(f.problem, f.input);
  const Workspace workspace = allocate_workspace(plan, f.input);
  auto merge = merge_params<MergeMomentsParams>(
      plan, collect_statistics<scalar_t>(f, plan, workspace, stream));
  merge.count = f.problem.n * f.problem.s;
  merge.moments = {static_cast<acc_t*>(row.data_ptr()), f.problem.c};
  check_launch(merges<acc_t>().moments(plan.merge, merge, stream), "merge_kernel");
}

template <typename acc_t>
void run_sum_ranks(const at::Tensor& gathered, const at::Tensor& sums) {
  SumRanksParams<acc_t> params{};
  params.ranks = static_cast<int>(gathered.size(0));
  params.columns = sums.numel();
  params.gathered = pointer_to<acc_t>(gathered);
  params.sums = static_cast<acc_t*>(sums.data_ptr());
  const RankMergeGeometry geometry = plan_rank_merge(sums.numel(), device_info(sums.device()));
  check_launch(merges<acc_t>().sum_ranks(geometry, params, current_stream(sums.device())),
               "sum_ranks_kernel");
}

}  // namespace

at::Tensor statistics(const at::Tensor& input) {
  check_statistics(input);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor row = allocate({moments_values(input)}, statistics_options(input));
  if (input.numel() == 0) return row.zero_();
  Forward f;
  f.input = dense(input);
  f.problem = describe(Op::kForwardTraining, f.input);
  dispatch_dtype(f.problem.dtype,
                 [&](auto tag) { run_moments<typename decltype(tag)::type>(f, row); });
  return row;
}

at::Tensor sum_ranks(const at::Tensor& gathered) {
  check_sum_ranks(gathered);
  const c10::DeviceGuard guard(gathered.device());
  const at::Tensor rows = gathered.contiguous();
  const at::Tensor sums = allocate(gathered.sizes().slice(1), gathered.options());
  if (sums.numel() == 0) return sums;
  if (gathered.scalar_type() == at::kDouble) {
    run_sum_ranks<double>(rows, sums);
  } else {
    run_sum_ranks<float>(rows, sums);
  }
  return sums;
}

}  // namespace batchnorm_cuda
