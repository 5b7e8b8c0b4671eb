// Softmax attention of few query rows a KV head over shared keys: rows lie in vector lanes, keys and values are read as stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include <omp.h>

#include "panels.h"

namespace {

constexpr int64_t SHARES = 4;    // tasks for each thread
constexpr int64_t LEAST = 128;   // keys of a task at least

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
