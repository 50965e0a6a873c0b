// What BatchNorm, PReLU and maximum pools do between two convolutions, in one pass each. Source of the formulas:
// clipwise.py, which compiles this file where there is a C++ compiler and does the same by PyTorch elsewhere.
//
// Activations are rows of `channels` values, float32 or bfloat16, channels a multiple of 16; parameters are
// float32 vectors of one value a channel. Sums run in float32 over ROWS rows and in float64 above.

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int64_t ROWS = 64;  // a block of rows: stays in the first caches while its channels are walked
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

inline Vector load(const float* p) { Vector v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

inline Vector load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
#ifdef __AVX512F__  // the compiler widens in two halves
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
  return (Vector)(__builtin_convertvector(h, Words) << 16);
#endif
}

inline void store(bfloat16* p, Vector v) {  // to the nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v == v ? rounded : (bits >> 16) | 0x40;
  Halves h = __builtin_convertvector(rounded, Halves);
  std::memcpy(p, &h, sizeof h);
#endif
}

inline void add(double* total, Vector part) {
  for (int i = 0; i < LANES; ++i) total[i] += part[i];
}

// Calls body(first row, last row, first channel, number of vectors) over blocks of rows and of channels, so that
// a block's sums stay in registers and whole cache lines are read.
template <class Body>
inline void blocks(int64_t rows, int64_t channels, Body body) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    int64_t last = first + ROWS < rows ? first + ROWS : rows, c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) body(first, last, c, std::integral_constant<int, 4>());
    for (; c < channels; c += LANES) body(first, last, c, std::integral_constant<int, 1>());
  }
}

// Sums over the rows of y - centre and of its square: (2, channels).
template <class T>
void moments(const T* y, const float* centre, double* sums, int64_t rows, int64_t channels) {
  blocks(rows, channels, [=](int64_t first, int64_t last, int64_t c, auto count) {
    constexpr int K = decltype(count)::value;
    Vector one[K] = {}, two[K] = {};
    for (int64_t r = first; r < last; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        Vector x = load(y + r * channels + c + k * LANES) - load(centre + c + k * LANES);
        one[k] += x;
        two[k] += x * x;
      }
    for (int k = 0; k < K; ++k) {
      add(sums + c + k * LANES, one[k]);
      add(sums + channels + c + k * LANES, two[k]);
    }
  });
}

// out = f(y scale + shift) + other, f(z) = z where z > 0, else slope z; `other` may be null.
template <class T>
void activate(const T* y, const float* scale, const float* shift, const float* slope, const T* other, T* out,
              int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += LANES) {
      int64_t at = r * channels + c;
      Vector z = load(y + at) * load(scale + c) + load(shift + c);
      z = z > 0.f ? z : z * load(slope + c);
      store(out + at, other ? z + load(other + at) : z);
    }
}

// d, the gradient behind f, becomes that before it; `a`, if not null, the activation. Sums: (3, channels) over
// the rows of dz (y - mean), of dz, and of d z where z <= 0.
template <class T>
void activate_backward(T* d, const T* y, const float* mean, const float* scale, const float* shift,
                       const float* slope, T* a, double* sums, int64_t rows, int64_t channels) {
  blocks(rows, channels, [=](int64_t first, int64_t last, int64_t c, auto count) {
    constexpr int K = decltype(count)::value;
    Vector products[K] = {}, total[K] = {}, below[K] = {};
    for (int64_t r = first; r < last; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        int64_t channel = c + k * LANES, at = r * channels + channel;
        Vector x = load(y + at), g = load(d + at), s = load(slope + channel);
        Vector z = x * load(scale + channel) + load(shift + channel);
        Mask positive = z > 0.f;
        Vector dz = positive ? g : g * s;
        store(d + at, dz);
        if (a) store(a + at, positive ? z : z * s);
        products[k] += dz * (x - load(mean + channel));
        total[k] += dz;
        below[k] += positive ? Vector{} : g * z;
      }
    for (int k = 0; k < K; ++k) {
      add(sums + c + k * LANES, products[k]);
      add(sums + channels + c + k * LANES, total[k]);
      add(sums + 2 * channels + c + k * LANES, below[k]);
    }
  });
}

// out = dz + y scale + shift; out may be y or dz.
template <class T>
void centre(const T* dz, const T* y, const float* scale, const float* shift, T* out, int64_t rows,
            int64_t channels) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += LANES) {
      int64_t at = r * channels + c;
      store(out + at, load(dz + at) + (load(y + at) * load(scale + c) + load(shift + c)));
    }
}

// out (windows, channels) = max(0, maximum of y scale + shift over rows start[w] <= r < end[w]).
template <class T>
void pool(const T* y, const float* scale, const float* shift, T* out, const int32_t* start, const int32_t* end,
          int64_t windows, int64_t channels) {
  for (int64_t w = 0; w < windows; ++w)
    for (int64_t c = 0; c < channels; c += LANES) {
      Vector s = load(scale + c), t = load(shift + c), best = {};
      for (int64_t r = start[w]; r < end[w]; ++r) {
        Vector z = load(y + r * channels + c) * s + t;
        best = z > best || z != z ? z : best;
      }
      store(out + w * channels + c, best);
    }
}

// Adds dp (windows, channels) to the rows of dz (zeros before) whose value won, the first one among equals, where
// it is above 0. Sums: (2, channels) of dz (y - mean) and of dz.
template <class T>
void pool_backward(const T* dp, const T* y, const float* mean, const float* scale, const float* shift, T* dz,
                   double* sums, const int32_t* start, const int32_t* end, int64_t windows, int64_t channels) {
  for (int64_t first = 0; first < windows; first += ROWS) {
    int64_t last = first + ROWS < windows ? first + ROWS : windows;
    for (int64_t c = 0; c < channels; c += LANES) {
      Vector m = load(mean + c), s = load(scale + c), t = load(shift + c), products = {}, total = {};
      for (int64_t w = first; w < last; ++w) {
        Vector best = {}, raw = {}, g = load(dp + w * channels + c);
        Mask place = Mask{} - 1;
        for (int64_t r = start[w]; r < end[w]; ++r) {
          Vector x = load(y + r * channels + c), z = x * s + t;
          Mask wins = z > best;
          best = wins ? z : best;
          raw = wins ? x : raw;
          place = wins ? Mask{} + (int32_t)(r - start[w]) : place;
        }
        for (int64_t r = start[w]; r < end[w]; ++r) {
          T* at = dz + r * channels + c;
          store(at, load(at) + (place == (int32_t)(r - start[w]) ? g : Vector{}));
        }
        g = place >= 0 ? g : Vector{};
        products += g * (raw - m);
        total += g;
      }
      add(sums + c, products);
      add(sums + channels + c, total);
    }
  }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                       \
  extern "C" void moments_##SUFFIX(const T* y, const float* m, double* sums, int64_t n, int64_t c) {            \
    moments(y, m, sums, n, c);                                                                                  \
  }                                                                                                             \
  extern "C" void activate_##SUFFIX(const T* y, const float* s, const float* t, const float* k, const T* other, \
                                    T* out, int64_t n, int64_t c) {                                             \
    activate(y, s, t, k, other, out, n, c);                                                                     \
  }                                                                                                             \
  extern "C" void activate_backward_##SUFFIX(T* d, const T* y, const float* m, const float* s, const float* t,  \
                                             const float* k, T* a, double* sums, int64_t n, int64_t c) {        \
    activate_backward(d, y, m, s, t, k, a, sums, n, c);                                                         \
  }                                                                                                             \
  extern "C" void centre_##SUFFIX(const T* dz, const T* y, const float* s, const float* t, T* out, int64_t n,   \
                                  int64_t c) {                                                                  \
    centre(dz, y, s, t, out, n, c);                                                                             \
  }                                                                                                             \
  extern "C" void pool_##SUFFIX(const T* y, const float* s, const float* t, T* out, const int32_t* start,       \
                                const int32_t* end, int64_t n, int64_t c) {                                     \
    pool(y, s, t, out, start, end, n, c);                                                                       \
  }                                                                                                             \
  extern "C" void pool_backward_##SUFFIX(const T* dp, const T* y, const float* m, const float* s,               \
                                         const float* t, T* dz, double* sums, const int32_t* start,             \
                                         const int32_t* end, int64_t n, int64_t c) {                            \
    pool_backward(dp, y, m, s, t, dz, sums, start, end, n, c);                                                  \
  }
EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
