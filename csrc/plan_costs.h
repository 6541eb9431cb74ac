// All constants of the planner's cost model, and the thresholds that stand for a cost: one home, so
// that measurements have one place to change. `python -m bench calibrate` fits those of CostModel.
//
// The unit of cost is a move: 8 KB, one 16-byte access by each of 512 threads, at an SM's share of
// the device's bandwidth. Only ratios matter, and only between choices for one problem. An origin
// is one of: assumed; simulated (where); measured (device, file in bench/results, commit).
#pragma once

#include <cstdint>

namespace batchnorm_cuda {

struct CostModel {
  // Moves, of a wait for the blocks of other SMs through global memory. Simulated: about 1100
  // cycles in a cycle-level simulation, in which an SM moves about 16 KB.
  double grid_wait = 2.0;
  // Moves, of a wait within a cluster. Simulated, likewise: a third of grid_wait.
  double cluster_wait = 0.7;
  // Ratio of the rate at which slots are read from the L2 cache to that of DRAM. Assumed.
  double slot_rate = 2.0;
  // Moves, from the first load of a round to its use. Assumed.
  double latency = 1.0;
  // Share of latencies and waits that still shows where another team's block on the SM fills them.
  // Assumed.
  double exposed = 0.5;
  // Ratio of what an SM can move while others are idle to its share of the bandwidth. Assumed.
  double sm_rate = 1.3;
  // Moves, of a launch more, or a device-wide drain (about 3 microseconds). Assumed.
  double launch = 5.0;
};

// Bytes per round that a block reads of others' slots above which the ranks merge a slice each. A
// second wait takes about as long as reading 8 KB from the L2 cache. Assumed.
constexpr int64_t kTwoLevelBytes = 8192;

// Resident blocks of a stage kernel that the planner aims for: with kUnroll windows of 16 bytes in
// flight per thread, 2 blocks of 256 threads keep 32 KB in flight on an SM. Assumed.
constexpr int64_t kStageBlocksWanted = 4;

// Rows of partial results per channel. More splits would cost the merge more than they bring.
// Assumed.
constexpr int64_t kMaxSplits = 1024;

}  // namespace batchnorm_cuda
