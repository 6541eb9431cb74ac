// Who last wrote and read each piece of a memory range, and whether that was ordered.
//
// Time. Each block counts its synchronisations. A thread's stamp is (thread, the block's count when
// the thread last synchronised): it names the stretch of code between two synchronisations. An
// earlier access is ordered before a later one if a block barrier, a __syncwarp of both threads, or
// a chain of cluster barriers, fences and atomics lies between (see Clock).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace simt::detail {

struct Thread;

// thread + 1 in the upper half; in the lower the time, shifted, and whether the access was atomic.
using Stamp = uint64_t;
constexpr Stamp kAtomic = 1;

inline Stamp make_stamp(uint32_t thread, uint32_t time) {
  return (static_cast<uint64_t>(thread) + 1) << 32 | static_cast<uint64_t>(time) << 1;
}
inline uint32_t stamp_thread(Stamp stamp) { return static_cast<uint32_t>(stamp >> 32) - 1; }
inline uint32_t stamp_time(Stamp stamp) { return static_cast<uint32_t>(stamp) >> 1; }
inline bool same_thread(Stamp a, Stamp b) { return (a ^ b) >> 32 == 0; }

// What a thread knows of others beyond its own block's barriers: accesses of block b at times
// before blocks[b], and of thread t before threads[t], are ordered before whatever it does next.
struct Clock {
  std::vector<std::pair<uint32_t, uint32_t>> blocks;
  std::vector<std::pair<uint32_t, uint32_t>> threads;
};
using ClockPtr = std::shared_ptr<const Clock>;

bool clock_covers(const std::vector<std::pair<uint32_t, uint32_t>>& entries, uint32_t key,
                  uint32_t time);
ClockPtr join(const ClockPtr& a, const ClockPtr& b);

// Several readers of one piece since its last write, one entry for each block: a thread, some lanes
// of a warp, or any threads of the block, with the latest time.
struct ReaderEntry {
  enum class Scope { kThread, kWarp, kBlock } scope;
  uint32_t thread;   // one of them
  uint32_t another;  // and, beyond kThread, another
  uint32_t lanes;    // for kWarp
  uint32_t time;
  bool atomic;
};
using ReaderSet = std::vector<ReaderEntry>;

// Reader sets by index, kept for reuse.
class ReaderPool {
 public:
  uint32_t take();
  void give_back(uint32_t index) { free_.push_back(index); }
  void reset();
  ReaderSet& operator[](uint32_t index) { return sets_[index]; }

 private:
  std::vector<ReaderSet> sets_;
  std::vector<uint32_t> free_;
  uint32_t used_ = 0;
};

struct Record {
  Stamp writer;  // 0: never written
  Stamp reader;  // 0: not read since; with kManyReaders above, the index of a ReaderSet
};
constexpr uint64_t kManyReaders = 0xffffffffull << 32;

// The records of one range. Each chunk of the range starts with a record per 16 bytes and is
// divided further once a smaller access comes.
class Shadow {
 public:
  static constexpr unsigned kChunkLog2 = 10;
  static constexpr size_t kChunkBytes = size_t{1} << kChunkLog2;
  static constexpr unsigned kMaxGranuleLog2 = 4;

  Shadow() = default;
  Shadow(Shadow&&) = default;
  Shadow& operator=(Shadow&&) = delete;
  ~Shadow() { clear(); }

  void cover(uintptr_t begin, size_t bytes, ReaderPool* readers);
  void clear();  // forgets all accesses

  // First of the records of [address, address + bytes); bytes is a power of two up to 16 and
  // divides the address.
  Record* find(uintptr_t address, size_t bytes, size_t* count) {
    Chunk& chunk = chunks_[(address - base_) >> kChunkLog2];
    const auto log2 = static_cast<unsigned>(__builtin_ctzll(bytes));
    if (__builtin_expect(chunk.granule_log2 > log2, 0)) divide(&chunk, log2);
    *count = bytes >> chunk.granule_log2;
    return chunk.records + ((address & (kChunkBytes - 1)) >> chunk.granule_log2);
  }

  ReaderPool& readers() { return *readers_; }

  // Address of the first byte of [begin, end) never written, or end.
  uintptr_t first_unwritten(uintptr_t begin, uintptr_t end, size_t* missing_bytes) const;

 private:
  struct Chunk {
    Record* records = nullptr;
    unsigned granule_log2 = 255;  // larger than any access's: no records yet
  };
  void divide(Chunk* chunk, unsigned granule_log2);
  bool written(uintptr_t address) const;

  ReaderPool* readers_ = nullptr;
  uintptr_t base_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<uint32_t> touched_;
};

struct AccessResult {
  enum class Kind { kFine, kUnwritten, kWriteRace, kReadRace } kind = Kind::kFine;
  Stamp other = 0;    // the thread raced with
  size_t offset = 0;  // of the offending piece in the access
};

// Checks an access by `thread` against the records and notes it there. `unwritten_readable`: the
// memory held values before the kernel.
AccessResult note_read(Shadow* shadow, uintptr_t address, size_t bytes, const Thread& thread,
                       bool atomic, bool unwritten_readable);
AccessResult note_write(Shadow* shadow, uintptr_t address, size_t bytes, const Thread& thread,
                        bool atomic);

}  // namespace simt::detail
