// Few rows times a weight matrix: every weight is read once, in one stream per thread, and summed in fp32.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif
constexpr int MOST = 4;                   // rows summed in one pass over a weight row
constexpr int64_t AHEAD = 768;            // bytes between the weights in use and those fetched
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

template <typename To, typename From>
inline To read(const From* from) {
  To result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

// 2 * LANES weights as two vectors: the first and the second half of them.
inline void load(const float* from, Floats& first, Floats& second) {
  first = read<Floats>(from);
  second = read<Floats>(from + LANES);
}

// 2 * LANES weights as two vectors: those at even and those at odd places, since a shift and a mask widen them so.
inline void load(const BFloat16* from, Floats& even, Floats& odd) {
  Words both = read<Words>(from), low = both << 16, high = both & 0xffff0000u;
  even = read<Floats>(&low);
  odd = read<Floats>(&high);
}

// A row x [in] in fp32, in the order in which `load` gives weights.
inline void arrange(const float* x, float* wide, int64_t in) { std::memcpy(wide, x, in * sizeof(float)); }

inline void arrange(const BFloat16* x, float* wide, int64_t in) {
  int64_t i = 0;
  for (; i + 2 * LANES <= in; i += 2 * LANES) {
    Floats even, odd;
    load(x + i, even, odd);
    std::memcpy(wide + i, &even, sizeof even);
    std::memcpy(wide + i + LANES, &odd, sizeof odd);
  }
  for (; i < in; i++) wide[i] = widen(x[i]);
}

inline float sum(Floats values) {
  const float* from = reinterpret_cast<const float*>(&values);
  Four all = read<Four>(from);
#pragma GCC unroll 4
  for (int lane = 4; lane < LANES; lane += 4) all += read<Four>(from + lane);
  return (all[0] + all[2]) + (all[1] + all[3]);
}

// Sums of ROWS arranged rows x [ROWS, in] with one weight row [in].
template <int ROWS, typename T>
inline void dot(const T* weight, const float* x, int64_t in, float* result) {
  constexpr int PAIRS = 4 * ROWS <= REGISTERS / 2 ? 2 : 1, BLOCK = 2 * LANES, STRIDE = PAIRS * BLOCK;
  Floats partial[ROWS][2 * PAIRS] = {};
  int64_t i = 0;
  auto add = [&](int64_t at, int pair) {
    Floats first, second;
    load(weight + at, first, second);
    for (int row = 0; row < ROWS; row++) {
      partial[row][2 * pair] += first * read<Floats>(x + row * in + at);
      partial[row][2 * pair + 1] += second * read<Floats>(x + row * in + at + LANES);
    }
  };
  for (; i + STRIDE <= in; i += STRIDE) {
    // A weight is used once a token: fetched so that it does not push what is used again out of the caches.
    __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + AHEAD, 0, 0);
    if (STRIDE * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + AHEAD + 64, 0, 0);
    for (int pair = 0; pair < PAIRS; pair++) add(i + pair * BLOCK, pair);
  }
  for (; i + BLOCK <= in; i += BLOCK) add(i, 0);
#pragma GCC unroll 4
  for (int row = 0; row < ROWS; row++) {
    Floats all = partial[row][0] + partial[row][1];
    if (PAIRS == 2) all += partial[row][2 * PAIRS - 2] + partial[row][2 * PAIRS - 1];
    result[row] = sum(all);
  }
  for (; i < in; i++)
    for (int row = 0; row < ROWS; row++) result[row] += widen(weight[i]) * x[row * in + i];
}

template <typename T>
void dots(const T* weight, const float* x, int64_t rows, int64_t in, float* result) {
  int64_t row = 0;
  for (; row + MOST <= rows; row += MOST) dot<MOST>(weight, x + row * in, in, result + row);
  switch (rows - row) {
    case 3: return dot<3>(weight, x + row * in, in, result + row);
    case 2: return dot<2>(weight, x + row * in, in, result + row);
    case 1: return dot<1>(weight, x + row * in, in, result + row);
  }
}

// x [rows, in] (rows stride apart), weight [out, in], bias [out] or null, y [rows, out].
template <typename T>
void linear(const T* x, int64_t stride, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out) {
  std::unique_ptr<float[]> wide(new float[rows * in]);
  for (int64_t row = 0; row < rows; row++) arrange(x + row * stride, wide.get() + row * in, in);
  const float* shared = wide.get();
  std::atomic<int64_t> next{0};
#pragma omp parallel if (in * out > SERIAL)
  {
    int64_t share = std::max<int64_t>(out / (SHARES * omp_get_num_threads()), 1);
    std::unique_ptr<float[]> sums(new float[rows]);
    for (int64_t first = next.fetch_add(share); first < out; first = next.fetch_add(share)) {
      for (int64_t o = first; o < std::min(first + share, out); o++) {
        dots(weight + o * in, shared, rows, in, sums.get());
        for (int64_t row = 0; row < rows; row++)
          narrow(sums[row] + (bias ? widen(bias[o]) : 0.0f), y[row * out + o]);
      }
    }
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
