// The one way that these tests look at an error: it is an Error, and its message says `needle`.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <string_view>

#include "block_sparse/check.h"

namespace block_sparse {

template <class F>
void expect_error(F&& f, std::string_view needle) {
  try {
    f();
  } catch (const Error& error) {
    EXPECT_NE(std::string_view(error.what()).find(needle), std::string_view::npos)
        << "the message is '" << error.what() << "', without '" << needle << "'";
    return;
  }
  ADD_FAILURE() << "no error; wanted one that says '" << needle << "'";
}

}  // namespace block_sparse
