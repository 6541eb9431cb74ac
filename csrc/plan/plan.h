// The plan: every fact of launch geometry (geometry.h), decided on the host by a pure function of
// the problem and of the device. No torch and no CUDA headers, so that it can be tested and
// described without a GPU.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../geometry.h"

namespace batchnorm_cuda {

struct DeviceInfo {
  std::string name = "unknown";
  int compute_major = 8, compute_minor = 0;
  int sm_count = 1;
  int max_threads_per_sm = 2048;
  int registers_per_sm = 65536;
  int64_t shared_bytes_per_sm = 102400;
  int64_t shared_bytes_per_block = 49152;         // without opting in
  int64_t shared_bytes_per_block_optin = 101376;  // with opting in
  int64_t l2_bytes = 4 << 20;
  int64_t max_grid = 2147483647;
  bool cooperative = true;  // cooperative launch
  int max_cluster = 0;      // blocks of a portable cluster, 0 without clusters (before 9.0)
  // Clusters of so many blocks that are resident at once with one block on an SM: the SMs of a
  // cluster are of one GPC, whose number need not be a multiple. 0: not known, or none.
  int clusters_of_2 = 0, clusters_of_4 = 0, clusters_of_8 = 0;
};

struct Problem {
  Op op = Op::kForwardTraining;
  Dtype dtype = Dtype::kFloat;
  int64_t n = 0, c = 0, s = 0;
  // Elements by which each tensor lies past a 16-byte boundary; -1: the tensor takes no part.
  int input_shift = 0, grad_output_shift = -1, output_shift = 0;
  // Backward: are the two sums wanted for their own sake (grad_weight or grad_bias)? Double
  // backward: are any sums wanted?
  bool need_sums = true;
  // Double backward: the third input.
  int grad_grad_input_shift = -1;
  // Outputs of the elementwise kernel, aligned alike: of the double backward, and of a fused
  // backward, which may write the residual's gradient beside grad_input, or alone.
  int outputs = 1;
  // Forward with a residual or a ReLU, or backward of a ReLU: other kernels, of the same geometry.
  bool fused = false;
  bool mask = false;        // of the ReLU: written by the forward, read by the backward
  int residual_shift = -1;  // forward
};

// What a caller may force; 0, kAuto or nothing leaves the choice to the planner. What cannot be
// honoured gives another plan: callers that care compare.
struct PlanOptions {
  int index_bits = 0;  // 32 is honoured only where it is safe
  int64_t splits = 0;  // of two passes: blocks per channel group, clamped to what there is to split
  Strategy strategy = Strategy::kAuto;
  Scope scope = Scope::kAuto;      // of a team, and all that follows
  int team_size = 0;               // blocks
  int slab = 0;                    // along C: windows of a channel group at most, 4, 8 or 16
  std::optional<Pattern> pattern;  // walk over the tensor
};

// What a plan is expected to take, in moves (plan_costs.h), by cause.
struct PlanCost {
  double launches = 0;
  double transfers = 0;  // every activation once, shared evenly by all SMs
  double rereads = 0;    // what is read twice
  double idle = 0;       // what the busiest SM has beyond an even share
  double code = 0;       // of the rounds of a team: what they take whatever they hold
  double waits = 0;      // exchanges of a team; the merge of partial results
  double total() const { return launches + transfers + rereads + idle + code + waits; }
};

struct Plan {
  Strategy strategy = Strategy::kTwoPass;
  std::string reason;  // why this strategy
  Team team;           // kTeam
  Pattern pattern = Pattern::kAlongS;
  int vec = 1;
  bool has_reduce = false, has_elementwise = false;
  Traversal reduce, elementwise;
  MergeGeometry merge;
  int64_t workspace_bytes = 0;  // partial results, planes of [merge.rows, C]
  int launches = 0;
  PlanCost cost;
  int64_t compulsory_bytes = 0;  // every activation once
  int64_t reread_bytes = 0;      // read a second time, from the L2 cache at best
  int64_t predicted_bytes = 0;   // of activations, to and from DRAM; a cold L2 cache holds the rest
};

// Throws std::invalid_argument for sizes that are negative or overflow 63 bits.
Plan make_plan(const Problem& problem, const DeviceInfo& device, const PlanOptions& options = {});

}  // namespace batchnorm_cuda
