// AVX-512, its bfloat16 dot products and, with -DTILES, tiles in software: tests code for processors that have them.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BF16__ 1

namespace software {

struct Words {  // a register of 16 words
  int32_t word[16];
  template <class V> static Words of(V v) { Words w; std::memcpy(w.word, &v, sizeof v); return w; }
  template <class V> V as() const { V v; std::memcpy(&v, word, sizeof v); return v; }
};

inline float widen(uint32_t bits) { bits <<= 16; float x; std::memcpy(&x, &bits, 4); return x; }
inline float value(const Words& w, int i) { float x; std::memcpy(&x, w.word + i, 4); return x; }

inline __m512i load_words(const void* p) { __m512i v; std::memcpy(&v, p, 64); return v; }
template <class V> inline void store_words(void* p, V v) { std::memcpy(p, &v, 64); }
inline __m512i everywhere(int32_t x) { Words w; for (auto& word : w.word) word = x; return w.as<__m512i>(); }
inline __m512i left(__m512i x, int bits) {
  Words w = Words::of(x);
  for (auto& word : w.word) word = (uint32_t)word << bits;
  return w.as<__m512i>();
}
inline __m512i either(__m512i a, __m512i b) {
  Words w = Words::of(a), v = Words::of(b);
  for (int i = 0; i < 16; ++i) w.word[i] |= v.word[i];
  return w.as<__m512i>();
}
inline __m512i wide(__m256i x) {
  uint16_t half[16];
  std::memcpy(half, &x, 32);
  Words w;
  for (int i = 0; i < 16; ++i) w.word[i] = half[i];
  return w.as<__m512i>();
}
inline __m256bh narrow(__m512 x) {
  Words w = Words::of(x);
  uint16_t half[16];
  for (int i = 0; i < 16; ++i) {
    uint32_t bits = w.word[i];
    float f = value(w, i);
    half[i] = f == f ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
  }
  __m256bh h;
  std::memcpy(&h, half, 32);
  return h;
}
inline __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
  Words s = Words::of(sum), x = Words::of(a), y = Words::of(b);
  for (int i = 0; i < 16; ++i) {
    float total = value(s, i) + widen((uint32_t)x.word[i] >> 16) * widen((uint32_t)y.word[i] >> 16) +
                  widen(x.word[i] & 0xffff) * widen(y.word[i] & 0xffff);
    std::memcpy(s.word + i, &total, 4);
  }
  return s.as<__m512>();
}
inline __m512i permute(__m512i a, __m512i index, __m512i b) {
  Words x = Words::of(a), y = Words::of(b), out, from = Words::of(index);
  for (int i = 0; i < 16; ++i) out.word[i] = (from.word[i] & 16 ? y : x).word[from.word[i] & 15];
  return out.as<__m512i>();
}

alignas(64) thread_local uint8_t configuration[64], tile[8][16][64];

inline void check(int t) {  // 16 rows of 64 bytes
  if (configuration[0] != 1 || configuration[48 + t] != 16 || configuration[16 + 2 * t] != 64) std::abort();
}
inline void load(int t, const void* base, long stride) {
  check(t);
  for (int r = 0; r < 16; ++r) std::memcpy(tile[t][r], (const char*)base + r * stride, 64);
}
inline void store(int t, void* base, long stride) {
  check(t);
  for (int r = 0; r < 16; ++r) std::memcpy((char*)base + r * stride, tile[t][r], 64);
}
inline void products(int to, int a, int b) {
  check(to), check(a), check(b);
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      int32_t pair;
      std::memcpy(&pair, tile[a][m] + 4 * k, 4);
      store_words(tile[to][m], dot(*(__m512_u*)tile[to][m], (__m512bh)everywhere(pair), *(__m512bh*)tile[b][k]));
    }
}

}  // namespace software

#define _mm512_loadu_si512 software::load_words
#define _mm512_storeu_si512 software::store_words
#define _mm512_set1_epi32 software::everywhere
#define _mm512_slli_epi32 software::left
#define _mm512_or_si512 software::either
#define _mm512_cvtepu16_epi32 software::wide
#define _mm512_cvtneps_pbh software::narrow
#define _mm512_dpbf16_ps software::dot
#define _mm512_permutex2var_epi32 software::permute

#ifdef TILES
inline bool tiles_permitted() { return true; }
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_storeconfig(p) std::memcpy(p, software::configuration, 64)
#define _tile_loadconfig(p) std::memcpy(software::configuration, p, 64)
#define _tile_loadd(t, base, stride) software::load(t, base, stride)
#define _tile_stored(t, base, stride) software::store(t, base, stride)
#define _tile_zero(t) std::memset(software::tile[t], 0, 1024)
#define _tile_dpbf16ps(to, a, b) software::products(to, a, b)
#endif
