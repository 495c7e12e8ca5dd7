// What the machine can do at most: multiply-adds on registers alone, and reading memory.
//
//     fma_peak    many a = a b + c, independent of each other: enough to fill the pipelines
//     bf16_peak   the same with the machine's bfloat16 products: tiles, dot products, or none
//     read_rate   every thread reads its share of a buffer as several streams, a small one again
//
// Rates are a second: floating-point operations (a multiply-add is two), or bytes.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <utility>

#if defined(GATEDFFN_TILES) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(GATEDFFN_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 64, CHAINS = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 32, CHAINS = 12;  // 16 registers: 12 sums and two operands
#elif defined(__aarch64__)
constexpr int WIDTH = 16, CHAINS = 16;
#else
constexpr int WIDTH = 16, CHAINS = 12;
#endif
constexpr int LINE = 64;
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef long long Words __attribute__((vector_size(WIDTH)));

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

using Chains = std::make_integer_sequence<int, CHAINS>;
volatile float sink;  // what is stored here cannot be optimised away

using Loop = void (*)(long);

// The best rate of a loop that does `work` operations an iteration, on all threads at once.
double best(int threads, double seconds, double work, Loop loop) {
  double rate = 0;
  long count = 1 << 12;
  for (double end = now() + seconds; now() < end;) {
    double start = now();
#pragma omp parallel num_threads(threads)
    loop(count);
    double taken = now() - start;
    rate = std::max(rate, threads * work * count / taken);
    if (taken < seconds / 16) count *= 2;
  }
  return rate;
}

// Indices are unfolded by the compiler's front, so that every sum lives in a register.
template <int... I>
void multiply_add(long count, std::integer_sequence<int, I...>) {
  Floats factor = {}, term = {};
  factor += 0.999f;
  term += 1e-4f;
  Floats sum[] = {term * float(I)...};
  while (count--) ((sum[I] = sum[I] * factor + term), ...);
  ((sum[0] += sum[I]), ...);
  sink = sum[0][0];
}

#if defined(__AVX512BF16__)
template <int... I>
void dot_bf16(long count, std::integer_sequence<int, I...>) {
  const __m512bh half = (__m512bh)_mm512_set1_epi16(0x3f00);
  const __m512bh tiny = (__m512bh)_mm512_set1_epi16(0x3a00);
  __m512 sum[] = {_mm512_set1_ps(float(I))...};
  while (count--) ((sum[I] = _mm512_dpbf16_ps(sum[I], half, tiny)), ...);
  ((sum[0] = _mm512_add_ps(sum[0], sum[I])), ...);
  sink = sum[0][0];
}
#endif

#if defined(GATEDFFN_TILES)
// A process must ask the system for the tiles before it uses them.
bool tiles_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

void tiles_bf16(long count) {
  struct {
    unsigned char palette = 1, start = 0, reserved[14] = {};
    unsigned short bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  alignas(64) char zeros[1024] = {};
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  while (count--) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, zeros, 64);
  sink = zeros[0];
  _tile_release();
}
#endif

// Adds what lies on one line of 64 bytes, and asks for a line further on.
inline void add_line(Words& sum, const char* line) {
  constexpr int AHEAD = 2048;
  __builtin_prefetch(line + AHEAD);
  for (int part = 0; part < LINE; part += WIDTH) {
    Words value;
    std::memcpy(&value, line + part, WIDTH);
    sum += value;
  }
}

// Reads `bytes` from `start` as four streams, which keeps more of the memory's channels busy.
void read(const char* start, size_t bytes) {
  const size_t each = bytes / 4 / LINE * LINE;
  Words a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i < each; i += LINE) {
    add_line(a, start + i);
    add_line(b, start + each + i);
    add_line(c, start + 2 * each + i);
    add_line(d, start + 3 * each + i);
  }
  sink = float((a + b + c + d)[0]);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

double fma_peak(int threads, double seconds) {
  return best(threads, seconds, 2.0 * CHAINS * (WIDTH / sizeof(float)), [](long count) { multiply_add(count, Chains{}); });
}

// 0 where the machine, or the compiler, has no bfloat16 products.
double bf16_peak(int threads, double seconds) {
#if defined(GATEDFFN_TILES)
  if (tiles_allowed()) return best(threads, seconds, 4 * 16 * 16 * 32 * 2.0, tiles_bf16);
#endif
#if defined(__AVX512BF16__)
  return best(threads, seconds, 2.0 * CHAINS * 32, [](long count) { dot_bf16(count, Chains{}); });
#else
  return 0 * threads * seconds;
#endif
}

// Below `enough` bytes the start of the threads would count more than the reading.
double read_rate(const void* buffer, size_t bytes, int threads) {
  constexpr size_t enough = 16 << 20;
  const size_t share = bytes / threads / LINE * LINE, passes = 1 + enough / bytes;
  double start = now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++)
    for (size_t pass = 0; pass < passes; pass++) {
      read(static_cast<const char*>(buffer) + thread * share, share);
      asm volatile("" ::: "memory");  // what was read must be read again
    }
  return passes * threads * share / (now() - start);
}
}
#pragma GCC visibility pop
