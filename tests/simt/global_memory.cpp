// Checks of global memory against the buffers that the kernel's arguments declare.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "traffic.h"

namespace simt {
namespace detail {
namespace {

bool overlap(const Buffer& a, const Buffer& b) { return a.begin < b.end && b.begin < a.end; }

[[noreturn]] void fail_launch(const std::string& what) {
  throw Fault(kernel_name() + ": at launch: " + what);
}

// Adds a declared range; one that is declared twice is read and written in place.
void add_buffer(const BufferUse& use) {
  if (use.pointer == nullptr || use.bytes == 0) return;
  Buffer fresh{};
  fresh.name = use.name;
  fresh.begin = reinterpret_cast<uintptr_t>(use.pointer);
  fresh.end = fresh.begin + use.bytes;
  fresh.readable = use.readable || use.persistent;
  fresh.must_write = use.must_write && !use.persistent;
  fresh.writable = use.must_write || use.persistent || !use.readable;
  Buffer* same = nullptr;
  for (Buffer& other : state.buffers) {
    if (!overlap(other, fresh)) continue;
    if (other.begin == fresh.begin && other.end == fresh.end) {
      same = &other;
    } else if (other.writable || fresh.writable) {
      fail_launch(std::string("buffers '") + other.name + "' and '" + fresh.name +
                  "' overlap in part");
    }
  }
  if (same == nullptr) {
    state.buffers.push_back(std::move(fresh));
    return;
  }
  same->readable |= fresh.readable;
  same->must_write |= fresh.must_write;
  same->writable |= fresh.writable;
}

std::string buffer_text(const Buffer& buffer) {
  return std::string("'") + buffer.name + "' (" + std::to_string(buffer.end - buffer.begin) +
         " bytes)";
}

[[noreturn]] void fail_outside(const Thread& thread, uintptr_t address, size_t bytes, Access access,
                               Site site) {
  const Buffer* nearest = nullptr;
  uintptr_t distance = ~uintptr_t{0};
  for (const Buffer& buffer : state.buffers) {
    const uintptr_t away = address < buffer.begin         ? buffer.begin - address
                           : address + bytes > buffer.end ? address + bytes - buffer.end
                                                          : 0;
    if (nearest == nullptr || away < distance) {
      nearest = &buffer;
      distance = away;
    }
  }
  std::string text = std::string("out-of-bounds global ") +
                     (access == Access::kRead ? "read" : "write") + " of " + std::to_string(bytes) +
                     " bytes";
  if (nearest == nullptr) {
    text += ": the launch declares no buffers";
  } else {
    const auto offset = static_cast<int64_t>(address - nearest->begin);
    text += " at byte offset " + std::to_string(offset) + " of the nearest buffer " +
            buffer_text(*nearest);
  }
  fail(thread, site, text);
}

Buffer* find_buffer(const Thread& thread, uintptr_t address, size_t bytes, Access access,
                    Site site) {
  for (Buffer& buffer : state.buffers) {
    if (address >= buffer.begin && address + bytes <= buffer.end) {
      state.buffer_by_line[site.line & 255] = &buffer;
      return &buffer;
    }
  }
  fail_outside(thread, address, bytes, access, site);
}

[[noreturn]] void fail_access(const Thread& thread, const Buffer& buffer, uintptr_t address,
                              const AccessResult& result, Access access, Site site) {
  const std::string where = " byte offset " +
                            std::to_string(address + result.offset - buffer.begin) + " of " +
                            buffer_text(buffer);
  if (result.kind == AccessResult::Kind::kUnwritten) {
    fail(thread, site, "reads unwritten memory at" + where);
  }
  fail_race(thread, site, "global memory", where, access, result, "nothing ordering");
}

void check_aligned(const Thread& thread, uintptr_t address, size_t bytes, Site site) {
  if (bytes == 0 || (bytes & (bytes - 1)) != 0 || bytes > 16) {
    fail(thread, site,
         "a global access of " + std::to_string(bytes) + " bytes: 1, 2, 4, 8 and 16 are possible");
  }
  if ((address & (bytes - 1)) != 0) {
    fail(thread, site,
         "misaligned global access of " + std::to_string(bytes) + " bytes at address 0x..." +
             std::to_string(address & 15) + " modulo 16");
  }
}

void check_global(Thread* thread, const void* pointer, size_t bytes, Access access, bool atomic,
                  Site site) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (__builtin_expect((bytes & (bytes - 1)) != 0 || bytes - 1 > 15 || (address & (bytes - 1)) != 0,
                       0)) {
    check_aligned(*thread, address, bytes, site);
  }
  if (access == Access::kWrite) note_progress();
  if (!state.checks_buffers) return;
  Buffer* buffer = state.buffer_by_line[site.line & 255];
  if (buffer == nullptr || address < buffer->begin || address + bytes > buffer->end) {
    buffer = find_buffer(*thread, address, bytes, access, site);
  }
  if (!buffer->writable) {
    if (access == Access::kRead) return;
    fail(*thread, site,
         "writes to the input " + buffer_text(*buffer) + " at byte offset " +
             std::to_string(address - buffer->begin));
  }
  AccessResult result;
  if (access != Access::kWrite) {
    result = note_read(&buffer->shadow, address, bytes, *thread, atomic, buffer->readable);
  }
  if (access != Access::kRead && result.kind == AccessResult::Kind::kFine) {
    result = note_write(&buffer->shadow, address, bytes, *thread, atomic);
  }
  if (result.kind != AccessResult::Kind::kFine) {
    fail_access(*thread, *buffer, address, result, access, site);
  }
}

}  // namespace

void open_buffers(const LaunchRequest& request) {
  state.checks_buffers = request.declares_buffers;
  state.buffers.reserve(request.buffers.size());
  for (const BufferUse& use : request.buffers) add_buffer(use);
  for (Buffer& buffer : state.buffers) {
    if (!buffer.writable) continue;
    buffer.shadow.cover(buffer.begin, buffer.end - buffer.begin, &state.global_readers);
    // A pattern that is NaN in every floating-point type.
    if (!buffer.readable) {
      std::memset(reinterpret_cast<void*>(buffer.begin), 0xff, buffer.end - buffer.begin);
    }
  }
}

void check_all_written() {
  for (const Buffer& buffer : state.buffers) {
    if (!buffer.must_write) continue;
    size_t missing = 0;
    const uintptr_t first = buffer.shadow.first_unwritten(buffer.begin, buffer.end, &missing);
    if (missing == 0) continue;
    throw Fault(kernel_name() + ": unwritten output: " + std::to_string(missing) + " bytes of " +
                buffer_text(buffer) + " were not written, the first at byte offset " +
                std::to_string(first - buffer.begin));
  }
}

void close_buffers() {
  state.buffers.clear();
  state.checks_buffers = false;
  std::fill(std::begin(state.buffer_by_line), std::end(state.buffer_by_line), nullptr);
  state.global_readers.reset();
}

}  // namespace detail

void on_global_access(const void* address, size_t bytes, Access access, Site site) {
  using namespace detail;
  Thread* self = state.current;
  if (self == nullptr) return;
  if (access == Access::kRead) note_plain_read(self, address, site);
  check_global(self, address, bytes, access, false, site);
  if (state.traffic == nullptr) return;
  state.traffic->access(*self, address, bytes, access, false, site, __builtin_return_address(0));
}

void on_atomic_access(const void* address, size_t bytes, Access access, Order order, Site site) {
  using namespace detail;
  Thread* self = state.current;
  if (self == nullptr) return;
  if (access != Access::kWrite) yield(site);
  if (is_shared(*self, address)) {
    check_shared(self, address, bytes, access, true, site);
  } else {
    check_global(self, address, bytes, access, true, site);
    if (state.traffic != nullptr) {
      state.traffic->access(*self, address, bytes, access, true, site, __builtin_return_address(0));
    }
  }
  order_at_atomic(self, address, access, order);
}

}  // namespace simt
