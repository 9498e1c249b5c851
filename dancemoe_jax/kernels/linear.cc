// Rows times one layer's weights out of arrays stacked over layers: nothing is sliced out or copied first.
//
// Its meaning is linear.py's `stacked_linear_xla`, for several weights that meet the same rows. With heads, each head of x has a
// weight of its own. Gated, x holds what silu gates, after its gates, and the rows that weights meet are half as wide.
#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

// One layer's weight, and where its products go.
struct Product {
  Matrix weights;  // of all heads, one after another
  size_t height, outputs, block, blocks;
  const float* scale = nullptr;
  void* to;
  Type result;
};

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::PRED> active,
                  ffi::RemainingArgs weights, ffi::RemainingRets results, bool transposed, bool scaled, bool gated) {
  const VectorCode& code = vector_code();
  const size_t rows = x.dimensions()[0], parts = results.size();
  const int32_t index = layer.typed_data()[0];
  if (parts == 0 || weights.size() != parts * (1 + scaled)) return invalid("linear needs weights and as many results");
  Type activations, stored, first;
  if (!type_of(weights.get<ffi::AnyBuffer>(0)->element_type(), &first) || !type_of(x.element_type(), &activations) ||
      activations == Type::kInt8)
    return invalid("a type that linear does not take");

  const std::vector<size_t> chosen = chosen_rows(active);
  const size_t count = chosen.size();
  size_t heads = 1, inputs = 0, tasks = 0, bytes = 0;
  std::vector<Product> all;
  for (size_t part = 0; part < parts; part++) {
    const ffi::AnyBuffer w = weights.get<ffi::AnyBuffer>(part).value();
    ffi::AnyBuffer y = *results.get<ffi::AnyBuffer>(part).value();
    const auto shape = w.dimensions();
    const size_t height = shape[shape.size() - 2], width = shape[shape.size() - 1];
    heads = shape.size() == 4 ? shape[1] : 1, inputs = transposed ? height : width;
    Product own{};
    own.height = height, own.outputs = transposed ? width : height;
    if (!type_of(w.element_type(), &stored) || !type_of(y.element_type(), &own.result) || own.result == Type::kInt8 || stored != first)
      return invalid("a type that linear does not take");
    if (index < 0 || index >= shape[0]) return invalid("no such layer");
    const Matrix stack{w.untyped_data(), stored, width, shape[0] * heads * height, width};
    own.weights = Matrix{stack.slice(index * heads * height, (index + 1) * heads * height)};
    if (scaled)
      own.scale = static_cast<const float*>(weights.get<ffi::AnyBuffer>(parts + part)->untyped_data()) + index * heads * own.outputs;
    own.to = y.untyped_data();
    // Transposed, a task takes so much of each row that memory is read in order.
    own.block = transposed ? std::min<size_t>(own.outputs, 512) : rows_of_a_task(own.weights, count), own.blocks = (own.outputs + own.block - 1) / own.block;
    tasks += heads * own.blocks, bytes += read_by(own.weights, count);
    // Rows that are not active get zeros and cost nothing else.
    if (count < rows) std::memset(own.to, 0, y.size_bytes());
    all.push_back(own);
  }
  if (count == 0) return ffi::Error::Success();

  const size_t given = inputs * (1 + gated), stride_of_gated = row_stride(inputs), taken = count * heads;
  const Rows from(x.untyped_data(), activations, heads, given, chosen);
  Scratch gated_rows(gated ? taken * stride_of_gated : 0);
  PackedRows packed(taken, inputs, activations, transposed ? Type::kFloat32 : stored);
  std::vector<const float*> by_head(taken);
  std::vector<const uint16_t*> packed_by_head(taken);
  const size_t row_block = std::max<size_t>(1, kNumbersOfATask / given), row_blocks = (taken + row_block - 1) / row_block;
  parallel(pool, row_blocks, [&](int64_t task) {
    for (size_t row = task * row_block; row < std::min(taken, (task + 1) * row_block); row++) {
      const float* own = from[row];
      if (gated) {
        float* to = gated_rows.data() + row * stride_of_gated;
        std::memcpy(to, own, inputs * sizeof(float));
        code.gate(to, own + inputs, inputs, 0);
        if (activations == Type::kBfloat16) code.round(to, inputs);
        std::memset(to + inputs, 0, (padded(inputs) - inputs) * sizeof(float));
        own = to;
      }
      packed.pack(row, own);
      const size_t place = row % heads * count + row / heads;
      by_head[place] = own, packed_by_head[place] = packed[row];
    }
  });

  parallel(pool, tasks, [&](int64_t number) {
    size_t task = number;
    const Product* product = all.data();
    for (; task >= heads * product->blocks; product++) task -= heads * product->blocks;
    const Product& own = *product;
    const size_t head = task / own.blocks, begin = task % own.blocks * own.block, end = std::min(own.outputs, begin + own.block);
    const Matrix matrix = own.weights.slice(head * own.height, (head + 1) * own.height);
    const bool direct = own.result == Type::kFloat32 && count == rows;
    Scratch wide(direct ? 0 : count * (end - begin));
    float* to = direct ? static_cast<float*>(own.to) + head * own.outputs + begin : wide.data();
    const size_t stride = direct ? heads * own.outputs : end - begin;
    const float* const* own_rows = by_head.data() + head * count;
    if (transposed) {
      const size_t between = count > 1 ? own_rows[1] - own_rows[0] : 0;
      for (size_t r = 0; r < count; r++) std::memset(to + r * stride, 0, (end - begin) * sizeof(float));
      code.mix(matrix.columns(begin, end), own_rows[0], between, count, to, stride);
    } else {
      products(matrix.slice(begin, end), own_rows, packed_by_head.data() + head * count, count, to, stride);
    }
    for (size_t r = 0; r < count; r++) {
      if (own.scale != nullptr)
        for (size_t i = begin; i < end; i++) to[r * stride + i - begin] *= own.scale[head * own.outputs + i];
      if (!direct) put(to + r * stride, own.to, own.result, (chosen[r] * heads + head) * own.outputs + begin, end - begin);
    }
  }, bytes);
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_linear(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed")
                                  .Attr<bool>("scaled")
                                  .Attr<bool>("gated"));

}  // namespace dancemoe
