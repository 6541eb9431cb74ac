#include "plan_text.h"

#include <cstdio>

namespace bn_standalone {

using namespace batchnorm_cuda;

namespace {

const char* name_of(Scope scope) {
  return scope == Scope::kBlock ? "one block" : scope == Scope::kCluster ? "cluster" : "grid";
}

const char* name_of(Pattern pattern) {
  return pattern == Pattern::kAlongS   ? "along S"
         : pattern == Pattern::kAlongC ? "along C"
                                       : "along rows";
}

void print_traversal(const char* stage, const Traversal& t) {
  std::printf("plan: %s: %lld blocks of %dx%d threads, %lld splits, %s windows, %d-bit indices\n",
              stage, static_cast<long long>(t.grid), t.threads_x, t.threads_y,
              static_cast<long long>(t.splits), t.exact ? "full" : "masked", t.index_bits);
}

void print_team(const Team& team) {
  std::printf("plan: %lld teams of %d blocks (%s), %lld rounds, %d blocks/SM, %lld bytes shared\n",
              static_cast<long long>(team.teams), team.size, name_of(team.scope),
              static_cast<long long>(team.rounds), team.blocks_per_sm,
              static_cast<long long>(team.shared_bytes));
  std::printf(
      "plan: a thread holds %d windows in registers and %d in shared memory per tensor, "
      "%lld bytes are streamed\n",
      team.register_windows, team.shared_windows, static_cast<long long>(team.streamed_bytes));
  print_traversal("team", team.traversal);
}

}  // namespace

void print_plan(const Plan& plan) {
  const bool team = plan.strategy == Strategy::kTeam;
  std::printf("plan: %s (%s), %s, %d launches, workspace %lld bytes\n", team ? "team" : "two_pass",
              plan.reason.c_str(), name_of(team ? plan.team.pattern : plan.pattern), plan.launches,
              static_cast<long long>(plan.workspace_bytes));
  if (team) {
    print_team(plan.team);
  } else {
    if (plan.has_reduce) print_traversal("reduce", plan.reduce);
    if (plan.has_elementwise) print_traversal("elementwise", plan.elementwise);
  }
  std::printf(
      "plan: moves %lld bytes, %.2f of the compulsory %lld\n",
      static_cast<long long>(plan.predicted_bytes),
      static_cast<double>(plan.predicted_bytes) / static_cast<double>(plan.compulsory_bytes),
      static_cast<long long>(plan.compulsory_bytes));
}

}  // namespace bn_standalone
