// Stacks, and changing from one to another. Used by world.cpp and async.cpp alone.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fa2_host {

#if defined(__x86_64__)
// What a call must keep is pushed, the stack pointers are exchanged, and the other side's is popped.
// Weak: each file that includes this has it.
extern "C" void fa2_host_switch(void** save, void* load);
asm(R"(
.text
.weak fa2_host_switch
.hidden fa2_host_switch
.type fa2_host_switch, @function
fa2_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fa2_host_switch, . - fa2_host_switch
)");

struct Context {
  void* sp = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // entry sees the stack as if it had been called: 16-byte aligned before the return address
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    sp = top;
  }
  static void change(Context& from, Context& to) { fa2_host_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

constexpr size_t kStackBytes = 256 << 10;

// Frames that were never left: the address sanitizer remembers them.
inline void forget_frames([[maybe_unused]] char* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);
#endif
}

// Stacks for one block's threads, each above a page that cannot be touched. The next block gets the same ones: making
// them takes longer than many a block runs.
class Stacks {
 public:
  explicit Stacks(int count) : page_(sysconf(_SC_PAGESIZE)), count_(count) {
    for (Spare& spare : spares()) {
      if (!spare.base || spare.count != count) continue;
      base_ = spare.base;
      spare.base = nullptr;
      return;
    }
    void* memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    base_ = static_cast<char*>(memory);
    for (int i = 0; i < count; i++) mprotect(base_ + i * (kStackBytes + page_), page_, PROT_NONE);
  }
  ~Stacks() {
    forget_frames(base_, bytes());  // the next thing that is mapped here is no stack
    for (Spare& spare : spares()) {
      if (spare.base) continue;
      spare = {base_, count_};
      return;
    }
    munmap(base_, bytes());
  }
  Stacks(const Stacks&) = delete;
  char* operator[](int i) const { return base_ + i * (kStackBytes + page_) + page_; }

 private:
  struct Spare {
    char* base;
    int count;
  };
  using Spares = Spare[16];
  // With g++ one for all libraries of the process (STB_GNU_UNIQUE).
  __attribute__((visibility("default"))) static Spares& spares() {
    static Spares all;
    return all;
  }
  size_t bytes() const { return count_ * (kStackBytes + page_); }

  size_t page_;
  int count_;
  char* base_;
};

}  // namespace fa2_host
