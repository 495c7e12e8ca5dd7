// The kernels in a process of another architecture, which works on its parent's memory.
//
// A call arrives as a name and the bytes of its arguments, whose addresses are the parent's. A page
// that is touched is fetched from there, to the same address, and all are written back and dropped
// when the call ends.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "cpu.cpp"

constexpr uintptr_t PAGE = 4096;
static uintptr_t pages[1 << 16];
static size_t count;
static int parent;

static void fail(const char* what) {
  std::perror(what);
  _exit(3);
}

static void fetch(int, siginfo_t* info, void*) {
  uintptr_t at = (uintptr_t)info->si_addr & ~(PAGE - 1);
  void* page = mmap((void*)at, PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (page != (void*)at || count == sizeof pages / sizeof *pages) fail("a page has no place");
  if (pread(parent, page, PAGE, (off_t)at) != (ssize_t)PAGE) fail("a page is not the parent's");
  pages[count++] = at;
}

static void give_back() {
  for (size_t i = 0; i < count; i++) {
    // A page that may only be read there was not written here.
    if (pwrite(parent, (void*)pages[i], PAGE, (off_t)pages[i]) < 0) fail("a page does not go back");
    munmap((void*)pages[i], PAGE);
  }
  count = 0;
}

template <class Result, class Argument>
static int64_t call(Result (*function)(Argument), char* bytes) {
  if constexpr (std::is_void<Result>::value) return function((Argument)bytes), 0;
  else return function((Argument)bytes);
}

static int64_t dispatch(const char* name, char* bytes) {
#define NAMED(function) if (!std::strcmp(name, #function)) return call(function, bytes);
#include "names.h"
  fail(name);
  return 0;
}

int main(int, char** arguments) {
  parent = open(arguments[1], O_RDWR);
  if (parent < 0) fail(arguments[1]);
  struct sigaction action {};
  action.sa_sigaction = fetch;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
  static char name[128], bytes[4096];
  int32_t sizes[2];
  while (std::fread(sizes, sizeof sizes, 1, stdin) == 1) {
    if (sizes[0] >= (int)sizeof name || sizes[1] > (int)sizeof bytes) fail("a call is too long");
    std::memset(name, 0, sizeof name);
    std::memset(bytes, 0, sizeof bytes);
    if (std::fread(name, 1, sizes[0], stdin) != (size_t)sizes[0]) break;
    if (std::fread(bytes, 1, sizes[1], stdin) != (size_t)sizes[1]) break;
    int64_t result = dispatch(name, bytes);
    give_back();
    std::fwrite(&result, sizeof result, 1, stdout);
    std::fflush(stdout);
  }
}
