// State of the running launch, shared by the engine's parts: scheduler, barriers, memory checks.
// One launch runs at a time, on the OS thread that made it.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "shadow.h"
#include "simt.h"

namespace simt::detail {

struct Block;
class TrafficRecorder;

// What a thread that does not run is doing.
enum class Wait { kRunnable, kYield, kBlockBarrier, kWarp, kClusterBarrier, kGridBarrier, kExited };

struct Thread {
  Suspended suspended = nullptr;
  Stack* stack = nullptr;
  Block* block = nullptr;
  uint3 index{};
  uint32_t local = 0;  // linear index in the block
  uint32_t lane = 0;
  Wait wait = Wait::kRunnable;
  Site site{};                    // of the operation waited in
  uint64_t result = 0;            // of the warp operation, filled in by the last lane to arrive
  bool in_cluster_phase = false;  // between arrive and wait
  uint32_t cluster_phase = 0;     // arrived at

  Stamp stamp = 0;
  uint32_t sync_time = 0;  // of the last __syncwarp, and its lanes
  uint32_t sync_lanes = 0;
  ClockPtr known;          // ordered before this thread
  ClockPtr acquired;       // seen by relaxed atomics, known from the next fence on
  ClockPtr fenced;         // what a relaxed atomic write hands on: all before the last fence
  ClockPtr last_seen;      // taken from an atomic most recently, by a relaxed access
  ClockPtr last_acquired;  // and by an acquiring one: polling takes each once
  uint32_t fence_time = 0;
};

// A warp operation that some lanes of its mask have reached.
struct WarpOperation {
  WarpKind kind;
  Site site;
  uint32_t mask;
  uint32_t arrived = 0;
  uint64_t value[32];
  uint32_t source[32];
};

struct Warp {
  uint32_t present = 0;  // lanes that exist
  uint32_t exited = 0;
  std::vector<WarpOperation> pending;  // with disjoint masks
};

struct SharedObject {
  const void* key;
  size_t offset;
  size_t bytes;
};

// Barrier of the blocks of a cluster, or of the whole grid.
struct GroupBarrier {
  uint32_t arrived = 0;  // threads
  uint32_t expected = 0;
  uint32_t phase = 0;  // completed barriers
  std::vector<Thread*> waiting;
};

struct Cluster {
  std::vector<Block*> blocks;
  GroupBarrier barrier;
};

struct Block {
  uint32_t rank = 0;  // linear index in the grid
  uint3 index{};
  uint32_t cluster_rank = 0;
  Cluster* cluster = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t exited = 0;

  Site barrier_site{};
  BarrierKind barrier_kind = BarrierKind::kPlain;
  std::vector<Thread*> at_barrier;
  uint32_t barrier_true = 0;  // predicates that held

  uint32_t time = 1;  // synchronisations so far
  uint32_t last_barrier = 1;
  bool clocks_differ = false;  // some thread learnt of other blocks since the last barrier
  bool fenced = false;         // some thread executed a fence since then

  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared = nullptr;  // 128-byte aligned in memory
  size_t shared_capacity = 0;
  Shadow shared_shadow;
  // The last cluster barrier phase in which another block touched this block's memory.
  int64_t remote_phase = -1;
  Site remote_site{};
  uint32_t remote_rank = 0;
};

struct Buffer {
  const char* name;
  uintptr_t begin;
  uintptr_t end;
  bool readable;
  bool must_write;
  bool writable;
  Shadow shadow;  // unused for inputs
};

// The plain read a thread made last, and how often in a row.
struct RepeatedRead {
  const Thread* thread = nullptr;
  const void* address = nullptr;
  uint32_t times = 0;
};

struct State {
  Thread* current = nullptr;  // null outside kernels
  bool checks_buffers = false;
  uint64_t idle_yields = 0;    // since any thread did anything but poll
  uint64_t silent_yields = 0;  // since memory changed, or a thread started or ended
  RepeatedRead repeated_read;
  uint32_t threads_per_block = 1;
  uint64_t ticks = 0;

  const LaunchRequest* request = nullptr;
  dim3 cluster_dims;
  GroupBarrier grid_barrier;
  bool cooperative = false;
  size_t dynamic_bytes = 0;
  // One layout for all blocks: the dynamic memory, then static objects as kernels first name them.
  std::vector<SharedObject> shared_objects;
  size_t shared_used = 0;

  Suspended scheduler = nullptr;
  std::vector<Thread*> ready;  // a queue: [ready_head, size)
  size_t ready_head = 0;
  std::vector<std::unique_ptr<Block>> blocks;  // resident ones
  std::vector<std::unique_ptr<Cluster>> clusters;
  uint64_t live_threads = 0;
  std::string fault;  // of the thread that stopped the launch
  std::mt19937_64 random;
  uint64_t random_state = 1;  // of a cheaper generator, for each switch

  ReaderPool global_readers;
  ReaderPool shared_readers;  // of the resident blocks
  std::vector<Buffer> buffers;
  Buffer* buffer_by_line[256] = {};
  std::unordered_map<const void*, ClockPtr> released;  // by address of an atomic

  TrafficRecorder* traffic = nullptr;  // null unless traffic is recorded
};

extern State state;

// scheduler.cpp
void suspend(Wait wait, Site site);  // the running thread, until make_ready
void make_ready(Thread* thread);
void run_grid();
void abandon_grid();

// sync.cpp
void note_plain_read(const Thread* thread, const void* address, Site site);
void thread_exited(Thread* thread);
void tick(Block* block, Thread* thread);              // starts a new stretch of the thread's time
Thread& running_thread(const char* what, Site site);  // or a Fault outside kernels

// faults.cpp
[[noreturn]] void fail(const Thread& thread, Site site, const std::string& what);
[[noreturn]] void fail_race(const Thread& thread, Site site, const std::string& memory,
                            const std::string& where, Access access, const AccessResult& result,
                            const std::string& lacking);
[[noreturn]] void fail_stuck();
std::string kernel_name();
std::string place(Site site);
std::string describe(const Thread& thread);           // "block (0,0,0) thread (3,0,0)"
std::string describe_thread(uint32_t launch_thread);  // the same by linear index in the launch
std::string wait_text(const Thread& thread);
std::string lane_list(uint32_t lanes);

// global_memory.cpp
void open_buffers(const LaunchRequest& request);
void check_all_written();
void close_buffers();

// ordering.cpp
ClockPtr clock_of(const Thread& thread);  // all that is ordered before its next synchronisation
void order_at_barrier(Block* block);
void order_at_group_barrier(const std::vector<Block*>& blocks);
void order_at_warp_sync(Block* block, uint32_t warp, uint32_t lanes);
void order_at_atomic(Thread* thread, const void* address, Access access, Order order);

// shared_memory.cpp
void check_remote_use(const Block& block);  // when its last thread has left
bool is_shared(const Thread& thread, const void* address);
void check_shared(Thread* thread, const void* address, size_t bytes, Access access, bool atomic,
                  Site site);
void lay_out_shared(size_t dynamic_bytes);
void open_shared(Block* block);
void close_shared(Block* block);

// device.cpp
cudaError_t check_launch(const LaunchRequest& request, dim3* cluster, bool* cooperative);
cudaError_t remember(cudaError_t error);
size_t resident_blocks(const LaunchRequest& request);  // of the whole device, at once

}  // namespace simt::detail
