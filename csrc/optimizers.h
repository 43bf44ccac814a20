// The optimizers' formulas, one struct each: what happens to one number of a row.
//
// Read by a host compiler for the CPU kernels and by NVRTC for others: no host headers, no loops, no memory. A number, V, is
// a float or a vector of them (vectors.h). A struct has
//
//   kElementSlots   slot variables with one number for each of the row's; passed to step by reference
//   kRowSlot        whether there is one more, with one number for the whole row: begin_row changes it, factor says what
//                   the row's steps need of it
//   Hyper           the hyperparameters, read from the float32 array that Python computes once a step, in the order of
//                   the optimizer's NamedTuple
//   kMeanSquare     whether begin_row reads the mean of the row's squared gradients; it is 0 where it does not
//   begin_row       (hyper, mean of the row's squared gradients, row slot), before the row's steps
//   factor          (hyper, row slot) -> a number, once a row
//   step            (hyper, that number, gradient, row, slots ...), for each number
//
// The formulas are those of `update_rows` in embax/optimizers, where sources are named. To add one: its struct here, its
// line in EMBAX_OPTIMIZERS.

#ifndef EMBAX_CSRC_OPTIMIZERS_H_
#define EMBAX_CSRC_OPTIMIZERS_H_

#include "portable.h"

#if defined(__CUDACC__)
namespace embax::EMBAX_ISA {
EMBAX_FORMULA float root(float x) { return sqrtf(x); }
EMBAX_FORMULA float power(float x, float exponent) { return powf(x, exponent); }
}  // namespace embax::EMBAX_ISA
#else
#include "vectors.h"
#endif

namespace embax::EMBAX_ISA {

// Without slots that it does not have, a formula is called with a number that nobody reads.
struct NoRowSlot {
  static constexpr bool kRowSlot = false, kMeanSquare = false;
  template <typename Hyper>
  EMBAX_FORMULA static void begin_row(const Hyper&, float, float&) {}
  template <typename Hyper>
  EMBAX_FORMULA static float factor(const Hyper&, float) {
    return 0;
  }
};

// 0 / sqrt(0) is a step of 0: an accumulator of 0 has only ever seen gradients of 0.
template <typename V>
EMBAX_FORMULA V over_root(V value, V square) {
  return square > 0 ? value / root(square) : V{};
}

struct Sgd : NoRowSlot {
  static constexpr int kElementSlots = 0;
  struct Hyper {
    float rate;
    EMBAX_FORMULA explicit Hyper(const float* h) : rate(h[0]) {}
  };
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float, V g, V& w, V&, V&) { w -= h.rate * g; }
};

struct Adagrad : NoRowSlot {
  static constexpr int kElementSlots = 1;
  using Hyper = Sgd::Hyper;
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float, V g, V& w, V& accumulator, V&) {
    accumulator += g * g;
    w -= h.rate * over_root(g, accumulator);
  }
};

struct RowwiseAdagrad {
  static constexpr int kElementSlots = 0;
  static constexpr bool kRowSlot = true, kMeanSquare = true;
  using Hyper = Sgd::Hyper;
  EMBAX_FORMULA static void begin_row(const Hyper&, float mean_square, float& accumulator) {
    accumulator += mean_square;
  }
  EMBAX_FORMULA static float factor(const Hyper& h, float accumulator) { return over_root(h.rate, accumulator); }
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper&, float factor, V g, V& w, V&, V&) {
    w -= factor * g;
  }
};

template <bool nesterov>
struct AdagradMomentum : NoRowSlot {
  static constexpr int kElementSlots = 2;
  struct Hyper {
    float rate, momentum, beta2, fresh, epsilon, inverse_exponent;
    EMBAX_FORMULA explicit Hyper(const float* h)
        : rate(h[0]), momentum(h[1]), beta2(h[2]), fresh(h[3]), epsilon(h[4]), inverse_exponent(h[5]) {}
  };
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float, V g, V& w, V& accumulator, V& momentum) {
    accumulator = h.beta2 * accumulator + h.fresh * g * g;
    const V grown = accumulator + h.epsilon;
    const V scaled = h.inverse_exponent == 0.5f ? g / root(grown) : g * power(grown, -h.inverse_exponent);
    momentum = h.momentum * momentum + scaled;
    w -= h.rate * (nesterov ? h.momentum * momentum + scaled : momentum);
  }
};

struct Adam : NoRowSlot {
  static constexpr int kElementSlots = 2;
  struct Hyper {
    float alpha, one_minus_beta1, one_minus_beta2, epsilon;
    EMBAX_FORMULA explicit Hyper(const float* h)
        : alpha(h[0]), one_minus_beta1(h[1]), one_minus_beta2(h[2]), epsilon(h[3]) {}
  };
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float, V g, V& w, V& momentum, V& velocity) {
    momentum += h.one_minus_beta1 * (g - momentum);
    velocity += h.one_minus_beta2 * (g * g - velocity);
    w -= h.alpha * momentum / (root(velocity) + h.epsilon);
  }
};

struct LaProp : NoRowSlot {
  static constexpr int kElementSlots = 2;
  struct Hyper {
    float rate, b1, fresh, decay, one_minus_decay, epsilon;
    EMBAX_FORMULA explicit Hyper(const float* h)
        : rate(h[0]), b1(h[1]), fresh(h[2]), decay(h[3]), one_minus_decay(h[4]), epsilon(h[5]) {}
  };
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float, V g, V& w, V& mu, V& nu) {
    nu = h.decay * nu + h.one_minus_decay * (g * g + h.epsilon);
    // A squared gradient below the smallest float32 leaves nu at 0: its direction is then 0, not NaN.
    mu = h.b1 * mu + h.fresh * over_root(g, nu);
    w -= h.rate * mu;
  }
};

template <bool multiplied>
struct Ftrl : NoRowSlot {
  static constexpr int kElementSlots = 2;
  struct Hyper {
    float rate, power, l1, l2, beta;
    bool still;
    // A rate of 0 (a warm-up begins so) leaves the row where it is; the formula divides by the rate.
    EMBAX_FORMULA explicit Hyper(const float* h)
        : rate(h[0] == 0 ? 1.0f : h[0]), power(h[1]), l1(h[2]), l2(h[3]), beta(h[4]), still(h[0] == 0) {}
  };
  template <typename V>
  EMBAX_FORMULA static V raised(const Hyper& h, V value) {
    return h.power == 0.5f ? root(value) : power(value, h.power);
  }
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float, V g, V& w, V& accumulator, V& linear) {
    const V before = accumulator;
    accumulator += g * g;
    if (h.still) return;
    const V grown = raised(h, accumulator);
    const V moved = (grown - raised(h, before)) * w;
    linear += multiplied ? h.rate * g - moved : g - moved / h.rate;
    const V l1 = V{} + (multiplied ? h.l1 * h.rate : h.l1);
    const V denominator = multiplied ? grown + 2 * h.rate * h.l2 + h.beta : (grown + h.beta) / h.rate + 2 * h.l2;
    const V low = linear < -l1 ? -l1 : linear;
    const V clipped = low > l1 ? l1 : low;
    // A denominator of 0 has seen gradients of 0 only.
    w = denominator == 0 ? w : (clipped - linear) / denominator;
  }
};

struct F2a {
  static constexpr int kElementSlots = 1;
  static constexpr bool kRowSlot = true, kMeanSquare = false;
  struct Hyper {
    float rate, step, rho, l1, l2, max_multiplier;
    EMBAX_FORMULA explicit Hyper(const float* h)
        : rate(h[0]), step(h[1] > 1 ? h[1] : 1.0f), rho(h[2]), l1(h[3]), l2(h[4]), max_multiplier(h[5]) {}
  };
  EMBAX_FORMULA static void begin_row(const Hyper&, float, float& local_step) { local_step += 1; }
  EMBAX_FORMULA static float factor(const Hyper& h, float local_step) {
    const float raised = power(h.step / local_step, h.rho);
    return raised < h.max_multiplier ? raised : h.max_multiplier;
  }
  template <typename V>
  EMBAX_FORMULA static void step(const Hyper& h, float factor, V g, V& w, V& accumulator, V&) {
    accumulator += g * g;
    const V one = V{} + 1.0f, negative = w < 0 ? -one : V{};
    const V sign = w > 0 ? one : negative;
    w -= h.rate * (factor * g / root(accumulator) + h.l1 * sign + h.l2 * w);
  }
};

}  // namespace embax::EMBAX_ISA

// X(name of the kernel in Python, struct), in the order of Kernels::step.
#define EMBAX_OPTIMIZERS(X)                          \
  X("sgd", Sgd)                                      \
  X("adagrad", Adagrad)                              \
  X("rowwise_adagrad", RowwiseAdagrad)               \
  X("adagrad_momentum", AdagradMomentum<false>)      \
  X("adagrad_nesterov", AdagradMomentum<true>)       \
  X("adam", Adam)                                    \
  X("laprop", LaProp)                                \
  X("ftrl", Ftrl<false>)                             \
  X("ftrl_multiplied", Ftrl<true>)                   \
  X("f2a", F2a)

#endif  // EMBAX_CSRC_OPTIMIZERS_H_
