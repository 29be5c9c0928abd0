// The intrinsics that schedules/amx.py calls, without AMX: tiles in memory, one set per thread, by the rules of Intel's
// manual. What would be a fault of the processor is kept as text for `amx_report`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>

namespace {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64];
};
struct Extent {
  uintptr_t begin = UINTPTR_MAX, end = 0;
};

thread_local Tile tiles[8];
thread_local bool configured = false;
thread_local uint8_t configuration[64];

std::mutex mutex;  // of all below
std::string fault;
int64_t active = 0, dots = 0, repeated = 0;
Extent extents[2];  // read into tiles 4 and 5, and into 6 and 7

bool require(bool holds, const char* rule) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!holds && fault.empty()) fault = rule;
  return holds;
}

bool usable(int tile) { return require(configured && tiles[tile].rows > 0, "a tile that is not configured"); }

float number(const uint8_t* bf16) {
  uint16_t bits;
  std::memcpy(&bits, bf16, 2);
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void set_active(bool now) {
  std::lock_guard<std::mutex> lock(mutex);
  active += int(now) - int(configured);
  configured = now;
}

}  // namespace

extern "C" {

void amx_emulated_ldtilecfg(const uint8_t* shapes) {
  bool valid = shapes[0] == 1 && std::all_of(shapes + 1, shapes + 16, [](uint8_t b) { return b == 0; });
  valid = valid && std::all_of(shapes + 32, shapes + 48, [](uint8_t b) { return b == 0; });
  valid = valid && std::all_of(shapes + 56, shapes + 64, [](uint8_t b) { return b == 0; });
  for (int i = 0; i < 8; ++i) {
    Tile& tile = tiles[i];
    tile.rows = shapes[48 + i];
    tile.bytes = shapes[16 + 2 * i] | shapes[17 + 2 * i] << 8;
    valid = valid && tile.rows <= 16 && tile.bytes <= 64 && (tile.rows == 0) == (tile.bytes == 0);
    std::memset(tile.data, 0, sizeof(tile.data));
  }
  if (!require(valid, "a configuration that does not exist")) return;
  if (configured && std::memcmp(configuration, shapes, 64) == 0) {
    std::lock_guard<std::mutex> lock(mutex);
    ++repeated;
  }
  std::memcpy(configuration, shapes, 64);
  set_active(true);
}

void amx_emulated_tilerelease() { set_active(false); }

void amx_emulated_tilezero(int8_t tile) {
  if (usable(tile)) std::memset(tiles[tile].data, 0, sizeof(tiles[tile].data));
}

void amx_emulated_tileloadd64(int8_t tile, const uint8_t* from, int64_t stride) {
  if (!usable(tile)) return;
  Tile& to = tiles[tile];
  std::memset(to.data, 0, sizeof(to.data));
  for (int row = 0; row < to.rows; ++row) std::memcpy(to.data[row], from + row * stride, to.bytes);
  if (tile >= 4) {
    std::lock_guard<std::mutex> lock(mutex);
    Extent& seen = extents[tile / 2 - 2];
    seen.begin = std::min(seen.begin, uintptr_t(from));
    seen.end = std::max(seen.end, uintptr_t(from + (to.rows - 1) * stride + to.bytes));
  }
}

void amx_emulated_tilestored64(int8_t tile, uint8_t* to, int64_t stride) {
  if (!usable(tile)) return;
  for (int row = 0; row < tiles[tile].rows; ++row) std::memcpy(to + row * stride, tiles[tile].data[row], tiles[tile].bytes);
}

void amx_emulated_tdpbf16ps(int8_t c_tile, int8_t a_tile, int8_t b_tile) {
  Tile &c = tiles[c_tile], &a = tiles[a_tile], &b = tiles[b_tile];
  if (!usable(c_tile) || !usable(a_tile) || !usable(b_tile)) return;
  bool fits = c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows && c.bytes % 4 == 0;
  if (!require(fits, "tiles whose shapes do not fit")) return;
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.bytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < b.rows; ++k) {
        even = std::fma(number(a.data[m] + 4 * k), number(b.data[k] + 4 * n), even);
        odd = std::fma(number(a.data[m] + 4 * k + 2), number(b.data[k] + 4 * n + 2), odd);
      }
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
  }
  std::lock_guard<std::mutex> lock(mutex);
  ++dots;
}

// What happened since the last report: threads that kept their tiles; products; bytes from the first to the last that was
// read of x and of the weight, or whatever else came into tiles 4 and 5, and 6 and 7; how often a thread configured its
// tiles as they were; and the first fault.
void amx_report(int64_t counts[5], char* text, int64_t size) {
  std::lock_guard<std::mutex> lock(mutex);
  counts[0] = active;
  counts[1] = dots;
  for (int i = 0; i < 2; ++i) counts[2 + i] = extents[i].end ? int64_t(extents[i].end - extents[i].begin) : 0;
  counts[4] = repeated;
  std::strncpy(text, fault.c_str(), size - 1);
  fault.clear();
  dots = repeated = 0;
  extents[0] = extents[1] = Extent();
}

}  // extern "C"
