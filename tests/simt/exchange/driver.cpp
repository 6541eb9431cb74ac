// driver CASE FAULT SEEDS: trains a forward pass by the team kernels, several launches on the same
// words of the workspace, with planted fault number FAULT (-1: none). Prints one line a seed: "ok",
// "fault: ...", "status: ..." for a launch that was refused, or "wrong: ..." for results that are
// off the reference in double. CASE merge_rows merges the partial results of the stage kernels.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "comparison.h"
#include "device_query.h"
#include "host_case.h"
#include "kernel_table.h"
#include "planted.h"

int simt_exchange::planted = -1;

namespace {

using batchnorm_cuda::Dtype;
using batchnorm_cuda::Scope;
using bn_standalone::check;
using bn_standalone::Comparison;
using bn_standalone::DeviceBuffer;
using bn_standalone::HostCase;

constexpr int kLaunches = 3;

// A problem, and how teams are to work on it.
struct Case {
  const char* name;
  int64_t n, c, s;
  Scope scope;
  int team_size;
  int64_t max_grid = 1 << 20;  // of the plan: makes rounds where every block is a team
  int launch_sms = 4;          // of the device launched on; the plan is for 4
  bool two_level = false;      // which the plan chooses for larger teams
};

constexpr Case kCases[] = {
    {"block_s", 4, 6, 1024, Scope::kBlock, 1, 2},
    {"block_s_narrow", 4, 24, 256, Scope::kBlock, 1, 2},  // four channels a block
    {"block_c", 70, 192, 1, Scope::kBlock, 1, 2},
    {"block_row", 12, 24, 49, Scope::kBlock, 1, 2},
    {"cluster_s", 4, 6, 1088, Scope::kCluster, 3},
    {"cluster_c", 70, 192, 1, Scope::kCluster, 3},
    {"cluster_row", 16, 24, 49, Scope::kCluster, 3},
    {"grid_s", 4, 6, 1088, Scope::kGrid, 3},
    {"grid_c", 70, 192, 1, Scope::kGrid, 3},
    {"grid_row", 16, 24, 49, Scope::kGrid, 3},       // rows of threads that are no part of a warp
    {"grid_row_short", 70, 96, 2, Scope::kGrid, 3},  // rows that a warp holds several of
    {"grid_c_two_level", 70, 192, 1, Scope::kGrid, 3, 1 << 20, 4, true},
    {"grid_row_two_level", 16, 24, 49, Scope::kGrid, 3, 1 << 20, 4, true},
    {"grid_not_resident", 4, 6, 1088, Scope::kGrid, 3, 1 << 20, 2},
};

const Case& find_case(const char* name) {
  for (const Case& each : kCases) {
    if (std::strcmp(each.name, name) == 0) return each;
  }
  throw std::runtime_error(std::string("no case ") + name);
}

batchnorm_cuda::Team plan_case(const Case& c, batchnorm_cuda::Problem* problem) {
  batchnorm_cuda::DeviceInfo device;
  check(static_cast<cudaError_t>(batchnorm_cuda::query_device(0, &device)), "query_device");
  device.max_grid = c.max_grid;
  problem->n = c.n;
  problem->c = c.c;
  problem->s = c.s;
  batchnorm_cuda::PlanOptions options;
  options.strategy = batchnorm_cuda::Strategy::kTeam;
  options.scope = c.team_size > 1 ? c.scope : Scope::kAuto;
  options.team_size = c.team_size;
  const batchnorm_cuda::Plan plan = make_plan(*problem, device, options);
  batchnorm_cuda::Team team = plan.team;
  if (c.two_level) {
    team.two_level = true;
    team.exchange_bytes = (team.grid + team.teams) * 2 * team.slot_values * sizeof(float);
  }
  // The faults of an exchange need rounds to show, and at least two teams.
  if (plan.strategy != batchnorm_cuda::Strategy::kTeam || team.scope != c.scope ||
      team.rounds < 3 || team.teams < 2) {
    throw std::runtime_error("the plan has no team of this scope with three rounds");
  }
  return team;
}

// The workspace of a kGrid launch, as the operator keeps it from launch to launch.
struct Workspace {
  explicit Workspace(const batchnorm_cuda::Team& team)
      : slots(static_cast<size_t>(team.exchange_bytes) / sizeof(float)),
        sync(std::vector<uint64_t>(static_cast<size_t>(team.sync_words))) {}
  DeviceBuffer<float> slots;
  DeviceBuffer<uint64_t> sync;
};

// A channel of 70 values goes through seven merges, of five roundings each on M2 and so half of
// that on invstd: 18 units of the result, where Comparison allows 8 for each of its magnitude.
constexpr double kMerges = 3;

std::string compare(const HostCase<float>& host, const std::vector<float>& output,
                    const std::vector<float>& mean, const std::vector<float>& invstd) {
  Comparison outputs("output", Dtype::kFloat, Dtype::kFloat);
  Comparison means("mean", Dtype::kFloat, Dtype::kFloat);
  Comparison invstds("invstd", Dtype::kFloat, Dtype::kFloat);
  for (int64_t c = 0; c < host.problem.c; ++c) {
    const std::vector<double> x = host.values(host.x, c), got = host.values(output, c);
    const bn_standalone::Moments moments = bn_standalone::moments_of(x);
    const double inverse = moments.invstd(bn_standalone::kEps);
    means.add(mean[static_cast<size_t>(c)], {moments.mean, moments.mean_magnitude});
    invstds.add(invstd[static_cast<size_t>(c)], {inverse, kMerges * inverse});
    for (size_t i = 0; i < x.size(); ++i) {
      bn_standalone::Quantity y = normalized(x[i], moments.mean, inverse, host.channel(c));
      y.magnitude *= kMerges;
      outputs.add(got[i], y);
    }
  }
  if (!outputs.passed()) return "wrong: output";
  if (!means.passed()) return "wrong: mean";
  return invstds.passed() ? "ok" : "wrong: invstd";
}

std::string launch(const batchnorm_cuda::Team& team, const HostCase<float>& host,
                   const Workspace& workspace) {
  const auto channels = static_cast<size_t>(host.problem.c);
  const DeviceBuffer<float> input(host.x), weight(host.weight), bias(host.bias);
  DeviceBuffer<float> output(host.x.size()), mean(channels), invstd(channels);
  batchnorm_cuda::TeamForwardParams<float> params{};
  params.team = team;
  params.input = input.data();
  params.output = output.data();
  params.weight = {weight.data(), Dtype::kFloat};
  params.bias = {bias.data(), Dtype::kFloat};
  params.statistics.c = host.problem.c;
  params.statistics.count = host.problem.n * host.problem.s;
  params.statistics.eps = bn_standalone::kEps;
  params.statistics.save_mean = mean.data();
  params.statistics.save_invstd = invstd.data();
  if (team.scope == Scope::kGrid) {
    params.slots = workspace.slots.data();
    params.sync = workspace.sync.data();
  }
  const batchnorm_cuda::LaunchStatus status = launch_team_forward(params, cudaStream_t());
  if (status != 0) {
    const int error = batchnorm_cuda::is_refused(status) ? -status : status;
    return std::string("status: ") + cudaGetErrorName(static_cast<cudaError_t>(error));
  }
  return compare(host, output.download(), mean.download(), invstd.download());
}

std::string run(const Case& c, const std::vector<std::unique_ptr<HostCase<float>>>& inputs,
                const batchnorm_cuda::Team& team) {
  simt::DeviceDescription device;
  device.sm_count = c.launch_sms;
  device.registers_per_thread = 128;  // two blocks an SM, as the kernels are compiled for
  simt::set_device(device);
  const Workspace workspace(team);
  for (const auto& input : inputs) {
    try {
      const std::string result = launch(team, *input, workspace);
      if (result != "ok") return result;
    } catch (const simt::Fault& fault) {
      return std::string("fault: ") + fault.what();
    }
  }
  return "ok";
}

// Partial results of a few values each, as the statistics kernel leaves them for three channels on
// 132 SMs, merged: more rows than the block has threads for at once.
std::string merge_rows() {
  batchnorm_cuda::DeviceInfo device;
  device.sm_count = 132;
  batchnorm_cuda::Problem problem;
  problem.n = 1 << 20;
  problem.c = 3;
  problem.s = 1;
  batchnorm_cuda::PlanOptions options;
  options.strategy = batchnorm_cuda::Strategy::kTwoPass;
  const batchnorm_cuda::MergeGeometry merge = make_plan(problem, device, options).merge;
  if (merge.rows <= merge.threads_y) throw std::runtime_error("the plan has few rows to merge");
  const int64_t values = 5, plane = merge.rows * problem.c;
  const batchnorm_cuda::Problem part{problem.op, problem.dtype, values, plane, 1};
  const HostCase<float> host(part, 0);
  std::vector<float> partials(static_cast<size_t>(4 * plane));  // count, shift, mean, M2
  std::vector<std::vector<double>> channels(static_cast<size_t>(problem.c));
  for (int64_t i = 0; i < plane; ++i) {
    const std::vector<double> x = host.values(host.x, i);
    const bn_standalone::Moments moments = bn_standalone::moments_of(x);
    const double fields[] = {double{values}, 0, moments.mean, moments.var * values};
    for (int f = 0; f < 4; ++f) {
      partials[static_cast<size_t>(f * plane + i)] = static_cast<float>(fields[f]);
    }
    auto& channel = channels[static_cast<size_t>(i % problem.c)];
    channel.insert(channel.end(), x.begin(), x.end());
  }
  const DeviceBuffer<float> workspace(partials);
  DeviceBuffer<float> mean(channels.size()), invstd(channels.size());
  batchnorm_cuda::MergeStatisticsParams<float> params{};
  params.partials = {workspace.data(), merge.rows, problem.c};
  params.statistics.c = problem.c;
  params.statistics.count = values * merge.rows;
  params.statistics.eps = bn_standalone::kEps;
  params.statistics.save_mean = mean.data();
  params.statistics.save_invstd = invstd.data();
  check(static_cast<cudaError_t>(
            batchnorm_cuda::merges<float>().statistics(merge, params, cudaStream_t())),
        "merge");
  Comparison means("mean", Dtype::kFloat, Dtype::kFloat);
  for (size_t c = 0; c < channels.size(); ++c) {
    const bn_standalone::Moments moments = bn_standalone::moments_of(channels[c]);
    means.add(mean.download()[c], {moments.mean, moments.mean_magnitude});
  }
  return means.passed() ? "ok" : "wrong: mean";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::printf("usage: driver CASE FAULT SEEDS\n");
    return 2;
  }
  try {
    simt_exchange::planted = std::atoi(argv[2]);
    const uint64_t seeds = std::strtoull(argv[3], nullptr, 10);
    if (std::strcmp(argv[1], "merge_rows") == 0) {
      for (uint64_t seed = 0; seed < seeds; ++seed) {
        simt::set_seed(seed);
        std::printf("%s\n", merge_rows().c_str());
      }
      return 0;
    }
    const Case& c = find_case(argv[1]);
    batchnorm_cuda::Problem problem;
    const batchnorm_cuda::Team team = plan_case(c, &problem);
    std::vector<std::unique_ptr<HostCase<float>>> inputs;
    for (uint64_t i = 0; i < kLaunches; ++i) {
      inputs.push_back(std::make_unique<HostCase<float>>(problem, i));
    }
    for (uint64_t seed = 0; seed < seeds; ++seed) {
      simt::set_seed(seed);
      std::printf("%s\n", run(c, inputs, team).c_str());
    }
  } catch (const std::exception& error) {
    std::printf("driver: %s\n", error.what());
    return 1;
  }
  return 0;
}
