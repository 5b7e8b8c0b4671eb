// Panels: query rows in vector lanes that read keys and values as they are stored, block by block, with a running softmax.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int WIDEST = 3;        // vectors of query rows at once: eight keys' sums of three fill the registers (six of four spill)
constexpr int64_t BLOCK = 64;    // keys whose scores are held at once

typedef int32_t Words __attribute__((vector_size(LANES * 4)));

inline Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x <= 0, to two units in the last place: 2^n times a polynomial on |f| <= ln 2 / 2; NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;
  Floats shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  Floats f = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = f * (1.0f / 5040) + (1.0f / 720);
  p = p * f + (1.0f / 120);
  p = p * f + (1.0f / 24);
  p = p * f + (1.0f / 6);
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  Floats result = x > -87.0f ? p * power : Floats{};
  return x == x ? result : x;
}

// C[m][lanes] (+)= sum over i of a[m * row + i * step] * b[i][lanes], for ROWS rows and VECTORS vectors of lanes.
template <int ROWS, int VECTORS, bool ADD>
inline void tile(const float* a, int64_t row, int64_t step, int64_t depth, const float* b, int64_t width, float* c) {
  Floats total[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) total[m][n] = ADD ? load(c + m * width + n * LANES) : Floats{};
  for (int64_t i = 0; i < depth; i++) {
    Floats right[VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) right[n] = load(b + i * width + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      const float left = a[m * row + i * step];
#pragma GCC unroll 8
      for (int n = 0; n < VECTORS; n++) total[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) store(c + m * width + n * LANES, total[m][n]);
}

template <int VECTORS, bool ADD>
void product(
    const float* a, int64_t row, int64_t step, int64_t rows, int64_t depth, const float* b, int64_t width, float* c) {
  constexpr int ROWS = LANES == 8 ? 4 : 8;
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS) tile<ROWS, VECTORS, ADD>(a + m * row, row, step, depth, b, width, c + m * width);
  for (; m < rows; m++) tile<1, VECTORS, ADD>(a + m * row, row, step, depth, b, width, c + m * width);
}

// A panel of query rows, one in each lane: queries [K, width], outputs [V, width] not yet divided, the largest score of each
// row and the sum of its weights.
struct Panel {
  int64_t vectors, width;
  float *queries, *outputs, *top, *total;

  template <int VECTORS>
  void add(const float* k, int64_t k_slot, const float* v, int64_t v_slot, int64_t keys, int64_t dim, int64_t out,
           float* scores) {
    product<VECTORS, false>(k, k_slot, 1, keys, dim, queries, width, scores);
    for (int n = 0; n < VECTORS; n++) {
      float* column = scores + n * LANES;
      Floats before = load(top + n * LANES), high = before;
      for (int64_t key = 0; key < keys; key++) high = larger(high, load(column + key * width));
      Floats sum = {};
      for (int64_t key = 0; key < keys; key++) {
        Floats weight = exponential(load(column + key * width) - high);
        store(column + key * width, weight);
        sum += weight;
      }
      Floats shrink = exponential(before - high);
      store(top + n * LANES, high);
      store(total + n * LANES, load(total + n * LANES) * shrink + sum);
      for (int64_t d = 0; d < out; d++) {
        float* place = outputs + d * width + n * LANES;
        store(place, load(place) * shrink);
      }
    }
    product<VECTORS, true>(v, 1, v_slot, out, keys, scores, width, outputs);
  }

  void add(const float* k, int64_t k_slot, const float* v, int64_t v_slot, int64_t keys, int64_t dim, int64_t out,
           float* scores) {
    switch (vectors) {
      case 1: return add<1>(k, k_slot, v, v_slot, keys, dim, out, scores);
      case 2: return add<2>(k, k_slot, v, v_slot, keys, dim, out, scores);
      case 3: return add<3>(k, k_slot, v, v_slot, keys, dim, out, scores);
    }
  }
};

}  // namespace
