// Few rows times a weight matrix: every weight is read once, in one stream per thread, and summed in fp32.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif
constexpr int MOST = REGISTERS / 4;       // rows summed in one pass over a block of weight rows
constexpr int TALL = 2;                   // weight rows in a block that more than TALL rows pass over; it stays in the caches
constexpr int64_t SHARES = 8;             // shares of the weight that a thread takes one after another
constexpr int64_t SERIAL = 32 * 1024;     // weights below which a second thread costs more than it brings

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef float Four __attribute__((vector_size(16)));

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

struct alignas(64) Line {
  char bytes[64];
};

template <typename To, typename From>
inline To read(const From* from) {
  To result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline float sum(Floats values) {
  const float* from = reinterpret_cast<const float*>(&values);
  Four all = read<Four>(from);
#pragma GCC unroll 4
  for (int lane = 4; lane < LANES; lane += 4) all += read<Four>(from + lane);
  return (all[0] + all[2]) + (all[1] + all[3]);
}

// How STEP weights and STEP numbers of a row meet: a row is kept as X, both are read into vectors and added to a sum in fp32.
template <typename T>
struct Form;

// Vectors of two halves: what lies at the even and at the odd places, or first and last, whichever reads fastest.
struct Halves {
  Floats one, two;
};

inline void add(Floats& total, const Halves& weight, const Halves& x) {
  total += weight.one * x.one;
  total += weight.two * x.two;
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

// x [rows, in] (rows stride apart), weight [out, in], bias [out] or null, y [rows, out].
// arranged: x over the first `whole` of its numbers, which fill whole steps.
template <typename T>
struct Product {
  const T* x;
  int64_t stride;
  const T *weight, *bias;
  T* y;
  int64_t rows, in, out, whole;
  const typename Form<T>::X* arranged;

  // y at [row .. row + ROWS, column .. column + COLUMNS].
  // One weight row is a stream that the processor follows by itself; of more, the block behind this one is fetched.
  template <int ROWS, int COLUMNS>
  void block(int64_t row, int64_t column) const {
    constexpr int STEP = Form<T>::STEP, LINES = COLUMNS > 1 ? COLUMNS * STEP * sizeof(T) / 64 : 0;
    Floats total[ROWS][COLUMNS] = {};
    const T* from = weight + column * in;
    const auto* numbers = arranged + row * whole;
    const char* next = reinterpret_cast<const char*>(from + COLUMNS * in);
    for (int64_t i = 0; i < whole; i += STEP, next += LINES * 64) {
#pragma GCC unroll 8
      for (int line = 0; line < LINES; line++) __builtin_prefetch(next + line * 64);
      decltype(Form<T>::read_weight(from)) weights[COLUMNS];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) weights[c] = Form<T>::read_weight(from + c * in + i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        auto step = Form<T>::read_row(numbers + r * whole + i);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) add(total[r][c], weights[c], step);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; c++) {
        float result = sum(total[r][c]);
        for (int64_t i = whole; i < in; i++) result += widen(from[c * in + i]) * widen(x[(row + r) * stride + i]);
        narrow(result + (bias ? widen(bias[column + c]) : 0.0f), y[(row + r) * out + column + c]);
      }
  }

  template <int ROWS, int COLUMNS>
  void blocks(int64_t row, int64_t column) const {
    for (; row + ROWS <= rows; row += ROWS) block<ROWS, COLUMNS>(row, column);
    if constexpr (ROWS > 1)
      if (row < rows) blocks<ROWS / 2, COLUMNS>(row, column);
  }

  void columns(int64_t first, int64_t last) const {
    if (rows > TALL)
      for (; first + TALL <= last; first += TALL) blocks<MOST, TALL>(0, first);
    for (; first < last; first++) blocks<MOST, 1>(0, first);
  }
};

template <typename T>
void linear(const T* x, int64_t stride, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out) {
  typedef typename Form<T>::X X;
  constexpr int64_t STEP = Form<T>::STEP;
  const int64_t whole = in - in % STEP;
  std::unique_ptr<Line[]> lines(new Line[rows * whole * sizeof(X) / sizeof(Line) + 1]);
  X* arranged = reinterpret_cast<X*>(lines.get());
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < whole; i += STEP) Form<T>::arrange(x + row * stride + i, arranged + row * whole + i);
  const Product<T> product{x, stride, weight, bias, y, rows, in, out, whole, arranged};
  std::atomic<int64_t> next{0};
#pragma omp parallel if (in * out > SERIAL)
  {
    int64_t share = std::max<int64_t>(out / (SHARES * omp_get_num_threads()) / TALL, 1) * TALL;
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
