#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace simt::detail {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kStacksPerSlab = 64;
// Each guard page costs the process two mappings, of which Linux allows about 65000.
constexpr size_t kMaxGuardedStacks = 8192;
constexpr size_t kColourStep = 192;
constexpr size_t kMaxColour = 8192;
constexpr uint64_t kCanary = 0x57ac6e6d5ca1ab1eull;

}  // namespace

Stack* StackPool::take() {
  if (free_.empty()) grow();
  Stack* stack = free_.back();
  free_.pop_back();
  return stack;
}

void StackPool::grow() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t stride = kStackBytes + guard;
  void* slab = mmap(nullptr, stride * kStacksPerSlab, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (slab == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = kStacksPerSlab; i-- > 0;) {
    unsigned char* low = static_cast<unsigned char*>(slab) + i * stride;
    if (guarded_ < kMaxGuardedStacks && mprotect(low, guard, PROT_NONE) == 0) ++guarded_;
    auto* stack = new Stack;
    stack->low = low + guard;
    // Tops at one offset in all stacks would fall into the same few cache sets.
    stack->bytes = kStackBytes - i % (kMaxColour / kColourStep) * kColourStep;
    std::memcpy(stack->low, &kCanary, sizeof(kCanary));
    free_.push_back(stack);
  }
}

bool StackPool::overrun(const Stack& stack) {
  return std::memcmp(stack.low, &kCanary, sizeof(kCanary)) != 0;
}

#if defined(SIMT_UCONTEXT)

Suspended prepare(Stack* stack, void (*entry)()) {
  getcontext(&stack->context);
  stack->context.uc_stack.ss_sp = stack->low;
  stack->context.uc_stack.ss_size = stack->bytes;
  stack->context.uc_link = nullptr;
  makecontext(&stack->context, entry, 0);
  return &stack->context;
}

void switch_to(Suspended* from, Suspended to) {
  static ucontext_t launcher;
  // The launching thread has no Stack: its context lives here, one launch running at a time.
  if (*from == nullptr) *from = &launcher;
  swapcontext(*from, to);
}

#else

extern "C" void simt_switch_fiber(void** from, void* to);

// Pushes the callee-saved registers, swaps stack pointers and pops the other side's.
constexpr size_t kSavedWords = 6;
asm(R"(
.text
.p2align 4
.type simt_switch_fiber,@function
.globl simt_switch_fiber
.hidden simt_switch_fiber
simt_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_fiber,.-simt_switch_fiber
)");

Suspended prepare(Stack* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack->low + stack->bytes);
  // The switch returns into entry, which must then see rsp = 16 k + 8 as after a call.
  uint64_t* frame = top - 2 - kSavedWords;
  std::memset(frame, 0, (kSavedWords + 2) * sizeof(uint64_t));
  frame[kSavedWords] = reinterpret_cast<uint64_t>(entry);
  return frame;
}

void switch_to(Suspended* from, Suspended to) { simt_switch_fiber(from, to); }

#endif

}  // namespace simt::detail
