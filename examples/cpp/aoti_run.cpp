// A model that Python compiled with AOTInductor (docs/serving.md), run without Python:
//   aoti_run model.pt2 input.pt output.pt _C.so        on a GPU then _C_cuda.so
// input.pt is a tensor as torch.save writes it, and so is output.pt.
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The library registers its ops while it is loaded; the compiled model finds them by name. It needs
// the libraries of torch that the program is linked with, and no Python.
void load_ops(const std::string& library) {
  if (dlopen(library.c_str(), RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
}

at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toTensor();
}

void write_tensor(const std::string& path, const at::Tensor& tensor) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() < 4) {
    std::cerr << "usage: aoti_run model.pt2 input.pt output.pt LIBRARY...\n";
    return EXIT_FAILURE;
  }
  try {
    // --8<-- [start:run]
    const c10::InferenceMode no_gradients;
    for (size_t i = 3; i < arguments.size(); ++i) load_ops(arguments[i]);  // before the model
    torch::inductor::AOTIModelPackageLoader model(arguments[0]);
    const std::vector<at::Tensor> outputs = model.run({read_tensor(arguments[1])});
    // --8<-- [end:run]
    write_tensor(arguments[2], outputs.at(0));
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
