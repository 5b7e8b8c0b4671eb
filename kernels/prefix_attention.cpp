// Softmax attention of few query rows a KV head over shared keys: rows lie in vector lanes, keys and values are read as stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int WIDEST = 3;        // vectors of query rows at once: eight keys' sums of three fill the registers (six of four spill)
constexpr int64_t BLOCK = 64;    // keys whose scores are held at once
constexpr int64_t SHARES = 4;    // tasks for each thread
constexpr int64_t LEAST = 128;   // keys of a task at least

typedef int32_t Words __attribute__((vector_size(LANES * 4)));

inline Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x <= 0, to two units in the last place: 2^n times a polynomial on |f| <= ln 2 / 2.
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
  return x > -87.0f ? p * power : Floats{};
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

struct Node {
  int64_t slot, length, column, first, rows;
};

template <typename T>
struct Call {
  const float* q;   // [B, w, H, K], contiguous
  const T *k, *v;   // [slots, Hkv, K], [slots, Hkv, V]
  float *o, *lse;   // [B, w, H, V], [B, w, H], contiguous: the states so far, which become those with the nodes
  int64_t width, heads, kv_heads, dim, out, k_slot, k_head, v_slot, v_head;
  float scale;

  int64_t group() const { return heads / kv_heads; }

  // Row r of a node's queries on a KV head, in q, o and lse: its number among [B, w, H].
  int64_t place(const Node& node, int64_t head, int64_t r) const {
    return (node.first * width + r / group()) * heads + head * group() + r % group();
  }
};

// Some keys of a node on one KV head.
template <typename T>
struct Task {
  Node node;
  int64_t head, start, stop, rows, vectors;
  std::unique_ptr<float[]> memory;
  std::vector<Panel> panels;

  void run(const Call<T>& call) {
    const int64_t count = (vectors + WIDEST - 1) / WIDEST, size = call.dim + call.out + 2;
    memory.reset(new float[vectors * LANES * size + BLOCK * (WIDEST * LANES + call.dim + call.out)]);
    float* next = memory.get();
    for (int64_t p = 0; p < count; p++) {
      Panel panel;
      panel.vectors = vectors * (p + 1) / count - vectors * p / count;
      panel.width = panel.vectors * LANES;
      panel.queries = next, next += call.dim * panel.width;
      panel.outputs = next, next += call.out * panel.width;
      panel.top = next, next += panel.width;
      panel.total = next, next += panel.width;
      panels.push_back(panel);
    }
    int64_t row = 0;
    for (Panel& panel : panels) {
      std::fill(panel.queries, panel.total + panel.width, 0.0f);
      std::fill(panel.top, panel.top + panel.width, -INFINITY);
      for (int64_t lane = 0; lane < panel.width && row < rows; lane++, row++) {
        const float* from = call.q + call.place(node, head, row) * call.dim;
        for (int64_t i = 0; i < call.dim; i++) panel.queries[i * panel.width + lane] = from[i] * call.scale;
      }
    }
    float *scores = next, *wide = next + BLOCK * WIDEST * LANES;
    const T *k = call.k + head * call.k_head, *v = call.v + head * call.v_head;
    for (int64_t at = start; at < stop; at += BLOCK) {
      const int64_t keys = std::min(BLOCK, stop - at);
      const T *keys_at = k + at * call.k_slot, *values_at = v + at * call.v_slot;
      const float *ready_k, *ready_v;
      int64_t k_slot = call.k_slot, v_slot = call.v_slot;
      if constexpr (sizeof(T) == sizeof(float)) {
        ready_k = keys_at, ready_v = values_at;
      } else {
        float *to_k = wide, *to_v = wide + BLOCK * call.dim;
        for (int64_t key = 0; key < keys; key++) {
          for (int64_t i = 0; i < call.dim; i++) to_k[key * call.dim + i] = widen(keys_at[key * k_slot + i]);
          for (int64_t i = 0; i < call.out; i++) to_v[key * call.out + i] = widen(values_at[key * v_slot + i]);
        }
        ready_k = to_k, ready_v = to_v, k_slot = call.dim, v_slot = call.out;
      }
      for (Panel& panel : panels) panel.add(ready_k, k_slot, ready_v, v_slot, keys, call.dim, call.out, scores);
    }
  }

  // Merge into the states; every row of a node is one lane of one panel.
  void merge(const Call<T>& call) const {
    int64_t row = 0;
    for (const Panel& panel : panels)
      for (int64_t lane = 0; lane < panel.width && row < rows; lane++, row++) {
        const int64_t place = call.place(node, head, row);
        const float other = panel.top[lane] + std::log(panel.total[lane]), known = call.lse[place];
        const float high = std::max(other, known), mine = std::exp(known - high), theirs = std::exp(other - high);
        const float sum = mine + theirs, keep = mine / sum, take = theirs / (sum * panel.total[lane]);
        float* o = call.o + place * call.out;
        for (int64_t d = 0; d < call.out; d++) o[d] = o[d] * keep + panel.outputs[d * panel.width + lane] * take;
        call.lse[place] = high + std::log(sum);
      }
  }
};

template <typename T>
void run(const Call<T>& call, const Node* nodes, int64_t count) {
  int64_t total = 0;
  for (int64_t n = 0; n < count; n++) total += nodes[n].length * call.kv_heads;
  const int64_t threads = omp_get_max_threads(), wanted = total / (threads > 1 ? SHARES * threads : 1) + 1;
  const int64_t chunk = std::max(LEAST, (wanted + BLOCK - 1) / BLOCK * BLOCK);
  std::vector<Task<T>> tasks;
  for (int64_t n = 0; n < count; n++)
    for (int64_t head = 0; head < call.kv_heads; head++)
      for (int64_t start = 0; start < nodes[n].length; start += chunk) {
        Task<T> task;
        task.node = nodes[n], task.head = head;
        task.start = nodes[n].slot + start, task.stop = nodes[n].slot + std::min(start + chunk, nodes[n].length);
        task.rows = nodes[n].rows * call.width * call.group();
        task.vectors = (task.rows + LANES - 1) / LANES;
        tasks.push_back(std::move(task));
      }
  const int64_t size = tasks.size();
#pragma omp parallel for schedule(dynamic, 1) if (threads > 1)
  for (int64_t n = 0; n < size; n++) tasks[n].run(call);
#pragma omp parallel for schedule(static, 1) if (threads > 1)
  for (int64_t head = 0; head < call.kv_heads; head++)
    for (const Task<T>& task : tasks)
      if (task.head == head) task.merge(call);
}

}  // namespace

// sizes: w, H, Hkv, K, V, and the strides of k and v: slot, head, slot, head.  nodes [count, 5].
extern "C" void subquad_prefix_attention(
    int32_t half, const float* q, const void* k, const void* v, float* o, float* lse, const int64_t* sizes, float scale,
    const int64_t* nodes, int64_t count) {
  const Node* table = reinterpret_cast<const Node*>(nodes);
  if (half)
    run(Call<BFloat16>{q, static_cast<const BFloat16*>(k), static_cast<const BFloat16*>(v), o, lse, sizes[0], sizes[1],
                       sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], scale},
        table, count);
  else
    run(Call<float>{q, static_cast<const float*>(k), static_cast<const float*>(v), o, lse, sizes[0], sizes[1], sizes[2],
                    sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], scale},
        table, count);
}
