// Clusters with distributed shared memory, and grids whose blocks are resident together.
#include <cooperative_groups.h>

#include "harness.h"

namespace simt_test {
namespace {

namespace cg = cooperative_groups;

// Each block puts rank + 1 into its shared memory and sums those of its cluster.
enum class Skip { kNothing, kFirstSync, kLastSync };

__global__ void cluster_sum_kernel(Buffer<int> out, Skip skip) {
  int* mine = &static_shared<int>();
  const auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) store_shared(mine, static_cast<int>(cluster.block_rank()) + 1);
  if (skip != Skip::kFirstSync) cluster.sync();
  int sum = 0;
  for (unsigned int rank = 0; rank < cluster.num_blocks(); ++rank) {
    sum += load_shared(cluster.map_shared_rank(mine, static_cast<int>(rank)));
  }
  if (skip != Skip::kLastSync) cluster.sync();
  store_global(out.data + blockIdx.x * blockDim.x + threadIdx.x, sum);
}

Shape cluster_shape(unsigned int clusters, unsigned int size, unsigned int threads) {
  Shape shape{clusters * size, threads};
  shape.cluster = size;
  return shape;
}

SIMT_CASE(cluster_exchange) {
  for (unsigned int size : {1u, 2u, 4u, 8u}) {
    Memory<int> out(size * 3 * 64);
    launch(cluster_shape(3, size, 64), cluster_sum_kernel, out.as(Use::kOutput), Skip::kNothing);
    for (size_t i = 0; i < out.size(); ++i)
      EXPECT(out[i] == static_cast<int>(size * (size + 1) / 2));
  }
}

SIMT_CASE(cluster_read_before_any_barrier) {
  Memory<int> out(2 * 32);
  expect_fault(
      [&] {
        launch(cluster_shape(1, 2, 32), cluster_sum_kernel, out.as(Use::kOutput), Skip::kFirstSync);
      },
      {"cluster_sum_kernel"});
}

__global__ void remote_before_start_kernel() {
  int* mine = &static_shared<int>();
  const unsigned int other = cg::this_cluster().block_rank() ^ 1;
  MARK, store_shared(cg::this_cluster().map_shared_rank(mine, static_cast<int>(other)), 1);
  cg::this_cluster().sync();
}

SIMT_CASE(cluster_write_before_the_owner_starts) {
  expect_fault([] { launch(cluster_shape(1, 2, 1), remote_before_start_kernel); },
               {"before any cluster barrier"});
}

SIMT_CASE(cluster_block_exits_too_early) {
  Memory<int> out(2 * 32);
  expect_fault(
      [&] {
        launch(cluster_shape(1, 2, 32), cluster_sum_kernel, out.as(Use::kOutput), Skip::kLastSync);
      },
      {"cluster_sum_kernel", "the kernel", "shared memory"});
}

// Block 1 accesses block 0's shared memory, before or after block 0 has left the kernel.
__global__ void remote_and_exit_kernel(int* flag, bool exits_first) {
  int* mine = &static_shared<int>();
  store_shared(mine, 1);
  const auto cluster = cg::this_cluster();
  cluster.sync();
  const bool first = (cluster.block_rank() == 0) == exits_first;
  while (!first && atomicAdd(flag, 0) == 0) {
  }
  if (cluster.block_rank() == 1) MARK, load_shared(cluster.map_shared_rank(mine, 0));
  if (first) atomicExch(flag, 1);
}

SIMT_CASE(cluster_access_and_exit_in_either_order) {
  for (const bool exits_first : {false, true}) {
    int flag = 0;
    expect_fault(
        [&] { launch(cluster_shape(1, 2, 1), remote_and_exit_kernel, &flag, exits_first); },
        {exits_first ? "has left the kernel" : "may still access its shared memory"});
  }
}

__global__ void remote_race_kernel(bool sync) {
  int* mine = &static_shared<int>();
  const auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) store_shared(mine, 0);
  cluster.sync();
  if (threadIdx.x == 0) {
    store_shared(cluster.map_shared_rank(mine, static_cast<int>(cluster.block_rank() ^ 1)), 1);
  }
  if (sync) {
    cluster.barrier_arrive();
    cluster.barrier_wait();
  } else {
    __syncthreads();
  }
  load_shared(mine);
  cluster.sync();
}

SIMT_CASE(cluster_shared_memory_race) {
  launch(cluster_shape(2, 2, 64), remote_race_kernel, true);
  expect_fault([] { launch(cluster_shape(2, 2, 64), remote_race_kernel, false); },
               {"shared memory race"});
}

__global__ void rank_beyond_kernel() { MARK, __cluster_map_shared_rank(&static_shared<int>(), 2); }

SIMT_CASE(cluster_rank_out_of_range) {
  expect_fault([] { launch(cluster_shape(1, 2, 1), rank_beyond_kernel); },
               {"rank 2 in a cluster of 2"});
}

__global__ void cluster_indices_kernel(Buffer<uint4> out) {
  const unsigned int block = blockIdx.x + gridDim.x * blockIdx.y;
  const dim3 index = __clusterRelativeBlockIdx();
  int* mine = &static_shared<int>();
  EXPECT(__cluster_query_shared_rank(mine) == __clusterRelativeBlockRank());
  EXPECT(__clusterDim().x == 2 && __clusterSizeInBlocks() == 2);
  store_global(out.data + block, uint4{index.x, index.y, __clusterRelativeBlockRank(), 0});
}

SIMT_CASE(cluster_indices) {
  Memory<uint4> out(8);
  launch({dim3(4, 2), 1, 0, false, 2}, cluster_indices_kernel, out.as(Use::kOutput));
  for (size_t i = 0; i < 8; ++i) EXPECT(out[i].x == i % 2 && out[i].y == 0 && out[i].z == i % 2);
}

// Rounds of: every block writes, all meet, every block reads its neighbour's.
__global__ void grid_rounds_kernel(Buffer<int> slots, int rounds, bool sync) {
  const unsigned int next = (blockIdx.x + 1) % gridDim.x;
  for (int round = 0; round < rounds; ++round) {
    int* half = slots.data + static_cast<unsigned int>(round % 2) * gridDim.x;
    if (threadIdx.x == 0) store_global(half + blockIdx.x, round);
    if (sync) cg::this_grid().sync();
    EXPECT(load_global(half + next) == round);
  }
}

SIMT_CASE(grid_barrier_rounds) {
  Memory<int> slots(12);
  Shape shape{6, 64};
  shape.cooperative = true;
  launch(shape, grid_rounds_kernel, slots.as(Use::kScratch), 5, true);
  expect_fault([&] { launch(shape, grid_rounds_kernel, slots.as(Use::kScratch), 5, false); },
               {"grid_rounds_kernel"});
  expect_fault([&] { launch({6, 64}, grid_rounds_kernel, slots.as(Use::kScratch), 5, true); },
               {"grid barrier needs a cooperative launch"});
}

// One 64-bit word {value, round} for each block and round parity; a block polls its team's words.
// The words themselves carry the values, so no fence is needed.
__global__ void team_exchange_kernel(Buffer<unsigned long long> words, Buffer<unsigned int> out,
                                     unsigned int team_size, unsigned int rounds) {
  const unsigned int first = blockIdx.x / team_size * team_size;
  const auto word = [](unsigned int value, unsigned int round) {
    return static_cast<unsigned long long>(round) << 32 | value;
  };
  unsigned int* total = &static_shared<unsigned int>();
  for (unsigned int round = 1; round <= rounds; ++round) {
    unsigned long long* slots = words.data + round % 2 * gridDim.x;
    if (threadIdx.x == 0) atomicExch(slots + blockIdx.x, word(blockIdx.x * round, round));
    if (threadIdx.x == 0) {
      unsigned int sum = 0;
      for (unsigned int peer = first; peer < first + team_size; ++peer) {
        unsigned long long seen = 0;
        while ((seen = atomicAdd(slots + peer, 0ull)) >> 32 != round) {
        }
        sum += static_cast<unsigned int>(seen);
      }
      store_shared(total, sum);
    }
    __syncthreads();
    if (threadIdx.x == round) {
      store_global(out.data + blockIdx.x * rounds + round - 1, load_shared(total));
    }
    __syncthreads();
  }
}

SIMT_CASE(team_exchange_by_words) {
  constexpr unsigned int kRounds = 9;
  for (unsigned int team_size : {1u, 2u, 4u, 8u}) {
    Memory<unsigned long long> words(16, 0);
    Memory<unsigned int> out(8 * kRounds);
    Shape shape{8, 64};
    shape.cooperative = true;
    launch(shape, team_exchange_kernel, words.as(Use::kPersistent), out.as(Use::kOutput), team_size,
           kRounds);
    for (unsigned int i = 0; i < out.size(); ++i) {
      const unsigned int first = i / kRounds / team_size * team_size;
      unsigned int wanted = 0;
      for (unsigned int peer = first; peer < first + team_size; ++peer) wanted += peer;
      EXPECT(out[i] == wanted * (i % kRounds + 1));
    }
  }
}

}  // namespace
}  // namespace simt_test
