// Attention over used positions, in the pages of all layers and sequences where they lie.
//
// Its meaning is attention.py's `cached_attention_xla`. Positions are worked off in chunks of kChunk, counted from the start
// of the sequence. A chunk gives its maximum, its sum of exponentials and its mix of values; chunks are joined one after
// another. So a query's result does not depend on which chunks were computed beside each other, or with which other queries.
#include <cmath>

#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

constexpr size_t kChunk = 256;       // positions
constexpr size_t kMostQueries = 24;  // of one task and head: their scores stay in the cache
constexpr size_t kMostOfHeads = 64;  // of one task, where it takes several heads
constexpr size_t kAtOnce = 16;         // positions that meet all queries, while as many of the next page are fetched

// What a chunk of positions gives for one query.
struct Partial {
  float maximum = -INFINITY, sum = 0;
};

// Joins `part` to what comes before it. values[i] are sums weighted by e^(score - maximum).
void join(const VectorCode& code, Partial* total, float* values, const Partial& part, const float* part_values, size_t width) {
  if (part.maximum == -INFINITY) return;
  const float maximum = std::max(total->maximum, part.maximum);
  const float before = total->maximum == -INFINITY ? 0.0f : code.exponential(total->maximum - maximum);
  const float now = code.exponential(part.maximum - maximum);
  for (size_t i = 0; i < width; i++) values[i] *= before;
  code.add(values, part_values, width, now);
  total->sum = total->sum * before + part.sum * now;
  total->maximum = maximum;
}

struct Cache {
  const void* keys;
  const void* values;
  Type type;
  size_t pages, page, heads, key_width, value_width, value_stride;
  const int32_t* table;  // pages of one layer, [slots][blocks]
  size_t slots, blocks;

  // Where the page of a position begins.
  const char* page_of(const void* data, size_t stride, size_t slot, size_t head, size_t position) const {
    const size_t first = ((size_t)table[slot * blocks + position / page] * page * heads + head) * stride;
    return static_cast<const char*>(data) + first * size_of(type);
  }

  // Calls each(head, positions before them, Matrix) with the keys (or values) of positions `begin` to `end` of a sequence, page
  // by page, so that memory is read in order; `begin` is the first of a page. A few rows at a time: meanwhile those of the next
  // page are fetched, which lies somewhere else and which the processor cannot foresee.
  template <class Each>
  void each_page(const void* data, size_t width, size_t stride, size_t slot, size_t first_head, size_t end_head, size_t begin,
                 size_t end, Each each) const {
    const size_t row_bytes = heads * stride * size_of(type);
    for (size_t at = begin; at < end; at += page) {
      const size_t own = std::min(page, end - at);
      for (size_t head = first_head; head < end_head; head++) {
        const char* from = page_of(data, stride, slot, head, at);
        const char* next = at + page < end ? page_of(data, stride, slot, head, at + page) : nullptr;
        for (size_t row = 0; row < own; row += kAtOnce) {
          const size_t rows = std::min(kAtOnce, own - row);
          for (size_t i = row; next != nullptr && i < row + rows; i++)
            for (size_t byte = 0; byte < width * size_of(type); byte += 64) __builtin_prefetch(next + i * row_bytes + byte, 0, 2);
          each(head, at + row - begin, Matrix{from + row * row_bytes, type, heads * stride, rows, width});
        }
      }
    }
  }

  // Whether positions `begin` to `end` of a sequence have pages.
  bool holds(size_t slot, size_t begin, size_t end) const {
    if (slot >= slots || end > blocks * page) return false;
    for (size_t block = begin / page; block * page < end; block++)
      if (table[slot * blocks + block] < 0 || (size_t)table[slot * blocks + block] >= pages) return false;
    return true;
  }
};

ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> slot, ffi::Buffer<ffi::S32> start,
                     ffi::Buffer<ffi::S32> length, ffi::Buffer<ffi::S32> window, ffi::RemainingArgs sinks,
                     ffi::Result<ffi::AnyBuffer> out, float scale) {
  const VectorCode& code = vector_code();
  const size_t batch = q.dimensions()[0], tokens = q.dimensions()[1], heads = q.dimensions()[2], width = q.dimensions()[3];
  Type activations, result;
  Cache cache{};
  cache.keys = keys.untyped_data(), cache.values = values.untyped_data();
  if (!type_of(q.element_type(), &activations) || !type_of(keys.element_type(), &cache.type) ||
      !type_of(out->element_type(), &result) || values.element_type() != keys.element_type())
    return invalid("a type that attention does not take");
  const auto shape = keys.dimensions(), tables = table.dimensions();
  cache.pages = shape[0], cache.page = shape[1], cache.heads = shape[2], cache.key_width = shape[3];
  cache.value_width = out->dimensions()[3], cache.value_stride = values.dimensions()[3];
  cache.slots = tables[1], cache.blocks = tables[2];
  const size_t own_layer = layer.typed_data()[0];
  if (own_layer >= (size_t)tables[0]) return invalid("no such layer");
  if (kChunk % cache.page != 0) return invalid("pages whose size does not divide attention's chunk");
  cache.table = table.typed_data() + own_layer * cache.slots * cache.blocks;
  const size_t group = heads / cache.heads, value_width = cache.value_width, value_padded = padded(value_width);
  const size_t reach = window.typed_data()[0] > 0 ? window.typed_data()[0] : cache.blocks * cache.page;
  const ffi::AnyBuffer* sink = nullptr;
  std::vector<ffi::AnyBuffer> sink_buffer;
  if (sinks.size() > 0) sink_buffer.push_back(sinks.get<ffi::AnyBuffer>(0).value()), sink = &sink_buffer[0];

  // A row without a sequence, and tokens behind a row's last one, get zeros.
  std::vector<size_t> rows_with_tokens;
  for (size_t row = 0; row < batch; row++)
    if (length.typed_data()[row] > 0) rows_with_tokens.push_back(row);
  const Rows queries(q.untyped_data(), activations, tokens * heads, width, rows_with_tokens);
  const size_t queries_count = rows_with_tokens.size() * tokens * heads;
  PackedRows packed(queries_count, width, activations, cache.type);
  for (size_t i = 0; i < queries_count; i++) packed.pack(i, queries[i]);
  std::memset(out->untyped_data(), 0, out->size_bytes());

  // Tasks: some tokens of one row and the query heads of one key head; of a single token those of several, whose keys lie
  // beside each other.
  struct Task {
    size_t row, query, head, heads, first, count;  // tokens first .. first + count of the row, whose first query is `query`
    size_t begin, end;                             // chunks
  };
  const size_t together = std::min(tokens, std::max<size_t>(1, kMostQueries / group));
  const size_t heads_together = tokens > 1 ? 1 : std::min(cache.heads, std::max<size_t>(1, kMostOfHeads / group));
  std::vector<Task> tasks;
  size_t bytes = 0;  // that could be read in the time
  for (size_t i = 0; i < rows_with_tokens.size(); i++) {
    const size_t row = rows_with_tokens[i], own = length.typed_data()[row], at = start.typed_data()[row];
    const size_t oldest = at + 1 > reach ? at + 1 - reach : 0;
    if (own > tokens || !cache.holds(slot.typed_data()[row], oldest, at + own))
      return invalid("a row lies outside the cache");
    for (size_t first = 0; first < own; first += together) {
      const size_t count = std::min(together, own - first), last = at + first + count - 1;
      const size_t seen = at + first + 1 > reach ? at + first + 1 - reach : 0;
      for (size_t head = 0; head < cache.heads; head += heads_together)
        tasks.push_back({row, i * tokens * heads, head, std::min(heads_together, cache.heads - head), first, count,
                         seen / kChunk, last / kChunk + 1});
      bytes += (last - seen + 1) * cache.heads * (cache.key_width + value_width) * size_of(cache.type) * (1 + count * group / 8);
    }
  }

  // A task's queries are numbered head by head, in a head token by token.
  // The chunk's part for every query of a task; p and part_values are scratch and result.
  auto compute = [&](const Task& task, size_t chunk, float* p, Partial* parts, float* part_values) {
    const size_t in_head = task.count * group, count = in_head * task.heads;
    const size_t at = start.typed_data()[task.row] + task.first, begin = chunk * kChunk;
    const size_t end = std::min(begin + kChunk, at + task.count), own_slot = slot.typed_data()[task.row];
    std::vector<const float*> rows(count);
    std::vector<const uint16_t*> packed_rows(count);
    for (size_t i = 0; i < count; i++) {
      const size_t head = task.head + i / in_head, of_head = i % in_head;
      const size_t query = task.query + (task.first + of_head / group) * heads + head * group + of_head % group;
      rows[i] = queries[query], packed_rows[i] = packed[query];
    }
    // Pages that no query of the task sees any more may be gone.
    const size_t oldest = at + 1 > reach ? at + 1 - reach : 0;
    const size_t seen = std::max(begin, oldest / cache.page * cache.page);
    float* from_seen = p + seen - begin;
    cache.each_page(cache.keys, cache.key_width, cache.key_width, own_slot, task.head, task.head + task.heads, seen, end,
                    [&](size_t head, size_t before, const Matrix& k) {
                      const size_t first = (head - task.head) * in_head;
                      products(k, rows.data() + first, packed_rows.data() + first, in_head, from_seen + first * kChunk + before, kChunk);
                    });
    for (size_t i = 0; i < count; i++) {
      float* own = p + i * kChunk;
      const size_t position = at + i % in_head / group;
      const size_t from = position + 1 > reach ? position + 1 - reach : 0;
      const size_t visible_begin = std::max(from, begin), visible_end = std::min(position + 1, end);
      if (visible_begin >= visible_end) {
        std::memset(own, 0, kChunk * sizeof(float));
        parts[i] = {};
        continue;
      }
      for (size_t s = visible_begin - begin; s < visible_end - begin; s++) own[s] *= scale;
      parts[i].sum = code.exponentials(own, visible_begin - begin, visible_end - begin, padded(end - begin), &parts[i].maximum);
    }
    std::memset(part_values, 0, count * value_padded * sizeof(float));
    cache.each_page(cache.values, value_width, cache.value_stride, own_slot, task.head, task.head + task.heads, seen, end,
                    [&](size_t head, size_t before, const Matrix& v) {
                      const size_t first = (head - task.head) * in_head;
                      code.mix(v, from_seen + first * kChunk + before, kChunk, in_head, part_values + first * value_padded, value_padded);
                    });
  };

  auto finish = [&](const Task& task, Partial* totals, float* totals_values) {
    const size_t in_head = task.count * group;
    for (size_t i = 0; i < in_head * task.heads; i++) {
      const size_t head = (task.head + i / in_head) * group + i % in_head % group;
      float sum = totals[i].sum, *own = totals_values + i * value_padded;
      if (sink != nullptr) {
        // The sink joins the sum and carries no value.
        const float s = number(*sink, head), maximum = std::max(totals[i].maximum, s);
        const float before = code.exponential(totals[i].maximum - maximum);
        sum = sum * before + code.exponential(s - maximum);
        for (size_t j = 0; j < value_width; j++) own[j] *= before;
      }
      for (size_t j = 0; j < value_width; j++) own[j] /= sum;
      const size_t to = ((task.row * tokens + task.first + i % in_head / group) * heads + head) * value_width;
      put(own, out->untyped_data(), result, to, value_width);
    }
  };

  const size_t most = together * group * heads_together;
  size_t chunks = 0;
  for (const Task& task : tasks) chunks += task.end - task.begin;
  if (tasks.size() >= 4 * (size_t)pool.num_threads() || chunks == tasks.size()) {
    // Enough tasks: each goes through its chunks.
    parallel(pool, tasks.size(), [&](int64_t number) {
      const Task& task = tasks[number];
      Scratch p(most * kChunk), part_values(most * value_padded), total_values(most * value_padded);
      std::vector<Partial> parts(most), totals(most);
      std::memset(total_values.data(), 0, most * value_padded * sizeof(float));
      for (size_t chunk = task.begin; chunk < task.end; chunk++) {
        compute(task, chunk, p.data(), parts.data(), part_values.data());
        for (size_t i = 0; i < task.count * group * task.heads; i++)
          join(code, &totals[i], total_values.data() + i * value_padded, parts[i], part_values.data() + i * value_padded, value_width);
      }
      finish(task, totals.data(), total_values.data());
    }, bytes);
    return ffi::Error::Success();
  }
  // Few tasks over long contexts: chunks side by side, joined afterwards in the same order.
  std::vector<size_t> first_part(tasks.size() + 1, 0), task_of;
  for (size_t i = 0; i < tasks.size(); i++) {
    const size_t own = tasks[i].end - tasks[i].begin;
    first_part[i + 1] = first_part[i] + own;
    task_of.insert(task_of.end(), own, i);
  }
  std::vector<Partial> parts(chunks * most);
  Scratch part_values(chunks * most * value_padded);
  parallel(pool, chunks, [&](int64_t number) {
    const size_t i = task_of[number];
    Scratch p(most * kChunk);
    compute(tasks[i], tasks[i].begin + number - first_part[i], p.data(), &parts[number * most],
            part_values.data() + number * most * value_padded);
  }, bytes);
  parallel(pool, tasks.size(), [&](int64_t number) {
    const Task& task = tasks[number];
    Scratch total_values(most * value_padded);
    std::vector<Partial> totals(most);
    std::memset(total_values.data(), 0, most * value_padded * sizeof(float));
    for (size_t part = first_part[number]; part < first_part[number + 1]; part++)
      for (size_t i = 0; i < task.count * group * task.heads; i++)
        join(code, &totals[i], total_values.data() + i * value_padded, parts[part * most + i],
             part_values.data() + (part * most + i) * value_padded, value_width);
    finish(task, totals.data(), total_values.data());
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_attention(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));

}  // namespace dancemoe
