// Few rows times a weight matrix: a weight is read from memory once, in one stream per thread, and sums are in fp32.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "vectors.h"

namespace {

constexpr int REGISTERS = LANES == 8 ? 16 : 32;
constexpr int SUMS = REGISTERS / 2;       // sums of one tile, rows times columns; the other registers hold what is multiplied
constexpr int MOST = SUMS / 2;            // rows of a tile at most
constexpr int64_t AHEAD = 16 * 1024;      // bytes before they are read, weights are fetched into the second cache
constexpr int64_t SHARES = 8;             // shares of the weight that a thread takes one after another
constexpr int64_t SERIAL = 32 * 1024;     // weights below which a second thread costs more than it brings

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));

inline void narrow(float value, float& result) { result = value; }

inline void narrow(float value, BFloat16& result) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    result.bits = 0x7fc0;
  } else {
    result.bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline void narrow(Floats values, float* results) { std::memcpy(results, &values, sizeof values); }

inline void narrow(Floats values, BFloat16* results) {
  Words bits, wrong = (Words)(values != values);
  std::memcpy(&bits, &values, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Shorts narrowed = __builtin_convertvector((bits & ~wrong) | (0x7fc0 & wrong), Shorts);
  std::memcpy(results, &narrowed, sizeof narrowed);
}

struct alignas(64) Line {
  char bytes[64];
};

template <typename To, typename From>
inline To read(const From* from) {
  To result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

// How STEP weights and STEP numbers of a row meet: a row is kept as X, both are read into vectors and added to a sum in fp32.
template <typename T>
struct Form;

// Vectors of two halves: what lies at the even and at the odd places, or first and last, whichever reads fastest.
struct Halves {
  Floats one, two;
};

inline void add(Floats& total, const Halves& weight, const Halves& x) {
  total = fused(weight.two, x.two, fused(weight.one, x.one, total));
}

template <>
struct Form<float> {
  typedef float X;
  static constexpr int STEP = 2 * LANES;
  static Halves read_weight(const float* from) { return {read<Floats>(from), read<Floats>(from + LANES)}; }
  static Halves read_row(const X* from) { return read_weight(from); }
  static void arrange(const float* x, X* to) { std::memcpy(to, x, STEP * sizeof(X)); }
};

#if defined(__AVX512BF16__)
// One instruction multiplies pairs of bf16 and adds them to fp32.
inline void add(Floats& total, __m512i weight, __m512i x) {
  total = (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)weight, (__m512bh)x);
}

template <>
struct Form<BFloat16> {
  typedef BFloat16 X;
  static constexpr int STEP = 2 * LANES;
  static __m512i read_weight(const BFloat16* from) { return _mm512_loadu_si512(from); }
  static __m512i read_row(const X* from) { return _mm512_loadu_si512(from); }
  static void arrange(const BFloat16* x, X* to) { std::memcpy(to, x, STEP * sizeof(X)); }
};
#else
template <>
struct Form<BFloat16> {
  typedef float X;
  static constexpr int STEP = 2 * LANES;
  static Halves read_weight(const BFloat16* from) {
    Words both = read<Words>(from), low = both << 16, high = both & 0xffff0000u;
    return {read<Floats>(&low), read<Floats>(&high)};
  }
  static Halves read_row(const X* from) { return {read<Floats>(from), read<Floats>(from + LANES)}; }
  static void arrange(const BFloat16* x, X* to) {
    Halves both = read_weight(x);
    std::memcpy(to, &both, sizeof both);
  }
};
#endif

// Into the second cache: the first has too few lines under way to keep up with the memory.
inline void fetch(const char* line) { __builtin_prefetch(line, 0, 2); }

// x [rows, in] (rows stride apart), weight [out, in], bias [out] or null, y [rows, out].
// arranged: x over the first `whole` of its numbers, which fill whole steps, and rows of zeros up to whole tiles.
template <typename T>
struct Product {
  static constexpr int STEP = Form<T>::STEP;
  const T* x;
  int64_t stride;
  const T *weight, *bias;
  T* y;
  int64_t rows, in, out, whole;
  const typename Form<T>::X* arranged;

  // What no whole step holds, and the bias.
  float finished(int64_t row, int64_t column, float result) const {
    const T* from = weight + column * in;
    for (int64_t i = whole; i < in; i++) result += widen(from[i]) * widen(x[row * stride + i]);
    return result + (bias ? widen(bias[column]) : 0.0f);
  }

  // One row and one column.
  void one(int64_t row, int64_t column) const {
    Floats total = {};
    const T* from = weight + column * in;
    for (int64_t i = 0; i < whole; i += STEP)
      add(total, Form<T>::read_weight(from + i), Form<T>::read_row(arranged + row * whole + i));
    narrow(finished(row, column, sum(total)), y[row * out + column]);
  }

  // y at [row .. row + ROWS, column .. column + SUMS / ROWS], one or two columns at a time: a weight row alone is a stream that
  // the processor follows by itself as long as little is computed with it, and with more rows two share what is read of x.
  template <int ROWS>
  void tile(int64_t row, int64_t column) const {
    constexpr int COLUMNS = SUMS / ROWS, STREAMS = ROWS < MOST ? 1 : 2, LINES = STREAMS * STEP * sizeof(T) / 64;
    Floats total[SUMS];
    const T* from = weight + column * in;
    const auto* numbers = arranged + row * whole;
    const char* next = reinterpret_cast<const char*>(from) + AHEAD;
#pragma GCC unroll 8
    for (int first = 0; first < COLUMNS; first += STREAMS, from += STREAMS * in) {
      Floats part[ROWS][STREAMS] = {};
      for (int64_t i = 0; i < whole; i += STEP, next += LINES * 64) {
#pragma GCC unroll 8
        for (int line = 0; line < LINES && ROWS > 2; line++) fetch(next + line * 64);
        decltype(Form<T>::read_weight(from)) weights[STREAMS];
#pragma GCC unroll 8
        for (int c = 0; c < STREAMS; c++) weights[c] = Form<T>::read_weight(from + c * in + i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          auto step = Form<T>::read_row(numbers + r * whole + i);
#pragma GCC unroll 8
          for (int c = 0; c < STREAMS; c++) add(part[r][c], weights[c], step);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < STREAMS; c++) total[r * COLUMNS + first + c] = part[r][c];
    }
    const int live = std::min<int64_t>(ROWS, rows - row);
    float results[SUMS];
#pragma GCC unroll 8
    for (int n = 0; n < SUMS; n += LANES) {
      Floats all = sums(total + n);
      std::memcpy(results + n, &all, sizeof all);
    }
    if (whole < in || bias)
      for (int r = 0; r < live; r++)
        for (int c = 0; c < COLUMNS; c++)
          results[r * COLUMNS + c] = finished(row + r, column + c, results[r * COLUMNS + c]);
    T narrowed[SUMS];
#pragma GCC unroll 8
    for (int n = 0; n < SUMS; n += LANES) narrow(read<Floats>(results + n), narrowed + n);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      if (r < live) std::memcpy(y + (row + r) * out + column, narrowed + r * COLUMNS, COLUMNS * sizeof(T));
  }

  template <int ROWS>
  void tiles(int64_t row, int64_t first, int64_t last) const {
    constexpr int COLUMNS = SUMS / ROWS;
    for (; first + COLUMNS <= last; first += COLUMNS) tile<ROWS>(row, first);
    for (; first < last; first++)
      for (int64_t r = row; r < std::min<int64_t>(row + ROWS, rows); r++) one(r, first);
  }

  template <int ROWS = MOST>
  void fitting(int64_t row, int64_t first, int64_t last) const {
    if constexpr (ROWS > 2)
      if (rows - row <= ROWS / 2) return fitting<ROWS / 2>(row, first, last);
    tiles<ROWS>(row, first, last);
  }

  void columns(int64_t first, int64_t last) const {
    if (rows == 1) {
      for (; first < last; first++) one(0, first);
      return;
    }
    for (; first < last; first += SUMS)
      for (int64_t row = 0; row < rows; row += MOST) fitting(row, first, std::min<int64_t>(first + SUMS, last));
  }
};

template <typename T>
void linear(const T* x, int64_t stride, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out) {
  typedef typename Form<T>::X X;
  constexpr int64_t STEP = Form<T>::STEP;
  const int64_t whole = in - in % STEP, filled = rows == 1 ? 1 : (rows + MOST - 1) / MOST * MOST;
  std::unique_ptr<Line[]> lines(new Line[filled * whole * sizeof(X) / sizeof(Line) + 1]);
  X* arranged = reinterpret_cast<X*>(lines.get());
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < whole; i += STEP) Form<T>::arrange(x + row * stride + i, arranged + row * whole + i);
  std::memset(static_cast<void*>(arranged + rows * whole), 0, (filled - rows) * whole * sizeof(X));
  const Product<T> product{x, stride, weight, bias, y, rows, in, out, whole, arranged};
  std::atomic<int64_t> next{0};
#pragma omp parallel if (in * out > SERIAL)
  {
    int64_t share = std::max<int64_t>(out / (SHARES * omp_get_num_threads()) / SUMS, 1) * SUMS;
    for (int64_t first = next.fetch_add(share); first < out; first = next.fetch_add(share))
      product.columns(first, std::min(first + share, out));
  }
}

struct Matrix {
  void* data;
  int64_t rows, columns, stride;
  int32_t dtype;
};

// A tensor [..., columns] as rows that are `stride` apart; false when it is not laid out so.
bool matrix(AtenTensorHandle tensor, Matrix& result) {
  int64_t dim;
  int64_t *sizes, *strides;
  if (aoti_torch_get_dim(tensor, &dim) || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &result.data) ||
      aoti_torch_get_dtype(tensor, &result.dtype) || dim < 1)
    return false;
  result.columns = sizes[dim - 1];
  result.rows = 1;
  result.stride = result.columns;
  if (sizes[dim - 1] > 1 && strides[dim - 1] != 1) return false;
  for (int64_t axis = dim - 2; axis >= 0; axis--) {
    if (sizes[axis] == 1) continue;
    if (result.rows == 1) result.stride = strides[axis];
    else if (strides[axis] != result.stride * result.rows) return false;
    result.rows *= sizes[axis];
  }
  return true;
}

}  // namespace

// The C form of subquad::narrow_linear that ahead-of-time compiled programs call.
extern "C" AOTITorchError aoti_torch_cpu_narrow_linear(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* result) {
  Matrix in, by, plus{}, out;
  if (!matrix(x, in) || !matrix(weight, by) || by.stride != by.columns || in.columns != by.columns || in.dtype != by.dtype)
    return AOTI_TORCH_FAILURE;
  if (bias && (!matrix(*bias, plus) || plus.columns != by.rows || plus.dtype != in.dtype)) return AOTI_TORCH_FAILURE;
  int64_t dim, *sizes, shape[8], strides[8], step = 1;
  if (aoti_torch_get_dim(x, &dim) || aoti_torch_get_sizes(x, &sizes) || dim > 8) return AOTI_TORCH_FAILURE;
  for (int64_t axis = dim - 1; axis >= 0; axis--) {
    shape[axis] = axis == dim - 1 ? by.rows : sizes[axis];
    strides[axis] = step;
    step *= shape[axis];
  }
  if (aoti_torch_empty_strided(dim, shape, strides, in.dtype, aoti_torch_device_type_cpu(), 0, result) ||
      !matrix(*result, out))
    return AOTI_TORCH_FAILURE;
  if (in.dtype == aoti_torch_dtype_bfloat16()) {
    linear(static_cast<const BFloat16*>(in.data), in.stride, static_cast<const BFloat16*>(by.data),
           static_cast<const BFloat16*>(plus.data), static_cast<BFloat16*>(out.data), in.rows, in.columns, by.rows);
  } else if (in.dtype == aoti_torch_dtype_float32()) {
    linear(static_cast<const float*>(in.data), in.stride, static_cast<const float*>(by.data),
           static_cast<const float*>(plus.data), static_cast<float*>(out.data), in.rows, in.columns, by.rows);
  } else {
    return AOTI_TORCH_FAILURE;
  }
  return AOTI_TORCH_SUCCESS;
}

// The same for operators outside compiled programs: x [rows, in] (rows stride apart), weight [out, in], bias [out] or null and
// y [rows, out], all of bf16 (half) or fp32.
extern "C" void subquad_narrow_linear(
    int32_t half, const void* x, int64_t stride, const void* weight, const void* bias, void* y, int64_t rows, int64_t in,
    int64_t out) {
  if (half)
    linear(static_cast<const BFloat16*>(x), stride, static_cast<const BFloat16*>(weight),
           static_cast<const BFloat16*>(bias), static_cast<BFloat16*>(y), rows, in, out);
  else
    linear(static_cast<const float*>(x), stride, static_cast<const float*>(weight), static_cast<const float*>(bias),
           static_cast<float*>(y), rows, in, out);
}
