// The places of the largest numbers of rows, for vocabularies of tens of thousands: the numbers are read once.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>


namespace {

constexpr int64_t BLOCK = 256;        // numbers that are passed over together when their largest is too small
constexpr int64_t SERIAL = 128 * 1024;  // numbers below which a second thread costs more than it brings

// Integers in the order of the numbers with these bits; both zeros are equal.
template <typename Key>
inline Key ordered(Key bits) {
  const Key sign = bits >> (8 * sizeof(Key) - 1), magnitude = bits & std::numeric_limits<Key>::max();
  return (magnitude ^ sign) - sign;
}

template <typename Key, Key INFINITE>
struct Row {
  const Key* bits;
  int64_t count;

  int64_t blocks() const { return (count + BLOCK - 1) / BLOCK; }

  // The largest of a block in order, and whether it holds one that is not a number.
  Key largest(int64_t block, bool& broken) const {
    const int64_t end = std::min(count, (block + 1) * BLOCK);
    Key most = std::numeric_limits<Key>::min(), magnitude = 0;
    for (int64_t n = block * BLOCK; n < end; n++) {
      most = std::max(most, ordered(bits[n]));
      magnitude = std::max<Key>(magnitude, bits[n] & std::numeric_limits<Key>::max());
    }
    broken |= magnitude > INFINITE;
    return most;
  }
};

// The ids of the `wanted` largest numbers, the largest first and equal ones ascending; false where the row holds one that is
// not a number.
template <typename Key, Key INFINITE>
bool places(Row<Key, INFINITE> row, int64_t wanted, int64_t* ids) {
  static thread_local std::vector<Key> most, sorted;
  static thread_local std::vector<std::pair<Key, int64_t>> found;
  const int64_t blocks = row.blocks();
  most.resize(blocks);
  bool broken = false;
  for (int64_t n = 0; n < blocks; n++) most[n] = row.largest(n, broken);
  if (broken) return false;
  Key least = std::numeric_limits<Key>::min();
  if (wanted <= blocks) {
    sorted = most;
    std::nth_element(sorted.begin(), sorted.begin() + (wanted - 1), sorted.end(), std::greater<Key>());
    least = sorted[wanted - 1];
  }
  found.clear();
  for (int64_t n = 0; n < blocks; n++) {
    if (most[n] < least) continue;
    const int64_t end = std::min(row.count, (n + 1) * BLOCK);
    for (int64_t place = n * BLOCK; place < end; place++) {
      const Key key = ordered(row.bits[place]);
      if (key >= least) found.emplace_back(key, place);
    }
  }
  const auto before = [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
  std::partial_sort(found.begin(), found.begin() + wanted, found.end(), before);
  for (int64_t n = 0; n < wanted; n++) ids[n] = found[n].second;
  return true;
}

template <typename Key, Key INFINITE>
bool run(const void* data, int64_t rows, int64_t stride, int64_t count, int64_t wanted, int64_t* ids) {
  bool whole = true;
#pragma omp parallel for reduction(&& : whole) if (rows > 1 && rows * count > SERIAL)
  for (int64_t row = 0; row < rows; row++)
    whole = places(Row<Key, INFINITE>{static_cast<const Key*>(data) + row * stride, count}, wanted, ids + row * wanted) && whole;
  return whole;
}

}  // namespace

// Rows of bf16 (half) or fp32, `stride` numbers apart; ids int64 [rows, wanted], wanted at most count.  0 where a row holds what
// is not a number; its ids are then not written.
extern "C" int32_t subquad_largest(int32_t half, const void* data, int64_t rows, int64_t stride, int64_t count,
                                   int64_t wanted, int64_t* ids) {
  return half ? run<int16_t, 0x7f80>(data, rows, stride, count, wanted, ids)
              : run<int32_t, 0x7f800000>(data, rows, stride, count, wanted, ids);
}
