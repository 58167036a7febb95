// Calls the native kernels for a test that runs on another CPU. Read from standard input, a call is
//
//   int32 function, int32 bytes of its struct, int32 count, the struct,
//   and for each of `count` pointers: int64 its place in the struct, int64 bytes, int32 whether they come back, the
//   bytes.
//
// The answer on standard output is the function's int32 result and the bytes that come back. Each pointer gets memory
// of its own of just that size, so that a sanitizer sees what is read and written beyond it.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "kvattn.h"

namespace {

enum Function { kAttend, kQuantize, kSelect, kVariant, kLinear };

void get(void *to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(feof(stdin) ? 0 : 1);
}
template <typename T>
T get() {
  T x;
  get(&x, sizeof x);
  return x;
}
void put(const void *from, size_t bytes) {
  if (fwrite(from, 1, bytes, stdout) != bytes) exit(1);
}

struct Memory {
  int64_t bytes;
  bool comes_back;
  std::unique_ptr<char[]> data;
};

int32_t call(int32_t function, const void *arguments) {
  switch (function) {
    case kAttend: return kvattn_attend(static_cast<const kvattn_attend_args *>(arguments));
    case kQuantize: return kvattn_quantize(static_cast<const kvattn_quantize_args *>(arguments));
    case kLinear: return kvattn_linear(static_cast<const kvattn_linear_args *>(arguments));
    case kSelect: return kvattn_select(static_cast<const char *>(arguments));
    case kVariant:
      return static_cast<int32_t>(strlen(strcpy(static_cast<char *>(const_cast<void *>(arguments)), kvattn_variant())));
  }
  exit(2);
}

}  // namespace

int main() {
  for (;;) {
    const auto function = get<int32_t>();
    std::unique_ptr<char[]> arguments;
    const auto bytes = get<int32_t>(), count = get<int32_t>();
    arguments.reset(new char[bytes]);
    get(arguments.get(), bytes);
    std::vector<Memory> memory(count);
    for (Memory &each : memory) {
      const auto place = get<int64_t>();
      each.bytes = get<int64_t>(), each.comes_back = get<int32_t>() != 0;
      each.data.reset(new char[each.bytes]);
      get(each.data.get(), each.bytes);
      const char *p = each.data.get();
      memcpy(arguments.get() + place, &p, sizeof p);
    }
    const int32_t result = call(function, arguments.get());
    put(&result, sizeof result);
    if (function == kVariant) put(arguments.get(), bytes);
    for (const Memory &each : memory)
      if (each.comes_back) put(each.data.get(), each.bytes);
    fflush(stdout);
  }
}
