// What the CPU kernels share: the threads, matrices, and the formula of a variant.
#pragma once
#include <cstdint>
#include <cstring>

#include "../activations/cpu.h"

#ifdef _OPENMP
extern "C" int omp_get_thread_num(void) noexcept;
extern "C" int omp_get_num_threads(void) noexcept;
#else
static inline int omp_get_thread_num() { return 0; }
static inline int omp_get_num_threads() { return 1; }
#endif

namespace gatedffn {

constexpr int64_t BLOCK = 512;  // elements worked on at once: a dozen such buffers stay in L1

// A row of the table of variants, as Python describes it: phi and psi by their place in FUNCTIONS
// (psi is -1 where there is no gate), and their parameters: two of phi, then one of psi.
struct Formula {
  int32_t phi_at, psi_at;
  Parameter parameters[3];

  const Function& phi() const { return FUNCTIONS[phi_at]; }
  const Function& psi() const { return FUNCTIONS[psi_at]; }
  bool gated() const { return psi_at >= 0; }

  // Identities, for which no buffer is copied.
  static bool plain(const Function& f) { return f.value == value_of<identity>; }

  // The parameters for the hidden units from `unit` on.
  void at(int64_t unit, Parameter* p) const {
    for (int i = 0; i < 3; i++)
      p[i] = {parameters[i].at + parameters[i].step * unit, parameters[i].step};
  }

  // h = phi(gate) psi(up) for n elements; all three are buffers of whole vectors.
  void hidden(float* h, const float* gate, const float* up, int64_t unit, int64_t n) const {
    Parameter p[3];
    at(unit, p);
    alignas(64) float buffer[BLOCK];
    const float* left = gate;
    if (!plain(phi())) phi().value(h, gate, p, n), left = h;
    if (!gated()) {
      if (left != h) std::memcpy(h, left, n * sizeof(float));
      return;
    }
    const float* right = up;
    if (!plain(psi())) psi().value(buffer, up, p + 2, n), right = buffer;
    for (int64_t i = 0; i < n; i += LANES) store(h + i, load(left + i) * load(right + i));
  }

  // The same for [rows][P], hidden units down and tokens across, in place of `gate`.
  void across(float* gate, const float* up, int64_t unit, int64_t rows, int P) const {
    bool per_unit = parameters[0].step || parameters[1].step || parameters[2].step;
    if (!per_unit) {
      for (int64_t i = 0; i < rows * P; i += BLOCK)
        hidden(gate + i, gate + i, up + i, 0, rows * P - i < BLOCK ? rows * P - i : BLOCK);
      return;
    }
    Formula one = *this;
    for (int64_t r = 0; r < rows; r++) {
      at(unit + r, one.parameters);
      for (Parameter& p : one.parameters) p.step = 0;
      one.hidden(gate + r * P, gate + r * P, up + r * P, 0, P);
    }
  }
};

// A matrix whose rows are `stride` elements apart; null where it is not given or not wanted.
template <class T>
struct Rows {
  T* at;
  int64_t stride;
  T* row(int64_t r, int64_t column) const { return at + r * stride + column; }
  // The rows from `r` on.
  Rows from(int64_t r) const { return {at ? at + r * stride : nullptr, stride}; }
};

// Rows of float32 that are added to: what is made of the t-th token, times its factor where there are
// factors, goes to the row `token[t]`.
struct Scattered {
  Rows<float> rows;
  const int32_t* token;
  const float* factor;

  Scattered from(int64_t t) const { return {rows, token + t, factor ? factor + t : nullptr}; }

  void add(int64_t t, int64_t column, V x, int64_t n) const {
    float* to = rows.row(token[t], column);
    if (factor) x *= set(factor[t]);
    if (n >= LANES) store(to, load(to) + x);
    else store_some(to, load_some(to, int(n)) + x, int(n));
  }
};

// A projection as torch.nn.Linear stores it.
template <class W>
struct Weight {
  const W* at;
  int64_t stride;  // elements between its rows
  const W* bias;   // null where there is none
};

template <class T>
static inline void widen(float* out, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load(x + i));
  if (i < n) store(out + i, load_some(x + i, int(n - i)));
}

template <class T>
static inline void narrow(T* out, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(out + i, load(x + i));
  if (i < n) store_some(out + i, load(x + i), int(n - i));
}

// The sum of a[i] b[i]: a sum of short sums.
template <class A, class B>
static inline float dot(const A* a, const B* b, int64_t n) {
  double all = 0.0;
  for (int64_t i = 0; i < n; i += BLOCK) {
    V sums = {};
    int64_t end = n - i < BLOCK ? n : i + BLOCK, k = i;
    for (; k + LANES <= end; k += LANES) sums += load(a + k) * load(b + k);
    if (k < end) sums += load_some(a + k, int(end - k)) * load_some(b + k, int(end - k));
    for (int l = 0; l < LANES; l++) all += double(sums[l]);
  }
  return float(all);
}

// The rounding that a value gets when it is stored as T.
template <class T>
static inline void round_as(float* x, int64_t n) {
  if (sizeof(T) == sizeof(float)) return;
  T stored[LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    store(stored, load(x + i));
    store(x + i, load(stored));
  }
}

#if defined(__AVX512F__)
#define GATEDFFN_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define GATEDFFN_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define GATEDFFN_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define GATEDFFN_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define GATEDFFN_LOW 0, 4, 1, 5
#define GATEDFFN_HIGH 2, 6, 3, 7
#endif

// Clang has the one spelling, GCC before 12 the other.
#if defined(__clang__)
#define GATEDFFN_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GATEDFFN_MIX(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

// A square of LANES vectors, in place. Interleaving the first half with the second turns the index
// of an element by one bit; as many turns as it has bits exchange rows and columns.
static inline void transpose(V* square) {
  for (int turn = 1; turn < LANES; turn *= 2) {
    V turned[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      turned[2 * i] = GATEDFFN_MIX(square[i], square[i + LANES / 2], GATEDFFN_LOW);
      turned[2 * i + 1] = GATEDFFN_MIX(square[i], square[i + LANES / 2], GATEDFFN_HIGH);
    }
    std::memcpy(square, turned, sizeof turned);
  }
}

// The sum of each of LANES vectors, in their order: as `transpose`, but what each turn brings
// together is added at once.
static inline V sums_of(const V* square) {
  V held[LANES];
  std::memcpy(held, square, sizeof held);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++)
      held[i] = GATEDFFN_MIX(held[i], held[i + half], GATEDFFN_LOW) +
                GATEDFFN_MIX(held[i], held[i + half], GATEDFFN_HIGH);
  return held[0];
}

// This thread's share [begin, end) of n things, all of them where they are not shared.
struct Share {
  int64_t begin, end;
  explicit Share(int64_t n, bool shared = true) {
    int64_t id = shared ? omp_get_thread_num() : 0, all = shared ? omp_get_num_threads() : 1;
    begin = n * id / all, end = n * (id + 1) / all;
  }
};

}  // namespace gatedffn
