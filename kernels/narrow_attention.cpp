// Softmax attention of a few tokens a row over the keys of their row and those that rows share, as compiled programs call it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "softmax_parts.h"

namespace {

enum Empty { NAN_ROWS, ZERO_ROWS, MEAN_ROWS };

template <typename T>
struct Tensor4 {
  T* data;
  int64_t sizes[4], strides[4];
};

inline void narrow(float value, float& to) { to = value; }

inline void narrow(float value, BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to.bits = value == value ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

template <typename T>
bool read(AtenTensorHandle tensor, Tensor4<T>& result) {
  int64_t dim, *sizes, *strides;
  void* data;
  if (aoti_torch_get_dim(tensor, &dim) || dim != 4 || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &data))
    return false;
  result.data = static_cast<T*>(data);
  std::copy(sizes, sizes + 4, result.sizes);
  std::copy(strides, strides + 4, result.strides);
  return sizes[3] == 1 || strides[3] == 1;
}

// A vector of fp32 or bf16 as fp32.
bool numbers(AtenTensorHandle tensor, std::vector<float>& result) {
  int64_t size, *strides;
  int32_t dtype;
  void* data;
  if (aoti_torch_get_numel(tensor, &size) || aoti_torch_get_strides(tensor, &strides) ||
      aoti_torch_get_dtype(tensor, &dtype) || aoti_torch_get_data_ptr(tensor, &data))
    return false;
  const bool half = dtype == aoti_torch_dtype_bfloat16();
  for (int64_t n = 0; n < size; n++)
    result.push_back(half ? widen(static_cast<BFloat16*>(data)[n * *strides]) : static_cast<float*>(data)[n * *strides]);
  return half || dtype == aoti_torch_dtype_float32();
}

// The mean of a row's values, what a token without keys gives under masks of finite numbers.
template <typename T>
void mean(const Tensor4<T>& v, int64_t row, int64_t head, float* to) {
  for (int64_t d = 0; d < v.sizes[3]; d++) {
    double sum = 0;
    for (int64_t key = 0; key < v.sizes[1]; key++)
      sum += widen(v.data[row * v.strides[0] + key * v.strides[1] + head * v.strides[2] + d]);
    to[d] = float(sum / v.sizes[1]);
  }
}

// What rows share: keys [N, Hkv, K], values [N, Hkv, V] and the nodes of a tree, int64 [n, 5]: slot, length, column, first row,
// rows; shown: bytes [B, w, N], or null.
struct Shared {
  AtenTensorHandle *k, *v, *nodes, *shown;
};

template <typename T>
bool read_slots(AtenTensorHandle tensor, const T*& data, int64_t& slots, int64_t& slot, int64_t& head) {
  int64_t dim, *sizes, *strides;
  void* at;
  if (aoti_torch_get_dim(tensor, &dim) || dim != 3 || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &at))
    return false;
  data = static_cast<const T*>(at), slots = sizes[0], slot = strides[0], head = strides[1];
  return sizes[2] == 1 || strides[2] == 1;
}

// Bytes of an integer or boolean tensor, which must be contiguous.
const void* whole(AtenTensorHandle tensor) {
  bool contiguous;
  void* data;
  if (aoti_torch_is_contiguous(tensor, &contiguous) || !contiguous || aoti_torch_get_data_ptr(tensor, &data)) return nullptr;
  return data;
}

// The nodes as segments, each read by all of its rows; `masks` holds their parts of `shown`.
template <typename T>
bool add_nodes(const Shared& shared, int64_t width, std::vector<Segment>& segments, std::vector<std::vector<uint8_t>>& masks) {
  const T *k, *v;
  int64_t slots, k_slot, k_head, v_slot, v_head, count;
  if (!read_slots(*shared.k, k, slots, k_slot, k_head) || !read_slots(*shared.v, v, slots, v_slot, v_head) ||
      aoti_torch_get_numel(*shared.nodes, &count))
    return false;
  const int64_t* node = static_cast<const int64_t*>(whole(*shared.nodes));
  const uint8_t* shown = shared.shown ? static_cast<const uint8_t*>(whole(*shared.shown)) : nullptr;
  if (count && (!node || (shared.shown && !shown))) return false;
  for (int64_t n = 0; n < count; n += 5, node += 5) {
    const int64_t slot = node[0], length = node[1], first = node[3], rows = node[4];
    int64_t visible = 0;
    if (shown) {
      std::vector<uint8_t> mask;
      for (int64_t query = first * width; query < (first + rows) * width; query++)
        mask.insert(mask.end(), shown + query * slots + slot, shown + query * slots + slot + length);
      if (std::memchr(mask.data(), 0, mask.size())) {
        masks.push_back(std::move(mask));
        visible = reinterpret_cast<int64_t>(masks.back().data());
      }
    }
    segments.push_back({
        reinterpret_cast<int64_t>(k + slot * k_slot), reinterpret_cast<int64_t>(v + slot * v_slot), 0, k_slot, k_head, 0,
        v_slot, v_head, length, first, rows, 1, 0, visible});
  }
  return true;
}

template <typename T>
bool attend(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle seen, AtenTensorHandle* sinks,
            float scale, float softcap, Empty empty, const Shared& shared, int32_t dtype, AtenTensorHandle* result) {
  Tensor4<T> in, keys, values, out;
  int64_t *sizes, *strides;
  void* mask;
  std::vector<float> sink;
  std::vector<Segment> segments;
  std::vector<std::vector<uint8_t>> masks;
  if (!read(q, in) || !read(k, keys) || !read(v, values) || aoti_torch_get_sizes(seen, &sizes) ||
      aoti_torch_get_strides(seen, &strides) || aoti_torch_get_data_ptr(seen, &mask) || (sinks && !numbers(*sinks, sink)))
    return false;
  const int64_t batch = in.sizes[0], width = in.sizes[1], heads = in.sizes[2], dim = in.sizes[3], slots = keys.sizes[1];
  const int64_t kv_heads = keys.sizes[2], depth = values.sizes[3], rows = batch * width * heads;
  if (sizes[0] != batch || sizes[1] != width || sizes[2] != slots || (slots > 1 && strides[2] != 1) ||
      (width > 1 && strides[1] != slots) || (batch > 1 && strides[0] != width * slots))
    return false;
  const int64_t shape[4] = {batch, width, heads, depth}, steps[4] = {width * heads * depth, heads * depth, depth, 1};
  if (aoti_torch_empty_strided(4, shape, steps, dtype, aoti_torch_device_type_cpu(), 0, result) || !read(*result, out))
    return false;
  static thread_local std::vector<float> memory;
  memory.assign(rows * (dim + depth + 1), 0.0f);
  float *queries = memory.data(), *o = queries + rows * dim, *lse = o + rows * depth;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t head = row % heads, token = row / heads % width, at = row / heads / width;
    const T* from = in.data + at * in.strides[0] + token * in.strides[1] + head * in.strides[2];
    for (int64_t i = 0; i < dim; i++) queries[row * dim + i] = widen(from[i]);
    lse[row] = sinks ? sink[head] : -INFINITY;
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(mask);
  const bool hides = std::memchr(bytes, 0, batch * width * slots);
  if (shared.nodes && !add_nodes<T>(shared, width, segments, masks)) return false;
  segments.push_back({
      reinterpret_cast<int64_t>(keys.data), reinterpret_cast<int64_t>(values.data), keys.strides[0], keys.strides[1],
      keys.strides[2], values.strides[0], values.strides[1], values.strides[2], slots, 0, batch, 0, 0,
      hides ? reinterpret_cast<int64_t>(bytes) : 0});
  Call<T> call{queries, o, lse, segments.data(), batch, width, heads, kv_heads, dim, depth, scale, softcap, {}};
  run(call, segments.size());
  for (int64_t row = 0; row < rows; row++) {
    float* from = o + row * depth;
    if (lse[row] == -INFINITY && empty == MEAN_ROWS)
      mean(values, row / heads / width, row % heads / (heads / kv_heads), from);
    for (int64_t d = 0; d < depth; d++)
      narrow(lse[row] == -INFINITY && empty == NAN_ROWS ? NAN : from[d], out.data[row * depth + d]);
  }
  return true;
}

}  // namespace

// The C form of subquad::narrow_attention that ahead-of-time compiled programs call.
extern "C" AOTITorchError aoti_torch_cpu_narrow_attention(
    AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle seen, AtenTensorHandle* sinks,
    double scale, double softcap, int64_t empty, AtenTensorHandle* shared_k, AtenTensorHandle* shared_v,
    AtenTensorHandle* nodes, AtenTensorHandle* shown, AtenTensorHandle* result) {
  int32_t dtype, other;
  if (aoti_torch_get_dtype(q, &dtype)) return AOTI_TORCH_FAILURE;
  for (AtenTensorHandle stored : {k, v, shared_k ? *shared_k : k, shared_v ? *shared_v : v})
    if (aoti_torch_get_dtype(stored, &other) || other != dtype) return AOTI_TORCH_FAILURE;
  const Shared shared{shared_k, shared_v, nodes, shown};
  if (nodes && (!shared_k || !shared_v)) return AOTI_TORCH_FAILURE;
  const bool half = dtype == aoti_torch_dtype_bfloat16();
  if (!half && dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
  const float factor = float(scale), cap = float(softcap);
  const bool done = half ? attend<BFloat16>(q, k, v, seen, sinks, factor, cap, Empty(empty), shared, dtype, result)
                         : attend<float>(q, k, v, seen, sinks, factor, cap, Empty(empty), shared, dtype, result);
  return done ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
