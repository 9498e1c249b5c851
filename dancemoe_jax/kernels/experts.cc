// Grouped expert product: each token's experts, straight out of the slots they lie in.
//
// Its meaning is experts.py's `slot_experts_xla`. Only slots that some token needs are read, each once a call.
#include <algorithm>
#include <cmath>
#include <vector>

#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

// One bank of the pool: buffers with a slot axis in front.
struct Bank {
  ffi::AnyBuffer w_in, w_out;
  size_t slots;
};

// Biases or scales of an expert; nothing where the model has none.
struct Extra {
  const ffi::AnyBuffer* scale = nullptr;
  const ffi::AnyBuffer* bias = nullptr;
  size_t start = 0;

  // numbers[i] is output `first + i`.
  void apply(float* numbers, size_t first, size_t count) const {
    if (scale != nullptr)
      for (size_t i = 0; i < count; i++) numbers[i] *= number(*scale, start + first + i);
    if (bias != nullptr)
      for (size_t i = 0; i < count; i++) numbers[i] += number(*bias, start + first + i);
  }
};

// The assignments to one slot, which are neighbours in the sorted list.
struct Group {
  size_t begin, end;
  Matrix w_in, w_out;
  Extra in, out;
};

// As experts.py's `sum_grid`.
float grid(const float* x, size_t width) {
  int exponent;
  std::frexp(vector_code().largest(x, width), &exponent);
  return std::ldexp(1.0f, std::max(exponent, -60) - 16);
}

struct Assignment {
  int32_t slot;
  size_t at;  // token * k + its place among the token's
};

ffi::Error Experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::F32> weights,
                   ffi::RemainingArgs parts, ffi::Result<ffi::Buffer<ffi::F32>> out, float limit, bool biased, bool scaled) {
  const VectorCode& code = vector_code();
  const size_t tokens = x.dimensions()[0], hidden = x.dimensions()[1], k = slots.dimensions()[1];
  Type activations, stored;
  if (!type_of(x.element_type(), &activations) || activations == Type::kInt8) return invalid("x must be float32 or bfloat16");

  // Each bank's arrays in the order w_in, w_out, biases of both, scales of both.
  const size_t per_bank = 2 + 2 * biased + 2 * scaled;
  std::vector<ffi::AnyBuffer> arrays;
  for (size_t i = 0; i < parts.size(); i++) arrays.push_back(parts.get<ffi::AnyBuffer>(i).value());
  if (arrays.empty() || arrays.size() % per_bank != 0) return invalid("incomplete banks");
  if (!type_of(arrays[0].element_type(), &stored)) return invalid("weights must be float32, bfloat16 or int8");
  const size_t inner = arrays[0].dimensions()[1] / 2, gated_stride = row_stride(inner);

  std::vector<Assignment> assignments;
  for (size_t at = 0; at < tokens * k; at++)
    if (slots.typed_data()[at] >= 0) assignments.push_back({slots.typed_data()[at], at});
  std::stable_sort(assignments.begin(), assignments.end(),
                   [](const Assignment& a, const Assignment& b) { return a.slot < b.slot; });
  const size_t count = assignments.size();

  std::vector<Group> groups;
  size_t bank = 0, bank_start = 0;
  for (size_t i = 0; i < count; i++) {
    const size_t slot = assignments[i].slot;
    if (i > 0 && assignments[i - 1].slot == assignments[i].slot) {
      groups.back().end++;
      continue;
    }
    while (slot - bank_start >= (size_t)arrays[bank].dimensions()[0]) {
      bank_start += arrays[bank].dimensions()[0];
      bank += per_bank;
      if (bank == arrays.size()) return invalid("a slot's number is larger than the pool");
    }
    const size_t place = slot - bank_start;
    const ffi::AnyBuffer* own = &arrays[bank];
    Group group{i, i + 1, {own[0].untyped_data(), stored, hidden, 2 * inner, hidden}, {own[1].untyped_data(), stored, inner, hidden, inner}, {}, {}};
    group.w_in = Matrix{group.w_in.slice(place * 2 * inner, (place + 1) * 2 * inner)};
    group.w_out = Matrix{group.w_out.slice(place * hidden, (place + 1) * hidden)};
    if (biased) group.in.bias = own + 2, group.out.bias = own + 3;
    if (scaled) group.in.scale = own + 2 + 2 * biased, group.out.scale = own + 3 + 2 * biased;
    group.in.start = place * 2 * inner, group.out.start = place * hidden;
    groups.push_back(group);
  }

  // Tokens that have an assignment, and where each is among them.
  std::vector<size_t> taken, place(tokens);
  for (size_t token = 0; token < tokens; token++) {
    const int32_t* own = slots.typed_data() + token * k;
    if (std::all_of(own, own + k, [](int32_t slot) { return slot < 0; })) continue;
    place[token] = taken.size();
    taken.push_back(token);
  }
  const Rows rows(x.untyped_data(), activations, 1, hidden, taken);
  PackedRows packed(taken.size(), hidden, activations, stored), packed_gated(count, inner, activations, stored);
  for (size_t i = 0; i < taken.size(); i++) packed.pack(i, rows[i]);
  Scratch gated(count * gated_stride), outputs(count * hidden);
  std::vector<const float*> sources(count), gated_rows(count);
  std::vector<const uint16_t*> packed_sources(count), packed_gated_rows(count);
  for (size_t i = 0; i < count; i++) {
    const size_t own = place[assignments[i].at / k];
    sources[i] = rows[own], packed_sources[i] = packed[own];
    gated_rows[i] = gated.data() + i * gated_stride, packed_gated_rows[i] = packed_gated[i];
  }

  // gated = silu(x gate) * (x up), in the activations' type: gate's and up's rows of a block of inner channels.
  const bool rounded = activations == Type::kBfloat16;
  const size_t of_a_group = count / std::max<size_t>(1, groups.size());
  const Matrix any_in{nullptr, stored, hidden, 2 * inner, hidden}, any_out{nullptr, stored, inner, hidden, inner};
  const size_t in_block = std::max<size_t>(rows_of_a_task(any_in, of_a_group) / 2, 16), in_blocks = (inner + in_block - 1) / in_block;
  parallel(pool, groups.size() * in_blocks, [&](int64_t task) {
    const Group& group = groups[task / in_blocks];
    const size_t begin = task % in_blocks * in_block, end = std::min(inner, begin + in_block);
    const size_t width = end - begin, own = group.end - group.begin;
    const float* const* own_rows = sources.data() + group.begin;
    const uint16_t* const* own_packed = packed_sources.data() + group.begin;
    float* gate = gated.data() + group.begin * gated_stride + begin;
    Scratch up(own * width);
    products(group.w_in.slice(begin, end), own_rows, own_packed, own, gate, gated_stride);
    products(group.w_in.slice(inner + begin, inner + end), own_rows, own_packed, own, up.data(), width);
    for (size_t r = 0; r < own; r++) {
      float *g = gate + r * gated_stride, *u = up.data() + r * width;
      group.in.apply(g, begin, width);
      group.in.apply(u, inner + begin, width);
      code.gate(g, u, width, limit);
      if (rounded) code.round(g, width);
      if (end == inner) std::memset(g + width, 0, (padded(inner) - inner) * sizeof(float));
    }
  }, groups.size() * read_by(any_in, of_a_group));

  const size_t row_block = std::max<size_t>(1, kNumbersOfATask / inner), row_blocks = (count + row_block - 1) / row_block;
  parallel(pool, row_blocks, [&](int64_t task) {
    for (size_t i = task * row_block; i < std::min(count, (task + 1) * row_block); i++) packed_gated.pack(i, gated_rows[i]);
  });

  const size_t out_block = rows_of_a_task(any_out, of_a_group), out_blocks = (hidden + out_block - 1) / out_block;
  parallel(pool, groups.size() * out_blocks, [&](int64_t task) {
    const Group& group = groups[task / out_blocks];
    const size_t begin = task % out_blocks * out_block, end = std::min(hidden, begin + out_block);
    float* to = outputs.data() + group.begin * hidden + begin;
    const size_t first = group.begin, own = group.end - first;
    products(group.w_out.slice(begin, end), &gated_rows[first], &packed_gated_rows[first], own, to, hidden);
    for (size_t i = group.begin; i < group.end; i++) group.out.apply(outputs.data() + i * hidden + begin, begin, end - begin);
  }, groups.size() * read_by(any_out, of_a_group));

  // Each token's sum, in the order of its k. On a grid the order does not matter (experts.py's `sum_grid`).
  if (taken.size() < tokens) std::memset(out->typed_data(), 0, out->size_bytes());
  std::vector<const float*> of(tokens * k, nullptr);
  for (size_t i = 0; i < count; i++) of[assignments[i].at] = outputs.data() + i * hidden;
  const size_t token_block = std::max<size_t>(1, kNumbersOfATask / (hidden * k)), token_blocks = (taken.size() + token_block - 1) / token_block;
  parallel(pool, token_blocks, [&](int64_t task) {
    Scratch total(hidden);
    for (size_t i = task * token_block; i < std::min(taken.size(), (task + 1) * token_block); i++) {
      std::memset(total.data(), 0, hidden * sizeof(float));
      const float step = rounded ? grid(rows[i], hidden) : 0;
      for (size_t at = taken[i] * k; at < (taken[i] + 1) * k; at++) {
        const float weight = weights.typed_data()[at];
        if (of[at] != nullptr && rounded)
          code.add_rounded(total.data(), of[at], hidden, weight, step);
        else if (of[at] != nullptr)
          code.add(total.data(), of[at], hidden, weight);
      }
      std::memcpy(out->typed_data() + taken[i] * hidden, total.data(), hidden * sizeof(float));
    }
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_experts(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("limit")
                                  .Attr<bool>("biased")
                                  .Attr<bool>("scaled"));

}  // namespace dancemoe
