// Tile instructions in software, to test code for processors that have them on those that have not.
#define TILES
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

inline bool tiles_permitted() { return true; }

namespace software {

thread_local uint8_t configuration[64], tile[8][16][64];

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
inline float half(const uint8_t* row, int i) {
  uint32_t bits = 0;
  std::memcpy((char*)&bits + 2, row + 2 * i, 2);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void products(int to, int a, int b) {
  check(to), check(a), check(b);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, tile[to][m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 2; ++i) sum += half(tile[a][m], 2 * k + i) * half(tile[b][k], 2 * n + i);
      std::memcpy(tile[to][m] + 4 * n, &sum, 4);
    }
}

}  // namespace software

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
