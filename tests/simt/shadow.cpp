#include "shadow.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "engine.h"

namespace simt::detail {
namespace {

using Entries = std::vector<std::pair<uint32_t, uint32_t>>;

// Blocks of records by granule size, kept for the next launch.
class RecordPool {
 public:
  Record* take(unsigned granule_log2) {
    auto& free = free_[granule_log2];
    if (free.empty()) return new Record[count(granule_log2)]();
    Record* records = free.back();
    free.pop_back();
    std::memset(static_cast<void*>(records), 0, count(granule_log2) * sizeof(Record));
    return records;
  }
  void give_back(Record* records, unsigned granule_log2) { free_[granule_log2].push_back(records); }
  static size_t count(unsigned granule_log2) { return Shadow::kChunkBytes >> granule_log2; }

 private:
  std::vector<Record*> free_[Shadow::kMaxGranuleLog2 + 1];
};

RecordPool& record_pool() {
  static auto* pool = new RecordPool;  // never destroyed: shadows may outlive other statics
  return *pool;
}

Entries join_entries(const Entries& a, const Entries& b) {
  Entries joined;
  joined.reserve(a.size() + b.size());
  size_t i = 0;
  size_t j = 0;
  while (i < a.size() || j < b.size()) {
    if (j == b.size() || (i < a.size() && a[i].first < b[j].first)) {
      joined.push_back(a[i++]);
    } else if (i == a.size() || b[j].first < a[i].first) {
      joined.push_back(b[j++]);
    } else {
      joined.emplace_back(a[i].first, std::max(a[i].second, b[j].second));
      ++i;
      ++j;
    }
  }
  return joined;
}

bool known_through_clock(const Thread& now, uint32_t block, uint32_t thread, uint32_t time) {
  if (!now.known) return false;
  return clock_covers(now.known->blocks, block, time) ||
         clock_covers(now.known->threads, thread, time);
}

bool ordered(Stamp earlier, const Thread& now) {
  if (same_thread(earlier, now.stamp)) return true;
  const uint32_t thread = stamp_thread(earlier);
  const uint32_t time = stamp_time(earlier);
  const uint32_t block = thread / state.threads_per_block;
  if (block == now.block->rank) {
    if (time < now.block->last_barrier) return true;
    const uint32_t local = thread - block * state.threads_per_block;
    if (local / 32 == now.local / 32 && (now.sync_lanes >> (local % 32) & 1) != 0 &&
        time < now.sync_time) {
      return true;
    }
  }
  return known_through_clock(now, block, thread, time);
}

bool ordered(const ReaderEntry& entry, const Thread& now) {
  if (entry.scope == ReaderEntry::Scope::kThread) {
    return ordered(make_stamp(entry.thread, entry.time), now);
  }
  const uint32_t block = entry.thread / state.threads_per_block;
  if (block == now.block->rank) {
    if (entry.time < now.block->last_barrier) return true;
    const uint32_t local = entry.thread - block * state.threads_per_block;
    const uint32_t others = entry.lanes & ~(1u << now.lane);
    if (entry.scope == ReaderEntry::Scope::kWarp && local / 32 == now.local / 32 &&
        (others == 0 || ((others & ~now.sync_lanes) == 0 && entry.time < now.sync_time))) {
      return true;
    }
  }
  return now.known && clock_covers(now.known->blocks, block, entry.time);
}

ReaderEntry entry_of(Stamp reader) {
  const uint32_t thread = stamp_thread(reader);
  const uint32_t lane = thread % state.threads_per_block % 32;
  return {ReaderEntry::Scope::kThread, thread, thread, 1u << lane, stamp_time(reader),
          (reader & kAtomic) != 0};
}

void add_reader(ReaderSet* set, Stamp reader, const Thread& now) {
  const ReaderEntry fresh = entry_of(reader);
  for (ReaderEntry& entry : *set) {
    if (entry.thread / state.threads_per_block != now.block->rank) continue;
    const bool atomic = entry.atomic && fresh.atomic;
    if (ordered(entry, now)) {
      entry = fresh;
    } else {
      const bool one_warp = entry.scope != ReaderEntry::Scope::kBlock &&
                            entry.thread % state.threads_per_block / 32 == now.local / 32;
      entry.scope = one_warp ? ReaderEntry::Scope::kWarp : ReaderEntry::Scope::kBlock;
      entry.lanes |= fresh.lanes;
      entry.time = std::max(entry.time, fresh.time);
      if (entry.thread != fresh.thread) entry.another = std::exchange(entry.thread, fresh.thread);
    }
    entry.atomic = atomic;
    return;
  }
  set->push_back(fresh);
}

void note_reader(ReaderPool* readers, Record* record, Stamp stamp, const Thread& now) {
  if (record->reader < kManyReaders) {
    const bool keeps_plain = (stamp & kAtomic) == 0 || (record->reader & kAtomic) != 0;
    if (record->reader == 0 || (ordered(record->reader, now) && keeps_plain)) {
      record->reader = stamp;
      return;
    }
    const uint32_t index = readers->take();
    (*readers)[index].assign(1, entry_of(record->reader));
    record->reader = kManyReaders | index;
  }
  add_reader(&(*readers)[static_cast<uint32_t>(record->reader)], stamp, now);
}

// A reader not ordered before a write by `now`, or 0.
Stamp racing_reader(ReaderPool* readers, const Record& record, const Thread& now, bool atomic) {
  if (record.reader < kManyReaders) {
    const bool both_atomic = atomic && (record.reader & kAtomic) != 0;
    return both_atomic || ordered(record.reader, now) ? 0 : record.reader;
  }
  for (const ReaderEntry& entry : (*readers)[static_cast<uint32_t>(record.reader)]) {
    if (!(atomic && entry.atomic) && !ordered(entry, now)) {
      const Stamp stamp = make_stamp(entry.thread, entry.time);
      return same_thread(stamp, now.stamp) ? make_stamp(entry.another, entry.time) : stamp;
    }
  }
  return 0;
}

}  // namespace

bool clock_covers(const Entries& entries, uint32_t key, uint32_t time) {
  const auto at = std::lower_bound(entries.begin(), entries.end(), std::make_pair(key, 0u));
  return at != entries.end() && at->first == key && time < at->second;
}

ClockPtr join(const ClockPtr& a, const ClockPtr& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto joined = std::make_shared<Clock>();
  joined->blocks = join_entries(a->blocks, b->blocks);
  joined->threads = join_entries(a->threads, b->threads);
  return joined;
}

uint32_t ReaderPool::take() {
  if (!free_.empty()) {
    const uint32_t index = free_.back();
    free_.pop_back();
    return index;
  }
  if (used_ == sets_.size()) sets_.emplace_back();
  return used_++;
}

void ReaderPool::reset() {
  used_ = 0;
  free_.clear();
}

void Shadow::cover(uintptr_t begin, size_t bytes, ReaderPool* readers) {
  clear();
  readers_ = readers;
  base_ = begin & ~(kChunkBytes - 1);
  chunks_.resize((begin + bytes - base_ + kChunkBytes - 1) >> kChunkLog2);
}

void Shadow::clear() {
  for (uint32_t index : touched_) {
    Chunk& chunk = chunks_[index];
    record_pool().give_back(chunk.records, chunk.granule_log2);
    chunk = Chunk();
  }
  touched_.clear();
}

void Shadow::divide(Chunk* chunk, unsigned granule_log2) {
  const unsigned log2 = std::min(granule_log2, kMaxGranuleLog2);
  Record* records = record_pool().take(log2);
  if (chunk->records == nullptr) {
    touched_.push_back(static_cast<uint32_t>(chunk - chunks_.data()));
  } else {
    const unsigned shift = chunk->granule_log2 - log2;
    for (size_t i = 0; i < RecordPool::count(log2); ++i) {
      records[i] = chunk->records[i >> shift];
      if (records[i].reader >= kManyReaders && (i & ((size_t{1} << shift) - 1)) != 0) {
        const ReaderSet copy = (*readers_)[static_cast<uint32_t>(records[i].reader)];
        const uint32_t own = readers_->take();
        (*readers_)[own] = copy;
        records[i].reader = kManyReaders | own;
      }
    }
    record_pool().give_back(chunk->records, chunk->granule_log2);
  }
  chunk->records = records;
  chunk->granule_log2 = log2;
}

bool Shadow::written(uintptr_t address) const {
  const Chunk& chunk = chunks_[(address - base_) >> kChunkLog2];
  return chunk.records != nullptr &&
         chunk.records[(address & (kChunkBytes - 1)) >> chunk.granule_log2].writer != 0;
}

uintptr_t Shadow::first_unwritten(uintptr_t begin, uintptr_t end, size_t* missing_bytes) const {
  uintptr_t first = end;
  *missing_bytes = 0;
  for (uintptr_t address = begin; address < end;) {
    const Chunk& chunk = chunks_[(address - base_) >> kChunkLog2];
    const size_t step = chunk.records == nullptr ? kChunkBytes : size_t{1} << chunk.granule_log2;
    const uintptr_t next = std::min((address & ~(step - 1)) + step, end);
    if (!written(address)) {
      first = std::min(first, address);
      *missing_bytes += next - address;
    }
    address = next;
  }
  return first;
}

AccessResult note_read(Shadow* shadow, uintptr_t address, size_t bytes, const Thread& thread,
                       bool atomic, bool unwritten_readable) {
  size_t count;
  Record* records = shadow->find(address, bytes, &count);
  const Stamp stamp = thread.stamp | (atomic ? kAtomic : 0);
  for (size_t i = 0; i < count; ++i) {
    Record& record = records[i];
    if (record.writer == 0) {
      if (!unwritten_readable) return {AccessResult::Kind::kUnwritten, 0, i * bytes / count};
    } else if (!(atomic && (record.writer & kAtomic) != 0) && !ordered(record.writer, thread)) {
      return {AccessResult::Kind::kWriteRace, record.writer, i * bytes / count};
    }
    if (same_thread(record.reader, stamp) && ((record.reader & kAtomic) != 0) == atomic) {
      record.reader = stamp;
    } else {
      note_reader(&shadow->readers(), &record, stamp, thread);
    }
  }
  return {};
}

AccessResult note_write(Shadow* shadow, uintptr_t address, size_t bytes, const Thread& thread,
                        bool atomic) {
  size_t count;
  Record* records = shadow->find(address, bytes, &count);
  const Stamp stamp = thread.stamp | (atomic ? kAtomic : 0);
  for (size_t i = 0; i < count; ++i) {
    Record& record = records[i];
    if (record.writer != 0 && !(atomic && (record.writer & kAtomic) != 0) &&
        !ordered(record.writer, thread)) {
      return {AccessResult::Kind::kWriteRace, record.writer, i * bytes / count};
    }
    if (record.reader != 0) {
      const Stamp reader = racing_reader(&shadow->readers(), record, thread, atomic);
      if (reader != 0) return {AccessResult::Kind::kReadRace, reader, i * bytes / count};
      if (record.reader >= kManyReaders) {
        shadow->readers().give_back(static_cast<uint32_t>(record.reader));
      }
      record.reader = 0;
    }
    record.writer = stamp;
  }
  return {};
}

}  // namespace simt::detail
