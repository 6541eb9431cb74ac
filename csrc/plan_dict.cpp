#include "plan_dict.h"

#include <stdexcept>

#include "plan_candidates.h"

namespace py = pybind11;

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

// The same of the cost model: `along_s.deep.forward` and the like in a walk's costs.
template <typename Walk, typename F>
void visit_walk(Walk& walk, const std::string& name, F&& f) {
  f(name + ".rate", walk.rate);
  f(name + ".elementwise", walk.elementwise);
  const auto visit_pass = [&](const char* depth, auto& pass) {
    f(name + depth + ".forward", pass.forward);
    f(name + depth + ".backward", pass.backward);
  };
  visit_pass(".middle", walk.middle);
  visit_pass(".deep", walk.deep);
  visit_pass(".stream", walk.stream);
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
  f("deep_rate", m.deep_rate);
  f("narrow", m.narrow);
  f("wide", m.wide);
  f("reduce", m.reduce);
  f("merge_row", m.merge_row);
  visit_walk(m.along_s, "along_s", f);
  visit_walk(m.runs, "runs", f);
  visit_walk(m.along_c, "along_c", f);
  visit_walk(m.along_row, "along_row", f);
}

// Takes what it knows out of `left`; what stays was misspelt.
template <typename T>
void take(py::dict& left, const char* key, T& value) {
  if (!left.contains(key)) return;
  value = left[key].cast<T>();
  left.attr("pop")(key);
}

void check_empty(const py::dict& left, const char* what) {
  if (left.empty()) return;
  throw py::value_error(std::string("make_plan: unknown ") + what + " " +
                        py::repr(left).cast<std::string>());
}

Op parse_op(const std::string& op) {
  if (op == "forward_training") return Op::kForwardTraining;
  if (op == "forward_eval") return Op::kForwardEval;
  if (op == "backward_training") return Op::kBackwardTraining;
  if (op == "backward_eval") return Op::kBackwardEval;
  if (op == "double_backward_training") return Op::kDoubleBackwardTraining;
  if (op == "double_backward_eval") return Op::kDoubleBackwardEval;
  throw py::value_error(
      "make_plan: expected op to be forward, backward or double_backward followed by _training or "
      "_eval, got " +
      op);
}

Dtype parse_dtype(const std::string& dtype) {
  if (dtype == "float16") return Dtype::kHalf;
  if (dtype == "bfloat16") return Dtype::kBFloat16;
  if (dtype == "float32") return Dtype::kFloat;
  if (dtype == "float64") return Dtype::kDouble;
  throw py::value_error(
      "make_plan: expected dtype to be float16, bfloat16, float32 or float64, got " + dtype);
}

const char* scope_name(Scope scope) {
  return scope == Scope::kBlock ? "block" : scope == Scope::kCluster ? "cluster" : "grid";
}

const char* pattern_name(Pattern pattern) {
  return pattern == Pattern::kAlongS   ? "along_s"
         : pattern == Pattern::kAlongC ? "along_c"
                                       : "along_row";
}

py::dict to_dict(const Traversal& t) {
  using py::literals::operator""_a;
  return py::dict("pattern"_a = pattern_name(t.pattern), "exact"_a = t.exact,
                  "index_bits"_a = t.index_bits, "shift"_a = t.shift, "threads_x"_a = t.threads_x,
                  "threads_y"_a = t.threads_y, "row_windows"_a = t.row_windows, "rows"_a = t.rows,
                  "row_repeat"_a = t.row_repeat, "channel_blocks"_a = t.channel_blocks,
                  "segments"_a = t.segments, "splits"_a = t.splits, "per_split"_a = t.per_split,
                  "edge_runs"_a = t.edge_runs, "tasks"_a = t.tasks, "grid"_a = t.grid,
                  "shared_bytes"_a = t.shared_bytes);
}

const char* depth_name(Depth depth) {
  switch (depth) {
    case Depth::kMiddle:
      return "middle";
    case Depth::kDeep:
      return "deep";
    default:
      return "stream";
  }
}

py::dict to_dict(const Team& team) {
  using py::literals::operator""_a;
  return py::dict("pattern"_a = pattern_name(team.pattern), "traversal"_a = to_dict(team.traversal),
                  "scope"_a = scope_name(team.scope), "size"_a = team.size, "teams"_a = team.teams,
                  "rounds"_a = team.rounds, "grid"_a = team.grid, "tensors"_a = team.tensors,
                  "depth"_a = depth_name(team.depth), "two_level"_a = team.two_level,
                  "register_windows"_a = team.register_windows,
                  "shared_windows"_a = team.shared_windows, "blocks_per_sm"_a = team.blocks_per_sm,
                  "shared_bytes"_a = team.shared_bytes, "exchange_bytes"_a = team.exchange_bytes,
                  "sync_words"_a = team.sync_words, "streamed_bytes"_a = team.streamed_bytes);
}

Strategy parse_strategy(const std::string& name) {
  if (name == "auto") return Strategy::kAuto;
  if (name == "two_pass") return Strategy::kTwoPass;
  if (name == "team") return Strategy::kTeam;
  throw py::value_error("make_plan: expected strategy to be auto, two_pass or team, got " + name);
}

Scope parse_scope(const std::string& name) {
  if (name == "auto") return Scope::kAuto;
  for (const Scope scope : {Scope::kBlock, Scope::kCluster, Scope::kGrid}) {
    if (name == scope_name(scope)) return scope;
  }
  throw py::value_error("make_plan: expected scope to be auto, block, cluster or grid, got " +
                        name);
}

std::optional<Depth> parse_depth(const std::string& name) {
  if (name == "auto") return std::nullopt;
  for (const Depth depth : {Depth::kMiddle, Depth::kDeep, Depth::kStream}) {
    if (name == depth_name(depth)) return depth;
  }
  throw py::value_error("make_plan: expected depth to be auto, middle, deep or stream, got " +
                        name);
}

std::optional<Pattern> parse_pattern(const std::string& name) {
  if (name == "auto") return std::nullopt;
  for (const Pattern pattern : {Pattern::kAlongS, Pattern::kAlongC, Pattern::kAlongRow}) {
    if (name == pattern_name(pattern)) return pattern;
  }
  throw py::value_error(
      "make_plan: expected pattern to be auto, along_s, along_c or along_row, got " + name);
}

// What is forced, as options_from_dict takes it.
py::dict to_dict(const PlanOptions& options) {
  py::dict result;
  if (options.index_bits > 0) result["index_bits"] = options.index_bits;
  if (options.splits > 0) result["splits"] = options.splits;
  result["strategy"] = options.strategy == Strategy::kTeam ? "team" : "two_pass";
  if (options.strategy == Strategy::kTwoPass) return result;
  result["scope"] = scope_name(options.scope);
  result["team_size"] = options.team_size;
  if (options.depth) result["depth"] = depth_name(*options.depth);
  if (options.slab > 0) result["slab"] = options.slab;
  if (options.pattern) result["pattern"] = pattern_name(*options.pattern);
  return result;
}

py::dict to_dict(const Plan& plan) {
  using py::literals::operator""_a;
  py::dict result("strategy"_a = plan.strategy == Strategy::kTeam ? "team" : "two_pass",
                  "reason"_a = plan.reason, "pattern"_a = pattern_name(plan.pattern),
                  "vec"_a = plan.vec, "launches"_a = plan.launches,
                  "workspace_bytes"_a = plan.workspace_bytes,
                  "compulsory_bytes"_a = plan.compulsory_bytes,
                  "reread_bytes"_a = plan.reread_bytes, "predicted_bytes"_a = plan.predicted_bytes);
  if (plan.strategy == Strategy::kTeam) {
    result["team"] = to_dict(plan.team);
    return result;
  }
  if (plan.has_reduce) {
    result["reduce"] = to_dict(plan.reduce);
    result["merge"] = py::dict("rows"_a = plan.merge.rows, "threads_x"_a = plan.merge.threads_x,
                               "threads_y"_a = plan.merge.threads_y, "grid"_a = plan.merge.grid,
                               "shared_bytes"_a = plan.merge.shared_bytes);
  }
  if (plan.has_elementwise) result["elementwise"] = to_dict(plan.elementwise);
  return result;
}

}  // namespace

py::dict to_dict(const DeviceInfo& device) {
  py::dict result;
  visit_fields(device, [&](const char* key, const auto& value) { result[key] = value; });
  return result;
}

PlanOptions options_from_dict(const py::dict& options) {
  PlanOptions parsed;
  py::dict left(options.attr("copy")());
  take(left, "index_bits", parsed.index_bits);
  take(left, "splits", parsed.splits);
  take(left, "team_size", parsed.team_size);
  take(left, "slab", parsed.slab);
  std::string strategy = "auto", scope = "auto", depth = "auto", pattern = "auto";
  take(left, "strategy", strategy);
  take(left, "scope", scope);
  take(left, "depth", depth);
  take(left, "pattern", pattern);
  parsed.strategy = parse_strategy(strategy);
  parsed.scope = parse_scope(scope);
  parsed.depth = parse_depth(depth);
  parsed.pattern = parse_pattern(pattern);
  check_empty(left, "options");
  return parsed;
}

namespace {

// Takes the problem's part out of `left`.
Problem take_problem(const std::string& op, int64_t n, int64_t c, int64_t s,
                     const std::string& dtype, py::dict& left) {
  Problem problem;
  problem.op = parse_op(op);
  problem.dtype = parse_dtype(dtype);
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

DeviceInfo described(const DeviceInfo& base, const py::dict& device) {
  DeviceInfo result = base;
  py::dict left(device.attr("copy")());
  visit_fields(result, [&](const char* key, auto& value) { take(left, key, value); });
  check_empty(left, "device property");
  return result;
}

}  // namespace

py::dict plan_as_dict(const std::string& op, int64_t n, int64_t c, int64_t s,
                      const std::string& dtype, const DeviceInfo& base, const py::dict& device,
                      const py::dict& options) {
  py::dict left(options.attr("copy")());
  const Problem problem = take_problem(op, n, c, s, dtype, left);
  return to_dict(make_plan(problem, described(base, device), options_from_dict(left)));
}

std::vector<py::dict> candidates_as_dicts(const std::string& op, int64_t n, int64_t c, int64_t s,
                                          const std::string& dtype, const py::dict& device,
                                          const py::dict& options, const py::dict& costs) {
  using py::literals::operator""_a;
  py::dict left(options.attr("copy")());
  const Problem problem = take_problem(op, n, c, s, dtype, left);
  CostModel model;
  py::dict costs_left(costs.attr("copy")());
  visit_costs(model,
              [&](const std::string& key, double& value) { take(costs_left, key.c_str(), value); });
  check_empty(costs_left, "cost");
  std::vector<py::dict> result;
  for (const PlanCandidate& each :
       plan_candidates(problem, described({}, device), options_from_dict(left), model)) {
    const Plan& plan = each.plan;
    const int64_t splits = plan.has_reduce ? plan.reduce.splits : plan.elementwise.splits;
    result.push_back(py::dict("options"_a = to_dict(each.options), "cost"_a = plan.cost,
                              "splits"_a = plan.strategy == Strategy::kTeam ? 0 : splits,
                              "predicted_bytes"_a = plan.predicted_bytes,
                              "chosen"_a = each.chosen));
  }
  return result;
}

py::dict cost_model_as_dict() {
  py::dict result;
  const CostModel model;
  visit_costs(model, [&](const std::string& key, double value) { result[key.c_str()] = value; });
  return result;
}

}  // namespace batchnorm_cuda
