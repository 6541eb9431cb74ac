// All constants of the planner's cost model, and the thresholds that stand for a cost: one home, so
// that measurements have one place to change. `python -m bench calibrate` fits those of CostModel.
//
// The unit of cost is a move: 8 KB, one 16-byte access by each of 512 threads, at an SM's share of
// the device's bandwidth; 0.264 us on the GPU below. Only ratios matter, and only between choices
// for one problem. An origin is one of: assumed; simulated (where); measured (device, file in
// bench/results). All of CostModel is measured: NVIDIA H200, nvidia-h200-tune.csv. That other GPUs
// are like it in moves is assumed.
#pragma once

#include <cstdint>

namespace batchnorm_cuda {

struct PassCost {
  double forward, backward;
};

// What depends on the walk over the tensor: how much longer a team's moves take than a copy's, and
// an elementwise stage's; and the moves of a round of a team kernel that holds nothing, by depth.
// Those are many because a round runs through the unrolled code of all places for windows, which is
// far larger than an instruction cache, whether they are taken or not.
struct WalkCost {
  double rate, elementwise;
  PassCost middle, deep, stream;
};

struct CostModel {
  // Moves, of the launch of a team kernel, and of a stage kernel, whose code is shorter.
  double launch = 34.2, stage_launch = 17.8;
  // Moves, of a wait for the blocks of other SMs through global memory, and within a cluster.
  double grid_wait = 16.5, cluster_wait = 8.5;
  // Ratio of the rate at which slots are read from the L2 cache to that of DRAM.
  double slot_rate = 0.125;
  // Ratio of what an SM can move while others are idle to its share of the bandwidth.
  double sm_rate = 1.29;
  // Moves of reading anew what a team could not hold, for each move of it.
  double streamed = 2.06;
  // Of a deep kernel, whose SM has half as many threads as others': on all its moves.
  double deep_rate = 1.17;
  // Of values of 4 bytes and more, of which a window has half as many: on the rounds below.
  double wide = 0.535;
  // Of the reduce stage's reads, part of which are in the L2 cache afterwards.
  double reduce = 0.4;
  // Moves, of a row of partial results in the merge kernel.
  double merge_row = 0.074;
  WalkCost along_s{1.01, 1.45, {13.0, 3.0}, {38.8, 10.1}, {11.2, 2.7}};
  WalkCost runs{1.11, 2.09, {23.4, 8.3}, {59.5, 19.7}, {19.0, 7.3}};
  WalkCost along_c{1.26, 1.47, {40.9, 2.4}, {125.5, 33.6}, {38.5, 2.1}};
  WalkCost along_row{1.37, 2.06, {58.8, 29.5}, {58.8, 29.5}, {58.8, 29.5}};
};

// Bytes per round that a block reads of others' slots above which the ranks merge a slice each. A
// second wait takes about as long as reading 8 KB from the L2 cache. Assumed.
constexpr int64_t kTwoLevelBytes = 8192;

// Resident blocks of a stage kernel that the planner aims for: those that launch bounds promise, so
// that all run at once. Half as many parts as before took 0.9 of the time in every problem along C
// and most along S. Measured (NVIDIA H200, nvidia-h200-tune.csv).
constexpr int64_t kStageBlocksWanted = 2;

// Rows of partial results per channel. More splits would cost the merge more than they bring.
// Assumed.
constexpr int64_t kMaxSplits = 1024;

}  // namespace batchnorm_cuda
