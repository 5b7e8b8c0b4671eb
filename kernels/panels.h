// Panels: query rows in vector lanes that read keys and values as they are stored, block by block, with a running softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int WIDEST = LANES == 8 ? 2 : 3;  // vectors of query rows at once, ..
constexpr int TALLEST = LANES == 8 ? 6 : 8;  // .. and keys: their sums nearly fill the registers (16 of 8 lanes, 32 of 16)
constexpr int64_t BLOCK = 64;    // keys whose scores are held at once
constexpr int64_t DEPTH = 32;    // numbers of a head that one sum adds up

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

// tanh x: by e^-2|x|, and near 0, where that cancels, by x + x^3 P(x^2) (the polynomial of Cephes' tanhf, |x| < 0.625).
inline Floats tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x, e = exponential(size * -2.0f), far = (1.0f - e) / (1.0f + e), z = x * x;
  Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return size < 0.625f ? p * z * x + x : (x < 0.0f ? -far : far);
}

// C[m][lanes] (+)= sum over i of a[m * row + i * step] * b[i][lanes], for M rows and VECTORS vectors of lanes.  The sum starts
// at zero, so that rounding grows with the depth of one product only.
template <int M, int VECTORS, bool ADD>
inline void tile(const float* a, int64_t row, int64_t step, int64_t depth, const float* b, int64_t width, float* c) {
  Floats total[M][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) total[m][n] = Floats{};
  for (int64_t i = 0; i < depth; i++) {
    Floats right[VECTORS];
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) right[n] = load(b + i * width + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const float left = a[m * row + i * step];
#pragma GCC unroll 8
      for (int n = 0; n < VECTORS; n++) total[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) {
      float* place = c + m * width + n * LANES;
      store(place, ADD ? load(place) + total[m][n] : total[m][n]);
    }
}

template <int VECTORS, bool ADD>
void product(
    const float* a, int64_t row, int64_t step, int64_t rows, int64_t depth, const float* b, int64_t width, float* c) {
  int64_t m = 0;
  for (; m + TALLEST <= rows; m += TALLEST)
    tile<TALLEST, VECTORS, ADD>(a + m * row, row, step, depth, b, width, c + m * width);
  for (; m + 4 <= rows; m += 4) tile<4, VECTORS, ADD>(a + m * row, row, step, depth, b, width, c + m * width);
  for (; m < rows; m++) tile<1, VECTORS, ADD>(a + m * row, row, step, depth, b, width, c + m * width);
}

// Which keys of a block each query row sees: row r's bytes start at rows[r]; null shows all.
struct Seen {
  const uint8_t* const* rows;
  int64_t start;
  bool hides(int64_t row, int64_t key) const { return !rows[row][start + key]; }
};

// A panel of query rows, one in each lane: queries [K, width], outputs [V, width] not yet divided, the largest score of each
// row and the sum of its weights.
struct Panel {
  int64_t vectors, width;
  float *queries, *outputs, *top, *total;
  int64_t first, rows;  // the rows of the panel among those of its task, which only `seen` needs

  template <int VECTORS>
  void add(const float* k, int64_t k_slot, const float* v, int64_t v_slot, int64_t keys, int64_t dim, int64_t out,
           float* scores, float cap, const Seen* seen) {
    product<VECTORS, false>(k, k_slot, 1, keys, std::min(dim, DEPTH), queries, width, scores);
    for (int64_t i = DEPTH; i < dim; i += DEPTH)
      product<VECTORS, true>(k + i, k_slot, 1, keys, std::min(dim - i, DEPTH), queries + i * width, width, scores);
    if (cap > 0)
      for (int64_t n = 0; n < keys * width; n += LANES) store(scores + n, tangent(load(scores + n)) * cap);
    if (seen)
      for (int64_t lane = 0; lane < rows; lane++)
        for (int64_t key = 0; key < keys; key++)
          if (seen->hides(first + lane, key)) scores[key * width + lane] = -INFINITY;
    for (int n = 0; n < VECTORS; n++) {
      float* column = scores + n * LANES;
      Floats before = load(top + n * LANES), high = before;
      for (int64_t key = 0; key < keys; key++) high = larger(high, load(column + key * width));
      store(top + n * LANES, high);
      high = high > -INFINITY ? high : Floats{};
      Floats sum = {};
      for (int64_t key = 0; key < keys; key++) {
        Floats weight = exponential(load(column + key * width) - high);
        store(column + key * width, weight);
        sum += weight;
      }
      Floats shrink = exponential(before - high);
      store(total + n * LANES, load(total + n * LANES) * shrink + sum);
      for (int64_t d = 0; d < out; d++) {
        float* place = outputs + d * width + n * LANES;
        store(place, load(place) * shrink);
      }
    }
    product<VECTORS, true>(v, 1, v_slot, out, keys, scores, width, outputs);
  }

  void add(const float* k, int64_t k_slot, const float* v, int64_t v_slot, int64_t keys, int64_t dim, int64_t out,
           float* scores, float cap = 0, const Seen* seen = nullptr) {
    switch (vectors) {
      case 1: return add<1>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
      case 2: return add<2>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
      case 3: return add<3>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
    }
  }
};

}  // namespace
