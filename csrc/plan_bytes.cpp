#include "plan_bytes.h"

#include <algorithm>

namespace batchnorm_cuda {
namespace {

// Second reads run backwards, so that what was read last is found in the L2 cache. With a cache
// that keeps the most recently used lines, an element is still there if all that was touched since
// its first read fits beside it: of every tensor `between` bytes, and behind the turn, for every
// byte that lies between the element and the turn, `per_byte` bytes. Returns how many bytes of each
// tensor before the turn are found.
int64_t found_in_l2(const DeviceInfo& device, int64_t between, int64_t per_byte) {
  return std::max<int64_t>(device.l2_bytes - between, 0) / per_byte;
}

// Of the stage kernels: between the two reads of an element lie what both reduce and elementwise
// kernel touch of the rest of the tensor, all inputs and the output.
int64_t found_by_stages(const Plan& plan, int64_t tensor, int64_t reads, const DeviceInfo& device) {
  const int64_t outputs = plan.has_elementwise ? 1 : 0;
  return std::min(tensor, found_in_l2(device, 0, reads + outputs));
}

// Of a team: what all teams hold on chip passes through the cache as well, and its output.
int64_t found_by_teams(const Team& team, int64_t tensor, const DeviceInfo& device) {
  const int64_t streamed = team.streamed_bytes / team.tensors / team.rounds;
  const int64_t held = tensor / team.rounds - streamed;
  const int64_t found = found_in_l2(device, held * (team.tensors + 1), team.tensors + 1);
  return std::min(streamed, found) * team.rounds;
}

}  // namespace

void predict_bytes(Plan& plan, const Problem& p, const DeviceInfo& device) {
  const bool forward = p.op == Op::kForwardTraining || p.op == Op::kForwardEval;
  const int64_t tensor = p.n * p.c * p.s * dtype_bytes(p.dtype);
  const int64_t reduced = plan.has_reduce ? (forward ? 1 : 2) : 0;
  const int64_t outputs = plan.has_elementwise ? 1 : 0;
  const int64_t transformed = outputs * (p.op == Op::kBackwardTraining ? 2 : 1);
  const int64_t twice = std::min(reduced, transformed);
  plan.compulsory_bytes = tensor * (std::max(reduced, transformed) + outputs);
  int64_t found;
  if (plan.strategy == Strategy::kTeam) {
    plan.reread_bytes = plan.team.streamed_bytes;
    found = found_by_teams(plan.team, tensor, device) * plan.team.tensors;
  } else {
    plan.reread_bytes = tensor * twice;
    found = found_by_stages(plan, tensor, reduced, device) * twice;
  }
  plan.predicted_bytes = plan.compulsory_bytes + plan.reread_bytes - found;
}

}  // namespace batchnorm_cuda
