#include "plan_cache.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace batchnorm_cuda {
namespace {

// Training repeats a few hundred problems at most: a network's layers, forward and backward.
constexpr size_t kMaxPlans = 1024;

std::mutex options_mutex;
PlanOptions forced_options;

using Key = std::array<int64_t, 37>;

// Everything that a plan depends on. The bindings name every field, so that one more does not
// compile until it is here.
Key key_of(const Problem& problem, const DeviceInfo& device, const PlanOptions& options) {
  const auto& [op, dtype, n, c, s, input, grad_output, output, sums, ggx, outputs, fused, mask,
               residual] = problem;
  const auto& [name, major, minor, sms, threads, registers, shared_sm, shared, shared_optin, l2,
               max_grid, cooperative, max_cluster, clusters_2, clusters_4, clusters_8] = device;
  const auto& [index_bits, splits, strategy, scope, team_size, slab, pattern] = options;
  static_cast<void>(name);
  return {static_cast<int64_t>(op),
          static_cast<int64_t>(dtype),
          n,
          c,
          s,
          input,
          grad_output,
          output,
          sums,
          ggx,
          outputs,
          fused,
          mask,
          residual,
          major,
          minor,
          sms,
          threads,
          registers,
          shared_sm,
          shared,
          shared_optin,
          l2,
          max_grid,
          cooperative,
          max_cluster,
          clusters_2,
          clusters_4,
          clusters_8,
          index_bits,
          splits,
          static_cast<int64_t>(strategy),
          static_cast<int64_t>(scope),
          team_size,
          slab,
          pattern ? static_cast<int64_t>(*pattern) : -1};
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t value : key) {
      // The constant of Fibonacci hashing, 2^64 over the golden ratio (Knuth 1973, 6.4).
      hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return static_cast<size_t>(hash);
  }
};

}  // namespace

void set_plan_options(const PlanOptions& options) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  forced_options = options;
}

PlanOptions plan_options() {
  const std::lock_guard<std::mutex> lock(options_mutex);
  return forced_options;
}

const Plan& cached_plan(const Problem& problem, const DeviceInfo& device,
                        const PlanOptions& options) {
  thread_local std::unordered_map<Key, Plan, Hash> plans;
  const Key key = key_of(problem, device, options);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  const Plan plan = make_plan(problem, device, options);
  if (plans.size() >= kMaxPlans) plans.clear();
  return plans.emplace(key, plan).first->second;
}

}  // namespace batchnorm_cuda
