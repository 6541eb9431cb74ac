#include "refusals.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <string>

namespace batchnorm_cuda {
namespace {

std::string name_of(const Team& team) {
  return team.scope == Scope::kCluster
             ? "clusters of " + std::to_string(team.size) + " blocks"
             : "a cooperative grid of " + std::to_string(team.grid) + " blocks";
}

void warn_once(const Team& team, LaunchStatus status) {
  static std::atomic<bool> warned{false};
  if (warned.exchange(true)) return;
  const char* cost =
      "two passes, which move up to 1.5 times the bytes forward and 1.7 times backward. This is "
      "said once in a process.";
  if (status == kNotResident) {
    TORCH_WARN("batch_norm: the device holds fewer blocks of a kernel than planned in ",
               name_of(team), ". This problem is solved in ", cost);
    return;
  }
  const LaunchStatus error = -status;
  TORCH_WARN("batch_norm: the device refused to launch ", name_of(team), " (",
             name_of_status(error), ": ", describe_status(error),
             "), which its occupancy allows: it may be shared, by MPS, MIG or green contexts. ",
             "From now on this process plans without ",
             team.scope == Scope::kCluster ? "clusters" : "cooperative grids",
             " on it; what needs them is solved in ", cost);
}

}  // namespace

const Plan& plan_after_refusal(const Problem& problem, c10::Device device, const Team& team,
                               LaunchStatus status) {
  warn_once(team, status);
  PlanOptions options = plan_options();
  if (status == kNotResident) {
    options.strategy = Strategy::kTwoPass;
  } else {
    refuse_scope(device, team.scope);
  }
  return cached_plan(problem, device_info(device), options);
}

}  // namespace batchnorm_cuda
