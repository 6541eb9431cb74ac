// Barriers of a block, cluster and grid, and the operations of a warp.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "engine.h"

namespace simt::detail {
namespace {

bool same_site(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Wakes all but the running thread, from a random one on: the order must not matter.
void wake(std::vector<Thread*>* waiting) {
  const size_t count = waiting->size();
  const size_t first = state.random() % count;
  for (size_t i = 0; i < count; ++i) {
    const size_t at = first + i < count ? first + i : first + i - count;
    if ((*waiting)[at] != state.current) make_ready((*waiting)[at]);
  }
  waiting->clear();
}

int barrier_result(BarrierKind kind, uint32_t held, uint32_t threads) {
  switch (kind) {
    case BarrierKind::kPlain:
      return 0;
    case BarrierKind::kCount:
      return static_cast<int>(held);
    case BarrierKind::kAnd:
      return held == threads;
    case BarrierKind::kOr:
      return held != 0;
  }
  return 0;
}

const Thread& some_exited(const Block& block) {
  return *std::find_if(block.threads.begin(), block.threads.end(),
                       [](const Thread& t) { return t.wait == Wait::kExited; });
}

void check_barrier(const Thread& self, BarrierKind kind, Site site) {
  const Block& block = *self.block;
  if (block.exited != 0) {
    fail(self, site,
         "divergent barrier: waits at __syncthreads, but " + std::to_string(block.exited) +
             " of the block's threads have left the kernel, the first of them " +
             describe(some_exited(block)));
  }
  if (block.at_barrier.empty()) return;
  if (!same_site(block.barrier_site, site) || block.barrier_kind != kind) {
    fail(self, site,
         "divergent barrier: waits at this __syncthreads while " +
             std::to_string(block.at_barrier.size()) + " threads, such as " +
             describe(*block.at_barrier.front()) + ", wait at " + place(block.barrier_site));
  }
}

void finish_warp_operation(Block* block, uint32_t warp_index, const WarpOperation& operation) {
  uint32_t ballot = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((operation.mask >> lane & 1) != 0 && operation.value[lane] != 0) ballot |= 1u << lane;
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((operation.mask >> lane & 1) == 0) continue;
    Thread& thread = block->threads[warp_index * 32 + lane];
    thread.result =
        operation.kind == WarpKind::kBallot ? ballot : operation.value[operation.source[lane]];
    if (&thread != state.current) make_ready(&thread);
  }
  if (operation.kind == WarpKind::kSync) order_at_warp_sync(block, warp_index, operation.mask);
}

std::string hex(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

void check_mask(const Thread& self, const Warp& warp, WarpKind kind, uint32_t mask, uint32_t source,
                Site site) {
  const std::string where = "the mask " + hex(mask) + " of this warp operation ";
  if ((mask >> self.lane & 1) == 0) {
    fail(self, site, where + "lacks the calling lane " + std::to_string(self.lane));
  }
  if ((mask & ~warp.present) != 0) {
    fail(self, site,
         where + "names lanes that the block does not have: " + lane_list(mask & ~warp.present));
  }
  if ((mask & warp.exited) != 0) {
    fail(self, site,
         "divergent warp operation: " + where +
             "names lanes that have left the kernel: " + lane_list(mask & warp.exited));
  }
  if (kind != WarpKind::kSync && kind != WarpKind::kBallot && (mask >> source & 1) == 0) {
    fail(
        self, site,
        "the shuffle reads from lane " + std::to_string(source) + " outside its mask " + hex(mask));
  }
}

GroupBarrier& barrier_of(const Thread& thread) { return thread.block->cluster->barrier; }

void arrive(GroupBarrier* barrier, const std::vector<Block*>& blocks) {
  state.idle_yields = 0;
  if (++barrier->arrived < barrier->expected) return;
  barrier->arrived = 0;
  ++barrier->phase;
  order_at_group_barrier(blocks);
  if (!barrier->waiting.empty()) wake(&barrier->waiting);
}

}  // namespace

Thread& running_thread(const char* what, Site site) {
  if (state.current == nullptr) {
    throw Fault(std::string(what) + " outside a kernel at " + place(site));
  }
  return *state.current;
}

int block_barrier(BarrierKind kind, bool predicate, Site site) {
  Thread& self = running_thread("__syncthreads", site);
  Block& block = *self.block;
  state.idle_yields = 0;
  check_barrier(self, kind, site);
  if (block.at_barrier.empty()) {
    block.barrier_site = site;
    block.barrier_kind = kind;
    block.barrier_true = 0;
  }
  block.barrier_true += predicate;
  block.at_barrier.push_back(&self);
  if (block.at_barrier.size() < block.threads.size()) {
    suspend(Wait::kBlockBarrier, site);
    return static_cast<int>(self.result);
  }
  const int result = barrier_result(kind, block.barrier_true, state.threads_per_block);
  for (Thread& thread : block.threads) thread.result = static_cast<uint64_t>(result);
  order_at_barrier(&block);
  wake(&block.at_barrier);
  return result;
}

// Operations are matched by kind, place and mask. What can never be completed is found when the
// launch is stuck, or when a lane that is waited for leaves the kernel.
uint64_t warp_collective(WarpKind kind, uint32_t mask, uint64_t value, uint32_t source, Site site) {
  Thread& self = running_thread("a warp operation", site);
  Block& block = *self.block;
  const uint32_t warp_index = self.local / 32;
  Warp& warp = block.warps[warp_index];
  state.idle_yields = 0;
  if ((mask >> self.lane & 1) == 0 || (mask & (~warp.present | warp.exited)) != 0 ||
      (mask >> source & 1) == 0) {
    check_mask(self, warp, kind, mask, source, site);
  }
  const auto matches = [&](const WarpOperation& operation) {
    return operation.mask == mask && operation.kind == kind && same_site(operation.site, site);
  };
  auto operation = std::find_if(warp.pending.begin(), warp.pending.end(), matches);
  if (operation == warp.pending.end()) {
    warp.pending.emplace_back();
    operation = warp.pending.end() - 1;
    operation->kind = kind;
    operation->site = site;
    operation->mask = mask;
  }
  operation->value[self.lane] = value;
  operation->source[self.lane] = source;
  operation->arrived |= 1u << self.lane;
  if (operation->arrived != mask) {
    suspend(Wait::kWarp, site);
    return self.result;
  }
  finish_warp_operation(&block, warp_index, *operation);
  warp.pending.erase(operation);
  return self.result;
}

uint32_t shuffle_source(WarpKind kind, int operand, int width, Site site) {
  const Thread& self = running_thread("a shuffle", site);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(self, site, "shuffle width " + std::to_string(width) + " is not a power of two up to 32");
  }
  const int lane = static_cast<int>(self.lane);
  const int first = lane & ~(width - 1);
  const int last = first + width - 1;
  int source = lane;
  if (kind == WarpKind::kShuffle) source = first + (operand & (width - 1));
  if (kind == WarpKind::kShuffleUp) source = lane - operand < first ? lane : lane - operand;
  if (kind == WarpKind::kShuffleDown) source = lane + operand > last ? lane : lane + operand;
  if (kind == WarpKind::kShuffleXor) source = (lane ^ operand) > last ? lane : lane ^ operand;
  return static_cast<uint32_t>(source);
}

void cluster_arrive(Site site) {
  Thread& self = running_thread("a cluster barrier", site);
  if (self.in_cluster_phase) fail(self, site, "arrives twice at a cluster barrier without waiting");
  self.in_cluster_phase = true;
  self.cluster_phase = barrier_of(self).phase;
  arrive(&barrier_of(self), self.block->cluster->blocks);
}

void cluster_wait(Site site) {
  Thread& self = running_thread("a cluster barrier", site);
  if (!self.in_cluster_phase) fail(self, site, "waits at a cluster barrier without having arrived");
  if (barrier_of(self).phase == self.cluster_phase) {
    barrier_of(self).waiting.push_back(&self);
    suspend(Wait::kClusterBarrier, site);
  }
  self.in_cluster_phase = false;
}

void grid_barrier(Site site) {
  Thread& self = running_thread("a grid barrier", site);
  if (!state.cooperative) fail(self, site, "a grid barrier needs a cooperative launch");
  GroupBarrier& barrier = state.grid_barrier;
  std::vector<Block*> blocks;
  if (barrier.arrived + 1 == barrier.expected) {
    for (auto& block : state.blocks) {
      if (block->cluster != nullptr) blocks.push_back(block.get());
    }
  }
  const bool last = !blocks.empty();
  if (!last) barrier.waiting.push_back(&self);
  arrive(&barrier, blocks);
  if (!last) suspend(Wait::kGridBarrier, site);
}

void thread_exited(Thread* thread) {
  Block& block = *thread->block;
  Warp& warp = block.warps[thread->local / 32];
  note_progress();
  if (!block.at_barrier.empty()) {
    fail(*thread, block.barrier_site,
         "divergent barrier: the thread left the kernel while " +
             std::to_string(block.at_barrier.size()) + " threads, such as " +
             describe(*block.at_barrier.front()) + ", wait at this __syncthreads");
  }
  for (const WarpOperation& operation : warp.pending) {
    if ((operation.mask >> thread->lane & 1) == 0) continue;
    fail(*thread, operation.site,
         "divergent warp operation: the thread left the kernel, but lanes " +
             lane_list(operation.arrived) + " of its warp wait for it here with mask " +
             hex(operation.mask));
  }
  warp.exited |= 1u << thread->lane;
  if (++block.exited == block.threads.size()) check_remote_use(block);
}

// A thread that reads one address over and over waits for another to write it. Without a turn for
// the others the race, or the deadlock, would hang the launch instead of being reported.
void note_plain_read(const Thread* thread, const void* address, Site site) {
  constexpr uint32_t kPollingReads = 64;
  RepeatedRead& read = state.repeated_read;
  if (read.address != address || read.thread != thread) {
    read = {thread, address, 0};
  } else if (++read.times == kPollingReads) {
    read.times = 0;
    yield(site);
  }
}

void note_progress() { state.idle_yields = state.silent_yields = 0; }
uint64_t clock_ticks() { return ++state.ticks; }
unsigned int cluster_rank() { return running_thread("cluster rank", {"", 0}).block->cluster_rank; }
unsigned int cluster_size() {
  return state.cluster_dims.x * state.cluster_dims.y * state.cluster_dims.z;
}
dim3 cluster_block_index() {
  const uint3 index = running_thread("cluster block index", {"", 0}).block->index;
  return dim3(index.x % state.cluster_dims.x, index.y % state.cluster_dims.y,
              index.z % state.cluster_dims.z);
}
dim3 cluster_dims() { return state.cluster_dims; }

}  // namespace simt::detail
