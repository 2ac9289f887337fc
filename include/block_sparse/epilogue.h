// Epilogue: what happens to a sum before it is stored. One row per kind.
#pragma once

#include <cstdint>
#include <string_view>

namespace block_sparse {

enum class Epilogue : uint8_t {
  none,  // y = sum
  bias,  // y = sum + bias[out]
};

constexpr std::string_view to_string(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::none:
      return "none";
    case Epilogue::bias:
      return "bias";
  }
  return "?";
}

}  // namespace block_sparse
