// Run by cmake/cpu_levels.cmake with the flags of a level: 0 if this machine has its instructions.
#include "cpu/supported.h"

int main() { return block_sparse::cpu::supported() ? 0 : 1; }
