// What BatchNorm, PReLU and maximum pools do between two convolutions, in one pass each, and the convolutions that
// PyTorch has no fast way for: one channel in, depthwise, and weight gradients in bfloat16. Source of the formulas:
// clipwise.py, which compiles this file where there is a C++ compiler and does the same by PyTorch elsewhere.
//
// Activations are rows of `channels` values, float32 or bfloat16, channels a multiple of 16; parameters are
// float32 vectors of one value a channel. Sums run in float32 over ROWS rows and in float64 above.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
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

// dz (rows, channels): dp (windows, channels) where a row's value won, the first one among equals, and is above 0;
// 0 elsewhere. Windows come in order. Sums: (2, channels) of dz (y - mean) and of dz.
template <class T>
void pool_backward(const T* dp, const T* y, const float* mean, const float* scale, const float* shift, T* dz,
                   double* sums, const int32_t* start, const int32_t* end, int64_t windows, int64_t rows,
                   int64_t channels) {
  for (int64_t first = 0; first < windows; first += ROWS) {
    int64_t last = first + ROWS < windows ? first + ROWS : windows;
    for (int64_t c = 0; c < channels; c += LANES) {
      Vector m = load(mean + c), s = load(scale + c), t = load(shift + c), products = {}, total = {};
      int64_t written = first ? end[first - 1] : 0;
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
        for (; written < start[w]; ++written) store(dz + written * channels + c, Vector{});
        for (int64_t r = start[w]; r < end[w]; ++r) {
          T* at = dz + r * channels + c;
          Vector value = place == (int32_t)(r - start[w]) ? g : Vector{};
          store(at, r < written ? load(at) + value : value);  // windows may overlap
        }
        written = end[w];
        g = place >= 0 ? g : Vector{};
        products += g * (raw - m);
        total += g;
      }
      if (last == windows)
        for (; written < rows; ++written) store(dz + written * channels + c, Vector{});
      add(sums + c, products);
      add(sums + channels + c, total);
    }
  }
}

// TFgram's first layer, one channel in: windows of 11 samples, five apart.
constexpr int WINDOW = 11, STEP = 5;

template <int R, int K, class T>
inline void first_rows(const float* x, const float* weight, const float* shift, T* out, int64_t channels) {
  Vector sum[R][K];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) sum[r][k] = load(shift + k * LANES);
#pragma GCC unroll 11
  for (int i = 0; i < WINDOW; ++i)
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < K; ++k) sum[r][k] += load(weight + i * channels + k * LANES) * x[r * STEP + i];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k)
      store(out + r * channels + k * LANES, sum[r][k] > 0.f ? sum[r][k] : Vector{});
}

// out (clips, rows, channels) = max(0, windows of x (clips, samples) weight (11, channels) + shift).
template <class T>
void first(const float* x, const float* weight, const float* shift, T* out, int64_t clips, int64_t samples,
           int64_t rows, int64_t channels) {
  for (int64_t clip = 0; clip < clips; ++clip)
    for (int64_t r = 0; r < rows;) {
      const float* at = x + clip * samples + r * STEP;
      T* to = out + (clip * rows + r) * channels;
      bool four = r + 4 <= rows && channels % (4 * LANES) == 0;
      for (int64_t c = 0; c < channels; c += four ? 4 * LANES : LANES)
        if (four)
          first_rows<4, 4>(at, weight + c, shift + c, to + c, channels);
        else
          first_rows<1, 1>(at, weight + c, shift + c, to + c, channels);
      r += four ? 4 : 1;
    }
}

// d, the gradient behind the ReLU whose result was `a`, becomes dz where `keep`. Sums: (12, channels) over the rows
// of dz (window - centre) and, last, of dz.
template <class T>
void first_backward(T* d, const T* a, const float* x, const float* centre, double* sums, int64_t clips,
                    int64_t samples, int64_t rows, int64_t channels, int64_t keep) {
  for (int64_t clip = 0; clip < clips; ++clip)
    for (int64_t first = 0; first < rows; first += ROWS) {
      int64_t count = first + ROWS < rows ? ROWS : rows - first;
      float window[ROWS][WINDOW + 1];
      for (int64_t r = 0; r < count; ++r) {
        const float* at = x + clip * samples + (first + r) * STEP;
        for (int i = 0; i < WINDOW; ++i) window[r][i] = at[i] - centre[i];
        window[r][WINDOW] = 1.f;
      }
      for (int64_t c = 0; c < channels; c += LANES) {
        Vector sum[WINDOW + 1] = {};
        for (int64_t r = 0; r < count; ++r) {
          int64_t at = ((clip * rows) + first + r) * channels + c;
          Vector dz = load(a + at) > 0.f ? load(d + at) : Vector{};
          if (keep) store(d + at, dz);
#pragma GCC unroll 12
          for (int i = 0; i <= WINDOW; ++i) sum[i] += dz * window[r][i];
        }
        for (int i = 0; i <= WINDOW; ++i) add(sums + i * channels + c, sum[i]);
      }
    }
}

// The index that tap k of three sees from `at`, with padding 1; from the other end for the input's gradient.
inline bool seen(int64_t at, int k, int64_t stride, bool gradient, int64_t size, int64_t& index) {
  index = gradient ? at + 1 - k : at * stride + k - 1;
  if (index < 0 || (gradient && index % stride)) return false;
  if (gradient) index /= stride;
  return index < size;
}

// Depthwise 3 x 3 convolution with padding 1 of x (clips, height, width, channels) by weight (3, 3, channels), or
// with `gradient` that of its input from x, the gradient of its output.
template <class T>
void depthwise(const T* x, const float* weight, T* out, int64_t clips, int64_t height, int64_t width,
               int64_t out_height, int64_t out_width, int64_t stride, int64_t gradient, int64_t channels) {
  for (int64_t clip = 0; clip < clips; ++clip)
    for (int64_t h = 0; h < out_height; ++h)
      for (int64_t w = 0; w < out_width; ++w, out += channels) {
        const T* from[9];
        const float* by[9];
        int taps = 0;
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 3; ++j) {
            int64_t row, column;
            if (!seen(h, i, stride, gradient, height, row)) continue;
            if (!seen(w, j, stride, gradient, width, column)) continue;
            from[taps] = x + ((clip * height + row) * width + column) * channels;
            by[taps++] = weight + (3 * i + j) * channels;
          }
        for (int64_t c = 0; c < channels; c += LANES) {
          Vector sum = {};
          if (taps == 9)
#pragma GCC unroll 9
            for (int t = 0; t < 9; ++t) sum += load(from[t] + c) * load(by[t] + c);
          else
            for (int t = 0; t < taps; ++t) sum += load(from[t] + c) * load(by[t] + c);
          store(out + c, sum);
        }
      }
}

// Adds to sums (3, 3, channels) the gradient of that weight, from x and dy (clips, out_height, out_width, channels).
template <class T>
void depthwise_weight(const T* x, const T* dy, double* sums, int64_t clips, int64_t height, int64_t width,
                      int64_t out_height, int64_t out_width, int64_t stride, int64_t channels) {
  for (int64_t clip = 0; clip < clips; ++clip)
    for (int64_t h = 0; h < out_height; ++h)
      for (int64_t c = 0; c < channels; c += LANES) {
        const T* row[3];
        for (int i = 0; i < 3; ++i) {
          int64_t index;
          bool inside = seen(h, i, stride, false, height, index);
          row[i] = inside ? x + (clip * height + index) * width * channels + c : nullptr;
        }
        Vector sum[9] = {};
        for (int64_t w = 0; w < out_width; ++w) {
          Vector g = load(dy + ((clip * out_height + h) * out_width + w) * channels + c);
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) {
            int64_t column;
            if (!seen(w, j, stride, false, width, column)) continue;
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i)
              if (row[i]) sum[3 * i + j] += g * load(row[i] + column * channels);
          }
        }
        for (int i = 0; i < 9; ++i) add(sums + i * channels + c, sum[i]);
      }
}

#ifdef TILES
constexpr int64_t BLOCK = 256;  // rows whose packed copies stay in the second cache
constexpr int PAIRS = 16;       // of rows in a tile; a tile is 16 rows of 64 bytes
constexpr int TILE = 512;       // bfloat16 values

const struct alignas(64) {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} CONFIGURATION;

// Rows `at` and `at` + 1 of x, 16 channels, value by value beside each other; rows outside are 0.
inline __m512i pair(const bfloat16* x, int64_t at, int64_t rows, int64_t channels) {
  auto row = [=](int64_t r) {
    if (r < 0 || r >= rows) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + r * channels)));
  };
  return _mm512_or_si512(row(at), _mm512_slli_epi32(row(at + 1), 16));
}

inline void transpose(__m512i* r) {  // 16 x 16 values of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 16; i += 8) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Pairs of rows from `at` on as tiles' second factors: (channels / 16, pairs, 32).
void pack(const bfloat16* x, int64_t at, int64_t pairs, int64_t rows, int64_t channels, bfloat16* to) {
  for (int64_t c = 0; c < channels; c += LANES)
    for (int64_t p = 0; p < pairs; ++p, to += 2 * LANES)
      _mm512_storeu_si512(to, pair(x + c, at + 2 * p, rows, channels));
}

// Adds to out (taps, outputs, inputs), per tap, the sum over the rows r of g (clips, rows, outputs) times
// x (clips, rows, inputs) at r + (tap - taps / 2) dilation; taps is 1 or 3, channels multiples of 32.
void weight_gradient(const bfloat16* x, const bfloat16* g, float* out, int64_t clips, int64_t rows,
                     int64_t inputs, int64_t outputs, int64_t taps, int64_t dilation) {
  alignas(64) uint8_t before[64];
  _tile_storeconfig(before);  // another library's, which may rely on it
  _tile_loadconfig(&CONFIGURATION);
  int64_t reach = taps / 2 * dilation, most = BLOCK / 2 + reach;
  bool odd = reach % 2;  // then the middle tap pairs other rows than its neighbours
  thread_local std::vector<bfloat16> memory;
  memory.resize(BLOCK * outputs + 4 * most * inputs + 32);
  auto* turned = (bfloat16*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
  bfloat16 *outer = turned + BLOCK * outputs, *middle = outer + 2 * most * inputs;
  for (int64_t clip = 0; clip < clips; ++clip, x += rows * inputs, g += rows * outputs)
    for (int64_t first = 0; first < rows; first += BLOCK) {
      int64_t count = first + BLOCK < rows ? BLOCK : rows - first, steps = (count + 31) / 32;
      int64_t pairs = steps * PAIRS, wide = pairs + reach;
      for (int64_t c = 0; c < outputs; c += LANES)
        for (int64_t s = 0; s < steps; ++s) {
          __m512i tile[PAIRS];
          for (int p = 0; p < PAIRS; ++p) tile[p] = pair(g + c, first + 32 * s + 2 * p, rows, outputs);
          transpose(tile);
          std::memcpy(turned + (c / LANES * steps + s) * TILE, tile, sizeof tile);
        }
      pack(x, first - reach, wide, rows, inputs, outer);
      if (odd) pack(x, first, pairs, rows, inputs, middle);
      asm volatile("" ::: "memory");  // the compiler does not know what tile instructions read and write
      for (int64_t o = 0; o < outputs; o += 2 * LANES)
        for (int64_t tap = 0; tap < taps; ++tap) {
          bool inner = odd && tap == taps / 2;
          const bfloat16* packed = inner ? middle : outer;
          int64_t length = 2 * LANES * (inner ? pairs : wide), offset = inner ? 0 : tap * dilation / 2;
          for (int64_t i = 0; i < inputs; i += 2 * LANES) {
            float *upper = out + (tap * outputs + o) * inputs + i, *lower = upper + LANES * inputs;
            const bfloat16* a = turned + o / LANES * steps * TILE;
            const bfloat16* b = packed + i / LANES * length + offset * 2 * LANES;
            _tile_loadd(0, upper, 4 * inputs);
            _tile_loadd(1, upper + LANES, 4 * inputs);
            _tile_loadd(2, lower, 4 * inputs);
            _tile_loadd(3, lower + LANES, 4 * inputs);
            for (int64_t s = 0; s < steps; ++s, a += TILE, b += TILE) {
              _tile_loadd(4, a, 64);
              _tile_loadd(5, a + steps * TILE, 64);
              _tile_loadd(6, b, 64);
              _tile_loadd(7, b + length, 64);
              _tile_dpbf16ps(0, 4, 6);
              _tile_dpbf16ps(1, 4, 7);
              _tile_dpbf16ps(2, 5, 6);
              _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, 4 * inputs);
            _tile_stored(1, upper + LANES, 4 * inputs);
            _tile_stored(2, lower, 4 * inputs);
            _tile_stored(3, lower + LANES, 4 * inputs);
          }
        }
    }
  asm volatile("" ::: "memory");
  _tile_loadconfig(before);
}
#endif

}  // namespace

// What the library offers: pointers to the functions, and whether weight_gradient is there and the system lets this
// process use tiles.
#define EXPORT(NAME)                                      \
  decltype(&NAME<float>) NAME##_float32 = NAME<float>; \
  decltype(&NAME<bfloat16>) NAME##_bfloat16 = NAME<bfloat16>;

extern "C" {
EXPORT(moments)
EXPORT(activate)
EXPORT(activate_backward)
EXPORT(centre)
EXPORT(pool)
EXPORT(pool_backward)
EXPORT(first)
EXPORT(first_backward)
EXPORT(depthwise)
EXPORT(depthwise_weight)
#ifdef TILES
decltype(&weight_gradient) weight_gradient_bfloat16 = weight_gradient;
int64_t tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
int64_t tiles() { return 0; }
#endif
}
