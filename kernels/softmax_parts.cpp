// The C form of softmax attention over segments that operators outside compiled programs call.

#include "softmax_parts.h"

// sizes: B, w, H, Hkv, K, V.  segments [count]; cap: the softcap, 0 for none.
extern "C" void subquad_softmax_parts(
    int32_t half, const float* q, float* o, float* lse, const int64_t* sizes, float scale, float cap, const int64_t* segments,
    int64_t count) {
  const Segment* table = reinterpret_cast<const Segment*>(segments);
  if (half) {
    Call<BFloat16> call{q, o, lse, table, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scale, cap, {}};
    run(call, count);
  } else {
    Call<float> call{q, o, lse, table, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scale, cap, {}};
    run(call, count);
  }
}
