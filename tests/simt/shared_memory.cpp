// A block's shared memory: its objects, their bounds and their initialisation, races, and the view
// that other blocks of the cluster have of it.
#include <algorithm>
#include <cstring>

#include "engine.h"

namespace simt {
namespace detail {
namespace {

// Between objects, so that running over the end of one is seen.
constexpr size_t kRedZone = 64;
constexpr size_t kArenaAlign = 128;
const char kDynamicKey = 0;

size_t round_up(size_t value, size_t align) { return (value + align - 1) / align * align; }

void add_object(const void* key, size_t bytes, size_t align) {
  const size_t offset = round_up(state.shared_used, std::max<size_t>(align, 16));
  state.shared_objects.push_back({key, offset, bytes});
  state.shared_used = offset + bytes + kRedZone;
}

void poison(Block* block, size_t from) {
  std::memset(block->shared + from, 0xff, state.shared_used - from);
}

Block* block_of(const Thread& thread, uintptr_t address) {
  const auto owns = [address](const Block* block) {
    const auto begin = reinterpret_cast<uintptr_t>(block->shared);
    return address >= begin && address < begin + block->shared_capacity;
  };
  if (owns(thread.block)) return thread.block;
  for (Block* block : thread.block->cluster->blocks) {
    if (owns(block)) return block;
  }
  return nullptr;
}

bool in_object(size_t offset, size_t bytes) {
  for (const SharedObject& object : state.shared_objects) {
    if (offset >= object.offset && offset + bytes <= object.offset + object.bytes) return true;
  }
  return false;
}

// Distributed shared memory exists while its block runs: a cluster barrier must lie between the
// start of the blocks and the first access, and between the last access and the owner's end.
void check_remote(const Thread& thread, Block* owner, Site site) {
  const uint32_t phase = owner->cluster->barrier.phase;
  const std::string whose =
      "shared memory of the cluster's block of rank " + std::to_string(owner->cluster_rank);
  if (owner->exited == owner->threads.size()) {
    fail(thread, site, "accesses " + whose + ", which has left the kernel");
  }
  if (phase == 0) {
    fail(thread, site,
         "accesses " + whose + " before any cluster barrier: it may not have started");
  }
  owner->remote_phase = phase;
  owner->remote_site = site;
  owner->remote_rank = thread.block->cluster_rank;
}

[[noreturn]] void fail_shared(const Thread& thread, const AccessResult& result, size_t offset,
                              Access access, Site site) {
  const std::string where = " at byte offset " + std::to_string(offset);
  if (result.kind == AccessResult::Kind::kUnwritten) {
    fail(thread, site, "reads uninitialised shared memory" + where);
  }
  fail_race(thread, site, "shared memory", where, access, result, "no barrier between");
}

AccessResult note_access(Thread* thread, Block* owner, uintptr_t address, size_t bytes,
                         Access access, bool atomic) {
  AccessResult result;
  if (access != Access::kWrite) {
    result = note_read(&owner->shared_shadow, address, bytes, *thread, atomic, false);
  }
  if (access != Access::kRead && result.kind == AccessResult::Kind::kFine) {
    result = note_write(&owner->shared_shadow, address, bytes, *thread, atomic);
  }
  return result;
}

}  // namespace

void lay_out_shared(size_t dynamic_bytes) {
  state.dynamic_bytes = dynamic_bytes;
  state.shared_objects.clear();
  state.shared_used = 0;
  add_object(&kDynamicKey, dynamic_bytes, kArenaAlign);
}

void open_shared(Block* block) {
  // Room for the red zones of a few dozen objects above what the device can give.
  const size_t capacity = static_cast<size_t>(device().shared_per_block_optin) + 8192;
  if (block->shared_capacity != capacity) {
    block->memory.reset(new unsigned char[capacity + kArenaAlign]);
    block->shared_capacity = capacity;
    const auto begin = reinterpret_cast<uintptr_t>(block->memory.get());
    block->shared = reinterpret_cast<unsigned char*>(round_up(begin, kArenaAlign));
    block->shared_shadow.cover(reinterpret_cast<uintptr_t>(block->shared), capacity,
                               &state.shared_readers);
  }
  poison(block, 0);
}

void close_shared(Block* block) { block->shared_shadow.clear(); }

bool is_shared(const Thread& thread, const void* address) {
  return block_of(thread, reinterpret_cast<uintptr_t>(address)) != nullptr;
}

void check_shared(Thread* thread, const void* pointer, size_t bytes, Access access, bool atomic,
                  Site site) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Block* owner = block_of(*thread, address);
  if (owner == nullptr) fail(*thread, site, "shared access outside the block's shared memory");
  const size_t offset = address - reinterpret_cast<uintptr_t>(owner->shared);
  if (owner != thread->block) check_remote(*thread, owner, site);
  if (!in_object(offset, bytes)) {
    fail(*thread, site,
         "shared access of " + std::to_string(bytes) + " bytes at byte offset " +
             std::to_string(offset) + " outside the block's shared memory (" +
             std::to_string(state.dynamic_bytes) + " dynamic bytes)");
  }
  const bool vector = (bytes & (bytes - 1)) == 0 && bytes <= 16;
  if (vector && (address & (bytes - 1)) != 0) {
    fail(*thread, site,
         "misaligned shared access of " + std::to_string(bytes) + " bytes at byte offset " +
             std::to_string(offset));
  }
  if (access == Access::kWrite) note_progress();
  // Structures of other sizes are accessed piece by piece, as their alignment allows.
  const size_t piece =
      vector ? bytes : std::min<size_t>((address | bytes) & -(address | bytes), 16);
  for (size_t at = 0; at < bytes; at += piece) {
    const AccessResult result = note_access(thread, owner, address + at, piece, access, atomic);
    if (result.kind != AccessResult::Kind::kFine) {
      fail_shared(*thread, result, offset + at + result.offset, access, site);
    }
  }
}

void check_remote_use(const Block& block) {
  if (block.remote_phase != static_cast<int64_t>(block.cluster->barrier.phase)) return;
  fail(block.threads.front(), block.remote_site,
       "the block leaves the kernel while the cluster's block of rank " +
           std::to_string(block.remote_rank) +
           " may still access its shared memory: no cluster barrier follows that access");
}

void* map_shared_rank(const void* address, unsigned int rank, Site site) {
  const Thread& self = running_thread("map_shared_rank", site);
  const std::vector<Block*>& blocks = self.block->cluster->blocks;
  if (rank >= blocks.size()) {
    fail(self, site,
         "maps shared memory of rank " + std::to_string(rank) + " in a cluster of " +
             std::to_string(blocks.size()));
  }
  const Block* owner = block_of(self, reinterpret_cast<uintptr_t>(address));
  if (owner == nullptr) fail(self, site, "maps an address outside shared memory");
  return blocks[rank]->shared + (static_cast<const unsigned char*>(address) - owner->shared);
}

unsigned int shared_rank_of(const void* address, Site site) {
  const Thread& self = running_thread("query_shared_rank", site);
  const Block* owner = block_of(self, reinterpret_cast<uintptr_t>(address));
  if (owner == nullptr) fail(self, site, "the rank of an address outside shared memory");
  return owner->cluster_rank;
}

}  // namespace detail

void on_shared_access(const void* address, size_t bytes, Access access, Site site) {
  using namespace detail;
  Thread& self = running_thread("a shared memory access", site);
  if (access == Access::kRead) note_plain_read(&self, address, site);
  check_shared(&self, address, bytes, access, false, site);
}

void* static_shared(const void* key, size_t bytes, size_t align) {
  using namespace detail;
  Thread& self = running_thread("static shared memory", {"", 0});
  for (const SharedObject& object : state.shared_objects) {
    if (object.key == key) return self.block->shared + object.offset;
  }
  size_t total = bytes;
  for (const SharedObject& object : state.shared_objects) total += object.bytes;
  const size_t statics = total - state.dynamic_bytes;
  if (statics > static_cast<size_t>(device().shared_per_block) ||
      total > static_cast<size_t>(device().shared_per_block_optin)) {
    fail(self, {"", 0},
         "too much shared memory: " + std::to_string(statics) + " static bytes (at most " +
             std::to_string(device().shared_per_block) + "), " + std::to_string(total) +
             " with the dynamic ones (at most " + std::to_string(device().shared_per_block_optin) +
             ")");
  }
  const size_t before = state.shared_used;
  add_object(key, bytes, align);
  for (auto& block : state.blocks) {
    if (block->cluster != nullptr) poison(block.get(), before);
  }
  return self.block->shared + state.shared_objects.back().offset;
}

void* dynamic_shared() {
  using namespace detail;
  return running_thread("dynamic shared memory", {"", 0}).block->shared;
}

}  // namespace simt
