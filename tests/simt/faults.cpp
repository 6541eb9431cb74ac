// The text of faults: kernel, block, thread, source line, rule.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>

#include "engine.h"

namespace simt::detail {
namespace {

// Name of the function at `address` in the symbol table of the file that holds it: kernels in an
// anonymous namespace are not among the dynamic symbols that dladdr knows.
std::string static_symbol(const char* path, uintptr_t base, uintptr_t address) {
  std::ifstream file(path, std::ios::binary);
  const std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  ElfW(Ehdr) header;
  if (image.size() < sizeof(header)) return "";
  std::memcpy(&header, image.data(), sizeof(header));
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "";
  std::vector<ElfW(Shdr)> sections(header.e_shnum);
  if (image.size() < header.e_shoff + sections.size() * sizeof(sections[0])) return "";
  std::memcpy(sections.data(), image.data() + header.e_shoff,
              sections.size() * sizeof(sections[0]));
  const uintptr_t wanted = header.e_type == ET_DYN ? address - base : address;
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
    for (size_t at = 0; at + sizeof(ElfW(Sym)) <= section.sh_size; at += sizeof(ElfW(Sym))) {
      ElfW(Sym) symbol;
      std::memcpy(&symbol, image.data() + section.sh_offset + at, sizeof(symbol));
      if (symbol.st_value != wanted || (symbol.st_info & 0xf) != STT_FUNC) continue;
      return image.data() + sections[section.sh_link].sh_offset + symbol.st_name;
    }
  }
  return "";
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 && text != nullptr ? text : symbol;
  std::free(text);
  return name;
}

// Cuts "void a::(anonymous namespace)::kernel<...>(args)" down to "kernel<...>".
std::string short_name(const std::string& name) {
  size_t depth = 0;
  size_t begin = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    const char c = name[i];
    if (c == '<') ++depth;
    if (c == '>') --depth;
    if (depth != 0) continue;
    if (c == ' ' || c == ':') begin = i + 1;
    if (c == '(' && name.compare(i, 11, "(anonymous ") == 0) {
      i = name.find(')', i);
    } else if (c == '(') {
      return name.substr(begin, i - begin);
    }
  }
  return name.substr(begin);
}

std::string triple(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

uint3 unflatten(uint32_t linear, const dim3& dims) {
  return {linear % dims.x, linear / dims.x % dims.y, linear / dims.x / dims.y};
}

const char* wait_name(Wait wait) {
  switch (wait) {
    case Wait::kRunnable:
      return "runs";
    case Wait::kYield:
      return "polls";
    case Wait::kBlockBarrier:
      return "waits at __syncthreads";
    case Wait::kWarp:
      return "waits at a warp operation";
    case Wait::kClusterBarrier:
      return "waits at a cluster barrier";
    case Wait::kGridBarrier:
      return "waits at a grid barrier";
    case Wait::kExited:
      return "has left the kernel";
  }
  return "";
}

// A warp operation that misses lanes, if there is one.
void fail_for_warps() {
  for (const auto& block : state.blocks) {
    if (block->cluster == nullptr) continue;
    for (size_t w = 0; w < block->warps.size(); ++w) {
      if (block->warps[w].pending.empty()) continue;
      const WarpOperation& operation = block->warps[w].pending.front();
      const uint32_t missing = operation.mask & ~operation.arrived;
      const auto first_of = [&](uint32_t lanes) -> const Thread& {
        return block->threads[w * 32 + static_cast<size_t>(__builtin_ctz(lanes))];
      };
      const Thread& absent = first_of(missing);
      if (absent.wait == Wait::kYield || absent.wait == Wait::kRunnable) continue;
      fail(first_of(operation.arrived), operation.site,
           "divergent warp operation: waits for lanes " + lane_list(missing) +
               " of its warp, but lane " + std::to_string(absent.lane) + " " + wait_text(absent));
    }
  }
}

}  // namespace

std::string kernel_name() {
  const void* kernel = state.request->kernel;
  Dl_info info{};
  std::string symbol;
  if (dladdr(kernel, &info) != 0) {
    if (info.dli_sname != nullptr && info.dli_saddr == kernel) {
      symbol = info.dli_sname;
    } else if (info.dli_fname != nullptr) {
      symbol = static_symbol(info.dli_fname, reinterpret_cast<uintptr_t>(info.dli_fbase),
                             reinterpret_cast<uintptr_t>(kernel));
    }
  }
  return symbol.empty() ? std::string(state.request->signature) : short_name(demangled(symbol));
}

std::string place(Site site) {
  if (site.file == nullptr || *site.file == '\0') return "an unknown line";
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string describe(const Thread& thread) {
  return "block " + triple(thread.block->index) + " thread " + triple(thread.index);
}

std::string describe_thread(uint32_t launch_thread) {
  return "block " + triple(unflatten(launch_thread / state.threads_per_block, gridDim)) +
         " thread " + triple(unflatten(launch_thread % state.threads_per_block, blockDim));
}

void fail_race(const Thread& thread, Site site, const std::string& memory, const std::string& where,
               Access access, const AccessResult& result, const std::string& lacking) {
  const char* mine = access == Access::kRead ? "reads" : "writes";
  const char* theirs = result.kind == AccessResult::Kind::kWriteRace ? "written" : "read";
  fail(thread, site,
       memory + " race: " + mine + where + ", " + theirs + " by " +
           describe_thread(stamp_thread(result.other)) + " with " + lacking + " the two");
}

std::string wait_text(const Thread& thread) {
  std::string text = wait_name(thread.wait);
  if (thread.wait != Wait::kExited) text += " at " + place(thread.site);
  return text;
}

std::string lane_list(uint32_t lanes) {
  std::string text;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    int last = lane;
    while (last < 31 && (lanes >> (last + 1) & 1) != 0) ++last;
    if (!text.empty()) text += ",";
    text += std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return text;
}

void fail(const Thread& thread, Site site, const std::string& what) {
  throw Fault(kernel_name() + ": " + describe(thread) + " at " + place(site) + ": " + what);
}

void fail_stuck() {
  fail_for_warps();
  std::map<std::string, std::pair<size_t, const Thread*>> groups;
  for (const auto& block : state.blocks) {
    if (block->cluster == nullptr) continue;
    for (const Thread& thread : block->threads) {
      if (thread.stack == nullptr) continue;
      auto& group = groups[wait_text(thread)];
      if (++group.first == 1) group.second = &thread;
    }
  }
  std::string text = kernel_name() + ": deadlock: no thread can go on";
  for (const auto& [waits, group] : groups) {
    text += "; " + std::to_string(group.first) + " threads, such as " + describe(*group.second) +
            ": " + waits;
  }
  if (!state.cooperative) {
    text += " (blocks outside this cluster are not guaranteed to run at the same time)";
  }
  throw Fault(text);
}

}  // namespace simt::detail
