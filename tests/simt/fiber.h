// Stacks for CUDA threads and the switch between them.
#pragma once

#include <cstddef>
#include <vector>

// Elsewhere than on x86-64, or where it is asked for, the C library switches: portable but slower.
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt::detail {

struct Stack {
  unsigned char* low = nullptr;  // lowest usable byte
  size_t bytes = 0;
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#endif
};

// A suspended computation: its stack pointer, or its context where there is no assembly switch.
#ifdef SIMT_UCONTEXT
using Suspended = ucontext_t*;
#else
using Suspended = void*;
#endif

// Keeps every stack it ever made: the last one given back is the next one out, so that threads
// which run one after another share a warm stack.
class StackPool {
 public:
  Stack* take();
  void give_back(Stack* stack) { free_.push_back(stack); }
  // True if the thread on this stack ran over its end (only needed where no guard page stops it).
  static bool overrun(const Stack& stack);

 private:
  void grow();
  std::vector<Stack*> free_;
  size_t guarded_ = 0;
};

// A computation that will call entry() on this stack when first switched to; entry never returns.
Suspended prepare(Stack* stack, void (*entry)());

// Saves the running computation into *from and goes on with `to`.
void switch_to(Suspended* from, Suspended to);

}  // namespace simt::detail
