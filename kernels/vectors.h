// What the C++ forms share: vectors of fp32 as wide as the processor's, sums over them, and bf16 numbers that widen to fp32.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));

// a * b + total, rounded once wherever the processor can: a compiler left to choose rounds twice in some loops and not in others.
inline Floats fused(Floats a, Floats b, Floats total) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
  return a * b + total;
#endif
}

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline Floats widened(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Floats widened(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
  typedef uint32_t Whole __attribute__((vector_size(LANES * 4)));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  Whole bits = __builtin_convertvector(halves, Whole) << 16;
  Floats result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// The first `count` numbers, zeros behind them.
template <typename T>
inline Floats some(const T* from, int64_t count) {
  float values[LANES] = {};
  for (int64_t i = 0; i < count; i++) values[i] = widen(from[i]);
  return widened(values);
}

template <int STRIDE, size_t... LANE>
inline Floats join(Floats a, Floats b, std::index_sequence<LANE...>) {
  return __builtin_shufflevector(a, b, (LANE & STRIDE ? LANES + (LANE ^ STRIDE) : LANE)...) +
         __builtin_shufflevector(a, b, (LANE & STRIDE ? LANES + LANE : LANE ^ STRIDE)...);
}

// Sums over the lanes of as many vectors as there are lanes: halves are added until one vector holds them all, in order.
template <int STRIDE = LANES / 2>
inline Floats sums(Floats* values) {
#pragma GCC unroll 8
  for (int k = 0; k < STRIDE; k++)
    values[k] = join<STRIDE>(values[k], values[k + STRIDE], std::make_index_sequence<LANES>());
  if constexpr (STRIDE > 1) return sums<STRIDE / 2>(values);
  else return values[0];
}

// The sum of one vector, in the order of `sums`.
inline float sum(Floats values) {
  float lanes[LANES];
  std::memcpy(lanes, &values, sizeof lanes);
#pragma GCC unroll 8
  for (int stride = LANES / 2; stride > 0; stride /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < stride; k++) lanes[k] += lanes[k + stride];
  return lanes[0];
}

}  // namespace
