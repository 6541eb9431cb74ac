// Runs a grid: which blocks are resident together, which thread goes on next, when all are stuck.
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <numeric>

#include "engine.h"
#include "traffic.h"

namespace simt {
namespace detail {

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

State state;

namespace {

StackPool& stack_pool() {
  static auto* pool = new StackPool;  // never destroyed: kernels may run during static destruction
  return *pool;
}

uint64_t configured_seed = 1;
std::mutex launch_mutex;
bool launches_skipped = false;  // under launch_mutex
thread_local bool launching = false;

// A thread that only yields makes no progress. After this many turns of all threads without a
// write, a barrier or an exit, whoever still yields waits for ever.
constexpr uint64_t kIdleRounds = 256;
// The same where polling threads pass barriers and warp operations in between, which alone are no
// progress, but which other threads may have many of to do before they write.
constexpr uint64_t kSilentRounds = 20000;

uint64_t current_seed() {
  const char* text = std::getenv("BATCHNORM_CUDA_EMULATE_SEED");
  return text == nullptr || *text == '\0' ? configured_seed : std::strtoull(text, nullptr, 10);
}

void run_thread() {
  Thread* thread = state.current;
  try {
    state.request->invoke(state.request->values);
    thread_exited(thread);
  } catch (const std::exception& error) {
    state.fault = error.what();
  } catch (...) {
    state.fault = "a kernel threw something that is not a std::exception";
  }
  thread->wait = Wait::kExited;
  switch_to(&thread->suspended, state.scheduler);
  std::abort();  // an exited thread is never resumed
}

uint64_t cheap_random() {
  state.random_state ^= state.random_state << 13;
  state.random_state ^= state.random_state >> 7;
  state.random_state ^= state.random_state << 17;
  return state.random_state;
}

Thread* next_ready() {
  if (state.ready_head == state.ready.size()) return nullptr;
  // Mostly in turn, sometimes out of it.
  const uint64_t draw = cheap_random();
  if (draw % 8 == 0) {
    const size_t other = state.ready_head + (draw >> 32) % (state.ready.size() - state.ready_head);
    std::swap(state.ready[state.ready_head], state.ready[other]);
  }
  Thread* thread = state.ready[state.ready_head++];
  if (state.ready_head == state.ready.size()) {
    state.ready.clear();
    state.ready_head = 0;
  }
  return thread;
}

void activate(Thread* thread) {
  if (thread->stack == nullptr) {
    thread->stack = stack_pool().take();
    thread->suspended = prepare(thread->stack, run_thread);
    note_progress();
  }
  thread->wait = Wait::kRunnable;
  state.current = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
}

void release_stack(Thread* thread) {
  if (thread->stack != nullptr) stack_pool().give_back(thread->stack);
  thread->stack = nullptr;
}

// Goes on with threads until all have ended or wait. An exited thread returns here, others switch
// directly to the next.
void run_ready() {
  while (Thread* next = next_ready()) {
    activate(next);
    switch_to(&state.scheduler, next->suspended);
    Thread* back = state.current;
    state.current = nullptr;
    if (!state.fault.empty()) throw Fault(state.fault);
    if (back->wait != Wait::kExited) continue;
    if (StackPool::overrun(*back->stack)) fail(*back, {}, "the thread overran its stack");
    release_stack(back);
    --state.live_threads;
  }
  if (state.live_threads != 0) fail_stuck();
}

uint3 unflatten(uint64_t linear, const dim3& dims) {
  return {static_cast<unsigned int>(linear % dims.x),
          static_cast<unsigned int>(linear / dims.x % dims.y),
          static_cast<unsigned int>(linear / dims.x / dims.y)};
}

void start_thread(Thread* thread, Block* block, uint32_t local) {
  thread->block = block;
  thread->index = unflatten(local, blockDim);
  thread->local = local;
  thread->lane = local % 32;
  thread->wait = Wait::kRunnable;
  thread->in_cluster_phase = false;
  thread->stamp = make_stamp(block->rank * state.threads_per_block + local, block->time);
  thread->sync_time = 0;
  thread->sync_lanes = 0;
  thread->fence_time = 0;
  thread->known.reset();
  thread->acquired.reset();
  thread->fenced.reset();
  thread->last_seen.reset();
  thread->last_acquired.reset();
}

void start_block(Block* block, uint3 index, Cluster* cluster) {
  block->index = index;
  block->rank = static_cast<uint32_t>(
      index.x + gridDim.x * (index.y + static_cast<uint64_t>(gridDim.y) * index.z));
  block->cluster = cluster;
  block->cluster_rank = static_cast<uint32_t>(cluster->blocks.size());
  cluster->blocks.push_back(block);
  block->exited = 0;
  block->at_barrier.clear();
  block->time = block->last_barrier = 1;
  block->clocks_differ = block->fenced = false;
  block->remote_phase = -1;
  block->threads.resize(state.threads_per_block);
  block->warps.resize((state.threads_per_block + 31) / 32);
  for (size_t w = 0; w < block->warps.size(); ++w) {
    const auto lanes = std::min<uint32_t>(32, state.threads_per_block - 32 * w);
    block->warps[w].present = lanes == 32 ? ~0u : (1u << lanes) - 1;
    block->warps[w].exited = 0;
    block->warps[w].pending.clear();
  }
  for (uint32_t i = 0; i < state.threads_per_block; ++i) {
    start_thread(&block->threads[i], block, i);
    state.ready.push_back(&block->threads[i]);
  }
  state.live_threads += state.threads_per_block;
  open_shared(block);
}

// Makes the blocks of a cluster resident; they take the slots from first_slot on.
void start_cluster(uint3 cluster_index, size_t slot) {
  const dim3 dims = state.cluster_dims;
  const uint32_t size = dims.x * dims.y * dims.z;
  while (state.clusters.size() <= slot) state.clusters.push_back(std::make_unique<Cluster>());
  Cluster* cluster = state.clusters[slot].get();
  cluster->blocks.clear();
  cluster->barrier = GroupBarrier();
  cluster->barrier.expected = size * state.threads_per_block;
  for (uint32_t rank = 0; rank < size; ++rank) {
    const uint3 in_cluster = unflatten(rank, dims);
    const size_t block_slot = slot * size + rank;
    while (state.blocks.size() <= block_slot) state.blocks.push_back(std::make_unique<Block>());
    start_block(state.blocks[block_slot].get(),
                {cluster_index.x * dims.x + in_cluster.x, cluster_index.y * dims.y + in_cluster.y,
                 cluster_index.z * dims.z + in_cluster.z},
                cluster);
  }
}

// Threads start in any order, either all mixed or one block after another.
void shuffle_ready() {
  const auto begin = state.ready.begin();
  if (state.random() % 2 == 0) {
    std::shuffle(begin, state.ready.end(), state.random);
    return;
  }
  for (size_t first = 0; first < state.ready.size(); first += state.threads_per_block) {
    const auto block = begin + static_cast<std::ptrdiff_t>(first);
    std::shuffle(block, block + state.threads_per_block, state.random);
  }
}

void finish_residents() {
  for (auto& block : state.blocks) {
    if (block->cluster != nullptr) close_shared(block.get());
    block->cluster = nullptr;
  }
  state.shared_readers.reset();
  if (state.traffic != nullptr) state.traffic->blocks_finished();
}

}  // namespace

void make_ready(Thread* thread) { state.ready.push_back(thread); }

void suspend(Wait wait, Site site) {
  Thread* self = state.current;
  self->wait = wait;
  self->site = site;
  Thread* next = next_ready();
  if (next == self) {
    self->wait = Wait::kRunnable;
    return;
  }
  if (next != nullptr) {
    activate(next);
    switch_to(&self->suspended, next->suspended);
  } else {
    switch_to(&self->suspended, state.scheduler);
  }
}

void run_grid() {
  const dim3 clusters(gridDim.x / state.cluster_dims.x, gridDim.y / state.cluster_dims.y,
                      gridDim.z / state.cluster_dims.z);
  std::vector<uint32_t> order(static_cast<size_t>(clusters.x) * clusters.y * clusters.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), state.random);
  const size_t resident = state.cooperative ? order.size() : 1;
  for (size_t first = 0; first < order.size(); first += resident) {
    for (size_t i = 0; i < resident; ++i) {
      start_cluster(unflatten(order[first + i], clusters), i);
    }
    shuffle_ready();
    run_ready();
    finish_residents();
  }
}

void abandon_grid() {
  state.current = nullptr;
  for (auto& block : state.blocks) {
    if (block->cluster == nullptr) continue;
    for (Thread& thread : block->threads) release_stack(&thread);
  }
  finish_residents();
  state.ready.clear();
  state.ready_head = 0;
  state.live_threads = 0;
}

namespace {

// Sets the launch up, runs it, and leaves the engine as it was, whichever way it ends.
void run(const LaunchRequest& request) {
  struct Cleanup {
    ~Cleanup() {
      abandon_grid();
      close_buffers();
      state.released.clear();
      state.request = nullptr;
    }
  } cleanup;
  const cudaLaunchConfig_t& config = *request.config;
  state.request = &request;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  state.threads_per_block = blockDim.x * blockDim.y * blockDim.z;
  state.fault.clear();
  note_progress();
  state.random.seed(current_seed());
  state.random_state = state.random() | 1;
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  if (blocks * state.threads_per_block >= 0xfffffffeull) {
    throw Fault(kernel_name() + ": more than 2^32 threads, beyond what the host model numbers");
  }
  state.grid_barrier = GroupBarrier();
  state.grid_barrier.expected = static_cast<uint32_t>(blocks * state.threads_per_block);
  lay_out_shared(config.dynamicSmemBytes);
  open_buffers(request);
  if (state.traffic != nullptr) state.traffic->begin_launch(request);
  run_grid();
  check_all_written();
  if (state.traffic != nullptr) state.traffic->end_launch(resident_blocks(request));
}

}  // namespace

cudaError_t launch(LaunchRequest* request) {
  if (launching) throw Fault("a launch from within a kernel is not modelled");
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const cudaError_t error = check_launch(*request, &state.cluster_dims, &state.cooperative);
  if (error != cudaSuccess) return remember(error);
  if (launches_skipped) return cudaSuccess;
  state.dependent = is_dependent(*request->config);
  struct Mark {
    Mark() { launching = true; }
    ~Mark() { launching = false; }
  } mark;
  request->collect(request);
  run(*request);
  return cudaSuccess;
}

}  // namespace detail

void set_seed(uint64_t seed) { detail::configured_seed = seed; }

void skip_launches(bool skip) {
  const std::lock_guard<std::mutex> lock(detail::launch_mutex);
  detail::launches_skipped = skip;
}

void yield(Site site) {
  using namespace detail;
  if (state.current == nullptr) throw Fault("simt::yield outside a kernel at " + place(site));
  Thread* self = state.current;
  const uint64_t round = state.ready.size() - state.ready_head + 1;
  if (++state.idle_yields > kIdleRounds * round || ++state.silent_yields > kSilentRounds * round) {
    self->wait = Wait::kYield;
    self->site = site;
    fail_stuck();
  }
  make_ready(self);
  suspend(Wait::kYield, site);
}

}  // namespace simt
