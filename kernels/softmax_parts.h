// Softmax attention of few query rows a KV head over segments of stored keys, of which many rows may read the same ones.
//
// Where many query rows meet the same keys they lie in vector lanes; where few do, the numbers of a head lie there.  Keys and
// values are read as they lie in memory, once for all rows that read them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include <omp.h>

#include "panels.h"

namespace {

constexpr int64_t SHARES = 4;     // tasks for each thread
constexpr int64_t PACKED = 1 << 16;  // numbers of keys and values that a task packs at once, so that they stay in the second cache
constexpr int64_t LEAST = 128;    // keys of a task at least
constexpr int64_t FEW = LANES / 2;  // query rows up to which they do not lie in lanes
constexpr int ROWS = 4;           // query rows at once, where they do not

inline int64_t filled(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline float largest_of(Floats value) {
  float parts[LANES], most;
  store(parts, value);
  most = parts[0];
  for (int i = 1; i < LANES; i++) most = parts[i] > most ? parts[i] : most;
  return most;
}

// A few query rows: queries [rows, filled K], outputs [rows, filled V], largest scores and sums as in a panel.
struct Few {
  int64_t first, rows;
  float *queries, *outputs, *top, *total;

  template <int R, typename T>
  void add(const T* k, int64_t k_slot, const T* v, int64_t v_slot, int64_t keys, int64_t dim, int64_t out, float* scores,
           float cap, const Seen* seen) {
    const int64_t q_row = filled(dim), o_row = filled(out);
    for (int64_t key = 0; key < keys; key += LANES) {
      const T* at[LANES];
      for (int n = 0; n < LANES; n++) at[n] = k + std::min(key + n, keys - 1) * k_slot;
      for (int r = 0; r < R; r++) {
        Floats found[LANES] = {};
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) {
          const Floats query = load(queries + r * q_row + i);
#pragma GCC unroll 16
          for (int n = 0; n < LANES; n++) found[n] += query * widened(at[n] + i);
        }
        if (i < dim) {
          const Floats query = load(queries + r * q_row + i);
          for (int n = 0; n < LANES; n++) found[n] += query * some(at[n] + i, dim - i);
        }
        store(scores + r * BLOCK + key, sums(found));
      }
    }
    for (int r = 0; r < R; r++) {
      float* row = scores + r * BLOCK;
      if (cap > 0)
        for (int64_t n = 0; n < keys; n += LANES) store(row + n, tangent(load(row + n)) * cap);
      std::fill(row + keys, row + filled(keys), -INFINITY);
      if (seen)
        for (int64_t key = 0; key < keys; key++)
          if (seen->hides(first + r, key)) row[key] = -INFINITY;
      Floats most = load(row);
      for (int64_t n = LANES; n < keys; n += LANES) most = larger(most, load(row + n));
      const float before = top[r], high = std::max(before, largest_of(most)), safe = high > -INFINITY ? high : 0.0f;
      Floats weights = {};
      for (int64_t n = 0; n < keys; n += LANES) {
        const Floats weight = exponential(load(row + n) - safe);
        store(row + n, weight);
        weights += weight;
      }
      const float shrink = std::exp(before - safe);
      top[r] = high;
      total[r] = total[r] * shrink + sum(weights);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < o_row; d += LANES) {
          float* place = outputs + r * o_row + d;
          store(place, load(place) * shrink);
        }
    }
    int64_t d = 0;
    for (; d + 4 * LANES <= out; d += 4 * LANES) values<R, 4>(v + d, v_slot, keys, scores, outputs + d, o_row, LANES);
    for (; d < out; d += LANES) values<R, 1>(v + d, v_slot, keys, scores, outputs + d, o_row, std::min<int64_t>(LANES, out - d));
  }

  template <int R, int VECTORS, typename T>
  static void values(const T* v, int64_t slot, int64_t keys, const float* weights, float* o, int64_t o_row, int64_t last) {
    Floats sums[R][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++) sums[r][n] = load(o + r * o_row + n * LANES);
    for (int64_t key = 0; key < keys; key++) {
      Floats x[VECTORS];
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++)
        x[n] = last == LANES ? widened(v + key * slot + n * LANES) : some(v + key * slot + n * LANES, last);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; n++) sums[r][n] += weights[r * BLOCK + key] * x[n];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++) store(o + r * o_row + n * LANES, sums[r][n]);
  }

  template <typename T>
  void add(const T* k, int64_t k_slot, const T* v, int64_t v_slot, int64_t keys, int64_t dim, int64_t out, float* scores,
           float cap, const Seen* seen) {
    switch (rows) {
      case 1: return add<1>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
      case 2: return add<2>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
      case 3: return add<3>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
      case 4: return add<4>(k, k_slot, v, v_slot, keys, dim, out, scores, cap, seen);
    }
  }
};

// What the caller says of a segment.  reads: 0 where query row first + n reads stored row n, 1 where all of its `rows` query
// rows read stored row 0, else the stored row of each, -1 for none.  lengths: live slots of each of these query rows, or 0.
// visible: bytes [rows, w, slots] that say which slots a query sees, or 0.
struct Segment {
  int64_t k, v, k_row, k_slot, k_head, v_row, v_slot, v_head, slots, first, rows, reads, lengths, visible;
};

// Stored keys of all KV heads, and the query rows of the batch that read them.
struct Part {
  int64_t segment, k, v, length;  // k, v: first element of its stored row
  std::vector<int64_t> members;
};

template <typename T>
struct Call {
  const float* q;   // [B, w, H, K], contiguous
  float *o, *lse;   // [B, w, H, V], [B, w, H], contiguous: the states so far, which become those with the segments
  const Segment* segments;
  int64_t batch, width, heads, kv_heads, dim, out;
  float scale, cap;
  std::vector<Part> parts;

  int64_t group() const { return heads / kv_heads; }

  // Query row r of a part on a KV head, in q, o and lse: its number among [B, w, H].
  int64_t place(const Part& part, int64_t head, int64_t r) const {
    const int64_t row = part.members[r / (width * group())], rest = r % (width * group());
    return (row * width + rest / group()) * heads + head * group() + rest % group();
  }

  // Whether the heads of a slot lie side by side in the segments, rather than the slots of a head.
  bool beside(int64_t count) const {
    return std::all_of(segments, segments + count, [](const Segment& s) { return s.k_head <= s.k_slot; });
  }

  void add_parts(int64_t number) {
    const Segment& s = segments[number];
    const auto* reads = s.reads > 1 ? reinterpret_cast<const int64_t*>(s.reads) : nullptr;
    const auto* lengths = reinterpret_cast<const int64_t*>(s.lengths);
    std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> readers;
    for (int64_t n = 0; n < s.rows; n++) {
      const int64_t stored = reads ? reads[n] : s.reads == 1 ? 0 : n;
      const int64_t length = lengths ? std::min(lengths[n], s.slots) : s.slots;
      if (stored >= 0 && length > 0) readers[{stored, length}].push_back(s.first + n);
    }
    for (auto& [key, members] : readers)
      parts.push_back({number, key.first * s.k_row, key.first * s.v_row, key.second, std::move(members)});
  }
};

// Some keys of a part on KV heads first .. first + heads - 1: more than one where their numbers lie side by side, so that
// memory is read in order.
template <typename T>
struct Task {
  const Part* part;
  int64_t first, heads, start, stop, rows;
  float* memory;
  std::vector<Panel> panels;  // those of the first head, of the next, ..
  std::vector<Few> fews;

  bool few() const { return rows <= FEW; }

  int64_t size(const Call<T>& call) const {
    return heads * (few() ? rows * (filled(call.dim) + filled(call.out) + 2 * LANES)
                          : filled(rows) * (call.dim + call.out + 2));
  }

  void arrange(const Call<T>& call) {
    float* next = memory;
    for (int64_t head = first; head < first + heads; head++) next = arrange(call, head, next);
  }

  float* arrange(const Call<T>& call, int64_t head, float* next) {
    auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
    if (few()) {
      for (int64_t row = 0; row < rows; row += ROWS) {
        Few some{row, std::min<int64_t>(ROWS, rows - row)};
        some.queries = take(some.rows * filled(call.dim)), some.outputs = take(some.rows * filled(call.out));
        some.top = take(some.rows), some.total = take(some.rows);
        std::fill(some.queries, some.total + some.rows, 0.0f);
        std::fill(some.top, some.top + some.rows, -INFINITY);
        for (int64_t r = 0; r < some.rows; r++) query(call, head, row + r, some.queries + r * filled(call.dim), 1);
        fews.push_back(some);
      }
      return next;
    }
    const int64_t vectors = filled(rows) / LANES, count = (vectors + WIDEST - 1) / WIDEST;
    int64_t row = 0;
    for (int64_t p = 0; p < count; p++) {
      Panel panel;
      panel.vectors = vectors * (p + 1) / count - vectors * p / count;
      panel.width = panel.vectors * LANES;
      panel.first = row, panel.rows = std::min(panel.width, rows - row);
      panel.queries = take(call.dim * panel.width), panel.outputs = take(call.out * panel.width);
      panel.top = take(panel.width), panel.total = take(panel.width);
      std::fill(panel.queries, panel.total + panel.width, 0.0f);
      std::fill(panel.top, panel.top + panel.width, -INFINITY);
      for (int64_t lane = 0; lane < panel.rows; lane++, row++) query(call, head, row, panel.queries + lane, panel.width);
      panels.push_back(panel);
    }
    return next;
  }

  void query(const Call<T>& call, int64_t head, int64_t row, float* to, int64_t step) const {
    const float* from = call.q + call.place(*part, head, row) * call.dim;
    const float factor = call.cap > 0 ? call.scale / call.cap : call.scale;
    for (int64_t i = 0; i < call.dim; i++) to[i * step] = from[i] * factor;
  }

  void run(const Call<T>& call, float* scratch) {
    arrange(call);
    const Segment& s = call.segments[part->segment];
    float *scores = scratch, *wide = scratch + BLOCK * WIDEST * LANES;
    const T* k = reinterpret_cast<const T*>(s.k) + part->k + first * s.k_head;
    const T* v = reinterpret_cast<const T*>(s.v) + part->v + first * s.v_head;
    std::vector<const uint8_t*> shown;
    if (s.visible)
      for (int64_t row = 0; row < rows; row++) {
        const int64_t query = call.place(*part, 0, row) / call.heads - s.first * call.width;
        shown.push_back(reinterpret_cast<const uint8_t*>(s.visible) + query * s.slots);
      }
    for (int64_t at = start; at < stop; at += BLOCK) {
      const int64_t keys = std::min(BLOCK, stop - at);
      if (s.visible && !holds(shown, 1, at, keys)) continue;
      const Seen seen{shown.data(), at}, *mask = s.visible && holds(shown, 0, at, keys) ? &seen : nullptr;
      const T *keys_at = k + at * s.k_slot, *values_at = v + at * s.v_slot;
      if (few()) {
        for (size_t n = 0; n < fews.size(); n++) {
          const int64_t head = n * heads / fews.size();
          fews[n].add(keys_at + head * s.k_head, s.k_slot, values_at + head * s.v_head, s.v_slot, keys, call.dim, call.out,
                      scores, call.cap, mask);
        }
        continue;
      }
      const float *ready_k = wide, *ready_v = wide + heads * BLOCK * call.dim;
      if (sizeof(T) == sizeof(float) && heads == 1 && s.k_slot == call.dim && s.v_slot == call.out) {
        ready_k = reinterpret_cast<const float*>(keys_at), ready_v = reinterpret_cast<const float*>(values_at);
      } else {
        pack(keys_at, s.k_slot, s.k_head, keys, call.dim, wide);
        pack(values_at, s.v_slot, s.v_head, keys, call.out, wide + heads * BLOCK * call.dim);
      }
      for (size_t n = 0; n < panels.size(); n++) {
        const int64_t head = n * heads / panels.size();
        panels[n].add(ready_k + head * BLOCK * call.dim, call.dim, ready_v + head * BLOCK * call.out, call.out, keys, call.dim,
                      call.out, scores, call.cap, mask);
      }
    }
  }

  // The numbers of `keys` slots, head by head, in fp32.
  void pack(const T* from, int64_t slot, int64_t step, int64_t keys, int64_t width, float* to) const {
    for (int64_t key = 0; key < keys; key++)
      for (int64_t head = 0; head < heads; head++) {
        const T* here = from + key * slot + head * step;
        float* there = to + (head * BLOCK + key) * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(there + i, widened(here + i));
        for (; i < width; i++) there[i] = widen(here[i]);
      }
  }

  static bool holds(const std::vector<const uint8_t*>& shown, int what, int64_t start, int64_t keys) {
    for (const uint8_t* row : shown)
      if (std::memchr(row + start, what, keys)) return true;
    return false;
  }

  // Merge the state of query row r on a head into that at `place`.
  void merge(const Call<T>& call, int64_t head, int64_t r, int64_t place) const {
    float top, total;
    const float* outputs;
    int64_t step = 1;
    if (few()) {
      const Few& some = fews[(head - first) * (fews.size() / heads) + r / ROWS];
      const int64_t lane = r % ROWS;
      top = some.top[lane], total = some.total[lane], outputs = some.outputs + lane * filled(call.out);
    } else {
      const Panel* panel = &panels[(head - first) * (panels.size() / heads)];
      while (r >= panel->first + panel->rows) panel++;
      const int64_t lane = r - panel->first;
      top = panel->top[lane], total = panel->total[lane], outputs = panel->outputs + lane, step = panel->width;
    }
    if (total == 0) return;
    const double other = double(top) + std::log(double(total)), known = call.lse[place];
    const double high = std::max(other, known), mine = std::exp(known - high), theirs = std::exp(other - high);
    const double sum = mine + theirs;
    const float keep = float(mine / sum), take = float(theirs / (sum * total));
    float* o = call.o + place * call.out;
    if (step == 1)
      for (int64_t d = 0; d < call.out; d++) o[d] = o[d] * keep + outputs[d] * take;
    else
      for (int64_t d = 0; d < call.out; d++) o[d] = o[d] * keep + outputs[d * step] * take;
    call.lse[place] = float(high + std::log(sum));
  }
};

// The tasks of one query row: the first of those over some slots, and the row's place among the part's members.
struct Reading {
  int64_t task, member;
};

template <typename T>
void run(Call<T>& call, int64_t count) {
  for (int64_t s = 0; s < count; s++) call.add_parts(s);
  int64_t total = 0;
  for (const Part& part : call.parts) total += part.length * call.kv_heads;
  const int64_t threads = omp_get_max_threads(), least = threads > 1 ? SHARES * threads : 1, wanted = total / least + 1;
  int64_t at_once = call.beside(count) ? std::clamp<int64_t>(PACKED / (BLOCK * (call.dim + call.out)), 1, call.kv_heads) : 1;
  while (threads > 1 && at_once > 1 && total < least * LEAST * at_once) at_once /= 2;
  const int64_t chunk = std::max(LEAST, (wanted / at_once + BLOCK - 1) / BLOCK * BLOCK);
  std::vector<Task<T>> tasks;
  std::vector<std::vector<Reading>> readings(call.batch);
  int64_t space = 0;
  for (const Part& part : call.parts)
    for (int64_t start = 0; start < part.length; start += chunk) {
      const int64_t members = part.members.size();
      for (int64_t m = 0; m < members; m++) readings[part.members[m]].push_back({int64_t(tasks.size()), m});
      for (int64_t head = 0; head < call.kv_heads; head += at_once) {
        const int64_t stop = std::min(start + chunk, part.length), rows = members * call.width * call.group();
        Task<T> task{&part, head, std::min(at_once, call.kv_heads - head), start, stop, rows};
        space += task.size(call);
        tasks.push_back(std::move(task));
      }
    }
  const int64_t scratch = BLOCK * (WIDEST * LANES + at_once * (call.dim + call.out)), size = tasks.size();
  static thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < space + threads * scratch) memory.resize(space + threads * scratch);
  float* next = memory.data() + threads * scratch;
  for (Task<T>& task : tasks) task.memory = std::exchange(next, next + task.size(call));
  float* spare = memory.data();
#pragma omp parallel if (threads > 1 && size > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < size; n++) tasks[n].run(call, spare + omp_get_thread_num() * scratch);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < call.batch * call.kv_heads; n++) {
      const int64_t row = n / call.kv_heads, head = n % call.kv_heads, each = call.width * call.group();
      for (const Reading& reading : readings[row])
        for (int64_t r = 0; r < each; r++) {
          const Task<T>& task = tasks[reading.task + head / at_once];
          task.merge(call, head, reading.member * each + r, call.place(*task.part, head, reading.member * each + r));
        }
    }
  }
}

}  // namespace
