// Which experts each token goes to, and with what weight, from the router's logits.
//
// Its meaning is choice.py's `choose_xla`. XLA adds up a softmax in another order where there are more tokens.
#include <algorithm>
#include <limits>

#include "buffers.h"
#include "threads.h"

namespace dancemoe {
namespace {

constexpr size_t kTask = 16 << 10;  // logits that one task looks at

struct Rule {
  bool sigmoid, normalize;
  float scale;
  size_t groups, top_groups, k;
};

// Index of the largest number that is not taken, of several such the first one.
size_t next_best(const float* numbers, const std::vector<char>& taken) {
  size_t best = 0;
  while (best < taken.size() && taken[best]) best++;
  for (size_t i = best + 1; i < taken.size(); i++)
    if (numbers[i] > numbers[best] && !taken[i]) best = i;
  return best;
}

// Takes all experts outside the best groups. A group is as good as its best expert, or as its two best.
void close_groups(const Rule& rule, const float* choice, bool by_two, std::vector<char>* taken) {
  const size_t own = taken->size() / rule.groups;
  std::vector<float> merit(rule.groups);
  for (size_t group = 0; group < rule.groups; group++) {
    const float* numbers = choice + group * own;
    std::vector<char> seen(own, false);
    const size_t first = next_best(numbers, seen);
    merit[group] = numbers[first];
    if (!by_two) continue;
    seen[first] = true;
    merit[group] += numbers[next_best(numbers, seen)];
  }
  std::vector<char> open(rule.groups, false);
  for (size_t i = 0; i < rule.top_groups; i++) open[next_best(merit.data(), open)] = true;
  for (size_t i = 0; i < taken->size(); i++) (*taken)[i] = !open[i / own];
}

// One token. `scores` are its logits, with room up to a multiple of 16; `correction` may be null.
void choose(const Rule& rule, float* scores, const float* correction, size_t experts, float* weights, int32_t* ids) {
  const VectorCode& code = vector_code();
  if (rule.sigmoid) {
    for (size_t i = 0; i < experts; i++) scores[i] = 1.0f / (1.0f + code.exponential(-scores[i]));
  } else {
    float maximum;
    const float sum = code.exponentials(scores, 0, experts, padded(experts), &maximum);
    for (size_t i = 0; i < experts; i++) scores[i] /= sum;
  }
  std::vector<float> choice(scores, scores + experts);
  for (size_t i = 0; correction != nullptr && i < experts; i++) choice[i] += correction[i];
  std::vector<char> taken(experts, false);
  if (rule.groups > 1) close_groups(rule, choice.data(), correction != nullptr, &taken);
  float total = 0;
  for (size_t i = 0; i < rule.k; i++) {
    const size_t best = next_best(choice.data(), taken);
    taken[best] = true;
    ids[i] = best, weights[i] = scores[best];
    total += scores[best];
  }
  // The smallest normal number guards a sigmoid router whose chosen scores all vanish.
  total = rule.normalize ? std::max(total, std::numeric_limits<float>::min()) : 1.0f;
  for (size_t i = 0; i < rule.k; i++) weights[i] = weights[i] / total * rule.scale;
}

ffi::Error Choice(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::PRED> active, ffi::RemainingArgs corrections,
                  ffi::Result<ffi::Buffer<ffi::F32>> weights, ffi::Result<ffi::Buffer<ffi::S32>> ids, bool sigmoid,
                  bool normalize, float scale, int64_t groups, int64_t top_groups) {
  const size_t tokens = logits.dimensions()[0], experts = logits.dimensions()[1], k = ids->dimensions()[1];
  const Rule rule{sigmoid, normalize, scale, (size_t)groups, (size_t)top_groups, k};
  const float* correction = nullptr;
  if (corrections.size() > 0) correction = static_cast<const float*>(corrections.get<ffi::AnyBuffer>(0)->untyped_data());
  const std::vector<size_t> chosen = chosen_rows(active);
  if (chosen.size() < tokens) {
    std::memset(weights->typed_data(), 0, weights->size_bytes());
    for (size_t i = 0; i < tokens * k; i++) ids->typed_data()[i] = i % k;
  }
  const size_t block = std::max<size_t>(1, kTask / experts);
  parallel(pool, (chosen.size() + block - 1) / block, [&](int64_t task) {
    Scratch scores(padded(experts));
    for (size_t i = task * block; i < std::min(chosen.size(), (task + 1) * block); i++) {
      const size_t token = chosen[i];
      std::memcpy(scores.data(), logits.typed_data() + token * experts, experts * sizeof(float));
      choose(rule, scores.data(), correction, experts, weights->typed_data() + token * k, ids->typed_data() + token * k);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

EXPORTED XLA_FFI_Error* dancemoe_choice(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(dancemoe_choice, Choice,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("sigmoid")
                                  .Attr<bool>("normalize")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("top_groups"));

}  // namespace dancemoe
