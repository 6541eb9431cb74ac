// What is ordered before what: stamps of a block's time, and clocks for knowledge across blocks.
#include <algorithm>

#include "engine.h"

namespace simt::detail {
namespace {

uint32_t launch_thread(const Thread& thread) { return stamp_thread(thread.stamp); }

void start_stretch(Thread* thread, uint32_t time) {
  thread->stamp = make_stamp(launch_thread(*thread), time);
}

template <typename Threads>
ClockPtr joined_knowledge(const Threads& threads) {
  ClockPtr all;
  for (const Thread* thread : threads) all = join(all, thread->known);
  return all;
}

std::vector<Thread*> all_threads(Block* block) {
  std::vector<Thread*> threads;
  for (Thread& thread : block->threads) threads.push_back(&thread);
  return threads;
}

// A fence before a barrier also covers the relaxed atomics of other threads after that barrier.
void hand_on_fences(Block* block) {
  auto fenced = std::make_shared<Clock>();
  for (const Thread& thread : block->threads) {
    if (thread.fence_time != 0)
      fenced->threads.emplace_back(launch_thread(thread), thread.fence_time);
  }
  const ClockPtr shared = join(fenced, block->threads.front().known);
  for (Thread& thread : block->threads) {
    thread.fenced = thread.fenced ? join(thread.fenced, shared) : shared;
    thread.fence_time = 0;
  }
  block->fenced = false;
}

}  // namespace

ClockPtr clock_of(const Thread& thread) {
  auto own = std::make_shared<Clock>();
  own->blocks.emplace_back(thread.block->rank, thread.block->last_barrier);
  own->threads.emplace_back(launch_thread(thread), stamp_time(thread.stamp) + 1);
  return join(own, thread.known);
}

void tick(Block* block, Thread* thread) { start_stretch(thread, ++block->time); }

void order_at_barrier(Block* block) {
  block->last_barrier = ++block->time;
  for (Thread& thread : block->threads) start_stretch(&thread, block->time);
  if (block->clocks_differ) {
    const ClockPtr all = joined_knowledge(all_threads(block));
    for (Thread& thread : block->threads) thread.known = all;
    block->clocks_differ = false;
  }
  if (block->fenced) hand_on_fences(block);
}

void order_at_group_barrier(const std::vector<Block*>& blocks) {
  auto here = std::make_shared<Clock>();
  ClockPtr all;
  for (Block* block : blocks) {
    order_at_barrier(block);
    here->blocks.emplace_back(block->rank, block->last_barrier);
    all = join(all, block->threads.front().known);
  }
  std::sort(here->blocks.begin(), here->blocks.end());
  all = join(all, here);
  for (Block* block : blocks) {
    for (Thread& thread : block->threads) thread.known = all;
  }
}

void order_at_warp_sync(Block* block, uint32_t warp, uint32_t lanes) {
  const uint32_t time = ++block->time;
  std::vector<Thread*> threads;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    Thread* thread = &block->threads[warp * 32 + lane];
    start_stretch(thread, time);
    thread->sync_time = time;
    thread->sync_lanes = lanes;
    threads.push_back(thread);
  }
  if (!block->clocks_differ) return;
  const ClockPtr all = joined_knowledge(threads);
  for (Thread* thread : threads) thread->known = all;
}

void fence() {
  Thread& self = running_thread("__threadfence", {"", 0});
  if (self.acquired) {
    self.known = join(self.known, self.acquired);
    self.acquired.reset();
    self.block->clocks_differ = true;
  }
  self.fenced = clock_of(self);
  tick(self.block, &self);
  self.fence_time = self.block->time;
  self.block->fenced = true;
}

void order_at_atomic(Thread* thread, const void* address, Access access, Order order) {
  const bool acquires = order == Order::kAcquire || order == Order::kAcquireRelease;
  const bool releases = order == Order::kRelease || order == Order::kAcquireRelease;
  ClockPtr& released = state.released[address];
  ClockPtr& last = acquires ? thread->last_acquired : thread->last_seen;
  if (access != Access::kWrite && released && released != last) {
    last = released;
    ClockPtr& target = acquires ? thread->known : thread->acquired;
    target = join(target, released);
    thread->block->clocks_differ |= acquires;
  }
  if (access == Access::kRead) return;
  const ClockPtr own = releases ? clock_of(*thread) : thread->fenced;
  // An update keeps what earlier writers released here; a plain atomic write ends that.
  released = access == Access::kUpdate ? join(released, own) : own;
  if (releases) tick(thread->block, thread);
}

}  // namespace simt::detail
