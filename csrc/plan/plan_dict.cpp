#include "plan_dict.h"

#include "plan_candidates.h"
#include "plan_names.h"

namespace batchnorm_cuda {
namespace {

// Visits every field of DeviceInfo by name: one list for both directions.
template <typename Info, typename F>
void visit_fields(Info& d, F&& f) {
  f("name", d.name);
  f("compute_major", d.compute_major);
  f("compute_minor", d.compute_minor);
  f("sm_count", d.sm_count);
  f("max_threads_per_sm", d.max_threads_per_sm);
  f("registers_per_sm", d.registers_per_sm);
  f("shared_bytes_per_sm", d.shared_bytes_per_sm);
  f("shared_bytes_per_block", d.shared_bytes_per_block);
  f("shared_bytes_per_block_optin", d.shared_bytes_per_block_optin);
  f("l2_bytes", d.l2_bytes);
  f("max_grid", d.max_grid);
  f("cooperative", d.cooperative);
  f("max_cluster", d.max_cluster);
  f("clusters_of_2", d.clusters_of_2);
  f("clusters_of_4", d.clusters_of_4);
  f("clusters_of_8", d.clusters_of_8);
}

// The same of the cost model: `along_s.round.forward` and the like in a walk's costs.
template <typename Walk, typename F>
void visit_walk(Walk& walk, const std::string& name, F&& f) {
  f(name + ".rate", walk.rate);
  f(name + ".elementwise", walk.elementwise);
  f(name + ".round.forward", walk.round.forward);
  f(name + ".round.backward", walk.round.backward);
}
template <typename Model, typename F>
void visit_costs(Model& m, F&& f) {
  f("launch", m.launch);
  f("stage_launch", m.stage_launch);
  f("grid_wait", m.grid_wait);
  f("cluster_wait", m.cluster_wait);
  f("grid_flag", m.grid_flag);
  f("slot_rate", m.slot_rate);
  f("sm_rate", m.sm_rate);
  f("streamed", m.streamed);
  f("narrow", m.narrow);
  f("wide", m.wide);
  f("reduce", m.reduce);
  f("merge_row", m.merge_row);
  visit_walk(m.along_s, "along_s", f);
  visit_walk(m.runs, "runs", f);
  visit_walk(m.along_c, "along_c", f);
  visit_walk(m.along_row, "along_row", f);
}

NamedValues to_values(const Traversal& t) {
  NamedValues result;
  put(result, "pattern", name_of(kPatterns, t.pattern));
  put(result, "exact", t.exact);
  put(result, "index_bits", t.index_bits);
  put(result, "shift", t.shift);
  put(result, "threads_x", t.threads_x);
  put(result, "threads_y", t.threads_y);
  put(result, "row_windows", t.row_windows);
  put(result, "rows", t.rows);
  put(result, "row_repeat", t.row_repeat);
  put(result, "folds", t.folds);
  put(result, "channel_blocks", t.channel_blocks);
  put(result, "segments", t.segments);
  put(result, "splits", t.splits);
  put(result, "work", t.work);
  put(result, "per_split", t.per_split);
  put(result, "spare", t.spare);
  put(result, "tasks", t.tasks);
  put(result, "grid", t.grid);
  put(result, "shared_bytes", t.shared_bytes);
  return result;
}

NamedValues to_values(const Team& team) {
  NamedValues result;
  put(result, "pattern", name_of(kPatterns, team.pattern));
  put(result, "traversal", to_values(team.traversal));
  put(result, "scope", name_of(kScopes, team.scope));
  put(result, "size", team.size);
  put(result, "teams", team.teams);
  put(result, "rounds", team.rounds);
  put(result, "grid", team.grid);
  put(result, "tensors", team.tensors);
  put(result, "two_level", team.two_level);
  put(result, "register_windows", team.register_windows);
  put(result, "shared_windows", team.shared_windows);
  put(result, "blocks_per_sm", team.blocks_per_sm);
  put(result, "shared_bytes", team.shared_bytes);
  put(result, "exchange_bytes", team.exchange_bytes);
  put(result, "sync_words", team.sync_words);
  put(result, "streamed_bytes", team.streamed_bytes);
  return result;
}

// What is forced, as options_from_values takes it.
NamedValues to_values(const PlanOptions& options) {
  NamedValues result;
  if (options.index_bits > 0) put(result, "index_bits", options.index_bits);
  if (options.splits > 0) put(result, "splits", options.splits);
  put(result, "strategy", name_of(kStrategies, options.strategy));
  if (options.strategy == Strategy::kTwoPass) return result;
  put(result, "scope", name_of(kScopes, options.scope));
  put(result, "team_size", options.team_size);
  if (options.slab > 0) put(result, "slab", options.slab);
  if (options.pattern) put(result, "pattern", name_of(kPatterns, *options.pattern));
  return result;
}

NamedValues to_values(const PlanCost& cost) {
  NamedValues result;
  put(result, "launches", cost.launches);
  put(result, "transfers", cost.transfers);
  put(result, "rereads", cost.rereads);
  put(result, "idle", cost.idle);
  put(result, "code", cost.code);
  put(result, "waits", cost.waits);
  return result;
}

NamedValues to_values(const Plan& plan) {
  NamedValues result;
  put(result, "strategy", name_of(kStrategies, plan.strategy));
  put(result, "reason", plan.reason);
  put(result, "pattern", name_of(kPatterns, plan.pattern));
  put(result, "vec", plan.vec);
  put(result, "launches", plan.launches);
  put(result, "workspace_bytes", plan.workspace_bytes);
  put(result, "compulsory_bytes", plan.compulsory_bytes);
  put(result, "reread_bytes", plan.reread_bytes);
  put(result, "predicted_bytes", plan.predicted_bytes);
  put(result, "cost", to_values(plan.cost));
  if (plan.strategy == Strategy::kTeam) {
    put(result, "team", to_values(plan.team));
    return result;
  }
  if (plan.has_reduce) {
    put(result, "reduce", to_values(plan.reduce));
    NamedValues merge;
    put(merge, "rows", plan.merge.rows);
    put(merge, "threads_x", plan.merge.threads_x);
    put(merge, "threads_y", plan.merge.threads_y);
    put(merge, "grid", plan.merge.grid);
    put(merge, "shared_bytes", plan.merge.shared_bytes);
    put(result, "merge", merge);
  }
  if (plan.has_elementwise) put(result, "elementwise", to_values(plan.elementwise));
  return result;
}

}  // namespace

NamedValues to_values(const DeviceInfo& device) {
  NamedValues result;
  visit_fields(device, [&](const char* key, const auto& value) { put(result, key, value); });
  return result;
}

PlanOptions options_from_values(NamedValues left) {
  PlanOptions parsed;
  take(left, "index_bits", parsed.index_bits);
  take(left, "splits", parsed.splits);
  take(left, "team_size", parsed.team_size);
  take(left, "slab", parsed.slab);
  std::string strategy = "auto", scope = "auto", pattern = "auto";
  take(left, "strategy", strategy);
  take(left, "scope", scope);
  take(left, "pattern", pattern);
  parsed.strategy = value_of(kStrategies, "strategy", strategy, "auto, two_pass or team");
  parsed.scope = value_of(kScopes, "scope", scope, "auto, block, cluster or grid");
  if (pattern != "auto") {
    parsed.pattern = value_of(kPatterns, "pattern", pattern, "auto, along_s, along_c or along_row");
  }
  check_empty(left, "options");
  return parsed;
}

namespace {

// Takes the problem's part out of `left`.
Problem take_problem(const std::string& op, int64_t n, int64_t c, int64_t s,
                     const std::string& dtype, NamedValues& left) {
  Problem problem;
  problem.op = value_of(kOps, "op", op,
                        "forward, backward or double_backward followed by _training or _eval");
  problem.dtype = value_of(kDtypes, "dtype", dtype, "float16, bfloat16, float32 or float64");
  problem.n = n;
  problem.c = c;
  problem.s = s;
  take(left, "input_shift", problem.input_shift);
  take(left, "grad_output_shift", problem.grad_output_shift);
  take(left, "output_shift", problem.output_shift);
  take(left, "need_sums", problem.need_sums);
  take(left, "grad_grad_input_shift", problem.grad_grad_input_shift);
  take(left, "outputs", problem.outputs);
  take(left, "fused", problem.fused);
  take(left, "mask", problem.mask);
  take(left, "residual_shift", problem.residual_shift);
  return problem;
}

DeviceInfo described(const NamedValues& device) {
  DeviceInfo result;
  NamedValues left = device;
  visit_fields(result, [&](const char* key, auto& value) { take(left, key, value); });
  check_empty(left, "device property");
  return result;
}

}  // namespace

NamedValues plan_as_values(const std::string& op, int64_t n, int64_t c, int64_t s,
                           const std::string& dtype, const NamedValues& device,
                           const NamedValues& options) {
  NamedValues left = options;
  const Problem problem = take_problem(op, n, c, s, dtype, left);
  return to_values(make_plan(problem, described(device), options_from_values(left)));
}

std::vector<NamedValues> candidates_as_values(const std::string& op, int64_t n, int64_t c,
                                              int64_t s, const std::string& dtype,
                                              const NamedValues& device, const NamedValues& options,
                                              const NamedValues& costs) {
  NamedValues left = options;
  const Problem problem = take_problem(op, n, c, s, dtype, left);
  CostModel model;
  NamedValues costs_left = costs;
  visit_costs(model,
              [&](const std::string& key, double& value) { take(costs_left, key.c_str(), value); });
  check_empty(costs_left, "cost");
  std::vector<NamedValues> result;
  for (const PlanCandidate& each :
       plan_candidates(problem, described(device), options_from_values(left), model)) {
    const Plan& plan = each.plan;
    const int64_t splits = plan.has_reduce ? plan.reduce.splits : plan.elementwise.splits;
    NamedValues& candidate = result.emplace_back();
    put(candidate, "options", to_values(each.options));
    put(candidate, "cost", plan.cost.total());
    put(candidate, "splits", plan.strategy == Strategy::kTeam ? 0 : splits);
    put(candidate, "predicted_bytes", plan.predicted_bytes);
    put(candidate, "chosen", each.chosen);
  }
  return result;
}

NamedValues cost_model_as_values() {
  NamedValues result;
  const CostModel model;
  visit_costs(model,
              [&](const std::string& key, double value) { put(result, key.c_str(), value); });
  return result;
}

}  // namespace batchnorm_cuda
