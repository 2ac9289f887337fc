// Errors: one exception type for bad input, with the values in the message.
// The library never prints, asserts or exits on what a caller passes in.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace block_sparse {

// Bad input: names the argument, what it was and what was wanted. An invalid_argument, so that a
// Python caller sees a ValueError.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The message is only built when the check fails.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]] {
    throw Error(concat(parts...));
  }
}

}  // namespace block_sparse
