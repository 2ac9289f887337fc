// Errors: one exception type for bad input, with the values in the message.
// The library never prints, asserts or exits on what a caller passes in.
#pragma once

#include <charconv>
#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace block_sparse {

// Bad input: names the argument, what it was and what was wanted. An invalid_argument, so that a
// Python caller sees a ValueError.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A part of a message: text, a number, or a function that makes text, called when it is needed.
// Not a stream: kernels say at each call why they refuse, and a stream costs microseconds.
template <class Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::same_as<Part, char>) {
    text += part;
  } else if constexpr (std::integral<Part>) {
    char digits[24];
    text.append(digits, std::to_chars(digits, digits + sizeof digits, part).ptr);
  } else if constexpr (std::floating_point<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    text += digits;
  } else if constexpr (std::invocable<Part>) {
    text += part();
  } else {
    text += std::string_view(part);
  }
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

// The message is only built when the check fails; what is costly to say is given as a function.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    throw Error(concat(parts...));
  }
}

}  // namespace block_sparse
