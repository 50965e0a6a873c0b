// Training layers for a CPU; native.py compiles this file and chain.py calls its functions.
//
// A layer is a convolution without bias, batch normalisation and an activation. Each function makes one pass over the
// clips of one layer, block of rows by block of rows, so that intermediate values stay in the cache. Forward: the
// input's normalisation and activation, the products, the raw output and its moments. Backward: the centred gradient,
// both products, the gradient of the activation below and the sums that the layer below needs.
//
// Activations are rows of channels, float32 or bfloat16; parameters and sums of products are float32. Sums over rows
// are float32 within a block and float64 across blocks. Sources of the formulas: chain.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef __AVX512BF16__
#define PAIRS  // dot products of bfloat16 pairs
#endif
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__linux__) && !defined(TILES)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES
inline bool tiles_permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#endif

// One layer and its clips; native.py has the same fields in the same order. Pointers that do not apply are null.
struct Step {
  int64_t clips, parts, threads;                          // threads compute one part of the clips at a time
  int64_t rows, inputs, outputs;                          // input rows per clip (height * width), channels
  int64_t taps, dilation;                                 // of a product along the rows
  int64_t height, width, out_height, out_width, stride;   // of a map
  int64_t samples;                                        // per clip of an input wave
  // The input is one of: `x`; f(below scale + shift) + other with f(z) = z above 0 and slope z elsewhere; the first
  // layer, max(0, windows of wave first_weight + shift).
  const void *x, *below;
  const float *scale, *shift, *slope;
  const void* other;
  const float *wave, *first_weight;
  const void* weight;  // packed for products, float32 (kernel positions, channels) otherwise
  // Forward: where to store the input, the raw output, and its moments about `centre`, (2, outputs) per part.
  void *kept, *y;
  float* centre;
  double* sums;
  // Backward: the output's dy = dz + y centre_scale + centre_shift; `d`, the input's gradient plus `extra`, taken
  // through f if there is a layer `below`; weight gradients per part; and `sums` per part, (3, inputs), of
  // dz (below - mean), of dz, and of the gradient times z where z <= 0. For the first layer: (12, inputs).
  const void* dz;
  const float *centre_scale, *centre_shift, *mean;
  const void* extra;
  void* d;
  float* weight_gradient;
  // Pools: first row and end row of every window of a clip.
  const int32_t *start, *end;
  int64_t windows;
};

namespace {

// Floats per register, and the block of sums that registers hold: ROWS or COLUMNS by VECTORS. Vectors are as long as a
// register, because GCC keeps longer ones in memory.
#ifdef __AVX512F__
constexpr int LANES = 16, ROWS = 12, COLUMNS = 8, VECTORS = 2;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, COLUMNS = 4, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 6, COLUMNS = 4, VECTORS = 4;
#else
constexpr int LANES = 4, ROWS = 6, COLUMNS = 4, VECTORS = 2;
#endif
constexpr int64_t PANEL = VECTORS * LANES;
constexpr int64_t BLOCK = 96;           // rows per block; a multiple of ROWS and of a tile's rows
constexpr int WINDOW = 11, STRIDE = 5;  // of the first layer over the wave

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 { uint16_t bits; };

template <class T> struct OperandOf { typedef float type; };  // what products of activations T read
#ifdef PAIRS
template <> struct OperandOf<bfloat16> { typedef bfloat16 type; };
#endif
template <class T> using Operand = typename OperandOf<T>::type;

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
#ifdef PAIRS
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

// Strides of a block of rows in memory: between rows, and between vectors of channels.
struct Layout {
  int64_t row, vector;
  int64_t operator()(int64_t r, int64_t c) const { return r * row + c / LANES * vector; }
};
inline Layout dense(int64_t channels) { return {channels, LANES}; }

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Calls body(first channel, number of vectors) so that sums stay in registers and whole cache lines are read.
template <class Body>
inline void by_channels(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + 4 * LANES <= channels; c += 4 * LANES) body(c, std::integral_constant<int, 4>());
  for (; c < channels; c += LANES) body(c, std::integral_constant<int, 1>());
}

// This thread's scratch buffer number `which`, for `count` values, uninitialised.
template <class E>
E* memory(int which, int64_t count) {
  thread_local struct { std::unique_ptr<char[]> data; int64_t size = 0; } buffers[8];
  auto& buffer = buffers[which];
  int64_t size = count * sizeof(E) + 64;
  if (buffer.size < size) buffer.data.reset(new char[size]), buffer.size = size;
  return (E*)(((uintptr_t)buffer.data.get() + 63) & ~(uintptr_t)63);
}

// --- tiles of the processor -----------------------------------------------------------------------------------------

#ifdef TILES
const struct alignas(64) {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} CONFIGURATION;

bool use_tiles() {
  static const bool permitted = tiles_permitted();
  return permitted;
}

// Configures eight tiles of 16 rows of 64 bytes, and restores another library's configuration at the end.
class Tiles {
 public:
  Tiles() { if (use_tiles()) { _tile_storeconfig(before); _tile_loadconfig(&CONFIGURATION); } }
  ~Tiles() { if (use_tiles()) _tile_loadconfig(before); }

 private:
  alignas(64) uint8_t before[64];
};

// The compiler does not know what tile instructions read and write.
inline void settle() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 hold a block of sums, 32 by 32 floats of rows of length n.
inline void load_sums(const float* at, int64_t n) {
  _tile_loadd(0, at, 4 * n);
  _tile_loadd(1, at + LANES, 4 * n);
  _tile_loadd(2, at + LANES * n, 4 * n);
  _tile_loadd(3, at + LANES * n + LANES, 4 * n);
}
inline void store_sums(float* at, int64_t n) {
  _tile_stored(0, at, 4 * n);
  _tile_stored(1, at + LANES, 4 * n);
  _tile_stored(2, at + LANES * n, 4 * n);
  _tile_stored(3, at + LANES * n + LANES, 4 * n);
}
// Adds products of 16 pairs of rows at `upper` and `lower` with columns at `left` and `right`; strides in bytes.
inline void add_products(const bfloat16* upper, const bfloat16* lower, int64_t rows, const bfloat16* left,
                         const bfloat16* right, int64_t columns) {
  _tile_loadd(4, upper, rows);
  _tile_loadd(5, lower, rows);
  _tile_loadd(6, left, columns);
  _tile_loadd(7, right, columns);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Transposes 16 x 16 values of 32 bits: swaps the off-diagonal blocks of 8 x 8 values, of 4 x 4 in each block, ...
void transpose(__m512i* r) {
#pragma GCC unroll 4
  for (int step = LANES / 2; step; step /= 2) {
    Mask lane, lower, upper;  // lanes from LANES on are the second operand's
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    lower = (lane & step) ? lane + (LANES - step) : lane;
    upper = (lane & step) ? lane + LANES : lane + step;
    for (int i = 0; i < LANES; ++i)
      if (!(i & step)) {
        __m512i a = r[i], b = r[i + step];
        r[i] = _mm512_permutex2var_epi32(a, (__m512i)lower, b);
        r[i + step] = _mm512_permutex2var_epi32(a, (__m512i)upper, b);
      }
  }
}
#else
bool use_tiles() { return false; }
struct Tiles { Tiles() {} };
#endif

// --- products -------------------------------------------------------------------------------------------------------

// A factor of a product is one float, or a pair of bfloat16 whose dot product with another pair is added.
template <class E> constexpr int64_t PER_FACTOR = std::is_same<E, float>::value ? 1 : 2;
inline Vector factors(const float* p) { return load(p); }
inline Vector repeat(const float* p) { return *p - Vector{}; }
inline Vector add_product(Vector sum, Vector a, Vector b) { return sum + a * b; }
#ifdef PAIRS
inline __m512bh factors(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh repeat(const bfloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}
inline Vector add_product(Vector sum, __m512bh a, __m512bh b) { return (Vector)_mm512_dpbf16_ps((__m512)sum, a, b); }
#endif

// out (rows, n) = sum over taps of a (rows from tap * dilation on, k) times weight (n / PANEL, taps, k, PANEL), or of
// pairs (n / PANEL, taps, k / 2, PANEL, 2); rows is a multiple of ROWS.
template <class E>
void multiply(const E* a, const E* weight, float* out, int64_t rows, int64_t taps, int64_t dilation, int64_t k,
              int64_t n) {
  constexpr int64_t PER = PER_FACTOR<E>;
  for (int64_t o = 0; o < n; o += PANEL, weight += taps * k * PANEL)
    for (int64_t r = 0; r < rows; r += ROWS) {
      Vector sum[ROWS][VECTORS] = {};
      const E* w = weight;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const E* from = a + (r + tap * dilation) * k;
        for (int64_t i = 0; i < k; i += PER, w += PER * PANEL) {
          decltype(factors(w)) b[VECTORS];
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) b[v] = factors(w + PER * v * LANES);
#pragma GCC unroll 12
          for (int j = 0; j < ROWS; ++j) {
            auto x = repeat(from + j * k + i);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[j][v] = add_product(sum[j][v], x, b[v]);
          }
        }
      }
      for (int j = 0; j < ROWS; ++j)
        for (int v = 0; v < VECTORS; ++v) store(out + (r + j) * n + o + v * LANES, sum[j][v]);
    }
}

// Adds to out (k, n) the sum over the rows of a (rows, k), transposed, times g (rows, n), or over pairs of rows of
// a (pairs, k, 2) and g (pairs, n, 2).
template <class E>
void outer(const E* a, const E* g, float* out, int64_t rows, int64_t k, int64_t n) {
  constexpr int64_t PER = PER_FACTOR<E>;
  for (int64_t o = 0; o < n; o += PANEL)
    for (int64_t i = 0; i < k; i += COLUMNS) {
      Vector sum[COLUMNS][VECTORS];
      float* at = out + i * n + o;
      for (int j = 0; j < COLUMNS; ++j)
        for (int v = 0; v < VECTORS; ++v) sum[j][v] = load(at + j * n + v * LANES);
      for (int64_t r = 0; r < rows; ++r) {
        decltype(factors(g)) b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) b[v] = factors(g + PER * (r * n + o + v * LANES));
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) {
          auto x = repeat(a + PER * (r * k + i + j));
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) sum[j][v] = add_product(sum[j][v], x, b[v]);
        }
      }
      for (int j = 0; j < COLUMNS; ++j)
        for (int v = 0; v < VECTORS; ++v) store(at + j * n + v * LANES, sum[j][v]);
    }
}

#ifdef TILES
// As `multiply`; rows is a multiple of 32.
void multiply_tiles(const bfloat16* a, const bfloat16* weight, float* out, int64_t rows, int64_t taps,
                    int64_t dilation, int64_t k, int64_t n) {
  settle();
  for (int64_t o = 0; o < n; o += PANEL, weight += taps * k * PANEL)
    for (int64_t r = 0; r < rows; r += 2 * LANES) {
      const bfloat16* w = weight;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const bfloat16* from = a + (r + tap * dilation) * k;
        for (int64_t i = 0; i < k; i += 2 * LANES, w += 2 * LANES * PANEL)
          add_products(from + i, from + LANES * k + i, 2 * k, w, w + 2 * LANES, 4 * PANEL);
      }
      store_sums(out + r * n + o, n);
    }
  settle();
}

// As `outer`, where a is (k / 16, pairs / 16) tiles of 16 channels by 32 rows.
void outer_tiles(const bfloat16* a, const bfloat16* g, float* out, int64_t pairs, int64_t k, int64_t n) {
  settle();
  for (int64_t o = 0; o < n; o += 2 * LANES)
    for (int64_t i = 0; i < k; i += 2 * LANES) {
      load_sums(out + i * n + o, n);
      const bfloat16 *upper = a + 2 * i * pairs, *lower = upper + 2 * LANES * pairs;
      for (int64_t p = 0; p < pairs; p += LANES, upper += 2 * LANES * LANES, lower += 2 * LANES * LANES) {
        const bfloat16* right = g + 2 * (p * n + o);
        add_products(upper, lower, 64, right, right + 2 * LANES, 4 * n);
      }
      store_sums(out + i * n + o, n);
    }
  settle();
}
#endif

// Adds to out (taps, k, n) the gradient of the weight: tap t reads g from row (taps - 1 - t) dilation on.
void weight_products(const float* a, const float* g, float* out, int64_t rows, int64_t taps, int64_t dilation,
                     int64_t k, int64_t n) {
  for (int64_t tap = 0; tap < taps; ++tap)
    outer(a, g + (taps - 1 - tap) * dilation * n, out + tap * k * n, rows, k, n);
}

#ifdef PAIRS
// Interleaves pairs of rows of x: (pairs, channels, 2).
void pair(const bfloat16* x, int64_t pairs, int64_t channels, bfloat16* to) {
  for (int64_t p = 0; p < pairs; ++p, x += 2 * channels)
    for (int64_t c = 0; c < channels; c += LANES, to += 2 * LANES) {
      __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + c)));
      __m512i lower = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + channels + c)));
      _mm512_storeu_si512(to, _mm512_or_si512(upper, _mm512_slli_epi32(lower, 16)));
    }
}

// The same; rows of `a` are padded with zeros to a multiple of 32, and g has that many more rows.
void weight_products(const bfloat16* a, const bfloat16* g, float* out, int64_t rows, int64_t taps, int64_t dilation,
                     int64_t k, int64_t n) {
  int64_t pairs = use_tiles() ? round_up(rows, 2 * LANES) / 2 : (rows + 1) / 2, reach = (taps - 1) * dilation;
  bfloat16* left = memory<bfloat16>(4, 2 * pairs * k);
  pair(a, pairs, k, left);
#ifdef TILES
  if (use_tiles()) {
    bfloat16* turned = memory<bfloat16>(5, 2 * pairs * k);
    for (int64_t i = 0; i < k; i += LANES)
      for (int64_t p = 0; p < pairs; p += LANES) {
        __m512i tile[LANES];
        for (int j = 0; j < LANES; ++j) tile[j] = _mm512_loadu_si512(left + 2 * ((p + j) * k + i));
        transpose(tile);
        std::memcpy(turned + 2 * (i * pairs + p * LANES), tile, sizeof tile);
      }
    left = turned;
  }
#endif
  bool odd = taps > 1 && dilation % 2;  // then the middle tap pairs other rows than the outer taps
  int64_t all = pairs + reach / 2;
  bfloat16 *even = memory<bfloat16>(6, 2 * all * n), *middle = memory<bfloat16>(7, 2 * pairs * n);
  pair(g, all, n, even);
  if (odd) pair(g + dilation * n, pairs, n, middle);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const bfloat16* right = odd && tap == 1 ? middle : even + (taps - 1 - tap) * dilation * n;
#ifdef TILES
    if (use_tiles()) {
      outer_tiles(left, right, out + tap * k * n, pairs, k, n);
      continue;
    }
#endif
    outer(left, right, out + tap * k * n, pairs, k, n);
  }
}
#endif

// --- before and after products --------------------------------------------------------------------------------------

// Consecutive rows: of a clip, or, where the layer reads single rows, of all clips of a part.
struct Run { int64_t clip, offset, rows; };

inline int64_t first_clip(const Step& s, int64_t part) { return part * s.clips / s.parts; }

template <class Body>
void by_runs(const Step& s, int64_t part, Body body) {
  int64_t first = first_clip(s, part), last = first_clip(s, part + 1);
  if (s.taps == 1 && !s.wave) return body(Run{first, first * s.rows, (last - first) * s.rows});
  for (int64_t clip = first; clip < last; ++clip) body(Run{clip, clip * s.rows, s.rows});
}

// Rows first <= r < last of the layer's input, zeros outside the run (for dense rows only).
template <class T, class E>
void input_rows(const Step& s, Run run, int64_t first, int64_t last, E* to, Layout layout) {
  int64_t n = s.inputs, from = std::max<int64_t>(first, 0), end = std::min(last, run.rows);
  if (first < from || end < last) std::memset((void*)to, 0, (last - first) * n * sizeof(E));
  to += layout(from - first, 0);
  if (s.wave) {
    const float* x = s.wave + run.clip * s.samples;
    return by_channels(n, [=](int64_t c, auto vectors) {
      constexpr int K = decltype(vectors)::value;
      for (int64_t r = from; r < end; ++r) {
        Vector sum[K];
        for (int k = 0; k < K; ++k) sum[k] = load(s.shift + c + k * LANES);
#pragma GCC unroll 11
        for (int i = 0; i < WINDOW; ++i)
          for (int k = 0; k < K; ++k) sum[k] += load(s.first_weight + i * n + c + k * LANES) * x[r * STRIDE + i];
        for (int k = 0; k < K; ++k)
          store(to + layout(r - from, c + k * LANES), sum[k] > 0.f ? sum[k] : Vector{});
      }
    });
  }
  int64_t at = (run.offset + from) * n, count = end - from;
  const T* x = (const T*)(s.x ? s.x : s.below) + at;
  const T* other = s.other ? (const T*)s.other + at : nullptr;
  T* kept = s.kept ? (T*)s.kept + at : nullptr;
  by_channels(n, [=](int64_t c, auto vectors) {
    constexpr int K = decltype(vectors)::value;
    Vector scale[K], shift[K], slope[K];
    if (!s.x)
      for (int k = 0; k < K; ++k) {
        scale[k] = load(s.scale + c + k * LANES);
        shift[k] = load(s.shift + c + k * LANES);
        slope[k] = load(s.slope + c + k * LANES);
      }
    for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        int64_t i = r * n + c + k * LANES;
        Vector v = load(x + i);
        if (!s.x) {
          v = v * scale[k] + shift[k];
          v = v > 0.f ? v : v * slope[k];
          if (other) v += load(other + i);
          if (kept) store(kept + i, v);
        }
        store(to + layout(r, c + k * LANES), v);
      }
  });
}

// Rows first <= r < last of the output's gradient, zeros outside of `rows` (for dense rows only).
template <class T, class E>
void gradient_rows(const Step& s, int64_t offset, int64_t rows, int64_t first, int64_t last, E* to, Layout layout) {
  int64_t n = s.outputs, from = std::max<int64_t>(first, 0), end = std::min(last, rows);
  if (first < from || end < last) std::memset((void*)to, 0, (last - first) * n * sizeof(E));
  to += layout(from - first, 0);
  const T *dz = (const T*)s.dz + (offset + from) * n, *y = (const T*)s.y + (offset + from) * n;
  by_channels(n, [=](int64_t c, auto vectors) {
    constexpr int K = decltype(vectors)::value;
    Vector scale[K], shift[K];
    for (int k = 0; k < K; ++k) {
      scale[k] = load(s.centre_scale + c + k * LANES);
      shift[k] = load(s.centre_shift + c + k * LANES);
    }
    for (int64_t r = 0; r < end - from; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        int64_t i = r * n + c + k * LANES;
        store(to + layout(r, c + k * LANES), load(dz + i) + (load(y + i) * scale[k] + shift[k]));
      }
  });
}

// Stores `count` rows of the output from row `at` on, and adds to its moments about the mean of the part's first rows.
template <class T>
void finish(const Step& s, int64_t part, const float* out, Layout layout, int64_t at, int64_t count, bool& begun) {
  int64_t n = s.outputs;
  float* centre = s.centre + part * n;
  double* sums = s.sums + part * 2 * n;
  T* y = (T*)s.y + at * n;
  bool fresh = !begun;
  begun = true;
  by_channels(n, [=](int64_t c, auto vectors) {
    constexpr int K = decltype(vectors)::value;
    Vector first[K] = {}, second[K] = {}, about[K];
    if (fresh) {
      for (int64_t r = 0; r < count; ++r)
        for (int k = 0; k < K; ++k) first[k] += load(out + layout(r, c + k * LANES));
      for (int k = 0; k < K; ++k) store(centre + c + k * LANES, first[k] / (float)count), first[k] = Vector{};
      std::fill(sums + c, sums + c + K * LANES, 0.0);
      std::fill(sums + n + c, sums + n + c + K * LANES, 0.0);
    }
    for (int k = 0; k < K; ++k) about[k] = load(centre + c + k * LANES);
    for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        store(y + r * n + c + k * LANES, load(out + layout(r, c + k * LANES)));
        Vector x = load(y + r * n + c + k * LANES) - about[k];
        first[k] += x;
        second[k] += x * x;
      }
    for (int k = 0; k < K; ++k) {
      add(sums + c + k * LANES, first[k]);
      add(sums + n + c + k * LANES, second[k]);
    }
  });
}

// Passes the input's gradient, `count` rows from row `first` of the run on, to the layer below.
template <class T>
void descend(const Step& s, int64_t part, Run run, const float* gradient, Layout layout, int64_t first,
             int64_t count) {
  int64_t n = s.inputs, at = (run.offset + first) * n;
  T* d = (T*)s.d + at;
  const T *below = s.below ? (const T*)s.below + at : nullptr, *extra = s.extra ? (const T*)s.extra + at : nullptr;
  double* sums = s.sums + part * 3 * n;
  by_channels(n, [=](int64_t c, auto vectors) {
    constexpr int K = decltype(vectors)::value;
    Vector products[K] = {}, total[K] = {}, under[K] = {};
    for (int64_t r = 0; r < count; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        int64_t channel = c + k * LANES, i = r * n + channel;
        Vector g = load(gradient + layout(r, channel));
        if (extra) g += load(extra + i);
        if (s.below) {
          Vector x = load(below + i), z = x * load(s.scale + channel) + load(s.shift + channel);
          Mask positive = z > 0.f;
          under[k] += positive ? Vector{} : g * z;
          g = positive ? g : g * load(s.slope + channel);
          products[k] += g * (x - load(s.mean + channel));
          total[k] += g;
        }
        store(d + i, g);
      }
    if (s.below)
      for (int k = 0; k < K; ++k) {
        add(sums + c + k * LANES, products[k]);
        add(sums + n + c + k * LANES, total[k]);
        add(sums + 2 * n + c + k * LANES, under[k]);
      }
  });
}

// The same for the first layer, whose output is `a`: sums of dz times the window and of dz.
template <class E>
void descend_to_wave(const Step& s, int64_t part, Run run, const float* gradient, const E* a, int64_t first,
                     int64_t count) {
  int64_t n = s.inputs;
  const float* x = s.wave + run.clip * s.samples + first * STRIDE;
  double* sums = s.sums + part * (WINDOW + 1) * n;
  for (int64_t c = 0; c < n; c += LANES) {
    Vector sum[WINDOW + 1] = {};
    for (int64_t r = 0; r < count; ++r) {
      Vector dz = load(a + r * n + c) > 0.f ? load(gradient + r * n + c) : Vector{};
#pragma GCC unroll 11
      for (int i = 0; i < WINDOW; ++i) sum[i] += dz * x[r * STRIDE + i];
      sum[WINDOW] += dz;
    }
    for (int i = 0; i <= WINDOW; ++i) add(sums + i * n + c, sum[i]);
  }
}

// Zeroes what a part adds to.
void clear(const Step& s, int64_t part, int64_t positions, int64_t sums) {
  std::memset(s.weight_gradient + part * positions, 0, positions * sizeof(float));
  if (s.sums) std::memset(s.sums + part * sums, 0, sums * sizeof(double));
}

// --- layers: products along the rows --------------------------------------------------------------------------------

// Number of rows that a product computes for `count` rows.
template <class E>
int64_t product_rows(int64_t count) {
  return round_up(count, std::is_same<E, bfloat16>::value && use_tiles() ? 2 * LANES : ROWS);
}

template <class E, class... Sizes>
void product(const E* a, const E* weight, float* out, Sizes... sizes) {
#ifdef TILES
  if constexpr (PER_FACTOR<E> == 2)
    if (use_tiles()) return multiply_tiles(a, weight, out, sizes...);
#endif
  multiply(a, weight, out, sizes...);
}

// weight: (taps, inputs, outputs), packed as `multiply` reads it.
template <class T>
void product_forward(const Step& s, int64_t part) {
  typedef Operand<T> E;
  Tiles tiles;
  int64_t reach = s.taps / 2 * s.dilation;
  E* input = memory<E>(0, (BLOCK + 2 * reach) * s.inputs);
  float* out = memory<float>(1, BLOCK * s.outputs);
  bool begun = false;
  by_runs(s, part, [&](Run run) {
    for (int64_t first = 0; first < run.rows; first += BLOCK) {
      int64_t count = std::min(BLOCK, run.rows - first), rows = product_rows<E>(count);
      input_rows<T>(s, run, first - reach, first + rows + reach, input, dense(s.inputs));
      product(input, (const E*)s.weight, out, rows, s.taps, s.dilation, s.inputs, s.outputs);
      finish<T>(s, part, out, dense(s.outputs), run.offset + first, count, begun);
    }
  });
}

// weight: (taps, outputs, inputs), taps reversed, packed; null if the input needs no gradient.
// weight_gradient: (taps, inputs, outputs), of the unscaled dy.
template <class T>
void product_backward(const Step& s, int64_t part) {
  typedef Operand<T> E;
  Tiles tiles;
  int64_t reach = s.taps / 2 * s.dilation, positions = s.taps * s.inputs * s.outputs;
  E* dy = memory<E>(0, (BLOCK + 2 * reach + 2) * s.outputs);
  E* input = memory<E>(2, BLOCK * s.inputs);
  float* d = memory<float>(1, BLOCK * s.inputs);
  float* gradient = s.weight_gradient + part * positions;
  clear(s, part, positions, (s.wave ? WINDOW + 1 : 3) * s.inputs);
  by_runs(s, part, [&](Run run) {
    for (int64_t first = 0; first < run.rows; first += BLOCK) {
      int64_t count = std::min(BLOCK, run.rows - first), rows = product_rows<E>(count);
      input_rows<T>(s, run, first, first + rows, input, dense(s.inputs));
      gradient_rows<T>(s, run.offset, run.rows, first - reach, first + rows + reach, dy, dense(s.outputs));
      weight_products(input, dy, gradient, count, s.taps, s.dilation, s.inputs, s.outputs);
      if (!s.weight) continue;
      product(dy, (const E*)s.weight, d, rows, s.taps, s.dilation, s.outputs, s.inputs);
      if (s.wave)
        descend_to_wave(s, part, run, d, input, first, count);
      else
        descend<T>(s, part, run, d, dense(s.inputs), first, count);
    }
  });
}

// --- layers: channel by channel -------------------------------------------------------------------------------------

// Rows of a map as float32, one vector of channels after the other, so that a walk along the row reads memory in order.
inline Layout along(int64_t width) { return {LANES, width * LANES}; }

// The last three rows of a map, with a zero pixel on both sides of each, and a row of zeros for outside the map.
class Band {
 public:
  Band(int which, int64_t width, int64_t channels) : layout(along(width + 2)), size((width + 2) * channels) {
    base = memory<float>(which, 4 * size);
    std::memset(base, 0, 4 * size * sizeof(float));
  }
  const Layout layout;
  void restart() { next = 0; }
  template <class Read>
  void reach(int64_t row, Read read) {  // reads the rows up to `row`
    for (; next <= row; ++next) read(next, base + next % 3 * size + LANES);
  }
  // A row, from its left zero pixel on.
  const float* row(int64_t index, int64_t height) const {
    return index >= 0 && index < height ? base + index % 3 * size : base + 3 * size;
  }

 private:
  int64_t size, next = 0;
  float* base;
};

template <int STEP>
inline void depthwise_row(const float* const* from, const Vector* by, float* out, int64_t width) {
  for (int64_t w = 0; w < width; ++w) {
    Vector sum = {};
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) sum += by[3 * i + j] * load(from[i] + (w * STEP + j) * LANES);
    store(out + w * LANES, sum);
  }
}

// 3 x 3 with padding 1; weight (9, channels).
template <class T>
void depthwise_forward(const Step& s, int64_t part) {
  int64_t n = s.inputs;
  const float* weight = (const float*)s.weight;
  Band band(0, s.width, n);
  Layout layout = along(s.out_width);
  float* out = memory<float>(1, s.out_width * n);
  bool begun = false;
  for (int64_t clip = first_clip(s, part); clip < first_clip(s, part + 1); ++clip) {
    Run run{clip, clip * s.rows, s.rows};
    band.restart();
    for (int64_t h = 0; h < s.out_height; ++h) {
      band.reach(std::min(h * s.stride + 1, s.height - 1), [&](int64_t row, float* to) {
        input_rows<T>(s, run, row * s.width, (row + 1) * s.width, to, band.layout);
      });
      for (int64_t c = 0; c < n; c += LANES) {
        Vector by[9];
        const float* from[3];
        for (int i = 0; i < 9; ++i) by[i] = load(weight + i * n + c);
        for (int i = 0; i < 3; ++i) from[i] = band.row(h * s.stride + i - 1, s.height) + band.layout(0, c);
        (s.stride == 1 ? depthwise_row<1> : depthwise_row<2>)(from, by, out + layout(0, c), s.out_width);
      }
      finish<T>(s, part, out, layout, (clip * s.out_height + h) * s.out_width, s.out_width, begun);
    }
  }
}

// The gradients of a row's input and, added to sum, of the weight. `from`: the output rows that read this one through
// the kernel's rows FIRST, FIRST + STEP ..., from their left zero pixel on.
template <int STEP, int FIRST>
inline void depthwise_row_backward(const float* const* from, const Vector* by, Vector* sum, const float* x, float* d,
                                   int64_t width) {
  auto pixel = [=](int64_t w, auto column) {
    Vector value = load(x + w * LANES), total = {};
#pragma GCC unroll 3
    for (int j = decltype(column)::value; j < 3; j += STEP) {
      int64_t at = (w + 1 - j) / STEP + 1;
#pragma GCC unroll 3
      for (int i = FIRST; i < 3; i += STEP) {
        Vector g = load(from[i] + at * LANES);
        total += by[3 * i + j] * g;
        sum[3 * i + j] += value * g;
      }
    }
    store(d + w * LANES, total);
  };
  if (STEP == 1) {
    for (int64_t w = 0; w < width; ++w) pixel(w, std::integral_constant<int, 0>());
  } else {
    for (int64_t w = 0; w < width; w += 2) {
      pixel(w, std::integral_constant<int, 1>());
      if (w + 1 < width) pixel(w + 1, std::integral_constant<int, 0>());
    }
  }
}

template <class T>
void depthwise_backward(const Step& s, int64_t part) {
  int64_t n = s.inputs, below = s.out_height * s.out_width;
  const float* weight = (const float*)s.weight;
  Band band(0, s.out_width, n);
  Layout layout = along(s.width);
  float *d = memory<float>(1, s.width * n), *input = memory<float>(2, s.width * n);
  float* gradient = s.weight_gradient + part * 9 * n;
  clear(s, part, 9 * n, 3 * n);
  for (int64_t clip = first_clip(s, part); clip < first_clip(s, part + 1); ++clip) {
    Run run{clip, clip * s.rows, s.rows};
    band.restart();
    for (int64_t h = 0; h < s.height; ++h) {
      band.reach(std::min((h + 1) / s.stride, s.out_height - 1), [&](int64_t row, float* to) {
        gradient_rows<T>(s, clip * below, below, row * s.out_width, (row + 1) * s.out_width, to, band.layout);
      });
      input_rows<T>(s, run, h * s.width, (h + 1) * s.width, input, layout);
      for (int64_t c = 0; c < n; c += LANES) {
        Vector by[9], sum[9];
        const float* from[3] = {};
        for (int i = 0; i < 9; ++i) by[i] = load(weight + i * n + c), sum[i] = load(gradient + i * n + c);
        for (int i = 0; i < 3; ++i)  // the output row that reads row h through row i of the kernel
          if ((h + 1 - i) % s.stride == 0)
            from[i] = band.row((h + 1 - i) / s.stride, s.out_height) + band.layout(0, c);
        auto row = s.stride == 1 ? depthwise_row_backward<1, 0>
                   : h % 2       ? depthwise_row_backward<2, 0>
                                 : depthwise_row_backward<2, 1>;
        row(from, by, sum, input + layout(0, c), d + layout(0, c), s.width);
        for (int i = 0; i < 9; ++i) store(gradient + i * n + c, sum[i]);
      }
      descend<T>(s, part, run, d, layout, h * s.width, s.width);
    }
  }
}

// --- the first layer's windows --------------------------------------------------------------------------------------

// Sums over all windows of the products of two samples and, last, of the samples: (12, 16) per part, of which 11
// columns count. Waves must have 16 samples from the start of their last window on.
template <class T>
void window_moments(const Step& s, int64_t part) {
  typedef double Wide __attribute__((vector_size(8 * LANES)));
  for (int64_t c = 0; c < 16; c += LANES) {
    Wide sums[WINDOW + 1] = {};
    for (int64_t clip = first_clip(s, part); clip < first_clip(s, part + 1); ++clip)
      for (int64_t r = 0; r < s.rows; ++r) {
        const float* x = s.wave + clip * s.samples + r * STRIDE;
        Wide window = __builtin_convertvector(load(x + c), Wide);
#pragma GCC unroll 11
        for (int i = 0; i < WINDOW; ++i) sums[i] += window * (double)x[i];
        sums[WINDOW] += window;
      }
    for (int i = 0; i <= WINDOW; ++i)
      std::memcpy(s.sums + (part * (WINDOW + 1) + i) * 16 + c, &sums[i], sizeof sums[i]);
  }
}

// --- maximum pools --------------------------------------------------------------------------------------------------

// y (clips, windows, channels) = max(0, maximum of below scale + shift over the rows of a window).
template <class T>
void pool_forward(const Step& s, int64_t part) {
  int64_t n = s.inputs;
  for (int64_t clip = first_clip(s, part); clip < first_clip(s, part + 1); ++clip)
    for (int64_t w = 0; w < s.windows; ++w)
      for (int64_t c = 0; c < n; c += LANES) {
        const T* x = (const T*)s.below + clip * s.rows * n + c;
        Vector scale = load(s.scale + c), shift = load(s.shift + c), best = {};
        for (int64_t r = s.start[w]; r < s.end[w]; ++r) {
          Vector z = load(x + r * n) * scale + shift;
          best = z > best || z != z ? z : best;
        }
        store((T*)s.y + (clip * s.windows + w) * n + c, best);
      }
}

// d is dz at a window's maximum (the first among equals) if that is above 0, and 0 elsewhere. Windows are in order.
template <class T>
void pool_backward(const Step& s, int64_t part) {
  int64_t n = s.inputs;
  double* sums = s.sums + part * 3 * n;
  std::memset(sums, 0, 3 * n * sizeof(double));
  for (int64_t clip = first_clip(s, part); clip < first_clip(s, part + 1); ++clip) {
    const T *x = (const T*)s.below + clip * s.rows * n, *dz = (const T*)s.dz + clip * s.windows * n;
    T* d = (T*)s.d + clip * s.rows * n;
    for (int64_t first = 0; first < s.windows; first += BLOCK) {
      int64_t last = std::min(first + BLOCK, s.windows), from = first ? s.end[first - 1] : 0;
      std::memset((void*)(d + from * n), 0, ((last == s.windows ? s.rows : s.end[last - 1]) - from) * n * sizeof(T));
      for (int64_t c = 0; c < n; c += LANES) {
        Vector mean = load(s.mean + c), scale = load(s.scale + c), shift = load(s.shift + c);
        Vector products = {}, total = {};
        for (int64_t w = first; w < last; ++w) {
          Vector best = {}, raw = {}, g = load(dz + w * n + c);
          Mask place = Mask{} - 1;
          for (int64_t r = s.start[w]; r < s.end[w]; ++r) {
            Vector v = load(x + r * n + c), z = v * scale + shift;
            Mask wins = z > best;
            best = wins ? z : best;
            raw = wins ? v : raw;
            place = wins ? Mask{} + (int32_t)(r - s.start[w]) : place;
          }
          for (int64_t r = s.start[w]; r < s.end[w]; ++r) {
            T* at = d + r * n + c;
            Vector share = place == (int32_t)(r - s.start[w]) ? g : Vector{};
            store(at, load(at) + share);  // windows may overlap
          }
          g = place >= 0 ? g : Vector{};
          products += g * (raw - mean);
          total += g;
        }
        add(sums + c, products);
        add(sums + n + c, total);
      }
    }
  }
}

}  // namespace

// Computes all parts; the results do not depend on which thread computes which part.
template <class F>
void call(F function, const Step& step) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t part; (part = next++) < step.parts;) function(step, part);
  };
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 1; i < std::min(step.threads, step.parts); ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {  // a limit of the system: fewer threads do the same work
  }
  work();
  for (auto& thread : threads) thread.join();
}

#define EXPORT(NAME)                                                                   \
  extern "C" void NAME##_float32(const Step* step) { call(NAME<float>, *step); }       \
  extern "C" void NAME##_bfloat16(const Step* step) { call(NAME<bfloat16>, *step); }

EXPORT(product_forward)
EXPORT(product_backward)
EXPORT(depthwise_forward)
EXPORT(depthwise_backward)
EXPORT(window_moments)
EXPORT(pool_forward)
EXPORT(pool_backward)

// The order of weights that `multiply` reads: outputs side by side, and whether bfloat16 inputs are paired.
extern "C" int64_t panel() { return PANEL; }
extern "C" int64_t pairs() { return std::is_same<Operand<bfloat16>, bfloat16>::value; }
extern "C" int64_t tiles() { return use_tiles(); }
