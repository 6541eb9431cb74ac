// All constants of the planner's cost model, and the thresholds that stand for a cost: one home, so
// that measurements have one place to change. `python -m bench calibrate` fits those of CostModel.
//
// The unit of cost is a move: 8 KB, one 16-byte access by each of 512 threads, at an SM's share of
// the device's bandwidth; 0.26 to 0.28 us on the GPU below, by the fit. Only ratios matter, and
// only between choices for one problem. An origin is one of: assumed; simulated (where); measured
// (device, file in bench/results). All of CostModel is measured: NVIDIA H200, nvidia-h200-tune.csv,
// by a fit to the plans that may be chosen, with two constants raised since: grid_flag from 0.033
// to part a tie, and streamed from 1.67, because teams hold more than those that were timed, so
// that of their plans the ones that read less twice are the better guess (docs/perf-log.md, 66). A
// fit of `bench calibrate` from here differs somewhat. That other GPUs are like it in moves is
// assumed.
#pragma once

#include <cstdint>

namespace batchnorm_cuda {

struct PassCost {
  double forward, backward;
};

// What depends on the walk over the tensor: how much longer a team's moves take than a copy's, and
// an elementwise stage's; and the moves of a round of a team kernel that holds nothing. Those are
// many because a round runs through the unrolled code of all places for windows, which is larger
// than an instruction cache, whether they are taken or not.
struct WalkCost {
  double rate, elementwise;
  PassCost round;
};

struct CostModel {
  // Moves, of the launch of a team kernel, and of a stage kernel, whose code is shorter.
  double launch = 31.1, stage_launch = 18.7;
  // Moves, of a wait within a cluster; of one through global memory, and for each block of the
  // team, whose flags all are polled.
  double cluster_wait = 8.2, grid_wait = 13.3, grid_flag = 0.045;
  // Ratio of the rate at which slots are read from the L2 cache to that of DRAM.
  double slot_rate = 0.131;
  // Ratio of what an SM can move while others are idle to its share of the bandwidth.
  double sm_rate = 1.32;
  // Moves of reading anew what a team could not hold, for each move of it.
  double streamed = 2.5;
  // Factor on a team's moves, of slabs that are narrower than a line of the cache.
  double narrow = 1.30;
  // Of values of 4 bytes and more, of which a window has half as many: on the rounds below.
  double wide = 0.562;
  // Of the reduce stage's reads, part of which are in the L2 cache afterwards.
  double reduce = 0.35;
  // Moves, of a row of partial results in the merge kernel.
  double merge_row = 0.0315;
  WalkCost along_s{1.09, 1.37, {12.0, 2.3}};
  WalkCost runs{1.37, 1.54, {20.7, 4.2}};
  WalkCost along_c{1.06, 1.44, {41.7, 4.9}};
  WalkCost along_row{1.39, 2.40, {64.4, 28.2}};
};

// Bytes per round that a block reads of others' slots above which the ranks merge a slice each. A
// second wait takes about as long as reading 8 KB from the L2 cache. Assumed.
constexpr int64_t kTwoLevelBytes = 8192;

// Rows of partial results per channel. More splits would cost the merge more than they bring.
// Assumed.
constexpr int64_t kMaxSplits = 1024;

}  // namespace batchnorm_cuda
