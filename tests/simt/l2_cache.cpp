// The L2 cache of simt_traffic.h.
#include <algorithm>
#include <cstddef>

#include "simt_traffic.h"

namespace simt {
namespace {

constexpr uint32_t kWhole = ~0u;
constexpr uint64_t kSectorsPerLine = kLineBytes / kSectorBytes;

// Spreads lines over sets as a GPU does, so that strides of a power of two share no set.
uint64_t mix(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

}  // namespace

L2Cache::L2Cache(size_t bytes, size_t ways)
    : ways_(ways), sets_(std::max<size_t>(1, bytes / kLineBytes / ways)), lines_(ways_ * sets_) {}

void L2Cache::evict(Line* line) {
  Dram& dram = dram_[line->owner];
  for (Sector& sector : line->sectors) {
    if (sector.dirty != 0) {
      if (sector.present != kWhole) dram.read += kSectorBytes;
      dram.written += kSectorBytes;
    }
    sector = Sector();
  }
  line->used = 0;
}

L2Cache::Sector& L2Cache::find(uint64_t sector, uint32_t owner) {
  if (owner >= dram_.size()) dram_.resize(owner + 1);
  const uint64_t number = sector / kSectorsPerLine;
  Line* const set = &lines_[mix(number) % sets_ * ways_];
  Line* oldest = set;
  ++time_;
  for (Line* line = set; line != set + ways_; ++line) {
    if (line->used != 0 && line->number == number) {
      line->used = time_;
      return line->sectors[sector % kSectorsPerLine];
    }
    if (line->used < oldest->used) oldest = line;
  }
  if (oldest->used != 0) evict(oldest);
  oldest->number = number;
  oldest->owner = owner;
  oldest->used = time_;
  return oldest->sectors[sector % kSectorsPerLine];
}

void L2Cache::read(uint64_t sector, uint32_t bytes, uint32_t owner) {
  Sector& found = find(sector, owner);
  if ((bytes & ~found.present) == 0) return;
  dram_[owner].read += kSectorBytes;
  found.present = kWhole;
}

void L2Cache::write(uint64_t sector, uint32_t bytes, uint32_t owner) {
  Sector& found = find(sector, owner);
  found.present |= bytes;
  found.dirty |= bytes;
}

void L2Cache::flush() {
  for (Line& line : lines_) {
    if (line.used != 0) evict(&line);
  }
}

}  // namespace simt
