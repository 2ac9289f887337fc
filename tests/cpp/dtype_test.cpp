// Dtypes: the conversions against independent definitions, over every value of the 16-bit types.
#include "block_sparse/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace block_sparse {
namespace {

// What a 16-bit pattern means, from the definition of the format.
double meaning(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * INFINITY : std::numeric_limits<double>::quiet_NaN();
  }
  const int significand = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits);
}

template <class T>
constexpr int kExponentBits = std::is_same_v<T, BFloat16> ? 8 : 5;

template <class T>
class SixteenBits : public ::testing::Test {
 protected:
  static double value(uint32_t bits) {
    return meaning(static_cast<uint16_t>(bits), kExponentBits<T>);
  }
  static constexpr uint32_t kInfinity = kExponentBits<T> == 8 ? 0x7f80 : 0x7c00;
};
using SixteenBitTypes = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(SixteenBits, SixteenBitTypes);

TYPED_TEST(SixteenBits, EveryValueRoundTrips) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const TypeParam stored{static_cast<uint16_t>(bits)};
    const double expected = this->value(bits);
    const auto widened = load<float>(stored);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(widened)) << bits;
      ASSERT_TRUE(std::isnan(load<double>(stored))) << bits;
      ASSERT_TRUE(std::isnan(this->value(store<TypeParam>(widened).bits))) << bits;
    } else {
      ASSERT_EQ(widened, expected) << bits;
      ASSERT_EQ(load<double>(stored), expected) << bits;
      ASSERT_EQ(std::signbit(widened), std::signbit(expected)) << bits;
      ASSERT_EQ(store<TypeParam>(widened).bits, bits);
    }
  }
}

// Between each two neighbours: the midpoint goes to the even one, anything beside it to the nearer.
// "Beside" is one step of a double, which a detour through float would round onto the midpoint.
TYPED_TEST(SixteenBits, RoundsToNearestEven) {
  for (uint32_t low = 0; low + 1 < this->kInfinity; ++low) {
    const uint32_t even = low % 2 == 0 ? low : low + 1;
    const double middle = (this->value(low) + this->value(low + 1)) / 2;
    for (const double sign : {1.0, -1.0}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000 : 0;
      ASSERT_EQ(store<TypeParam>(sign * middle).bits, even | sign_bit) << low;
      ASSERT_EQ(store<TypeParam>(sign * std::nextafter(middle, 0.0)).bits, low | sign_bit) << low;
      ASSERT_EQ(store<TypeParam>(sign * std::nextafter(middle, INFINITY)).bits,
                (low + 1) | sign_bit)
          << low;
    }
  }
}

TYPED_TEST(SixteenBits, OverflowAndTinyAndNan) {
  const double largest = this->value(this->kInfinity - 1);
  const double step = largest - this->value(this->kInfinity - 2);
  EXPECT_EQ(store<TypeParam>(std::nextafter(largest + step / 2, 0.0)).bits, this->kInfinity - 1);
  EXPECT_EQ(store<TypeParam>(largest + step / 2).bits, this->kInfinity);
  EXPECT_EQ(store<TypeParam>(1e300).bits, this->kInfinity);
  EXPECT_EQ(store<TypeParam>(-INFINITY).bits, this->kInfinity | 0x8000);
  EXPECT_EQ(store<TypeParam>(1e-300).bits, 0);
  EXPECT_EQ(store<TypeParam>(-1e-300).bits, 0x8000);
  EXPECT_EQ(store<TypeParam>(this->value(1) / 2).bits, 0);  // half of the least: to even
  EXPECT_EQ(store<TypeParam>(this->value(1) * 0.75).bits, 1);
  EXPECT_TRUE(std::isnan(this->value(store<TypeParam>(std::nan("")).bits)));
}

// The nearest of all 65536 values, found by looking at each.
TYPED_TEST(SixteenBits, RandomValuesGoToTheNearest) {
  std::mt19937_64 generator(7);
  std::uniform_real_distribution<double> mantissa(1, 2);
  std::uniform_int_distribution<int> exponent(-26, 15);
  for (int i = 0; i < 200; ++i) {
    const double x = std::ldexp(mantissa(generator), exponent(generator));
    double best = INFINITY;
    for (uint32_t bits = 0; bits < this->kInfinity; ++bits) {
      best = std::min(best, std::abs(this->value(bits) - x));
    }
    if (x <= this->value(this->kInfinity - 1)) {
      ASSERT_EQ(std::abs(this->value(store<TypeParam>(x).bits) - x), best) << x;
    }
  }
}

TEST(Dtype, WideTypesAreCast) {
  EXPECT_EQ(store<double>(0.1), 0.1);
  EXPECT_EQ(store<float>(0.1), 0.1f);
  EXPECT_EQ(load<float>(0.1), 0.1f);
  EXPECT_EQ(load<double>(0.1f), static_cast<double>(0.1f));
}

TEST(Dtype, NamesAndSizes) {
  EXPECT_EQ(to_string(Dtype::f64), "f64");
  EXPECT_EQ(to_string(Dtype::bf16), "bf16");
  EXPECT_EQ(size_of(Dtype::f64), 8);
  EXPECT_EQ(size_of(Dtype::f32), 4);
  EXPECT_EQ(size_of(Dtype::bf16), 2);
  EXPECT_EQ(size_of(Dtype::f16), 2);
  EXPECT_EQ(
      visit(Dtype::f16, [](auto type) { return Traits<typename decltype(type)::type>::dtype; }),
      Dtype::f16);
}

}  // namespace
}  // namespace block_sparse
